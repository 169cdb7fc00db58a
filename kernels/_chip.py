"""Questions before a launch: which path, on what chip, in what precision, and what it accepts."""

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

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # read once: @triton.jit reads it at import, too
if INTERPRET:
    expect_triton("TRITON_INTERPRET=1")
TARGET: tuple[int, int] | None = (
    None  # set by bench/ops/static.py alone: launches only compile, for this chip
)
# of a CPU's attention, a vector of floats: of fewer, torch makes zeros of a row of scores that all are NaN, but under a
# mask. tests/kernels/test_nan.py
FEW_KEYS = 16
KNOWN = (8, 9, 10, 12)  # NVIDIA's major compute capabilities that have tiles of their own
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOATS = (*DTYPES, torch.float64)  # of an operand that is cast or looked up, not multiplied as it is
# of our ops in torch.ops: a copy of this folder inside another package registers its own beside an installed Burnish
NAMESPACE = "burnish" if __package__ == "burnish.kernels" else str(__package__).replace(".", "_")


def use_triton(x: Tensor) -> bool:
    """CUDA tensors take the Triton path, CPU tensors torch, unless Triton interprets or only compiles.

    Raises ValueError for a GPU that is too old, ModuleNotFoundError for one without Triton.
    """
    if x.is_cuda:
        _capability(x.device)
        return True
    return INTERPRET or TARGET is not None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """A device's own, or for one that no tile table knows that of the card whose tiles ask for least."""
    expect_triton(str(device))
    if torch.version.hip is not None:
        return 9, 4  # its 64 KB of shared memory are the least that AMD's cards have
    found = torch.cuda.get_device_capability(device)
    if found < (8, 0):  # no bf16, 64 KB of shared memory
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"{device}: expected a GPU of compute capability 8.0 or newer, got {name} ({found[0]}.{found[1]})"
        )
    return found if found[0] in KNOWN else (12, 0)


def capability(x: Tensor) -> tuple[int, int]:
    """The number that picks a tile from a table: (9, 0) on an H100, (9, 4) on an MI300X, (0, 0) when interpreted."""
    if TARGET is not None:
        return TARGET
    return _capability(x.device) if x.is_cuda else (0, 0)


def precision() -> str:
    """The way products of fp32 tensors are rounded, as torch's matmul on a GPU rounds them: "ieee", or "tf32".

    The older getters raise once a process has used the newer setters, as transformers does.
    """
    found = torch.backends.cuda.matmul.fp32_precision
    if found == "none":
        found = torch.backends.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
    return "tf32" if found == "tf32" else "ieee"


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast, which does not know our ops nor "meta", would give x as an operand of a product."""
    kind = x.device.type
    cast = x.is_floating_point() and x.dtype != torch.float64 and not x.is_meta
    if not cast or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def without_autocast(compute: Callable[..., Any]) -> Callable[..., Any]:
    """A CPU's autocast is off inside. (torch.autocast as a decorator keeps the state of one thread for all of them.)"""

    @wraps(compute)
    def off(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return compute(*args, **kwargs)

    return off


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def device_name(x: Tensor) -> str:
    """The name under which measurements of one device are kept; "" where nothing is launched on any."""
    return _device_name(x.device) if x.is_cuda else ""


def check_shape(name: str, x: Any, **dims: int) -> None:
    """check_shape("weight", w, hidden=4096) raises ValueError naming every dimension it expected."""
    expected = tuple(dims.values())
    if x.shape != expected and tuple(x.shape) != expected:  # an NF4Weight's shape may be a list
        want = ", ".join(f"{dim}={size}" for dim, size in dims.items())
        raise ValueError(f"{name}: expected shape ({want}), got {tuple(x.shape)}")


def check_dtype(name: str, x: Tensor, *allowed: torch.dtype) -> None:
    """Raises ValueError for another dtype than those allowed; by default the kernels', and fp64 on the torch path."""
    if x.dtype not in (allowed or DTYPES) and (allowed or x.dtype != torch.float64 or use_triton(x)):
        raise ValueError(f"{name}: expected dtype {' or '.join(map(str, allowed or DTYPES))}, got {x.dtype}")


def whole_number(number: Any) -> Any:
    """An integer, numpy's as Python's, which a launch takes; a size that a graph does not know; None for others."""
    if isinstance(number, int | torch.SymInt):
        return number
    return int(number) if isinstance(number, Integral) else None


def check_number(name: str, value: float, low: float = -math.inf) -> None:
    """Raises ValueError for NaN, an infinity or a number below `low`."""
    if not low <= value < math.inf or value == -math.inf:  # NaN is neither
        least = "" if low == -math.inf else f" of at least {low:g}"
        raise ValueError(f"{name}: expected a finite number{least}, got {value}")


def check_ids(name: str, ids: Tensor, low: int, high: int) -> None:
    """On the torch path alone: raises ValueError for one that is not from low to high. A graph holds an assertion."""
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
    """Raises ValueError for an operand that is not where x is, of which a kernel would read another tensor's memory."""
    device = x.device
    for name, other in others.items():
        if other is not None and other.device != device:
            raise ValueError(f"{name}: expected on {device}, got on {other.device}")


def readable(x: Tensor) -> bool:
    """May the host look at numbers? Only on the torch path: a GPU would stall, and graphs and "meta" hold none."""
    return not (use_triton(x) or x.is_meta or torch.compiler.is_compiling() or isinstance(x, FakeTensor))


MOST_WINDOW = 2**30  # hides nothing, and is a 32-bit integer to a kernel


def check_attention(
    scale: float | None, window: int | None, softcap: float | None, sinks: Tensor | None, heads: int
) -> int | None:
    """Returns the window; raises ValueError for what no attention, over sequences or a cache, is asked with."""
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
    """The number of blocks that cover `size`. (triton.cdiv, triton.next_power_of_2: microseconds on the host.)"""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    return 1 << (max(size, 1) - 1).bit_length()


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(x: Tensor) -> int:
    """The size of a grid whose programs walk their work; 2 when interpreted, so that every program walks."""
    return _multiprocessors(x.device) if x.is_cuda else 2 if INTERPRET else 132


def most_warps() -> int:
    """A block has at most 1,024 threads: 32 warps of 32 on NVIDIA, 16 of 64 on AMD's MI300X."""
    return 16 if torch.version.hip or TARGET == (9, 4) else 32
