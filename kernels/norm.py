"""RMSNorm, alone or with the residual addition before it.

    h = x + residual        rstd = 1 / sqrt(mean(h^2) + eps)        xhat = h * rstd        y = xhat * w

    dh = rstd * (g - xhat * mean(g * xhat)) + the gradient that reaches h directly        with g = dy * w
    dw = sum over rows of dy * xhat

w is the weight, or 1 + weight with `unit_offset` (Gemma). Per-head normalisation is the same op on (..., H, D).

Memory, in elements of an (R, N) input: forward reads RN and writes RN + R, where eager moves about 7RN; with the
residual it reads 2RN and writes 2RN + R. Backward reads 2RN and writes RN (3RN and RN with the residual); dw costs
PN more, written and read once in fp32, P being the number of programs. All of it is bandwidth-bound.

Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, equation 4
"""

# A launch passes numbers where the kernel is annotated tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, check_dtype, check_shape, multiprocessors, next_power_of_2, register, use_triton

# ---- reference


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6, *, unit_offset: bool = False) -> Tensor:
    wide = torch.promote_types(
        x.dtype, torch.float32
    )  # fp64 stays fp64: gradients are checked by finite differences
    xf, w = x.to(wide), weight.to(wide)
    rstd = torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    return (xf * rstd * (1 + w if unit_offset else w)).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    h = x + residual
    return rms_norm_reference(h, weight, eps, unit_offset=unit_offset).to(x.dtype), h


# ---- kernels


@triton.jit
def _weight(w_ptr, cols, mask, UNIT_OFFSET: tl.constexpr, EVICTION: tl.constexpr):
    w = tl.load(w_ptr + cols, mask, other=0.0, eviction_policy=EVICTION).to(tl.float32)
    return 1 + w if UNIT_OFFSET else w


