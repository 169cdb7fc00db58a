"""Cases of kernels/moe.py: mixtures of experts, also with adapters and with experts in 4 bits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import NF4Weight, moe_mlp, nf4
from ...kernels._chip import autocast_dtype
from ...kernels.plain.moe import moe_mlp_reference
from .case import Case, Dims, Tensors, Work, check_most, randn, taken, tensor
from .glu import clamped_swiglu_eager, swiglu_eager
from .nf4 import FOUR_BIT


def _activate(h: Tensor, activation: str) -> Tensor:
    if activation == "relu2":
        return h.relu().square()
    gate, up = h.chunk(2, -1)
    return {"swiglu": swiglu_eager, "clamped_swiglu": clamped_swiglu_eager}[activation](gate, up)


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    rows: Tensor | slice = slice(None),
) -> Tensor:
    """Return the output of one layer of one expert on the given rows of x, with bias and adapter if there are any."""
    y = F.linear(x[rows], weight, bias)
    if a is None and b is None:
        return y
    assert a is not None and b is not None, "a, b: expected both or neither"
    return y + F.linear(F.linear(x[rows], a), b)


def _eager(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    indices: Tensor,
    *,
    activation: str = "swiglu",
    **beside: Any,
) -> Tensor:
    """Compute the mixture with a loop over the experts, as model code does.

    beside: bias, a and b of each layer, under names such as gate_up_bias.
    """
    first, second = taken(beside, "gate_up_"), taken(beside, "down_")
    if beside:
        raise TypeError(f"moe_mlp: expected parts of gate_up and of down, got {', '.join(beside)}")

    out = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        token, choice = torch.where(indices == e)
        h = _linear(x, gate_up[e], **{part: t[e] for part, t in first.items()}, rows=token)
        y = _linear(_activate(h, activation), down[e], **{part: t[e] for part, t in second.items()})
        out = out.index_add(0, token, (y * weights[token, choice, None].to(y.dtype)).to(out.dtype))
    return out


def _moe_4bit_eager(x: Tensor, *, gate_up: NF4Weight, down: NF4Weight, **others: Any) -> Tensor:
    dense = (nf4.dequantize_nf4_reference(weight, autocast_dtype(x)) for weight in (gate_up, down))
    return _eager(x, *dense, **others)


def with_4bit_experts(op: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an op on 4-bit experts, so that it takes the tensors that each 4-bit weight consists of."""

    def mlp(x: Tensor, **tensors: Any) -> Tensor:
        E, C, F_ = tensors["gate_up_a"].shape[0], x.shape[1], tensors["down_a"].shape[2]
        experts = {}
        for name, shape in (("gate_up", (E, 2 * F_, C)), ("down", (E, C, F_))):
            parts = {part: tensors.pop(f"{name}_{part}") for part in FOUR_BIT}
            experts[name] = NF4Weight(shape=shape, dtype=x.dtype, **parts)
        return op(x, **experts, **tensors)

    return mlp


def _inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """Return inputs whose last expert gets no tokens, unless K = E."""
    check_most(dims, "K", "E")
    T, C, F_, E, K = (dims[letter] for letter in "TCFEK")
    logits = torch.randn(T, E, dtype=torch.promote_types(dtype, torch.float32), device=device)
    logits[:, -1] -= 100.0 * (E > K)
    weights, indices = logits.softmax(-1).topk(K, -1)
    return {
        "x": randn((T, C), dtype, device),
        "gate_up": randn((E, 2 * F_, C), dtype, device) / C**0.5,
        "down": randn((E, C, F_), dtype, device) / F_**0.5,
        "weights": weights,
        "indices": indices,
    }


