"""The products of low-rank adapters, with optional dropout. Each row of x may use its own adapter from a stack.

    S = drop(x) A^T                     out += scaling S B^T
    dS = scaling g B                    dB = scaling g^T S                 dA = dS^T drop(x)        dx += drop(dS A)

drop(x) = x / (1 - p) where a hash of (seed, row, column) keeps the element, else 0. The backward computes the hash
again, so no mask is stored.

Memory, in elements, for x (M, K) and out (M, N): the forward reads x once, and reads and writes out. The backward reads
g and x once, and reads and writes dx. One pass over g gives both dS and dB if the partial sums of dB are small.

Source: LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3; the hash: lowbias32 of
        https://github.com/skeeto/hash-prospector
"""

# A launch passes numbers where the kernel is annotated tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
from torch import Tensor

from ._chip import cdiv, check_ids, multiprocessors, next_power_of_2, precision, use_triton
from ._triton import tl, triton
from .plain import lora as plain
from .records import Rows

# ---- kernels

# fmt: off


@triton.jit
def _mix32(h):
    # the same as plain.mix, but on uint32
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _not_dropped(seed_ptr, rows, columns, threshold):
    # [rows, columns]: True where an element is not dropped
    seed = tl.load(seed_ptr)
    low = _mix32(seed.to(tl.uint32))
    high = _mix32((seed >> 32).to(tl.uint32) ^ 0x2545F491)
    row, column = _mix32(rows.to(tl.uint32) ^ low), _mix32(columns.to(tl.uint32) ^ high)
    return (_mix32(row[:, None] ^ column[None, :]) >> 8).to(tl.int32) >= threshold


@triton.jit
def _adapters_of(adapter_ptr, rows, M, adapters, ADAPTERS: tl.constexpr):
    # Returns the adapter of each row, -1 for none and -2 for one that the stack lacks. Also returns the block's first
    # adapter, and its last plus one. The range is short, because rows of one sequence are adjacent.
    row_adapter, first, last = tl.zeros_like(rows).to(tl.int32), 0, 1
    if ADAPTERS:
        ids = tl.load(adapter_ptr + rows, rows < M, other=-1)
        known = (ids >= 0) & (ids < adapters)
        row_adapter = tl.where(known, ids, tl.where(ids == -1, -1, -2)).to(tl.int32)
        first, last = tl.min(tl.where(known, row_adapter, 2147483647), 0), tl.max(row_adapter, 0) + 1
    return row_adapter, first, last


@triton.jit
def _shrink_fwd(
    x_ptr, a_ptr, adapter_ptr, seed_ptr, s_ptr, M, K, R, adapters, threshold, keep_scale,
    ADAPTERS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):
    # S = drop(x) A^T, each row with its adapter's A. Program (i, j) takes block i of the rows and block j of the ranks.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_adapter, first, last = _adapters_of(adapter_ptr, rows, M, adapters, ADAPTERS)  # pyright: ignore[reportGeneralTypeIssues]

    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for e in range(first, last):
        part = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for k in range(0, K, BLOCK_K):
            cols = k + tl.arange(0, BLOCK_K)
            live = (rows < M)[:, None] & (cols < K)[None, :]
            x = tl.load(x_ptr + rows[:, None] * K + cols[None, :], live, other=0.0)
            if DROPOUT:
                x = tl.where(_not_dropped(seed_ptr, rows, cols, threshold), x * keep_scale, 0.0).to(x.dtype)

            places = (tl.cast(e, tl.int64) * R + ranks)[None, :] * K + cols[:, None]  # [BLOCK_K, BLOCK_R]
            a = tl.load(a_ptr + places, (ranks < R)[None, :] & (cols < K)[:, None], other=0.0)
            part = tl.dot(x, a, part, input_precision=PRECISION)
        acc = tl.where((row_adapter == e)[:, None], part, acc)

    places = rows[:, None] * R + ranks[None, :]
    tl.store(s_ptr + places, acc.to(s_ptr.dtype.element_ty), (rows < M)[:, None] & (ranks < R)[None, :])


