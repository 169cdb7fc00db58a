"""Mixture of experts: the feed-forward layers that the router chose for each token, weighted and summed.

    out_t = sum over k of w_tk E_i(x_t), i = indices_tk        E(x) = act(x W_gu^T + b_gu) W_d^T + b_d

    act: swiglu silu(g) u; clamped_swiglu (min(g, limit) sigmoid(alpha g)) (clamp(u) + 1); relu2 max(u, 0)^2

    dA = w dout W_d        dW_d = dout^T (w A)        dw_tk = (dout W_d) . A + dout . b_d
    dH = dA act'(H)        dW_gu = dH^T x             dx_t = sum over k of dH W_gu

    adapters: W_gu + B_gu A_gu is never formed; H gets the term S B_gu^T, S = x A_gu^T. The same holds for W_d.
    dB_gu = dH^T S         dA_gu = (dH B_gu)^T x      dB_d = dout^T (w A A_d^T)      dA_d = (dout B_d)^T (w A)

A row is a token with one of its experts. Rows are sorted by expert, so the rows of an expert are contiguous. The host
reads no tensor: a grid has the size of its upper bound, T K / BLOCK_M + E tiles, and tiles past the end return at once.
The first product gathers x when it loads its operand. The sum over k gathers its terms, so there are no atomics. The
pre-activation H is saved; the backward computes A from it again, and dw as a sum over each row. Experts in 4 bits are
dequantised before the products, in the forward and again in the backward, and are saved in 4 bits. See docs/moe.md.

Operations: 6 T K C F forward, 12 T K C F backward. Memory traffic beside the operands, in elements: the forward writes
H and A (3 T K F) and the experts' outputs (T K C). The backward writes dH and w A (3 T K F) and dX (T K C). Adapters of
rank R add 2 T K R (2C + 3F) operations forward and twice that backward, and save T K R elements.

Source: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538; clamped SwiGLU: gpt-oss,
        https://arxiv.org/abs/2508.10925; ReLU^2: Primer, https://arxiv.org/abs/2109.08668
"""

# A launch passes numbers where the kernel is annotated tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._chip import FLOATS, cdiv, check_device, check_dtype, check_number, check_shape, precision, use_triton
from ._op import like_saved, make_op, make_path
from ._triton import tl, triton
from .nf4 import dense_of
from .plain.moe import ACTIVATIONS, Activation, moe_mlp_cpu
from .records import ExpertLinear, Experts, NF4Weight, Weight
from .route import Routes, routes_of
from .tiles import moe_tile, moe_weight_tile, tile_width

# ---- kernels

# fmt: off


@triton.jit
def _activated(g, u, alpha, limit, ACTIVATION: tl.constexpr):
    if ACTIVATION == "swiglu":
        return g * tl.sigmoid(g) * u
    elif ACTIVATION == "relu2":
        u = tl.where(u < 0, 0.0, u)  # comparisons, not maximum: NaN passes through
        return u * u
    else:
        g = tl.where(g > limit, limit, g)
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
        return (u + 1) * g * tl.sigmoid(alpha * g)


