"""Cases of kernels/sample.py: drawing a token from logits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.plain.sample import sample_tokens_reference
from ...kernels.records import TOP_P_WIDTH
from ...kernels.sample import sample_tokens
from .case import Case, Dims, Tensors, Work, randn


def logprob_alone(op: Callable[..., Any]) -> Callable[..., Tensor]:
    """Wrap a sampler so that it returns only the log-probability, because outputs of a Case are floats.

    The noise may have any dtype, and is converted to fp64.
    """

    def logprob(logits: Tensor, noise: Tensor, **how: Any) -> Tensor:
        return op(logits, noise.double(), **how)[1]

    return logprob


def _eager(
    logits: Tensor,
    noise: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return sampled ids and their log-probabilities, by the cumulative sum of the softmax over the vocabulary.

    The vocabulary is sorted first if top_k, top_p or min_p truncates it.
    """
    u = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    ids = None
    if top_k is not None:
        u, ids = u.topk(min(top_k, u.shape[1]))
    elif top_p is not None or min_p is not None:
        u, ids = u.sort(-1, descending=True)

    p = u.softmax(-1)
    kept = torch.ones_like(p, dtype=torch.bool)
    if top_p is not None:
        kept &= p.cumsum(-1) - p < top_p
    if min_p is not None:
        kept &= p >= min_p * p[:, :1]
    if ids is not None and top_k is None:
        kept[:, TOP_P_WIDTH:] = False
    p = p * kept

    reached = p.cumsum(-1, dtype=torch.float64)
    chosen = torch.searchsorted(reached, noise[:, None] * reached[:, -1:], right=True)
    chosen = chosen.clamp(max=p.shape[1] - 1)
    logprob = (p.gather(1, chosen) / reached[:, -1:]).log().to(u.dtype).squeeze(1)
    return (chosen if ids is None else ids.gather(1, chosen)).squeeze(1), logprob


def _inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    B = dims["B"]
    return {
        "logits": 2 * randn((B, dims["V"]), dtype, device),
        "noise": torch.randint(256, (B,), device=device).double() / 256,  # exact in every dtype
    }


def _work(dims: Dims, size: int) -> tuple[Work, Work]:
    B, V = dims["B"], dims["V"]
    return Work(4 * B * V, B * (V * size + 12)), Work(0, 0)


_CASE = Case(
    op="sample_tokens",
    family="all ids",
    inputs=_inputs,
    fused=logprob_alone(sample_tokens),
    reference=logprob_alone(sample_tokens_reference),
    eager=logprob_alone(_eager),
    work=_work,
    formula="reads the logits: BV; no backward",
    shapes=({"B": 1, "V": 1}, {"B": 2, "V": 67}, {"B": 1, "V": 4099}),
    activations=("logits",),
    empty=({"B": 0, "V": 5},),
    bench={"cuda": ({"B": 64, "V": 151936}, {"B": 8, "V": 262144}), "cpu": ({"B": 8, "V": 32768},)},
    configurations=({"B": 2, "V": 151936},),
    fixed=("logits", "noise"),
)

CASES = (
    _CASE,
    replace(
        _CASE,
        family="top_p",
        options={"top_p": 0.9},
        shapes=_CASE.shapes[:2],
        bench=_CASE.bench | {"cuda": _CASE.bench["cuda"][::-1]},
    ),
    replace(
        _CASE,
        family="top_k",
        options={"temperature": 0.7, "top_k": 20, "top_p": 0.99, "min_p": 0.05},
        shapes=({"B": 1, "V": 67},),
        bench=_CASE.bench | {"cuda": _CASE.bench["cuda"][:1]},
    ),
)
