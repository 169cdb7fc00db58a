"""The static proof: every shipped configuration of every kernel, compiled for six chips on a machine that has none.

    python -m burnish.bench static [op ...] [--all] [--check] [--accept] [--json FILE] [--html FILE]

The public op is called as in training, forward and backward, on CPU tensors, with Triton's driver replaced by one that
names the chip and launches nothing. What is compiled is therefore what is launched: the op's own tile table,
specialisations and all. The machine code then says what the source cannot: registers, spills, stack, shared memory,
blocks per multiprocessor, matrix instructions, the widest global load, asynchronous copies, and whether a kernel that
stores in its source stores at all. bench/static.json holds the accepted figures; --check names what got worse, --accept
writes them anew. A grid that no chip launches raises.

Without --all only the selection runs that `make test` affords: the first configuration of each case, in bf16 on sm_90.
"""

import argparse
import html
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...algorithms.run.streams import run_program
from ...kernels import _chip
from ...kernels._triton import INSTALLED, expect_triton, triton
from ..cases.case import Case, Dims, label, make_inputs, make_upstream, run
from ..cases.registry import CASES
from ..publish.pictures import roofline_picture
from ..record import ROOT, as_command, kept_part, reading, write_whole
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
MOST_PROGRAMS = ((1 << 31) - 1, 65535, 65535)  # of a grid's three dimensions
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Build:
    """One compiled kernel, read from its machine code."""

    kernel: str
    tile: str  # the constants it was compiled with, its warps and its stages
    registers: int  # per thread
    spills: int  # local loads and stores in the code
    stack: int  # bytes per thread
    shared: int  # bytes per block
    blocks: int  # resident blocks per multiprocessor
    matrix: int  # matrix instructions
    matrix_kind: str
    load_bits: int  # the widest load from global memory
    asynchronous: int  # asynchronous copies to shared memory, TMA included
    instructions: int
    exponentials: int
    overlapped: int  # of them, those that run while a product does
    stores: int  # to global memory
    source_stores: int  # those of the kernel before its machine code: where there are any, the code has some


@dataclass(frozen=True)
class Job:
    case: str
    dims: tuple[tuple[str, int], ...]
    dtype: str
    chip: str

    @property
    def key(self) -> str:
        return f"{self.case} | {label(dict(self.dims))} | {self.dtype} | {self.chip}"


_READ: dict[
    str, Build
] = {}  # by the compiled kernel's hash: disassembly takes longer than a small compilation


# ---- compiling


class _Driver:
    """Stands where Triton looks for a GPU. The chips are numbered as devices: Triton keeps its caches per device."""

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
    """Inside, a launch compiles for `chip` (of every kernel, or of the one named) and runs nothing.

    Yields the growing list of what was compiled. Raises ValueError for a grid that would not be launched.
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
    """Every distinct kernel that the op launches, forward and backward, at this configuration."""
    case = next(c for c in CASES if c.name == job.case)
    tensors = make_inputs(case, dict(job.dims), DTYPES[job.dtype], "cpu")
    upstream = make_upstream(case, tensors)
    with compile_only(job.chip) as launches:
        run(case.fused, case, tensors, upstream)
    assert launches, f"{job.key}: the op launched no kernel"
    for compiled in launches:
        if compiled.hash not in _READ:
            _READ[compiled.hash] = _read(compiled, job.chip)
    return [_READ[digest] for digest in dict.fromkeys(compiled.hash for compiled in launches)]


def selection(ops: list[str], everything: bool) -> list[Job]:
    """Each case's first configuration on sm_90; --all is every one on every chip in bf16, and on sm_90 in fp32, too."""
    jobs: list[Job] = []
    for case in CASES:
        if ops and case.op not in ops:
            continue
        for chip in TARGETS:
            for dims in case.configurations if everything else case.configurations[: chip == "sm_90"]:
                for dtype in ("bf16", "fp32") if everything and chip == "sm_90" else ("bf16",):
                    jobs.append(Job(case.name, tuple(dims.items()), dtype, chip))
    return jobs


# ---- reading the machine code


def _read(compiled: Any, chip: str) -> Build:
    function, meta = compiled.src.fn, compiled.metadata
    constants = {function.params[path[0]].name: value for path, value in compiled.src.constants.items()}
    named = [(p.name, constants[p.name]) for p in function.params if p.is_constexpr]
    tile = [name if value is True else f"{name}={value}" for name, value in named if value is not False]
    tile += [f"warps={meta.num_warps}", f"stages={meta.num_stages}"]
    figures = _read_amd(compiled) if chip == "gfx942" else _read_nvidia(compiled.asm["cubin"])
    shared = meta.shared
    blocks = _blocks(chip, figures["registers"], meta.num_warps, shared)
    stores = len(
        re.findall(
            r"tt\.store|tt\.atomic|buffer_store|buffer_atomic|descriptor_store|descriptor_reduce|local_to_global",
            compiled.asm["ttgir"],
        )
    )
    return Build(
        kernel=function.__name__,
        tile=" ".join(tile),
        shared=shared,
        blocks=blocks,
        source_stores=stores,
        **figures,
    )


