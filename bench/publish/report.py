"""Tables and pictures from measured and accepted figures; no number in README or docs is typed by hand.

    python -m burnish.bench report [--check] [--keep-r1 RUN]

A Markdown file asks for a table by a pair of marks, between which everything is generated:

    <!-- generated: speed -->
    <!-- /generated -->

speed is the newest file of bench/results for each machine, static is bench/static.json, cards is that beside what
bench/results has of each card, candidates is bench/candidates.json, floors are the registry's formulas on the
datasheets of roofline.py, pictures are those in docs/pictures, drawn from the same. trainers, conformance and r1
are the newest runs of that kind in bench/results; --keep-r1 puts one of `burnish r1` there. loads is the table of
architectures of model/files/architectures.py.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...algorithms.run.streams import run_program
from ...model.files.architectures import loadable
from ...model.files.text_files import read_object
from .. import record
from ..cases.case import label
from ..cases.registry import CASES
from ..ops.paths import table as paths
from ..ops.roofline import CHIPS, datasheet
from ..ops.static import COLUMNS, static_row
from ..ops.tune import tile_name
from ..record import PASSES, as_command, best, markdown, newest_results, newest_run, reading, write_whole
from ..runs.conformance import CHECKS
from .pictures import pictures

DOCUMENTS = (record.ROOT / "README.md", *sorted((record.ROOT / "docs").glob("*.md")))
MARK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- /generated -->)", re.DOTALL)
# the cards that take each chip's builds, and how a machine's name tells that it has one
CARDS = {
    "sm_80": ("A100", r"\bA100\b"),
    "sm_86": ("RTX 30, RTX 40, A10, L4, L40S", r"\b(RTX [34]0\d\d|A10|L4|L40S)\b"),
    "sm_90": ("H100, H200", r"\bH[12]00\b"),
    "sm_100": ("B200", r"\bB200\b"),
    "sm_120": ("RTX 50, RTX PRO 6000", r"\b(RTX 50\d\d|RTX PRO 6000)\b"),
    "gfx942": ("MI300X", r"\bMI300X\b"),
}
NO_RUN = "No run is kept in `bench/results` yet.\n"


# ---- what is read


def of_run(kind: str) -> Callable[[Callable[[str, dict[str, Any]], str]], Callable[[], str]]:
    """A section from the newest run of a kind: make(path, result)."""

    def section(make: Callable[[str, dict[str, Any]], str]) -> Callable[[], str]:
        def made() -> str:
            if (run := newest_run(kind)) is None:
                return NO_RUN
            with reading(run[0]):
                return make(*run)

        return made

    return section


def of_kept(name: str) -> Callable[[Callable[[dict[str, Any]], str]], Callable[[], str]]:
    """A section from a file of bench/."""

    def section(make: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
        def made() -> str:
            file = record.ROOT / "bench" / name
            accepted = read_object(file)
            with reading(file):
                return make(accepted)

        return made

    return section


def of_machines(make: Callable[[str, dict[str, Any]], list[str]]) -> list[str]:
    """The parts that make(path, result) makes of each machine's newest results."""
    parts = []
    for path, result in newest_results().items():
        with reading(path):
            parts += make(path, result)
    return parts


# ---- what was measured


def groups(result: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, dict[str, Any]]]:
    """(case, shape, pass) -> provider -> row; the cases in the order of the run, small shapes first."""
    grouped: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    cases = list(dict.fromkeys(row["case"] for row in result["rows"]))
    for row in sorted(result["rows"], key=lambda r: (cases.index(r["case"]), r["pass"], r["floor_us"])):
        grouped.setdefault((row["case"], label(row["dims"]), row["pass"]), {})[row["provider"]] = row
    return grouped


