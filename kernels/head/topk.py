"""A teacher's distribution in few numbers: its k likeliest ids at each token, and a student's divergence from them.

    ids, log p_T(ids) = the k largest of log softmax(softcap(hidden W^T + bias) / temperature)

    L = listed ids        p_S(id) = exp(u_id) / Z        p_S(tail) = sum over ids not in L of exp(u_j) / Z
                          p_T(id), stored                p_T(tail) = 1 - sum over L of p_T(id)

and D(p_T, p_S) of divergence.py over these K + 1 buckets, all other ids taken as one. Dropping the tail instead would
sum over what is not a distribution: such a sum can be negative, and clamping it there kills the gradient. With the tail
it is a divergence, never above the one over the whole vocabulary (data processing), and 0 where all buckets agree.

    rest = log sum_{j not in L} exp(u_j)       log p_S = log softmax([u_L, rest])
    du_j = g_u of its bucket for j in L, g_rest exp(u_j - rest) otherwise

rest is summed over the others directly: log(Z - sum over L) would lose all digits where a student is sure. p_T(tail),
which stored fp32 numbers do not resolve further, is at least 2^-24; it is nothing where L is the whole vocabulary.

Memory, in elements: eager code writes (tokens, V) logits, their logarithms and the gradient: about 8 tokens V. Here a
chunk of the vocabulary at a time is written, which selecting ids needs, and read 3 times: torch does that on every
device, and there is no kernel to win by. dW of a chunk is one product, in fp32.

Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531
"""

# pyright: reportArgumentType=false

import torch
from torch import Tensor

from .._chip import check_device, check_shape, readable, use_triton, whole_number, without_autocast
from .._op import register
from ._old import (
    block_of,
    blocks_of,
    buffer_of,
    cast,
    check_adapter,
    check_budget,
    check_head,
    check_ids,
    check_mask,
    check_rows,
    checked_temperature,
    divergence_of,
    exponential,
    head_gradients,
    head_gradients_fake,
    operand,
    product,
    rows_of,
    scaled_,
    scaled_logits,
    split_temperature,
    widened,
)

COPIES = 4  # of a block: the logits and temporaries
NOTHING = -1e30  # the log-probability of a bucket that is not there, finite: 0 times it is 0
LEAST = 2.0**-24  # of a teacher's tail
SLACK = 0.05  # of a sum of probabilities whose logarithms were rounded to bf16

# ---- reference


@without_autocast  # fp32 inside, whatever the policy outside
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
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    u = scaled_logits(
        hidden, weight, lora_a=lora_a, lora_b=lora_b, scaling=scaling, bias=bias,
        temperature=temperature, softcap=softcap,
    )  # fmt: skip
    logprobs, ids = torch.log_softmax(u, -1).topk(k, -1)
    return ids.int(), logprobs


@without_autocast
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
    memory_budget: int | None = None,
) -> Tensor:
    u = scaled_logits(
        hidden, weight, lora_a=lora_a, lora_b=lora_b, scaling=scaling, bias=bias,
        temperature=temperature, softcap=softcap,
    )  # fmt: skip
    V = u.shape[1]
    columns = torch.where(teacher_ids < 0, V, teacher_ids).long()  # padding falls into one column too many
    listed = torch.zeros(u.shape[0], V + 1, dtype=torch.bool, device=u.device).scatter_(1, columns, True)
    rest = torch.logsumexp(u.masked_fill(listed[:, :-1], NOTHING), -1)
    return _over_buckets(
        u.gather(1, teacher_ids.clamp(min=0).long()), rest, teacher_ids, teacher_logprobs, V, beta, mask
    )


