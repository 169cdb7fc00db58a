"""What every kernel file needs before it launches: which path to take, and what it accepts."""

import os

from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # read once: @triton.jit reads it at import, too


def use_triton(x: Tensor) -> bool:
    """CUDA tensors take the Triton path, CPU tensors torch, unless Triton interprets on the CPU."""
    return x.is_cuda or INTERPRET


def check_shape(name: str, x: Tensor, **dims: int) -> None:
    """check_shape("weight", w, hidden=4096) raises ValueError naming every dimension it expected."""
    if tuple(x.shape) != tuple(dims.values()):
        want = ", ".join(f"{dim}={size}" for dim, size in dims.items())
        raise ValueError(f"{name}: expected shape ({want}), got {tuple(x.shape)}")
