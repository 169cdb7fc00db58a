"""Attention whose scores are never in memory as a whole: dense, packed, and with a shared prompt.

    s_ij  = scale * q_i . k_j       softcap c: s_ij = c * tanh(scale * q_i . k_j / c)       over the keys j that i sees
    lse_i = log(sum_j exp(s_ij) + exp(sink))                                         the sink only where there is one
    p_ij  = exp(s_ij - lse_i)       out_i = sum_j p_ij v_j

    dv_j  = sum_i p_ij dout_i       dp_ij = dout_i . v_j       delta_i = dout_i . out_i - dlse_i
    ds_ij = p_ij (dp_ij - delta_i)             softcap: times 1 - (s_ij / c)^2
    dq_i  = scale * sum_j ds_ij k_j       dk_j = scale * sum_i ds_ij q_i       dsink = -sum_i exp(sink - lse_i) delta_i

What a query sees, by logical positions: position i of a query, j of a key.

    causal, T=2, S=5       window=3              parents = [-1, 0, 0]: segment 0 is the prompt of 1 and 2
       j 0 1 2 3 4            j 0 1 2 3 4           a a a b b c c      j counts on in a child: b and c both
    i 3  x x x x .         i 3  . x x x .        a  x . . . . . .      hold the positions 3 and 4
      4  x x x x x           4  . . x x x        a  x x . . . . .
                                                 a  x x x . . . .
    the last query         i - W < j <= i        b  x x x x . . .
    sees the last key                            b  x x x x x . .
                                                 c  x x x . . x .
                                                 c  x x x . . x x

Memory, in elements of one head and sequence: forward reads TD for q, S(D + Dv) for k and v once for each block of
queries (from L2, mostly), and writes TDv + T. q, k, v, out and lse are saved. Backward reads all of it and dout
twice, for dQ and for dK/dV, and writes the gradients and T for delta. Eager writes and reads TS scores, forward and
backward. Work: 2(D + Dv) operations for each pair in sight forward; backward 8D + 6Dv where 6D + 4Dv are counted: dQ
and dK/dV each compute the scores and dp, so that no sum is shared between programs, there are no atomics, and every
run gives the same bits.

Source: Dao et al. 2022, https://arxiv.org/abs/2205.14135; Dao 2023, https://arxiv.org/abs/2307.08691
"""

# A launch passes numbers where the kernel is annotated tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._chip import (
    FEW_KEYS,
    capability,
    cdiv,
    check_attention,
    check_device,
    check_dtype,
    check_shape,
    next_power_of_2,
    precision,
    use_triton,
    without_autocast,
)
from ._op import register, register_path
from ._triton import TensorDescriptor, tl, triton

# ---- reference


def _visible(query_position: Tensor, key_position: Tensor, causal: bool, window: int | None) -> Tensor:
    """Positions (..., T) and (..., S) to (..., T, S): which key each query sees."""
    i, j = query_position.unsqueeze(-1), key_position.unsqueeze(-2)
    visible = j <= i if causal else (j <= i) | True
    return visible if window is None else visible & (j > i - window)


def _positions(cu_seqlens: Tensor, parents: Tensor | None, total: int) -> tuple[Tensor, Tensor]:
    """(total,) int64 each: every row's segment, -1 for a row that none owns, and its logical position."""
    row = torch.arange(total, device=cu_seqlens.device)
    segments = cu_seqlens.numel() - 1
    entries = torch.searchsorted(cu_seqlens, row, right=True)  # (total,) how many are at or before the row
    segment = torch.where(entries > segments, 0, entries) - 1
    position = row - cu_seqlens[segment]
    if parents is not None:  # -1 picks what is padded on: no parent, and its length 0
        parent = F.pad(parents, (0, 1), value=-1)[segment].long()
        parent = torch.where(parent < segments, parent, -1).clamp(min=-1)
        position = position + F.pad(cu_seqlens.diff(), (0, 1))[parent]
    return segment, position


@without_autocast  # fp32 inside, whatever the policy outside
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv), visible (T, S) or (B, 1, 1, T, S) to out and lse (B, T, H)."""
    wide = torch.promote_types(q.dtype, torch.float32)  # fp64 stays fp64, for finite differences
    G, n = k.shape[2], q.shape[2] // k.shape[2]
    query = q.to(wide).unflatten(2, (G, n))  # (B, T, G, n, D)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    s = factor * torch.einsum("btgnd,bsgd->bgnts", query, k.to(wide))  # (B, G, n, T, S)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~visible, -torch.inf)
    sink = s.new_tensor(-torch.inf) if sinks is None else sinks.to(wide).view(G, n, 1, 1)
    s = torch.cat([s, sink.expand(*s.shape[:-1], 1)], -1)  # (B, G, n, T, S + 1)
    top = s.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min)  # finite where nothing is seen
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    some = total != 0  # NaN is not nothing
    total = torch.where(some, total, 1.0)
    out = torch.einsum("bgnts,bsgd->btgnd", (e / total)[..., :-1], v.to(wide))
    lse = torch.where(some, top + torch.log(total), -torch.inf).squeeze(-1)  # (B, G, n, T)
    return out.flatten(2, 3).to(q.dtype), lse.permute(0, 3, 1, 2).flatten(2, 3)


def flash_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    parents: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    if cu_seqlens is None:
        T, S = q.shape[1], k.shape[1]
        position = torch.arange(S - T, S, device=q.device)
        visible = _visible(position, torch.arange(S, device=q.device), causal, window)
        out, lse = _attend(q, k, v, visible, scale, softcap, sinks)
        return (out, lse) if return_lse else out
    segment, position = _positions(cu_seqlens, parents, q.shape[0])
    owned = segment >= 0
    related = segment[:, None] == segment  # (total, total)
    if parents is not None:
        related = related | (F.pad(parents, (0, 1), value=-1)[segment][:, None] == segment)
    visible = related & owned & _visible(position, position, causal, window)
    out, lse = _attend(q[None], k[None], v[None], visible, scale, softcap, sinks)
    lse = lse[0].masked_fill(~owned[:, None], -torch.inf)
    return (out[0], lse) if return_lse else out[0]


# ---- CPU path


@without_autocast  # in q's dtype, as the kernels
def _attend_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `_attend`, with visible None for causal and T = S. One SDPA call unless it lacks a feature asked for."""
    T = q.shape[1]
    if softcap is None and sinks is None and not return_lse and q.numel() and k.numel():
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        mask = visible if visible is None or visible.dim() == 2 else visible.squeeze(1)  # or (B, 1, T, S)
        if mask is None and T < FEW_KEYS:
            mask = q.new_full((T, T), -torch.inf).triu(1)
        # branched on: of dynamic shapes a comparison is a symbol, which SDPA does not take
        gqa = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, **gqa
        )
        return out.transpose(1, 2), None
    if visible is None:
        row = torch.arange(T, device=q.device)
        visible = _visible(row, row, True, None)
    return _attend(q, k, v, visible, scale, softcap, sinks)


