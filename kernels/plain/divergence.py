"""Divergence of two heads in plain torch: the reference, the CPU path, and the merging of pieces for both paths.

Names are those of head/divergence.py. For the student and the teacher, u and t are the scaled logits, and log_p and
log_q the log-probabilities. p and q are the probabilities, or exp(u - top) and exp(t - teacher_top), where top and
teacher_top are the highest logits of a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._chip import without_autocast
from ..head.blocks import (
    block_of,
    buffer_of,
    chunk_of,
    exponential,
    rows_of,
    scaled_,
    softcap_slope,
    unscaled_,
)
from ..head.inputs import HeadInputs, divergence_of, scaled_logits
from ..records import Head

Blocks = tuple[list[slice], list[slice]]  # rows, columns
COPIES = 6  # copies of a block in memory: both logits and the temporaries of their difference

# ---- reference


def token_divergence_reference(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    beta: float = 0.0,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    teacher_lora_a: Tensor | None = None,
    teacher_lora_b: Tensor | None = None,
    teacher_scaling: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    student = HeadInputs(hidden, weight, bias, lora_a, lora_b, scaling, softcap)
    adapter = teacher_lora_a, teacher_lora_b, teacher_scaling
    teacher = HeadInputs(teacher_hidden, teacher_weight, teacher_bias, *adapter, teacher_softcap)
    return divergence_of_logits(student, teacher, temperature, beta, mask)


@without_autocast
def divergence_of_logits(
    student: HeadInputs, teacher: HeadInputs, temperature: float | Tensor, beta: float, mask: Tensor | None
) -> Tensor:
    """Compute the divergence (tokens,) from all logits of both heads. The teacher gets no gradient."""
    u = scaled_logits(student, temperature)
    with torch.no_grad():
        t = scaled_logits(teacher, temperature)
    divergence = divergence_of(torch.log_softmax(t, -1), torch.log_softmax(u, -1), beta)
    return divergence if mask is None else torch.where(mask, divergence, 0)


# ---- pieces of a row


class Piece(NamedTuple):
    """Sums over some columns of the logits. Every field has one number per row.

    With beta = 0, the teacher's t takes the place of u in sum_gap and gap_at_top.
    """

    sum_exp: Tensor  # sum exp(u - top)
    teacher_sum_exp: Tensor
    top: Tensor  # the highest u
    teacher_top: Tensor
    sum_gap: Tensor  # sum exp(u - top) (gap - gap_at_top)
    gap_at_top: Tensor  # the gap where u is highest


class Norms(NamedTuple):
    """Sums over all columns of the logits. Every field has one number per row. The backward needs no other sums."""

    top: Tensor
    # log sum exp(u - top). It is kept apart from top, because their sum would be rounded at the size of the logits
    log_sum: Tensor
    teacher_top: Tensor
    teacher_log_sum: Tensor
    mean_gap: Tensor  # the mean of gap - gap_at_top under p, or under q for beta = 0
    gap_at_top: Tensor


def merged(pieces: Tensor, beta: float) -> Tensor:
    """Merge the sums over the pieces of each row (Piece), (pieces, 6, rows), into Norms, (6, rows)."""
    piece = Piece(*pieces.unbind(1))  # (pieces, rows) each
    (top, at), (teacher_top, teacher_at) = piece.top.max(0), piece.teacher_top.max(0)

    # sums relative to the tops of their pieces become relative to the top of the row
    shrink, teacher_shrink = (piece.top - top).exp(), (piece.teacher_top - teacher_top).exp()
    sum_exp, teacher_sum_exp = shrink * piece.sum_exp, teacher_shrink * piece.teacher_sum_exp
    log_sum, teacher_log_sum = sum_exp.sum(0).log(), teacher_sum_exp.sum(0).log()

    # likewise, the gaps become relative to the gap at the row's top
    if beta == 0:
        at, shrink, sum_exp = teacher_at, teacher_shrink, teacher_sum_exp
    gap_at_top = piece.gap_at_top.gather(0, at[None])[0]
    sum_gap = shrink * piece.sum_gap + (piece.gap_at_top - gap_at_top) * sum_exp
    mean_gap = sum_gap.sum(0) / sum_exp.sum(0)
    return torch.stack(Norms(top, log_sum, teacher_top, teacher_log_sum, mean_gap, gap_at_top))


def to_mixture(log_ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Compute log p_S - log m and log p_T - log m for the mixture m = beta p_T + (1 - beta) p_S.

    log_ratio: log p_T - log p_S. It is overwritten.
    """
    larger = log_ratio.clamp(min=0)
    log_ratio -= larger
    smaller = -larger
    log_rest = exponential(log_ratio).mul_(beta)
    log_rest.add_(exponential(smaller, out=smaller), alpha=1 - beta).log_()
    return larger.add_(log_rest).neg_(), log_ratio.sub_(log_rest)


# ---- blocks on a CPU


def summarise(student: Head, teacher: Head, beta: float, blocks: Blocks, logits: Tensor | None) -> Tensor:
    """Return the six sums of Piece for each chunk of the vocabulary and each row, (chunks, 6, rows).

    logits: for a mixture, a buffer (2, rows, V) into which the logits of both heads are written. It is None for a KL.
    """
    row_blocks, chunks = blocks
    buffers = [] if logits is not None else [buffer_of(x.hidden, *blocks) for x in (student, teacher)]
    # made before the blocks: small tensors between the blocks would keep the blocks' memory from being reused
    pieces = student.hidden.new_empty(len(chunks), 6, len(student.hidden))

    for i, columns in enumerate(chunks):
        chunk, teacher_chunk = chunk_of(student, columns), chunk_of(teacher, columns)
        for rows in row_blocks:
            if logits is None:
                outs = [block_of(x, rows, columns.stop - columns.start) for x in buffers]
            else:
                outs = logits[:, rows, columns]
            u, t = _scaled_products(rows_of(chunk, rows), rows_of(teacher_chunk, rows), *outs)
            _summarise_block(u, t, beta, Piece(*pieces[i, :, rows]))
    return pieces


