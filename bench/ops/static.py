"""The static proof: every shipped configuration of every kernel, compiled for six chips on a machine without a GPU.

    burnish bench static [op ...] [--all] [--check | --accept] [--json FILE]

The public op is called as in training, forward and backward, on CPU tensors. Triton's driver is replaced by a driver
that names the chip and launches nothing. So the compiled kernels are exactly the kernels that a GPU would launch, with
the op's own tile table and specialisations. Their machine code shows facts that the source cannot show: registers,
spills, stack, shared memory, blocks per multiprocessor, matrix instructions, the widest global load, and asynchronous
copies. It also shows whether a kernel with stores in its source still has any. bench/static.json holds the accepted
figures. --check lists the figures that got worse, and --accept replaces the accepted figures. A grid that no chip can
launch raises ValueError.

Without --all only the small selection of `make test` runs: the first configuration of each case, in bf16 on sm_90.
"""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ...algorithms.run.flags import POSITIONAL, Count
from ...kernels import _chip
from ...kernels._triton import INSTALLED, expect_triton, triton
from ...model.errors import InputError
from ..cases.case import DTYPES, Case, Dims, label, make_inputs, make_upstream, run
from ..cases.registry import CASES
from ..record import ROOT, kept_part, reading, write_whole
from .machine_code import Build, read_build
from .roofline import CHIPS, datasheet

if TYPE_CHECKING or INSTALLED:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction
else:
    GPUTarget = JITFunction = driver = triton

BASELINE = ROOT / "bench" / "static.json"
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), (8, 0)),
    "sm_86": (GPUTarget("cuda", 86, 32), (8, 6)),
    "sm_90": (GPUTarget("cuda", 90, 32), (9, 0)),
    "sm_100": (GPUTarget("cuda", 100, 32), (10, 0)),
    "sm_120": (GPUTarget("cuda", 120, 32), (12, 0)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), (9, 4)),
}
MOST_PROGRAMS = ((1 << 31) - 1, 65535, 65535)  # most programs in each of a grid's three dimensions
PROCESSES = min(2, os.cpu_count() or 1)


@dataclass(frozen=True)
class Job:
    case: str
    dims: tuple[tuple[str, int], ...]
    dtype: str
    chip: str

    @property
    def key(self) -> str:
        return f"{self.case} | {label(dict(self.dims))} | {self.dtype} | {self.chip}"


# builds by the hash of the compiled kernel: disassembly takes longer than a small compilation
_READ: dict[str, Build] = {}


# ---- compiling


class _Driver:
    """A stand-in for Triton's GPU driver. Each chip is a separate device, because Triton caches per device."""

    def __init__(self, chip: str):
        self.chip = chip

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.chip)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.chip][0]


@contextmanager
def compile_only(chip: str, kernel: str | None = None) -> Iterator[list[Any]]:
    """Compile the kernels that are launched inside the `with` block for a chip, and run nothing.

    Yields the list of compiled kernels, which grows with each launch. kernel: compile only the kernel with this name.
    Raises ValueError for a grid that no chip can launch.
    """
    if _chip.INTERPRET:
        raise ValueError("TRITON_INTERPRET: expected unset, the interpreter compiles nothing")

    launches: list[Any] = []
    launch, active, target = JITFunction.run, driver._active, _chip.TARGET

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if kernel not in (None, self.__name__):
            return None
        check_grid(self.__name__, grid)
        compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append(compiled)
        return compiled

    driver.set_active(_Driver(chip))  # pyright: ignore[reportArgumentType]
    JITFunction.run, _chip.TARGET = record, TARGETS[chip][1]  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield launches
    finally:
        JITFunction.run, driver._active, _chip.TARGET = launch, active, target


def check_grid(kernel: str, grid: tuple[int, ...]) -> None:
    if any(n > most for n, most in zip(grid, MOST_PROGRAMS, strict=False)):
        raise ValueError(f"{kernel}: expected a grid of at most {MOST_PROGRAMS} programs, got {grid}")


