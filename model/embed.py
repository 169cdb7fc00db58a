"""Burnish's ops inside a model of transformers 5, in place and reversibly, for existing trainers.

    from burnish.model import embed

    model = AutoModelForCausalLM.from_pretrained(folder)       or the PEFT model around one
    embed.apply(model)                                          its modules, names and state_dict stay as they were
    ...
    embed.remove(model)

Each part is a keyword of `apply`, so that it can be left out:

    attention   flash_attention and decode_attention, through AttentionInterface and AttentionMaskInterface
    rope        apply_rope, in the forward of each attention layer
    norm        rms_norm, in the forward of each norm
    swiglu      swiglu, in the forward of each dense feed-forward layer
    experts     moe_mlp, through ALL_EXPERTS_FUNCTIONS
    head        token_logprobs: the loss of a training step without its logits, and TRL's per-token log-probabilities

Outside the model, only the three registries named above are written to. Inside it, forwards are replaced on the
instances. A part raises an error for a feature that it does not support, and the error names the feature. The parts
are in embedding/. docs/embedding.md describes the masks, the costs and the limits.

Source: transformers 5.22.2 and trl 1.16.0, whose function signatures are used here
"""

import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .embedding.attention import attend, mask
from .embedding.experts import experts_forward, has_swiglu
from .embedding.head import make_head_forward
from .embedding.layers import is_silu, make_attention_forward, mlp_forward, norm_forward
from .embedding.operands import check_head
from .embedding.state import STATE, Embedded, Named
from .embedding.trl_head import HandOver
from .errors import InputError

NAME = "burnish"  # our name in the registries
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "smollm3", "mixtral", "qwen3_moe", "gpt_oss")


def apply(
    hf_model: Any,
    *,
    attention: bool = True,
    rope: bool = True,
    norm: bool = True,
    swiglu: bool = True,
    experts: bool = True,
    head: bool = True,
) -> None:
    """Replace ops of hf_model with Burnish's, in place.

    hf_model: a transformers model of ARCHITECTURES, with or without a head, or a PEFT model around one. A trainer may
        be built around it before or after this call.
    attention, rope, norm, swiglu, experts, head: whether to apply each part. A part that the model does not have is
        skipped.

    Raises InputError for an unsupported model, layer, activation or head, and for a model that has the ops already.
    """
    base, decoder, home = _base(hf_model)
    if base.__dict__.get(STATE):
        raise InputError("hf_model: burnish is applied already; call embed.remove(hf_model) first")
    if not getattr(base.config, "is_causal", True):
        raise InputError("config.is_causal: expected True, got False")
    state = Embedded()

    # 1. the forwards, found and checked before anything is written
    parts = {"rope": rope, "norm": norm, "swiglu": swiglu, "experts": experts}
    forwards = [*_layer_forwards(decoder, home, parts)]
    if head and hasattr(base, "lm_head"):
        check_head(base.lm_head)
        state.head = make_head_forward(home, base)
        forwards.append((base, state.head))
    if any(hasattr(module, "_hf_hook") for module, _ in forwards):
        raise InputError("hf_model: expected a model on one device, got hooks of accelerate's device_map")

    # 2. the hook through which TRL's forward, if it wraps ours, reaches ours
    if state.head is not None:
        state.hook = base.register_forward_pre_hook(HandOver(), with_kwargs=True)

    # 3. the registries, and our name in the config
    if attention:
        state.attention = _set_attention(base)
    if experts and any((_known(module, home) or "").endswith("Experts") for module in decoder.modules()):
        state.experts = _set_experts(base)

    # 4. the forwards, on the instances; by the name "forward", pickle finds the class's own instead
    for module, forward in forwards:
        forward.__name__ = "forward"
        state.forwards.append((module, module.__dict__.get("forward")))
        module.forward = types.MethodType(forward, module)
    base.__dict__[STATE] = state


