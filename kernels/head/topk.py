"""A teacher's distribution in a few numbers, its k most likely ids for each token, and a student's divergence from it.

    ids, log p_T(ids) = the k largest of log softmax(softcap(hidden W^T + bias) / temperature)

    L = listed ids        p_S(id) = exp(u_id) / Z        p_S(tail) = sum over ids not in L of exp(u_j) / Z
                          p_T(id), stored                p_T(tail) = 1 - sum over L of p_T(id)

The divergence is D(p_T, p_S) of divergence.py over these K + 1 buckets: all other ids form one bucket, the tail.
Without the tail the sums would not run over a distribution. Such a sum can be negative, and clamping it kills the
gradient. With the tail D is a divergence. It is never above the divergence over the whole vocabulary (data
processing), and 0 if all buckets agree.

    rest = log sum_{j not in L} exp(u_j)       log p_S = log softmax([u_L, rest])
    du_j = g_u of its bucket for j in L, g_rest exp(u_j - rest) otherwise

rest is summed directly over the other ids, because log(Z - sum over L) would lose all digits for a confident student.
p_T(tail) is at least 2^-24, the resolution of stored fp32 numbers. There is no tail if L is the whole vocabulary.

Memory, in elements: eager code writes (tokens, V) logits, their logarithms and the gradient: about 8 tokens V. Here a
chunk of the vocabulary at a time is written, because selecting ids needs it, and read 3 times. torch does that on every
device, and a kernel would gain nothing. dW of a chunk is one product, in fp32.

Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._chip import check_device, check_shape, readable, whole_number, without_autocast
from .._op import like_saved, make_op
from ..records import Head
from .blocks import (
    HeadGradients,
    block_of,
    blocks_of,
    buffer_of,
    chunk_of,
    exponential,
    head_gradients,
    product,
    rows_of,
    scaled_,
    softcap_slope,
    unscaled_,
    with_operand,
)
from .inputs import (
    HeadInputs,
    cast,
    check_budget,
    check_heads,
    check_ids,
    check_mask,
    check_rows,
    checked_temperature,
    divergence_of,
    head_of,
    logits_fit,
    scaled_logits,
)

COPIES = 4  # copies of a block in memory: the logits and temporaries
NOTHING = -1e30  # the log-probability of a bucket that does not exist; finite, so that 0 times it is 0
LEAST = 2.0**-24  # the least probability of a teacher's tail
SLACK = 0.05  # how far a sum of probabilities may exceed 1, if their logarithms were rounded to bf16

# ---- reference


@without_autocast
def topk_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    u = scaled_logits(HeadInputs(hidden, weight, bias, lora_a, lora_b, scaling, softcap), temperature)
    logprobs, ids = torch.log_softmax(u, -1).topk(k, -1)
    return ids.int(), logprobs


def topk_divergence_reference(
    hidden: Tensor,
    weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    beta: float = 0.0,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    student = HeadInputs(hidden, weight, bias, lora_a, lora_b, scaling, softcap)
    return _of_logits(student, _Listed(teacher_ids, teacher_logprobs), temperature, beta, mask)


class _Listed(NamedTuple):
    """A teacher's most likely ids, padded with -1, and their log-probabilities."""

    ids: Tensor  # (tokens, K)
    logprobs: Tensor  # (tokens, K)


@without_autocast
def _of_logits(
    student: HeadInputs, teacher: _Listed, temperature: float | Tensor, beta: float, mask: Tensor | None
) -> Tensor:
    """Compute the divergence from all of the student's logits."""
    u, ids = scaled_logits(student, temperature), teacher.ids
    V = u.shape[1]
    columns = torch.where(ids < 0, V, ids).long()  # padding goes to an additional column
    listed = torch.zeros(u.shape[0], V + 1, dtype=torch.bool, device=u.device).scatter_(1, columns, True)
    rest = torch.logsumexp(u.masked_fill(listed[:, :-1], NOTHING), -1)
    student_buckets = _Buckets(u.gather(1, ids.clamp(min=0).long()), rest)
    return _over_buckets(student_buckets, teacher, V, beta, mask)


