"""Rotary position embedding of queries and keys, both at once.

Dimension pairs (a, b) of a head turn by the angle position * frequency, whose cosine and sine are looked up:

    a' = a cos - b sin        b' = b cos + a sin

    half layout (Llama, Qwen, GPT-NeoX)   pair i is (x[i], x[i + rotary/2])
    interleaved layout (RoFormer, GPT-J)  pair i is (x[2i], x[2i + 1])

Dimensions from `rotary` on pass through (partial rotation). The backward is the same map with -sin: the transposed
rotation, also where a table carries a factor (yarn scales both). The tables take no gradient.

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, equation 34
"""

import torch
from torch import Tensor

from ._launch import check_shape

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


# ---- autograd


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """One tensor on the CPU: (..., T, H, D) by tables (..., T, rotary/2) of at least fp32."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    wide = x[..., : 2 * half].to(cos.dtype)
    if interleaved:
        product = torch.view_as_complex(wide.unflatten(-1, (half, 2))) * torch.complex(cos, sin)
        out = torch.view_as_real(product).flatten(-2)
    else:  # a roll by half a head swaps the two halves: long inner loops where slices would have short ones
        out = (wide * torch.cat((cos, cos), -1)).addcmul_(wide.roll(half, -1), torch.cat((-sin, sin), -1))
    out = out.to(x.dtype)
    return out if x.shape[-1] == 2 * half else torch.cat((out, x[..., 2 * half :]), -1)


class _RopeTorch(torch.autograd.Function):
    """The CPU path. Autograd through the reference keeps every product; this keeps the two tables."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(q, cos, sin, interleaved), _turn(k, cos, sin, interleaved)

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor):
        cos, sin = ctx.saved_tensors
        minus = -sin
        return (
            _turn(dq, cos, minus, ctx.interleaved),
            _turn(dk, cos, minus, ctx.interleaved),
            None,
            None,
            None,
        )


# ---- public op


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

    q: (..., T, H, D)    k: (..., T, G, D)    any strides; packed tokens are (total, H, D)
    cos, sin: (positions, rotary/2), any float dtype, rotary <= D; they take no gradient
    positions: (..., T) int64, the table row of each token; None means 0, 1, ..., T - 1
    Returns q and k rotated, in their dtypes.
    """
    *lead, T, _, D = q.shape
    check_shape("k", k, **{f"q.shape[{i}]": n for i, n in enumerate(lead)}, T=T, G=k.shape[-2], D=D)
    check_shape("sin", sin, positions=cos.shape[0], half_rotary=cos.shape[1])
    if 2 * cos.shape[1] > D:
        raise ValueError(f"cos: expected at most D/2 = {D // 2} columns, got {cos.shape[1]}")
    if positions is None:
        if T > cos.shape[0]:
            raise ValueError(f"cos: expected at least T = {T} rows, got {cos.shape[0]}")
        cos, sin = cos[:T], sin[:T]
    else:
        check_shape("positions", positions, **{f"q.shape[{i}]": n for i, n in enumerate(lead)}, T=T)
        cos, sin = cos[positions], sin[positions]
    wide = torch.promote_types(q.dtype, torch.float32)
    return _RopeTorch.apply(q, k, cos.to(wide), sin.to(wide), interleaved)
