"""Rotary position embedding of queries and keys, both in one launch.

Each pair (a, b) of a head's dimensions is rotated by the angle position * frequency. Its cosine and sine are in tables:

    a' = a cos - b sin        b' = b cos + a sin

    half layout (Llama, Qwen, GPT-NeoX)      pair i is (x[i], x[i + rotary/2])
    interleaved layout (RoFormer, GPT-J)     pair i is (x[2i], x[2i + 1])

Dimensions from `rotary` on pass through unchanged (partial rotation). The backward is the same map with -sin, which is
the transposed map even if the tables contain a factor, as with YaRN. The tables get no gradient.

Memory, in elements: forward and backward each read and write T(H + G)D, and read 2T(rotary/2) from the tables. Eager
code moves about 10 T(H + G)D. All of it is bandwidth-bound.

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, equation 34
"""

# A launch passes numbers where the kernel is annotated tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._chip import (
    FLOATS,
    cdiv,
    check_device,
    check_dtype,
    check_ids,
    check_shape,
    next_power_of_2,
    use_triton,
)
from ._op import make_op
from ._triton import tl, triton

# ---- reference


def apply_rope_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    half = cos.shape[-1]
    rows = torch.arange(q.shape[-3], device=q.device) if positions is None else positions

    def rotate(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        c, s = cos[rows].to(wide).unsqueeze(-2), sin[rows].to(wide).unsqueeze(-2)  # (..., T, 1, rotary/2)
        turned, passed = x[..., : 2 * half].to(wide), x[..., 2 * half :]
        pairs = turned.unflatten(-1, (half, 2) if interleaved else (2, half))
        a, b = pairs.unbind(-1 if interleaved else -2)  # each (..., T, H, rotary/2)
        out = torch.stack((a * c - b * s, b * c + a * s), -1 if interleaved else -2).flatten(-2)
        return torch.cat((out.to(x.dtype), passed), -1)

    return rotate(q), rotate(k)


# ---- kernels

# fmt: off


@triton.jit
def _turn_heads(
    x_ptr, out_ptr, cos, sin, where, tokens, live, first_head, HEADS, stride_head,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_PASS: tl.constexpr,
):
    # cos, sin: [BLOCK_T, 1, BLOCK_HALF]. where: each token's offset in x. tokens: its row in the contiguous output.
    heads = tl.cast(first_head, tl.int64) + tl.arange(0, BLOCK_H)  # 64 bits: in a transposed view heads lie far apart
    seen = live[:, None, None] & (heads < HEADS)[None, :, None]  # [BLOCK_T, BLOCK_H, 1]
    source = where[:, None, None] + heads[None, :, None] * stride_head
    target = (tokens.to(tl.int64)[:, None, None] * HEADS + heads[None, :, None]) * D

    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        mask = seen & (cols < 2 * HALF)
        x = tl.load(x_ptr + source + cols, mask, other=0.0).to(tl.float32)
        pairs = tl.reshape(x, [x.shape[0], BLOCK_H, BLOCK_HALF, 2])
        a, b = tl.split(pairs)  # each [BLOCK_T, BLOCK_H, BLOCK_HALF]
        turned = tl.join(a * cos - b * sin, b * cos + a * sin)
        tl.store(out_ptr + target + cols, tl.reshape(turned, x.shape), mask)
    else:
        cols = tl.arange(0, BLOCK_HALF)[None, None, :]
        mask = seen & (cols < HALF)
        a = tl.load(x_ptr + source + cols, mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + source + HALF + cols, mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + target + cols, a * cos - b * sin, mask)
        tl.store(out_ptr + target + HALF + cols, b * cos + a * sin, mask)

    if 2 * HALF < D:
        cols = 2 * HALF + tl.arange(0, BLOCK_PASS)[None, None, :]
        passed = tl.load(x_ptr + source + cols, seen & (cols < D))
        tl.store(out_ptr + target + cols, passed, seen & (cols < D))


@triton.jit
def _rope(
    q_ptr, k_ptr, cos_ptr, sin_ptr, positions_ptr, q_out_ptr, k_out_ptr, tokens, T, table, H, G,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_PASS: tl.constexpr,
):
    # A program takes BLOCK_T tokens of BLOCK_H heads, first q's and then k's. Neighbouring programs share their tokens,
    # and so the rows of the tables.
    q_blocks = tl.cdiv(H, BLOCK_H)
    blocks = q_blocks + tl.cdiv(G, BLOCK_H)
    block = tl.program_id(0) % blocks
    token = (tl.program_id(0) // blocks) * BLOCK_T + tl.arange(0, BLOCK_T)

    live = token < tokens
    row, known = (token % T).to(tl.int64), live
    if positions_ptr is not None:
        row = tl.load(positions_ptr + token, live, other=0)
        known = live & (row >= 0) & (row < table)

    cols = tl.arange(0, BLOCK_HALF)[None, :]
    mask = known[:, None] & (cols < HALF)
    nan = float("nan")  # for a position that the table lacks
    cos = tl.load(cos_ptr + row[:, None] * HALF + cols, mask, other=nan).to(tl.float32)[:, None, :]
    sin = tl.load(sin_ptr + row[:, None] * HALF + cols, mask, other=nan).to(tl.float32)[:, None, :]
    if INVERSE:
        sin = -sin

    if block < q_blocks:
        where = (token // T).to(tl.int64) * stride_qb + (token % T).to(tl.int64) * stride_qt
        _turn_heads(
            q_ptr, q_out_ptr, cos, sin, where, token, live, block * BLOCK_H, H, stride_qh,
            D, HALF, INTERLEAVED, BLOCK_H, BLOCK_HALF, BLOCK_PASS,
        )
    else:
        where = (token // T).to(tl.int64) * stride_kb + (token % T).to(tl.int64) * stride_kt
        _turn_heads(
            k_ptr, k_out_ptr, cos, sin, where, token, live, (block - q_blocks) * BLOCK_H, G, stride_kh,
            D, HALF, INTERLEAVED, BLOCK_H, BLOCK_HALF, BLOCK_PASS,
        )

# fmt: on


# ---- launch


@cache
def _config(H: int, G: int, D: int, half: int) -> dict[str, int]:
    """Return the tile of a program: heads, few of them idle, and as many tokens as fill 2,048 elements.

    The heads of a tile share the table rows of its tokens. Measured against a tile of 8 heads and 4,096 elements, on an
    H100 in bf16 with torch 2.11 and Triton 3.6: 32 query and 8 key heads of 128 dimensions take 117.7 us instead of
    126.7, 8/4 of 256 take 76.9 instead of 82.2, 9/3 of 64 take 43.3 instead of 46.2, and 14/2 of 64 take 54.6 instead
    of 55.8.
    """
    block_h = min(16, next_power_of_2(max(H, G)))
    while block_h > 4 and 0.8 * block_h * (cdiv(H, block_h) + cdiv(G, block_h)) > H + G:
        block_h //= 2
    block_t = max(1, 2048 // (block_h * next_power_of_2(D)))
    widths = {"BLOCK_HALF": next_power_of_2(half), "BLOCK_PASS": next_power_of_2(D - 2 * half)}
    return {"BLOCK_H": block_h, "BLOCK_T": block_t, **widths, "num_warps": 4}


class _Tables(NamedTuple):
    """The tables cos and sin (positions, rotary/2), the positions (B, T), and flags. All tensors are contiguous."""

    cos: Tensor
    sin: Tensor
    positions: Tensor | None
    interleaved: bool
    inverse: bool  # rotate back, with -sin


class _Gradients(NamedTuple):
    q: Tensor | None
    k: Tensor | None


def _forward(q: Tensor, k: Tensor, tables: _Tables) -> tuple[Tensor, Tensor]:
    """Rotate q (B, T, H, D) and k (B, T, G, D), whose last dimensions are contiguous."""
    B, T, H, D = q.shape
    cos, sin, positions, interleaved, inverse = tables
    G, half = k.shape[2], cos.shape[1]
    q_out, k_out = _shapes(q, k, tables)
    if q_out.numel() + k_out.numel() == 0:
        return q_out, k_out

    config = _config(H, G, D, half)
    blocks = cdiv(H, config["BLOCK_H"]) + cdiv(G, config["BLOCK_H"])
    grid = (cdiv(B * T, config["BLOCK_T"]) * blocks,)
    tensors = q, k, cos, sin, positions, q_out, k_out
    sizes = B * T, T, cos.shape[0], H, G, *q.stride()[:3], *k.stride()[:3]
    _rope[grid](*tensors, *sizes, D, half, interleaved, inverse, **config)
    return q_out, k_out


def _shapes(q, k, tables):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(outputs, q, k, tables):
    return tables


def _backward(saved: _Tables, needs: Any, dq: Tensor, dk: Tensor) -> _Gradients:
    return _Gradients(*_rotate(_rows(dq), _rows(dk), _Tables(*saved[:4], not saved.inverse)))


_rotate = make_op("apply_rope", _forward, _shapes, _save, _backward)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Rotate q (..., T, H, D) and k (..., T, G, D) by torch. cos and sin are (..., T, rotary/2) in fp32 or wider."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turns = torch.complex(cos, sin) if interleaved else cos  # (..., T, 1, rotary/2)
    if not interleaved:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def turn(x: Tensor) -> Tensor:
        wide = x[..., : 2 * half].to(cos.dtype)
        if interleaved:
            # a complex view needs an even offset
            wide = wide.clone(memory_format=torch.contiguous_format)
            out = torch.view_as_real(torch.view_as_complex(wide.unflatten(-1, (half, 2))) * turns).flatten(-2)
        else:  # a roll by `half` swaps the two halves; its inner loops are longer than those of slices
            out = (wide * cos).addcmul_(wide.roll(half, -1), sin)
        out = out.to(x.dtype)
        return out if x.shape[-1] == 2 * half else torch.cat((out, x[..., 2 * half :]), -1)

    return turn(q), turn(k)


class _RopeTorch(torch.autograd.Function):
    """The CPU path of apply_rope. It saves only cos and sin; autograd of the reference would save every product."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(q, k, cos, sin, interleaved)

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor):
        cos, sin = ctx.saved_tensors
        return *_turn(dq, dk, cos, -sin, ctx.interleaved), None, None, None


# ---- op


def apply_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions.

    q, k: (..., T, H, D) and (..., T, G, D), such as packed tokens (total, H, D). Read in place if D is contiguous.
    cos, sin: (positions, rotary/2), any float dtype, rotary <= D. They get no gradient.
    positions: (..., T) int64, the table row of each token. None means 0, 1, ..., T - 1.
    interleaved: the layout of the pairs, (x[2i], x[2i + 1]) if True, else (x[i], x[i + rotary/2]).
    Returns q and k rotated, contiguous, in their dtype.
    Raises ValueError for other shapes and dtypes, for tensors on several devices, and on a CPU for a position that the
    tables lack. Elsewhere the host does not check, and the rotated dimensions of such a token are NaN.
    """
    if q.ndim < 3 or k.ndim != q.ndim or cos.ndim != 2:
        got = ", ".join(str(tuple(t.shape)) for t in (q, k, cos))
        raise ValueError(
            f"q, k, cos: expected (..., T, H, D), (..., T, G, D), (positions, rotary/2), got {got}"
        )

    check_dtype("q", q)
    check_dtype("k", k, q.dtype)
    check_dtype("cos", cos, *FLOATS)
    check_dtype("sin", sin, *FLOATS)
    check_device(q, k=k, cos=cos, sin=sin, positions=positions)

    *lead, T, H, D = q.shape
    leading = {f"q.shape[{i}]": size for i, size in enumerate(lead)}
    check_shape("k", k, **leading, T=T, G=k.shape[-2], D=D)
    check_shape("sin", sin, positions=cos.shape[0], half_rotary=cos.shape[1])
    if 2 * cos.shape[1] > D:
        raise ValueError(f"cos: expected at most D/2 = {D // 2} columns, got {cos.shape[1]}")
    if positions is not None:
        check_shape("positions", positions, **leading, T=T)
        check_dtype("positions", positions, torch.int64)
        check_ids("positions", positions, 0, cos.shape[0] - 1)
    elif cos.shape[0] < T:
        raise ValueError(f"cos: expected at least T = {T} rows, got {cos.shape[0]}")

    cos, sin = cos.detach(), sin.detach()
    if use_triton(q):
        B, G = math.prod(lead), k.shape[-2]
        # (..., T, H, D) -> (B, T, H, D)
        rows_q, rows_k = _rows(q.reshape(B, T, H, D)), _rows(k.reshape(B, T, G, D))
        positions = None if positions is None else positions.contiguous()
        tables = _Tables(cos.contiguous(), sin.contiguous(), positions, interleaved, inverse=False)
        q_out, k_out = _rotate(rows_q, rows_k, tables)
        return q_out.view(q.shape), k_out.view(k.shape)
    rows = slice(T) if positions is None else positions
    wide = torch.promote_types(q.dtype, torch.float32)
    turn = _RopeTorch.apply if torch.is_grad_enabled() else _turn
    return turn(q, k, cos[rows].to(wide), sin[rows].to(wide), interleaved)
