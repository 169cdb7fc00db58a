"""Decoding on a CPU: the reference of decode_attention, and its path by torch's fused attention.

    prefix  x x x x x            in each of its two rows, a sequence sees the keys first to last - 1;
    row               x x x      a window hides the earliest keys

One attention call computes several neighbouring rows of a cache, if reading keys that some of the rows do not need is
cheaper than another call. The results of the two caches are combined by their log-sum-exps, as in the kernels.
"""

from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._chip import FEW_KEYS, without_autocast
from ..records import Cache, Scores

CALL = 2**19  # the cost of one more call, in bytes read: 50 us at 9 GB/s, on a core of an AMD EPYC
QUERY = 0.25  # the cost of the product of a query and a key, relative to reading the key


# ---- reference


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
    caches = [Cache(k_cache, v_cache, slot, length)]
    if prefix_slot is not None and prefix_length is not None:
        keys, values = (k_cache, v_cache) if k_prefix is None or v_prefix is None else (k_prefix, v_prefix)
        caches.append(Cache(keys, values, prefix_slot, prefix_length))
    scores = Scores(q.shape[-1] ** -0.5 if scale is None else scale, window, softcap, sinks)
    return _one_by_one(q, caches, scores)


@without_autocast  # always computes in fp32
def _one_by_one(q: Tensor, caches: list[Cache], scores: Scores) -> Tensor:
    """Compute attention for one sequence at a time.

    The keys of a sequence's prefix, in the second cache, come before its own keys.
    """
    out = q.new_empty(*q.shape[:2], caches[0].values.shape[-1])
    for b in range(q.shape[0]):
        k, v = _row(caches[0], b)
        for prefix in caches[1:]:
            if prefix.slot[b] >= 0:
                k, v = map(torch.cat, zip(_row(prefix, b), (k, v), strict=True))
        if scores.window is not None:
            k, v = k[-scores.window :], v[-scores.window :]
        out[b] = _attend(q[b], k, v, scores)
    return out


def _row(cache: Cache, b: int) -> tuple[Tensor, Tensor]:
    """Return the keys (S, G, D) and values (S, G, Dv) of sequence b."""
    row = cache.slot[b], slice(cache.length[b])
    return cache.keys[row], cache.values[row]


def _attend(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """Compute attention of one query: q (H, D), k (S, G, D) and v (S, G, Dv) give (H, Dv), or zeros without keys."""
    wide = torch.promote_types(q.dtype, torch.float32)
    G, n = k.shape[1], q.shape[0] // k.shape[1]
    s = scores.scale * torch.einsum("gnd,sgd->gns", q.to(wide).unflatten(0, (G, n)), k.to(wide))
    if scores.softcap is not None:
        s = scores.softcap * torch.tanh(s / scores.softcap)

    # the sink is one more column, which has no value
    sink = s.new_tensor(-torch.inf) if scores.sinks is None else scores.sinks.to(wide).view(G, n, 1)
    s = torch.cat([s, sink.expand(G, n, 1)], -1)  # (G, n, S + 1)
    e = torch.exp(s - s.amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min))
    total = e.sum(-1, keepdim=True)
    p = e / torch.where(total > 0, total, 1.0)
    return torch.einsum("gns,sgd->gnd", p[..., :-1], v.to(wide)).flatten(0, 1)


# ---- calls


class Call(NamedTuple):
    """Neighbouring rows of a cache that one attention call reads.

    Several sequences may read one row, such as a shared prompt. In the call every row has the same number of places for
    sequences, which is the largest number of sequences that read one of the rows.
    """

    rows: range
    keys: range  # all keys that any of its sequences sees
    readers: int  # the number of places for sequences in each row
    mask: Tensor | None = None

    def beside(self, other: "Call") -> "Call":
        """Return one call for the rows of this call and of `other`, which has the next rows."""
        keys = range(min(self.keys.start, other.keys.start), max(self.keys.stop, other.keys.stop))
        return Call(range(self.rows.start, other.rows.stop), keys, max(self.readers, other.readers))


class Plan(NamedTuple):
    """The attention calls that together read one cache for a whole batch."""

    calls: list[Call]
    source: Tensor | None  # the sequence in each place; None if the places are the batch in its own order
    place: Tensor | None  # (B,), the place of each sequence
    blind: Tensor | None  # (B,) bool, whether a sequence sees nothing in this cache


