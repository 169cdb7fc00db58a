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

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._chip import cdiv, check_attention, check_device, check_dtype, check_shape, precision, use_triton
from ._op import like_saved, make_op
from ._sight import _batch, _capped, _load, _locate, _lse, _masked, _queries, _spans, _with_children
from ._triton import TensorDescriptor, tl, triton
from .plain.attention import attend_cpu, positions
from .records import Packing, Rules
from .tiles import AttentionTiles, Tile, attention_tiles, tile_width

# ---- kernels

# differ from batch to batch: no new compilation for a multiple of 16
RAGGED = ["T", "S", "rows", "sequences", "window"]
LOG2E = tl.constexpr(1.4426950408889634)

# fmt: off


@triton.jit(do_not_specialize=RAGGED)
def _flash_fwd(
    q, k, v, out_ptr, lse_ptr, sinks_ptr, cu_ptr, parents_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    T, S, rows, sequences, window, inner, cap,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    PACKED: tl.constexpr, PARENTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, FOLD: tl.constexpr,
):
    # Scores live in units of log2: m and norm are the running maximum and sum of exp2(score - m). m starts at a finite
    # number, so a row that has seen nothing yet needs no special case: exp2(-inf - m) is 0.
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # the longest rows first
    key_head = head // GROUP
    q_start, queries, m0, k_start, keys, reach, owned, parent_start, parent_keys = _queries(
        cu_ptr, parents_ptr, T, S, rows, sequences, block, PACKED, PARENTS, BLOCK_M, FOLD
    )
    if m0 >= queries:
        return

    local = tl.arange(0, BLOCK_M)
    query = _load(q, head, q_start + m0, queries - m0, stride_qt, stride_qh, BLOCK_M, D, BLOCK_D, TMA)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    # a sink is in the sum from the start
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        if PACKED:
            sink = tl.where(owned, sink, float("-inf"))
        m = tl.zeros([BLOCK_M], tl.float32) + tl.maximum(sink, -1.0e30)
        norm = tl.exp2(sink - m)
    else:
        m = tl.full([BLOCK_M], -1.0e30, tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)

    # the keys in sight: one flat loop over the parent's blocks, then the segment's
    first, blocks, parent_first, parent_blocks, parent_reach = _spans(
        m0, keys, reach, owned, parent_keys, window, CAUSAL, WINDOW, PACKED, PARENTS, BLOCK_M, BLOCK_N
    )
    for step in tl.range(0, parent_blocks + blocks):
        # positions of the first query and the first key, where keys end, and the first key's row
        j, row, j_end, i = first + step * BLOCK_N, k_start, keys, reach
        if PARENTS:
            in_segment = step >= parent_blocks
            j = tl.where(in_segment, j - parent_blocks * BLOCK_N, parent_first + step * BLOCK_N)
            row, j_end = tl.where(in_segment, k_start, parent_start), tl.where(in_segment, keys, parent_keys)
            i = tl.where(in_segment, reach, parent_reach)
        row += j

        key = _load(k, key_head, row, j_end - j, stride_kt, stride_kh, BLOCK_N, D, BLOCK_D, TMA)
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
        value = _load(v, key_head, row, j_end - j, stride_vt, stride_vh, BLOCK_N, DV, BLOCK_DV, TMA)
        acc = tl.dot(p.to(value.dtype), value, acc, input_precision=PRECISION)
        m = m_new

    seen = norm != 0  # a NaN, too
    norm = tl.where(seen, norm, 1.0)
    lse = tl.where(seen, m + tl.log2(norm), float("-inf"))
    inside = m0 + local < queries
    base = tl.cast(q_start + m0, tl.int64)
    tl.store(lse_ptr + tl.cast(head, tl.int64) * rows + base + local, lse, inside)

    d = tl.arange(0, BLOCK_DV)
    pointers = out_ptr + (base * tl.num_programs(1) + head) * DV
    pointers = pointers + local[:, None] * (tl.num_programs(1) * DV) + d[None, :]
    tl.store(pointers, (acc / norm[:, None]).to(out_ptr.dtype.element_ty), inside[:, None] & (d[None, :] < DV))


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
):
    # dQ, and delta on the way: it comes before dK/dV
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    key_head = head // GROUP
    q_start, queries, m0, k_start, keys, reach, owned, parent_start, parent_keys = _queries(
        cu_ptr, parents_ptr, T, S, rows, sequences, block, PACKED, PARENTS, BLOCK_M, FOLD
    )
    if m0 >= queries:
        return

    local = tl.arange(0, BLOCK_M)
    inside = m0 + local < queries
    base = tl.cast(q_start + m0, tl.int64)
    query = _load(q, head, q_start + m0, queries - m0, stride_qt, stride_qh, BLOCK_M, D, BLOCK_D, TMA)
    do = _load(dout, head, q_start + m0, queries - m0, stride_dt, stride_dh, BLOCK_M, DV, BLOCK_DV, TMA)

    # delta, which dK/dV reads
    heads = tl.num_programs(1)
    delta = _dots(
        out_ptr + (base * heads + head) * DV, heads * DV,
        dout_ptr + base * stride_dt + tl.cast(head, tl.int64) * stride_dh, stride_dt, queries - m0, BLOCK_M, DV,
    )
    at = tl.cast(head, tl.int64) * rows + base + local
    if DLSE:
        delta -= tl.load(dlse_ptr + at, inside, other=0.0) * LOG2E
    tl.store(delta_ptr + at, delta, inside)
    lse = _lse(lse_ptr, at, inside)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # the keys in sight: one flat loop over the parent's blocks, then the segment's
    first, blocks, parent_first, parent_blocks, parent_reach = _spans(
        m0, keys, reach, owned, parent_keys, window, CAUSAL, WINDOW, PACKED, PARENTS, BLOCK_M, BLOCK_N
    )
    for step in tl.range(0, parent_blocks + blocks):
        # positions of the first query and the first key, where keys end, and the first key's row
        j, row, j_end, i = first + step * BLOCK_N, k_start, keys, reach
        if PARENTS:
            in_segment = step >= parent_blocks
            j = tl.where(in_segment, j - parent_blocks * BLOCK_N, parent_first + step * BLOCK_N)
            row, j_end = tl.where(in_segment, k_start, parent_start), tl.where(in_segment, keys, parent_keys)
            i = tl.where(in_segment, reach, parent_reach)
        row += j

        key = _load(k, key_head, row, j_end - j, stride_kt, stride_kh, BLOCK_N, D, BLOCK_D, TMA)
        value = _load(v, key_head, row, j_end - j, stride_vt, stride_vh, BLOCK_N, DV, BLOCK_DV, TMA)
        qk = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        s = _capped(qk, inner, cap) if SOFTCAP else qk * inner
        p = tl.exp2(_masked(s, i, j, j_end, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N) - lse[:, None])

        dp = tl.dot(do, tl.trans(value), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds *= 1 - (s / cap) * (s / cap)
        dq = tl.dot(ds.to(key.dtype), key, dq, input_precision=PRECISION)

    d = tl.arange(0, BLOCK_D)
    pointers = dq_ptr + (base * tl.num_programs(1) + head) * D
    pointers = pointers + local[:, None] * (tl.num_programs(1) * D) + d[None, :]
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
):
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
    key = _load(k, key_head, k_start + n0, keys - n0, stride_kt, stride_kh, BLOCK_N, D, BLOCK_D, False)
    value = _load(v, key_head, k_start + n0, keys - n0, stride_vt, stride_vh, BLOCK_N, DV, BLOCK_DV, False)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    # the queries that see these keys, from lo to hi
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

    # a parent's keys have long columns: SHARE of the group's query heads to a program, and their sum outside
    first_head = key_head * GROUP
    if SPLIT:
        first_head += tl.program_id(2) * SHARE
    for step in tl.range(0, SHARE * blocks):
        head, index = first_head, step
        if SHARE > 1:
            head, index = first_head + step // blocks, step % blocks
        m0 = lo + index * BLOCK_M
        row, left, i = q_start + m0, hi - m0, tl.arange(0, BLOCK_M)
        query = _load(q, head, row, left, stride_qt, stride_qh, BLOCK_M, D, BLOCK_D, TMA)
        do = _load(dout, head, row, left, stride_dt, stride_dh, BLOCK_M, DV, BLOCK_DV, TMA)
        at = tl.cast(head, tl.int64) * rows + row + i
        lse = _lse(lse_ptr, at, i < left)

        qk = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        s = _capped(qk, inner, cap) if SOFTCAP else qk * inner
        p = tl.exp2(s - lse[None, :])
        if WINDOW:
            position = m0 + shift + i
            if PARENTS:  # each child counts on from the parent's length
                of_child = tl.load(position_ptr + row + i, i < left, other=0)
                position = tl.where(position < keys, position, of_child)
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

