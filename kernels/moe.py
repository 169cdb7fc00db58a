"""Mixture of experts: which experts each token goes to, and the feed-forward layers that run there.

    moe_route     s = softmax(z) or sigmoid(z)        indices = the K largest of z or s + bias        w = s[indices]
    moe_mlp       out_t = sum over k of w_tk E_i(x_t), i = indices_tk        E(x) = act(x W_gu^T + b_gu) W_d^T + b_d

    act: swiglu silu(g) u; clamped_swiglu (min(g, limit) sigmoid(alpha g)) (clamp(u) + 1); relu2 max(u, 0)^2
    balance = E sum_e (tokens that chose e / T) (mean of e's probability)        z_loss = mean of logsumexp(z)^2

    dA = w dout W_d        dW_d = dout^T (w A)        dw_tk = (dout W_d) . A + dout . b_d
    dH = dA act'(H)        dW_gu = dH^T x             dx_t = sum over k of dH W_gu

    adapters: W_gu + B_gu A_gu and W_d + B_d A_d, never added up: H gets S B_gu^T, S = x A_gu^T, Y likewise
    dB_gu = dH^T S         dA_gu = (dH B_gu)^T x      dB_d = dout^T (w A A_d^T)      dA_d = (dout B_d)^T (w A)

The rows (a token with one of its experts) are sorted by expert. Nothing is read on the host: grids have the size of
their upper bound, T K / BLOCK_M + E tiles, and the tiles past the end return at once. x is gathered by the load of the
product's operand; the products' rows lie contiguously by expert; the sum over k gathers, so there are no atomics. H,
the pre-activation, is saved, A is computed again from it in the backward, and dw is a row sum there. Experts in 4 bits
are multiplied out before the products, in the forward and again in the backward, and saved in 4 bits. See docs/moe.md.

Operations: 6 T K C F forward, 12 T K C F backward. Memory beside the operands, in elements: forward writes H and A
(3 T K F) and the experts' outputs (T K C); backward dH and w A (3 T K F) and dX (T K C). Adapters of rank R add
2 T K R (2C + 3F) operations forward, twice that backward, and save T K R.

Source: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538; Switch, https://arxiv.org/abs/2101.03961, eq. 4-6;
        z-loss, https://arxiv.org/abs/2202.08906, eq. 5; sigmoid router with bias and groups: DeepSeek-V3,
        https://arxiv.org/abs/2412.19437, eq. 12-16; clamped SwiGLU: gpt-oss, https://arxiv.org/abs/2508.10925;
        ReLU^2: Primer, https://arxiv.org/abs/2109.08668
"""

# A launch passes numbers where the kernel is annotated tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._chip import (
    FLOATS,
    capability,
    cdiv,
    check_device,
    check_dtype,
    check_number,
    check_shape,
    next_power_of_2,
    precision,
    use_triton,
    without_autocast,
)
from ._op import register, register_path
from ._triton import tl, triton
from .nf4 import dense_of
from .plain.nf4 import unnested
from .records import NF4Weight, Weight

Activation = Literal["swiglu", "clamped_swiglu", "relu2"]
ACTIVATIONS: tuple[Activation, ...] = ("swiglu", "clamped_swiglu", "relu2")


class RouteStatistics(NamedTuple):
    """What a router says beside its choice. Counted before a capacity drops anything."""

    balance: Tensor  # (), differentiable; K where the load is even
    z_loss: Tensor  # (), differentiable
    counts: Tensor  # (E,) int64, how many tokens chose each expert
    dropped: Tensor  # () int64, how many choices found their expert full
    probability: Tensor  # (E,), differentiable: each expert's, a mean over the tokens


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
    mean_share = share.sum(0) / tokens  # (E,)
    balance = E * (counts.to(z.dtype) / tokens * mean_share).sum()
    z_loss = z.logsumexp(-1).square().sum() / tokens
    dropped = counts.new_zeros(())
    if capacity_factor is not None:
        capacity = math.ceil(min(capacity_factor, E) * T * top_k / E)  # E: every choice of one expert
        full = _place_in_expert(indices, E) >= capacity
        indices, weights = indices.masked_fill(full, E), weights.masked_fill(full, 0)
        dropped = full.sum()
    return weights, indices, RouteStatistics(balance, z_loss, counts, dropped, mean_share)


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
    W_gu, W_d = (dense_of(Weight.of(w), x.dtype) for w in (gate_up, down))
    W_gu = W_gu if gate_up_a is None or gate_up_b is None else W_gu + gate_up_b @ gate_up_a
    W_d = W_d if down_a is None or down_b is None else W_d + down_b @ down_a
    out = torch.zeros_like(x)
    for e in range(W_gu.shape[0]):
        h = F.linear(x, W_gu[e], None if gate_up_bias is None else gate_up_bias[e])
        a = _activate(h, activation, alpha, limit)
        y = F.linear(a, W_d[e], None if down_bias is None else down_bias[e])
        weight = (weights * (indices == e)).sum(1, keepdim=True)  # (T, 1), zero where the token is elsewhere
        out = out + weight.to(x.dtype) * y
    return out


