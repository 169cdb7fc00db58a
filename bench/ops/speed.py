"""Times of our ops beside eager torch, beside other libraries (--peers), and beside your own functions (--against).

    burnish bench [OP ...] [--peers] [--json FILE] [--csv FILE]
    burnish bench rms_norm --shape "B=1 T=300 C=777" --dtype bf16 --against mine.py:rms_norm
    burnish bench --list [OP ...]                           the ops, their shapes, the arguments of your function
    burnish bench --compare A.json B.json [--fail-above 1.1]

A contestant is timed only after its outputs and gradients have passed the accuracy rule (cases/case.py). theirs.py
lists the further conditions for your functions. Ops are timed in the order in which they are named. A time is a p50
with its p20 and p80. A ratio is a contestant's time over ours in the same round: its median over the rounds, with the
interval that holds the true median. contest.py describes a round. share = floor / time. The floor is bytes / bandwidth
or operations / rate, whichever is longer. This run measures the bandwidth with a copy and the rate with a matrix
product.

The files are written again before and after every shape. So a process that dies leaves its rows, and the name of the
shape at which it died. --resume records that shape as red (failed), and continues after it.
"""

import datetime
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from ...algorithms.run.calls import PASSES, torch_as_it_was
from ...algorithms.run.flags import POSITIONAL, Bounds
from ...kernels._chip import INTERPRET
from ...model.errors import InputError
from .. import record
from ..cases.case import DTYPES, Case, Dims, label, make_inputs
from ..cases.registry import CASES
from ..cases.shapes import describe
from ..flags import flag, spelled
from . import roofline
from .chosen import chosen, left_out, shaped
from .clocks import host_seconds, lost
from .compare import compare
from .contest import (
    AGAINST,
    OURS,
    ROUNDS,
    Contestant,
    Inputs,
    call,
    contestants,
    prepare,
    prepare_sets,
    row,
    time_pass,
)
from .listing import listing
from .output import as_csv, print_rows, waiting
from .resumed import OUT_OF_TIME, asked, fingerprint, kept_report
from .theirs import (
    OnClones,
    against,
    changed,
    copied,
    first_wrong,
    misfit,
    raises,
    restore,
    why_not,
    writes,
)

LOST = 3  # exit status: the device no longer answers, but another process may go on


@dataclass(frozen=True, kw_only=True)
class Config:
    ops: Annotated[tuple[str, ...], POSITIONAL] = ()  # ops, or cases such as rms_norm/heads (default: all)
    shape: tuple[str, ...] = ()  # your own shapes, in the letters that --list shows: "B=1 T=300 C=777"
    dtype: Literal["bf16", "fp16", "fp32"] | None = (
        None  # dtype of the inputs (default: bf16 on a GPU, fp32 on a CPU)
    )
    against: tuple[str, ...] = ()  # FILE.py:function ..., timed beside ours; the file is executed
    rounds: Annotated[int, Bounds(5, 1000)] = ROUNDS  # of timing; more rounds narrow the interval of a ratio
    peers: bool = False  # also time torch.compile, torch's own fused ops and other installed libraries
    forward_only: bool = False  # check and time the forward pass alone
    check_only: bool = False  # check accuracy, and time nothing; works with TRITON_INTERPRET=1
    list: bool = False  # list the ops, or describe the named ops, and time nothing
    compare: tuple[Path, ...] = ()  # two files of --json: print the changes in the second
    fail_above: Annotated[float, Bounds(1)] | None = None  # with --compare: exit status 1 above this ratio
    json: Path | None = None  # write the figures to this file
    csv: Path | None = None  # write the figures to this file, a line for each pass of each contestant
    keep: bool = False  # write the figures to bench/results/<machine>-<date>.json
    resume: bool = False  # continue the file of --json or --keep with its missing shapes
    budget: Annotated[float, Bounds(0, switch=True)] = inf  # seconds after which no further shape is started
    commit: str | None = None  # commit to record with the figures, if git is absent


def main(cfg: Config) -> int:
    """Run the benchmark, and return the exit status.

    The status is 1 if a function is wrong, if a shape is red (failed), or with --fail-above if a time is slower. The
    status is LOST if the device no longer answers.
    """
    check(cfg)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.list:
        print(listing(CASES, cfg.ops, device))
        return 0
    if cfg.compare:
        first, second = cfg.compare
        return compare(first, second, cfg.fail_above)

    own = against(cfg.against)
    shapes = shapes_of(cfg, device)
    if cfg.shape and (others := left_out(CASES, cfg.ops, shapes)):
        print(f"not timed unless named: {', '.join(others)}")
    bench = Bench(cfg, device, own)
    return bench.run(shapes)


