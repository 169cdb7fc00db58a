"""RMSNorm, alone or with the residual addition before it.

    h = x + residual        rstd = 1 / sqrt(mean(h^2) + eps)        xhat = h * rstd        y = xhat * w

    dh = rstd * (g - xhat * mean(g * xhat)) + the gradient that reaches h directly        with g = dy * w
    dw = sum over rows of dy * xhat

w is the weight, or 1 + weight with `unit_offset` (Gemma). Per-head normalisation is the same op on (..., H, D).

Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, equation 4
"""

import torch
from torch import Tensor

from ._launch import check_shape

# ---- reference


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6, *, unit_offset: bool = False) -> Tensor:
    wide = torch.promote_types(
        x.dtype, torch.float32
    )  # fp64 stays fp64: gradients are checked by finite differences
    xf, w = x.to(wide), weight.to(wide)
    rstd = torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    return (xf * rstd * (1 + w if unit_offset else w)).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    h = x + residual
    return rms_norm_reference(h, weight, eps, unit_offset=unit_offset).to(x.dtype), h


# ---- autograd


class _RMSNormTorch(torch.autograd.Function):
    """The CPU path in fp32. Autograd through the reference keeps and moves three times as much."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, eps: float) -> Tensor:
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, w, rstd)
        return (x * rstd).mul_(w)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, w, rstd = ctx.saved_tensors
        N = x.shape[-1]
        xhat = x * rstd
        by_weight = (dy * xhat).view(
            -1, N
        )  # (rows, N): its column sums are dw, its rows' products with w the mean
        dot = torch.mv(by_weight, w / N).view_as(rstd)
        dx = (dy * w).addcmul_(xhat, dot, value=-1).mul_(rstd)
        return dx, by_weight.sum(0), None


# ---- public op


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, unit_offset: bool = False) -> Tensor:
    """Normalise the last dimension to unit root mean square, then scale by weight, or by 1 + weight.

    x: (..., hidden) float, statistics are kept in fp32    weight: (hidden,), any float dtype
    Returns (..., hidden) in x's dtype.
    """
    check_shape("weight", weight, hidden=x.shape[-1])
    if x.dtype == weight.dtype == torch.float32:
        return _RMSNormTorch.apply(x, weight + 1 if unit_offset else weight, eps)
    return rms_norm_reference(x, weight, eps, unit_offset=unit_offset)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """rms_norm of x + residual, and that sum.

    x, residual: (..., hidden), the sum in the wider of their dtypes (a bf16 branch on an fp32 stream is fine)
    weight: (hidden,), any float dtype
    Returns (..., hidden) normalised, in x's dtype, and (..., hidden) the sum.
    """
    check_shape("residual", residual, **{f"x.shape[{i}]": size for i, size in enumerate(x.shape)})
    h = x + residual
    return rms_norm(h, weight, eps, unit_offset=unit_offset).to(x.dtype), h
