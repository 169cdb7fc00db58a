"""Flash attention over a dense batch, packed segments, or segments that share a prompt. It never stores all scores.

    s_ij  = scale * q_i . k_j       softcap c: s_ij = c * tanh(scale * q_i . k_j / c)       for each key j that i sees
    lse_i = log(sum_j exp(s_ij) + exp(sink))                                          without a sink, exp(sink) is 0
    p_ij  = exp(s_ij - lse_i)       out_i = sum_j p_ij v_j

    dv_j  = sum_i p_ij dout_i       dp_ij = dout_i . v_j       delta_i = dout_i . out_i - dlse_i
    ds_ij = p_ij (dp_ij - delta_i)             softcap: times 1 - (s_ij / c)^2
    dq_i  = scale * sum_j ds_ij k_j       dk_j = scale * sum_i ds_ij q_i       dsink = -sum_i exp(sink - lse_i) delta_i

The pictures mark with x the keys that a query sees; i and j are the positions of query and key.

    causal, T=2, S=5       window=3              parents = [-1, 0, 0]: segment a is the prompt of b and c
       j 0 1 2 3 4            j 0 1 2 3 4           a a a b b c c      A child's positions continue from its
    i 3  x x x x .         i 3  . x x x .        a  x . . . . . .      parent's: b and c both have 3 and 4.
      4  x x x x x           4  . . x x x        a  x x . . . . .
                                                 a  x x x . . . .
    the last query         i - W < j <= i        b  x x x x . . .
    sees the last key                            b  x x x x x . .
                                                 c  x x x . . x .
                                                 c  x x x . . x x

Memory, in elements, for one head of one sequence: the forward pass reads TD for q. For each block of queries it reads
S(D + Dv) for k and v, mostly from L2. It writes TDv for out and T for lse, and saves q, k, v, out and lse. The
backward pass reads all of these and dout twice, once for dQ and once for dK/dV. It writes the gradients, and T for
delta. Eager attention writes and reads TS scores in both passes.
Work, in operations for each visible pair of query and key: 2(D + Dv) forward, and 8D + 6Dv backward. The benchmark
counts only 6D + 4Dv backward: the kernels of dQ and dK/dV each compute the scores and dp, although once would suffice.
In return no two programs add to one sum, so there are no atomics, and every run gives the same bits.

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

# these differ from batch to batch: a multiple of 16 must not cause a new compilation
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
    # Scores are in units of log2. m is the running maximum, and norm the running sum of exp2(score - m). m starts at a
    # finite number, so exp2(-inf - m) is 0: a row that has seen no key yet needs no special case.
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # last queries first: they see most keys
    key_head = head // GROUP
    q_start, queries, m0, k_start, keys, reach, owned, parent_start, parent_keys = _queries(
        cu_ptr, parents_ptr, T, S, rows, sequences, block, PACKED, PARENTS, BLOCK_M, FOLD
    )
    if m0 >= queries:
        return

    local = tl.arange(0, BLOCK_M)
    query = _load(q, head, q_start + m0, queries - m0, stride_qt, stride_qh, BLOCK_M, D, BLOCK_D, TMA)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    # the sum starts with the sink
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        if PACKED:
            sink = tl.where(owned, sink, float("-inf"))
        m = tl.zeros([BLOCK_M], tl.float32) + tl.maximum(sink, -1.0e30)
        norm = tl.exp2(sink - m)
    else:
        m = tl.full([BLOCK_M], -1.0e30, tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)

    # one flat loop over the visible keys: first the parent's blocks, then the segment's
    first, blocks, parent_first, parent_blocks, parent_reach = _spans(
        m0, keys, reach, owned, parent_keys, window, CAUSAL, WINDOW, PACKED, PARENTS, BLOCK_M, BLOCK_N
    )
    for step in tl.range(0, parent_blocks + blocks):
        # i, j: positions of the first query and the first key; j_end: the end of the keys; row: that of key j
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

        scaled = 1.0 if SOFTCAP else inner  # the scale joins the exponent's fused multiply-add
        m_new = tl.maximum(m, tl.max(qk, 1) * scaled)
        p = tl.exp2(qk * scaled - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        norm = norm * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        value = _load(v, key_head, row, j_end - j, stride_vt, stride_vh, BLOCK_N, DV, BLOCK_DV, TMA)
        acc = tl.dot(p.to(value.dtype), value, acc, input_precision=PRECISION)
        m = m_new

    seen = norm != 0  # true for NaN, too
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
    # sum(x * y) of each row, 32 columns at a time to save registers
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
    # Computes dQ and delta. It runs before _flash_dkdv, which reads delta.
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

    # delta, which _flash_dkdv also reads
    heads = tl.num_programs(1)
    delta = _dots(
        out_ptr + (base * heads + head) * DV, heads * DV,
        dout_ptr + base * stride_dt + tl.cast(head, tl.int64) * stride_dh, stride_dt, queries - m0, BLOCK_M, DV,
    )
    at = tl.cast(head, tl.int64) * rows + base + local
    if DLSE:
        delta -= tl.load(dlse_ptr + at, inside, other=0.0) * LOG2E  # lse is stored in log2
    tl.store(delta_ptr + at, delta, inside)
    lse = _lse(lse_ptr, at, inside)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # one flat loop over the visible keys: first the parent's blocks, then the segment's
    first, blocks, parent_first, parent_blocks, parent_reach = _spans(
        m0, keys, reach, owned, parent_keys, window, CAUSAL, WINDOW, PACKED, PARENTS, BLOCK_M, BLOCK_N
    )
    for step in tl.range(0, parent_blocks + blocks):
        # i, j: positions of the first query and the first key; j_end: the end of the keys; row: that of key j
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
    # Scores are transposed, [keys, queries], so the probabilities need no transpose as a left operand. A key past the
    # end changes only its own rows of dk and dv, which are not stored. A query past the end has lse = +inf, so p is 0.
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
    if PARENTS:  # children's queries follow the parent's rows, at positions after all of its keys
        family = _with_children(cu_ptr, parents_ptr, sequences, rows, segment, owned, k_start)
        reached = owned & (family > keys)
        if WINDOW:
            # a child's positions start at `keys`: early keys of a long prompt are outside every child's window
            reached &= n0 + BLOCK_N - 1 + window > keys
        hi = tl.where(reached, family, hi)
    blocks = tl.cdiv(tl.maximum(hi - lo, 0), BLOCK_M)

    # many queries see a parent's keys: a program takes SHARE of the group's heads, and the host sums the shares
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
            if PARENTS:  # a child's positions start at the parent's length
                of_child = tl.load(position_ptr + row + i, i < left, other=0)
                position = tl.where(position < keys, position, of_child)
            mask = (n0 + local)[:, None] <= position[None, :]
            mask &= (n0 + local)[:, None] > position[None, :] - window
            p = tl.where(mask, p, 0.0)
        elif CAUSAL:
            diagonal = m0 + shift < n0 + BLOCK_N - 1  # rarely true: a branch costs less than the mask
            if diagonal:
                p = tl.where((n0 + local)[:, None] <= (m0 + shift + i)[None, :], p, 0.0)

        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(value, tl.trans(do), input_precision=PRECISION)
        delta = tl.load(delta_ptr + at, i < left, other=0.0)  # loaded late, as it takes many registers
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

GRID = 65535  # the largest second and third dimension of a grid
SHARES = 2**28  # bytes for the fp32 shares of dk and dv; one share per query head of a group if they fit


def _rows(x: Tensor, tma: bool) -> Tensor:
    """Reshape x from (B, T, H, D) or (total, H, D) to (rows, H, D). Copy x if its strides do not suit the kernels.

    A tensor descriptor requires positive strides that are multiples of 16 bytes. Without descriptors, the compiler
    recognises only strides that are multiples of 16 elements. For other strides loads are narrow, and registers spill.
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
    """Return a tensor descriptor of x (rows, H, D) with tiles of `block` rows of a head. Columns past D read as 0."""
    rows, heads, width = x.shape
    strides = [x.stride(1), x.stride(0), 1]
    return TensorDescriptor(x, [heads, rows, width], strides, [1, block, tile_width(width)])


