"""The benchmark: every op beside eager torch and, with --peers, beside all that a user could take instead.

    python -m burnish.bench [op ...] [--peers] [--json [FILE]] [--resume]

Ops are timed in the order in which they are named. The file is written anew before and after every shape: a process
that dies leaves its rows and the name of the shape that it died at, which --resume tells as red and goes on behind.

No case is timed before it has passed the accuracy rule at its benchmark shape. Contestants are interleaved (A B A B),
five rounds; every figure is a p50 with its p20 and p80. "device" is a CUDA graph of many calls, replayed: no host in
it. "eager" is a loop of calls on the host's clock: whichever of the host and the device is slower. Each call takes the
next of several input sets, 200 MB in all (64 on a CPU), so that no call finds its operands in the L2 cache. The
forward pass is that of training: it saves for the backward. share = floor / time, the floor being bytes over the
bandwidth of a copy or operations over the rate of a matrix product, whichever is longer, both measured in this run.
"""

import argparse
import datetime
import hashlib
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...algorithms.run.streams import run_program
from ...kernels._chip import INTERPRET
from ...model.files.text_files import read_object
from ..cases.case import Case, Dims, Tensors, assert_accurate, label, leaves, make_inputs, make_upstream
from ..cases.registry import CASES
from ..record import PASSES, ROOT, as_command, clocks, machine, reading, results_file, run_text, write_whole
from . import roofline
from .peers import PEERS, Unsuitable

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROUNDS = 5
# beyond any L2 cache, on a CPU beyond one core's share of L3
COLD_BYTES = {"cuda": 200 << 20, "cpu": 64 << 20}
MOST_SETS = 64
SLICE = 0.006  # seconds that one contestant is timed for in one round
# seconds, bytes: a graph would add little to such a call but a second copy of its memory
LONG, LARGE = 0.02, 4 << 30
LOST = 3  # exit status: the device answers no more, another process may go on
OUT_OF_TIME = "out of time"
FAILED: list[torch.cuda.CUDAGraph] = []  # torch's allocator goes on looking at a graph whose capture failed


@dataclass
class Contestant:
    name: str
    op: Callable[..., Any]
    accurate: bool = True
    compile: float = 0.0  # seconds by which the first call is longer than the second
    memory: int = 0  # bytes: peak growth over live inputs
    note: str = ""
    device: list[float] = field(default_factory=list)  # seconds per call
    eager: list[float] = field(default_factory=list)


# ---- one call


@dataclass(frozen=True)
class Inputs:
    tensors: Tensors
    wanted: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.tensors.values(), *self.upstream) if t is not None)


def prepare(case: Case, dims: Dims, dtype: torch.dtype, device: str) -> Inputs:
    tensors = make_inputs(case, dims, dtype, device)
    names = leaves(case, tensors)
    tensors = {n: t.requires_grad_() if n in names and t is not None else t for n, t in tensors.items()}
    upstream = make_upstream(
        replace(case, reference=case.fused), tensors
    )  # a reference may be too large at this shape
    return Inputs(
        tensors, tuple(t for n, t in tensors.items() if n in names and t is not None), tuple(upstream)
    )


def call(op: Callable[..., Any], case: Case, inputs: Inputs, backward: bool) -> Any:
    outputs = op(**inputs.tensors, **case.options)
    if not backward or not inputs.wanted:
        return outputs
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return outputs, torch.autograd.grad(outputs, inputs.wanted, inputs.upstream)


# ---- clocks


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def host_seconds(work: Callable[[], Any], device: str) -> float:
    sync(device)
    begun = time.perf_counter()
    work()
    sync(device)
    return time.perf_counter() - begun


