"""Candidate tiles for each op, ranked by their machine code and, on a GPU, timed beside the shipped tiles.

    burnish bench tune [op ...] [--keep] [--json FILE] [--budget SECONDS]
    burnish bench tune [op ...] [--chip CHIP] [--search [--accept]]

--search compiles a grid of tiles for every entry of an op's tile table, and ranks them. Each criterion orders the tiles
that are equal by the criteria before it:

    1. the tile fits the chip, and spills in none of the calls that use it
    2. the chip's own matrix instructions
    3. two blocks on a multiprocessor, so that one multiplies while the other computes exponentials
    4. eight resident warps
    5. more (query, key) pairs in a step, and so fewer steps
    6. a larger side in the kernel's loop, whose matrix instructions are wider
    7. more pipeline stages

--accept keeps the best tiles and the shipped tile in bench/candidates.json.

Without a GPU the ranking in this file is printed. On a GPU its tiles are compiled again by the installed Triton. A tile
that does not spill must pass the accuracy rule. Then only the kernel that uses the tile is timed, as a replayed graph
of its launches. It takes turns with the same kernel in the shipped tile (A B A B). Rows are written as they come, so
that an interrupted run keeps them.
"""

import datetime
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from importlib import import_module
from math import inf
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import torch

from ...algorithms.run.flags import POSITIONAL, Count, Limit
from ...kernels import _chip
from ...kernels._triton import expect_triton, triton
from ...model.errors import InputError
from ..cases.case import Case, assert_accurate, label, make_inputs, make_upstream, run
from ..flags import spelled
from ..record import RESULTS, ROOT, clocks, kept_part, machine, reading, run_text, write_whole
from . import static
from .clocks import capture, event_seconds, host_seconds
from .contest import ROUNDS, call, prepare
from .machine_code import Build, read_build
from .slots import OWN, SLOTS, WIDTHS, Slot, Tile, case_of

KEPT = ROOT / "bench" / "candidates.json"
KEEP = 6  # tiles of each entry that fit and do not spill
PROCESSES = min(8, os.cpu_count() or 1)


# ---- ranked


