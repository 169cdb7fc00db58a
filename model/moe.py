"""Experts in place of the feed-forward layer, and how many parameters a model has.

    weights, indices = moe_route(x W_gate^T)          which experts each token goes to
    out = moe_mlp(x, ...)  (+ shared_expert(x), which every token goes to; with a gate times sigmoid(x w))

A layer's experts are two tensors, gate_up (E, 2F, C), the gate's rows first, and down (E, C, F); what they are in a
folder stands in experts.py.

Source: https://arxiv.org/abs/2401.04088 (Mixtral), 2409.02060 (OLMoE), 2412.19437 (DeepSeek-V3), 2508.10925 (gpt-oss)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import moe_mlp, moe_route
from ..kernels._chip import autocast_dtype
from ..kernels.route import RouteStatistics
from .config import Experts, Latent, ModelConfig
from .linear import ExpertLinear, Linear

# ---- layers


class Router(nn.Module):
    """Logits of the experts (total, E) in fp32: which ones are chosen hangs on the last bits."""

    def __init__(self, config: ModelConfig, experts: Experts):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(experts.num_experts)) if experts.clamped else None
        self.e_score_correction_bias: Tensor | None
        correction = torch.zeros(experts.num_experts) if experts.score == "sigmoid" else None
        self.register_buffer("e_score_correction_bias", correction)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(wide)
            return F.linear(x.to(wide), self.weight.to(wide), bias)


class ExpertWeights(nn.Module):
    def __init__(self, config: ModelConfig, experts: Experts):
        super().__init__()
        E, F_, C = experts.num_experts, experts.intermediate_size, config.hidden_size
        self.gate_up_proj = ExpertLinear(E, C, 2 * F_)
        self.down_proj = ExpertLinear(E, F_, C)
        self.gate_up_bias = nn.Parameter(torch.empty(E, 2 * F_)) if experts.clamped else None
        self.down_bias = nn.Parameter(torch.empty(E, C)) if experts.clamped else None


class MoE(nn.Module):
    """shared: the expert that every token goes to, a module of (x, now)."""

    def __init__(self, config: ModelConfig, experts: Experts, shared: nn.Module | None):
        super().__init__()
        self.gate = Router(config, experts)
        self.experts = ExpertWeights(config, experts)
        self.shared_expert = shared
        self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False) if experts.shared_gate else None
        self.how = experts

    def forward(self, x: Tensor, now: Any) -> Tensor:
        """(total, C) to (total, C); what the router says of its choice goes to now.routed."""
        how, held = self.how, self.experts
        weights, indices, statistics = moe_route(
            self.gate(x),
            how.top_k,
            score=how.score,  # pyright: ignore[reportArgumentType]
            bias=self.gate.e_score_correction_bias,
            groups=how.groups,
            top_groups=how.top_groups,
            renormalize=how.renormalize,
            scale=how.scale,
        )
        now.routed.append(statistics)
        x = x.to(autocast_dtype(x))
        gate_up_a, gate_up_b = held.gate_up_proj.adapter()
        down_a, down_b = held.down_proj.adapter()
        out = moe_mlp(
            x,
            held.gate_up_proj.operand(x.dtype),
            held.down_proj.operand(x.dtype),
            weights,
            indices,
            activation="clamped_swiglu" if how.clamped else "swiglu",
            gate_up_bias=None if held.gate_up_bias is None else held.gate_up_bias.to(x.dtype),
            down_bias=None if held.down_bias is None else held.down_bias.to(x.dtype),
            gate_up_a=gate_up_a,
            gate_up_b=gate_up_b,
            down_a=down_a,
            down_b=down_b,
            alpha=how.alpha,
            limit=how.limit,
        )
        if self.shared_expert is None:
            return out
        shared = self.shared_expert(x, now)
        if self.shared_expert_gate is not None:
            shared = self.shared_expert_gate(x, now.adapter).sigmoid() * shared
        return out + shared


def pooled_balance(routing: Sequence[RouteStatistics], top_k: int) -> Tensor:
    """E sum_e (how often a token chose e)(mean probability of e), both means over the tokens of all layers at once.

    (), differentiable; K where the load is even. routing: the layers of one forward pass, at least one. As transformers
    has it (load_balancing_loss_func): an expert that one layer overworks and another spares costs nothing.
    """
    counts = torch.stack([layer.counts for layer in routing]).sum(0)  # (E,)
    probability = torch.stack([layer.probability for layer in routing]).mean(0)  # (E,)
    share = counts.to(probability.dtype) / counts.sum().clamp(min=1)
    return probability.numel() * top_k * (share * probability).sum()


def layer_balance(routing: Sequence[RouteStatistics]) -> Tensor:
    """The mean over layers of each one's own balance: every layer's load is to be even by itself."""
    return torch.stack([layer.balance for layer in routing]).mean()


# ---- parameters


@dataclass(frozen=True)
class Count:
    """total: parameters in memory. active: without the experts that a token does not go to.

    Publishers count the embedding, of which a token reads one row, among the active ones (Mixtral) or not (DeepSeek).
    """

    total: int
    active: int
    embedding: int
    formula: str


def count_parameters(config: ModelConfig) -> Count:
    """With the formula, a term for each kind of tensor, in the order of a forward pass."""
    C, V, layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
    H, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    terms: list[tuple[str, int, int]] = []  # words, total, active

    def add(words: str, total: int, active: int | None = None) -> None:
        terms.append((words, total, total if active is None else active))

    add(f"embedding {V} x {C}", V * C)
    if config.latent:
        low = config.latent
        queries = C * low.q_rank + low.q_rank + low.q_rank * H * D if low.q_rank else C * H * D
        keys = (
            C * (low.kv_rank + low.rope_dim) + low.kv_rank + low.kv_rank * H * (low.nope_dim + low.value_dim)
        )
        add(f"{layers} latent attention", layers * (queries + keys + H * low.value_dim * C))
    else:
        biases = config.qkv_bias * (H + 2 * G) * D + config.output_bias * C
        norms = config.qk_norm * 2 * D + config.qk_norm_whole * (H + G) * D + config.sinks * H
        words = f"{layers} attention x ({C} x {D} x (2 x {H} + 2 x {G}) + {biases + norms})"
        add(words, layers * (C * D * (2 * H + 2 * G) + biases + norms))
    experts = config.experts
    sparse = sum(experts.layers) if experts else 0
    if layers - sparse:
        F_ = config.intermediate_size
        add(
            f"{layers - sparse} dense x 3 x {C} x {F_}",
            (layers - sparse) * (3 * C * F_ + config.mlp_bias * (2 * F_ + C)),
        )
    if experts and sparse:
        E, K, F_ = experts.num_experts, experts.top_k, experts.intermediate_size
        one = 3 * C * F_ + experts.clamped * (2 * F_ + C)
        router = E * C + E * experts.clamped
        add(f"{sparse} routers x {E} x {C}", sparse * router)
        add(f"{sparse} x {E} experts x 3 x {C} x {F_} ({K} active)", sparse * E * one, sparse * K * one)
        if experts.shared_size:
            shared = 3 * C * experts.shared_size + experts.shared_gate * C
            add(f"{sparse} shared experts x 3 x {C} x {experts.shared_size}", sparse * shared)
    add("norms", layers * C * (4 if config.gemma else 2) + C)
    if not config.tie_word_embeddings:
        add(f"head {V} x {C}", V * C)
    formula = "\n+ ".join(f"{words} = {total:,}" for words, total, _ in terms)
    return Count(sum(t for _, t, _ in terms), sum(a for _, _, a in terms), V * C, formula)


def count_switch(
    moe_layers: int,
    experts: int,
    hidden: int,
    ffn: int,
    attention_layers: int,
    attention: int,
    vocab_size: int,
) -> Count:
    """A Switch Transformer: experts of two matrices without a gate, one active; attention: heads times their width."""
    one = moe_layers * 2 * hidden * ffn
    rest = attention_layers * 4 * hidden * attention + moe_layers * experts * hidden
    formula = (
        f"embedding {vocab_size} x {hidden} = {vocab_size * hidden:,}\n"
        f"+ {attention_layers} attention x 4 x {hidden} x {attention}, "
        f"{moe_layers} routers x {experts} x {hidden} = {rest:,}\n"
        f"+ {moe_layers} x {experts} experts x 2 x {hidden} x {ffn} = {experts * one:,}"
    )
    rest += vocab_size * hidden
    return Count(rest + experts * one, rest + one, vocab_size * hidden, formula)


def switch_c() -> Count:
    """15 encoder and 15 decoder layers, 45 attentions of 32 heads of 64. https://arxiv.org/abs/2101.03961, table 9"""
    return count_switch(30, 2048, 2080, 6144, attention_layers=45, attention=2048, vocab_size=32_128)


