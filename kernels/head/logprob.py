"""Token log-probabilities of a linear head, without its logits in memory.

    z = hidden W^T + bias        s = softcap tanh(z / softcap)        u = s / temperature        p = softmax(u)

    lse = log sum_j exp(u_j)     logprob = u_y - lse                  entropy = lse - sum_j p_j u_j

    du_j = g_logprob [j = y] + p_j (g_lse - g_logprob - g_entropy (u_j - lse + entropy))
    dz   = du (1 - (s / softcap)^2) / temperature
    dhidden = dz W        dW = dz^T hidden        dbias = sum over tokens of dz

A recorded support holds the ids that a truncating sampler kept. With it the sums over j run over these ids: gather.py.

Memory, in elements: eager code writes (tokens, V) logits, their softmax and its gradient, and reads them again for
each of the head's products: about 8 tokens V. Here the forward keeps four numbers for each row of a tile of logits,
and merges them as in the online softmax. The backward computes the logits again, a fourth product, and writes their
gradient a chunk of the vocabulary at a time: 3 tokens V. Unlike a chunk of tokens, a chunk of the vocabulary has its
own rows of dW. One product computes them, accumulated in fp32, and no second copy of dW is kept.

Source: the online softmax of Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867
"""

# Triton's launches and tuples are opaque to pyright
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._chip import cdiv, check_device, check_shape, readable, use_triton
from .._op import like_saved, make_op
from .._triton import tl, triton
from ..plain.logprob import COPIES, RowTerms, dlogits, score_logits, summaries
from ..records import Head
from .blocks import (
    HeadGradients,
    _place,
    _products,
    _quarter,
    _scaled,
    _sharpness,
    _store_gradient,
    blocks_of,
    bytes_of,
    chunk_of,
    described,
    grid_of,
    has_tma,
    head_gradients,
    launch_arguments,
    part_of,
    tile_of,
    with_operand,
)
from .gather import score_support
from .inputs import (
    HeadInputs,
    cast,
    check_budget,
    check_heads,
    check_ids,
    checked_temperature,
    head_of,
    logits_fit,
)

# ---- reference


def token_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    support: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = HeadInputs(hidden, weight, bias, lora_a, lora_b, scaling, softcap)
    return score_logits(inputs, temperature, targets, support, ignore_index)


# ---- kernels

# fmt: off


@triton.jit
def _columns_of(target_ptr, rows, T, start, N):
    # int32 columns of the targets in a chunk of N columns from `start` on; -1 for any other 64-bit number
    y = tl.load(target_ptr + rows, rows < T, other=-1) - start
    return tl.where((y >= 0) & (y < N), y, -1).to(tl.int32)


