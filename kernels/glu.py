"""Gated linear units, the activations between the two products of a feed-forward layer.

    out = (u + offset) * g * p        p = sigmoid(s(g))        s(g) = scale * (g + cubic * g^3)

    swiglu           scale 1               cubic 0          offset 0    silu(g) * u
    geglu            scale 2 sqrt(2/pi)    cubic 0.044715   offset 0    gelu(g) * u in the tanh approximation
    clamped_swiglu   scale alpha = 1.702   cubic 0          offset 1    of min(g, limit) and clamp(u, -limit, limit)

    dg = dout * (u + offset) * p * (1 + g * (1 - p) * s'(g))        s'(g) = scale * (1 + 3 * cubic * g^2)
    du = dout * g * p        dg and du are 0 where their input is clamped

Since tanh(z) = 2 sigmoid(2z) - 1, gelu's 0.5 g (1 + tanh(z)) has the same form, so one kernel serves all three units.

Memory, in elements, for an (R, F) output: the forward reads 2RF and writes RF, while eager code moves 5RF. The backward
reads 3RF and writes 2RF. Only the two inputs are saved, and the activation is recomputed. All of it is bandwidth-bound.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202, equation 6; gelu: Hendrycks and Gimpel 2016,
https://arxiv.org/abs/1606.08415, section 2; the clamped form: gpt-oss model card, https://arxiv.org/abs/2508.10925
"""

# A launch passes numbers where the kernel is annotated tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._chip import cdiv, check_device, check_dtype, check_number, check_shape, use_triton
from ._op import like_saved, make_op
from ._triton import tl, triton

