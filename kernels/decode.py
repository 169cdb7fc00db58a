"""Attention of one new token of each sequence over its cached keys and values: the step of generation. No gradient.

    s_j = scale * q . k_j       softcap c: s_j = c * tanh(scale * q . k_j / c)       over the keys j that are in sight
    out = sum_j exp(s_j) v_j / (sum_j exp(s_j) + exp(sink))                      the sink only where there is one

A sequence of `length` tokens is a row of the cache. It may go on from a second row, its prefix, which many sequences
share: a group of samples then holds its prompt once. Prefixes may lie in a cache of their own, as long as they are.

    position          0 1 2 3 4 5 6 7            prefix_length 5, length 3: the query stands at position 7
    prefix_slot 2     x x x x x
    slot 0                      x x x            window=4: it sees the positions 4 to 7

The keys are cut into pieces of a fixed length. Each piece gives its own softmax and its log-sum-exp, and the pieces are
put together in their order:

    lse_p = log(sum_{j in p} exp(s_j))        out = sum_p exp(lse_p) out_p / (sum_p exp(lse_p) + exp(sink))

Where a piece begins depends on the sequence alone, and which program computes it does not matter: a sequence has the
same bits whatever else is in the batch. The query heads that share a key head are the rows of one tile, so are those of
the sequences that share a prefix: what they share is read once.

Memory, in elements: reads 2 G D for each key in sight (a prefix: once for up to 16 sequences that stand together), and
writes and reads H (Dv + 1) in fp32 for each piece. All of it is bandwidth-bound; eager also copies the cache by slot,
repeats it for each query head, and writes and reads the scores.

Source: Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html; the shared prefix: Juravsky et al.
2024, https://arxiv.org/abs/2402.05099
"""

# A launch passes numbers where the kernel is annotated tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false

from functools import lru_cache
from itertools import chain
from typing import NamedTuple

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
    multiprocessors,
    next_power_of_2,
    precision,
    use_triton,
    without_autocast,
)
from ._op import register
from ._triton import tl, triton

# ---- reference


@without_autocast  # fp32 inside, whatever the policy outside
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """q (B, H, D), k (B, S, G, D), v (B, S, G, Dv), visible (B, S) to (B, H, Dv); zeros where nothing is visible."""
    wide = torch.promote_types(q.dtype, torch.float32)
    G, n = k.shape[2], q.shape[1] // k.shape[2]
    s = (q.shape[-1] ** -0.5 if scale is None else scale) * torch.einsum(
        "bgnd,bsgd->bgns", q.to(wide).unflatten(1, (G, n)), k.to(wide)
    )  # (B, G, n, S)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~visible[:, None, None], -torch.inf)
    sink = s.new_tensor(-torch.inf) if sinks is None else sinks.to(wide).view(G, n, 1)
    s = torch.cat([s, sink.expand(*s.shape[:-1], 1)], -1)  # (B, G, n, S + 1)
    e = torch.exp(s - s.amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min))
    total = e.sum(-1, keepdim=True)
    p = e / torch.where(total > 0, total, 1.0)
    return torch.einsum("bgns,bsgd->bgnd", p[..., :-1], v.to(wide)).flatten(1, 2).to(q.dtype)


