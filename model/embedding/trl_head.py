"""TRL's head with token_logprobs: **TRL's own bytecode runs, with two of its globals exchanged**.

TRL's trainers put a forward on their model, `_fused_forward` of trl.trainer.utils.add_fused_lm_head. They call it with
fused_lm_head=True to get per-token values instead of logits. The code around the head is to stay TRL's: shifts, masks,
FSDP2's shards, the balance loss. But that forward is a closure, made anew for each model, and takes no function as an
argument. So no part of it can be subclassed or registered. Rewritten here, it would be a copy that goes out of date.
Setting the names in trl.trainer.utils would change every model of the process.

So `fused_forward` makes a second function of the same code object, closure and defaults. Its globals are a copy of
TRL's in which two names are ours:

    _ChunkedLogProbFunction     TRL's autograd.Function     ->  TokenLogprobs, whose `apply` calls token_logprobs
    _use_triton                 is this a GPU of Triton's?  ->  always yes: then TRL scores the trained rows alone

TRL's module, and the function that it has put on the model, stay as they were. This relies on

    the name `_fused_forward`, by which TRL's forward is recognised
    both names being globals of that code: checked, and InputError names a missing one
    the order of the nine arguments of `_ChunkedLogProbFunction.apply` and of its five results: TokenLogprobs
    the order of the forwards, ours around TRL's or inside it: HandOver

tests/embed/test_trl.py tests all of it, value by value.

Source: trl 1.16.0, trl/trainer/utils.py and trl/kernels/chunked_logprob.py
"""

import functools
import math
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .operands import score

FUSED = "burnish_head"  # the keyword by which HandOver passes TRL's forward to ours
LOGITS_AT_A_TIME = 1 << 22  # logits in memory when TRL asks for the most likely token


def fused_forward(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return TRL's forward with token_logprobs in place of TRL's own function, or None if `forward` is not TRL's.

    Raises InputError if it is the forward of another version of TRL.
    """
    code = getattr(forward, "__code__", None)
    if code is None or code.co_name != "_fused_forward":
        return None
    missing = {"_ChunkedLogProbFunction", "_use_triton"} - set(code.co_names)
    if missing:
        raise InputError(
            f"trl: expected the head of version 1.16, got one without {', '.join(sorted(missing))}"
        )

    # TRL's code, closure and defaults; a copy of its globals with two names exchanged
    ours = {"_ChunkedLogProbFunction": TokenLogprobs, "_use_triton": lambda device: True}
    again = types.FunctionType(
        code, forward.__globals__ | ours, code.co_name, forward.__defaults__, forward.__closure__
    )
    again.__kwdefaults__ = forward.__kwdefaults__
    return again


class HandOver:
    """A forward pre-hook for models on which TRL's forward wraps ours.

    It makes TRL's forward pass the call on to ours, together with the function that computes TRL's per-token values.
    accelerate may wrap TRL's forward once more, so the hook follows `__wrapped__`.
    """

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        forward = module.forward if kwargs.get("fused_lm_head") else None
        while forward is not None:
            forward = getattr(forward, "__func__", forward)
            fused = fused_forward(forward)
            if fused is not None:
                asked = functools.partial(fused, fused_lm_head=True)
                return args, {**kwargs, "fused_lm_head": False, FUSED: asked}
            forward = getattr(forward, "__wrapped__", None)
        return args, kwargs

    def __reduce__(self) -> Any:  # it is pickled as a method of the standard library that does nothing
        return getattr, (nullcontext(), "__exit__")

    def __deepcopy__(self, memo: dict[int, Any]) -> "HandOver":
        return self


class TokenLogprobs:
    """token_logprobs with the calling convention of trl.kernels.ChunkedLogProbFunction."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *more: Any
    ) -> tuple[Tensor | None, ...]:
        """Return (log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1), each (N,).

        hidden is (N, C), weight (V, C), targets (N,). The last three results have no gradient.
        more: temperature, chunk_size (ignored), softcap, logit_scale, and outputs, the names of the wanted results.
        Apart from log_probs, a result that `outputs` does not name is None.
        Raises InputError for logits that are scaled or capped.
        """
        temperature, _, softcap, logit_scale, outputs = more
        if softcap is not None or logit_scale != 1:
            raise InputError(f"lm_head: expected plain logits, got softcap={softcap}, scale={logit_scale}")
        operands = {"weight": weight, "bias": bias}
        logprob, lse, entropy = score(hidden, targets, operands, temperature=temperature)

        squares = mean = top = None
        with torch.no_grad():
            if "log_sum_sq_probs" in outputs:  # sum p^2 = sum exp(2 u) / exp(2 lse)
                squares = score(hidden, targets, operands, temperature=temperature / 2)[1] - 2 * lse
            if "mean_logits" in outputs:  # the mean of products is the product with the mean
                mean = hidden.float() @ weight.float().mean(0) + (0 if bias is None else bias.float().mean())
                mean = mean / temperature
            if "is_top1" in outputs:
                top = _is_top(hidden, weight, bias, targets, logprob)
        return logprob, entropy if "entropy" in outputs else None, squares, mean, top


def _is_top(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logprob: Tensor) -> Tensor:
    """Return (N,) bool: whether the target is the most likely token.

    A probability above 0.5 settles it. Otherwise the row of logits is computed and compared.
    """
    top = logprob > math.log(0.5)
    rows = (~top).nonzero()[:, 0]
    for some in rows.split(max(1, LOGITS_AT_A_TIME // weight.shape[0])):
        top[some] = F.linear(hidden[some], weight, bias).argmax(-1) == targets[some]
    return top
