"""Attention whose scores are never in memory as a whole: dense, packed, with a shared prompt, and against a cache.

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

Source: Dao et al. 2022, https://arxiv.org/abs/2205.14135; Dao 2023, https://arxiv.org/abs/2307.08691
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import check_shape, use_triton

# ---- reference


def _visible(query_position: Tensor, key_position: Tensor, causal: bool, window: int | None) -> Tensor:
    """Positions (..., T) and (..., S) to (..., T, S): which key each query sees."""
    i, j = query_position.unsqueeze(-1), key_position.unsqueeze(-2)
    visible = j <= i if causal else (j <= i) | True
    return visible if window is None else visible & (j > i - window)


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
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = scale * torch.einsum("btgnd,bsgd->bgnts", query, k.to(wide))  # (B, G, n, T, S)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~visible, -torch.inf)
    sink = s.new_tensor(-torch.inf) if sinks is None else sinks.to(wide).view(G, n, 1, 1)
    s = torch.cat([s, sink.expand(*s.shape[:-1], 1)], -1)  # (B, G, n, T, S + 1)
    top = s.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min)  # finite where nothing is seen
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    some = total > 0
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
    row = torch.arange(q.shape[0], device=q.device)
    segment = torch.searchsorted(cu_seqlens[1:].long(), row, right=True)  # (total,)
    position = row - cu_seqlens[segment]
    related = segment[:, None] == segment  # (total, total)
    if parents is not None:
        parent = parents[segment].long()
        position = position + torch.where(parent >= 0, cu_seqlens.diff()[parent], 0)
        related = related | (parent[:, None] == segment)
    visible = related & _visible(position, position, causal, window)
    out, lse = _attend(q[None], k[None], v[None], visible, scale, softcap, sinks)
    return (out[0], lse[0]) if return_lse else out[0]


def decode_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    length: Tensor,
    *,
    prefix_slot: Tensor | None = None,
    prefix_length: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    outs = []
    for b in range(q.shape[0]):
        k, v = (cache[slot[b], : length[b]] for cache in (k_cache, v_cache))  # (S, G, D)
        if prefix_slot is not None and prefix_length is not None:
            before = prefix_slot[b], slice(prefix_length[b])
            k, v = torch.cat([k_cache[before], k]), torch.cat([v_cache[before], v])
        outs.append(
            flash_attention_reference(
                q[b, None, None], k[None], v[None], scale=scale, window=window, softcap=softcap, sinks=sinks
            )
        )
    return torch.cat(outs)[:, 0] if outs else q.new_empty(0, q.shape[1], v_cache.shape[-1])  # type: ignore[arg-type]


# ---- CPU path


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
    if softcap is None and sinks is None and not return_lse and q.numel() and k.numel():
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        mask = visible if visible is None or visible.dim() == 2 else visible.squeeze(1)  # or (B, 1, T, S)
        gqa = q.shape[2] != k.shape[2]
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=visible is None, scale=scale, enable_gqa=gqa
        )
        return out.transpose(1, 2), None
    if visible is None:
        row = torch.arange(q.shape[1])
        visible = _visible(row, row, True, None)
    return _attend(q, k, v, visible, scale, softcap, sinks)


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
) -> tuple[Tensor, Tensor | None]:
    """Segments padded to one call; with parents to two, the children's with their parent's keys in front.

    Padding is on the right, so a causal root needs no mask; padded queries always see a key, and are dropped.
    """
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
        None if x[0] is None else torch.cat([y.flatten(0, 1) for y in x]).index_select(0, row)
        for x in zip(*outs, strict=True)
    )
    assert out is not None
    return out, lse


# ---- public op


def _check(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, softcap: float | None, sinks: Tensor | None
) -> None:
    """What both ops ask of a query (..., H, D) and keys and values (..., G, D), (..., G, Dv)."""
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v: expected one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    for name, x in (("q", q), ("v", v)):
        if not 1 <= x.shape[-1] <= 256:
            raise ValueError(f"{name}: expected a head dimension of 1 to 256, got {x.shape[-1]}")
    H, G = q.shape[-2], k.shape[-2]
    if G == 0 or H % G:
        raise ValueError(f"q: expected a multiple of the {G} key/value heads, got {H}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a positive number, got {softcap}")
    if sinks is not None:
        check_shape("sinks", sinks, heads=H)


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
    cu_seqlens: (segments + 1,) int32, from 0 to total. A segment may be empty.
    parents: (segments,) int32, -1 or the segment that this one continues: it also sees the parent's tokens, and its
        positions go on from the parent's length. Causal only. A parent has parent -1 and stands directly before its
        children; a table that breaks this gives wrong numbers (`model.packed.pack` checks it).
    Returns (B, T, H, Dv) or (total, H, Dv) in q's dtype; with return_lse also lse (B, T, H) or (total, H) fp32 (fp64
        of fp64): the natural log of each softmax's denominator, sink included, -inf where empty; differentiable.
    Raises ValueError for shapes, dtypes and combinations other than these.
    """
    packed = cu_seqlens is not None
    if q.dim() != (3 if packed else 4):
        want = "(total, H, D) with cu_seqlens" if packed else "(B, T, H, D) without cu_seqlens"
        raise ValueError(f"q: expected {want}, got {tuple(q.shape)}")
    if k.dim() != q.dim() or v.dim() != q.dim():
        raise ValueError(
            f"k, v: expected {q.dim()} dimensions as q has, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    _check(q, k, v, window, softcap, sinks)
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
        if not cu_seqlens.is_cuda and cu_seqlens[-1] != q.shape[0]:
            raise ValueError(f"cu_seqlens: expected to end at total={q.shape[0]}, got {int(cu_seqlens[-1])}")
        if parents is not None:
            if not causal:
                raise ValueError("parents: expected causal=True, got causal=False")
            if parents.dtype != torch.int32:
                raise ValueError(f"parents: expected torch.int32, got {parents.dtype}")
            check_shape("parents", parents, segments=cu_seqlens.numel() - 1)
    if use_triton(q):
        raise NotImplementedError(
            "flash_attention: not built for CUDA yet; flash_attention_reference runs anywhere"
        )
    if cu_seqlens is not None:
        out, lse = _packed_cpu(
            q, k, v, causal, scale, window, softcap, sinks, cu_seqlens, parents, return_lse
        )
    else:
        T, S = q.shape[1], k.shape[1]
        visible = None
        if not (causal and T == S and window is None):
            visible = _visible(torch.arange(S - T, S), torch.arange(S), causal, window)
        out, lse = _attend_cpu(q, k, v, visible, scale, softcap, sinks, return_lse)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    length: Tensor,
    *,
    prefix_slot: Tensor | None = None,
    prefix_length: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """One query for each sequence against its cached keys and values, and those of a prefix before them. No gradient.

    q: (B, H, D)    k_cache: (slots, S_max, G, D)    v_cache: (slots, S_max, G, Dv)
    slot: (B,) integers, the cache row of each sequence.    length: (B,) how many of its keys are there, the query's own
        included: it is the last of them.
    prefix_slot, prefix_length: (B,) each, a second cache row that stands before the first: the prompt of a group,
        cached once. A length of 0 means none.
    scale, window, softcap, sinks: as for flash_attention; the window counts through the prefix.
    Returns (B, H, Dv). On the CPU the last bits may depend on the longest sequence of the batch: it sets the padding.
    Raises ValueError for shapes and dtypes other than these.
    """
    if q.dim() != 3 or k_cache.dim() != 4 or v_cache.dim() != 4:
        got = ", ".join(str(tuple(x.shape)) for x in (q, k_cache, v_cache))
        raise ValueError(
            f"q, k_cache, v_cache: expected (B, H, D), (slots, S_max, G, D), (slots, S_max, G, Dv), got {got}"
        )
    _check(q, k_cache, v_cache, window, softcap, sinks)
    B, (slots, S_max, G) = q.shape[0], k_cache.shape[:3]
    check_shape("k_cache", k_cache, slots=slots, S_max=S_max, kv_heads=G, head_dim=q.shape[-1])
    check_shape("v_cache", v_cache, slots=slots, S_max=S_max, kv_heads=G, head_dim=v_cache.shape[-1])
    if (prefix_slot is None) != (prefix_length is None):
        raise ValueError("prefix_slot, prefix_length: expected both or neither")
    check_shape("slot", slot, batch=B)
    check_shape("length", length, batch=B)
    if use_triton(q):
        raise NotImplementedError(
            "decode_attention: not built for CUDA yet; decode_attention_reference runs anywhere"
        )
    if not B:
        return q.new_empty(0, q.shape[1], v_cache.shape[-1])
    own = torch.arange(int(length.max()))
    key, value = k_cache[:, : own.numel()], v_cache[:, : own.numel()]
    if B != slots or not torch.equal(slot, torch.arange(B, dtype=slot.dtype)):  # a gather takes as long as the attention
        key, value = key.index_select(0, slot), value.index_select(0, slot)  # (B, S, G, D)
    if prefix_slot is None or prefix_length is None:
        visible = own < length[:, None]  # (B, S)
        if window is not None:
            visible = visible & (own >= length[:, None] - window)
    else:
        check_shape("prefix_slot", prefix_slot, batch=B)
        check_shape("prefix_length", prefix_length, batch=B)
        before = torch.arange(int(prefix_length.max()))
        prefix = k_cache[prefix_slot, : before.numel()], v_cache[prefix_slot, : before.numel()]
        key, value = torch.cat([prefix[0], key], 1), torch.cat([prefix[1], value], 1)
        visible = torch.cat([before < prefix_length[:, None], own < length[:, None]], 1)
        if window is not None:
            first = (prefix_length + length - window)[:, None]  # (B, 1), the first position in sight
            visible = visible & torch.cat([before >= first, own + prefix_length[:, None] >= first], 1)
    out, _ = _attend_cpu(q[:, None], key, value, visible[:, None, None, None], scale, softcap, sinks, False)
    return out[:, 0]