@triton.jit
def _up_fwd(
    x_ptr, w_ptr, bias_ptr, s_ptr, b_ptr, h_ptr, a_ptr, choice_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr,
    K, C, F, R, alpha, limit,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Compute A = act(H), H = x W^T + s B^T + bias, for gathered rows of x. RANK: loop step over R, or 0 without s."""
    GATED: tl.constexpr = ACTIVATION != "relu2"
    blocks = tl.cdiv(F, BLOCK_N)  # neighbouring programs share their rows of x
    tile = tl.program_id(0) // blocks
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    rows = tl.load(tile_row_ptr + tile) + tl.arange(0, BLOCK_M)
    live = rows < tl.load(starts_ptr + expert + 1)
    token = (tl.load(choice_ptr + rows, live, other=0) // K).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)

    # x W^T, for the same columns of the gate and of up
    k = tl.arange(0, BLOCK_K)
    width = F * (1 + GATED)
    x_ptrs = x_ptr + token[:, None] * C + k[None, :]
    w_ptrs = w_ptr + expert * width * C + cols[None, :].to(tl.int64) * C + k[:, None]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    for first in range(0, C, BLOCK_K):
        inside = k < C - first
        mask = inside[:, None] & (cols < F)[None, :]
        x = tl.load(x_ptrs + first, inside[None, :] & live[:, None], other=0.0)  # [BLOCK_M, BLOCK_K]
        if GATED:
            gate = tl.dot(x, tl.load(w_ptrs + first, mask, other=0.0), gate, input_precision=PRECISION)
            w = tl.load(w_ptrs + F.to(tl.int64) * C + first, mask, other=0.0)
            up = tl.dot(x, w, up, input_precision=PRECISION)
        else:
            up = tl.dot(x, tl.load(w_ptrs + first, mask, other=0.0), up, input_precision=PRECISION)

    # s B^T
    if RANK:
        for first in range(0, R, RANK):
            r = first + tl.arange(0, RANK)
            s_ptrs = s_ptr + rows[:, None].to(tl.int64) * R + r[None, :]
            s = tl.load(s_ptrs, live[:, None] & (r < R)[None, :], other=0.0)
            b_ptrs = b_ptr + expert * width * R + cols[None, :].to(tl.int64) * R + r[:, None]
            mask = (r < R)[:, None] & (cols < F)[None, :]
            if GATED:
                gate = tl.dot(s, tl.load(b_ptrs, mask, other=0.0), gate, input_precision=PRECISION)
                b_ptrs += F.to(tl.int64) * R
            up = tl.dot(s, tl.load(b_ptrs, mask, other=0.0), up, input_precision=PRECISION)

    if BIAS:
        bias_ptrs = bias_ptr + expert * width + cols
        if GATED:
            gate += tl.load(bias_ptrs, cols < F, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias_ptrs + F, cols < F, other=0.0).to(tl.float32)[None, :]
        else:
            up += tl.load(bias_ptrs, cols < F, other=0.0).to(tl.float32)[None, :]

    # round first: the activation sees the numbers that the backward will read
    mask = live[:, None] & (cols < F)[None, :]
    at = rows[:, None].to(tl.int64)
    gate, up = gate.to(h_ptr.dtype.element_ty), up.to(h_ptr.dtype.element_ty)
    if SAVE:
        if GATED:
            tl.store(h_ptr + at * width + cols[None, :], gate, mask)
            tl.store(h_ptr + at * width + F + cols[None, :], up, mask)
        else:
            tl.store(h_ptr + at * width + cols[None, :], up, mask)
    a = _activated(gate.to(tl.float32), up.to(tl.float32), alpha, limit, ACTIVATION)
    tl.store(a_ptr + at * F + cols[None, :], a, mask)


@triton.jit
def _rows_product(
    a_ptr, w_ptr, bias_ptr, s_ptr, b_ptr, out_ptr, choice_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr,
    TOP_K, N, K, R, w_row, w_column, b_row, b_column,
    BIAS: tl.constexpr, RANK: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Compute out = a W^T + s B^T + bias. Each row uses W (N, K) and B (N, R) of its expert, of any strides.

    GATHER: a has a row for each token, not for each choice. RANK: the step of the loop over R, or 0 without s and B.
    """
    blocks = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // blocks
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    rows = tl.load(tile_row_ptr + tile) + tl.arange(0, BLOCK_M)
    live = rows < tl.load(starts_ptr + expert + 1)
    cols = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    at = rows[:, None].to(tl.int64)
    a_at = (tl.load(choice_ptr + rows, live, other=0) // TOP_K)[:, None].to(tl.int64) if GATHER else at

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        inside = k < K - first
        a = tl.load(a_ptr + a_at * K + first + k[None, :], inside[None, :] & live[:, None], other=0.0)
        offsets = cols[None, :].to(tl.int64) * w_row + (first + k)[:, None].to(tl.int64) * w_column
        w = tl.load(w_ptr + expert * N * K + offsets, inside[:, None] & (cols < N)[None, :], other=0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)

    if RANK:
        for first in range(0, R, RANK):
            r = first + tl.arange(0, RANK)
            s = tl.load(s_ptr + at * R + r[None, :], live[:, None] & (r < R)[None, :], other=0.0)
            offsets = cols[None, :].to(tl.int64) * b_row + r[:, None].to(tl.int64) * b_column
            b = tl.load(b_ptr + expert * N * R + offsets, (r < R)[:, None] & (cols < N)[None, :], other=0.0)
            acc = tl.dot(s, b, acc, input_precision=PRECISION)

    if BIAS:
        acc += tl.load(bias_ptr + expert * N + cols, cols < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + at * N + cols[None, :], acc, live[:, None] & (cols < N)[None, :])


@triton.jit
def _combine(y_ptr, weights_ptr, row_ptr, out_ptr, C, K, WEIGHTED: tl.constexpr, BLOCK_C: tl.constexpr):
    """Compute out_t = sum over k of w_tk y[row of (t, k)], in the order of k. A dropped choice has row -1."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], tl.float32)
    for k in range(0, K):
        row = tl.load(row_ptr + token * K + k).to(tl.int64)
        y = tl.load(y_ptr + row * C + cols, (cols < C) & (row >= 0), other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(weights_ptr + token * K + k)
        total += y
    tl.store(out_ptr + token * C + cols, total, cols < C)


@triton.jit
def _activation_bwd(
    dout_ptr, w_ptr, p_ptr, lora_a_ptr, h_ptr, weights_ptr, dh_ptr, wa_ptr, partial_ptr, choice_ptr, starts_ptr,
    tile_expert_ptr, tile_row_ptr, K, C, F, R, alpha, limit,
    ACTIVATION: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Compute dH, w A, and partial sums of each row's gradient of w, one per block of F. p_ptr: dout B_d."""
    GATED: tl.constexpr = ACTIVATION != "relu2"
    blocks = tl.cdiv(F, BLOCK_N)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    rows = tl.load(tile_row_ptr + tile) + tl.arange(0, BLOCK_M)
    live = rows < tl.load(starts_ptr + expert + 1)
    choice = tl.load(choice_ptr + rows, live, other=0)
    token = (choice // K).to(tl.int64)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)

    # dA, not yet multiplied by the weight
    c = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, C, BLOCK_K):
        inside = c < C - first
        dout_ptrs = dout_ptr + token[:, None] * C + first + c[None, :]
        dout = tl.load(dout_ptrs, inside[None, :] & live[:, None], other=0.0)
        offsets = (first + c)[:, None].to(tl.int64) * F + cols[None, :]
        w = tl.load(w_ptr + expert * C * F + offsets, inside[:, None] & (cols < F)[None, :], other=0.0)
        acc = tl.dot(dout, w, acc, input_precision=PRECISION)

    if RANK:
        for first in range(0, R, RANK):
            r = first + tl.arange(0, RANK)
            p_ptrs = p_ptr + rows[:, None].to(tl.int64) * R + r[None, :]
            p = tl.load(p_ptrs, live[:, None] & (r < R)[None, :], other=0.0)
            offsets = r[:, None].to(tl.int64) * F + cols[None, :]
            low = tl.load(lora_a_ptr + expert * R * F + offsets, (r < R)[:, None] & (cols < F)[None, :], other=0.0)
            acc = tl.dot(p, low, acc, input_precision=PRECISION)

    # offsets from the tile's first row fit in 32 bits, which take half the registers
    mask = live[:, None] & (cols < F)[None, :]
    base = tl.load(tile_row_ptr + tile).to(tl.int64) * F
    at = tl.arange(0, BLOCK_M)[:, None]
    weight = tl.load(weights_ptr + choice, live, other=0.0)[:, None]

    # dH, and A recomputed from H
    if GATED:
        h_at = at * (2 * F) + cols[None, :]
        g = tl.load(h_ptr + 2 * base + h_at, mask, other=0.0).to(tl.float32)
        u = tl.load(h_ptr + 2 * base + h_at + F, mask, other=0.0).to(tl.float32)
        da = acc * weight
        if ACTIVATION == "swiglu":
            p = tl.sigmoid(g)
            a = g * p * u
            dg = da * u * p * (1 + g * (1 - p))
            du = da * g * p
        else:
            gc = tl.where(g > limit, limit, g)
            uc = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
            p = tl.sigmoid(alpha * gc)
            # a clamped number has no gradient
            a = (uc + 1) * gc * p
            dg = tl.where(g > limit, 0.0, da * (uc + 1) * p * (1 + alpha * gc * (1 - p)))
            du = tl.where((u > limit) | (u < -limit), 0.0, da * gc * p)
        tl.store(dh_ptr + 2 * base + h_at, dg, mask)
        tl.store(dh_ptr + 2 * base + h_at + F, du, mask)
    else:
        u = tl.load(h_ptr + base + at * F + cols[None, :], mask, other=0.0).to(tl.float32)
        a = _activated(u, u, alpha, limit, ACTIVATION)
        tl.store(dh_ptr + base + at * F + cols[None, :], acc * weight * 2 * tl.where(u < 0, 0.0, u), mask)

    tl.store(wa_ptr + base + at * F + cols[None, :], a * weight, mask)
    tl.store(partial_ptr + choice.to(tl.int64) * blocks + block, tl.sum(acc * a, 1), live)


@triton.jit
def _weight_bwd(
    p_ptr, q_ptr, dw_ptr, db_ptr, weights_ptr, choice_ptr, starts_ptr, K, N, C,
    GATHER_P: tl.constexpr, GATHER_Q: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Compute dW (N, C) = p^T q over the rows of each expert, and db, the sum of p's rows.

    A gathered operand has a row for each token, not for each choice. The rows of a gathered p are multiplied by their
    weight w for db, but not for dW, where q = w A already contains w.
    """
    blocks_n, blocks_c = tl.cdiv(N, BLOCK_N), tl.cdiv(C, BLOCK_C)
    expert = (tl.program_id(0) // (blocks_n * blocks_c)).to(tl.int64)
    block = tl.program_id(0) % (blocks_n * blocks_c)
    n = block // blocks_c * BLOCK_N + tl.arange(0, BLOCK_N)
    c = block % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    start, end = tl.load(starts_ptr + expert), tl.load(starts_ptr + expert + 1)
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    db = tl.zeros([BLOCK_N], tl.float32)

    for first in tl.range(start, end, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        live = rows < end
        choice = tl.load(choice_ptr + rows, live, other=0)
        token = (choice // K).to(tl.int64)
        row = rows.to(tl.int64)

        p_row = token if GATHER_P else row
        q_row = token if GATHER_Q else row
        p = tl.load(p_ptr + p_row[None, :] * N + n[:, None], live[None, :] & (n < N)[:, None], other=0.0)
        q = tl.load(q_ptr + q_row[:, None] * C + c[None, :], live[:, None] & (c < C)[None, :], other=0.0)
        acc = tl.dot(p, q, acc, input_precision=PRECISION)
        if BIAS:
            wide = p.to(tl.float32)
            if GATHER_P:
                wide *= tl.load(weights_ptr + choice, live, other=0.0)[None, :]
            db += tl.sum(wide, 1)

    inside = (n < N)[:, None] & (c < C)[None, :]
    tl.store(dw_ptr + expert * N * C + n[:, None].to(tl.int64) * C + c[None, :], acc, inside)
    if BIAS:
        tl.store(db_ptr + expert * N + n, db, (n < N) & (block % blocks_c == 0))


# ---- launch


def _product(
    a: Tensor, weight: Tensor, routes: Routes, *, by_token: bool = False, transposed: bool = False,
    bias: Tensor | None = None, low: Tensor | None = None, up: Tensor | None = None,
) -> Tensor:
    """Return a W^T + low U^T + bias, (T K, N). `weight` is W and `up` is U.

    W is (E, N, K) and U is (E, N, R); if `transposed`, (E, K, N) and (E, R, N). a is (T K, K), or (T, K) if `by_token`.
    """
    starts, row, choice, tile_expert, tile_row, block_m, top_k = routes
    K, N, R = a.shape[1], weight.shape[2 if transposed else 1], 0 if low is None else low.shape[1]
    out = a.new_empty(row.numel(), N)
    strides = (1, N, 1, N) if transposed else (K, 1, R, 1)
    tile = moe_tile(a, block_m, width=N)
    _rows_product[(tile_expert.numel() * cdiv(N, tile["BLOCK_N"]),)](
        a, weight, bias, low, up, out, choice, starts, tile_expert, tile_row, top_k, N, K, R, *strides,
        bias is not None, _rank_step(tile, R), by_token, precision(), **tile,
    )
    return out


def _activation(x: Tensor, experts: Experts, s: Tensor, routes: Routes, save: bool) -> tuple[Tensor, Tensor]:
    """Return the activation A = act(H), (T K, F), and H, (T K, 2F or F), which is empty unless `save`."""
    starts, row, choice, tile_expert, tile_row, block_m, top_k = routes
    gate_up, _, activation, alpha, limit = experts
    (_, width, C), R = gate_up.sizes, s.shape[1]
    F = width if activation == "relu2" else width // 2
    a, h = x.new_empty(row.numel(), F), x.new_empty(row.numel() if save else 0, width)
    tile = moe_tile(x, block_m, accumulators=2)
    _up_fwd[(tile_expert.numel() * cdiv(F, tile["BLOCK_N"]),)](
        x, gate_up.weight.data, gate_up.bias, s, gate_up.b, h, a, choice, starts, tile_expert, tile_row,
        top_k, C, F, R, alpha, limit,
        activation, gate_up.bias is not None, _rank_step(tile, R), save, precision(), **tile,
    )
    return a, h


def _activation_grad(
    dout: Tensor, dout_b: Tensor | None, experts: Experts, h: Tensor, weights: Tensor, routes: Routes
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dH (T K, 2F or F), w A (T K, F), and partial sums of each choice's gradient of w, (T K, blocks of F)."""
    starts, row, choice, tile_expert, tile_row, block_m, top_k = routes
    _, down, activation, alpha, limit = experts
    (_, C, F), R = down.sizes, 0 if dout_b is None else dout_b.shape[1]
    # the epilogue holds gate and up beside the accumulator, and for clamped_swiglu each of them twice
    tile = moe_tile(dout, block_m, accumulators=4 if activation == "clamped_swiglu" else 2)
    blocks = cdiv(F, tile["BLOCK_N"])
    dh, wa = torch.empty_like(h), h.new_empty(row.numel(), F)
    sums = weights.new_zeros(row.numel(), blocks)  # zeros: a dropped choice has no row
    _activation_bwd[(tile_expert.numel() * blocks,)](
        dout, down.weight.data, dout_b, down.a, h, weights, dh, wa, sums, choice, starts, tile_expert, tile_row,
        top_k, C, F, R, alpha, limit, activation, _rank_step(tile, R), precision(), **tile,
    )
    return dh, wa, sums


def _weight_grad(
    weights: Tensor, routes: Routes, p: Tensor | None, q: Tensor | None, by_token: str, needed: bool,
    with_bias: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Return p^T q (E, N, C) over the rows of each expert, and the sum of p's rows (E, N), each None if not needed.

    p is (T K, N) and q is (T K, C). by_token is "p" or "q" if that operand has T rows and is gathered, else "".
    """
    if p is None or q is None or not (needed or with_bias):
        return None, None
    E, N, C = routes.starts.shape[0] - 1, p.shape[1], q.shape[1]
    dw, db = p.new_empty(E, N, C), p.new_empty(E, N) if with_bias else None
    tile = moe_weight_tile(p, N, C)
    _weight_bwd[(E * cdiv(N, tile["BLOCK_N"]) * cdiv(C, tile["BLOCK_C"]),)](
        p, q, dw, db, weights, routes.choice, routes.starts, routes.top_k, N, C,
        by_token == "p", by_token == "q", with_bias, precision(), **tile,
    )
    return dw if needed else None, db

# fmt: on


def _sum_over_choices(y: Tensor, weights: Tensor | None, routes: Routes) -> Tensor:
    """Return (T, C): for each token the sum of its K rows of y (T K, C), weighted if `weights` are given."""
    T, C = routes.row.numel() // routes.top_k, y.shape[1]
    out = y.new_empty(T, C)
    grid = (T, cdiv(C, 1024))
    _combine[grid](
        y, weights, routes.row, out, C, routes.top_k, weights is not None, BLOCK_C=1024, num_warps=4
    )
    return out


def _block_m(x: Tensor, rows: int, E: int) -> int:
    """Return the number of rows of a tile: about the average number of an expert's rows, as more would be idle."""
    most = 64 if x.dtype == torch.float32 else 128
    return min(most, max(16, 1 << (rows // max(E, 1)).bit_length()))


def _rank_step(tile: dict[str, int], R: int) -> int:
    """Return the step of a kernel's loop over the rank R of an adapter, or 0 without an adapter."""
    return min(tile["BLOCK_K"], tile_width(R)) if R else 0


class _Saved(NamedTuple):
    """The tensors that the backward reads: the operands of the forward, the pre-activation H, and S = x A_gu^T."""

    x: Tensor
    experts: Experts
    weights: Tensor
    routes: Routes
    h: Tensor
    s: Tensor


class _Gradients(NamedTuple):
    x: Tensor | None
    experts_gate_up_weight_data: Tensor | None
    experts_gate_up_bias: Tensor | None
    experts_gate_up_a: Tensor | None
    experts_gate_up_b: Tensor | None
    experts_down_weight_data: Tensor | None
    experts_down_bias: Tensor | None
    experts_down_a: Tensor | None
    experts_down_b: Tensor | None
    weights: Tensor | None


def _forward(
    x: Tensor, experts: Experts, weights: Tensor, routes: Routes, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (T, C), the pre-activation H (T K, 2F or F), and S = x A_gu^T (T K, R).

    H and S are empty unless `save`. The inputs are contiguous, and `weights` is fp32.
    """
    if not x.numel() or not routes.top_k:
        out, h, s = _shapes(x, experts, weights, routes, save)
        return out.zero_(), h, s
    experts = _multiplied_out(experts, x.dtype)
    gate_up, down = experts[:2]

    s = x.new_empty(0, 0)
    if gate_up.a is not None:
        s = _product(x, gate_up.a, routes, by_token=True)
    a, h = _activation(x, experts, s, routes, save)

    low = None if down.a is None else _product(a, down.a, routes)
    y = _product(a, down.weight.data, routes, bias=down.bias, low=low, up=down.b)
    return _sum_over_choices(y, weights, routes), h, s if save else s.new_empty(0, s.shape[1])


def _shapes(x, experts, weights, routes, save):
    (_, width, _), a = experts.gate_up.sizes, experts.gate_up.a
    rows, R = weights.numel() if save else 0, 0 if a is None else a.shape[1]
    return torch.empty_like(x), x.new_empty(rows, width), x.new_empty(rows if R else 0, R)


def _multiplied_out(experts: Experts, dtype: torch.dtype) -> Experts:
    """Return the experts with dense weights. A 4-bit weight is dequantised in one launch, and freed after the op."""
    gate_up, down = experts[:2]
    if not (gate_up.weight.blocksize or down.weight.blocksize):
        return experts
    dense = (ExpertLinear(Weight(dense_of(layer.weight, dtype)), *layer[1:]) for layer in (gate_up, down))
    return Experts(*dense, *experts[2:])


def _save(outputs, x, experts, weights, routes, save):
    _, h, s = outputs
    return _Saved(x, experts, weights, routes, h, s)


def _backward(saved: _Saved, needs: Any, dout: Tensor) -> _Gradients:
    x, experts, weights, routes, h, s = saved
    if not x.numel() or not routes.top_k:
        return needs._make(None if grad is None else grad.zero_() for grad in like_saved(saved, needs))
    experts = _multiplied_out(experts, x.dtype)
    gate_up, down = experts[:2]
    dout = dout.contiguous()

    # dH: back through the second layer, its adapter (dout B_d), and the activation
    dout_b = None if down.b is None else _product(dout, down.b, routes, by_token=True, transposed=True)
    dh, wa, sums = _activation_grad(dout, dout_b, experts, h, weights, routes)

    # dx: back through the first layer and its adapter (dH B_gu)
    dh_b = dx = None
    if gate_up.b is not None and (needs.x or needs.experts_gate_up_a):
        dh_b = _product(dh, gate_up.b, routes, transposed=True)
    if needs.x:
        dx_rows = _product(dh, gate_up.weight.data, routes, transposed=True, low=dh_b, up=gate_up.a)
        dx = _sum_over_choices(dx_rows, None, routes)

    # the gradients of the two layers
    grad = partial(_weight_grad, weights, routes)
    dw_gate_up, db_gate_up = grad(dh, x, "q", needs.experts_gate_up_weight_data, needs.experts_gate_up_bias)
    dw_down, db_down = grad(dout, wa, "p", needs.experts_down_weight_data, needs.experts_down_bias)
    wa_a = _product(wa, down.a, routes) if needs.experts_down_b else None  # w A A_d^T

    return _Gradients(
        x=dx,
        experts_gate_up_weight_data=dw_gate_up,
        experts_gate_up_bias=db_gate_up,
        experts_gate_up_a=grad(dh_b, x, "q", needs.experts_gate_up_a)[0],
        experts_gate_up_b=grad(dh, s, "", needs.experts_gate_up_b)[0],
        experts_down_weight_data=dw_down,
        experts_down_bias=db_down,
        experts_down_a=grad(dout_b, wa, "", needs.experts_down_a)[0],
        experts_down_b=grad(dout, wa_a, "p", needs.experts_down_b)[0],
        weights=_mixing_grad(sums, dout, down.bias, routes) if needs.weights else None,
    )


def _mixing_grad(sums: Tensor, dout: Tensor, down_bias: Tensor | None, routes: Routes) -> Tensor:
    """Return dw (T, K): the sum of each choice's partial sums over the blocks of F, plus dout . b_d."""
    E, row = routes.starts.shape[0] - 1, routes.row.view(-1, routes.top_k)
    dweights = sums.sum(1).view_as(row)
    if down_bias is not None:
        # the expert of each choice; dropped choices are masked below
        expert = torch.searchsorted(routes.starts[1:], row, right=True).clamp_(max=E - 1)
        along = torch.mm(dout.float(), down_bias.float().t())  # (T, E)
        dweights += along.gather(1, expert).masked_fill_(row < 0, 0)
    return dweights


def _sorted_mlp(x: Tensor, experts: Experts, weights: Tensor, indices: Tensor) -> Tensor:
    """Sort the choices by expert, make the operands contiguous, and return the output of the op."""
    gate_up, down = experts[:2]
    save = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weights, *gate_up.tensors(), *down.tensors())
    )
    E = gate_up.sizes[0]
    routes = routes_of(indices, E, _block_m(x, indices.numel(), E))
    experts = Experts(gate_up.contiguous(), down.contiguous(), *experts[2:])
    return _mlp(x.contiguous(), experts, weights.contiguous(), routes, save)[0]


_mlp = make_op("moe_mlp", _forward, _shapes, _save, _backward, like_saved)
_mlp_on_cpu = make_path("moe_mlp_cpu", moe_mlp_cpu, lambda x, *_: torch.empty_like(x))


# ---- op


def moe_mlp(
    x: Tensor,
    gate_up: Tensor | NF4Weight,
    down: Tensor | NF4Weight,
    weights: Tensor,
    indices: Tensor,
    *,
    activation: Activation = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_up_a: Tensor | None = None,
    gate_up_b: Tensor | None = None,
    down_a: Tensor | None = None,
    down_b: Tensor | None = None,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Tensor:
    """Run each token through its experts, and sum the outputs by `weights`. The top of this file has the formula.

    x: (T, C).    gate_up: (E, 2F, C), the gate's rows first, or (E, F, C) for relu2.    down: (E, C, F). The weights
        are tensors in x's dtype, or frozen 4-bit weights with whole blocks for each expert. Experts have no capacity.
    weights: (T, K) floating point.    indices: (T, K) int32 or int64. A choice outside of 0..E-1 is skipped.
    gate_up_bias: (E, 2F), or (E, F) for relu2.    down_bias: (E, C).    alpha, limit: parameters of clamped_swiglu.
    gate_up_a, gate_up_b: (E, R, C) and (E, 2F, R), an adapter.    down_a, down_b: (E, R, F) and (E, C, R), an adapter.
        An expert's weight is then W + B A. Multiply a scaling into B beforehand. The two ranks R may differ. The
        products are in x's dtype.
    Returns (T, C) in x's dtype. Differentiable in all but indices; frozen experts cost no weight gradient.
    Raises ValueError for other shapes and dtypes, for tensors on several devices, for an alpha that is not finite, and
    for a limit below 0.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    check_number("alpha", alpha)
    if not limit >= 0:
        raise ValueError(f"limit: expected a number of at least 0, got {limit}")
    if x.dim() != 2 or len(down.shape) != 3 or weights.dim() != 2:
        got = ", ".join(str(tuple(t.shape)) for t in (x, down, weights))
        raise ValueError(f"x, down, weights: expected (T, C), (E, C, F), (T, K), got {got}")
    check_dtype("x", x)
    check_device(x, weights=weights, indices=indices, gate_up_bias=gate_up_bias, down_bias=down_bias)
    check_device(x, gate_up_a=gate_up_a, gate_up_b=gate_up_b, down_a=down_a, down_b=down_b)

    (T, C), (E, _, F), K = x.shape, down.shape, weights.shape[1]
    if not E:
        raise ValueError("down: expected at least one expert, got none")
    width = F if activation == "relu2" else 2 * F
    _check_experts("gate_up", gate_up, x, experts=E, width=width, hidden=C)
    _check_experts("down", down, x, experts=E, hidden=C, ffn=F)
    check_shape("weights", weights, tokens=T, top_k=K)
    check_dtype("weights", weights, *FLOATS)
    check_shape("indices", indices, tokens=T, top_k=K)
    check_dtype("indices", indices, torch.int32, torch.int64)
    for name, bias, size in (("gate_up_bias", gate_up_bias, width), ("down_bias", down_bias, C)):
        if bias is not None:
            check_shape(name, bias, experts=E, width=size)
            check_dtype(name, bias, x.dtype)

    gate_up_a, gate_up_b = _adapter("gate_up", gate_up_a, gate_up_b, x.dtype, E, C, width)
    down_a, down_b = _adapter("down", down_a, down_b, x.dtype, E, F, C)
    first = ExpertLinear(Weight.of(gate_up), gate_up_bias, gate_up_a, gate_up_b)
    second = ExpertLinear(Weight.of(down), down_bias, down_a, down_b)
    experts = Experts(first, second, activation, alpha, limit)
    if use_triton(x):
        return _sorted_mlp(x, experts, weights.float(), indices)
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    return _mlp_on_cpu(x, experts, weights, indices)


def _check_experts(name: str, weight: Tensor | NF4Weight, x: Tensor, **dims: int) -> None:
    check_shape(name, weight, **dims)
    check_device(x, **{name: weight if isinstance(weight, Tensor) else weight.packed})
    if isinstance(weight, Tensor):
        return check_dtype(name, weight, x.dtype)
    one = weight.numel // max(weight.shape[0], 1)
    if one % weight.blocksize:
        raise ValueError(
            f"{name}: expected whole blocks of {weight.blocksize} weights in each expert, got {one} weights in each"
        )


def _adapter(
    name: str, a: Tensor | None, b: Tensor | None, dtype: torch.dtype, E: int, C: int, N: int
) -> tuple[Tensor | None, Tensor | None]:
    """Check the adapter of a layer with C inputs and N outputs. Return A and B in `dtype`, or None and None."""
    if a is None and b is None:
        return None, None
    if a is None or b is None or a.dim() != 3 or not 1 <= a.shape[1] <= 256:
        raise ValueError(
            f"{name}_a, {name}_b: expected (E, R, in) and (E, out, R) with R from 1 to 256, got "
            + " and ".join("none" if t is None else str(tuple(t.shape)) for t in (a, b))
        )
    check_shape(f"{name}_a", a, experts=E, rank=a.shape[1], **{"in": C})
    check_shape(f"{name}_b", b, experts=E, out=N, rank=a.shape[1])
    check_dtype(f"{name}_a", a, *FLOATS)
    check_dtype(f"{name}_b", b, *FLOATS)
    return a.to(dtype), b.to(dtype)