def _parts(group: int, size: int) -> int:
    """Return how many programs share a group's query heads. Their buffers of `size` bytes must fit into SHARES."""
    return next(n for n in range(group, 0, -1) if group % n == 0 and (n == 1 or n * size <= SHARES))


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


class _Call(NamedTuple):
    """The operands and sizes that all kernels of an attention call take. In a packed call, segments are the batch."""

    q: Tensor  # (rows, H, D)
    k: Tensor  # (rows, G, D)
    v: Tensor  # (rows, G, Dv)
    T: int  # 0 in a packed call, as S
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
        tma = descriptors and all(x.numel() > 0 for x in (q, k, v))  # no descriptor of an empty tensor
        return cls(*(_rows(x, tma) for x in (q, k, v)), T, S, sequences, packing, tiles, tma)

    def grid(self, block: int, length: int, heads: int, parts: int = 1) -> tuple[int, int, int]:
        """Return a launch grid in which a program takes `block` queries or keys of a head.

        `length` is the number of queries or keys. In a packed call, `parts` programs share the same keys.
        """
        if self.packing.cu_seqlens is not None:
            return self.q.shape[0] // block + self.sequences + 2, heads, parts
        return cdiv(length, block) * cdiv(self.sequences, GRID), heads, min(self.sequences, GRID)

    def options(self, numbers: dict[str, Any], tile: Tile, **more: Any) -> dict[str, Any]:
        """Return a launch's keyword arguments: `numbers` for all kernels, `more` for this one alone, and the tile."""
        M, N, _, warps, stages = tile
        more.update(numbers, BLOCK_M=M, BLOCK_N=N, TMA=self.tma, num_warps=warps, num_stages=stages)
        return more


