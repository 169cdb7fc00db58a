"""The arguments of public ops on a linear head: their checks, their logits, and the Head made from them.

    z = hidden (W + scaling B A)^T + bias        s = softcap tanh(z / softcap)        u = s / temperature

W + scaling B A is never multiplied out. blocks.py cuts the Head into blocks of u.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._chip import (
    autocast_dtype,
    check_device,
    check_dtype,
    check_number,
    check_shape,
    readable,
    use_triton,
    whole_number,
)
from ..records import Head

CPU_BUDGET = 2**23  # bytes; larger blocks do not stay in the caches and are slower
GPU_BUDGET = 2**28  # bytes; 16k columns of bf16 gradients at 8k tokens. On an H100, wider blocks gain nothing


class HeadInputs(NamedTuple):
    """The arguments by which a public op takes a linear head. `head_of` makes a Head of them, to be cut into blocks."""

    hidden: Tensor  # (tokens, C)
    weight: Tensor  # (V, C)
    bias: Tensor | None  # (V,)
    lora_a: Tensor | None  # (R, C)
    lora_b: Tensor | None  # (V, R)
    scaling: float
    softcap: float | None


# ---- reference


def scaled(z: Tensor, bias: Tensor | None, temperature: float | Tensor, softcap: float | None) -> Tensor:
    """Compute logits u from z = hidden W^T, (tokens, N): add the bias, apply the softcap, divide by the temperature."""
    if bias is not None:
        z = z + bias.to(z.dtype)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)


def scaled_logits(inputs: HeadInputs, temperature: float | Tensor) -> Tensor:
    """Compute all logits u (tokens, V), in fp32, or in fp64 for fp64 inputs, as in gradient checks.

    The caller must turn autocast off. It is not turned off here, because each switch takes microseconds.
    """
    hidden, lora_a, lora_b = inputs.hidden, inputs.lora_a, inputs.lora_b
    wide = torch.promote_types(hidden.dtype, torch.float32)
    z = hidden.to(wide) @ inputs.weight.to(wide).T
    if lora_a is not None and lora_b is not None:
        z = z + inputs.scaling * (hidden.to(wide) @ lora_a.to(wide).T) @ lora_b.to(wide).T
    return scaled(z, inputs.bias, temperature, inputs.softcap)


# ---- distributions


def divergence_of(log_t: Tensor, log_s: Tensor, beta: float) -> Tensor:
    """Return (rows,): KL(t || s) at beta = 0, KL(s || t) at 1, and beta KL(t || m) + (1 - beta) KL(s || m) in between.

    m is beta t + (1 - beta) s. log_t and log_s are finite log-probabilities (rows, n). An entry that a row does not
    have is -1e30 in both.
    """
    if beta == 0:
        return (log_t.exp() * (log_t - log_s)).sum(-1)
    if beta == 1:
        return (log_s.exp() * (log_s - log_t)).sum(-1)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log(1 - beta))
    kl_teacher, kl_student = ((log_p.exp() * (log_p - log_m)).sum(-1) for log_p in (log_t, log_s))
    return beta * kl_teacher + (1 - beta) * kl_student


# ---- checks


def check_heads(student: HeadInputs, teacher: HeadInputs | None = None) -> None:
    """Raise ValueError for a head or an adapter whose shape, dtype, device or numbers do not fit the hidden states."""
    _check_head(student, "")
    if teacher is not None:
        _check_head(teacher, "teacher_")
    _check_adapter(student, "")
    if teacher is not None:
        _check_adapter(teacher, "teacher_")


def _check_head(head: HeadInputs, prefix: str) -> None:
    """Check a head without its adapter. `prefix` is put before the argument names in messages."""
    hidden, weight, bias, softcap = head.hidden, head.weight, head.bias, head.softcap
    if hidden.ndim != 2 or hidden.shape[1] == 0:
        raise ValueError(f"{prefix}hidden: expected shape (tokens, hidden), got {tuple(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{prefix}weight: expected shape (vocabulary, hidden={hidden.shape[1]}), got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_shape(f"{prefix}bias", bias, vocabulary=weight.shape[0])
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{prefix}softcap: expected a finite number above 0, got {softcap}")
    _check_operands(hidden, prefix, hidden=hidden, weight=weight, bias=bias)


def _check_adapter(head: HeadInputs, prefix: str) -> None:
    check_number(f"{prefix}scaling", head.scaling)  # math.isfinite would break a graph with dynamic shapes
    lora_a, lora_b = head.lora_a, head.lora_b
    if lora_a is None and lora_b is None:
        return
    if lora_a is None or lora_b is None:
        raise ValueError(f"{prefix}lora_a, {prefix}lora_b: expected both or neither")
    if lora_a.ndim != 2:
        raise ValueError(f"{prefix}lora_a: expected shape (rank, hidden), got {tuple(lora_a.shape)}")
    R = lora_a.shape[0]
    check_shape(f"{prefix}lora_a", lora_a, rank=R, hidden=head.hidden.shape[1])
    check_shape(f"{prefix}lora_b", lora_b, vocabulary=head.weight.shape[0], rank=R)
    _check_operands(head.hidden, prefix, lora_a=lora_a, lora_b=lora_b)


def _check_operands(like: Tensor, prefix: str, /, **operands: Tensor | None) -> None:
    check_device(like, **{f"{prefix}{name}": x for name, x in operands.items()})
    for name, x in operands.items():
        if x is not None:
            check_dtype(f"{prefix}{name}", x)


def checked_temperature(hidden: Tensor, temperature: float | Tensor) -> float | Tensor:
    """Return the temperature, a number or one number per row, or raise ValueError.

    On a CPU, a temperature that is not finite and above 0 raises. Where the values of a tensor cannot be read, as on a
    GPU, each one that is not above 0 becomes NaN.
    """
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
        return temperature
    check_shape("temperature", temperature, tokens=hidden.shape[0])
    check_device(hidden, temperature=temperature)
    if temperature.requires_grad:
        raise ValueError("temperature: it has no gradient here; pass temperature.detach()")
    if not temperature.is_floating_point():
        raise ValueError(f"temperature: expected a floating dtype, got {temperature.dtype}")
    if not readable(hidden):
        return torch.where(temperature > 0, temperature, torch.nan)
    check_rows("temperature", temperature, (temperature > 0) & temperature.isfinite(), "finite and above 0")
    return temperature


def check_rows(name: str, values: Tensor, right: Tensor, expected: str) -> None:
    """Raise ValueError for the first row where `right` (tokens,) is False. The check reads values on the host."""
    if not right.all():
        row = int((~right).nonzero()[0])
        raise ValueError(f"{name}: expected each row {expected}, got {values[row].item()} in row {row}")


def check_ids(name: str, ids: Tensor, vocabulary: int, counts: Tensor | None) -> None:
    """Raise ValueError for ids (tokens, K) outside the vocabulary, or for an id that occurs twice in a row.

    counts: (tokens,) bool, the rows whose ids must be distinct, or None for all rows.

    Negative ids are padding. The check reads values on the host.
    """
    if (ids >= vocabulary).any():
        raise ValueError(f"{name}: id {int(ids.max())} is outside a vocabulary of {vocabulary}")
    ordered = ids.sort(-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if counts is not None:
        twice &= counts[:, None]
    if twice.any():
        row, column = twice.nonzero()[0].tolist()
        raise ValueError(f"{name}: row {row} has id {int(ordered[row, column])} twice")


def check_budget(hidden: Tensor, memory_budget: int | None, times: int = 1) -> int:
    """Return the memory budget in bytes. None stands for `times` the default budget of the device."""
    if memory_budget is None:
        return times * (GPU_BUDGET if hidden.is_cuda else CPU_BUDGET)
    budget = whole_number(memory_budget)
    if budget is None or budget <= 0:
        raise ValueError(f"memory_budget: expected a whole number of bytes above 0, got {memory_budget}")
    return budget


def check_mask(hidden: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        return
    check_shape("mask", mask, tokens=hidden.shape[0])
    check_device(hidden, mask=mask)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: expected bool, got {mask.dtype}")


# ---- conversions


def logits_fit(inputs: HeadInputs, copies: int, budget: int) -> bool:
    """Return whether `copies` tensors of all logits fit into the budget.

    If so, autograd may keep them, and the backward need not compute them again. On the Triton path the result is always
    False.
    """
    wide = torch.promote_types(inputs.hidden.dtype, torch.float32)
    elements = inputs.hidden.shape[0] * inputs.weight.shape[0]
    return not use_triton(inputs.hidden) and copies * wide.itemsize * elements <= budget


def cast(inputs: HeadInputs) -> HeadInputs:
    """Return the inputs with hidden states in autocast's dtype, if autocast is on."""
    dtype = autocast_dtype(inputs.hidden)
    return inputs if inputs.hidden.dtype == dtype else inputs._replace(hidden=inputs.hidden.to(dtype))


def low_rank(hidden: Tensor, lora_a: Tensor, scaling: float) -> Tensor:
    """Compute scaling hidden A^T, (tokens, R). Its product with B^T is the adapter's part of the logits."""
    return scaling * (hidden @ lora_a.to(hidden.dtype).T)


def head_of(inputs: HeadInputs, temperature: float | Tensor) -> Head:
    """Build the Head from the arguments of a public op, after these were checked and cast.

    An adapter becomes R more columns of hidden; `chunk_of` appends B to the weight. W + scaling B A is not computed.
    """
    hidden, weight, bias, lora_a, lora_b, scaling, softcap = inputs
    temperatures = None
    if isinstance(temperature, Tensor):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        temperatures, temperature = temperature.to(wide).contiguous(), 1.0
    if lora_a is not None:
        hidden = torch.cat((hidden, low_rank(hidden, lora_a, scaling)), 1)  # (tokens, C + R)
    bias = None if bias is None else bias.contiguous()
    return Head(hidden, weight, lora_b, bias, temperatures, float(temperature), softcap)
