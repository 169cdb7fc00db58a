"""Gated linear units: the activation between the two products of a feed-forward layer.

    out = (u + offset) * g * sigmoid(s(g))        s(g) = scale * (g + cubic * g^3)

    swiglu           scale 1                cubic 0           offset 0     silu(g) * u
    geglu            scale 2 sqrt(2/pi)     cubic 0.044715    offset 0     gelu(g) * u, in the tanh approximation
    clamped_swiglu   scale alpha = 1.702    cubic 0           offset 1     of min(g, limit) and clamp(u, -limit, limit)

    dg = dout * (u + offset) * p * (1 + g * (1 - p) * s'(g))        with p = sigmoid(s(g))
    du = dout * g * p        both zero where the clamp holds

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202, equation 6; the clamped form is gpt-oss's
(https://arxiv.org/abs/2508.10925, section 2.2)
"""

import torch.nn.functional as F
from torch import Tensor

# ---- reference


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def geglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def clamped_swiglu_reference(gate: Tensor, up: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * (alpha * gate).sigmoid()


# ---- public op


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. gate, up: (..., F), last dimension contiguous, e.g. the halves of (..., 2F)."""
    return swiglu_reference(gate, up)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up with gelu's tanh approximation. gate, up: (..., F) as for swiglu."""
    return geglu_reference(gate, up)


def clamped_swiglu(gate: Tensor, up: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """(up + 1) * gate * sigmoid(alpha * gate) of clamped inputs. gate, up: (..., F) as for swiglu."""
    return clamped_swiglu_reference(gate, up, alpha, limit)