def _over_buckets(
    u: Tensor, rest: Tensor, ids: Tensor, logprobs: Tensor, vocabulary: int, beta: float, mask: Tensor | None
) -> Tensor:
    """u (tokens, K): the student's logits of the listed ids; rest (tokens,): the log-sum-exp of all others. Both may be
    shifted alike."""
    padding = ids < 0
    whole = (~padding).sum(-1) == vocabulary  # (tokens,): no other ids are left
    log_t = logprobs.detach().to(u.dtype).masked_fill(padding, NOTHING)  # (tokens, K)
    tail = (1 - log_t.exp().sum(-1)).clamp(min=LEAST).log().masked_fill(whole, NOTHING)
    log_t = torch.log_softmax(torch.cat((log_t, tail[:, None]), 1), -1)  # (tokens, K + 1)
    rest = rest.masked_fill(whole, NOTHING)
    log_s = torch.log_softmax(torch.cat((u.masked_fill(padding, NOTHING), rest[:, None]), 1), -1)
    divergence = divergence_of(log_t, log_s, beta)
    return divergence if mask is None else torch.where(mask, divergence, 0)


# ---- kernels


def _size(hidden: Tensor) -> int:
    return COPIES * max(4, hidden.itemsize)


def _walk(hidden, weight, lora_b, bias, temperatures, temperature, softcap, memory_budget):
    """(rows, columns, u) of every block, u (rows, columns) in one buffer that the next block overwrites."""
    h, wide = operand(hidden), torch.promote_types(hidden.dtype, torch.float32)
    row_blocks, chunks = blocks_of(hidden, weight.shape[0], memory_budget, _size(hidden))
    buffer = buffer_of(h.new_empty(0, dtype=wide), row_blocks, chunks)
    for columns in chunks:
        w, b = rows_of(weight, lora_b, columns, h.dtype), None if bias is None else bias[columns]
        for rows in row_blocks:
            z = product(h[rows], w.T, block_of(buffer, rows, w.shape[0]))
            yield (
                rows,
                columns,
                scaled_(z, b, None if temperatures is None else temperatures[rows], temperature, softcap),
            )


def _merge(top: Tensor, total: Tensor, u: Tensor) -> None:
    """The highest (rows,) and the sum of exponentials below it, of what they were of and of u (rows, columns), spent.

    Not one number, the log-sum-exp: with logits in the thousands its rounding would be that of every probability.
    """
    highest = torch.maximum(top, u.amax(-1))
    u -= highest[:, None]
    total.mul_((top - highest).exp_()).add_(exponential(u, out=u).sum(-1))
    top.copy_(highest)


