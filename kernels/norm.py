"""RMSNorm, alone or fused with the residual addition before it.

    h = x + residual        rstd = 1 / sqrt(mean(h^2) + eps)        xhat = h * rstd        y = xhat * w

    dh = rstd * (g - xhat * mean(g * xhat)) + the upstream gradient of h        with g = dy * w
    dw = sum over rows of dy * xhat

w is the weight, or 1 + weight with `unit_offset` (Gemma). Per-head normalisation is the same op on (..., H, D).

Memory, in elements, for an (R, N) input: the forward reads RN and writes RN + R, while eager code moves about 7RN. With
the residual it reads 2RN and writes 2RN + R. The backward reads 2RN and writes RN; with the residual it reads 3RN and
writes RN. For dw, P programs write PN partial sums in fp32, which are read once; if rows are few, 2RN is read again
instead. All of it is bandwidth-bound.

Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, equation 4
"""

# A launch passes numbers where the kernel is annotated tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._chip import (
    FLOATS,
    capability,
    cdiv,
    check_device,
    check_dtype,
    check_number,
    check_shape,
    most_warps,
    multiprocessors,
    use_triton,
)
from ._op import make_op
from ._triton import tl, triton
from .plain.norm import RMSNormTorch, normalise
from .tiles import (
    NORM_FEW_ROWS,
    NORM_WIDE,
    NORM_WIDE_WEIGHT_GRAD,
    NORM_WIDEST,
    norm_backward,
    norm_forward,
    norm_sum,
    norm_walk,
)

# ---- reference


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6, *, unit_offset: bool = False) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)  # fp64, in which gradients are checked, stays fp64
    xf, w = x.to(wide), weight.to(wide)
    rstd = torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    return (xf * rstd * (1 + w if unit_offset else w)).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    h = x + residual
    return rms_norm_reference(h, weight, eps, unit_offset=unit_offset).to(x.dtype), h


# ---- kernels

# fmt: off


@triton.jit
def _weight(w_ptr, cols, mask, UNIT_OFFSET: tl.constexpr, EVICTION: tl.constexpr):
    w = tl.load(w_ptr + cols, mask, other=0.0, eviction_policy=EVICTION).to(tl.float32)
    return 1 + w if UNIT_OFFSET else w


@triton.jit
def _rms_norm_fwd(
    x_ptr, residual_ptr, w_ptr, y_ptr, h_ptr, rstd_ptr, R, N, eps,
    ADD: tl.constexpr, UNIT_OFFSET: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_N)
    mask = (rows < R)[:, None] & (cols < N)[None, :]
    offsets = rows[:, None] * N + cols[None, :]  # [BLOCK_R, BLOCK_N]

    h = tl.load(x_ptr + offsets, mask, other=0.0).to(tl.float32)
    if ADD:
        h += tl.load(residual_ptr + offsets, mask, other=0.0).to(tl.float32)
        rounded = h.to(h_ptr.dtype.element_ty)  # y is the norm of the rounded sum, which is returned
        tl.store(h_ptr + offsets, rounded, mask)
        h = rounded.to(tl.float32)

    rstd = tl.rsqrt(tl.sum(h * h, 1) / N + eps)  # [BLOCK_R]
    w = _weight(w_ptr, cols, cols < N, UNIT_OFFSET, "")
    tl.store(y_ptr + offsets, h * rstd[:, None] * w[None, :], mask)
    tl.store(rstd_ptr + rows, rstd, rows < R)