def _blocks(chip: str, registers: int, warps: int, shared: int) -> int:
    """Resident blocks. Registers are given out by 256 to a warp; a block loses 1 KB of shared memory to the system."""
    limits = CHIPS[chip]
    if chip == "gfx942":  # 4 SIMDs of 512 registers by 64 lanes, given out by 8; at most 8 waves on each
        waves = 4 * min(8, 512 // max(8, -(-registers // 8) * 8))
        return min(waves // warps, limits.shared // shared if shared else limits.blocks)
    by_registers = limits.registers // (-(-registers * 32 // 256) * 256) // warps
    by_shared = limits.shared // (shared + 1024) if shared <= limits.shared_block else 0
    return min(by_registers, by_shared, limits.warps // warps, limits.blocks)


def _read_nvidia(cubin: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "--dump-resource-usage", path)
        code = re.findall(r'"opcode":"([^"]+)"(?:,"operands":"([^"]*)")?', _tool("nvdisasm", "-json", path))
    opcodes = [opcode for opcode, _ in code]
    matrix = [o for o in opcodes if re.match(r"HMMA|IMMA|DMMA|HGMMA|QGMMA|UTC\w*MMA", o)]
    loads = [o for o in opcodes if o.startswith("LDG")]
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "stack": int(re.findall(r"STACK:(\d+)", usage)[0]),
        "spills": sum(o.startswith(("LDL", "STL")) for o in opcodes),
        "matrix": len(matrix),
        "matrix_kind": matrix[0].split(".")[0] if matrix else "",
        "load_bits": max((_width(o) for o in loads), default=0),
        "asynchronous": sum(o.startswith(("LDGSTS", "UTMALDG", "UBLKCP")) for o in opcodes),
        "instructions": len(opcodes),
        "exponentials": sum(o.startswith("MUFU.EX2") for o in opcodes),
        "overlapped": _overlapped(code),
        "stores": sum(o.startswith(("STG", "ST.E", "RED", "ATOM", "UTMASTG", "UTMAREDG")) for o in opcodes),
    }


def _overlapped(code: list[tuple[str, str]]) -> int:
    """Exponentials in the order of the code between asynchronous products, of sm_90 alone, and the wait for all."""
    count, running = 0, False
    for opcode, operands in code:
        if opcode.startswith("HGMMA"):
            running = True
        elif opcode.startswith("WARPGROUP.DEPBAR") and operands.endswith(",0x0"):
            running = False
        count += running and opcode.startswith("MUFU.EX2")
    return count


def _width(opcode: str) -> int:
    parts = set(opcode.split("."))
    named = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    return next((bits for part, bits in named.items() if part in parts), 32)


def _read_amd(compiled: Any) -> dict[str, Any]:
    assert compiled.asm["hsaco"].startswith(b"\x7fELF")  # assembled and linked, not only printed
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[0])

    opcodes = re.findall(r"^\t([a-z]\w+)", text, re.MULTILINE)
    loads = [o for o in opcodes if re.match(r"(global|buffer)_load_(dword|u|s)", o)]
    words = {"x4": 128, "x3": 96, "x2": 64, "rd": 32}
    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "spills": field("vgpr_spill_count"),
        "matrix": sum(o.startswith("v_mfma") for o in opcodes),
        "matrix_kind": "MFMA" if any(o.startswith("v_mfma") for o in opcodes) else "",
        "load_bits": max((words.get(o[-2:], 16) for o in loads), default=0),
        "asynchronous": sum("lds" in o for o in loads),
        "instructions": len(opcodes),
        "exponentials": sum(o.startswith("v_exp_f32") for o in opcodes),
        "overlapped": 0,  # its products are not asynchronous
        "stores": sum(bool(re.match(r"(global|buffer|flat)_(store|atomic)", o)) for o in opcodes),
    }


def _tool(name: str, *args: Any) -> str:
    return subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


# ---- accepted figures