def compile_job(job: Job) -> list[Build]:
    """Return the figures of each distinct kernel that an op launches, forward and backward, at the job's shape."""
    case = next(c for c in CASES if c.name == job.case)
    tensors = make_inputs(case, dict(job.dims), DTYPES[job.dtype], "cpu")
    upstream = make_upstream(case, tensors)
    with compile_only(job.chip) as launches:
        run(case.fused, case, tensors, upstream)
    assert launches, f"{job.key}: the op launched no kernel"

    for compiled in launches:
        if compiled.hash not in _READ:
            _READ[compiled.hash] = read_build(compiled, job.chip)
    return [_READ[digest] for digest in dict.fromkeys(compiled.hash for compiled in launches)]


def selection(ops: Collection[str], everything: bool) -> list[Job]:
    """Return the jobs to compile: by default the first configuration of each case, in bf16 on sm_90.

    With `everything`, return all configurations in bf16 on every chip, and in fp32 on sm_90.
    """
    jobs: list[Job] = []
    for case in CASES:
        if ops and case.op not in ops:
            continue
        for chip in TARGETS:
            for dims in case.configurations if everything else case.configurations[: chip == "sm_90"]:
                for dtype in ("bf16", "fp32") if everything and chip == "sm_90" else ("bf16",):
                    jobs.append(Job(case.name, tuple(dims.items()), dtype, chip))
    return jobs


# ---- accepted figures


