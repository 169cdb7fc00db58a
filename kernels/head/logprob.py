"""Token log-probabilities of a linear head, without its logits.

    z = hidden W^T + bias        s = softcap tanh(z / softcap)        u = s / temperature        p = softmax(u)

    lse = log sum_j exp(u_j)     logprob = u_y - lse                  entropy = lse - sum_j p_j u_j

    du_j = g_logprob [j = y] + p_j (g_lse - g_logprob - g_entropy (u_j - lse + entropy))
    dz   = du (1 - (s / softcap)^2) / temperature
    dhidden = dz W        dW = dz^T hidden        dbias = sum over tokens of dz

With a recorded support (the ids that a truncating sampler kept), the sums over j run over that row's support.

Memory, in elements: eager code writes (tokens, V) logits, their softmax and its gradient, and reads them again for
each of the head's products: about 8 tokens V. Here the forward keeps of each tile of logits four numbers a row, merged
as in the online softmax; the backward computes the logits again, a fourth product, and writes their gradient a chunk
of the vocabulary at a time: 3 tokens V. A chunk of the vocabulary, unlike a chunk of tokens, owns its rows of dW: they
come out of one product, accumulated in fp32, and no second copy of dW is kept.

Source: the online softmax of Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867
"""

# Triton's launches and tuples are opaque to pyright
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
from torch import Tensor

from .._chip import check_device, check_shape, precision, readable, use_triton, without_autocast
from .._op import register
from .._triton import tl, triton
from .blocks import (
    _place,
    _products,
    _quarter,
    _scaled,
    _sharpness,
    _store_gradient,
    block_of,
    blocks_of,
    buffer_of,
    bytes_of,
    cast,
    check_adapter,
    check_budget,
    check_head,
    check_ids,
    checked_temperature,
    described,
    exponential,
    grid_of,
    has_tma,
    head_gradients,
    head_gradients_fake,
    locate,
    low_rank,
    operand,
    rows_of,
    scaled_,
    slices,
    split_temperature,
    tile_of,
)

# ---- reference


@without_autocast  # fp32 inside, whatever the policy outside
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
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(
        hidden.dtype, torch.float32
    )  # fp64 stays fp64: gradients are checked by finite differences
    z = hidden.to(wide) @ weight.to(wide).T  # (tokens, vocabulary)
    if lora_a is not None and lora_b is not None:
        z = z + scaling * (hidden.to(wide) @ lora_a.to(wide).T) @ lora_b.to(wide).T
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
def _columns_of(target_ptr, rows, T, start, N):
    # int32, of targets in a chunk of N columns that begins at `start`; -1 for any other number, of 64 bits
    y = tl.load(target_ptr + rows, rows < T, other=-1) - start
    return tl.where((y >= 0) & (y < N), y, -1).to(tl.int32)


