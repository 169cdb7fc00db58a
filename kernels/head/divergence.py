"""Divergence of two linear heads, one number per token, without the logits of either head in memory.

    z = hidden W^T + bias        s = softcap tanh(z / softcap)        u = s / temperature        p = softmax(u)

with p_S of the student and p_T of the teacher, which has no gradient:

    beta = 0, the forward KL    D = KL(p_T || p_S)                               du_S = p_S - p_T
    beta = 1, the reverse KL    D = KL(p_S || p_T)                               du_S = p_S (sum_k p_S gap - gap)
    between, the JSD     D = beta KL(p_T || m) + (1 - beta) KL(p_S || m)    du_S = (1 - beta) p_S (gap - sum_k p_S gap)

    gap = u_T - u_S for the KLs    for the JSD gap = log p_S - log m, of the mixture m = beta p_T + (1 - beta) p_S

beta = 0 and 1 are defined as KLs: the JSD's formula gives 0 there. The JSD's sums: mixture.py. dbias: logprob.py.

With logits in the thousands, a gap and its mean are of that size, and their difference du is small or 0. So the gap at
a row's most likely id (the student's, or for beta = 0 the teacher's) is subtracted from all gaps of the row:

    gap = gap_at_top + gap_beyond        mean_gap = sum_j p gap_beyond
    D = mean_gap + gap_at_top - lse_T + lse_S for beta = 0, and the negative of that for beta = 1

The sums. The forward and the backward each compute tiles of both logits, and keep none of them:

                columns of a tile           of the next tile
    u_S, u_T    [quarter > quarter > ...]   [quarter > ...]   ...   sums grow from quarter to quarter: online softmax
                            |                      |
                          Piece                  Piece        ...   (pieces, 6, rows), six numbers of a tile's row
                            '----------+-----------'----------      merged in the same way as the quarters
                                     Norms  >  D                    (6, rows)
    forward of a mixture:   u_S, u_T,  Norms  >  gaps  >  D         u_S, u_T of some rows are kept until then
    backward:               u_S, u_T,  Norms  >  du_S  >  dz

Memory, in elements: eager code writes and reads (tokens, V) logits of both heads, their logarithms and the gradient:
about 14 tokens V. Here the forward keeps six numbers of each tile's row. The backward computes both heads'
logits again and writes the student's gradient, a chunk of the vocabulary at a time: 3 tokens V. The forward of a
mixture also writes and reads both logits of some rows: 4 tokens V more.

Source: GKD, Agarwal et al. 2023, https://arxiv.org/abs/2306.13649, eq. 1
"""

# Triton's launches and tuples are opaque to pyright
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._chip import INTERPRET, cdiv, check_device, use_triton
from .._op import like_saved, make_op
from .._triton import tl, triton
from ..plain import divergence as plain
from ..plain.divergence import Blocks, Norms, Upstream
from ..records import Head
from ..tiles import DIVERGENCE, Tile, chip_of, row_of
from .blocks import (
    HeadGradients,
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
    chunk_of,
    described,
    grid_of,
    has_tma,
    head_gradients,
    launch_arguments,
    rows_of,
    slices,
    with_operand,
)
from .inputs import (
    HeadInputs,
    cast,
    check_budget,
    check_heads,
    check_mask,
    checked_temperature,
    head_of,
    logits_fit,
)
from .mixture import _to_mixture, mixture_sums

# ---- kernels

# fmt: off


