"""The tables of runs other than those of single ops: trainers, rollouts, embedding, conformance and `burnish r1`."""

from pathlib import Path
from typing import Any

from ...model.errors import InputError
from ...model.files.text_files import read_object
from .. import record
from ..record import markdown, newest_run, reading
from .sources import NO_RUN, of_run, whence


@of_run("trainers")
def trainers(path: str, result: dict[str, Any]) -> str:
    """Return the table of the newest run of `burnish bench trainers`."""
    rows = []
    for row in result["rows"]:
        ours, theirs = row["burnish"], row["trl"]
        difference = row.get("loss_difference")
        cells = [
            f"`{row['task']}`",
            f"{ours['tokens_per_second']:,.0f} / {theirs['tokens_per_second']:,.0f}",
            interval(row["speed_ratio"], row["speed_ratios"]),
            interval(row["cpu_ratio"], row["cpu_ratios"]),
            f"{ours['growth_bytes'] / 1e6:,.0f} / {theirs['growth_bytes'] / 1e6:,.0f} MB",
            f"{row['growth_ratio']:.2f}x",
            f"{ours['import_seconds']:.1f} / {theirs['import_seconds']:.1f} s",
            "" if difference is None else f"{difference:.0e}",
        ]
        rows.append(cells)

    m = result["machine"]
    facts = f"{m['device']}, one thread, torch {m['torch']}, trl {m['trl']}, transformers {m['transformers']}"
    head = (
        *("trainer", "tokens/s, ours / TRL", "ratio", "CPU-time ratio", "memory growth", "ratio", "import"),
        "losses differ by",
    )
    rounds = f"medians of {result['rows'][0]['rounds']} rounds"
    return f"{facts}. {whence(path, result)}; {rounds}.\n\n{markdown(head, rows)}"


@of_run("embedding")
def embedding(path: str, result: dict[str, Any]) -> str:
    """Return the table of the newest run of `burnish bench embedding`."""
    from ..runs.embedding import table

    m = result["machine"]
    facts = f"{m['device']}, one thread, torch {m['torch']}, trl {m['trl']}, transformers {m['transformers']}"
    return (
        f"{facts}. {whence(path, result)}; medians of {result['rounds']} rounds.\n\n{table(result['rows'])}"
    )


def interval(ratio: float, ratios: list[float]) -> str:
    """Return a ratio as text, with the lowest and the highest of the rounds' ratios in brackets."""
    return f"{ratio:.2f}x [{min(ratios):.2f}, {max(ratios):.2f}]"


def rollouts() -> str:
    """Return the tables of `burnish bench rollouts`: the newest run on a GPU, then the newest run on a CPU."""
    runs = [run for kind in ("gpu-rollouts", "rollouts") if (run := newest_run(kind)) is not None]
    parts = []
    for path, result in runs:
        with reading(path):
            parts.append(_rollouts(path, result))
    return "\n\n".join(parts) or NO_RUN


def _rollouts(path: str, result: dict[str, Any]) -> str:
    m = result["machine"]
    threads = "" if "driver" in m else ", one thread"
    facts = f"{m['device']}{threads}, torch {m['torch']}, transformers {m['transformers']}"

    rows = []
    for row in result["rows"]:
        ours, theirs = (row["tokens_per_second"][side] for side in ("burnish", "transformers"))
        cells = [
            row["model"],
            row["work"],
            f"{ours:,.0f} / {theirs:,.0f}",
            interval(row["ratio"], row["ratios"]),
            f"{row['cache_bytes'] / 1e6:.1f} / {row['copied_cache_bytes'] / 1e6:.1f} MB",
            f"{row['same_greedy_answers']:.0%}",
        ]
        rows.append(cells)

    head = (
        *("model", "work", "tokens/s, ours / theirs", "ratio", "cache, shared / copied"),
        "same greedy answers",
    )
    rounds = f"medians of {result['rows'][0]['rounds']} rounds"
    return f"{facts}. {whence(path, result)}; {rounds}.\n\n{markdown(head, rows)}"


@of_run("conformance")
def conformance(path: str, result: dict[str, Any]) -> str:
    """Return the table of the newest run of `burnish bench conformance`."""
    try:
        from ..runs.conformance import CHECKS  # it needs tokenizers, which a GPU machine may lack
    except ModuleNotFoundError as error:
        reason = f"the conformance checks need {error.name}, which is not installed: pip install {error.name}"
        raise InputError(reason) from error

    names = [f"{trainer['name']} {trainer['version']}" for trainer in result["trainers"]]
    rows, notes = [], []
    for check, (_, statement, _) in CHECKS.items():
        cells = []
        for name, trainer in zip(names, result["trainers"], strict=True):
            status, detail = trainer["outcomes"].get(check, ("not run", ""))
            if detail:
                notes.append(f"{len(notes) + 1}. {name}, {check}: {detail}")
                status += f" ({len(notes)})"
            cells.append(status)
        rows.append([check, statement.replace("|", "\\|"), *cells])

    table = markdown(["check", "statement", *names], rows)
    return "\n".join([f"{whence(path, result)}.\n", table, *notes, ""])


@of_run("r1")
def r1(path: str, result: dict[str, Any]) -> str:
    """Return the table of the newest run of `burnish r1` in bench/results."""
    rows = [
        [stage, *("" if value is None else f"{value:.1f}" for name, value in score.items() if name != "form")]
        for stage, score in result["scores"].items()
    ]
    head = ["stage", "pass@1", "majority vote", "greedy", "DeepSeek's pass@1, AIME 2024"]
    seeds = f", medians of {result['seeds']} seeds" if result["seeds"] > 1 else ", one seed"
    source = (
        f"Percent of 200 held-out problems{seeds}; `{result['command']}` at commit {result['commit']}, "
        f"{result['date']}, "
        f"{result['machine']['device']}, from `{path}`. The published column is of another task: compare the trend.\n"
    )
    return markdown(head, rows) + "\n" + source


def keep_r1(folder: Path) -> None:
    """Copy the figures of a run of `burnish r1` to bench/results."""
    figures = read_object(folder / "figures.json")
    with reading(folder / "figures.json"):
        command = "burnish r1" + (f" --seeds {figures['seeds']}" if figures["seeds"] > 1 else "")
    record.keep("r1", command, machine=record.machine("cpu"), **figures)
