"""One decoder-only transformer on packed tokens; every architecture is a ModelConfig.

    x = embedding[tokens]                                                            (total, C)
    for each layer:   h = x + o_proj(attention(rope(norm(q)), rope(norm(k)), v))     with q, k, v linear in rms_norm(x)
                      x = h + down(silu(gate(y)) * up(y))                            with y = rms_norm(h)
    hidden = rms_norm(x)          logits = hidden head^T, never formed in training: see `score`

There is no batch dimension and no padding: sequences lie end to end (packed.py). Parameter names are those of a Hugging
Face checkpoint, without the leading "model.".
"""

import math
from collections import deque
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import (
    add_rms_norm,
    apply_rope,
    flash_attention,
    geglu,
    rms_norm,
    swiglu,
)
from ..kernels._chip import autocast_dtype, readable
from ..kernels.route import RouteStatistics
from .cache import Cache
from .config import ModelConfig, Rope
from .head import Head, full_logits, operands
from .linear import Linear, LoraConfig, linears_of
from .moe import MoE, layer_balance, pooled_balance
from .packed import Packed
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from .files.dtypes import Dtypes

# ---- rope


@lru_cache(maxsize=64)
def rope_frequencies(rope: Rope, dim: int, device: torch.device) -> tuple[Tensor, float]:
    """Angle per position of each of the dim/2 pairs, (dim/2,) fp32, and the factor on cos and sin.

    yarn: Peng et al. 2023, https://arxiv.org/abs/2309.00071, section 3.  llama3: the blend of Llama 3.1's release.
    """
    inv_freq = 1.0 / rope.rope_theta ** (torch.arange(0, dim, 2, device=device).float() / dim)  # (dim/2,)
    if rope.rope_type == "default":
        return inv_freq, 1.0
    factor = rope.factor or 1.0
    if rope.rope_type == "linear":
        return inv_freq / factor, 1.0
    trained = float(rope.original_max_position_embeddings or 0)
    if rope.rope_type == "llama3":
        low, high = rope.low_freq_factor or 1.0, rope.high_freq_factor or 4.0
        turns = trained * inv_freq / (2 * math.pi)  # of a pair within the trained length
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: interpolated, 1: as trained
        return keep * inv_freq + (1 - keep) * inv_freq / factor, 1.0

    def pair_with(turns: float) -> float:  # index of the pair that turns so often within the trained length
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    first, last = pair_with(rope.beta_fast or 32), pair_with(rope.beta_slow or 1)
    if rope.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    pairs = torch.arange(dim // 2, device=device).float()
    interpolate = ((pairs - first) / (last - first or 1e-3)).clamp(0, 1)
    inv_freq = interpolate * inv_freq / factor + (1 - interpolate) * inv_freq
    if rope.attention_factor is not None:
        return inv_freq, rope.attention_factor

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return inv_freq, mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return inv_freq, mscale(1.0)


# ---- layers


@dataclass(frozen=True)
class Pass:
    """What every layer of one forward pass shares: the angles of its tokens, and what they may attend to."""

    cos: Tensor  # (total, D/2)
    sin: Tensor
    cu_seqlens: Tensor | None = None  # None: one new token for each of the cache's first slots
    parents: Tensor | None = None
    cache: Cache | None = None
    adapter: Tensor | None = None  # (total,) which of several adapters each token has, -1 for none
    local: tuple[Tensor, Tensor] | None = None  # cos and sin of the layers with a window, where theirs differ
    # by layer, filled as they run; no list, which FSDP would copy for each layer, as its tensors have a gradient
    routed: deque[RouteStatistics] = field(default_factory=deque)


class Norm(nn.Module):
    """Holds a weight (width,): the ops are functions."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Linear(C, H * D, config.qkv_bias)
        self.k_proj = Linear(C, G * D, config.qkv_bias)
        self.v_proj = Linear(C, G * D, config.qkv_bias)
        self.o_proj = Linear(H * D, C, config.output_bias)
        whole = config.qk_norm_whole
        self.q_norm = Norm(H * D if whole else D) if whole or config.qk_norm else None
        self.k_norm = Norm(G * D if whole else D) if whole or config.qk_norm else None
        self.sinks = nn.Parameter(torch.empty(H)) if config.sinks else None
        self.H, self.G, self.D = H, G, D
        self.layer, self.eps = layer, config.rms_norm_eps
        self.rotate, self.window = config.rope_layers[layer], config.windows[layer]
        self.scale, self.whole, self.unit_offset = config.attention_scale, whole, config.gemma

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        q, k, v = linears_of((self.q_proj, self.k_proj, self.v_proj), x, now.adapter)
        q, k, v = (t.view(-1, heads, self.D) for t, heads in ((q, self.H), (k, self.G), (v, self.G)))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._norm(q, self.q_norm), self._norm(k, self.k_norm)
        if self.rotate:
            cos, sin = now.local if now.local and self.window else (now.cos, now.sin)
            q, k = apply_rope(q, k, cos, sin)
        out = attend(q, k, v, now, self.layer, self.window, self.scale, self.sinks)
        return self.o_proj(out.flatten(1), now.adapter)  # (total, C)

    def _norm(self, x: Tensor, norm: "Norm") -> Tensor:
        if self.whole:  # over all heads at once
            return rms_norm(x.flatten(1), norm.weight, self.eps).view_as(x)
        return rms_norm(x, norm.weight, self.eps, unit_offset=self.unit_offset)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    now: Pass,
    layer: int,
    window: int | None,
    scale: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q (total, H, D), k and v (total, G, D) to (total, H, D), among themselves or with what the cache holds."""
    sinks = None if sinks is None else sinks.to(q.dtype)
    if now.cache is not None:
        now.cache.write(layer, k, v)
    if now.cache is not None and now.cu_seqlens is None:
        return now.cache.attend(layer, q, window, scale, sinks)
    out = flash_attention(
        q, k, v, window=window, cu_seqlens=now.cu_seqlens, parents=now.parents, scale=scale, sinks=sinks
    )
    assert isinstance(out, Tensor)
    return out


class LatentAttention(nn.Module):
    """Keys and values from a vector of kv_rank numbers, and rope_dim rotated ones that all heads share.

    The cache holds them multiplied out, the narrower of keys and values padded to the width of the wider.
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
        self.latent, self.H, self.layer, self.eps = latent, H, layer, 1e-6
        self.scale, self.window = config.attention_scale, config.windows[layer]
        self.width = config.attention_width

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        latent, H = self.latent, self.H
        first = self.q_a_proj if latent.q_rank else self.q_proj
        q, narrow = linears_of((first, self.kv_a_proj_with_mqa), x, now.adapter)
        if latent.q_rank:
            q = self.q_b_proj(rms_norm(q, self.q_a_layernorm.weight, self.eps), now.adapter)
        q = q.unflatten(1, (H, -1))  # (total, H, nope + rope)
        narrow, k_rope = narrow.split([latent.kv_rank, latent.rope_dim], 1)
        kv = self.kv_b_proj(rms_norm(narrow, self.kv_a_layernorm.weight, self.eps), now.adapter)
        k, v = kv.unflatten(1, (H, -1)).split([latent.nope_dim, latent.value_dim], 2)  # (total, H, ...)
        q_rope, k_rope = apply_rope(
            q[..., latent.nope_dim :], k_rope[:, None], now.cos, now.sin, interleaved=latent.interleaved
        )
        q = torch.cat([q[..., : latent.nope_dim], q_rope], -1)
        k = torch.cat([k, k_rope.expand(-1, H, -1)], -1)
        q, k, v = (F.pad(t, (0, self.width - t.shape[-1])) for t in (q, k, v))
        out = attend(q, k, v, now, self.layer, self.window, self.scale)[..., : latent.value_dim]
        return self.o_proj(out.flatten(1), now.adapter)  # (total, C)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, size: int | None = None):
        super().__init__()
        C, F_ = config.hidden_size, size or config.intermediate_size
        self.activation = geglu if config.gemma else swiglu
        self.gate_proj = Linear(C, F_, config.mlp_bias)
        self.up_proj = Linear(C, F_, config.mlp_bias)
        self.down_proj = Linear(F_, C, config.mlp_bias)

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        gate, up = linears_of((self.gate_proj, self.up_proj), x, now.adapter)  # (total, F)
        return self.down_proj(self.activation(gate, up), now.adapter)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size)
        self.self_attn = (LatentAttention if config.latent else Attention)(config, layer)
        self.post_attention_layernorm = Norm(config.hidden_size)
        self.pre_feedforward_layernorm = Norm(config.hidden_size) if config.gemma else None
        self.post_feedforward_layernorm = Norm(config.hidden_size) if config.gemma else None
        experts = config.experts
        if experts is not None and experts.layers[layer]:
            self.mlp = MoE(config, experts, MLP(config, experts.shared_size) if experts.shared_size else None)
        else:
            self.mlp = MLP(config)
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor, now: Pass, rows: Tensor | None = None) -> Tensor:
        """x (total, C) to (total, C), or with `rows` (n,) to these alone: the others are only attended to."""
        if self.pre_feedforward_layernorm is not None:
            return self._gemma(x, now, rows)
        y = self.self_attn(rms_norm(x, self.input_layernorm.weight, self.eps), now)
        x, y, now = _narrow(x, y, now, rows)
        y, h = add_rms_norm(y, x, self.post_attention_layernorm.weight, self.eps)
        return h + self.mlp(y, now)

    def _gemma(self, x: Tensor, now: Pass, rows: Tensor | None) -> Tensor:
        """Each branch is also normalised before it is added."""
        assert self.pre_feedforward_layernorm is not None and self.post_feedforward_layernorm is not None
        y = self.self_attn(rms_norm(x, self.input_layernorm.weight, self.eps, unit_offset=True), now)
        x, y, now = _narrow(x, y, now, rows)
        y = rms_norm(y, self.post_attention_layernorm.weight, self.eps, unit_offset=True)
        y, h = add_rms_norm(y, x, self.pre_feedforward_layernorm.weight, self.eps, unit_offset=True)
        return h + rms_norm(
            self.mlp(y, now), self.post_feedforward_layernorm.weight, self.eps, unit_offset=True
        )


def _narrow(x: Tensor, y: Tensor, now: Pass, rows: Tensor | None) -> tuple[Tensor, Tensor, Pass]:
    """What is left of x and y (total, C), and of what their tokens share, at `rows`."""
    if rows is None:
        return x, y, now
    return x[rows], y[rows], replace(now, adapter=None if now.adapter is None else now.adapter[rows])


# ---- model


class Transformer(nn.Module):
    """Weights N(0, initializer_range) from `seed`, norms one, biases zero; on the meta device nothing is drawn.

    checkpoint_activations: keep only each layer's input in training and run the layer again in the backward pass.
    """

    def __init__(self, config: ModelConfig, seed: int = 0, device: torch.device | str = "cpu"):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        self.adapter: LoraConfig | None = None  # what adapter.py has added
        self.routing: tuple[RouteStatistics, ...] = ()  # of the latest forward pass, by layer with experts
        # the base's own values of what an adapter trains whole, by name
        self.replaced: dict[str, Tensor] = {}
        self.dtypes: Dtypes | None = None  # of the folder that the weights were read from
        with torch.device("meta"):
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
            self.norm = Norm(config.hidden_size)
            tied = config.tie_word_embeddings
            self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, bias=False)
        if torch.device(device).type == "meta":
            return
        self.to_empty(device=device)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if weight.dim() >= 2 and not name.endswith("bias"):
                    # drawn on the CPU: the same weights on every device
                    drawn = torch.empty(weight.shape).normal_(generator=generator)
                    weight.copy_(drawn * config.initializer_range)
                else:
                    zero = name.endswith(("bias", "sinks")) or config.gemma
                    weight.fill_(0.0 if zero else 1.0)
            for buffer in self.buffers():
                buffer.zero_()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"routing": ()}  # its tensors have a graph, which a copy of the model has not

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def head(self) -> Tensor:
        """(V, C): the embedding itself where the two are tied, an adapter multiplied in."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.merged()

    def _pass(self, positions: Tensor, **more: Any) -> Pass:
        local = self.config.local_rope
        cos, sin = self._angles(positions)
        return Pass(cos, sin, local=None if local is None else self._angles(positions, local), **more)

    def _packed_pass(self, packed: Packed, cache: Cache | None = None) -> Pass:
        return self._pass(
            packed.positions,
            cu_seqlens=packed.cu_seqlens,
            parents=packed.parents,
            cache=cache,
            adapter=packed.adapter,
        )

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        return x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype) if self.config.gemma else x

    def _final(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.norm.weight, self.config.rms_norm_eps, unit_offset=self.config.gemma)

    def balance_loss(self, coefficient: float | None = None, *, pooled: bool = True) -> Tensor:
        """How uneven the experts' load was in the latest forward pass, times a coefficient: config.json's by default.

        () with a gradient, 0 without experts. pooled: over the tokens of all layers at once, as transformers has it;
        otherwise the mean of each layer's own.
        """
        experts = self.config.experts
        if experts is None or not self.routing:
            return torch.zeros((), device=self.device)
        coefficient = experts.balance_coefficient if coefficient is None else coefficient
        balance = pooled_balance(self.routing, experts.top_k) if pooled else layer_balance(self.routing)
        return coefficient * balance

    def _angles(self, positions: Tensor, rope: Rope | None = None) -> tuple[Tensor, Tensor]:
        """positions (total,) to cos and sin, (total, D/2) fp32."""
        rope = self.config.rope if rope is None else rope
        inv_freq, factor = rope_frequencies(rope, self.config.rotary_dim, positions.device)
        angle = positions[:, None].float() * inv_freq
        cos, sin = angle.cos(), angle.sin()
        return (cos, sin) if factor == 1 else (cos * factor, sin * factor)

    def forward(self, packed: Packed) -> Tensor:
        """Hidden states after the final norm, (total, C)."""
        x, now = self._embed(packed.tokens), self._packed_pass(packed)  # (total, C)
        for layer in self.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, now, use_reentrant=False)
            else:
                x = layer(x, now)
        self.routing = tuple(now.routed)
        return self._final(x)

    def prefill(self, packed: Packed, cache: Cache) -> Tensor:
        """Write the cache as its `open` said. Returns hidden states of each segment's last token, (segments, C)."""
        x, now = self._embed(packed.tokens), self._packed_pass(packed, cache)
        *layers, final = self.layers
        for layer in layers:
            x = layer(x, now)
        return self._final(final(x, now, packed.cu_seqlens[1:].long() - 1))

    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:
        """One further token (B,) for each of the cache's first B slots to hidden states (B, C)."""
        adapter = None if cache.adapter is None else cache.adapter[: tokens.numel()]
        now = self._pass(cache.grow(tokens.numel()), cache=cache, adapter=adapter)
        x = self._embed(tokens)
        for layer in self.layers:
            x = layer(x, now)
        return self._final(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) to (..., V) in fp32 (fp64 from fp64), from the inputs and with the precision that `score` uses.

        An adapter of the head, without its dropout, comes on top: sampling would multiply it out for every token.
        Where no gradient is asked, a head in half precision is not copied, but for one with DoRA.
        """
        return full_logits(hidden, self.lm_head, self.embed_tokens.weight)

    def score(
        self,
        packed: Packed,
        rows: Tensor,
        *,
        temperature: float | Tensor = 1.0,
        support: Tensor | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """How likely are the tokens at `rows` (n,), given what stands before them?  (logprob, lse, entropy), each (n,).

        Row i's own token is scored from packed.predictors[i], so that masks never shift. support: (n, K_max) int32, the
        ids kept by a truncating sampler, padded with -1. vocabulary: the ids that a sampler drew from, on the model's
        device; None for the whole head. Raises ValueError where a row is the first of its sequence; on a GPU, where
        looking would stall it, such a row gives NaN.
        """
        vocabulary = vocabulary if support is None else None  # a support holds nothing but tokens
        hidden, head = self.before_head(packed, rows, vocabulary)
        targets = packed.tokens[rows]
        targets = targets if vocabulary is None else vocabulary.rows_of(targets)
        return head.token_logprobs(hidden, targets, temperature=temperature, support=support)

    def before_head(
        self, packed: Packed, rows: Tensor, vocabulary: Vocabulary | None = None
    ) -> tuple[Tensor, Head]:
        """The operands of the logits that score the tokens at `rows` (n,): hidden states (n, C) and the head.

        Both in the dtype that autocast would give their product; C is wider where the head's adapter has dropout.
        vocabulary: of the head these ids' rows alone, which rows_of counts. The first row of a sequence is answered as
        `score` does.
        """
        hidden, head = self._predicting(packed, rows), Head(self.embed_tokens.weight)
        if self.lm_head is not None:
            hidden, head = operands(self.lm_head, hidden)
        hidden, head = hidden.to(autocast_dtype(hidden)), head.to(autocast_dtype(head.weight))
        return hidden, head.among(vocabulary)

    def _predicting(self, packed: Packed, rows: Tensor) -> Tensor:
        predictors = packed.predictors[rows]
        nowhere = predictors < 0
        if not readable(predictors):
            hidden = self(packed)[predictors]
            return hidden + hidden.new_zeros(len(rows), 1).masked_fill_(nowhere[:, None], torch.nan)
        if nowhere.any():
            raise ValueError(
                "rows: the first token of a sequence without a parent has nothing to be scored from"
            )
        return self(packed)[predictors]
