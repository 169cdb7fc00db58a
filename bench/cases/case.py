"""A Case: all that the tests, the static proof and the benchmark know about an op and a family of its shapes.

The accuracy rule, for every output and every gradient:

    max|fused - truth| <= 2 max|eager - truth| + 1e-5 (1 + max|truth|)

truth is the reference in fp32 (fp64 for fp32 inputs); eager is the composition as torch users write it, in the input's
dtype. An op is held to what its users would otherwise have had; NaN never passes. `verdicts` judges every output and
gradient, and finds where one is wrong; `assert_accurate` raises with the first that is.

An op's Cases stand in bench/cases/<its file in kernels>.py; bench/cases/registry.py lists them all.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FEW = 8  # numbers, of which eager is now and then right by luck
Dims = dict[str, int]  # a shape by the house's letters: {"B": 2, "T": 5, "C": 100}
Tensors = dict[str, Tensor | None]  # by the name of the op's argument


class Work(NamedTuple):
    """The least that one pass must do: arithmetic operations, and bytes when each operand is read or written once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Case:
    op: str
    family: str
    inputs: Callable[[Dims, torch.dtype, str], Tensors]
    fused: Callable[..., Any]
    reference: Callable[..., Any]
    eager: Callable[..., Any]
    work: Callable[[Dims, int], tuple[Work, Work]]  # (dims, bytes per element) -> forward, backward
    formula: str  # the traffic in work, in words: elements forward; elements backward
    shapes: tuple[Dims, ...]  # tests: one, odd, prime, just over a tile; all of the same letters
    activations: tuple[str, ...]  # what is scaled by 30; the other tensors are parameters
    empty: tuple[Dims, ...] = ()
    # by device, "cuda" or "cpu"; the one to know first
    bench: dict[str, tuple[Dims, ...]] = field(default_factory=dict)
    configurations: tuple[Dims, ...] = ()  # for the static proof: one for each row of the kernel's tile table
    options: dict[str, Any] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()  # float tensors that have no gradient
    half_scales: tuple[float, ...] = (1e-3, 30)  # those at which the eager composition is finite in fp16
    reads_values: bool = False  # the CPU path looks into integer tensors, which those on meta do not have
    check: Callable[[Dims], Dims] = dict  # the shape at which a benchmark shape is checked before it is timed
    # letters that may be left out, and the letter whose size they have then
    optional: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op}/{self.family}"


def label(dims: Dims) -> str:
    return " ".join(f"{letter}={size}" for letter, size in dims.items())


