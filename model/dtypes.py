"""The dtype of each tensor on disk: remembered from the folder that a model was read from, and given back when it is
saved. Training holds fp32 weights whatever the files hold: a bf16 folder comes back as a bf16 folder.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import InputError
from .folder import Stored

CHUNK = 2**18  # numbers that are cast and looked at in one go


class TooLarge(InputError):
    """A tensor holds numbers that the dtype it is to be written in does not."""


@dataclass(frozen=True)
class Dtypes:
    """Dtypes of a folder's tensors. usual: of most of its numbers. others: the tensors in another, by name on disk."""

    usual: torch.dtype
    others: dict[str, torch.dtype] = field(default_factory=dict)

    def of(self, name: str) -> torch.dtype:
        return self.others.get(name, self.usual)


def read_dtypes(stored: Mapping[str, Stored]) -> Dtypes:
    """From a folder's headers; of a weight in 4 bits, whatever its bytes are stored in, what its state names."""
    found: dict[str, torch.dtype] = {}
    numbers: Counter[torch.dtype] = Counter()
    for name, tensor in stored.items():
        if isinstance(tensor.dtype, str) or not tensor.dtype.is_floating_point or ".weight." in name:
            continue
        found[name] = tensor.dtype
        numbers[tensor.dtype] += tensor.numel

    for name, tensor in stored.items():
        weight, _, state = name.partition(".quant_state.")
        if state:
            stored_in = found.pop(weight, None)
            if stored_in is not None:
                numbers[stored_in] -= stored[weight].numel
            found[weight] = getattr(torch, json.loads(bytes(tensor.read().tolist()))["dtype"])

    usual = max(numbers, key=numbers.__getitem__, default=torch.float32)
    return Dtypes(usual, {name: dtype for name, dtype in found.items() if dtype != usual})


def check_finite(where: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor, a new one in `dtype` unless that holds more. where: its file and name.

    Raises InputError where it holds NaN or infinite numbers, TooLarge where it would in `dtype`.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    if dtype is not None and torch.finfo(dtype).max <= torch.finfo(tensor.dtype).max:
        result, fits = torch.empty(tensor.shape, dtype=dtype), True
        for part, source in zip(result.view(-1).split(CHUNK), tensor.reshape(-1).split(CHUNK), strict=True):
            fits = fits and _is_finite(part.copy_(source))  # while it is in the cache
        if fits:
            return result
    elif _is_finite(tensor):
        return tensor
    broken = tensor.numel() - int(tensor.isfinite().sum())
    if broken:
        raise InputError(
            f"{where}: expected finite numbers, got NaN or infinity in {broken} of {tensor.numel()}: download the "
            "file again, or take another checkpoint"
        )
    return cast(where, tensor, dtype or tensor.dtype)


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`. Raises TooLarge where a finite number would become infinite."""
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if _may_hold_infinity(result) and bool((result.isinf() & tensor.isfinite()).any()):
        most, largest = torch.finfo(dtype).max, tensor.abs().max().item()
        short = str(dtype).removeprefix("torch.")
        raise TooLarge(
            f"{name}: expected numbers up to {most:g}, the most that {short} holds, got {largest:g}: "
            "take bfloat16 or float32"
        )
    return result


def _may_hold_infinity(tensor: Tensor) -> bool:
    """In a sixtieth of the time that isinf takes, and without its memory; NaN hides an infinity, and counts as one."""
    return tensor.numel() > 0 and not all(bool(end.isfinite()) for end in tensor.aminmax())


def _is_finite(tensor: Tensor) -> bool:
    """A sum is finite only of finite numbers, and takes the least time; it may be too large by itself."""
    return bool(tensor.sum().isfinite()) or not _may_hold_infinity(tensor)
