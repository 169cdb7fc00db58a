"""moe_mlp in plain torch: the reference, which runs every expert on every token, and the CPU path.

The CPU path sorts the choices by expert, and computes the rows of one expert at a time. Weights in 4 bits are
dequantised one expert at a time, in the forward and again in the backward.
"""

from collections.abc import Iterator
from itertools import repeat
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .._chip import without_autocast
from ..nf4 import dense_of
from ..records import ExpertLinear, Experts, NF4Weight, Weight
from .nf4 import unnested

Activation = Literal["swiglu", "clamped_swiglu", "relu2"]
ACTIVATIONS: tuple[Activation, ...] = ("swiglu", "clamped_swiglu", "relu2")

# ---- reference


def moe_mlp_reference(
    x: Tensor,
    gate_up: Tensor | NF4Weight,
    down: Tensor | NF4Weight,
    weights: Tensor,
    indices: Tensor,
    *,
    activation: Activation = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_up_a: Tensor | None = None,
    gate_up_b: Tensor | None = None,
    down_a: Tensor | None = None,
    down_b: Tensor | None = None,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Tensor:
    W_gu, W_d = (dense_of(Weight.of(weight), x.dtype) for weight in (gate_up, down))
    W_gu = W_gu if gate_up_a is None or gate_up_b is None else W_gu + gate_up_b @ gate_up_a
    W_d = W_d if down_a is None or down_b is None else W_d + down_b @ down_a

    out = torch.zeros_like(x)
    for e in range(W_gu.shape[0]):
        h = F.linear(x, W_gu[e], None if gate_up_bias is None else gate_up_bias[e])
        a = _activate(h, activation, alpha, limit)
        y = F.linear(a, W_d[e], None if down_bias is None else down_bias[e])
        weight = (weights * (indices == e)).sum(1, keepdim=True)  # (T, 1), 0 for a token of other experts
        out = out + weight.to(x.dtype) * y
    return out


def _activate(h: Tensor, activation: str, alpha: float, limit: float) -> Tensor:
    """Apply the activation to h, (rows, 2F), or (rows, F) for relu2. Returns (rows, F)."""
    if activation == "relu2":
        return h.relu().square()

    gate, up = h.chunk(2, -1)
    if activation == "swiglu":
        return F.silu(gate) * up
    gate = torch.where(gate > limit, limit, gate)  # clamp would give NaN a gradient of 0
    up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
    return (up + 1) * (gate * (alpha * gate).sigmoid())


# ---- CPU path


@without_autocast  # computes in x's dtype, as the kernels do
def moe_mlp_cpu(x: Tensor, experts: Experts, weights: Tensor, indices: Tensor) -> Tensor:
    """Compute the experts one at a time, and skip each expert that has no rows. Returns (tokens, hidden)."""
    (T, C), E, K = x.shape, experts.gate_up.sizes[0], indices.shape[1]
    activation = experts[2:]

    # the choices sorted by expert, without ids that are no expert
    ids = indices.flatten()
    ids = torch.where((ids < 0) | (ids >= E), E, ids)
    order = ids.argsort(stable=True)
    counts = ids.bincount(minlength=E + 1)[:E].tolist()
    order = order[: sum(counts)]

    of_experts = zip(
        x[order // K].split(counts), _by_expert(experts.gate_up), _by_expert(experts.down), strict=True
    )
    parts = [
        _linear(_activate(_linear(rows, *gate_up), *activation), *down)
        for e, (rows, gate_up, down) in enumerate(of_experts)
        if rows.shape[0] or e == 0  # at least one, so that weights without tokens get gradients of zeros
    ]
    y = torch.cat(parts)
    y = y.new_zeros(T * K, C).index_copy(0, order, y).view(T, K, C)
    return (y.to(weights.dtype) * weights[..., None]).sum(1).to(x.dtype)


def _by_expert(layer: ExpertLinear) -> Iterator[tuple[Any, ...]]:
    """Yield the weight, bias, A and B of each expert, without the dimension E. A missing part is None."""
    weight, *others = layer
    # unbind, because the backward of indexing [e] would fill a gradient of all experts each time
    weights = _by_expert_4bit(weight) if weight.blocksize else weight.data.unbind()
    return zip(weights, *(repeat(None) if t is None else t.unbind() for t in others), strict=False)


def _by_expert_4bit(weight: Weight) -> list[Weight]:
    assert weight.absmax is not None
    E, *shape = weight.shape
    absmax = unnested(weight)
    return [
        Weight(packed, absmax, weight.code, shape=shape, blocksize=weight.blocksize)
        for packed, absmax in zip(weight.data.view(E, -1), absmax.view(E, -1), strict=True)
    ]


class _FourBitLinear(torch.autograd.Function):
    """A linear product that saves its weight in 4 bits for the backward. Only x gets a gradient."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Weight], output: Tensor) -> None:
        ctx.weight = inputs[1]

    @staticmethod
    def forward(x: Tensor, weight: Weight) -> Tensor:
        return F.linear(x, dense_of(weight, x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ dense_of(ctx.weight, dy.dtype), None


def _linear(
    x: Tensor, weight: Tensor | Weight, bias: Tensor | None, a: Tensor | None, b: Tensor | None
) -> Tensor:
    if isinstance(weight, Tensor):
        y = F.linear(x, weight, bias)
    else:
        y = _FourBitLinear.apply(x, weight)
        y = y if bias is None else y + bias
    return y if a is None or b is None else y + F.linear(F.linear(x, a), b)
