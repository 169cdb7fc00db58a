"""What every kernel file needs before it launches: which path, on what chip, what it accepts, how torch knows it."""

import math
import os
from collections.abc import Callable, Iterable
from functools import cache, wraps
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, _SetExcludeDispatchKeyGuard
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ._triton import expect_triton

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # read once: @triton.jit reads it at import, too
if INTERPRET:
    expect_triton("TRITON_INTERPRET=1")
TARGET: tuple[int, int] | None = None  # set by bench/static.py alone: launches only compile, for this chip
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
    """What picks a tile from a table: (9, 0) on an H100, (9, 4) on an MI300X, (0, 0) when interpreted."""
    if TARGET is not None:
        return TARGET
    return _capability(x.device) if x.is_cuda else (0, 0)


def precision() -> str:
    """How products of fp32 tensors are rounded, as torch's matmul on a GPU rounds them: "ieee", or "tf32".

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
    """What picks from what was measured on one device alone; "" where nothing is launched on any."""
    return _device_name(x.device) if x.is_cuda else ""


def check_shape(name: str, x: Any, **dims: int) -> None:
    """check_shape("weight", w, hidden=4096) raises ValueError naming every dimension it expected."""
    if tuple(x.shape) != tuple(dims.values()):
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
    if _recorded((ids,)):
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
    """How many blocks cover `size`. (triton.cdiv and triton.next_power_of_2 take microseconds on the host.)"""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    return 1 << (max(size, 1) - 1).bit_length()


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(x: Tensor) -> int:
    """What a grid that walks its work is sized by; 2 when interpreted, so that every program walks."""
    return _multiprocessors(x.device) if x.is_cuda else 2 if INTERPRET else 132


def most_warps() -> int:
    """A block has at most 1,024 threads: 32 warps of 32 on NVIDIA, 16 of 64 on AMD's MI300X."""
    return 16 if torch.version.hip or TARGET == (9, 4) else 32


def _flattened(values: Iterable[Any]) -> tuple[list[Any], list[int | None]]:
    """Lists of tensors laid out flat, and how long each was; None for what is no such list."""
    flat, lengths = [], []
    for value in values:
        is_list = isinstance(value, list) and all(t is None or isinstance(t, Tensor) for t in value)
        flat += value if is_list else [value]
        lengths.append(len(value) if is_list else None)
    return flat, lengths


def _nested(flat: Iterable[Any], lengths: list[int | None]) -> list[Any]:
    """The inverse."""
    rest = iter(flat)
    return [next(rest) if length is None else [next(rest) for _ in range(length)] for length in lengths]


# ---- ops