@triton.jit
def _rms_norm_fwd_wide(
    x_ptr, residual_ptr, w_ptr, y_ptr, h_ptr, rstd_ptr, N, eps,
    ADD: tl.constexpr, UNIT_OFFSET: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # A row that does not fit in registers is read twice, the second time from L2.
    start = tl.program_id(0).to(tl.int64) * N
    squares = tl.zeros([BLOCK_N], tl.float32)
    for block in range(0, N, BLOCK_N):
        cols = block + tl.arange(0, BLOCK_N)
        h = tl.load(x_ptr + start + cols, cols < N, other=0.0).to(tl.float32)
        if ADD:
            h += tl.load(residual_ptr + start + cols, cols < N, other=0.0).to(tl.float32)
            rounded = h.to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + start + cols, rounded, cols < N)
            h = rounded.to(tl.float32)
        squares += h * h

    rstd = tl.rsqrt(tl.sum(squares, 0) / N + eps)
    tl.store(rstd_ptr + tl.program_id(0), rstd)

    for block in range(0, N, BLOCK_N):
        cols = block + tl.arange(0, BLOCK_N)
        h = tl.load(x_ptr + start + cols, cols < N, other=0.0).to(tl.float32)
        if ADD:
            h += tl.load(residual_ptr + start + cols, cols < N, other=0.0).to(tl.float32)
            h = h.to(h_ptr.dtype.element_ty).to(tl.float32)
        tl.store(y_ptr + start + cols, h * rstd * _weight(w_ptr, cols, cols < N, UNIT_OFFSET, ""), cols < N)


