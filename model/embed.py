"""Burnish's ops under a model of transformers 5, in place and reversibly: for trainers that already run.

    from burnish.model import embed

    model = AutoModelForCausalLM.from_pretrained(folder)       or the PEFT model around one
    embed.apply(model)                                          its modules, names and state_dict stay what they were
    ...
    embed.remove(model)

A part is a keyword of `apply`, so that each can be left out:

    attention   flash_attention and decode_attention, through AttentionInterface and AttentionMaskInterface
    rope        apply_rope, in the forward of each attention layer
    norm        rms_norm, in the forward of each norm
    swiglu      swiglu, in the forward of each dense feed-forward layer
    experts     moe_mlp, through ALL_EXPERTS_FUNCTIONS
    head        token_logprobs: the loss of a training step without its logits, and TRL's per-token log-probabilities

Only these three registries are written to beside the model itself: a forward is replaced on the instance. What a part
does not know it refuses by name. docs/embedding.md has the masks, the costs and the limits.

Source: the sources of transformers 5.22.2 and trl 1.16.0, whose signatures these are
"""

import copy
import functools
import importlib
import math
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import (
    apply_rope,
    decode_attention,
    flash_attention,
    moe_mlp,
    rms_norm,
    swiglu,
    token_logprobs,
)
from ..kernels._chip import autocast_dtype
from .errors import InputError

NAME = "burnish"  # under which the registries know us
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "smollm3", "mixtral", "qwen3_moe", "gpt_oss")
_LOOK = 1 << 22  # logits in memory at a time, where TRL asks for the likeliest token
_STATE = "_burnish"  # the attribute of a model that holds what remove() needs
_HEAD = "burnish_head"  # the keyword by which `_HandOver` reaches our forward


