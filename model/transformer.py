"""A decoder-only transformer on packed tokens. Every architecture is a ModelConfig.

    x = embedding[tokens]                                                            (total, C)
    for each layer:   h = x + o_proj(attention(rope(norm(q)), rope(norm(k)), v))     with q, k, v linear in rms_norm(x)
                      x = h + down(silu(gate(y)) * up(y))                            with y = rms_norm(h)
    hidden = rms_norm(x)          logits = hidden head^T, never formed in training: see `score`

There is no batch dimension and no padding: sequences are concatenated (packed.py). Parameter names are those of a
Hugging Face checkpoint, without the leading "model.". Attention is in attention.py, and the head in head.py.
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
    """The feed-forward layer: two matrices from C to F, one of them the gate, and one from F to C."""

    def __init__(self, config: ModelConfig, size: int | None = None):
        super().__init__()
        C, F_ = config.hidden_size, size or config.intermediate_size
        self.activation = geglu if config.gemma else swiglu
        self.gate_proj = Linear(C, F_, config.mlp_bias)
        self.up_proj = Linear(C, F_, config.mlp_bias)
        self.down_proj = Linear(F_, C, config.mlp_bias)

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        """Apply the layer to x (total, C), and return (total, C)."""
        gate, up = linears_of((self.gate_proj, self.up_proj), x, now.adapter)  # (total, F)
        return self.down_proj(self.activation(gate, up), now.adapter)


class Layer(nn.Module):
    """A transformer layer: attention, and then a feed-forward layer or experts.

    Each of these two branches reads the RMSNorm of its input, and its output is added to its input.
    """

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
        """Apply the layer to x (total, C), and return (total, C).

        With `rows` (n,) the result is (n, C). The feed-forward layer then runs for these tokens only.
        """
        if self.pre_feedforward_layernorm is not None:
            return self._gemma(x, now, rows)
        y = self.self_attn(rms_norm(x, self.input_layernorm.weight, self.eps), now)
        x, y, now = _narrow(x, y, now, rows)
        y, h = add_rms_norm(y, x, self.post_attention_layernorm.weight, self.eps)
        return h + self.mlp(y, now)

    def _gemma(self, x: Tensor, now: Pass, rows: Tensor | None) -> Tensor:
        """Apply the layer like `forward`, but also normalise each branch before it is added."""
        assert self.pre_feedforward_layernorm is not None and self.post_feedforward_layernorm is not None
        y = self.self_attn(rms_norm(x, self.input_layernorm.weight, self.eps, unit_offset=True), now)
        x, y, now = _narrow(x, y, now, rows)
        y = rms_norm(y, self.post_attention_layernorm.weight, self.eps, unit_offset=True)
        y, h = add_rms_norm(y, x, self.pre_feedforward_layernorm.weight, self.eps, unit_offset=True)
        y = self.mlp(y, now)
        return h + rms_norm(y, self.post_feedforward_layernorm.weight, self.eps, unit_offset=True)


def _narrow(x: Tensor, y: Tensor, now: Pass, rows: Tensor | None) -> tuple[Tensor, Tensor, Pass]:
    """Select `rows` (n,) of x and y (total, C), and of the adapter indices in the Pass. None selects all rows.

    The last layer of `prefill` uses it, because only the last token of each segment is read.
    """
    if rows is None:
        return x, y, now
    return x[rows], y[rows], replace(now, adapter=None if now.adapter is None else now.adapter[rows])


# ---- model


class Transformer(nn.Module):
    """A transformer with a language head, initialised from `seed`.

    Weights are drawn from N(0, initializer_range), norms are one, and biases are zero. On the meta device nothing is
    drawn.

    checkpoint_activations: save only each layer's input in training, and run the layer again in the backward pass.
    """

    def __init__(self, config: ModelConfig, seed: int = 0, device: torch.device | str = "cpu"):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        self.adapter: LoraConfig | None = None  # the adapter that adapter.py has added
        self.routing: tuple[RouteStatistics, ...] = ()  # of the latest pass, one per layer with experts
        # by name, the base's values of the tensors that an adapter trains in full
        self.replaced: dict[str, Tensor] = {}
        self.dtypes: Dtypes | None = None  # the dtypes of the folder that the weights were read from

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
        """Initialise every parameter and buffer. Matrices are drawn on the CPU, to be the same on every device."""
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
        return self.__dict__ | {"routing": ()}  # a copy of the model cannot have the graph of its tensors

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def head(self) -> Tensor:
        """The head's weight (V, C), including an adapter. It is the embedding itself if the two are tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.merged()

    # ---- tokens to hidden states

    def forward(self, packed: Packed) -> Tensor:
        """Return the hidden states after the final norm, (total, C)."""
        x, now = self._embed(packed.tokens), self._packed_pass(packed)  # (total, C)
        for layer in self.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, now, use_reentrant=False)
            else:
                x = layer(x, now)
        self.routing = tuple(now.routed)
        return self._final(x)

    def prefill(self, packed: Packed, cache: Cache) -> Tensor:
        """Run prompts, and store their keys and values in the cache rows that `cache.open` set.

        Returns the hidden state of each segment's last token, (segments, C).
        """
        x, now = self._embed(packed.tokens), self._packed_pass(packed, cache)
        *layers, final = self.layers
        for layer in layers:
            x = layer(x, now)
        return self._final(final(x, now, packed.cu_seqlens[1:].long() - 1))

    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Run one new token for each of the cache's first B slots.

        Takes tokens (B,), and returns hidden states (B, C).
        """
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
        """Return the Pass, the operands that all layers share, for tokens at `positions` (total,).

        more: the other fields of the Pass.
        """
        config, dim = self.config, self.config.rotary_dim
        cos, sin = cos_and_sin(config.rope, dim, positions)
        local = None if config.local_rope is None else cos_and_sin(config.local_rope, dim, positions)
        return Pass(cos, sin, local=local, **more)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings (total, C) of tokens (total,).

        Gemma's embeddings are multiplied by sqrt(C), rounded to their dtype as in transformers.
        """
        x = self.embed_tokens(tokens)
        return x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype) if self.config.gemma else x

    def _final(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.norm.weight, self.config.rms_norm_eps, unit_offset=self.config.gemma)

    # ---- hidden states to logits

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits (..., V) of hidden states (..., C), in fp32 (fp64 for fp64).

        The operands are rounded as in `score`. The head's adapter is included, without dropout.
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
        """Score the tokens at `rows` (n,), given the tokens before them.

        rows: (n,) int, indices into packed.tokens. The token at row i is scored from row packed.predictors[i], so
            callers never shift masks.
        support: (n, K_max) int32, the ids that a truncating sampler kept, padded with -1.
        vocabulary: the ids that a sampler drew from, on the model's device, or None for the whole head. It is ignored
            if a support is given.

        Returns (logprob, lse, entropy), each (n,) fp32. Raises ValueError if a row is the first of a sequence without a
        parent. On a GPU such a row gives NaN instead, because the check would stall the device.
        """
        vocabulary = vocabulary if support is None else None  # a support holds only ids of the vocabulary
        hidden, head = self.before_head(packed, rows, vocabulary)
        targets = packed.tokens[rows]
        targets = targets if vocabulary is None else vocabulary.rows_of(targets)
        return head.token_logprobs(hidden, targets, temperature=temperature, support=support)

    def before_head(
        self, packed: Packed, rows: Tensor, vocabulary: Vocabulary | None = None
    ) -> tuple[Tensor, Head]:
        """Return the operands of the logits that score the tokens at `rows` (n,): hidden states (n, C) and the head.

        Both have the dtype that autocast would give their product. They are wider than C if the head's adapter has
        dropout.

        vocabulary: keep only the head's rows of these ids, in the numbering of `Vocabulary.rows_of`.

        The first row of a sequence raises, or gives NaN, as in `score`.
        """
        hidden, head = self._predicting(packed, rows), Head(self.embed_tokens.weight)
        if self.lm_head is not None:
            hidden, head = operands(self.lm_head, hidden)
        hidden, head = hidden.to(autocast_dtype(hidden)), head.to(autocast_dtype(head.weight))
        return hidden, head.among(vocabulary)

    def _predicting(self, packed: Packed, rows: Tensor) -> Tensor:
        """Return the hidden states (n, C) of the rows that score the tokens at `rows`.

        A token without such a row raises ValueError, or gives NaN, as in `score`.
        """
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
        """Return the load-balance loss of the experts for the latest forward pass, times a coefficient.

        coefficient: by default that of config.json.
        pooled: whether the load is counted over the tokens of all layers at once, as in transformers. Otherwise the
            mean of each layer's own loss is taken.

        Returns a scalar with a gradient, or 0 without experts.
        """
        experts = self.config.experts
        if experts is None or not self.routing:
            return torch.zeros((), device=self.device)
        coefficient = experts.balance_coefficient if coefficient is None else coefficient
        balance = pooled_balance(self.routing, experts.top_k) if pooled else layer_balance(self.routing)
        return coefficient * balance