class _Buckets(NamedTuple):
    """A student's logits of the listed ids, and the log-sum-exp of all other logits.

    All logits of a row may be shifted by the same number, which does not change a softmax over them.
    """

    u: Tensor  # (tokens, K)
    rest: Tensor  # (tokens,)


def _over_buckets(
    student: _Buckets, teacher: _Listed, vocabulary: int, beta: float, mask: Tensor | None
) -> Tensor:
    """Compute the divergence (tokens,) over the listed ids and one more bucket for all other ids."""
    u, rest = student
    padding = teacher.ids < 0
    whole = (~padding).sum(-1) == vocabulary  # (tokens,): all ids are listed

    log_t = teacher.logprobs.detach().to(u.dtype).masked_fill(padding, NOTHING)  # (tokens, K)
    tail = (1 - log_t.exp().sum(-1)).clamp(min=LEAST).log().masked_fill(whole, NOTHING)
    log_t = torch.log_softmax(torch.cat((log_t, tail[:, None]), 1), -1)  # (tokens, K + 1)

    rest = rest.masked_fill(whole, NOTHING)
    log_s = torch.log_softmax(torch.cat((u.masked_fill(padding, NOTHING), rest[:, None]), 1), -1)
    divergence = divergence_of(log_t, log_s, beta)
    return divergence if mask is None else torch.where(mask, divergence, 0)


# ---- launch


def _size(head: Head) -> int:
    return COPIES * max(4, head.hidden.itemsize)