@triton.jit
def _input_grad(
    dy_ptr, h_ptr, w_ptr, rstd_ptr, dh_ptr, dx_ptr, tile, R, N,
    ADD: tl.constexpr, UNIT_OFFSET: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, RELOAD: tl.constexpr,
):
    # Stores dx of one tile of rows and returns the tile's dy * xhat. With RELOAD the tile is loaded again, from L1, and
    # is not held across the reduction, which halves the registers. The two loads differ in eviction policy, so the
    # compiler cannot merge them.
    rows = tl.cast(tile, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_N)
    mask = (rows < R)[:, None] & (cols < N)[None, :]
    offsets = rows[:, None] * N + cols[None, :]  # [BLOCK_R, BLOCK_N]

    rstd = tl.load(rstd_ptr + rows, rows < R, other=0.0)[:, None]  # [BLOCK_R, 1]
    w = _weight(w_ptr, cols, cols < N, UNIT_OFFSET, "evict_last")[None, :]
    h = tl.load(h_ptr + offsets, mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    dy = tl.load(dy_ptr + offsets, mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    mean = (tl.sum(dy * w * (h * rstd), 1) / N)[:, None]  # [BLOCK_R, 1]

    if RELOAD:
        h = tl.load(h_ptr + offsets, mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        w = _weight(w_ptr, cols, cols < N, UNIT_OFFSET, "")[None, :]

    xhat = h * rstd
    dx = rstd * (dy * w - xhat * mean)
    if ADD:
        dx += tl.load(dh_ptr + offsets, mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offsets, dx, mask)
    return dy * xhat


@triton.jit
def _weight_grad(
    dy_ptr, h_ptr, rstd_ptr, dw_ptr, block, first, step, R, N, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):
    # Sums one block of columns over every step-th tile of rows, starting with tile `first`.
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    dw = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)

    for tile in range(first, tl.cdiv(R, BLOCK_R), step):
        rows = tl.cast(tile, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (rows < R)[:, None] & (cols < N)[None, :]
        offsets = rows[:, None] * N + cols[None, :]  # [BLOCK_R, BLOCK_N]
        h = tl.load(h_ptr + offsets, mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask, other=0.0).to(tl.float32)
        dw += dy * (h * tl.load(rstd_ptr + rows, rows < R, other=0.0)[:, None])
    tl.store(dw_ptr + cols, tl.sum(dw, 0), cols < N)


@triton.jit
def _rms_norm_bwd(
    dy_ptr, h_ptr, w_ptr, rstd_ptr, dh_ptr, dx_ptr, dw_ptr, R, N,
    ADD: tl.constexpr, UNIT_OFFSET: tl.constexpr, WITH_DW: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, RELOAD: tl.constexpr,
    DW_BLOCK_R: tl.constexpr, DW_BLOCK_N: tl.constexpr,
):
    # The first programs compute dw, each for a block of columns; dw needs only dy, h and rstd. The others compute dx,
    # each for a tile of rows. The inputs are read twice, but in one launch.
    columns = tl.cdiv(N, DW_BLOCK_N) if WITH_DW else 0
    program = tl.program_id(0)
    if program < columns:
        _weight_grad(dy_ptr, h_ptr, rstd_ptr, dw_ptr, program, 0, 1, R, N, DW_BLOCK_R, DW_BLOCK_N)
    else:
        _input_grad(
            dy_ptr, h_ptr, w_ptr, rstd_ptr, dh_ptr, dx_ptr, program - columns, R, N,
            ADD, UNIT_OFFSET, BLOCK_R, BLOCK_N, RELOAD,
        )


@triton.jit
def _rms_norm_bwd_walk(
    dy_ptr, h_ptr, w_ptr, rstd_ptr, dh_ptr, dx_ptr, dw_ptr, R, N,
    ADD: tl.constexpr, UNIT_OFFSET: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, RELOAD: tl.constexpr, STAGES: tl.constexpr,
):
    # A program takes every num_programs-th tile and keeps its partial sum of dw in registers. There are no atomics, so
    # every run gives the same bits.
    program, step = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK_N)
    dw = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for tile in tl.range(program, tl.cdiv(R, BLOCK_R), step, num_stages=STAGES):
        dw += _input_grad(
            dy_ptr, h_ptr, w_ptr, rstd_ptr, dh_ptr, dx_ptr, tile, R, N, ADD, UNIT_OFFSET, BLOCK_R, BLOCK_N, RELOAD
        )
    tl.store(dw_ptr + program * N + cols, tl.sum(dw, 0), cols < N)


@triton.jit
def _rms_norm_bwd_wide(
    dy_ptr, h_ptr, w_ptr, rstd_ptr, dh_ptr, dx_ptr, N,
    ADD: tl.constexpr, UNIT_OFFSET: tl.constexpr, BLOCK_N: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * N
    rstd = tl.load(rstd_ptr + tl.program_id(0))

    products = tl.zeros([BLOCK_N], tl.float32)
    for block in range(0, N, BLOCK_N):
        cols = block + tl.arange(0, BLOCK_N)
        h = tl.load(h_ptr + start + cols, cols < N, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + start + cols, cols < N, other=0.0).to(tl.float32)
        products += dy * _weight(w_ptr, cols, cols < N, UNIT_OFFSET, "") * (h * rstd)

    mean = tl.sum(products, 0) / N
    for block in range(0, N, BLOCK_N):
        cols = block + tl.arange(0, BLOCK_N)
        h = tl.load(h_ptr + start + cols, cols < N, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + start + cols, cols < N, other=0.0).to(tl.float32)
        dx = rstd * (dy * _weight(w_ptr, cols, cols < N, UNIT_OFFSET, "") - h * rstd * mean)
        if ADD:
            dx += tl.load(dh_ptr + start + cols, cols < N, other=0.0).to(tl.float32)
        tl.store(dx_ptr + start + cols, dx, cols < N)


@triton.jit
def _weight_grad_wide(
    dy_ptr, h_ptr, rstd_ptr, dw_ptr, R, N, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):
    # Program (i, j) takes block i of the columns and the share j of the rows.
    first, step = tl.program_id(1), tl.num_programs(1)
    _weight_grad(
        dy_ptr, h_ptr, rstd_ptr, dw_ptr + first * N, tl.program_id(0), first, step, R, N, BLOCK_R, BLOCK_N
    )


@triton.jit
def _sum_partials(partial_ptr, dw_ptr, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for start in range(0, P, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        mask = (rows < P)[:, None] & (cols < N)[None, :]
        total += tl.load(partial_ptr + rows[:, None] * N + cols[None, :], mask, other=0.0)
    tl.store(dw_ptr + cols, tl.sum(total, 0), cols < N)

# fmt: on


# ---- launch


class _Saved(NamedTuple):
    """The tensors and numbers that the backward reads. Each gradient has the dtype of its input."""

    h: Tensor  # the sum, or x if there is no residual
    weight: Tensor
    rstd: Tensor
    unit_offset: bool
    x_dtype: torch.dtype
    residual_dtype: torch.dtype | None


class _Gradients(NamedTuple):
    x: Tensor | None
    residual: Tensor | None
    weight: Tensor | None


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalised y, the sum h (empty without a residual), and rstd (...). The inputs are contiguous."""
    N, add = x.shape[-1], residual is not None
    y, h, rstd = _shapes(x, residual, weight, eps, unit_offset)
    R = rstd.numel()
    if y.numel() == 0:
        return y, h, rstd.zero_()

    if N > NORM_WIDEST:
        _rms_norm_fwd_wide[(R,)](x, residual, weight, y, h, rstd, N, eps, add, unit_offset, **NORM_WIDE)
    else:
        config = norm_forward(N, most_warps())
        grid = (cdiv(R, config["BLOCK_R"]),)
        _rms_norm_fwd[grid](x, residual, weight, y, h, rstd, R, N, eps, add, unit_offset, **config)
    return y, h, rstd


def _shapes(x, residual, weight, eps, unit_offset):
    h = x.new_empty(0)
    if residual is not None:
        h = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    return torch.empty_like(x), h, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _save(outputs, x, residual, weight, eps, unit_offset):
    _, h, rstd = outputs
    if residual is None:
        return _Saved(x, weight, rstd, unit_offset, x.dtype, None)
    return _Saved(h, weight, rstd, unit_offset, x.dtype, residual.dtype)


def _backward(saved: _Saved, needs: Any, dy: Tensor | None, dh: Tensor | None) -> _Gradients:
    """Compute the gradients of the inputs. dy is the gradient of the normalised output, dh that of x + residual."""
    if saved.residual_dtype is None:
        dh = None  # the gradient of an empty tensor
    dx, dw = dh, None
    if dy is not None:
        dh = None if dh is None else dh.contiguous()
        h, weight, rstd, unit_offset = saved[:4]
        dx, dw = _rms_norm_backward(dy.contiguous(), dh, h, weight, rstd, unit_offset, needs.weight)
    if dx is None:
        return _Gradients(None, None, None)
    dresidual = None if saved.residual_dtype is None else dx.to(saved.residual_dtype)
    return _Gradients(
        dx if dx.dtype == saved.x_dtype else dx.to(saved.x_dtype), dresidual, dw if needs.weight else None
    )


def _input_and_weight_grad(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool, with_dw: bool
) -> tuple[Tensor, Tensor]:
    """Return dx in h's dtype, and dw, which is empty unless `with_dw`. The inputs are contiguous."""
    N, R, add = h.shape[-1], rstd.numel(), dh is not None
    dx, dw = _gradient_shapes(dy, dh, h, weight, rstd, unit_offset, with_dw)
    if dx.numel() == 0:
        return dx, dw.zero_()

    if N * h.element_size() > 2 * NORM_WIDEST:
        _rms_norm_bwd_wide[(R,)](dy, h, weight, rstd, dh, dx, N, add, unit_offset, **NORM_WIDE)
        if with_dw:
            partial = _partial(dw, min(cdiv(R, NORM_WIDE_WEIGHT_GRAD["BLOCK_R"]), multiprocessors(h)))
            grid = (cdiv(N, NORM_WIDE_WEIGHT_GRAD["BLOCK_N"]), partial.shape[0])
            _weight_grad_wide[grid](dy, h, rstd, partial, R, N, **NORM_WIDE_WEIGHT_GRAD)
            _add_up(partial, dw)

    elif not with_dw or multiprocessors(h) * NORM_FEW_ROWS >= R:
        config = norm_backward(N, most_warps())
        programs = cdiv(R, config["BLOCK_R"]) + (cdiv(N, config["DW_BLOCK_N"]) if with_dw else 0)
        _rms_norm_bwd[(programs,)](dy, h, weight, rstd, dh, dx, dw, R, N, add, unit_offset, with_dw, **config)

    else:
        # a GeForce RTX 50 (sm_120) spills registers at a width of 128 if the next tile is loaded ahead
        per_sm, config = norm_walk(N, 1 if capability(h)[0] == 12 else 2)
        partial = _partial(dw, min(cdiv(R, config["BLOCK_R"]), per_sm * multiprocessors(h)))
        _rms_norm_bwd_walk[(partial.shape[0],)](
            dy, h, weight, rstd, dh, dx, partial, R, N, add, unit_offset, **config
        )
        _add_up(partial, dw)
    return dx, dw


def _partial(dw: Tensor, programs: int) -> Tensor:
    return dw.new_empty(programs, dw.shape[0], dtype=torch.float32)


def _add_up(partial: Tensor, dw: Tensor) -> None:
    """Write the sum of `partial` (programs, N) over the programs into dw (N,), in a fixed order."""
    P, N = partial.shape
    config = norm_sum(P)
    _sum_partials[(cdiv(N, config["BLOCK_N"]),)](partial, dw, P, N, **config)


def _gradient_shapes(dy, dh, h, weight, rstd, unit_offset, with_dw):
    return torch.empty_like(h), weight.new_empty(weight.shape if with_dw else 0)


_rms_norm_backward = make_op("rms_norm_backward", _input_and_weight_grad, _gradient_shapes)
_rms_norm = make_op("rms_norm", _forward, _shapes, _save, _backward)


# ---- op


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    if not x.ndim:
        raise ValueError("x: expected shape (..., hidden), got ()")
    check_dtype("x", x)
    check_shape("weight", weight, hidden=x.shape[-1])
    if weight.dtype != x.dtype:
        check_dtype("weight", weight, *FLOATS)
    check_device(x, weight=weight)
    check_number("eps", eps, 0)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, unit_offset: bool = False) -> Tensor:
    """Normalise the last dimension to unit root mean square, then multiply by weight.

    x: (..., hidden) float; statistics are computed in fp32 (fp64 for fp64).    weight: (hidden,), any float dtype.
    eps: added to the mean square, at least 0.    unit_offset: multiply by 1 + weight.
    Returns (..., hidden) in x's dtype.
    Raises ValueError for other shapes and dtypes, an eps below 0, and tensors on several devices.
    """
    _check(x, weight, eps)
    if use_triton(x):
        return _rms_norm(x.contiguous(), None, weight.contiguous(), eps, unit_offset)[0]
    if x.dtype == weight.dtype == torch.float32:
        w = weight + 1 if unit_offset else weight
        # the compiler makes its own backward; from ours it could not derive a second derivative
        own = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return RMSNormTorch.apply(x, w, eps) if own else normalise(x, w, eps)[0]
    return rms_norm_reference(x, weight, eps, unit_offset=unit_offset)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """Return rms_norm(x + residual), and the sum x + residual.

    x, residual: (..., hidden). Their dtypes may differ, such as a bf16 branch on an fp32 residual stream.
    weight: (hidden,), any float dtype.    eps, unit_offset: as in rms_norm.
    Returns the normalised (..., hidden) in x's dtype, and the sum (..., hidden) in the wider of the two dtypes.
    Raises ValueError as rms_norm does.
    """
    _check(x, weight, eps)
    check_shape("residual", residual, **{f"x.shape[{i}]": size for i, size in enumerate(x.shape)})
    check_dtype("residual", residual)
    check_device(x, residual=residual)
    if use_triton(x):
        y, h, _ = _rms_norm(x.contiguous(), residual.contiguous(), weight.contiguous(), eps, unit_offset)
        return y, h
    h = x + residual
    return rms_norm(h, weight, eps, unit_offset=unit_offset).to(x.dtype), h
