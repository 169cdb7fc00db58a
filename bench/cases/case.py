"""A Case: all that the tests, the static proof and the benchmark know about an op and a family of its shapes.

The accuracy rule, for every output and every gradient:

    max|fused - truth| <= 2 max|eager - truth| + 1e-5 (1 + max|truth|)

truth is the reference in fp32 (fp64 for fp32 inputs); eager is the composition as torch users write it, in the input's
dtype. An op is held to what its users would otherwise have had; NaN never passes.

An op's Cases stand in bench/cases/<its file in kernels>.py; bench/cases/registry.py lists them all.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    shapes: tuple[Dims, ...]  # tests: one, odd, prime, just over a tile
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

    @property
    def name(self) -> str:
        return f"{self.op}/{self.family}"


def label(dims: Dims) -> str:
    return " ".join(f"{letter}={size}" for letter, size in dims.items())


def randn(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


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


def run(
    op: Callable[..., Any], case: Case, tensors: Tensors, upstream: list[Tensor] | None = None
) -> dict[str, Tensor]:
    """Outputs by number and, given their upstream gradients, the gradient of every leaf by name."""
    names = leaves(case, tensors)
    if upstream is None or not names:
        with torch.no_grad():
            outputs = op(**tensors, **case.options)
        return {f"output {i}": t for i, t in enumerate(_tuple(outputs))}
    wanted = {n: tensor(tensors, n).detach().requires_grad_() for n in names}
    outputs = _tuple(op(**{**tensors, **wanted}, **case.options))
    upstream = [g.to(t.dtype) for g, t in zip(upstream, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, list(wanted.values()), upstream)
    return {f"output {i}": t.detach() for i, t in enumerate(outputs)} | {
        f"gradient of {n}": g for n, g in zip(names, grads, strict=True)
    }


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def widen(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {n: t.to(dtype) if t is not None and t.is_floating_point() else t for n, t in tensors.items()}


def make_upstream(case: Case, tensors: Tensors) -> list[Tensor]:
    """Random upstream gradients, in the shapes and dtypes that the reference says the op returns."""
    return [
        torch.randn(t.shape, dtype=t.dtype, device=t.device)
        for t in run(case.reference, case, tensors).values()
    ]


def assert_accurate(
    case: Case,
    tensors: Tensors,
    upstream: list[Tensor] | None = None,
    under: Callable[[], AbstractContextManager[Any]] = nullcontext,
    luck: float = 0.0,
) -> None:
    """Hold case.fused to the accuracy rule on these tensors. `under` is a context for both, such as autocast.

    luck: a share of the largest number, allowed on top where there are few.
    """
    floats = [t.dtype for t in tensors.values() if t is not None and t.is_floating_point()]
    wide = torch.float64 if torch.float32 in floats else torch.float32
    upstream = upstream or make_upstream(case, tensors)
    with under():
        fused = run(case.fused, case, tensors, upstream)
        eager = run(case.eager, case, tensors, upstream)
    truth = run(case.reference, case, widen(tensors, wide), upstream)
    dtypes = [g.dtype for g in upstream] + [tensor(tensors, n).dtype for n in leaves(case, tensors)]
    assert fused.keys() == truth.keys(), f"{case.name}: expected {list(truth)}, got {list(fused)}"
    for (name, t), dtype in zip(truth.items(), dtypes, strict=True):
        f, e = fused[name], eager[name].to(dtype)
        assert f.shape == t.shape, (
            f"{case.name}: {name}: expected shape {tuple(t.shape)}, got {tuple(f.shape)}"
        )
        assert f.dtype == dtype, f"{case.name}: {name}: expected {dtype}, got {f.dtype}"
        finite = t.isfinite()  # a log-sum-exp over nothing is -inf
        assert torch.equal(f[~finite].to(wide), t[~finite]), (
            f"{case.name}: {name}: differs where the truth is infinite"
        )
        if finite.any():
            t, f, e = t[finite], f[finite].to(wide), e[finite].to(wide)
            allowed = 2 * (e - t).abs().max() + 1e-5 * (1 + t.abs().max())
            if t.numel() <= FEW:
                allowed += luck * t.abs().max()
            error = (f - t).abs().max()
            assert error <= allowed, f"{case.name}: {name}: error {error:.2e}, allowed {allowed:.2e}"
