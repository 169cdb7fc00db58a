"""A frozen linear layer and the low-rank adapter that is trained beside it.

    out = gain (x W^T + scaling S B^T) + bias        S = drop(x) A^T        gain = 1, or with DoRA m / |W + scaling B A|

    g = gain dout                       dS = scaling g B        dB = scaling g^T S        dA = dS^T drop(x)
    dx = g W + drop(dS A)               dm = sum over rows of dout (x W^T + scaling S B^T) / |W + scaling B A|
    dbias = sum over rows of dout       W has no gradient, nor, as DoRA has it, the norm in the gain

Several layers of one x, as q, k and v, have their A in one: S = drop(x) [A1; A2; A3]^T, dA = dS^T drop(x), and the dS A
that is added to the sum of the g W. Their adapters read x once forward and once backward, and write dx once.

drop(x) = x / (1 - p) where a hash of (seed, row, column) says so, else 0: computed again in the backward, so that no
mask is kept. Saved are x, S and two vectors of DoRA; a base in 4 bits is multiplied out again for dx. With several
adapters, row i has the A and B that `adapter` names.

Memory, in elements, x (M, K), out (M, N): the base's product reads MK + NK and writes MN. Beside it, forward, the
adapter reads MK, reads and writes MN; backward it reads MN and MK twice, and reads and writes MK. Fused into the base's
product it would read and write nothing: at M = K = N = 4096 that is at most 22 % of the product's time on an H100.

Source: LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3; DoRA, Liu et al. 2024,
        https://arxiv.org/abs/2402.09353, equations 5 and 11; the hash: lowbias32 of
        https://github.com/skeeto/hash-prospector
"""

# A launch passes numbers where the kernel is annotated tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _lora_paths
from ._chip import (
    FLOATS,
    autocast_dtype,
    capability,
    cdiv,
    check_device,
    check_dtype,
    check_ids,
    check_number,
    check_shape,
    device_name,
    multiprocessors,
    next_power_of_2,
    precision,
    use_triton,
)
from ._op import register
from ._triton import tl, triton
from .nf4 import FEW_ROWS, dequantize, multiplied_out, product
from .records import NF4Weight

# ---- reference


