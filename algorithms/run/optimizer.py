"""AdamW, its learning-rate schedule, and the optimizer step."""

import contextlib
import math

import torch
from torch import nn

from ...model.errors import InputError
from ...model.linear import whole
from .flags import Schedule


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float = 0.0, eps: float = 1e-8
) -> torch.optim.AdamW:
    """Return AdamW for the trainable parameters. Weight decay is not applied to vectors (norms and biases)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=eps, fused=True)


def scheduled(peak: float, step: int, steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """Return the learning rate of `step`, counted from 0.

    The rate rises linearly to `peak` during the warm-up, and then stays constant or decays to 0 at `steps`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak


def optimizer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: float,
    learning_rate: float,
    max_grad_norm: float,
) -> float:
    """Clip the summed gradients, take an optimizer step, and clear the gradients. Returns their norm before clipping.

    loss: the loss of the whole step. Raises InputError, and leaves the weights as they are, if the loss or the norm is
    not finite.
    """
    norm = whole(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        cause = f"Try a learning rate below {learning_rate:g}, or look for broken rows in the data"
        if not optimizer.state:  # weights were finite when they were read
            cause = "This is the first update, so the learning rate is not the cause: look for broken rows in the data"
        raise InputError(
            f"loss is {loss}, gradient norm {norm}: training has diverged and stopped before this update. {cause}"
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return norm


def autocast(device: str) -> contextlib.AbstractContextManager:
    """Return the autocast context: bf16 over fp32 master weights on a GPU, and fp32 on a CPU, where bf16 is slower."""
    return torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else contextlib.nullcontext()
