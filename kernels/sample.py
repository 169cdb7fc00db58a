"""Draw a token from each row of logits: softmax, truncation and the draw in one op. No gradient.

    u = logits / temperature, on the support: all ids, or the top_k most likely, and of these the fewest whose
        probability reaches top_p, less those below min_p times the most likely one's
    token: the first id, in the support's order, at which the cumulative softmax of u passes a number in [0, 1)
    logprob = log softmax(u) there, of the distribution that was sampled

The order is that of the ids without truncation; with it the most likely id comes first, and of equally likely ones the
lower. A support is recorded, so it has a bound: top_p and min_p without top_k choose among the 1,024 most likely ids,
where top_p's probabilities are of the whole vocabulary; after top_k they are of what it left. Temperature 0 is the most
likely id, with its log-probability at temperature 1.

    p            0.05 0.4 0.3 0.15 0.1        top_p=0.8: 0.4 + 0.3 + 0.15 is the first sum to reach it
    support      1 2 3 -1 -1                  number 0.6: 0.4 / 0.85 < 0.6 < 0.7 / 0.85, so token 2

Memory, in elements: eager code reads and writes B V about ten times, where it sorts the vocabulary twenty.

Source: the definitions of top-k, top-p and min-p: Fan et al. 2018, https://arxiv.org/abs/1805.04833, Holtzman et al.
2019, https://arxiv.org/abs/1904.09751, Nguyen et al. 2024, https://arxiv.org/abs/2407.01082
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import check_dtype, check_shape

TOP_P_WIDTH = 1024  # ids that top_p and min_p choose among without top_k

# ---- reference


def _width(
    V: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> int | None:
    """How many ids a support has room for; None where nothing is truncated."""
    if temperature == 0 or (top_k is None and top_p is None and min_p is None):
        return None
    return min(top_k or TOP_P_WIDTH, V)


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
    top_k, top_p, min_p = _meant(x.shape[1], top_k, top_p, min_p)
    width = _width(x.shape[1], temperature, top_k, top_p, min_p)
    order = x.sort(dim=-1, descending=True, stable=True).indices  # (B, V)
    if temperature == 0:
        token = order[:, :1]
        return token.squeeze(1), x.log_softmax(-1).gather(1, token).squeeze(1), None
    u = x / temperature
    ids = torch.arange(x.shape[1], device=x.device).expand_as(x) if width is None else order[:, :width]
    kept = u.gather(1, ids)
    dropped = torch.zeros_like(ids, dtype=torch.bool)
    if top_p is not None:
        p = (u.softmax(-1).gather(1, ids) if top_k is None else kept.softmax(-1)).double()
        dropped |= p.cumsum(-1) - p >= top_p  # where the ids before this one suffice
    if min_p is not None:
        dropped |= (kept - kept[:, :1]).exp() < min_p
    logprobs = kept.masked_fill(dropped, -torch.inf).log_softmax(-1)
    reached = logprobs.double().exp().cumsum(-1)
    passes = reached > noise[:, None] * reached[:, -1:]
    chosen = passes.int().argmax(-1, keepdim=True)  # the first
    token, logprob = (values.gather(1, chosen).squeeze(1) for values in (ids, logprobs))
    return token, logprob, None if width is None else ids.masked_fill(dropped, -1).int()


# ---- kernels

BLOCK = 128  # on a CPU: ids whose probabilities are summed before an id is looked for among them


def _sample_cpu(
    logits: Tensor,
    noise: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What to draw from is selected before anything is exponentiated."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
    if temperature == 0:
        top, token = x.max(-1)  # the first
        return token, -(x - top[:, None]).logsumexp(-1), None
    width = _width(x.shape[1], temperature, top_k, top_p, min_p)
    if width is None:
        return *_invert(x if temperature == 1 else x / temperature, noise), None
    most, ids = x.topk(width)  # (B, width), most likely first
    u, support = most / temperature, ids.int()
    if top_p is not None:
        p = ((x / temperature).softmax(-1).gather(1, ids) if top_k is None else u.softmax(-1)).double()
        dropped = p.cumsum(-1) - p >= top_p
        u, support = u.masked_fill(dropped, -torch.inf), support.masked_fill(dropped, -1)
    if min_p is not None:
        dropped = (u - u[:, :1]).exp() < min_p
        u, support = u.masked_fill(dropped, -torch.inf), support.masked_fill(dropped, -1)
    chosen, logprob = _invert(u, noise)
    return ids.gather(1, chosen[:, None]).squeeze(1), logprob, support


def _invert(u: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative softmax of u (B, V) passes the noise (B,), and log softmax there, both (B,).

    Looked for among the sums of blocks first: one pass over u instead of a cumulative sum of it.
    """
    (B, V), blocks = u.shape, -(-u.shape[1] // BLOCK)
    p = u.softmax(-1)
    p = (F.pad(p, (0, blocks * BLOCK - V)) if V % BLOCK else p).view(B, blocks, BLOCK)
    sums = p.sum(-1).double()  # (B, blocks)
    reached = sums.cumsum(-1)
    total = reached[:, -1:]
    target = noise[:, None] * total  # (B, 1)
    # the first that passes has a sum above 0; only NaN logits pass nowhere
    block = torch.searchsorted(reached, target, right=True).clamp_(max=blocks - 1)
    inside = p.gather(1, block[:, :, None].expand(B, 1, BLOCK)).squeeze(1).cumsum(-1, dtype=torch.float64)
    # the sums were rounded: inside of the block, and past the ids of probability 0 with which it begins
    rest = (target - (reached - sums).gather(1, block)).clamp_(min=0)
    rest = torch.minimum(rest, torch.nextafter(inside[:, -1:], torch.zeros_like(total)))
    chosen = block * BLOCK + torch.searchsorted(inside, rest, right=True)
    chosen = chosen.clamp_(max=V - 1)  # (B, 1)
    logprob = (p.flatten(1).gather(1, chosen) / total).log()
    return chosen.squeeze(1), logprob.to(u.dtype).squeeze(1)


# ---- autograd


# ---- public op


def _meant(
    V: int, top_k: int | None, top_p: float | None, min_p: float | None
) -> tuple[int | None, float | None, float | None]:
    """None for what truncates nothing."""
    return None if top_k is None or top_k >= V else top_k, None if top_p == 1 else top_p, min_p or None


def sample_tokens(
    logits: Tensor,
    noise: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A token for each row, its log-probability, and the ids that it was drawn from.

    logits: (B, V), V at least 1. An id at -inf is never drawn; a row with NaN gives some id of the vocabulary.
    noise: (B,) fp64 in [0, 1): the same number draws the same token.
    temperature: 0 is the most likely id, the lowest where several are, at temperature 1 and without a support.
    top_k: keep as many ids; V and more keep all.    top_p: in (0, 1].    min_p: in [0, 1].

    Returns token (B,) int64; logprob (B,) in nats, fp32 (fp64 for fp64); support (B, width) int32, most likely first,
        padded with -1, width the smaller of V and top_k (1,024 without top_k), or None where nothing is truncated.
    Of ids that tie at the end of the top_k on a CPU any may be kept, and those that tie may stand in any order.
    Raises ValueError for shapes, dtypes and numbers other than these, NotImplementedError where a gradient is asked.
    """
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits: expected (B, V) with V at least 1, got {tuple(logits.shape)}")
    check_dtype("logits", logits, torch.float32, torch.float16, torch.bfloat16, torch.float64)
    check_shape("noise", noise, B=logits.shape[0])
    check_dtype("noise", noise, torch.float64)
    if not temperature >= 0:
        raise ValueError(f"temperature: expected at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p: expected a number in [0, 1], got {min_p}")
    if torch.is_grad_enabled() and logits.requires_grad:
        raise NotImplementedError(
            "sample_tokens: has no gradient; call it under torch.no_grad(), train through token_logprobs"
        )
    return _sample_cpu(logits, noise, temperature, *_meant(logits.shape[1], top_k, top_p, min_p))
