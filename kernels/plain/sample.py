"""Sampling on a CPU: the reference of sample_tokens, and a path that sums the vocabulary in blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._chip import cdiv
from ..records import Sampling

BLOCK = 128  # ids in a block, whose sums are searched before an id is searched in one block
NARROW = 1024  # up to this many ids, one cumulative sum over all of them is used
SMALL = 1e-30  # below this temperature, the highest logit is subtracted before the division


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

    # the candidates, and the flags of those that truncation drops
    u = (x - x.amax(-1, keepdim=True)) / temperature
    ids = torch.arange(x.shape[1], device=x.device).expand_as(x) if width is None else order[:, :width]
    candidates = u.gather(1, ids)
    dropped = torch.zeros_like(ids, dtype=torch.bool)
    if rules.top_p is not None:
        p = (u.softmax(-1).gather(1, ids) if rules.top_k is None else candidates.softmax(-1)).double()
        dropped |= p.cumsum(-1) - p >= rules.top_p  # if the ids before it suffice
    if rules.min_p is not None:
        dropped |= (candidates - candidates[:, :1]).exp() < rules.min_p

    # the first id at which the cumulative softmax passes the noise
    logprobs = candidates.masked_fill(dropped, -torch.inf).log_softmax(-1)
    reached = logprobs.double().exp().cumsum(-1)
    passes = reached > noise[:, None] * reached[:, -1:]
    chosen = passes.int().argmax(-1, keepdim=True)
    token, logprob = (values.gather(1, chosen).squeeze(1) for values in (ids, logprobs))
    return token, logprob, None if width is None else ids.masked_fill(dropped, -1).int()


# ---- path


def sample_tokens_cpu(logits: Tensor, noise: Tensor, rules: Sampling) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return tokens, log-probabilities and supports. Candidates are selected before anything is exponentiated.

    The support is None if nothing is truncated.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
    temperature, top_k, top_p, min_p = rules
    if temperature == 0:
        highest, token = x.max(-1)  # the first of equal logits
        return token, -(x - highest[:, None]).exp_().sum(-1).log(), None
    width = rules.width(x.shape[1])
    if width is None:
        if temperature < SMALL:  # the logits divided by it would overflow
            x = x - x.amax(-1, keepdim=True)
        return *_invert(x if temperature == 1 else x / temperature, noise), None

    candidates, ids = x.topk(width)  # (B, width), most likely first
    highest = candidates[:, :1]
    u = (candidates - highest) / temperature
    mass = u.exp()  # relative to the most likely id
    dropped = mass < (min_p or 0.0)
    if top_p is not None:
        among = mass if top_k is not None else (x - highest).div_(temperature).exp_()
        p = (mass / among.sum(-1, keepdim=True)).double()
        dropped |= p.cumsum(-1) - p >= top_p
    chosen, logprob = _invert(u.masked_fill(dropped, -torch.inf), noise)
    return ids.gather(1, chosen[:, None]).squeeze(1), logprob, ids.masked_fill(dropped, -1).int()


def _invert(u: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draw an id from each row of logits: the first at which the cumulative softmax exceeds the row's random number.

    u: logits (B, V). noise: random numbers in [0, 1), (B,). Returns (id, logprob), both (B,).
    A large vocabulary is summed in blocks. The search finds a block first and then an id in it, which avoids a
    cumulative sum over all of u.
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

    # the first block that passes has a sum above 0; only with NaN logits no block passes
    block = torch.searchsorted(reached, target, right=True).clamp_(max=blocks - 1)
    inside = p.gather(1, block[:, :, None].expand(B, 1, BLOCK)).squeeze(1).cumsum(-1, dtype=torch.float64)

    # The sums were rounded, so the rest is scaled to the sum inside the block. The search passes ids of probability 0
    # at the block's start
    remaining = (target - (reached - sums).gather(1, block)).clamp_(min=0)
    remaining *= inside[:, -1:] / sums.gather(1, block)
    remaining = torch.minimum(remaining, torch.nextafter(inside[:, -1:], torch.zeros_like(total)))
    chosen = block * BLOCK + torch.searchsorted(inside, remaining, right=True)
    chosen = chosen.clamp_(max=V - 1)  # (B, 1)
    logprob = (p.flatten(1).gather(1, chosen) / total).log()
    return chosen.squeeze(1), logprob.to(u.dtype).squeeze(1)