# fmt: on


# ---- launch

GRID = 65535  # the most of a grid's second and third dimension
SHARES = 2**28  # bytes of the fp32 shares of dk and dv: one for each query head of a group, if they fit


def _rows(x: Tensor, tma: bool) -> Tensor:
    """(B, T, H, D) or (total, H, D) to (rows, H, D), copied where the strides do not allow it.

    A descriptor asks for rows at positive steps of 16 bytes. Without, the compiler knows of steps of 16 elements alone
    that they are even; of others it takes narrow loads, which spill.
    """
    x = x if x.dim() == 3 else x.flatten(0, 1)
    unit = 16 // x.element_size() if tma else 16
    step_t, step_h, step = x.stride()
    even = step_t > 0 and step_h > 0 and step_t % unit == 0 and step_h % unit == 0
    if even and step == 1 and x.data_ptr() % 16 == 0:
        return x
    width = x.shape[-1]
    return x.new_empty(*x.shape[:-1], cdiv(width, 16) * 16)[..., :width].copy_(x)


def _described(x: Tensor, block: int) -> TensorDescriptor:
    """Tiles of `block` rows of one head of x (rows, H, D); columns past D read as 0."""
    rows, heads, width = x.shape
    strides = [x.stride(1), x.stride(0), 1]
    return TensorDescriptor(x, [heads, rows, width], strides, [1, block, tile_width(width)])