def examine(
    slot: Slot, chip: str, width: int, tile: Tile, cases: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Compile a tile, and return figures of its machine code: the worst figures over all Cases that use the tile.

    The remaining Cases are skipped after a Case in which the tile spills.
    """
    builds: list[Build] = []
    for case in map(case_of, cases or slot.cases):
        dims = next(d for d in case.configurations if d["D"] == width)
        tensors = make_inputs(case, dims, torch.bfloat16, "cpu")
        with slot.placed(slot, tile), static.compile_only(chip, slot.kernel) as launches:
            run(case.fused, case, tensors, make_upstream(case, tensors))
        builds.append(read_build(launches[-1], chip))
        if builds[-1].spills or builds[-1].stack:
            break

    worst = {
        name: max(getattr(b, name) for b in builds) for name in ("registers", "spills", "stack", "shared")
    }
    kinds = "/".join(sorted({b.matrix_kind for b in builds}))
    return {"tile": list(tile), **worst, "blocks": min(b.blocks for b in builds), "matrix": kinds}


def sound(c: dict[str, Any]) -> bool:
    return c["blocks"] >= 1 and not c["spills"] and not c["stack"]


def rank(slot: Slot, chip: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the candidates sorted by the criteria in this module's docstring, the best first."""

    def order(c: dict[str, Any]) -> tuple[Any, ...]:
        *sides, warps, stages = c["tile"]
        resident, walked = sides[slot.resident], sides[1 - slot.resident]
        failing = (c["blocks"] < 1, c["spills"], c["stack"], c["matrix"] != OWN[chip])
        return (
            *failing,
            -min(c["blocks"], 2),
            -min(c["blocks"] * warps, 8),
            -resident * walked,
            -walked,
            -stages,
        )

    return sorted(found, key=order)


def search(job: tuple[str, str, str, int]) -> tuple[str, list[dict[str, Any]]]:
    """Return the key of a table entry and the ranking of its tiles.

    All tiles of the grid are compiled for the first Case that uses the entry, with two stages. The best tiles are then
    compiled for all Cases that use the entry, with three stages and with two.
    """
    op, name, chip, width = job
    slot = next(s for s in SLOTS if (s.op, s.name) == (op, name))
    shipped = slot.shipped(slot, chip, width)

    first = [examine(slot, chip, width, tile, slot.cases[:1]) for tile in slot.grid(slot, chip, width)]
    tiles = [shipped] + [
        (*c["tile"][:-1], stages) for c in rank(slot, chip, first) if sound(c) for stages in (3, 2)
    ]

    found: list[dict[str, Any]] = []
    for tile in dict.fromkeys(tiles):
        if sum(map(sound, found)) < KEEP:
            found.append(examine(slot, chip, width, tile))
    ranked = rank(slot, chip, found)
    return slot.key(chip, width), [c | {"shipped": tuple(c["tile"]) == shipped} for c in ranked]


# ---- timed


class _Watch:
    """A stand-in for a kernel in its module. It records each launch, so that the launch can be repeated."""

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self.launches: list[Callable[[], Any]] = []

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            self.launches.append(lambda: self.kernel[grid](*args, **kwargs))
            return self.launches[-1]()

        return launch


def launches(slot: Slot, tile: Tile, case: Case, inputs: Any) -> list[Callable[[], Any]]:
    """Return the launches of the tuned kernel in one training call that uses this tile."""
    module = import_module(slot.module)
    watch = _Watch(getattr(module, slot.kernel))
    setattr(module, slot.kernel, watch)
    try:
        with slot.placed(slot, tile):
            call(case.fused, case, inputs, backward=True)
    finally:
        setattr(module, slot.kernel, watch.kernel)
    return watch.launches


def beside(
    ours: list[Callable[[], Any]], theirs: list[Callable[[], Any]], device: str
) -> tuple[float, float]:
    """Time two lists of launches in turns, on a GPU as replayed CUDA graphs. Return the median seconds of each."""
    sides = ours, theirs
    if device == "cuda":
        graphs = [capture(side) for side in sides]
        timers = [lambda g=g: event_seconds(g.replay) for g in graphs]
    else:
        timers = [
            lambda side=side: host_seconds(lambda: [launch() for launch in side], device) for side in sides
        ]

    samples = [[timer() for timer in timers] for _ in range(2 * ROUNDS)]
    one, other = (median(column) for column in zip(*samples, strict=True))
    return one, other


def measure(
    slot: Slot, width: int, tiles: list[Tile], shipped: Tile, dtype: torch.dtype, device: str
) -> Iterator[dict[str, Any]]:
    """Yield a row for each tile and shape. A tile that is inaccurate or raises an error is not timed any further."""
    passed: set[tuple[Tile, str]] = set()
    refused: dict[Tile, str] = {}
    for case, dims in slot.timed(slot, width):
        torch.manual_seed(0)
        inputs = prepare(case, dims, dtype, device)
        checked = make_inputs(case, case.check(dims), dtype, device)
        base = launches(slot, shipped, case, inputs)

        for tile in tiles:
            row = {"slot": slot.name, "case": case.name, "dims": dims, "tile": list(tile)}
            try:
                if tile not in refused:
                    if (tile, case.name) not in passed:
                        with slot.placed(slot, tile):
                            assert_accurate(case, checked)
                        passed.add((tile, case.name))
                    seconds, against = beside(launches(slot, tile, case, inputs), base, device)
                    row |= {"us": round(1e6 * seconds, 2), "shipped_us": round(1e6 * against, 2)}

            except Exception as error:  # the other tiles are still timed
                refused[tile] = f"{type(error).__name__}: {error}".splitlines()[0]
            yield row | {"shipped": tile == shipped} | ({"refused": refused[tile]} if tile in refused else {})


# ---- output


def kept() -> dict[str, list[dict[str, Any]]]:
    return kept_part(KEPT, "entries")


def keep(entries: dict[str, list[dict[str, Any]]]) -> None:
    """Write entries to bench/candidates.json, one line for each candidate. All other entries stay as they are."""
    whole = dict(sorted((kept() | entries).items()))
    text = ",\n".join(
        f" {json.dumps(key)}: [\n  " + ",\n  ".join(map(json.dumps, ranked)) + "\n ]"
        for key, ranked in whole.items()
    )
    write_whole(KEPT, f'{{"triton": "{triton.__version__}", "entries": {{\n{text}\n}}}}\n')


def tile_name(tile: Tile) -> str:
    """Return a tile as text: (64, 128, 4, 3) gives "64x128 w4 s3", which has 4 warps and 3 stages."""
    *sides, warps, stages = tile
    return f"{'x'.join(map(str, sides))} w{warps} s{stages}"


def print_ranking(key: str, ranked: list[dict[str, Any]]) -> None:
    print(f"\n{key}")
    for place, c in enumerate(ranked, 1):
        figures = f"{c['registers']:3} registers  {c['spills']:3} spills  {c['shared']:6} bytes shared"
        mark = "  shipped" if c["shipped"] else ""
        print(f"  {place:2}  {tile_name(c['tile']):18} {figures}  {c['blocks']} blocks  {c['matrix']}{mark}")


def print_times(key: str, rows: list[dict[str, Any]]) -> None:
    """Print an entry's tiles, the fastest first. Tiles are ordered by the mean ratio to the shipped tile's time."""
    by_tile: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for row in rows:
        by_tile.setdefault(tuple(row["tile"]), []).append(row)

    def share(tile: tuple[int, ...]) -> float:
        return mean(row["us"] / row["shipped_us"] if "us" in row else float("inf") for row in by_tile[tile])

    shapes = dict.fromkeys(f"{row['case'].split('/')[1]} {label(row['dims'])}" for row in rows)
    print(f"\n{key}: time / shipped tile's time, then microseconds at {'; '.join(shapes)}")
    for tile in sorted(by_tile, key=share):
        cells = [f"{row['us']:9.1f}" if "us" in row else row["refused"] for row in by_tile[tile]]
        mark = "  shipped" if by_tile[tile][0]["shipped"] else ""
        print(f"  {share(tile):5.3f}  {tile_name(tile):18} {'  '.join(dict.fromkeys(cells))}{mark}")


# ---- command


@dataclass(frozen=True, kw_only=True)
class Config:
    ops: Annotated[tuple[str, ...], POSITIONAL] = ()  # the ops to tune (default: all)
    chip: str | None = None  # print the ranking for this chip, such as sm_90, and time nothing
    search: bool = False  # compile a grid of tiles, and rank them again
    accept: bool = False  # with --search: keep the ranking in bench/candidates.json
    json: Path | None = None  # write rankings and times to this file
    keep: bool = False  # keep rankings and times in bench/results/tune-<chip>-<date>.json
    budget: Limit = inf  # seconds after which no tile is timed
    processes: Count = PROCESSES  # number of processes that compile
    commit: str | None = None  # commit to record with the figures, if git is absent


def main(cfg: Config) -> int:
    """Search for tiles, print the ranking of bench/candidates.json, or time its tiles on this machine's GPU."""
    expect_triton("the compiler")
    check(cfg)
    slots = [slot for slot in SLOTS if not cfg.ops or slot.op in cfg.ops]
    chips = [cfg.chip] if cfg.chip else list(OWN)
    if cfg.search:
        search_all(slots, chips, cfg)
        return 0

    if cfg.chip or not torch.cuda.is_available():
        for key, ranked in kept().items():
            if any(key.startswith(f"{slot.op} ") for slot in slots) and key.split(" | ")[-1] in chips:
                with reading(KEPT):
                    print_ranking(key, ranked)
        print("\nranked by the static proof alone: nothing was timed")
        return 0

    here = torch.cuda.get_device_capability()
    chip = next((name for name in OWN if static.TARGETS[name][1] == here), None)
    if chip is None:
        print(f"no candidates for a GPU of compute capability {here}: only {', '.join(OWN)} have any")
        return 0
    Timing(cfg, chip).run(slots)
    return 0


def check(cfg: Config) -> None:
    """Raise InputError if a flag is wrong or would be ignored."""
    if _chip.INTERPRET:
        raise InputError("TRITON_INTERPRET: expected unset, because interpreted kernels are not timed")
    static.check_ops(cfg.ops, {slot.op for slot in SLOTS})
    if cfg.chip not in (None, *OWN):
        raise InputError(f"--chip: expected one of {', '.join(OWN)}, got {cfg.chip}")
    if cfg.accept and not cfg.search:
        raise InputError("--accept: expected --search beside it")

    of_times = "--json, --keep, --budget, --commit"
    timed = cfg.json or cfg.keep or cfg.commit or cfg.budget < inf
    if timed and (cfg.search or cfg.chip):
        raise InputError(f"{of_times}: expected neither --search nor --chip, which time nothing")
    if timed and not torch.cuda.is_available():
        raise InputError(f"{of_times}: expected a GPU that torch can use, to time tiles on")


def search_all(slots: list[Slot], chips: list[str], cfg: Config) -> None:
    """Rank the tiles of all chosen table entries. With --accept, keep each ranking as soon as it is made."""
    jobs = [(slot.op, slot.name, chip, width) for chip in chips for width in WIDTHS for slot in slots]
    with ProcessPoolExecutor(cfg.processes, mp_context=get_context("spawn")) as pool:
        for key, ranked in pool.map(search, jobs):
            print_ranking(key, ranked)
            if cfg.accept:
                keep({key: ranked})


class Timing:
    """A run on a GPU that compiles, ranks and times the tiles of bench/candidates.json until the budget is spent."""

    def __init__(self, cfg: Config, chip: str):
        self.chip, self.processes = chip, cfg.processes
        self.deadline, today = time.monotonic() + cfg.budget, datetime.date.today().isoformat()
        kept_file = RESULTS / f"tune-{chip}-{today}.json" if cfg.keep else None
        self.files = [file for file in (cfg.json, kept_file) if file is not None]
        self.report: dict[str, Any] = {
            "kind": "tune",
            "machine": machine("cuda"),
            "chip": chip,
            "date": today,
            "commit": cfg.commit or run_text("git", "describe", "--always", "--dirty"),
            "command": spelled("python -m burnish.bench tune", cfg),
            "clocks_before": clocks("cuda"),
            "ranked": {},
            "rows": [],
        }

    def run(self, slots: list[Slot]) -> None:
        """Time the entries one by one, while worker processes compile the tiles of all entries."""
        entries = kept()
        turns = [(slot, width) for width in WIDTHS for slot in slots if slot.key(self.chip, width) in entries]
        with reading(KEPT):
            tiles = [[tuple(c["tile"]) for c in entries[slot.key(self.chip, width)]] for slot, width in turns]

        with ProcessPoolExecutor(self.processes, mp_context=get_context("spawn")) as pool:
            jobs = [
                [pool.submit(examine, slot, self.chip, width, tile) for tile in each]
                for (slot, width), each in zip(turns, tiles, strict=True)
            ]
            for (slot, width), each in zip(turns, jobs, strict=True):
                wait(each, timeout=min(self.deadline - time.monotonic(), 3600))
                if time.monotonic() > self.deadline:
                    break
                self.time_entry(slot, width, each)
            pool.shutdown(cancel_futures=True)

        self.report["clocks_after"] = clocks("cuda")
        self.write([])
        for file in self.files:
            print(f"written: {os.path.relpath(file)}")

    def time_entry(self, slot: Slot, width: int, jobs: list[Future[dict[str, Any]]]) -> None:
        """Rank the compiled tiles of one table entry. Time the tiles that fit and do not spill."""
        key, shipped = slot.key(self.chip, width), slot.shipped(slot, self.chip, width)
        found = [job.result() for job in jobs]
        ranked = rank(slot, self.chip, [c | {"shipped": tuple(c["tile"]) == shipped} for c in found])
        print_ranking(key, ranked)
        self.report["ranked"][key] = ranked

        rows: list[dict[str, Any]] = []
        tiles = [tuple(c["tile"]) for c in ranked if sound(c)]
        for row in measure(slot, width, tiles, shipped, torch.bfloat16, "cuda"):
            rows.append(row | {"entry": key})
            self.write(rows)
            if time.monotonic() > self.deadline:
                break
        print_times(key, rows)
        self.report["rows"] += rows

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Write the report, with the rows of the current entry."""
        text = json.dumps(self.report | {"rows": self.report["rows"] + rows}, indent=1) + "\n"
        for file in self.files:
            write_whole(file, text)
