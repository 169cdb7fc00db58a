"""The shape of a decoder as plain fields. Every difference between architectures is a field.

files/config_json.py reads and writes the fields as a checkpoint's config.json.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from .rope import Rope


@dataclass(frozen=True)
class Experts:
    """The mixture of experts that replaces the feed-forward layer."""

    num_experts: int  # E
    top_k: int  # K
    intermediate_size: int  # F of each expert
    layers: tuple[bool, ...]  # for each layer, whether it has experts
    score: str = "softmax"  # or "sigmoid", where each expert has a bias that corrects the choice
    groups: int = 1
    top_groups: int = 1
    renormalize: bool = False
    scale: float = 1.0
    shared_size: int = 0  # F of the expert that every token goes to; 0 for no such expert
    shared_gate: bool = False  # whether a sigmoid of the token weighs this expert
    # gpt-oss: clamped SwiGLU, biases of router and experts, gate and up interleaved on disk
    clamped: bool = False
    alpha: float = 1.702
    limit: float = 7.0
    balance_coefficient: float = 0.0  # the coefficient of the load-balance loss in training


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: keys and values are linear in a narrow vector. DeepSeek-V2, arXiv 2405.04434."""

    kv_rank: int
    nope_dim: int  # the dimensions of a query and key that are not rotated
    rope_dim: int  # the dimensions that are rotated; all heads share those of the keys
    value_dim: int
    q_rank: int = 0  # 0: queries are linear in the input, without a narrow vector
    interleaved: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one decoder. Fields have config.json's names where the meaning is the same."""

    vocab_size: int  # V
    hidden_size: int  # C
    intermediate_size: int  # F
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int = 0  # G; 0 stands for H
    head_dim: int = 0  # D; 0 stands for C / H
    rms_norm_eps: float = 1e-6
    rope: Rope = field(default_factory=Rope)
    rope_layers: tuple[bool, ...] = ()  # for each layer, whether queries and keys are rotated; () for all
    windows: tuple[int | None, ...] = ()  # for each layer, its sliding window W or None; () for no windows
    qk_norm: bool = False  # RMSNorm over D of every query and key head, before the rotation
    qk_norm_whole: bool = False  # RMSNorm over all heads of the queries, and of the keys
    local_rope: Rope | None = None  # the rope of layers with a window, if it differs
    attention_scale: float | None = None  # None: 1 / sqrt(D)
    sinks: bool = False  # whether each head has a learned logit in the softmax's denominator
    latent: Latent | None = None
    experts: Experts | None = None
    gemma: bool = False  # norms scale by 1 + w and also follow each branch; embedding times sqrt(C); GeGLU
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048  # the length that the model was trained for; it is no limit here
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    model_type: str = "llama"  # the architecture under whose keys write_config writes the fields
    # the contents of generation_config.json, which are saved again with the model
    generation: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        # the values of fields that were left out
        layers = self.num_hidden_layers
        for name, value in (
            ("num_key_value_heads", self.num_attention_heads),
            ("head_dim", self.hidden_size // self.num_attention_heads),
            ("rope_layers", tuple(True for _ in range(layers))),
            ("windows", tuple(None for _ in range(layers))),
        ):
            if not getattr(self, name):
                object.__setattr__(self, name, value)

        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads: expected a multiple of num_key_value_heads={self.num_key_value_heads}, "
                f"got {self.num_attention_heads}"
            )
        if self.rotary_dim % 2 and any(self.rope_layers):
            raise ValueError(
                f"head_dim: expected an even number, since rope rotates pairs, got {self.head_dim}"
            )

        for name in ("rope_layers", "windows"):
            if len(getattr(self, name)) != layers:
                raise ValueError(
                    f"{name}: expected one for each of {layers} layers, got {len(getattr(self, name))}"
                )

    @property
    def rotary_dim(self) -> int:
        return self.latent.rope_dim if self.latent else self.head_dim

    @property
    def attention_width(self) -> int:
        """The width of the widest of queries, keys and values. Attention pads the others to this width."""
        return max(self.head_dim, self.latent.value_dim) if self.latent else self.head_dim


@dataclass(frozen=True)
class Dtypes:
    """The dtypes of a folder's tensors.

    usual: the dtype of most numbers. others: name on disk -> dtype, for each tensor with another dtype.
    """

    usual: torch.dtype
    others: dict[str, torch.dtype] = field(default_factory=dict)

    def of(self, name: str) -> torch.dtype:
        return self.others.get(name, self.usual)