def lora_linear_reference(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    adapter: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    W = weight if isinstance(weight, Tensor) else multiplied_out(weight, x.dtype)
    wide = torch.promote_types(x.dtype, W.dtype)
    rows, W, lora_a, lora_b = (t.to(wide) for t in (x.reshape(-1, x.shape[-1]), W, lora_a, lora_b))
    dropped = _drop(rows, dropout, _seed(seed, x)) if dropout else rows
    if adapter is None:
        low = dropped @ lora_a.T @ lora_b.T
    else:
        index = adapter.reshape(-1).long()
        a, b = lora_a[index.clamp(min=0)], lora_b[index.clamp(min=0)]  # (rows, R, K), (rows, N, R)
        low = (b @ (a @ dropped[:, :, None]))[:, :, 0].masked_fill((index < 0)[:, None], 0)
    out = rows @ W.T + scaling * low
    if magnitude is not None:
        out = out * (magnitude / (W + scaling * (lora_b @ lora_a)).detach().norm(dim=1))
    return (out if bias is None else out + bias).to(x.dtype).view(*x.shape[:-1], W.shape[0])


def lora_linears_reference(
    x: Tensor,
    weights: Sequence[Tensor | NF4Weight],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scalings: Sequence[float],
    *,
    biases: Sequence[Tensor] | None = None,
    magnitudes: Sequence[Tensor] | None = None,
    adapter: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> list[Tensor]:
    nothing = [None] * len(weights)
    each = zip(weights, lora_a, lora_b, scalings, biases or nothing, magnitudes or nothing, strict=True)
    return [
        lora_linear_reference(
            x, W, a, b, s, bias=bias, magnitude=magnitude, adapter=adapter, dropout=dropout, seed=seed
        )
        for W, a, b, s, bias, magnitude in each
    ]


def _seed(seed: int | Tensor | None, x: Tensor) -> Tensor:
    if seed is None:
        raise ValueError("seed: expected an int or a 0-d int64 tensor, for dropout above 0, got none")
    if isinstance(seed, Tensor):
        if seed.ndim or seed.dtype != torch.int64 or seed.device != x.device:
            raise ValueError(
                f"seed: expected a 0-d int64 tensor on {x.device}, got {seed.ndim}-d {seed.dtype} on {seed.device}"
            )
        return seed
    if isinstance(seed, float) or not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed: expected an int of 64 bits, got {seed}")
    return torch.tensor(seed, dtype=torch.int64, device=x.device)


def _mix(h: Tensor) -> Tensor:
    """A permutation of 32 bits that looks random, in int32, whose products wrap and whose shifts keep the sign."""
    h = h ^ ((h >> 16) & 0xFFFF)
    h = h * 0x7FEB352D
    h = h ^ ((h >> 15) & 0x1FFFF)
    h = h * (0x846CA68B - (1 << 32))
    return h ^ ((h >> 16) & 0xFFFF)


def _drop(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """(M, K): the elements whose hash is not below `dropout`, divided by 1 - dropout."""
    low, high = _mix(seed.int()), _mix((seed >> 32).int() ^ 0x2545F491)
    rows = _mix(torch.arange(x.shape[0], dtype=torch.int32, device=x.device) ^ low)
    columns = _mix(torch.arange(x.shape[1], dtype=torch.int32, device=x.device) ^ high)
    kept = ((_mix(rows[:, None] ^ columns) >> 8) & 0xFFFFFF) >= _threshold(dropout)
    return torch.where(kept, x * (1 / (1 - dropout)), 0)


def _threshold(dropout: float) -> int:
    return round(dropout * (1 << 24))


# ---- kernels


@triton.jit
def _mix32(h):
    # _mix, on uint32
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _kept(seed_ptr, rows, columns, threshold):
    # [rows, columns]: True where an element is not dropped
    seed = tl.load(seed_ptr)
    low = _mix32(seed.to(tl.uint32))
    high = _mix32((seed >> 32).to(tl.uint32) ^ 0x2545F491)
    row, column = _mix32(rows.to(tl.uint32) ^ low), _mix32(columns.to(tl.uint32) ^ high)
    return (_mix32(row[:, None] ^ column[None, :]) >> 8).to(tl.int32) >= threshold


@triton.jit
def _span(adapter_ptr, rows, M, adapters, ADAPTERS: tl.constexpr):
    # Each row's adapter, -1 for none and -2 for one that the stack has not; and the first and one past the last of them
    # all: rows of one sequence lie together.
    mine, first, last = tl.zeros_like(rows).to(tl.int32), 0, 1
    if ADAPTERS:
        ids = tl.load(adapter_ptr + rows, rows < M, other=-1)
        known = (ids >= 0) & (ids < adapters)
        mine = tl.where(known, ids, tl.where(ids == -1, -1, -2)).to(tl.int32)
        first, last = tl.min(tl.where(known, mine, 2147483647), 0), tl.max(mine, 0) + 1
    return mine, first, last


@triton.jit
def _shrink_fwd(
    x_ptr, a_ptr, adapter_ptr, seed_ptr, s_ptr, M, K, R, adapters, threshold, keep_scale,
    ADAPTERS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # S = drop(x) A^T, each row with its adapter's A. Program (i, j): rows of block i, the share j of the rank
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    low = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mine, first, last = _span(adapter_ptr, rows, M, adapters, ADAPTERS)  # pyright: ignore[reportGeneralTypeIssues]
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for e in range(first, last):
        part = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for k in range(0, K, BLOCK_K):
            cols = k + tl.arange(0, BLOCK_K)
            live = (rows < M)[:, None] & (cols < K)[None, :]
            x = tl.load(x_ptr + rows[:, None] * K + cols[None, :], live, other=0.0)
            if DROPOUT:
                x = tl.where(_kept(seed_ptr, rows, cols, threshold), x * keep_scale, 0.0).to(x.dtype)
            places = (tl.cast(e, tl.int64) * R + low)[None, :] * K + cols[:, None]  # [BLOCK_K, BLOCK_R]
            a = tl.load(a_ptr + places, (low < R)[None, :] & (cols < K)[:, None], other=0.0)
            part = tl.dot(x, a, part, input_precision=PRECISION)
        acc = tl.where((mine == e)[:, None], part, acc)
    places = rows[:, None] * R + low[None, :]
    tl.store(s_ptr + places, acc.to(s_ptr.dtype.element_ty), (rows < M)[:, None] & (low < R)[None, :])


@triton.jit
def _low_rank(
    s_ptr, b_ptr, adapter_ptr, rows, cols, M, N, R, adapters, stride_e, stride_n, stride_r,
    ADAPTERS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # S B^T on one tile, each row with its adapter's B: NaN where the stack has no such adapter
    mine, first, last = _span(adapter_ptr, rows, M, adapters, ADAPTERS)  # pyright: ignore[reportGeneralTypeIssues]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for e in range(first, last):
        part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for r in range(0, R, BLOCK_R):
            low = r + tl.arange(0, BLOCK_R)
            live = (rows < M)[:, None] & (low < R)[None, :]
            s = tl.load(s_ptr + rows[:, None] * R + low[None, :], live, other=0.0)
            places = tl.cast(e, tl.int64) * stride_e + low[:, None] * stride_r + cols[None, :] * stride_n
            b = tl.load(b_ptr + places, (low < R)[:, None] & (cols < N)[None, :], other=0.0)
            part = tl.dot(s, b, part, input_precision=PRECISION)
        acc = tl.where((mine == e)[:, None], part, acc)
    if ADAPTERS:
        acc = tl.where((mine == -2)[:, None], float("nan"), acc)
    return acc


@triton.jit
def _expand_fwd(
    out_ptr, s_ptr, b_ptr, adapter_ptr, seed_ptr, gain_ptr, bias_ptr, M, N, R, adapters,
    stride_e, stride_n, stride_r, scaling, threshold, keep_scale,
    ADAPTERS: tl.constexpr, DROPOUT: tl.constexpr, GAIN: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # out = gain (out + drop(scaling S B^T)) + bias, in place: what follows a product of cuBLAS
    blocks = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = _low_rank(
        s_ptr, b_ptr, adapter_ptr, rows, cols, M, N, R, adapters, stride_e, stride_n, stride_r,
        ADAPTERS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    if DROPOUT:
        acc = tl.where(_kept(seed_ptr, rows, cols, threshold), acc * keep_scale, 0.0)
    live = (rows < M)[:, None] & (cols < N)[None, :]
    places = out_ptr + rows[:, None] * N + cols[None, :]
    out = tl.load(places, live, other=0.0).to(tl.float32) + scaling * acc
    if GAIN:
        out *= tl.load(gain_ptr + cols, cols < N, other=0.0)[None, :]
    if BIAS:
        out += tl.load(bias_ptr + cols, cols < N, other=0.0).to(tl.float32)[None, :]
    tl.store(places, out.to(out_ptr.dtype.element_ty), live)


@triton.jit
def _lora_fwd(
    x_ptr, w_ptr, s_ptr, b_ptr, adapter_ptr, gain_ptr, bias_ptr, out_ptr, M, N, K, R, adapters,
    stride_e, stride_n, stride_r, scaling,
    ADAPTERS: tl.constexpr, GAIN: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # the base's product, its accumulator started from the adapter's; GROUP rows of tiles share a column of W in L2
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = tl.program_id(0) // (GROUP * blocks_n)
    height = tl.minimum(blocks_m - band * GROUP, GROUP)
    inside = tl.program_id(0) % (GROUP * blocks_n)
    rows = (band * GROUP + inside % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (inside // height).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = scaling * _low_rank(
        s_ptr, b_ptr, adapter_ptr, rows, cols, M, N, R, adapters, stride_e, stride_n, stride_r,
        ADAPTERS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    for k in range(0, K, BLOCK_K):
        deep = k + tl.arange(0, BLOCK_K)
        x_live, w_live = (rows < M)[:, None] & (deep < K)[None, :], (deep < K)[:, None] & (cols < N)[None, :]
        x = tl.load(x_ptr + rows[:, None] * K + deep[None, :], x_live, other=0.0)
        w = tl.load(w_ptr + cols[None, :] * K + deep[:, None], w_live, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if GAIN:
        acc *= tl.load(gain_ptr + cols, cols < N, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + cols, cols < N, other=0.0).to(tl.float32)[None, :]
    live = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(out_ptr + rows[:, None] * N + cols[None, :], acc.to(out_ptr.dtype.element_ty), live)


@triton.jit
def _dora_norm_fwd(
    w_ptr, a_ptr, b_ptr, norm_ptr, N, K, R, scaling, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # |W + scaling B A| of each row, without the sum in memory
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    squares = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k in range(0, K, BLOCK_K):
        deep = k + tl.arange(0, BLOCK_K)
        product = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for r in range(0, R, BLOCK_R):
            low = r + tl.arange(0, BLOCK_R)
            b_live = (cols < N)[:, None] & (low < R)[None, :]
            b = tl.load(b_ptr + cols[:, None] * R + low[None, :], b_live, other=0.0)
            a_live = (low < R)[:, None] & (deep < K)[None, :]
            a = tl.load(a_ptr + low[:, None] * K + deep[None, :], a_live, other=0.0)
            product = tl.dot(b, a, product, input_precision=PRECISION)
        live = (cols < N)[:, None] & (deep < K)[None, :]
        w = tl.load(w_ptr + cols[:, None] * K + deep[None, :], live, other=0.0).to(tl.float32)
        w += scaling * product
        squares += w * w
    tl.store(norm_ptr + cols, tl.sqrt(tl.sum(squares, 1)), cols < N)


@triton.jit
def _lora_bwd(
    dout_ptr, s_ptr, b_ptr, ds_ptr, db_ptr, M, N, R, scaling, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # One pass over dout for each BLOCK_R of the rank: dS of BLOCK_M rows, and these rows' share of dB, which is added
    # up afterwards in a fixed order
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    low = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    s_live = (rows < M)[:, None] & (low < R)[None, :]
    s = tl.load(s_ptr + rows[:, None] * R + low[None, :], s_live, other=0.0)
    ds = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for n in range(0, N, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        live = (rows < M)[:, None] & (cols < N)[None, :]
        dout = tl.load(dout_ptr + rows[:, None] * N + cols[None, :], live, other=0.0)
        b_live = (cols < N)[:, None] & (low < R)[None, :]
        places = cols[:, None] * R + low[None, :]
        b = tl.load(b_ptr + places, b_live, other=0.0)
        ds = tl.dot(dout, b, ds, input_precision=PRECISION)
        db = scaling * tl.dot(tl.trans(dout), s, input_precision=PRECISION)  # [BLOCK_N, BLOCK_R]
        tl.store(db_ptr + tl.program_id(0).to(tl.int64) * N * R + places, db, b_live)
    tl.store(ds_ptr + rows[:, None] * R + low[None, :], (scaling * ds).to(ds_ptr.dtype.element_ty), s_live)


@triton.jit
def _lora_a_bwd(
    ds_ptr, x_ptr, adapter_ptr, seed_ptr, partial_ptr, M, K, R, adapters, tiles, threshold, keep_scale,
    ADAPTERS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # Program (i, j): the share j of the rows, summed; i: a block of columns of dA, a share of the rank, an adapter. Of
    # these there may be more than the 65,535 that a grid's other dimensions take.
    blocks_k, blocks_r = tl.cdiv(K, BLOCK_K), tl.cdiv(R, BLOCK_R)
    block, e = tl.program_id(0) // blocks_k, tl.program_id(0) // (blocks_k * blocks_r)
    cols = (tl.program_id(0) % blocks_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    low = block % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    first = tl.program_id(1) * tiles
    for tile in range(first, tl.minimum(first + tiles, tl.cdiv(M, BLOCK_M))):
        rows = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        own = rows < M
        if ADAPTERS:
            own = own & (tl.load(adapter_ptr + rows, own, other=-1) == e)
        ds = tl.load(ds_ptr + rows[None, :] * R + low[:, None], own[None, :] & (low < R)[:, None], other=0.0)
        x = tl.load(x_ptr + rows[:, None] * K + cols[None, :], own[:, None] & (cols < K)[None, :], other=0.0)
        if DROPOUT:
            x = tl.where(_kept(seed_ptr, rows, cols, threshold), x * keep_scale, 0.0).to(x.dtype)
        acc = tl.dot(ds, x, acc, input_precision=PRECISION)
    share = (tl.program_id(1).to(tl.int64) * adapters + e) * R
    places = (share + low)[:, None] * K + cols[None, :]
    tl.store(partial_ptr + places, acc, (low < R)[:, None] & (cols < K)[None, :])


# ---- autograd

# "cublas": F.linear, then addmm in place, the very calls of the baseline. "epilogue": F.linear, then _expand_fwd.
# "fused": _lora_fwd. _lora_paths.py says which was the fastest where all were measured; elsewhere "cublas" is taken,
# which is never slower than the baseline.
PATHS = ("cublas", "epilogue", "fused")

PARTIAL_ROWS = 128  # of dout, which _lora_bwd sums up in one tile
PARTIAL_BUDGET = 256 << 20  # bytes of its partial sums; beyond, dS and dB are two products, which need none


def _path(x: Tensor, N: int, R: int) -> str:
    """x: (M, K)."""
    device = device_name(x)
    if not device:
        return "cublas"
    M, K = x.shape
    rows = 1 << max(M, 1).bit_length() - 1  # rounded down to a power of two, as those that are measured
    dtype = str(x.dtype).removeprefix("torch.")
    return _lora_paths.PATHS.get((device, dtype, rows, N, K, R), "cublas")


def _drop_arguments(seed: Tensor | None, dropout: float) -> tuple[int, float]:
    return (_threshold(dropout), 1 / (1 - dropout)) if seed is not None else (0, 1.0)


def _ranks(R: int, most: int) -> int:
    """BLOCK_R. At most what registers hold: 64, in fp32, which is multiplied without matrix units, 16."""
    return min(max(16, next_power_of_2(R)), most)


def _most_ranks(x: Tensor) -> int:
    return 16 if x.dtype == torch.float32 else 64


def _shrink(x: Tensor, a: Tensor, adapter: Tensor | None, seed: Tensor | None, dropout: float) -> Tensor:
    """drop(x) A^T (M, R), one pass over x."""
    (M, K), R = x.shape, a.shape[-2]
    S = x.new_empty(M, R)
    if S.numel():
        block_m, block_r = 32 if 64 * multiprocessors(x) > M else 64, _ranks(R, 64)
        _shrink_fwd[(cdiv(M, block_m), cdiv(R, block_r))](
            x, a, adapter, seed, S, M, K, R, a.shape[0], *_drop_arguments(seed, dropout),
            adapter is not None, seed is not None, precision(), block_m, 64, block_r, num_warps=4, num_stages=3,
        )  # fmt: skip
    return S


def _expand_(
    out: Tensor,
    S: Tensor,
    b: Tensor,
    scaling: float,
    adapter: Tensor | None = None,
    seed: Tensor | None = None,
    dropout: float = 0.0,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """out = gain (out + drop(scaling S b^T)) + bias, in place. b: (N, R) or (adapters, N, R), any strides."""
    M, N = out.shape
    R = S.shape[1]
    if out.numel():
        block_n = 64 if out.dtype == torch.float32 else 128
        _expand_fwd[(cdiv(M, 64) * cdiv(N, block_n),)](
            out, S, b, adapter, seed, gain, bias, M, N, R, b.shape[0], b.stride(0), b.stride(-2), b.stride(-1),
            scaling, *_drop_arguments(seed, dropout),
            adapter is not None, seed is not None, gain is not None, bias is not None, precision(), 64, block_n,
            _ranks(R, _most_ranks(out)), num_warps=4, num_stages=1,
        )  # fmt: skip


def _fused(
    x: Tensor,
    W: Tensor,
    S: Tensor,
    b: Tensor,
    scaling: float,
    adapter: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    (M, K), (N, R) = x.shape, b.shape[-2:]
    out = x.new_empty(M, N)
    if out.numel():
        tile, block_r = _fused_tile(x), _ranks(R, 16 if x.dtype == torch.float32 else 32)
        _lora_fwd[(cdiv(M, tile["BLOCK_M"]) * cdiv(N, tile["BLOCK_N"]),)](
            x, W, S, b, adapter, gain, bias, out, M, N, K, R, b.shape[0], b.stride(0), b.stride(-2), b.stride(-1),
            scaling, adapter is not None, gain is not None, bias is not None, precision(),
            BLOCK_R=block_r, GROUP=8, **tile,
        )  # fmt: skip
    return out


def _fused_tile(x: Tensor) -> dict[str, int]:
    if x.dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if capability(x)[0] >= 9 and capability(x) != (9, 4):
        return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}


def _a_grad(
    dS: Tensor, x: Tensor, a: Tensor, adapter: Tensor | None, seed: Tensor | None, dropout: float
) -> Tensor:
    """dS^T drop(x), one pass over x for each adapter, in a's shape."""
    (M, K), R = x.shape, dS.shape[1]
    adapters, block_k, block_r = a.shape[0] if adapter is not None else 1, 64, _ranks(R, _most_ranks(x))
    splits = max(1, min(cdiv(M, 512), cdiv(2 * multiprocessors(x), cdiv(K, block_k))))
    tiles = cdiv(cdiv(M, 32), splits)
    partial = x.new_zeros(splits, adapters, R, K, dtype=torch.float32)
    if M * K:
        _lora_a_bwd[(cdiv(K, block_k) * cdiv(R, block_r) * adapters, splits)](
            dS, x, adapter, seed, partial, M, K, R, adapters, tiles, *_drop_arguments(seed, dropout),
            adapter is not None, seed is not None, precision(), 32, block_k, block_r, num_warps=4, num_stages=2,
        )  # fmt: skip
    return partial.sum(0).to(x.dtype).view(a.shape)


def _partial_fits(M: int, N: int, R: int) -> bool:
    """Are _dout_once's partial sums of dB small beside what it spares?"""
    return 4 * cdiv(M, PARTIAL_ROWS) * N * R <= PARTIAL_BUDGET


def _dout_once(g: Tensor, S: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """dS (M, R) and dB (N, R), from one pass over g."""
    (M, N), R = g.shape, S.shape[1]
    dS, block_r = torch.empty_like(S), _ranks(R, _most_ranks(g))
    partial = g.new_empty(cdiv(M, PARTIAL_ROWS), N, R, dtype=torch.float32)
    if M:
        _lora_bwd[(cdiv(M, PARTIAL_ROWS), cdiv(R, block_r))](
            g,
            S,
            b,
            dS,
            partial,
            M,
            N,
            R,
            scaling,
            precision(),
            PARTIAL_ROWS,
            32,
            block_r,
            num_warps=8,
            num_stages=2,
        )
    return dS, partial.sum(0).to(g.dtype)


def _stacked(S: Tensor, adapter: Tensor | None, adapters: int) -> Tensor:
    """(M, R) -> (M, adapters R), zero but in the place of each row's adapter."""
    if adapter is None:
        return S
    mine = adapter[:, None] == torch.arange(adapters, device=S.device)  # (M, adapters)
    return (S[:, None] * mine[:, :, None]).flatten(1)


def _picked(S: Tensor, adapter: Tensor | None, adapters: int) -> Tensor:
    """(M, adapters R) -> (M, R), the place of each row's adapter; zero where it has none or one that is not there."""
    if adapter is None:
        return S
    ids, R = adapter.long(), S.shape[1] // adapters
    known = ids.clamp(0, adapters - 1)
    own = S.view(-1, adapters, R).gather(1, known[:, None, None].expand(-1, 1, R))[:, 0]
    return own.masked_fill((ids != known)[:, None], 0)


def _forward(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    code: Tensor | None,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    magnitude: Tensor | None,
    adapter: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    path: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """x: (M, K). Returns out (M, N), S (M, R), and the norm (N,) of DoRA, empty without it."""
    path = path or _path(x, lora_b.shape[-2], lora_a.shape[-2])
    S = _down(x, lora_a, adapter, seed, dropout, path)
    held = weight, absmax, code, nested_absmax, nested_code, offset
    out, norm = _up(x, held, blocksize, S, lora_a, lora_b, bias, magnitude, adapter, scaling, path)
    return out, S, norm


def _down(
    x: Tensor, lora_a: Tensor, adapter: Tensor | None, seed: Tensor | None, dropout: float, path: str
) -> Tensor:
    """S (M, R)."""
    if use_triton(x) and not (seed is None and adapter is None and path == "cublas"):
        return _shrink(x, lora_a, adapter, seed, dropout)
    if adapter is not None:
        check_ids("adapter", adapter, -1, lora_a.shape[0] - 1)
    dropped = x if seed is None else _drop(x, dropout, seed)
    return _picked(dropped @ _end_to_end(lora_a).T, adapter, lora_a.shape[0])


def _up(
    x: Tensor,
    held: Sequence[Any],
    blocksize: int,
    S: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    magnitude: Tensor | None,
    adapter: Tensor | None,
    scaling: float,
    path: str,
) -> tuple[Tensor, Tensor]:
    """out (M, N), and the norm (N,) of DoRA, empty without it."""
    adapters, B, N = lora_b.shape[0], _side_by_side(lora_b), lora_b.shape[-2]
    in_4_bits = held[1] is not None and x.shape[0] <= FEW_ROWS and magnitude is None and path != "fused"
    W = None if in_4_bits and use_triton(x) else _dense(x, *held, blocksize, lora_b)
    if magnitude is None:
        norm = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
    else:
        assert W is not None
        norm = _norm(W, lora_a, lora_b, scaling)
    gain = None if magnitude is None else magnitude / norm
    if W is None:
        out = product(x, *held, bias, N, blocksize)
    elif use_triton(x) and path == "fused":
        return _fused(x, W, S, lora_b, scaling, adapter, gain, bias), norm
    else:
        out = F.linear(x, W, bias.to(x.dtype) if bias is not None and gain is None else None)
    if use_triton(x) and not (gain is None and adapter is None and path == "cublas"):
        _expand_(out, S, lora_b, scaling, adapter, gain=gain, bias=None if gain is None else bias)
        return out, norm
    out.addmm_(_stacked(S, adapter, adapters), B.T, alpha=scaling)
    if gain is not None:
        out.mul_(gain)
        if bias is not None:
            out.add_(bias)
    return out, norm


def _forward_fake(
    x, weight, absmax, code, nested_absmax, nested_code, offset, blocksize, lora_a, lora_b, bias, magnitude,
    adapter, seed, scaling, dropout, path,
):  # fmt: skip
    N, R = lora_b.shape[-2:]
    norm = x.new_empty(0 if magnitude is None else N, dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape[0], N), x.new_empty(x.shape[0], R), norm


def _dense(x, weight, absmax, code, nested_absmax, nested_code, offset, blocksize, lora_b) -> Tensor:
    if absmax is None:
        return weight
    shape = [lora_b.shape[-2], x.shape[1]]
    return dequantize(weight, absmax, code, nested_absmax, nested_code, offset, shape, blocksize, x.dtype)


def _end_to_end(lora_a: Tensor) -> Tensor:
    """Stacked adapters' A as one, (adapters R, K)."""
    return lora_a if lora_a.ndim == 2 else lora_a.flatten(0, 1)


def _side_by_side(lora_b: Tensor) -> Tensor:
    """Stacked adapters' B as one, (N, adapters R)."""
    return lora_b if lora_b.ndim == 2 else lora_b.transpose(0, 1).flatten(1)


def _norm(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """(N,) |W + scaling B A|, at least in fp32."""
    wide = torch.promote_types(W.dtype, torch.float32)
    if not use_triton(W):
        with torch.autocast(W.device.type, enabled=False):
            return torch.addmm(W.to(wide), B.to(wide), A.to(wide), alpha=scaling).norm(dim=1)
    (N, K), R = W.shape, A.shape[0]
    norm = W.new_empty(N, dtype=torch.float32)
    if N:
        _dora_norm_fwd[(cdiv(N, 32),)](
            W,
            A,
            B,
            norm,
            N,
            K,
            R,
            scaling,
            precision(),
            32,
            64,
            _ranks(R, _most_ranks(W)),
            num_warps=4,
            num_stages=2,
        )
    return norm


def _backward(
    dout: Tensor,
    x: Tensor,
    S: Tensor,
    norm: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    code: Tensor | None,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor | None,
    adapter: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    path: str,
    with_dx: bool,
    with_dlora: bool,
    with_dbias: bool,
    with_dmagnitude: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dlora_a, dlora_b, dbias, dmagnitude, each empty where it is not asked for."""
    wide = norm.dtype
    dx, da, dbias = (x.new_empty(0, dtype=dtype) for dtype in (x.dtype, x.dtype, wide))
    W = None
    if with_dx or with_dmagnitude:
        W = _dense(x, weight, absmax, code, nested_absmax, nested_code, offset, blocksize, lora_b)
    if with_dbias:
        dbias = dout.sum(0, dtype=wide)
    path = path or _path(x, lora_b.shape[-2], lora_b.shape[-1])
    g, dS, db, dm = _up_backward(
        dout, x, S, norm, W, lora_b, magnitude, adapter, scaling, path, with_dlora, with_dmagnitude
    )
    if with_dlora:
        da = _down_backward(dS, x, lora_a, adapter, seed, dropout)
    if with_dx:
        assert W is not None
        dx = g @ W
        _add_low_(dx, dS, lora_a, adapter, seed, dropout)
    return dx, da, db, dbias, dm


def _up_backward(
    dout: Tensor,
    x: Tensor,
    S: Tensor,
    norm: Tensor,
    W: Tensor | None,
    lora_b: Tensor,
    magnitude: Tensor | None,
    adapter: Tensor | None,
    scaling: float,
    path: str,
    with_dlora: bool,
    with_dmagnitude: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g (M, N), dS (M, R), and dlora_b and dmagnitude, each empty where it is not asked for."""
    adapters, B = lora_b.shape[0], _side_by_side(lora_b)
    db, dm, g = x.new_empty(0), norm.new_empty(0), dout
    if magnitude is not None:
        if with_dmagnitude:
            assert W is not None
            before = F.linear(x, W).addmm_(S, B.T, alpha=scaling)
            dm = (dout.to(norm.dtype) * before).sum(0) / norm
        g = (dout * (magnitude / norm)).to(dout.dtype)
    once = path != "cublas" and adapter is None and _partial_fits(*dout.shape, S.shape[1])
    if use_triton(x) and with_dlora and once:
        dS, db = _dout_once(g, S, lora_b, scaling)
        return g, dS, db, dm
    dS = _picked(g @ B, adapter, adapters).mul_(scaling)  # (M, R)
    if with_dlora:
        db = (g.T @ _stacked(S, adapter, adapters)).mul_(scaling)  # (N, adapters R)
        if lora_b.ndim == 3:
            db = db.view(db.shape[0], adapters, -1).transpose(0, 1).contiguous()
    return g, dS, db, dm


def _down_backward(
    dS: Tensor, x: Tensor, lora_a: Tensor, adapter: Tensor | None, seed: Tensor | None, dropout: float
) -> Tensor:
    """dlora_a."""
    if use_triton(x) and not (seed is None and adapter is None):
        return _a_grad(dS, x, lora_a, adapter, seed, dropout)
    dropped = x if seed is None else _drop(x, dropout, seed)
    return (_stacked(dS, adapter, lora_a.shape[0]).T @ dropped).view(lora_a.shape)


def _add_low_(
    dx: Tensor, dS: Tensor, lora_a: Tensor, adapter: Tensor | None, seed: Tensor | None, dropout: float
) -> None:
    """dx += drop(dS A), in place."""
    if use_triton(dx) and not (seed is None and adapter is None):
        _expand_(dx, dS, lora_a.transpose(-2, -1), 1.0, adapter, seed, dropout)
        return
    stacked, A = _stacked(dS, adapter, lora_a.shape[0]), _end_to_end(lora_a)
    if seed is None:
        dx.addmm_(stacked, A)
    else:
        dx.add_(_drop(stacked @ A, dropout, seed))


def _backward_fake(
    dout, x, S, norm, weight, absmax, code, nested_absmax, nested_code, offset, blocksize, lora_a, lora_b, magnitude,
    adapter, seed, scaling, dropout, path, with_dx, with_dlora, with_dbias, with_dmagnitude,
):  # fmt: skip
    N = lora_b.shape[-2]
    return (
        x.new_empty(x.shape if with_dx else 0),
        lora_a.new_empty(lora_a.shape if with_dlora else 0),
        lora_b.new_empty(lora_b.shape if with_dlora else 0),
        norm.new_empty(N if with_dbias else 0),
        norm.new_empty(N if with_dmagnitude else 0),
    )


def _save(ctx, inputs, output):
    *four_bit, lora_a, lora_b, bias, magnitude, adapter, seed = inputs[:-3]
    _out, S, norm = output
    x, *tensors, blocksize = four_bit
    ctx.save_for_backward(x, S, norm, *tensors, lora_a, lora_b, magnitude, adapter, seed)
    ctx.numbers, ctx.bias_dtype = (blocksize, *inputs[-3:]), None if bias is None else bias.dtype
    ctx.mark_non_differentiable(S, norm)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout: Tensor | None, _dS: Tensor | None, _dnorm: Tensor | None):
    if dout is None:
        return (None,) * 17
    *tensors, lora_a, lora_b, magnitude, adapter, seed = ctx.saved_tensors
    blocksize, *numbers = ctx.numbers
    needs = ctx.needs_input_grad
    with_dx, with_da, with_db, with_dbias, with_dm = needs[0], needs[8], needs[9], needs[10], needs[11]
    dx, da, db, dbias, dm = _lora_backward(
        dout.contiguous(), *tensors, blocksize, lora_a, lora_b, magnitude, adapter, seed, *numbers,
        with_dx, with_da or with_db, with_dbias, with_dm,
    )  # fmt: skip
    return (
        dx if with_dx else None,
        *[None] * 7,
        da if with_da else None,
        db if with_db else None,
        dbias.to(ctx.bias_dtype) if with_dbias else None,
        dm.to(magnitude.dtype) if with_dm else None,
        *[None] * 5,
    )


_lora_backward = register("lora_linear_backward", _backward, _backward_fake)
_lora = register("lora_linear", _forward, _forward_fake, _save, _differentiate)


def _check(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    magnitude: Tensor | None,
    adapter: Tensor | None,
    dropout: float,
    scaling: float,
) -> None:
    if len(weight.shape) != 2:
        raise ValueError(f"weight: expected shape (out, in), got {tuple(weight.shape)}")
    N, K = weight.shape
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x: expected shape (..., in={K}), got {tuple(x.shape)}")
    if isinstance(weight, Tensor) and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight: it gets no gradient here; pass weight.detach()")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a share from 0 to below 1, got {dropout}")
    check_number("scaling", scaling)
    stack = {} if adapter is None or not lora_a.ndim else {"adapters": lora_a.shape[0]}
    R = lora_a.shape[-2] if lora_a.ndim > 1 else 1
    check_shape("lora_a", lora_a, **stack, rank=R, **{"in": K})
    check_shape("lora_b", lora_b, **stack, out=N, rank=R)
    if not R or 0 in stack.values():
        raise ValueError(
            f"lora_a: expected at least one adapter of rank 1 or more, got {tuple(lora_a.shape)}"
        )
    if use_triton(x) and R > 256:
        raise NotImplementedError(
            f"lora_a: expected rank 1 to 256, got {R}; merge the adapter into the weight"
        )

    dense = weight if isinstance(weight, Tensor) else weight.packed
    check_device(
        x, weight=dense, lora_a=lora_a, lora_b=lora_b, bias=bias, magnitude=magnitude, adapter=adapter
    )
    check_dtype("x", x)
    for name, t in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        if t.dtype != x.dtype:
            check_dtype(name, t, *FLOATS)
    for name, vector in (("bias", bias), ("magnitude", magnitude)):
        if vector is not None:
            check_shape(name, vector, out=N)
            check_dtype(name, vector, *FLOATS)
    if adapter is not None:
        check_shape("adapter", adapter, **{f"x.shape[{i}]": size for i, size in enumerate(x.shape[:-1])})
        check_dtype("adapter", adapter, torch.int64, torch.int32, torch.int16, torch.int8)
        if magnitude is not None:
            raise NotImplementedError("magnitude: not with several adapters; call lora_linear for each")


def _lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    adapter: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    path: str = "",
) -> Tensor:
    """lora_linear by one of PATHS, which the benchmark and the tests choose themselves; "": as measured."""
    _check(x, weight, lora_a, lora_b, bias, magnitude, adapter, dropout, scaling)
    N, K = weight.shape
    x = x.to(autocast_dtype(x))
    dtype, rows = x.dtype, x if x.ndim == 2 else x.reshape(-1, K)
    if isinstance(weight, Tensor):
        held = (_operand(weight, dtype), *[None] * 5, 0)
    else:
        held = (*weight.tensors(), weight.blocksize)
    out, _, _ = _lora(
        rows.contiguous(), *held, _operand(lora_a, dtype), _operand(lora_b, dtype),
        None if bias is None else bias.contiguous(), None if magnitude is None else magnitude.contiguous(),
        None if adapter is None else adapter.reshape(-1).contiguous(),
        _seed(seed, x) if dropout else None, float(scaling), float(dropout), path,
    )  # fmt: skip
    return out if x.ndim == 2 else out.view(*x.shape[:-1], N)


def _operand(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype).contiguous(), but without the microseconds where both change nothing."""
    return (t if t.dtype == dtype else t.to(dtype)).contiguous()


# Several layers at once. One layer has an op of its own above: as a list of one, a row by 576 x 576 takes 1.6 times as
# long on a CPU, for lists are laid out flat and back.


def _all_forward(
    x: Tensor,
    weights: list[Tensor],
    held: list[Tensor],
    blocksize: int,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    biases: list[Tensor],
    magnitudes: list[Tensor],
    adapter: Tensor | None,
    seed: Tensor | None,
    scalings: list[float],
    dropout: float,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """x: (M, K). held: of 4-bit weights, the tensors beside the packed ones, of each in turn; empty for dense ones.

    Returns each out (M, N), S (M, sum of R), and each norm (N,) of DoRA, none without it.
    """
    ranks = [b.shape[-1] for b in lora_b]
    paths = [_path(x, b.shape[-2], b.shape[-1]) for b in lora_b]
    S = _down(x, torch.cat(lora_a, -2), adapter, seed, dropout, paths[0])
    outs, norms = [], []
    for i, (path, mine) in enumerate(zip(paths, S.split(ranks, 1), strict=True)):
        out, norm = _up(
            x, _held_of(i, weights, held), blocksize, mine.contiguous(), lora_a[i], lora_b[i],
            _at(biases, i), _at(magnitudes, i), adapter, scalings[i], path,
        )  # fmt: skip
        outs.append(out)
        norms += [norm] if magnitudes else []
    return outs, S, norms


def _all_forward_fake(
    x, weights, held, blocksize, lora_a, lora_b, biases, magnitudes, adapter, seed, scalings, dropout
):  # fmt: skip
    M, wide = x.shape[0], torch.promote_types(x.dtype, torch.float32)
    outs = [x.new_empty(M, b.shape[-2]) for b in lora_b]
    norms = [x.new_empty(b.shape[-2], dtype=wide) for b in lora_b] if magnitudes else []
    return outs, x.new_empty(M, sum(b.shape[-1] for b in lora_b)), norms


def _at(tensors: list[Tensor], i: int) -> Tensor | None:
    return tensors[i] if tensors else None


def _held_of(i: int, weights: list[Tensor], held: list[Tensor]) -> tuple[Tensor | None, ...]:
    """One weight's tensors, as lora_linear's op takes them."""
    each = len(held) // len(weights)
    mine = held[i * each : (i + 1) * each]
    return weights[i], *mine, *[None] * (5 - each)


def _all_backward(
    douts: list[Tensor],
    x: Tensor,
    S: Tensor,
    norms: list[Tensor],
    weights: list[Tensor],
    held: list[Tensor],
    blocksize: int,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    magnitudes: list[Tensor],
    adapter: Tensor | None,
    seed: Tensor | None,
    scalings: list[float],
    dropout: float,
    with_dx: bool,
    with_dlora: bool,
    with_dbias: bool,
    with_dmagnitude: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """dx, and of each layer dlora_a, dlora_b, dbias, dmagnitude: empty where it is not asked for."""
    wide = torch.promote_types(x.dtype, torch.float32)
    ranks, dx, dS = [b.shape[-1] for b in lora_b], x.new_empty(0), []
    das, dbs, dbiases, dms = [], [], [], []
    for i, mine in enumerate(S.split(ranks, 1)):
        dout, W = douts[i], None
        if with_dx or with_dmagnitude:
            W = _dense(x, *_held_of(i, weights, held), blocksize, lora_b[i])
        path = _path(x, lora_b[i].shape[-2], ranks[i])
        g, low, db, dm = _up_backward(
            dout, x, mine.contiguous(), norms[i] if norms else dout.new_empty(0, dtype=wide), W, lora_b[i],
            _at(magnitudes, i), adapter, scalings[i], path, with_dlora, with_dmagnitude,
        )  # fmt: skip
        if with_dx:
            assert W is not None
            dx = g @ W if i == 0 else dx.addmm_(g, W)
        dS.append(low)
        dbs.append(db)
        dms.append(dm)
        dbiases.append(dout.sum(0, dtype=wide) if with_dbias else dout.new_empty(0, dtype=wide))
    A, low = torch.cat(lora_a, -2), torch.cat(dS, 1)
    if with_dlora:
        da = _down_backward(low, x, A, adapter, seed, dropout)
        das = [part.clone() for part in da.split(ranks, -2)]  # what an op returns may share no memory
    else:
        das = [x.new_empty(0) for _ in lora_a]
    if with_dx:
        _add_low_(dx, low, A, adapter, seed, dropout)
    return dx, das, dbs, dbiases, dms


def _all_backward_fake(
    douts, x, S, norms, weights, held, blocksize, lora_a, lora_b, magnitudes, adapter, seed, scalings, dropout,
    with_dx, with_dlora, with_dbias, with_dmagnitude,
):  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    vectors = [
        [x.new_empty(b.shape[-2] if wanted else 0, dtype=wide) for b in lora_b]
        for wanted in (with_dbias, with_dmagnitude)
    ]
    matrices = [[x.new_empty(t.shape if with_dlora else 0) for t in stack] for stack in (lora_a, lora_b)]
    return x.new_empty(x.shape if with_dx else 0), *matrices, *vectors


def _save_all(ctx, inputs, output):
    x, weights, held, blocksize, lora_a, lora_b, biases, magnitudes, adapter, seed, scalings, dropout = inputs
    _outs, S, norms = output
    lists = norms, weights, held, lora_a, lora_b, magnitudes
    ctx.save_for_backward(x, S, adapter, seed, *(t for tensors in lists for t in tensors))
    ctx.lengths, ctx.numbers = [len(tensors) for tensors in lists], (blocksize, scalings, dropout)
    ctx.bias_dtypes = [bias.dtype for bias in biases]
    ctx.wanted = [[t.requires_grad for t in ts] for ts in ([x], lora_a, lora_b, biases, magnitudes)]
    ctx.mark_non_differentiable(S, *norms)


def _differentiate_all(ctx, douts: list[Tensor], _dS: Tensor, _dnorms: list[Tensor]):
    x, S, adapter, seed, *rest = ctx.saved_tensors
    norms, weights, held, lora_a, lora_b, magnitudes = (
        [rest.pop(0) for _ in range(length)] for length in ctx.lengths
    )
    blocksize, scalings, dropout = ctx.numbers
    (with_dx,), want_a, want_b, want_bias, want_m = ctx.wanted
    dx, das, dbs, dbiases, dms = _lora_all_backward(
        [dout.contiguous() for dout in douts], x, S, norms, weights, held, blocksize, lora_a, lora_b, magnitudes,
        adapter, seed, scalings, dropout, with_dx, any(want_a) or any(want_b), any(want_bias), any(want_m),
    )  # fmt: skip
    return (
        dx if with_dx else None,
        [None] * len(weights),
        [None] * len(held),
        None,
        [da if wanted else None for da, wanted in zip(das, want_a, strict=True)],
        [db if wanted else None for db, wanted in zip(dbs, want_b, strict=True)],
        [db.to(t) if w else None for db, t, w in zip(dbiases, ctx.bias_dtypes, want_bias, strict=False)],
        [dm.to(m.dtype) if w else None for dm, m, w in zip(dms, magnitudes, want_m, strict=False)],
        *[None] * 4,
    )


_lora_all_backward = register("lora_linears_backward", _all_backward, _all_backward_fake)
_lora_all = register(
    "lora_linears", _all_forward, _all_forward_fake, _save_all, _differentiate_all, lists=True
)


# ---- public op


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    adapter: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """x W^T + scaling drop(x) A^T B^T + bias, W frozen. rsLoRA is a scaling: alpha / sqrt(R).

    x: (..., in)    weight: (out, in), a tensor or 4-bit    lora_a: (R, in)    lora_b: (out, R)    bias: (out,)
    magnitude: (out,), DoRA: before the bias, the result is scaled by magnitude / |W + scaling B A| for each output.
    adapter: (...) int, for stacked lora_a (adapters, R, in) and lora_b (adapters, out, R): each row's own, -1 for none.
        A number that is neither raises on a CPU; elsewhere the host does not wait to look, and such a row of the result
        is NaN, and of dx where the adapter sees x.
    dropout: share of x that the adapter does not see; which, follows from `seed`, an int or a 0-d int64 tensor (an int
        would freeze in a CUDA graph).

    Returns (..., out) in x's dtype, which the products are computed in. With lora_b = 0 the result on a CPU has the
    bits of F.linear(x, weight, bias).
    Raises ValueError for other shapes and dtypes, a scaling that is not finite, and tensors on several devices.
    """
    return _lora_linear(
        x, weight, lora_a, lora_b, scaling,
        bias=bias, magnitude=magnitude, adapter=adapter, dropout=dropout, seed=seed,
    )  # fmt: skip


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor | NF4Weight],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scalings: Sequence[float],
    *,
    biases: Sequence[Tensor] | None = None,
    magnitudes: Sequence[Tensor] | None = None,
    adapter: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> list[Tensor]:
    """[lora_linear(x, ...) for each layer], whose adapters read x once: q, k and v, or gate and up.

    One entry of each sequence for each layer, as in lora_linear; ranks may differ. weights: all of them tensors, or all
    4-bit and of one format. With dropout, all adapters see the same part of x.
    """
    count = len(weights)
    for name, given in (("lora_a", lora_a), ("lora_b", lora_b), ("scalings", scalings)):
        if len(given) != count:
            raise ValueError(f"{name}: expected one for each of {count} weights, got {len(given)}")
    for name, given in (("biases", biases), ("magnitudes", magnitudes)):
        if given is not None and len(given) != count:
            raise ValueError(f"{name}: expected none, or one for each of {count} weights, got {len(given)}")
    biases, magnitudes = biases or [], magnitudes or []
    formats: set[Any] = set()
    for i, weight in enumerate(weights):
        bias, magnitude = _at([*biases], i), _at([*magnitudes], i)
        _check(x, weight, lora_a[i], lora_b[i], bias, magnitude, adapter, dropout, scalings[i])
        if adapter is not None and lora_a[i].shape[0] != lora_a[0].shape[0]:
            sizes = [a.shape[0] for a in lora_a]
            raise ValueError(f"lora_a: expected as many stacked adapters in every layer, got {sizes}")
        formats.add(None if isinstance(weight, Tensor) else (weight.blocksize, weight.offset is None))
    if len(formats) != 1:
        raise ValueError(f"weights: expected some, all dense or all 4-bit of one format, got {count}")
    x = x.to(autocast_dtype(x))
    packed, held, blocksize = [], [], 0
    for weight in weights:
        if isinstance(weight, Tensor):
            packed.append(_operand(weight, x.dtype))
        else:
            packed.append(weight.packed)
            held += [part for part in weight.tensors()[1:] if part is not None]
            blocksize = weight.blocksize
    outs, _, _ = _lora_all(
        x.reshape(-1, x.shape[-1]).contiguous(), packed, held, blocksize,
        [_operand(a, x.dtype) for a in lora_a], [_operand(b, x.dtype) for b in lora_b],
        [bias.contiguous() for bias in biases], [magnitude.contiguous() for magnitude in magnitudes],
        None if adapter is None else adapter.reshape(-1).contiguous(),
        _seed(seed, x) if dropout else None, [float(s) for s in scalings], float(dropout),
    )  # fmt: skip
    return [out.view(*x.shape[:-1], out.shape[1]) for out in outs]