def decode_attention_reference(
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
    k_prefix, v_prefix = (k_cache, v_cache) if k_prefix is None or v_prefix is None else (k_prefix, v_prefix)
    out = q.new_empty(*q.shape[:2], v_cache.shape[-1])
    for b in range(q.shape[0]):
        k, v = k_cache[slot[b], : length[b]], v_cache[slot[b], : length[b]]  # (S, G, D), (S, G, Dv)
        if prefix_slot is not None and prefix_length is not None and prefix_slot[b] >= 0:
            before = prefix_slot[b], slice(prefix_length[b])
            k, v = torch.cat([k_prefix[before], k]), torch.cat([v_prefix[before], v])
        if window is not None:
            k, v = k[-window:], v[-window:]
        seen = torch.ones(1, k.shape[0], dtype=torch.bool, device=q.device)
        out[b] = _attend(q[b, None], k[None], v[None], seen, scale, softcap, sinks)[0]
    return out


# ---- CPU path

CALL = 2**19  # what one more call costs, in bytes read: 50 us, and 9 GB/s, of a core of an AMD EPYC
QUERY = 0.25  # and the product of a query and a key, in readings of the key


class Bucket(NamedTuple):
    """Neighbouring rows of a cache that one call reads, each for as many sequences as has the one with the most."""

    rows: slice
    keys: slice  # all that one of its sequences sees
    readers: int  # places to a row
    # (rows, 1, 1 or queries to a row, keys), added to the scores; None: all is in sight, FEW_KEYS or more
    mask: Tensor | None


class Part(NamedTuple):
    """How the sequences read one cache."""

    buckets: list[Bucket]
    source: Tensor | None  # the sequence in each place; None: the sequences themselves, as they come
    place: Tensor | None  # (B,), where each sequence stands
    blind: Tensor | None  # (B,) bool: those that see nothing here


def _flags(flags: list[bool]) -> Tensor | None:
    return torch.tensor(flags) if any(flags) else None


@lru_cache(maxsize=16)  # all layers of a step read alike, and prefixes are read as the step before did
def _part(
    rows: tuple[int, ...],
    first: tuple[int, ...],
    last: tuple[int, ...],
    G: int,
    n: int,
    width: int,
    dtype: torch.dtype,
) -> Part | None:
    """Sequence b sees the keys first[b] to last[b] - 1 of the row rows[b]. None: nobody sees anything.

    Each of the G key heads has n query heads, and a key with its value `width` bytes.
    """
    B = len(rows)
    readers: dict[int, list[int]] = {}  # of each row
    for b in sorted(range(B), key=rows.__getitem__):
        if first[b] < last[b]:
            readers.setdefault(rows[b], []).append(b)

    def cost(rows: int, keys: int, readers: int) -> float:
        return rows * keys * G * width * (1 + QUERY * readers * n)

    groups: list[tuple[list[int], int, int, int]] = []  # of each bucket: rows, keys from and to, readers
    needed = 0.0
    for row, members in readers.items():
        lo, hi, most = min(first[b] for b in members), max(last[b] for b in members), len(members)
        own = cost(1, hi - lo, most)
        if groups and groups[-1][0][-1] + 1 == row:
            held, *edges = groups[-1]
            joint = min(lo, edges[0]), max(hi, edges[1]), max(most, edges[2])
            if cost(len(held) + 1, joint[1] - joint[0], joint[2]) <= needed + own + CALL:
                groups[-1], needed = ([*held, row], *joint), needed + own
                continue
        groups.append(([row], lo, hi, most))
        needed = own
    if not groups:
        return None
    buckets, source = [], []
    for held, lo, hi, most in groups:
        places = [(readers[row] * most)[:most] for row in held]  # repeated, where a row has fewer
        inside = [[(first[b], last[b]) for b in members] for members in places]
        mask = None
        if hi - lo < FEW_KEYS or any(seen != (lo, hi) for ranges in inside for seen in ranges):
            alike = all(len(set(ranges)) == 1 for ranges in inside)
            edges = torch.tensor([ranges[:1] for ranges in inside] if alike else inside)[:, None, :, None]
            position = torch.arange(lo, hi)  # edges: (rows, 1, readers or 1, 1, 2)
            hidden = (position < edges[..., 0]) | (position >= edges[..., 1])  # (rows, 1, readers or 1, keys)
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
            mask = mask if alike else mask.repeat_interleave(n, 2)
        buckets.append(Bucket(slice(held[0], held[-1] + 1), slice(lo, hi), most, mask))
        source += chain.from_iterable(places)
    blind = _flags([i >= j for i, j in zip(first, last, strict=True)])
    if source == list(range(B)):
        return Part(buckets, None, None, blind)
    place = dict(zip(source, range(len(source)), strict=True))
    return Part(buckets, torch.tensor(source), torch.tensor([place.get(b, 0) for b in range(B)]), blind)


def _read(part: Part, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, G, n, D) over what the sequences see of one cache: (B, G, n, Dv) and log-sum-exp (B, G, n)."""
    n, D, Dv = *q.shape[2:], values.shape[-1]
    q = q if part.source is None else q.index_select(0, part.source)
    q = F.pad(q, (0, Dv - D)) if Dv > D else q
    q, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, keys, values))
    outs, start = [], 0
    for rows, seen, readers, mask in part.buckets:
        k, v = keys[rows, seen].transpose(1, 2), values[rows, seen].transpose(1, 2)  # (rows, G, keys, D)
        if Dv != D:  # the call takes one width
            k, v = F.pad(k, (0, max(Dv - D, 0))), F.pad(v, (0, max(D - Dv, 0)))
        end = start + k.shape[0] * readers
        x = q[start:end]
        if readers > 1:
            x = x.unflatten(0, (-1, readers)).transpose(1, 2).flatten(2, 3)  # (rows, G, readers * n, D)
        # what scaled_dot_product_attention calls on a CPU; by that name there is no log-sum-exp
        both = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            x, k, v, attn_mask=mask, scale=scale
        )
        if readers > 1:
            both = [y.unflatten(2, (readers, n)).transpose(1, 2).flatten(0, 1) for y in both]
        outs.append(both)
        start = end
    out, lse = outs[0] if len(outs) == 1 else map(torch.cat, zip(*outs, strict=True))
    if part.place is not None:
        out, lse = out.index_select(0, part.place), lse.index_select(0, part.place)
    if part.blind is not None:  # its lse is 0 where all is masked, its row another's where it has no place
        blind = part.blind[:, None, None]
        out, lse = out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -torch.inf)
    return out[..., :Dv], lse


def _check_rows(cache: str, slots: str, slot: Tensor, lengths: str, length: Tensor, rows: Tensor) -> None:
    """Raises ValueError for slots and lengths that `rows` (slots, S_max, ...) of that name do not have."""
    for name, x, most in ((slots, slot, rows.shape[0] - 1), (lengths, length, rows.shape[1])):
        if x.numel() and not 0 <= int(x.min()) <= int(x.max()) <= most:
            found = f"{int(x.min())} to {int(x.max())}"
            raise ValueError(f"{name}: expected 0 to {most} with {cache} {tuple(rows.shape)}, got {found}")


def _decode_cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    length: Tensor,
    prefix_slot: Tensor | None,
    prefix_length: Tensor | None,
    k_prefix: Tensor,
    v_prefix: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """A call for each bucket of prefixes and of own rows, put together by the log-sum-exps as the kernels do it."""
    _check_rows("k_cache", "slot", slot, "length", length, k_cache)
    if prefix_slot is not None and prefix_length is not None:
        some = prefix_slot != -1
        prefixes = prefix_slot[some], "prefix_length", prefix_length[some]
        _check_rows("k_prefix", "prefix_slot", *prefixes, k_prefix)
    if softcap is not None:  # which torch's fused attention has not
        return decode_attention_reference(
            *(q, k_cache, v_cache, slot, length),
            **{"prefix_slot": prefix_slot, "prefix_length": prefix_length},
            **{"k_prefix": k_prefix, "v_prefix": v_prefix},
            **{"scale": scale, "window": window, "softcap": softcap, "sinks": sinks},
        )
    wide, G = torch.promote_types(q.dtype, torch.float32), k_cache.shape[2]
    shape = G, q.shape[1] // G, (q.shape[2] + v_cache.shape[3]) * q.element_size(), q.dtype
    own = length.tolist()
    rows = before = [0] * len(own)  # of the prefixes, and how many tokens they have
    if prefix_slot is not None and prefix_length is not None:
        rows = prefix_slot.tolist()
        before = [n if row >= 0 else 0 for row, n in zip(rows, prefix_length.tolist(), strict=True)]
    both = [n + m for n, m in zip(before, own, strict=True)]
    hidden = first = [0] * len(own)  # what the window hides: of all positions, and of the own ones
    if window is not None:
        hidden = [max(n - window, 0) for n in both]
        first = [max(i - n, 0) for i, n in zip(hidden, before, strict=True)]
    x = q.unflatten(1, (G, -1))  # (B, G, n, D)
    read = [
        _read(part, x, keys, values, scale)
        for part, keys, values in (
            (_part(tuple(rows), tuple(hidden), tuple(before), *shape), k_prefix, v_prefix),
            (_part(tuple(slot.tolist()), tuple(first), tuple(own), *shape), k_cache, v_cache),
        )
        if part is not None
    ]
    if not read:
        return q.new_zeros(*q.shape[:2], v_cache.shape[-1])
    out, lse = read[0]
    out = out.to(wide)  # (B, G, n, Dv)
    if len(read) == 2:
        further, own_lse = read[1]
        out = torch.lerp(out, further.to(wide), torch.sigmoid(own_lse - lse)[..., None])
        lse = lse if sinks is None else torch.logaddexp(lse, own_lse)
    if sinks is not None:
        out = out * torch.sigmoid(lse - sinks.to(wide).view(G, -1))[..., None]
    empty = _flags([n == 0 for n in both])
    if empty is not None:
        out = out.masked_fill(empty[:, None, None, None], 0.0)
    return out.flatten(1, 2).to(q.dtype)  # (B, H, Dv)


# ---- kernels

RAGGED = [
    "B",
    "window",
    "skip",
    "slots",
    "longest",
    "prefixes",
    "own_longest",
    "prefix_longest",
]  # change with the batch: no new compilation for a multiple of 16


@triton.jit
def _rows(pointers, stride, inside, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    # [ROWS, BLOCK_D]
    r, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    return tl.load(pointers + (r * stride)[:, None] + d[None, :], mask, other=0.0)


@triton.jit
def _end(slot, length, slots, longest):
    # how many keys are read of a row: none of one that the cache has not, never more than there are
    return tl.where((slot >= 0) & (slot < slots), tl.minimum(tl.maximum(length, 0), longest), 0).to(tl.int32)


@triton.jit(do_not_specialize=RAGGED)
def _decode_pieces(
    q_ptr, k_ptr, v_ptr, slot_ptr, end_ptr, length_ptr, partial_ptr, lse_ptr,
    stride_qb, stride_qh, stride_ks, stride_kt, stride_kh, stride_vs, stride_vt, stride_vh,
    B, window, skip, slots, longest, own_longest, inner, cap,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PREFIX: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr, PIECE: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # A program: GROUP heads of one key head, SHARE sequences, every num_programs(1)-th piece of the cache row that they
    # share. The sequences that do not share it come after, in the same way. SPLIT such groups have the same key head.
    # Partial results are (pieces, B, H, Dv), the prefix's from piece `skip` on. Scores live in units of log2; m starts
    # at a finite number, so a row that has seen nothing yet needs no special case: exp2(-inf - m) is 0.
    group, worker, first = tl.program_id(0) % GROUPS, tl.program_id(1), tl.program_id(0) // GROUPS * SHARE
    key_head = tl.cast(group // SPLIT, tl.int64)
    r, n = tl.arange(0, ROWS), tl.arange(0, BLOCK_N)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    H = GROUPS * GROUP
    b = first + r // GROUP  # [ROWS]
    inside = (r < SHARE * GROUP) & (b < B)
    q_ptr += tl.cast(first, tl.int64) * stride_qb + tl.cast(group, tl.int64) * GROUP * stride_qh
    q_at = q_ptr + (r // GROUP * stride_qb + r % GROUP * stride_qh)[:, None] + d[None, :]
    query = tl.load(q_at, inside[:, None] & (d < D)[None, :], other=0.0)  # [ROWS, BLOCK_D]
    row = r // GROUP * H + r % GROUP  # [ROWS], from the first row on
    row_slot = tl.load(slot_ptr + b, inside, other=-1)
    row_end = _end(row_slot, tl.load(end_ptr + b, inside, other=0), slots, longest)
    in_sight = tl.zeros([ROWS], tl.int32)  # the first position that the row sees
    if PREFIX and WINDOW:
        in_sight = row_end + _end(0, tl.load(length_ptr + b, inside, other=0), 1, own_longest) - window
    for i in range(SHARE):
        leader = first + i
        slot = tl.load(slot_ptr + leader, leader < B, other=-1)
        end = _end(slot, tl.load(end_ptr + leader, leader < B, other=0), slots, longest)
        together = inside & (row_slot == slot) & (row_end == end)
        served = tl.min(tl.where(together, b, B), 0) < leader
        start, nearest = 0, 0
        if WINDOW:
            if PREFIX:
                nearest = tl.maximum(tl.min(tl.where(together, in_sight, end), 0), 0)
            else:
                start = tl.maximum(end - window, 0)
        pieces = tl.where(served, 0, tl.cdiv(end - start, PIECE))
        keys = k_ptr + slot.to(tl.int64) * stride_ks + key_head * stride_kh
        values = v_ptr + slot.to(tl.int64) * stride_vs + key_head * stride_vh
        for piece in range(worker, pieces, tl.num_programs(1)):
            lo = start + piece * PIECE
            hi = tl.minimum(lo + PIECE, end)
            if PREFIX and WINDOW:  # blocks that no row sees
                lo += tl.maximum(nearest - lo, 0) // BLOCK_N * BLOCK_N
            m = tl.full([ROWS], -1.0e30, tl.float32)
            norm = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
            for j in tl.range(lo, hi, BLOCK_N):
                at, there = tl.cast(j, tl.int64), j + n < hi
                key = _rows(keys + at * stride_kt, stride_kt, there, BLOCK_N, D, BLOCK_D)
                qk = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [ROWS, BLOCK_N]
                # cap * tanh(x), inner * qk = 2x log2(e); exact at both ends, where exp2 is 0 or inf
                qk = cap * (1 - 2 / (tl.exp2(qk * inner) + 1)) if SOFTCAP else qk * inner
                seen = there[None, :]
                if PREFIX and WINDOW:
                    seen = seen & ((j + n)[None, :] >= in_sight[:, None])
                qk = tl.where(seen, qk, float("-inf"))
                m_new = tl.maximum(m, tl.max(qk, 1))
                p = tl.exp2(qk - m_new[:, None])
                alpha = tl.exp2(m - m_new)
                norm = norm * alpha + tl.sum(p, 1)
                value = _rows(values + at * stride_vt, stride_vt, there, BLOCK_N, DV, BLOCK_DV)
                acc = tl.dot(p.to(value.dtype), value, acc * alpha[:, None], input_precision=PRECISION)
                m = m_new
            some = norm != 0  # a NaN, too
            norm = tl.where(some, norm, 1.0)
            top = (tl.cast(skip + piece, tl.int64) * B + first) * H + group * GROUP
            tl.store(lse_ptr + top + row, tl.where(some, m + tl.log2(norm), float("-inf")), together)
            partial_at = partial_ptr + top * DV + row[:, None] * DV + e[None, :]
            tl.store(partial_at, acc / norm[:, None], together[:, None] & (e < DV)[None, :])


@triton.jit(do_not_specialize=RAGGED)
def _decode_merge(
    partial_ptr, lse_ptr, sinks_ptr, out_ptr, slot_ptr, length_ptr, prefix_slot_ptr, prefix_length_ptr,
    window, skip, slots, longest, prefixes, prefix_longest,
    H: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    SINKS: tl.constexpr, PREFIX: tl.constexpr, WINDOW: tl.constexpr, PIECE: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # in the order of the positions: the prefix's pieces, then the own ones
    index = tl.cast(tl.program_id(0), tl.int64)  # of (B, H)
    b, head = index // H, index % H
    e = tl.arange(0, BLOCK_DV)
    length = _end(tl.load(slot_ptr + b), tl.load(length_ptr + b), slots, longest)
    if WINDOW:
        length = tl.minimum(length, window)
    own = tl.cdiv(length, PIECE)
    before = 0
    if PREFIX:
        prefix = tl.load(prefix_slot_ptr + b)
        before = tl.cdiv(_end(prefix, tl.load(prefix_length_ptr + b), prefixes, prefix_longest), PIECE)
    m, norm = -1.0e30, 0.0
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        m = tl.maximum(sink, -1.0e30)
        norm = tl.exp2(sink - m)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for start in range(0, before + own, BLOCK_P):
        piece = start + tl.arange(0, BLOCK_P)
        there = piece < before + own
        piece = tl.where(piece < before, skip + piece, piece - before)
        at = piece.to(tl.int64) * tl.num_programs(0) + index  # [BLOCK_P] of (pieces, B, H)
        lse = tl.load(lse_ptr + at, there, other=float("-inf"))
        partial = tl.load(
            partial_ptr + at[:, None] * DV + e[None, :], there[:, None] & (e < DV)[None, :], other=0.0
        )
        m_new = tl.maximum(m, tl.max(lse, 0))
        weight, alpha = tl.exp2(lse - m_new), tl.exp2(m - m_new)
        norm = norm * alpha + tl.sum(weight, 0)
        acc = acc * alpha + tl.sum(weight[:, None] * partial, 0)
        m = m_new
    acc = acc / tl.where(norm != 0, norm, 1.0)  # NaN where the norm is
    tl.store(out_ptr + index * DV + e, acc.to(out_ptr.dtype.element_ty), e < DV)


# ---- autograd

LOG2E = 1.4426950408889634
PIECE = 256  # keys
ROWS = 16  # of the tile of sequences that share a prefix, where a group of heads has not more
MOST = 32  # heads to a tile; a larger group is split
PROGRAMS = 16  # on each multiprocessor, at least, where there are as many pieces

# by the wider head dimension, padded: BLOCK_N, warps, stages; the first entry that is wide enough
TILES = {
    "half": {64: (64, 4, 3), 128: (32, 4, 3), 256: (16, 4, 3)},
    # and RTX cards; untimed, and with 4 warps two of them spill
    "half_sm_80": {64: (64, 8, 3), 128: (32, 4, 3), 256: (16, 8, 3)},
    "fp32": {64: (64, 8, 2), 128: (32, 8, 2), 256: (16, 8, 2)},
    "interpreted": {256: (16, 4, 1)},
}


def _pad(width: int) -> int:
    return max(16, next_power_of_2(width))


def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    length: Tensor,
    prefix_slot: Tensor | None,
    prefix_length: Tensor | None,
    k_prefix: Tensor,
    v_prefix: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    out = q.new_empty(*q.shape[:2], v_cache.shape[-1])
    if not out.numel():
        return out
    q, k_cache, v_cache, k_prefix, v_prefix = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, k_cache, v_cache, k_prefix, v_prefix)
    )
    (B, H, D), (_, S_max, G, DV) = q.shape, v_cache.shape
    BLOCK_D, BLOCK_DV = _pad(D), _pad(DV)
    chip = capability(q)
    interpreted = chip == (0, 0)
    half = "half_sm_80" if chip[0] in (8, 12) else "half"
    table = TILES["interpreted" if interpreted else "fp32" if q.dtype == torch.float32 else half]
    BLOCK_N, warps, stages = next(tile for width, tile in table.items() if max(BLOCK_D, BLOCK_DV) <= width)
    piece = 32 if interpreted else PIECE
    skip = max(1, cdiv(S_max, piece))  # where the prefixes' partial results begin
    group = H // G
    split = next(n for n in range(1, group + 1) if group % n == 0 and group // n <= MOST)
    group //= split
    parts = [(k_cache, v_cache, slot, length, skip, 1, False)]  # the own rows, then the prefixes'
    if prefix_slot is not None and prefix_length is not None:
        pieces, share = max(1, cdiv(k_prefix.shape[1], piece)), max(1, ROWS // group)
        parts.append((k_prefix, v_prefix, prefix_slot, prefix_length, pieces, share, True))
    total = sum(pieces for _, _, _, _, pieces, *_ in parts)
    partial = torch.empty(total, B, H, DV, device=q.device, dtype=torch.float32)
    lse = torch.empty(total, B, H, device=q.device, dtype=torch.float32)
    inner, cap = (scale * LOG2E, 1.0) if softcap is None else (2 * LOG2E * scale / softcap, softcap * LOG2E)
    for k, v, rows, ends, pieces, SHARE, PREFIX in parts:
        chunks = cdiv(B, SHARE)
        workers = min(pieces, cdiv(PROGRAMS * multiprocessors(q), G * split * chunks))
        _decode_pieces[G * split * chunks, workers](
            q, k, v, rows, ends, length, partial, lse, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
            B, window or 0, skip if PREFIX else 0, *k.shape[:2], S_max, inner, cap,
            GROUPS=G * split, GROUP=group, D=D, DV=DV, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV,
            WINDOW=window is not None, SOFTCAP=softcap is not None, PREFIX=PREFIX,
            PRECISION=precision(),
            SPLIT=split, PIECE=piece, SHARE=SHARE, ROWS=_pad(SHARE * group), BLOCK_N=BLOCK_N,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    _decode_merge[B * H,](
        partial, lse, sinks, out, slot, length, prefix_slot, prefix_length,
        window or 0, skip, *k_cache.shape[:2], *k_prefix.shape[:2],
        H=H, DV=DV, BLOCK_DV=BLOCK_DV, SINKS=sinks is not None, PREFIX=prefix_slot is not None,
        WINDOW=window is not None, PIECE=piece, BLOCK_P=16, num_warps=4,
    )  # fmt: skip
    return out


def _decode_fake(
    q,
    k_cache,
    v_cache,
    slot,
    length,
    prefix_slot,
    prefix_length,
    k_prefix,
    v_prefix,
    scale,
    window,
    softcap,
    sinks,
) -> Tensor:
    return q.new_empty(*q.shape[:2], v_cache.shape[-1])


_decode_op = register("decode_attention", _decode, _decode_fake)
_decode_on_cpu = register("decode_attention_cpu", _decode_cpu, _decode_fake)  # it reads lengths on the host


# ---- public op


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
    """The newest token of each sequence attends to all of its sequence; the picture is at the top of this file.

    q: (B, H, D)    k_cache: (slots, S_max, G, D)    v_cache: (slots, S_max, G, Dv). One dtype. H a multiple of G; D
        and Dv in 1..256.
    slot: (B,) int32 or int64, the cache row of each sequence.
    length: (B,) int32 or int64, how many keys of that row are its own: at most S_max, the query's included.
    prefix_slot, prefix_length: (B,) each, both or neither: the row and length of what comes before. Slot -1: nothing.
        Sequences with the same prefix are fastest when they stand together in the batch.
    k_prefix, v_prefix: (prefixes, P_max, G, D) and (prefixes, P_max, G, Dv), where prefix_slot is a row of these and
        not of the caches: rows for prompts need not be as long as rows for what follows, nor the other way round.
    scale: of the scores, by default 1 / sqrt(D).    softcap: c * tanh(scores / c).
    window: the last `window` positions are in sight, the query's own included, counted through the prefix.
    sinks: (H,) one logit per head that takes part in the softmax and has no value; neither scaled nor capped.
    Returns (B, H, Dv) in q's dtype; zeros where a sequence is empty. On a GPU each sequence has the same bits whatever
        else is in the batch; on the CPU its last bits may depend on the longest beside it, which sets the padding.
    NaN comes out: of a query, a key in its sight or a sink in its whole row, of a value at least in its channel. It may
        come out of a sequence that has the same row or prefix and does not see it, as 0 * NaN.
    Raises ValueError for shapes, dtypes and devices other than these, NotImplementedError where a gradient is asked
        for; on a CPU also ValueError for slots and lengths that the caches do not have. On a GPU, where nobody reads
        them, such a slot counts as one of length 0, such a prefix as none, and a length as the nearest that there is.
    """
    if q.dim() != 3 or k_cache.dim() != 4 or v_cache.dim() != 4:
        got = ", ".join(str(tuple(x.shape)) for x in (q, k_cache, v_cache))
        raise ValueError(
            f"q, k_cache, v_cache: expected (B, H, D), (slots, S_max, G, D), (slots, S_max, G, Dv), got {got}"
        )
    tables = {"slot": slot, "length": length, "prefix_slot": prefix_slot, "prefix_length": prefix_length}
    check_device(
        q, k_cache=k_cache, v_cache=v_cache, k_prefix=k_prefix, v_prefix=v_prefix, sinks=sinks, **tables
    )
    check_dtype("q", q)
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(
            f"q, k_cache, v_cache: expected one dtype, got {q.dtype}, {k_cache.dtype}, {v_cache.dtype}"
        )
    for name, x in (("q", q), ("v_cache", v_cache)):
        if not 1 <= x.shape[-1] <= 256:
            raise ValueError(f"{name}: expected a head dimension of 1 to 256, got {x.shape[-1]}")
    (B, H, D), (slots, S_max, G, _) = q.shape, k_cache.shape
    if G == 0 or H % G:
        raise ValueError(f"q: expected a multiple of the {G} key/value heads, got {H}")
    check_shape("k_cache", k_cache, slots=slots, S_max=S_max, kv_heads=G, head_dim=D)
    check_shape("v_cache", v_cache, slots=slots, S_max=S_max, kv_heads=G, head_dim=v_cache.shape[-1])
    if (prefix_slot is None) != (prefix_length is None):
        raise ValueError("prefix_slot, prefix_length: expected both or neither, got one")
    if k_prefix is None and v_prefix is None:
        k_prefix, v_prefix = k_cache, v_cache
    elif k_prefix is None or v_prefix is None or prefix_slot is None:
        raise ValueError("k_prefix, v_prefix: expected both and a prefix_slot, or neither")
    elif not k_prefix.dtype == v_prefix.dtype == q.dtype:
        raise ValueError(f"k_prefix, v_prefix: expected {q.dtype}, got {k_prefix.dtype}, {v_prefix.dtype}")
    else:
        prefixes, P_max = k_prefix.shape[:2]
        rows = {"prefixes": prefixes, "P_max": P_max, "kv_heads": G}
        check_shape("k_prefix", k_prefix, **rows, head_dim=D)
        check_shape("v_prefix", v_prefix, **rows, head_dim=v_cache.shape[-1])
    for name, x in tables.items():
        if x is not None:
            check_shape(name, x, batch=B)
            check_dtype(name, x, torch.int32, torch.int64)
    window = check_attention(scale, window, softcap, sinks, H)
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k_cache, v_cache, k_prefix, v_prefix, sinks)
    ):
        raise NotImplementedError(
            "decode_attention: has no gradient; call it under torch.no_grad(), train through flash_attention"
        )
    caches, scale = (k_prefix, v_prefix), D**-0.5 if scale is None else scale
    if not use_triton(q):
        return _decode_on_cpu(q, k_cache, v_cache, *tables.values(), *caches, scale, window, softcap, sinks)
    *numbers, sinks = (None if x is None else x.contiguous() for x in (*tables.values(), sinks))
    return _decode_op(q, k_cache, v_cache, *numbers, *caches, scale, window, softcap, sinks)
