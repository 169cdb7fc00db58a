"""Cases of kernels/lora.py: a linear layer with an adapter, by each path, and several such layers on one input."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import lora
from ...kernels.plain import lora as plain
from .case import Case, Dims, Tensors, Work, randn, taken
from .nf4 import FOUR_BIT, eager_four_bit, four_bit, four_bit_tensors

# ---- eager: F.linear, then addmm, the leanest form that torch users write


def _eager(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    dropped: Tensor | None = None,
) -> Tensor:
    """Compute the layer with F.linear, then addmm for the adapter. dropped: the adapter's input, by default x."""
    rows = x.flatten(0, -2)
    a, b = lora_a.to(weight.dtype), lora_b.to(weight.dtype)
    out = F.linear(rows, weight, bias)
    low = F.linear(rows if dropped is None else dropped, a)
    out = torch.addmm(out, low.to(out.dtype), b.T.to(out.dtype), alpha=scaling)
    return out.view(*x.shape[:-1], weight.shape[0]).to(x.dtype)


def _dropout_eager(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    dropout: float,
    seed: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute the layer with dropout in the adapter. The mask is that of the kernel's own hash."""
    dropped = plain.drop(x.flatten(0, -2), dropout, torch.tensor(seed, device=x.device))
    return _eager(x, weight, lora_a, lora_b, scaling, bias=bias, dropped=dropped)


def _dora_eager(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    magnitude: Tensor,
    bias: Tensor,
) -> Tensor:
    """Compute DoRA: the rows of W + scaling B A, rescaled to the lengths in `magnitude`.

    The lengths of the rows count as constants, so no gradient flows through them.
    """
    out = _eager(x, weight, lora_a, lora_b, scaling)
    a, b = lora_a.to(weight.dtype), lora_b.to(weight.dtype)
    norm = (weight + scaling * (b @ a)).detach().norm(dim=1)
    return (out * (magnitude / norm) + bias).to(x.dtype)


def _stacked_eager(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, *, adapter: Tensor
) -> Tensor:
    """Compute every adapter on every row, and keep each row's own adapter by a mask."""
    a, b = lora_a.to(weight.dtype), lora_b.to(weight.dtype)
    out = F.linear(x, weight)
    for e in range(a.shape[0]):
        own = (adapter == e)[:, None]
        out = out + own * scaling * F.linear(F.linear(x, a[e]), b[e])
    return out.to(x.dtype)


def _eager_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scalings: Sequence[float],
    *,
    biases: Sequence[Tensor],
) -> list[Tensor]:
    each = zip(weights, lora_a, lora_b, scalings, biases, strict=True)
    return [_eager(x, W, a, b, s, bias=bias) for W, a, b, s, bias in each]


# ---- a Case's calls


def by_path(path: str, module: Any = lora) -> Callable[..., Tensor]:
    """Return lora_linear of a module, forced to take the given path at every shape."""

    def linear(*args: Any, **options: Any) -> Tensor:
        module.FORCED_PATH = path
        try:
            return module.lora_linear(*args, **options)
        finally:
            module.FORCED_PATH = ""

    return linear