def _numbers(call: _Call, rules: Rules) -> dict[str, Any]:
    """Return the numbers and flags that every attention kernel takes, by the names of the parameters."""
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
        # compile-time constants
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
    """Compute out and lse. q, k and v have the shapes that flash_attention takes.

    lse is (H, rows), because the kernels read it along the rows. It is in units of log2, as the scores are, so that
    the backward pass subtracts exactly the number of the forward pass.
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
    """Compute dq, dk and dv, always all three: the dK/dV kernel reads delta, which the dQ kernel writes."""
    call = _Call.of(saved.q, saved.k, saved.v, saved.packing)
    dout = _rows(torch.zeros_like(saved.out) if dout is None else dout, call.tma)
    numbers = _numbers(call, saved.rules)
    numbers["scale"] = saved.rules.scale
    dq, delta = _query_grad(call, saved, numbers, dout, dlse)
    dk, dv = _key_and_value_grad(call, saved, numbers, dout, delta)

    dsinks = None
    if needs.sinks:  # a sink is a key whose value is 0: ds = -p * delta
        assert saved.sinks is not None
        unseen = saved.lse == -torch.inf  # rows of no segment, which add nothing whatever dout is
        p = torch.exp2(saved.sinks.float()[:, None] * LOG2E.value - saved.lse)
        dsinks = -(p * delta).masked_fill(unseen, 0.0).sum(1).to(saved.sinks.dtype)
    return _Gradients(dq, dk, dv, dsinks)


def _query_grad(
    call: _Call, saved: _Saved, numbers: dict[str, Any], dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute dq and delta (H, rows). The kernel of dK/dV reads delta, which is dout . out - dlse."""
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

    # a program takes all query heads of a group, or a share of them
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
    """Return out and lse as flash_attention does. lse is None unless return_lse."""
    if q.shape[-2] > GRID:
        raise ValueError(f"q: expected at most {GRID} heads on a GPU, got {q.shape[-2]}")
    sinks = None if sinks is None else sinks.contiguous()
    if packing.cu_seqlens is not None:
        packing = Packing(*(None if table is None else table.contiguous() for table in packing))

    # A head dimension that is no multiple of 8 allows no descriptors, and makes some kernel spill registers. Pad it to
    # the next power of two, the width of a tile.
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
    """Compute softmax(scale * q k^T) v over the keys that each query sees. Pictures are at the top of this file.

    q, k, v: (B, T, H, D), (B, S, G, D) and (B, S, G, Dv), or packed with cu_seqlens: (total, H, D), (total, G, D) and
        (total, G, Dv). All have one dtype. H is a multiple of G. D and Dv are 1 to 256.
    causal: query i sees the keys j <= i + S - T, so the last query sees the last key. A row that sees no key is 0.
    scale: the factor of the scores, by default 1 / sqrt(D).
    window: a query at position i sees the keys i - window < j <= i, which include its own. Requires causal.
    softcap: a number c; each scaled score s becomes c * tanh(s / c).
    sinks: (H,), one logit per head that joins the softmax but has no value. It is neither scaled nor capped.
    cu_seqlens: (segments + 1,) int32 in 0..total, the start of each segment and the end of the last. A segment may be
        empty. Rows outside all segments, such as padding, have out 0, lse -inf and zero gradients.
    parents: (segments,) int32, for each segment the parent that it continues, or -1. A child also sees its parent's
        tokens, and its positions start at the parent's length. A parent has no parent itself, and stands directly
        before its children. Requires causal.
    Returns (B, T, H, Dv) or (total, H, Dv) in q's dtype. With return_lse it also returns lse, (B, T, H) or (total, H),
        in fp32 (fp64 for fp64). This is the natural log of each softmax's denominator, including the sink, or -inf for
        an empty softmax. It is differentiable.
    NaN in a query, in a key that it sees or in its sink makes the query's row of out and its lse NaN. NaN in a value
        makes at least its channel NaN. The gradients of all keys and values that such a query sees are NaN, too. Since
        0 * NaN is NaN, nearby rows may be NaN as well, even those of the sequence before.
    A score of +inf gives NaN. A score of -inf has no weight. An infinite value gives infinity or NaN in its channel.
    Raises ValueError for other shapes, dtypes, devices and combinations. On a CPU it also raises for a cu_seqlens or
        parents that break these rules. On a GPU nobody checks these tables: cu_seqlens is clamped to 0..total, a parent
        that is not a segment counts as -1, and a decreasing cu_seqlens leaves every row outside all segments. Other
        wrong parents give wrong numbers. In no case is memory outside the call's tensors read or written.
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