@triton.jit
def _token_logprobs_fwd(
    h, w, bias_ptr, target_ptr, temperature_ptr, part_ptr, target_u_ptr,
    T, N, C, h_stride, w_stride, start, temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_TEMPERATURES: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # of BLOCK_N columns of a row: their maximum, the sum of exponentials, and that of exponentials times logits
    tiles_m, tiles_n = tl.cdiv(T, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        m, n = _place(tile, tiles_m, tiles_n, GROUP)
        z = _products(h, w, m, n, T, N, C, h_stride, w_stride, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
        sharpness = _sharpness(temperature_ptr, rows, T, temperature, HAS_TEMPERATURES)
        y = _columns_of(target_ptr, rows, T, start, N)
        top = tl.full([BLOCK_M], -1e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        weighted = tl.zeros([BLOCK_M], tl.float32)
        target_u = tl.zeros([BLOCK_M], tl.float32)
        for i in tl.static_range(4):
            cols = n * BLOCK_N + i * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            u = _quarter(z, i, BLOCK_M, BLOCK_N)  # [BLOCK_M, BLOCK_N / 4]
            u = _scaled(u, bias_ptr, cols, N, sharpness, softcap, HAS_BIAS, HAS_SOFTCAP)
            u = tl.where((cols < N)[None, :], u, -1e30)  # finite: p times it is 0
            target_u += tl.sum(tl.where(cols[None, :] == y[:, None], u, 0.0), 1)
            new_top = tl.maximum(top, tl.max(u, 1))
            u -= new_top[:, None]
            p = tl.exp(u)
            shift = top - new_top
            weighted = tl.exp(shift) * (weighted + shift * total) + tl.sum(p * u, 1)
            total = tl.exp(shift) * total + tl.sum(p, 1)
            top = new_top
        at = part_ptr + n.to(tl.int64) * 3 * T + rows
        tl.store(at, top, rows < T)
        tl.store(at + T, total, rows < T)
        tl.store(at + 2 * T, weighted, rows < T)
        here = (y >= n * BLOCK_N) & (y < n * BLOCK_N + BLOCK_N)
        tl.store(target_u_ptr + rows, target_u, here & (rows < T))


@triton.jit
def _token_logprobs_bwd(
    h, w, dz, bias_ptr, target_ptr, temperature_ptr,
    highest_ptr, log_ptr, entropy_ptr, gain_ptr, level_ptr, dentropy_ptr, db_ptr,
    T, N, C, h_stride, w_stride, dz_stride, start, temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_TEMPERATURES: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, WITH_DBIAS: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(T, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        m, n = _place(tile, tiles_m, tiles_n, GROUP)
        z = _products(h, w, m, n, T, N, C, h_stride, w_stride, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
        sharpness = _sharpness(temperature_ptr, rows, T, temperature, HAS_TEMPERATURES)
        y = _columns_of(target_ptr, rows, T, start, N)
        highest = tl.load(highest_ptr + rows, rows < T, other=0.0)[:, None]
        log = tl.load(log_ptr + rows, rows < T, other=0.0)[:, None]
        gain = tl.load(gain_ptr + rows, rows < T, other=0.0)[:, None]
        level = tl.load(level_ptr + rows, rows < T, other=0.0)[:, None]
        for i in tl.static_range(4):
            cols = n * BLOCK_N + i * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            u = _quarter(z, i, BLOCK_M, BLOCK_N)  # [BLOCK_M, BLOCK_N / 4]
            u = _scaled(u, bias_ptr, cols, N, sharpness, softcap, HAS_BIAS, HAS_SOFTCAP)
            log_p = u - highest - log
            slope = level
            if HAS_ENTROPY:
                entropy = tl.load(entropy_ptr + rows, rows < T, other=0.0)[:, None]
                slope = level - tl.load(dentropy_ptr + rows, rows < T, other=0.0)[:, None] * (log_p + entropy)
            d = (tl.exp(log_p) * slope + tl.where(cols[None, :] == y[:, None], gain, 0.0)) * sharpness
            if HAS_SOFTCAP:
                s = u / (sharpness * softcap)
                d = d * (1 - s * s)
            first = n * BLOCK_N + i * (BLOCK_N // 4)
            _store_gradient(
                d, dz, db_ptr, m, first, rows, cols, T, N, dz_stride, WITH_DBIAS, TMA, BLOCK_M
            )  # fmt: skip


@triton.jit
def _gathered_fwd(h_ptr, w_ptr, ids_ptr, z_ptr, K, C, V, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    # NaN for an id outside the vocabulary, 0 for padding
    row = tl.program_id(0).to(tl.int64)
    ks = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + row * K + ks, ks < K, other=-1).to(tl.int64)  # [BLOCK_K]
    z = tl.zeros([BLOCK_K], tl.float32)
    for block in range(0, C, BLOCK_C):
        cols = block + tl.arange(0, BLOCK_C)
        h = tl.load(h_ptr + row * C + cols, cols < C, other=0.0).to(tl.float32)  # [BLOCK_C]
        mask = ((ids >= 0) & (ids < V))[:, None] & (cols < C)[None, :]
        w = tl.load(w_ptr + ids[:, None] * C + cols[None, :], mask, other=0.0).to(tl.float32)  # [K, C]
        z += tl.sum(w * h[None, :], 1)
    tl.store(z_ptr + row * K + ks, tl.where(ids < V, z, float("nan")), ks < K)


@triton.jit
def _gathered_dhidden(dz_ptr, w_ptr, ids_ptr, dh_ptr, K, C, V, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    dh = tl.zeros([BLOCK_C], tl.float32)
    for block in range(0, K, BLOCK_K):
        ks = block + tl.arange(0, BLOCK_K)
        ids = tl.load(ids_ptr + row * K + ks, ks < K, other=-1).to(tl.int64)  # [BLOCK_K]
        dz = tl.load(dz_ptr + row * K + ks, ids >= 0, other=0.0)
        mask = ((ids >= 0) & (ids < V))[:, None] & (cols < C)[None, :]
        w = tl.load(w_ptr + ids[:, None] * C + cols[None, :], mask, other=0.0).to(tl.float32)  # [K, C]
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


def _summarise_triton(h, w, bias, targets, start, temperatures, temperature, softcap, target_u):
    """parts (pieces, 3, tokens) of a chunk of the vocabulary; target_u where the target is in it."""
    (T, C), N = h.shape, w.shape[0]
    tile, tma = tile_of(h), has_tma(h)
    parts = h.new_empty(triton.cdiv(N, tile["BLOCK_N"]), 3, T, dtype=torch.float32)
    if T:
        h_tile, w_tile = [tile["BLOCK_M"], tile["BLOCK_K"]], [tile["BLOCK_N"], tile["BLOCK_K"]]
        _token_logprobs_fwd[grid_of(h, N, tile, tma)](
            described(h, h_tile, tma), described(w, w_tile, tma), bias, targets, temperatures, parts, target_u,
            T, N, C, h.stride(0), w.stride(0), start, temperature, softcap or 1.0,
            bias is not None, softcap is not None, temperatures is not None, tma, precision(), **tile,
        )  # fmt: skip
    return parts


def _dlogits_triton(h, w, bias, targets, start, temperatures, temperature, softcap, saved, dz, with_dbias):
    """dz (rows, N) of a block, filled; returns its sum over the rows, in fp32 as it was before rounding."""
    (T, C), N = h.shape, w.shape[0]
    highest, log, entropy, gain, level, dentropy = saved
    tile, tma = tile_of(h), has_tma(h)
    h_tile, w_tile = [tile["BLOCK_M"], tile["BLOCK_K"]], [tile["BLOCK_N"], tile["BLOCK_K"]]
    z_tile = [tile["BLOCK_M"], tile["BLOCK_N"] // 4]
    db = h.new_empty(triton.cdiv(T, tile["BLOCK_M"]) if with_dbias else 0, N, dtype=torch.float32)
    _token_logprobs_bwd[grid_of(h, N, tile, tma)](
        described(h, h_tile, tma), described(w, w_tile, tma), described(dz, z_tile, tma),
        bias, targets, temperatures, highest, log, entropy, gain, level, dentropy, db,
        T, N, C, h.stride(0), w.stride(0), dz.stride(0), start, temperature, softcap or 1.0,
        bias is not None, softcap is not None, temperatures is not None, dentropy is not None, with_dbias,
        tma, precision(), **tile,
    )  # fmt: skip
    return db.sum(0)


# ---- blocks on a CPU

COPIES = 3  # of a block: the logits and two temporaries


def _summarise(
    h, w, bias, targets, start, temperatures, temperature, softcap, target_u, row_blocks, buffer, part
):  # fmt: skip
    """As _summarise_triton, with the logits of one block of rows at a time in buffer; one piece, into part."""
    for rows in row_blocks:
        z = torch.mm(h[rows], w.T, out=block_of(buffer, rows, w.shape[0]))
        u = scaled_(z, bias, None if temperatures is None else temperatures[rows], temperature, softcap)
        column, here = locate(targets[rows], start, u.shape[1])
        target_u[rows] = torch.where(here, u.gather(1, column)[:, 0], target_u[rows])
        top, total, weighted = part[:, rows]
        u -= torch.amax(u, -1, out=top)[:, None]
        p = exponential(u)
        torch.sum(p, -1, out=total)
        torch.sum(p.mul_(u), -1, out=weighted)


def _dlogits(h, w, bias, targets, start, temperatures, temperature, softcap, saved, dz, with_dbias):
    """As _dlogits_triton."""
    highest, log, entropy, gain, level = (x[:, None] for x in saved[:5])
    dentropy = None if saved[5] is None else saved[5][:, None]
    z = torch.mm(h, w.T, out=dz)
    u = scaled_(z, bias, temperatures, temperature, softcap)
    divisor = temperature if temperatures is None else temperatures[:, None]
    capped = None if softcap is None else (u * divisor).div_(softcap)
    u.sub_(highest).sub_(log)  # their sum, rounded at the size of the logits, would be wrong for a whole row
    slope = level if dentropy is None else level - (u + entropy).mul_(dentropy)
    du = exponential(u, out=u).mul_(slope)
    column, here = locate(targets, start, u.shape[1])
    du.scatter_add_(1, column, gain * here[:, None])
    if temperatures is not None or temperature != 1:
        du.div_(divisor)
    if capped is not None:
        du.mul_(capped.square_().neg_().add_(1))
    return dz.sum(0) if with_dbias else dz.new_empty(0)


# ---- autograd


def _forward(
    hidden: Tensor,
    weight: Tensor,
    lora_b: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    memory_budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprob, lse, entropy, and norms (2, tokens): the highest logit, and the logarithm of the sum of exponentials
    below it."""
    h = operand(hidden)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    row_blocks, chunks = blocks_of(hidden, weight.shape[0], memory_budget, bytes_of(hidden, COPIES))
    if use_triton(h) and weight.dtype == h.dtype and lora_b is None:
        chunks = [
            slice(0, weight.shape[0])
        ]  # no logits in memory, and no copy of the weight in another dtype
    buffer = None if use_triton(h) else buffer_of(h, row_blocks, chunks)
    target_u = h.new_full((h.shape[0],), torch.nan, dtype=wide)  # stays NaN for an id outside the vocabulary
    # on a CPU made before the blocks: small tensors left between these keep their memory from being used again
    parts = [] if buffer is None else [target_u.new_empty(len(chunks), 3, h.shape[0])]
    for i, columns in enumerate(chunks):
        w, b = rows_of(weight, lora_b, columns, h.dtype), None if bias is None else bias[columns]
        block = h, w, b, targets, columns.start, temperatures, temperature, softcap, target_u
        if buffer is None:
            parts.append(_summarise_triton(*block))
        else:
            _summarise(*block, row_blocks, buffer, parts[0][i])
    tops, totals, weighted = torch.cat(parts).unbind(1)  # (pieces, tokens) each
    top = tops.amax(0)
    shift = tops - top
    total = (shift.exp() * totals).sum(0)
    mean = (shift.exp() * (weighted + shift * totals)).sum(0) / total  # of u - top, under p
    log = total.log()
    ignored = targets == ignore_index
    logprob, lse, entropy = (
        x.masked_fill_(ignored, 0) for x in (target_u - top - log, top + log, log - mean)
    )
    return logprob, lse, entropy, torch.stack((top, log))


def _forward_fake(
    hidden, weight, lora_b, bias, targets, temperatures, temperature, softcap, ignore_index, memory_budget
):  # fmt: skip
    wide = torch.promote_types(hidden.dtype, torch.float32)
    scores = (hidden.new_empty(hidden.shape[0], dtype=wide) for _ in range(3))
    return *scores, hidden.new_empty(2, hidden.shape[0], dtype=wide)


def _backward(
    dlogprob: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    lora_b: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    entropy: Tensor,
    norms: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    memory_budget: int,
    with_dhidden: bool,
    with_dweight: bool,
    with_dlora_b: bool,
    with_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dhidden, dweight, dlora_b and dbias, each empty where it is not asked for."""
    ignored = targets == ignore_index
    highest, log = norms
    highest = highest.masked_fill(ignored, torch.finfo(highest.dtype).max)  # p = 0 there, whatever the logits
    gain = torch.zeros_like(highest) if dlogprob is None else dlogprob.masked_fill(ignored, 0)
    level = -gain if dlse is None else dlse.masked_fill(ignored, 0) - gain
    dentropy = None if dentropy is None else dentropy.masked_fill(ignored, 0)
    dlogits = _dlogits_triton if use_triton(hidden) else _dlogits

    def fill(rows, columns, h, w, b, dz):
        t = None if temperatures is None else temperatures[rows]
        saved = [None if x is None else x[rows] for x in (highest, log, entropy, gain, level, dentropy)]
        return dlogits(h, w, b, targets[rows], columns.start, t, temperature, softcap, saved, dz, with_dbias)

    needs = with_dhidden, with_dweight, with_dlora_b, with_dbias
    return head_gradients(hidden, weight, lora_b, bias, memory_budget, bytes_of(hidden, COPIES), fill, needs)


def _backward_fake(
    dlogprob, dlse, dentropy, hidden, weight, lora_b, bias, targets, temperatures, entropy, norms,
    temperature, softcap, ignore_index, memory_budget, with_dhidden, with_dweight, with_dlora_b, with_dbias,
):  # fmt: skip
    needs = with_dhidden, with_dweight, with_dlora_b, with_dbias
    return head_gradients_fake(hidden, weight, lora_b, bias, needs)


def _save(ctx, inputs, output):
    hidden, weight, lora_b, bias, targets, temperatures, *ctx.constants = inputs
    ctx.save_for_backward(hidden, weight, lora_b, bias, targets, temperatures, *output[2:])
    ctx.set_materialize_grads(False)  # an output that no loss reads costs nothing in the backward


def _differentiate(ctx, dlogprob, dlse, dentropy, _):
    needs = ctx.needs_input_grad[:4]
    gradients = _dense_backward(dlogprob, dlse, dentropy, *ctx.saved_tensors, *ctx.constants, *needs)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *[None] * 6


_dense_backward = register("token_logprobs_backward", _backward, _backward_fake)
_dense = register("token_logprobs", _forward, _forward_fake, _save, _differentiate)


# a recorded support: rows of W are gathered, so that 50 ids cost 50 products a token whatever the vocabulary


def _gather(hidden: Tensor, weight: Tensor, ids: Tensor, memory_budget: int) -> Tensor:
    """z (tokens, K_max), the products of each row with the rows of weight that its ids name; -1 gives 0.

    An id outside the vocabulary gives NaN, on the Triton path; no gradient of it reaches weight.
    """
    (tokens, K), C = ids.shape, hidden.shape[1]
    z = _gather_fake(hidden, weight, ids, memory_budget)
    if use_triton(hidden):
        tile = {"BLOCK_K": 16, "BLOCK_C": 128}
        if tokens:
            _gathered_fwd[(tokens, triton.cdiv(K, 16))](hidden, weight, ids, z, K, C, weight.shape[0], **tile)
        return z
    for rows in _gathered_blocks(ids, C, z.itemsize, memory_budget):
        w = weight[ids[rows].clamp(min=0)].to(z.dtype)  # (rows, K_max, hidden)
        z[rows] = (w @ hidden[rows, :, None].to(z.dtype))[:, :, 0].masked_fill_(ids[rows] < 0, 0)
    return z


def _gather_fake(hidden, weight, ids, memory_budget):
    return hidden.new_empty(ids.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))


def _gathered_blocks(ids: Tensor, C: int, itemsize: int, memory_budget: int) -> list[slice]:
    return slices(ids.shape[0], max(1, memory_budget // (2 * itemsize * ids.shape[1] * C)))


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
            _gathered_dhidden[grid](dz, weight, ids, dhidden, K, C, V, **tile)
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
    lora_a: (R, hidden)    lora_b: (vocabulary, R): of an adapter, W + scaling B A, never multiplied out.
    temperature: finite and above 0, a number or (tokens,); it gets no gradient.
    support: (tokens, K_max) int, distinct ids padded with -1. The sums run over them alone; the target is one.
    ignore_index: a row with this target gives 0, 0, 0 and passes no gradient.
    memory_budget: bytes that logits and their gradients may take at any time.

    Returns logprob, lse, entropy, each (tokens,) in fp32 (fp64 for fp64), each with its own gradient to hidden,
    weight, bias and the adapter. A weight without requires_grad costs no product for dW.
    Raises ValueError for shapes, dtypes and devices that disagree, for numbers other than these and, on the CPU, for
    rows: a target outside the vocabulary or its support, an id outside, one twice in a row that is not ignored, a
    temperature not above 0. On CUDA, where looking would stall the device, such a row gives NaN, and an id that is
    there twice counts twice.
    """
    budget = check_budget(hidden, memory_budget)
    check_head(hidden, weight, bias, softcap)
    check_adapter(hidden, weight, lora_a, lora_b, scaling)
    tokens = hidden.shape[0]
    check_shape("targets", targets, tokens=tokens)
    check_device(hidden, targets=targets, support=support)
    temperature = checked_temperature(hidden, temperature)
    if support is not None and (support.ndim != 2 or support.shape[0] != tokens or support.shape[1] == 0):
        raise ValueError(f"support: expected shape (tokens={tokens}, K_max), got {tuple(support.shape)}")
    for name, x in (("targets", targets), ("support", support)):
        if x is not None and x.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}: expected int32 or int64, got {x.dtype}")
    if readable(hidden):
        _check_targets(targets, support, weight.shape[0], ignore_index)
    hidden = cast(hidden)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if not use_triton(hidden) and 6 * wide.itemsize * tokens * weight.shape[0] <= budget:
        # autograd's own copies of such small logits fit: no need to compute them twice
        return token_logprobs_reference(
            hidden, weight, targets, bias=bias, lora_a=lora_a, lora_b=lora_b, scaling=scaling,
            temperature=temperature, softcap=softcap, support=support, ignore_index=ignore_index,
        )  # fmt: skip
    low = None  # what an adapter adds is more columns of hidden and weight: no W + scaling B A
    if lora_a is not None:
        low = low_rank(hidden, lora_a, scaling)
    targets = targets.long().contiguous()
    bias = None if bias is None else bias.contiguous()
    if support is not None:
        ids = support.contiguous()
        z = _supported(hidden.contiguous(), weight.contiguous(), ids, budget)  # (tokens, K_max)
        if low is not None and lora_b is not None:
            z = z + _supported(low.contiguous(), lora_b.contiguous(), ids, budget)
        trained = targets != ignore_index
        match = ids == targets[:, None]
        b = None if bias is None else bias.to(wide)[ids.clamp(0, weight.shape[0] - 1)]
        logprob, lse, entropy = _score(z, match.int().argmax(-1), trained, b, temperature, softcap, ids >= 0)
        return torch.where(match.any(-1) | ~trained, logprob, torch.nan), lse, entropy
    temperatures, number = split_temperature(temperature, wide)
    hidden = hidden if low is None else torch.cat((hidden, low), 1)  # (tokens, C + R)
    options = number, softcap, ignore_index, budget
    return _dense(hidden, weight, lora_b, bias, targets, temperatures, *options)[:3]


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
