"""Numbers that stay finite: those of a file, as they are read, and those of a model, as they are written."""

import torch
from torch import Tensor

from ..errors import InputError

CHUNK = 2**18  # numbers that are cast and looked at in one go


class TooLarge(InputError):
    """A tensor holds numbers that the dtype it is to be written in does not."""


def check_finite(where: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor, or a copy in `dtype` where that holds no larger numbers. where: its file and name, for errors.

    Raises InputError where it holds NaN or infinity, TooLarge where only its copy in `dtype` would.
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

    # some number is at fault: a broken one, or one too large for the dtype
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
    """Whether the least or the largest number is not finite. NaN hides an infinity there, and so counts as one.

    It takes a sixtieth of the time of isinf, and none of its memory.
    """
    return tensor.numel() > 0 and not all(bool(end.isfinite()) for end in tensor.aminmax())


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite. The sum is the quickest sign of it, but may be too large by itself."""
    return bool(tensor.sum().isfinite()) or not _may_hold_infinity(tensor)