def randn(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


def check_most(dims: Dims, letter: str, most: str) -> None:
    """Raises ValueError for a size above another letter's."""
    if dims[letter] > dims[most]:
        raise ValueError(f"{letter}: expected at most {most}={dims[most]}, got {dims[letter]}")


def taken(named: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Take out of `named` what begins with the prefix: {"teacher_bias": b} gives {"bias": b}."""
    return {n.removeprefix(prefix): named.pop(n) for n in list(named) if n.startswith(prefix)}


def tensor(tensors: Tensors, name: str) -> Tensor:
    t = tensors[name]
    assert t is not None
    return t


# ---- running a case


def make_inputs(case: Case, dims: Dims, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensors:
    """Scale 30 is for activations only; 1e-3 is for every tensor that is learned or computed."""
    tensors = case.inputs(dims, dtype, device)
    for name, t in tensors.items():
        if t is not None and t.is_floating_point() and (name in case.activations or name not in case.fixed):
            tensors[name] = t * scale if scale < 1 or name in case.activations else t
    return tensors


def leaves(case: Case, tensors: Tensors) -> list[str]:
    """The names of the tensors that have a gradient."""
    return [n for n, t in tensors.items() if t is not None and t.is_floating_point() and n not in case.fixed]


def as_leaf(t: Tensor) -> Tensor:
    """A tensor that takes a gradient, on the same memory: itself where it does."""
    return t if t.requires_grad and t.is_leaf else t.detach().requires_grad_()


def run(
    op: Callable[..., Any], case: Case, tensors: Tensors, upstream: list[Tensor] | None = None
) -> dict[str, Tensor]:
    """Outputs by number and, given their upstream gradients, the gradient of every leaf by name."""
    names = leaves(case, tensors)
    if upstream is None or not names:
        with torch.no_grad():
            outputs = op(**tensors, **case.options)
        return {f"output {i}": t for i, t in enumerate(_tuple(outputs))}

    wanted = {n: as_leaf(tensor(tensors, n)) for n in names}
    outputs = _tuple(op(**{**tensors, **wanted}, **case.options))
    upstream = [g.to(t.dtype) for g, t in zip(upstream, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, list(wanted.values()), upstream)
    return {f"output {i}": t.detach() for i, t in enumerate(outputs)} | {
        f"gradient of {n}": g for n, g in zip(names, grads, strict=True)
    }


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def widen(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    wide = {n: t.detach().to(dtype) for n, t in tensors.items() if t is not None and t.is_floating_point()}
    return tensors | wide


def make_upstream(case: Case, tensors: Tensors) -> list[Tensor]:
    """Random upstream gradients, in the shapes and dtypes that the reference says the op returns."""
    return [
        torch.randn(t.shape, dtype=t.dtype, device=t.device)
        for t in run(case.reference, case, tensors).values()
    ]


# ---- the accuracy rule


class Wrong(NamedTuple):
    """A fault of one output or gradient. Where shape, dtype or kind differ, there is the reason alone."""

    reason: str  # a clause
    count: int = 0  # of elements that are wrong
    numel: int = 0
    nan: int = 0  # among those that are wrong
    infinite: int = 0
    worst: tuple[int, ...] = ()  # its index: a NaN or an infinity before all others
    got: float = math.nan
    truth: float = math.nan
    box: tuple[slice, ...] = ()  # the smallest that holds all that are wrong


class Verdict(NamedTuple):
    name: str  # "output 0", "gradient of q"
    error: float  # the largest, where the truth is finite; NaN where nothing was compared
    allowed: float
    wrong: Wrong | None = None

    def text(self, axes: tuple[str, ...] = ()) -> str:
        """One line, and two more on elements that are wrong. axes: letters in the place of numbers of axes."""
        if self.wrong is None:
            return f"{self.name}: error {self.error:.2e}, allowed {self.allowed:.2e}"
        reason, count, numel, nans, infinite, worst, got, truth, box = self.wrong
        if not count:
            return f"{self.name}: {reason}"

        spans = [f"{s.start}:{s.stop}" if s.stop > s.start + 1 else str(s.start) for s in box]
        kinds = [f", {n:,} of them {kind}" for n, kind in ((nans, "NaN"), (infinite, "infinite")) if n]
        bound = f" +- {self.allowed:.2e}" if math.isfinite(truth) else ""
        return (
            f"{self.name}: {reason}\n"
            f"  wrong: {count:,} of {numel:,}{_place(', all in ', spans, axes)}{''.join(kinds)}\n"
            f"  worst: {got:.6g}, expected {truth:.6g}{bound}{_place(', at ', [*map(str, worst)], axes)}"
        )


def _place(before: str, at: list[str], axes: tuple[str, ...]) -> str:
    """An index or a box, as [0, 3:5] or by letters as B=0 C=3:5; nothing of a tensor without axes."""
    if not at:
        return ""
    if len(axes) != len(at):
        return f"{before}[{', '.join(at)}]"
    names = [f"axis{n}" if axis.isdigit() else axis.replace(" ", "") for n, axis in enumerate(axes)]
    return before + " ".join(f"{name}={i}" for name, i in zip(names, at, strict=True))


def verdicts(
    case: Case,
    tensors: Tensors,
    upstream: list[Tensor] | None = None,
    under: Callable[[], AbstractContextManager[Any]] = nullcontext,
    luck: float = 0.0,
) -> list[Verdict]:
    """Hold each output and each gradient of case.fused to the accuracy rule. Arguments as of assert_accurate.

    What is no tensor, is missing or has no gradient is a verdict; what the op raises is let through.
    """
    floats = [t.dtype for t in tensors.values() if t is not None and t.is_floating_point()]
    wide = torch.float64 if torch.float32 in floats else torch.float32
    upstream = upstream or make_upstream(case, tensors)
    with under():
        found = _found(case, tensors, upstream)
        eager = run(case.eager, case, tensors, upstream)
    truth = run(case.reference, case, widen(tensors, wide), upstream)

    dtypes = [g.dtype for g in upstream] + [tensor(tensors, n).dtype for n in leaves(case, tensors)]
    judged = [
        _judge(name, found[name], eager[name].to(dtype), t, luck)
        for (name, t), dtype in zip(truth.items(), dtypes, strict=True)
    ]
    beyond = [
        Verdict(name, math.nan, math.nan, Wrong(str(f))) for name, f in found.items() if name not in truth
    ]
    return judged + beyond


def assert_accurate(
    case: Case,
    tensors: Tensors,
    upstream: list[Tensor] | None = None,
    under: Callable[[], AbstractContextManager[Any]] = nullcontext,
    luck: float = 0.0,
) -> None:
    """Hold case.fused to the accuracy rule on these tensors. `under` is a context for it and eager, such as autocast.

    luck: a share of the largest number, allowed on top where there are few.
    """
    for verdict in verdicts(case, tensors, upstream, under, luck):
        assert verdict.wrong is None, f"{case.name}: {verdict.text()}"


def _found(case: Case, tensors: Tensors, upstream: list[Tensor]) -> dict[str, Tensor | str]:
    """The results of case.fused as `run` names them, with a clause in the place of each that is none."""
    names = leaves(case, tensors)
    wanted = {n: as_leaf(tensor(tensors, n)) for n in names}
    with nullcontext() if names else torch.no_grad():
        outputs = _outputs(case.fused(**{**tensors, **wanted}, **case.options), len(upstream))
    grads = _gradients(outputs, list(wanted.values()), upstream)
    return {f"output {i}": t.detach() if isinstance(t, Tensor) else t for i, t in enumerate(outputs)} | {
        f"gradient of {n}": g for n, g in zip(names, grads, strict=True)
    }


def _outputs(returned: Any, count: int) -> list[Tensor | str]:
    """The tensors that an op returned; a clause in the place of what is none, is missing, or is one too many."""
    if count > 1 and not isinstance(returned, tuple):
        return [f"expected a tuple of {count} tensors, got {_kind(returned)}"] * count
    outputs: list[Tensor | str] = [
        t if isinstance(t, Tensor) else f"expected a tensor, got {_kind(t)}" for t in _tuple(returned)
    ]
    number = f"expected {count} {'outputs' if count > 1 else 'output'}, got {len(outputs)}"
    return outputs[:count] + [number] * abs(count - len(outputs))


def _kind(returned: Any) -> str:
    if returned is None:
        return "None"
    return "a tensor" if isinstance(returned, Tensor) else f"a {type(returned).__name__}"


def _gradients(
    outputs: list[Tensor | str], wanted: list[Tensor], upstream: list[Tensor]
) -> list[Tensor | str]:
    """The gradient of each leaf, which comes from all outputs: a clause where these cannot take theirs."""
    paths = [
        (t, g.to(t.dtype))
        for t, g in zip(outputs, upstream, strict=False)
        if isinstance(t, Tensor) and (t.shape, t.device) == (g.shape, g.device)
    ]
    if len(paths) != len(outputs):
        return ["not computed, since an output is wrong"] * len(wanted)
    none = "expected a gradient, got none"
    paths = [(t, g) for t, g in paths if t.requires_grad]
    if not wanted or not paths:
        return [none] * len(wanted)

    grads = torch.autograd.grad([t for t, _ in paths], wanted, [g for _, g in paths], allow_unused=True)
    return [none if g is None else g for g in grads]


def _judge(name: str, found: Tensor | str, eager: Tensor, truth: Tensor, luck: float) -> Verdict:
    """The rule, of one output or gradient. eager: in the dtype that is expected."""
    if isinstance(found, str):
        return Verdict(name, math.nan, math.nan, Wrong(found))
    for kind, expected, got in (
        ("shape ", tuple(truth.shape), tuple(found.shape)),
        ("", eager.dtype, found.dtype),
        ("device ", truth.device, found.device),
    ):
        if got != expected:
            return Verdict(name, math.nan, math.nan, Wrong(f"expected {kind}{expected}, got {got}"))

    finite = truth.isfinite()  # a log-sum-exp over nothing is -inf
    error = allowed = 0.0
    if finite.any():
        t, f, e = truth[finite], found[finite].to(truth.dtype), eager[finite].to(truth.dtype)
        bound = 2 * (e - t).abs().max() + 1e-5 * (1 + t.abs().max())
        if t.numel() <= FEW:
            bound += luck * t.abs().max()
        error, allowed = float((f - t).abs().max()), float(bound)

    reason = f"error {error:.2e}, allowed {allowed:.2e}"
    if not torch.equal(found[~finite].to(truth.dtype), truth[~finite]):
        reason = "differs where the truth is infinite"
    elif error <= allowed:
        return Verdict(name, error, allowed)
    return Verdict(name, error, allowed, _where(reason, found.to(truth.dtype), truth, allowed))


def _where(reason: str, found: Tensor, truth: Tensor, allowed: float) -> Wrong:
    distance = (found - truth).abs()
    wrong = torch.where(truth.isfinite(), ~(distance <= allowed), found != truth)
    distance = torch.where(wrong, distance.nan_to_num(nan=torch.inf), -1.0)
    worst = tuple(int(i) for i in torch.unravel_index(distance.argmax(), truth.shape))

    axes, box = range(truth.dim()), []
    for axis in axes:
        others = [a for a in axes if a != axis]
        places = (wrong.any(others) if others else wrong).nonzero()[:, 0]
        box.append(slice(int(places[0]), int(places[-1]) + 1))

    return Wrong(
        reason,
        count=int(wrong.sum()),
        numel=truth.numel(),
        nan=int((wrong & found.isnan()).sum()),
        infinite=int((wrong & found.isinf()).sum()),
        worst=worst,
        got=float(found[worst]),
        truth=float(truth[worst]),
        box=tuple(box),
    )