def _parts(group: int, size: int) -> int:
    """Programs to a key head of a shared prompt; a share of dk and dv has `size` bytes."""
    return next(n for n in range(group, 0, -1) if group % n == 0 and (n == 1 or n * size <= SHARES))


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


class _Call(NamedTuple):
    """A call as its kernels take it. A packed one is one batch of segments, and does not use T and S."""

    q: Tensor  # (rows, H, D)
    k: Tensor  # (rows, G, D)
    v: Tensor  # (rows, G, Dv)
    T: int
    S: int
    sequences: int  # segments, or the batch
    packing: Packing
    tiles: AttentionTiles
    tma: bool

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> "_Call":
        if packing.cu_seqlens is not None:
            T, S, sequences = 0, 0, packing.cu_seqlens.numel() - 1
        else:
            sequences, T, S = *q.shape[:2], k.shape[1]

        tiles, descriptors = attention_tiles(q, max(q.shape[-1], v.shape[-1]))
        tma = descriptors and all(x.numel() > 0 for x in (q, k, v))  # they want something to describe
        return cls(*(_rows(x, tma) for x in (q, k, v)), T, S, sequences, packing, tiles, tma)

    def grid(self, block: int, length: int, heads: int, parts: int = 1) -> tuple[int, int, int]:
        """`block` queries or keys of a head to a program; `parts` programs share a packed call's keys."""
        if self.packing.cu_seqlens is not None:
            return self.q.shape[0] // block + self.sequences + 2, heads, parts
        return cdiv(length, block) * cdiv(self.sequences, GRID), heads, min(self.sequences, GRID)

    def options(self, numbers: dict[str, Any], tile: Tile, **more: Any) -> dict[str, Any]:
        """The keyword arguments of a launch: `numbers`, the tile, and what one kernel takes alone."""
        M, N, _, warps, stages = tile
        more.update(numbers, BLOCK_M=M, BLOCK_N=N, TMA=self.tma, num_warps=warps, num_stages=stages)
        return more


