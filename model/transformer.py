"""One decoder-only transformer on packed tokens; every architecture is a ModelConfig.

    x = embedding[tokens]                                                            (total, C)
    for each layer:   h = x + o_proj(attention(rope(norm(q)), rope(norm(k)), v))     with q, k, v linear in rms_norm(x)
                      x = h + down(silu(gate(y)) * up(y))                            with y = rms_norm(h)
    hidden = rms_norm(x)          logits = hidden head^T, never formed in training: see `score`

There is no batch dimension and no padding: sequences lie end to end (packed.py). Parameter names are those of a Hugging
Face checkpoint, without the leading "model.".
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import (
    add_rms_norm,
    apply_rope,
    flash_attention,
    rms_norm,
    swiglu,
    token_logprobs,
)
from .cache import Cache
from .config import ModelConfig, Rope
from .linear import Linear, LoraConfig
from .packed import Packed

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
        self.q_norm = Norm(D) if config.qk_norm else None
        self.k_norm = Norm(D) if config.qk_norm else None
        self.H, self.G, self.D = H, G, D
        self.layer, self.eps = layer, config.rms_norm_eps
        self.rotate, self.window = config.rope_layers[layer], config.windows[layer]

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        q = self.q_proj(x, now.adapter).view(-1, self.H, self.D)  # (total, H, D)
        k = self.k_proj(x, now.adapter).view(-1, self.G, self.D)  # (total, G, D)
        v = self.v_proj(x, now.adapter).view(-1, self.G, self.D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm.weight, self.eps), rms_norm(k, self.k_norm.weight, self.eps)
        if self.rotate:
            q, k = apply_rope(q, k, now.cos, now.sin)
        if now.cache is not None:
            now.cache.write(self.layer, k, v)
        if now.cache is not None and now.cu_seqlens is None:
            out = now.cache.attend(self.layer, q, self.window)
        else:
            out = flash_attention(q, k, v, window=self.window, cu_seqlens=now.cu_seqlens, parents=now.parents)
        assert isinstance(out, Tensor)
        return self.o_proj(out.flatten(1), now.adapter)  # (total, C)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        C, F_ = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(C, F_, config.mlp_bias)
        self.up_proj = Linear(C, F_, config.mlp_bias)
        self.down_proj = Linear(F_, C, config.mlp_bias)

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        gate, up = self.gate_proj(x, now.adapter), self.up_proj(x, now.adapter)  # (total, F)
        return self.down_proj(swiglu(gate, up), now.adapter)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = Norm(config.hidden_size)
        self.mlp = MLP(config)
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        y = self.self_attn(rms_norm(x, self.input_layernorm.weight, self.eps), now)
        y, h = add_rms_norm(y, x, self.post_attention_layernorm.weight, self.eps)
        return h + self.mlp(y, now)


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
        self.replaced: dict[
            str, Tensor
        ] = {}  # the base's own values of what an adapter trains whole, by name
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
                if weight.dim() == 2:  # drawn on the CPU: the same weights on every device
                    drawn = torch.empty(weight.shape).normal_(generator=generator)
                    weight.copy_(drawn * config.initializer_range)
                else:
                    weight.fill_(0.0 if name.endswith("bias") else 1.0)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def head(self) -> Tensor:
        """(V, C): the embedding itself where the two are tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.merged()

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (total,) to cos and sin, (total, D/2) fp32."""
        inv_freq, factor = rope_frequencies(self.config.rope, self.config.head_dim, positions.device)
        angle = positions[:, None].float() * inv_freq
        cos, sin = angle.cos(), angle.sin()
        return (cos, sin) if factor == 1 else (cos * factor, sin * factor)

    def forward(self, packed: Packed, cache: Cache | None = None) -> Tensor:
        """Hidden states after the final norm, (total, C). A cache takes the keys and values as its `open` said."""
        cos, sin = self._angles(packed.positions)
        now = Pass(cos, sin, packed.cu_seqlens, packed.parents, cache, packed.adapter)
        x = self.embed_tokens(packed.tokens)  # (total, C)
        for layer in self.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, now, use_reentrant=False)
            else:
                x = layer(x, now)
        return rms_norm(x, self.norm.weight, self.config.rms_norm_eps)

    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:
        """One further token (B,) for each of the cache's first B slots to hidden states (B, C)."""
        cos, sin = self._angles(cache.grow(tokens.numel()))
        adapter = None if cache.adapter is None else cache.adapter[: tokens.numel()]
        now = Pass(cos, sin, cache=cache, adapter=adapter)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, now)
        return rms_norm(x, self.norm.weight, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) to (..., V) in fp32 (fp64 from fp64), from the inputs and with the precision that `score` uses."""
        hidden, head = self._head_inputs(hidden)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(wide), head.to(wide))

    def _head_inputs(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and head in the dtype that autocast, which does not know our ops, would give a matmul."""
        if not torch.is_autocast_enabled(hidden.device.type):
            return hidden, self.head
        dtype = torch.get_autocast_dtype(hidden.device.type)
        return hidden.to(dtype), self.head.to(dtype)

    def score(
        self,
        packed: Packed,
        rows: Tensor,
        *,
        temperature: float | Tensor = 1.0,
        support: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """How likely are the tokens at `rows` (n,), given what stands before them?  (logprob, lse, entropy), each (n,).

        Row i's own token is scored from packed.predictors[i], so that masks never shift. support: (n, K_max) int32, the
        ids kept by a truncating sampler, padded with -1. Raises ValueError where a row is the first of its sequence.
        """
        predictors = packed.predictors[rows]
        if bool((predictors < 0).any()):
            raise ValueError(
                "rows: the first token of a sequence without a parent has nothing to be scored from"
            )
        hidden, head = self._head_inputs(self(packed)[predictors])  # (n, C), (V, C)
        with torch.autocast(hidden.device.type, enabled=False):
            return token_logprobs(hidden, head, packed.tokens[rows], temperature=temperature, support=support)
