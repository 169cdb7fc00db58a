"""The operands of token_logprobs that a model's lm_head holds: its own weight and bias, and PEFT's adapters on it."""

from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import token_logprobs
from ...kernels._chip import autocast_dtype
from ..errors import InputError


def check_head(head: Any) -> None:
    """Raise InputError for a head whose product is not one with a weight and with adapters of low rank."""
    head = _trained(head)
    adapted = hasattr(head, "base_layer")
    beyond = _beyond_lora(head) if adapted else ""
    if beyond or not isinstance(head.base_layer if adapted else head, nn.Linear):
        got = f"{type(head).__module__}.{type(head).__qualname__}" + (f" with {beyond}" if beyond else "")
        raise InputError(
            f"lm_head: expected torch.nn.Linear, or PEFT's plain LoRA on one, got {got}; pass head=False"
        )


def head_operands(head: Any) -> dict[str, Any]:
    """weight, bias and adapter, as token_logprobs takes them; several adapters lie side by side.

    Raises InputError as `check_head` does: an adapter may have come after `apply`.
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
    """token_logprobs with the inputs that autocast, which does not know our ops, would give the head."""
    dtype = autocast_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        cast = {name: None if x is None else x.to(dtype) for name, x in operands.items()}
        return token_logprobs(hidden.to(dtype), targets=targets, **cast, **options)


# ---- PEFT's layers


def _trained(head: Any) -> Any:
    """The layer that stands in lm_head's place: of modules_to_save, PEFT keeps the trained copy beside the original."""
    if not hasattr(head, "modules_to_save"):
        return head
    is_original = head.disable_adapters or not head.active_adapters
    return head.original_module if is_original else head.modules_to_save[head.active_adapters[0]]


def _adapters(head: Any) -> list[str]:
    """The LoRA adapters that PEFT would add to the product with head, which is one of its layers."""
    if head.disable_adapters or head.merged:
        return []
    return [name for name in head.active_adapters if name in head.lora_A]


def _beyond_lora(head: Any) -> str:
    """The name of what one of PEFT's layers does beyond adding products of low rank; empty where it does no more."""
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