def _check_tables(cu_seqlens: Tensor, parents: Tensor | None, total: int) -> None:
    """Raises ValueError for tables that describe no packing: a GPU, on which nobody looks, then bounds them."""
    falls = cu_seqlens.diff() < 0
    if falls.any():
        at = int(falls.long().argmax())
        raise ValueError(
            f"cu_seqlens: expected no entry below the one before it, got {cu_seqlens[at : at + 2].tolist()}"
        )
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first < 0 or last > total:
        raise ValueError(f"cu_seqlens: expected entries from 0 to total={total}, got {first} to {last}")
    if parents is None:
        return
    segment, parent = torch.arange(parents.numel()), parents.long()
    known = (parent >= 0) & (parent < segment)
    before = segment.clamp(min=1) - 1
    sound = known & (parent[parent * known] == -1) & ((parent == before) | (parent[before] == parent))
    wrong = (parent != -1) & ~sound
    if wrong.any():
        at = int(wrong.long().argmax())
        raise ValueError(
            "parents: expected -1, or a segment without a parent that stands directly before its children, "
            f"got {int(parent[at])} for segment {at}"
        )


@without_autocast  # which refuses fp16 in torch.cat
def _packed_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    cu_seqlens: Tensor,
    parents: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Segments padded to one call; with parents to two, the children's with their parent's keys in front.

    Padding is on the right, so a causal root needs no mask; padded queries always see a key, and are dropped. lse is
    empty where it is not asked for.
    """
    _check_tables(cu_seqlens, parents, q.shape[0])
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if last - first < q.shape[0]:  # rows before and after, which no segment owns
        outside = (0, 0, first, q.shape[0] - last)
        q, k, v = (x[first:last] for x in (q, k, v))
        options = causal, scale, window, softcap, sinks, cu_seqlens - first, parents, return_lse
        out, lse = _packed_cpu(q, k, v, *options)
        return F.pad(out, (0, 0, *outside)), F.pad(lse, outside, value=-torch.inf) if return_lse else lse
    if parents is None:  # without the empty ones, of which a traced mask has many
        cu_seqlens = cu_seqlens.unique_consecutive()
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()  # (segments,)
    total, segments = q.shape[0], lengths.numel()
    child = torch.zeros(segments, dtype=torch.bool) if parents is None else parents >= 0
    roots = segments - int(child.sum())
    P, C = (int(F.pad(lengths[which], (1, 0)).max()) for which in (~child, child))  # the longest of each
    split = roots * P
    # (segments,): the row where a segment starts in the padded buffer, roots first
    padded = torch.where(child, split + (child.cumsum(0) - 1) * C, ((~child).cumsum(0) - 1) * P)
    shift = torch.repeat_interleave(padded - starts, lengths, output_size=total)
    row = torch.arange(total) + shift  # (total,)

    def pad(x: Tensor) -> tuple[Tensor, Tensor]:
        buffer = x.new_zeros(split + (segments - roots) * C, *x.shape[1:]).index_copy_(0, row, x)
        return buffer[:split].unflatten(0, (roots, P)), buffer[split:].unflatten(0, (segments - roots, C))

    (q, q_child), (k, k_child), (v, v_child) = pad(q), pad(k), pad(v)
    root_row, child_row = torch.arange(P), torch.arange(C)
    if causal:
        visible = None if window is None else _visible(root_row, root_row, True, window)
    else:  # an empty segment sees its first padding: a softmax over nothing would put NaN into the gradients
        visible = (root_row < lengths[:, None].clamp(min=1))[:, None, None, None]  # (roots, 1, 1, 1, P)
    outs = [_attend_cpu(q, k, v, visible, scale, softcap, sinks, return_lse)]
    if roots < segments and parents is not None:
        parent = parents[child].long()  # (children,)
        before = lengths[parent, None]  # (children, 1)
        position = before + child_row  # (children, C)
        unseen = torch.where(root_row < before, root_row, P + C)  # (children, P), padding after every query
        visible = _visible(position, torch.cat([unseen, position], 1), True, window)[:, None, None]
        which = ((~child).cumsum(0) - 1)[parent]  # (children,): the parent's place among the roots
        key = torch.cat([k.index_select(0, which), k_child], 1)  # (children, P + C, G, D)
        value = torch.cat([v.index_select(0, which), v_child], 1)
        outs.append(_attend_cpu(q_child, key, value, visible, scale, softcap, sinks, return_lse))
    out, lse = (
        None if any(y is None for y in x) else torch.cat([y.flatten(0, 1) for y in x]).index_select(0, row)
        for x in zip(*outs, strict=True)
    )
    assert out is not None
    return out, lse if lse is not None and return_lse else out.new_empty(0)


def _packed_fake(
    q, k, v, causal, scale, window, softcap, sinks, cu_seqlens, parents, return_lse
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    wide = torch.promote_types(q.dtype, torch.float32)
    return out, out.new_empty(q.shape[:2], dtype=wide) if return_lse else out.new_empty(0)


# ---- kernels

# differ from batch to batch: no new compilation for a multiple of 16
RAGGED = ["T", "S", "rows", "sequences", "window"]


@triton.jit
def _entry(cu_ptr, at, total, mask):
    # a cu_seqlens that is wrong names no row outside
    return tl.minimum(tl.maximum(tl.load(cu_ptr + at, mask, other=0), 0), total)


@triton.jit
def _locate(cu_ptr, segments, total, block, BLOCK: tl.constexpr):
    # Segment s owns the blocks from cu[s] // BLOCK + s + 1 on: always enough of them, and at most one too many. The
    # rows before the first segment are segment -1, those after the last one segment `segments`: rows that nobody owns.
    # So a grid of total // BLOCK + segments + 2 covers every packing, and nobody has to read the lengths on the host.
    # Where cu decreases nobody owns any row: each row is written once, whatever cu holds.
    count, falls = 0, 0
    for first in range(0, segments + 1, 256):
        i = first + tl.arange(0, 256)
        start = _entry(cu_ptr, i, total, i <= segments)
        before = (start // BLOCK + i < block) & (i <= segments)
        falling = (i < segments) & (_entry(cu_ptr, i + 1, total, i < segments) < start)
        both = tl.sum(
            before.to(tl.int32) + falling.to(tl.int32) * 65536, 0
        )  # one reduction, of 256 at most each
        count += both % 65536
        falls += both // 65536
    s = tl.where(falls > 0, segments, count - 1)
    owned = (s >= 0) & (s < segments)
    start = _entry(cu_ptr, s, total, (s >= 0) & (falls == 0))
    end = tl.where(s < segments, _entry(cu_ptr, s + 1, total, s < segments), total)
    first = tl.where(falls > 0, 0, start // BLOCK + s + 1)
    return s, owned, start, end - start, (block - first) * BLOCK


@triton.jit
def _parent(cu_ptr, parents_ptr, segments, total, segment, owned):
    # where the parent's keys start, and how many they are: none without a parent
    parent = tl.load(parents_ptr + segment, owned, other=-1)
    some = (parent >= 0) & (parent < segments)
    start, end = _entry(cu_ptr, parent, total, some), _entry(cu_ptr, parent + 1, total, some)
    return start, end - start


@triton.jit
def _with_children(cu_ptr, parents_ptr, segments, total, segment, owned, start):
    # the children stand directly after their parent: how many rows they and it are
    count = 0
    for first in range(0, segments, 256):
        i = first + tl.arange(0, 256)
        count += tl.sum((tl.load(parents_ptr + i, i < segments, other=-1) == segment).to(tl.int32), 0)
    return _entry(cu_ptr, tl.minimum(segment + 1 + count, segments), total, owned) - start


@triton.jit
def _batch(block, length, B, BLOCK: tl.constexpr, FOLD: tl.constexpr):
    # a grid's third dimension ends at 65,535: of a larger batch the first one goes on (`_Shape.grid`)
    batch = tl.program_id(2)
    if FOLD:
        blocks = tl.cdiv(length, BLOCK)
        batch += block // blocks * tl.num_programs(2)
        block %= blocks
        length = tl.where(batch < B, length, 0)
    return batch, length, block * BLOCK


@triton.jit
def _span(
    reach, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    # the first of the keys that BLOCK_M queries see between them, the first query at key `reach`, and how many blocks
    first, end = 0, keys
    if CAUSAL:
        end = tl.minimum(keys, reach + BLOCK_M)
    if WINDOW:
        first = tl.maximum(reach - window + 1, 0) // BLOCK_N * BLOCK_N
    return first, tl.cdiv(tl.maximum(end - first, 0), BLOCK_N)


@triton.jit
def _masked(
    qk, i, j, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    # Scores [BLOCK_M, BLOCK_N] of the queries from i on and the keys from j on, -inf where not seen. Most blocks are
    # seen whole: a branch round the mask costs less than a second loop, which would fill its pipeline again.
    partly = j + BLOCK_N > keys
    if CAUSAL:
        partly |= j + BLOCK_N > i + 1
    if WINDOW:
        partly |= j + window < i + BLOCK_M
    if partly:
        queries, columns = (i + tl.arange(0, BLOCK_M))[:, None], (j + tl.arange(0, BLOCK_N))[None, :]
        seen = columns < keys
        if CAUSAL:
            seen &= columns <= queries
        if WINDOW:
            seen &= columns > queries - window
        qk = tl.where(seen, qk, float("-inf"))
    return qk


@triton.jit
def _tile(
    x, head, row, left, stride_t, stride_h,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    # [ROWS, BLOCK_D] of one head, from `row` on; `left` rows are there (a descriptor reads on into the next segment)
    if TMA:
        tile = x.load([head, row, 0]).reshape([ROWS, BLOCK_D])
    else:
        r, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
        pointers = x + tl.cast(row, tl.int64) * stride_t + tl.cast(head, tl.int64) * stride_h
        pointers += r[:, None] * stride_t + d[None, :]
        mask = r[:, None] < left
        if D < BLOCK_D:
            mask &= d[None, :] < D
        tile = tl.load(pointers, mask, other=0.0)
    return tile


@triton.jit
def _capped(qk, inner, cap):
    # cap * tanh(x), inner * qk = 2x log2(e); exact at both ends, where exp2 is 0 or inf
    return cap * (1 - 2 / (tl.exp2(qk * inner) + 1))


@triton.jit(do_not_specialize=RAGGED)
def _flash_fwd(
    q, k, v, out_ptr, lse_ptr, sinks_ptr, cu_ptr, parents_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    T, S, rows, sequences, window, inner, cap,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    PACKED: tl.constexpr, PARENTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    # Scores live in units of log2: m and norm are the running maximum and sum of exp2(score - m). m starts at a finite
    # number, so a row that has seen nothing yet needs no special case: exp2(-inf - m) is 0.
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # the longest rows first
    key_head = head // GROUP
    parent_start, parent_keys = 0, 0
    if PACKED:
        segment, owned, q_start, queries, m0 = _locate(cu_ptr, sequences, rows, block, BLOCK_M)
        k_start, keys, reach = q_start, queries, m0
        if PARENTS:
            parent_start, parent_keys = _parent(cu_ptr, parents_ptr, sequences, rows, segment, owned)
    else:
        batch, queries, m0 = _batch(block, T, sequences, BLOCK_M, FOLD)
        q_start, k_start, keys, reach = batch * T, batch * S, S, m0 + S - T
    if m0 >= queries:
        return
    local = tl.arange(0, BLOCK_M)
    query = _tile(q, head, q_start + m0, queries - m0, stride_qt, stride_qh, BLOCK_M, D, BLOCK_D, TMA)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        if PACKED:
            sink = tl.where(owned, sink, float("-inf"))
        m = tl.zeros([BLOCK_M], tl.float32) + tl.maximum(sink, -1.0e30)
        norm = tl.exp2(sink - m)
    else:
        m = tl.full([BLOCK_M], -1.0e30, tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
    first, blocks = _span(reach, keys, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    if PACKED:
        blocks = tl.where(owned, blocks, 0)
    parent_first, parent_blocks, parent_reach = 0, 0, m0 + parent_keys
    if PARENTS:
        parent_first, parent_blocks = _span(
            parent_reach, parent_keys, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N
        )
    for step in tl.range(0, parent_blocks + blocks):
        j, row, j_end, i = first + step * BLOCK_N, k_start, keys, reach
        if PARENTS:  # one flat loop over the parent's blocks, then the own ones
            own = step >= parent_blocks
            j = tl.where(own, j - parent_blocks * BLOCK_N, parent_first + step * BLOCK_N)
            row, j_end = tl.where(own, k_start, parent_start), tl.where(own, keys, parent_keys)
            i = tl.where(own, reach, parent_reach)
        row += j
        key = _tile(k, key_head, row, j_end - j, stride_kt, stride_kh, BLOCK_N, D, BLOCK_D, TMA)
        qk = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if SOFTCAP:
            qk = _capped(qk, inner, cap)
        qk = _masked(qk, i, j, j_end, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
        scaled = 1.0 if SOFTCAP else inner  # into the exponent's fused multiply-add
        m_new = tl.maximum(m, tl.max(qk, 1) * scaled)
        p = tl.exp2(qk * scaled - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        norm = norm * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        value = _tile(v, key_head, row, j_end - j, stride_vt, stride_vh, BLOCK_N, DV, BLOCK_DV, TMA)
        acc = tl.dot(p.to(value.dtype), value, acc, input_precision=PRECISION)
        m = m_new
    seen = norm != 0  # a NaN, too
    norm = tl.where(seen, norm, 1.0)
    lse = tl.where(seen, m + tl.log2(norm), float("-inf"))
    inside = m0 + local < queries
    base = tl.cast(q_start + m0, tl.int64)
    tl.store(lse_ptr + tl.cast(head, tl.int64) * rows + base + local, lse, inside)
    d = tl.arange(0, BLOCK_DV)
    pointers = (
        out_ptr
        + (base * tl.num_programs(1) + head) * DV
        + local[:, None] * (tl.num_programs(1) * DV)
        + d[None, :]
    )
    tl.store(
        pointers, (acc / norm[:, None]).to(out_ptr.dtype.element_ty), inside[:, None] & (d[None, :] < DV)
    )


@triton.jit
def _lse(lse_ptr, at, mask):
    # +inf for a row that is not there or sees nothing makes its probabilities 0
    lse = tl.load(lse_ptr + at, mask, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def _dots(x_ptr, stride_x, y_ptr, stride_y, left, ROWS: tl.constexpr, D: tl.constexpr):
    # row by row, sum(x * y), a few columns at a time: registers are short
    r = tl.arange(0, ROWS)[:, None]
    total = tl.zeros([ROWS], tl.float32)
    for column in tl.static_range(0, D, 32):
        d = column + tl.arange(0, 32)[None, :]
        mask = (r < left) & (d < D)
        x = tl.load(x_ptr + r * stride_x + d, mask, other=0.0).to(tl.float32)
        total += tl.sum(x * tl.load(y_ptr + r * stride_y + d, mask, other=0.0).to(tl.float32), 1)
    return total


@triton.jit(do_not_specialize=RAGGED)
def _flash_dq(
    q, k, v, dout, dout_ptr, out_ptr, lse_ptr, dlse_ptr, dq_ptr, delta_ptr, cu_ptr, parents_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dt, stride_dh,
    T, S, rows, sequences, window, scale, inner, cap,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DLSE: tl.constexpr,
    PACKED: tl.constexpr, PARENTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    # comes before dK/dV, which reads the delta that this writes
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    key_head = head // GROUP
    parent_start, parent_keys = 0, 0
    if PACKED:
        segment, owned, q_start, queries, m0 = _locate(cu_ptr, sequences, rows, block, BLOCK_M)
        k_start, keys, reach = q_start, queries, m0
        if PARENTS:
            parent_start, parent_keys = _parent(cu_ptr, parents_ptr, sequences, rows, segment, owned)
    else:
        batch, queries, m0 = _batch(block, T, sequences, BLOCK_M, FOLD)
        q_start, k_start, keys, reach = batch * T, batch * S, S, m0 + S - T
    if m0 >= queries:
        return
    local = tl.arange(0, BLOCK_M)
    inside = m0 + local < queries
    base = tl.cast(q_start + m0, tl.int64)
    query = _tile(q, head, q_start + m0, queries - m0, stride_qt, stride_qh, BLOCK_M, D, BLOCK_D, TMA)
    do = _tile(dout, head, q_start + m0, queries - m0, stride_dt, stride_dh, BLOCK_M, DV, BLOCK_DV, TMA)
    heads = tl.num_programs(1)
    delta = _dots(
        out_ptr + (base * heads + head) * DV, heads * DV,
        dout_ptr + base * stride_dt + tl.cast(head, tl.int64) * stride_dh, stride_dt, queries - m0, BLOCK_M, DV,
    )  # fmt: skip
    at = tl.cast(head, tl.int64) * rows + base + local
    if DLSE:
        delta -= tl.load(dlse_ptr + at, inside, other=0.0) * 1.4426950408889634
    tl.store(delta_ptr + at, delta, inside)
    lse = _lse(lse_ptr, at, inside)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first, blocks = _span(reach, keys, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    if PACKED:
        blocks = tl.where(owned, blocks, 0)
    parent_first, parent_blocks, parent_reach = 0, 0, m0 + parent_keys
    if PARENTS:
        parent_first, parent_blocks = _span(
            parent_reach, parent_keys, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N
        )
    for step in tl.range(0, parent_blocks + blocks):
        j, row, j_end, i = first + step * BLOCK_N, k_start, keys, reach
        if PARENTS:  # one flat loop over the parent's blocks, then the own ones
            own = step >= parent_blocks
            j = tl.where(own, j - parent_blocks * BLOCK_N, parent_first + step * BLOCK_N)
            row, j_end = tl.where(own, k_start, parent_start), tl.where(own, keys, parent_keys)
            i = tl.where(own, reach, parent_reach)
        row += j
        key = _tile(k, key_head, row, j_end - j, stride_kt, stride_kh, BLOCK_N, D, BLOCK_D, TMA)
        value = _tile(v, key_head, row, j_end - j, stride_vt, stride_vh, BLOCK_N, DV, BLOCK_DV, TMA)
        qk = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        s = _capped(qk, inner, cap) if SOFTCAP else qk * inner
        p = tl.exp2(_masked(s, i, j, j_end, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N) - lse[:, None])
        dp = tl.dot(do, tl.trans(value), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds *= 1 - (s / cap) * (s / cap)
        dq = tl.dot(ds.to(key.dtype), key, dq, input_precision=PRECISION)
    d = tl.arange(0, BLOCK_D)
    pointers = (
        dq_ptr
        + (base * tl.num_programs(1) + head) * D
        + local[:, None] * (tl.num_programs(1) * D)
        + d[None, :]
    )
    tl.store(pointers, (dq * scale).to(dq_ptr.dtype.element_ty), inside[:, None] & (d[None, :] < D))


@triton.jit(do_not_specialize=RAGGED)
def _flash_dkdv(
    q, k, v, dout, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_ptr, parents_ptr, position_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dt, stride_dh,
    T, S, rows, sequences, window, scale, inner, cap,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    PACKED: tl.constexpr, PARENTS: tl.constexpr, SPLIT: tl.constexpr, SHARE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    # Everything transposed, [keys, queries]: the probabilities are then a left operand as they are. A key past the end
    # fills only its own rows of dk and dv, which are not stored; a query past the end has lse = +inf.
    block, key_head = tl.program_id(0), tl.program_id(1)
    if PACKED:
        segment, owned, k_start, keys, n0 = _locate(cu_ptr, sequences, rows, block, BLOCK_N)
        q_start, queries, shift = k_start, tl.where(owned, keys, 0), 0
    else:
        batch, keys, n0 = _batch(block, S, sequences, BLOCK_N, FOLD)
        k_start, q_start, queries, shift = batch * S, batch * T, T, S - T
    if n0 >= keys:
        return
    local = tl.arange(0, BLOCK_N)
    key = _tile(k, key_head, k_start + n0, keys - n0, stride_kt, stride_kh, BLOCK_N, D, BLOCK_D, False)
    value = _tile(v, key_head, k_start + n0, keys - n0, stride_vt, stride_vh, BLOCK_N, DV, BLOCK_DV, False)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    lo, hi = 0, queries
    if CAUSAL:
        lo = tl.maximum(n0 - shift, 0)
    if WINDOW:
        hi = tl.maximum(tl.minimum(queries, n0 + BLOCK_N - 1 + window - shift), 0)
    if PARENTS:  # its children's queries follow its own, and stand after all of its keys
        family = _with_children(cu_ptr, parents_ptr, sequences, rows, segment, owned, k_start)
        reached = owned & (family > keys)
        if WINDOW:
            # their positions start at `keys`: early keys of a long prompt are out of every child's window
            reached &= n0 + BLOCK_N - 1 + window > keys
        hi = tl.where(reached, family, hi)
    blocks = tl.cdiv(tl.maximum(hi - lo, 0), BLOCK_M)
    first_head = key_head * GROUP
    if (
        SPLIT
    ):  # a program to SHARE query heads, and the sum of them outside: a parent's keys have long columns
        first_head += tl.program_id(2) * SHARE
    for step in tl.range(0, SHARE * blocks):
        head, index = first_head, step
        if SHARE > 1:
            head, index = first_head + step // blocks, step % blocks
        m0 = lo + index * BLOCK_M
        row, left, i = q_start + m0, hi - m0, tl.arange(0, BLOCK_M)
        query = _tile(q, head, row, left, stride_qt, stride_qh, BLOCK_M, D, BLOCK_D, TMA)
        do = _tile(dout, head, row, left, stride_dt, stride_dh, BLOCK_M, DV, BLOCK_DV, TMA)
        at = tl.cast(head, tl.int64) * rows + row + i
        lse = _lse(lse_ptr, at, i < left)
        qk = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        s = _capped(qk, inner, cap) if SOFTCAP else qk * inner
        p = tl.exp2(s - lse[None, :])
        if WINDOW:
            position = m0 + shift + i
            if PARENTS:  # each child counts on from the parent's length
                position = tl.where(
                    position < keys, position, tl.load(position_ptr + row + i, i < left, other=0)
                )
            mask = (n0 + local)[:, None] <= position[None, :]
            mask &= (n0 + local)[:, None] > position[None, :] - window
            p = tl.where(mask, p, 0.0)
        elif CAUSAL:
            diagonal = m0 + shift < n0 + BLOCK_N - 1  # few blocks are: a branch is cheaper than their mask
            if diagonal:
                p = tl.where((n0 + local)[:, None] <= (m0 + shift + i)[None, :], p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(value, tl.trans(do), input_precision=PRECISION)
        delta = tl.load(delta_ptr + at, i < left, other=0.0)  # late: a thread holds it for many columns
        ds = p * (dp - delta[None, :])
        if SOFTCAP:
            ds *= 1 - (s / cap) * (s / cap)
        dk = tl.dot(ds.to(query.dtype), query, dk, input_precision=PRECISION)
    inside = (n0 + local < keys)[:, None]
    key_heads = tl.num_programs(1)
    base = tl.cast(k_start + n0, tl.int64)
    if SPLIT:
        base += tl.cast(tl.program_id(2), tl.int64) * rows
    base = base * key_heads + key_head
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    pointers = dk_ptr + base * D + local[:, None] * (key_heads * D) + d[None, :]
    tl.store(pointers, (dk * scale).to(dk_ptr.dtype.element_ty), inside & (d[None, :] < D))
    pointers = dv_ptr + base * DV + local[:, None] * (key_heads * DV) + e[None, :]
    tl.store(pointers, dv.to(dv_ptr.dtype.element_ty), inside & (e[None, :] < DV))


# ---- autograd


LOG2E = 1.4426950408889634


GRID = 65535  # the most of a grid's second and third dimension


@dataclass(frozen=True)
class _Shape:
    """What the grids and kernels are told: a packed call is one batch of segments, and does not use T and S."""

    T: int
    S: int
    sequences: int  # segments, or the batch
    total: int | None  # rows of a packed call

    @staticmethod
    def of(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> "_Shape":
        if cu_seqlens is not None:
            return _Shape(0, 0, cu_seqlens.numel() - 1, q.shape[0])
        return _Shape(q.shape[1], k.shape[1], q.shape[0], None)

    def grid(self, block: int, length: int, heads: int, parts: int = 1) -> tuple[int, int, int]:
        """`block` queries or keys of a head to a program; `parts` programs share a packed call's keys."""
        if self.total is not None:
            return self.total // block + self.sequences + 2, heads, parts
        return cdiv(length, block) * cdiv(self.sequences, GRID), heads, min(self.sequences, GRID)