def _numbers(call: _Call, rules: Rules) -> dict[str, Any]:
    """The numbers and flags that every kernel takes."""
    causal, scale, window, softcap = rules
    packed, parents = call.packing.cu_seqlens is not None, call.packing.parents is not None
    assert scale is not None
    inner, cap = scale * LOG2E.value, 1.0
    if softcap is not None:
        inner, cap = 2 * LOG2E.value * scale / softcap, softcap * LOG2E.value

    (rows, H, D), (_, G, Dv) = call.q.shape, call.v.shape
    return {
        "T": call.T,
        "S": call.S,
        "rows": rows,
        "sequences": call.sequences,
        "window": window or 0,
        "inner": inner,
        "cap": cap,
        # what a kernel is compiled for
        "GROUP": H // G,
        "D": D,
        "DV": Dv,
        "BLOCK_D": tile_width(D),
        "BLOCK_DV": tile_width(Dv),
        "CAUSAL": causal,
        "WINDOW": window is not None,
        "SOFTCAP": softcap is not None,
        "PACKED": packed,
        "PARENTS": parents,
        "FOLD": not packed and call.sequences > GRID,
        "PRECISION": precision(),
    }


class _Saved(NamedTuple):
    out: Tensor
    lse: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    packing: Packing
    rules: Rules


class _Gradients(NamedTuple):
    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    sinks: Tensor | None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, packing: Packing, rules: Rules
) -> tuple[Tensor, Tensor]:
    """q, k, v as the public op takes them. Returns out, and the lse (H, rows): the kernels read it along the rows.

    It is in units of log2, as the scores are: the backward pass subtracts the very number that the forward pass had.
    """
    out, lse = _shapes(q, k, v, sinks, packing, rules)
    call = _Call.of(q, k, v, packing)
    q, k, v = call[:3]
    tile = call.tiles.fwd
    loads, strides = [q, k, v], _strides(q, k, v)
    if call.tma:
        loads = [_described(q, tile.M), _described(k, tile.N), _described(v, tile.N)]
    options = call.options(_numbers(call, rules), tile, SINKS=sinks is not None)
    _flash_fwd[call.grid(tile.M, call.T, q.shape[1])](*loads, out, lse, sinks, *packing, *strides, **options)
    return out, lse


def _shapes(q, k, v, sinks, packing, rules):
    H = q.shape[-2]
    rows = q.shape[0] if q.dim() == 3 else q.shape[0] * q.shape[1]
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(H, rows, dtype=torch.float32)


def _save(outputs, *inputs):
    return _Saved(*outputs, *inputs)


def _backward(saved: _Saved, needs: Any, dout: Tensor | None, dlse: Tensor | None) -> _Gradients:
    """dq, dk and dv whatever is asked for: dQ's kernel makes the delta that dK/dV's reads."""
    call = _Call.of(saved.q, saved.k, saved.v, saved.packing)
    dout = _rows(torch.zeros_like(saved.out) if dout is None else dout, call.tma)
    numbers = _numbers(call, saved.rules)
    numbers["scale"] = saved.rules.scale
    dq, delta = _query_grad(call, saved, numbers, dout, dlse)
    dk, dv = _key_and_value_grad(call, saved, numbers, dout, delta)

    dsinks = None
    if needs.sinks:  # a sink is a key whose value is 0: ds = -p * delta
        assert saved.sinks is not None
        unseen = saved.lse == -torch.inf  # a row of no segment, whatever its upstream gradient is
        p = torch.exp2(saved.sinks.float()[:, None] * LOG2E.value - saved.lse)
        dsinks = -(p * delta).masked_fill(unseen, 0.0).sum(1).to(saved.sinks.dtype)
    return _Gradients(dq, dk, dv, dsinks)