def check(cfg: Config) -> None:
    """Raise InputError if flags contradict one another, so that no flag is silently ignored."""
    alone = [name for name in ("list", "compare") if getattr(cfg, name)]
    given = [name for name, value in vars(cfg).items() if value != getattr(Config, name)]
    beside = {"list": ("list", "ops"), "compare": ("compare", "fail_above")}
    for name in alone:
        if others := [other for other in given if other not in beside[name]]:
            raise InputError(f"--{name}: expected no {flag(others[0])} beside it")

    # flags that would be ignored, or have a wrong number of values
    if cfg.compare and len(cfg.compare) != 2:
        raise InputError(f"--compare: expected two files, got {len(cfg.compare)}")
    if cfg.fail_above is not None and not cfg.compare:
        raise InputError("--fail-above: expected --compare beside it")

    # output files
    if cfg.resume and not (cfg.json or cfg.keep):
        raise InputError("--resume: expected --json FILE or --keep beside it")
    if cfg.json and cfg.keep:
        raise InputError("--keep: expected no --json beside it, because --keep names the file itself")
    if cfg.keep and (cfg.check_only or cfg.forward_only):  # tables are made from kept files
        raise InputError(
            "--keep: expected whole passes to keep, got --check-only or --forward-only beside it"
        )
    if cfg.csv and cfg.json and cfg.csv.absolute() == cfg.json.absolute():
        raise InputError(f"--csv: expected another file than --json {cfg.json}")
    if cfg.commit and not (cfg.json or cfg.keep):
        raise InputError("--commit: expected --json FILE or --keep beside it")

    if cfg.check_only and cfg.rounds != ROUNDS:
        raise InputError("--rounds: expected no --check-only beside it, which times nothing")

    # flags that need an op
    for name in ("shape", "against"):
        if getattr(cfg, name) and not cfg.ops:
            raise InputError(f"--{name}: expected an op before it, got none; --list shows them")
    if INTERPRET and not (cfg.check_only or alone):
        raise InputError(
            "TRITON_INTERPRET: expected unset or --check-only, because interpreted kernels are not timed"
        )


def shapes_of(cfg: Config, device: str) -> list[tuple[Case, Dims]]:
    """Return the (Case, shape) pairs to time, in order. Raises InputError for an unknown op or an invalid shape."""
    cases = chosen(CASES, cfg.ops)
    if cfg.shape:
        return shaped(cases, cfg.ops, cfg.shape, DTYPES[dtype_of(cfg, device)], device)
    return list(in_turn(cases, device))


def dtype_of(cfg: Config, device: str) -> str:
    return cfg.dtype or ("bf16" if device == "cuda" else "fp32")


def in_turn(cases: list[Case], device: str) -> Iterator[tuple[Case, Dims]]:
    """Yield the first shape of every Case, then the second of every Case, and so on.

    So an interrupted run has figures of as many Cases as possible.
    """
    shapes = [[(case, dims) for dims in case.bench.get(device, ())] for case in cases]
    return (pair for layer in zip_longest(*shapes) for pair in layer if pair is not None)


# ---- a run