@dataclass(frozen=True)
class _Tiles:
    """[BLOCK_M queries, BLOCK_N keys] of the three kernels, with warps and pipeline stages."""

    fwd: tuple[int, int, int, int]
    dq: tuple[int, int, int, int]
    dkdv: tuple[int, int, int, int]
    # where what packing, or a window or a softcap, holds in registers is too much for the tile above
    dkdv_packed: tuple[int, int, int, int] | None = None
    dkdv_features: tuple[int, int, int, int] | None = None
    dq_features: tuple[int, int, int, int] | None = None  # a window or a softcap, with parents


# By chip, then by the wider head dimension, padded: the first row that is wide enough. None spills in bf16, whatever
# is combined, nor in fp32 on sm_90 (tests/bench/test_static.py); those of sm_80 and sm_100 are picked by that, untimed.
# What else could stand here: bench/candidates.json.
TILES = {
    "sm_80": {
        # dQ: with 64 keys a softcap spills. dK/dV: with 64 keys any call does, with 32 three blocks fit; at 256 a
        # window, a softcap and a parent together do with 32 queries
        64: _Tiles((128, 64, 4, 3), (64, 32, 4, 3), (64, 32, 4, 3)),
        128: _Tiles((128, 32, 4, 3), (64, 32, 4, 2), (64, 64, 8, 2)),
        256: _Tiles((64, 64, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2), None, (16, 64, 8, 2)),
    },
    # Timed on an H100. At D=64 and 128 two blocks of one warpgroup share a multiprocessor: one takes exponentials while
    # the other multiplies. At 256 only one block fits, and two warpgroups make up for it. dK/dV keeps 64 keys
    # throughout, the rows of a warpgroup's product, and takes fewer queries where registers are short; those were never
    # timed at 256, nor with a window or a softcap.
    "sm_90": {
        64: _Tiles((64, 128, 4, 2), (64, 64, 4, 3), (128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        128: _Tiles((64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2), None, (32, 64, 4, 2)),
        256: _Tiles(
            (128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 8, 2), (32, 64, 8, 2), (16, 64, 8, 2), (64, 32, 8, 3)
        ),
    },
    "sm_100": {
        64: _Tiles((128, 64, 4, 3), (128, 64, 4, 3), (64, 128, 8, 3)),
        128: _Tiles((128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2)),
        256: _Tiles((128, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2)),
    },
    # 99 KB of shared memory: RTX 30 and 40, A10, A40, L4, L40S, and RTX 50. Compiled, never run.
    "sm_86": {
        64: _Tiles((128, 64, 4, 3), (64, 32, 4, 3), (64, 32, 4, 3)),
        128: _Tiles((128, 32, 8, 3), (64, 32, 4, 2), (64, 64, 8, 2)),
        256: _Tiles((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    },
    # 64 KB of shared memory; compiled, never run: they are picked because they do not spill
    "gfx942": {
        64: _Tiles((128, 64, 4, 3), (64, 64, 4, 3), (32, 64, 4, 1)),
        128: _Tiles((128, 32, 4, 3), (64, 64, 4, 2), (32, 64, 8, 1)),
        256: _Tiles((64, 32, 8, 2), (64, 16, 8, 1), (16, 32, 8, 1)),
    },
    # Products without matrix units: a thread holds whole rows of its operands, so tiles are small, and a second stage
    # keeps dQ's two from being held across the loop.
    "fp32": {
        64: _Tiles((64, 32, 8, 2), (32, 32, 4, 2), (32, 64, 8, 2)),
        128: _Tiles((32, 16, 8, 1), (16, 32, 8, 2), (16, 32, 8, 1)),
        256: _Tiles((32, 16, 8, 1), (16, 16, 8, 2), (16, 32, 8, 1)),
    },
    "interpreted": {256: _Tiles((32, 16, 4, 1), (32, 16, 4, 1), (16, 32, 4, 1))},
}
# TF32 has matrix units, whose operands lie in shared memory: of "fp32", dK/dV at 256 would take 112 KB
TILES["tf32_sm_86"] = TILES["fp32"] | {256: _Tiles((32, 16, 8, 1), (16, 16, 8, 2), (16, 16, 8, 1))}


def _tiles(q: Tensor, width: int) -> tuple[_Tiles, bool]:
    """The row of the table, and whether the chip has tensor descriptors."""
    chip = capability(q)
    small = chip in ((8, 6), (8, 9)) or chip[0] == 12
    half = q.dtype != torch.float32  # without matrix units a descriptor's tile is held by rows, and spills
    descriptors = half and torch.version.hip is None and (chip == (9, 0) or chip[0] in (10, 11))
    if chip == (0, 0):
        name = "interpreted"
    elif not half:
        name = "tf32_sm_86" if small and precision() == "tf32" else "fp32"
    elif chip == (9, 4):
        name = "gfx942"
    elif descriptors:
        name = "sm_90" if chip[0] == 9 else "sm_100"
    else:
        name = "sm_86" if small else "sm_80"
    return next(tiles for widest, tiles in TILES[name].items() if width <= widest), descriptors


def _pad(width: int) -> int:
    return max(16, next_power_of_2(width))


def _choice(q: Tensor, k: Tensor, v: Tensor) -> tuple[_Tiles, bool]:
    """The tiles, and whether they come by descriptors, which want something to describe."""
    tiles, descriptors = _tiles(q, max(_pad(q.shape[-1]), _pad(v.shape[-1])))
    return tiles, descriptors and all(x.numel() > 0 for x in (q, k, v))


def _rows(x: Tensor, tma: bool) -> Tensor:
    """(B, T, H, D) or (total, H, D) to (rows, H, D), copied where the strides do not allow it.

    A descriptor asks for rows at positive steps of 16 bytes. Without, the compiler knows of steps of 16 elements alone
    that they are even; of others it takes narrow loads, which spill.
    """
    x = x if x.dim() == 3 else x.flatten(0, 1)
    unit = 16 // x.element_size() if tma else 16
    even = all(step > 0 and step % unit == 0 for step in x.stride()[:-1])
    if even and x.stride(-1) == 1 and x.data_ptr() % 16 == 0:
        return x
    width = x.shape[-1]
    return x.new_empty(*x.shape[:-1], cdiv(width, 16) * 16)[..., :width].copy_(x)


def _described(x: Tensor, block: int) -> TensorDescriptor:
    """Tiles of `block` rows of one head of x (rows, H, D); columns past D read as 0."""
    rows, heads, width = x.shape
    strides = [x.stride(1), x.stride(0), 1]
    return TensorDescriptor(x, [heads, rows, width], strides, [1, block, _pad(width)])


SHARES = 2**28  # bytes of the fp32 shares of dk and dv: one for each query head of a group, if they fit


def _parts(group: int, size: int) -> int:
    """Programs to a key head of a shared prompt; a share of dk and dv has `size` bytes."""
    return next(n for n in range(group, 0, -1) if group % n == 0 and (n == 1 or n * size <= SHARES))


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _common(q, k, v, shape, packed, parents, causal, scale, window, softcap) -> dict[str, Any]:
    """What every kernel is told besides its tensors. q, k, v are (rows, heads, width)."""
    if softcap is None:
        numbers = {"inner": scale * LOG2E, "cap": 1.0}
    else:
        numbers = {"inner": 2 * LOG2E * scale / softcap, "cap": softcap * LOG2E}
    return numbers | {
        "T": shape.T,
        "S": shape.S,
        "rows": q.shape[0],
        "sequences": shape.sequences,
        "window": window or 0,
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[2],
        "DV": v.shape[2],
        "BLOCK_D": _pad(q.shape[2]),
        "BLOCK_DV": _pad(v.shape[2]),
        "CAUSAL": causal,
        "WINDOW": window is not None,
        "SOFTCAP": softcap is not None,
        "PACKED": packed,
        "PARENTS": parents,
        "PRECISION": precision(),
        "FOLD": shape.total is None and shape.sequences > GRID,
    }


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    parents: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """q, k, v as the public op takes them. Returns out, and the lse (H, rows): the kernels read it along the rows.

    It is in units of log2, as the scores are: the backward pass subtracts the very number that the forward pass had.
    """
    out, lse = _forward_fake(q, k, v, sinks, cu_seqlens, parents, causal, scale, window, softcap)
    shape = _Shape.of(q, k, cu_seqlens)
    tables = cu_seqlens, parents
    tiles, tma = _choice(q, k, v)
    q, k, v = (_rows(x, tma) for x in (q, k, v))
    common = _common(q, k, v, shape, *(x is not None for x in tables), causal, scale, window, softcap)
    M, N, warps, stages = tiles.fwd
    _flash_fwd[shape.grid(M, shape.T, q.shape[1])](
        *((_described(q, M), _described(k, N), _described(v, N)) if tma else (q, k, v)),
        out, lse, sinks, *tables, *_strides(q, k, v), **common, SINKS=sinks is not None,
        BLOCK_M=M, BLOCK_N=N, TMA=tma, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse


def _forward_fake(
    q, k, v, sinks, cu_seqlens, parents, causal, scale, window, softcap
) -> tuple[Tensor, Tensor]:
    H = q.shape[-2]
    rows = q.shape[0] if q.dim() == 3 else q.shape[0] * q.shape[1]
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(H, rows, dtype=torch.float32)


def _backward_launch(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    parents: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and the sinks; an empty tensor where there are none."""
    dq, dk, dv, dsinks = _backward_fake(
        dout, dlse, out, lse, q, k, v, sinks, cu_seqlens, parents, causal, scale, window, softcap
    )
    shape = _Shape.of(q, k, cu_seqlens)
    tables = cu_seqlens, parents
    tiles, tma = _choice(q, k, v)
    q, k, v, dout = (_rows(x, tma) for x in (q, k, v, dout))
    common = _common(q, k, v, shape, *(x is not None for x in tables), causal, scale, window, softcap)
    common["scale"] = scale
    strides = _strides(q, k, v, dout)
    delta = torch.empty_like(lse)
    dlse = None if dlse is None else dlse.contiguous()
    plain = window is None and softcap is None
    M, N, warps, stages = tiles.dq if plain or parents is None else tiles.dq_features or tiles.dq
    _flash_dq[shape.grid(M, shape.T, q.shape[1])](
        *((_described(q, M), _described(k, N), _described(v, N), _described(dout, M)) if tma else (q, k, v, dout)),
        dout, out, lse, dlse, dq, delta, *tables, *strides, **common,
        DLSE=dlse is not None, BLOCK_M=M, BLOCK_N=N, TMA=tma, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    with_packing = tiles.dkdv if cu_seqlens is None else tiles.dkdv_packed or tiles.dkdv
    M, N, warps, stages = with_packing if plain else tiles.dkdv_features or with_packing
    position = None
    if cu_seqlens is not None and parents is not None and window is not None:
        position = _positions(cu_seqlens, parents, q.shape[0])[1].to(torch.int32)
    group = q.shape[1] // k.shape[1]
    parts = 1 if parents is None else _parts(group, 4 * (dk.numel() + dv.numel()))
    split = parts > 1
    shares = [x.new_empty(parts, *x.shape, dtype=torch.float32) if split else x for x in (dk, dv)]
    _flash_dkdv[shape.grid(N, shape.S, k.shape[1], parts)](
        *((_described(q, M), k, v, _described(dout, M)) if tma else (q, k, v, dout)),
        lse, delta, *shares, *tables, position, *strides, **common,
        SPLIT=split, SHARE=group // parts, BLOCK_M=M, BLOCK_N=N, TMA=tma, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if split:
        dk, dv = (share.sum(0).to(k.dtype) for share in shares)
    if sinks is not None:  # a sink is a key whose value is 0: ds = -p * delta
        unseen = lse == -torch.inf  # a row of no segment, whatever its upstream gradient is
        p = torch.exp2(sinks.float()[:, None] * LOG2E - lse)
        dsinks = -(p * delta).masked_fill(unseen, 0.0).sum(1).to(sinks.dtype)
    return dq, dk, dv, dsinks


def _backward_fake(
    dout, dlse, out, lse, q, k, v, sinks, cu_seqlens, parents, causal, scale, window, softcap
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


_flash_backward = register("flash_attention_backward", _backward_launch, _backward_fake)


def _save(ctx, inputs, output) -> None:
    tensors, ctx.options = inputs[:6], inputs[6:]
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor | None, dlse: Tensor | None):
    out, lse, *tensors = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dsinks = _flash_backward(dout, dlse, out, lse, *tensors, *ctx.options)
    return dq, dk, dv, None if tensors[3] is None else dsinks, *[None] * 6


_flash = register("flash_attention", _forward, _forward_fake, _save, _backward)
_packed = register_path("packed_attention_cpu", _packed_cpu, _packed_fake)


# ---- public op


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """A query is (..., H, D), keys and values (..., G, D) and (..., G, Dv)."""
    check_dtype("q", q)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v: expected one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    for name, x in (("q", q), ("v", v)):
        if not 1 <= x.shape[-1] <= 256:
            raise ValueError(f"{name}: expected a head dimension of 1 to 256, got {x.shape[-1]}")
    H, G = q.shape[-2], k.shape[-2]
    if G == 0 or H % G:
        raise ValueError(f"q: expected a multiple of the {G} key/value heads, got {H}")


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    parents: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v over the keys that each query sees; the mask pictures are at the top of this file.

    q: (B, T, H, D), k: (B, S, G, D), v: (B, S, G, Dv); or packed self-attention: (total, H, D), (total, G, D),
        (total, G, Dv) with cu_seqlens. One dtype. H a multiple of G; D and Dv in 1..256.
    causal: bottom-right aligned, query i sees the keys j <= i + S - T. Rows that see nothing (T > S) give zeros.
    scale: of the scores, by default 1 / sqrt(D).    softcap: c * tanh(scores / c).
    window: query i sees the keys i - window < j <= i, itself included; causal only.
    sinks: (H,) one logit per head that takes part in the softmax and has no value; neither scaled nor capped.
    cu_seqlens: (segments + 1,) int32, where each segment starts and the last one ends, within 0..total. A segment may
        be empty. Rows before the first and after the last, as those of a padded batch, have out 0, lse -inf and zero
        gradients.
    parents: (segments,) int32, -1 or the segment that this one continues: it also sees the parent's tokens, and its
        positions go on from the parent's length. Causal only. A parent has parent -1 and stands directly before its
        children.
    Returns (B, T, H, Dv) or (total, H, Dv) in q's dtype; with return_lse also lse (B, T, H) or (total, H) fp32 (fp64
        of fp64): the natural log of each softmax's denominator, sink included, -inf where empty; differentiable.
    NaN comes out: of a query, a key that a query sees, or a sink in the query's whole row and its lse; of a value at
        least in its channel; and in the gradients of all that such a query sees. More may be NaN, since 0 * NaN is:
        rows near by, also of the sequence before. A score of +inf gives NaN, one of -inf weighs nothing, and an
        infinite value comes out infinite or NaN in its channel.
    Raises ValueError for shapes, dtypes, devices and combinations other than these; on a CPU also for a cu_seqlens or
        parents that break the rules above. On a GPU, where nobody reads them, entries count as within 0..total, a
        parent that is none as -1, all rows as owned by no segment where cu_seqlens decreases, and other wrong parents
        give wrong numbers: in none of these is memory read or written that is not the call's own.
    """
    packed = cu_seqlens is not None
    if q.dim() != (3 if packed else 4):
        want = "(total, H, D) with cu_seqlens" if packed else "(B, T, H, D) without cu_seqlens"
        raise ValueError(f"q: expected {want}, got {tuple(q.shape)}")
    if k.dim() != q.dim() or v.dim() != q.dim():
        raise ValueError(
            f"k, v: expected {q.dim()} dimensions as q has, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    check_device(q, k=k, v=v, sinks=sinks, cu_seqlens=cu_seqlens, parents=parents)
    _check(q, k, v)
    window = check_attention(scale, window, softcap, sinks, q.shape[-2])
    if window is not None and not causal:
        raise ValueError("window: expected causal=True, got causal=False")
    G, D, Dv = k.shape[-2], q.shape[-1], v.shape[-1]
    if cu_seqlens is None:
        check_shape("k", k, batch=q.shape[0], keys=k.shape[1], kv_heads=G, head_dim=D)
        check_shape("v", v, batch=q.shape[0], keys=k.shape[1], kv_heads=G, head_dim=Dv)
        if parents is not None:
            raise ValueError("parents: expected cu_seqlens beside them, got None")
    else:
        check_shape("k", k, total=q.shape[0], kv_heads=G, head_dim=D)
        check_shape("v", v, total=q.shape[0], kv_heads=G, head_dim=Dv)
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or not cu_seqlens.numel():
            got = f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
            raise ValueError(f"cu_seqlens: expected (segments + 1,) torch.int32, got {got}")
        if cu_seqlens.numel() == 1 and q.shape[0]:
            raise ValueError(f"cu_seqlens: expected two entries or more for total={q.shape[0]}, got one")
        if parents is not None:
            if not causal:
                raise ValueError("parents: expected causal=True, got causal=False")
            if parents.dtype != torch.int32:
                raise ValueError(f"parents: expected torch.int32, got {parents.dtype}")
            check_shape("parents", parents, segments=cu_seqlens.numel() - 1)
    if use_triton(q):
        if q.shape[-2] > GRID:
            raise ValueError(f"q: expected at most {GRID} heads on a GPU, got {q.shape[-2]}")
        scale = D**-0.5 if scale is None else scale
        tables = (None if x is None else x.contiguous() for x in (sinks, cu_seqlens, parents))
        # no descriptors of such rows, and some kernel spills: they run as the next power of two, which fills the tile
        q, k, v = (
            F.pad(x, (0, _pad(x.shape[-1]) - x.shape[-1])) if x.shape[-1] % 8 else x for x in (q, k, v)
        )
        out, lse = _flash(q, k, v, *tables, causal, scale, window, softcap)
        out = out if out.shape[-1] == Dv else out[..., :Dv].contiguous()
        if not return_lse:
            return out
        lse = lse.t() / LOG2E  # (rows, H)
        return out, lse if packed else lse.unflatten(0, q.shape[:2])
    if cu_seqlens is not None:
        out, lse = _packed(q, k, v, causal, scale, window, softcap, sinks, cu_seqlens, parents, return_lse)
    else:
        T, S = q.shape[1], k.shape[1]
        visible = None
        if not (causal and T == S and window is None):
            row, column = (torch.arange(n, S, device=q.device) for n in (S - T, 0))
            visible = _visible(row, column, causal, window)
        out, lse = _attend_cpu(q, k, v, visible, scale, softcap, sinks, return_lse)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse
