"""Cases of kernels/glu.py: gated activations."""

from dataclasses import replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import glu
from .case import Case, Dims, Tensors, Work, randn


def swiglu_eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _geglu_eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def clamped_swiglu_eager(gate: Tensor, up: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(alpha * gate))


def _inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    shape = dims["B"], dims["T"], dims["F"]
    return {"gate": randn(shape, dtype, device), "up": randn(shape, dtype, device)}


def _work(dims: Dims, size: int) -> tuple[Work, Work]:
    n = prod(dims.values())
    return Work(6 * n, 3 * n * size), Work(15 * n, 5 * n * size)


_SHAPES = (
    {"B": 1, "T": 1, "F": 1},
    {"B": 2, "T": 5, "F": 101},
    {"B": 1, "T": 3, "F": 1031},
    {"B": 2, "T": 2, "F": 1024},
)
_EMPTY = ({"B": 0, "T": 5, "F": 8}, {"B": 2, "T": 5, "F": 0})
_BENCH = {
    "cuda": tuple({"B": 1, "T": t, "F": 14336} for t in (2048, 512, 8192)),
    "cpu": ({"B": 1, "T": 512, "F": 2048},),
}

_CASE = Case(
    op="swiglu",
    family="elementwise",
    inputs=_inputs,
    fused=glu.swiglu,
    reference=glu.swiglu_reference,
    eager=swiglu_eager,
    work=_work,
    formula="reads gate and up, writes y: 3TF; reads both and dy, writes two gradients: 5TF",
    shapes=_SHAPES,
    activations=("gate", "up"),
    empty=_EMPTY,
    bench=_BENCH,
    configurations=({"B": 1, "T": 256, "F": 14336},),
)
_OTHER = replace(_CASE, bench={device: shapes[:1] for device, shapes in _BENCH.items()})

CASES = (
    _CASE,
    replace(_OTHER, op="geglu", fused=glu.geglu, reference=glu.geglu_reference, eager=_geglu_eager),
    replace(
        _OTHER,
        op="clamped_swiglu",
        fused=glu.clamped_swiglu,
        reference=glu.clamped_swiglu_reference,
        eager=clamped_swiglu_eager,
    ),
)