def capture(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """One graph of all calls. Their results stay alive inside it, so that each call writes to memory of its own.

    RuntimeError where a call waits for the host. That is found before a capture begins: one that fails leaves torch's
    generator and its current stream in the capture, and the next random number ends the run.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
        torch.cuda.set_sync_debug_mode("error")
        try:
            calls[0]()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    untouched = generator.clone_state()
    try:
        with torch.cuda.graph(graph):
            kept = [once() for once in calls]
    except RuntimeError:
        FAILED.append(graph)
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(untouched)
        raise
    del kept
    return graph


def event_seconds(work: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_growth(work: Callable[[], Any], device: str) -> int:
    """Bytes that torch's allocators held at the worst moment of one call, beyond what was live before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself on stderr
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    results: Any = profile.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    held = peak = 0
    for _, nbytes in events:
        held += nbytes
        peak = max(peak, held)
    return peak


# ---- one row


def contestants(case: Case, peers: bool, absent: dict[str, str]) -> list[Contestant]:
    found = [Contestant("burnish", case.fused), Contestant("eager", case.eager)]
    for name, build in PEERS.get(case.op, {}).items() if peers else ():
        try:
            found.append(Contestant(name, build(case)))
        except ImportError:
            absent[name] = "not installed"
        except Unsuitable as reason:
            absent[f"{name} for {case.name}"] = str(reason)
    return found


def time_row(case: Case, sets: list[Inputs], entrants: list[Contestant], device: str, backward: bool) -> None:
    """Fill the samples of every contestant for one pass."""
    loops: dict[str, Callable[[], Any]] = {}  # on the host's clock
    replays: dict[str, Callable[[], Any]] = {}  # on the device's
    counts: dict[str, int] = {}
    for c in entrants:
        c.device, c.eager, c.note = [], [], ""
        calls = [lambda c=c, s=s: call(c.op, case, s, backward) for s in sets]
        c.memory = peak_growth(calls[0], device)
        once = max(host_seconds(calls[0], device), 1e-6)
        repeats = max(1, min(round(SLICE / once / len(calls)), 200))
        counts[c.name] = repeats * len(calls)
        loops[c.name] = lambda calls=calls, repeats=repeats: (
            [one() for _ in range(repeats) for one in calls] and None
        )
        if device == "cuda" and (once > LONG or c.memory > LARGE):
            replays[c.name] = lambda calls=calls: [one() for one in calls] and None
            c.note = "no graph: the call is long or large"
        elif device == "cuda":
            try:
                replays[c.name] = capture(calls).replay
            except RuntimeError as error:  # it synchronises with the host
                c.note = f"not capturable: {str(error).splitlines()[0]}"
                torch.cuda.synchronize()
    for _ in range(ROUNDS):
        for c in entrants:
            samples = 1 if device == "cuda" else 3
            c.eager += [host_seconds(loops[c.name], device) / counts[c.name] for _ in range(samples)]
            if c.name in replays:
                samples = max(2, min(int(SLICE / event_seconds(replays[c.name])), 20))
                c.device += [event_seconds(replays[c.name]) / len(sets) for _ in range(samples)]


def percentiles(samples: list[float]) -> list[float] | None:
    """p20, p50, p80 in microseconds."""
    if not samples:
        return None
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return [round(1e6 * s, 2) for s in (fifths[0], statistics.median(samples), fifths[3])]


def bench_shape(
    case: Case,
    dims: Dims,
    dtype_name: str,
    device: str,
    ceilings: roofline.Ceilings,
    peers: bool,
    report: dict[str, Any],
) -> None:
    """Check, then time, then append to report["rows"]; a red case goes to report["red"] and is not timed."""
    dtype = DTYPES[dtype_name]
    one = prepare(case, dims, dtype, device)
    checked = make_inputs(case, case.check(dims), dtype, device)
    entrants: list[Contestant] = []
    for c in contestants(case, peers, report["absent"]):
        try:
            first, later = (
                host_seconds(lambda c=c: call(c.op, case, one, backward=True), device) for _ in range(2)
            )
            c.compile = max(first - later, 0)
            assert_accurate(replace(case, fused=c.op), checked)
        except AssertionError as error:
            if c.name == "burnish":
                report["red"].append(f"{label(dims)}: {error}")
                print(f"RED, not timed: {label(dims)}: {error}")
                return
            c.accurate = False
        except Exception as error:  # what breaks is listed, and ends nobody else's run
            if c.name == "burnish":
                report["red"].append(f"{case.name} {label(dims)}: {type(error).__name__}: {error}")
                print(f"RED, not timed: {report['red'][-1]}")
                return
            what = f"{c.name} for {case.name} {label(dims)}"
            report["absent"][what] = f"{type(error).__name__}: {error}".splitlines()[0]
            if device == "cuda":  # it may have run out of memory
                torch.cuda.empty_cache()
            continue
        entrants.append(c)
    del checked
    count = min(MOST_SETS, -(-COLD_BYTES[device] // max(one.nbytes, 1)))
    sets = [one, *(prepare(case, dims, dtype, device) for _ in range(count - 1))]
    forward, backward = case.work(dims, dtype.itemsize)
    for name in PASSES if one.wanted else PASSES[:1]:
        both = name == "forward+backward"
        floor_us = round(1e6 * (ceilings.floor(forward) + (ceilings.floor(backward) if both else 0)), 2)
        time_row(case, sets, entrants, device, both)
        for c in entrants:
            device_us, eager_us = percentiles(c.device), percentiles(c.eager)
            best = (device_us or eager_us or [0, 0, 0])[1]
            report["rows"].append(
                {
                    "case": case.name,
                    "dims": dims,
                    "dtype": dtype_name,
                    "pass": name,
                    "provider": c.name,
                    "device_us": device_us,
                    "eager_us": eager_us,
                    "floor_us": floor_us,
                    "binds": ceilings.binds(forward),
                    "share": round(floor_us / best, 3) if best else None,
                    "memory_bytes": c.memory,
                    "compile_s": round(c.compile, 3),
                    "accurate": c.accurate,
                    "sets": len(sets),
                    "note": c.note,
                }
            )
        print_rows(report["rows"][-len(entrants) :])


def in_turn(cases: list[Case], device: str) -> Iterator[tuple[Case, Dims]]:
    """Every case's first shape, then every case's second: a run cut short has something of each."""
    shapes = [[(case, dims) for dims in case.bench.get(device, ())] for case in cases]
    return (pair for layer in zip_longest(*shapes) for pair in layer if pair is not None)


def lost(device: str) -> str:
    """Why the device answers no more, which no later call in this process survives; "" where it does."""
    try:
        sync(device)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def fingerprint() -> str:
    """Of what is timed and what times it, but for the table that is written from the times."""
    files = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    sources = (path.read_bytes() for path in sorted(files) if path.name != "_lora_paths.py")
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


def kept_report(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """What an earlier process wrote of the same day, code and machine; red is the shape that it died at."""
    if not path.exists():
        return fresh
    with reading(path):
        report = read_object(path)
        same = all(report.get(name) == fresh[name] for name in ("machine", "date", "code"))
        if not same or "begun" not in report or report["ceilings"]["dtype"] != fresh["ceilings"]["dtype"]:
            return fresh
        if running := report.pop("running", None):
            report["red"].append(f"{running}: the process died")
        report["absent"] = {what: why for what, why in report["absent"].items() if why != OUT_OF_TIME}
    return report


def print_rows(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    floor = f"floor {first['floor_us']:.1f} us, {first['binds']} bind"
    print(f"\n{first['case']}  {label(first['dims'])}  {first['dtype']}  {first['pass']}  ({floor})")
    for r in rows:
        device, eager = (
            f"{u[1]:9.1f} [{u[0]:.1f}, {u[2]:.1f}]" if u else "" for u in (r["device_us"], r["eager_us"])
        )
        verdict = "" if r["accurate"] else "  outside the accuracy rule"
        share = f"{r['share']:6.1%}" if r["share"] else ""
        print(
            f"  {r['provider']:16} device {device:28} eager {eager:28} share {share}  "
            f"memory {r['memory_bytes'] / 1e6:8.1f} MB  compile {r['compile_s']:5.1f} s{verdict}"
        )


@as_command
def main(argv: list[str] | None = None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        prog="python -m burnish.bench", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("ops", nargs="*", metavar="op", help="all of them when none is named")
    parser.add_argument(
        "--peers", action="store_true", help="torch.compile, torch's own fused ops, other libraries"
    )
    parser.add_argument(
        "--json", nargs="?", const="", metavar="FILE", help="default: bench/results/<machine>-<date>.json"
    )
    parser.add_argument("--resume", action="store_true", help="add to the file of --json what it lacks")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16" if device == "cuda" else "fp32")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="start no shape after this"
    )
    parser.add_argument(
        "--commit", default=run_text("git", "describe", "--always", "--dirty"), help="where git is absent"
    )
    args = parser.parse_args(argv)
    if INTERPRET:
        parser.error("TRITON_INTERPRET: expected unset, interpreted kernels have no speed")
    unknown = set(args.ops) - {c.op for c in CASES}
    if unknown:
        parser.error(f"op: expected one of {sorted({c.op for c in CASES})}, got {sorted(unknown)}")
    if args.resume and args.json is None:
        parser.error("--resume: expected --json beside it")

    begun = time.perf_counter()
    today = datetime.date.today().isoformat()
    report: dict[str, Any] = {
        "machine": machine(device),
        "date": today,
        "commit": args.commit,
        "code": fingerprint(),
        "command": shlex.join(["python", "-m", "burnish.bench", *(sys.argv[1:] if argv is None else argv)]),
        "ceilings": {"dtype": args.dtype},
        "clocks_before": clocks(device),
        "absent": {},
        "red": [],
        "begun": [],
        "rows": [],
    }
    path = (
        results_file(report["machine"]["device"], today) if args.json == "" else args.json and Path(args.json)
    )
    if args.resume:
        report = kept_report(path, report)
    known: dict[str, Any] = report["ceilings"]
    if "rate_per_s" in known:
        ceilings = roofline.Ceilings(known["bandwidth_bytes_per_s"], known["rate_per_s"])
    else:
        ceilings = roofline.measure(device, DTYPES[args.dtype])
        known |= {"bandwidth_bytes_per_s": ceilings.bandwidth, "rate_per_s": ceilings.rate}
    print(
        f"{report['machine']}\ncopy {ceilings.bandwidth / 1e9:.0f} GB/s, product {ceilings.rate / 1e12:.1f} TFLOP/s"
    )

    def write() -> None:
        if path:
            write_whole(path, json.dumps(report, indent=1) + "\n")

    chosen = [c for c in CASES if not args.ops or c.op in args.ops]
    chosen.sort(key=lambda c: args.ops.index(c.op) if args.ops else 0)
    for case, dims in in_turn(chosen, device):
        where = f"{case.name} {label(dims)}"
        if where in report["begun"]:
            continue
        if time.perf_counter() - begun > args.budget:
            report["absent"][where] = OUT_OF_TIME
            continue
        report["begun"].append(where)
        report["running"] = where
        write()
        try:
            torch.manual_seed(0)
            bench_shape(case, dims, args.dtype, device, ceilings, args.peers, report)
        except Exception as error:  # the other shapes are still worth having
            report["red"].append(f"{where}: {type(error).__name__}: {error}")
            print(f"RED, not timed: {report['red'][-1]}")
        del report["running"]
        if why := lost(device):
            report["red"].append(f"{where}: the device is lost: {why}")
            print(f"RED: {report['red'][-1]}")
            write()
            return LOST
        write()
    report["clocks_after"] = clocks(device)
    report["seconds"] = round(time.perf_counter() - begun, 1)
    for what, why in report["absent"].items():
        print(f"{what}: {why}")
    write()
    if path:
        print(f"written: {os.path.relpath(path)}")
    return 1 if report["red"] else 0


if __name__ == "__main__":
    sys.exit(run_program("python -m burnish.bench", main))