def _find(ids: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Of each id its column (rows, K) in a chunk of the vocabulary, and whether it is there at all."""
    at = ids.long() - columns.start
    width = columns.stop - columns.start
    return at.clamp(0, width - 1), (at >= 0) & (at < width)


def _hide(u: Tensor, at: Tensor, here: Tensor) -> Tensor:
    """u without the listed ids."""
    hidden = torch.where(here, NOTHING, torch.inf).to(u.dtype)
    return u.scatter_reduce_(1, at, hidden, "amin")


# ---- autograd


def _topk(
    hidden: Tensor,
    weight: Tensor,
    lora_b: Tensor | None,
    bias: Tensor | None,
    temperatures: Tensor | None,
    k: int,
    temperature: float,
    softcap: float | None,
    memory_budget: int,
) -> tuple[Tensor, Tensor]:
    ids, found = _topk_fake(
        hidden, weight, lora_b, bias, temperatures, k, temperature, softcap, memory_budget
    )
    ids.zero_()
    found.fill_(-torch.inf)
    top, total = found.new_full((hidden.shape[0],), NOTHING), found.new_zeros(hidden.shape[0])
    for rows, columns, u in _walk(
        hidden, weight, lora_b, bias, temperatures, temperature, softcap, memory_budget
    ):
        best, at = u.topk(min(k, u.shape[1]), -1)
        best, order = torch.cat((found[rows], best), 1).topk(k, -1)
        ids[rows] = torch.cat((ids[rows], at.int() + columns.start), 1).gather(1, order)
        found[rows] = best
        _merge(top[rows], total[rows], u)
    return ids, (found - top[:, None]).sub_(total.log_()[:, None])


def _topk_fake(hidden, weight, lora_b, bias, temperatures, k, temperature, softcap, memory_budget):
    shape, wide = (hidden.shape[0], k), torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(shape, dtype=torch.int32), hidden.new_empty(shape, dtype=wide)


_topk_logprobs = register("topk_logprobs", _topk, _topk_fake)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    lora_b: Tensor | None,
    bias: Tensor | None,
    ids: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    memory_budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """u - top (tokens, K) of the listed ids, NaN for one that is not in the vocabulary, rest - top (tokens,), and top.

    top (tokens,), the highest of the others, is no more than a shift, of which softmax knows nothing.
    """
    listed, rest, top = _forward_fake(
        hidden, weight, lora_b, bias, ids, temperatures, temperature, softcap, memory_budget
    )
    listed.fill_(torch.nan).masked_fill_(ids < 0, 0)
    rest.zero_()
    top.fill_(NOTHING)
    for rows, columns, u in _walk(
        hidden, weight, lora_b, bias, temperatures, temperature, softcap, memory_budget
    ):
        at, here = _find(ids[rows], columns)
        listed[rows] = torch.where(here, u.gather(1, at), listed[rows])
        _merge(top[rows], rest[rows], _hide(u, at, here))
    top.masked_fill_(top == NOTHING, 0)  # there are no others
    return listed.sub_(top[:, None]), rest.log_(), top


def _forward_fake(hidden, weight, lora_b, bias, ids, temperatures, temperature, softcap, memory_budget):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(ids.shape, dtype=wide), *(
        hidden.new_empty(len(hidden), dtype=wide) for _ in range(2)
    )


def _backward(
    dlisted: Tensor,
    drest: Tensor,
    hidden: Tensor,
    weight: Tensor,
    lora_b: Tensor | None,
    bias: Tensor | None,
    ids: Tensor,
    temperatures: Tensor | None,
    rest: Tensor,
    top: Tensor,
    temperature: float,
    softcap: float | None,
    memory_budget: int,
    with_dhidden: bool,
    with_dweight: bool,
    with_dlora_b: bool,
    with_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dhidden, dweight, dlora_b and dbias, each empty where it is not asked for."""

    def fill(rows, columns, h, w, b, dz):
        at, here = _find(ids[rows], columns)
        t = None if temperatures is None else temperatures[rows]
        divisor = temperature if t is None else t[:, None]
        z = dz if dz.dtype == rest.dtype else dz.new_empty(dz.shape, dtype=rest.dtype)
        u = scaled_(product(h, w.T, z), b, t, temperature, softcap)
        slope = None if softcap is None else (u * divisor).div_(softcap).square_().neg_().add_(1)
        du = _hide(u, at, here).sub_(top[rows, None]).sub_(rest[rows, None])
        exponential(du, out=du).mul_(drest[rows, None])
        du.scatter_add_(1, at, torch.where(here, dlisted[rows], 0)).div_(divisor)
        if slope is not None:
            du.mul_(slope)
        if du is not dz:
            dz.copy_(du)
        return du.sum(0) if with_dbias else du.new_empty(0)

    needs = with_dhidden, with_dweight, with_dlora_b, with_dbias
    return head_gradients(hidden, weight, lora_b, bias, memory_budget, _size(hidden), fill, needs)


def _backward_fake(
    dlisted, drest, hidden, weight, lora_b, bias, ids, temperatures, rest, top, temperature, softcap, memory_budget,
    with_dhidden, with_dweight, with_dlora_b, with_dbias,
):  # fmt: skip
    needs = with_dhidden, with_dweight, with_dlora_b, with_dbias
    return head_gradients_fake(hidden, weight, lora_b, bias, needs)


def _save(ctx, inputs, output):
    *tensors, temperature, softcap, memory_budget = inputs
    ctx.constants = temperature, softcap, memory_budget
    ctx.save_for_backward(*tensors, *output[1:])


def _differentiate(ctx, dlisted, drest, _):
    needs = ctx.needs_input_grad[:4]
    gradients = _listed_backward(dlisted, drest, *ctx.saved_tensors, *ctx.constants, *needs)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *[None] * 5


_listed_backward = register("listed_logits_backward", _backward, _backward_fake)
_listed = register("listed_logits", _forward, _forward_fake, _save, _differentiate)


# ---- public op


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
    """The k likeliest ids of each token, most likely first, and their log-probabilities in nats. No gradient.

    hidden: (tokens, hidden)    weight: (vocabulary, hidden)    bias: (vocabulary,)    k: 1 to vocabulary
    lora_a: (R, hidden)    lora_b: (vocabulary, R): of an adapter, W + scaling B A, never multiplied out.
    temperature: finite and above 0, a number or (tokens,).    memory_budget: bytes of logits at any time.

    Returns ids (tokens, k) int32 and logprobs (tokens, k) in fp32 (fp64 for fp64). Ids that tie stand in any order.
    Raises ValueError for shapes, dtypes and devices that disagree, for numbers other than these and, on the CPU, for a
    row's temperature; such a row gives NaN on CUDA.
    """
    budget = check_budget(hidden, memory_budget)
    check_head(hidden, weight, bias, softcap)
    check_adapter(hidden, weight, lora_a, lora_b, scaling)
    temperature = checked_temperature(hidden, temperature)
    size = whole_number(k)
    if size is None or not 1 <= size <= weight.shape[0]:
        raise ValueError(f"k: expected a whole number from 1 to vocabulary={weight.shape[0]}, got {k}")
    hidden = cast(hidden)
    temperatures, number = split_temperature(temperature, torch.promote_types(hidden.dtype, torch.float32))
    with torch.no_grad():
        hidden = widened(hidden, lora_a, scaling)
        return _topk_logprobs(hidden, weight, lora_b, bias, temperatures, size, number, softcap, budget)


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
    """A student's divergence from a teacher's stored log-probabilities, in nats a token; all other ids are one bucket.

    hidden: (tokens, hidden)    weight: (vocabulary, hidden)    bias: (vocabulary,)
    teacher_ids: (tokens, K) int, distinct, padded with -1.    teacher_logprobs: (tokens, K), as `topk_logprobs` gives
        them, at this temperature; no gradient.
    lora_a: (R, hidden)    lora_b: (vocabulary, R): of the student's adapter, W + scaling B A, never multiplied out.
    beta, temperature, mask, memory_budget: as `token_divergence` has them; temperature is of the student's logits.

    Returns (tokens,) in fp32 (fp64 for fp64), with gradients to hidden, weight, bias and the adapter.
    Raises ValueError for shapes, dtypes and devices that disagree, for numbers other than these and, on the CPU, for
    rows: an id outside the vocabulary, a temperature, NaN among teacher_logprobs, and where a row counts an id that is
    there twice or teacher_logprobs that sum to a probability above 1. On CUDA, where looking would stall the device, an
    id outside and such a temperature give NaN, the others a number that is no divergence.
    """
    budget = check_budget(hidden, memory_budget)
    check_head(hidden, weight, bias, softcap)
    check_adapter(hidden, weight, lora_a, lora_b, scaling)
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
    hidden = cast(hidden)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if not use_triton(hidden) and 8 * wide.itemsize * tokens * vocabulary <= budget:
        # autograd's own copies of such small logits fit: no need to compute them twice
        return topk_divergence_reference(
            hidden, weight, teacher_ids, teacher_logprobs, beta=beta, temperature=temperature, bias=bias,
            lora_a=lora_a, lora_b=lora_b, scaling=scaling, softcap=softcap, mask=mask,
        )  # fmt: skip
    temperatures, number = split_temperature(temperature, wide)
    hidden = widened(hidden, lora_a, scaling)
    u, rest, _ = _listed(hidden, weight, lora_b, bias, teacher_ids, temperatures, number, softcap, budget)
    return _over_buckets(u, rest, teacher_ids, teacher_logprobs, vocabulary, beta, mask)
