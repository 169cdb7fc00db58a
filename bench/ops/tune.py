"""Which tiles an op should ship: candidates ranked by the static proof and, on a GPU, timed beside the shipped one.

    python -m burnish.bench tune [op ...] [--json [FILE]] [--budget SECONDS]
    python -m burnish.bench tune [op ...] [--chip CHIP] [--search [--accept]]

--search compiles a grid of tiles for every entry of an op's tile table and ranks them. First come those that spill in
none of the calls that they serve, and fit; of these, those on the chip's own matrix instructions; then those of which
two blocks share a multiprocessor, so that one multiplies while the other takes exponentials; then those with eight
warps resident; then those with more pairs in a step, which take fewer steps; then those with the wider walked side,
whose instructions are wider; then the deeper pipeline. --accept keeps the best, and the shipped one, in
bench/candidates.json.

Without a GPU the kept ranking is printed. On one, what is kept is compiled anew, by the Triton at hand; what still
spills nowhere must pass the accuracy rule and is then timed: its kernel alone, a replayed graph of its launches, in
turns with the shipped tile's (A B A B). Rows are written as they come, so that a run cut short keeps them.
"""

import argparse
import datetime
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from ...algorithms.run.streams import run_program
from ...kernels import _chip, attention
from ...kernels._triton import expect_triton, triton
from ...kernels.tiles import ATTENTION, AttentionTiles
from ...kernels.tiles import Tile as LaunchTile
from ..cases.case import Case, Dims, assert_accurate, label, make_inputs, make_upstream, run
from ..cases.registry import CASES
from ..record import RESULTS, ROOT, as_command, clocks, kept_part, machine, reading, run_text, write_whole
from . import static
from .clocks import capture, event_seconds, host_seconds
from .contest import ROUNDS, call, prepare
from .roofline import CHIPS

Tile = tuple[int, ...]
KEPT = ROOT / "bench" / "candidates.json"
KEEP = 6  # of each entry
# the matrix instruction of each chip that tiles are searched for
OWN = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}


@dataclass(frozen=True)
class Slot:
    """One entry in the rows of an op's tile table: (side, other side, warps, stages) of one kernel."""

    op: str
    name: str
    module: str
    kernel: str  # the name of it there
    cases: tuple[str, ...]  # the families that it serves
    held: int  # which of the tile's sides stays on the chip while the other is walked over: 0 or 1
    grid: Callable[["Slot", str, int], Iterator[Tile]]  # chip, row of the table
    shipped: Callable[["Slot", str, int], Tile]
    placed: Callable[["Slot", Tile], AbstractContextManager[None]]  # inside, the op takes this tile
    timed: Callable[["Slot", int], list[tuple[Case, Dims]]]

    def key(self, chip: str, width: int) -> str:
        return f"{self.op} {self.name} | D={width} | {chip}"


# ---- flash_attention


def _attention_grid(slot: Slot, chip: str, width: int) -> Iterator[Tile]:
    """What may fit: operands in shared memory, accumulators and scores in registers. At two stages."""
    # [held, D] accumulators; [held, walked] scores, and as many [held, D] operands: q; q and dout; k and v
    accumulators, scores = {"_flash_fwd": (1, 1), "_flash_dq": (1, 2), "_flash_dkdv": (2, 2)}[slot.kernel]
    for held in (64, 128):
        for walked in (32, 64, 128) if width < 256 else (16, 32, 64):
            for warps in (4, 8):
                numbers = (accumulators * held * width + scores * held * walked) / (32 * warps)  # of a thread
                shared = 2 * width * (held * scores + 4 * walked)
                if 40 <= numbers <= 224 and shared <= CHIPS[chip].shared_block:
                    yield *((held, walked) if slot.held == 0 else (walked, held)), warps, 2


def _attention_shipped(slot: Slot, chip: str, width: int) -> Tile:
    tiles = next(tiles for widest, tiles in ATTENTION[chip].items() if width <= widest)
    shipped = getattr(tiles, slot.name) or tiles.dkdv
    return shipped.M, shipped.N, shipped.warps, shipped.stages