@triton.jit
def _token_divergence_fwd(
    h, w, th, tw, u_ptr, t_ptr, bias_ptr, teacher_bias_ptr, temperature_ptr, piece_ptr,
    T, N, C, TC, h_stride, w_stride, th_stride, tw_stride, u_stride, temperature, softcap, teacher_softcap,
    HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_TEACHER_SOFTCAP: tl.constexpr, HAS_TEMPERATURES: tl.constexpr,
    REVERSE: tl.constexpr, KEEP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # A Piece for every row of a tile. p weighs the gaps with REVERSE, q without. KEEP: store both logits, not sum_gap
    tiles_m, tiles_n = tl.cdiv(T, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        m, n = _place(tile, tiles_m, tiles_n, GROUP)
        z = _products(h, w, m, n, T, N, C, h_stride, w_stride, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        tz = _products(th, tw, m, n, T, N, TC, th_stride, tw_stride, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)

        # sums over the quarters of the tile, updated with one quarter after another
        rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
        sharpness = _sharpness(temperature_ptr, rows, T, temperature, HAS_TEMPERATURES)
        top = tl.full([BLOCK_M], -1e30, tl.float32)
        teacher_top = tl.full([BLOCK_M], -1e30, tl.float32)
        sum_exp = tl.zeros([BLOCK_M], tl.float32)
        teacher_sum_exp = tl.zeros([BLOCK_M], tl.float32)
        sum_gap = tl.zeros([BLOCK_M], tl.float32)
        gap_at_top = tl.zeros([BLOCK_M], tl.float32)

        for i in tl.static_range(4):
            # u_S and u_T, [BLOCK_M, BLOCK_N / 4]
            cols = n * BLOCK_N + i * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            inside = (cols < N)[None, :]
            u = _quarter(z, i, BLOCK_M, BLOCK_N)
            u = _scaled(u, bias_ptr, cols, N, sharpness, softcap, HAS_BIAS, HAS_SOFTCAP)
            t = _quarter(tz, i, BLOCK_M, BLOCK_N)
            t = _scaled(t, teacher_bias_ptr, cols, N, sharpness, teacher_softcap, HAS_TEACHER_BIAS, HAS_TEACHER_SOFTCAP)
            if KEEP:
                at = rows.to(tl.int64)[:, None] * u_stride + cols[None, :]
                tl.store(u_ptr + at, u, (rows < T)[:, None] & inside)
                tl.store(t_ptr + at, t, (rows < T)[:, None] & inside)
            u = tl.where(inside, u, -1e30)
            t = tl.where(inside, t, -1e30)  # p times gap is 0 there
            gap = t - u

            # the tops so far, and the gap at the top of the weighing distribution
            here, teacher_here = tl.max(u, 1), tl.max(t, 1)
            new_top, new_teacher_top = tl.maximum(top, here), tl.maximum(teacher_top, teacher_here)
            if REVERSE:
                gap_here = tl.max(tl.where(u == here[:, None], gap, -1e38), 1)
                new_gap_at_top = tl.where(here > top, gap_here, gap_at_top)
            else:
                gap_here = tl.max(tl.where(t == teacher_here[:, None], gap, -1e38), 1)
                new_gap_at_top = tl.where(teacher_here > teacher_top, gap_here, gap_at_top)

            # move the sums so far to the new tops and the new gap_at_top, and add the quarter's own sums
            p, q = tl.exp(u - new_top[:, None]), tl.exp(t - new_teacher_top[:, None])
            shrink, teacher_shrink = tl.exp(top - new_top), tl.exp(teacher_top - new_teacher_top)
            if not KEEP:
                sum_gap += (gap_at_top - new_gap_at_top) * (sum_exp if REVERSE else teacher_sum_exp)
                sum_gap *= shrink if REVERSE else teacher_shrink
                sum_gap += tl.sum((p if REVERSE else q) * (gap - new_gap_at_top[:, None]), 1)
            sum_exp = shrink * sum_exp + tl.sum(p, 1)
            teacher_sum_exp = teacher_shrink * teacher_sum_exp + tl.sum(q, 1)
            top, teacher_top, gap_at_top = new_top, new_teacher_top, new_gap_at_top

        # (tiles_n, 6, T), in the order of Piece
        at = piece_ptr + n.to(tl.int64) * 6 * T + rows
        tl.store(at, sum_exp, rows < T)
        tl.store(at + T, teacher_sum_exp, rows < T)
        tl.store(at + 2 * T, top, rows < T)
        tl.store(at + 3 * T, teacher_top, rows < T)
        tl.store(at + 4 * T, sum_gap, rows < T)
        tl.store(at + 5 * T, gap_at_top, rows < T)


@triton.jit
def _token_divergence_bwd(
    h, w, th, tw, dz, bias_ptr, teacher_bias_ptr, temperature_ptr, norm_ptr, gain_ptr, db_ptr,
    T, N, C, TC, h_stride, w_stride, th_stride, tw_stride, dz_stride, temperature, softcap, teacher_softcap, beta,
    HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_TEACHER_SOFTCAP: tl.constexpr, HAS_TEMPERATURES: tl.constexpr,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr, WITH_DBIAS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(T, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        m, n = _place(tile, tiles_m, tiles_n, GROUP)
        z = _products(h, w, m, n, T, N, C, h_stride, w_stride, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        tz = _products(th, tw, m, n, T, N, TC, th_stride, tw_stride, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)

        # Norms, [BLOCK_M, 1] each, and the gradient that reaches a row
        rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
        sharpness = _sharpness(temperature_ptr, rows, T, temperature, HAS_TEMPERATURES)
        norms = norm_ptr + rows
        top = tl.load(norms, rows < T, other=0.0)[:, None]
        log_sum = tl.load(norms + T, rows < T, other=0.0)[:, None]
        teacher_top = tl.load(norms + 2 * T, rows < T, other=0.0)[:, None]
        teacher_log_sum = tl.load(norms + 3 * T, rows < T, other=0.0)[:, None]
        mean_gap = tl.load(norms + 4 * T, rows < T, other=0.0)[:, None]
        gap_at_top = tl.load(norms + 5 * T, rows < T, other=0.0)[:, None]
        gain = tl.load(gain_ptr + rows, rows < T, other=0.0)[:, None]

        for i in tl.static_range(4):
            # u_S and u_T, [BLOCK_M, BLOCK_N / 4], and their log-probabilities
            first = n * BLOCK_N + i * (BLOCK_N // 4)
            cols = first + tl.arange(0, BLOCK_N // 4)
            u = _quarter(z, i, BLOCK_M, BLOCK_N)
            u = _scaled(u, bias_ptr, cols, N, sharpness, softcap, HAS_BIAS, HAS_SOFTCAP)
            t = _quarter(tz, i, BLOCK_M, BLOCK_N)
            t = _scaled(t, teacher_bias_ptr, cols, N, sharpness, teacher_softcap, HAS_TEACHER_BIAS, HAS_TEACHER_SOFTCAP)
            log_p = u - top - log_sum
            log_q = t - teacher_top - teacher_log_sum
            p = tl.exp(log_p)

            # du_S; a mixture's 1 - beta is in gain
            if FORWARD:
                du = p - tl.exp(log_q)
            elif REVERSE:
                gap_beyond = t - u - gap_at_top
                du = p * (mean_gap - gap_beyond)
            else:
                gap, _ = _to_mixture(log_q - log_p, beta)
                gap_beyond = gap - gap_at_top
                du = p * (gap_beyond - mean_gap)

            # dz of the loss, from du, temperature and softcap
            dlogit = du * gain * sharpness
            if HAS_SOFTCAP:
                tanh = u / (sharpness * softcap)
                dlogit = dlogit * (1 - tanh * tanh)
            _store_gradient(dlogit, dz, db_ptr, m, first, rows, cols, T, N, dz_stride, WITH_DBIAS, TMA, BLOCK_M)

# fmt: on


# ---- launch


def _tile(student: Head, teacher: Head, mixture_gradient: bool = False) -> Tile:
    h, th = student.hidden, teacher.hidden
    if INTERPRET:
        return DIVERGENCE["interpreted"]
    chip = chip_of(h)
    if torch.float32 in (h.dtype, th.dtype):
        return row_of(DIVERGENCE, f"{chip} fp32", "fp32")
    kind = "without TMA" if not (has_tma(h) and has_tma(th)) else "mixture" if mixture_gradient else ""
    return row_of(DIVERGENCE, f"{chip} {kind}", chip)


def _launch_arguments(student: Head, teacher: Head, tile: Tile) -> dict[str, Any]:
    """Return the kernel arguments that describe blocks of both heads."""
    th, tw = teacher.hidden, teacher.weight
    tma = has_tma(student.hidden) and has_tma(th)
    return launch_arguments(student, tile, tma) | {
        "th": described(th, [tile.M, tile.K], tma),
        "tw": described(tw, [tile.N, tile.K], tma),
        "teacher_bias_ptr": teacher.bias,
        "TC": th.shape[1],
        "th_stride": th.stride(0),
        "tw_stride": tw.stride(0),
        "teacher_softcap": teacher.softcap or 1.0,
        "HAS_TEACHER_BIAS": teacher.bias is not None,
        "HAS_TEACHER_SOFTCAP": teacher.softcap is not None,
    }


def _summarise(student: Head, teacher: Head, beta: float, blocks: Blocks, logits: Tensor | None) -> Tensor:
    """Return six sums (Piece) for each row of each tile, (pieces, 6, rows). Write a mixture's logits (2, rows, V)."""
    rows, V = student.hidden.shape[0], student.weight.shape[0]
    no_copy = all(x.weight.dtype == x.hidden.dtype and x.lora_b is None for x in (student, teacher))
    tile, pieces = _tile(student, teacher), []
    for columns in [slice(0, V)] if no_copy else blocks[1]:  # in chunks if the weight is copied
        chunk, teacher_chunk = chunk_of(student, columns), chunk_of(teacher, columns)
        arguments = _launch_arguments(chunk, teacher_chunk, tile)
        N = chunk.weight.shape[0]
        piece = chunk.hidden.new_empty(cdiv(N, tile.N), 6, rows, dtype=torch.float32)
        u, t = (None, None) if logits is None else logits[:, :, columns]
        kept = {"u_ptr": u, "t_ptr": t, "u_stride": 0 if u is None else u.stride(0), "KEEP": u is not None}
        grid = grid_of(chunk.hidden, N, tile, arguments["TMA"])
        _token_divergence_fwd[grid](**arguments, **kept, piece_ptr=piece, REVERSE=beta > 0)
        pieces.append(piece)
    return torch.cat(pieces)


def _dlogits(student: Head, teacher: Head, upstream: Upstream, dz: Tensor, with_dbias: bool) -> Tensor:
    """Write dz (rows, columns), the gradient of a block's logits. Return its sum over the rows in fp32."""
    (norms, gain, beta), (rows, columns) = upstream, dz.shape
    tile = _tile(student, teacher, 0 < beta < 1)
    arguments = _launch_arguments(student, teacher, tile)
    db = norms.new_empty(cdiv(rows, tile.M) if with_dbias else 0, columns, dtype=torch.float32)
    written = {"dz": described(dz, [tile.M, tile.N // 4], arguments["TMA"]), "dz_stride": dz.stride(0)}
    kind = {"beta": beta, "FORWARD": beta == 0, "REVERSE": beta == 1, "WITH_DBIAS": with_dbias}
    grid = grid_of(student.hidden, columns, tile, arguments["TMA"])
    _token_divergence_bwd[grid](**arguments, **written, **kind, norm_ptr=norms, gain_ptr=gain, db_ptr=db)
    return db.sum(0)


class _Saved(NamedTuple):
    head: Head
    teacher: Head
    mask: Tensor | None
    norms: Tensor
    beta: float
    memory_budget: int


def _forward(
    head: Head, teacher: Head, mask: Tensor | None, beta: float, memory_budget: int
) -> tuple[Tensor, Tensor]:
    """Return the divergence (tokens,), and the Norms (6, tokens), six sums per row that the backward reads."""
    divergence, norms = _shapes(head, teacher, mask, beta, memory_budget)
    student, teacher = with_operand(head), with_operand(teacher)
    on_gpu = use_triton(student.hidden)
    summarise, sums_of = (_summarise, mixture_sums) if on_gpu else (plain.summarise, plain.mixture_sums)

    # A mixture keeps all logits of some rows in three quarters of the budget, and so computes no product twice for m
    tokens, V, budget = len(divergence), head.weight.shape[0], memory_budget
    height, mixture = tokens, 0 < beta < 1
    if mixture:
        height, budget = 3 * memory_budget // (8 * divergence.itemsize * aligned(V)), memory_budget // 4
        height = min(tokens, height - height % 128 if height > 128 else height)  # whole tiles
    bands = slices(tokens, max(1, height))
    kept = norms.new_empty(2, bands[0].stop if bands and mixture else 0, aligned(V))[:, :, :V]

    for band in bands:
        rows = rows_of(student, band), rows_of(teacher, band)
        blocks = blocks_of(rows[0], budget, bytes_of(head.hidden, plain.COPIES))
        logits = kept[:, : band.stop - band.start] if mixture else None
        stacked = plain.merged(summarise(*rows, beta, blocks, logits), beta)

        # log p_T - log p_S at the top id
        row = Norms(*stacked)
        log_ratio = row.gap_at_top + (row.top - row.teacher_top) + (row.log_sum - row.teacher_log_sum)

        if logits is None:
            # the mean of log p_T - log p_S under p_T for beta = 0, or p_S for beta = 1
            mean_log_ratio = row.mean_gap + log_ratio
            divergence[band] = mean_log_ratio if beta == 0 else -mean_log_ratio
        else:
            # from here on gap is log p_S - log m
            row.gap_at_top.copy_(plain.to_mixture(log_ratio, beta)[0])
            mean_gap, kl_teacher = sums_of(logits, stacked, beta, blocks)
            row.mean_gap.copy_(mean_gap)
            kl_student = mean_gap + row.gap_at_top
            divergence[band] = beta * kl_teacher + (1 - beta) * kl_student
        norms[:, band] = stacked
    return divergence if mask is None else torch.where(mask, divergence, 0), norms


def _shapes(head, teacher, mask, beta, memory_budget):
    tokens, wide = head.hidden.shape[0], torch.promote_types(head.hidden.dtype, torch.float32)
    return head.hidden.new_empty(tokens, dtype=wide), head.hidden.new_empty(6, tokens, dtype=wide)


def _save(outputs, head, teacher, mask, beta, memory_budget):
    return _Saved(head, teacher, mask, outputs[1], beta, memory_budget)


def _backward(saved: _Saved, needs: Any, ddivergence: Tensor) -> HeadGradients:
    head, teacher, mask, norms, beta, budget = saved
    mixture, teacher = 0 < beta < 1, with_operand(teacher)
    gain = ddivergence.contiguous() * (1 - beta if mixture else 1)
    if mask is not None:  # masked rows get p = 0, whatever their logits
        norms = norms.clone()
        row = Norms(*norms)
        for top in (row.top, row.teacher_top):
            top.masked_fill_(~mask, 1e30)
        gain = torch.where(mask, gain, 0)

    room = []  # holds a buffer for the teacher's logits, as large as the first block

    def fill(block: Head, rows: slice, columns: slice, dz: Tensor) -> Tensor:
        blocks = block, rows_of(chunk_of(teacher, columns), rows)
        upstream = Upstream(norms[:, rows].contiguous(), gain[rows], beta)
        if use_triton(dz):
            return _dlogits(*blocks, upstream, dz, needs.head_bias)
        if not room:
            room.append(buffer_of(teacher.hidden, [rows], [columns]))
        return plain.dlogits(*blocks, upstream, dz, block_of(room[0], rows, dz.shape[1]), needs.head_bias)

    # the larger budget of a mixture is for its forward: wider blocks gain nothing here
    budget = budget // 4 if mixture else budget
    return head_gradients(head, needs, budget, bytes_of(head.hidden, plain.COPIES), fill)


_divergence = make_op("token_divergence", _forward, _shapes, _save, _backward, like_saved)


# ---- op


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
    """Compute the divergence between a student's and a teacher's next-token distributions, in nats per token.

    hidden: (tokens, hidden)    weight: (vocabulary, hidden)    bias: (vocabulary,)    the student's head
    teacher_hidden: (tokens, teacher_hidden)    teacher_weight: (vocabulary, teacher_hidden)    the teacher's, fixed
    lora_a: (R, hidden)    lora_b: (vocabulary, R)    an adapter, W + scaling B A, never multiplied out
    teacher_lora_a, teacher_lora_b, teacher_scaling, teacher_softcap: as for the student. The teacher gets no gradient.
    beta: 0 is KL(teacher || student), 1 is KL(student || teacher). In between, beta KL(teacher || m) + (1 - beta)
        KL(student || m) with m = beta teacher + (1 - beta) student.
    temperature: of both heads, a number or (tokens,), finite and above 0. It gets no gradient.
    mask: (tokens,) bool, True for each row that counts. The other rows give 0 and pass no gradient.
    memory_budget: the bytes that logits and their gradients may take at any time.

    Returns (tokens,) in fp32 (fp64 for fp64), with gradients for hidden, weight, bias and the adapter. A weight without
    requires_grad costs no product for dW. Raises ValueError for shapes, dtypes and devices that do not match and for
    numbers out of range. A wrong temperature of a row raises on the CPU, and gives NaN for that row on CUDA.
    """
    student = HeadInputs(hidden, weight, bias, lora_a, lora_b, scaling, softcap)
    adapter = teacher_lora_a, teacher_lora_b, teacher_scaling
    teacher = HeadInputs(teacher_hidden, teacher_weight, teacher_bias, *adapter, teacher_softcap)
    check_heads(student, teacher)
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

    student, teacher = cast(student), cast(teacher)
    if logits_fit(student, 12, budget):
        return plain.divergence_of_logits(student, teacher, temperature, beta, mask)
    head = head_of(student, temperature)
    fixed = HeadInputs(*(x.detach() if isinstance(x, Tensor) else x for x in teacher))
    teacher_head = head_of(fixed, temperature)._replace(temperatures=head.temperatures)
    mask = None if mask is None else mask.contiguous()
    return _divergence(head, teacher_head, mask, float(beta), budget)[0]
