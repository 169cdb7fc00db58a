"""Cases of kernels/nf4.py, and helpers for all Cases with a 4-bit weight.

The inputs of a Case are tensors. So a 4-bit weight is given by the tensors that it consists of, listed in FOUR_BIT.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import NF4Weight, nf4
from ...kernels._chip import autocast_dtype
from .case import Case, Dims, Tensors, Work, randn

FOUR_BIT = ("packed", "absmax", "code", "nested_absmax", "nested_code", "offset")


def _weight(C: int, dtype: torch.dtype, **four_bit: Any) -> NF4Weight:
    """Build the 4-bit weight (F, C) from the tensors that it consists of."""
    shape = (2 * four_bit["packed"].numel() // max(C, 1), C)
    return NF4Weight(shape=shape, dtype=dtype, **four_bit)


def four_bit(op: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an op on (x, 4-bit weight, ...), so that it takes x and the tensors that the weight consists of."""

    def linear(x: Tensor, **tensors: Any) -> Tensor:
        parts = {n: tensors.pop(n) for n in FOUR_BIT}
        return op(x, _weight(x.shape[-1], x.dtype, **parts), **tensors)

    return linear


def eager_four_bit(op: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an op on (x, dense weight, ...), so that it takes x and the tensors that a 4-bit weight consists of.

    torch dequantises the weight before the op is called.
    """

    def linear(x: Tensor, weight: NF4Weight, **others: Any) -> Tensor:
        dtype = autocast_dtype(x)
        return op(x, nf4.dequantize_nf4_reference(weight, dtype), **others).to(x.dtype)

    return four_bit(linear)


def multiplied_out(op: Callable[..., Any]) -> Callable[..., Any]:
    def dequantize(like: Tensor, **tensors: Any) -> Tensor:
        return op(_weight(like.shape[-1], like.dtype, **tensors), like.dtype)

    return dequantize


def absmax_alone(op: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap quantize_nf4 so that it returns only absmax.

    The accuracy rule does not suit the nibbles, which are codes. tests/kernels/test_nf4.py compares them.
    """

    def quantize(weight: Tensor) -> Tensor:
        return op(weight, double_quant=False).absmax

    return quantize


def four_bit_tensors(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """Return the tensors of a random 4-bit weight (F, C), under the names in FOUR_BIT.

    Raises ValueError if the number of weights is odd. A byte holds two weights, so F could not be derived from the
    tensors.
    """
    if dims["F"] * dims["C"] % 2:
        raise ValueError(f"C, F: expected an even number of weights, got C F = {dims['C'] * dims['F']}")
    weight = torch.randn(dims["F"], dims["C"], device=device) * dims["C"] ** -0.5
    return dict(zip(FOUR_BIT, nf4.quantize_nf4_reference(weight).tensors(), strict=True))


def _inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    bias = randn((dims["F"],), dtype, device)
    return {"x": randn((dims["T"], dims["C"]), dtype, device), "bias": bias} | four_bit_tensors(
        dims, dtype, device
    )


def _dequantize_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    like = randn((1, dims["C"]), dtype, device)
    return {"like": like} | four_bit_tensors(dims, dtype, device)


def _packed_bytes(dims: Dims) -> int:
    n = dims["C"] * dims["F"]
    return n // 2 + n // 64 + n // 4096


def _work(dims: Dims, size: int) -> tuple[Work, Work]:
    T, C, F_ = dims["T"], dims["C"], dims["F"]
    one = Work(2 * T * C * F_, T * (C + F_) * size + _packed_bytes(dims))
    return one, one


def _dequantize_work(dims: Dims, size: int) -> tuple[Work, Work]:
    n = dims["C"] * dims["F"]
    return Work(n, _packed_bytes(dims) + n * size), Work(0, 0)


def _quantize_work(dims: Dims, size: int) -> tuple[Work, Work]:
    n = dims["C"] * dims["F"]
    return Work(20 * n, n // 2 + n // 16 + n * size), Work(0, 0)


_BENCH = {
    "cuda": tuple({"T": t, "C": 4096, "F": 14336} for t in (1, 16, 64, 4096)),
    "cpu": ({"T": 1, "C": 1024, "F": 1024}, {"T": 128, "C": 1024, "F": 1024}),
}
_SIZES = {
    "cuda": ({"C": 4096, "F": 14336}, {"C": 4096, "F": 4096}),
    "cpu": ({"C": 1024, "F": 1024},),
}

_DEQUANTIZE = Case(
    op="dequantize_nf4",
    family="absmax quantised",
    inputs=_dequantize_inputs,
    fused=multiplied_out(nf4.dequantize_nf4),
    reference=multiplied_out(nf4.dequantize_nf4_reference),
    eager=multiplied_out(nf4.dequantize_nf4_reference),
    work=_dequantize_work,
    formula="reads 0.516 CF bytes, writes CF elements; no backward",
    shapes=({"C": 2, "F": 1}, {"C": 66, "F": 33}, {"C": 128, "F": 130}),
    activations=(),
    bench=_SIZES,
    configurations=({"C": 256, "F": 256},),
    fixed=("like", *FOUR_BIT),
)

CASES = (
    Case(
        op="nf4_linear",
        family="bias",
        inputs=_inputs,
        fused=four_bit(nf4.nf4_linear),
        reference=four_bit(nf4.nf4_linear_reference),
        eager=eager_four_bit(F.linear),
        work=_work,
        formula="2TCF operations, or 0.516 CF bytes; the same backward",
        shapes=({"T": 1, "C": 2, "F": 1}, {"T": 3, "C": 128, "F": 67}, {"T": 70, "C": 64, "F": 33}),
        activations=("x",),
        empty=({"T": 0, "C": 64, "F": 16},),
        bench=_BENCH,
        configurations=tuple({"T": t, "C": 256, "F": 256} for t in (1, 64)),
        fixed=FOUR_BIT,
        half_scales=(30,),
    ),
    _DEQUANTIZE,
    replace(
        _DEQUANTIZE,
        op="quantize_nf4",
        family="absmax",
        inputs=lambda dims, dtype, device: {"weight": randn((dims["F"], dims["C"]), dtype, device)},
        fused=absmax_alone(nf4.quantize_nf4),
        reference=absmax_alone(nf4.quantize_nf4_reference),
        eager=absmax_alone(nf4.quantize_nf4_reference),
        work=_quantize_work,
        formula="reads CF elements, writes 0.56 CF bytes; no backward",
        fixed=("weight",),
    ),
)
