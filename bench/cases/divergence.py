"""Cases of kernels/head/divergence.py: divergences between two heads over the whole vocabulary."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.head.divergence import token_divergence
from ...kernels.plain.divergence import token_divergence_reference
from .case import Case, Dims, Tensors, Work, randn, taken
from .logprob import head_inputs, head_logits, with_adapter, without_budget


def token_divergence_eager(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    beta: float = 0.0,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    **heads: Any,
) -> Tensor:
    """Compute the divergence from all logits of both heads, by F.kl_div on log_softmax, as GKD trainers do."""
    teacher = taken(heads, "teacher_")
    log_s = head_logits(hidden, weight, temperature, **heads).log_softmax(-1)
    with torch.no_grad():
        log_t = head_logits(teacher_hidden, teacher_weight, temperature, **teacher).log_softmax(-1)
    return kl_div(log_t, log_s, beta, mask)


def kl_div(log_t: Tensor, log_s: Tensor, beta: float, mask: Tensor | None) -> Tensor:
    def kl(log_q: Tensor, log_p: Tensor) -> Tensor:
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

    if 0 < beta < 1:
        weights = torch.tensor([beta, 1 - beta], dtype=log_s.dtype, device=log_s.device).log()
        log_m = torch.logsumexp(torch.stack((log_t + weights[0], log_s + weights[1])), 0)
        divergence = beta * kl(log_m, log_t) + (1 - beta) * kl(log_m, log_s)
    else:
        divergence = kl(log_t, log_s) if beta else kl(log_s, log_t)
    return divergence if mask is None else torch.where(mask, divergence, 0)


def _inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """Return the inputs of student and teacher. The teacher's head has the width dims["teacher"]."""
    teacher = head_inputs(dims | {"C": dims["teacher"]}, dtype, device)
    return head_inputs(dims, dtype, device) | {f"teacher_{n}": t for n, t in teacher.items()}


def _features(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    T, V = dims["T"], dims["V"]
    return _inputs(dims, dtype, device) | {
        "bias": randn((V,), dtype, device),
        "teacher_bias": randn((V,), dtype, device),
        "temperature": torch.linspace(0.5, 2, T, device=device),
        "mask": torch.arange(T, device=device) % 7 != 3,
    }


def _adapters(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """Return inputs in which both heads have an adapter. The teacher's adapter has the rank R + 2."""
    teacher = with_adapter(head_inputs)(dims | {"C": dims["teacher"], "R": dims["R"] + 2}, dtype, device)
    return with_adapter(head_inputs)(dims, dtype, device) | {f"teacher_{n}": t for n, t in teacher.items()}


def _work(dims: Dims, size: int) -> tuple[Work, Work]:
    T, C, D, V = dims["T"], dims["C"], dims["teacher"], dims["V"]
    operands = (T + V) * C * size
    return (
        Work(2 * T * (C + D) * V, operands + (T + V) * D * size + 4 * T),
        Work(4 * T * C * V, 2 * operands + 4 * T),
    )


_SHAPES = (
    {"T": 1, "C": 1, "teacher": 2, "V": 2},
    {"T": 11, "C": 33, "teacher": 17, "V": 101},
    {"T": 5, "C": 16, "teacher": 24, "V": 1031},
)
_BENCH = {
    "cuda": (
        {"T": 8192, "C": 2048, "teacher": 4096, "V": 151936},
        {"T": 1024, "C": 2048, "teacher": 4096, "V": 151936},
    ),
    "cpu": ({"T": 256, "C": 128, "teacher": 256, "V": 32768},),
}
_TILES = (
    {"T": 64, "C": 128, "teacher": 256, "V": 4096},
    {"T": 64, "C": 128, "teacher": 100, "V": 4096},  # the bytes of a teacher's row are no multiple of 16
)

_CASE = Case(
    op="token_divergence",
    family="forward KL",
    inputs=_inputs,
    fused=token_divergence,
    reference=without_budget(token_divergence_reference),
    eager=without_budget(token_divergence_eager),
    work=_work,
    formula="2T(C+D)V operations, D the teacher's width; 4TCV",
    shapes=_SHAPES,
    empty=({"T": 0, "C": 8, "teacher": 4, "V": 16},),
    activations=("hidden", "teacher_hidden"),
    fixed=(
        *("teacher_hidden", "teacher_weight", "teacher_bias"),
        *("teacher_lora_a", "teacher_lora_b", "temperature"),
    ),
    check=lambda dims: dims | {"T": min(dims["T"], 1024)},  # the reference holds all logits
    half_scales=(1e-3,),
)

CASES = (
    replace(_CASE, bench=_BENCH, configurations=_TILES),
    replace(_CASE, family="reverse KL", options={"beta": 1.0}, configurations=_TILES),
    replace(
        _CASE,
        family="JSD",
        options={"beta": 0.3},
        bench={device: shapes[:1] for device, shapes in _BENCH.items()},
        configurations=_TILES,
    ),
    replace(_CASE, family="chunks", options={"beta": 0.3, "memory_budget": 1 << 15}),
    *(
        replace(
            _CASE,
            family=f"features, beta {beta}",
            inputs=_features,
            options={"beta": beta, "softcap": 5.0, "teacher_softcap": 4.0, "memory_budget": 1 << 15},
            configurations=_TILES if beta == 0.3 else (),
        )
        for beta in (0.0, 0.3, 1.0)
    ),
    replace(
        _CASE,
        family="adapters",
        inputs=_adapters,
        options={"scaling": 0.5, "teacher_scaling": 2.0, "memory_budget": 1 << 12},
        shapes=tuple(dims | {"R": 5} for dims in _SHAPES[1:2]),  # not T=1: eager may be exact there
        empty=(),
    ),
)
