"""A Case: the definition of one op on one family of shapes.

The tests, the benchmark and the static proof share it. The static proof compiles every kernel without a GPU.

Every output and every gradient must satisfy the accuracy rule:

    max|fused - truth| <= 2 max|eager - truth| + 1e-5 (1 + max|truth|)

truth is the reference in fp32 (in fp64 for fp32 inputs). eager is the composition that torch users write, in the
input's dtype. So the error of an op may be at most about twice the error of the code that it replaces. NaN never
passes. `verdicts` judges every output and gradient, and finds where a result is wrong. `assert_accurate` raises
AssertionError for the first wrong result.

The Cases of kernels/x.py are in bench/cases/x.py. bench/cases/registry.py lists all Cases.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FEW = 8  # elements: in a tensor of so few, eager may be exact by chance
Dims = dict[str, int]  # sizes by axis letter: {"B": 2, "T": 5, "C": 100}
Tensors = dict[str, Tensor | None]  # keys: names of the op's arguments


class Work(NamedTuple):
    """The minimum work of one pass: its arithmetic operations, and its bytes if each operand moves only once."""

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
    formula: str  # `work` in words, for tables: forward; backward
    shapes: tuple[Dims, ...]  # for tests: 1, odd, prime, just above a tile; all with the same letters
    activations: tuple[str, ...]  # tensors that tests scale by 30; the others are parameters
    empty: tuple[Dims, ...] = ()
    # shapes to time, by device ("cuda" or "cpu"); the most important first
    bench: dict[str, tuple[Dims, ...]] = field(default_factory=dict)
    configurations: tuple[
        Dims, ...
    ] = ()  # for the static proof: one shape for each row of the kernel's tile table
    options: dict[str, Any] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()  # float tensors that have no gradient
    half_scales: tuple[float, ...] = (1e-3, 30)  # scales at which eager is finite in fp16
    reads_values: bool = False  # the CPU path reads integer values, so it cannot run on meta tensors
    check: Callable[[Dims], Dims] = dict  # benchmark shape -> the shape at which its accuracy is checked
    # letters that a shape may omit -> the letter whose size they then have
    optional: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op}/{self.family}"


def label(dims: Dims) -> str:
    return " ".join(f"{letter}={size}" for letter, size in dims.items())


def randn(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


def check_most(dims: Dims, letter: str, most: str) -> None:
    """Raise ValueError if the axis `letter` is longer than the axis `most`."""
    if dims[letter] > dims[most]:
        raise ValueError(f"{letter}: expected at most {most}={dims[most]}, got {dims[letter]}")


def taken(named: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Remove names with a prefix from `named`. Return them without it, such as {"bias": b} for {"teacher_bias": b}."""
    return {n.removeprefix(prefix): named.pop(n) for n in list(named) if n.startswith(prefix)}


def tensor(tensors: Tensors, name: str) -> Tensor:
    t = tensors[name]
    assert t is not None
    return t


# ---- running a case


