"""Divergence of two linear heads, a number a token, without the logits of either.

    z = hidden W^T + bias        s = softcap tanh(z / softcap)        u = s / temperature        p = softmax(u)

with p_S the student's and p_T the teacher's, which has no gradient:

    beta = 0    D = KL(p_T || p_S) = sum_j p_T (u_T - u_S) - lse_T + lse_S              du_S = p_S - p_T
    beta = 1    D = KL(p_S || p_T) = sum_j p_S (u_S - u_T) - lse_S + lse_T              du_S = p_S (r - sum_k p_S r)
    between     D = beta KL(p_T || m) + (1 - beta) KL(p_S || m)              du_S = (1 - beta) p_S (r - sum_k p_S r)

    m = beta p_T + (1 - beta) p_S,  r_j = log p_S - log p_T for beta = 1, log p_S - log m between

The two KLs are the ends by definition: the limit of the mixture's formula there is 0. From r the rest follows as in
logprob.py: dz, dhidden, dW, dbias.

Memory, in elements: eager code writes (tokens, V) logits of both, their logarithms and the gradient, and reads them
again: about 14 tokens V. Here the forward keeps of each tile six numbers a row, and the backward, which computes both
heads' logits again, writes the student's gradient a chunk of the vocabulary at a time: 3 tokens V. A mixture cannot be
taken before both normalisers are known: its forward writes both logits of some rows, and reads them: 4 tokens V more.

With logits in the thousands, r and its mean are differences of such numbers and du is small or 0: both are kept
relative to what they are at the row's likeliest id, and normalisers as a highest logit and the logarithm below it.

Source: GKD, Agarwal et al. 2023, https://arxiv.org/abs/2306.13649, eq. 1
"""

# Triton's launches and tuples are opaque to pyright
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
from torch import Tensor

from .._chip import INTERPRET, capability, check_device, precision, use_triton, without_autocast
from .._op import register
from .._triton import tl, triton
from ._old import (
    _place,
    _products,
    _quarter,
    _scaled,
    _sharpness,
    _store_gradient,
    aligned,
    block_of,
    blocks_of,
    buffer_of,
    bytes_of,
    cast,
    check_adapter,
    check_budget,
    check_head,
    check_mask,
    checked_temperature,
    described,
    divergence_of,
    exponential,
    grid_of,
    has_tma,
    head_gradients,
    head_gradients_fake,
    operand,
    rows_of,
    scaled_,
    scaled_logits,
    slices,
    split_temperature,
    widened,
)

# ---- reference


@without_autocast  # fp32 inside, whatever the policy outside
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
    memory_budget: int | None = None,
) -> Tensor:
    u = scaled_logits(
        hidden, weight, lora_a=lora_a, lora_b=lora_b, scaling=scaling, bias=bias,
        temperature=temperature, softcap=softcap,
    )  # fmt: skip
    with torch.no_grad():
        t = scaled_logits(
            teacher_hidden, teacher_weight, lora_a=teacher_lora_a, lora_b=teacher_lora_b, scaling=teacher_scaling,
            bias=teacher_bias, temperature=temperature, softcap=teacher_softcap,
        )  # fmt: skip
    divergence = divergence_of(torch.log_softmax(t, -1), torch.log_softmax(u, -1), beta)
    return divergence if mask is None else torch.where(mask, divergence, 0)


# ---- kernels


@triton.jit
def _against_mixture(d, beta):
    # log p_S - log m and log p_T - log m, with d = log p_T - log p_S: of -log(1 - beta + beta e^d), d + that
    top = tl.maximum(d, 0.0)
    log = tl.log(beta * tl.exp(d - top) + (1 - beta) * tl.exp(-top))
    return -top - log, d - top - log


