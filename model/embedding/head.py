"""The forward of a causal language model that trains without holding its logits, by means of token_logprobs."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .operands import head_operands, score
from .state import STATE
from .trl_head import FUSED, fused_forward


def make_head_forward(home: Any, base: Any) -> Callable[..., Any]:
    """Return a new forward for base, a model of transformers' module `home`.

    The new forward handles three kinds of calls: TRL's calls for per-token values, training steps that need the loss,
    and all others. The others, such as calls for logits, go to the forward that base has now.
    """
    original = _unbound(base.forward)
    fused_below = fused_forward(original)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # after `remove`, a trainer's forward that wraps this one may still call it
        state = self.__dict__.get(STATE)
        if state is None or state.head is not forward:
            return original(self, *args, **kwargs)

        # a call from TRL: HandOver passes TRL's forward if that wraps this one; else this one may wrap it
        fused = kwargs.pop(FUSED, fused_below if kwargs.get("fused_lm_head") else None)
        if fused is not None:
            if "lora_a" in head_operands(self.get_output_embeddings()):
                raise InputError(
                    "lm_head: TRL would ignore its adapter; do not target lm_head, or list it in modules_to_save"
                )
            return fused(self, *args, **kwargs)

        asks_for_logits = "logits_to_keep" in kwargs or kwargs.get("return_dict") is False
        if asks_for_logits or kwargs.get("labels") is None or not self.training:
            return original(self, *args, **kwargs)
        return _train(self, home, *args, **kwargs)

    return functools.wraps(type(base).forward)(forward)  # generate() and Trainer read the signature


def _unbound(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method as a function of the model and the arguments.

    If `method` is not a bound method, the returned function ignores the model.
    """

    def call(_: Any, *args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return getattr(method, "__func__", None) or call


def _train(
    self: Any,
    home: Any,
    *args: Any,
    labels: Tensor,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> Any:
    """Run a forward pass with labels (B, T), and return transformers' output with the loss. Its `logits` are None."""
    routed = hasattr(home, "load_balancing_loss_func")
    if routed and kwargs.get("output_router_logits") is None:
        kwargs["output_router_logits"] = self.config.output_router_logits
    outputs = self.base_model(*args, **kwargs)

    # 1. the trained positions: the next token has a label
    targets = F.pad(labels[:, 1:], (0, 1), value=ignore_index) if shift_labels is None else shift_labels
    targets = targets.flatten().to(outputs.last_hidden_state.device)  # (B T,)
    hidden = outputs.last_hidden_state.flatten(0, 1)  # (B T, C)
    trained = targets != ignore_index
    if not torch.compiler.is_compiling():
        hidden, targets = hidden[trained], targets[trained]  # (trained, C), (trained,)

    # 2. the loss
    operands = head_operands(self.get_output_embeddings())
    logprob, _, _ = score(hidden, targets, operands, ignore_index=ignore_index)
    loss = -logprob.sum() / (trained.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)

    # 3. transformers' output, with the balance loss of a mixture
    kept = {key: outputs.get(key) for key in ("past_key_values", "hidden_states", "attentions")}
    if not routed:
        return home.CausalLMOutputWithPast(loss=loss, **kept)
    balance = None
    if kwargs["output_router_logits"]:
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        balance = home.load_balancing_loss_func(
            outputs.router_logits, self.num_experts, self.num_experts_per_tok, mask
        )
        loss = loss + self.router_aux_loss_coef * balance
    return home.MoeCausalLMOutputWithPast(
        loss=loss, aux_loss=balance, router_logits=outputs.get("router_logits"), **kept
    )