def _features(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    E, C, F_ = dims["E"], dims["C"], dims["F"]
    biases = {
        "gate_up_bias": randn((E, 2 * F_), dtype, device),
        "down_bias": randn((E, C), dtype, device),
    }
    return _inputs(dims, dtype, device) | biases


def _relu2(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    tensors = _inputs(dims, dtype, device)
    gate_up = tensor(tensors, "gate_up")
    return tensors | {"gate_up": gate_up[:, : dims["F"]].contiguous()}


def _adapters(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    C, F_, E, R = (dims[letter] for letter in "CFER")
    return _inputs(dims, dtype, device) | {
        "gate_up_a": randn((E, R, C), dtype, device) * C**-0.5,
        "gate_up_b": randn((E, 2 * F_, R), dtype, device) * R**-0.5,
        "down_a": randn((E, R, F_), dtype, device) * F_**-0.5,
        "down_b": randn((E, C, R), dtype, device) * R**-0.5,
    }


def _4bit_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """Return inputs with adapters and 4-bit experts, whose tensors have names such as gate_up_packed.

    C * F must be a multiple of 64, the size of a quantisation block.
    """
    tensors = _adapters(dims, dtype, device)
    for name in ("gate_up", "down"):
        weight = nf4.quantize_nf4_reference(tensor(tensors, name))
        del tensors[name]
        parts = zip(FOUR_BIT, weight.tensors(), strict=True)
        tensors |= {f"{name}_{part}": t for part, t in parts}
    return tensors


def _work(dims: Dims, size: int) -> tuple[Work, Work]:
    T, C, F_, E, K = (dims[letter] for letter in "TCFEK")
    experts, choices = 3 * E * F_ * C * size, 12 * T * K  # choices: fp32 weights, int64 indices
    return (
        Work(6 * T * K * C * F_, experts + 2 * T * C * size + choices),
        Work(12 * T * K * C * F_, 2 * experts + 3 * T * C * size + choices),
    )


def _adapter_work(dims: Dims, size: int) -> tuple[Work, Work]:
    """Return the work of a mixture with adapters and frozen experts. Frozen experts need no weight gradient.

    Bytes of 4-bit experts are counted as if the experts were dense.
    """
    T, C, F_, E, K, R = (dims[letter] for letter in "TCFEKR")
    forward, _ = _work(dims, size)
    low, adapters = 2 * T * K * R * (2 * C + 3 * F_), E * R * (2 * C + 3 * F_) * size
    return (
        Work(forward.flops + low, forward.bytes + adapters),
        Work(forward.flops + 2 * low, forward.bytes + T * C * size + 2 * adapters),
    )


_CASE = Case(
    op="moe_mlp",
    family="swiglu",
    inputs=_inputs,
    fused=moe_mlp,
    reference=moe_mlp_reference,
    eager=_eager,
    work=_work,
    formula="6TKCF operations; 12TKCF",
    shapes=({"T": 1, "C": 1, "F": 1, "E": 1, "K": 1}, {"T": 19, "C": 20, "F": 35, "E": 3, "K": 2}),
    empty=({"T": 0, "C": 8, "F": 8, "E": 3, "K": 2},),
    activations=("x",),
    half_scales=(1e-3,),
    reads_values=True,
    # the reference runs every expert on every token
    check=lambda dims: dims | {"T": min(dims["T"], 1024)},
)

CASES = (
    replace(
        _CASE,
        bench={
            "cuda": tuple({"T": t, "C": 2048, "F": 768, "E": 128, "K": 8} for t in (32768, 4096)),
            "cpu": ({"T": 512, "C": 128, "F": 256, "E": 8, "K": 2},),
        },
        configurations=(
            {"T": 256, "C": 128, "F": 128, "E": 2, "K": 2},
            {"T": 64, "C": 128, "F": 128, "E": 8, "K": 1},
        ),
    ),
    replace(
        _CASE,
        family="clamped, biases",
        inputs=_features,
        options={"activation": "clamped_swiglu"},
        configurations=({"T": 256, "C": 128, "F": 128, "E": 2, "K": 2},),
    ),
    replace(_CASE, family="relu2", inputs=_relu2, options={"activation": "relu2"}),
    replace(
        _CASE,
        family="adapters",
        inputs=_adapters,
        work=_adapter_work,
        formula="6TKCF + 2TKR(2C + 3F) operations; 6TKCF + 4TKR(2C + 3F)",
        shapes=({"T": 19, "C": 20, "F": 35, "E": 3, "K": 2, "R": 3},),
        empty=({"T": 0, "C": 8, "F": 8, "E": 3, "K": 2, "R": 3},),
        fixed=("gate_up", "down"),
        configurations=({"T": 256, "C": 128, "F": 128, "E": 2, "K": 2, "R": 16},),
    ),
    replace(
        _CASE,
        family="4-bit experts, adapters",
        inputs=_4bit_inputs,
        fused=with_4bit_experts(moe_mlp),
        reference=with_4bit_experts(moe_mlp_reference),
        eager=with_4bit_experts(_moe_4bit_eager),
        work=_adapter_work,
        formula="6TKCF + 2TKR(2C + 3F) operations; 6TKCF + 4TKR(2C + 3F)",
        shapes=({"T": 19, "C": 20, "F": 48, "E": 3, "K": 2, "R": 17},),
        empty=(),
        fixed=tuple(f"{name}_{part}" for name in ("gate_up", "down") for part in FOUR_BIT),
    ),
)
