"""The language head, from hidden states to logits, and the ops computed with it.

    logits = hidden (weight + scaling lora_b lora_a)^T          hidden (n, C), weight (V, C)

Training never holds the logits. It does not hold the sum of weight and adapter either, except with DoRA (`operands`).
`Transformer.before_head` returns the hidden states and the `Head`, whose methods are the ops on these two. For
sampling, `full_logits` computes the logits of a few rows.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import lora_linear, token_divergence, token_logprobs, topk_divergence, topk_logprobs
from ..kernels._chip import autocast_dtype
from ..kernels.head.blocks import logits_of
from ..kernels.head.inputs import low_rank
from .linear import Linear, whole
from .vocabulary import Vocabulary


@dataclass(frozen=True)
class Head:
    """The weight of a language head and, if it has an adapter, the adapter's low-rank factors.

    Autocast does not cast the inputs of the ops used here. So the methods turn it off, and the caller casts `hidden`
    and `weight` to the dtype in which they are multiplied.
    """

    weight: Tensor  # (V, C)
    lora_a: Tensor | None = None  # (R, C)
    lora_b: Tensor | None = None  # (V, R)
    scaling: float = 1.0

    @property
    def size(self) -> int:
        """The vocabulary size V."""
        return len(self.weight)

    def to(self, dtype: torch.dtype) -> "Head":
        """Return the head with its weight in this dtype. An adapter keeps its own dtype."""
        return replace(self, weight=self.weight.to(dtype))

    def among(self, vocabulary: Vocabulary | None) -> "Head":
        """Return the head with only the rows of these ids, in the order of `Vocabulary.rows_of`. None keeps all."""
        tokens = None if vocabulary is None else vocabulary.within(self.size)
        if tokens is None:  # all rows: a slice would have a gradient that is a needless copy
            return self
        lora_b = None if self.lora_b is None else tokens.select(self.lora_b)
        return replace(self, weight=tokens.select(self.weight), lora_b=lora_b)

    def token_logprobs(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        temperature: float | Tensor = 1.0,
        support: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (logprob, lse, entropy), each (n,), of the targets (n,) that follow hidden (n, C).

        It calls `kernels.token_logprobs`.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return token_logprobs(
                hidden,
                self.weight,
                targets,
                lora_a=self.lora_a,
                lora_b=self.lora_b,
                scaling=self.scaling,
                temperature=temperature,
                support=support,
            )

    def token_divergence(
        self,
        hidden: Tensor,
        teacher_hidden: Tensor,
        teacher: "Head",
        *,
        beta: float = 0.0,
        temperature: float | Tensor = 1.0,
    ) -> Tensor:
        """Compute the divergence (n,), in nats, from a teacher's hidden states (n, C') and head.

        It calls `kernels.token_divergence`.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return token_divergence(
                hidden,
                self.weight,
                teacher_hidden,
                teacher.weight,
                beta=beta,
                temperature=temperature,
                lora_a=self.lora_a,
                lora_b=self.lora_b,
                scaling=self.scaling,
                teacher_lora_a=teacher.lora_a,
                teacher_lora_b=teacher.lora_b,
                teacher_scaling=teacher.scaling,
            )

    def topk_divergence(
        self,
        hidden: Tensor,
        teacher_ids: Tensor,
        teacher_logprobs: Tensor,
        *,
        beta: float = 0.0,
        temperature: float | Tensor = 1.0,
    ) -> Tensor:
        """Compute the divergence (n,), in nats, from a teacher's stored ids and log-probabilities (n, K).

        It calls `kernels.topk_divergence`.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return topk_divergence(
                hidden,
                self.weight,
                teacher_ids,
                teacher_logprobs,
                beta=beta,
                temperature=temperature,
                lora_a=self.lora_a,
                lora_b=self.lora_b,
                scaling=self.scaling,
            )

    def topk_logprobs(
        self, hidden: Tensor, k: int, *, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return the k most likely rows of the head and their log-probabilities, (n, k) each, without a gradient.

        It calls `kernels.topk_logprobs`.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return topk_logprobs(
                hidden,
                self.weight,
                k,
                lora_a=self.lora_a,
                lora_b=self.lora_b,
                scaling=self.scaling,
                temperature=temperature,
            )


def operands(layer: Linear, x: Tensor) -> tuple[Tensor, Head]:
    """Return x (n, C) and the layer as the two operands of a product, without adding the adapter to the weight.

    With DoRA the adapter is added, because DoRA scales the sum. With adapter dropout x becomes wider, (n, C + R),
    because only the adapter's part of x has dropout.
    """
    lora = layer.lora
    if lora is None or not lora.enabled:
        return x, Head(layer.merged())
    if layer.dropout:
        x, weight = layer.as_one_product(x)  # (n, C + R), (V, C + R)
        return x, Head(weight)
    if lora.magnitude is not None:
        return x, Head(layer.merged())
    return x, Head(whole(layer.dense()), whole(lora.a), whole(lora.b), lora.scaling)


def full_logits(hidden: Tensor, layer: Linear | None, embedding: Tensor) -> Tensor:
    """Compute the logits (..., V) of hidden (..., C), in fp32 (fp64 for fp64).

    layer: the head, or None if the embedding (V, C) is the head. An adapter is applied beside the weight, without its
    dropout, because merging would cost a product for every token. Without gradients a head in half precision is not
    copied, except with DoRA.
    """
    lora = None if layer is None else layer.lora
    lora = lora if lora is not None and lora.enabled else None
    weight = embedding if layer is None else whole(layer.dense())
    hidden = hidden.to(autocast_dtype(hidden))
    dora = lora is not None and lora.magnitude is not None

    with torch.autocast(hidden.device.type, enabled=False):
        # block by block, without a copy of the head
        if hidden.itemsize == 2 and not torch.is_grad_enabled() and not dora:
            x = hidden.flatten(0, -2) if hidden.dim() > 1 else hidden[None]  # (n, C)
            adapter = () if lora is None else (low_rank(x, whole(lora.a), lora.scaling), whole(lora.b))
            return logits_of(x, weight, *adapter).view(*hidden.shape[:-1], len(weight))

        # operands rounded as in `score`, then one product in full precision
        wide = torch.promote_types(hidden.dtype, torch.float32)
        hidden, weight = hidden.to(wide), weight.to(hidden.dtype).to(wide)
        if lora is None:
            return F.linear(hidden, weight)
        magnitude = None if lora.magnitude is None else whole(lora.magnitude)
        return lora_linear(hidden, weight, whole(lora.a), whole(lora.b), lora.scaling, magnitude=magnitude)
