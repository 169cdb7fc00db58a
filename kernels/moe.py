"""Mixture of experts: which experts each token goes to, and the feed-forward layers that run there.

    moe_route     s = softmax(z) or sigmoid(z)        indices = the K largest of z or s + bias        w = s[indices]
    moe_mlp       out_t = sum over k of w_tk E_i(x_t), i = indices_tk        E(x) = act(x W_gu^T + b_gu) W_d^T + b_d

    act: swiglu silu(g) u; clamped_swiglu (min(g, limit) sigmoid(alpha g)) (clamp(u) + 1); relu2 max(u, 0)^2
    balance = E sum_e (tokens that chose e / T) (mean of e's probability)        z_loss = mean of logsumexp(z)^2

    dA = w dout W_d        dW_d = dout^T (w A)        dw_tk = (dout W_d) . A + dout . b_d
    dH = dA act'(H)        dW_gu = dH^T x             dx_t = sum over k of dH W_gu

The rows (a token with one of its experts) are sorted by expert. Nothing is read on the host: grids have the size of
their upper bound, T K / BLOCK_M + E tiles, and the tiles past the end return at once. x is gathered by the load of the
product's operand; the products' rows lie contiguously by expert; the sum over k gathers, so there are no atomics. H,
the pre-activation, is saved, A is computed again from it in the backward, and dw is a row sum there. See docs/moe.md.

Operations: 6 T K C F forward, 12 T K C F backward. Memory beside the operands, in elements: forward writes H and A
(3 T K F) and the experts' outputs (T K C); backward dH and w A (3 T K F) and dX (T K C).

Source: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538; Switch, https://arxiv.org/abs/2101.03961, eq. 4-6;
        z-loss, https://arxiv.org/abs/2202.08906, eq. 5; sigmoid router with bias and groups: DeepSeek-V3,
        https://arxiv.org/abs/2412.19437, eq. 12-16; clamped SwiGLU: gpt-oss, https://arxiv.org/abs/2508.10925;
        ReLU^2: Primer, https://arxiv.org/abs/2109.08668
"""

# A launch passes numbers where the kernel is annotated tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._launch import capability, cdiv, check_dtype, check_shape, register, use_triton

Activation = Literal["swiglu", "clamped_swiglu", "relu2"]
ACTIVATIONS: tuple[Activation, ...] = ("swiglu", "clamped_swiglu", "relu2")


class RouteStatistics(NamedTuple):
    """What a router says beside its choice. Counted before a capacity drops anything."""

    balance: Tensor  # (), differentiable; K where the load is even
    z_loss: Tensor  # (), differentiable
    counts: Tensor  # (E,) int64, how many tokens chose each expert
    dropped: Tensor  # () int64, how many choices found their expert full


# ---- reference


