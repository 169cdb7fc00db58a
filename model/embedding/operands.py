"""The operands of token_logprobs that a model's lm_head holds: its weight and bias, and PEFT's adapters on it."""

from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import token_logprobs
from ...kernels._chip import autocast_dtype
from ..errors import InputError


def check_head(head: Any) -> None:
    """Raise InputError for a head that is not a plain linear layer, possibly with PEFT's plain LoRA on it."""
    head = _trained(head)
    adapted = hasattr(head, "base_layer")
    beyond = _beyond_lora(head) if adapted else ""
    if beyond or not isinstance(head.base_layer if adapted else head, nn.Linear):
        got = f"{type(head).__module__}.{type(head).__qualname__}" + (f" with {beyond}" if beyond else "")
        raise InputError(
            f"lm_head: expected torch.nn.Linear, or PEFT's plain LoRA on one, got {got}; pass head=False"
        )


def head_operands(head: Any) -> dict[str, Any]:
    """Return weight, bias and adapter as keywords of token_logprobs. Several adapters are concatenated along the rank.

    Raises InputError as `check_head` does, because an adapter may have been added after `apply`.
    """
    check_head(head)
    head = _trained(head)
    layer = getattr(head, "base_layer", head)
    operands = {"weight": layer.weight, "bias": layer.bias}
    if layer is not head and (names := _adapters(head)):
        operands["lora_a"] = torch.cat([head.lora_A[name].weight for name in names])  # (R, C)
        operands["lora_b"] = torch.cat(
            [head.lora_B[name].weight * head.scaling[name] for name in names], 1
        )  # (V, R)
    return operands


def score(
    hidden: Tensor, targets: Tensor, operands: dict[str, Any], **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Call token_logprobs, with its inputs cast to the dtype that autocast would give the head.

    The cast is made here, because autocast does not know our ops.
    """
    dtype = autocast_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        cast = {name: None if x is None else x.to(dtype) for name, x in operands.items()}
        return token_logprobs(hidden.to(dtype), targets=targets, **cast, **options)


# ---- PEFT's layers


def _trained(head: Any) -> Any:
    """Return the layer that computes lm_head's product.

    With modules_to_save, PEFT wraps the original layer and a trained copy. Then the active one of the two is returned.
    """
    if not hasattr(head, "modules_to_save"):
        return head
    is_original = head.disable_adapters or not head.active_adapters
    return head.original_module if is_original else head.modules_to_save[head.active_adapters[0]]


def _adapters(head: Any) -> list[str]:
    """Return the names of the LoRA adapters that PEFT would add to the head's product. head: one of PEFT's layers."""
    if head.disable_adapters or head.merged:
        return []
    return [name for name in head.active_adapters if name in head.lora_A]


def _beyond_lora(head: Any) -> str:
    """Return the name of a feature of this PEFT layer that plain LoRA does not have, or "" if there is none."""
    if not hasattr(head, "lora_A"):
        return "an adapter that is no LoRA"
    for name in _adapters(head):
        if name in getattr(head, "lora_variant", ()):
            return "DoRA, or another variant of LoRA"
        if head.lora_B[name].bias is not None:
            return "lora_bias"
        if head.training and getattr(head.lora_dropout[name], "p", 0):
            return "lora_dropout"
    return ""
