"""The experts of a layer for transformers' registry ALL_EXPERTS_FUNCTIONS, computed by moe_mlp."""

from typing import Any

import torch
from torch import Tensor

from ...kernels import moe_mlp
from ...kernels._chip import autocast_dtype
from ..errors import InputError
from .layers import is_silu


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the experts' weighted sum, (T, C). An index equal to the number of experts is skipped.

    hidden_states is (T, C), top_k_index and top_k_weights are (T, K).
    Raises InputError for experts with an activation other than SwiGLU, without a gate, or with a norm after them.
    """
    if not (self.has_gate and has_swiglu(self)) or self.has_post_expert_norm:
        raise InputError(
            f"{type(self).__name__}: expected experts with SwiGLU and no norm after them; pass experts=False"
        )

    # 1. transformers' weights in our layout: gate_up (E, 2F, C) with the gate's rows first, down (E, C, F)
    gate_up, down = self.gate_up_proj, self.down_proj
    if self.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if not self.is_concatenated:
        gate_up = gate_first(gate_up)
    dtype = autocast_dtype(gate_up)

    # 2. options of some experts: biases (E, 2F) and (E, C), and a clamped activation
    options: dict[str, Any] = {}
    if self.has_bias:
        bias = self.gate_up_proj_bias
        bias = bias if self.is_concatenated else gate_first(bias)
        options |= {"gate_up_bias": bias.to(dtype), "down_bias": self.down_proj_bias.to(dtype)}
    if _is_clamped(self):
        options |= {"activation": "clamped_swiglu", "alpha": self.alpha, "limit": self.limit}

    hidden, gate_up, down = (x.to(dtype) for x in (hidden_states, gate_up, down))
    out = moe_mlp(hidden, gate_up, down, top_k_weights, top_k_index, **options)
    return out.to(hidden_states.dtype)


def has_swiglu(experts: Any) -> bool:
    return _is_clamped(experts) or is_silu(experts.act_fn)


def _is_clamped(experts: Any) -> bool:
    """Return whether the experts compute gpt-oss' variant of SwiGLU, which has a slope and a bound."""
    return hasattr(experts, "alpha") and hasattr(experts, "limit")


def gate_first(x: Tensor) -> Tensor:
    """Return a copy of x (E, 2F, ...) with all gate rows before all up rows. In x, gate and up rows alternate."""
    return torch.cat([x[:, ::2], x[:, 1::2]], 1)
