"""Tables about compiled kernels: figures of the machine code on each chip, ranked tiles, and least times by formula.

bench/static.json has the builds: kernels compiled for one chip. Each build is a line of docs/data/static.csv. The
documents show only totals.
"""

import csv
import io
import re
from typing import Any

from ..cases.case import label
from ..cases.registry import CASES
from ..ops.roofline import CHIPS, datasheet
from ..ops.tune import tile_name
from ..record import markdown, newest_results, newest_run, reading
from .sources import of_kept

# the cards that run each chip's builds, and a pattern for them in the name of a machine
CARDS = {
    "sm_80": ("A100", r"\bA100\b"),
    "sm_86": ("RTX 30, RTX 40, A10, L4, L40S", r"\b(RTX [34]0\d\d|A10|L4|L40S)\b"),
    "sm_90": ("H100, H200", r"\bH[12]00\b"),
    "sm_100": ("B200", r"\bB200\b"),
    "sm_120": ("RTX 50, RTX PRO 6000", r"\b(RTX 50\d\d|RTX PRO 6000)\b"),
    "gfx942": ("MI300X", r"\bMI300X\b"),
}


# ---- every build

COLUMNS = (
    *("kernel", "chip", "dtype", "registers", "spills", "stack", "shared", "blocks", "matrix", "matrix_kind"),
    *("load_bits", "asynchronous", "instructions", "exponentials", "overlapped", "stores", "source_stores"),
    *("tile", "ops"),
)