def _scaled_products(student: Head, teacher: Head, out: Tensor, teacher_out: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the scaled logits (rows, columns) of a block in two buffers: u of the student and t of the teacher."""
    u = scaled_(torch.mm(student.hidden, student.weight.T, out=out), student)
    return u, scaled_(torch.mm(teacher.hidden, teacher.weight.T, out=teacher_out), teacher)


def _summarise_block(u: Tensor, t: Tensor, beta: float, piece: Piece) -> None:
    """Write the sums over a block's logits u and t into `piece`.

    u and t are overwritten, except for a mixture. A mixture's gaps are not summed here, because m is known only
    after the sums of the whole row.
    """
    mixture = 0 < beta < 1
    gap = t - u
    at = torch.max(u if beta > 0 else t, -1)[1][:, None]
    piece.gap_at_top.copy_(gap.gather(1, at)[:, 0])
    torch.amax(u, -1, out=piece.top)
    torch.amax(t, -1, out=piece.teacher_top)

    p = torch.sub(u, piece.top[:, None], out=None if mixture else u)
    q = torch.sub(t, piece.teacher_top[:, None], out=None if mixture else t)
    torch.sum(exponential(p, out=p), -1, out=piece.sum_exp)
    torch.sum(exponential(q, out=q), -1, out=piece.teacher_sum_exp)
    if mixture:
        piece.sum_gap.zero_()
    else:
        gap_beyond = gap.sub_(piece.gap_at_top[:, None])
        torch.sum(gap_beyond.mul_(p if beta > 0 else q), -1, out=piece.sum_gap)


def _log_probabilities(
    u: Tensor, t: Tensor, norms: Norms, out: Tensor, teacher_out: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute log_p and log_q from the scaled logits u and t.

    The fields top and log_sum of Norms are subtracted one after the other, because their sum would be rounded.
    """
    log_p = torch.sub(u, norms.top[:, None], out=out).sub_(norms.log_sum[:, None])
    log_q = torch.sub(t, norms.teacher_top[:, None], out=teacher_out).sub_(norms.teacher_log_sum[:, None])
    return log_p, log_q


def mixture_sums(logits: Tensor, norms: Tensor, beta: float, blocks: Blocks) -> Tensor:
    """Return the sums over the vocabulary of p gap_beyond and of q teacher_gap for each row, (2, rows).

    The formulas in head/mixture.py define both terms. logits: (2, rows, V), of student and teacher. norms: the fields
    of Norms, (6, rows). blocks: slices of rows and columns.
    """
    u, t = logits
    sums = norms.new_zeros(2, len(u))
    for rows, columns in [(rows, columns) for columns in blocks[1] for rows in blocks[0]]:
        block = u[rows, columns], t[rows, columns]
        row = Norms(*norms[:, rows])
        log_p, log_q = _log_probabilities(*block, row, *map(torch.empty_like, block))

        gap, teacher_gap = to_mixture(log_q - log_p, beta)
        gap_beyond = gap.sub_(row.gap_at_top[:, None])
        sums[0, rows] += exponential(log_p, out=log_p).mul_(gap_beyond).sum(-1)
        sums[1, rows] += exponential(log_q, out=log_q).mul_(teacher_gap).sum(-1)
    return sums


class Upstream(NamedTuple):
    """Each row's terms of the gradient: its Norms, and the gradient of the loss with respect to the divergence D."""

    norms: Tensor  # Norms (6, rows)
    gain: Tensor  # (rows,): the loss's gradient with respect to D, times 1 - beta for a mixture
    beta: float


def dlogits(
    student: Head, teacher: Head, upstream: Upstream, dz: Tensor, teacher_out: Tensor, with_dbias: bool
) -> Tensor:
    """Write dz (rows, columns), the gradient of a block's logits.

    Return its sum over the rows, or an empty tensor without `with_dbias`. teacher_out: a buffer for t (rows, columns).
    """
    beta, norms = upstream.beta, Norms(*upstream.norms)
    u, t = _scaled_products(student, teacher, dz, teacher_out)
    slope = softcap_slope(u, student)
    mean_gap, gap_at_top = norms.mean_gap[:, None], norms.gap_at_top[:, None]

    # u and t are overwritten below, so the gap of the reverse KL is computed first
    gap_beyond = (t - u).sub_(gap_at_top) if beta == 1 else None
    log_p, log_q = _log_probabilities(u, t, norms, u, t)
    if beta == 0:
        du = exponential(log_p, out=log_p).sub_(exponential(log_q, out=log_q))
    elif gap_beyond is not None:
        du = exponential(log_p, out=log_p).mul_(gap_beyond.neg_().add_(mean_gap))
    else:
        gap, _ = to_mixture(log_q.sub_(log_p), beta)
        du = exponential(log_p, out=log_p).mul_(gap.sub_(gap_at_top).sub_(mean_gap))

    unscaled_(du.mul_(upstream.gain[:, None]), slope, student)
    return dz.sum(0) if with_dbias else dz.new_empty(0)