def several(op: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an op that takes sequences of tensors, for a Case whose tensors are numbered: weight_0, weight_1, ..."""

    def linears(x: Tensor, *, scaling: float, **tensors: Any) -> tuple[Tensor, ...]:
        parts = "weight", "lora_a", "lora_b", "bias"
        each = [list(taken(tensors, f"{part}_").values()) for part in parts]
        if tensors:
            raise TypeError(f"lora_linears: expected {', '.join(parts)}, numbered, got {', '.join(tensors)}")
        weights, lora_a, lora_b, biases = each
        scalings = [scaling * (i + 1) for i in range(len(weights))]
        return tuple(op(x, weights, lora_a, lora_b, scalings, biases=biases))

    return linears


# ---- inputs and work


def _inputs(dims: Dims, dtype: torch.dtype, device: str, stack: tuple[int, ...] = ()) -> Tensors:
    """Return inputs for which base and adapter give outputs of unit variance. stack: leading axes of the adapter."""
    T, C, F_, R = (dims[letter] for letter in "TCFR")
    return {
        "x": randn((T, C), dtype, device),
        "weight": randn((F_, C), dtype, device) * C**-0.5,
        "lora_a": randn((*stack, R, C), dtype, device) * C**-0.5,
        "lora_b": randn((*stack, F_, R), dtype, device) * R**-0.5,
    }


def _stacked_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """Return inputs with E adapters, and the adapter of each row. The value -1 stands for no adapter."""
    T, E = dims["T"], dims["E"]
    adapter = torch.arange(T, device=device) // 3 % (E + 1) - 1
    return _inputs(dims, dtype, device, (E,)) | {"adapter": adapter}


def _bias_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    return _inputs(dims, dtype, device) | {"bias": randn((dims["F"],), dtype, device)}


def _dora_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    return _bias_inputs(dims, dtype, device) | {"magnitude": randn((dims["F"],), dtype, device)}


def _qlora_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    tensors = _inputs(dims, dtype, device)
    del tensors["weight"]
    return tensors | four_bit_tensors(dims, dtype, device)


def _several_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """Return the inputs of q, k and v, with F, G and G outputs, and adapters of rank R, R + 1 and R + 2."""
    T, C, F_, G, R = (dims[letter] for letter in "TCFGR")
    parts = [
        _bias_inputs({"T": T, "C": C, "F": n, "R": R + i}, dtype, device) for i, n in enumerate((F_, G, G))
    ]
    numbered = {f"{n}_{i}": t for i, part in enumerate(parts) for n, t in part.items() if n != "x"}
    return {"x": parts[0]["x"]} | numbered


def _work(dims: Dims, size: int) -> tuple[Work, Work]:
    T, C, F_, R = dims["T"], dims["C"], dims["F"], dims["R"]
    low, adapter = T * R * (C + F_), R * (C + F_) * size
    weights = F_ * C * size + adapter
    forward = Work(2 * T * C * F_ + 2 * low, T * (C + F_) * size + weights)
    return forward, Work(2 * T * C * F_ + 4 * low, T * (2 * C + F_) * size + weights + adapter)


def _several_work(dims: Dims, size: int) -> tuple[Work, Work]:
    """Return the work of q, k and v together. x is read once, and dx is written once."""
    T, C, F_, G, R = (dims[letter] for letter in "TCFGR")
    works = [_work({"T": T, "C": C, "F": n, "R": R + i}, size) for i, n in enumerate((F_, G, G))]
    forward, backward = (Work(*map(sum, zip(*w, strict=True))) for w in zip(*works, strict=True))
    return (
        Work(forward.flops, forward.bytes - 2 * T * C * size),
        Work(backward.flops, backward.bytes - 4 * T * C * size),
    )


_SHAPES = (
    {"T": 1, "C": 1, "F": 1, "R": 1},
    {"T": 37, "C": 67, "F": 41, "R": 3},
    {"T": 5, "C": 32, "F": 130, "R": 16},  # more columns than a tile
)
_EMPTY = ({"T": 0, "C": 8, "F": 16, "R": 4},)
_BENCH = {
    "cuda": (
        {"T": 8192, "C": 4096, "F": 4096, "R": 16},
        {"T": 8192, "C": 4096, "F": 14336, "R": 16},
        {"T": 4096, "C": 4096, "F": 4096, "R": 64},
        {"T": 1024, "C": 4096, "F": 4096, "R": 16},
    ),
    "cpu": ({"T": 256, "C": 576, "F": 1536, "R": 16}, {"T": 256, "C": 576, "F": 576, "R": 16}),
}
_SEVERAL_SHAPES = (
    {"T": 7, "C": 9, "F": 11, "G": 5, "R": 3},
    {"T": 37, "C": 67, "F": 41, "G": 17, "R": 16},
)
_SEVERAL_EMPTY = ({"T": 0, "C": 8, "F": 16, "G": 4, "R": 4},)
_SEVERAL_BENCH = {
    "cuda": ({"T": 8192, "C": 4096, "F": 4096, "G": 1024, "R": 16},),
    "cpu": ({"T": 256, "C": 576, "F": 576, "G": 192, "R": 16},),
}
_TILES = tuple({"T": 256, "C": 256, "F": 256, "R": r} for r in (16, 64, 256))

_CASE = Case(
    op="lora_linear",
    family="dense",
    inputs=_bias_inputs,
    fused=lora.lora_linear,
    reference=lora.lora_linear_reference,
    eager=_eager,
    work=_work,
    formula="2TCF + 2TR(C + F) operations; 2TCF + 4TR(C + F)",
    shapes=_SHAPES[1:2],
    activations=("x",),
    fixed=("weight",),
    options={"scaling": 0.5},
    half_scales=(30,),
)

CASES = (
    replace(_CASE, shapes=_SHAPES, empty=_EMPTY, bench=_BENCH),
    replace(_CASE, family="fused", fused=by_path("fused"), shapes=_SHAPES, configurations=_TILES),
    replace(
        _CASE,
        family="epilogue",
        fused=by_path("epilogue"),
        shapes=_SHAPES,
        empty=_EMPTY,
        configurations=_TILES,
    ),
    replace(_CASE, family="DoRA", inputs=_dora_inputs, eager=_dora_eager, configurations=_TILES[:1]),
    replace(
        _CASE,
        family="dropout",
        eager=_dropout_eager,
        options={"scaling": 0.5, "dropout": 0.3, "seed": 1 << 40 | 7},
        configurations=_TILES,
    ),
    replace(
        _CASE,
        family="several adapters",
        inputs=_stacked_inputs,
        eager=_stacked_eager,
        shapes=({"T": 37, "C": 35, "F": 41, "R": 3, "E": 3},),
        configurations=({"T": 256, "C": 256, "F": 256, "R": 16, "E": 4},),
    ),
    replace(
        _CASE,
        family="4-bit base",
        inputs=_qlora_inputs,
        fused=four_bit(lora.lora_linear),
        reference=four_bit(lora.lora_linear_reference),
        eager=eager_four_bit(_eager),
        shapes=({"T": 7, "C": 66, "F": 33, "R": 8},),
        fixed=FOUR_BIT,
    ),
    replace(
        _CASE,
        family="q, k, v",
        op="lora_linears",
        inputs=_several_inputs,
        fused=several(lora.lora_linears),
        reference=several(lora.lora_linears_reference),
        eager=several(_eager_linears),
        work=_several_work,
        formula="2TC(F + 2G) + 2TR(3C + F + 2G) operations; 2TC(F + 2G) + 4TR(3C + F + 2G)",
        shapes=_SEVERAL_SHAPES,
        empty=_SEVERAL_EMPTY,
        bench=_SEVERAL_BENCH,
        fixed=tuple(f"weight_{i}" for i in range(3)),
    ),
)