def distinct_builds(accepted: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each distinct build once, with the fields of COLUMNS. Several ops and configurations may share a build."""
    ops: dict[tuple[Any, ...], set[str]] = {}
    for key, builds in accepted["builds"].items():
        case, _, dtype, chip = key.split(" | ")
        for build in builds:
            of = build | {"chip": chip, "dtype": dtype}
            ops.setdefault(tuple(of[name] for name in COLUMNS[:-1]), set()).add(case.split("/")[0])

    lines = [dict(zip(COLUMNS, (*line, " ".join(sorted(names))), strict=True)) for line, names in ops.items()]
    order = ("kernel", "tile", "ops", *COLUMNS)
    return sorted(lines, key=lambda line: [str(line[name]) for name in order])


@of_kept("static.json")
def static_csv(accepted: dict[str, Any]) -> str:
    """Return the text of docs/data/static.csv."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(distinct_builds(accepted))
    return out.getvalue()


@of_kept("static.json")
def static(accepted: dict[str, Any]) -> str:
    """Return the paragraph that names the file of all builds and explains its columns."""
    lines = (
        f"[docs/data/static.csv](data/static.csv), from `bench/static.json`, Triton {accepted['triton']}, has a",
        f"line for each of {len(distinct_builds(accepted)):,} distinct builds. Its columns are: kernel, chip, dtype;",
        "registers per thread, local loads and stores in the code (spills), bytes of stack per thread, bytes of",
        "shared memory per block, resident blocks per multiprocessor; matrix instructions and their kind, bits of",
        "the widest load, asynchronous copies; instructions, exponentials, exponentials that run during a product",
        "(overlapped); stores in the code, stores in the source; the constants that the kernel was compiled with",
        "(tile), and the ops that launch it.",
    )
    return "\n".join(lines) + "\n"


# ---- totals of the builds


def in_bf16(accepted: dict[str, Any]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return op -> chip -> distinct builds in bf16, with the ops in alphabetical order."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for key, builds in accepted["builds"].items():
        case, _, dtype, chip = key.split(" | ")
        if dtype == "bf16":
            of_chip = found.setdefault(case.split("/")[0], {}).setdefault(chip, [])
            of_chip += [build for build in builds if build not in of_chip]
    return dict(sorted(found.items()))


def spilling(builds: list[dict[str, Any]] | None) -> str:
    return f"{sum(b['spills'] > 0 for b in builds)} of {len(builds)}" if builds else "not compiled"


@of_kept("static.json")
def proven(accepted: dict[str, Any]) -> str:
    """Return the table of the number of builds that spill registers, for each op and chip in bf16."""
    rows = []
    for op, chips in in_bf16(accepted).items():
        every = [b for builds in chips.values() for b in builds]
        cells = [spilling(chips.get(c)) for c in CHIPS]
        matrix = "yes" if any(b["matrix"] for b in every) else "no products"
        rows.append([f"`{op}`", str(len({b["kernel"] for b in every})), *cells, matrix])
    head = ["op", "kernels", *(f"spill on {chip.name}" for chip in CHIPS.values()), "matrix instructions"]
    return f"In bf16, Triton {accepted['triton']}, from `bench/static.json`:\n\n{markdown(head, rows)}"


@of_kept("static.json")
def cards(accepted: dict[str, Any]) -> str:
    """Return the table of each op's builds for each kind of card, and of the runs that found the op accurate on one."""
    runs, sources = runs_on_cards()
    rows = []
    for op, chips in in_bf16(accepted).items():
        cells = []
        for chip in CARDS:
            builds, ran = chips.get(chip, []), runs.get((op, chip), {})
            shared = max((b["shared"] for b in builds), default=0) / CHIPS[chip].shared_block
            state = ", ".join(f"run on {card}, {day}" for card, day in ran.items()) or "compiled only"
            cell = f"{spilling(builds)}; {shared:.0%}; {state}"
            cells.append(cell if builds else f"not compiled; {state}" if ran else "not compiled")
        rows.append([f"`{op}`", *cells])

    head = ["op", *(f"{chip}: for {names}" for chip, (names, _) in CARDS.items())]
    notes = (
        f"Builds in bf16, Triton {accepted['triton']}, from `bench/static.json`. A cell gives how many of the builds",
        "spill registers, and the largest shared memory of a build as a share of a block's limit on the chip.",
        '"compiled only" means that the op has passed no run on one of these cards. Otherwise the cell names the card',
        "that ran, and the last day on which `burnish bench` found the op accurate there, as the op was on that day.",
        f"Runs: {'; '.join(sources) or 'none yet'}.",
        "RTX 40, L4 and L40S are sm_89, which has the limits of sm_86. Their builds are those for sm_86.",
    )
    return "\n".join(notes) + f"\n\n{markdown(head, rows)}"


def runs_on_cards() -> tuple[dict[tuple[str, str], dict[str, str]], list[str]]:
    """Return (op, chip) -> card -> the last day on which the op was accurate there, and the sources of the days."""
    runs: dict[tuple[str, str], dict[str, str]] = {}
    sources = []
    for path, result in newest_results().items():
        with reading(path):
            device = result["machine"]["device"]
            found = ((c, re.search(name, device)) for c, (_, name) in CARDS.items())
            chip, card = next(((c, match[0]) for c, match in found if match), ("", ""))
            if not chip:
                continue
            sources.append(f"{device} at commit {result['commit']}, `{path}`")
            for row in result["rows"]:
                if row["provider"] == "burnish" and row["accurate"]:
                    days = runs.setdefault((row["case"].split("/")[0], chip), {})
                    days[card] = max(days.get(card, ""), result["date"])
    return runs, sources


# ---- tiles


@of_kept("candidates.json")
def candidates(accepted: dict[str, Any]) -> str:
    """Return the table of candidate tiles, with a line for each entry of a tile table.

    A line has the best two tiles by tune.py's ranking, and the rank of the shipped tile. If `burnish bench tune` has
    timed the candidates, the line has the fastest tile, too.
    """
    times, sources = times_of_tiles()
    rows = []
    for key, ranked in accepted["entries"].items():
        entry, width, chip = key.split(" | ")
        cells = [f"{tile_name(c['tile'])} ({c['registers']}, {c['blocks']})" for c in ranked]
        place = next(n for n, c in enumerate(ranked) if c["shipped"])

        # the mean over shapes
        means = {tile: sum(shares) / len(shares) for tile, shares in times.get(key, {}).items()}
        fastest = min(means, key=lambda tile: means[tile], default=None)
        timed = f"{fastest}: {means[fastest]:.3f}" if fastest else "not timed"
        best_two = (cells + [""])[:2]
        rows.append([f"`{entry}`", width, chip, *best_two, f"{place + 1}: {cells[place]}", timed])

    head = ["entry", "row", "chip", "first", "second", "shipped", "fastest candidate, time over shipped"]
    source = f"From `bench/candidates.json`, Triton {accepted['triton']}, bf16"
    untimed = "`burnish bench tune` has not timed the candidates on a GPU yet"
    timed = f"`burnish bench tune` has timed candidates on {', '.join(sources)}" if sources else untimed
    return f"{source}. {timed}.\n\n{markdown(head, rows)}"


def times_of_tiles() -> tuple[dict[str, dict[str, list[float]]], list[str]]:
    """Return entry -> tile -> ratios of its times to the shipped tile's, and the GPUs and files of the times."""
    times: dict[str, dict[str, list[float]]] = {}
    sources = []
    for chip in CHIPS:
        if run := newest_run(f"tune-{chip}"):
            with reading(run[0]):
                sources.append(f"{run[1]['machine']['device']} from `{run[0]}`")
                for row in run[1]["rows"]:
                    if "us" in row:
                        by_tile = times.setdefault(row["entry"], {})
                        by_tile.setdefault(tile_name(row["tile"]), []).append(row["us"] / row["shipped_us"])
    return times, sources


# ---- floors


def floors() -> str:
    """Return the table of floors (least times) for the last benchmark shape of each case in bf16.

    A floor is bytes over bandwidth or operations over rate, whichever is longer.
    """
    rows = []
    for case in CASES:
        if not case.bench.get("cuda"):
            continue
        dims = case.bench["cuda"][-1]
        forward, backward = case.work(dims, 2)
        times = []
        for chip in CHIPS.values():
            top = datasheet(chip, "bf16")
            times.append(f"{top.floor(forward) * 1e6:.4g} / {top.floor(backward) * 1e6:.4g}")

        binds = datasheet(CHIPS["sm_90"], "bf16").binds(forward)
        rows.append([f"`{case.name}`", case.formula, label(dims), binds, *times])
    head = ["case", "work, forward; backward", "shape", "bound by", *(chip.name for chip in CHIPS.values())]
    return (
        "Floors in microseconds, forward / backward, in bf16, by the datasheet of each chip.\n\n"
        + markdown(head, rows)
    )
