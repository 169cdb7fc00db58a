"""A guard at every access of an interpreted kernel: it lies within an argument and meets no other program's.

install() puts it under Triton's interpreter. AccessError names the kernel, the program and the fault:

outside   an unmasked lane reads or writes an element of no argument: past a tensor's ends, or between the elements of
          a strided view (another view of that memory owns it, if the launch was given that one, too)
race      a program writes what another one has read or written, or reads what another one has written. The interpreter
          runs the programs of a launch one after the other, a GPU all at once: such a kernel is right here, wrong there
twice     one store writes an element from two lanes, with different values

It sees pointers and tensor descriptors. Atomics raise: no kernel has any, and sums in their order would not repeat.
It does not see what programs of different launches share, order within a program (the interpreter has one thread), or
a race with a read that the same values excuse: equal values that two programs store count as a race.
"""

from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from triton.runtime import interpreter

NOBODY, SEVERAL = 0, -1  # programs count from 1
LARGEST = 1 << 27  # elements of one storage; of a larger one only the ends are looked at

Addresses = NDArray[np.int64]


class AccessError(Exception):
    pass


class _Memory:
    """The views of one storage that a launch was given, and which program has touched which element."""

    def __init__(self, views: list[Any]):
        self.size = min(v.element_size() for v in views)
        spans = [(v.data_ptr(), v.data_ptr() + (_reach(v) + 1) * v.element_size()) for v in views]
        self.first, self.end = min(first for first, _ in spans), max(end for _, end in spans)
        whole = any(
            _dense(v) and span == (self.first, self.end) for v, span in zip(views, spans, strict=True)
        )
        self.given = None if whole or self.elements > LARGEST else self._elements_of(views)
        self.reads: (
            list[tuple[int, Addresses]] | None
        ) = []  # until a program writes here, which most memory sees never
        self.reader = self.writer = np.zeros(0, np.int32)

    @property
    def elements(self) -> int:
        return -(-(self.end - self.first) // self.size)

    def _elements_of(self, views: list[Any]) -> NDArray[np.bool_]:
        given = np.zeros(self.elements, bool)
        for v in views:
            width, start = v.element_size() // self.size, (v.data_ptr() - self.first) // self.size
            for part in range(width):
                strides = [s * width for s in v.stride()]
                np.lib.stride_tricks.as_strided(given[start + part :], v.shape, strides)[...] = True
        return given

    def read(self, program: int, at: Addresses) -> str:
        if self.reads is not None:
            self.reads.append((program, at))
            return ""
        if _others(self.writer[at], program):
            return "reads what another program has written"
        seen = self.reader[at]
        self.reader[at] = np.where((seen == NOBODY) | (seen == program), program, SEVERAL)
        return ""

    def write(self, program: int, at: Addresses) -> str:
        if self.reads is not None:
            reads, self.reads = self.reads, None
            self.reader, self.writer = np.zeros(self.elements, np.int32), np.zeros(self.elements, np.int32)
            for reader, places in reads:
                self.read(reader, places)
        if _others(self.writer[at], program):
            return "writes what another program has written"
        if _others(self.reader[at], program):
            return "writes what another program has read"
        self.writer[at] = program
        return ""


def _reach(view: Any) -> int:
    """The number of elements from a view's first to its last."""
    return sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True))


def _dense(view: Any) -> bool:
    return view.numel() == _reach(view) + 1 and 0 not in view.stride()


def _others(seen: NDArray[np.int32], program: int) -> bool:
    return bool(((seen != NOBODY) & (seen != program)).any())


class _Launch:
    """The one that runs: the interpreter runs one after the other."""

    kernel = ""
    program = (0, 0, 0)
    number = 0
    memory: tuple[_Memory, ...] = ()
    launches = lanes = 0  # of this process: what has been looked at


def _fault(kind: str, text: str) -> NoReturn:
    raise AccessError(f"{kind}: {_Launch.kernel}, program {_Launch.program}: {text}")


