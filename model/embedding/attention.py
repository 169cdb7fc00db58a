"""Attention and its mask for transformers' two registries, computed by flash_attention and decode_attention.

transformers asks for a mask once per forward pass, and passes the answer to all layers of a kind. Our mask is never the
usual (B, 1, T, S), but one of three forms:

    None                            causal; the last query is aligned with the last key
    int32 (1, 1, 1, segments + 1)   the first T keys are the queries' own: cu_seqlens of the B T tokens, row after row.
                                    A run of padding is a segment, too, so no token is moved, and the host reads no
                                    length
    int64 (B, 1, 1, T or T + S)     a cache: the number of keys that each query sees. If some keys of a row are
                                    padding, an order of the S keys follows, which puts the padding last

The tensors have four dimensions, because transformers passes on a mask of four dimensions as it is. It takes any other
tensor for a padding mask.

The signatures of `mask` and `attend` are transformers'. The keywords in `more` are named in each docstring.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import decode_attention, flash_attention
from ...kernels._chip import autocast_dtype

# ---- mask


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    **more: Any,
) -> Tensor | None:
    """Return the mask for AttentionMaskInterface, in one of the three forms described at the top of this file.

    mask_function: takes (row, head, query, key), and returns whether the query sees the key.
    attention_mask: (B, tokens so far) bool, False at padding. Keys beyond its end are padding.
    more: transformers' other keywords. Only use_vmap, local_size, allow_is_causal_skip and device are read, and the
        presence of allow_is_bidirectional_skip.

    Raises NotImplementedError for a mask that none of the forms can express.
    """
    use_vmap = more.get("use_vmap", False)
    if use_vmap or "allow_is_bidirectional_skip" in more:
        which = "or_mask_function or and_mask_function" if use_vmap else "bidirectional attention"
        raise NotImplementedError(
            f"attention mask: {which} is not supported; use embed.apply(model, attention=False)"
        )
    device = more.get("device", "cpu")

    first = q_offset - kv_offset  # the index of the first query's own key
    if isinstance(first, Tensor) and not torch.compiler.is_compiling():
        first = int(first)
    is_token = None  # (B, S) bool, False at padding; None if no query can see padding
    if attention_mask is not None:
        missing = kv_offset + kv_length - attention_mask.shape[1]
        is_token = F.pad(attention_mask, (0, max(missing, 0)))[:, kv_offset : kv_offset + kv_length]
        if not torch.compiler.is_compiling() and bool(is_token[:, : first + q_length].all()):
            is_token = None

    # 1. no keys before the queries: the first T keys are the queries' own
    if isinstance(first, int) and first == 0:
        if is_token is None and more.get("allow_is_causal_skip", True) and kv_length == q_length:
            return None
        return _segments(batch_size, q_length, mask_function, is_token, device)

    # 2. keys before the queries, no padding, the last query on the last key
    if is_token is None and isinstance(first, int) and first + q_length == kv_length:
        return None

    # 3. a cache with padding, or with room behind the last query
    query = first + torch.arange(q_length, device=device)  # (T,) the index of each query's own key
    if is_token is None:
        return (query + 1).expand(batch_size, q_length)[:, None, None]  # (B, 1, 1, T)
    if more.get("local_size") is not None:
        _expect(
            _most_runs(is_token) <= 1,
            "several runs of tokens in a row are not supported with a sliding window",
        )
    counts = is_token.long().cumsum(1)[:, query]  # (B, T)
    order = (~is_token).long().argsort(dim=1, stable=True)  # (B, S)
    return torch.cat([counts, order], 1)[:, None, None]  # (B, 1, 1, T + S)


def _segments(
    batch_size: int,
    T: int,
    mask_function: Callable[..., Tensor] | None,
    is_token: Tensor | None,
    device: torch.device | str,
) -> Tensor:
    """Return the segments' bounds as int32 (1, 1, 1, segments + 1).

    A segment ends before a token that does not see the token before it, and wherever padding begins or ends.
    """
    starts = torch.ones(batch_size, T, dtype=torch.bool, device=device)

    # where two packed sequences meet: ask transformers' mask function about each token and its predecessor
    if T > 1 and mask_function is not None:
        row, token = torch.arange(batch_size, device=device), torch.arange(1, T, device=device)
        head = torch.zeros((), dtype=torch.long, device=device)
        starts[:, 1:] = ~mask_function(row[:, None], head, token[None], token[None] - 1)

    # where padding begins or ends
    if is_token is not None:
        is_token = is_token[:, :T]
        _expect(_most_runs(is_token) <= 1, "a row has padding between tokens")
        starts[:, 1:] |= is_token[:, 1:] != is_token[:, :-1]

    total = batch_size * T
    if torch.compiler.is_compiling():
        # the largest possible number, the last segments empty: the true number would be read on the host
        at = torch.where(starts.flatten(), torch.arange(total, device=device), total).sort().values
    else:
        at = starts.flatten().nonzero()[:, 0]
    return F.pad(at, (0, 1), value=total).int()[None, None, None]


def _most_runs(is_token: Tensor) -> Tensor:
    """Return the largest number of runs of tokens in any row, as a scalar tensor. Padding separates the runs.

    is_token: (B, S) bool.
    """
    return (is_token & ~F.pad(is_token, (1, 0))[:, :-1]).sum(1).max()


def _expect(condition: Tensor, otherwise: str) -> None:
    """Raise NotImplementedError unless the condition holds.

    During compilation the host cannot read the condition, so it is asserted on the device.
    """
    message = f"attention_mask: {otherwise}; embed.apply(model, attention=False)"
    if torch.compiler.is_compiling():
        torch.ops.aten._assert_async.msg(condition, message)
    elif not condition:
        raise NotImplementedError(message)


# ---- attention


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Compute attention for AttentionInterface. Returns ((B, T, H, D), None), since there are no attention weights.

    query, key, value: (B, H, T, D), (B, G, S, D) and (B, G, S, D).
    attention_mask: from `mask`.
    more: transformers' other keywords. Only sliding_window and s_aux, the sinks (H,), are read.

    Raises NotImplementedError for dropout, for a mask that `mask` did not make, and for gradients through a cache.
    """
    if dropout:
        raise NotImplementedError(
            f"attention_dropout: expected 0, got {dropout}; embed.apply(model, attention=False)"
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (B, T, H, D), (B, S, G, D)
    q, k, v = (x.to(autocast_dtype(x)) for x in (q, k, v))
    sinks = more.get("s_aux")
    sinks = None if sinks is None else sinks.to(q.dtype)
    options = {"scale": scaling, "window": more.get("sliding_window"), "sinks": sinks}

    if attention_mask is None:
        out = flash_attention(q, k, v, **options)
    elif attention_mask.dtype == torch.int32:
        out = _attend_in_segments(q, k, v, attention_mask.flatten(), options)
    elif attention_mask.dtype == torch.int64 and attention_mask.shape[1:3] == (1, 1):
        out = _attend_to_cache(q, k, v, attention_mask[:, 0, 0], options)
    else:
        raise NotImplementedError(
            f"attention_mask: expected (B, S) or none, got {tuple(attention_mask.shape)} {attention_mask.dtype}; "
            f"embed.apply(model, attention=False) for T={q.shape[1]} queries and S={k.shape[1]} keys under a mask of "
            "your own"
        )
    assert isinstance(out, Tensor)
    return out, None


def _attend_in_segments(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, options: dict[str, Any]
) -> Tensor:
    """Compute attention within segments, and return (B, T, H, D).

    q is (B, T, H, D), and k and v are (B, S, G, D). Only the first T keys are used: they belong to the queries' tokens.
    """
    B, T = q.shape[:2]
    q, k, v = q.flatten(0, 1), k[:, :T].flatten(0, 1), v[:, :T].flatten(0, 1)  # (B T, H, D), (B T, G, D)
    out = flash_attention(q, k, v, cu_seqlens=cu_seqlens, **options)
    assert isinstance(out, Tensor)
    return out.unflatten(0, (B, T))  # (B, T, H, D)


def _attend_to_cache(
    q: Tensor, k: Tensor, v: Tensor, counts_and_order: Tensor, options: dict[str, Any]
) -> Tensor:
    """Compute attention to a cache, and return (B, T, H, D). Raises NotImplementedError if a gradient is needed.

    q is (B, T, H, D), and k and v are (B, S, G, D). counts_and_order is (B, T or T + S), the int64 form of our mask.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise NotImplementedError(
            "past_key_values: keys before the queries' own get no gradient if some are padding or the cache is "
            "static; pass use_cache=False, or use torch.no_grad() or embed.apply(model, attention=False)"
        )
    B, T = q.shape[:2]
    counts, order = counts_and_order.split([T, counts_and_order.shape[-1] - T], 1)  # (B, T), (B, 0 or S)
    if order.shape[1]:
        order = order[:, :, None, None]  # (B, S, 1, 1)
        k, v = (x.gather(1, order.expand(-1, -1, *x.shape[2:])) for x in (k, v))  # (B, S, G, D)

    slot = torch.arange(B, device=q.device).repeat_interleave(T)  # (B T,) the row of the cache
    out = decode_attention(q.flatten(0, 1), k, v, slot, counts.flatten(), **options)  # (B T, H, D)
    return out.unflatten(0, (B, T))  # (B, T, H, D)
