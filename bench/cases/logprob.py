"""Cases of kernels/head/logprob.py (log-probabilities of tokens), and helpers for all ops on a language-model head."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.head import logprob
from .case import Case, Dims, Tensors, Work, check_most, randn


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return all logits (tokens, V) as trainers compute them.

    The products and the softcap are in the input's dtype, the division by the temperature is in fp32.
    """
    logits = F.linear(hidden, weight, bias)
    if lora_a is not None or lora_b is not None:
        assert lora_a is not None and lora_b is not None, "lora_a, lora_b: expected both or neither"
        logits = logits + scaling * F.linear(F.linear(hidden, lora_a), lora_b)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)

    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)


def marked(ids: Tensor, vocabulary: int) -> Tensor:
    """Return (tokens, V) bool: whether a row of `ids` (tokens, K) lists each id. Negative ids are padding."""
    marks = torch.zeros(ids.shape[0], vocabulary + 1, dtype=torch.bool, device=ids.device)
    return marks.scatter(1, torch.where(ids < 0, vocabulary, ids).long(), True)[:, :-1]


def _eager(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    support: Tensor | None = None,
    ignore_index: int = -100,
    **head: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each target's log-probability, the log-sum-exp and the entropy, with all logits in memory."""
    logits = head_logits(hidden, weight, **head)
    if support is not None:
        logits = logits.masked_fill(~marked(support, logits.shape[1]), -torch.inf)
    log_p = torch.log_softmax(logits, -1)

    trained = targets != ignore_index
    logprob = log_p.gather(1, targets.masked_fill(~trained, 0).long()[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)  # 0 log 0 = 0
    logprob, lse, entropy = (
        torch.where(trained, t, 0) for t in (logprob, torch.logsumexp(logits, -1), entropy)
    )
    return logprob, lse, entropy


def output(number: int, op: Callable[..., Any]) -> Callable[..., Tensor]:
    """Wrap an op that has several outputs, so that it returns only output `number`."""

    def one(*args: Any, **kwargs: Any) -> Tensor:
        return op(*args, **kwargs)[number]

    return one


def without_budget(op: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that makes all logits, so that it accepts memory_budget and ignores it."""

    def whole(*args: Any, memory_budget: int | None = None, **kwargs: Any) -> Any:
        return op(*args, **kwargs)

    return whole


def head_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """Return hidden states and a head whose logits have unit variance."""
    weight = randn((dims["V"], dims["C"]), dtype, device) * dims["C"] ** -0.5
    return {"hidden": randn((dims["T"], dims["C"]), dtype, device), "weight": weight}


def _inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """Return hidden states, a head of unit-variance logits, and random targets. Every seventh row is ignored."""
    T, C, V = dims["T"], dims["C"], dims["V"]
    weight = torch.randn(V, C, dtype=dtype, device=device) * C**-0.5
    targets = torch.randint(V, (T,), device=device)
    targets[3::7] = -100
    return {"hidden": randn((T, C), dtype, device), "weight": weight, "targets": targets}


def _features(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    temperature = torch.linspace(0.5, 2, dims["T"], device=device)
    return _inputs(dims, dtype, device) | {
        "bias": randn((dims["V"],), dtype, device),
        "temperature": temperature,
    }


def _support(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """Return inputs with a support of up to K ids for each row.

    The first id of a row is its target, or 0 if the row is ignored. Where that id occurs again, padding replaces it.
    """
    check_most(dims, "K", "V")
    tensors = _inputs(dims, dtype, device)
    T, V, K = dims["T"], dims["V"], dims["K"]
    ids = torch.rand(T, V, device=device).argsort(-1)[:, :K].int()
    target = tensors["targets"]
    assert target is not None
    ids = torch.where((ids == target[:, None]) & (torch.arange(K, device=device) > 0), -1, ids)
    ids[:, 0] = target.clamp(min=0)
    ids = torch.where((ids == ids[:, :1]) & (torch.arange(K, device=device) > 0), -1, ids)
    return tensors | {"support": ids}


def with_adapter(inputs: Callable[[Dims, torch.dtype, str], Tensors]) -> Callable[..., Tensors]:
    def adapted(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
        return inputs(dims, dtype, device) | {
            "lora_a": randn((dims["R"], dims["C"]), dtype, device) * dims["C"] ** -0.5,
            "lora_b": randn((dims["V"], dims["R"]), dtype, device),
        }

    return adapted


def logprob_work(dims: Dims, size: int) -> tuple[Work, Work]:
    T, C, V = dims["T"], dims["C"], dims["V"]
    operands = (T + V) * C * size
    return Work(2 * T * C * V, operands + 20 * T), Work(4 * T * C * V, 2 * operands + 20 * T)


LOGPROB_SHAPES = ({"T": 1, "C": 1, "V": 2}, {"T": 11, "C": 33, "V": 101}, {"T": 5, "C": 16, "V": 1031})
_BENCH = {
    "cuda": (
        {"T": 8192, "C": 4096, "V": 151936},
        {"T": 8192, "C": 2048, "V": 128256},
        {"T": 1024, "C": 4096, "V": 151936},
    ),
    "cpu": ({"T": 512, "C": 256, "V": 32768},),
}

_NO_TMA = {"T": 64, "C": 100, "V": 4096}  # the bytes of a row are no multiple of 16

_CASE = Case(
    op="token_logprobs",
    family="dense",
    inputs=_inputs,
    fused=logprob.token_logprobs,
    reference=logprob.token_logprobs_reference,
    eager=_eager,
    work=logprob_work,
    formula="2TCV operations; 4TCV",
    shapes=LOGPROB_SHAPES,
    empty=({"T": 0, "C": 8, "V": 16},),
    activations=("hidden",),
    fixed=("temperature",),
    check=lambda dims: dims | {"T": min(dims["T"], 2048)},  # the reference holds all logits
    half_scales=(1e-3,),
)

CASES = (
    replace(_CASE, bench=_BENCH, configurations=({"T": 64, "C": 128, "V": 4096}, _NO_TMA)),
    replace(
        _CASE,
        family="target only",
        fused=output(0, logprob.token_logprobs),
        reference=output(0, logprob.token_logprobs_reference),
        eager=output(0, _eager),
        bench={device: shapes[:1] for device, shapes in _BENCH.items()},
    ),
    replace(
        _CASE,
        family="chunks",
        reference=without_budget(logprob.token_logprobs_reference),
        eager=without_budget(_eager),
        options={"memory_budget": 1 << 12},
    ),
    replace(
        _CASE,
        family="bias, softcap, temperatures",
        inputs=_features,
        options={"softcap": 5.0},
        configurations=(_NO_TMA,),
    ),
    replace(
        _CASE,
        family="support",
        inputs=_support,
        reads_values=True,
        shapes=({"T": 11, "C": 33, "V": 101, "K": 7},),
        empty=(),
        configurations=({"T": 64, "C": 1024, "V": 4096, "K": 64},),
    ),
    replace(
        _CASE,
        family="adapter",
        inputs=with_adapter(_inputs),
        options={"scaling": 0.5},
        shapes=tuple(dims | {"R": 5} for dims in LOGPROB_SHAPES),
        empty=(),
        configurations=({"T": 64, "C": 128, "V": 4096, "R": 16},),
    ),
    replace(
        _CASE,
        family="adapter, support",
        inputs=with_adapter(_support),
        options={"scaling": 0.5},
        reads_values=True,
        shapes=({"T": 11, "C": 33, "V": 101, "K": 7, "R": 5},),
        empty=(),
    ),
)