@dataclass
class Bench:
    """A run of the benchmark: its flags, and its report, which is written as it grows."""

    cfg: Config
    device: str
    own: list[Contestant]
    begun: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        cfg, today = self.cfg, datetime.date.today().isoformat()
        here = record.machine(self.device)
        self.dtype = dtype_of(cfg, self.device)
        self.path = record.results_file(here["device"], today) if cfg.keep else cfg.json

        # the circumstances of the run, then its outcome
        self.report: dict[str, Any] = {
            "machine": here,
            "date": today,
            "commit": cfg.commit or record.run_text("git", "describe", "--always", "--dirty"),
            "code": fingerprint(),
            "command": spelled("burnish bench", cfg),
            "asked": asked(cfg),
            "ceilings": {"dtype": self.dtype},
            "clocks_before": record.clocks(self.device),
        }
        self.report |= {"absent": {}, "red": [], "wrong": [], "right": [], "begun": [], "rows": []}
        if cfg.resume and self.path:
            self.report = kept_report(self.path, self.report)

    def run(self, shapes: list[tuple[Case, Dims]]) -> int:
        """Run every shape in turn while the device answers. Return the exit status."""
        self.write()  # fail now if the file cannot be written
        self.ceilings = self.measured()
        for case, dims in shapes:
            if (where := f"{case.name} {label(dims)}") in self.report["begun"]:
                continue
            if time.perf_counter() - self.begun > self.cfg.budget:
                self.report["absent"][where] = OUT_OF_TIME
                continue
            if not self.run_shape(case, dims, where):
                return LOST

        report = self.report
        report["clocks_after"] = record.clocks(self.device)
        report["seconds"] = round(time.perf_counter() - self.begun, 1)
        for what, why in report["absent"].items():
            print(f"{what}: {why}")
        self.write()
        for path in (self.path, self.cfg.csv):
            if path:
                print(f"written: {os.path.relpath(path)}")
        return 1 if report["red"] or report["wrong"] else 0

    def run_shape(self, case: Case, dims: Dims, where: str) -> bool:
        """Run one shape, and return whether the device still answers. An exception marks the shape as red (failed)."""
        report = self.report
        report["begun"].append(where)
        report["running"] = where
        self.write()
        try:
            torch.manual_seed(0)
            self.bench_shape(case, dims)
        except Exception as error:  # the other shapes are still run
            self.red(f"{where}: {type(error).__name__}: {error}")
        del report["running"]
        if why := lost(self.device):
            self.red(f"{where}: the device is lost: {why}")
        self.write()
        return not why

    def red(self, text: str) -> None:
        self.report["red"].append(text)
        print(f"RED, not timed: {text}")

    def measured(self) -> roofline.Ceilings:
        """Return the ceilings of the machine, measured by a copy and a matrix product.

        If an earlier process has measured the ceilings, its figures are used. With --check-only both ceilings are 1,
        because nothing is timed.
        """
        known: dict[str, Any] = self.report["ceilings"]
        if self.cfg.check_only:
            return roofline.Ceilings(1.0, 1.0)
        if "rate_per_s" in known:
            ceilings = roofline.Ceilings(known["bandwidth_bytes_per_s"], known["rate_per_s"])
        else:
            with waiting("measuring a copy and a product") as say:
                ceilings = roofline.measure(self.device, DTYPES[self.dtype])
                say("done")
            known |= {"bandwidth_bytes_per_s": ceilings.bandwidth, "rate_per_s": ceilings.rate}
        facts = ", ".join(f"{name} {value}" for name, value in self.report["machine"].items())
        bandwidth, rate = ceilings.bandwidth / 1e9, ceilings.rate / 1e12
        print(f"{facts}\ncopy {bandwidth:.0f} GB/s, {self.dtype} product {rate:.3g} TFLOP/s")
        return ceilings

    def write(self) -> None:
        if self.path:
            record.write_whole(self.path, json.dumps(self.report, indent=1) + "\n")
        if self.cfg.csv:
            record.write_whole(self.cfg.csv, as_csv(self.report))

    # ---- one shape

    def bench_shape(self, case: Case, dims: Dims) -> None:
        """Check all contestants at a shape, then time them.

        If our own op is wrong, nothing is timed. A user's function that is wrong is left out.
        """
        print(f"\n{case.name}  {label(dims)}  {self.dtype}")
        if (at := case.check(dims)) != dims:
            print(f"  checked at {label(at)}: the reference does not fit at the full shape")
        if self.cfg.forward_only:
            case = replace(case, fixed=tuple(case.inputs(case.shapes[0], torch.float32, "cpu")))
        one = prepare(case, dims, DTYPES[self.dtype], self.device)

        entrants: list[Contestant] = []
        for c in [*contestants(case, self.cfg.peers, self.report["absent"]), *map(replace, self.own)]:
            with waiting(f"  {c.name}: compiling and checking") as say:
                why, runs = self.verdict(c, case, dims, one)
                say(why or f"right, compiled in {c.compile:.1f} s")

            # our fault ends the shape, a user's function is left out, a peer that runs is timed and marked
            if why and c.kind == OURS:
                self.red(f"{case.name} {label(dims)}: {why}")
                return
            if why and (c.kind == AGAINST or not runs):
                self.out(c, case, dims, why)
            else:
                c.accurate = not why
                entrants.append(c)

        if self.cfg.check_only:
            at = {"case": case.name, "dims": dims, "dtype": self.dtype}
            self.report["right"] += [{"provider": c.name, **at} for c in entrants if c.accurate]
        else:
            self.time_shape(case, dims, one, entrants)

    def out(self, c: Contestant, case: Case, dims: Dims, why: str) -> None:
        """Record why a contestant is not timed at a shape.

        A user's function that is wrong in one pass also loses its rows of the other pass.
        """
        if c.kind == AGAINST:
            at = {"provider": c.name, "case": case.name, "dims": dims, "dtype": self.dtype}
            self.report["wrong"].append({**at, "why": why})
            self.report["rows"] = [r for r in self.report["rows"] if not at.items() <= r.items()]
        else:
            self.report["absent"][f"{c.name} for {case.name} {label(dims)}"] = why

    @torch_as_it_was()
    def verdict(self, c: Contestant, case: Case, dims: Dims, one: Inputs) -> tuple[str, bool]:
        """Check a contestant. Return (reason, runs): the reason is "" if it is right; runs tells whether it can run."""
        theirs = c.kind == AGAINST
        dtype, at = DTYPES[self.dtype], case.check(dims)
        draws = [make_inputs(case, at, dtype, self.device) for _ in range(1 + theirs)]
        shape = describe(case, at, dtype)
        if theirs and (why := misfit(c.op, case, draws[0])):
            return why, False

        # the first call compiles
        op = OnClones(c.op) if theirs else c.op
        once = lambda: call(op, case, one, backward=True)
        broken = ""
        try:
            first, later = (host_seconds(once, self.device) for _ in range(2))
            c.compile = max(first - later, 0)
            if not theirs:
                return first_wrong(c.op, case, draws, shape), True
        except PASSES:
            raise
        except BaseException as error:  # it is reported, and the others go on
            broken = raises(error)

            if lost(self.device):
                raise RuntimeError(f"{c.name} {broken}") from error
            if self.device == "cuda":  # it may have run out of memory
                torch.cuda.empty_cache()

        # for a user's function, the result of the checks says more than torch's exception
        why = why_not(c.op, case, draws, shape) if theirs else ""
        return why or broken, not broken

    def time_shape(self, case: Case, dims: Dims, one: Inputs, entrants: list[Contestant]) -> None:
        """Time each pass, and add a row for each contestant to the report."""
        dtype = DTYPES[self.dtype]
        sets = prepare_sets(case, dims, dtype, self.device, one)
        forward, backward = case.work(dims, dtype.itemsize)
        own = [c for c in entrants if c.kind == AGAINST]
        given = copied(one.tensors) if own else {}

        def fault(c: Contestant) -> str:
            """Return an error text if a user's function has written to its inputs, otherwise "".

            Changed inputs are restored for the other contestants.
            """
            if c.kind != AGAINST or not (names := changed(one.tensors, given)):
                return ""
            restore(one.tensors, given)
            return writes(names)

        for name in record.PASSES if one.wanted else record.PASSES[:1]:
            with_backward = name == "forward+backward"
            floor = self.ceilings.floor(forward) + (self.ceilings.floor(backward) if with_backward else 0)
            floor_us = round(1e6 * floor, 2)
            with waiting(f"  timing {name}") as say:
                broken = time_pass(case, sets, entrants, self.device, with_backward, self.cfg.rounds, fault)
                say("done" if not broken else "; ".join(f"{name} {why}" for name, why in broken.items()))
            for c in entrants:
                if c.name in broken:
                    self.out(c, case, dims, broken[c.name])
            entrants = [c for c in entrants if c.name not in broken]

            ours = next(c for c in entrants if c.kind == OURS)
            place = {"case": case.name, "dims": dims, "dtype": self.dtype, "pass": name}
            sums = {"floor_us": floor_us, "binds": self.ceilings.binds(forward), "sets": len(sets)}
            rows = [place | sums | row(c, ours, floor_us) for c in entrants]
            self.report["rows"] += rows
            print_rows(rows, self.device)

        for c in own:
            if c in entrants:
                self.ask_again(c, case, dims)

    @torch_as_it_was()
    def ask_again(self, c: Contestant, case: Case, dims: Dims) -> None:
        """Check a user's function again after it was timed, because its results may change after many calls."""
        dtype, at = DTYPES[self.dtype], case.check(dims)
        draws = [make_inputs(case, at, dtype, self.device) for _ in range(2)]
        with waiting(f"  {c.name}: checking again") as say:
            why = why_not(c.op, case, draws, describe(case, at, dtype))
            say(why or "right")
        if why:
            self.out(c, case, dims, f"right at first, wrong after it was timed: {why}")
