"""Rotary positions: the angle by which each pair of dimensions of a query or key is rotated.

    angle of pair i at position p = p theta^(-2i / dim)          then, by type:
    linear     all angles are divided by factor
    llama3     only the angles of pairs that turn seldom within the trained length are divided
    yarn       likewise, and cos and sin are multiplied by a factor

Source: yarn, Peng et al. 2023, https://arxiv.org/abs/2309.00071, section 3; llama3, the blend of Llama 3.1's release
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """The parameters of rotary positions, named as in `rope_parameters`. A field that the type does not use is None."""

    rope_theta: float = 10_000.0
    rope_type: str = "default"  # default, linear, llama3 or yarn
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    @property
    def stretch(self) -> float:
        return self.factor or 1.0


def cos_and_sin(rope: Rope, dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin, (total, dim/2) fp32 each, of the angles at positions (total,)."""
    inv_freq, factor = rope_frequencies(rope, dim, positions.device)
    angle = positions[:, None].float() * inv_freq  # (total, dim/2)
    cos, sin = angle.cos(), angle.sin()
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


@lru_cache(maxsize=64)
def rope_frequencies(rope: Rope, dim: int, device: torch.device) -> tuple[Tensor, float]:
    """Return each pair's angle per position, (dim/2,) fp32, and the factor that multiplies cos and sin."""
    inv_freq = 1.0 / rope.rope_theta ** (torch.arange(0, dim, 2, device=device).float() / dim)  # (dim/2,)
    if rope.rope_type == "default":
        return inv_freq, 1.0
    if rope.rope_type == "linear":
        return inv_freq / rope.stretch, 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, inv_freq), 1.0
    return _yarn(rope, inv_freq), _factor_on_cos_and_sin(rope)


def _llama3(rope: Rope, inv_freq: Tensor) -> Tensor:
    trained = float(rope.original_max_position_embeddings or 0)
    low, high = rope.low_freq_factor or 1.0, rope.high_freq_factor or 4.0
    turns = trained * inv_freq / (2 * math.pi)  # the turns of a pair within the trained length
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: interpolated, 1: as trained
    return keep * inv_freq + (1 - keep) * inv_freq / rope.stretch


def _yarn(rope: Rope, inv_freq: Tensor) -> Tensor:
    trained, dim = float(rope.original_max_position_embeddings or 0), 2 * inv_freq.numel()

    def pair_with(turns: float) -> float:  # index of the pair that makes these turns in the trained length
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    # pairs before `first` stay as trained, and pairs after `last` are interpolated
    first, last = pair_with(rope.beta_fast or 32), pair_with(rope.beta_slow or 1)
    if rope.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    pairs = torch.arange(dim // 2, device=inv_freq.device).float()
    interpolate = ((pairs - first) / (last - first or 1e-3)).clamp(0, 1)
    return interpolate * inv_freq / rope.stretch + (1 - interpolate) * inv_freq


def _factor_on_cos_and_sin(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope, rope.mscale) / _mscale(rope, rope.mscale_all_dim)
    return _mscale(rope, 1.0)


def yarn_factor(rope: Rope) -> float:
    """Return the number whose square multiplies the attention scale in DeepSeek models with stretched positions."""
    if rope.rope_type == "default" or not rope.mscale_all_dim:
        return 1.0
    return _mscale(rope, rope.mscale_all_dim)


def _mscale(rope: Rope, weight: float) -> float:
    """Return yarn's attention factor for stretched positions, 0.1 weight ln(stretch) + 1.

    For weight 1 this is equation 22 of arXiv 2309.00071.
    """
    return 0.1 * weight * math.log(rope.stretch) + 1.0 if rope.stretch > 1 else 1.0
