"""The generalised Jensen-Shannon divergence (JSD) of a teacher and a student, for 0 < beta < 1.

    D = beta KL(p_T || m) + (1 - beta) KL(p_S || m)                     m = beta p_T + (1 - beta) p_S
    du_S = (1 - beta) p_S (gap - sum_k p_S gap)

    gap = log p_S - log m        teacher_gap = log p_T - log m        log_ratio = log p_T - log p_S
    m / p_S = 1 - beta + beta e^log_ratio

    KL(p_S || m) = sum_j p_S gap = gap_at_top + sum_j p_S gap_beyond    KL(p_T || m) = sum_j p_T teacher_gap

gap_at_top is the gap at the student's most likely id, and gap_beyond is a gap's difference from it. A gap needs the
normalisers of the whole row. So divergence.py first writes both logits of some rows, and this file reads them.

Memory: 2 V elements of each row are read; two numbers are written for each row and piece of its columns.

Source: GKD, Agarwal et al. 2023, https://arxiv.org/abs/2306.13649, eq. 1
"""

# Triton's launches and tuples are opaque to pyright
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from typing import Any

from torch import Tensor

from .._chip import INTERPRET, cdiv
from .._triton import tl, triton

# ---- kernels

# fmt: off


@triton.jit
def _to_mixture(log_ratio, beta):
    # gap and teacher_gap. The larger exponential of m / p_S is taken out of the logarithm, so neither overflows
    larger = tl.maximum(log_ratio, 0.0)
    log_rest = tl.log(beta * tl.exp(log_ratio - larger) + (1 - beta) * tl.exp(-larger))
    return -larger - log_rest, log_ratio - larger - log_rest


@triton.jit
def _mixture_fwd(
    u_ptr, t_ptr, norm_ptr, sums_ptr, T, N, stride, beta, PIECE: tl.constexpr, BLOCK_N: tl.constexpr
):
    # PIECE columns of a row: sum p_S gap_beyond and sum p_T teacher_gap
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    norm = norm_ptr + row
    top, log_sum = tl.load(norm), tl.load(norm + T)
    teacher_top, teacher_log_sum = tl.load(norm + 2 * T), tl.load(norm + 3 * T)
    gap_at_top = tl.load(norm + 5 * T)
    sum_gap = tl.zeros([BLOCK_N], tl.float32)
    sum_teacher_gap = tl.zeros([BLOCK_N], tl.float32)

    for start in range(0, PIECE, BLOCK_N):
        cols = piece * PIECE + start + tl.arange(0, BLOCK_N)
        log_p = tl.load(u_ptr + row * stride + cols, cols < N, other=-1e30) - top - log_sum
        log_q = tl.load(t_ptr + row * stride + cols, cols < N, other=-1e30) - teacher_top - teacher_log_sum
        gap, teacher_gap = _to_mixture(log_q - log_p, beta)
        gap_beyond = gap - gap_at_top
        sum_gap += tl.exp(log_p) * gap_beyond
        sum_teacher_gap += tl.exp(log_q) * teacher_gap

    at = sums_ptr + piece * 2 * T + row
    tl.store(at, tl.sum(sum_gap, 0))
    tl.store(at + T, tl.sum(sum_teacher_gap, 0))

# fmt: on


# ---- launch


def mixture_sums(logits: Tensor, norms: Tensor, beta: float, _: Any) -> Tensor:
    """Return the sums over the vocabulary of p_S gap_beyond and of p_T teacher_gap for each row, (2, rows).

    The formulas at the top of this file define both terms.
    logits: the logits u_S and u_T of student and teacher, (2, rows, V).
    norms: six sums over each row's logits, the fields of Norms in kernels/plain/divergence.py, (6, rows).
    """
    (u, t), (_, rows, N) = logits, logits.shape
    tile = {"PIECE": 1024, "BLOCK_N": 512} if INTERPRET else {"PIECE": 32768, "BLOCK_N": 2048, "num_warps": 8}
    sums = norms.new_empty(cdiv(N, tile["PIECE"]), 2, rows)
    _mixture_fwd[(rows, len(sums))](u, t, norms, sums, rows, N, u.stride(0), beta, **tile)
    return sums.sum(0)