def _activate(h: Tensor, activation: str, alpha: float, limit: float) -> Tensor:
    """(rows, 2F), or (rows, F) for relu2, to (rows, F)."""
    if activation == "relu2":
        return h.relu().square()
    gate, up = h.chunk(2, -1)
    if activation == "swiglu":
        return F.silu(gate) * up
    gate = torch.where(gate > limit, limit, gate)  # clamp gives NaN the gradient 0
    up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
    return (up + 1) * (gate * (alpha * gate).sigmoid())


# ---- CPU path


@without_autocast  # in x's dtype, as the kernels
def _mlp_cpu(
    x: Tensor,
    gate_up: Tensor | NF4Weight,
    down: Tensor | NF4Weight,
    weights: Tensor,
    indices: Tensor,
    activation: str,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_up_a: Tensor | None,
    gate_up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
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
    first = _apart(gate_up, gate_up_bias, gate_up_a, gate_up_b)
    second = _apart(down, down_bias, down_a, down_b)
    parts = [
        _expert_linear(_activate(_expert_linear(rows, *first[e]), activation, alpha, limit), *second[e])
        for e, rows in enumerate(x[order // K].split(counts))
        if rows.shape[0] or e == 0  # one at least: what no token reaches has a gradient, of zeros
    ]
    y = torch.cat(parts)
    y = y.new_zeros(T * K, C).index_copy(0, order, y).view(T, K, C)
    return (y.to(weights.dtype) * weights[..., None]).sum(1).to(x.dtype)


def _apart(weight: Tensor | NF4Weight, *others: Tensor | None) -> list[tuple[Any, ...]]:
    """For each expert its weight and the others."""
    E = weight.shape[0]
    # unbind, not [e]: the backward of each [e] would fill a gradient of all experts
    weights = weight.unbind() if isinstance(weight, Tensor) else _apart_4bit(weight)
    return [*zip(weights, *([None] * E if t is None else t.unbind() for t in others), strict=True)]


def _apart_4bit(weight: NF4Weight) -> list[NF4Weight]:
    E = weight.shape[0]
    absmax = unnested(weight).view(E, -1)
    packed = weight.packed.view(E, -1)
    return [
        NF4Weight(packed[e], absmax[e], weight.code, weight.shape[1:], weight.dtype, weight.blocksize)
        for e in range(E)
    ]


class _FourBitLinear(torch.autograd.Function):
    """What is kept for the backward is the weight in its 4 bits."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, NF4Weight], output: Tensor) -> None:
        ctx.weight = inputs[1]

    @staticmethod
    def forward(x: Tensor, weight: NF4Weight) -> Tensor:
        return F.linear(x, dense_of(Weight.of(weight), x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ dense_of(Weight.of(ctx.weight), dy.dtype), None


def _expert_linear(
    x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, a: Tensor | None, b: Tensor | None
) -> Tensor:
    if isinstance(weight, Tensor):
        y = F.linear(x, weight, bias)
    else:
        y = _FourBitLinear.apply(x, weight)
        y = y if bias is None else y + bias
    return y if a is None or b is None else y + F.linear(F.linear(x, a), b)


def _mlp_path(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_up_a: Tensor | None,
    gate_up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    gate_up_absmax: Tensor | None,
    gate_up_code: Tensor | None,
    gate_up_nested_absmax: Tensor | None,
    gate_up_nested_code: Tensor | None,
    gate_up_offset: Tensor | None,
    down_absmax: Tensor | None,
    down_code: Tensor | None,
    down_nested_absmax: Tensor | None,
    down_nested_code: Tensor | None,
    down_offset: Tensor | None,
    blocksizes: list[int],
    sizes: list[int],
    indices: Tensor,
    activation: str,
    alpha: float,
    limit: float,
) -> Tensor:
    """`_mlp_cpu` with the arguments of `_forward`. sizes: E, the width of H, and F."""
    (E, width, F), C = sizes, x.shape[1]
    first = gate_up_absmax, gate_up_code, gate_up_nested_absmax, gate_up_nested_code, gate_up_offset
    second = down_absmax, down_code, down_nested_absmax, down_nested_code, down_offset
    held = ((gate_up, first, blocksizes[0], (E, width, C)), (down, second, blocksizes[1], (E, C, F)))
    experts = (
        NF4Weight(weight, *rest[:2], shape, x.dtype, size, *rest[2:]) if size else weight
        for weight, rest, size, shape in held
    )
    others = gate_up_bias, down_bias, gate_up_a, gate_up_b, down_a, down_b
    return _mlp_cpu(x, *experts, weights, indices, activation, *others, alpha, limit)


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
    expert = tl.load(indices_ptr + n, n < N, other=-1)
    kept = (expert >= 0) & (expert < E)  # before it is cut to 32 bits: 2^40 is no expert 0
    expert = tl.where(kept, expert, -1).to(tl.int32)
    cell = expert * BLOCKS + tl.program_id(0)
    before = tl.load(ends_ptr + cell, kept, other=0) - tl.load(counts_ptr + cell, kept, other=0)
    others = tl.load(indices_ptr + tl.program_id(0) * BLOCK_N + i, n < N, other=-1)
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
    x_ptr, w_ptr, bias_ptr, s_ptr, b_ptr, h_ptr, a_ptr, choice_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr,
    K, C, F, R, alpha, limit,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
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
    if RANK:
        for first in range(0, R, RANK):
            r = first + tl.arange(0, RANK)
            s = tl.load(
                s_ptr + rows[:, None].to(tl.int64) * R + r[None, :],
                live[:, None] & (r < R)[None, :],
                other=0.0,
            )
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
    a_ptr, w_ptr, bias_ptr, s_ptr, b_ptr, out_ptr, choice_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr,
    TOP_K, N, K, R, w_row, w_column, b_row, b_column,
    BIAS: tl.constexpr, RANK: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = a W^T + s B^T + bias, each row with the weights (N, K) and (N, R) of its expert, by their strides.

    With GATHER a's rows are by token. RANK: a step through R, 0 without s and B.
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
    dout_ptr, w_ptr, p_ptr, lora_a_ptr, h_ptr, weights_ptr, dh_ptr, wa_ptr, partial_ptr, choice_ptr, starts_ptr,
    tile_expert_ptr, tile_row_ptr, K, C, F, R, alpha, limit,
    ACTIVATION: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
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
    if RANK:  # p = dout B_d
        for first in range(0, R, RANK):
            r = first + tl.arange(0, RANK)
            p = tl.load(
                p_ptr + rows[:, None].to(tl.int64) * R + r[None, :],
                live[:, None] & (r < R)[None, :],
                other=0.0,
            )
            offsets = r[:, None].to(tl.int64) * F + cols[None, :]
            low = tl.load(
                lora_a_ptr + expert * R * F + offsets, (r < R)[:, None] & (cols < F)[None, :], other=0.0
            )
            acc = tl.dot(p, low, acc, input_precision=PRECISION)
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
    GATHER_P: tl.constexpr, GATHER_Q: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dW (N, C) = p^T q over the rows of each expert; what is gathered is by token.

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
        M, N, K, warps, stages = min(block_m, 64), 64 // accumulators, 32, 4, 2
    elif block_m < 64:
        M, N, K, warps, stages = block_m, 128 // accumulators, 64, 4, 3
    else:
        M, N, K, warps, stages = block_m, 128 // accumulators, 64, 8, 3 if capability(x) != (9, 4) else 2
    return {"BLOCK_M": M, "BLOCK_N": N, "BLOCK_K": K, "num_warps": warps, "num_stages": stages}


def _weight_tile(x: Tensor, N: int, C: int) -> dict[str, int]:
    """Of a product (N, C), either of which may be a rank."""
    most = 64 if x.dtype == torch.float32 else 128
    tile = {"BLOCK_N": min(most, _covering(N)), "BLOCK_C": min(most, _covering(C))}
    if x.dtype == torch.float32:
        return {"BLOCK_R": 32, **tile, "num_warps": 4, "num_stages": 2}
    stages = 3 if capability(x) != (9, 4) else 2
    return {"BLOCK_R": 64, **tile, "num_warps": 8 if min(N, C) > 64 else 4, "num_stages": stages}


def _rank_tile(x: Tensor, block_m: int, R: int) -> dict[str, int]:
    """Of a product whose result is R wide."""
    tile = _tile(x, block_m, 1)
    return tile | {"BLOCK_N": min(tile["BLOCK_N"], _covering(R))}


def _rank_step(x: Tensor, R: int) -> int:
    """Of the loop over R in a kernel that adds an adapter."""
    return min(32 if x.dtype == torch.float32 else 64, _covering(R))


def _covering(size: int) -> int:
    """A block for a dimension that may be small; 16 is the least that tl.dot takes."""
    return max(16, next_power_of_2(size))


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
    gate_up_a: Tensor | None,
    gate_up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    gate_up_absmax: Tensor | None,
    gate_up_code: Tensor | None,
    gate_up_nested_absmax: Tensor | None,
    gate_up_nested_code: Tensor | None,
    gate_up_offset: Tensor | None,
    down_absmax: Tensor | None,
    down_code: Tensor | None,
    down_nested_absmax: Tensor | None,
    down_nested_code: Tensor | None,
    down_offset: Tensor | None,
    blocksizes: list[int],
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous inputs, weights fp32. Returns out (T, C), H (T K, 2F or F), S (T K, R); H and S empty unless save.

    *_absmax to *_offset: what NF4Weight holds beside the packed bytes, which gate_up and down then are; blocksizes: of
    both, 0 where they are dense. Single arguments, for autograd takes a list of tensors for differentiable.
    """
    four_bit = [gate_up_absmax, gate_up_code, gate_up_nested_absmax, gate_up_nested_code, gate_up_offset,
        down_absmax, down_code, down_nested_absmax, down_nested_code, down_offset]  # fmt: skip
    rows = [starts, row, choice, tile_expert, tile_row]
    out, h, s = _kept(x, gate_up, down, weights, gate_up_a, blocksizes, rows, activation, save)
    (T, C), K = x.shape, weights.shape[1]
    E, width, F = _sizes(x, gate_up, down, rows, blocksizes, activation)
    if not out.numel() or not K:
        return out.zero_(), h, s
    gate_up, down = _dense(x, gate_up, down, E, width, F, four_bit, blocksizes)
    places, tiles, rounding = (choice, starts, tile_expert, tile_row), tile_expert.numel(), precision()
    a, y = x.new_empty(T * K, F), x.new_empty(T * K, C)
    R = 0 if gate_up_a is None else gate_up_a.shape[1]
    if gate_up_a is not None:
        s = s if save else x.new_empty(T * K, R)
        _product(x, gate_up_a, s, rows, block_m, K, gather=True)
    tile = _tile(x, block_m, 2)
    _up_fwd[(tiles * cdiv(F, tile["BLOCK_N"]),)](
        x, gate_up, gate_up_bias, s, gate_up_b, h, a, *places, K, C, F, R, alpha, limit,
        activation, gate_up_bias is not None, _rank_step(x, R) if R else 0, save, rounding, **tile,
    )  # fmt: skip
    low = None
    if down_a is not None:
        low = x.new_empty(T * K, down_a.shape[1])
        _product(a, down_a, low, rows, block_m, K)
    _product(a, down, y, rows, block_m, K, bias=down_bias, low=low, up=down_b)
    _combine[(T, cdiv(C, 1024))](y, weights, row, out, C, K, WEIGHTED=True, BLOCK_C=1024, num_warps=4)
    return out, h, s if save else s.new_empty(0, R)


def _forward_fake(x, gate_up, down, weights, _bias, _other_bias, gate_up_a, *rest):
    blocksizes, *rows, activation, _alpha, _limit, _block_m, save = rest[13:]
    return _kept(x, gate_up, down, weights, gate_up_a, blocksizes, rows, activation, save)


def _kept(x, gate_up, down, weights, gate_up_a, blocksizes, rows, activation, save):
    """out, H and S."""
    kept = weights.numel() if save else 0
    width = _sizes(x, gate_up, down, rows, blocksizes, activation)[1]
    R = 0 if gate_up_a is None else gate_up_a.shape[1]
    return torch.empty_like(x), x.new_empty(kept, width), x.new_empty(kept if R else 0, R)


def _sizes(x, gate_up, down, rows, blocksizes, activation) -> tuple[int, int, int]:
    """E, the width of H, and F."""
    if not blocksizes[1]:
        E, _, F = down.shape
    else:
        E = rows[0].shape[0] - 1
        F = 2 * down.numel() // (E * x.shape[1])
    return E, F if activation == "relu2" else 2 * F, F


def _dense(
    x: Tensor, gate_up: Tensor, down: Tensor, E: int, width: int, F: int, four_bit: list[Tensor | None],
    blocksizes: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both weights of all experts in x's dtype, those in 4 bits multiplied out: one launch each, freed after the op."""
    C = x.shape[1]
    held = (
        (gate_up, four_bit[:5], [E, width, C], blocksizes[0]),
        (down, four_bit[5:], [E, C, F], blocksizes[1]),
    )
    first, second = (
        dense_of(Weight(packed, *rest, shape, blocksize), x.dtype) for packed, rest, shape, blocksize in held
    )
    return first, second


def _product(
    a: Tensor,
    weight: Tensor,
    out: Tensor,
    rows: list[Tensor],
    block_m: int,
    top_k: int,
    *,
    transposed: bool = False,
    gather: bool = False,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
) -> None:
    """out = a W^T + low U^T + bias, W (E, N, K) and U (E, N, R), or transposed. gather: a is by token."""
    starts, _, choice, tile_expert, tile_row = rows
    N, K, R = out.shape[1], a.shape[1], 0 if low is None else low.shape[1]
    strides = (1, N, 1, N) if transposed else (K, 1, R, 1)
    tile = _tile(a, block_m, 1) if N > 64 else _rank_tile(a, block_m, N)
    _rows_product[(tile_expert.numel() * cdiv(N, tile["BLOCK_N"]),)](
        a, weight, bias, low, up, out, choice, starts, tile_expert, tile_row, top_k, N, K, R, *strides,
        bias is not None, _rank_step(a, R) if R else 0, gather, precision(), **tile,
    )  # fmt: skip


def _backward(
    dout: Tensor,
    operands: list[Tensor | None],
    four_bit: list[Tensor | None],
    blocksizes: list[int],
    h: Tensor,
    s: Tensor,
    rows: list[Tensor],
    activation: str,
    alpha: float,
    limit: float,
    block_m: int,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of the ten operands of _forward, in their order; empty where not needed."""
    grads = _backward_fake(
        dout, operands, four_bit, blocksizes, h, s, rows, activation, alpha, limit, block_m, needed
    )
    dx, dgate_up, ddown, dweights, dgate_up_bias, ddown_bias, dgate_up_a, dgate_up_b, ddown_a, ddown_b = grads
    x, gate_up, down, weights, _, down_bias, gate_up_a, gate_up_b, down_a, down_b = operands
    assert x is not None and gate_up is not None and down is not None and weights is not None
    (T, C), (T, K) = x.shape, weights.shape
    if not x.numel() or not K:
        return [grad.zero_() for grad in grads]
    E, width, F = _sizes(x, gate_up, down, rows, blocksizes, activation)
    gate_up, down = _dense(x, gate_up, down, E, width, F, four_bit, blocksizes)
    starts, row, choice, tile_expert, tile_row = rows
    tiles, rounding = tile_expert.numel(), precision()

    def weight_grad(p: Tensor, q: Tensor, dw: Tensor, db: Tensor | None, by_token: str) -> None:
        N, width = p.shape[1], q.shape[1]
        tile = _weight_tile(x, N, width)
        _weight_bwd[(E * cdiv(N, tile["BLOCK_N"]) * cdiv(width, tile["BLOCK_C"]),)](
            p, q, dw, db, weights, choice, starts, K, N, width,
            by_token == "p", by_token == "q", db is not None, rounding, **tile,
        )  # fmt: skip

    # the epilogue holds gate and up beside the accumulator, clamped ones twice
    tile = _tile(x, block_m, 4 if activation == "clamped_swiglu" else 2)
    blocks = cdiv(F, tile["BLOCK_N"])
    dh, wa = x.new_empty(T * K, width), x.new_empty(T * K, F)
    partial = weights.new_zeros(T * K, blocks)  # zeros: a dropped choice has no row
    p, R = None, 0  # dout B_d
    if down_a is not None and down_b is not None:
        R = down_a.shape[1]
        p = x.new_empty(T * K, R)
        _product(dout, down_b, p, rows, block_m, K, transposed=True, gather=True)
    _activation_bwd[(tiles * blocks,)](
        dout, down, p, down_a, h, weights, dh, wa, partial, choice, starts, tile_expert, tile_row, K, C, F, R, alpha,
        limit, activation, _rank_step(x, R) if R else 0, rounding, **tile,
    )  # fmt: skip
    ds = None
    if gate_up_b is not None and (needed[0] or needed[6]):
        ds = x.new_empty(T * K, gate_up_b.shape[2])
        _product(dh, gate_up_b, ds, rows, block_m, K, transposed=True)
    if needed[0]:
        dxs = x.new_empty(T * K, C)
        _product(dh, gate_up, dxs, rows, block_m, K, transposed=True, low=ds, up=gate_up_a)
        _combine[(T, cdiv(C, 1024))](dxs, None, row, dx, C, K, WEIGHTED=False, BLOCK_C=1024, num_warps=4)
    if needed[1] or needed[4]:
        dw = dgate_up if needed[1] else torch.empty_like(gate_up)
        weight_grad(dh, x, dw, dgate_up_bias if needed[4] else None, by_token="q")
    if needed[2] or needed[5]:
        dw = ddown if needed[2] else torch.empty_like(down)
        weight_grad(dout, wa, dw, ddown_bias if needed[5] else None, by_token="p")
    if needed[3]:
        torch.sum(partial, 1, out=dweights.view(-1))
        if down_bias is not None:
            expert = torch.searchsorted(starts[1:], row, right=True).clamp_(max=E - 1)  # of each choice
            along = torch.mm(dout.float(), down_bias.float().t())  # (T, E)
            dweights += along.gather(1, expert.view(T, K)).masked_fill_(row.view(T, K) < 0, 0)
    if needed[6]:
        assert ds is not None
        weight_grad(ds, x, dgate_up_a, None, by_token="q")
    if needed[7]:
        weight_grad(dh, s, dgate_up_b, None, by_token="")
    if needed[8]:
        assert p is not None
        weight_grad(p, wa, ddown_a, None, by_token="")
    if needed[9]:
        assert down_a is not None
        low = x.new_empty(T * K, R)
        _product(wa, down_a, low, rows, block_m, K)
        weight_grad(dout, low, ddown_b, None, by_token="p")
    return grads


def _backward_fake(
    dout, operands, four_bit, blocksizes, h, s, rows, activation, alpha, limit, block_m, needed
):  # fmt: skip
    return [
        torch.empty_like(t) if need and t is not None else dout.new_empty(0)
        for t, need in zip(operands, needed, strict=True)
    ]


def _save(ctx, inputs, output):
    tensors, blocksizes, rows, numbers = inputs[:20], inputs[20], inputs[21:26], inputs[26:30]
    _out, h, s = output
    ctx.save_for_backward(*tensors, *rows, h, s)
    ctx.blocksizes, ctx.numbers = blocksizes, numbers
    ctx.mark_non_differentiable(h, s)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout: Tensor | None, _dh: Tensor | None, _ds: Tensor | None):
    none = (None,) * 31
    if dout is None:
        return none
    *saved, h, s = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:10])
    grads = _mlp_backward(
        dout.contiguous(), saved[:10], saved[10:20], ctx.blocksizes, h, s, saved[20:], *ctx.numbers, needed
    )
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *none[10:]


_mlp_backward = register("moe_mlp_backward", _backward, _backward_fake)
_mlp = register("moe_mlp", _forward, _forward_fake, _save, _differentiate)
_dispatched = register("moe_dispatch", _dispatch, _dispatch_fake)
_mlp_on_cpu = register_path("moe_mlp_cpu", _mlp_path, lambda x, *_: torch.empty_like(x))


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
        finds it full has weight 0 and index E, which moe_mlp passes over. Infinite: nothing is dropped.
    Returns weights (T, K) fp32, indices (T, K) int64, most likely first, and RouteStatistics; the host reads nothing.
    A token with NaN among its logits has NaN among its weights, and indices of experts that are there.
    Raises ValueError for numbers out of range, other shapes and dtypes, and tensors on two devices.
    """
    if logits.dim() != 2 or not 1 <= top_k <= logits.shape[1]:
        raise ValueError(
            f"logits: expected (tokens, experts >= top_k={top_k} >= 1), got {tuple(logits.shape)}"
        )
    E = logits.shape[1]
    check_dtype("logits", logits, *FLOATS)
    check_device(logits, bias=bias)
    check_number("scale", scale)
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"score: expected softmax or sigmoid, got {score!r}")
    if bias is not None:
        check_shape("bias", bias, experts=E)
        check_dtype("bias", bias, *FLOATS)
    if groups < 1 or E % groups or not 1 <= top_groups <= groups or top_groups * (E // groups) < top_k:
        raise ValueError(
            f"groups, top_groups: expected a divisor of {E} experts, and enough of them to choose {top_k} from, "
            f"got {groups} and {top_groups}"
        )
    if capacity_factor is not None and not capacity_factor > 0:
        raise ValueError(f"capacity_factor: expected a positive number, got {capacity_factor}")
    return moe_route_reference(
        logits, top_k, score=score, bias=bias, groups=groups, top_groups=top_groups, renormalize=renormalize,
        scale=scale, capacity_factor=capacity_factor,
    )  # fmt: skip


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
    """Each token through its experts, weighted and summed: the formula at the top of this file. Dropless.

    x: (T, C)    gate_up: (E, 2F, C), the gate's rows first; (E, F, C) for relu2    down: (E, C, F). In x's dtype; or
        in 4 bits, each expert a whole number of blocks, and frozen.
    weights: (T, K) floating point    indices: (T, K) int32 or int64; a choice outside of 0..E-1 is passed over.
    gate_up_bias: (E, 2F), (E, F) for relu2    down_bias: (E, C)    alpha, limit: of clamped_swiglu.
    gate_up_a, gate_up_b: (E, R, C) and (E, 2F, R)    down_a, down_b: (E, R, F) and (E, C, R), adapters: each expert's
        weight is W + B A. A scaling is multiplied into B before. Their ranks may differ; computed in x's dtype.
    Returns (T, C) in x's dtype. Differentiable in all but indices; frozen experts cost no weight gradient.
    Raises ValueError for shapes and dtypes other than these, for tensors on several devices, for an alpha that is not
    finite and a limit below 0.
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
    check_device(
        x, weights=weights, indices=indices, gate_up_bias=gate_up_bias, down_bias=down_bias, gate_up_a=gate_up_a,
        gate_up_b=gate_up_b, down_a=down_a, down_b=down_b,
    )  # fmt: skip
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
    wide = torch.float32 if use_triton(x) else torch.promote_types(weights.dtype, torch.float32)
    others = gate_up_bias, down_bias, gate_up_a, gate_up_b, down_a, down_b
    held = [(w, None) if isinstance(w, Tensor) else (w.packed, w) for w in (gate_up, down)]
    four_bit = [t for _, w in held for t in ((None,) * 5 if w is None else w.tensors()[1:])]
    blocksizes = [0 if w is None else w.blocksize for _, w in held]
    operands = (x, *(packed for packed, _ in held), weights.to(wide), *others)
    if not use_triton(x):
        options = (indices, activation, alpha, limit)
        return _mlp_on_cpu(*operands, *four_bit, blocksizes, [E, width, F], *options)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    operands = [None if t is None else t.contiguous() for t in operands]
    block_m = _block_m(T * K, E)
    if x.dtype == torch.float32:
        block_m = min(block_m, 64)
    rows = _dispatched(indices.contiguous(), E, block_m)
    out, _, _ = _mlp(*operands, *four_bit, blocksizes, *rows, activation, alpha, limit, block_m, save)
    return out


def _check_experts(name: str, weight: Tensor | NF4Weight, x: Tensor, **dims: int) -> None:
    check_shape(name, weight, **dims)
    check_device(x, **{name: weight if isinstance(weight, Tensor) else weight.packed})
    if isinstance(weight, Tensor):
        return check_dtype(name, weight, x.dtype)
    one = weight.numel // max(weight.shape[0], 1)
    if one % weight.blocksize:
        raise ValueError(
            f"{name}: expected each expert a whole number of blocks of {weight.blocksize}, got {one} weights an expert"
        )


def _adapter(
    name: str, a: Tensor | None, b: Tensor | None, dtype: torch.dtype, E: int, C: int, N: int
) -> tuple[Tensor | None, Tensor | None]:
    """In x's dtype. C in, N out."""
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
