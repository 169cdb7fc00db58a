"""A linear layer that may hold its weight in 4 bits and may have an adapter.

    y = x W^T + bias                                       W (N, K), a parameter, or frozen in 4 bits
    y = x W^T + scaling dropout(x) A^T B^T + bias          with an adapter: A (R, K), B (N, R)
    y = m / |W + scaling B A| * (...) + bias               with DoRA: m (N,); the row norms have no gradient

Source: LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685; DoRA, https://arxiv.org/abs/2402.09353;
        rsLoRA, https://arxiv.org/abs/2312.03732; QLoRA, https://arxiv.org/abs/2305.14314
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import NF4Weight, dequantize_nf4, lora_linear, lora_linears, nf4_linear
from .adapters.lora import Lora


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor of a tensor that may be sharded over processes.

    For a sharded tensor every process has to call it, in the same order.
    """
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


class Adaptable(nn.Module):
    """The base class of a linear layer and of the linear layers of all experts. Both may have an adapter.

    If the weight is in 4 bits, `four_bit` holds it, and `weight` is None.
    """

    weight: nn.Parameter  # (N, K); (E, N, K) for experts
    four_bit: NF4Weight | None
    lora: Lora | None
    in_features: int
    out_features: int
    stack: tuple[int, ...] = ()  # (E,) for experts

    @property
    def numel(self) -> int:
        return math.prod(self.stack) * self.in_features * self.out_features

    def dense(self) -> Tensor:
        """Return the base weight, dequantised if it is in 4 bits."""
        return self.weight if self.four_bit is None else dequantize_nf4(self.four_bit)

    def merged(self) -> Tensor:
        """Return one weight that acts like base and adapter together, without dropout. It has the base's dtype."""
        lora, weight = self.lora, whole(self.dense())
        if lora is None or not lora.enabled:
            return weight

        merged = weight.float() + lora.scaling * (whole(lora.b) @ whole(lora.a))
        if lora.magnitude is not None:
            merged = merged * (whole(lora.magnitude) / merged.detach().norm(dim=1))[:, None]
        return merged.to(weight.dtype)

    def hold(self, four_bit: NF4Weight) -> None:
        """Use `four_bit` as the weight, frozen, in place of `weight`."""
        self.weight = None  # pyright: ignore[reportAttributeAccessIssue]
        self.four_bit = four_bit

    def _apply(self, fn: Any, recurse: bool = True) -> "Adaptable":
        """Apply model.to(...) to the 4-bit weight as well: to(device) moves it, and to(dtype) leaves it unchanged."""
        if self.four_bit is not None:
            self.four_bit = self.four_bit.to(fn(self.four_bit.packed).device)
        return super()._apply(fn, recurse)


class Linear(Adaptable, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A linear layer from (..., K) to (..., N)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        nn.Linear.__init__(self, in_features, out_features, bias)
        self.four_bit = None
        self.lora = None

    def forward(self, x: Tensor, adapter: Tensor | None = None) -> Tensor:
        """Apply the layer to x (..., K).

        adapter: (...) int, the index of each row's adapter in a stack of several, -1 for no adapter.
        """
        lora = self.lora
        if lora is None or not lora.enabled:
            if self.four_bit is None:
                return F.linear(x, self.weight, self.bias)
            return nf4_linear(x, self.four_bit, self.bias)

        dropout = self.dropout
        return lora_linear(
            x,
            self.weight if self.four_bit is None else self.four_bit,
            lora.a,
            lora.b,
            lora.scaling,
            bias=self.bias,
            magnitude=lora.magnitude,
            adapter=adapter,
            dropout=dropout,
            seed=_drawn_seed(x) if dropout else None,
        )

    @property
    def dropout(self) -> float:
        """The adapter's dropout probability. It is 0 outside training and where gradients are off."""
        return self.lora.dropout if self.lora and self.training and torch.is_grad_enabled() else 0.0

    def as_one_product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (input, weight), whose product is the layer's output without bias, including its adapter and dropout.

        x is (n, K). The input is (n, K + R) and the weight (N, K + R), for an op that takes a single matrix. Both are
        copies, and the copy of the weight needs a gradient.
        """
        lora, weight = self.lora, whole(self.dense())
        assert lora is not None
        narrow = F.dropout(x, self.dropout) @ whole(lora.a).to(x.dtype).T  # (n, R)
        wide = torch.cat([weight, (lora.scaling * whole(lora.b)).to(weight.dtype)], 1)  # (N, K + R)

        if lora.magnitude is not None:
            merged = wide[:, : x.shape[1]].float() + lora.scaling * (whole(lora.b) @ whole(lora.a))
            norm = merged.detach().norm(dim=1)  # (N,)
            wide = (wide.float() * (whole(lora.magnitude) / norm)[:, None]).to(weight.dtype)
        return torch.cat([x, narrow.to(x.dtype)], 1), wide

    @property
    def form(self) -> tuple[Any, ...] | None:
        """The properties that layers must share for one op to compute them together, or None without an adapter."""
        lora, four_bit = self.lora, self.four_bit
        if lora is None or not lora.enabled:
            return None
        kind = None if four_bit is None else (four_bit.blocksize, four_bit.offset is None)
        return kind, self.bias is None, lora.magnitude is None, self.dropout


def linears_of(layers: Sequence[Linear], x: Tensor, adapter: Tensor | None = None) -> list[Tensor]:
    """Return each layer's output for the same x (..., K).

    If all layers have adapters of the same `form`, one op computes all outputs and reads x once.
    """
    form, loras = layers[0].form, [layer.lora for layer in layers if layer.lora is not None]
    if form is None or any(layer.form != form for layer in layers):
        return [layer(x, adapter) for layer in layers]

    dropout = layers[0].dropout
    return lora_linears(
        x,
        [layer.weight if layer.four_bit is None else layer.four_bit for layer in layers],
        [lora.a for lora in loras],
        [lora.b for lora in loras],
        [lora.scaling for lora in loras],
        biases=_all_or_none(layer.bias for layer in layers),
        magnitudes=_all_or_none(lora.magnitude for lora in loras),
        adapter=adapter,
        dropout=dropout,
        seed=_drawn_seed(x) if dropout else None,
    )


def _all_or_none(tensors: Iterable[Tensor | None]) -> list[Tensor] | None:
    return [t for t in tensors if t is not None] or None


def _drawn_seed(x: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=x.device).random_()


class ExpertLinear(Adaptable):
    """The same linear layer of all experts in one tensor (E, N, K), as moe_mlp takes it."""

    def __init__(self, experts: int, in_features: int, out_features: int):
        super().__init__()
        self.stack, self.in_features, self.out_features = (experts,), in_features, out_features
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features))
        self.four_bit = None
        self.lora = None

    def operand(self, dtype: torch.dtype) -> Tensor | NF4Weight:
        return self.weight.to(dtype) if self.four_bit is None else self.four_bit

    def adapter(self) -> tuple[Tensor | None, Tensor | None]:
        """Return A and B, with the scaling multiplied into B, or (None, None) without an adapter."""
        lora = self.lora
        return (None, None) if lora is None or not lora.enabled else (lora.a, lora.scaling * lora.b)
