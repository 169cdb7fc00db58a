"""Attention of the newest token of each sequence over its cached keys and values, for generation. No gradient.

    s_j = scale * q . k_j       softcap c: s_j = c * tanh(scale * q . k_j / c)       for each key j in sight
    out = sum_j exp(s_j) v_j / (sum_j exp(s_j) + exp(sink))                      without a sink, exp(sink) is 0

A sequence has the first `length` keys of one row of the cache. Before them it may have a prefix: keys of a second row,
which many sequences share. A group of samples then stores its prompt once. Prefixes may lie in a cache of their own,
whose rows may have another length.

    position          0 1 2 3 4 5 6 7            prefix_length 5, length 3: the query is at position 7
    prefix_slot 2     x x x x x
    slot 0                      x x x            window=4: it sees the positions 4 to 7

The keys are cut into pieces of a fixed length. Each piece p gives a softmax output out_p and a log-sum-exp lse_p. The
pieces are combined in their order:

    lse_p = log(sum_{j in p} exp(s_j))        out = sum_p exp(lse_p) out_p / (sum_p exp(lse_p) + exp(sink))

The places where a sequence is cut depend on this sequence alone, and a piece has the same result in any program. So a
sequence gets the same bits whatever else is in the batch. The query heads that share a key head are rows of one tile.
The heads of the sequences that share a prefix are rows of one tile, too. The tile reads the shared keys once.

Memory, in elements: it reads 2 G D for each key in sight, but a prefix only once for up to 16 sequences that are
adjacent in the batch. It writes and reads H (Dv + 1) in fp32 for each piece. All of it is bandwidth-bound. Eager
attention also copies the cache by slot, repeats it for each query head, and writes and reads the scores.

Source: Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html; the shared prefix: Juravsky et al.
2024, https://arxiv.org/abs/2402.05099
"""

# A launch passes numbers where the kernel is annotated tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ._chip import (
    cdiv,
    check_attention,
    check_device,
    check_dtype,
    check_shape,
    multiprocessors,
    precision,
    use_triton,
)
from ._op import make_op
from ._triton import tl, triton
from .plain.decode import decode_attention_cpu
from .records import Cache, Scores
from .tiles import DECODE, chip_of, tile_width

# ---- kernels

LOG2E = tl.constexpr(1.4426950408889634)
# these change with the batch: a multiple of 16 must not cause a new compilation
RAGGED = ["B", "window", "skip", "slots", "longest", "prefixes", "s_max", "prefix_longest"]

# fmt: off


