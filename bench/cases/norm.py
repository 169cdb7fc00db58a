"""Cases of kernels/norm.py: RMS normalisation, alone and after a residual sum."""

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from ...kernels import norm
from .case import Case, Dims, Tensors, Work, randn


def _rms_norm_eager(x: Tensor, weight: Tensor, eps: float = 1e-6, *, unit_offset: bool = False) -> Tensor:
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y * (1 + weight if unit_offset else weight)


def _add_rms_norm_eager(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, unit_offset: bool = False
):
    total = x + residual
    return _rms_norm_eager(total, weight, eps, unit_offset=unit_offset), total


def _shape(dims: Dims) -> tuple[int, ...]:
    """Return the shape (B, T, C) or (B, T, H, D). The last axis is normalised."""
    return tuple(dims[letter] for letter in "BTHDC" if letter in dims)


def _inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    shape = _shape(dims)
    return {"x": randn(shape, dtype, device), "weight": randn(shape[-1:], dtype, device)}


def _add_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    shape = _shape(dims)
    residual = randn(shape, dtype, device)
    return {
        "x": randn(shape, dtype, device),
        "residual": residual,
        "weight": randn(shape[-1:], dtype, device),
    }


def _work(dims: Dims, size: int) -> tuple[Work, Work]:
    *lead, n = _shape(dims)
    rn = prod(lead) * n
    return Work(5 * rn, (2 * rn + n) * size), Work(10 * rn, (3 * rn + 2 * n) * size)


def _add_work(dims: Dims, size: int) -> tuple[Work, Work]:
    *lead, n = _shape(dims)
    rn = prod(lead) * n
    return Work(6 * rn, (4 * rn + n) * size), Work(11 * rn, (4 * rn + 2 * n) * size)


_SHAPES = (
    {"B": 1, "T": 1, "C": 1},
    {"B": 2, "T": 5, "C": 100},
    {"B": 1, "T": 37, "C": 33},  # more rows than one tile holds
    {"B": 1, "T": 11, "C": 1031},  # more tiles than programs
    {"B": 1, "T": 2, "C": 16411},  # wider than one program holds
)
_HEAD_SHAPES = ({"B": 1, "T": 1, "H": 1, "D": 3}, {"B": 2, "T": 5, "H": 3, "D": 65})
_EMPTY = ({"B": 0, "T": 5, "C": 8}, {"B": 2, "T": 0, "C": 8})
_WIDTHS = tuple(  # dw: by columns at 256 rows, by a loop over rows at 600
    {"B": 1, "T": t, "C": c} for c in (4096, 128, 16384, 1024, 8192, 2048, 5120, 32768) for t in (600, 256)
)[:-1]
_BENCH = {
    "cuda": tuple(
        {"B": 1, "T": t, "C": c}
        for t, c in [(8192, 4096), (2048, 16384), (65536, 1024), (2048, 4096), (32768, 4096)]
    ),
    "cpu": ({"B": 1, "T": 512, "C": 1024}, {"B": 1, "T": 2048, "C": 2048}),
}
_ADD_BENCH = {"cuda": _BENCH["cuda"][:2], "cpu": _BENCH["cpu"][:1]}
_HEAD_BENCH = {
    "cuda": ({"B": 1, "T": 8192, "H": 32, "D": 128},),
    "cpu": ({"B": 1, "T": 512, "H": 8, "D": 64},),
}

_CASE = Case(
    op="rms_norm",
    family="hidden",
    inputs=_inputs,
    fused=norm.rms_norm,
    reference=norm.rms_norm_reference,
    eager=_rms_norm_eager,
    work=_work,
    formula="reads x, writes y: 2RN; reads x and dy, writes dx: 3RN",
    shapes=_SHAPES,
    empty=_EMPTY,
    bench=_BENCH,
    configurations=_WIDTHS,
    activations=("x",),
    half_scales=(30,),
)

_ADD = replace(
    _CASE,
    op="add_rms_norm",
    inputs=_add_inputs,
    fused=norm.add_rms_norm,
    reference=norm.add_rms_norm_reference,
    eager=_add_rms_norm_eager,
    work=_add_work,
    formula="reads x and the residual, writes y and the sum: 4RN; reads the sum and two gradients, writes one: 4RN",
    activations=("x", "residual"),
    bench=_ADD_BENCH,
)

CASES = (
    _CASE,
    replace(_CASE, family="unit offset", options={"unit_offset": True}, bench={}, configurations=()),
    replace(_CASE, family="heads", shapes=_HEAD_SHAPES, empty=(), bench=_HEAD_BENCH, configurations=()),
    _ADD,
    replace(_ADD, family="unit offset", options={"unit_offset": True}, bench={}, configurations=()),
)