def moe_route_reference(
    logits: Tensor,
    top_k: int,
    *,
    score: Literal["softmax", "sigmoid"] = "softmax",
    bias: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    renormalize: bool = False,
    scale: float = 1.0,
    capacity_factor: float | None = None,
) -> tuple[Tensor, Tensor, RouteStatistics]:
    T, E = logits.shape
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probability = z.softmax(-1) if score == "softmax" else z.sigmoid()
    chosen_by = (z if score == "softmax" and bias is None else probability).detach()
    if bias is not None:
        chosen_by = chosen_by + bias.to(z.dtype)
    if groups > 1:
        members = chosen_by.view(T, groups, E // groups)
        best = (
            members.topk(min(2, E // groups), -1).values.sum(-1) if score == "sigmoid" else members.amax(-1)
        )
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(top_groups, -1).indices, True)
        chosen_by = members.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    indices = chosen_by.topk(top_k, -1).indices  # (T, K)
    weights = probability.gather(1, indices)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights * scale
    counts = _counts(indices, E)
    share = probability if score == "softmax" else probability / (probability.sum(-1, keepdim=True) + 1e-20)
    tokens = max(T, 1)
    balance = E * (counts.to(z.dtype) / tokens * (share.sum(0) / tokens)).sum()
    z_loss = z.logsumexp(-1).square().sum() / tokens
    dropped = counts.new_zeros(())
    if capacity_factor is not None:
        capacity = math.ceil(capacity_factor * T * top_k / E)
        full = _place_in_expert(indices, E) >= capacity
        indices, weights = indices.masked_fill(full, E), weights.masked_fill(full, 0)
        dropped = full.sum()
    return weights, indices, RouteStatistics(balance, z_loss, counts, dropped)


def _counts(indices: Tensor, E: int) -> Tensor:
    """(E,) int64, without reading a number on the host as bincount does."""
    ids = indices.flatten().sort().values
    experts = torch.arange(E + 1, device=indices.device, dtype=ids.dtype)
    return torch.searchsorted(ids, experts).diff()


def _place_in_expert(indices: Tensor, E: int) -> Tensor:
    """(T, K): how many choices of the same expert come before: all first choices before all second ones."""
    by_choice = indices.t().flatten()  # (K T,)
    ids, order = by_choice.sort(stable=True)
    starts = torch.searchsorted(ids, torch.arange(E, device=ids.device, dtype=ids.dtype))
    place = torch.empty_like(ids)
    place[order] = torch.arange(ids.numel(), device=ids.device) - starts[ids]
    return place.view(indices.shape[1], -1).t()


def moe_mlp_reference(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    indices: Tensor,
    *,
    activation: Activation = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        h = F.linear(x, gate_up[e], None if gate_up_bias is None else gate_up_bias[e])
        y = F.linear(
            _activate(h, activation, alpha, limit), down[e], None if down_bias is None else down_bias[e]
        )
        weight = (weights * (indices == e)).sum(1, keepdim=True)  # (T, 1), zero where the token is elsewhere
        out = out + weight.to(x.dtype) * y
    return out


def _activate(h: Tensor, activation: Activation, alpha: float, limit: float) -> Tensor:
    """(rows, 2F), or (rows, F) for relu2, to (rows, F)."""
    if activation == "relu2":
        return h.relu().square()
    gate, up = h.chunk(2, -1)
    if activation == "swiglu":
        return F.silu(gate) * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * (alpha * gate).sigmoid())


# ---- CPU path


def _mlp_cpu(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    indices: Tensor,
    activation: Activation,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    alpha: float,
    limit: float,
) -> Tensor:
    """The rows of one expert at a time, only where there are any."""
    (T, C), E, K = x.shape, gate_up.shape[0], indices.shape[1]
    ids = indices.flatten()
    ids = torch.where((ids < 0) | (ids >= E), E, ids)
    order = ids.argsort(stable=True)
    counts = ids.bincount(minlength=E + 1)[:E].tolist()
    order = order[: sum(counts)]
    # unbind, not [e]: the backward of each [e] would fill a gradient of all experts
    first, second = gate_up.unbind(), down.unbind()
    first_bias = [None] * E if gate_up_bias is None else gate_up_bias.unbind()
    second_bias = [None] * E if down_bias is None else down_bias.unbind()
    parts = [
        F.linear(
            _activate(F.linear(rows, first[e], first_bias[e]), activation, alpha, limit),
            second[e],
            second_bias[e],
        )
        for e, rows in enumerate(x[order // K].split(counts))
        if rows.shape[0] or e == 0  # one at least: what no token reaches has a gradient, of zeros
    ]
    y = torch.cat(parts)
    y = y.new_zeros(T * K, C).index_copy(0, order, y).view(T, K, C)
    return (y.to(weights.dtype) * weights[..., None]).sum(1).to(x.dtype)


# ---- kernels


@triton.jit
def _histogram(indices_ptr, counts_ptr, N, E, BLOCKS, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """counts (E, BLOCKS): how often each block of BLOCK_N choices names each expert."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.load(indices_ptr + n, n < N, other=-1)
    for first in range(0, E, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        count = tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)  # [BLOCK_E]
        tl.store(counts_ptr + e * BLOCKS + tl.program_id(0), count, e < E)


@triton.jit
def _scatter(indices_ptr, counts_ptr, ends_ptr, row_ptr, choice_ptr, N, E, BLOCKS, BLOCK_N: tl.constexpr):
    """A choice's row is the number of choices of earlier experts, of its expert in earlier blocks, and in its block."""
    i = tl.arange(0, BLOCK_N)
    n = tl.program_id(0) * BLOCK_N + i
    expert = tl.load(indices_ptr + n, n < N, other=-1).to(tl.int32)
    kept = (expert >= 0) & (expert < E)
    cell = expert * BLOCKS + tl.program_id(0)
    before = tl.load(ends_ptr + cell, kept, other=0) - tl.load(counts_ptr + cell, kept, other=0)
    others = tl.load(indices_ptr + tl.program_id(0) * BLOCK_N + i, n < N, other=-1).to(tl.int32)
    earlier = (expert[:, None] == others[None, :]) & (i[None, :] < i[:, None])  # [BLOCK_N, BLOCK_N]
    row = before + tl.sum(earlier.to(tl.int32), 1)
    tl.store(row_ptr + n, tl.where(kept, row, -1), n < N)
    tl.store(choice_ptr + row, n, kept)


@triton.jit
def _tiles(
    starts_ptr, tile_expert_ptr, tile_row_ptr, E, tiles,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """For each tile of BLOCK_M rows its expert, -1 past the last tile, and its first row."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.zeros([BLOCK_T], tl.int32) - 1
    row = tl.zeros([BLOCK_T], tl.int32)
    before = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, E, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        start = tl.load(starts_ptr + e, e < E, other=0)
        count = (tl.load(starts_ptr + e + 1, e < E, other=0) - start + BLOCK_M - 1) // BLOCK_M  # tiles of e
        stop = before + tl.cumsum(count, 0)
        begin = stop - count
        here = (t[:, None] >= begin[None, :]) & (
            t[:, None] < stop[None, :]
        )  # [BLOCK_T, BLOCK_E], one at most
        expert += tl.sum(tl.where(here, e[None, :] + 1, 0), 1)
        row += tl.sum(tl.where(here, start[None, :] + (t[:, None] - begin[None, :]) * BLOCK_M, 0), 1)
        before += tl.sum(count, 0)
    tl.store(tile_expert_ptr + t, expert, t < tiles)
    tl.store(tile_row_ptr + t, row, t < tiles)


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
    x_ptr, w_ptr, bias_ptr, h_ptr, a_ptr, choice_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, K, C, F, alpha, limit,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
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
            up = tl.dot(
                x,
                tl.load(w_ptrs + F.to(tl.int64) * C + first, mask, other=0.0),
                up,
                input_precision=PRECISION,
            )
        else:
            up = tl.dot(x, tl.load(w_ptrs + first, mask, other=0.0), up, input_precision=PRECISION)
    if BIAS:
        bias_ptrs = bias_ptr + expert * width + cols
        if GATED:
            gate += tl.load(bias_ptrs, cols < F, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias_ptrs + F, cols < F, other=0.0).to(tl.float32)[None, :]
        else:
            up += tl.load(bias_ptrs, cols < F, other=0.0).to(tl.float32)[None, :]
    mask = live[:, None] & (cols < F)[None, :]
    at = rows[:, None].to(tl.int64)
    # the activation sees what the backward will read
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
    a_ptr, w_ptr, bias_ptr, out_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, N, K, w_row, w_column,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = a W^T + bias, each row with the weight (N, K) of its expert; w_row and w_column are W's strides."""
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
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        inside = k < K - first
        a = tl.load(a_ptr + at * K + first + k[None, :], inside[None, :] & live[:, None], other=0.0)
        offsets = cols[None, :].to(tl.int64) * w_row + (first + k)[:, None].to(tl.int64) * w_column
        w = tl.load(w_ptr + expert * N * K + offsets, inside[:, None] & (cols < N)[None, :], other=0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias_ptr + expert * N + cols, cols < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + at * N + cols[None, :], acc, live[:, None] & (cols < N)[None, :])


@triton.jit
def _combine(
    y_ptr, weights_ptr, row_ptr, out_ptr, C, K, WEIGHTED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out_t = sum over k of w_tk y[row of (t, k)], in the order of k; dropped choices have row -1."""
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
    dout_ptr, w_ptr, h_ptr, weights_ptr, dh_ptr, wa_ptr, partial_ptr, choice_ptr, starts_ptr, tile_expert_ptr,
    tile_row_ptr, K, C, F, alpha, limit,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dH, w A, and of each row's gradient of w one partial sum for each block of F."""
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
    c = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, C, BLOCK_K):
        inside = c < C - first
        dout = tl.load(
            dout_ptr + token[:, None] * C + first + c[None, :], inside[None, :] & live[:, None], other=0.0
        )
        offsets = (first + c)[:, None].to(tl.int64) * F + cols[None, :]
        w = tl.load(w_ptr + expert * C * F + offsets, inside[:, None] & (cols < F)[None, :], other=0.0)
        acc = tl.dot(dout, w, acc, input_precision=PRECISION)  # dA before its weight
    mask = live[:, None] & (cols < F)[None, :]
    # from the tile's first row on, 32 bits reach: half the registers
    base = tl.load(tile_row_ptr + tile).to(tl.int64) * F
    at = tl.arange(0, BLOCK_M)[:, None]
    weight = tl.load(weights_ptr + choice, live, other=0.0)[:, None]
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
    GATHER_P: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dW (N, C) = p^T q over the rows of each expert; with GATHER_P p is by token, else q.

    db = the sum of p's rows; gathered ones times their weight, which w A has in q.
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
        q_row = row if GATHER_P else token
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


# ---- autograd


class _Rows(NamedTuple):
    """Where every row lies. Sizes are upper bounds: rows and tiles past the last are never touched."""

    starts: Tensor  # (E + 1,) int32, the first row of each expert, and the number of rows
    row: Tensor  # (T K,) int32, of each choice; -1 where it is dropped
    choice: Tensor  # (T K,) int32, of each row
    tile_expert: Tensor  # (tiles,) int32, -1 past the last tile
    tile_row: Tensor  # (tiles,) int32, the first row of each tile


def _block_m(rows: int, E: int) -> int:
    """Rows of a tile: about what an expert has, for what a tile has more is lost."""
    return min(128, max(16, 1 << (rows // max(E, 1)).bit_length()))


def _tile(x: Tensor, block_m: int, accumulators: int) -> dict[str, int]:
    """accumulators: tiles [BLOCK_M, BLOCK_N] that are held at once."""
    if x.dtype == torch.float32:
        return {
            "BLOCK_M": min(block_m, 64),
            "BLOCK_N": 64 // accumulators,
            "BLOCK_K": 32,
            "num_warps": 4,
            "num_stages": 2,
        }
    if block_m < 64:
        return {
            "BLOCK_M": block_m,
            "BLOCK_N": 128 // accumulators,
            "BLOCK_K": 64,
            "num_warps": 4,
            "num_stages": 3,
        }
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": 128 // (1 if capability(x)[0] >= 9 and accumulators == 1 else accumulators),
        "BLOCK_K": 64,
        "num_warps": 8,
        "num_stages": 3 if capability(x) != (9, 4) else 2,
    }


def _weight_tile(x: Tensor) -> dict[str, int]:
    if x.dtype == torch.float32:
        return {"BLOCK_R": 32, "BLOCK_N": 64, "BLOCK_C": 64, "num_warps": 4, "num_stages": 2}
    stages = 3 if capability(x) != (9, 4) else 2
    return {"BLOCK_R": 64, "BLOCK_N": 128, "BLOCK_C": 128, "num_warps": 8, "num_stages": stages}


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _dispatch(indices: Tensor, E: int, block_m: int) -> list[Tensor]:
    """indices (T, K) contiguous, int32 or int64, to the fields of _Rows."""
    starts, row, choice, tile_expert, tile_row = _dispatch_fake(indices, E, block_m)
    N = indices.numel()
    if not N:
        return [starts.zero_(), row, choice, tile_expert, tile_row]
    blocks = cdiv(N, 128)
    counts = indices.new_empty(E, blocks, dtype=torch.int32)
    _histogram[(blocks,)](indices, counts, N, E, blocks, BLOCK_N=128, BLOCK_E=64)
    ends = counts.view(-1).cumsum(0, dtype=torch.int32)
    _scatter[(blocks,)](indices, counts, ends, row, choice, N, E, blocks, BLOCK_N=128)
    starts[:1].zero_()
    starts[1:] = ends.view(E, blocks)[:, -1]
    tiles = tile_expert.numel()
    _tiles[(cdiv(tiles, 64),)](
        starts, tile_expert, tile_row, E, tiles, BLOCK_M=block_m, BLOCK_T=64, BLOCK_E=64
    )
    return [starts, row, choice, tile_expert, tile_row]


def _dispatch_fake(indices, E, block_m):
    N = indices.numel()
    sizes = (E + 1, N, N, *[cdiv(N, block_m) + E] * 2)
    return [indices.new_empty(size, dtype=torch.int32) for size in sizes]


def _forward(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    starts: Tensor,
    row: Tensor,
    choice: Tensor,
    tile_expert: Tensor,
    tile_row: Tensor,
    activation: str,
    alpha: float,
    limit: float,
    block_m: int,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Contiguous inputs, weights fp32. Returns out (T, C) and H (T K, 2F or F), which is empty unless save."""
    (T, C), (T, K), F = x.shape, weights.shape, down.shape[2]
    out, h = torch.empty_like(x), x.new_empty(T * K if save else 0, gate_up.shape[1])
    if not out.numel() or not K:
        return out.zero_(), h
    tiles = tile_expert.numel()
    a, y = x.new_empty(T * K, F), x.new_empty(T * K, C)
    tile = _tile(x, block_m, 2)
    _up_fwd[(tiles * cdiv(F, tile["BLOCK_N"]),)](
        x, gate_up, gate_up_bias, h, a, choice, starts, tile_expert, tile_row, K, C, F, alpha, limit,
        activation, gate_up_bias is not None, save, _precision(), **tile,
    )  # fmt: skip
    tile = _tile(x, block_m, 1)
    _rows_product[(tiles * cdiv(C, tile["BLOCK_N"]),)](
        a,
        down,
        down_bias,
        y,
        starts,
        tile_expert,
        tile_row,
        C,
        F,
        F,
        1,
        down_bias is not None,
        _precision(),
        **tile,
    )
    _combine[(T, cdiv(C, 1024))](y, weights, row, out, C, K, WEIGHTED=True, BLOCK_C=1024, num_warps=4)
    return out, h


def _forward_fake(x, gate_up, down, weights, *rest):
    return torch.empty_like(x), x.new_empty(weights.numel() if rest[-1] else 0, gate_up.shape[1])


def _backward(
    dout: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    h: Tensor,
    rows: list[Tensor],
    activation: str,
    alpha: float,
    limit: float,
    block_m: int,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of x, gate_up, down, weights, gate_up_bias, down_bias; empty where not needed."""
    grads = _backward_fake(
        dout,
        x,
        gate_up,
        down,
        weights,
        gate_up_bias,
        down_bias,
        h,
        rows,
        activation,
        alpha,
        limit,
        block_m,
        needed,
    )
    dx, dgate_up, ddown, dweights, dgate_up_bias, ddown_bias = grads
    (T, C), (E, width, _), (T, K) = x.shape, gate_up.shape, weights.shape
    F = down.shape[2]
    if not x.numel() or not K:
        return [grad.zero_() for grad in grads]
    starts, row, choice, tile_expert, tile_row = rows
    tiles, precision = tile_expert.numel(), _precision()
    # the epilogue holds gate and up beside the accumulator, clamped ones twice
    tile = _tile(x, block_m, 4 if activation == "clamped_swiglu" else 2)
    blocks = cdiv(F, tile["BLOCK_N"])
    dh, wa = torch.empty_like(h), x.new_empty(T * K, F)
    partial = weights.new_zeros(T * K, blocks)  # zeros: a dropped choice has no row
    _activation_bwd[(tiles * blocks,)](
        dout, down, h, weights, dh, wa, partial, choice, starts, tile_expert, tile_row, K, C, F, alpha, limit,
        activation, precision, **tile,
    )  # fmt: skip
    tile = _tile(x, block_m, 1)
    if needed[0]:
        dxs = x.new_empty(T * K, C)
        _rows_product[(tiles * cdiv(C, tile["BLOCK_N"]),)](
            dh, gate_up, None, dxs, starts, tile_expert, tile_row, C, width, 1, C, False, precision, **tile
        )
        _combine[(T, cdiv(C, 1024))](dxs, None, row, dx, C, K, WEIGHTED=False, BLOCK_C=1024, num_warps=4)
    tile = _weight_tile(x)
    if needed[1] or needed[4]:
        grid = (E * cdiv(width, tile["BLOCK_N"]) * cdiv(C, tile["BLOCK_C"]),)
        dw = dgate_up if needed[1] else torch.empty_like(gate_up)
        _weight_bwd[grid](
            dh,
            x,
            dw,
            dgate_up_bias,
            weights,
            choice,
            starts,
            K,
            width,
            C,
            False,
            needed[4],
            precision,
            **tile,
        )
    if needed[2] or needed[5]:
        grid = (E * cdiv(C, tile["BLOCK_N"]) * cdiv(F, tile["BLOCK_C"]),)
        dw = ddown if needed[2] else torch.empty_like(down)
        _weight_bwd[grid](
            dout, wa, dw, ddown_bias, weights, choice, starts, K, C, F, True, needed[5], precision, **tile
        )
    if needed[3]:
        torch.sum(partial, 1, out=dweights.view(-1))
        if down_bias is not None:
            expert = torch.searchsorted(starts[1:], row, right=True).clamp_(max=E - 1)  # of each choice
            along = torch.mm(dout.float(), down_bias.float().t())  # (T, E)
            dweights += along.gather(1, expert.view(T, K)).masked_fill_(row.view(T, K) < 0, 0)
    return grads


def _backward_fake(
    dout,
    x,
    gate_up,
    down,
    weights,
    gate_up_bias,
    down_bias,
    h,
    rows,
    activation,
    alpha,
    limit,
    block_m,
    needed,
):
    inputs = (x, gate_up, down, weights, gate_up_bias, down_bias)
    return [
        torch.empty_like(t) if need and t is not None else x.new_empty(0)
        for t, need in zip(inputs, needed, strict=True)
    ]


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:11], output[1])
    ctx.numbers = inputs[11:-1]  # activation, alpha, limit, block_m
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout: Tensor | None, _dh: Tensor | None):
    none = (None,) * 16
    if dout is None:
        return none
    *saved, h = ctx.saved_tensors
    operands, rows = saved[:6], saved[6:]
    needed = list(ctx.needs_input_grad[:6])
    grads = _mlp_backward(dout.contiguous(), *operands, h, rows, *ctx.numbers, needed)
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *none[6:]


_mlp_backward = register("moe_mlp_backward", _backward, _backward_fake)
_mlp = register("moe_mlp", _forward, _forward_fake, _save, _differentiate)
_dispatched = register("moe_dispatch", _dispatch, _dispatch_fake)


# ---- public op


def moe_route(
    logits: Tensor,
    top_k: int,
    *,
    score: Literal["softmax", "sigmoid"] = "softmax",
    bias: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    renormalize: bool = False,
    scale: float = 1.0,
    capacity_factor: float | None = None,
) -> tuple[Tensor, Tensor, RouteStatistics]:
    """Choose top_k experts for each token. Top-k-then-softmax is softmax with renormalize: the same numbers.

    logits: (T, E); computed in fp32 (fp64 of fp64).
    score: what a logit is worth. softmax: over all experts.
    bias: (E,), added to the scores for the choice alone: the weights do not see it, and it has no gradient.
    groups: E is as many groups, only experts of the best top_groups are chosen. A group is worth its best expert
        (DeepSeek-V2), or with sigmoid the sum of its two best (DeepSeek-V3).
    renormalize: weights of a token sum to 1 (before scale).
    capacity_factor: each expert takes ceil(capacity_factor T K / E) choices, first choices first, then by token; what
        finds it full has weight 0 and index E, which moe_mlp passes over.
    Returns weights (T, K) fp32, indices (T, K) int64, most likely first, and RouteStatistics; the host reads nothing.
    Raises ValueError for numbers out of range and other shapes.
    """
    if logits.dim() != 2 or not 1 <= top_k <= logits.shape[1]:
        raise ValueError(
            f"logits: expected (tokens, experts >= top_k={top_k} >= 1), got {tuple(logits.shape)}"
        )
    E = logits.shape[1]
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"score: expected softmax or sigmoid, got {score!r}")
    if bias is not None:
        check_shape("bias", bias, experts=E)
    if groups < 1 or E % groups or not 1 <= top_groups <= groups or top_groups * (E // groups) < top_k:
        raise ValueError(
            f"groups, top_groups: expected a divisor of {E} experts, and enough of them to choose {top_k} from, "
            f"got {groups} and {top_groups}"
        )
    if capacity_factor is not None and not capacity_factor > 0:
        raise ValueError(f"capacity_factor: expected a positive number, got {capacity_factor}")
    return moe_route_reference(
        logits,
        top_k,
        score=score,
        bias=bias,
        groups=groups,
        top_groups=top_groups,
        renormalize=renormalize,
        scale=scale,
        capacity_factor=capacity_factor,
    )


def moe_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    indices: Tensor,
    *,
    activation: Activation = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Tensor:
    """Each token through its experts, weighted and summed: the formula at the top of this file. Dropless.

    x: (T, C)    gate_up: (E, 2F, C), the gate's rows first; (E, F, C) for relu2    down: (E, C, F). One dtype.
    weights: (T, K) floating point    indices: (T, K) int32 or int64; a choice outside of 0..E-1 is passed over.
    gate_up_bias: (E, 2F), (E, F) for relu2    down_bias: (E, C)    alpha, limit: of clamped_swiglu.
    Returns (T, C) in x's dtype. Differentiable in all but indices; frozen experts cost no weight gradient.
    Raises ValueError for shapes and dtypes other than these.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if x.dim() != 2 or down.dim() != 3 or weights.dim() != 2:
        got = ", ".join(str(tuple(t.shape)) for t in (x, down, weights))
        raise ValueError(f"x, down, weights: expected (T, C), (E, C, F), (T, K), got {got}")
    (T, C), (E, _, F), K = x.shape, down.shape, weights.shape[1]
    width = F if activation == "relu2" else 2 * F
    check_shape("gate_up", gate_up, experts=E, width=width, hidden=C)
    check_shape("down", down, experts=E, hidden=C, ffn=F)
    check_shape("weights", weights, tokens=T, top_k=K)
    check_shape("indices", indices, tokens=T, top_k=K)
    check_dtype("indices", indices, torch.int32, torch.int64)
    for name, bias, size in (("gate_up_bias", gate_up_bias, width), ("down_bias", down_bias, C)):
        if bias is not None:
            check_shape(name, bias, experts=E, width=size)
            check_dtype(name, bias, x.dtype)
    check_dtype("gate_up", gate_up, x.dtype)
    check_dtype("down", down, x.dtype)
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    if not use_triton(x):
        return _mlp_cpu(x, gate_up, down, weights, indices, activation, gate_up_bias, down_bias, alpha, limit)
    check_dtype("x", x)
    operands = (x, gate_up, down, weights.float(), gate_up_bias, down_bias)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    operands = [None if t is None else t.contiguous() for t in operands]
    block_m = _block_m(T * K, E)
    if x.dtype == torch.float32:
        block_m = min(block_m, 64)
    rows = _dispatched(indices.contiguous(), E, block_m)
    out, _ = _mlp(*operands, *rows, activation, alpha, limit, block_m, save)
    return out