@lru_cache(maxsize=16)  # all layers of a step need the same plan, and so do the prefixes of the next step
def _plan(
    rows: tuple[int, ...],
    first: tuple[int, ...],
    last: tuple[int, ...],
    n: int,
    key_bytes: int,
    dtype: torch.dtype,
) -> Plan | None:
    """Return the attention calls that read one cache for a batch, or None if no key is seen.

    Sequence b sees the keys first[b] to last[b] - 1 of row rows[b]. n: query heads for each key head. key_bytes: the
    bytes of a key and its value, over all heads.
    """
    readers: dict[int, list[int]] = {}  # the sequences of each row
    for b in sorted(range(len(rows)), key=rows.__getitem__):
        if first[b] < last[b]:
            readers.setdefault(rows[b], []).append(b)
    if not readers:
        return None

    # a call for each row, then for neighbouring rows
    calls = []
    for row, members in readers.items():
        keys = range(min(first[b] for b in members), max(last[b] for b in members))
        calls.append(Call(range(row, row + 1), keys, len(members)))
    calls = _joined(calls, n, key_bytes)

    # the sequences in the places of each call; a row with fewer readers repeats them
    source = []
    for i, call in enumerate(calls):
        places = [(readers[row] * call.readers)[: call.readers] for row in call.rows]
        seen = [[(first[b], last[b]) for b in members] for members in places]
        calls[i] = call._replace(mask=_mask(seen, call.keys, n, dtype))
        source += chain.from_iterable(places)

    blind = _flags([i >= j for i, j in zip(first, last, strict=True)])
    if source == list(range(len(rows))):
        return Plan(calls, None, None, blind)
    place = dict(zip(source, range(len(source)), strict=True))
    return Plan(calls, torch.tensor(source), torch.tensor([place.get(b, 0) for b in range(len(rows))]), blind)


def _joined(calls: list[Call], n: int, key_bytes: int) -> list[Call]:
    """Merge neighbouring calls where the merged call costs no more than the calls that it replaces."""

    def cost(call: Call) -> float:
        return len(call.rows) * len(call.keys) * key_bytes * (1 + QUERY * call.readers * n)

    joined: list[Call] = []
    cost_alone = 0.0  # the cost of reading the rows of the last joined call one by one
    for call in calls:
        if joined and joined[-1].rows.stop == call.rows.start:
            wider = joined[-1].beside(call)
            if cost(wider) <= cost_alone + cost(call) + CALL:
                joined[-1] = wider
                cost_alone += cost(call)
                continue
        joined.append(call)
        cost_alone = cost(call)
    return joined


def _mask(seen: list[list[tuple[int, int]]], keys: range, n: int, dtype: torch.dtype) -> Tensor | None:
    """Return the mask (rows, 1, 1 or queries per row, keys) that is added to the scores.

    It is None if all keys are visible and there are at least FEW_KEYS.
    seen: for each row and each place for a sequence in it, the first visible key and the key after the last visible
        key.
    """
    if len(keys) >= FEW_KEYS and all(ends == (keys.start, keys.stop) for row in seen for ends in row):
        return None
    alike = all(len(set(row)) == 1 for row in seen)  # all readers of a row see the same keys
    ends = torch.tensor([row[:1] for row in seen] if alike else seen)[:, None, :, None]
    position = torch.arange(keys.start, keys.stop)  # ends: (rows, 1, readers or 1, 1, 2)
    hidden = (position < ends[..., 0]) | (position >= ends[..., 1])  # (rows, 1, readers or 1, keys)
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
    return mask if alike else mask.repeat_interleave(n, 2)


def _flags(flags: list[bool]) -> Tensor | None:
    return torch.tensor(flags) if any(flags) else None


# ---- path


