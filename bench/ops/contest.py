"""A contest of one op at one shape: who takes part, on which inputs, and the samples of each, round by round.

Contestants are interleaved (A B A B), round by round. "device" is a CUDA graph of many calls, replayed: no host in it.
"eager" is a loop of calls on the host's clock: whichever of the host and the device is slower. Each call takes the next
of several input sets, so that no call finds its operands in the L2 cache.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import comb
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...algorithms.run.calls import PASSES, described, torch_as_it_was
from ..cases.case import Case, Dims, Tensors, leaves, make_inputs, make_upstream
from .clocks import capture, event_seconds, host_seconds, lost, peak_growth
from .peers import PEERS, Unsuitable

OURS, EAGER, PEER, AGAINST = "ours", "eager", "peer", "against"  # kinds; the last is a user's own
ROUNDS = 5  # by default
SURE = 0.93  # of an interval
# beyond any L2 cache, on a CPU beyond one core's share of L3
COLD_BYTES = {"cuda": 200 << 20, "cpu": 64 << 20}
MOST_SETS = 64
SLICE = 0.006  # seconds that one contestant is timed for in one round
# seconds, bytes: a graph would add little to such a call but a second copy of its memory
LONG, LARGE = 0.02, 4 << 30


@dataclass
class Contestant:
    """An implementation of a case's op, and its samples of one pass: a list for each round, seconds a call."""

    name: str
    op: Callable[..., Any]
    kind: str = PEER
    accurate: bool = True
    compile: float = 0.0  # seconds by which the first call is longer than the second
    memory: int = 0  # bytes: peak growth over live inputs
    note: str = ""
    device: list[list[float]] = field(default_factory=list)
    eager: list[list[float]] = field(default_factory=list)


def contestants(case: Case, peers: bool, absent: dict[str, str]) -> list[Contestant]:
    """Ours, eager torch, and the case's peers; absent: gets the names of those that cannot take part, and why."""
    found = [Contestant("burnish", case.fused, OURS), Contestant("eager", case.eager, EAGER)]
    for name, build in PEERS.get(case.op, {}).items() if peers else ():
        try:
            found.append(Contestant(name, build(case)))
        except ImportError:
            absent[name] = "not installed"
        except Unsuitable as reason:
            absent[f"{name} for {case.name}"] = str(reason)
    return found


# ---- one call


@dataclass(frozen=True)
class Inputs:
    tensors: Tensors
    wanted: tuple[Tensor, ...]  # those whose gradients a call makes
    upstream: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.tensors.values(), *self.upstream) if t is not None)


def prepare(case: Case, dims: Dims, dtype: torch.dtype, device: str) -> Inputs:
    tensors = make_inputs(case, dims, dtype, device)
    names = leaves(case, tensors)
    tensors = {n: t.requires_grad_() if n in names and t is not None else t for n, t in tensors.items()}
    wanted = tuple(t for n, t in tensors.items() if n in names and t is not None)
    by_ours = replace(case, reference=case.fused)  # the reference may be too large at this shape
    return Inputs(tensors, wanted, tuple(make_upstream(by_ours, tensors)))