def accurate_peers(providers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those that hold to the accuracy rule: one that computes something else is no contestant."""
    return {n: r for n, r in providers.items() if not n.startswith(("burnish", "eager")) and r["accurate"]}


def whence(path: str, result: dict[str, Any]) -> str:
    return f"`{result['command']}` at commit {result['commit']}, {result['date']}, from `{path}`"


def speed() -> str:
    return "\n".join(p for p in of_machines(_speed) if p) or "No results yet.\n"


def _speed(path: str, result: dict[str, Any]) -> list[str]:
    parts = []
    m, c = result["machine"], result["ceilings"]
    facts = f"{m['device']}, torch {m['torch']}, Triton {m['triton']}"
    facts += (
        f", driver {m['driver']}" if "driver" in m else f", {m['threads']} thread{'s' * (m['threads'] > 1)}"
    )
    bandwidth, rate = c["bandwidth_bytes_per_s"] / 1e12, c["rate_per_s"] / 1e12
    parts.append(
        f"{facts}; a copy reached {bandwidth:.3g} TB/s, a {c['dtype']} product {rate:.3g} TFLOP/s. "
        f"{whence(path, result)}. "
        f"Times are p50 [p20, p80] in microseconds, {'device' if 'driver' in m else 'host'} clock.\n"
    )
    rows = []
    for (case, shape, which), providers in groups(result).items():
        ours, eager = providers["burnish"], providers.get("eager")  # eager may run out of memory
        peers = accurate_peers(providers)
        rival = min(peers, key=lambda n: best(peers[n])[1], default=None)
        p20, p50, p80 = best(ours)
        rows.append(
            [
                f"`{case}`",
                shape,
                which,
                f"{p50:.4g} [{p20:.4g}, {p80:.4g}]",
                f"{best(eager)[1]:.4g}" if eager else "out of memory",
                f"{best(peers[rival])[1]:.4g} ({rival})" if rival else "",
                f"{best(eager)[1] / p50:.2f}x" if eager else "",
                f"{ours['share']:.0%}",
                f"{ours['memory_bytes'] / 1e6:.4g}"
                + (f" / {eager['memory_bytes'] / 1e6:.4g}" if eager else ""),
            ]
        )
    head = (
        *("case", "shape", "pass", "burnish", "eager", "fastest peer", "over eager", "of roofline"),
        "MB ours / eager",
    )
    parts.append(markdown(head, rows))
    absent = [f"{what}: {why}" for what, why in result["absent"].items()]
    parts.append(f"Not measured: {'; '.join(absent)}.\n" if absent else "")
    return parts


def headlines() -> str:
    """The largest shape of each case, beside the fastest peer; the whole table is `speed`."""
    return "\n".join(of_machines(_headlines)) or "No results yet.\n"


def _headlines(path: str, result: dict[str, Any]) -> list[str]:
    parts = []
    largest: dict[str, dict[str, tuple[str, dict[str, dict[str, Any]]]]] = {}
    for (case, shape, which), providers in groups(result).items():  # small shapes first
        largest.setdefault(case, {})[which] = (shape, providers)
    rows = []
    for case, passes in largest.items():
        cells = [cell for which in PASSES for cell in headline(passes.get(which))]
        rows.append([f"`{case}`", passes["forward"][0], *cells])
    head = ["case", "shape", *(name for which in PASSES for name in (which, "fastest peer"))]
    parts.append(f"{result['machine']['device']}, {result['date']}, from `{path}`:\n")
    parts.append(markdown(head, rows))
    return parts


def headline(measured: tuple[str, dict[str, dict[str, Any]]] | None) -> tuple[str, str]:
    """Time with its share of the roofline, and how many times as long the fastest peer takes."""
    if measured is None:
        return "", ""
    _, providers = measured
    peers = {name: best(row)[1] for name, row in accurate_peers(providers).items()}
    rival = min(peers, key=lambda name: peers[name], default=None)
    ours = best(providers["burnish"])[1]
    time = f"{ours / 1e3:.3g} ms" if ours >= 1e3 else f"{ours:.3g} us"
    return (
        f"{time}, {providers['burnish']['share']:.0%}",
        f"{peers[rival] / ours:.2f}x {rival}" if rival else "",
    )


# ---- what holds without a measurement


@of_kept("static.json")
def static(accepted: dict[str, Any]) -> str:
    rows: dict[tuple[str, ...], None] = {}
    for key, builds in accepted["builds"].items():
        for b in builds:
            rows[static_row(key, b)] = None
    source = (
        f"From `bench/static.json`, Triton {accepted['triton']}. Bytes of shared memory, bits of a load.\n\n"
    )
    return source + markdown(COLUMNS, [[f"`{r[0]}`", *r[1:]] for r in sorted(rows)])


def in_bf16(accepted: dict[str, Any]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """op -> chip -> its distinct builds, by op in the order of the alphabet."""
    found: dict[str, dict[str, dict[tuple[str, ...], dict[str, Any]]]] = {}
    for key, builds in accepted["builds"].items():
        case, _, dtype, chip = key.split(" | ")
        if dtype == "bf16":
            of_chip = found.setdefault(case.split("/")[0], {}).setdefault(chip, {})
            of_chip.update({static_row(key, b): b for b in builds})
    return {op: {c: list(b.values()) for c, b in chips.items()} for op, chips in sorted(found.items())}


def spilling(builds: list[dict[str, Any]] | None) -> str:
    return f"{sum(b['spills'] > 0 for b in builds)} of {len(builds)}" if builds else "not compiled"


@of_kept("static.json")
def proven(accepted: dict[str, Any]) -> str:
    """Each op in one line: how many of its configurations spill in bf16 on each chip; the whole table is `static`."""
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
    """What is proven of each op on each card, and how: by its builds, by a run, or not at all."""
    runs, sources = {}, []
    for path, result in newest_results().items():
        with reading(path):
            device = result["machine"]["device"]
            chip = next((c for c, (_, name) in CARDS.items() if re.search(name, device)), None)
            if chip is not None:
                sources.append(f"{device} at commit {result['commit']}, `{path}`")
                passed = [r for r in result["rows"] if r["provider"] == "burnish" and r["accurate"]]
                runs |= {(row["case"].split("/")[0], chip): result["date"] for row in passed}
    rows = []
    for op, chips in in_bf16(accepted).items():
        cells = []
        for chip in CARDS:
            builds, ran = chips.get(chip, []), runs.get((op, chip))
            shared = max((b["shared"] for b in builds), default=0) / CHIPS[chip].shared_block
            cell = f"{spilling(builds)}; {shared:.0%}" if builds else "not compiled"
            cells.append(f"{cell}; **run {ran}**" if ran else cell)
        rows.append([f"`{op}`", *cells])
    head = ["op", *(f"{names} ({chip})" for chip, (names, _) in CARDS.items())]
    notes = (
        f"In bf16, Triton {accepted['triton']}, from `bench/static.json`: how many builds spill; the most shared",
        "memory of one, as a share of what a block may have on the card. In bold when `python -m burnish.bench`",
        f"last ran the op there, as it was then, and found it accurate: {'; '.join(sources) or 'nowhere yet'}.",
        "RTX 40, L4 and L40S are sm_89, which has sm_86's limits: compiled for the one, not for the other.",
    )
    return "\n".join(notes) + f"\n\n{markdown(head, rows)}"


@of_kept("candidates.json")
def candidates(accepted: dict[str, Any]) -> str:
    """The best tiles of each entry by tune.py's ranking, the place of the shipped one, and the fastest where timed."""
    # entry -> tile -> its time over the shipped one's, by shape
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
    rows = []
    for key, ranked in accepted["entries"].items():
        entry, width, chip = key.split(" | ")
        cells = [f"{tile_name(c['tile'])} ({c['registers']}, {c['blocks']})" for c in ranked]
        place = next(n for n, c in enumerate(ranked) if c["shipped"])
        means = {tile: sum(shares) / len(shares) for tile, shares in times.get(key, {}).items()}
        fastest = min(means, key=lambda tile: means[tile], default=None)
        timed = f"{fastest}: {means[fastest]:.3f}" if fastest else "not timed"
        best_two = (cells + [""])[:2]
        rows.append([f"`{entry}`", width, chip, *best_two, f"{place + 1}: {cells[place]}", timed])
    head = ["entry", "row", "chip", "first", "second", "shipped", "fastest, over shipped"]
    source = f"From `bench/candidates.json`, Triton {accepted['triton']}, bf16"
    return f"{source}; timed on {', '.join(sources) or 'no GPU yet'}.\n\n{markdown(head, rows)}"


def floors() -> str:
    """Bytes over bandwidth or operations over rate, whichever is longer, for the largest benchmark shape in bf16."""
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
    head = ["case", "elements", "shape", "binds", *(chip.name for chip in CHIPS.values())]
    return "Forward / backward in microseconds, bf16, on the datasheet chip.\n\n" + markdown(head, rows)


# ---- whole runs


@of_run("trainers")
def trainers(path: str, result: dict[str, Any]) -> str:
    """The newest run of trainers.py."""
    m = result["machine"]
    facts = f"{m['device']}, one thread, torch {m['torch']}, trl {m['trl']}, transformers {m['transformers']}"
    rows = []
    for row in result["rows"]:
        ours, theirs = row["burnish"], row["trl"]
        difference = row.get("loss_difference")
        rows.append(
            [
                f"`{row['task']}`",
                f"{ours['tokens_per_second']:,.0f} / {theirs['tokens_per_second']:,.0f}",
                *(
                    f"{row[ratio]:.2f}x [{min(row[ratio + 's']):.2f}, {max(row[ratio + 's']):.2f}]"
                    for ratio in ("speed_ratio", "cpu_ratio")
                ),
                f"{ours['growth_bytes'] / 1e6:,.0f} / {theirs['growth_bytes'] / 1e6:,.0f} MB",
                f"{row['growth_ratio']:.2f}x",
                f"{ours['import_seconds']:.1f} / {theirs['import_seconds']:.1f} s",
                "" if difference is None else f"{difference:.0e}",
            ]
        )
    head = (
        *("trainer", "tokens/s, ours / TRL", "ratio", "by CPU time", "memory growth", "ratio", "import"),
        "losses differ by",
    )
    rounds = f"medians of {result['rows'][0]['rounds']} rounds"
    return f"{facts}. {whence(path, result)}; {rounds}.\n\n{markdown(head, rows)}"


def rollouts() -> str:
    """The newest runs of rollouts.py: a GPU's, where there is one, and a CPU's."""
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
        rows.append(
            [
                row["model"],
                row["work"],
                f"{ours:,.0f} / {theirs:,.0f}",
                f"{row['ratio']:.2f}x [{min(row['ratios']):.2f}, {max(row['ratios']):.2f}]",
                f"{row['cache_bytes'] / 1e6:.1f} / {row['copied_cache_bytes'] / 1e6:.1f} MB",
                f"{row['same_greedy_answers']:.0%}",
            ]
        )
    head = (
        "model",
        "work",
        "tokens/s, ours / theirs",
        "ratio",
        "cache, shared / copied",
        "same greedy answers",
    )
    rounds = f"medians of {result['rows'][0]['rounds']} rounds"
    return f"{facts}. {whence(path, result)}; {rounds}.\n\n{markdown(head, rows)}"


@of_run("conformance")
def conformance(path: str, result: dict[str, Any]) -> str:
    """The newest run of conformance.py."""
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
    return "\n".join(
        [f"{whence(path, result)}.\n", markdown(["check", "statement", *names], rows), *notes, ""]
    )


@of_run("r1")
def r1(path: str, result: dict[str, Any]) -> str:
    """The newest kept run of `burnish r1`."""
    rows = [
        [stage, *("" if value is None else f"{value:.1f}" for name, value in score.items() if name != "form")]
        for stage, score in result["scores"].items()
    ]
    head = ["stage", "pass@1", "majority vote", "greedy", "DeepSeek's pass@1, AIME 2024"]
    seeds = f", medians of {result['seeds']} seeds" if result["seeds"] > 1 else ", one seed"
    source = (
        f"Percent of 200 held-out problems{seeds}; `{result['command']}` at commit {result['commit']}, "
        f"{result['date']}, "
        f"{result['machine']['device']}, from `{path}`. The published column is another task: its shape is the point.\n"
    )
    return markdown(head, rows) + "\n" + source


def keep_r1(folder: Path) -> None:
    """Copy a run's figures to bench/results."""
    figures = read_object(folder / "figures.json")
    with reading(folder / "figures.json"):
        command = "burnish r1" + (f" --seeds {figures['seeds']}" if figures["seeds"] > 1 else "")
    record.keep("r1", command, machine=record.machine("cpu"), **figures)


def loads() -> str:
    """The architectures whose folders are read and written."""
    rows = [[f"`{name}`", f"`{class_name}`", special] for name, class_name, special in loadable()]
    return markdown(["`model_type`", "class in transformers", "what sets it apart"], rows)


def gallery() -> str:
    """Every picture, for a document in docs/."""
    return "\n".join(f"![{p.path.stem}](pictures/{p.path.name})" for p in pictures()) + "\n"


# ---- documents

SECTIONS: dict[str, Callable[[], str]] = {
    "paths": paths,
    "rollouts": rollouts,
    "r1": r1,
    "trainers": trainers,
    "conformance": conformance,
    "headlines": headlines,
    "proven": proven,
    "speed": speed,
    "static": static,
    "cards": cards,
    "candidates": candidates,
    "floors": floors,
    "pictures": gallery,
    "loads": loads,
}


def fill(text: str) -> str:
    """The document with every generated part made anew."""

    def make(match: re.Match[str]) -> str:
        if match[2] not in SECTIONS:
            raise ValueError(f"generated: expected one of {sorted(SECTIONS)}, got {match[2]}")
        return f"{match[1]}\n{SECTIONS[match[2]]()}\n{match[3]}"

    return MARK.sub(make, text)


# ---- command


def stale() -> list[str]:
    """Which generated parts differ from their sources."""
    late = [
        str(p.relative_to(record.ROOT))
        for p in DOCUMENTS
        if p.exists() and fill(p.read_text()) != p.read_text()
    ]
    for picture in pictures():
        if not picture.path.exists() or picture.stamp not in picture.path.read_text():
            late.append(str(picture.path.relative_to(record.ROOT)))
    return late


@as_command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m burnish.bench report", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; status 1 and a list where a part is stale"
    )
    parser.add_argument("--keep-r1", type=Path, metavar="RUN", help="the folder of a run of `burnish r1`")
    args = parser.parse_args(argv)
    if args.keep_r1:
        keep_r1(args.keep_r1)
    if args.check:
        late = stale()
        print("\n".join(f"stale: {name}" for name in late), file=sys.stderr)
        return 1 if late else 0
    for path in DOCUMENTS:
        if path.exists():
            write_whole(path, fill(path.read_text()))
    for picture in pictures():
        with reading(picture.source):
            drawn = picture.draw()
        write_whole(picture.path, f"{drawn}{picture.stamp}\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_program("python -m burnish.bench report", main))