class _Named(str):
    """NAME in a model's config. Pickled it is the name of the implementation that was set before."""

    def __new__(cls, name: str, before: str | None) -> "_Named":
        named = super().__new__(cls, name)
        named.before = before
        return named

    before: str | None

    def __reduce__(self) -> Any:
        return copy.copy, (self.before,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Named":
        return self


@dataclass
class _Embedded:
    """What remove() needs. The implementations are those that were set before, None where it was left alone.

    A pickled model is the plain one, which loads where there is no Burnish: what `apply` has put on it is pickled as
    what was there before. Each of our forwards has the name `forward`, so pickle finds that of its module's class.
    """

    attention: str | None = None
    experts: str | None = None
    head: Callable[..., Any] | None = None  # the model's forward
    hook: Any = None  # the handle of `_HandOver`
    forwards: list[tuple[nn.Module, Any]] = field(
        default_factory=list
    )  # a module and its own forward, if any

    def __reduce__(self) -> Any:
        return copy.copy, (None,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Embedded":
        values = (copy.deepcopy(getattr(self, f.name), memo) for f in fields(self))
        return _Embedded(*values)


# ---- attention


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **more: Any,
) -> Tensor | None:
    """What transformers asks of AttentionMaskInterface, once a forward pass. All layers of a kind get the answer.

    None                            causal, the last query on the last key
    int32 (1, 1, 1, segments + 1)   the first T keys are the queries' own: cu_seqlens of the B T tokens laid end to end.
                                    A run of padding is a segment, too, so nothing is moved and no length is read
    int64 (B, 1, 1, T or T + S)     a cache: how many keys each query sees, then, where some of a row's keys are
                                    padding, the order that puts them last

    Four dimensions, because transformers hands such a tensor through and calls everything else a padding mask.
    """
    if use_vmap or "allow_is_bidirectional_skip" in more:
        which = "or_mask_function or and_mask_function" if use_vmap else "bidirectional attention"
        raise NotImplementedError(
            f"attention mask: {which} is not built; embed.apply(model, attention=False)"
        )
    traced = torch.compiler.is_compiling()
    first = q_offset - kv_offset  # the key that the first query stands on
    if isinstance(first, Tensor) and not traced:
        first = int(first)
    real = None  # (B, S): is this key a token?
    if attention_mask is not None:
        missing = kv_offset + kv_length - attention_mask.shape[1]
        real = F.pad(attention_mask, (0, max(missing, 0)))[:, kv_offset : kv_offset + kv_length]
        if not traced and bool(real[:, : first + q_length].all()):
            real = None
    if isinstance(first, int) and first == 0:
        if real is None and allow_is_causal_skip and kv_length == q_length:
            return None
        return _segments(batch_size, q_length, mask_function, real, traced, device)
    if real is None and isinstance(first, int) and first + q_length == kv_length:
        return None
    seen = first + torch.arange(q_length, device=device)  # (T,) the key that each query stands on
    if real is None:
        return (seen + 1).expand(batch_size, q_length)[:, None, None]
    if local_size is not None:
        _expect(_runs(real) <= 1, "holes between tokens cannot be told from a sliding window's edge", traced)
    counts = real.long().cumsum(1)[:, seen]  # (B, T)
    order = (~real).long().argsort(dim=1, stable=True)  # (B, S)
    return torch.cat([counts, order], 1)[:, None, None]


def _segments(
    batch_size: int,
    T: int,
    mask_function: Callable[..., Tensor] | None,
    real: Tensor | None,
    traced: bool,
    device: torch.device | str,
) -> Tensor:
    """(1, 1, 1, segments + 1): a segment ends where a token does not see the one before, and where padding does."""
    starts = torch.ones(batch_size, T, dtype=torch.bool, device=device)
    if T > 1 and mask_function is not None:
        row, token = torch.arange(batch_size, device=device), torch.arange(1, T, device=device)
        zero = torch.zeros((), dtype=torch.long, device=device)
        starts[:, 1:] = ~mask_function(row[:, None], zero, token[None], token[None] - 1)
    if real is not None:
        real = real[:, :T]
        _expect(_runs(real) <= 1, "a row has padding between tokens", traced)
        starts[:, 1:] |= real[:, 1:] != real[:, :-1]
    total = batch_size * T
    if (
        traced
    ):  # as many as there can be: the number of segments would be read on the host; the last ones are empty
        at = torch.where(starts.flatten(), torch.arange(total, device=device), total).sort().values
    else:
        at = starts.flatten().nonzero()[:, 0]
    return F.pad(at, (0, 1), value=total).int()[None, None, None]


def _runs(real: Tensor) -> Tensor:
    """(B, S) to (): how many runs of tokens the row with the most of them has."""
    return (real & ~F.pad(real, (1, 0))[:, :-1]).sum(1).max()


def _expect(holds: Tensor, otherwise: str, traced: bool) -> None:
    message = f"attention_mask: {otherwise}; embed.apply(model, attention=False)"
    if traced:
        torch.ops.aten._assert_async.msg(holds, message)
    elif not holds:
        raise NotImplementedError(message)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query (B, H, T, D), key and value (B, G, S, D) to (B, T, H, D); the mask is `_mask`'s."""
    if dropout:
        raise NotImplementedError(
            f"attention_dropout: expected 0, got {dropout}; embed.apply(model, attention=False)"
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (B, T, H, D), (B, S, G, D)
    q, k, v = (x.to(autocast_dtype(x)) for x in (q, k, v))
    (B, T), S = q.shape[:2], k.shape[1]
    sinks = None if s_aux is None else s_aux.to(q.dtype)
    if attention_mask is None:
        out = flash_attention(q, k, v, scale=scaling, window=sliding_window, sinks=sinks)
    elif attention_mask.dtype == torch.int32:
        q, k, v = q.flatten(0, 1), k[:, :T].flatten(0, 1), v[:, :T].flatten(0, 1)  # (B T, H, D)
        cu_seqlens = attention_mask.flatten()
        out = flash_attention(
            q, k, v, scale=scaling, window=sliding_window, sinks=sinks, cu_seqlens=cu_seqlens
        )
        assert isinstance(out, Tensor)
        out = out.unflatten(0, (B, T))
    elif attention_mask.dtype == torch.int64 and attention_mask.shape[1:3] == (1, 1):
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise NotImplementedError(
                "past_key_values: keys before the queries' own have no gradient where some are padding or the cache "
                "is static; use_cache=False, torch.no_grad() or embed.apply(model, attention=False)"
            )
        counts, order = attention_mask[:, 0, 0].split([T, attention_mask.shape[-1] - T], 1)
        if order.shape[1]:
            order = order[:, :, None, None]
            k, v = (x.gather(1, order.expand(-1, -1, *x.shape[2:])) for x in (k, v))
        slot = torch.arange(B, device=q.device).repeat_interleave(T)
        out = decode_attention(
            q.flatten(0, 1), k, v, slot, counts.flatten(), scale=scaling, window=sliding_window, sinks=sinks
        )
        out = out.unflatten(0, (B, T))
    else:
        raise NotImplementedError(
            f"attention_mask: expected (B, S) or none, got {tuple(attention_mask.shape)} {attention_mask.dtype}; "
            f"embed.apply(model, attention=False) for T={T} queries and S={S} keys under a mask of your own"
        )
    assert isinstance(out, Tensor)
    return out, None


def _attention_forward(home: Any, halves: bool) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The forward of an attention layer of the module `home`, with apply_rope.

    halves: are cos and sin (B, T, D), each half of D the same?  gpt-oss has (B, T, D/2).
    """
    interfaces, eager = home.ALL_ATTENTION_FUNCTIONS, home.eager_attention_forward

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(heads)  # (B, T, H, D)
        k = self.k_proj(hidden_states).view(heads)  # (B, T, G, D)
        v = self.v_proj(hidden_states).view(heads)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if getattr(self, "use_rope", True):
            q, k = _rotate(q, k, *position_embeddings, halves)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        # llama has no window; mistral and mixtral read theirs from the config, the others keep the layer's
        if hasattr(self, "sliding_window"):
            kwargs["sliding_window"] = self.sliding_window
        elif self.config.model_type in ("mistral", "mixtral"):
            kwargs["sliding_window"] = self.config.sliding_window
        if hasattr(self, "sinks"):
            kwargs["s_aux"] = self.sinks
        attend = interfaces.get_interface(self.config._attn_implementation, eager)
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

    return forward


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> tuple[Tensor, Tensor]:
    """q (B, T, H, D), k (B, T, G, D); cos, sin (B or 1, T, D or D/2) are a table with a row for each token."""
    if halves:
        half = cos.shape[-1] // 2
        cos, sin = cos[..., :half], sin[..., :half]
    if cos.shape[0] == 1:
        return apply_rope(q, k, cos[0], sin[0])
    B = q.shape[0]
    q, k = apply_rope(q.flatten(0, 1), k.flatten(0, 1), cos.flatten(0, 1), sin.flatten(0, 1))  # (B T, H, D)
    return q.unflatten(0, (B, -1)), k.unflatten(0, (B, -1))


# ---- norm, feed-forward


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def _silu(module: nn.Module) -> bool:
    return type(module).__name__ in ("SiLU", "SiLUActivation")


# ---- experts


def _experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states (T, C), top_k_index and top_k_weights (T, K) to (T, C); index E is no expert and is passed over."""
    clamped = hasattr(self, "alpha") and hasattr(self, "limit")  # gpt-oss
    if not (self.has_gate and (clamped or _silu(self.act_fn))) or self.has_post_expert_norm:
        raise InputError(
            f"{type(self).__name__}: expected experts with SwiGLU and no norm after them; pass experts=False"
        )
    gate_up, down = self.gate_up_proj, self.down_proj
    biases = (self.gate_up_proj_bias, self.down_proj_bias) if self.has_bias else (None, None)
    if self.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)  # (E, 2F, C), (E, C, F)
    if not self.is_concatenated:  # rows of gate and up in turn
        gate_up, biases = _apart(gate_up), (None if biases[0] is None else _apart(biases[0]), biases[1])
    dtype = autocast_dtype(gate_up)
    gate_up_bias, down_bias = (None if b is None else b.to(dtype) for b in biases)
    out = moe_mlp(
        hidden_states.to(dtype), gate_up.to(dtype), down.to(dtype), top_k_weights, top_k_index,
        activation="clamped_swiglu" if clamped else "swiglu", gate_up_bias=gate_up_bias, down_bias=down_bias,
        **({"alpha": self.alpha, "limit": self.limit} if clamped else {}),
    )  # fmt: skip
    return out.to(hidden_states.dtype)


def _apart(x: Tensor) -> Tensor:
    """(E, 2F, ...), gate and up in turn, to the same with all of the gate first. A copy."""
    return torch.cat([x[:, ::2], x[:, 1::2]], 1)


# ---- head


def _head_forward(home: Any, base: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a causal language model whose training loss does not need its logits; else it is `original`."""
    below = _fused_head(original)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__.get(_STATE)
        if state is None or state.head is not forward:  # removed, with a trainer's forward over this one
            return original(self, *args, **kwargs)
        fused = kwargs.pop(_HEAD, below if kwargs.get("fused_lm_head") else None)
        if fused is not None:
            if "lora_a" in _head_operands(self.get_output_embeddings()):
                raise InputError(
                    "lm_head: TRL scores without its adapter; do not target it, or list it in modules_to_save"
                )
            return fused(self, *args, **kwargs)
        whole = "logits_to_keep" in kwargs or kwargs.get("return_dict") is False
        if whole or kwargs.get("labels") is None or not self.training:
            return original(self, *args, **kwargs)
        return _train(self, home, *args, **kwargs)

    return functools.wraps(type(base).forward)(forward)  # generate() and Trainer read its signature


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
    """A forward pass with labels (B, T) as transformers' own, its `logits` None."""
    routed = hasattr(home, "load_balancing_loss_func")
    if routed and kwargs.get("output_router_logits") is None:
        kwargs["output_router_logits"] = self.config.output_router_logits
    outputs = self.base_model(*args, **kwargs)
    targets = F.pad(labels[:, 1:], (0, 1), value=ignore_index) if shift_labels is None else shift_labels
    targets = targets.flatten().to(outputs.last_hidden_state.device)
    hidden = outputs.last_hidden_state.flatten(0, 1)  # (B T, C)
    trained = targets != ignore_index
    if not torch.compiler.is_compiling():
        hidden, targets = hidden[trained], targets[trained]
    operands = _head_operands(self.get_output_embeddings())
    logprob, _, _ = _score(hidden, targets, operands, ignore_index=ignore_index)
    loss = -logprob.sum() / (trained.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
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


def _whole_head(head: Any) -> Any:
    """What stands in lm_head's place: of modules_to_save, PEFT keeps the trained copy beside the original."""
    if not hasattr(head, "modules_to_save"):
        return head
    whole = head.disable_adapters or not head.active_adapters
    return head.original_module if whole else head.modules_to_save[head.active_adapters[0]]


def _adapters(head: Any) -> list[str]:
    """The LoRA adapters that PEFT would add to the product with head, which is one of its layers."""
    if head.disable_adapters or head.merged:
        return []
    return [name for name in head.active_adapters if name in head.lora_A]


def _beyond_lora(head: Any) -> str:
    """What one of PEFT's layers does beyond adding products of low rank."""
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


def _check_head(head: Any) -> None:
    """Raises InputError for a head whose product is not one with a weight and with adapters of low rank."""
    head = _whole_head(head)
    adapted = hasattr(head, "base_layer")
    beyond = _beyond_lora(head) if adapted else ""
    if beyond or not isinstance(head.base_layer if adapted else head, nn.Linear):
        got = f"{type(head).__module__}.{type(head).__qualname__}" + (f" with {beyond}" if beyond else "")
        raise InputError(
            f"lm_head: expected torch.nn.Linear, or PEFT's plain LoRA on one, got {got}; pass head=False"
        )


def _head_operands(head: Any) -> dict[str, Any]:
    """weight, bias and adapter, as token_logprobs takes them; several adapters lie side by side."""
    _check_head(head)
    head = _whole_head(head)
    layer = getattr(head, "base_layer", head)
    operands = {"weight": layer.weight, "bias": layer.bias}
    if layer is not head and (names := _adapters(head)):
        operands["lora_a"] = torch.cat([head.lora_A[name].weight for name in names])
        operands["lora_b"] = torch.cat([head.lora_B[name].weight * head.scaling[name] for name in names], 1)
    return operands


def _score(
    hidden: Tensor, targets: Tensor, operands: dict[str, Any], **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """token_logprobs with the inputs that autocast, which does not know our ops, would give the head."""
    dtype = autocast_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        cast = {name: None if x is None else x.to(dtype) for name, x in operands.items()}
        return token_logprobs(hidden.to(dtype), targets=targets, **cast, **options)


class _HandOver:
    """A forward pre-hook: where TRL's forward lies over ours, it is asked for the plain one, which is ours.

    accelerate may have laid its own over TRL's: each names the one below `__wrapped__`.
    """

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        forward = module.forward if kwargs.get("fused_lm_head") else None
        while forward is not None:
            forward = getattr(forward, "__func__", forward)
            fused = _fused_head(forward)
            if fused is not None:
                asked = functools.partial(fused, fused_lm_head=True)
                return args, {**kwargs, "fused_lm_head": False, _HEAD: asked}
            forward = getattr(forward, "__wrapped__", None)
        return args, kwargs

    def __reduce__(self) -> Any:  # pickled, a hook of the standard library that does nothing
        return getattr, (nullcontext(), "__exit__")

    def __deepcopy__(self, memo: dict[int, Any]) -> "_HandOver":
        return self


def _fused_head(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """TRL's forward with token_logprobs in place of its own function; None where `forward` is not TRL's.

    Its trainers put one on their model (trl.trainer.utils.add_fused_lm_head) and call it with fused_lm_head=True. What
    it does around the head, shifts, masks and the balance loss, stays TRL's: its code runs with two names exchanged.
    """
    code = getattr(forward, "__code__", None)
    if code is None or code.co_name != "_fused_forward":
        return None
    missing = {"_ChunkedLogProbFunction", "_use_triton"} - set(code.co_names)
    if missing:
        raise InputError(f"trl: expected the head of version 1.16, which has {', '.join(sorted(missing))}")
    # where TRL believes that Triton runs, it scores the trained rows alone: ours does everywhere
    names = {"_ChunkedLogProbFunction": _TokenLogprobs, "_use_triton": lambda device: True}
    again = types.FunctionType(
        code, forward.__globals__ | names, code.co_name, forward.__defaults__, forward.__closure__
    )
    again.__kwdefaults__ = forward.__kwdefaults__
    return again


class _TokenLogprobs:
    """Called as trl.kernels.ChunkedLogProbFunction is."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """hidden (N, C), weight (V, C), targets (N,) to log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1.

        Each (N,), None where `outputs` does not name it; the last three without a gradient. chunk_size is TRL's.
        """
        if softcap is not None or logit_scale != 1:
            raise InputError(f"lm_head: expected plain logits, got softcap={softcap}, scale={logit_scale}")
        operands = {"weight": weight, "bias": bias}
        logprob, lse, entropy = _score(hidden, targets, operands, temperature=temperature)
        squares = mean = top = None
        with torch.no_grad():
            if "log_sum_sq_probs" in outputs:  # sum p^2 = sum exp(2 u) / exp(2 lse)
                squares = _score(hidden, targets, operands, temperature=temperature / 2)[1] - 2 * lse
            if "mean_logits" in outputs:  # the mean of products is the product with the mean
                mean = hidden.float() @ weight.float().mean(0) + (0 if bias is None else bias.float().mean())
                mean = mean / temperature
            if "is_top1" in outputs:
                top = _is_top(hidden, weight, bias, targets, logprob)
        return logprob, entropy if "entropy" in outputs else None, squares, mean, top


def _is_top(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logprob: Tensor) -> Tensor:
    """(N,) bool: is the target the likeliest token? Above one half it is; else its row of logits is looked at."""
    top = logprob > math.log(0.5)
    rows = (~top).nonzero()[:, 0]
    for some in rows.split(max(1, _LOOK // weight.shape[0])):
        top[some] = F.linear(hidden[some], weight, bias).argmax(-1) == targets[some]
    return top


# ---- apply and remove


def _base(hf_model: Any) -> tuple[Any, Any, Any]:
    """The transformers model, its decoder, and the module that defines its layers. InputError: none that we know."""
    base = hf_model.get_base_model() if hasattr(hf_model, "get_base_model") else hf_model  # of a PeftModel
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    if model_type not in ARCHITECTURES:
        raise InputError(
            f"hf_model: expected a transformers model of {', '.join(ARCHITECTURES)}, got {type(base).__name__}"
            + (f" ({model_type})" if model_type else "")
        )
    home = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    decoder = base.base_model  # itself, where there is no head around it
    for layer in getattr(decoder, "layers", [decoder]):
        if _known(layer, home) is None:
            raise InputError(f"hf_model: expected layers of {home.__name__}, got {type(layer).__qualname__}")
    return base, decoder, home


def _known(module: nn.Module, home: Any) -> str | None:
    """The name of the class in `home` that a module is of, also under FSDP2, which derives a class."""
    return next((cls.__name__ for cls in type(module).__mro__ if cls.__module__ == home.__name__), None)


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
    """Put Burnish's ops under hf_model, in place.

    hf_model: a transformers model, with a head or without, or a PEFT model around one, of ARCHITECTURES; before a
        trainer is built around it or after.
    attention, rope, norm, swiglu, experts, head: which parts; one that the model does not have is passed over.
    Raises InputError for a model, layer, activation or head that it does not know, and for a model that has it already.
    """
    base, decoder, home = _base(hf_model)
    if base.__dict__.get(_STATE):
        raise InputError("hf_model: burnish is applied already; call embed.remove(hf_model) first")
    config = base.config
    if not getattr(config, "is_causal", True):
        raise InputError("config.is_causal: expected True, got False")
    state = _Embedded()
    replacements: list[tuple[nn.Module, Callable[..., Any]]] = []
    attention_forward = _attention_forward(home, halves=config.model_type != "gpt_oss")
    sparse = False
    for name, module in decoder.named_modules():
        kind = _known(module, home) or ""
        sparse |= kind.endswith("Experts")
        if rope and kind.endswith("Attention"):
            replacements.append((module, attention_forward))
        elif norm and kind.endswith("RMSNorm"):
            replacements.append((module, _norm_forward))
        elif swiglu and kind.endswith("MLP") and hasattr(module, "gate_proj"):
            if not _silu(module.act_fn):
                raise InputError(f"{name}.act_fn: expected SiLU, got {module.act_fn}; pass swiglu=False")
            replacements.append((module, _mlp_forward))
        elif experts and kind.endswith("Experts") and not (hasattr(module, "alpha") or _silu(module.act_fn)):
            raise InputError(f"{name}.act_fn: expected SiLU, got {module.act_fn}; pass experts=False")
    if head and hasattr(base, "lm_head"):
        _check_head(base.lm_head)
        own = getattr(base.forward, "__func__", None) or (
            lambda _, *args, call=base.forward, **more: call(*args, **more)
        )
        state.head = _head_forward(home, base, own)
        replacements.append((base, state.head))
    if any(hasattr(module, "_hf_hook") for module, _ in replacements):
        raise InputError("hf_model: expected one device, got accelerate's hooks of a device_map over several")
    if state.head is not None:
        state.hook = base.register_forward_pre_hook(_HandOver(), with_kwargs=True)
    if attention:
        transformers = importlib.import_module("transformers")
        transformers.AttentionInterface.register(NAME, _attention)
        transformers.AttentionMaskInterface.register(NAME, _mask)  # without it padding would be seen
        state.attention = config._attn_implementation
        base.set_attn_implementation(NAME)
        config._attn_implementation_internal = _Named(NAME, state.attention)
    if experts and sparse:
        importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS.register(
            NAME, _experts
        )
        state.experts = config._experts_implementation
        base.set_experts_implementation(NAME)
        config._experts_implementation_internal = _Named(NAME, state.experts)
    for module, forward in replacements:
        forward.__name__ = "forward"
        state.forwards.append((module, module.__dict__.get("forward")))
        module.forward = types.MethodType(forward, module)
    base.__dict__[_STATE] = state


def remove(hf_model: Any) -> None:
    """Take off what `apply` put on. Raises InputError where it has not been applied."""
    base, _, _ = _base(hf_model)
    state: _Embedded | None = base.__dict__.pop(_STATE, None)
    if not state:
        raise InputError("hf_model: burnish is not applied")
    if state.hook is not None:
        state.hook.remove()
    ours = {getattr(m.forward, "__func__", None) for m, _ in state.forwards if m is not base} - {None}
    for module, own in state.forwards:
        if module is base and getattr(base.forward, "__func__", None) is not state.head:
            continue  # a trainer has put its forward over ours, which now passes its calls on
        if own is None:
            del module.__dict__["forward"]
        else:
            module.forward = own
    for module in base.modules():  # copies that PEFT made of ours, for modules_to_save
        if getattr(module.__dict__.get("forward"), "__func__", None) in ours:
            del module.__dict__["forward"]
    if state.attention is not None:
        base.set_attn_implementation(state.attention)
    if state.experts is not None:
        base.set_experts_implementation(state.experts)