def compare(accepted: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a sentence for each figure in `now` that is worse than the accepted one, and for each unknown kernel."""
    complaints: list[str] = []
    unknown = f"not in {BASELINE.name}; look at its figures, then --accept"
    for key, builds in now.items():
        if key not in accepted:
            complaints.append(f"{key}: {unknown}")
            continue

        # an op may launch a kernel with several tiles: the order of launches matches them
        before: dict[str, list[Any]] = defaultdict(list)
        for build in accepted[key]:
            before[build["kernel"]].append(build)

        for build in builds:
            if not before[build["kernel"]]:
                complaints.append(f"{key}: {build['kernel']}: {unknown}")
            else:
                old = before[build["kernel"]].pop(0)
                where = f"{key}: {build['kernel']} {build['tile']}"
                complaints += [f"{where}: {what}" for what in _worse(old, build)]
    return complaints


def _worse(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for name in ("spills", "stack"):
        if new[name] > old[name]:
            yield f"{name} {old[name]} -> {new[name]}"
    if new["matrix"] == 0 < old["matrix"] or new["matrix_kind"] != old["matrix_kind"]:
        yield f"matrix instructions {_matrix(old)} -> {_matrix(new)}"
    for name in ("blocks", "load_bits"):
        if new[name] < old[name]:
            yield f"{name} {old[name]} -> {new[name]}"

    # any number of these instructions is good, except none
    if new["asynchronous"] == 0 < old["asynchronous"]:
        yield f"asynchronous copies {old['asynchronous']} -> 0"
    if new["overlapped"] == 0 < old.get("overlapped", 0):
        yield f"exponentials under a product {old['overlapped']} -> 0"


def limits(now: dict[str, Any]) -> list[str]:
    """Return a sentence for each kernel that does not fit the chip, or that has stores in its source alone."""
    complaints = []
    for key, builds in now.items():
        most = CHIPS[key.split(" | ")[-1]].shared_block
        for b in builds:
            where = f"{key}: {b['kernel']} {b['tile']}"
            if b["shared"] > most:
                complaints.append(f"{where}: {b['shared']} bytes shared, at most {most}: does not fit")
            elif b["blocks"] < 1:
                complaints.append(f"{where}: {b['registers']} registers: does not fit")
            if b["stores"] == 0 < b["source_stores"]:
                complaints.append(f"{where}: {b['source_stores']} stores in its source, none in its code")
    return complaints


def _matrix(build: dict[str, Any]) -> str:
    return f"{build['matrix']} {build['matrix_kind']}" if build["matrix"] else "none"


def accepted_figures() -> dict[str, Any]:
    return kept_part(BASELINE, "builds")


def compile_all(jobs: list[Job], processes: int) -> dict[str, Any]:
    if processes == 1:
        built = [compile_job(job) for job in jobs]
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            built = list(pool.map(compile_job, jobs))
    return {job.key: [asdict(b) for b in builds] for job, builds in zip(jobs, built, strict=True)}


def floors(case: Case, dims: Dims, dtype: str) -> dict[str, tuple[float, float]]:
    """Return chip -> (forward, backward): the least seconds that the chip's datasheet allows for a case."""
    forward, backward = case.work(dims, DTYPES[dtype].itemsize)
    return {
        c: (datasheet(chip, dtype).floor(forward), datasheet(chip, dtype).floor(backward))
        for c, chip in CHIPS.items()
    }


# ---- output

COLUMNS = ("kernel", "tile", "chip", "regs", "spills", "stack", "shared", "blocks", "matrix", "load", "async")


def static_row(key: str, b: dict[str, Any]) -> tuple[str, ...]:
    dtype, chip = key.split(" | ")[-2:]
    counts = (b[name] for name in ("registers", "spills", "stack", "shared", "blocks"))
    figures = (*counts, _matrix(b), b["load_bits"], b["asynchronous"])
    return (b["kernel"], f"{dtype} {b['tile']}", chip, *map(str, figures))


def table(figures: dict[str, Any]) -> str:
    """Return a table with one line for each distinct kernel. Several configurations may share a kernel."""
    rows = [
        COLUMNS,
        *dict.fromkeys(static_row(key, b) for key, builds in figures.items() for b in builds),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def floor_table(ops: Collection[str]) -> str:
    lines = ["floors by the datasheets, forward / backward in us, bf16"]
    for case in CASES:
        for dims in case.bench.get("cuda", ()) if not ops or case.op in ops else ():
            times = "   ".join(
                f"{c} {f * 1e6:8.1f} /{b * 1e6:8.1f}" for c, (f, b) in floors(case, dims, "bf16").items()
            )
            lines.append(f"{case.name:28} {label(dims):32} {times}")
    return "\n".join(lines)


# ---- command


@dataclass(frozen=True, kw_only=True)
class Config:
    ops: Annotated[tuple[str, ...], POSITIONAL] = ()  # the ops to compile (default: all)
    all: bool = False  # every configuration: bf16 on every chip, fp32 on sm_90
    check: bool = False  # compare with the accepted figures; exit status 1 if one got worse
    accept: bool = False  # replace the accepted figures in bench/static.json
    json: Path | None = None  # write the figures to this file
    processes: Count = PROCESSES  # number of processes that compile


def check_ops(named: Collection[str], known: Collection[str]) -> None:
    """Raise InputError if a named op is unknown."""
    if unknown := sorted(set(named) - set(known)):
        raise InputError(f"op: expected one of {sorted(known)}, got {unknown}")


def main(cfg: Config) -> int:
    """Compile the selection, and print its figures. Return 1 if a kernel does not fit or, with --check, got worse."""
    if cfg.accept and cfg.check:
        raise InputError("--check: expected no --accept beside it, because it replaces the accepted figures")
    expect_triton("the compiler")
    check_ops(cfg.ops, {case.op for case in CASES})
    figures = compile_all(selection(cfg.ops, cfg.all), cfg.processes)
    print(table(figures), floor_table(cfg.ops), sep="\n\n")

    if cfg.json:
        write_figures(cfg.json, figures)
    if cfg.accept:
        kept = {} if cfg.all and not cfg.ops else accepted_figures()
        write_figures(BASELINE, dict(sorted((kept | figures).items())))

    with reading(BASELINE):
        complaints = limits(figures) + (compare(accepted_figures(), figures) if cfg.check else [])
    for complaint in complaints:
        print(f"worse: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


def write_figures(file: Path, builds: dict[str, Any]) -> None:
    write_whole(file, json.dumps({"triton": triton.__version__, "builds": builds}, indent=1) + "\n")
