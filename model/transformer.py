"""One decoder-only transformer on packed tokens; every architecture is a ModelConfig.

    x = embedding[tokens]                                                            (total, C)
    for each layer:   h = x + o_proj(attention(rope(norm(q)), rope(norm(k)), v))     with q, k, v linear in rms_norm(x)
                      x = h + down(silu(gate(y)) * up(y))                            with y = rms_norm(h)
    hidden = rms_norm(x)          logits = hidden head^T, never formed in training: see `score`

There is no batch dimension and no padding: sequences lie end to end (packed.py). Parameter names are those of a Hugging
Face checkpoint, without the leading "model.". Attention is in attention.py, the head in head.py.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import add_rms_norm, geglu, rms_norm, swiglu
from ..kernels._chip import autocast_dtype, readable
from ..kernels.route import RouteStatistics
from .adapters.config import LoraConfig
from .attention import Attention, LatentAttention, Norm, Pass
from .cache import Cache
from .config import Dtypes, ModelConfig
from .head import Head, full_logits, operands
from .linear import Linear, linears_of
from .moe import MoE, layer_balance, pooled_balance
from .packed import Packed
from .rope import cos_and_sin
from .vocabulary import Vocabulary

# ---- layers


class MLP(nn.Module):
    """The feed-forward layer, two matrices of C to F with a gate and one back."""

    def __init__(self, config: ModelConfig, size: int | None = None):
        super().__init__()
        C, F_ = config.hidden_size, size or config.intermediate_size
        self.activation = geglu if config.gemma else swiglu
        self.gate_proj = Linear(C, F_, config.mlp_bias)
        self.up_proj = Linear(C, F_, config.mlp_bias)
        self.down_proj = Linear(F_, C, config.mlp_bias)

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        """x (total, C) to (total, C)."""
        gate, up = linears_of((self.gate_proj, self.up_proj), x, now.adapter)  # (total, F)
        return self.down_proj(self.activation(gate, up), now.adapter)


class Layer(nn.Module):
    """Attention and the feed-forward layer, or experts in its place, each on a norm and added to its input."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        C, experts = config.hidden_size, config.experts
        self.input_layernorm = Norm(C)
        self.self_attn = (LatentAttention if config.latent else Attention)(config, layer)
        self.post_attention_layernorm = Norm(C)
        self.pre_feedforward_layernorm = Norm(C) if config.gemma else None
        self.post_feedforward_layernorm = Norm(C) if config.gemma else None
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
        y = self.mlp(y, now)
        return h + rms_norm(y, self.post_feedforward_layernorm.weight, self.eps, unit_offset=True)


def _narrow(x: Tensor, y: Tensor, now: Pass, rows: Tensor | None) -> tuple[Tensor, Tensor, Pass]:
    """x and y (total, C) to (n, C), and the pass with the adapters of these tokens: `rows` (n,) go on alone.

    The last layer of `prefill` makes no more than what is read of it.
    """
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
        if torch.device(device).type != "meta":
            self.to_empty(device=device)
            self._draw(seed)

    @torch.no_grad()
    def _draw(self, seed: int) -> None:
        """Fill every weight. Matrices are drawn on the CPU: the same weights on every device."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() >= 2 and not name.endswith("bias"):
                drawn = torch.empty(weight.shape).normal_(generator=generator)
                weight.copy_(drawn * self.config.initializer_range)
            else:
                zero = name.endswith(("bias", "sinks")) or self.config.gemma
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

    # ---- tokens to hidden states

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
        """Write the cache where its `open` aimed. Returns hidden states of each segment's last token, (segments, C)."""
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

    def _packed_pass(self, packed: Packed, cache: Cache | None = None) -> Pass:
        return self._pass(
            packed.positions,
            cu_seqlens=packed.cu_seqlens,
            parents=packed.parents,
            cache=cache,
            adapter=packed.adapter,
        )

    def _pass(self, positions: Tensor, **more: Any) -> Pass:
        """The operands of a pass over tokens at `positions` (total,). more: the other fields of a Pass."""
        config, dim = self.config, self.config.rotary_dim
        cos, sin = cos_and_sin(config.rope, dim, positions)
        local = None if config.local_rope is None else cos_and_sin(config.local_rope, dim, positions)
        return Pass(cos, sin, local=local, **more)

    def _embed(self, tokens: Tensor) -> Tensor:
        """tokens (total,) to (total, C), in gemma times a factor rounded as transformers rounds it."""
        x = self.embed_tokens(tokens)
        return x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype) if self.config.gemma else x

    def _final(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.norm.weight, self.config.rms_norm_eps, unit_offset=self.config.gemma)

    # ---- hidden states to words

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) to (..., V) in fp32 (fp64 from fp64), from the inputs and with the precision that `score` uses.

        An adapter of the head, without its dropout, comes on top.
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
        """Score the tokens at `rows` (n,), given what stands before them: (logprob, lse, entropy), each (n,) fp32.

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

        Both in the dtype that autocast would give their product, and wider than C where the head's adapter has dropout.
        vocabulary: the head's rows of these ids alone, which `Vocabulary.rows_of` numbers. The first row of a sequence
        raises, or gives NaN, as in `score`.
        """
        hidden, head = self._predicting(packed, rows), Head(self.embed_tokens.weight)
        if self.lm_head is not None:
            hidden, head = operands(self.lm_head, hidden)
        hidden, head = hidden.to(autocast_dtype(hidden)), head.to(autocast_dtype(head.weight))
        return hidden, head.among(vocabulary)

    def _predicting(self, packed: Packed, rows: Tensor) -> Tensor:
        """Hidden states (n, C) of the rows that score the tokens at `rows`."""
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

    # ---- experts

    def balance_loss(self, coefficient: float | None = None, *, pooled: bool = True) -> Tensor:
        """Unevenness of the experts' load in the latest forward pass, times a coefficient: config.json's by default.

        () with a gradient, 0 without experts. pooled: over the tokens of all layers at once, as transformers has it;
        otherwise the mean of each layer's own.
        """
        experts = self.config.experts
        if experts is None or not self.routing:
            return torch.zeros((), device=self.device)
        coefficient = experts.balance_coefficient if coefficient is None else coefficient
        balance = pooled_balance(self.routing, experts.top_k) if pooled else layer_balance(self.routing)
        return coefficient * balance
