"""The router of a mixture of experts. It chooses the experts of each token, and sorts the choices by expert.

    s = softmax(z) or sigmoid(z)        indices = the K largest of z or s + bias        w = s[indices]

    balance = E sum_e (tokens that chose e / T) (mean of e's probability)        z_loss = mean of logsumexp(z)^2

    row of a choice = choices of earlier experts + earlier choices of its expert        token of a row = its choice // K

The router is plain torch on every device, and kernels sort its choices. The host reads no tensor. See docs/moe.md.

Memory, in elements: the router writes and reads (T, E) in fp32 a few times, which is little beside the products of the
experts. Sorting writes 2 T K + T K E / 128 integers. The second term counts each expert in each block of 128 choices.

Source: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538; Switch, https://arxiv.org/abs/2101.03961, eq. 4-6;
        z-loss, https://arxiv.org/abs/2202.08906, eq. 5; sigmoid router with bias and groups: DeepSeek-V3,
        https://arxiv.org/abs/2412.19437, eq. 12-16
"""

# A launch passes numbers where the kernel is annotated tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ._chip import FLOATS, cdiv, check_device, check_dtype, check_number, check_shape
from ._op import make_op
from ._triton import tl, triton


class RouteStatistics(NamedTuple):
    """The statistics of a router. All fields but `dropped` are counted before any choice is dropped."""

    balance: Tensor  # (), differentiable; K if the load is even
    z_loss: Tensor  # (), differentiable
    counts: Tensor  # (E,) int64, how many tokens chose each expert
    dropped: Tensor  # () int64, how many choices found their expert full
    probability: Tensor  # (E,), differentiable: the mean probability of each expert over the tokens


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

    # the choice, which has no gradient
    chosen_by = (z if score == "softmax" and bias is None else probability).detach()
    if bias is not None:
        chosen_by = chosen_by + bias.to(z.dtype)
    if groups > 1:
        members = chosen_by.view(T, groups, E // groups)
        best = (
            members.topk(min(2, E // groups), -1).values.sum(-1) if score == "sigmoid" else members.amax(-1)
        )
        open_groups = torch.zeros_like(best, dtype=torch.bool)
        open_groups.scatter_(1, best.topk(top_groups, -1).indices, True)
        chosen_by = members.masked_fill(~open_groups[..., None], -torch.inf).flatten(1)
    indices = chosen_by.topk(top_k, -1).indices  # (T, K)

    weights = probability.gather(1, indices)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights * scale

    # the load of the experts
    counts = _counts(indices, E)
    share = probability if score == "softmax" else probability / (probability.sum(-1, keepdim=True) + 1e-20)
    tokens = max(T, 1)
    mean_share = share.sum(0) / tokens  # (E,)
    balance = E * (counts.to(z.dtype) / tokens * mean_share).sum()
    z_loss = z.logsumexp(-1).square().sum() / tokens

    # drop the choices that exceed the capacity of their expert
    dropped = counts.new_zeros(())
    if capacity_factor is not None:
        capacity = math.ceil(min(capacity_factor, E) * T * top_k / E)  # E: room for every choice
        full = _place_in_expert(indices, E) >= capacity
        indices, weights = indices.masked_fill(full, E), weights.masked_fill(full, 0)
        dropped = full.sum()
    return weights, indices, RouteStatistics(balance, z_loss, counts, dropped, mean_share)


def _counts(indices: Tensor, E: int) -> Tensor:
    """Return (E,) int64: how many choices name each expert. Unlike bincount, it reads no number on the host."""
    ids = indices.flatten().sort().values
    experts = torch.arange(E + 1, device=indices.device, dtype=ids.dtype)
    return torch.searchsorted(ids, experts).diff()


def _place_in_expert(indices: Tensor, E: int) -> Tensor:
    """Return (T, K): for each choice, the number of earlier choices of the same expert.

    All first choices count as earlier than all second choices, and so on.
    """
    by_choice = indices.t().flatten()  # (K T,)
    ids, order = by_choice.sort(stable=True)
    starts = torch.searchsorted(ids, torch.arange(E, device=ids.device, dtype=ids.dtype))
    place = torch.empty_like(ids)
    place[order] = torch.arange(ids.numel(), device=ids.device) - starts[ids]
    return place.view(indices.shape[1], -1).t()


# ---- kernels

# fmt: off


@triton.jit
def _histogram(indices_ptr, counts_ptr, N, E, BLOCKS, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """Write counts (E, BLOCKS): how often each block of BLOCK_N choices names each expert."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.load(indices_ptr + n, n < N, other=-1)
    for first in range(0, E, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        count = tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)  # [BLOCK_E]
        tl.store(counts_ptr + e * BLOCKS + tl.program_id(0), count, e < E)


@triton.jit
def _scatter(indices_ptr, counts_ptr, ends_ptr, row_ptr, choice_ptr, N, E, BLOCKS, BLOCK_N: tl.constexpr):
    """Write the row of each choice, and the choice of each row.

    A choice's row is the sum of three counts: the choices of earlier experts, the choices of its own expert in earlier
    blocks, and the choices of its own expert before it in its block.
    """
    i = tl.arange(0, BLOCK_N)
    n = tl.program_id(0) * BLOCK_N + i
    expert = tl.load(indices_ptr + n, n < N, other=-1)
    kept = (expert >= 0) & (expert < E)  # checked before the cast to 32 bits, which turns 2^40 into 0
    expert = tl.where(kept, expert, -1).to(tl.int32)

    cell = expert * BLOCKS + tl.program_id(0)
    before = tl.load(ends_ptr + cell, kept, other=0) - tl.load(counts_ptr + cell, kept, other=0)
    # the same ids again, along the other axis of the comparison
    block = tl.load(indices_ptr + tl.program_id(0) * BLOCK_N + i, n < N, other=-1)
    earlier = (expert[:, None] == block[None, :]) & (i[None, :] < i[:, None])  # [BLOCK_N, BLOCK_N]
    row = before + tl.sum(earlier.to(tl.int32), 1)
    tl.store(row_ptr + n, tl.where(kept, row, -1), n < N)
    tl.store(choice_ptr + row, n, kept)


@triton.jit
def _tiles(
    starts_ptr, tile_expert_ptr, tile_row_ptr, E, tiles,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):
    """Write the expert and the first row of each tile of BLOCK_M rows. The expert is -1 past the last tile."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.zeros([BLOCK_T], tl.int32) - 1
    row = tl.zeros([BLOCK_T], tl.int32)
    before = tl.zeros([BLOCK_E], tl.int32)

    for first in range(0, E, BLOCK_E):
        # each of these BLOCK_E experts has the tiles from begin to stop - 1
        e = first + tl.arange(0, BLOCK_E)
        start = tl.load(starts_ptr + e, e < E, other=0)
        count = (tl.load(starts_ptr + e + 1, e < E, other=0) - start + BLOCK_M - 1) // BLOCK_M
        stop = before + tl.cumsum(count, 0)
        begin = stop - count

        # a tile belongs to at most one of them
        lies = (t[:, None] >= begin[None, :]) & (t[:, None] < stop[None, :])  # [BLOCK_T, BLOCK_E]
        expert += tl.sum(tl.where(lies, e[None, :] + 1, 0), 1)
        row += tl.sum(tl.where(lies, start[None, :] + (t[:, None] - begin[None, :]) * BLOCK_M, 0), 1)
        before += tl.sum(count, 0)

    tl.store(tile_expert_ptr + t, expert, t < tiles)
    tl.store(tile_row_ptr + t, row, t < tiles)

# fmt: on


# ---- launch


class Routes(NamedTuple):
    """The rows of all experts, sorted by expert. A row is a token with one of its chosen experts.

    The sizes of the tensors are upper bounds. Entries past the last row or tile are never used.
    """

    starts: Tensor  # (E + 1,) int32, the first row of each expert, and the number of rows
    row: Tensor  # (T K,) int32, the row of each choice; -1 if it is dropped
    choice: Tensor  # (T K,) int32, the choice of each row
    tile_expert: Tensor  # (tiles,) int32, the expert of each tile; -1 past the last tile
    tile_row: Tensor  # (tiles,) int32, the first row of each tile
    block_m: int  # rows of a tile
    top_k: int  # K


def _dispatch(indices: Tensor, E: int, block_m: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the tensors of Routes for indices (T, K), which must be contiguous int32 or int64."""
    starts, row, choice, tile_expert, tile_row = _dispatch_shapes(indices, E, block_m)
    N = indices.numel()
    if not N:
        return starts.zero_(), row, choice, tile_expert, tile_row

    blocks = cdiv(N, 128)
    counts = indices.new_empty(E, blocks, dtype=torch.int32)
    _histogram[(blocks,)](indices, counts, N, E, blocks, BLOCK_N=128, BLOCK_E=64)
    ends = counts.view(-1).cumsum(0, dtype=torch.int32)  # the prefix sums, by expert and then by block
    _scatter[(blocks,)](indices, counts, ends, row, choice, N, E, blocks, BLOCK_N=128)

    starts[:1].zero_()
    starts[1:] = ends.view(E, blocks)[:, -1]
    tiles = tile_expert.numel()
    grid = (cdiv(tiles, 64),)
    _tiles[grid](starts, tile_expert, tile_row, E, tiles, BLOCK_M=block_m, BLOCK_T=64, BLOCK_E=64)
    return starts, row, choice, tile_expert, tile_row


def _dispatch_shapes(indices, E, block_m):
    N = indices.numel()
    tiles = cdiv(N, block_m) + E
    return tuple(indices.new_empty(size, dtype=torch.int32) for size in (E + 1, N, N, tiles, tiles))


_dispatched = make_op("moe_dispatch", _dispatch, _dispatch_shapes)


def routes_of(indices: Tensor, E: int, block_m: int) -> Routes:
    return Routes(*_dispatched(indices.contiguous(), E, block_m), block_m, indices.shape[1])


# ---- op


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
    """Choose top_k experts for each token, and compute their weights. The host reads no tensor.

    logits: (T, E). Computed in fp32 (fp64 for fp64).
    score: the function from logits to scores, "softmax" over all experts or "sigmoid". For a softmax over only the
        chosen experts, use "softmax" with renormalize: the numbers are the same.
    bias: (E,), added to the scores for the choice alone. The weights do not contain it, and it has no gradient.
    groups: the experts form this many equal groups, and only experts of the best top_groups groups are chosen. The
        score of a group is that of its best expert (DeepSeek-V2), or for "sigmoid" the sum of the best two
        (DeepSeek-V3).
    renormalize: divide the weights of each token by their sum.
    scale: a factor of the weights, applied last.
    capacity_factor: each expert takes at most ceil(capacity_factor T K / E) choices. All first choices come before all
        second choices, and otherwise the order is that of the tokens. A choice that exceeds the capacity gets weight 0
        and index E, which moe_mlp skips. An infinite factor drops nothing.
    Returns weights (T, K) fp32 (fp64 for fp64), indices (T, K) int64 with the most likely expert first, and
        RouteStatistics. A token with NaN in its logits has NaN in its weights, but its indices are valid experts.
    Raises ValueError for numbers out of range, for other shapes and dtypes, and for tensors on two devices.
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
            f"groups, top_groups: expected a divisor of {E} experts, and top_groups groups of {top_k} experts or more, "
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