@triton.jit
def _token_logprobs_fwd(
    h, w, bias_ptr, target_ptr, temperature_ptr, part_ptr, target_u_ptr,
    T, N, C, h_stride, w_stride, start, temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_TEMPERATURES: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # For BLOCK_N columns of a row: top, the highest logit; the sum of exp(u - top); the sum of exp(u - top) (u - top)
    tiles_m, tiles_n = tl.cdiv(T, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        m, n = _place(tile, tiles_m, tiles_n, GROUP)
        z = _products(h, w, m, n, T, N, C, h_stride, w_stride, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)

        rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
        sharpness = _sharpness(temperature_ptr, rows, T, temperature, HAS_TEMPERATURES)
        y = _columns_of(target_ptr, rows, T, start, N)

        top = tl.full([BLOCK_M], -1e30, tl.float32)
        sum_exp = tl.zeros([BLOCK_M], tl.float32)
        weighted = tl.zeros([BLOCK_M], tl.float32)
        target_u = tl.zeros([BLOCK_M], tl.float32)

        for i in tl.static_range(4):
            cols = n * BLOCK_N + i * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            u = _quarter(z, i, BLOCK_M, BLOCK_N)  # [BLOCK_M, BLOCK_N / 4]
            u = _scaled(u, bias_ptr, cols, N, sharpness, softcap, HAS_BIAS, HAS_SOFTCAP)
            u = tl.where((cols < N)[None, :], u, -1e30)  # finite, so that p times it is 0

            target_u += tl.sum(tl.where(cols[None, :] == y[:, None], u, 0.0), 1)

            # the online softmax: the sums relative to the old top become relative to the new one
            new_top = tl.maximum(top, tl.max(u, 1))
            u -= new_top[:, None]
            p = tl.exp(u)
            shift = top - new_top
            weighted = tl.exp(shift) * (weighted + shift * sum_exp) + tl.sum(p * u, 1)
            sum_exp = tl.exp(shift) * sum_exp + tl.sum(p, 1)
            top = new_top

        tile_part_ptr = part_ptr + n.to(tl.int64) * 3 * T + rows
        tl.store(tile_part_ptr, top, rows < T)
        tl.store(tile_part_ptr + T, sum_exp, rows < T)
        tl.store(tile_part_ptr + 2 * T, weighted, rows < T)
        in_tile = (y >= n * BLOCK_N) & (y < n * BLOCK_N + BLOCK_N)
        tl.store(target_u_ptr + rows, target_u, in_tile & (rows < T))


@triton.jit
def _token_logprobs_bwd(
    h, w, dz, bias_ptr, target_ptr, temperature_ptr,
    highest_ptr, log_sum_ptr, entropy_ptr, dlogprob_ptr, dnorm_ptr, dentropy_ptr, db_ptr,
    T, N, C, h_stride, w_stride, dz_stride, start, temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_TEMPERATURES: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, WITH_DBIAS: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(T, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        m, n = _place(tile, tiles_m, tiles_n, GROUP)
        z = _products(h, w, m, n, T, N, C, h_stride, w_stride, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)

        rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
        sharpness = _sharpness(temperature_ptr, rows, T, temperature, HAS_TEMPERATURES)
        y = _columns_of(target_ptr, rows, T, start, N)
        highest = tl.load(highest_ptr + rows, rows < T, other=0.0)[:, None]
        log_sum = tl.load(log_sum_ptr + rows, rows < T, other=0.0)[:, None]
        dlogprob = tl.load(dlogprob_ptr + rows, rows < T, other=0.0)[:, None]
        dnorm = tl.load(dnorm_ptr + rows, rows < T, other=0.0)[:, None]

        for i in tl.static_range(4):
            cols = n * BLOCK_N + i * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            u = _quarter(z, i, BLOCK_M, BLOCK_N)  # [BLOCK_M, BLOCK_N / 4]
            u = _scaled(u, bias_ptr, cols, N, sharpness, softcap, HAS_BIAS, HAS_SOFTCAP)
            log_p = u - highest - log_sum

            # du = dlogprob [j = y] + p (dnorm - dentropy (log p + entropy))
            factor = dnorm
            if HAS_ENTROPY:
                entropy = tl.load(entropy_ptr + rows, rows < T, other=0.0)[:, None]
                factor = dnorm - tl.load(dentropy_ptr + rows, rows < T, other=0.0)[:, None] * (log_p + entropy)
            d = (tl.exp(log_p) * factor + tl.where(cols[None, :] == y[:, None], dlogprob, 0.0)) * sharpness
            if HAS_SOFTCAP:
                s = u / (sharpness * softcap)
                d = d * (1 - s * s)

            first = n * BLOCK_N + i * (BLOCK_N // 4)
            _store_gradient(d, dz, db_ptr, m, first, rows, cols, T, N, dz_stride, WITH_DBIAS, TMA, BLOCK_M)

# fmt: on


# ---- launch

ROW_POINTERS = [f"{name}_ptr" for name in RowTerms._fields]


class _Saved(NamedTuple):
    head: Head
    targets: Tensor
    entropy: Tensor
    norms: Tensor
    ignore_index: int
    memory_budget: int


def _forward(
    head: Head, targets: Tensor, ignore_index: int, memory_budget: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logprob, lse and entropy, (tokens,) each, and norms (2, tokens).

    norms: the highest logit, and the logarithm of the sum of exp(u - highest).
    """
    operands, wide = with_operand(head), torch.promote_types(head.hidden.dtype, torch.float32)
    # a target outside the vocabulary keeps NaN
    target_u = targets.new_full(targets.shape, torch.nan, dtype=wide)
    summarise = _summaries_triton if use_triton(head.hidden) else summaries
    parts = summarise(operands, targets, memory_budget, target_u)

    # merge the pieces of a row
    tops, sums, weighted = parts.unbind(1)  # (pieces, tokens) each
    top = tops.amax(0)
    shift = tops - top
    sum_exp = (shift.exp() * sums).sum(0)
    mean = (shift.exp() * (weighted + shift * sums)).sum(0) / sum_exp  # the mean of u - top under p
    log_sum = sum_exp.log()

    ignored = targets == ignore_index
    scores = target_u - top - log_sum, top + log_sum, log_sum - mean
    logprob, lse, entropy = (x.masked_fill_(ignored, 0) for x in scores)
    return logprob, lse, entropy, torch.stack((top, log_sum))


def _shapes(head, targets, ignore_index, memory_budget):
    wide = torch.promote_types(head.hidden.dtype, torch.float32)
    scores = (targets.new_empty(targets.shape, dtype=wide) for _ in range(3))
    return *scores, targets.new_empty(2, *targets.shape, dtype=wide)


def _summaries_triton(head: Head, targets: Tensor, memory_budget: int, target_u: Tensor) -> Tensor:
    """Return parts (pieces, 3, tokens), three numbers for each row of each tile of logits.

    They are the row's highest logit in the tile, sum exp(u - highest), and sum exp(u - highest) (u - highest).
    target_u (tokens,) receives the logit of each target in the vocabulary.
    """
    h, V = head.hidden, head.weight.shape[0]
    tile, tma = tile_of(h), has_tma(h)
    _, chunks = blocks_of(head, memory_budget, bytes_of(h, COPIES))
    if head.weight.dtype == h.dtype and head.lora_b is None:
        chunks = [slice(0, V)]  # neither logits nor a copy of the weight are in memory

    parts = []
    for columns in chunks:
        chunk = chunk_of(head, columns)
        N = chunk.weight.shape[0]
        parts.append(h.new_empty(cdiv(N, tile.N), 3, len(targets), dtype=torch.float32))
        if len(targets):
            arguments = launch_arguments(chunk, tile, tma)
            arguments |= {"target_ptr": targets, "part_ptr": parts[-1], "target_u_ptr": target_u}
            _token_logprobs_fwd[grid_of(h, N, tile, tma)](**arguments, start=columns.start)
    return torch.cat(parts)


def _save(outputs, head, targets, ignore_index, memory_budget):
    _, _, entropy, norms = outputs
    return _Saved(head, targets, entropy, norms, ignore_index, memory_budget)


def _backward(
    saved: _Saved, needs: Any, dlogprob: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None
) -> HeadGradients:
    head, targets, entropy, norms, ignore_index, memory_budget = saved
    highest, log_sum = norms

    # an ignored row has no upstream gradient, and p = 0 whatever the logits
    ignored = targets == ignore_index
    highest = highest.masked_fill(ignored, torch.finfo(highest.dtype).max)
    dlogprob = torch.zeros_like(highest) if dlogprob is None else dlogprob.masked_fill(ignored, 0)
    dnorm = -dlogprob if dlse is None else dlse.masked_fill(ignored, 0) - dlogprob
    dentropy = None if dentropy is None else dentropy.masked_fill(ignored, 0)

    terms = RowTerms(targets, highest, log_sum, entropy, dlogprob, dnorm, dentropy)
    write = _dlogits_triton if use_triton(head.hidden) else dlogits
    cuts: dict[int, RowTerms] = {}  # the rows' terms, the same in every chunk

    def fill(block: Head, rows: slice, columns: slice, dz: Tensor) -> Tensor:
        if rows.start not in cuts:
            cuts[rows.start] = RowTerms(*(None if x is None else part_of(x, rows) for x in terms))
        return write(block, cuts[rows.start], columns.start, dz, needs.head_bias)

    return head_gradients(head, needs, memory_budget, bytes_of(head.hidden, COPIES), fill)


def _dlogits_triton(block: Head, terms: RowTerms, start: int, dz: Tensor, with_dbias: bool) -> Tensor:
    """Write dz (rows, N), the gradient of a block's logits. Return its sum over the rows, in fp32 and unrounded."""
    h, N = block.hidden, block.weight.shape[0]
    tile, tma = tile_of(h), has_tma(h)
    db = h.new_empty(cdiv(h.shape[0], tile.M) if with_dbias else 0, N, dtype=torch.float32)

    arguments = launch_arguments(block, tile, tma)
    arguments |= zip(ROW_POINTERS, terms, strict=True)
    arguments |= {"dz": described(dz, [tile.M, tile.N // 4], tma), "dz_stride": dz.stride(0), "db_ptr": db}
    arguments |= {"HAS_ENTROPY": terms.dentropy is not None, "WITH_DBIAS": with_dbias, "start": start}
    _token_logprobs_bwd[grid_of(h, N, tile, tma)](**arguments)
    return db.sum(0)


_token_logprobs = make_op("token_logprobs", _forward, _shapes, _save, _backward, like_saved)


def _check_targets(targets: Tensor, support: Tensor | None, vocabulary: int, ignore_index: int) -> None:
    trained = targets != ignore_index
    wrong = trained & ((targets < 0) | (targets >= vocabulary))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"targets: row {row} is {int(targets[row])}, outside a vocabulary of {vocabulary}")
    if support is None:
        return
    check_ids("support", support, vocabulary, trained)
    missing = trained & ~(support == targets[:, None]).any(-1)
    if missing.any():
        row = int(missing.nonzero()[0])
        raise ValueError(f"support: row {row} does not hold its target {int(targets[row])}")


# ---- op


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    support: Tensor | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score targets under softmax(softcap(hidden W^T + bias) / temperature), in nats, without the logits in memory.

    hidden: (tokens, hidden)    weight: (vocabulary, hidden)    targets: (tokens,) int    bias: (vocabulary,)
    lora_a: (R, hidden)    lora_b: (vocabulary, R)    an adapter, W + scaling B A, never multiplied out
    temperature: a number or (tokens,), finite and above 0. It gets no gradient.
    support: (tokens, K_max) int, distinct ids, among them the target, padded with -1. The softmax runs over these only.
    ignore_index: a row with this target gives 0, 0, 0 and passes no gradient.
    memory_budget: the bytes that logits and their gradients may take at any time.

    Returns logprob, lse and entropy, each (tokens,) in fp32 (fp64 for fp64). Each has its own gradient to hidden,
    weight, bias and the adapter. A weight without requires_grad costs no product for dW. Raises ValueError for shapes,
    dtypes and devices that do not match, and for numbers out of range. The CPU path also
    raises it for a target outside the vocabulary or its support, a support with an id outside the vocabulary or with an
    id more than once (ignored rows excepted), and a temperature not above 0. On CUDA the check would stall the device:
    such a row gives NaN there, and a repeated id counts twice.
    """
    budget = check_budget(hidden, memory_budget)
    inputs = HeadInputs(hidden, weight, bias, lora_a, lora_b, scaling, softcap)
    check_heads(inputs)
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    check_shape("targets", targets, tokens=tokens)
    check_device(hidden, targets=targets, support=support)
    temperature = checked_temperature(hidden, temperature)
    if support is not None and (support.ndim != 2 or support.shape[0] != tokens or support.shape[1] == 0):
        raise ValueError(f"support: expected shape (tokens={tokens}, K_max), got {tuple(support.shape)}")
    for name, x in (("targets", targets), ("support", support)):
        if x is not None and x.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}: expected int32 or int64, got {x.dtype}")
    if readable(hidden):
        _check_targets(targets, support, vocabulary, ignore_index)

    inputs = cast(inputs)
    if logits_fit(inputs, 6, budget):
        return score_logits(inputs, temperature, targets, support, ignore_index)
    targets = targets.long().contiguous()
    if support is not None:
        return score_support(inputs, temperature, targets, support, ignore_index, budget)
    return _token_logprobs(head_of(inputs, temperature), targets, ignore_index, budget)[:3]
