"""Sampling on a CPU: the reference of sample_tokens, and a path that sums the vocabulary in blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._chip import cdiv
from ..records import Sampling

BLOCK = 128  # ids whose probabilities are summed before an id is looked for among them
NARROW = 1024  # ids; fewer are added up one by one
SMALL = 1e-30  # a temperature


# ---- reference


def sample_tokens_reference(
    logits: Tensor,
    noise: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (B, V)
    rules = Sampling.of(x.shape[1], temperature, top_k, top_p, min_p)
    width = rules.width(x.shape[1])
    order = x.sort(dim=-1, descending=True, stable=True).indices  # (B, V)
    if temperature == 0:
        token = order[:, :1]
        return token.squeeze(1), x.log_softmax(-1).gather(1, token).squeeze(1), None

    # the candidates, and which of them truncation drops
    u = (x - x.amax(-1, keepdim=True)) / temperature
    ids = torch.arange(x.shape[1], device=x.device).expand_as(x) if width is None else order[:, :width]
    candidates = u.gather(1, ids)
    dropped = torch.zeros_like(ids, dtype=torch.bool)
    if rules.top_p is not None:
        p = (u.softmax(-1).gather(1, ids) if rules.top_k is None else candidates.softmax(-1)).double()
        dropped |= p.cumsum(-1) - p >= rules.top_p  # where the ids before this one suffice
    if rules.min_p is not None:
        dropped |= (candidates - candidates[:, :1]).exp() < rules.min_p

    # the first at which the cumulative softmax passes the number
    logprobs = candidates.masked_fill(dropped, -torch.inf).log_softmax(-1)
    reached = logprobs.double().exp().cumsum(-1)
    passes = reached > noise[:, None] * reached[:, -1:]
    chosen = passes.int().argmax(-1, keepdim=True)
    token, logprob = (values.gather(1, chosen).squeeze(1) for values in (ids, logprobs))
    return token, logprob, None if width is None else ids.masked_fill(dropped, -1).int()


# ---- path


def sample_tokens_cpu(logits: Tensor, noise: Tensor, rules: Sampling) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, log-probabilities and supports. What to draw from is selected before anything is exponentiated."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
    temperature, top_k, top_p, min_p = rules
    if temperature == 0:
        highest, token = x.max(-1)  # the first
        return token, -(x - highest[:, None]).exp_().sum(-1).log(), None
    width = rules.width(x.shape[1])
    if width is None:
        if temperature < SMALL:  # a quotient of the logits themselves would overflow
            x = x - x.amax(-1, keepdim=True)
        return *_invert(x if temperature == 1 else x / temperature, noise), None

    candidates, ids = x.topk(width)  # (B, width), most likely first
    highest = candidates[:, :1]
    u = (candidates - highest) / temperature
    mass = u.exp()  # beside the most likely
    dropped = mass < (min_p or 0.0)
    if top_p is not None:
        among = mass if top_k is not None else (x - highest).div_(temperature).exp_()
        p = (mass / among.sum(-1, keepdim=True)).double()
        dropped |= p.cumsum(-1) - p >= top_p
    chosen, logprob = _invert(u.masked_fill(dropped, -torch.inf), noise)
    return ids.gather(1, chosen[:, None]).squeeze(1), logprob, ids.masked_fill(dropped, -1).int()


def _invert(u: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The id at which the cumulative softmax of u (B, V) passes the noise (B,), and log softmax there, both (B,).

    Looked for among the sums of blocks first, where u is wide: one pass over it instead of a cumulative sum of it.
    """
    (B, V), blocks = u.shape, cdiv(u.shape[1], BLOCK)
    p = u.softmax(-1)
    if V <= NARROW:
        reached = p.cumsum(-1, dtype=torch.float64)
        total = reached[:, -1:]
        chosen = torch.searchsorted(reached, noise[:, None] * total, right=True).clamp_(max=V - 1)
        return chosen.squeeze(1), (p.gather(1, chosen) / total).log().to(u.dtype).squeeze(1)

    p = (F.pad(p, (0, blocks * BLOCK - V)) if V % BLOCK else p).view(B, blocks, BLOCK)
    sums = p.sum(-1).double()  # (B, blocks)
    reached = sums.cumsum(-1)
    total = reached[:, -1:]
    target = noise[:, None] * total  # (B, 1)

    # the first that passes has a sum above 0; only NaN logits pass nowhere
    block = torch.searchsorted(reached, target, right=True).clamp_(max=blocks - 1)
    inside = p.gather(1, block[:, :, None].expand(B, 1, BLOCK)).squeeze(1).cumsum(-1, dtype=torch.float64)

    # the sums were rounded: as far inside of the block as of its sum, past the ids of probability 0 at its start
    remaining = (target - (reached - sums).gather(1, block)).clamp_(min=0)
    remaining *= inside[:, -1:] / sums.gather(1, block)
    remaining = torch.minimum(remaining, torch.nextafter(inside[:, -1:], torch.zeros_like(total)))
    chosen = block * BLOCK + torch.searchsorted(inside, remaining, right=True)
    chosen = chosen.clamp_(max=V - 1)  # (B, 1)
    logprob = (p.flatten(1).gather(1, chosen) / total).log()
    return chosen.squeeze(1), logprob.to(u.dtype).squeeze(1)
