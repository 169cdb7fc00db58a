"""Conversion of records (NamedTuples of tensors and numbers) to flat arguments for torch.library, and back.

torch.library supports tensors, numbers and lists of these. The schema and the conversion functions are generated
once, when a kernel file is imported. A field `bias` of an argument `head` has the flat name head_bias.
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
    """One flat argument of a schema: a tensor, a number, or a list of either."""

    name: str  # such as head_bias
    kind: str  # the type in the schema, such as Tensor?
    read: str  # an expression that reads it from the arguments, such as head.bias

    @property
    def is_tensor(self) -> bool:
        return self.kind.startswith("Tensor")

    @property
    def is_list(self) -> bool:
        return self.kind.endswith("[]")


def _is_record(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, tuple) and hasattr(annotation, "_fields")


def kind_of(annotation: Any) -> str:
    """Return the name of a Python type in a torch schema, such as "Tensor?" for Tensor | None."""
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (part for part in get_args(annotation) if part is not type(None))
        return kind_of(annotation) + "?"
    if get_origin(annotation) is list:
        return kind_of(get_args(annotation)[0]) + "[]"
    return SCHEMA[annotation]


def _leaves(name: str, annotation: Any, read: str) -> list[Leaf]:
    """Return the leaves of an argument, which are the flat arguments that it becomes in a schema.

    A tensor, a number, or a list of them is one leaf. A record gives the leaves of its fields. A list of records gives
    one list for each leaf of the record.
    """
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
    """Concatenate lists of whole numbers, each preceded by its length, because a schema cannot hold a list of lists."""
    return [number for numbers in lists for number in (len(numbers), *numbers)]


def _parted(joined: list[int]) -> list[list[int]]:
    """Split a list made by `_joined` into its lists."""
    lists, rest = [], iter(joined)
    for length in rest:
        lists.append([next(rest) for _ in range(length)])
    return lists


def _built(annotation: Any, names: Iterator[str], records: dict[str, Any]) -> str:
    """Return the source of a Python expression that rebuilds one argument from its leaves.

    names: the variables that hold the leaves, in order. records: a dict to which each record class that the expression
        calls is added.
    """
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
    """The flat form (leaves) of a function's arguments or a record's fields.

    `flat` turns the arguments into a tuple of leaves, and `nested` turns the leaves back into a tuple of arguments.
    """

    def __init__(self, hints: dict[str, Any]):
        self.leaves = [leaf for name, kind in hints.items() for leaf in _leaves(name, kind, name)]
        self.schema = ", ".join(f"{leaf.kind} {leaf.name}" for leaf in self.leaves)
        self._arguments = ", ".join(hints)
        self._hints = hints
        # each is the inverse of the other; both return a tuple
        self.flat = self.pick(self.leaves)
        names = [leaf.name for leaf in self.leaves]
        self.nested = self.build(", ".join(names), names)

    def pick(self, leaves: Iterable[Leaf], spread: bool = False) -> Callable[..., Any]:
        """Return a function that takes the arguments and returns the given leaves as a tuple.

        spread: whether a leaf that is a list is replaced in the tuple by its items.
        """
        parts = "".join("*" * (spread and leaf.is_list) + leaf.read + ", " for leaf in leaves)
        return eval(f"lambda {self._arguments}: ({parts})")

    def call(self, function: Callable[..., Any], leaves: Iterable[Leaf]) -> Callable[..., Any]:
        """Return a function of the arguments that calls `function` with a tuple of them, then the given leaves."""
        parts = "".join(leaf.read + ", " for leaf in leaves)
        return eval(
            f"lambda {self._arguments}: _function(({self._arguments},), {parts})", {"_function": function}
        )

    def build(self, parameters: str, leaves: Iterable[str], record: type[Any] = tuple) -> Callable[..., Any]:
        """Return a function that takes `parameters`, and rebuilds the arguments as a NamedTuple of class `record`.

        parameters: the parameter list, as source text. leaves: for each leaf, an expression that reads it from the
            parameters.
        """
        records: dict[str, Any] = {"_make": partial(tuple.__new__, record), "_parted": _parted}
        rest = iter(leaves)
        built = "".join(_built(kind, rest, records) + ", " for kind in self._hints.values())
        return eval(f"lambda {parameters}: _make(({built}))", records)


def compiled(signature: str, lines: list[str], **known: Any) -> Callable[..., Any]:
    """Compile a function from its signature and the source lines of its body. `known` are the globals of the body."""
    known["_joined"] = _joined
    exec(f"def {signature}:\n    " + "\n    ".join(lines), known)
    return known[signature.split("(")[0]]


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    hints = get_type_hints(function)
    return {name: hints[name] for name in inspect.signature(function).parameters}


def flattened(values: Iterable[Any]) -> tuple[list[Any], list[int | None]]:
    """Replace each list of tensors among `values` by its items, in one flat list.

    Return (flat, lengths). There is one length for each value: that of a list of tensors, or None for any other value.
    """
    flat, lengths = [], []
    for value in values:
        is_list = isinstance(value, list) and all(t is None or isinstance(t, Tensor) for t in value)
        flat += value if is_list else [value]
        lengths.append(len(value) if is_list else None)
    return flat, lengths


def nested(flat: Iterable[Any], lengths: list[int | None]) -> list[Any]:
    """Undo `flattened`: rebuild the list of values from the flat list and the lengths."""
    rest = iter(flat)
    return [next(rest) if length is None else [next(rest) for _ in range(length)] for length in lengths]
