"""What a stopped run goes on from: one safetensors file with all that training changes, replaced as a whole.

It holds the trained parameters and the optimizer states as "part/name", and in its metadata the step and a few numbers
as JSON. Nothing else needs saving: data order and sampling noise are functions of the seed and the step, and frozen
weights come from the model folder that the run started from.

Of several processes each writes a file with its rows of every tensor; that of rank 0 comes last and names the others.
Any number of processes, one included, reads from them the rows that it needs.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..model.errors import InputError
from ._distributed import gathered, rank, world

Part = nn.Module | torch.optim.Optimizer


def write_checkpoint(file: Path, parts: Mapping[str, Part], values: Mapping[str, Any]) -> None:
    """Replace `file` by the state of `parts` and the JSON of `values`; a failure leaves the earlier file whole."""
    tensors: dict[str, Tensor] = {}
    starts: dict[str, int] = {}  # of the tensors that processes share: the first row of this one
    for part, module in parts.items():
        for name, tensor in _tensors(module).items():
            if _is_shared(tensor):
                starts[f"{part}/{name}"] = _rows(tensor).start
            if _is_shared(tensor) or rank() == 0:
                tensors[f"{part}/{name}"] = _own(tensor).detach().contiguous()
    others = [f"{file.stem}-{values.get('step')}-{i}-of-{world()}{file.suffix}" for i in range(1, world())]
    metadata = {"values": json.dumps(dict(values))}
    if others:
        metadata |= {"others": json.dumps(others), "starts": json.dumps(starts)}
    final = file.with_name(others[rank() - 1]) if rank() else file
    beside = final.with_name(f".{final.name}.partial")
    try:
        save_file(tensors, beside, metadata=metadata)
        with open(beside, "rb+") as written:
            os.fsync(written.fileno())
        if rank():
            beside.replace(final)
        gathered({"written": torch.ones(1)})  # by every process: only now may the earlier checkpoint go
        if rank() == 0:
            beside.replace(file)
            for stale in file.parent.glob(f"{file.stem}-*-of-*{file.suffix}"):
                if stale.name not in others:
                    stale.unlink()
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise InputError(f"{file}: cannot be written, the earlier checkpoint is kept: {error}") from error


def read_checkpoint(file: Path, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Put the state in `file` into `parts`, in place. Returns the values. Raises InputError where it does not fit."""
    with ExitStack() as stack:
        try:
            opened = [stack.enter_context(safe_open(file, framework="pt"))]
            values = json.loads(opened[0].metadata()["values"])
            for name in json.loads(opened[0].metadata().get("others", "[]")):
                opened.append(stack.enter_context(safe_open(file.with_name(name), framework="pt")))
            stored = _stored(opened)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{file}: not a whole checkpoint: {type(error).__name__}: {error}") from error
        for part, module in parts.items():
            prefix = f"{part}/"
            state = {name.removeprefix(prefix): s for name, s in stored.items() if name.startswith(prefix)}
            if isinstance(module, nn.Module):
                wanted = _tensors(module)
                shapes = {name: [*parameter.shape] for name, parameter in wanted.items()}
                if shapes != {name: found.shape for name, found in state.items()}:
                    raise InputError(f"{file}: {part}: its tensors are not those that this run trains")
                with torch.no_grad():
                    for name, parameter in wanted.items():
                        _own(parameter).copy_(state[name].read(_rows(parameter)))
            else:
                module.load_state_dict(_optimizer_state(module, state))
    return values


def _tensors(part: Part) -> dict[str, Tensor]:
    if isinstance(part, nn.Module):
        return {name: parameter for name, parameter in part.named_parameters() if parameter.requires_grad}
    return {
        f"{index}/{name}": tensor
        for index, state in part.state_dict()["state"].items()
        for name, tensor in state.items()
    }


def _optimizer_state(optimizer: torch.optim.Optimizer, stored: Mapping[str, "Stored"]) -> dict[str, Any]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, found in stored.items():
        index, _, name = key.partition("/")
        parameter = parameters[int(index)]
        tensor = found.read(_rows(parameter))
        if found.shape and _is_shared(parameter):
            from torch.distributed.tensor import DTensor

            shape = {"shape": parameter.shape, "stride": parameter.stride()}
            tensor = tensor.to(_own(parameter).device)
            tensor = DTensor.from_local(tensor, parameter.device_mesh, parameter.placements, **shape)
        state.setdefault(int(index), {})[name] = tensor
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


# ---- tensors that processes share


def _is_shared(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _own(tensor: Any) -> Tensor:
    """This process's rows."""
    return tensor.to_local() if _is_shared(tensor) else tensor


def _rows(tensor: Tensor) -> range:
    """Which rows they are: as torch.chunk shares them out."""
    rows = tensor.shape[0] if tensor.dim() else 1
    if not _is_shared(tensor):
        return range(rows)
    size = ceil(rows / world())
    found = range(min(rank() * size, rows), min((rank() + 1) * size, rows))
    assert len(found) == _own(tensor).shape[0]
    return found


@dataclass(frozen=True)
class Stored:
    """A tensor in files, each with some of its rows."""

    shape: list[int]
    pieces: list[tuple[int, Any]] = field(default_factory=list)  # the first row, and the file's slices

    def read(self, rows: range) -> Tensor:
        """These rows; the number of a tensor without dimensions."""
        if not self.shape:
            return self.pieces[0][1][...]
        found = [torch.empty(0, *self.shape[1:])]
        for start, piece in self.pieces:
            first, end = max(rows.start, start), min(rows.stop, start + piece.get_shape()[0])
            if first < end:
                found.append(piece[first - start : end - start])
        return torch.cat(found[1:] or found)


def _stored(opened: Sequence[Any]) -> dict[str, Stored]:
    """By name."""
    stored: dict[str, Stored] = {}
    for file in opened:
        starts = json.loads(file.metadata().get("starts", "{}"))
        for name in file.keys():  # noqa: SIM118 (not a dict)
            piece = file.get_slice(name)
            shape, start = piece.get_shape(), starts.get(name, 0)
            earlier = stored.get(name)
            total = (
                [max(start + shape[0], earlier.shape[0] if earlier else 0), *shape[1:]] if shape else shape
            )
            stored[name] = Stored(total, [*(earlier.pieces if earlier else []), (start, piece)])
    return stored
