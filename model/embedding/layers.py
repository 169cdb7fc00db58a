"""The forwards that replace those of a transformers model's layers: attention with apply_rope, norms, feed-forward."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...kernels import apply_rope, rms_norm, swiglu

# ---- attention


def make_attention_forward(home: Any, halves: bool) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return a forward with apply_rope for the attention layers of transformers' module `home`.

    halves: True if cos and sin are (B, T, D) and their two halves are equal. In gpt-oss they are (B, T, D/2).
    """
    interfaces, eager = home.ALL_ATTENTION_FUNCTIONS, home.eager_attention_forward

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        # 1. queries, keys and values, rotated
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(heads)  # (B, T, H, D)
        k = self.k_proj(hidden_states).view(heads)  # (B, T, G, D)
        v = self.v_proj(hidden_states).view(heads)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if getattr(self, "use_rope", True):
            q, k = rotate(q, k, *position_embeddings, halves)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)

        # 2. the window: llama has none, mistral and mixtral have it in the config, the others in the layer
        if hasattr(self, "sliding_window"):
            kwargs["sliding_window"] = self.sliding_window
        elif self.config.model_type in ("mistral", "mixtral"):
            kwargs["sliding_window"] = self.config.sliding_window
        if hasattr(self, "sinks"):
            kwargs["s_aux"] = self.sinks

        # 3. the attention that the config names, which need not be ours
        attend = interfaces.get_interface(self.config._attn_implementation, eager)
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        out = out.reshape(*hidden_states.shape[:-1], -1).contiguous()  # (B, T, H D)
        return self.o_proj(out), weights

    return forward


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> tuple[Tensor, Tensor]:
    """Apply rotary positions to queries q (B, T, H, D) and keys k (B, T, G, D).

    cos, sin: (B or 1, T, D or D/2), with a row for each token.
    halves: True if cos and sin have the width D, and their two halves are equal.
    """
    if halves:
        half = cos.shape[-1] // 2
        cos, sin = cos[..., :half], sin[..., :half]
    if cos.shape[0] == 1:
        return apply_rope(q, k, cos[0], sin[0])

    B = q.shape[0]
    q, k = apply_rope(q.flatten(0, 1), k.flatten(0, 1), cos.flatten(0, 1), sin.flatten(0, 1))  # (B T, H, D)
    return q.unflatten(0, (B, -1)), k.unflatten(0, (B, -1))  # (B, T, H, D)


# ---- norm, feed-forward


def norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def mlp_forward(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def is_silu(module: nn.Module) -> bool:
    return type(module).__name__ in ("SiLU", "SiLUActivation")
