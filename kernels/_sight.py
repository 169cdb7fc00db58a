"""Triton helpers of the attention kernels: the query rows of a program, the keys that they see, and masked scores.

Pictures of segments, parents and masks are in kernels/attention.py. Rows, segments and positions are whole numbers.
Entries read from cu_seqlens and parents are clamped to the rows of the call.
"""

# A launch passes numbers where the kernel is annotated tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from ._triton import tl, triton

# ---- kernels

# fmt: off


@triton.jit
def _load(
    x, head, row, left, stride_t, stride_h,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):
    # [ROWS, BLOCK_D] of one head, from `row` on; `left` rows remain. A descriptor reads on into the next segment
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
    # cap * tanh(x), where inner * qk = 2x log2(e). It is exact at both ends, where exp2 is 0 or inf
    return cap * (1 - 2 / (tl.exp2(qk * inner) + 1))


@triton.jit
def _lse(lse_ptr, at, mask):
    # a row that does not exist or sees no key gets +inf, which makes its probabilities 0
    lse = tl.load(lse_ptr + at, mask, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def _entry(cu_ptr, at, total, mask):
    # clamped, so that a wrong cu_seqlens cannot address a row outside the tensor
    return tl.minimum(tl.maximum(tl.load(cu_ptr + at, mask, other=0), 0), total)


@triton.jit
def _locate(cu_ptr, segments, total, block, BLOCK: tl.constexpr):
    # Segment s owns the blocks from cu[s] // BLOCK + s + 1 on: always enough blocks, and at most one too many. Rows
    # before the first segment count as segment -1, and rows after the last as segment `segments`. No segment owns them.
    # So a grid of total // BLOCK + segments + 2 covers every packing, and the host need not read the lengths.
    # If cu decreases anywhere, no segment owns any row. Each row is written exactly once, whatever cu holds.
    count, falls = 0, 0
    for first in range(0, segments + 1, 256):
        i = first + tl.arange(0, 256)
        start = _entry(cu_ptr, i, total, i <= segments)
        before = (start // BLOCK + i < block) & (i <= segments)
        falling = (i < segments) & (_entry(cu_ptr, i + 1, total, i < segments) < start)
        # one reduction gives both counts, which are at most 256 each
        counts = tl.sum(before.to(tl.int32) + falling.to(tl.int32) * 65536, 0)
        count += counts % 65536
        falls += counts // 65536

    s = tl.where(falls > 0, segments, count - 1)
    owned = (s >= 0) & (s < segments)
    start = _entry(cu_ptr, s, total, (s >= 0) & (falls == 0))
    end = tl.where(s < segments, _entry(cu_ptr, s + 1, total, s < segments), total)
    first = tl.where(falls > 0, 0, start // BLOCK + s + 1)
    return s, owned, start, end - start, (block - first) * BLOCK


@triton.jit
def _parent(cu_ptr, parents_ptr, segments, total, segment, owned):
    # the start of the parent's keys, and their number: 0 without a parent
    parent = tl.load(parents_ptr + segment, owned, other=-1)
    some = (parent >= 0) & (parent < segments)
    start, end = _entry(cu_ptr, parent, total, some), _entry(cu_ptr, parent + 1, total, some)
    return start, end - start


@triton.jit
def _with_children(cu_ptr, parents_ptr, segments, total, segment, owned, start):
    # the number of rows of a parent and its children, which directly follow it
    count = 0
    for first in range(0, segments, 256):
        i = first + tl.arange(0, 256)
        count += tl.sum((tl.load(parents_ptr + i, i < segments, other=-1) == segment).to(tl.int32), 0)
    return _entry(cu_ptr, tl.minimum(segment + 1 + count, segments), total, owned) - start


@triton.jit
def _batch(block, length, B, BLOCK: tl.constexpr, FOLD: tl.constexpr):
    # a grid's third dimension is at most 65,535; a larger batch continues in the first dimension (`_Call.grid`)
    batch = tl.program_id(2)
    if FOLD:
        blocks = tl.cdiv(length, BLOCK)
        batch += block // blocks * tl.num_programs(2)
        block %= blocks
        length = tl.where(batch < B, length, 0)
    return batch, length, block * BLOCK


@triton.jit
def _queries(
    cu_ptr, parents_ptr, T, S, rows, sequences, block,
    PACKED: tl.constexpr, PARENTS: tl.constexpr, BLOCK_M: tl.constexpr, FOLD: tl.constexpr,
):
    # The rows of a block of queries and of their keys. The sequence's queries and keys start at rows q_start and
    # k_start. The block's first query is number m0, at position `reach`. If m0 >= queries, the block is empty.
    parent_start, parent_keys, owned = 0, 0, True
    if PACKED:
        segment, owned, q_start, queries, m0 = _locate(cu_ptr, sequences, rows, block, BLOCK_M)
        k_start, keys, reach = q_start, queries, m0
        if PARENTS:
            parent_start, parent_keys = _parent(cu_ptr, parents_ptr, sequences, rows, segment, owned)
    else:
        batch, queries, m0 = _batch(block, T, sequences, BLOCK_M, FOLD)
        q_start, k_start, keys, reach = batch * T, batch * S, S, m0 + S - T
    return q_start, queries, m0, k_start, keys, reach, owned, parent_start, parent_keys


@triton.jit
def _span(
    reach, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    # the first block of keys, and the number of blocks, that the BLOCK_M queries from position `reach` on see
    first, end = 0, keys
    if CAUSAL:
        end = tl.minimum(keys, reach + BLOCK_M)
    if WINDOW:
        first = tl.maximum(reach - window + 1, 0) // BLOCK_N * BLOCK_N
    return first, tl.cdiv(tl.maximum(end - first, 0), BLOCK_N)


@triton.jit
def _spans(
    m0, keys, reach, owned, parent_keys, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, PARENTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # `_span` of the segment, then `_span` of its parent, whose keys come before the queries
    first, blocks = _span(reach, keys, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    if PACKED:
        blocks = tl.where(owned, blocks, 0)
    parent_first, parent_blocks, parent_reach = 0, 0, m0 + parent_keys
    if PARENTS:
        parent_first, parent_blocks = _span(parent_reach, parent_keys, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    return first, blocks, parent_first, parent_blocks, parent_reach


@triton.jit
def _masked(
    qk, i, j, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    # Scores [BLOCK_M, BLOCK_N] of the queries from i on and the keys from j on, -inf where a key is hidden. Most blocks
    # are entirely visible. A branch around the mask costs less than a second loop, which would refill its pipeline.
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

# fmt: on
