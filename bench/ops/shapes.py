"""The check that an op accepts a shape, before any memory is allocated.

There is no separate list of valid shapes. Inputs are made on the meta device, where they have shapes but no memory. The
op is called on them, and rejects an invalid shape.
"""

from math import prod
from pathlib import Path

import torch

from ...model.errors import InputError
from ..cases.case import Case, Dims, Tensors, label, run
from ..cases.shapes import letters, letters_text

MOST = 2**48  # the largest size: above any memory, yet small enough for 64-bit arithmetic


def check_dims(case: Case, dims: Dims, dtype: torch.dtype, device: str) -> Dims:
    """Return the shape with its letters in the order of the Case.

    Raises InputError if a letter is unknown or missing, if a size is out of range, if the inputs need more than the
    free memory, or if the op rejects the shape. case: a Case of the registry, whose op is our own.
    """
    known = letters(case)
    names = letters_text(case)
    for letter in (*dims, *known):
        if letter not in known:
            raise InputError(f"{case.name}: expected sizes of {names}, got {letter}={dims[letter]}")
        if letter not in dims and letter not in case.optional:
            raise InputError(f"{case.name}: expected sizes of {names}, got no {letter}")
        least = 0 if any(empty.get(letter) == 0 for empty in case.empty) else 1
        size = dims.get(letter, least)
        if not isinstance(size, int) or not least <= size <= MOST:
            expected = f"a whole number from {least} to {MOST}"
            raise InputError(f"{case.name}: expected {expected} for {letter}, got {size}")

    dims = {letter: dims[letter] for letter in known if letter in dims}
    place = f"{case.name} at {label(dims)}"
    try:
        tensors = case.inputs(dims, dtype, "meta")
        _check_memory(place, tensors, device)
        run(case.fused, case, tensors)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{place}: {error}") from None
    except (RuntimeError, TypeError):
        if prod(dims.values()) < 2**60:
            raise
        raise InputError(f"{place}: expected tensors whose elements 64 bits can count, got more") from None
    return dims


def _check_memory(place: str, tensors: Tensors, device: str) -> None:
    needed = sum(t.numel() * t.itemsize for t in tensors.values() if t is not None)
    free = _free_bytes(device)
    if free is not None and needed > free:
        raise InputError(
            f"{place}: expected operands of at most {free / 1e9:,.1f} GB, the free memory of {device}, "
            f"got {needed / 1e9:,.1f} GB"
        )


def _free_bytes(device: str) -> int | None:
    """Return the free memory of a device in bytes, or None if the system does not report it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    memory = Path("/proc/meminfo")
    lines = memory.read_text().splitlines() if memory.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None