def _first(args: Iterable[Any]) -> Tensor | None:
    """The first tensor among an op's arguments, of which some are lists and some None."""
    for value in args:
        if isinstance(value, Tensor):
            return value
        if isinstance(value, list) and (found := _first(value)) is not None:
            return found
    return None


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device and its stream: make them those of the arguments."""

    @wraps(launch)
    def guarded(*args: Any) -> Any:
        first = _first(args)
        if first is None or not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device(first.device):
            return launch(*args)

    return guarded


class _FirstOrder(torch.autograd.Function):
    """Gradients as they are, recorded as made of `origins`; they have none of their own."""

    @staticmethod
    def forward(ctx: Any, name: str, origins: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return tensors[origins:]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            f"{ctx.name}: expected first derivatives alone, got the derivative of a gradient; references have it"
        )


class _Unpacked:
    """A context whose saved tensors may be asked for twice: activation checkpointing hands them out once."""

    def __init__(self, ctx: Any):
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _first_order(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """Under create_graph, which alone records a backward, what would be wrong without a word raises."""

    def once(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        ctx = _Unpacked(ctx)
        with torch.no_grad():
            found = backward(ctx, *grads)
        origins = [
            t for t in (*_flattened(grads)[0], *ctx.saved_tensors) if t is not None and t.requires_grad
        ]
        flat, lengths = _flattened(found if isinstance(found, tuple) else (found,))
        return tuple(_nested(_FirstOrder.apply(name, len(origins), *origins, *flat), lengths))

    return once


def register(
    name: str,
    launch: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    lists: bool = False,
) -> Callable[..., Any]:
    """Make `launch` known to torch as burnish::name and return what the public op calls.

    launch: it runs on the device of its tensors.
    fake: the same signature, shapes and dtypes only; it answers for tensors on "meta", too.
    save(ctx, inputs, output) and backward(ctx, *grads): those of torch.autograd.Function, of first derivatives alone.
    torch.compile and dispatch modes (FakeTensor, selective checkpointing) see the registered op; an eager call goes by
    an autograd.Function around the same three functions, which costs half as much, or where gradients are off straight
    to `launch`.
    lists: the op takes and returns lists of tensors. An autograd.Function knows none: they pass it flat.
    """
    launch = on_its_device(launch)
    registered = torch.library.custom_op(f"{NAMESPACE}::{name}", launch, mutates_args=())
    registered.register_fake(fake)
    direct = launch
    if save is not None and backward is not None:
        backward = _first_order(name, backward)
        registered.register_autograd(backward, setup_context=save)

        def forward(ctx: Any, *args: Any) -> Any:
            output = launch(*args)
            save(ctx, args, output)
            return output

        def forward_lists(ctx: Any, lengths: list[int | None], returned: list[Any], *flat: Any) -> Any:
            output = forward(ctx, *_nested(flat, lengths))
            flat_output, ctx.returned = _flattened(output)
            returned += ctx.returned
            return tuple(flat_output)

        def backward_lists(ctx: Any, *grads: Any) -> Any:
            assert backward is not None
            return None, None, *_flattened(backward(ctx, *_nested(grads, ctx.returned)))[0]

        # without a setup_context of its own, for which torch would inspect the signature anew on each call
        pair = (forward_lists, backward_lists) if lists else (forward, backward)
        members = {"forward": staticmethod(pair[0]), "backward": staticmethod(pair[1])}
        direct = apply = type(name, (torch.autograd.Function,), members).apply
        if lists:

            def direct(*args: Any) -> Any:
                flat, lengths = _flattened(args)
                returned: list[int | None] = []
                return _nested(apply(lengths, returned, *flat), returned)

    def call(*args: Any) -> Any:
        if _recorded(args):
            return registered(*args)
        return direct(*args) if torch.is_grad_enabled() else launch(*args)

    return call


def _recorded(args: tuple[Any, ...]) -> bool:
    """Does somebody want to see the registered ops, or their shapes alone?"""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    first = _first(args)
    return first is not None and first.is_meta


def register_path(
    name: str, path: Callable[..., Tensor | tuple[Tensor, ...]], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Make a CPU path that reads numbers of its tensors, which no graph can hold, one op in a graph: burnish::name.

    path: plain torch, annotated as a custom op is, whose outputs are no views of its arguments; no lists of tensors.
    An eager call is `path` itself, which autograd records. The backward of the registered op runs it again.
    """
    schema = torch.library.infer_schema(path, mutates_args=())
    arguments = schema[1 : schema.rindex(") ->")]

    def derive(grads: list[Tensor], needed: list[int], *arguments: Any) -> list[Tensor]:
        given = list(arguments)
        for place in needed:
            given[place] = arguments[place].detach().requires_grad_()
        leaves = [given[place] for place in needed]
        # inside of an op autograd is off; torch.func.vjp, which would turn it on, crashes under a dispatch mode
        with torch.enable_grad(), _SetExcludeDispatchKeyGuard(DispatchKey.AutogradFunctionality, False):
            outs = path(*given)
            outs = outs if isinstance(outs, tuple) else (outs,)
            live = [i for i, out in enumerate(outs) if out.requires_grad]
            outs, upstream = ([x[i] for i in live] for x in (outs, grads))
            found = torch.autograd.grad(outs, leaves, upstream, materialize_grads=True)
        return [torch.empty_like(leaf).copy_(d) for leaf, d in zip(leaves, found, strict=True)]

    backward = torch.library.custom_op(
        f"{NAMESPACE}::{name}_backward",
        derive,
        mutates_args=(),
        schema=f"(Tensor[] grads, SymInt[] needed, {arguments}) -> Tensor[]",
    )
    backward.register_fake(lambda grads, needed, *arguments: [torch.empty_like(arguments[i]) for i in needed])

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]

    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        arguments = [next(tensors) if other is None else other[0] for other in ctx.others]
        needed = [place for place, need in enumerate(ctx.needs_input_grad) if need]
        found = dict(zip(needed, backward(list(grads), needed, *arguments), strict=True))
        return tuple(found.get(place) for place in range(len(arguments)))

    registered = torch.library.custom_op(f"{NAMESPACE}::{name}", path, mutates_args=())
    registered.register_fake(fake)
    registered.register_autograd(_first_order(name, differentiate), setup_context=save)
    return lambda *args: (registered if _recorded(args) else path)(*args)
