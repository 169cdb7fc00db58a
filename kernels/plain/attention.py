"""Attention in plain torch: the reference, and the path of CPU tensors. The maths is that of kernels/attention.py.

Memory: the reference holds the scores of all heads, (B, H, T, S). The CPU path calls torch's
scaled_dot_product_attention, which holds blocks of scores. For a feature that SDPA lacks, it calls the reference.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._chip import FEW_KEYS, without_autocast
from .._op import make_path
from ..records import Packing, Rules

# ---- reference


def visible_keys(query_position: Tensor, key_position: Tensor, rules: Rules) -> Tensor:
    """Return a bool mask of the keys that each query sees, (..., T, S).

    The positions of the queries are (..., T), and those of the keys are (..., S).
    """
    i, j = query_position.unsqueeze(-1), key_position.unsqueeze(-2)
    visible = j <= i if rules.causal else (j <= i) | True
    return visible if rules.window is None else visible & (j > i - rules.window)


def positions(cu_seqlens: Tensor, parents: Tensor | None, total: int) -> tuple[Tensor, Tensor]:
    """Return the segment and the logical position of every packed row, (total,) int64 each.

    A row that belongs to no segment has segment -1.
    """
    row = torch.arange(total, device=cu_seqlens.device)
    segments = cu_seqlens.numel() - 1
    entries = torch.searchsorted(cu_seqlens, row, right=True)  # (total,) the entries up to each row
    segment = torch.where(entries > segments, 0, entries) - 1
    position = row - cu_seqlens[segment]

    if parents is not None:  # index -1 picks the padding: no parent, of length 0
        parent = F.pad(parents, (0, 1), value=-1)[segment].long()
        parent = torch.where(parent < segments, parent, -1).clamp(min=-1)
        position = position + F.pad(cu_seqlens.diff(), (0, 1))[parent]
    return segment, position


@without_autocast  # always computes in fp32
def _attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, visible: Tensor, rules: Rules
) -> tuple[Tensor, Tensor]:
    """Compute attention by its formula. Returns out (B, T, H, Dv) and lse (B, T, H).

    q: (B, T, H, D)    k: (B, S, G, D)    v: (B, S, G, Dv)    visible: (T, S) or (B, 1, 1, T, S)
    """
    wide = torch.promote_types(q.dtype, torch.float32)  # fp64 stays fp64, for finite differences
    G, n = k.shape[2], q.shape[2] // k.shape[2]
    query = q.to(wide).unflatten(2, (G, n))  # (B, T, G, n, D)
    scale = q.shape[-1] ** -0.5 if rules.scale is None else rules.scale
    s = scale * torch.einsum("btgnd,bsgd->bgnts", query, k.to(wide))  # (B, G, n, T, S)
    if rules.softcap is not None:
        s = rules.softcap * torch.tanh(s / rules.softcap)
    s = s.masked_fill(~visible, -torch.inf)

    # a sink is one more key that has no value
    sink = s.new_tensor(-torch.inf) if sinks is None else sinks.to(wide).view(G, n, 1, 1)
    s = torch.cat([s, sink.expand(*s.shape[:-1], 1)], -1)  # (B, G, n, T, S + 1)

    top = s.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min)  # finite if no key is visible
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    some = total != 0  # True for NaN
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
    rules = Rules(causal, scale, window, softcap)
    if cu_seqlens is None:
        T, S = q.shape[1], k.shape[1]
        position = torch.arange(S - T, S, device=q.device)
        visible = visible_keys(position, torch.arange(S, device=q.device), rules)
        out, lse = _attend(q, k, v, sinks, visible, rules)
        return (out, lse) if return_lse else out

    # packed: a batch of one, whose mask restricts a row to its own segment and the parent
    segment, position = positions(cu_seqlens, parents, q.shape[0])
    owned = segment >= 0
    related = segment[:, None] == segment  # (total, total)
    if parents is not None:
        related = related | (F.pad(parents, (0, 1), value=-1)[segment][:, None] == segment)
    visible = related & owned & visible_keys(position, position, rules)
    out, lse = _attend(q[None], k[None], v[None], sinks, visible, rules)
    lse = lse[0].masked_fill(~owned[:, None], -torch.inf)
    return (out[0], lse) if return_lse else out[0]


# ---- CPU path


@without_autocast  # computes in q's dtype, as the kernels do
def _attend_batch(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, seen: Tensor | None, rules: Rules, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute attention of a padded batch by one SDPA call, or by `_attend` if SDPA lacks a feature.

    seen: the mask of visible keys. None stands for the causal mask without a window, with T = S.
    """
    T = q.shape[1]
    if rules.softcap is None and sinks is None and not with_lse and q.numel() and k.numel():
        query, key, value = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        mask = seen if seen is None or seen.dim() == 2 else seen.squeeze(1)  # or (B, 1, T, S)
        if mask is None and T < FEW_KEYS:
            mask = q.new_full((T, T), -torch.inf).triu(1)
        # a branch, because with dynamic shapes the comparison is a symbol, which SDPA does not accept
        gqa = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=rules.scale, **gqa
        )
        return out.transpose(1, 2), None

    if seen is None:
        row = torch.arange(T, device=q.device)
        seen = visible_keys(row, row, rules)
    return _attend(q, k, v, sinks, seen, rules)


def _check_tables(cu_seqlens: Tensor, parents: Tensor | None, total: int) -> None:
    """Raise ValueError if the entries of cu_seqlens or parents describe no valid packing.

    This is checked on a CPU only. On a GPU the host does not read the entries, and the kernels clamp them.
    """
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