# ---- reference


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def geglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def clamped_swiglu_reference(gate: Tensor, up: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    gate = torch.where(gate > limit, limit, gate)  # clamp gives NaN the gradient 0
    up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
    return (up + 1) * (gate * (alpha * gate).sigmoid())


# ---- kernels

# fmt: off


@triton.jit
def _glu_fwd(
    gate_ptr, up_ptr, out_ptr, R, F, stride_gate, stride_up, scale, cubic, limit, offset,
    CUBIC: tl.constexpr, CLAMP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):
    blocks = tl.cdiv(F, BLOCK_F)  # neighbouring programs take neighbouring columns
    rows = ((tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    cols = ((tl.program_id(0) % blocks).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    mask = (rows < R) & (cols < F)  # [BLOCK_R, BLOCK_F]

    g = tl.load(gate_ptr + rows * stride_gate + cols, mask, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + rows * stride_up + cols, mask, other=0.0).to(tl.float32)
    if CLAMP:
        g = tl.where(g > limit, limit, g)  # comparisons, not minimum: NaN passes through
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
    s = scale * (g + cubic * g * g * g) if CUBIC else scale * g
    tl.store(out_ptr + rows * F + cols, (u + offset) * g * tl.sigmoid(s), mask)


@triton.jit
def _glu_bwd(
    dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, R, F, stride_gate, stride_up, scale, cubic, limit, offset,
    CUBIC: tl.constexpr, CLAMP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):
    blocks = tl.cdiv(F, BLOCK_F)  # neighbouring programs take neighbouring columns
    rows = ((tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    cols = ((tl.program_id(0) % blocks).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    mask = (rows < R) & (cols < F)  # [BLOCK_R, BLOCK_F]

    dout = tl.load(dout_ptr + rows * F + cols, mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + rows * stride_gate + cols, mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * stride_up + cols, mask, other=0.0).to(tl.float32)
    g, u = gate, up
    if CLAMP:
        g = tl.where(gate > limit, limit, gate)
        u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    s = scale * (g + cubic * g * g * g) if CUBIC else scale * g
    slope = scale * (1 + 3 * cubic * g * g) if CUBIC else scale

    p = tl.sigmoid(s)
    dg = dout * (u + offset) * p * (1 + g * (1 - p) * slope)
    du = dout * g * p
    if CLAMP:
        dg = tl.where(gate > limit, 0.0, dg)
        du = tl.where((up > limit) | (up < -limit), 0.0, du)
    tl.store(dgate_ptr + rows * F + cols, dg, mask)
    tl.store(dup_ptr + rows * F + cols, du, mask)

# fmt: on


# ---- launch


@lru_cache
def _config(F: int) -> dict[str, int]:
    """Return the widest tile of 2,048 elements with at most 5 % idle columns. It has at least 128 columns."""
    block_f = 2048
    while block_f > 128 and cdiv(F, block_f) * block_f > 1.05 * F:
        block_f //= 2
    return {"BLOCK_R": 2048 // block_f, "BLOCK_F": block_f, "num_warps": 4}


class _Inputs(NamedTuple):
    """The two inputs, and the numbers that define the activation."""

    gate: Tensor
    up: Tensor
    scale: float
    cubic: float
    limit: float | None
    offset: float


class _Gradients(NamedTuple):
    gate: Tensor | None
    up: Tensor | None


def _forward(
    gate: Tensor, up: Tensor, scale: float, cubic: float, limit: float | None, offset: float
) -> Tensor:
    """Compute the gated linear unit of gate and up, both (R, F) with a contiguous last dimension."""
    out = gate.new_empty(gate.shape)
    if out.numel():
        numbers, grid, config = _launch_arguments(gate, up, scale, cubic, limit, offset)
        _glu_fwd[grid](gate, up, out, *numbers, **config)
    return out


def _shapes(gate, *_):
    return gate.new_empty(gate.shape)


def _save(outputs, *inputs):
    return _Inputs(*inputs)


def _backward(saved: _Inputs, needs: Any, dout: Tensor) -> _Gradients:
    gate, up = saved[:2]
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if dgate.numel():
        numbers, grid, config = _launch_arguments(*saved)
        _glu_bwd[grid](dout.contiguous(), gate, up, dgate, dup, *numbers, **config)
    return _Gradients(dgate, dup)


def _launch_arguments(
    gate: Tensor, up: Tensor, scale: float, cubic: float, limit: float | None, offset: float
) -> tuple[tuple[Any, ...], tuple[int], dict[str, int]]:
    """Return the numbers that the forward and backward kernels take, the grid, and the tile."""
    if gate.is_contiguous() and up.is_contiguous():  # taken as a single row
        R, F, stride_gate, stride_up = 1, gate.numel(), 0, 0
    else:
        (R, F), stride_gate, stride_up = gate.shape, gate.stride(0), up.stride(0)

    config = _config(F)
    grid = (cdiv(R, config["BLOCK_R"]) * cdiv(F, config["BLOCK_F"]),)
    form = scale, cubic, limit or 0.0, offset, cubic != 0, limit is not None
    return (R, F, stride_gate, stride_up, *form), grid, config


_gated = make_op("gated_linear_unit", _forward, _shapes, _save, _backward, like_saved)


def _fused(
    gate: Tensor,
    up: Tensor,
    scale: float,
    cubic: float = 0.0,
    limit: float | None = None,
    offset: float = 0.0,
) -> Tensor:
    def rows(x: Tensor) -> Tensor:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # (..., F) -> (R, F)
        return x if x.stride(-1) == 1 else x.contiguous()

    return _gated(rows(gate), rows(up), scale, cubic, limit, offset).view(gate.shape)


def _check(gate: Tensor, up: Tensor) -> None:
    if not gate.ndim:
        raise ValueError("gate: expected shape (..., F), got ()")
    check_dtype("gate", gate)
    check_device(gate, up=up)
    check_shape("up", up, **{f"gate.shape[{i}]": size for i, size in enumerate(gate.shape)})
    check_dtype("up", up, gate.dtype)


# ---- op


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up.

    gate, up: (..., F), one dtype. Strided rows, such as the halves of a fused (..., 2F), are read in place.
    Returns (..., F), contiguous.
    Raises ValueError for other shapes and dtypes, and for tensors on two devices.
    """
    _check(gate, up)
    return _fused(gate, up, scale=1.0) if use_triton(gate) else swiglu_reference(gate, up)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute gelu(gate) * up with the tanh approximation of gelu. Shapes, dtypes and errors are those of swiglu."""
    _check(gate, up)
    if use_triton(gate):
        return _fused(gate, up, scale=2 * math.sqrt(2 / math.pi), cubic=0.044715)
    return geglu_reference(gate, up)


def clamped_swiglu(gate: Tensor, up: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """Compute (up + 1) * gate * sigmoid(alpha * gate) of clamped inputs.

    gate is clamped to at most `limit`, and up to the range from -limit to limit. An infinite limit clamps nothing. A
    clamped element gets no gradient, but an element that lies on the limit does. Shapes and dtypes are those of swiglu.
    Raises ValueError as swiglu does, for an alpha that is not finite, and for a limit below 0.
    """
    _check(gate, up)
    check_number("alpha", alpha)
    if not limit >= 0:
        raise ValueError(f"limit: expected a number of at least 0, got {limit}")
    if use_triton(gate):
        return _fused(gate, up, scale=alpha, limit=limit, offset=1.0)
    return clamped_swiglu_reference(gate, up, alpha, limit)