def compare(accepted: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What got worse, a sentence each; `now` may be a part of what was accepted."""
    complaints = []
    for key, builds in now.items():
        if key not in accepted:
            complaints.append(f"{key}: not in {BASELINE.name}; look at its figures, then --accept")
            continue
        before: dict[
            str, list[Any]
        ] = {}  # an op may launch one kernel at several tiles: in its order of launches
        for b in accepted[key]:
            before.setdefault(b["kernel"], []).append(b)
        for b in builds:
            old = before[b["kernel"]].pop(0) if before.get(b["kernel"]) else None
            if old is None:
                complaints.append(
                    f"{key}: {b['kernel']}: not in {BASELINE.name}; look at its figures, then --accept"
                )
                continue
            where = f"{key}: {b['kernel']} {b['tile']}"
            for name in ("spills", "stack"):
                if b[name] > old[name]:
                    complaints.append(f"{where}: {name} {old[name]} -> {b[name]}")
            if b["matrix"] == 0 < old["matrix"] or b["matrix_kind"] != old["matrix_kind"]:
                complaints.append(f"{where}: matrix instructions {_matrix(old)} -> {_matrix(b)}")
            for name in ("blocks", "load_bits"):
                if b[name] < old[name]:
                    complaints.append(f"{where}: {name} {old[name]} -> {b[name]}")
            if b["asynchronous"] == 0 < old["asynchronous"]:
                complaints.append(f"{where}: asynchronous copies {old['asynchronous']} -> 0")
            if b["overlapped"] == 0 < old.get("overlapped", 0):
                complaints.append(f"{where}: exponentials under a product {old['overlapped']} -> 0")
    return complaints


def limits(now: dict[str, Any]) -> list[str]:
    """What no accepted figure may excuse: a block that does not fit the chip, a kernel that lost its stores."""
    complaints = []
    for key, builds in now.items():
        most = CHIPS[key.split(" | ")[-1]].shared_block
        for b in builds:
            where = f"{key}: {b['kernel']} {b['tile']}"
            if b["shared"] > most:
                complaints.append(f"{where}: {b['shared']} bytes shared, of {most}: does not fit")
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
    """Seconds forward and backward on each chip, by its datasheet."""
    forward, backward = case.work(dims, DTYPES[dtype].itemsize)
    return {
        c: (datasheet(chip, dtype).floor(forward), datasheet(chip, dtype).floor(backward))
        for c, chip in CHIPS.items()
    }


# ---- output

COLUMNS = ("kernel", "tile", "chip", "regs", "spills", "stack", "shared", "blocks", "matrix", "load", "async")


def static_row(key: str, b: dict[str, Any]) -> tuple[str, ...]:
    dtype, chip = key.split(" | ")[-2:]
    matrix = f"{b['matrix']} {b['matrix_kind']}" if b["matrix"] else "none"
    counts = (b[name] for name in ("registers", "spills", "stack", "shared", "blocks"))
    figures = (*counts, matrix, b["load_bits"], b["asynchronous"])
    return (b["kernel"], f"{dtype} {b['tile']}", chip, *map(str, figures))


def table(figures: dict[str, Any]) -> str:
    """A line for each distinct kernel; several configurations may share one."""
    rows = [
        COLUMNS,
        *dict.fromkeys(static_row(key, b) for key, builds in figures.items() for b in builds),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def static_page(figures: dict[str, Any]) -> str:
    rows = dict.fromkeys(static_row(key, b) for key, builds in figures.items() for b in builds)
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>\n" for row in rows)
    head = "".join(f"<th>{c}</th>" for c in COLUMNS)
    picture = roofline_picture()
    return (
        "<!doctype html><html><head><meta charset='utf-8'><title>Burnish: the static proof</title><style>"
        ":root{color-scheme:light dark}body{font:14px system-ui;margin:2em}table{border-collapse:collapse}"
        "td,th{padding:2px 10px;text-align:left;border-bottom:1px solid #8884;font-variant-numeric:tabular-nums}"
        f"</style></head><body><h1>The static proof</h1>{picture[picture.index('<svg') :]}"
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{cells}</tbody></table></body></html>\n"
    )


def floor_table(ops: list[str]) -> str:
    lines = ["floor on the datasheet chip, us forward / backward, bf16"]
    for case in CASES:
        for dims in case.bench.get("cuda", ()) if not ops or case.op in ops else ():
            times = "   ".join(
                f"{c} {f * 1e6:8.1f} /{b * 1e6:8.1f}" for c, (f, b) in floors(case, dims, "bf16").items()
            )
            lines.append(f"{case.name:28} {label(dims):32} {times}")
    return "\n".join(lines)


@as_command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m burnish.bench static", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("ops", nargs="*", metavar="op", help="all of them when none is named")
    parser.add_argument(
        "--all", action="store_true", help="every configuration, bf16 and fp32, on every chip"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with the accepted figures; status 1 when worse"
    )
    parser.add_argument("--accept", action="store_true", help=f"write {BASELINE.name} anew")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    parser.add_argument("--html", metavar="FILE", help="write a page with the table and a roofline picture")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args(argv)
    expect_triton("python -m burnish.bench static")
    unknown = set(args.ops) - {c.op for c in CASES}
    if unknown:
        parser.error(f"op: expected one of {sorted({c.op for c in CASES})}, got {sorted(unknown)}")
    figures = compile_all(selection(args.ops, args.all), args.processes)
    print(table(figures), floor_table(args.ops), sep="\n\n")
    stamp = {"triton": triton.__version__, "builds": figures}
    if args.json:
        write_whole(Path(args.json), json.dumps(stamp, indent=1) + "\n")
    if args.html:
        write_whole(Path(args.html), static_page(figures))
    if args.accept:
        kept = {} if args.all and not args.ops else accepted_figures()
        write_whole(
            BASELINE, json.dumps(stamp | {"builds": dict(sorted((kept | figures).items()))}, indent=1) + "\n"
        )
    with reading(BASELINE):
        complaints = limits(figures) + (compare(accepted_figures(), figures) if args.check else [])
    for complaint in complaints:
        print(f"worse: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(run_program("python -m burnish.bench static", main))