def _query_grad(
    call: _Call, saved: _Saved, numbers: dict[str, Any], dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dq, and delta (H, rows)."""
    dq, delta = saved.q.new_empty(saved.q.shape), torch.empty_like(saved.lse)
    dlse = None if dlse is None else dlse.contiguous()
    q, k, v = call[:3]
    features = saved.rules.window is not None or saved.rules.softcap is not None
    tile = call.tiles.of_dq(features, call.packing.parents is not None)
    loads, strides = [q, k, v, dout], _strides(q, k, v, dout)
    if call.tma:
        loads = [_described(x, rows) for x, rows in zip(loads, (tile.M, tile.N, tile.N, tile.M), strict=True)]
    options = call.options(numbers, tile, DLSE=dlse is not None)
    _flash_dq[call.grid(tile.M, call.T, q.shape[1])](
        *loads, dout, saved.out, saved.lse, dlse, dq, delta, *call.packing, *strides, **options
    )
    return dq, delta


def _key_and_value_grad(
    call: _Call, saved: _Saved, numbers: dict[str, Any], dout: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    dk, dv = saved.k.new_empty(saved.k.shape), saved.v.new_empty(saved.v.shape)
    q, k, v = call[:3]
    window, (cu_seqlens, parents) = saved.rules.window, call.packing
    features = window is not None or saved.rules.softcap is not None
    tile = call.tiles.of_dkdv(features, cu_seqlens is not None)
    position = None
    if cu_seqlens is not None and parents is not None and window is not None:
        position = positions(cu_seqlens, parents, q.shape[0])[1].to(torch.int32)

    # the query heads of a group, or shares of them
    group = q.shape[1] // k.shape[1]
    parts = 1 if parents is None else _parts(group, 4 * (dk.numel() + dv.numel()))
    split = parts > 1
    shares = [x.new_empty(parts, *x.shape, dtype=torch.float32) if split else x for x in (dk, dv)]
    loads = (_described(q, tile.M), k, v, _described(dout, tile.M)) if call.tma else (q, k, v, dout)
    options = call.options(numbers, tile, SPLIT=split, SHARE=group // parts)
    _flash_dkdv[call.grid(tile.N, call.S, k.shape[1], parts)](
        *loads, saved.lse, delta, *shares, cu_seqlens, parents, position, *_strides(q, k, v, dout), **options
    )
    if split:
        dk, dv = (share.sum(0).to(k.dtype) for share in shares)
    return dk, dv


_flash = make_op("flash_attention", _forward, _shapes, _save, _backward, like_saved)


def _attend_triton(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, packing: Packing, rules: Rules, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """out and lse as flash_attention returns them; lse is None where it is not asked for."""
    if q.shape[-2] > GRID:
        raise ValueError(f"q: expected at most {GRID} heads on a GPU, got {q.shape[-2]}")
    sinks = None if sinks is None else sinks.contiguous()
    if packing.cu_seqlens is not None:
        packing = Packing(*(None if table is None else table.contiguous() for table in packing))

    # no descriptors of such rows, and some kernel spills: they run as the next power of two, which fills the tile
    Dv = v.shape[-1]
    q, k, v = (
        F.pad(x, (0, tile_width(x.shape[-1]) - x.shape[-1])) if x.shape[-1] % 8 else x for x in (q, k, v)
    )
    out, lse = _flash(q, k, v, sinks, packing, rules)
    out = out if out.shape[-1] == Dv else out[..., :Dv].contiguous()
    if not return_lse:
        return out, None
    lse = lse.t() / LOG2E.value  # (rows, H)
    return out, lse if packing.cu_seqlens is not None else lse.unflatten(0, q.shape[:2])


# ---- op


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
        got = f"{tuple(k.shape)} and {tuple(v.shape)}"
        raise ValueError(f"k, v: expected {q.dim()} dimensions as q has, got {got}")
    check_device(q, k=k, v=v, sinks=sinks, cu_seqlens=cu_seqlens, parents=parents)
    check_dtype("q", q)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v: expected one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")

    H, G, D, Dv = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    for name, width in (("q", D), ("v", Dv)):
        if not 1 <= width <= 256:
            raise ValueError(f"{name}: expected a head dimension of 1 to 256, got {width}")
    if G == 0 or H % G:
        raise ValueError(f"q: expected a multiple of the {G} key/value heads, got {H}")
    window = check_attention(scale, window, softcap, sinks, H)
    if window is not None and not causal:
        raise ValueError("window: expected causal=True, got causal=False")

    if packed:
        check_shape("k", k, total=q.shape[0], kv_heads=G, head_dim=D)
        check_shape("v", v, total=q.shape[0], kv_heads=G, head_dim=Dv)
    else:
        check_shape("k", k, batch=q.shape[0], keys=k.shape[1], kv_heads=G, head_dim=D)
        check_shape("v", v, batch=q.shape[0], keys=k.shape[1], kv_heads=G, head_dim=Dv)
    packing = Packing(cu_seqlens, parents)
    packing.check(q.shape[0], causal)

    attend = attend_cpu
    if use_triton(q):
        attend, scale = _attend_triton, D**-0.5 if scale is None else scale
    out, lse = attend(q, k, v, sinks, packing, Rules(causal, scale, window, softcap), return_lse)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse
