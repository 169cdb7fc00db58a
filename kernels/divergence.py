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
again: about 14 tokens V. Here the forward keeps of each tile five numbers a row, and the backward, which computes both
heads' logits again, writes the student's gradient a chunk of the vocabulary at a time: 3 tokens V. A mixture cannot be
taken before both normalisers are known: its forward passes over the vocabulary twice.

Source: GKD, Agarwal et al. 2023, https://arxiv.org/abs/2306.13649, eq. 1
"""

# Triton's launches and tuples are opaque to pyright
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._head import (
    _place,
    _products,
    _quarter,
    _scaled,
    _sharpness,
    block_of,
    blocks_of,
    buffer_of,
    bytes_of,
    cast,
    check_budget,
    check_head,
    check_mask,
    check_temperature,
    described,
    divergence_of,
    grid_of,
    has_tma,
    head_gradients,
    head_gradients_fake,
    operand,
    precision,
    rows_of,
    scaled_,
    split_temperature,
)
from ._launch import INTERPRET, capability, register, use_triton

# ---- reference


@torch.autocast("cpu", enabled=False)  # fp32 inside, whatever the policy outside
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
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    mask: Tensor | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    log_s = _log_probabilities(hidden, weight, bias, softcap, temperature)
    with torch.no_grad():
        log_t = _log_probabilities(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, temperature)
    divergence = divergence_of(log_t, log_s, beta)
    return divergence if mask is None else torch.where(mask, divergence, 0)


def _log_probabilities(hidden, weight, bias, softcap, temperature):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    z = hidden.to(wide) @ weight.to(wide).T  # (tokens, vocabulary)
    if bias is not None:
        z = z + bias.to(wide)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return torch.log_softmax(
        z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature), -1
    )


# ---- kernels


@triton.jit
def _against_mixture(d, beta):
    # log p_S - log m = -log(1 - beta + beta e^d) with d = log p_T - log p_S
    top = tl.maximum(d, 0.0)
    return -(top + tl.log(beta * tl.exp(d - top) + (1 - beta) * tl.exp(-top)))


@triton.jit
def _token_divergence_fwd(
    h, w, th, tw, bias_ptr, teacher_bias_ptr, temperature_ptr, norm_ptr, part_ptr,
    T, N, C, TC, h_stride, w_stride, th_stride, tw_stride, temperature, softcap, teacher_softcap, beta,
    HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_TEACHER_SOFTCAP: tl.constexpr, HAS_TEMPERATURES: tl.constexpr,
    REVERSE: tl.constexpr, MIXTURE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # of BLOCK_N columns of a row: both maxima, both sums of exponentials, and the sum of exponentials times u_T - u_S;
    # with MIXTURE, which knows both normalisers: sum p_T (log p_T - log m), sum p_S (log p_S - log m)
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
        if MIXTURE:
            norms = norm_ptr + rows
            highest = tl.load(norms, rows < T, other=0.0)[:, None]
            log = tl.load(norms + T, rows < T, other=0.0)[:, None]
            teacher_highest = tl.load(norms + 2 * T, rows < T, other=0.0)[:, None]
            teacher_log = tl.load(norms + 3 * T, rows < T, other=0.0)[:, None]
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
            if MIXTURE:
                u = tl.where(inside, u - highest - log, -1e30)
                t = tl.where(inside, t - teacher_highest - teacher_log, -1e30)
                r = _against_mixture(t - u, beta)
                teacher_total += tl.sum(tl.exp(t) * (t - u + r), 1)
                total += tl.sum(tl.exp(u) * r, 1)
            else:
                u = tl.where(inside, u, -1e30)
                t = tl.where(inside, t, -1e30)  # p times u_T - u_S is 0 there
                d = t - u
                new_top = tl.maximum(top, tl.max(u, 1))
                p = tl.exp(u - new_top[:, None])
                shrink = tl.exp(top - new_top)
                total = shrink * total + tl.sum(p, 1)
                top = new_top
                new_top = tl.maximum(teacher_top, tl.max(t, 1))
                q = tl.exp(t - new_top[:, None])
                teacher_shrink = tl.exp(teacher_top - new_top)
                teacher_total = teacher_shrink * teacher_total + tl.sum(q, 1)
                teacher_top = new_top
                apart *= shrink if REVERSE else teacher_shrink
                apart += tl.sum((p if REVERSE else q) * d, 1)
        at = part_ptr + n.to(tl.int64) * 5 * T + rows
        tl.store(at, total, rows < T)
        tl.store(at + T, teacher_total, rows < T)
        if not MIXTURE:
            tl.store(at + 2 * T, top, rows < T)
            tl.store(at + 3 * T, teacher_top, rows < T)
            tl.store(at + 4 * T, apart, rows < T)


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
        gain = tl.load(gain_ptr + rows, rows < T, other=0.0)[:, None]
        for i in tl.static_range(4):
            cols = n * BLOCK_N + i * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
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
            else:
                r = log_p - log_q
                if not REVERSE:
                    r = _against_mixture(-r, beta)
                d = p * (r - level)
            d = d * gain * sharpness
            if HAS_SOFTCAP:
                s = u / (sharpness * softcap)
                d = d * (1 - s * s)
            if WITH_DBIAS:
                tl.store(
                    db_ptr + m.to(tl.int64) * N + cols,
                    tl.sum(tl.where((rows < T)[:, None], d, 0.0), 0),
                    cols < N,
                )
            if TMA:
                dz.store([m * BLOCK_M, n * BLOCK_N + i * (BLOCK_N // 4)], d.to(dz.dtype))
            else:
                at = dz + rows.to(tl.int64)[:, None] * dz_stride + cols[None, :]
                tl.store(at, d.to(dz.dtype.element_ty), (rows < T)[:, None] & (cols < N)[None, :])


# ---- blocks on a GPU


def _tile(h: Tensor, th: Tensor, beta: float) -> dict[str, int]:
    """Two accumulators, so half of logprob's tile; on Hopper the mixture's logarithms take half of that again."""
    if INTERPRET:
        return {"GROUP": 2, "BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 32}
    if torch.float32 in (h.dtype, th.dtype):
        return {"GROUP": 8, "BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    if capability(h) == (9, 4):
        return {"GROUP": 8, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if not (has_tma(h) and has_tma(th)):
        return {"GROUP": 8, "BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
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


def _summarise_triton(h, w, bias, th, tw, teacher_bias, temperatures, temperature, caps, beta, norms):
    """parts (pieces, 5, tokens) of a chunk of the vocabulary; with norms, (pieces, 2, tokens)."""
    tile, tma = _tile(h, th, beta), has_tma(h) and has_tma(th)
    parts = h.new_empty(triton.cdiv(w.shape[0], tile["BLOCK_N"]), 5, h.shape[0], dtype=torch.float32)
    if h.shape[0]:
        matrices, numbers = _operands(h, w, th, tw, tile, tma)
        _token_divergence_fwd[grid_of(h, w.shape[0], tile, tma)](
            *matrices, bias, teacher_bias, temperatures, norms, parts,
            *numbers, temperature, caps[0] or 1.0, caps[1] or 1.0, beta,
            bias is not None, teacher_bias is not None, caps[0] is not None, caps[1] is not None,
            temperatures is not None, beta == 1, norms is not None, tma, precision(), **tile,
        )  # fmt: skip
    return parts if norms is None else parts[:, :2]


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

COPIES = 5  # of a block: both logits and the temporaries of their difference


def _scaled_products(h, w, bias, th, tw, teacher_bias, temperatures, temperature, caps, out, teacher_out):
    """u of student and teacher, (rows, columns) each, in the two buffers."""
    u = scaled_(torch.mm(h, w.T, out=out), bias, temperatures, temperature, caps[0])
    t = torch.mm(th, tw.T, out=teacher_out)
    return u, scaled_(t, teacher_bias, temperatures, temperature, caps[1])


def _normalise_(u: Tensor, t: Tensor, norms: Tensor) -> None:
    """Logits become log-probabilities, in place. A large maximum and a small logarithm: their sum would be rounded."""
    highest, log, teacher_highest, teacher_log = norms[:4, :, None].unbind()
    u.sub_(highest).sub_(log)
    t.sub_(teacher_highest).sub_(teacher_log)


def _ratio(d: Tensor, beta: float) -> Tensor:
    """log p_S - log p_T, or log p_S - log m, from d = log p_T - log p_S."""
    return -d if beta == 1 else torch.logaddexp(d + math.log(beta), d.new_tensor(math.log(1 - beta))).neg_()


def _summarise(
    h, w, bias, th, tw, teacher_bias, temperatures, temperature, caps, beta, norms, row_blocks, buffers
):  # fmt: skip
    """As _summarise_triton, with the logits of one block of rows at a time in the buffers; one piece."""
    parts = h.new_empty(1, 5 if norms is None else 2, h.shape[0])
    for rows in row_blocks:
        outs = [block_of(b, rows, w.shape[0]) for b in buffers]
        at = None if temperatures is None else temperatures[rows]
        u, t = _scaled_products(h[rows], w, bias, th[rows], tw, teacher_bias, at, temperature, caps, *outs)
        part = parts[0, :, rows]
        if norms is not None:
            _normalise_(u, t, norms[:, rows])
            d = t - u
            r = _ratio(d, beta)
            torch.sum(u.exp_().mul_(r), -1, out=part[0])
            torch.sum(t.exp_().mul_(d.add_(r)), -1, out=part[1])
            continue
        d = t - u
        for x, total, top in ((u, part[0], part[2]), (t, part[1], part[3])):
            x -= torch.amax(x, -1, out=top)[:, None]
            torch.sum(x.exp_(), -1, out=total)
        torch.sum(d.mul_(u if beta == 1 else t), -1, out=part[4])
    return parts


def _dlogits(
    h, w, bias, th, tw, teacher_bias, temperatures, temperature, caps, beta, saved, dz, with_dbias, buffer
):  # fmt: skip
    """As _dlogits_triton."""
    norms, gain = saved
    level = norms[4, :, None]
    u, t = _scaled_products(h, w, bias, th, tw, teacher_bias, temperatures, temperature, caps, dz, buffer)
    divisor = temperature if temperatures is None else temperatures[:, None]
    slope = None if caps[0] is None else (u * divisor).div_(caps[0]).square_().neg_().add_(1)
    _normalise_(u, t, norms)
    if beta == 0:
        u.exp_().sub_(t.exp_())
    else:
        r = _ratio(t.sub_(u), beta)
        u.exp_().mul_(r.sub_(level))
    du = u.mul_(gain[:, None]).div_(divisor)
    if slope is not None:
        du.mul_(slope)
    return du.sum(0) if with_dbias else du.new_empty(0)


# ---- autograd


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    temperatures: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    teacher_softcap: float | None,
    beta: float,
    memory_budget: int,
) -> tuple[Tensor, Tensor]:
    """The divergence, and norms (5, tokens), for the backward: of student and of teacher the highest logit and the
    logarithm of the sum of exponentials below it; and KL(p_S || p_T or m)."""
    h, th, caps = operand(hidden), operand(teacher_hidden), (softcap, teacher_softcap)
    row_blocks, chunks = blocks_of(hidden, weight.shape[0], memory_budget, bytes_of(hidden, COPIES))
    if use_triton(h) and weight.dtype == h.dtype and teacher_weight.dtype == th.dtype:
        chunks = [slice(0, weight.shape[0])]  # no logits in memory, and no copy of a weight in another dtype
    buffers = [] if use_triton(h) else [buffer_of(x, row_blocks, chunks) for x in (h, th)]

    def sums(norms: Tensor | None) -> Tensor:
        parts = []
        for columns in chunks:
            w, tw = (rows_of(x, None, columns, y.dtype) for x, y in ((weight, h), (teacher_weight, th)))
            b, tb = (None if x is None else x[columns] for x in (bias, teacher_bias))
            block = h, w, b, th, tw, tb, temperatures, temperature, caps, beta, norms
            parts.append(_summarise(*block, row_blocks, buffers) if buffers else _summarise_triton(*block))
        return torch.cat(parts).transpose(0, 1)  # (5 or 2, pieces, tokens)

    total, teacher_total, top, teacher_top, apart = sums(None)
    highest, teacher_highest = top.amax(0), teacher_top.amax(0)
    shrink, teacher_shrink = (top - highest).exp(), (teacher_top - teacher_highest).exp()
    total, teacher_total = (shrink * total).sum(0), (teacher_shrink * teacher_total).sum(0)
    log, teacher_log = total.log(), teacher_total.log()
    norms = torch.stack((highest, log, teacher_highest, teacher_log, torch.zeros_like(log)))
    if beta in (0, 1):
        mean = (shrink * apart).sum(0) / total if beta else (teacher_shrink * apart).sum(0) / teacher_total
        divergence = mean + (highest - teacher_highest) + (log - teacher_log)  # mean of u_T - u_S
        if beta:
            norms[4] = divergence.neg_()
    else:
        norms[4], of_teacher = sums(norms).sum(1)
        divergence = beta * of_teacher + (1 - beta) * norms[4]
    return divergence if mask is None else torch.where(mask, divergence, 0), norms


def _forward_fake(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, temperatures, mask,
    temperature, softcap, teacher_softcap, beta, memory_budget,
):  # fmt: skip
    wide = torch.promote_types(hidden.dtype, torch.float32)
    tokens = hidden.shape[0]
    return hidden.new_empty(tokens, dtype=wide), hidden.new_empty(5, tokens, dtype=wide)


def _backward(
    ddivergence: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
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
    with_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden, dweight and dbias, each empty where it is not asked for."""
    th, caps = operand(teacher_hidden), (softcap, teacher_softcap)
    gain = ddivergence * (1 if beta in (0, 1) else 1 - beta)
    if mask is not None:  # p = 0 there, whatever the logits
        norms = norms.clone()
        norms[0:4:2].masked_fill_(~mask, 1e30)
        gain = torch.where(mask, gain, 0)
    room = []  # for the teacher's logits, as large as the first block

    def fill(rows, columns, h, w, b, dz):
        tw = rows_of(teacher_weight, None, columns, th.dtype)
        tb = None if teacher_bias is None else teacher_bias[columns]
        at = None if temperatures is None else temperatures[rows]
        saved = norms[:, rows].contiguous(), gain[rows]
        block = h, w, b, th[rows], tw, tb, at, temperature, caps, beta, saved, dz, with_dbias
        if use_triton(h):
            return _dlogits_triton(*block)
        if not room:
            room.append(buffer_of(th, [rows], [columns]))
        return _dlogits(*block, block_of(room[0], slice(0, h.shape[0]), w.shape[0]))

    needs = with_dhidden, with_dweight, False, with_dbias
    dhidden, dweight, _, dbias = head_gradients(
        hidden, weight, None, bias, memory_budget, bytes_of(hidden, COPIES), fill, needs
    )
    return dhidden, dweight, dbias


def _backward_fake(
    ddivergence, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, temperatures, mask,
    norms, temperature, softcap, teacher_softcap, beta, memory_budget,
    with_dhidden, with_dweight, with_dbias,
):  # fmt: skip
    needs = with_dhidden, with_dweight, False, with_dbias
    dhidden, dweight, _, dbias = head_gradients_fake(hidden, weight, None, bias, needs)
    return dhidden, dweight, dbias


def _save(ctx, inputs, output):
    *tensors, temperature, softcap, teacher_softcap, beta, memory_budget = inputs
    ctx.constants = temperature, softcap, teacher_softcap, beta, memory_budget
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx, ddivergence, *_):
    needs = ctx.needs_input_grad[:3]
    gradients = _divergence_backward(ddivergence.contiguous(), *ctx.saved_tensors, *ctx.constants, *needs)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *[None] * 10


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
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    mask: Tensor | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """How far a student's next-token distribution is from its teacher's, in nats a token, without either's logits.

    hidden: (tokens, hidden)    weight: (vocabulary, hidden)    bias: (vocabulary,): the student's
    teacher_hidden: (tokens, teacher_hidden)    teacher_weight: (vocabulary, teacher_hidden): its own width; no gradient
    beta: 0 is KL(teacher || student), 1 KL(student || teacher); between, beta KL(teacher || m) + (1 - beta)
        KL(student || m) with m = beta teacher + (1 - beta) student.
    temperature: above 0, of both, a number or (tokens,); it gets no gradient.
    mask: (tokens,) bool, True where a row counts; the others give 0 and pass no gradient.
    memory_budget: bytes that logits and their gradients may take at any time.

    Returns (tokens,) in fp32 (fp64 for fp64), with gradients to hidden, weight and bias. A weight without requires_grad
    costs no product for dW. Raises ValueError for shapes that disagree.
    """
    budget = check_budget(hidden, memory_budget)
    check_head(hidden, weight, bias, softcap)
    check_head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, "teacher_")
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    if teacher_hidden.shape[0] != tokens:
        raise ValueError(
            f"teacher_hidden: expected {tokens} tokens, as hidden has, got {teacher_hidden.shape[0]}"
        )
    if teacher_weight.shape[0] != vocabulary:
        raise ValueError(
            f"teacher_weight: expected a vocabulary of {vocabulary}, as weight has, got {teacher_weight.shape[0]}"
        )
    check_temperature(temperature, tokens)
    check_mask(mask, tokens)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected a number from 0 to 1, got {beta}")
    hidden, teacher_hidden = cast(hidden), cast(teacher_hidden).detach()
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if not use_triton(hidden) and 12 * wide.itemsize * tokens * vocabulary <= budget:
        # autograd's own copies of such small logits fit: no need to compute them twice
        return token_divergence_reference(
            hidden, weight, teacher_hidden, teacher_weight, beta=beta, temperature=temperature, bias=bias,
            teacher_bias=teacher_bias, softcap=softcap, teacher_softcap=teacher_softcap, mask=mask,
        )  # fmt: skip
    temperatures, number = split_temperature(temperature, wide)
    bias, teacher_bias, mask = (None if x is None else x.contiguous() for x in (bias, teacher_bias, mask))
    return _divergence(
        hidden, weight, bias, teacher_hidden, teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(), temperatures, mask,
        number, softcap, teacher_softcap, float(beta), budget,
    )[0]  # fmt: skip