def _deepseek(**sizes: Any) -> ModelConfig:
    return ModelConfig(
        head_dim=192,
        latent=Latent(kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, q_rank=1536),
        **sizes,
    )


PRESETS = {
    "Mixtral-8x7B": ModelConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        experts=Experts(8, 2, 14_336, (True,) * 32, renormalize=True),
    ),
    "DeepSeek-V2.5": _deepseek(
        vocab_size=102_400,
        hidden_size=5120,
        intermediate_size=12_288,
        num_hidden_layers=60,
        num_attention_heads=128,
        experts=Experts(
            160, 6, 1536, (False,) + (True,) * 59, groups=8, top_groups=3, scale=16.0, shared_size=3072
        ),
    ),
    "DeepSeek-V3": _deepseek(
        vocab_size=129_280,
        hidden_size=7168,
        intermediate_size=18_432,
        num_hidden_layers=61,
        num_attention_heads=128,
        experts=Experts(
            256,
            8,
            2048,
            (False,) * 3 + (True,) * 58,
            score="sigmoid",
            groups=8,
            top_groups=4,
            renormalize=True,
            scale=2.5,
            shared_size=2048,
        ),
    ),
    "Qwen3-30B-A3B": ModelConfig(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        qk_norm=True,
        experts=Experts(128, 8, 768, (True,) * 48, renormalize=True),
    ),
}
