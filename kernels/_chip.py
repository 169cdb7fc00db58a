"""Decisions and checks before a kernel launch: Triton or torch, the chip, the precision, and valid arguments."""

import math
import os
from collections.abc import Callable
from functools import cache, wraps
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ._triton import expect_triton

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # read once, at import, as @triton.jit does
if INTERPRET:
    expect_triton("TRITON_INTERPRET=1")
TARGET: tuple[int, int] | None = (
    None  # only bench/ops/static.py sets it: launches then compile for this chip, and run nothing
)
# The number of floats in a CPU vector. With fewer keys, and without a mask, torch's CPU attention returns zeros for a
# row whose scores are all NaN: tests/kernels/test_nan.py
FEW_KEYS = 16
KNOWN = (8, 9, 10, 12)  # NVIDIA's major compute capabilities that have tiles of their own
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOATS = (*DTYPES, torch.float64)  # for an operand that is cast or looked up before it is multiplied
# The namespace of these ops in torch.ops. A copy of this folder inside another package has its own, so that it can be
# used beside an installed Burnish
NAMESPACE = "burnish" if __package__ == "burnish.kernels" else str(__package__).replace(".", "_")


def use_triton(x: Tensor) -> bool:
    """Return whether an op on x takes the Triton path.

    Ops on CUDA tensors run Triton kernels, and ops on CPU tensors run plain torch. Under Triton's interpreter, or
    while kernels are only compiled, ops on CPU tensors take the Triton path, too.
    Raises ValueError for a GPU that is too old, and ModuleNotFoundError for a GPU without Triton installed.
    """
    if x.is_cuda:
        _capability(x.device)
        return True
    return INTERPRET or TARGET is not None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Return the device's compute capability.

    For a GPU that has no entry in the tile tables, return the capability of the card whose tiles need the fewest
    resources.
    """
    expect_triton(str(device))
    if torch.version.hip is not None:
        return 9, 4  # MI300X: no AMD card has less than its 64 KB of shared memory
    found = torch.cuda.get_device_capability(device)
    if found < (8, 0):  # these cards lack bf16 and have 64 KB of shared memory
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"{device}: expected a GPU of compute capability 8.0 or newer, got {name} ({found[0]}.{found[1]})"
        )
    return found if found[0] in KNOWN else (12, 0)


def capability(x: Tensor) -> tuple[int, int]:
    """Return the compute capability for which tiles are picked from the tile tables.

    It is (9, 0) on an H100, (9, 4) on an MI300X, and (0, 0) on a CPU, where Triton's interpreter runs the kernels.
    When kernels are only compiled, it is that of the target chip.
    """
    if TARGET is not None:
        return TARGET
    return _capability(x.device) if x.is_cuda else (0, 0)


def precision() -> str:
    """Return how kernels round products of fp32 tensors: "ieee" or "tf32", after torch's setting for CUDA matmul.

    The setting is read from torch's newer attributes `fp32_precision`. The older getters raise once a process has set
    a newer attribute, as transformers does.
    """
    found = torch.backends.cuda.matmul.fp32_precision
    if found == "none":
        found = torch.backends.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
    return "tf32" if found == "tf32" else "ieee"


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that autocast would give x as an operand of a product.

    Autocast does not cover these ops, so they cast their own inputs to this dtype. A tensor on the device "meta", which
    autocast does not cover either, keeps its dtype.
    """
    kind = x.device.type
    cast = x.is_floating_point() and x.dtype != torch.float64 and not x.is_meta
    if not cast or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def without_autocast(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function so that CPU autocast is off inside it.

    torch.autocast itself is not used as the decorator. All threads would share one autocast object, which holds the
    state to restore after the call.
    """

    @wraps(compute)
    def off(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return compute(*args, **kwargs)

    return off


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def device_name(x: Tensor) -> str:
    """Return the name under which measurements of x's device are stored, or "" for a tensor that is not on a GPU."""
    return _device_name(x.device) if x.is_cuda else ""


def check_shape(name: str, x: Any, **dims: int) -> None:
    """Raise ValueError unless x has the given dimensions; the message names each expected dimension.

    Example: check_shape("weight", w, hidden=4096). x is a tensor or an NF4Weight.
    """
    expected = tuple(dims.values())
    if x.shape != expected and tuple(x.shape) != expected:  # an NF4Weight's shape may be a list
        want = ", ".join(f"{dim}={size}" for dim, size in dims.items())
        raise ValueError(f"{name}: expected shape ({want}), got {tuple(x.shape)}")


def check_dtype(name: str, x: Tensor, *allowed: torch.dtype) -> None:
    """Raise ValueError unless x has one of the allowed dtypes.

    If no dtypes are given, fp32, fp16 and bf16 are allowed, and on the torch path fp64, too.
    """
    if x.dtype not in (allowed or DTYPES) and (allowed or x.dtype != torch.float64 or use_triton(x)):
        raise ValueError(f"{name}: expected dtype {' or '.join(map(str, allowed or DTYPES))}, got {x.dtype}")


def whole_number(number: Any) -> Any:
    """Return an integer of Python or numpy as an int, a graph's symbolic size unchanged, and None for anything else."""
    if isinstance(number, int | torch.SymInt):
        return number
    return int(number) if isinstance(number, Integral) else None


def check_number(name: str, value: float, low: float = -math.inf) -> None:
    """Raise ValueError if `value` is NaN, infinite or below `low`."""
    if not low <= value < math.inf or value == -math.inf:  # NaN is neither
        least = "" if low == -math.inf else f" of at least {low:g}"
        raise ValueError(f"{name}: expected a finite number{least}, got {value}")


def check_ids(name: str, ids: Tensor, low: int, high: int) -> None:
    """Raise ValueError if an id is not in [low, high].

    Nothing is checked on the Triton path, because reading ids would stall a GPU. Under torch.compile or a dispatch
    mode, the check becomes an assertion in the graph.
    """
    if use_triton(ids) or ids.is_meta or not ids.numel():
        return
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        known = ((ids >= low) & (ids <= high)).all()
        return torch.ops.aten._assert_async.msg(known, f"{name}: expected numbers from {low} to {high}")
    least, most = (int(end) for end in ids.aminmax())
    if least < low or most > high:
        raise ValueError(
            f"{name}: expected numbers from {low} to {high}, got {least if least < low else most}"
        )


def check_device(x: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError if an operand is not on the device of x, because a kernel would then read wrong memory."""
    device = x.device
    for name, other in others.items():
        if other is not None and other.device != device:
            raise ValueError(f"{name}: expected on {device}, got on {other.device}")


def readable(x: Tensor) -> bool:
    """Return whether the host may read the values of x.

    It may do so on the torch path only. Reading from a GPU would stall it, and tensors of a graph or on "meta" have no
    values.
    """
    return not (use_triton(x) or x.is_meta or torch.compiler.is_compiling() or isinstance(x, FakeTensor))


MOST_WINDOW = 2**30  # a window that hides no key, and that fits a kernel's 32-bit integer


def check_attention(
    scale: float | None, window: int | None, softcap: float | None, sinks: Tensor | None, heads: int
) -> int | None:
    """Check the arguments that flash_attention and decode_attention share, and return the window.

    The window is an int of at most 2^30, or None. Raises ValueError for a scale or softcap that is not positive, a
    window that is no integer of at least 1, and sinks of a wrong dtype or a shape other than (heads,).
    """
    for name, number in (("scale", scale), ("softcap", softcap)):
        if number is not None and not 0 < number < float("inf"):
            raise ValueError(f"{name}: expected a positive number, got {number}")
    size = whole_number(window)
    if window is not None and size is None:
        raise ValueError(f"window: expected an integer, got {window}")
    if size is not None and size < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    if sinks is not None:
        check_dtype("sinks", sinks)
        check_shape("sinks", sinks, heads=heads)
    return None if size is None else min(size, MOST_WINDOW)


def cdiv(size: int, block: int) -> int:
    """Return the number of blocks that cover `size`. triton.cdiv would cost microseconds on the host."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    return 1 << (max(size, 1) - 1).bit_length()


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(x: Tensor) -> int:
    """Return the number of programs in a grid where each program handles several tiles.

    This is the number of multiprocessors on a GPU, and 132 when kernels are only compiled. It is 2 when interpreted, so
    that each program loops over tiles.
    """
    return _multiprocessors(x.device) if x.is_cuda else 2 if INTERPRET else 132


def most_warps() -> int:
    """Return the largest number of warps in a block of 1,024 threads: 32 warps of 32 threads, or 16 of 64 on AMD."""
    return 16 if torch.version.hip or TARGET == (9, 4) else 32