def decode_attention_cpu(q: Tensor, caches: list[Cache], scores: Scores) -> Tensor:
    """Compute attention over one or two caches: the sequences' own rows, and optionally their prefixes.

    Raises ValueError for slots and lengths that are outside the caches.
    """
    own, prefix = caches[0], caches[1] if len(caches) > 1 else None
    _check_rows(own, "k_cache", "slot", "length")
    if prefix is not None:
        some = prefix.slot != -1
        given = prefix._replace(slot=prefix.slot[some], length=prefix.length[some])
        _check_rows(given, "k_prefix", "prefix_slot", "prefix_length")
    if scores.softcap is not None:  # torch's fused attention has no softcap
        return _one_by_one(q, caches, scores)

    # a sequence sees the positions from `hidden` on, where its prefix is counted first
    length = own.length.tolist()
    prefix_rows = prefix_length = [0] * len(length)
    if prefix is not None:
        prefix_rows = prefix.slot.tolist()
        pairs = zip(prefix_rows, prefix.length.tolist(), strict=True)
        prefix_length = [n if row >= 0 else 0 for row, n in pairs]
    total = [n + m for n, m in zip(prefix_length, length, strict=True)]
    hidden = [0 if scores.window is None else max(n - scores.window, 0) for n in total]
    first = [max(i - n, 0) for i, n in zip(hidden, prefix_length, strict=True)]

    # each cache by itself
    wide, G = torch.promote_types(q.dtype, torch.float32), own.keys.shape[2]
    key_bytes = G * (q.shape[2] + own.values.shape[3]) * q.element_size()
    x = q.unflatten(1, (G, -1))  # (B, G, n, D)
    partial, reads = [], [(own, own.slot.tolist(), first, length)]
    if prefix is not None:
        reads.insert(0, (prefix, prefix_rows, hidden, prefix_length))
    for cache, rows, lo, hi in reads:
        plan = _plan(tuple(rows), tuple(lo), tuple(hi), x.shape[2], key_bytes, q.dtype)
        if plan is not None:
            partial.append(_read(plan, x, cache, scores.scale))
    if not partial:
        return q.new_zeros(*q.shape[:2], own.values.shape[-1])

    # exp(lse) is a cache's share of the sum
    out, lse = partial[0]
    out = out.to(wide)  # (B, G, n, Dv)
    if len(partial) == 2:
        own_out, own_lse = partial[1]
        out = torch.lerp(out, own_out.to(wide), torch.sigmoid(own_lse - lse)[..., None])
        lse = lse if scores.sinks is None else torch.logaddexp(lse, own_lse)
    if scores.sinks is not None:
        out = out * torch.sigmoid(lse - scores.sinks.to(wide).view(G, -1))[..., None]
    empty = _flags([n == 0 for n in total])
    if empty is not None:
        out = out.masked_fill(empty[:, None, None, None], 0.0)
    return out.flatten(1, 2).to(q.dtype)  # (B, H, Dv)


def _check_rows(cache: Cache, keys: str, slot: str, length: str) -> None:
    """Raise ValueError for slots and lengths outside this cache.

    keys, slot, length: the names of the arguments, for the message.
    """
    shape = tuple(cache.keys.shape)
    for name, x, most in ((slot, cache.slot, shape[0] - 1), (length, cache.length, shape[1])):
        if x.numel() and not 0 <= int(x.min()) <= int(x.max()) <= most:
            found = f"{int(x.min())} to {int(x.max())}"
            raise ValueError(f"{name}: expected 0 to {most} with {keys} {shape}, got {found}")


def _read(plan: Plan, q: Tensor, cache: Cache, scale: float) -> tuple[Tensor, Tensor]:
    """Compute attention of q (B, G, n, D) over one cache. Returns out (B, G, n, Dv) and log-sum-exp (B, G, n)."""
    n, D, Dv = *q.shape[2:], cache.values.shape[-1]
    q = q if plan.source is None else q.index_select(0, plan.source)
    q = F.pad(q, (0, Dv - D)) if Dv > D else q
    q, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, cache.keys, cache.values))

    outs, start = [], 0
    for call in plan.calls:
        window = slice(call.rows.start, call.rows.stop), slice(call.keys.start, call.keys.stop)
        k, v = keys[window].transpose(1, 2), values[window].transpose(1, 2)  # (rows, G, keys, D)
        if Dv != D:  # the call requires keys and values of the same width
            k, v = F.pad(k, (0, max(Dv - D, 0))), F.pad(v, (0, max(D - Dv, 0)))
        end = start + len(call.rows) * call.readers
        x = q[start:end]
        if call.readers > 1:
            x = x.unflatten(0, (-1, call.readers)).transpose(1, 2).flatten(2, 3)  # (rows, G, readers * n, D)

        # the op behind scaled_dot_product_attention on a CPU, which also returns the log-sum-exp
        out_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            x, k, v, attn_mask=call.mask, scale=scale
        )
        if call.readers > 1:
            out_lse = [y.unflatten(2, (call.readers, n)).transpose(1, 2).flatten(0, 1) for y in out_lse]
        outs.append(out_lse)
        start = end

    # back in the order of the batch
    out, lse = outs[0] if len(outs) == 1 else map(torch.cat, zip(*outs, strict=True))
    if plan.place is not None:
        out, lse = out.index_select(0, plan.place), lse.index_select(0, plan.place)
    if plan.blind is not None:  # lse was 0 if all is masked, and a row without a place was another's
        blind = plan.blind[:, None, None]
        out, lse = out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -torch.inf)
    return out[..., :Dv], lse
