"""Token log-probabilities in plain torch: from all logits under autograd, or block by block in one buffer."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._chip import without_autocast
from ..head.blocks import (
    block_of,
    blocks_of,
    buffer_of,
    bytes_of,
    chunk_of,
    exponential,
    locate,
    rows_of,
    scaled_,
    softcap_slope,
    unscaled_,
)
from ..head.inputs import HeadInputs, scaled_logits
from ..records import Head

COPIES = 3  # copies of a block in memory: the logits and two temporaries

Scores = tuple[Tensor, Tensor, Tensor]  # logprob, lse, entropy, (tokens,) each


# ---- from logits that autograd keeps


def score(u: Tensor, column: Tensor, trained: Tensor, kept: Tensor | None) -> Scores:
    """Return logprob, lse and entropy, (tokens,) each, from scaled logits u (tokens, N).

    column: (tokens,), the target's column.
    trained: (tokens,) bool. The other rows get 0.
    kept: (tokens, N) bool, the columns that the softmax runs over, or None for all.
    """
    if kept is not None:
        u = u.masked_fill(~kept, -torch.inf)
    lse = torch.logsumexp(u, -1)
    log_p = u - lse[:, None]
    p = log_p.exp()

    logprob = log_p.gather(1, column[:, None])[:, 0]
    entropy = -(p * (log_p if kept is None else log_p.masked_fill(~kept, 0))).sum(-1)  # 0 log 0 = 0
    return torch.where(trained, logprob, 0), torch.where(trained, lse, 0), torch.where(trained, entropy, 0)


@without_autocast
def score_logits(
    head: HeadInputs, temperature: float | Tensor, targets: Tensor, support: Tensor | None, ignore_index: int
) -> Scores:
    """Return logprob, lse and entropy from all logits. targets and support (tokens, K_max) hold vocabulary ids."""
    u, kept = scaled_logits(head, temperature), None
    if support is not None:
        (tokens, V), device = u.shape, u.device
        columns = torch.where(support < 0, V, support).long()  # padding goes to an additional column
        kept = torch.zeros(tokens, V + 1, dtype=torch.bool, device=device).scatter_(1, columns, True)[:, :-1]

    trained = targets != ignore_index
    return score(u, targets.masked_fill(~trained, 0).long(), trained, kept)


# ---- block by block


class RowTerms(NamedTuple):
    """Each row's terms of the gradient of its logits, (rows,) each.

    du_j = dlogprob [j = y] + p_j (dnorm - dentropy (log p_j + entropy))        log p_j = u_j - highest - log_sum
    """

    target: Tensor
    highest: Tensor
    log_sum: Tensor
    entropy: Tensor
    dlogprob: Tensor
    dnorm: Tensor  # dlse - dlogprob, because logprob = u_y - lse also contains the normaliser
    dentropy: Tensor | None


def summaries(head: Head, targets: Tensor, memory_budget: int, target_u: Tensor) -> Tensor:
    """Return parts (chunks, 3, tokens): highest, sum exp(u - highest), and sum exp(u - highest) (u - highest).

    highest is the highest logit of a row in a chunk of the vocabulary. target_u (tokens,) receives the logit of each
    target in the vocabulary.
    """
    row_blocks, chunks = blocks_of(head, memory_budget, bytes_of(head.hidden, COPIES))
    buffer = buffer_of(head.hidden, row_blocks, chunks)
    # made before the blocks: small tensors between the blocks would keep the blocks' memory from being reused
    parts = target_u.new_empty(len(chunks), 3, len(targets))

    for part, columns in zip(parts, chunks, strict=True):
        chunk = chunk_of(head, columns)
        for rows in row_blocks:
            block = rows_of(chunk, rows)
            z = torch.mm(block.hidden, block.weight.T, out=block_of(buffer, rows, len(block.weight)))
            u = scaled_(z, block)

            column, in_chunk = locate(targets[rows], columns.start, u.shape[1])
            target_u[rows] = torch.where(in_chunk, u.gather(1, column)[:, 0], target_u[rows])

            top, sum_exp, weighted = part[:, rows]
            u -= torch.amax(u, -1, out=top)[:, None]
            p = exponential(u)
            torch.sum(p, -1, out=sum_exp)
            torch.sum(p.mul_(u), -1, out=weighted)
    return parts


def dlogits(block: Head, terms: RowTerms, start: int, dz: Tensor, with_dbias: bool) -> Tensor:
    """Write dz (rows, N), the gradient of the logits of a block whose first column is `start`.

    Return its sum over the rows, or an empty tensor without `with_dbias`.
    """
    target, *columns, dentropy = terms
    highest, log_sum, entropy, dlogprob, dnorm = (x[:, None] for x in columns)
    u = scaled_(torch.mm(block.hidden, block.weight.T, out=dz), block)
    slope = softcap_slope(u, block)

    # log p. The sum highest + log_sum would be rounded at the size of the logits, an error of the whole row
    u.sub_(highest).sub_(log_sum)
    factor = dnorm
    if dentropy is not None:
        factor = dnorm - (u + entropy).mul_(dentropy[:, None])
    du = exponential(u, out=u).mul_(factor)

    # the target's own term
    column, in_chunk = locate(target, start, u.shape[1])
    du.scatter_add_(1, column, dlogprob * in_chunk[:, None])

    unscaled_(du, slope, block)
    return dz.sum(0) if with_dbias else dz.new_empty(0)