@triton.jit
def _rows(pointers, stride, valid, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    # [ROWS, BLOCK_D]
    r, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    mask = valid[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    return tl.load(pointers + (r * stride)[:, None] + d[None, :], mask, other=0.0)


@triton.jit
def _end(slot, length, slots, longest):
    # how many keys of a row are read: 0 if the cache has no such row, and at most `longest`
    return tl.where((slot >= 0) & (slot < slots), tl.minimum(tl.maximum(length, 0), longest), 0).to(tl.int32)


@triton.jit(do_not_specialize=RAGGED)
def _decode_pieces(
    q_ptr, k_ptr, v_ptr, slot_ptr, end_ptr, length_ptr, partial_ptr, lse_ptr,
    stride_qb, stride_qh, stride_ks, stride_kt, stride_kh, stride_vs, stride_vt, stride_vh,
    B, window, skip, slots, longest, s_max, inner, cap,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PREFIX: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr, PIECE: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # A program takes SHARE sequences and GROUP query heads of one key head. SPLIT such groups have the same key head.
    # The program computes every num_programs(1)-th piece of a cache row for all of its sequences that share the row.
    # Then it goes on to the sequences with another row. Partial results are (pieces, B, H, Dv); the pieces of this
    # cache start at `skip`. Scores are in units of log2. m starts at a finite number, so exp2(-inf - m) is 0: a row
    # that has seen no key yet needs no special case.
    group, worker, first = tl.program_id(0) % GROUPS, tl.program_id(1), tl.program_id(0) // GROUPS * SHARE
    key_head = tl.cast(group // SPLIT, tl.int64)
    r, n = tl.arange(0, ROWS), tl.arange(0, BLOCK_N)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    H = GROUPS * GROUP

    # the queries: GROUP heads of each sequence
    b = first + r // GROUP  # [ROWS]
    inside = (r < SHARE * GROUP) & (b < B)
    q_ptr += tl.cast(first, tl.int64) * stride_qb + tl.cast(group, tl.int64) * GROUP * stride_qh
    q_at = q_ptr + (r // GROUP * stride_qb + r % GROUP * stride_qh)[:, None] + d[None, :]
    query = tl.load(q_at, inside[:, None] & (d < D)[None, :], other=0.0)  # [ROWS, BLOCK_D]
    row = r // GROUP * H + r % GROUP  # [ROWS], relative to the first row

    # the keys that each row sees
    row_slot = tl.load(slot_ptr + b, inside, other=-1)
    row_end = _end(row_slot, tl.load(end_ptr + b, inside, other=0), slots, longest)
    first_seen = tl.zeros([ROWS], tl.int32)  # the first position that the row sees
    if PREFIX and WINDOW:
        first_seen = row_end + _end(0, tl.load(length_ptr + b, inside, other=0), 1, s_max) - window

    # A sequence leads all that see equally many keys of the same cache row, unless an earlier sequence leads it.
    for i in range(SHARE):
        leader = first + i
        slot = tl.load(slot_ptr + leader, leader < B, other=-1)
        end = _end(slot, tl.load(end_ptr + leader, leader < B, other=0), slots, longest)
        sharing = inside & (row_slot == slot) & (row_end == end)
        is_led = tl.min(tl.where(sharing, b, B), 0) < leader

        # of own rows the window hides the same keys from all sequences; of a prefix it hides different keys from each
        start, first_of_all = 0, 0
        if WINDOW:
            if PREFIX:
                first_of_all = tl.maximum(tl.min(tl.where(sharing, first_seen, end), 0), 0)
            else:
                start = tl.maximum(end - window, 0)
        pieces = tl.where(is_led, 0, tl.cdiv(end - start, PIECE))
        keys = k_ptr + slot.to(tl.int64) * stride_ks + key_head * stride_kh
        values = v_ptr + slot.to(tl.int64) * stride_vs + key_head * stride_vh

        for piece in range(worker, pieces, tl.num_programs(1)):
            lo = start + piece * PIECE
            hi = tl.minimum(lo + PIECE, end)
            if PREFIX and WINDOW:  # skip the blocks that no row sees
                lo += tl.maximum(first_of_all - lo, 0) // BLOCK_N * BLOCK_N
            m = tl.full([ROWS], -1.0e30, tl.float32)
            norm = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)

            for j in tl.range(lo, hi, BLOCK_N):
                at, valid = tl.cast(j, tl.int64), j + n < hi
                key = _rows(keys + at * stride_kt, stride_kt, valid, BLOCK_N, D, BLOCK_D)
                qk = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [ROWS, BLOCK_N]
                # cap * tanh(x) with inner * qk = 2x log2(e); exact at both ends, where exp2 is 0 or inf
                qk = cap * (1 - 2 / (tl.exp2(qk * inner) + 1)) if SOFTCAP else qk * inner
                seen = valid[None, :]
                if PREFIX and WINDOW:
                    seen = seen & ((j + n)[None, :] >= first_seen[:, None])
                qk = tl.where(seen, qk, float("-inf"))

                # the softmax so far: m is its maximum, norm its sum
                m_new = tl.maximum(m, tl.max(qk, 1))
                p = tl.exp2(qk - m_new[:, None])
                alpha = tl.exp2(m - m_new)
                norm = norm * alpha + tl.sum(p, 1)
                value = _rows(values + at * stride_vt, stride_vt, valid, BLOCK_N, DV, BLOCK_DV)
                acc = tl.dot(p.to(value.dtype), value, acc * alpha[:, None], input_precision=PRECISION)
                m = m_new

            # the piece's output and log-sum-exp, which is -inf for a row that sees none of the piece
            sees = norm != 0  # true for NaN, too
            norm = tl.where(sees, norm, 1.0)
            first_row = (tl.cast(skip + piece, tl.int64) * B + first) * H + group * GROUP
            tl.store(lse_ptr + first_row + row, tl.where(sees, m + tl.log2(norm), float("-inf")), sharing)
            partial_at = partial_ptr + first_row * DV + row[:, None] * DV + e[None, :]
            tl.store(partial_at, acc / norm[:, None], sharing[:, None] & (e < DV)[None, :])


@triton.jit(do_not_specialize=RAGGED)
def _decode_merge(
    partial_ptr, lse_ptr, sinks_ptr, out_ptr, slot_ptr, length_ptr, prefix_slot_ptr, prefix_length_ptr,
    window, skip, slots, longest, prefixes, prefix_longest,
    H: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    SINKS: tl.constexpr, PREFIX: tl.constexpr, WINDOW: tl.constexpr, PIECE: tl.constexpr, BLOCK_P: tl.constexpr,
):
    # A program takes one head of one sequence. It adds up the pieces in the order of positions, first the prefix's.
    index = tl.cast(tl.program_id(0), tl.int64)  # of (B, H)
    b, head = index // H, index % H
    e = tl.arange(0, BLOCK_DV)

    # the number of pieces
    length = _end(tl.load(slot_ptr + b), tl.load(length_ptr + b), slots, longest)
    if WINDOW:
        length = tl.minimum(length, window)
    own_pieces = tl.cdiv(length, PIECE)
    prefix_pieces = 0
    if PREFIX:
        prefix = tl.load(prefix_slot_ptr + b)
        prefix_end = _end(prefix, tl.load(prefix_length_ptr + b), prefixes, prefix_longest)
        prefix_pieces = tl.cdiv(prefix_end, PIECE)

    # the sum starts with the sink
    m, norm = -1.0e30, 0.0
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        m = tl.maximum(sink, -1.0e30)
        norm = tl.exp2(sink - m)
    acc = tl.zeros([BLOCK_DV], tl.float32)

    for start in range(0, prefix_pieces + own_pieces, BLOCK_P):
        piece = start + tl.arange(0, BLOCK_P)
        valid = piece < prefix_pieces + own_pieces
        piece = tl.where(piece < prefix_pieces, skip + piece, piece - prefix_pieces)
        at = piece.to(tl.int64) * tl.num_programs(0) + index  # [BLOCK_P] of (pieces, B, H)
        lse = tl.load(lse_ptr + at, valid, other=float("-inf"))
        partial_at = partial_ptr + at[:, None] * DV + e[None, :]
        partial = tl.load(partial_at, valid[:, None] & (e < DV)[None, :], other=0.0)

        m_new = tl.maximum(m, tl.max(lse, 0))
        weight, alpha = tl.exp2(lse - m_new), tl.exp2(m - m_new)
        norm = norm * alpha + tl.sum(weight, 0)
        acc = acc * alpha + tl.sum(weight[:, None] * partial, 0)
        m = m_new

    acc = acc / tl.where(norm != 0, norm, 1.0)  # NaN if norm is NaN
    tl.store(out_ptr + index * DV + e, acc.to(out_ptr.dtype.element_ty), e < DV)

# fmt: on


# ---- launch

PIECE = 256  # keys
MOST = 32  # heads of a tile; a larger group is split
PROGRAMS = 16  # the least on each multiprocessor, if there are enough pieces


def _piece(chip: str) -> int:
    return 32 if chip == "interpreted" else PIECE


@lru_cache(maxsize=256)
def _constants(
    chip: str, dtype: torch.dtype, H: int, G: int, D: int, DV: int, prefix: bool
) -> dict[str, Any]:
    """Return the compile-time constants, warps and stages of the kernel _decode_pieces for these heads.

    `prefix` says whether the kernel reads the cache of the prefixes or that of the sequences' own rows.
    """
    table = DECODE["fp32" if dtype == torch.float32 and chip != "interpreted" else chip]
    tile = next(tile for width, tile in table.items() if tile_width(max(D, DV)) <= width)
    steps = {"PIECE": _piece(chip), "BLOCK_N": tile.N, "num_warps": tile.warps, "num_stages": tile.stages}
    widths = {"D": D, "DV": DV, "BLOCK_D": tile_width(D), "BLOCK_DV": tile_width(DV)}

    # the query heads of a key head, or an equal part of them that fits a tile
    group = H // G
    split = next(n for n in range(1, group + 1) if group % n == 0 and group // n <= MOST)
    group //= split
    heads = {"GROUPS": G * split, "GROUP": group, "SPLIT": split}

    # a prefix may be shared: then as many sequences as fill the tile
    share = max(1, tile.M // group) if prefix else 1
    return steps | widths | heads | {"PREFIX": prefix, "SHARE": share, "ROWS": tile_width(share * group)}


def _unit_strides(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _decode(q: Tensor, caches: list[Cache], scores: Scores) -> Tensor:
    """Compute attention over one or two caches: the sequences' own rows and, if there are prefixes, the prefixes."""
    out = _shapes(q, caches, scores)
    if not out.numel():
        return out
    q = q if q.stride(-1) == 1 else q.contiguous()
    caches = [Cache(*_unit_strides(cache)) for cache in caches]
    sinks = None if scores.sinks is None else scores.sinks.contiguous()

    # the softmax of each piece of each cache
    piece = _piece(chip_of(q))
    pieces = [max(1, cdiv(cache.keys.shape[1], piece)) for cache in caches]
    partial = torch.empty(sum(pieces), *out.shape, device=q.device, dtype=torch.float32)
    lse = torch.empty(sum(pieces), *out.shape[:2], device=q.device, dtype=torch.float32)
    _by_piece(q, caches, scores, pieces, partial, lse)

    # combine the pieces
    (B, H, DV), own, last = out.shape, caches[0], caches[-1]
    has_prefix = last is not own
    prefix = (last.slot, last.length) if has_prefix else (None, None)
    tensors = partial, lse, sinks, out, own.slot, own.length, *prefix
    sizes = scores.window or 0, pieces[0], *own.keys.shape[:2], *last.keys.shape[:2]
    rules = {"SINKS": sinks is not None, "PREFIX": has_prefix, "WINDOW": scores.window is not None}
    steps = {"PIECE": piece, "BLOCK_P": 16, "num_warps": 4}
    _decode_merge[B * H,](*tensors, *sizes, H=H, DV=DV, BLOCK_DV=tile_width(DV), **rules, **steps)
    return out


def _by_piece(
    q: Tensor, caches: list[Cache], scores: Scores, pieces: list[int], partial: Tensor, lse: Tensor
) -> None:
    """Compute attention over each piece of the keys, without combining the pieces.

    The output of each piece goes into partial (pieces, B, H, Dv), and the log-sum-exp of its scores into lse
    (pieces, B, H).
    """
    (B, H, D), (_, S_max, G, DV) = q.shape, caches[0].values.shape
    scale, window, softcap, _ = scores
    rules = {"WINDOW": window is not None, "SOFTCAP": softcap is not None, "PRECISION": precision()}
    inner, cap = scale * LOG2E.value, 1.0
    if softcap is not None:
        inner, cap = 2 * LOG2E.value * scale / softcap, softcap * LOG2E.value

    chip, skip = chip_of(q), 0
    for cache, count in zip(caches, pieces, strict=True):
        constants = _constants(chip, q.dtype, H, G, D, DV, cache is not caches[0])
        programs = constants["GROUPS"] * cdiv(B, constants["SHARE"])
        workers = min(count, cdiv(PROGRAMS * multiprocessors(q), programs))
        tensors = q, *cache, caches[0].length, partial, lse
        strides = *q.stride()[:2], *cache.keys.stride()[:3], *cache.values.stride()[:3]
        sizes = B, window or 0, skip, *cache.keys.shape[:2], S_max
        _decode_pieces[programs, workers](*tensors, *strides, *sizes, inner, cap, **rules, **constants)
        skip += count


def _shapes(q: Tensor, caches: list[Cache], scores: Scores) -> Tensor:
    return q.new_empty(*q.shape[:2], caches[0].values.shape[-1])


_decode_op = make_op("decode_attention", _decode, _shapes)
# registered as an op because it reads lengths on the host
_decode_on_cpu = make_op("decode_attention_cpu", decode_attention_cpu, _shapes)


# ---- op


def _check(q: Tensor, own: Cache) -> None:
    k_cache, v_cache = own[:2]
    check_dtype("q", q)
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(
            f"q, k_cache, v_cache: expected one dtype, got {q.dtype}, {k_cache.dtype}, {v_cache.dtype}"
        )
    for name, x in (("q", q), ("v_cache", v_cache)):
        if not 1 <= x.shape[-1] <= 256:
            raise ValueError(f"{name}: expected a head dimension of 1 to 256, got {x.shape[-1]}")

    (_, H, D), (slots, S_max, G, _) = q.shape, k_cache.shape
    if G == 0 or H % G:
        raise ValueError(f"q: expected a multiple of the {G} key/value heads, got {H}")
    check_shape("k_cache", k_cache, slots=slots, S_max=S_max, kv_heads=G, head_dim=D)
    check_shape("v_cache", v_cache, slots=slots, S_max=S_max, kv_heads=G, head_dim=v_cache.shape[-1])


def _prefixes(
    own: Cache,
    slot: Tensor | None,
    length: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
) -> list[Cache]:
    """Return a list with the cache of the prefixes. The list is empty if there are no prefixes.

    Raises ValueError for arguments that are incomplete or do not match the sequences' own cache.
    """
    if (slot is None) != (length is None):
        raise ValueError("prefix_slot, prefix_length: expected both or neither, got one")
    if keys is None and values is None:
        keys, values = own.keys, own.values
    elif keys is None or values is None or slot is None:
        raise ValueError("k_prefix, v_prefix: expected both and a prefix_slot, or neither")
    elif not keys.dtype == values.dtype == own.keys.dtype:
        raise ValueError(f"k_prefix, v_prefix: expected {own.keys.dtype}, got {keys.dtype}, {values.dtype}")
    else:
        prefixes, P_max, G, D = *keys.shape[:2], *own.keys.shape[2:]
        rows = {"prefixes": prefixes, "P_max": P_max, "kv_heads": G}
        check_shape("k_prefix", keys, **rows, head_dim=D)
        check_shape("v_prefix", values, **rows, head_dim=own.values.shape[-1])
    return [] if slot is None or length is None else [Cache(keys, values, slot, length)]


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    length: Tensor,
    *,
    prefix_slot: Tensor | None = None,
    prefix_length: Tensor | None = None,
    k_prefix: Tensor | None = None,
    v_prefix: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute attention of the newest token of each sequence over its whole sequence, which lies in a cache.

    A picture is at the top of this file.

    q: (B, H, D)    k_cache: (slots, S_max, G, D)    v_cache: (slots, S_max, G, Dv). All have one dtype. H is a multiple
        of G. D and Dv are 1 to 256.
    slot: (B,) int32 or int64, the cache row of each sequence.
    length: (B,) int32 or int64, the number of keys of that row, at most S_max. They include the query's own key.
    prefix_slot, prefix_length: (B,) each, int32 or int64, both or neither: the row and length of the prefix. Slot -1
        means no prefix. Sequences with the same prefix are fastest if they are adjacent in the batch.
    k_prefix, v_prefix: (prefixes, P_max, G, D) and (prefixes, P_max, G, Dv), an optional cache for the prefixes alone.
        prefix_slot is then a row of this cache. P_max and S_max may differ.
    scale: the factor of the scores, by default 1 / sqrt(D).
    window: the query sees only the last `window` positions, including its own. Positions count through the prefix.
    softcap: a number c; each scaled score s becomes c * tanh(s / c).
    sinks: (H,), one logit per head that joins the softmax but has no value. It is neither scaled nor capped.
    Returns (B, H, Dv) in q's dtype, with zeros for an empty sequence. On a GPU a sequence gets the same bits whatever
        else is in the batch. On a CPU its last bits may depend on longer sequences, to whose length it is padded.
    NaN in a query, in a key that it sees or in its sink makes its whole row NaN. NaN in a value makes at least its
        channel NaN. Since 0 * NaN is NaN, it may also reach a sequence that has the same row or prefix but does not
        see the NaN.
    Raises ValueError for other shapes, dtypes and devices, and NotImplementedError if a gradient is required. On a CPU
        it also raises ValueError for slots and lengths that the caches do not have. On a GPU nobody checks these
        numbers: an invalid slot counts as an empty row, and an invalid length as the nearest valid one.
    """
    if q.dim() != 3 or k_cache.dim() != 4 or v_cache.dim() != 4:
        got = ", ".join(str(tuple(x.shape)) for x in (q, k_cache, v_cache))
        raise ValueError(
            f"q, k_cache, v_cache: expected (B, H, D), (slots, S_max, G, D), (slots, S_max, G, Dv), got {got}"
        )

    floats = dict(k_cache=k_cache, v_cache=v_cache, k_prefix=k_prefix, v_prefix=v_prefix, sinks=sinks)
    numbers = {"slot": slot, "length": length, "prefix_slot": prefix_slot, "prefix_length": prefix_length}
    check_device(q, **floats, **numbers)
    own = Cache(k_cache, v_cache, slot, length)
    _check(q, own)

    caches = [own, *_prefixes(own, prefix_slot, prefix_length, k_prefix, v_prefix)]
    for name, x in numbers.items():
        if x is not None:
            check_shape(name, x, batch=q.shape[0])
            check_dtype(name, x, torch.int32, torch.int64)
    window = check_attention(scale, window, softcap, sinks, q.shape[1])

    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, *floats.values())):
        raise NotImplementedError(
            "decode_attention: has no gradient; call it under torch.no_grad(), train through flash_attention"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    decode = _decode_op if use_triton(q) else _decode_on_cpu
    return decode(q, caches, Scores(scale, window, softcap, sinks))