def prepare_sets(case: Case, dims: Dims, dtype: torch.dtype, device: str, first: Inputs) -> list[Inputs]:
    """Sets of inputs, more than any cache holds, `first` among them."""
    count = min(MOST_SETS, -(-COLD_BYTES[device] // max(first.nbytes, 1)))
    return [first, *(prepare(case, dims, dtype, device) for _ in range(count - 1))]


def call(op: Callable[..., Any], case: Case, inputs: Inputs, backward: bool) -> Any:
    """One pass: that of training, whose forward saves for the backward."""
    outputs = op(**inputs.tensors, **case.options)
    if not backward or not inputs.wanted:
        return outputs
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return outputs, torch.autograd.grad(outputs, inputs.wanted, inputs.upstream)


# ---- samples


class Loop(NamedTuple):
    """The calls of a contestant that one sample times."""

    on_host: Callable[[], Any]
    count: int  # calls in it
    on_device: Callable[[], Any] | None  # one call for each set


def time_pass(
    case: Case,
    sets: list[Inputs],
    entrants: list[Contestant],
    device: str,
    backward: bool,
    rounds: int = ROUNDS,
    fault: Callable[[Contestant], str] = lambda _: "",
) -> dict[str, str]:
    """Fill the samples of every contestant for one pass; returns, by name, those that broke, and how.

    Raises what ours raises. fault: asked after each contestant's turn; a text ends its part.
    """
    loops: dict[str, Loop] = {}
    broken: dict[str, str] = {}

    def attempt(c: Contestant, step: Callable[[], None]) -> None:
        try:
            with torch_as_it_was():
                step()
        except PASSES:
            raise
        except BaseException as error:  # what breaks ends nobody else's run
            if c.kind == OURS:
                raise
            broken[c.name] = f"raises {described(error)}"
            if lost(device):
                raise RuntimeError(f"{c.name} {broken[c.name]}") from error
        if why := fault(c):
            broken[c.name] = why

    for c in entrants:
        calls = [lambda c=c, s=s: call(c.op, case, s, backward) for s in sets]
        attempt(c, lambda c=c, calls=calls: loops.update({c.name: loop_of(c, calls, device)}))
    for _ in range(rounds):
        for c in entrants:
            if c.name not in broken:
                attempt(c, lambda c=c: sample(c, loops[c.name], len(sets), device))
    return broken


def loop_of(c: Contestant, calls: list[Callable[[], Any]], device: str) -> Loop:
    """The calls that a sample times, so many that a clock can tell."""
    c.device, c.eager, c.note = [], [], ""
    c.memory = peak_growth(calls[0], device)
    once = max(host_seconds(calls[0], device), 1e-6)
    repeats = max(1, min(round(SLICE / once / len(calls)), 200))
    replay = replayed(c, calls, once) if device == "cuda" else None
    return Loop(
        lambda: [one() for _ in range(repeats) for one in calls] and None, repeats * len(calls), replay
    )


def sample(c: Contestant, loop: Loop, sets: int, device: str) -> None:
    """Add a round's samples of a contestant."""
    samples = 1 if device == "cuda" else 3
    c.eager.append([host_seconds(loop.on_host, device) / loop.count for _ in range(samples)])
    if replay := loop.on_device:
        samples = max(2, min(int(SLICE / event_seconds(replay)), 20))
        c.device.append([event_seconds(replay) / sets for _ in range(samples)])


def replayed(c: Contestant, calls: list[Callable[[], Any]], once: float) -> Callable[[], Any] | None:
    """All calls as a graph, or one after another where they are long; None, and a note, where a call waits."""
    if once > LONG or c.memory > LARGE:
        c.note = "no graph: the call is long or large"
        return lambda: [one() for one in calls] and None
    try:
        return capture(calls).replay
    except RuntimeError as error:  # it synchronises with the host
        c.note = f"not capturable: {str(error).splitlines()[0]}"
        torch.cuda.synchronize()
        return None


# ---- figures


class Ratio(NamedTuple):
    """A number of times as long: the median of the rounds' ratios, and the interval that holds the true one."""

    median: float
    low: float
    high: float

    @property
    def word(self) -> str:
        """slower, faster, or draw where the interval holds 1."""
        return "slower" if self.low > 1 else "faster" if self.high < 1 else "draw"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Two of the values, between which the true median lies with at least SURE, whatever the distribution.

    k values lie outside at either end: with n values the median is outside with 2 (C(n, 0) + ... + C(n, k)) / 2^n. Of
    five values these are the lowest and the highest, with 94 %.
    """
    n, k, outside = len(values), 0, 2 / 2 ** len(values)
    while outside + 2 * comb(n, k + 1) / 2**n <= 1 - SURE and k + 1 < n // 2:
        k += 1
        outside += 2 * comb(n, k) / 2**n
    ordered = sorted(values)
    return ordered[k], ordered[n - 1 - k]


def medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(samples) for samples in rounds]


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Ratio:
    """theirs, ours: the median of each round. A round runs all contestants, so what slows it slows both."""
    each = [a / b for a, b in zip(theirs, ours, strict=True)]
    return Ratio(*(round(x, 4) for x in (statistics.median(each), *interval(each))))


def percentiles(rounds: list[list[float]]) -> list[float] | None:
    """p20, p50, p80 in microseconds, over all rounds."""
    samples = [s for each in rounds for s in each]
    if not samples:
        return None
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return [round(1e6 * s, 2) for s in (fifths[0], statistics.median(samples), fifths[3])]


def row(c: Contestant, ours: Contestant, floor_us: float) -> dict[str, Any]:
    """The figures of a contestant in one pass. ours: what its ratio is over; floor_us: the roofline's microseconds."""
    rounds = {clock: medians(getattr(c, clock)) for clock in ("device", "eager")}
    clock = "device" if c.device and ours.device else "eager"
    over = ratio(rounds[clock], medians(getattr(ours, clock))) if c is not ours and c.accurate else None
    device, eager = percentiles(c.device), percentiles(c.eager)

    best = (device or eager or [0.0, 0.0, 0.0])[1]
    return {
        "provider": c.name,
        "kind": c.kind,
        "device_us": device,
        "eager_us": eager,
        "rounds_us": {clock: [round(1e6 * s, 3) for s in each] for clock, each in rounds.items()},
        "ratio": over,
        "share": round(floor_us / best, 3) if best else None,
        "memory_bytes": c.memory,
        "compile_s": round(c.compile, 3),
        "accurate": c.accurate,
        "note": c.note,
    }
