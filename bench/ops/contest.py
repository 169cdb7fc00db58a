"""A contest of several implementations of one op at one shape: the contestants, their inputs and their time samples.

In each round the contestants take turns (A B A B). The "device" clock times a CUDA graph of many calls that is
replayed, so it includes no host time. The "eager" clock times a loop of calls on the host, so it measures the slower of
host and device. Each call takes the next of several input sets, so that no call finds its operands in the L2 cache.
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

OURS, EAGER, PEER, AGAINST = "ours", "eager", "peer", "against"  # kinds; the last: a user's function
ROUNDS = 5  # by default
SURE = 0.93  # probability that an interval holds the true median
# bytes of all input sets: above any L2 cache; on a CPU above one core's share of L3
COLD_BYTES = {"cuda": 200 << 20, "cpu": 64 << 20}
MOST_SETS = 64
SLICE = 0.006  # seconds that one contestant is timed for in one round
# seconds, bytes: above these a call is not captured, as a graph gains little and doubles the memory
LONG, LARGE = 0.02, 4 << 30


@dataclass
class Contestant:
    """An implementation of an op, and its time samples of one pass: a list for each round, in seconds per call."""

    name: str
    op: Callable[..., Any]
    kind: str = PEER
    accurate: bool = True
    compile: float = 0.0  # seconds by which the first call takes longer than the second
    memory: int = 0  # bytes: peak memory of a call beyond the live inputs
    note: str = ""
    device: list[list[float]] = field(default_factory=list)
    eager: list[list[float]] = field(default_factory=list)


def contestants(case: Case, peers: bool, absent: dict[str, str]) -> list[Contestant]:
    """Return our op, eager torch and, if `peers` is True, the Case's peers: implementations by other libraries.

    The names of peers that cannot take part are added to `absent`, with the reason.
    """
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
    """The tensors of one call, the inputs that need a gradient, and the upstream gradients."""

    tensors: Tensors
    wanted: tuple[Tensor, ...]  # inputs whose gradients a call computes
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
    """Return input sets, beginning with `first`: at most MOST_SETS, and together larger than the caches."""
    count = min(MOST_SETS, -(-COLD_BYTES[device] // max(first.nbytes, 1)))
    return [first, *(prepare(case, dims, dtype, device) for _ in range(count - 1))]


def call(op: Callable[..., Any], case: Case, inputs: Inputs, backward: bool) -> Any:
    """Call the op as in training, where it saves tensors for the backward pass. backward: also compute gradients."""
    outputs = op(**inputs.tensors, **case.options)
    if not backward or not inputs.wanted:
        return outputs
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return outputs, torch.autograd.grad(outputs, inputs.wanted, inputs.upstream)


# ---- samples


class Loop(NamedTuple):
    """The calls of a contestant that one time sample measures."""

    on_host: Callable[[], Any]
    count: int  # calls in on_host
    on_device: Callable[[], Any] | None  # one call for each input set


def time_pass(
    case: Case,
    sets: list[Inputs],
    entrants: list[Contestant],
    device: str,
    backward: bool,
    rounds: int = ROUNDS,
    fault: Callable[[Contestant], str] = lambda _: "",
) -> dict[str, str]:
    """Time one pass of every contestant. Return the contestants that broke: name -> reason.

    The samples are stored in the contestants. An exception of our own op is raised. `fault` is called after each turn
    of a contestant. If it returns a text other than "", the contestant is excluded, and the text is the reason. Raises
    RuntimeError if a contestant makes the device unusable.
    """
    loops: dict[str, Loop] = {}
    broken: dict[str, str] = {}

    def attempt(c: Contestant, step: Callable[[], None]) -> None:
        try:
            with torch_as_it_was():
                step()
        except PASSES:
            raise
        except BaseException as error:  # the other contestants go on
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
    """Return the calls that one sample times, repeated to take about SLICE seconds. Also measure a call's memory."""
    c.device, c.eager, c.note = [], [], ""
    c.memory = peak_growth(calls[0], device)
    once = max(host_seconds(calls[0], device), 1e-6)
    repeats = max(1, min(round(SLICE / once / len(calls)), 200))
    replay = replayed(c, calls, once) if device == "cuda" else None
    return Loop(
        lambda: [one() for _ in range(repeats) for one in calls] and None, repeats * len(calls), replay
    )


def sample(c: Contestant, loop: Loop, sets: int, device: str) -> None:
    """Time a contestant for one round, and store the samples in it."""
    samples = 1 if device == "cuda" else 3
    c.eager.append([host_seconds(loop.on_host, device) / loop.count for _ in range(samples)])
    if replay := loop.on_device:
        samples = max(2, min(int(SLICE / event_seconds(replay)), 20))
        c.device.append([event_seconds(replay) / sets for _ in range(samples)])


def replayed(c: Contestant, calls: list[Callable[[], Any]], once: float) -> Callable[[], Any] | None:
    """Return a function that replays all calls as one CUDA graph.

    A long or large call is not captured: the function then makes the calls one after another. If a call waits for the
    host, return None. In both cases c.note gets the reason.
    """
    if once > LONG or c.memory > LARGE:
        c.note = "no graph: the call is long or large"
        return lambda: [one() for one in calls] and None
    try:
        return capture(calls).replay
    except RuntimeError as error:  # a call synchronises with the host
        c.note = f"not capturable: {str(error).splitlines()[0]}"
        torch.cuda.synchronize()
        return None


# ---- figures


class Ratio(NamedTuple):
    """A ratio of two times: its median over the rounds, and the interval that holds the true median."""

    median: float
    low: float
    high: float

    @property
    def word(self) -> str:
        """Return "slower" or "faster", or "draw" if the interval holds 1."""
        return "slower" if self.low > 1 else "faster" if self.high < 1 else "draw"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return two of the values that hold the true median with a probability of at least SURE, for any distribution.

    The interval leaves out the k lowest and the k highest of n values. The probability that it misses the true median
    is 2 (C(n, 0) + ... + C(n, k)) / 2^n. For five values k is 0: the lowest and the highest hold the median with 94 %.
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
    """Return the Ratio of another contestant's time to ours. theirs, ours: the median time of each round.

    Both contestants run in every round, so a disturbance of the machine affects both times.
    """
    each = [a / b for a, b in zip(theirs, ours, strict=True)]
    return Ratio(*(round(x, 4) for x in (statistics.median(each), *interval(each))))


def percentiles(rounds: list[list[float]]) -> list[float] | None:
    """Return p20, p50 and p80 over all rounds in microseconds, or None if there are no samples."""
    samples = [s for each in rounds for s in each]
    if not samples:
        return None
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return [round(1e6 * s, 2) for s in (fifths[0], statistics.median(samples), fifths[3])]


def row(c: Contestant, ours: Contestant, floor_us: float) -> dict[str, Any]:
    """Return the figures of a contestant in one pass.

    ours: our op, whose time is the denominator of the ratio. floor_us: the least time that the roofline allows,
    in microseconds.
    """
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
