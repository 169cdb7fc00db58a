"""The rows of figures in README.md, each from a kept run, with the command that makes it."""

from typing import Any

from .. import record
from ..record import PASSES, best, markdown, reading
from .sources import of_machines
from .times import accurate_peers, groups

FEATURED = "flash_attention/shared prompt"


def highlights() -> str:
    """Return the table of figures in README.md: what was measured, the figure, the machine and the command.

    A kind of run that is not kept has no row.
    """
    rows = [
        *of_machines(_kernel),
        *_row("trainers", _trainers),
        *_row("embedding", _embedding),
        *_row("r1", _r1),
    ]
    return markdown(["measured", "figure", "machine", "command"], rows)


def _row(kind: str, make: Any) -> list[list[str]]:
    if (run := record.newest_run(kind)) is None:
        return []
    path, result = run
    with reading(path):
        command = f"[`{command_of(result)}`]({path})"
        return [[*make(result), f"{result['machine']['device']}, one thread", command]]


def command_of(result: dict[str, Any]) -> str:
    """Return the command of a run without the flags that say where its figures are written."""
    words = result["command"].replace("python -m burnish.bench.", "burnish bench ").split()
    return " ".join(word for word in words if word not in ("--keep", "--json"))


def _kernel(path: str, result: dict[str, Any]) -> list[Any]:
    """Return the row of the featured case at its largest shape, or no row if this machine has not measured it."""
    ratios, shape = [], ""
    for (case, shape_of, which), providers in groups(result).items():  # small shapes first
        peers = [best(row)[1] for row in accurate_peers(providers).values()]
        if case == FEATURED and which in PASSES and peers:
            ratio = min(peers) / best(providers["burnish"])[1]
            ratios = [r for r in ratios if r[0] != which] + [(which, ratio)]
            shape = shape_of
    if not ratios or "driver" not in result["machine"]:
        return []

    figures = ", ".join(f"{ratio:.1f}x {which}" for which, ratio in sorted(ratios))
    what = f"attention over a shared prompt beside the fastest of torch, {shape}, bf16"
    command = f"[`burnish bench flash_attention --peers`]({path})"
    return [[what, figures, result["machine"]["device"], command]]


def _trainers(result: dict[str, Any]) -> list[str]:
    ratios = {row["task"].upper(): row["speed_ratio"] for row in result["rows"]}
    what = "tokens a second beside TRL's trainers, same weights, rows and flags"
    return [what, ", ".join(f"{task} {ratio:.1f}x" for task, ratio in ratios.items())]


def _embedding(result: dict[str, Any]) -> list[str]:
    growth = {row["embedded"]: row["growth_bytes"] / 1e6 for row in result["rows"] if row["head_of"] == "TRL"}
    what = "memory that a training step with TRL's head adds, before and after `embed.apply`"
    return [what, f"{growth[False]:,.0f} MB -> {growth[True]:,.0f} MB"]


def _r1(result: dict[str, Any]) -> list[str]:
    stages = {name: score["pass_at_1"] for name, score in result["scores"].items()}
    seconds = result["seconds"] / result["seeds"]
    what = f"DeepSeek-R1's recipe in miniature, {seconds:.0f} s a seed: pass@1 of base, R1-Zero, R1"
    return [what, " -> ".join(f"{stages[name]:.0f} %" for name in ("base", "R1-Zero", "R1"))]
