"""What a stopped run goes on from: one safetensors file with all that training changes, replaced as a whole.

It holds the trained parameters and the optimizer states as "part/name", and in its metadata the step and a few numbers
as JSON. Nothing else needs saving: data order and sampling noise are functions of the seed and the step, and frozen
weights come from the model folder that the run started from.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..model.errors import InputError

Part = nn.Module | torch.optim.Optimizer


def write_checkpoint(file: Path, parts: Mapping[str, Part], values: Mapping[str, Any]) -> None:
    """Replace `file` by the state of `parts` and the JSON of `values`; a failure leaves the earlier file whole."""
    tensors = {
        f"{part}/{name}": tensor.detach().contiguous()
        for part, module in parts.items()
        for name, tensor in _tensors(module).items()
    }
    beside = file.with_name(f".{file.name}.partial")
    try:
        save_file(tensors, beside, metadata={"values": json.dumps(dict(values))})
        with open(beside, "rb+") as written:
            os.fsync(written.fileno())
        beside.replace(file)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise InputError(f"{file}: cannot be written, the earlier checkpoint is kept: {error}") from error


def read_checkpoint(file: Path, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Put the state in `file` into `parts`, in place. Returns the values. Raises InputError where it does not fit."""
    try:
        with safe_open(file, framework="pt") as opened:
            values = json.loads(opened.metadata()["values"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: not a whole checkpoint: {type(error).__name__}: {error}") from error
    for part, module in parts.items():
        prefix = f"{part}/"
        state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        if isinstance(module, nn.Module):
            wanted = {name: parameter.shape for name, parameter in _tensors(module).items()}
            if wanted != {name: tensor.shape for name, tensor in state.items()}:
                raise InputError(f"{file}: {part}: its tensors are not those that this run trains")
            module.load_state_dict(state, strict=False)
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


def _optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition("/")
        state.setdefault(int(index), {})[name] = tensor
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
