"""The dtype of each tensor on disk: remembered from the folder that a model was read from, and given back when it is
saved. Training holds fp32 weights whatever the files hold: a bf16 folder comes back as a bf16 folder.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from .errors import InputError
from .folder import opened

_NAMES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TooLarge(InputError):
    """A tensor holds numbers that the dtype it is to be written in does not."""


@dataclass(frozen=True)
class Dtypes:
    """Of a folder's tensors. usual: of most of its numbers. others: of tensors in another dtype, by name on disk."""

    usual: torch.dtype
    others: dict[str, torch.dtype] = field(default_factory=dict)

    def of(self, name: str) -> torch.dtype:
        return self.others.get(name, self.usual)


def read_dtypes(files: Iterable[Path], four_bit: Mapping[str, torch.dtype]) -> Dtypes:
    """From the headers of safetensors files. four_bit: of the weights in 4 bits, what they are multiplied out to."""
    found: dict[str, torch.dtype] = {}
    sizes: dict[str, int] = {}
    states: set[str] = set()  # the weights that are in 4 bits on disk
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                weight, _, part = name.partition(".quant_state.")
                states |= {weight} if part else set()
                piece = tensors.get_slice(name)
                dtype = _NAMES.get(piece.get_dtype())
                if dtype is not None and ".weight." not in name:
                    found[name], sizes[name] = dtype, prod(piece.get_shape())
    found = {name: dtype for name, dtype in found.items() if name not in states}
    numbers: Counter[torch.dtype] = Counter()
    for name, dtype in found.items():
        numbers[dtype] += sizes[name]
    usual = max(numbers, key=numbers.__getitem__, default=torch.float32)
    found |= {name: four_bit[name] for name in states if name in four_bit}
    return Dtypes(usual, {name: dtype for name, dtype in found.items() if dtype != usual})


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`. Raises TooLarge where a finite number would become infinite."""
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if bool((result.isinf() & tensor.isfinite()).any()):
        most, largest = torch.finfo(dtype).max, tensor.abs().max().item()
        short = str(dtype).removeprefix("torch.")
        raise TooLarge(
            f"{name}: expected numbers up to {most:g}, the most that {short} holds, got {largest:g}: "
            "write it in bfloat16 or float32"
        )
    return result
