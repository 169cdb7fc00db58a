"""Token log-probabilities of a linear head, without its logits.

    z = hidden W^T + bias        s = softcap tanh(z / softcap)        u = s / temperature        p = softmax(u)

    lse = log sum_j exp(u_j)     logprob = u_y - lse                  entropy = lse - sum_j p_j u_j

    du_j = g_logprob [j = y] + p_j (g_lse - g_logprob - g_entropy (u_j - lse + entropy))
    dz   = du (1 - (s / softcap)^2) / temperature
    dhidden = dz W        dW = dz^T hidden        dbias = sum over tokens of dz

With a recorded support (the ids that a truncating sampler kept), the sums over j run over that row's support.

Memory, in elements: eager code writes (tokens, V) logits, their softmax and its gradient, and reads them again for
each of the head's products: about 8 tokens V. Here a block of them exists at a time. The vocabulary is walked in
chunks, a row's statistics are merged chunk by chunk, and the backward computes each block again: a fourth product.
A chunk of the vocabulary, unlike a chunk of tokens, owns its rows of dW: they come out of one product, accumulated in
fp32, and no second copy of dW is kept.

Source: the online softmax of Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import check_dtype, check_shape, register, use_triton

# ---- reference


def token_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    support: Tensor | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(
        hidden.dtype, torch.float32
    )  # fp64 stays fp64: gradients are checked by finite differences
    z = hidden.to(wide) @ weight.to(wide).T  # (tokens, vocabulary)
    kept = None
    if support is not None:
        columns = torch.where(
            support < 0, z.shape[1], support
        ).long()  # padding falls into one column too many
        kept = torch.zeros(z.shape[0], z.shape[1] + 1, dtype=torch.bool, device=z.device)
        kept = kept.scatter_(1, columns, True)[:, :-1]  # (tokens, vocabulary)
    trained = targets != ignore_index
    column = targets.masked_fill(~trained, 0).long()
    return _score(z, column, trained, None if bias is None else bias.to(wide), temperature, softcap, kept)


def _score(
    z: Tensor,
    column: Tensor,
    trained: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """From raw products (tokens, N): column (tokens,) is the target's; kept (tokens, N) says which take part."""
    if bias is not None:
        z = z + bias
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    u = z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    if kept is not None:
        u = u.masked_fill(~kept, -torch.inf)
    lse = torch.logsumexp(u, -1)
    log_p = u - lse[:, None]
    p = log_p.exp()
    logprob = log_p.gather(1, column[:, None])[:, 0]
    entropy = -(p * (log_p if kept is None else log_p.masked_fill(~kept, 0))).sum(-1)  # 0 log 0 = 0
    return torch.where(trained, logprob, 0), torch.where(trained, lse, 0), torch.where(trained, entropy, 0)


# ---- kernels


