"""A layer's experts, as transformers' registry ALL_EXPERTS_FUNCTIONS calls them: moe_mlp."""

from typing import Any

import torch
from torch import Tensor

from ...kernels import moe_mlp
from ...kernels._chip import autocast_dtype
from ..errors import InputError
from .layers import is_silu


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states (T, C), top_k_index and top_k_weights (T, K) to (T, C); index E is no expert and is passed over.

    Raises InputError for experts that are more or other than SwiGLU.
    """
    if not (self.has_gate and has_swiglu(self)) or self.has_post_expert_norm:
        raise InputError(
            f"{type(self).__name__}: expected experts with SwiGLU and no norm after them; pass experts=False"
        )

    # 1. transformers' weights in our layout: gate_up (E, 2F, C) with all of the gate first, down (E, C, F)
    gate_up, down = self.gate_up_proj, self.down_proj
    if self.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if not self.is_concatenated:
        gate_up = gate_first(gate_up)
    dtype = autocast_dtype(gate_up)

    # 2. what some experts have: biases (E, 2F) and (E, C), a bound
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
    """Tell gpt-oss' SwiGLU, which has a slope and a bound, from the plain one."""
    return hasattr(experts, "alpha") and hasattr(experts, "limit")


def gate_first(x: Tensor) -> Tensor:
    """(E, 2F, ...), gate and up in turn, to the same with all of the gate first. A copy."""
    return torch.cat([x[:, ::2], x[:, 1::2]], 1)