def _walk(head: Head, memory_budget: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (rows, columns, u) for every block. The next block overwrites u (rows, columns)."""
    operands, wide = with_operand(head), torch.promote_types(head.hidden.dtype, torch.float32)
    row_blocks, chunks = blocks_of(head, memory_budget, _size(head))
    buffer = buffer_of(head.hidden.new_empty(0, dtype=wide), row_blocks, chunks)
    for columns in chunks:
        chunk = chunk_of(operands, columns)
        for rows in row_blocks:
            block = rows_of(chunk, rows)
            z = product(block.hidden, block.weight.T, block_of(buffer, rows, columns.stop - columns.start))
            yield rows, columns, scaled_(z, block)


def _merge(top: Tensor, sum_exp: Tensor, u: Tensor) -> None:
    """Update each row's highest logit, and its sum of exponentials relative to it, with the logits u (rows, columns).

    u is overwritten. The two numbers are not combined into a log-sum-exp, because it would be rounded. With logits in
    the thousands, the rounding would be an error of every probability.
    """
    new_top = torch.maximum(top, u.amax(-1))
    u -= new_top[:, None]
    sum_exp.mul_((top - new_top).exp_()).add_(exponential(u, out=u).sum(-1))
    top.copy_(new_top)


def _find(ids: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Return (column, inside), both (rows, K), for ids in a chunk of the vocabulary.

    column: the id's column, clamped to the chunk. inside: bool, whether the id is in the chunk at all.
    """
    column = ids.long() - columns.start
    width = columns.stop - columns.start
    return column.clamp(0, width - 1), (column >= 0) & (column < width)


def _without(u: Tensor, column: Tensor, is_here: Tensor) -> Tensor:
    """Set the logits of the listed ids in u to -1e30, in place, and return u.

    column, is_here: the places of the listed ids in u, from `_find`.
    """
    least = torch.where(is_here, NOTHING, torch.inf).to(u.dtype)
    return u.scatter_reduce_(1, column, least, "amin")


def _select(head: Head, k: int, memory_budget: int) -> tuple[Tensor, Tensor]:
    ids, logits = _selected_shapes(head, k, memory_budget)
    ids.zero_()
    logits.fill_(-torch.inf)
    top, sum_exp = logits.new_full((len(logits),), NOTHING), logits.new_zeros(len(logits))
    for rows, columns, u in _walk(head, memory_budget):
        # the k most likely ids among those found so far and those of this block
        best, column = u.topk(min(k, u.shape[1]), -1)
        best, order = torch.cat((logits[rows], best), 1).topk(k, -1)
        ids[rows] = torch.cat((ids[rows], column.int() + columns.start), 1).gather(1, order)
        logits[rows] = best
        _merge(top[rows], sum_exp[rows], u)
    return ids, (logits - top[:, None]).sub_(sum_exp.log_()[:, None])


def _selected_shapes(head, k, memory_budget):
    shape, wide = (head.hidden.shape[0], k), torch.promote_types(head.hidden.dtype, torch.float32)
    return head.hidden.new_empty(shape, dtype=torch.int32), head.hidden.new_empty(shape, dtype=wide)


class _Saved(NamedTuple):
    head: Head
    ids: Tensor
    rest: Tensor
    top: Tensor
    memory_budget: int


def _forward(head: Head, ids: Tensor, memory_budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (u - top, rest - top, top), of shapes (tokens, K), (tokens,) and (tokens,).

    u are the logits of the listed ids. rest is the log-sum-exp of all other logits, and top is the highest other logit.
    The shift by top does not change a softmax. A listed id outside the vocabulary gives NaN.
    """
    listed, rest, top = _shapes(head, ids, memory_budget)
    listed.fill_(torch.nan).masked_fill_(ids < 0, 0)
    rest.zero_()
    top.fill_(NOTHING)
    for rows, columns, u in _walk(head, memory_budget):
        column, is_here = _find(ids[rows], columns)
        listed[rows] = torch.where(is_here, u.gather(1, column), listed[rows])
        _merge(top[rows], rest[rows], _without(u, column, is_here))
    top.masked_fill_(top == NOTHING, 0)  # all ids are listed
    return listed.sub_(top[:, None]), rest.log_(), top


def _shapes(head, ids, memory_budget):
    hidden, wide = head.hidden, torch.promote_types(head.hidden.dtype, torch.float32)
    return hidden.new_empty(ids.shape, dtype=wide), *(
        hidden.new_empty(len(hidden), dtype=wide) for _ in range(2)
    )


def _save(outputs, head, ids, memory_budget):
    _, rest, top = outputs
    return _Saved(head, ids, rest, top, memory_budget)


def _backward(saved: _Saved, needs: Any, dlisted: Tensor, drest: Tensor) -> HeadGradients:
    head, ids, rest, top, memory_budget = saved

    def fill(block: Head, rows: slice, columns: slice, dz: Tensor) -> Tensor:
        z = dz if dz.dtype == rest.dtype else dz.new_empty(dz.shape, dtype=rest.dtype)
        u = scaled_(product(block.hidden, block.weight.T, z), block)
        slope = softcap_slope(u, block)

        # du of the ids that are not listed, then of the listed ones
        column, is_here = _find(ids[rows], columns)
        log_share = _without(u, column, is_here).sub_(top[rows, None]).sub_(rest[rows, None])
        du = exponential(log_share, out=log_share).mul_(drest[rows, None])
        du.scatter_add_(1, column, torch.where(is_here, dlisted[rows], 0))

        found = unscaled_(du, slope, block)
        if found is not dz:
            dz.copy_(found)
        return found.sum(0) if needs.head_bias else found.new_empty(0)

    return head_gradients(head, needs, memory_budget, _size(head), fill)


_topk_logprobs = make_op("topk_logprobs", _select, _selected_shapes)
_listed = make_op("listed_logits", _forward, _shapes, _save, _backward, like_saved)


# ---- op


def topk_logprobs(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the k most likely ids of each token, most likely first, and their log-probabilities in nats. No gradient.

    hidden: (tokens, hidden)    weight: (vocabulary, hidden)    bias: (vocabulary,)    k: 1 to vocabulary
    lora_a: (R, hidden)    lora_b: (vocabulary, R)    an adapter, W + scaling B A, never multiplied out
    temperature: a number or (tokens,), finite and above 0.
    memory_budget: the bytes that logits may take at any time.

    Returns ids (tokens, k) int32 and logprobs (tokens, k) in fp32 (fp64 for fp64). Equally likely ids have any order.
    Raises ValueError for shapes, dtypes and devices that do not match, and for numbers out of range. A wrong
    temperature of a row raises on the CPU, and gives NaN for that row on CUDA.
    """
    budget = check_budget(hidden, memory_budget)
    inputs = HeadInputs(hidden, weight, bias, lora_a, lora_b, scaling, softcap)
    check_heads(inputs)
    temperature = checked_temperature(hidden, temperature)
    size = whole_number(k)
    if size is None or not 1 <= size <= weight.shape[0]:
        raise ValueError(f"k: expected a whole number from 1 to vocabulary={weight.shape[0]}, got {k}")
    with torch.no_grad():
        return _topk_logprobs(head_of(cast(inputs), temperature), size, budget)


def topk_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    beta: float = 0.0,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Compute a student's divergence from a teacher's stored log-probabilities, in nats per token.

    The ids that the teacher does not list form one bucket.

    hidden: (tokens, hidden)    weight: (vocabulary, hidden)    bias: (vocabulary,)
    teacher_ids: (tokens, K) int, distinct, padded with -1.
    teacher_logprobs: (tokens, K), as returned by `topk_logprobs` at this temperature. It gets no gradient.
    lora_a: (R, hidden)    lora_b: (vocabulary, R)    the student's adapter, W + scaling B A, never multiplied out
    beta, mask, memory_budget: as in `token_divergence`.
    temperature: of the student's logits, a number or (tokens,), finite and above 0. It gets no gradient.

    Returns (tokens,) in fp32 (fp64 for fp64), with gradients for hidden, weight, bias and the adapter. Raises
    ValueError for shapes, dtypes and devices that do not match, and for numbers out of range. On the CPU these rows
    raise, too: an id outside the vocabulary, a temperature not above 0, NaN in teacher_logprobs. A row that counts also
    raises for an id that it has twice, and for teacher_logprobs that sum to a probability above 1.05. On CUDA nothing
    is raised for rows. There an id outside the vocabulary and such a temperature give NaN. Other wrong rows give a
    number that is no divergence.
    """
    budget = check_budget(hidden, memory_budget)
    student = HeadInputs(hidden, weight, bias, lora_a, lora_b, scaling, softcap)
    check_heads(student)
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    temperature = checked_temperature(hidden, temperature)
    check_mask(hidden, mask)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected a number from 0 to 1, got {beta}")

    if teacher_ids.ndim != 2 or teacher_ids.shape[0] != tokens:
        raise ValueError(f"teacher_ids: expected shape (tokens={tokens}, K), got {tuple(teacher_ids.shape)}")
    if teacher_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"teacher_ids: expected int32 or int64, got {teacher_ids.dtype}")
    check_shape("teacher_logprobs", teacher_logprobs, tokens=tokens, K=teacher_ids.shape[1])
    if not teacher_logprobs.is_floating_point():
        raise ValueError(f"teacher_logprobs: expected a floating dtype, got {teacher_logprobs.dtype}")
    check_device(hidden, teacher_ids=teacher_ids, teacher_logprobs=teacher_logprobs)

    if readable(hidden):
        check_ids("teacher_ids", teacher_ids, vocabulary, mask)
        mass = teacher_logprobs.detach().double().masked_fill(teacher_ids < 0, -torch.inf).exp().sum(-1)
        right = mass <= 1 + SLACK
        right = right if mask is None else right | ~mask & mass.isfinite()  # NaN would reach dW from any row
        check_rows("teacher_logprobs", mass, right, "to sum to a probability of at most 1")

    student, teacher = cast(student), _Listed(teacher_ids, teacher_logprobs)
    if logits_fit(student, 8, budget):
        return _of_logits(student, teacher, temperature, beta, mask)
    u, rest, _ = _listed(head_of(student, temperature), teacher_ids, budget)
    return _over_buckets(_Buckets(u, rest), teacher, vocabulary, beta, mask)
