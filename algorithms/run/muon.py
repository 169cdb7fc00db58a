"""Muon: momentum whose singular values are all made about 1 before each step.

    m = mu m + (1 - mu) g        u = NS((1 - mu) g + mu m)        w = (1 - lr decay) w - 0.2 sqrt(max(N, K)) lr u

NS is five Newton-Schulz iterations, x = a x + (b x x^T + c (x x^T)^2) x, from x = u / |u|. They move every singular
value into about [0.7, 1.2]. The factor 0.2 sqrt(max(N, K)) gives an update the root mean square of AdamW's, about
0.2 lr, so that a learning rate keeps its meaning (`match_rms_adamw` of torch.optim.Muon).

On a GPU the iterations are in bf16, and a step equals that of torch.optim.Muon to the bit. On a CPU they are in fp32.
The iterations enlarge small singular values up to 480 times, and with them the error of rounding. With bf16 one and
two processes, whose sums are rounded differently, would soon differ visibly.

torch's class takes whole matrices only. Here a weight of experts (E, N, K) is E matrices, and a matrix whose rows are
shared by processes is gathered, once a step: 2 bytes a number in bf16. Each process then computes the whole update and
keeps its own rows. Experts are shared whole, so nothing is gathered.

Source: https://kellerjordan.github.io/posts/muon; the factor: Liu et al. 2025, https://arxiv.org/abs/2502.16982, eq. 4
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...model.linear import whole
from .processes import is_shared, own, rows_of, shared_as

A, B, C = 3.4445, -4.7750, 2.0315  # coefficients of the iteration: steep at 0, so that small values grow fast
ITERATIONS = 5
LEAST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, for matrices (N, K) and stacks of matrices (E, N, K) in fp32.

    A group's decay is decoupled, as in AdamW. The state of a parameter is `momentum_buffer`, of its shape and dtype.
    dtype: that of the iterations, by default bf16 on a GPU and fp32 on a CPU.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype | None = None,
    ):
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step for each parameter that has a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, grad = self.state[parameter], own(parameter.grad)
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)

                # this process's rows
                buffer = own(state["momentum_buffer"])
                buffer.lerp_(grad, 1 - momentum)
                mixed = grad.lerp(buffer, momentum)

                # the whole matrix, and this process's rows of its update
                dtype = self.dtype or (torch.bfloat16 if mixed.is_cuda else torch.float32)
                update = _own_update(parameter, mixed.to(dtype))
                weight = own(parameter)
                weight.mul_(1 - lr * group["weight_decay"])
                weight.add_(update, alpha=-lr * 0.2 * math.sqrt(max(parameter.shape[-2:])))


def _own_update(parameter: Tensor, mixed: Tensor) -> Tensor:
    """Return this process's rows of the orthogonalised update. mixed: its rows of the momentum with the gradient."""
    if not is_shared(parameter) or parameter.dim() > 2:
        return orthogonal(mixed)
    rows = rows_of(parameter)
    return orthogonal(whole(shared_as(parameter, mixed)))[rows.start : rows.stop]


def orthogonal(matrices: Tensor) -> Tensor:
    """Return the nearest matrices whose singular values are all about 1, in the dtype of `matrices` (..., N, K).

    They are iterated on their shorter side.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / x.flatten(-2).norm(dim=-1).clamp(min=LEAST_NORM)[..., None, None]
    sum_of = torch.addmm if x.dim() == 2 else torch.baddbmm

    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = sum_of(gram, gram, gram, beta=B, alpha=C)
        x = sum_of(x, polynomial, x, beta=A)
    return x.mT if is_tall else x