@triton.jit
def _scaled(z, bias_ptr, cols, mask, softcap, temperature, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    if HAS_BIAS:
        z += tl.load(bias_ptr + cols, mask, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        z = softcap * (1 - 2 / (tl.exp(2 * z / softcap) + 1))  # tanh
    return z / temperature


@triton.jit
def _token_logprobs_fwd(
    z_ptr, bias_ptr, target_ptr, temperature_ptr, part_ptr, target_u_ptr,
    start, N, z_stride, part_stride, temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_TEMPERATURES: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # SPLIT columns of a row: their maximum, the sum of exponentials, and that of exponentials times logits
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if HAS_TEMPERATURES:
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
    target = tl.load(target_ptr + row) - start
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    weighted = tl.full([], 0.0, tl.float32)
    for block in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, N), BLOCK_N):
        cols = block + tl.arange(0, BLOCK_N)
        mask = cols < N
        z = tl.load(z_ptr + row * z_stride + cols, mask, other=0.0).to(tl.float32)  # [BLOCK_N]
        u = _scaled(z, bias_ptr, cols, mask, softcap, temperature, HAS_BIAS, HAS_SOFTCAP)
        if (target >= block) & (target < block + BLOCK_N):
            tl.store(target_u_ptr + row, tl.sum(tl.where(cols == target, u, 0.0), 0), target < N)
        new_top = tl.maximum(top, tl.max(tl.where(mask, u, float("-inf")), 0))
        p = tl.where(mask, tl.exp(u - new_top), 0.0)
        shift = tl.where(total > 0, top - new_top, 0.0)  # the first block has nothing to shift
        shrink = tl.exp(shift)
        weighted = shrink * (weighted + shift * total) + tl.sum(p * (u - new_top), 0)
        total = shrink * total + tl.sum(p, 0)
        top = new_top
    part_ptr += split * 3 * part_stride + row
    tl.store(part_ptr, top)
    tl.store(part_ptr + part_stride, total)
    tl.store(part_ptr + 2 * part_stride, weighted)


@triton.jit
def _token_logprobs_bwd(
    z_ptr, dz_ptr, bias_ptr, target_ptr, temperature_ptr, lse_ptr, entropy_ptr, gain_ptr, level_ptr, dentropy_ptr,
    start, N, stride, temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_TEMPERATURES: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    if HAS_TEMPERATURES:
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
    z = tl.load(z_ptr + row * stride + cols, mask, other=0.0).to(tl.float32)  # [BLOCK_N]
    u = _scaled(z, bias_ptr, cols, mask, softcap, temperature, HAS_BIAS, HAS_SOFTCAP)
    log_p = u - tl.load(lse_ptr + row)
    slope = tl.load(level_ptr + row)
    if HAS_ENTROPY:
        slope -= tl.load(dentropy_ptr + row) * (log_p + tl.load(entropy_ptr + row))
    target = tl.load(target_ptr + row) - start
    dz = (tl.exp(log_p) * slope + tl.where(cols == target, tl.load(gain_ptr + row), 0.0)) / temperature
    if HAS_SOFTCAP:
        s = u * temperature / softcap
        dz *= 1 - s * s
    tl.store(dz_ptr + row * stride + cols, dz, mask)


@triton.jit
def _gathered_fwd(h_ptr, w_ptr, ids_ptr, z_ptr, K, C, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    ks = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + row * K + ks, ks < K, other=-1).to(tl.int64)  # [BLOCK_K]
    z = tl.zeros([BLOCK_K], tl.float32)
    for block in range(0, C, BLOCK_C):
        cols = block + tl.arange(0, BLOCK_C)
        h = tl.load(h_ptr + row * C + cols, cols < C, other=0.0).to(tl.float32)  # [BLOCK_C]
        mask = (ids >= 0)[:, None] & (cols < C)[None, :]
        w = tl.load(w_ptr + ids[:, None] * C + cols[None, :], mask, other=0.0).to(
            tl.float32
        )  # [BLOCK_K, BLOCK_C]
        z += tl.sum(w * h[None, :], 1)
    tl.store(z_ptr + row * K + ks, z, ks < K)


@triton.jit
def _gathered_dhidden(dz_ptr, w_ptr, ids_ptr, dh_ptr, K, C, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    dh = tl.zeros([BLOCK_C], tl.float32)
    for block in range(0, K, BLOCK_K):
        ks = block + tl.arange(0, BLOCK_K)
        ids = tl.load(ids_ptr + row * K + ks, ks < K, other=-1).to(tl.int64)  # [BLOCK_K]
        dz = tl.load(dz_ptr + row * K + ks, ids >= 0, other=0.0)
        mask = (ids >= 0)[:, None] & (cols < C)[None, :]
        w = tl.load(w_ptr + ids[:, None] * C + cols[None, :], mask, other=0.0).to(
            tl.float32
        )  # [BLOCK_K, BLOCK_C]
        dh += tl.sum(w * dz[:, None], 0)
    tl.store(dh_ptr + row * C + cols, dh, cols < C)


@triton.jit
def _gathered_dweight(
    dz_ptr, h_ptr, pair_ptr, bound_ptr, dw_ptr, K, C, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    # one id's (token, k) pairs stand together after sorting: summed in their order, no atomics
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    stop = tl.load(bound_ptr + row + 1)
    dw = tl.zeros([BLOCK_C], tl.float32)
    for block in range(tl.load(bound_ptr + row), stop, BLOCK_K):
        pairs = block + tl.arange(0, BLOCK_K)
        pair = tl.load(pair_ptr + pairs, pairs < stop, other=0)  # [BLOCK_K]
        dz = tl.load(dz_ptr + pair, pairs < stop, other=0.0)
        mask = (pairs < stop)[:, None] & (cols < C)[None, :]
        h = tl.load(h_ptr + (pair // K)[:, None] * C + cols[None, :], mask, other=0.0).to(tl.float32)
        dw += tl.sum(h * dz[:, None], 0)
    tl.store(dw_ptr + row * C + cols, dw, cols < C)


# ---- blocks of logits

CPU_BUDGET = 2**23  # bytes; a block that stays in the caches: larger ones are slower
GPU_BUDGET = 2**30  # 16k columns of fp32 logits and bf16 gradients at 8k tokens
CPU_NARROWEST = 256  # columns, below which the products slow down; then fewer rows make a block
GPU_NARROWEST = 4096
SPLIT = 16384  # columns whose statistics one program takes


def _blocks(hidden: Tensor, vocabulary: int, memory_budget: int) -> tuple[list[slice], list[slice]]:
    """Rows and columns of the blocks: all rows if their block is wide enough, and blocks of equal width."""
    tokens = hidden.shape[0]
    # fp32 logits and what is computed from them: dz in the products' dtype on a GPU, two temporaries in torch
    elements = memory_budget // (4 + hidden.itemsize if use_triton(hidden) else 3 * max(4, hidden.itemsize))
    narrowest = GPU_NARROWEST if hidden.is_cuda else CPU_NARROWEST
    columns = min(vocabulary, max(narrowest, elements // max(tokens, 1)))
    columns = math.ceil(vocabulary / math.ceil(vocabulary / columns))
    columns = min(vocabulary, _aligned(columns))
    return _slices(tokens, max(1, elements // columns)), _slices(vocabulary, columns)


def _aligned(columns: int) -> int:
    """The stride of a block's rows: whole cache lines, which the matrix units load, whatever the vocabulary."""
    return (columns + 63) // 64 * 64


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a b into out, which may be wider than a and b."""
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _accumulate(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out + a b into out, which may be wider than a and b."""
    if out.dtype != a.dtype and a.is_cuda:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return out.addmm_(a.to(out.dtype), b.to(out.dtype))


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Products on the CPU are taken in fp32: its half precision ones are slower by an order of magnitude."""
    return hidden.dtype if use_triton(hidden) else torch.promote_types(hidden.dtype, torch.float32)


def _splits(h: Tensor, columns: slice) -> int:
    """In how many pieces a chunk's statistics come: enough of them fill a GPU with the rows of a short batch."""
    return triton.cdiv(columns.stop - columns.start, SPLIT) if use_triton(h) else 1


def _row_tile(N: int) -> dict[str, int]:
    return {"BLOCK_N": min(2048, triton.next_power_of_2(N)), "num_warps": 8}


def _summarise(z, bias, targets, start, temperatures, temperature, softcap, part, target_u):
    """Raw products (rows, N) in, destroyed; part (splits, 3, rows) and target_u, for targets in this chunk, out."""
    if use_triton(z):
        rows, N = z.shape
        _token_logprobs_fwd[(rows, len(part))](
            z, bias, targets, temperatures, part, target_u,
            start, N, z.stride(0), part.stride(1), temperature, softcap or 1.0,
            bias is not None, softcap is not None, temperatures is not None,
            SPLIT, **_row_tile(N),
        )  # fmt: skip
        return
    u = _scaled_(z, bias, temperatures, temperature, softcap)
    column, here = _locate(targets, start, z.shape[1])
    target_u.copy_(torch.where(here, u.gather(1, column)[:, 0], target_u))
    top = torch.amax(u, -1, out=part[0, 0])
    u -= top[:, None]
    p = torch.exp(u)
    torch.sum(p, -1, out=part[0, 1])
    torch.sum(p.mul_(u), -1, out=part[0, 2])


def _dlogits(z, bias, targets, start, temperatures, temperature, softcap, saved, dz):
    """Raw products (rows, N) in, destroyed; their gradient out, in dz, which may be z itself."""
    lse, entropy, gain, level, dentropy = saved
    if use_triton(z):
        rows, N = z.shape
        tile = _row_tile(N)
        _token_logprobs_bwd[(rows, triton.cdiv(N, tile["BLOCK_N"]))](
            z, dz, bias, targets, temperatures, lse, entropy, gain, level, dentropy,
            start, N, z.stride(0), temperature, softcap or 1.0,
            bias is not None, softcap is not None, temperatures is not None, dentropy is not None,
            **tile,
        )  # fmt: skip
        return
    u = _scaled_(z, bias, temperatures, temperature, softcap)
    divisor = temperature if temperatures is None else temperatures[:, None]
    capped = None if softcap is None else (u * divisor).div_(softcap)
    u -= lse[:, None]
    slope = (
        level[:, None]
        if dentropy is None
        else level[:, None] - (u + entropy[:, None]).mul_(dentropy[:, None])
    )
    du = u.exp_().mul_(slope)
    column, here = _locate(targets, start, z.shape[1])
    du.scatter_add_(1, column, (gain * here)[:, None])
    if temperatures is not None or temperature != 1:
        du.div_(divisor)
    if capped is not None:
        du.mul_(capped.square_().neg_().add_(1))


def _scaled_(z, bias, temperatures, temperature, softcap):
    """u from raw products, in place."""
    if bias is not None:
        z += bias
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    if temperatures is not None:
        z.div_(temperatures[:, None])
    elif temperature != 1:
        z.div_(temperature)
    return z


def _locate(targets: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """The target's column (rows, 1) in a chunk of the vocabulary, and (rows,) whether it is in the chunk at all."""
    column = targets - start
    return column.clamp(0, width - 1)[:, None], (column >= 0) & (column < width)


# ---- autograd


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    memory_budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    compute, wide = _compute_dtype(hidden), torch.promote_types(hidden.dtype, torch.float32)
    row_blocks, chunks = _blocks(hidden, weight.shape[0], memory_budget)
    splits = [_splits(hidden, columns) for columns in chunks]
    parts = hidden.new_empty(sum(splits), 3, hidden.shape[0], dtype=wide)
    target_u = hidden.new_full(
        (hidden.shape[0],), torch.nan, dtype=wide
    )  # stays NaN for an id outside the vocabulary
    h = hidden.to(compute)
    buffer = _buffer(h, row_blocks, chunks, wide)
    for part, columns in zip(parts.split(splits), chunks, strict=True):
        w, b = weight[columns].to(compute), None if bias is None else bias[columns]
        for rows in row_blocks:
            z = _product(h[rows], w.T, _block(buffer, rows, columns))
            t = None if temperatures is None else temperatures[rows]
            _summarise(
                z, b, targets[rows], columns.start, t, temperature, softcap, part[:, :, rows], target_u[rows]
            )
    tops, totals, weighted = parts.unbind(1)  # (splits, tokens) each
    top = tops.amax(0)
    shift = tops - top
    total = (shift.exp() * totals).sum(0)
    mean = (shift.exp() * (weighted + shift * totals)).sum(0) / total  # of u - top, under p
    lse = top + total.log()
    ignored = targets == ignore_index
    logprob, entropy = target_u - lse, total.log() - mean
    return logprob.masked_fill_(ignored, 0), lse.masked_fill_(ignored, 0), entropy.masked_fill_(ignored, 0)


def _forward_fake(
    hidden, weight, bias, targets, temperatures, temperature, softcap, ignore_index, memory_budget
):  # fmt: skip
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return tuple(hidden.new_empty(hidden.shape[0], dtype=wide) for _ in range(3))


def _backward(
    dlogprob: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    memory_budget: int,
    with_dhidden: bool,
    with_dweight: bool,
    with_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden, dweight and dbias, each empty where it is not asked for."""
    compute, wide = _compute_dtype(hidden), lse.dtype
    row_blocks, chunks = _blocks(hidden, weight.shape[0], memory_budget)
    dhidden = hidden.new_zeros(hidden.shape if with_dhidden else 0, dtype=wide)
    dweight = weight.new_empty(weight.shape if with_dweight else 0)
    dbias = weight.new_zeros(weight.shape[0] if with_dbias else 0, dtype=wide)
    ignored = targets == ignore_index
    lse = lse.masked_fill(ignored, torch.finfo(wide).max)  # p = 0 there, whatever the logits
    gain = torch.zeros_like(lse) if dlogprob is None else dlogprob.masked_fill(ignored, 0)
    level = -gain if dlse is None else dlse.masked_fill(ignored, 0) - gain
    dentropy = None if dentropy is None else dentropy.masked_fill(ignored, 0)
    h = hidden.to(compute)
    buffer = _buffer(h, row_blocks, chunks, wide)
    dbuffer = buffer if wide == compute else torch.empty_like(buffer, dtype=compute)
    whole = len(row_blocks) == 1 and dweight.dtype in (
        compute,
        wide,
    )  # a chunk's dw then comes out of one product
    for columns in chunks:
        w, b = weight[columns].to(compute), None if bias is None else bias[columns]
        dw = (
            dweight[columns] if whole or not with_dweight else h.new_zeros(w.shape, dtype=wide)
        )  # (columns, hidden)
        for rows in row_blocks:
            z = _product(h[rows], w.T, _block(buffer, rows, columns))
            dz = _block(dbuffer, rows, columns)
            t, y = None if temperatures is None else temperatures[rows], targets[rows]
            saved = [None if x is None else x[rows] for x in (lse, entropy, gain, level, dentropy)]
            _dlogits(z, b, y, columns.start, t, temperature, softcap, saved, dz)
            if with_dhidden:
                _accumulate(dz, w, dhidden[rows])
            if with_dweight:
                (_product if whole else _accumulate)(dz.T, h[rows], dw)
            if with_dbias:
                dbias[columns] += dz.sum(0, dtype=wide)
        if with_dweight and not whole:
            dweight[columns] = dw
    return dhidden.to(hidden.dtype), dweight, dbias if bias is None else dbias.to(bias.dtype)


def _backward_fake(
    dlogprob, dlse, dentropy, hidden, weight, bias, targets, temperatures, lse, entropy,
    temperature, softcap, ignore_index, memory_budget, with_dhidden, with_dweight, with_dbias,
):  # fmt: skip
    dhidden = hidden.new_empty(hidden.shape if with_dhidden else 0)
    dweight = weight.new_empty(weight.shape if with_dweight else 0)
    return (
        dhidden,
        dweight,
        (weight if bias is None else bias).new_empty(weight.shape[0] if with_dbias else 0),
    )


def _buffer(h: Tensor, row_blocks: list[slice], chunks: list[slice], dtype: torch.dtype) -> Tensor:
    """Room for the largest block."""
    return h.new_empty(row_blocks[0].stop * _aligned(chunks[0].stop) if row_blocks else 0, dtype=dtype)


def _block(buffer: Tensor, rows: slice, columns: slice) -> Tensor:
    height, width = rows.stop - rows.start, columns.stop - columns.start
    return buffer[: height * _aligned(width)].view(height, _aligned(width))[:, :width]


def _save(ctx, inputs, output):
    hidden, weight, bias, targets, temperatures, *ctx.constants = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, temperatures, *output[1:])
    ctx.set_materialize_grads(False)  # an output that no loss reads costs nothing in the backward


def _differentiate(ctx, dlogprob, dlse, dentropy):
    needs = ctx.needs_input_grad[:3]
    gradients = _dense_backward(dlogprob, dlse, dentropy, *ctx.saved_tensors, *ctx.constants, *needs)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *[None] * 6


_dense_backward = register("token_logprobs_backward", _backward, _backward_fake)
_dense = register("token_logprobs", _forward, _forward_fake, _save, _differentiate)


# a recorded support: rows of W are gathered, so that 50 ids cost 50 products a token whatever the vocabulary


def _gather(hidden: Tensor, weight: Tensor, ids: Tensor, memory_budget: int) -> Tensor:
    """z (tokens, K_max), the products of each row with the rows of weight that its ids name; -1 gives 0."""
    (tokens, K), C = ids.shape, hidden.shape[1]
    z = _gather_fake(hidden, weight, ids, memory_budget)
    if use_triton(hidden):
        tile = {"BLOCK_K": 16, "BLOCK_C": 128}
        if tokens:
            _gathered_fwd[(tokens, triton.cdiv(K, 16))](hidden, weight, ids, z, K, C, **tile)
        return z
    for rows in _gathered_blocks(ids, C, z.itemsize, memory_budget):
        w = weight[ids[rows].clamp(min=0)].to(z.dtype)  # (rows, K_max, hidden)
        z[rows] = (w @ hidden[rows, :, None].to(z.dtype))[:, :, 0].masked_fill_(ids[rows] < 0, 0)
    return z


def _gather_fake(hidden, weight, ids, memory_budget):
    return hidden.new_empty(ids.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))


def _gathered_blocks(ids: Tensor, C: int, itemsize: int, memory_budget: int) -> list[slice]:
    return _slices(ids.shape[0], max(1, memory_budget // (2 * itemsize * ids.shape[1] * C)))


def _gather_backward(
    dz: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    memory_budget: int,
    with_dhidden: bool,
    with_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """dhidden and dweight, each empty where it is not asked for."""
    (tokens, K), (V, C) = ids.shape, weight.shape
    dhidden, dweight = _gather_backward_fake(
        dz, hidden, weight, ids, memory_budget, with_dhidden, with_dweight
    )
    if use_triton(hidden):
        tile = {"BLOCK_K": 8, "BLOCK_C": min(1024, triton.next_power_of_2(C)), "num_warps": 8}
        if with_dhidden and tokens:
            grid = (tokens, triton.cdiv(C, tile["BLOCK_C"]))
            _gathered_dhidden[grid](dz, weight, ids, dhidden, K, C, **tile)
        if with_dweight:
            named = torch.where(ids < 0, V, ids).flatten()
            named, pairs = named.sort(stable=True)
            bounds = torch.searchsorted(named, torch.arange(V + 1, device=ids.device, dtype=ids.dtype))
            grid = (V, triton.cdiv(C, tile["BLOCK_C"]))
            _gathered_dweight[grid](dz, hidden, pairs, bounds, dweight, K, C, **tile)
        return dhidden, dweight
    total = torch.zeros_like(dweight, dtype=dz.dtype)
    for rows in _gathered_blocks(ids, C, dz.itemsize, memory_budget):
        names, d = ids[rows].clamp(min=0), dz[rows].masked_fill(ids[rows] < 0, 0)
        if with_dhidden:
            dhidden[rows] = (d[:, None] @ weight[names].to(dz.dtype))[:, 0].to(hidden.dtype)
        if with_dweight:
            pairs = d[:, :, None] * hidden[rows, None].to(dz.dtype)  # (rows, K_max, hidden)
            total.index_add_(0, names.flatten(), pairs.flatten(0, 1))
    return dhidden, total.to(weight.dtype)


def _gather_backward_fake(dz, hidden, weight, ids, memory_budget, with_dhidden, with_dweight):
    dhidden = hidden.new_empty(hidden.shape if with_dhidden else 0)
    return dhidden, weight.new_empty(weight.shape if with_dweight else 0)


def _gather_save(ctx, inputs, output):
    hidden, weight, ids, ctx.memory_budget = inputs
    ctx.save_for_backward(hidden, weight, ids)


def _gather_differentiate(ctx, dz):
    needs = ctx.needs_input_grad[:2]
    gradients = _supported_backward(dz.contiguous(), *ctx.saved_tensors, ctx.memory_budget, *needs)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None


_supported_backward = register("gathered_products_backward", _gather_backward, _gather_backward_fake)
_supported = register("gathered_products", _gather, _gather_fake, _gather_save, _gather_differentiate)


# ---- public op


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    support: Tensor | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score targets under softmax(softcap(hidden W^T + bias) / temperature), in nats, without the logits in memory.

    hidden: (tokens, hidden)    weight: (vocabulary, hidden)    targets: (tokens,) int    bias: (vocabulary,)
    temperature: above 0, a number or (tokens,); it gets no gradient.
    support: (tokens, K_max) int, distinct ids padded with -1. The sums run over them alone; the target is one.
    ignore_index: a row with this target gives 0, 0, 0 and passes no gradient.
    memory_budget: bytes that logits and their gradients may take at any time.

    Returns logprob, lse, entropy, each (tokens,) in fp32 (fp64 for fp64), each with its own gradient to hidden,
    weight and bias. A weight without requires_grad costs no product for dW.
    Raises ValueError for shapes that disagree and, on the CPU, for a target outside the vocabulary or its support.
    On CUDA, where looking would stall the device, such a row gives NaN.
    """
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(f"memory_budget: expected bytes above 0, got {memory_budget}")
    if hidden.ndim != 2:
        raise ValueError(f"hidden: expected shape (tokens, hidden), got {tuple(hidden.shape)}")
    tokens = hidden.shape[0]
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight: expected shape (vocabulary, hidden={hidden.shape[1]}), got {tuple(weight.shape)}"
        )
    check_shape("targets", targets, tokens=tokens)
    if bias is not None:
        check_shape("bias", bias, vocabulary=weight.shape[0])
    if isinstance(temperature, Tensor):
        check_shape("temperature", temperature, tokens=tokens)
        if temperature.requires_grad:
            raise ValueError("temperature: it has no gradient here; pass temperature.detach()")
    elif not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a number above 0, got {softcap}")
    if support is not None and (support.ndim != 2 or support.shape[0] != tokens or support.shape[1] == 0):
        raise ValueError(f"support: expected shape (tokens={tokens}, K_max), got {tuple(support.shape)}")
    for name, x in (("targets", targets), ("support", support)):
        if x is not None and x.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}: expected int32 or int64, got {x.dtype}")
    if use_triton(hidden):
        check_dtype("hidden", hidden)
    if not hidden.is_cuda and not torch.compiler.is_compiling():
        _check_ids(targets, support, weight.shape[0], ignore_index)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    budget = (GPU_BUDGET if hidden.is_cuda else CPU_BUDGET) if memory_budget is None else memory_budget
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if not use_triton(hidden) and 6 * wide.itemsize * tokens * weight.shape[0] <= budget:
        # autograd's own copies of such small logits fit: no need to compute them twice
        return token_logprobs_reference(
            hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, support=support,
            ignore_index=ignore_index,
        )  # fmt: skip
    targets = targets.long().contiguous()
    if support is not None:
        ids = support.contiguous()
        z = _supported(hidden.contiguous(), weight.contiguous(), ids, budget)  # (tokens, K_max)
        trained = targets != ignore_index
        match = ids == targets[:, None]
        b = None if bias is None else bias.to(wide)[ids.clamp(min=0)]
        logprob, lse, entropy = _score(z, match.int().argmax(-1), trained, b, temperature, softcap, ids >= 0)
        return torch.where(match.any(-1) | ~trained, logprob, torch.nan), lse, entropy
    temperatures = temperature.to(wide).contiguous() if isinstance(temperature, Tensor) else None
    number = 1.0 if isinstance(temperature, Tensor) else float(temperature)
    return _dense(hidden, weight, bias, targets, temperatures, number, softcap, ignore_index, budget)


def _check_ids(targets: Tensor, support: Tensor | None, vocabulary: int, ignore_index: int) -> None:
    trained = targets != ignore_index
    wrong = trained & ((targets < 0) | (targets >= vocabulary))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"targets: row {row} is {int(targets[row])}, outside a vocabulary of {vocabulary}")
    if support is None:
        return
    if (support >= vocabulary).any():
        raise ValueError(f"support: id {int(support.max())} is outside a vocabulary of {vocabulary}")
    missing = trained & ~(support == targets[:, None]).any(-1)
    if missing.any():
        row = int(missing.nonzero()[0])
        raise ValueError(f"support: row {row} does not hold its target {int(targets[row])}")