def remove(hf_model: Any) -> None:
    """Undo `apply`. Raises InputError if the model does not have Burnish's ops."""
    base, _, _ = _base(hf_model)
    state: Embedded | None = base.__dict__.pop(STATE, None)
    if not state:
        raise InputError("hf_model: burnish is not applied")
    if state.hook is not None:
        state.hook.remove()

    # the forwards, and the copies of our forwards that PEFT made for modules_to_save
    ours = {getattr(m.forward, "__func__", None) for m, _ in state.forwards if m is not base} - {None}
    for module, before in state.forwards:
        if module is base and getattr(base.forward, "__func__", None) is not state.head:
            continue  # a trainer's forward wraps ours; from now on ours only passes calls on
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before
    for module in base.modules():
        if getattr(module.__dict__.get("forward"), "__func__", None) in ours:
            del module.__dict__["forward"]

    # the names in the config; our entries in the registries stay, but are not used any more
    if state.attention is not None:
        base.set_attn_implementation(state.attention)
    if state.experts is not None:
        base.set_experts_implementation(state.experts)


# ---- the model


def _base(hf_model: Any) -> tuple[Any, Any, Any]:
    """Return (the transformers model, its decoder, the Python module that defines its layers).

    Raises InputError if the model is not one of ARCHITECTURES, or if its layers are not those of transformers.
    """
    base = hf_model.get_base_model() if hasattr(hf_model, "get_base_model") else hf_model  # of a PeftModel
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    if model_type not in ARCHITECTURES:
        raise InputError(
            f"hf_model: expected a transformers model of {', '.join(ARCHITECTURES)}, got {type(base).__name__}"
            + (f" ({model_type})" if model_type else "")
        )

    home = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    decoder = base.base_model  # base itself, if it has no head
    for layer in getattr(decoder, "layers", [decoder]):
        if _known(layer, home) is None:
            raise InputError(f"hf_model: expected layers of {home.__name__}, got {type(layer).__qualname__}")
    return base, decoder, home


def _known(module: nn.Module, home: Any) -> str | None:
    """Return the name of the class in the Python module `home` that a layer is an instance of, or None.

    Subclasses count, because FSDP2 replaces the class of a layer by a subclass.
    """
    return next((cls.__name__ for cls in type(module).__mro__ if cls.__module__ == home.__name__), None)


def _layer_forwards(
    decoder: Any, home: Any, parts: dict[str, bool]
) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Yield (module, our forward) for each module whose forward is to be replaced.

    Raises InputError for an activation other than SiLU.
    """
    attention_forward = make_attention_forward(home, halves=decoder.config.model_type != "gpt_oss")
    for name, module in decoder.named_modules():
        kind = _known(module, home) or ""
        if parts["rope"] and kind.endswith("Attention"):
            yield module, attention_forward
        elif parts["norm"] and kind.endswith("RMSNorm"):
            yield module, norm_forward
        elif parts["swiglu"] and kind.endswith("MLP") and hasattr(module, "gate_proj"):
            if not is_silu(module.act_fn):
                raise InputError(f"{name}.act_fn: expected SiLU, got {module.act_fn}; pass swiglu=False")
            yield module, mlp_forward
        elif parts["experts"] and kind.endswith("Experts") and not has_swiglu(module):
            raise InputError(f"{name}.act_fn: expected SiLU, got {module.act_fn}; pass experts=False")


# ---- the registries


def _set_attention(base: Any) -> str:
    """Register our attention and our mask, and return the name of the implementation that they replace.

    The mask is needed, because without it attention would see padding.
    """
    transformers = importlib.import_module("transformers")
    transformers.AttentionInterface.register(NAME, attend)
    transformers.AttentionMaskInterface.register(NAME, mask)
    before = base.config._attn_implementation
    base.set_attn_implementation(NAME)
    base.config._attn_implementation_internal = Named(NAME, before)
    return before


def _set_experts(base: Any) -> str:
    """Register our experts, and return the name of the implementation that they replace."""
    registry = importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
    registry.register(NAME, experts_forward)
    before = base.config._experts_implementation
    base.set_experts_implementation(NAME)
    base.config._experts_implementation_internal = Named(NAME, before)
    return before
