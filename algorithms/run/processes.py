"""Training on several processes: `torchrun --nproc-per-node N -m burnish.algorithms.sft ...`.

With one process nothing here acts: a model stays as it is, a sum is its only term.

    shard(model)                        each process keeps 1/N of every tensor, of its gradient, and of AdamW's moments
    shares(lengths, micro_batch_tokens) the micro-batches of this process, as many as every other has
    summed(metrics)                     over processes: losses are sums over a global denominator, so gradients add up
    with unsharded(model): ...          whole weights, for work that is not in step with the other processes
    gathered(tensors)                   what each process has found, on all

Every process reads the same rows and draws the same order, so all know the step's whole batch and its denominators
without a message. Collectives have to meet: a process without sequences in a round runs IDLE, which adds nothing.
Sharding, all-gather and reduce-scatter are torch's FSDP2: https://arxiv.org/abs/2304.11277, one group a layer.
"""

import contextlib
import os
import sys
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...model.adapter import Model, linears
from ...model.errors import InputError
from ...model.scalar import ScalarModel

TRAINERS = ("sft", "reward", "dpo", "kto", "ppo", "grpo", "distill")  # what runs on several processes
TIMEOUT = timedelta(minutes=30)  # a process waits as long for one that samples or judges, then ends the job
IDLE = [[0]]  # the sequences of a micro-batch that has none: one token, of which nothing is scored


def world() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process. Rank 0 alone prints, logs and writes models."""
    return dist.get_rank() if world() > 1 else 0


@contextlib.contextmanager
def processes(command: str, device: str) -> Iterator[None]:
    """Join the processes that torchrun has started, if it has: over gloo on CPUs, NCCL on GPUs.

    An exception leaves this process with its message and without waiting for the others, which torchrun then ends.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if command not in TRAINERS:
        raise InputError(
            f"{command} runs on one process: expected no torchrun; {', '.join(TRAINERS)} run on several"
        )

    # each process joins with a GPU of its own
    if device.startswith("cuda"):
        if device != "cuda":
            raise InputError(
                f"--device {device}: under torchrun each process has a GPU of its own: expected cuda"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)

    # the others are silent, but for how they end
    with contextlib.ExitStack() as stack:
        if rank():
            quiet = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(quiet))
        try:
            yield
        except BaseException as error:
            print(
                f"\n{command}: process {rank()} of {world()} ends the job: {type(error).__name__}",
                file=sys.stderr,
            )
            raise
    dist.destroy_process_group()


