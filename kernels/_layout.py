"""Records, NamedTuples of tensors and numbers, laid out flat for torch.library and put together again.

torch.library knows tensors, numbers and lists of them. The schema, and the functions that stand between it and records,
are generated once, when a kernel file is imported. Flat, an argument `head` that is a record with a field `bias` is
called head_bias.
"""

import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

SCHEMA = {
    Tensor: "Tensor",
    int: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
}


class Leaf(NamedTuple):
    """A tensor, a number or a list of them: what a schema has as one argument."""

    name: str  # head_bias
    kind: str  # as a schema has it: Tensor?
    read: str  # an expression that reads it from the arguments: head.bias

    @property
    def is_tensor(self) -> bool:
        return self.kind.startswith("Tensor")

    @property
    def is_list(self) -> bool:
        return self.kind.endswith("[]")


def _is_record(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, tuple) and hasattr(annotation, "_fields")


def kind_of(annotation: Any) -> str:
    """A type as a schema names it."""
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (part for part in get_args(annotation) if part is not type(None))
        return kind_of(annotation) + "?"
    if get_origin(annotation) is list:
        return kind_of(get_args(annotation)[0]) + "[]"
    return SCHEMA[annotation]


def _leaves(name: str, annotation: Any, read: str) -> list[Leaf]:
    """The leaves of an argument; of a list of records, one list for each of a record's leaves."""
    if _is_record(annotation):
        fields = get_type_hints(annotation).items()
        return [
            leaf for field, kind in fields for leaf in _leaves(f"{name}_{field}", kind, f"{read}.{field}")
        ]

    if get_origin(annotation) is list and _is_record(get_args(annotation)[0]):
        each = _leaves(name, get_args(annotation)[0], "each")
        lists = [(leaf, f"[{leaf.read} for each in {read}]") for leaf in each]
        return [
            Leaf(leaf.name, leaf.kind, f"_joined({all_of})")
            if leaf.is_list
            else Leaf(leaf.name, leaf.kind + "[]", all_of)
            for leaf, all_of in lists
        ]

    return [Leaf(name, kind_of(annotation), read)]


def _joined(lists: list[list[int]]) -> list[int]:
    """Lists of whole numbers as one, each behind its length: a schema knows no list of lists."""
    return [number for numbers in lists for number in (len(numbers), *numbers)]


def _parted(joined: list[int]) -> list[list[int]]:
    """The inverse."""
    lists, rest = [], iter(joined)
    for length in rest:
        lists.append([next(rest) for _ in range(length)])
    return lists


def _built(annotation: Any, names: Iterator[str], records: dict[str, Any]) -> str:
    """An expression that makes an argument of its leaves, which are named; `records` is what it may call."""
    if _is_record(annotation):
        known = records.setdefault(annotation.__name__, annotation)
        assert known is annotation, f"two records are named {annotation.__name__}"
        parts = [_built(kind, names, records) for kind in get_type_hints(annotation).values()]
        return f"{annotation.__name__}({', '.join(parts)})"

    if get_origin(annotation) is list and _is_record(get_args(annotation)[0]):
        leaves = _leaves("", get_args(annotation)[0], "")
        lists = [f"_parted({next(names)})" if leaf.is_list else next(names) for leaf in leaves]
        each = [f"each_{i}" for i in range(len(leaves))]
        record = _built(get_args(annotation)[0], iter(each), records)
        return f"[{record} for {', '.join(each)}, in zip({', '.join(lists)}, strict=True)]"

    return next(names)


class Layout:
    """The arguments of a function, or the fields of a record, laid out flat."""

    def __init__(self, hints: dict[str, Any]):
        self.leaves = [leaf for name, kind in hints.items() for leaf in _leaves(name, kind, name)]
        self.schema = ", ".join(f"{leaf.kind} {leaf.name}" for leaf in self.leaves)
        self._arguments = ", ".join(hints)
        self._hints = hints
        # inverse to one another; both return a tuple
        self.flat = self.pick(self.leaves)
        names = [leaf.name for leaf in self.leaves]
        self.nested = self.build(", ".join(names), names)

    def pick(self, leaves: Iterable[Leaf], spread: bool = False) -> Callable[..., Any]:
        """A function of the arguments that returns these leaves as a tuple, lists spread out in it or as they are."""
        parts = "".join("*" * (spread and leaf.is_list) + leaf.read + ", " for leaf in leaves)
        return eval(f"lambda {self._arguments}: ({parts})")

    def call(self, function: Callable[..., Any], leaves: Iterable[Leaf]) -> Callable[..., Any]:
        """A function of the arguments that passes them on as one tuple, and once more these leaves of them."""
        parts = "".join(leaf.read + ", " for leaf in leaves)
        return eval(
            f"lambda {self._arguments}: _function(({self._arguments},), {parts})", {"_function": function}
        )

    def build(self, parameters: str, leaves: Iterable[str], record: type[Any] = tuple) -> Callable[..., Any]:
        """A function of `parameters` that returns the arguments as a record, each leaf an expression of them."""
        records: dict[str, Any] = {"_make": partial(tuple.__new__, record), "_parted": _parted}
        rest = iter(leaves)
        built = "".join(_built(kind, rest, records) + ", " for kind in self._hints.values())
        return eval(f"lambda {parameters}: _make(({built}))", records)


def compiled(signature: str, lines: list[str], **known: Any) -> Callable[..., Any]:
    """The function of these lines."""
    known["_joined"] = _joined
    exec(f"def {signature}:\n    " + "\n    ".join(lines), known)
    return known[signature.split("(")[0]]


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    hints = get_type_hints(function)
    return {name: hints[name] for name in inspect.signature(function).parameters}


def flattened(values: Iterable[Any]) -> tuple[list[Any], list[int | None]]:
    """Lists of tensors laid out flat, and how long each was; None for what is no such list."""
    flat, lengths = [], []
    for value in values:
        is_list = isinstance(value, list) and all(t is None or isinstance(t, Tensor) for t in value)
        flat += value if is_list else [value]
        lengths.append(len(value) if is_list else None)
    return flat, lengths


def nested(flat: Iterable[Any], lengths: list[int | None]) -> list[Any]:
    """The inverse."""
    rest = iter(flat)
    return [next(rest) if length is None else [next(rest) for _ in range(length)] for length in lengths]