def _guard(pointers: Any, mask: Any, values: NDArray[Any] | None = None) -> None:
    # a descriptor's mask is an array; a conjunction of masks may come in integers
    mask = np.asarray(mask if isinstance(mask, np.ndarray) else mask.data, bool)
    at: Addresses = (
        pointers.data.view(np.int64) if pointers.data.dtype == np.uint64 else pointers.data.astype(np.int64)
    )
    if values is not None:
        values = np.broadcast_to(values, at.shape)

    # the lanes that are on
    if mask.all():
        at, values = at.ravel(), None if values is None else values.ravel()
    else:
        live = np.broadcast_to(mask, at.shape)
        at, values = at[live], None if values is None else values[live]
    if not at.size:
        return

    # in one argument, or in several
    _Launch.lanes += at.size
    width = max(8, pointers.get_element_ty().primitive_bitwidth) // 8
    lowest, highest = int(at.min()), int(at.max()) + width
    for memory in _Launch.memory:
        if memory.first <= lowest and highest <= memory.end:
            _within(memory, at, width, values is not None)
            break
    else:
        _scattered(at, width, values is not None)
    if values is not None:
        _written_once(at, values)


def _within(memory: _Memory, at: Addresses, width: int, writes: bool) -> None:
    places = (at - memory.first) // memory.size
    if width > memory.size:
        places = np.concatenate([places + part for part in range(width // memory.size)])
    if memory.given is not None and not memory.given[places].all():
        _fault(
            "outside", f"{int((~memory.given[places]).sum())} lanes between the elements of a strided view"
        )
    if memory.elements > LARGEST:
        return
    fault = (memory.write if writes else memory.read)(_Launch.number, places)
    if fault:
        _fault("race", fault)


def _scattered(at: Addresses, width: int, writes: bool) -> None:
    """Lanes of several tensors, or outside of all."""
    left = at
    for memory in _Launch.memory:
        inside = (left >= memory.first) & (left + width <= memory.end)
        if inside.any():
            _within(memory, left[inside], width, writes)
            left = left[~inside]

    # lanes outside of all: how far from the nearest argument
    if left.size:
        one = int(left[0])
        near = min(_Launch.memory, key=lambda m: min(abs(one - m.first), abs(one - m.end)), default=None)
        where = "of a launch without tensors"
        if near is not None:
            gap = (
                f"{near.first - one} bytes before"
                if one < near.first
                else f"{one + width - near.end} bytes past"
            )
            where = f"the first {gap} an argument of {near.end - near.first} bytes"
        _fault("outside", f"{'writes' if writes else 'reads'} by {left.size} lanes, {where}")


def _written_once(at: Addresses, values: NDArray[Any]) -> None:
    if at.size < 2 or bool((at[1:] > at[:-1]).all()):
        return
    order = np.argsort(at, kind="stable")
    at, values = at[order], values[order]
    same = at[1:] == at[:-1]
    one, other = values[1:][same], values[:-1][same]
    if not ((one == other) | ((one != one) & (other != other))).all():
        _fault("twice", "two lanes of one store write different values")


def _tensors(arguments: list[Any]) -> list[Any]:
    """The distinct tensors among a launch's arguments, tuples and descriptors opened."""
    found = {}
    while arguments:
        a = arguments.pop()
        if isinstance(a, tuple):
            arguments += a
        elif hasattr(a, "block_shape"):
            arguments.append(a.base)
        elif hasattr(a, "data_ptr") and a.numel():
            found[a.data_ptr(), tuple(a.shape), a.stride(), a.dtype] = a
    return list(found.values())


def install() -> None:
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    begin, end = executor._init_args_hst, executor._restore_args_dev
    move, load, store = builder.set_grid_idx, builder.create_masked_load, builder.create_masked_store

    def init_args(self: Any, args: Any, kwargs: Any) -> Any:
        made = begin(self, args, kwargs)
        storages: dict[int, list[Any]] = {}
        for t in _tensors([*made[0], *made[1].values()]):
            storages.setdefault(t.untyped_storage().data_ptr(), []).append(t)
        _Launch.kernel, _Launch.number = self.fn.__name__, 0
        _Launch.memory = tuple(_Memory(views) for views in storages.values())
        _Launch.launches += 1
        return made

    def restore_args(self: Any, *args: Any) -> Any:
        _Launch.memory = ()
        return end(self, *args)

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> Any:
        _Launch.program, _Launch.number = (x, y, z), _Launch.number + 1
        return move(self, x, y, z)

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        _guard(pointers, mask)
        return load(self, pointers, mask, *rest, **more)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _guard(pointers, mask, value.data)
        return store(self, pointers, value, mask, *rest)

    def atomic(*_: Any) -> NoReturn:
        _fault("atomic", "expected none: sums in their order do not repeat, and the guard knows no others")

    executor._init_args_hst, executor._restore_args_dev = init_args, restore_args
    builder.set_grid_idx, builder.create_masked_load, builder.create_masked_store = (
        set_grid_idx,
        masked_load,
        masked_store,
    )
    builder.create_atomic_rmw = builder.create_atomic_cas = atomic
