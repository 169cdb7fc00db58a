"""Mixture of experts in place of the feed-forward layer.

    weights, indices = moe_route(x W_gate^T)          the experts that each token goes to
    out = moe_mlp(x, ...)  (+ shared_expert(x), which sees every token; with a gate it is multiplied by sigmoid(x w))

A layer's experts are two tensors, gate_up (E, 2F, C), with the gate's rows first, and down (E, C, F). files/experts.py
has their form on disk.

Source: https://arxiv.org/abs/2401.04088 (Mixtral), 2409.02060 (OLMoE), 2412.19437 (DeepSeek-V3), 2508.10925 (gpt-oss)
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import moe_mlp, moe_route
from ..kernels._chip import autocast_dtype
from ..kernels.route import RouteStatistics
from .config import Experts, ModelConfig
from .linear import ExpertLinear, Linear


class Router(nn.Module):
    """The layer that computes the experts' logits (total, E), in fp32 because the choice depends on their last bits."""

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
    """The two matrices of all experts, with biases if the architecture has them."""

    def __init__(self, config: ModelConfig, experts: Experts):
        super().__init__()
        E, F_, C = experts.num_experts, experts.intermediate_size, config.hidden_size
        self.gate_up_proj = ExpertLinear(E, C, 2 * F_)
        self.down_proj = ExpertLinear(E, F_, C)
        self.gate_up_bias = nn.Parameter(torch.empty(E, 2 * F_)) if experts.clamped else None
        self.down_bias = nn.Parameter(torch.empty(E, C)) if experts.clamped else None


class MoE(nn.Module):
    """A mixture of experts with its router.

    shared: the expert that every token goes to, or None. It is called with x (total, C) and the Pass of attention.py.
    """

    def __init__(self, config: ModelConfig, experts: Experts, shared: nn.Module | None):
        super().__init__()
        self.gate = Router(config, experts)
        self.experts = ExpertWeights(config, experts)
        self.shared_expert = shared
        self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False) if experts.shared_gate else None
        self.routing = experts

    def forward(self, x: Tensor, now: Any) -> Tensor:
        """Apply the layer to x (total, C), and return (total, C). The router's statistics are added to now.routed."""
        # 1. choose the experts of each token
        routing, experts = self.routing, self.experts
        weights, indices, statistics = moe_route(
            self.gate(x),
            routing.top_k,
            score=routing.score,  # pyright: ignore[reportArgumentType]
            bias=self.gate.e_score_correction_bias,
            groups=routing.groups,
            top_groups=routing.top_groups,
            renormalize=routing.renormalize,
            scale=routing.scale,
        )
        now.routed.append(statistics)

        # 2. compute the weighted sum of their outputs
        x = x.to(autocast_dtype(x))
        gate_up_a, gate_up_b = experts.gate_up_proj.adapter()
        down_a, down_b = experts.down_proj.adapter()

        out = moe_mlp(
            x,
            experts.gate_up_proj.operand(x.dtype),
            experts.down_proj.operand(x.dtype),
            weights,
            indices,
            activation="clamped_swiglu" if routing.clamped else "swiglu",
            gate_up_bias=None if experts.gate_up_bias is None else experts.gate_up_bias.to(x.dtype),
            down_bias=None if experts.down_bias is None else experts.down_bias.to(x.dtype),
            gate_up_a=gate_up_a,
            gate_up_b=gate_up_b,
            down_a=down_a,
            down_b=down_b,
            alpha=routing.alpha,
            limit=routing.limit,
        )

        # 3. add the expert that every token goes to
        if self.shared_expert is None:
            return out
        shared = self.shared_expert(x, now)
        if self.shared_expert_gate is not None:
            shared = self.shared_expert_gate(x, now.adapter).sigmoid() * shared
        return out + shared


def pooled_balance(routing: Sequence[RouteStatistics], top_k: int) -> Tensor:
    """Compute the load-balance loss over the tokens of all layers at once.

    The loss is E sum_e (how often a token chose e)(mean probability of e), a differentiable scalar. For an even load it
    is K (`top_k`). As in load_balancing_loss_func of transformers, overuse of an expert in one layer is cancelled by
    its underuse in another.
    routing: one entry per layer of a forward pass, at least one.
    """
    counts = torch.stack([layer.counts for layer in routing]).sum(0)  # (E,)
    probability = torch.stack([layer.probability for layer in routing]).mean(0)  # (E,)
    share = counts.to(probability.dtype) / counts.sum().clamp(min=1)
    return probability.numel() * top_k * (share * probability).sum()


def layer_balance(routing: Sequence[RouteStatistics]) -> Tensor:
    """Return the mean over layers of each layer's own balance loss, so that the load must be even in every layer."""
    return torch.stack([layer.balance for layer in routing]).mean()