@triton.jit
def _token_divergence_fwd(
    h, w, th, tw, u_ptr, t_ptr, bias_ptr, teacher_bias_ptr, temperature_ptr, part_ptr,
    T, N, C, TC, h_stride, w_stride, th_stride, tw_stride, u_stride, temperature, softcap, teacher_softcap,
    HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_TEACHER_SOFTCAP: tl.constexpr, HAS_TEMPERATURES: tl.constexpr,
    REVERSE: tl.constexpr, KEEP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # of BLOCK_N columns of a row: both maxima and both sums of exponentials; and with d = u_T - u_S, under p_S with
    # REVERSE, p_T without: d at the maximum, and the sum of exponentials times what d is beyond that.
    # KEEP writes the logits of both in place of that sum
    tiles_m, tiles_n = tl.cdiv(T, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        m, n = _place(tile, tiles_m, tiles_n, GROUP)
        z = _products(h, w, m, n, T, N, C, h_stride, w_stride, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        tz = _products(
            th, tw, m, n, T, N, TC, th_stride, tw_stride, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
        rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
        sharpness = _sharpness(temperature_ptr, rows, T, temperature, HAS_TEMPERATURES)
        top = tl.full([BLOCK_M], -1e30, tl.float32)
        teacher_top = tl.full([BLOCK_M], -1e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        teacher_total = tl.zeros([BLOCK_M], tl.float32)
        apart = tl.zeros([BLOCK_M], tl.float32)
        reference = tl.zeros([BLOCK_M], tl.float32)
        for i in tl.static_range(4):
            cols = n * BLOCK_N + i * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            inside = (cols < N)[None, :]
            u = _quarter(z, i, BLOCK_M, BLOCK_N)  # [BLOCK_M, BLOCK_N / 4]
            u = _scaled(u, bias_ptr, cols, N, sharpness, softcap, HAS_BIAS, HAS_SOFTCAP)
            t = _quarter(tz, i, BLOCK_M, BLOCK_N)
            t = _scaled(
                t,
                teacher_bias_ptr,
                cols,
                N,
                sharpness,
                teacher_softcap,
                HAS_TEACHER_BIAS,
                HAS_TEACHER_SOFTCAP,
            )
            if KEEP:
                at = rows.to(tl.int64)[:, None] * u_stride + cols[None, :]
                tl.store(u_ptr + at, u, (rows < T)[:, None] & inside)
                tl.store(t_ptr + at, t, (rows < T)[:, None] & inside)
            u = tl.where(inside, u, -1e30)
            t = tl.where(inside, t, -1e30)  # p times u_T - u_S is 0 there
            d = t - u
            here, teacher_here = tl.max(u, 1), tl.max(t, 1)
            new_top, new_teacher_top = tl.maximum(top, here), tl.maximum(teacher_top, teacher_here)
            if REVERSE:
                found = tl.max(tl.where(u == here[:, None], d, -1e38), 1)
                new_reference = tl.where(here > top, found, reference)
            else:
                found = tl.max(tl.where(t == teacher_here[:, None], d, -1e38), 1)
                new_reference = tl.where(teacher_here > teacher_top, found, reference)
            p, q = tl.exp(u - new_top[:, None]), tl.exp(t - new_teacher_top[:, None])
            shrink, teacher_shrink = tl.exp(top - new_top), tl.exp(teacher_top - new_teacher_top)
            if not KEEP:
                apart += (reference - new_reference) * (total if REVERSE else teacher_total)
                apart *= shrink if REVERSE else teacher_shrink
                apart += tl.sum((p if REVERSE else q) * (d - new_reference[:, None]), 1)
            total = shrink * total + tl.sum(p, 1)
            teacher_total = teacher_shrink * teacher_total + tl.sum(q, 1)
            top, teacher_top, reference = new_top, new_teacher_top, new_reference
        at = part_ptr + n.to(tl.int64) * 6 * T + rows
        tl.store(at, total, rows < T)
        tl.store(at + T, teacher_total, rows < T)
        tl.store(at + 2 * T, top, rows < T)
        tl.store(at + 3 * T, teacher_top, rows < T)
        tl.store(at + 4 * T, apart, rows < T)
        tl.store(at + 5 * T, reference, rows < T)


@triton.jit
def _mixture_fwd(
    u_ptr, t_ptr, norm_ptr, part_ptr, T, N, stride, beta, PIECE: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    # of PIECE columns of a row: sum p_S (log p_S - log m - reference), sum p_T (log p_T - log m)
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    norm = norm_ptr + row
    highest, log = tl.load(norm), tl.load(norm + T)
    teacher_highest, teacher_log = tl.load(norm + 2 * T), tl.load(norm + 3 * T)
    reference = tl.load(norm + 5 * T)
    apart = tl.zeros([BLOCK_N], tl.float32)
    teacher_apart = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, PIECE, BLOCK_N):
        cols = piece * PIECE + start + tl.arange(0, BLOCK_N)
        u = tl.load(u_ptr + row * stride + cols, cols < N, other=-1e30) - highest - log
        t = tl.load(t_ptr + row * stride + cols, cols < N, other=-1e30) - teacher_highest - teacher_log
        of_student, of_teacher = _against_mixture(t - u, beta)
        apart += tl.exp(u) * (of_student - reference)
        teacher_apart += tl.exp(t) * of_teacher
    at = part_ptr + piece * 2 * T + row
    tl.store(at, tl.sum(apart, 0))
    tl.store(at + T, tl.sum(teacher_apart, 0))


@triton.jit
def _token_divergence_bwd(
    h, w, th, tw, dz, bias_ptr, teacher_bias_ptr, temperature_ptr,
    norm_ptr, gain_ptr, db_ptr,
    T, N, C, TC, h_stride, w_stride, th_stride, tw_stride, dz_stride, temperature, softcap, teacher_softcap, beta,
    HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_TEACHER_SOFTCAP: tl.constexpr, HAS_TEMPERATURES: tl.constexpr,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr, WITH_DBIAS: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(T, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        m, n = _place(tile, tiles_m, tiles_n, GROUP)
        z = _products(h, w, m, n, T, N, C, h_stride, w_stride, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        tz = _products(
            th, tw, m, n, T, N, TC, th_stride, tw_stride, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
        rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
        sharpness = _sharpness(temperature_ptr, rows, T, temperature, HAS_TEMPERATURES)
        norms = norm_ptr + rows
        highest = tl.load(norms, rows < T, other=0.0)[:, None]
        log = tl.load(norms + T, rows < T, other=0.0)[:, None]
        teacher_highest = tl.load(norms + 2 * T, rows < T, other=0.0)[:, None]
        teacher_log = tl.load(norms + 3 * T, rows < T, other=0.0)[:, None]
        level = tl.load(norms + 4 * T, rows < T, other=0.0)[:, None]
        reference = tl.load(norms + 5 * T, rows < T, other=0.0)[:, None]
        gain = tl.load(gain_ptr + rows, rows < T, other=0.0)[:, None]
        for i in tl.static_range(4):
            first = n * BLOCK_N + i * (BLOCK_N // 4)
            cols = first + tl.arange(0, BLOCK_N // 4)
            u = _quarter(z, i, BLOCK_M, BLOCK_N)  # [BLOCK_M, BLOCK_N / 4]
            u = _scaled(u, bias_ptr, cols, N, sharpness, softcap, HAS_BIAS, HAS_SOFTCAP)
            t = _quarter(tz, i, BLOCK_M, BLOCK_N)
            t = _scaled(
                t,
                teacher_bias_ptr,
                cols,
                N,
                sharpness,
                teacher_softcap,
                HAS_TEACHER_BIAS,
                HAS_TEACHER_SOFTCAP,
            )
            log_p = u - highest - log
            log_q = t - teacher_highest - teacher_log
            p = tl.exp(log_p)
            if FORWARD:
                d = p - tl.exp(log_q)
            elif REVERSE:
                d = p * (level - (t - u - reference))
            else:
                r, _ = _against_mixture(log_q - log_p, beta)
                d = p * (r - reference - level)
            d = d * gain * sharpness
            if HAS_SOFTCAP:
                s = u / (sharpness * softcap)
                d = d * (1 - s * s)
            _store_gradient(
                d, dz, db_ptr, m, first, rows, cols, T, N, dz_stride, WITH_DBIAS, TMA, BLOCK_M
            )  # fmt: skip


# ---- blocks on a GPU


def _tile(h: Tensor, th: Tensor, beta: float = 0.0) -> dict[str, int]:
    """Two accumulators, so half of logprob's tile; on Hopper the mixture's gradient takes half of that again.

    GeForce's Blackwell has other stages than the rest: with theirs it spills.
    """
    if INTERPRET:
        return {"GROUP": 2, "BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 32}
    if torch.float32 in (h.dtype, th.dtype):
        stages = 3 if capability(h)[0] == 12 else 2
        return {"GROUP": 8, "BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": stages}
    if capability(h) == (9, 4):
        return {"GROUP": 8, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if not (has_tma(h) and has_tma(th)):
        stages = 2 if capability(h)[0] == 12 else 3
        return {
            "GROUP": 8,
            "BLOCK_M": 128,
            "BLOCK_N": 64,
            "BLOCK_K": 32,
            "num_warps": 8,
            "num_stages": stages,
        }
    columns = 64 if capability(h)[0] == 9 and 0 < beta < 1 else 128
    return {"GROUP": 8, "BLOCK_M": 128, "BLOCK_N": columns, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


def _operands(h, w, th, tw, tile, tma):
    """The four matrices as the kernels take them; their sizes and strides."""
    blocks = [[tile[side], tile["BLOCK_K"]] for side in ("BLOCK_M", "BLOCK_N", "BLOCK_M", "BLOCK_N")]
    matrices = h, w, th, tw
    sizes = h.shape[0], w.shape[0], h.shape[1], th.shape[1]
    return [described(x, block, tma) for x, block in zip(matrices, blocks, strict=True)], (
        *sizes,
        *(x.stride(0) for x in matrices),
    )


def _summarise_triton(
    h, w, bias, th, tw, teacher_bias, temperatures, temperature, caps, reverse, outs, keep
):  # fmt: skip
    """parts (pieces, 6, rows) of a chunk of the vocabulary, as the kernel says; with `keep`, the logits in outs."""
    tile, tma = _tile(h, th), has_tma(h) and has_tma(th)
    parts = h.new_empty(triton.cdiv(w.shape[0], tile["BLOCK_N"]), 6, h.shape[0], dtype=torch.float32)
    if h.shape[0]:
        matrices, numbers = _operands(h, w, th, tw, tile, tma)
        _token_divergence_fwd[grid_of(h, w.shape[0], tile, tma)](
            *matrices, *(outs if keep else (None, None)), bias, teacher_bias, temperatures, parts,
            *numbers, outs[0].stride(0) if keep else 0, temperature, caps[0] or 1.0, caps[1] or 1.0,
            bias is not None, teacher_bias is not None, caps[0] is not None, caps[1] is not None,
            temperatures is not None, reverse, keep, tma, precision(), **tile,
        )  # fmt: skip
    return parts


def _mixture_triton(u, t, norms, beta, blocks):
    """(2, rows): sum p_S (log p_S - log m - reference) and sum p_T (log p_T - log m) of whole rows of logits."""
    rows, N = u.shape
    tile = {"PIECE": 1024, "BLOCK_N": 512} if INTERPRET else {"PIECE": 32768, "BLOCK_N": 2048, "num_warps": 8}
    parts = u.new_empty(triton.cdiv(N, tile["PIECE"]), 2, rows)
    _mixture_fwd[(rows, len(parts))](u, t, norms, parts, rows, N, u.stride(0), beta, **tile)
    return parts.sum(0)


def _dlogits_triton(
    h, w, bias, th, tw, teacher_bias, temperatures, temperature, caps, beta, saved, dz, with_dbias
):  # fmt: skip
    """dz (rows, N) of a block, filled; returns its sum over the rows, in fp32 as it was before rounding."""
    tile, tma = _tile(h, th, beta), has_tma(h) and has_tma(th)
    matrices, numbers = _operands(h, w, th, tw, tile, tma)
    db = h.new_empty(
        triton.cdiv(h.shape[0], tile["BLOCK_M"]) if with_dbias else 0, w.shape[0], dtype=torch.float32
    )
    _token_divergence_bwd[grid_of(h, w.shape[0], tile, tma)](
        *matrices, described(dz, [tile["BLOCK_M"], tile["BLOCK_N"] // 4], tma), bias, teacher_bias, temperatures,
        *saved, db, *numbers, dz.stride(0), temperature, caps[0] or 1.0, caps[1] or 1.0, beta,
        bias is not None, teacher_bias is not None, caps[0] is not None, caps[1] is not None,
        temperatures is not None, beta == 0, beta == 1, with_dbias, tma, precision(), **tile,
    )  # fmt: skip
    return db.sum(0)


# ---- blocks on a CPU

COPIES = 6  # of a block: both logits and the temporaries of their difference


def _scaled_products(h, w, bias, th, tw, teacher_bias, temperatures, temperature, caps, out, teacher_out):
    """u of student and teacher, (rows, columns) each, in the two buffers."""
    u = scaled_(torch.mm(h, w.T, out=out), bias, temperatures, temperature, caps[0])
    t = torch.mm(th, tw.T, out=teacher_out)
    return u, scaled_(t, teacher_bias, temperatures, temperature, caps[1])


def _log_probabilities(u: Tensor, t: Tensor, norms: Tensor, out: Tensor, teacher_out: Tensor) -> None:
    """A large maximum and a small logarithm: their sum would be rounded."""
    highest, log, teacher_highest, teacher_log = norms[:4, :, None].unbind()
    torch.sub(u, highest, out=out).sub_(log)
    torch.sub(t, teacher_highest, out=teacher_out).sub_(teacher_log)


def _ratios(d: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """As _against_mixture; d is spent."""
    top = d.clamp(min=0)
    d -= top
    low = -top
    log = exponential(d).mul_(beta).add_(exponential(low, out=low), alpha=1 - beta).log_()
    return top.add_(log).neg_(), d.sub_(log)


def _summarise(h, w, bias, th, tw, teacher_bias, temperatures, temperature, caps, reverse, outs, keep, part):
    """As _summarise_triton; one piece, into part (6, rows). Without `keep`, the buffers are spent."""
    u, t = _scaled_products(h, w, bias, th, tw, teacher_bias, temperatures, temperature, caps, *outs)
    total, teacher_total, top, teacher_top, apart, reference = part
    d = t - u
    at = torch.max(u if reverse else t, -1)[1][:, None]
    reference.copy_(d.gather(1, at)[:, 0])
    torch.amax(u, -1, out=top)
    torch.amax(t, -1, out=teacher_top)
    p = torch.sub(u, top[:, None], out=None if keep else u)
    q = torch.sub(t, teacher_top[:, None], out=None if keep else t)
    torch.sum(exponential(p, out=p), -1, out=total)
    torch.sum(exponential(q, out=q), -1, out=teacher_total)
    if keep:
        apart.zero_()
    else:
        torch.sum(d.sub_(reference[:, None]).mul_(p if reverse else q), -1, out=apart)


def _mixture(u, t, norms, beta, blocks):
    """As _mixture_triton, a block at a time."""
    sums = norms.new_zeros(2, len(u))
    for rows, columns in blocks:
        log_p, log_q = (torch.empty_like(x[rows, columns]) for x in (u, t))
        _log_probabilities(u[rows, columns], t[rows, columns], norms[:, rows], log_p, log_q)
        of_student, of_teacher = _ratios(log_q - log_p, beta)
        sums[0, rows] += exponential(log_p, out=log_p).mul_(of_student.sub_(norms[5, rows, None])).sum(-1)
        sums[1, rows] += exponential(log_q, out=log_q).mul_(of_teacher).sum(-1)
    return sums


def _dlogits(
    h, w, bias, th, tw, teacher_bias, temperatures, temperature, caps, beta, saved, dz, with_dbias, buffer
):  # fmt: skip
    """As _dlogits_triton."""
    norms, gain = saved
    level, reference = norms[4:, :, None]
    u, t = _scaled_products(h, w, bias, th, tw, teacher_bias, temperatures, temperature, caps, dz, buffer)
    divisor = temperature if temperatures is None else temperatures[:, None]
    slope = None if caps[0] is None else (u * divisor).div_(caps[0]).square_().neg_().add_(1)
    beyond = (t - u).sub_(reference) if beta == 1 else None
    _log_probabilities(u, t, norms, u, t)
    if beta == 0:
        exponential(u, out=u).sub_(exponential(t, out=t))
    elif beyond is not None:
        exponential(u, out=u).mul_(beyond.neg_().add_(level))
    else:
        r, _ = _ratios(t.sub_(u), beta)
        exponential(u, out=u).mul_(r.sub_(reference).sub_(level))
    du = u.mul_(gain[:, None]).div_(divisor)
    if slope is not None:
        du.mul_(slope)
    return du.sum(0) if with_dbias else du.new_empty(0)


# ---- autograd


def _merged(parts: Tensor, reverse: bool) -> Tensor:
    """norms (6, rows) of all pieces (pieces, 6, rows): of student and of teacher the highest logit and the logarithm of
    the sum of exponentials below it; of d = u_T - u_S, under p_S with `reverse`, p_T without, the mean of what it is
    beyond its value at the highest logit, and that value. Its own size, which may be thousands, is in no sum."""
    total, teacher_total, top, teacher_top, apart, reference = parts.unbind(1)  # (pieces, rows) each
    (highest, at), (teacher_highest, teacher_at) = top.max(0), teacher_top.max(0)
    total, teacher_total = (
        (top - highest).exp() * total,
        (teacher_top - teacher_highest).exp() * teacher_total,
    )
    log, teacher_log = total.sum(0).log(), teacher_total.sum(0).log()
    top, at, total = (
        (top - highest, at, total) if reverse else (teacher_top - teacher_highest, teacher_at, teacher_total)
    )
    beyond = reference.gather(0, at[None])[0]
    mean = (top.exp() * apart + (reference - beyond) * total).sum(0) / total.sum(0)
    return torch.stack((highest, log, teacher_highest, teacher_log, mean, beyond))


def _forward(
    hidden: Tensor,
    weight: Tensor,
    lora_b: Tensor | None,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_lora_b: Tensor | None,
    teacher_bias: Tensor | None,
    temperatures: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    teacher_softcap: float | None,
    beta: float,
    memory_budget: int,
) -> tuple[Tensor, Tensor]:
    """The divergence, and norms (6, tokens) for the backward, as `_merged` has them; of a mixture, the last two are of
    log p_S - log m under p_S."""
    h, th, caps = operand(hidden), operand(teacher_hidden), (softcap, teacher_softcap)
    (tokens, _), V, wide = hidden.shape, weight.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    divergence, norms = hidden.new_empty(tokens, dtype=wide), hidden.new_empty(6, tokens, dtype=wide)
    mixture, on_gpu = 0 < beta < 1, use_triton(h)
    height, budget = tokens, memory_budget
    if (
        mixture
    ):  # both logits of some rows, whole, in three quarters of the budget: no product is taken again for m
        height, budget = 3 * memory_budget // (8 * wide.itemsize * aligned(V)), memory_budget // 4
        height = min(tokens, height - height % 128 if height > 128 else height)  # whole tiles
    bands = slices(tokens, max(1, height))
    kept = hidden.new_empty(2, bands[0].stop if bands and mixture else 0, aligned(V), dtype=wide)[:, :, :V]
    for band in bands:
        row_blocks, chunks = blocks_of(hidden[band], V, budget, bytes_of(hidden, COPIES))
        if on_gpu:
            row_blocks = [slice(0, band.stop - band.start)]
            if (
                weight.dtype == h.dtype
                and teacher_weight.dtype == th.dtype
                and lora_b is None
                and teacher_lora_b is None
            ):
                chunks = [slice(0, V)]  # no logits in memory, and no copy of a weight in another dtype
        buffers = [] if on_gpu or mixture else [buffer_of(x, row_blocks, chunks) for x in (h, th)]
        # on a CPU made before the blocks: small tensors left between these keep their memory from being used again
        parts = [] if on_gpu else [norms.new_empty(len(chunks), 6, band.stop - band.start)]
        for i, columns in enumerate(chunks):
            w = rows_of(weight, lora_b, columns, h.dtype)
            tw = rows_of(teacher_weight, teacher_lora_b, columns, th.dtype)
            b, tb = (None if x is None else x[columns] for x in (bias, teacher_bias))
            for rows in row_blocks:
                at = slice(band.start + rows.start, band.start + rows.stop)
                t = None if temperatures is None else temperatures[at]
                outs = kept[:, rows, columns] if mixture else [block_of(x, rows, w.shape[0]) for x in buffers]
                block = h[at], w, b, th[at], tw, tb, t, temperature, caps, beta > 0, outs, mixture
                if on_gpu:
                    parts.append(_summarise_triton(*block))
                else:
                    _summarise(*block, parts[0][i, :, rows])
        merged = _merged(torch.cat(parts), beta > 0)
        highest, log, teacher_highest, teacher_log, mean, beyond = merged
        beyond = beyond + (highest - teacher_highest) + (log - teacher_log)  # log p_T - log p_S there
        if mixture:
            merged[5] = _ratios(beyond, beta)[0]
            logits = kept[:, : band.stop - band.start]
            blocks = [(rows, columns) for columns in chunks for rows in row_blocks]
            merged[4], of_teacher = (_mixture_triton if on_gpu else _mixture)(*logits, merged, beta, blocks)
            divergence[band] = beta * of_teacher + (1 - beta) * (merged[4] + merged[5])
        else:
            divergence[band] = mean + beyond if beta == 0 else -(mean + beyond)
        norms[:, band] = merged
    return divergence if mask is None else torch.where(mask, divergence, 0), norms


def _forward_fake(
    hidden, weight, lora_b, bias, teacher_hidden, teacher_weight, teacher_lora_b, teacher_bias, temperatures, mask,
    temperature, softcap, teacher_softcap, beta, memory_budget,
):  # fmt: skip
    wide = torch.promote_types(hidden.dtype, torch.float32)
    tokens = hidden.shape[0]
    return hidden.new_empty(tokens, dtype=wide), hidden.new_empty(6, tokens, dtype=wide)


def _backward(
    ddivergence: Tensor,
    hidden: Tensor,
    weight: Tensor,
    lora_b: Tensor | None,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_lora_b: Tensor | None,
    teacher_bias: Tensor | None,
    temperatures: Tensor | None,
    mask: Tensor | None,
    norms: Tensor,
    temperature: float,
    softcap: float | None,
    teacher_softcap: float | None,
    beta: float,
    memory_budget: int,
    with_dhidden: bool,
    with_dweight: bool,
    with_dlora_b: bool,
    with_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dhidden, dweight, dlora_b and dbias, each empty where it is not asked for."""
    th, caps, mixture = operand(teacher_hidden), (softcap, teacher_softcap), 0 < beta < 1
    gain = ddivergence * (1 - beta if mixture else 1)
    if mask is not None:  # p = 0 there, whatever the logits
        norms = norms.clone()
        norms[0:4:2].masked_fill_(~mask, 1e30)
        gain = torch.where(mask, gain, 0)
    room = []  # for the teacher's logits, as large as the first block

    def fill(rows, columns, h, w, b, dz):
        tw = rows_of(teacher_weight, teacher_lora_b, columns, th.dtype)
        tb = None if teacher_bias is None else teacher_bias[columns]
        at = None if temperatures is None else temperatures[rows]
        saved = norms[:, rows].contiguous(), gain[rows]
        block = h, w, b, th[rows], tw, tb, at, temperature, caps, beta, saved, dz, with_dbias
        if use_triton(h):
            return _dlogits_triton(*block)
        if not room:
            room.append(buffer_of(th, [rows], [columns]))
        return _dlogits(*block, block_of(room[0], slice(0, h.shape[0]), w.shape[0]))

    needs = with_dhidden, with_dweight, with_dlora_b, with_dbias
    budget = memory_budget // 4 if mixture else memory_budget  # wider blocks win nothing
    return head_gradients(hidden, weight, lora_b, bias, budget, bytes_of(hidden, COPIES), fill, needs)


def _backward_fake(
    ddivergence, hidden, weight, lora_b, bias, teacher_hidden, teacher_weight, teacher_lora_b, teacher_bias,
    temperatures, mask, norms, temperature, softcap, teacher_softcap, beta, memory_budget,
    with_dhidden, with_dweight, with_dlora_b, with_dbias,
):  # fmt: skip
    needs = with_dhidden, with_dweight, with_dlora_b, with_dbias
    return head_gradients_fake(hidden, weight, lora_b, bias, needs)


def _save(ctx, inputs, output):
    *tensors, temperature, softcap, teacher_softcap, beta, memory_budget = inputs
    ctx.constants = temperature, softcap, teacher_softcap, beta, memory_budget
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx, ddivergence, *_):
    needs = ctx.needs_input_grad[:4]
    gradients = _divergence_backward(ddivergence.contiguous(), *ctx.saved_tensors, *ctx.constants, *needs)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *[None] * 11


_divergence_backward = register("token_divergence_backward", _backward, _backward_fake)
_divergence = register("token_divergence", _forward, _forward_fake, _save, _differentiate)


# ---- public op


def token_divergence(
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
    memory_budget: int | None = None,
) -> Tensor:
    """How far a student's next-token distribution is from its teacher's, in nats a token, without either's logits.

    hidden: (tokens, hidden)    weight: (vocabulary, hidden)    bias: (vocabulary,): the student's
    teacher_hidden: (tokens, teacher_hidden)    teacher_weight: (vocabulary, teacher_hidden): its own width; no gradient
    lora_a: (R, hidden)    lora_b: (vocabulary, R): of an adapter, W + scaling B A, never multiplied out; teacher_* too
    beta: 0 is KL(teacher || student), 1 KL(student || teacher); between, beta KL(teacher || m) + (1 - beta)
        KL(student || m) with m = beta teacher + (1 - beta) student.
    temperature: finite and above 0, of both, a number or (tokens,); it gets no gradient.
    mask: (tokens,) bool, True where a row counts; the others give 0 and pass no gradient.
    memory_budget: bytes that logits and their gradients may take at any time.

    Returns (tokens,) in fp32 (fp64 for fp64), with gradients to hidden, weight, bias and the adapter. A weight without
    requires_grad costs no product for dW. Raises ValueError for shapes, dtypes and devices that disagree, for numbers
    other than these and, on the CPU, for a row's temperature; such a row gives NaN on CUDA.
    """
    check_head(hidden, weight, bias, softcap)
    check_head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, "teacher_")
    check_adapter(hidden, weight, lora_a, lora_b, scaling)
    check_adapter(teacher_hidden, teacher_weight, teacher_lora_a, teacher_lora_b, teacher_scaling, "teacher_")
    check_device(hidden, teacher_hidden=teacher_hidden)
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    if teacher_hidden.shape[0] != tokens:
        raise ValueError(
            f"teacher_hidden: expected {tokens} tokens, as hidden has, got {teacher_hidden.shape[0]}"
        )
    if teacher_weight.shape[0] != vocabulary:
        raise ValueError(
            f"teacher_weight: expected a vocabulary of {vocabulary}, as weight has, got {teacher_weight.shape[0]}"
        )
    temperature = checked_temperature(hidden, temperature)
    check_mask(hidden, mask)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected a number from 0 to 1, got {beta}")
    budget = check_budget(hidden, memory_budget, 4 if 0 < beta < 1 else 1)
    hidden, teacher_hidden = cast(hidden), cast(teacher_hidden)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if not use_triton(hidden) and 12 * wide.itemsize * tokens * vocabulary <= budget:
        # autograd's own copies of such small logits fit: no need to compute them twice
        return token_divergence_reference(
            hidden, weight, teacher_hidden, teacher_weight, beta=beta, temperature=temperature, bias=bias,
            teacher_bias=teacher_bias, lora_a=lora_a, lora_b=lora_b, scaling=scaling, teacher_lora_a=teacher_lora_a,
            teacher_lora_b=teacher_lora_b, teacher_scaling=teacher_scaling, softcap=softcap,
            teacher_softcap=teacher_softcap, mask=mask,
        )  # fmt: skip
    temperatures, number = split_temperature(temperature, wide)
    bias, mask = (None if x is None else x.contiguous() for x in (bias, mask))
    with torch.no_grad():
        teacher_hidden = widened(teacher_hidden, teacher_lora_a, teacher_scaling)
    teacher = (
        None if x is None else x.detach()
        for x in (teacher_hidden, teacher_weight, teacher_lora_b, teacher_bias)
    )
    return _divergence(
        widened(hidden, lora_a, scaling), weight, lora_b, bias, *teacher, temperatures, mask,
        number, softcap, teacher_softcap, float(beta), budget,
    )[0]  # fmt: skip