def make_inputs(case: Case, dims: Dims, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensors:
    """Return the op's input tensors at a shape, multiplied by `scale`.

    A scale of 1 or more applies only to the activations. A smaller scale also applies to every tensor that has a
    gradient.
    """
    tensors = case.inputs(dims, dtype, device)
    for name, t in tensors.items():
        if t is not None and t.is_floating_point() and (name in case.activations or name not in case.fixed):
            tensors[name] = t * scale if scale < 1 or name in case.activations else t
    return tensors


def leaves(case: Case, tensors: Tensors) -> list[str]:
    """Return the names of the tensors that have a gradient."""
    return [n for n, t in tensors.items() if t is not None and t.is_floating_point() and n not in case.fixed]


def as_leaf(t: Tensor) -> Tensor:
    """Return a leaf tensor that requires a gradient, on the same memory. If t is such a leaf, return t itself."""
    return t if t.requires_grad and t.is_leaf else t.detach().requires_grad_()


def run(
    op: Callable[..., Any], case: Case, tensors: Tensors, upstream: list[Tensor] | None = None
) -> dict[str, Tensor]:
    """Run an op, and return its outputs. If upstream gradients are given, also return the gradients of its inputs.

    The keys of the result are "output 0", "gradient of q" and so on. upstream: one gradient for each output.
    """
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
    """Return random upstream gradients, one for each output of the reference, in its shape and dtype."""
    return [
        torch.randn(t.shape, dtype=t.dtype, device=t.device)
        for t in run(case.reference, case, tensors).values()
    ]


# ---- the accuracy rule


class Wrong(NamedTuple):
    """A fault of one output or gradient. If its shape, dtype or device is wrong, only `reason` is set."""

    reason: str  # a clause
    count: int = 0  # wrong elements
    numel: int = 0
    nan: int = 0  # wrong elements that are NaN
    infinite: int = 0
    worst: tuple[int, ...] = ()  # index of the worst element; NaN and infinity come first
    got: float = math.nan
    truth: float = math.nan
    box: tuple[slice, ...] = ()  # the smallest box that holds all wrong elements


class Verdict(NamedTuple):
    name: str  # "output 0", "gradient of q"
    error: float  # the largest error where the truth is finite; NaN if nothing was compared
    allowed: float
    wrong: Wrong | None = None

    def text(self, axes: tuple[str, ...] = ()) -> str:
        """Return the verdict in one line, or in three lines if elements are wrong.

        axes: a letter for each axis, to be written instead of the number of the axis.
        """
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
    """Return an index or a box as text after `before`: "[0, 3:5]", or "B=0 C=3:5" if every axis has a letter.

    For a tensor without axes the whole text is empty.
    """
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
    """Return one Verdict for each output and each gradient of case.fused. The arguments are those of assert_accurate.

    A missing output, a missing gradient, or an output that is no tensor is a fault. Exceptions of the op are not
    caught.
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
    """Raise AssertionError if an output or gradient of case.fused breaks the accuracy rule on these tensors.

    under: makes the context in which fused and eager run, such as autocast. luck: an additional allowance for a result
    of at most FEW finite elements, as a share of its largest magnitude.
    """
    for verdict in verdicts(case, tensors, upstream, under, luck):
        assert verdict.wrong is None, f"{case.name}: {verdict.text()}"


def _found(case: Case, tensors: Tensors, upstream: list[Tensor]) -> dict[str, Tensor | str]:
    """Run case.fused, and return its results as `run` does, with an error text in place of each invalid result."""
    names = leaves(case, tensors)
    wanted = {n: as_leaf(tensor(tensors, n)) for n in names}
    with nullcontext() if names else torch.no_grad():
        outputs = _outputs(case.fused(**{**tensors, **wanted}, **case.options), len(upstream))
    grads = _gradients(outputs, list(wanted.values()), upstream)
    return {f"output {i}": t.detach() if isinstance(t, Tensor) else t for i, t in enumerate(outputs)} | {
        f"gradient of {n}": g for n, g in zip(names, grads, strict=True)
    }


def _outputs(returned: Any, count: int) -> list[Tensor | str]:
    """Return the op's outputs. An output that is missing, surplus or no tensor is replaced by an error text."""
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
    """Return the gradient of each input, or an error text in its place.

    Every gradient depends on all outputs. So no gradient is computed if an output is invalid.
    """
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
    """Apply the accuracy rule to one output or gradient. eager: the result of case.eager in the expected dtype."""
    if isinstance(found, str):
        return Verdict(name, math.nan, math.nan, Wrong(found))
    for kind, expected, got in (
        ("shape ", tuple(truth.shape), tuple(found.shape)),
        ("", eager.dtype, found.dtype),
        ("device ", truth.device, found.device),
    ):
        if got != expected:
            return Verdict(name, math.nan, math.nan, Wrong(f"expected {kind}{expected}, got {got}"))

    finite = truth.isfinite()  # the log-sum-exp of an empty set is -inf
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
    """Return the fault with the number of wrong elements, the worst of them, and the box that holds all of them."""
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
