"""The letters of a Case's shapes, and what its op is called with: for those who time a kernel of their own beside ours.

All of it is read off inputs that are made on the meta device, where they have shapes and no memory.
"""

from itertools import combinations
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .case import Case, Dims, leaves, run, tensor

# three shapes that every Case takes, no two letters alike in all of them: lengths of axes are told from these
SIZES: dict[str, tuple[int, int, int]] = {
    "B": (3, 5, 7),
    "T": (41, 53, 59),
    "S": (67, 71, 73),
    "H": (22, 39, 38),
    "G": (11, 13, 19),
    "D": (34, 48, 62),
    "C": (808, 824, 856),
    "F": (1336, 1384, 1432),
    "V": (101, 103, 107),
    "E": (12, 14, 15),
    "K": (2, 4, 5),
    "R": (9, 10, 16),
    "P": (17, 23, 29),
    "rotary": (20, 26, 28),
    "teacher": (27, 31, 35),
}


def letters(case: Case) -> tuple[str, ...]:
    """The letters of its shapes, in order, with those that case.optional has."""
    return tuple(case.shapes[0])


def letters_text(case: Case) -> str:
    """The letters as a person reads them, the optional ones in brackets: B T [S] H."""
    return " ".join(f"[{letter}]" if letter in case.optional else letter for letter in letters(case))


# ---- what it is called with


class Operand(NamedTuple):
    """An argument or an output."""

    name: str
    axes: tuple[str, ...]  # by letters: "B", "2 F"; a number where none fits
    shape: tuple[int, ...]
    dtype: torch.dtype
    gradient: bool  # of an argument


class Description(NamedTuple):
    arguments: tuple[Operand, ...]
    options: dict[str, Any]  # what is passed beside, arguments that are None among them
    outputs: tuple[Operand, ...]

    def axes(self, name: str) -> tuple[str, ...]:
        """Those of "q", "output 0" or "gradient of q"; none of a name that is unknown."""
        operands = {o.name: o.axes for o in (*self.arguments, *self.outputs)}
        return operands.get(name.removeprefix("gradient of "), ())

    def text(self) -> str:
        """A line for each operand, in columns; one for the options."""
        operands = *self.arguments, *self.outputs
        rows = [
            (
                o.name,
                f"({', '.join(o.axes)})",
                f"({', '.join(map(str, o.shape))})",
                str(o.dtype).removeprefix("torch."),
                "gradient" if o.gradient else "",
            )
            for o in operands
        ]

        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [
            "  ".join(f"{cell:{n}}" for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        if self.options:
            options = " ".join(f"{name}={value!r}" for name, value in self.options.items())
            lines.insert(len(self.arguments), f"{'options':{widths[0]}}  {options}")
        return "\n".join(lines)


def describe(case: Case, dims: Dims, dtype: torch.dtype) -> Description:
    """The arguments, options and outputs of the registry's Case at a shape that check_dims has taken."""
    known = [letter for letter in letters(case) if letter in dims]
    shapes = [dims, *({letter: SIZES[letter][i] for letter in known} for i in range(3))]
    calls = [case.inputs(shape, dtype, "meta") for shape in shapes]
    results = [run(case.fused, case, tensors) for tensors in calls]
    absent = {name: None for name, t in calls[0].items() if t is None}
    wanted = leaves(case, calls[0])
    return Description(
        tuple(
            _operand(n, [tensor(c, n) for c in calls], shapes, n in wanted)
            for n in calls[0]
            if n not in absent
        ),
        absent | case.options,
        tuple(_operand(n, [r[n] for r in results], shapes, False) for n in results[0]),
    )


def _operand(name: str, found: list[Tensor], shapes: list[Dims], gradient: bool) -> Operand:
    """found: the tensor at each of the shapes."""
    axes = tuple(_axis(lengths, shapes) for lengths in zip(*(t.shape for t in found), strict=True))
    return Operand(name, axes, tuple(found[0].shape), found[0].dtype, gradient)


FORMS = {  # of a letter, or of a product of two or three: (times, plus, over), rounded up
    "{}": (1, 0, 1),
    "2 {}": (2, 0, 1),
    "{} + 1": (1, 1, 1),
    "{} + 2": (1, 2, 1),
    "2 {} + 1": (2, 1, 1),
    "{} / 2": (1, 0, 2),
    **{f"{{}} / {n}": (1, 0, n) for n in (32, 64, 64 * 128, 64 * 256)},  # 4-bit blocks, and blocks of these
}


def _axis(lengths: tuple[int, ...], shapes: list[Dims]) -> str:
    """The form of letters that gives the length at each shape; where none does, the length at the first."""
    if len(set(lengths)) > 1:
        for chosen in (c for n in (1, 2, 3) for c in combinations(shapes[0], n)):
            products = [prod(dims[letter] for letter in chosen) for dims in shapes]
            for form, (times, plus, over) in FORMS.items():
                if all(-(-(times * p + plus) // over) == n for p, n in zip(products, lengths, strict=True)):
                    return form.format(" ".join(chosen))
    return str(lengths[0])