@triton.jit
def _rms_norm_fwd(
    x_ptr, residual_ptr, w_ptr, y_ptr, h_ptr, rstd_ptr, R, N, eps,
    ADD: tl.constexpr, UNIT_OFFSET: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_N)
    mask = (rows < R)[:, None] & (cols < N)[None, :]
    offsets = rows[:, None] * N + cols[None, :]  # [BLOCK_R, BLOCK_N]
    h = tl.load(x_ptr + offsets, mask, other=0.0).to(tl.float32)
    if ADD:
        h += tl.load(residual_ptr + offsets, mask, other=0.0).to(tl.float32)
        rounded = h.to(h_ptr.dtype.element_ty)  # y is the norm of the sum that is returned
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
):  # fmt: skip
    # a row that does not fit in registers is read twice, the second time from L2
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
def _rms_norm_bwd(
    dy_ptr, h_ptr, w_ptr, rstd_ptr, dh_ptr, dx_ptr, dw_ptr, R, N,
    ADD: tl.constexpr, UNIT_OFFSET: tl.constexpr, WITH_DW: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, RELOAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # One program walks every num_programs-th tile and keeps its share of dw in registers: no atomics, same bits every
    # run. RELOAD takes the tile a second time, from L1, rather than hold it across the reduction: half the registers.
    # The two loads differ in eviction policy, so the compiler cannot merge them.
    program, step = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK_N)
    dw = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for tile in tl.range(program, tl.cdiv(R, BLOCK_R), step, num_stages=STAGES):
        rows = tl.cast(tile, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
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
        if WITH_DW:
            dw += dy * xhat
    if WITH_DW:
        tl.store(dw_ptr + program * N + cols, tl.sum(dw, 0), cols < N)


@triton.jit
def _rms_norm_bwd_wide(
    dy_ptr, h_ptr, w_ptr, rstd_ptr, dh_ptr, dx_ptr, N,
    ADD: tl.constexpr, UNIT_OFFSET: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
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
):  # fmt: skip
    # program (i, j): columns of block i, every num_programs(1)-th tile of rows from j on
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dw = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(R, BLOCK_R), tl.num_programs(1)):
        rows = tl.cast(tile, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (rows < R)[:, None] & (cols < N)[None, :]
        offsets = rows[:, None] * N + cols[None, :]  # [BLOCK_R, BLOCK_N]
        h = tl.load(h_ptr + offsets, mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask, other=0.0).to(tl.float32)
        dw += dy * h * tl.load(rstd_ptr + rows, rows < R, other=0.0)[:, None]
    tl.store(dw_ptr + tl.program_id(1) * N + cols, tl.sum(dw, 0), cols < N)


@triton.jit
def _sum_partials(partial_ptr, dw_ptr, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for start in range(0, P, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        mask = (rows < P)[:, None] & (cols < N)[None, :]
        total += tl.load(partial_ptr + rows[:, None] * N + cols[None, :], mask, other=0.0)
    tl.store(dw_ptr + cols, tl.sum(total, 0), cols < N)


# ---- autograd

WIDEST = 16384  # columns that the registers of one program hold; wider rows are read twice


def _tile(N: int, elements_per_warp: int) -> dict[str, int]:
    """[rows, columns]: one row, or several short ones of 2,048 elements in all."""
    block_n = next_power_of_2(N)
    warps = min(16, max(4, block_n // elements_per_warp))
    return {"BLOCK_R": max(1, 2048 // block_n), "BLOCK_N": block_n, "num_warps": warps}


@cache
def _forward_config(N: int) -> dict[str, int]:
    return _tile(N, 1024)


@cache
def _backward_config(N: int) -> tuple[int, dict[str, int]]:
    """Programs on each multiprocessor, and the tile."""
    return 4, {**_tile(N, 512), "RELOAD": True, "STAGES": 1}


def _sum_config(P: int) -> dict[str, int]:
    """One look at all partial sums: the loop over them is a chain of loads that wait for each other."""
    if P <= 64:
        return {"BLOCK_P": 64, "BLOCK_N": 64, "num_warps": 8}
    return {"BLOCK_P": 512, "BLOCK_N": 16, "num_warps": 8}


WIDE = {"BLOCK_N": 8192, "num_warps": 16}
WIDE_WEIGHT_GRAD = {"BLOCK_R": 16, "BLOCK_N": 128, "num_warps": 4}


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous inputs. Returns y, the sum h (empty without a residual) and rstd (...)."""
    N, add = x.shape[-1], residual is not None
    y, h, rstd = _forward_fake(x, residual, weight, eps, unit_offset)
    R = rstd.numel()
    if y.numel() == 0:
        return y, h, rstd.zero_()
    if N > WIDEST:
        _rms_norm_fwd_wide[(R,)](x, residual, weight, y, h, rstd, N, eps, add, unit_offset, **WIDE)
    else:
        config = _forward_config(N)
        grid = (cdiv(R, config["BLOCK_R"]),)
        _rms_norm_fwd[grid](x, residual, weight, y, h, rstd, R, N, eps, add, unit_offset, **config)
    return y, h, rstd


def _forward_fake(x, residual, weight, eps, unit_offset):
    h = x.new_empty(0)
    if residual is not None:
        h = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    return torch.empty_like(x), h, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool, with_dw: bool
) -> tuple[Tensor, Tensor]:
    """Contiguous inputs. Returns dx in h's dtype and dw, which is empty where it is not asked for."""
    N, R, add = h.shape[-1], rstd.numel(), dh is not None
    dx, dw = _backward_fake(dy, dh, h, weight, rstd, unit_offset, with_dw)
    if dx.numel() == 0:
        return dx, dw.zero_()
    wide = N * h.element_size() > 2 * WIDEST
    per_sm, config = (1, WIDE_WEIGHT_GRAD) if wide else _backward_config(N)
    programs = min(cdiv(R, config["BLOCK_R"]), per_sm * multiprocessors(h))
    # one program writes dw itself; several write (programs, N) in fp32, summed below in a fixed order
    partial = dw if programs == 1 or not with_dw else dw.new_empty(programs, N, dtype=torch.float32)
    if wide:
        _rms_norm_bwd_wide[(R,)](dy, h, weight, rstd, dh, dx, N, add, unit_offset, **WIDE)
        if with_dw:
            grid = (cdiv(N, config["BLOCK_N"]), programs)
            _weight_grad_wide[grid](dy, h, rstd, partial, R, N, **config)
    else:
        _rms_norm_bwd[(programs,)](
            dy, h, weight, rstd, dh, dx, partial, R, N, add, unit_offset, with_dw, **config
        )
    if partial is not dw:
        config = _sum_config(programs)
        _sum_partials[(cdiv(N, config["BLOCK_N"]),)](partial, dw, programs, N, **config)
    return dx, dw


def _backward_fake(dy, dh, h, weight, rstd, unit_offset, with_dw):
    return torch.empty_like(h), weight.new_empty(weight.shape if with_dw else 0)


def _save(ctx, inputs, output):
    x, residual, weight, _eps, unit_offset = inputs
    _y, h, rstd = output
    ctx.save_for_backward(x if residual is None else h, weight, rstd)
    ctx.unit_offset, ctx.dtypes = unit_offset, (x.dtype, residual.dtype if residual is not None else None)
    ctx.mark_non_differentiable(rstd, *(() if residual is not None else (h,)))
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy: Tensor | None, dh: Tensor | None, _drstd: Tensor | None):
    h, weight, rstd = ctx.saved_tensors
    x_dtype, residual_dtype = ctx.dtypes
    dx, dw = dh, None
    if dy is not None:
        with_dw = ctx.needs_input_grad[2]
        dh = dh if dh is None else dh.contiguous()
        dx, dw = _rms_norm_backward(dy.contiguous(), dh, h, weight, rstd, ctx.unit_offset, with_dw)
        dw = dw if with_dw else None
    if dx is None:
        return None, None, None, None, None
    return dx.to(x_dtype), None if residual_dtype is None else dx.to(residual_dtype), dw, None, None


_rms_norm_backward = register("rms_norm_backward", _backward, _backward_fake)
_rms_norm = register("rms_norm", _forward, _forward_fake, _save, _differentiate)


class _RMSNormTorch(torch.autograd.Function):
    """The CPU path in fp32: autograd through the reference would keep every intermediate."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, eps: float) -> Tensor:
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, w, rstd)
        return (x * rstd).mul_(w)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, w, rstd = ctx.saved_tensors
        N = x.shape[-1]
        xhat = x * rstd
        products = (dy * xhat).reshape(
            -1, N
        )  # (rows, N): column sums are dw, and each row's product with w the mean
        mean = torch.mv(products, w / N).view_as(rstd)
        dx = (dy * w).addcmul_(xhat, mean, value=-1).mul_(rstd)
        return dx, products.sum(0), None


# ---- public op


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, unit_offset: bool = False) -> Tensor:
    """Normalise the last dimension to unit root mean square, then scale by weight, or by 1 + weight.

    x: (..., hidden) float, statistics are kept in fp32    weight: (hidden,), any float dtype
    Returns (..., hidden) in x's dtype.
    """
    check_shape("weight", weight, hidden=x.shape[-1])
    if use_triton(x):
        check_dtype("x", x)
        return _rms_norm(x.contiguous(), None, weight.contiguous(), eps, unit_offset)[0]
    if x.dtype == weight.dtype == torch.float32:
        return _RMSNormTorch.apply(x, weight + 1 if unit_offset else weight, eps)
    return rms_norm_reference(x, weight, eps, unit_offset=unit_offset)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """rms_norm of x + residual, and that sum.

    x, residual: (..., hidden), of equal or different dtypes: a bf16 branch on an fp32 stream is fine
    weight: (hidden,), any float dtype
    Returns the normalised (..., hidden) in x's dtype, and the sum (..., hidden) in the wider dtype of the two.
    """
    check_shape("residual", residual, **{f"x.shape[{i}]": size for i, size in enumerate(x.shape)})
    check_shape("weight", weight, hidden=x.shape[-1])
    if use_triton(x):
        check_dtype("x", x)
        check_dtype("residual", residual)
        y, h, _ = _rms_norm(x.contiguous(), residual.contiguous(), weight.contiguous(), eps, unit_offset)
        return y, h
    h = x + residual
    return rms_norm(h, weight, eps, unit_offset=unit_offset).to(x.dtype), h