@triton.jit
def _adapter_product(
    s_ptr, b_ptr, adapter_ptr, rows, cols, M, N, R, adapters, stride_e, stride_n, stride_r,
    ADAPTERS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    # S B^T of one tile, each row with its adapter's B. A row whose adapter the stack lacks becomes NaN.
    row_adapter, first, last = _adapters_of(adapter_ptr, rows, M, adapters, ADAPTERS)  # pyright: ignore[reportGeneralTypeIssues]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for e in range(first, last):
        part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for r in range(0, R, BLOCK_R):
            ranks = r + tl.arange(0, BLOCK_R)
            live = (rows < M)[:, None] & (ranks < R)[None, :]
            s = tl.load(s_ptr + rows[:, None] * R + ranks[None, :], live, other=0.0)

            places = tl.cast(e, tl.int64) * stride_e + ranks[:, None] * stride_r + cols[None, :] * stride_n
            b = tl.load(b_ptr + places, (ranks < R)[:, None] & (cols < N)[None, :], other=0.0)
            part = tl.dot(s, b, part, input_precision=PRECISION)
        acc = tl.where((row_adapter == e)[:, None], part, acc)

    if ADAPTERS:
        acc = tl.where((row_adapter == -2)[:, None], float("nan"), acc)
    return acc


@triton.jit
def _expand_fwd(
    out_ptr, s_ptr, b_ptr, adapter_ptr, seed_ptr, gain_ptr, bias_ptr, M, N, R, adapters,
    stride_e, stride_n, stride_r, scaling, threshold, keep_scale,
    ADAPTERS: tl.constexpr, DROPOUT: tl.constexpr, GAIN: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    # out = gain (out + drop(scaling S B^T)) + bias, in place, after a product by cuBLAS
    blocks = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)

    acc = _adapter_product(
        s_ptr, b_ptr, adapter_ptr, rows, cols, M, N, R, adapters, stride_e, stride_n, stride_r,
        ADAPTERS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
    )
    if DROPOUT:
        acc = tl.where(_not_dropped(seed_ptr, rows, cols, threshold), acc * keep_scale, 0.0)

    live = (rows < M)[:, None] & (cols < N)[None, :]
    places = out_ptr + rows[:, None] * N + cols[None, :]
    out = tl.load(places, live, other=0.0).to(tl.float32) + scaling * acc
    if GAIN:
        out *= tl.load(gain_ptr + cols, cols < N, other=0.0)[None, :]
    if BIAS:
        out += tl.load(bias_ptr + cols, cols < N, other=0.0).to(tl.float32)[None, :]
    tl.store(places, out.to(out_ptr.dtype.element_ty), live)


@triton.jit
def _lora_bwd(
    dout_ptr, s_ptr, b_ptr, ds_ptr, db_ptr, M, N, R, scaling, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    # One pass over dout for each block of ranks. A program computes dS of BLOCK_M rows, and the partial sum of dB over
    # these rows. The host adds up the partial sums in a fixed order.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    s_live = (rows < M)[:, None] & (ranks < R)[None, :]
    s = tl.load(s_ptr + rows[:, None] * R + ranks[None, :], s_live, other=0.0)

    ds = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for n in range(0, N, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        live = (rows < M)[:, None] & (cols < N)[None, :]
        dout = tl.load(dout_ptr + rows[:, None] * N + cols[None, :], live, other=0.0)
        b_live = (cols < N)[:, None] & (ranks < R)[None, :]
        places = cols[:, None] * R + ranks[None, :]
        b = tl.load(b_ptr + places, b_live, other=0.0)
        ds = tl.dot(dout, b, ds, input_precision=PRECISION)

        db = scaling * tl.dot(tl.trans(dout), s, input_precision=PRECISION)  # [BLOCK_N, BLOCK_R]
        tl.store(db_ptr + tl.program_id(0).to(tl.int64) * N * R + places, db, b_live)

    tl.store(ds_ptr + rows[:, None] * R + ranks[None, :], (scaling * ds).to(ds_ptr.dtype.element_ty), s_live)


@triton.jit
def _lora_a_bwd(
    ds_ptr, x_ptr, adapter_ptr, seed_ptr, partial_ptr, M, K, R, adapters, tiles, threshold, keep_scale,
    ADAPTERS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):
    # dA = dS^T drop(x). Program (i, j) sums the share j of the rows. i counts blocks of columns, blocks of ranks and
    # adapters. Their product may exceed 65,535, the limit of a grid's second and third dimension.
    blocks_k, blocks_r = tl.cdiv(K, BLOCK_K), tl.cdiv(R, BLOCK_R)
    block, e = tl.program_id(0) // blocks_k, tl.program_id(0) // (blocks_k * blocks_r)
    cols = (tl.program_id(0) % blocks_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    ranks = block % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)

    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    first = tl.program_id(1) * tiles
    for tile in range(first, tl.minimum(first + tiles, tl.cdiv(M, BLOCK_M))):
        rows = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        live = rows < M
        if ADAPTERS:
            live = live & (tl.load(adapter_ptr + rows, live, other=-1) == e)

        ds = tl.load(ds_ptr + rows[None, :] * R + ranks[:, None], live[None, :] & (ranks < R)[:, None], other=0.0)
        x = tl.load(x_ptr + rows[:, None] * K + cols[None, :], live[:, None] & (cols < K)[None, :], other=0.0)
        if DROPOUT:
            x = tl.where(_not_dropped(seed_ptr, rows, cols, threshold), x * keep_scale, 0.0).to(x.dtype)
        acc = tl.dot(ds, x, acc, input_precision=PRECISION)

    share = (tl.program_id(1).to(tl.int64) * adapters + e) * R
    places = (share + ranks)[:, None] * K + cols[None, :]
    tl.store(partial_ptr + places, acc, (ranks < R)[:, None] & (cols < K)[None, :])

# fmt: on


# ---- launch

PARTIAL_ROWS = 128  # rows of dout in one partial sum of _lora_bwd
PARTIAL_BUDGET = 256 << 20  # the most bytes of all partial sums; above it, dS and dB are two products


def _drop_arguments(rows: Rows) -> tuple[int, float]:
    return (0, 1.0) if rows.seed is None else (plain.threshold(rows.dropout), 1 / (1 - rows.dropout))


def rank_block(R: int, most: int) -> int:
    return min(max(16, next_power_of_2(R)), most)


def most_ranks(x: Tensor) -> int:
    """Return the widest block of ranks that fits in registers: 16 for fp32, which uses no matrix units, else 64."""
    return 16 if x.dtype == torch.float32 else 64


def _launch_shrink(x: Tensor, a: Tensor, rows: Rows) -> Tensor:
    """Compute S = drop(x) A^T, (M, R), in one pass over x."""
    (M, K), R, adapter, seed = x.shape, a.shape[-2], rows.adapter, rows.seed
    S = x.new_empty(M, R)
    if S.numel():
        block_m, block_r = 32 if 64 * multiprocessors(x) > M else 64, rank_block(R, 64)
        launch = _shrink_fwd[(cdiv(M, block_m), cdiv(R, block_r))]
        numbers = M, K, R, a.shape[0], *_drop_arguments(rows)
        flags = adapter is not None, seed is not None, precision()
        launch(x, a, adapter, seed, S, *numbers, *flags, block_m, 64, block_r, num_warps=4, num_stages=3)
    return S


def launch_expand(
    out: Tensor, S: Tensor, b: Tensor, scaling: float, rows: Rows, gain: Tensor | None, bias: Tensor | None
) -> None:
    """Replace `out` by gain (out + drop(scaling S b^T)) + bias. b is (N, R) or (adapters, N, R) with any strides."""
    (M, N), R, (adapter, seed, _) = out.shape, S.shape[1], rows
    if out.numel():
        block_n = 64 if out.dtype == torch.float32 else 128
        launch = _expand_fwd[(cdiv(M, 64) * cdiv(N, block_n),)]
        sizes = M, N, R, b.shape[0], b.stride(0), b.stride(-2), b.stride(-1)
        numbers = *sizes, scaling, *_drop_arguments(rows)
        given = (adapter is not None, seed is not None, gain is not None, bias is not None)
        blocks = 64, block_n, rank_block(R, most_ranks(out))
        tensors = out, S, b, adapter, seed, gain, bias
        launch(*tensors, *numbers, *given, precision(), *blocks, num_warps=4, num_stages=1)


def launch_ds_and_db(g: Tensor, S: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Compute dS = scaling g B, (M, R), and dB = scaling g^T S, (N, R), in one pass over g."""
    (M, N), R = g.shape, S.shape[1]
    dS, block_r = torch.empty_like(S), rank_block(R, most_ranks(g))
    partial = g.new_empty(cdiv(M, PARTIAL_ROWS), N, R, dtype=torch.float32)
    if M:
        launch = _lora_bwd[(cdiv(M, PARTIAL_ROWS), cdiv(R, block_r))]
        numbers = M, N, R, scaling, precision(), PARTIAL_ROWS, 32, block_r
        launch(g, S, b, dS, partial, *numbers, num_warps=8, num_stages=2)
    return dS, partial.sum(0).to(g.dtype)


def partial_sums_fit(M: int, N: int, R: int) -> bool:
    """Return whether the fp32 partial sums of dB fit in PARTIAL_BUDGET, so that one pass over g gives dS and dB."""
    return 4 * cdiv(M, PARTIAL_ROWS) * N * R <= PARTIAL_BUDGET


def _launch_da(dS: Tensor, x: Tensor, a: Tensor, rows: Rows) -> Tensor:
    """Compute dA = dS^T drop(x) in a's shape, in one pass over x for each adapter."""
    (M, K), R, (adapter, seed, _) = x.shape, dS.shape[1], rows
    adapters, block_k, block_r = a.shape[0] if adapter is not None else 1, 64, rank_block(R, most_ranks(x))
    splits = max(1, min(cdiv(M, 512), cdiv(2 * multiprocessors(x), cdiv(K, block_k))))
    tiles = cdiv(cdiv(M, 32), splits)

    partial = x.new_zeros(splits, adapters, R, K, dtype=torch.float32)
    if M * K:
        launch = _lora_a_bwd[(cdiv(K, block_k) * cdiv(R, block_r) * adapters, splits)]
        numbers = M, K, R, adapters, tiles, *_drop_arguments(rows)
        flags = adapter is not None, seed is not None, precision()
        blocks = 32, block_k, block_r
        launch(dS, x, adapter, seed, partial, *numbers, *flags, *blocks, num_warps=4, num_stages=2)
    return partial.sum(0).to(x.dtype).view(a.shape)


def low_rank_forward(x: Tensor, a: Tensor, rows: Rows, path: str) -> Tensor:
    """Compute S = drop(x) A^T, (M, R).

    On a GPU a Triton kernel computes S. With the path "cublas" torch computes S, unless there is a stack of adapters or
    dropout.
    """
    adapter, seed, dropout = rows
    if use_triton(x) and not (seed is None and adapter is None and path == "cublas"):
        return _launch_shrink(x, a, rows)
    if adapter is not None:
        check_ids("adapter", adapter, -1, a.shape[0] - 1)
    dropped = x if seed is None else plain.drop(x, dropout, seed)
    return plain.gathered(dropped @ plain.wide_a(a).T, adapter, a.shape[0])


def a_gradient(dS: Tensor, x: Tensor, a: Tensor, rows: Rows) -> Tensor:
    """Compute dA = dS^T drop(x) in the shape of a, which is one adapter or a stack."""
    adapter, seed, dropout = rows
    if use_triton(x) and not (seed is None and adapter is None):
        return _launch_da(dS, x, a, rows)
    dropped = x if seed is None else plain.drop(x, dropout, seed)
    return (plain.scattered(dS, adapter, a.shape[0]).T @ dropped).view(a.shape)


def add_adapter_dx_(dx: Tensor, dS: Tensor, a: Tensor, rows: Rows) -> None:
    """Add drop(dS A) to dx in place."""
    adapter, seed, dropout = rows
    if use_triton(dx) and not (seed is None and adapter is None):
        return launch_expand(dx, dS, a.transpose(-2, -1), 1.0, rows, None, None)

    wide, A = plain.scattered(dS, adapter, a.shape[0]), plain.wide_a(a)
    if seed is None:
        dx.addmm_(wide, A)
    else:
        dx.add_(plain.drop(wide @ A, dropout, seed))
