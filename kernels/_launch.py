"""What every kernel file needs before it launches: which path to take, on what chip, and what it accepts."""

import os

import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # read once: @triton.jit reads it at import, too
TARGET: tuple[int, int] | None = (
    None  # set by burnish.bench.static alone: launches only compile, for this chip
)


def use_triton(x: Tensor) -> bool:
    """CUDA tensors take the Triton path, CPU tensors torch, unless Triton interprets or only compiles."""
    return x.is_cuda or INTERPRET or TARGET is not None


def capability(x: Tensor) -> tuple[int, int]:
    """What picks a tile from a table: (9, 0) on an H100, (9, 4) on an MI300X, (0, 0) when interpreted."""
    if TARGET is not None:
        return TARGET
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)


def check_shape(name: str, x: Tensor, **dims: int) -> None:
    """check_shape("weight", w, hidden=4096) raises ValueError naming every dimension it expected."""
    if tuple(x.shape) != tuple(dims.values()):
        want = ", ".join(f"{dim}={size}" for dim, size in dims.items())
        raise ValueError(f"{name}: expected shape ({want}), got {tuple(x.shape)}")
