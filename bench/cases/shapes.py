"""The letters of a Case's shapes, and the arguments of its op, for users who time their own kernel beside ours.

Both are derived from inputs on the meta device, which have shapes but no memory.
"""

from itertools import combinations
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .case import Case, Dims, leaves, run, tensor

# three sizes for each letter. Every Case accepts them, and they identify the letter of an axis by its lengths
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
    """Return the letters of the Case's shapes in order, optional letters included."""
    return tuple(case.shapes[0])


def letters_text(case: Case) -> str:
    """Return the letters as text, with optional letters in brackets: "B T [S] H"."""
    return " ".join(f"[{letter}]" if letter in case.optional else letter for letter in letters(case))


# ---- the arguments of the op


class Operand(NamedTuple):
    """An argument or an output of an op."""

    name: str
    axes: tuple[str, ...]  # formulas in letters, "B" or "2 F"; a number if none fits
    shape: tuple[int, ...]
    dtype: torch.dtype
    gradient: bool  # whether an argument has a gradient


class Description(NamedTuple):
    """The arguments, options and outputs of an op at one shape."""

    arguments: tuple[Operand, ...]
    options: dict[str, Any]  # keyword options, and the arguments that are None
    outputs: tuple[Operand, ...]

    def axes(self, name: str) -> tuple[str, ...]:
        """Return the axes of the operand "q", "output 0" or "gradient of q". Return () for an unknown name."""
        operands = {o.name: o.axes for o in (*self.arguments, *self.outputs)}
        return operands.get(name.removeprefix("gradient of "), ())

    def text(self) -> str:
        """Return a table with one line for each operand and one line for the options."""
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
    """Return the Description of a Case in the registry, at a shape that check_dims has accepted."""
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
    """Return the Operand of an argument or output. found: the tensor of this name at each of the shapes."""
    axes = tuple(_axis(lengths, shapes) for lengths in zip(*(t.shape for t in found), strict=True))
    return Operand(name, axes, tuple(found[0].shape), found[0].dtype, gradient)


FORMS = {  # of p, the product of one to three letters: (times, plus, over) is ceil((times p + plus) / over)
    "{}": (1, 0, 1),
    "2 {}": (2, 0, 1),
    "{} + 1": (1, 1, 1),
    "{} + 2": (1, 2, 1),
    "2 {} + 1": (2, 1, 1),
    "{} / 2": (1, 0, 2),
    **{f"{{}} / {n}": (1, 0, n) for n in (32, 64, 64 * 128, 64 * 256)},  # 4-bit blocks, and blocks of these
}


def _axis(lengths: tuple[int, ...], shapes: list[Dims]) -> str:
    """Return the formula in letters, such as "2 F", that gives an axis its length at each of the shapes.

    An axis of constant length, or without such a formula, gets its length at the first shape.
    """
    if len(set(lengths)) > 1:
        for chosen in (c for n in (1, 2, 3) for c in combinations(shapes[0], n)):
            products = [prod(dims[letter] for letter in chosen) for dims in shapes]
            for form, (times, plus, over) in FORMS.items():
                if all(-(-(times * p + plus) // over) == n for p, n in zip(products, lengths, strict=True)):
                    return form.format(" ".join(chosen))
    return str(lengths[0])
