"""The table of figures in README.md. Each row has the figures of one run in bench/results, and the run's command."""

from typing import Any

from .. import record
from ..record import PASSES, best, markdown, reading
from .sources import command_of, of_machines
from .times import Providers, accurate_peers, groups, inaccurate_peers

SHARED = "flash_attention/shared prompt"


def highlights() -> str:
    """Return the table of figures in README.md: what was measured, the figure, the machine and the command.

    A kind of run without a file in bench/results has no row. A sentence about slower figures stands below the table.
    """
    rows = [
        *of_machines(_kernel),
        *_row("trainers", _trainers),
        *_row("embedding", _embedding),
        *_row("r1", _r1),
    ]
    return markdown(["measured", "figure", "machine", "repeat it with"], rows) + "\n" + losses()


def _row(kind: str, make: Any) -> list[list[str]]:
    if (run := record.newest_run(kind)) is None:
        return []
    path, result = run
    with reading(path):
        command = f"[`{command_of(result)}`]({path})"
        return [[*make(result), f"{result['machine']['device']}, one thread, {result['date']}", command]]


def _kernel(path: str, result: dict[str, Any]) -> list[Any]:
    """Return the row about attention to a shared prompt, at the largest shape. Return no row if it was not measured."""
    passes = of_largest(result, SHARED)
    if not passes:
        return []

    d = next(iter(passes.values()))["burnish"]["dims"]
    answers = (d["T"] - d["P"]) // d["R"]
    figures: list[str] = []
    outside: dict[str, list[str]] = {}
    for which, providers in passes.items():
        ratios = {n: best(row)[1] / best(providers["burnish"])[1] for n, row in providers.items()}
        least = min(ratios[n] for n in accurate_peers(providers))
        figures.append(f"{least:.1f}x {which}")
        for name in inaccurate_peers(providers):
            if ratios[name] < least:
                outside.setdefault(name, []).append(f"{ratios[name]:.1f}x {which}")

    what = (
        f"attention of {answers} answers of {d['R']:,} tokens to one prompt of {d['P']:,}, beside the fastest accurate "
        "attention of torch with the prompt repeated"
    )
    note = "".join(f"; {n}, outside the accuracy rule: {', '.join(each)}" for n, each in outside.items())
    machine = f"{result['machine']['device']}, {result['date']}"
    return [[what, ", ".join(figures) + note, machine, f'[`burnish bench "{SHARED}" --peers`]({path})']]


def losses() -> str:
    """Return a sentence about causal attention for each GPU: our time over that of the fastest accurate peer."""
    return "".join(of_machines(_losses))


def _losses(path: str, result: dict[str, Any]) -> list[str]:
    words, passes = [], of_largest(result, "flash_attention/causal")
    for which, providers in passes.items():
        peers = {n: best(row)[1] for n, row in accurate_peers(providers).items()}
        rival = min(peers, key=lambda n: peers[n])
        words.append(f"{best(providers['burnish'])[1] / peers[rival]:.2f}x as long as {rival} {which}")
    if not words:
        return []

    length = next(iter(passes.values()))["burnish"]["dims"]["T"]
    return [
        f"Plain causal attention of {length:,} tokens took {' and '.join(words)}. The figures of the "
        f"{result['machine']['device']} are of the kernels at commit {result['commit']}, not of later ones.\n"
    ]


def of_largest(result: dict[str, Any], wanted: str) -> dict[str, Providers]:
    """Return pass -> provider -> row for a case at its largest shape, or {} if no GPU has measured the case."""
    passes: dict[str, Providers] = {}
    for (case, _, which), providers in groups(result).items():  # small shapes first
        if case == wanted and accurate_peers(providers) and "driver" in result["machine"]:
            passes[which] = providers
    return {which: passes[which] for which in PASSES if which in passes}


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
