"""Attention over packed tokens: a layer's queries, keys and values, and the attention among them or with a cache.

    q, k, v = linear in x                     (total, H, D), (total, G, D), (total, G, D); normed and rotated
    out = o_proj(softmax(scale q k^T) v)      over the same tokens, or over the keys and values of a cache

`Attention` is that of Llama, Qwen, Gemma and gpt-oss, chosen by the fields of ModelConfig. `LatentAttention` is that of
DeepSeek-V2, https://arxiv.org/abs/2405.04434.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import apply_rope, flash_attention, rms_norm
from ..kernels.route import RouteStatistics
from .cache import Cache
from .config import ModelConfig
from .linear import Linear, linears_of


@dataclass(frozen=True)
class Pass:
    """The operands that all layers of one forward pass share: rotary angles, packing, cache and adapters."""

    cos: Tensor  # (total, D/2)
    sin: Tensor
    cu_seqlens: Tensor | None = None  # None: one new token for each of the cache's first slots
    parents: Tensor | None = None
    cache: Cache | None = None
    adapter: Tensor | None = None  # (total,) the index of each token's adapter, -1 for none
    local: tuple[Tensor, Tensor] | None = None  # cos and sin of layers with a window, if they differ
    # One entry per layer, added as the layers run. FSDP would copy a list for each layer, since its tensors have
    # gradients
    routed: deque[RouteStatistics] = field(default_factory=deque)


class Rules(NamedTuple):
    """A layer's index in the cache, its window, and the scale of its scores."""

    layer: int
    window: int | None  # W; None: all earlier tokens are visible
    scale: float | None  # None: 1 / sqrt(D)

    @classmethod
    def of(cls, config: ModelConfig, layer: int) -> "Rules":
        return cls(layer, config.windows[layer], config.attention_scale)


def attend(q: Tensor, k: Tensor, v: Tensor, now: Pass, rules: Rules, sinks: Tensor | None = None) -> Tensor:
    """Compute attention of q (total, H, D) with k and v (total, G, D), or with a cache. Returns (total, H, D).

    A cache first stores k and v. A decoding step then attends to the cache; a prefill attends to k and v.
    """
    layer, window, scale = rules
    sinks = None if sinks is None else sinks.to(q.dtype)
    if now.cache is not None:
        now.cache.write(layer, k, v)
        if now.cu_seqlens is None:
            return now.cache.attend(layer, q, window, scale, sinks)

    out = flash_attention(
        q, k, v, window=window, cu_seqlens=now.cu_seqlens, parents=now.parents, scale=scale, sinks=sinks
    )
    assert isinstance(out, Tensor)
    return out


class Norm(nn.Module):
    """The weight (width,) of an RMSNorm. The layers pass it to rms_norm or add_rms_norm, which compute the norm."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Attention(nn.Module):
    """Attention of H query heads over G heads of keys and values."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Linear(C, H * D, config.qkv_bias)
        self.k_proj = Linear(C, G * D, config.qkv_bias)
        self.v_proj = Linear(C, G * D, config.qkv_bias)
        self.o_proj = Linear(H * D, C, config.output_bias)

        self.norms_whole = config.qk_norm_whole  # over all heads at once
        has_norms = config.qk_norm_whole or config.qk_norm
        self.q_norm = Norm(H * D if self.norms_whole else D) if has_norms else None
        self.k_norm = Norm(G * D if self.norms_whole else D) if has_norms else None
        self.sinks = nn.Parameter(torch.empty(H)) if config.sinks else None

        self.H, self.G, self.D = H, G, D
        self.rules, self.rotates = Rules.of(config, layer), config.rope_layers[layer]
        self.eps, self.unit_offset = config.rms_norm_eps, config.gemma

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        """Apply the layer to x (total, C), and return (total, C)."""
        q, k, v = linears_of((self.q_proj, self.k_proj, self.v_proj), x, now.adapter)
        q, k, v = (t.view(-1, heads, self.D) for t, heads in ((q, self.H), (k, self.G), (v, self.G)))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._norm(q, self.q_norm), self._norm(k, self.k_norm)

        if self.rotates:
            cos, sin = now.local if now.local and self.rules.window else (now.cos, now.sin)
            q, k = apply_rope(q, k, cos, sin)

        out = attend(q, k, v, now, self.rules, self.sinks)  # (total, H, D)
        return self.o_proj(out.flatten(1), now.adapter)

    def _norm(self, x: Tensor, norm: Norm) -> Tensor:
        if self.norms_whole:
            return rms_norm(x.flatten(1), norm.weight, self.eps).view_as(x)
        return rms_norm(x, norm.weight, self.eps, unit_offset=self.unit_offset)


class LatentAttention(nn.Module):
    """Attention whose keys and values come from a latent vector of kv_rank numbers per token.

    A key also has rope_dim rotated numbers, which all heads share. The cache holds the keys and values of each head,
    not the latent vectors. Queries, keys and values are padded to the width of the widest.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        latent = config.latent
        assert latent is not None
        C, H, D = config.hidden_size, config.num_attention_heads, config.head_dim
        if latent.q_rank:
            self.q_a_proj = Linear(C, latent.q_rank, config.qkv_bias)
            self.q_a_layernorm = Norm(latent.q_rank)
            self.q_b_proj = Linear(latent.q_rank, H * D, bias=False)
        else:
            self.q_proj = Linear(C, H * D, bias=False)

        self.kv_a_proj_with_mqa = Linear(C, latent.kv_rank + latent.rope_dim, config.qkv_bias)
        self.kv_a_layernorm = Norm(latent.kv_rank)
        self.kv_b_proj = Linear(latent.kv_rank, H * (latent.nope_dim + latent.value_dim), bias=False)
        self.o_proj = Linear(H * latent.value_dim, C, config.output_bias)
        self.latent, self.H, self.eps = latent, H, 1e-6
        self.rules, self.width = Rules.of(config, layer), config.attention_width

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        """Apply the layer to x (total, C), and return (total, C)."""
        latent, H = self.latent, self.H
        first = self.q_a_proj if latent.q_rank else self.q_proj
        q, narrow = linears_of((first, self.kv_a_proj_with_mqa), x, now.adapter)
        if latent.q_rank:
            q = self.q_b_proj(rms_norm(q, self.q_a_layernorm.weight, self.eps), now.adapter)
        q = q.unflatten(1, (H, -1))  # (total, H, nope + rope)

        # keys and values of each head from the latent vector; the rotated part of the keys comes from the same product
        narrow, k_rope = narrow.split([latent.kv_rank, latent.rope_dim], 1)
        kv = self.kv_b_proj(rms_norm(narrow, self.kv_a_layernorm.weight, self.eps), now.adapter)
        k, v = kv.unflatten(1, (H, -1)).split([latent.nope_dim, latent.value_dim], 2)  # (total, H, ...)

        q_rope, k_rope = apply_rope(
            q[..., latent.nope_dim :], k_rope[:, None], now.cos, now.sin, interleaved=latent.interleaved
        )
        q = torch.cat([q[..., : latent.nope_dim], q_rope], -1)
        k = torch.cat([k, k_rope.expand(-1, H, -1)], -1)

        q, k, v = (F.pad(t, (0, self.width - t.shape[-1])) for t in (q, k, v))  # (total, H, width)
        out = attend(q, k, v, now, self.rules)[..., : latent.value_dim]
        return self.o_proj(out.flatten(1), now.adapter)