@contextmanager
def _attention_placed(slot: Slot, tile: Tile) -> Iterator[None]:
    look_up = attention.attention_tiles
    M, N, warps, stages = tile

    def placed(q: torch.Tensor, width: int) -> tuple[AttentionTiles, bool]:
        tiles, descriptors = look_up(q, width)
        return tiles._replace(**{slot.name: LaunchTile(M, N, warps=warps, stages=stages)}), descriptors

    attention.attention_tiles = placed
    try:
        yield
    finally:
        attention.attention_tiles = look_up


def _attention_timed(slot: Slot, width: int) -> list[tuple[Case, Dims]]:
    """16,384 tokens and 2048 / D heads, as docs/attention.md has them; packed and shared as its Cases have."""
    heads = 2048 // width
    dense = [{"B": 16384 // T, "T": T, "H": heads, "G": heads, "D": width} for T in (4096, 16384, 1024)]
    packed = {"T": 8192, "H": heads, "G": heads, "D": width}
    shared = {"T": 10240, "P": 2048, "R": 512, "H": heads, "G": heads // 4, "D": width}
    wide = {"window": 1024, "softcap": 50.0}
    trials = {
        "causal": [(_case("flash_attention/causal"), dims) for dims in dense],
        "shared prompt": [
            (_case("flash_attention/shared prompt"), shared),
            (_case("flash_attention/packed"), packed),
        ],
        _FEATURES: [
            (replace(case, options=case.options | wide), dims)
            for case in [_case(f"flash_attention/{_FEATURES}")]
            for dims in dense[:2]
        ],
    }
    return [trial for name in slot.cases for trial in trials[name.split("/")[1]]]


_FEATURES = "window, softcap, sinks"
_ATTENTION = {  # name: kernel, families, held side
    "fwd": ("_flash_fwd", ("causal", _FEATURES), 0),
    "dq": ("_flash_dq", ("causal", _FEATURES), 0),
    "dkdv": ("_flash_dkdv", ("causal",), 1),
    "dkdv_packed": ("_flash_dkdv", ("shared prompt",), 1),
    "dkdv_features": ("_flash_dkdv", (_FEATURES,), 1),
}
SLOTS = tuple(
    Slot(
        "flash_attention",
        name,
        attention.__name__,
        kernel,
        tuple(f"flash_attention/{family}" for family in families),
        held,
        _attention_grid,
        _attention_shipped,
        _attention_placed,
        _attention_timed,
    )
    for name, (kernel, families, held) in _ATTENTION.items()
)
WIDTHS = (128, 64, 256)  # rows of the table, in the order of what matters


# ---- ranked


def _case(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


def examine(
    slot: Slot, chip: str, width: int, tile: Tile, cases: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """What the static proof reads of the tile, the worst of all calls that it serves, up to one in which it spills."""
    builds: list[static.Build] = []
    for case in map(_case, cases or slot.cases):
        dims = next(d for d in case.configurations if d["D"] == width)
        tensors = make_inputs(case, dims, torch.bfloat16, "cpu")
        with slot.placed(slot, tile), static.compile_only(chip, slot.kernel) as launches:
            run(case.fused, case, tensors, make_upstream(case, tensors))
        builds.append(static._read(launches[-1], chip))
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
    """The best first, by the rule at the top of this file."""

    def order(c: dict[str, Any]) -> tuple[Any, ...]:
        *sides, warps, stages = c["tile"]
        held, walked = sides[slot.held], sides[1 - slot.held]
        failing = (c["blocks"] < 1, c["spills"], c["stack"], c["matrix"] != OWN[chip])
        return *failing, -min(c["blocks"], 2), -min(c["blocks"] * warps, 8), -held * walked, -walked, -stages

    return sorted(found, key=order)


def search(job: tuple[str, str, str, int]) -> tuple[str, list[dict[str, Any]]]:
    """An entry's key and its ranking: the grid at two stages in the first call, then its best in every call."""
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
    """Stands where an op looks for its kernel, and keeps each launch, to be made again."""

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self.launches: list[Callable[[], Any]] = []

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            self.launches.append(lambda: self.kernel[grid](*args, **kwargs))
            return self.launches[-1]()

        return launch


def launches(slot: Slot, tile: Tile, case: Case, inputs: Any) -> list[Callable[[], Any]]:
    """What one training call launches of the slot's kernel with this tile."""
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
    """Median seconds of both, in turns; on a GPU of graphs that are replayed."""
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
    """A row for each tile and shape. A tile outside the accuracy rule is refused, and not timed."""
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
            except Exception as error:  # the other tiles are still worth having
                refused[tile] = f"{type(error).__name__}: {error}".splitlines()[0]
            yield row | {"shipped": tile == shipped} | ({"refused": refused[tile]} if tile in refused else {})


# ---- output


def kept() -> dict[str, list[dict[str, Any]]]:
    return kept_part(KEPT, "entries")


def keep(entries: dict[str, list[dict[str, Any]]]) -> None:
    """A line for each candidate, and entries that were not ranked anew as they were."""
    whole = dict(sorted((kept() | entries).items()))
    text = ",\n".join(
        f" {json.dumps(key)}: [\n  " + ",\n  ".join(map(json.dumps, ranked)) + "\n ]"
        for key, ranked in whole.items()
    )
    write_whole(KEPT, f'{{"triton": "{triton.__version__}", "entries": {{\n{text}\n}}}}\n')


def tile_name(tile: Tile) -> str:
    """(64, 128, 4, 3) is 64 by 128 with 4 warps and 3 stages."""
    *sides, warps, stages = tile
    return f"{'x'.join(map(str, sides))} w{warps} s{stages}"


def print_ranking(key: str, ranked: list[dict[str, Any]]) -> None:
    print(f"\n{key}")
    for place, c in enumerate(ranked, 1):
        figures = f"{c['registers']:3} registers  {c['spills']:3} spills  {c['shared']:6} bytes shared"
        mark = "  shipped" if c["shipped"] else ""
        print(f"  {place:2}  {tile_name(c['tile']):18} {figures}  {c['blocks']} blocks  {c['matrix']}{mark}")


def print_times(key: str, rows: list[dict[str, Any]]) -> None:
    """The fastest first: by the mean, over the shapes, of its time over that of the shipped tile beside it."""
    by_tile: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for row in rows:
        by_tile.setdefault(tuple(row["tile"]), []).append(row)

    def share(tile: tuple[int, ...]) -> float:
        return mean(row["us"] / row["shipped_us"] if "us" in row else float("inf") for row in by_tile[tile])

    shapes = dict.fromkeys(f"{row['case'].split('/')[1]} {label(row['dims'])}" for row in rows)
    print(f"\n{key}: time over that of the shipped tile, then microseconds at {'; '.join(shapes)}")
    for tile in sorted(by_tile, key=share):
        cells = [f"{row['us']:9.1f}" if "us" in row else row["refused"] for row in by_tile[tile]]
        mark = "  shipped" if by_tile[tile][0]["shipped"] else ""
        print(f"  {share(tile):5.3f}  {tile_name(tile):18} {'  '.join(dict.fromkeys(cells))}{mark}")


# ---- command


def time_kept(slots: list[Slot], chip: str, args: argparse.Namespace) -> None:
    """Compile, rank and time what is kept for this GPU, in the order of WIDTHS, until the budget is spent."""
    deadline, today, entries = time.monotonic() + args.budget, datetime.date.today().isoformat(), kept()
    report: dict[str, Any] = {
        "kind": "tune",
        "machine": machine("cuda"),
        "chip": chip,
        "date": today,
        "commit": args.commit,
        "command": shlex.join(["python", "-m", "burnish.bench", "tune", *args.words]),
        "clocks_before": clocks("cuda"),
        "ranked": {},
        "rows": [],
    }
    path = RESULTS / f"tune-{chip}-{today}.json" if args.json == "" else args.json and Path(args.json)
    turns = [(slot, width) for width in WIDTHS for slot in slots if slot.key(chip, width) in entries]
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        with reading(KEPT):
            kept_tiles = {
                turn: [tuple(c["tile"]) for c in entries[turn[0].key(chip, turn[1])]] for turn in turns
            }
        jobs = {
            (slot.name, width): [pool.submit(examine, slot, chip, width, t) for t in kept_tiles[slot, width]]
            for slot, width in turns
        }
        for slot, width in turns:
            wait(jobs[slot.name, width], timeout=min(deadline - time.monotonic(), 3600))
            if time.monotonic() > deadline:
                break
            key, shipped = slot.key(chip, width), slot.shipped(slot, chip, width)
            found = [job.result() for job in jobs[slot.name, width]]
            ranked = rank(slot, chip, [c | {"shipped": tuple(c["tile"]) == shipped} for c in found])
            print_ranking(key, ranked)
            report["ranked"][key], rows = ranked, []
            tiles = [tuple(c["tile"]) for c in ranked if sound(c)]
            for row in measure(slot, width, tiles, shipped, torch.bfloat16, "cuda"):
                rows.append(row | {"entry": key})
                if path:
                    write_whole(path, json.dumps(report | {"rows": report["rows"] + rows}, indent=1) + "\n")
                if time.monotonic() > deadline:
                    break
            print_times(key, rows)
            report["rows"] += rows
        pool.shutdown(cancel_futures=True)
    report["clocks_after"] = clocks("cuda")
    if path:
        write_whole(path, json.dumps(report, indent=1) + "\n")
        print(f"written: {os.path.relpath(path)}")


@as_command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m burnish.bench tune", description=(__doc__ or "").split("\n")[0]
    )
    ops = sorted({slot.op for slot in SLOTS})
    parser.add_argument("ops", nargs="*", metavar="op", help="all of them when none is named")
    parser.add_argument("--chip", choices=list(OWN), help="the ranking for this one, nothing timed")
    parser.add_argument("--search", action="store_true", help="compile a grid of tiles, and rank them anew")
    parser.add_argument(
        "--accept", action="store_true", help=f"with --search: keep the ranking in {KEPT.name}"
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="",
        metavar="FILE",
        help="times; default: bench/results/tune-<chip>-<date>.json",
    )
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="time no tile after this"
    )
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument(
        "--commit", default=run_text("git", "describe", "--always", "--dirty"), help="where git is absent"
    )
    args = parser.parse_args(argv)
    expect_triton("python -m burnish.bench tune")
    args.words = sys.argv[1:] if argv is None else argv
    if _chip.INTERPRET:
        parser.error("TRITON_INTERPRET: expected unset, interpreted kernels have no speed")
    if unknown := set(args.ops) - set(ops):
        parser.error(f"op: expected one of {ops}, got {sorted(unknown)}")
    if args.accept and not args.search:
        parser.error("--accept: expected --search beside it")
    slots = [slot for slot in SLOTS if not args.ops or slot.op in args.ops]
    chips = [args.chip] if args.chip else list(OWN)
    if args.search:
        jobs = [(s.op, s.name, c, w) for c in chips for w in WIDTHS for s in slots]
        with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
            for key, ranked in pool.map(search, jobs):
                print_ranking(key, ranked)
                if args.accept:
                    keep({key: ranked})
        return 0
    if args.chip or not torch.cuda.is_available():
        for key, ranked in kept().items():
            if any(key.startswith(f"{s.op} ") for s in slots) and key.split(" | ")[-1] in chips:
                with reading(KEPT):
                    print_ranking(key, ranked)
        print("\nby the static proof alone: nothing was timed")
        return 0
    here = torch.cuda.get_device_capability()
    chip = next((name for name in OWN if static.TARGETS[name][1] == here), None)
    if chip is None:
        print(f"no candidates for a GPU of compute capability {here}: they are kept for {', '.join(OWN)}")
        return 0
    time_kept(slots, chip, args)
    return 0


if __name__ == "__main__":
    sys.exit(run_program("python -m burnish.bench tune", main))
