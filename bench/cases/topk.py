"""Cases of kernels/head/topk.py: the most likely tokens of a teacher, and the divergence from them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.head import topk
from .case import Case, Dims, Tensors, Work, check_most, randn
from .divergence import kl_div
from .logprob import (
    LOGPROB_SHAPES,
    head_inputs,
    head_logits,
    logprob_work,
    marked,
    output,
    with_adapter,
    without_budget,
)


def topk_divergence_eager(
    hidden: Tensor,
    weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    beta: float = 0.0,
    mask: Tensor | None = None,
    **head: Any,
) -> Tensor:
    """Compute the divergence from the full log_softmax. All tokens outside the teacher's list form one more bucket.

    Padding in the list gets probability 0.
    """
    log_s = head_logits(hidden, weight, **head).log_softmax(-1)
    padding = teacher_ids < 0
    rest = log_s.masked_fill(marked(teacher_ids, log_s.shape[1]), -1e30).logsumexp(-1, keepdim=True)
    log_s = log_s.gather(1, teacher_ids.clamp(min=0).long()).masked_fill(padding, -1e30)

    log_t = teacher_logprobs.to(log_s.dtype).masked_fill(padding, -1e30)
    tail = (1 - log_t.exp().sum(-1, keepdim=True)).clamp(min=2.0**-24).log()
    log_t = torch.cat((log_t, tail), -1).log_softmax(-1)
    return kl_div(log_t, torch.cat((log_s, rest), -1), beta, mask)


def _topk_logprobs_eager(hidden: Tensor, weight: Tensor, k: int, **head: Any) -> tuple[Tensor, Tensor]:
    logprobs, ids = head_logits(hidden, weight, **head).log_softmax(-1).topk(k, -1)
    return ids, logprobs


def _inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """Return inputs in which every second row lists only half of its K ids. The mask excludes every seventh row."""
    check_most(dims, "K", "V")
    T, V, K = dims["T"], dims["V"], dims["K"]
    logprobs, ids = torch.randn(T, V, device=device).log_softmax(-1).topk(K, -1)
    ids[::2, (K + 1) // 2 :] = -1
    return head_inputs(dims, dtype, device) | {
        "teacher_ids": ids.int(),
        "teacher_logprobs": logprobs,
        "bias": randn((V,), dtype, device),
        "temperature": torch.linspace(0.5, 2, T, device=device),
        "mask": torch.arange(T, device=device) % 7 != 3,
    }


def _work(dims: Dims, size: int) -> tuple[Work, Work]:
    forward, backward = logprob_work(dims, size)
    stored = 8 * dims["T"] * dims["K"]
    return Work(forward.flops, forward.bytes + stored), Work(backward.flops, backward.bytes + stored)


def _likeliest_work(dims: Dims, size: int) -> tuple[Work, Work]:
    return _work(dims | {"K": 2}, size)[0], Work(0, 0)


_CASE = Case(
    op="topk_divergence",
    family="beta 0.0",
    inputs=_inputs,
    fused=topk.topk_divergence,
    reference=without_budget(topk.topk_divergence_reference),
    eager=without_budget(topk_divergence_eager),
    work=_work,
    formula="2TCV operations; 4TCV",
    shapes=tuple(dims | {"K": 7} for dims in LOGPROB_SHAPES[1:]),
    empty=({"T": 0, "C": 8, "V": 16, "K": 3},),
    activations=("hidden",),
    fixed=("teacher_logprobs", "temperature"),
    reads_values=True,
    half_scales=(1e-3,),
)

CASES = (
    *(
        replace(
            _CASE, family=f"beta {beta}", options={"beta": beta, "softcap": 5.0, "memory_budget": 1 << 13}
        )
        for beta in (0.0, 0.3, 1.0)
    ),
    replace(
        _CASE,
        family="adapter",
        inputs=with_adapter(_inputs),
        options={"beta": 0.3, "scaling": 0.5, "memory_budget": 1 << 13},
        shapes=({"T": 11, "C": 33, "V": 101, "K": 7, "R": 5},),
        empty=(),
    ),
    replace(
        _CASE,
        family="likeliest",  # tied ids may come in any order, so only log-probabilities are compared
        op="topk_logprobs",
        inputs=head_inputs,
        fused=output(1, topk.topk_logprobs),
        reference=without_budget(output(1, topk.topk_logprobs_reference)),
        eager=without_budget(output(1, _topk_logprobs_eager)),
        options={"k": 2, "memory_budget": 1 << 13},
        fixed=("hidden", "weight"),
        reads_values=False,
        work=_likeliest_work,
        formula="2TCV operations; no backward",
        shapes=LOGPROB_SHAPES[1:],
        empty=({"T": 0, "C": 8, "V": 16},),
    ),
)
