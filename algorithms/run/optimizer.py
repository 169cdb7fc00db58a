"""The optimizers of --optimizer, the learning-rate schedule, and the optimizer step (docs/optimizers.md)."""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...model.errors import InputError
from ...model.linear import Adaptable, whole
from .adamw8bit import LEAST, MOMENTS, AdamW8bit, blocks_of
from .flags import OptimizerName, Schedule
from .muon import Muon

BETAS = (0.9, 0.95)  # of AdamW


def make_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    kind: OptimizerName = "adamw",
) -> torch.optim.Optimizer:
    """Return the optimizer of the trainable parameters. Weight decay is not applied to vectors (norms and biases).

    kind: the optimizer of the parameters that it can train; AdamW has the others. Raises InputError if the package of
    adamw8bit is missing.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    chosen = {id(p) for p in CHOSEN[kind](model)}
    main = [p for p in named.values() if id(p) in chosen]
    rest = {name: p for name, p in named.items() if id(p) not in chosen}
    vectors = [p for name, p in rest.items() if is_vector(name, p)]
    matrices = [p for name, p in rest.items() if not is_vector(name, p)]

    # each group names its rule: the optimizer that updates it
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "rule": "adamw"},
        {"params": vectors, "weight_decay": 0.0, "rule": "adamw"},
    ]
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, eps=eps, fused=True)
    group = [{"params": main, "weight_decay": weight_decay, "rule": kind}]
    if kind == "muon":
        return Combined(Muon(group, learning_rate), adamw)
    if kind == "adamw8bit":
        return Combined(AdamW8bit(group, learning_rate, BETAS, eps), adamw)
    return adamw


class Combined(torch.optim.Optimizer):
    """Two optimizers, each of some of a model's parameters, as one: their param_groups and states together."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        super().__init__([group for each in optimizers for group in each.param_groups], {})
        self.optimizers = optimizers
        for each in optimizers:
            each.state = self.state

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for each in self.optimizers:
            each.step()


def is_vector(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter is a norm, a bias or the like. The biases of experts are a stack of vectors (E, N)."""
    return parameter.ndim < 2 or name.endswith("bias")


# ---- the parameters that are not AdamW's


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that Muon trains: the matrices inside of layers, and their adapters' A and B.

    Embedding, head and score are AdamW's, because Muon trains them worse (Jordan et al. 2024). So are the router and
    the gate of a shared expert, because each is a classifier of tokens, as the head is.
    """
    layers = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, Adaptable) and ".layers." in f".{name}." and layer.out_features > 1
    ]
    adapters = [layer.lora for layer in layers if layer.lora is not None]
    found = [layer.weight for layer in layers] + [each for lora in adapters for each in (lora.a, lora.b)]
    return [parameter for parameter in found if parameter is not None and parameter.requires_grad]


def large_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters whose moments adamw8bit holds in 8 bits: matrices of at least LEAST numbers.

    The embedding keeps its moments in fp32 (Dettmers et al. 2021, section 2.3), also where it is the head.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [
        p
        for name, p in model.named_parameters()
        if p.requires_grad and not is_vector(name, p) and p.numel() >= LEAST and id(p) not in embeddings
    ]


CHOSEN: dict[OptimizerName, Callable[[nn.Module], list[nn.Parameter]]] = {
    "adamw": lambda model: [],
    "muon": hidden_matrices,
    "adamw8bit": large_matrices,
}


# ---- the states that a checkpoint holds


class State(NamedTuple):
    """The shape, dtype and smallest value of one state of a parameter."""

    shape: list[int]
    dtype: torch.dtype
    at_least: float = -math.inf


def states_of(rule: OptimizerName, parameter: Tensor) -> dict[str, State]:
    """Return the states of a parameter after its first step, by name. rule: that of the parameter's group."""
    shape, dtype = [*parameter.shape], parameter.dtype
    if rule == "muon":
        return {"momentum_buffer": State(shape, dtype)}
    step = {"step": State([], torch.float32, 1.0)}
    if rule == "adamw":
        return step | {"exp_avg": State(shape, dtype), "exp_avg_sq": State(shape, dtype, 0.0)}
    codes, absmax = State(shape, torch.uint8), State(blocks_of(shape), torch.float32, 0.0)
    return (
        step | {f"{name}_codes": codes for name in MOMENTS} | {f"{name}_absmax": absmax for name in MOMENTS}
    )


def state_bytes(kind: OptimizerName, model: nn.Module) -> int:
    """Return the bytes of the states of all trained parameters. The model may be on the meta device."""
    chosen = {id(p) for p in CHOSEN[kind](model)}
    return sum(
        math.prod(state.shape) * state.dtype.itemsize
        for p in model.parameters()
        if p.requires_grad
        for name, state in states_of(kind if id(p) in chosen else "adamw", p).items()
        if name != "step"
    )


# ---- a step


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
