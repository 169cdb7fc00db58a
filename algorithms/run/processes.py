"""Training on several processes: `torchrun --nproc-per-node N -m burnish.algorithms.sft ...`.

With one process these functions have no effect: a model stays as it is, and a sum has one term.

    shard(model)                        each process keeps 1/N of every tensor, of its gradient, and of AdamW's moments
    shares(lengths, micro_batch_tokens) the micro-batches of this process; every process has the same number
    summed(metrics)                     sums over processes: losses have a global denominator, so gradients add up
    with unsharded(model): ...          whole weights, for work that is not in step with the other processes
    gathered(tensors)                   the tensors of every process, on all processes

Every process reads the same rows and draws the same order. All therefore know the step's whole batch and its
denominators without communication. Every process must take part in each collective: a process without sequences in a
round runs IDLE, a sequence that adds nothing. Sharding, all-gather and reduce-scatter are torch's FSDP2
(https://arxiv.org/abs/2304.11277), with one group per layer.
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

TRAINERS = ("sft", "reward", "dpo", "kto", "ppo", "grpo", "distill")  # commands that run on several processes
TIMEOUT = timedelta(minutes=30)  # the longest wait for a process that samples or judges, before the job ends
IDLE = [[0]]  # the sequences of an empty micro-batch: one token that is not scored


def world() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0. Only rank 0 prints, logs and writes models."""
    return dist.get_rank() if world() > 1 else 0


@contextlib.contextmanager
def processes(command: str, device: str) -> Iterator[None]:
    """Join the processes that torchrun has started, over gloo on CPUs and NCCL on GPUs. Without torchrun, do nothing.

    An exception ends this process at once, with its message. torchrun then ends the other processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if command not in TRAINERS:
        raise InputError(
            f"{command}: expected one process, got torchrun; only {', '.join(TRAINERS)} run on several processes"
        )

    # each process joins with its own GPU
    if device.startswith("cuda"):
        if device != "cuda":
            raise InputError(
                f"--device: expected cuda under torchrun, where each process has its own GPU, got {device}"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)

    # processes other than rank 0 print only the error that ends them
    with contextlib.ExitStack() as stack:
        if rank():
            quiet = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(quiet))
        try:
            yield
        except SystemExit:  # SIGTERM ends all processes after the same step
            raise
        except BaseException as error:
            print(
                f"\n{command}: process {rank()} of {world()} ends the job: {type(error).__name__}",
                file=sys.stderr,
            )
            raise
    dist.destroy_process_group()


def check_joined() -> None:
    """Raise InputError if torchrun started processes that have not joined: each would train a model of its own."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != world():
        raise InputError(
            f"torchrun has started {started} processes, but only {world()} joined: use "
            f"`torchrun -m burnish.algorithms.{TRAINERS[0]}`, or `with processes(...)` around the call of a trainer"
        )


# ---- weights


def host(device: str) -> str:
    """Return the device on which to load weights. With several processes, return the CPU: `shard` moves the shards."""
    return device if world() == 1 else "cpu"


def shard(*models: Model | None) -> None:
    """Shard each model's weights over the processes, by rows. 4-bit weights stay whole on each process.

    None entries are skipped. A layer is gathered only while it runs. Weights outside of layers stay gathered from a
    forward pass to the end of its backward pass, because `Batch.score` reads the head in between. Gradients are sums,
    not means.
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
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction with a factor
        if isinstance(model, ScalarModel):
            register_fsdp_forward_method(model, "values")  # reads the head outside of `forward`


def _groups(model: Model) -> list[Any]:
    """Return the modules whose tensors are gathered together: each layer, and the rest of the model."""
    return [*(model.body if isinstance(model, ScalarModel) else model).layers, model]


def _sharded(model: Model) -> list[Any]:
    """Return the modules that `shard` has sharded, none with one process."""
    return _groups(model) if world() > 1 else []


def reshard(*models: Model | None) -> None:
    """Free the gathered weights of a forward pass that no backward pass has followed."""
    for model in filter(None, models):
        for module in _sharded(model):
            module.reshard()


@contextlib.contextmanager
def unsharded(model: Model) -> Iterator[None]:
    """Gather the whole model on each process inside the block. Each process may then run any number of forward passes.

    FSDP's hooks are removed inside the block. They would count these passes, and FSDP would use that count to prefetch
    in the next backward pass.
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


# ---- tensors sharded over processes


def is_shared(tensor: Tensor) -> bool:
    """Return whether a tensor's rows are shared by the processes: a DTensor of FSDP2."""
    return hasattr(tensor, "full_tensor")


def own(tensor: Any) -> Tensor:
    """Return this process's rows of a tensor."""
    return tensor.to_local() if is_shared(tensor) else tensor


def rows_of(tensor: Tensor) -> range:
    """Return the range of a tensor's rows on this process. Rows are distributed as in torch.chunk."""
    rows = tensor.shape[0] if tensor.dim() else 1
    if not is_shared(tensor):
        return range(rows)
    size = ceil(rows / world())
    found = range(min(rank() * size, rows), min((rank() + 1) * size, rows))
    assert len(found) == own(tensor).shape[0]
    return found


def shared_as(like: Any, rows: Tensor) -> Tensor:
    """Return the tensor of which `rows` are this process's, shared as `like` is. `rows` itself if `like` is whole."""
    if not is_shared(like):
        return rows
    from torch.distributed.tensor import DTensor

    shape = torch.Size([like.shape[0], *rows.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, like.device_mesh, like.placements, shape=shape, stride=stride)


# ---- distributing work, and communication


def parts(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Split indices into `count` parts of about equal total length: the longest first, each into the lightest part."""
    found: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        lightest = loads.index(min(loads))
        found[lightest].append(index)
        loads[lightest] += lengths[index]
    order = sorted(range(count), key=lambda part: -loads[part])
    return [sorted(found[part]) for part in order]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack the indices of `lengths` into bins of at most `capacity`, by best-fit-decreasing.

    The longest sequence comes first, and each goes into the fullest bin that has room. Sequences are never split: a
    sequence longer than capacity has its own bin. The result is deterministic.
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
    """Return the micro-batches of this process, as lists of indices, of about `capacity` tokens each.

    With one process they are packed by `best_fit`. With several, all processes have micro-batches of similar size in
    each round, because the processes wait for one another. The last micro-batch may be empty.
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
    """Sum each value over the processes. All processes must pass the same names in the same order."""
    if world() == 1:
        return dict(values)
    return dict(
        zip(values, sum_over_processes(torch.tensor([*values.values()]).double()).tolist(), strict=True)
    )


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum a tensor over the processes. Returns the same shape on the same device."""
    if world() == 1:
        return values
    there = values.to(_device())
    dist.all_reduce(there)
    return there.to(values.device)


def most(count: int) -> int:
    """Return the maximum of `count` over the processes."""
    if world() == 1:
        return count
    return max(int(each["count"]) for each in gathered({"count": torch.tensor(count)}))


def gathered(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the tensors of every process, one dict per rank. Shapes may differ between processes."""
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
    """Return the text of rank 0, a path for instance, on every process."""
    first = gathered({"text": torch.tensor(list(os.fsencode(text)), dtype=torch.uint8)})[0]
    return os.fsdecode(bytes(first["text"].tolist()))


def _device() -> torch.device:
    """Return the device that collectives need their tensors on: the CPU for gloo, the GPU for NCCL."""
    return (
        torch.device("cpu")
        if dist.get_backend() == "gloo"
        else torch.device("cuda", torch.cuda.current_device())
    )