class _Padding(NamedTuple):
    """The places of packed segments in one buffer, where they are padded on the right.

    Segments without a parent (roots) come first and are padded to P rows, the longest of their lengths. Segments with a
    parent (children) follow and are padded to C rows.
    """

    row: Tensor  # (total,): the place of each packed row in the buffer
    roots: int
    P: int
    children: int
    C: int

    @classmethod
    def of(cls, starts: Tensor, lengths: Tensor, child: Tensor, total: int) -> "_Padding":
        """Build the index that pads segments to one length.

        starts, lengths, child: (segments,). child is True for a segment with a parent.
        """
        children = int(child.sum())
        roots = lengths.numel() - children
        P, C = (int(F.pad(lengths[which], (1, 0)).max()) for which in (~child, child))  # the longest

        # (segments,): the row where a segment starts in the buffer
        padded = torch.where(child, roots * P + (child.cumsum(0) - 1) * C, ((~child).cumsum(0) - 1) * P)
        shift = torch.repeat_interleave(padded - starts, lengths, output_size=total)
        return cls(torch.arange(total) + shift, roots, P, children, C)

    def pad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Copy packed rows x (total, ...) into padded segments.

        Return the segments without a parent, (roots, P, ...), and those with a parent, (children, C, ...).
        """
        roots, P, children, C = self[1:]
        buffer = x.new_zeros(roots * P + children * C, *x.shape[1:]).index_copy_(0, self.row, x)
        return buffer[: roots * P].unflatten(0, (roots, P)), buffer[roots * P :].unflatten(0, (children, C))


def _attend_segments(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, packing: Packing, rules: Rules, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """Compute attention within packed segments, by one or two calls over padded segments.

    The first call takes the segments without a parent. The second takes those with a parent, and puts the parent's keys
    before a segment's own. Padding is on the right, so a causal mask already hides it in the first call. Padded
    queries always see a key, and their results are dropped.
    """
    cu_seqlens, parents = packing
    assert cu_seqlens is not None
    if parents is None:  # drop empty segments: a traced mask has many
        cu_seqlens = cu_seqlens.unique_consecutive()
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()  # (segments,)
    child = torch.zeros(lengths.numel(), dtype=torch.bool) if parents is None else parents >= 0
    padding = _Padding.of(starts, lengths, child, q.shape[0])
    P, C = padding.P, padding.C
    (q, q_child), (k, k_child), (v, v_child) = (padding.pad(x) for x in (q, k, v))

    # the roots
    root_row, child_row = torch.arange(P), torch.arange(C)
    if rules.causal:
        visible = None if rules.window is None else visible_keys(root_row, root_row, rules)
    else:  # an empty segment sees its first padding, because an empty softmax would put NaN into the gradients
        visible = (root_row < lengths[:, None].clamp(min=1))[:, None, None, None]  # (roots, 1, 1, 1, P)
    results = [_attend_batch(q, k, v, sinks, visible, rules, return_lse)]

    # the children: the parent's keys, then their own
    if padding.children and parents is not None:
        parent = parents[child].long()  # (children,)
        before = lengths[parent, None]  # (children, 1)
        position = before + child_row  # (children, C)
        unseen = torch.where(root_row < before, root_row, P + C)  # (children, P), padding after all queries
        visible = visible_keys(position, torch.cat([unseen, position], 1), rules)[:, None, None]
        which = ((~child).cumsum(0) - 1)[parent]  # (children,): the parent's place among the roots
        key = torch.cat([k.index_select(0, which), k_child], 1)  # (children, P + C, G, D)
        value = torch.cat([v.index_select(0, which), v_child], 1)
        results.append(_attend_batch(q_child, key, value, sinks, visible, rules, return_lse))

    # back to packed rows
    out, lse = (
        None
        if any(y is None for y in x)
        else torch.cat([y.flatten(0, 1) for y in x]).index_select(0, padding.row)
        for x in zip(*results, strict=True)
    )
    assert out is not None
    return out, lse if lse is not None and return_lse else out.new_empty(0)


@without_autocast  # because CPU autocast rejects fp16 in torch.cat
def _packed(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, packing: Packing, rules: Rules, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """Compute attention within segments. A row that belongs to no segment has out 0 and lse -inf.

    lse is an empty tensor unless return_lse.
    """
    cu_seqlens, parents = packing
    assert cu_seqlens is not None
    total = q.shape[0]
    _check_tables(cu_seqlens, parents, total)
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if last - first == total:
        return _attend_segments(q, k, v, sinks, packing, rules, return_lse)

    q, k, v = (x[first:last] for x in (q, k, v))
    packing = Packing(cu_seqlens - first, parents)
    out, lse = _attend_segments(q, k, v, sinks, packing, rules, return_lse)
    outside = (0, 0, first, total - last)
    return F.pad(out, (0, 0, *outside)), F.pad(lse, outside, value=-torch.inf) if return_lse else lse


def _packed_shapes(q, k, v, sinks, packing, rules, return_lse):
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    wide = torch.promote_types(q.dtype, torch.float32)
    return out, out.new_empty(q.shape[:2], dtype=wide) if return_lse else out.new_empty(0)


_packed_attention = make_path("packed_attention_cpu", _packed, _packed_shapes)


def attend_cpu(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, packing: Packing, rules: Rules, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute out and lse as flash_attention returns them. lse is None or an empty tensor unless return_lse."""
    if packing.cu_seqlens is not None:
        return _packed_attention(q, k, v, sinks, packing, rules, return_lse)

    T, S, visible = q.shape[1], k.shape[1], None
    if not (rules.causal and T == S and rules.window is None):
        row, column = (torch.arange(n, S, device=q.device) for n in (S - T, 0))
        visible = visible_keys(row, column, rules)
    return _attend_batch(q, k, v, sinks, visible, rules, return_lse)
