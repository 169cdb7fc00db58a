"""Checks that numbers stay finite, both those read from a file and those written to one."""

import torch
from torch import Tensor

from ..errors import InputError

CHUNK = 2**18  # numbers that are cast and checked at a time


class TooLarge(InputError):
    """An error for a tensor with numbers beyond the range of the dtype that it is to be written in."""


def check_finite(where: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Check that a tensor is finite, and return it. Cast it to `dtype`, unless `dtype` has a larger range than its own.

    A cast to a larger range cannot make a number infinite, so it is left to the caller.
    where: the tensor's file and name, for errors.
    Raises InputError if the tensor holds NaN or infinity, and TooLarge if only the cast makes a number infinite.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor

    if dtype is not None and torch.finfo(dtype).max <= torch.finfo(tensor.dtype).max:
        result, fits = torch.empty(tensor.shape, dtype=dtype), True
        for part, source in zip(result.view(-1).split(CHUNK), tensor.reshape(-1).split(CHUNK), strict=True):
            fits = fits and _is_finite(part.copy_(source))  # checked while the chunk is in the CPU's cache
        if fits:
            return result
    elif _is_finite(tensor):
        return tensor

    # some number is not finite, in the tensor itself or only in the copy
    broken = tensor.numel() - int(tensor.isfinite().sum())
    if broken:
        raise InputError(
            f"{where}: expected finite numbers, got NaN or infinity in {broken} of {tensor.numel()}: download the "
            "file again, or take another checkpoint"
        )
    return cast(where, tensor, dtype or tensor.dtype)


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in `dtype`. Raises TooLarge if a finite number would become infinite."""
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
    """Return whether the smallest or the largest number is infinite or NaN.

    In a tensor with NaN, both are NaN, and an infinity may be hidden. This takes a sixtieth of the time of isinf, and
    no memory.
    """
    return tensor.numel() > 0 and not all(bool(end.isfinite()) for end in tensor.aminmax())


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite.

    A finite sum proves it quickly. Otherwise the smallest and the largest number are checked, because a sum of finite
    numbers may overflow.
    """
    return bool(tensor.sum().isfinite()) or not _may_hold_infinity(tensor)
