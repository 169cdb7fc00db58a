"""RMSNorm on a CPU in fp32, by the formulas of kernels/norm.py."""

import torch
from torch import Tensor


def _rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))


def normalise(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = _rstd(x, eps)
    return (x * rstd).mul_(w), rstd


class RMSNormTorch(torch.autograd.Function):
    """RMSNorm of the CPU path in fp32.

    It has its own backward, because autograd through the reference would keep every intermediate.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, eps: float) -> Tensor:
        y, rstd = normalise(x, w, eps)
        ctx.save_for_backward(x, w, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, w, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the saved rstd is not connected to x
            rstd = _rstd(x, ctx.eps)
        N = x.shape[-1]
        xhat = x * rstd
        # (rows, N): its column sums are dw, and a row's product with w / N is the mean
        products = (dy * xhat).reshape(-1, N)
        mean = torch.mv(products, w / N).view_as(rstd)
        dx = (dy * w).addcmul_(xhat, mean, value=-1).mul_(rstd)
        return dx, products.sum(0), None