def check_joined() -> None:
    """Raises InputError under torchrun outside of `processes`: a trainer would train a whole model on each process."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != world():
        raise InputError(
            f"torchrun has started {started} processes, {world()} of them joined: expected "
            f"`torchrun -m burnish.algorithms.{TRAINERS[0]}`, or `with processes(...)` around the call of a trainer"
        )


# ---- weights


def host(device: str) -> str:
    """The device on which weights are read; of several processes the host, from which `shard` moves the parts."""
    return device if world() == 1 else "cpu"


def shard(*models: Model | None) -> None:
    """Spread each model's weights over the processes, by rows. What is in 4 bits stays whole on each.

    None stands for one that the run does without. A layer is whole only while it runs; what is outside of layers from a
    forward to the end of its backward, because `score` reads the head between the two. Gradients are sums, not means.
    """
    if world() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh("cpu" if dist.get_backend() == "gloo" else "cuda", (world(),))
    for model in filter(None, models):
        for layer in linears(model).values():
            if layer.four_bit is not None and mesh.device_type == "cuda":
                layer.four_bit = layer.four_bit.to(f"cuda:{torch.cuda.current_device()}")
        for module in _groups(model):
            fully_shard(module, mesh=mesh, reshard_after_forward=module is not model)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other sum with a factor
        if isinstance(model, ScalarModel):
            register_fsdp_forward_method(model, "values")  # its head is read there


def _groups(model: Model) -> list[Any]:
    """The modules whose tensors are whole together."""
    return [*(model.body if isinstance(model, ScalarModel) else model).layers, model]


def _sharded(model: Model) -> list[Any]:
    """The modules that `shard` has made groups of."""
    return _groups(model) if world() > 1 else []


def reshard(*models: Model | None) -> None:
    """Let go of what a forward without a backward has left whole."""
    for model in filter(None, models):
        for module in _sharded(model):
            module.reshard()


@contextlib.contextmanager
def unsharded(model: Model) -> Iterator[None]:
    """The whole model on each process: forward passes need no other process then, and may differ in number.

    FSDP's hooks are off meanwhile: it would count these passes, and prefetch in the next backward by that count.
    """
    modules = _sharded(model)
    hooks = [(module._forward_pre_hooks, module._forward_hooks) for module in modules]
    for module in modules:
        module.unshard()
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    yield
    for module, (before, after) in zip(modules, hooks, strict=True):
        module._forward_pre_hooks, module._forward_hooks = before, after
        module.reshard()


# ---- work and words


def parts(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Indices in `count` parts of about the same total length: the longest first, each to the lightest part."""
    found: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        lightest = loads.index(min(loads))
        found[lightest].append(index)
        loads[lightest] += lengths[index]
    order = sorted(range(count), key=lambda part: -loads[part])
    return [sorted(found[part]) for part in order]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `capacity`, best-fit-decreasing: the longest first, each into the fullest
    bin that has room. Sequences are never split: one longer than capacity has a bin of its own. Deterministic.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(rooms, (lengths[index], -1))
        if place == len(rooms):
            room, chosen = capacity, len(bins)
            bins.append([])
        else:
            room, chosen = rooms.pop(place)
        bins[chosen].append(index)
        insort(rooms, (room - lengths[index], chosen))
    return bins


def shares(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices in micro-batches of about `capacity` tokens, those of this process: best-fit with one.

    With several the micro-batches of a round are of like size, because the processes wait for one another; the last
    may be empty.
    """
    if world() == 1 or not lengths:
        return best_fit(lengths, capacity)
    capacity = max(capacity, *lengths)
    rounds = ceil(sum(lengths) / capacity / world())
    while True:
        found = parts(lengths, rounds * world())
        if max(sum(lengths[i] for i in part) for part in found) <= capacity:
            return found[rank() :: world()]
        rounds += 1


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """Each value's sum over the processes, which have the same names in the same order."""
    if world() == 1:
        return dict(values)
    return dict(
        zip(values, sum_over_processes(torch.tensor([*values.values()]).double()).tolist(), strict=True)
    )


def sum_over_processes(values: Tensor) -> Tensor:
    """The same shape; NCCL's way leads over the GPU."""
    if world() == 1:
        return values
    there = values.to(_device())
    dist.all_reduce(there)
    return there.to(values.device)


def most(count: int) -> int:
    """The largest of the processes' numbers."""
    if world() == 1:
        return count
    return max(int(each["count"]) for each in gathered({"count": torch.tensor(count)}))


def gathered(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors that every process has passed, by rank; shapes may differ. Sent as safetensors, not pickled."""
    if world() == 1:
        return [dict(tensors)]
    from safetensors.torch import load, save

    sent = torch.frombuffer(bytearray(save(dict(tensors))), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64, device=_device()) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([sent.numel()], device=_device()))
    longest = max(int(size) for size in sizes)
    padded = torch.nn.functional.pad(sent, (0, longest - sent.numel())).to(_device())
    received = [torch.empty_like(padded) for _ in range(world())]
    dist.all_gather(received, padded)
    return [load(bytes(data[: int(size)].cpu().numpy())) for data, size in zip(received, sizes, strict=True)]


def from_rank_0(text: str) -> str:
    """The text of rank 0, a path for instance, on every process."""
    first = gathered({"text": torch.tensor(list(os.fsencode(text)), dtype=torch.uint8)})[0]
    return os.fsdecode(bytes(first["text"].tolist()))


def _device() -> torch.device:
    """The device on which collectives want their tensors."""
    return (
        torch.device("cpu")
        if dist.get_backend() == "gloo"
        else torch.device("cuda", torch.cuda.current_device())
    )
