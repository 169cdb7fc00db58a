"""The Cases (ops with their inputs) and the shapes that a command line names."""

import re
from collections.abc import Sequence
from difflib import get_close_matches

import torch

from ...model.errors import InputError, shown
from ..cases.case import Case, Dims, label
from ..cases.shapes import letters, letters_text
from .shapes import check_dims


def chosen(cases: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """Return the Cases that the names select, in the order of the names. Without names, return all Cases.

    The name of an op (rms_norm) selects all Cases of the op. The name of a Case (rms_norm/heads) selects this Case.
    Raises InputError for an unknown name.
    """
    if not names:
        return list(cases)
    found: list[Case] = []
    for name in names:
        matches = of_name(cases, name)
        if not matches:
            known = list(dict.fromkeys(x for case in cases for x in (case.op, case.name)))
            near = get_close_matches(name, known, 3) or list(dict.fromkeys(case.op for case in cases))
            raise InputError(f"op: expected one of --list, such as {', '.join(near)}, got {shown(name)}")
        found += [case for case in matches if case not in found]
    return found


def shaped(
    cases: list[Case], names: Sequence[str], shapes: Sequence[str], dtype: torch.dtype, device: str
) -> list[tuple[Case, Dims]]:
    """Return a (Case, shape) pair for each shape and each named Case that has the letters of the shape.

    If a name has several such Cases, the Cases with default benchmark shapes are taken, or else the first Case. Raises
    InputError if no Case has the letters of a shape, if a name fits none of the shapes, or if a size is invalid.
    """
    given = [read_shape(text) for text in joined(shapes)]
    found: list[tuple[Case, Dims]] = []
    for shape in given:
        fitting = [case for name in names for case in of_name(cases, name) if fits(case, shape)]
        if not fitting:
            expected_ones = "; ".join(f"{name}: {expected(cases, name)}" for name in names)
            raise InputError(f"--shape {label(shape)}: expected letters of {expected_ones}")
        for name in names:
            of_this = [case for case in of_name(cases, name) if case in fitting]
            for case in [case for case in of_this if case.bench] or of_this[:1]:
                dims = {letter: shape[letter] for letter in letters(case) if letter in shape}
                if least := [letter for letter, size in dims.items() if size == 0]:
                    raise InputError(f"--shape {label(shape)}: expected sizes above 0, got {least[0]}=0")
                found.append((case, check_dims(case, dims, dtype, device)))

    for name in names:
        if not any(name in (case.op, case.name) for case, _ in found):
            raise InputError(f"--shape: expected one of {name}'s letters, {expected(cases, name)}, got none")
    return found


def joined(shapes: Sequence[str]) -> list[str]:
    """Return the shapes of a command line. Several words with one size each are joined: they are one unquoted shape."""
    lone = len(shapes) > 1 and all(text.count("=") == 1 for text in shapes)
    return [" ".join(shapes)] if lone else list(shapes)


def left_out(cases: Sequence[Case], names: Sequence[str], found: Sequence[tuple[Case, Dims]]) -> list[str]:
    """Return the names of Cases that fit one of the timed shapes, but are not timed unless the user names them."""
    timed = {case.name for case, _ in found}
    taken = [case for name in names for case in of_name(cases, name) for _, dims in found if fits(case, dims)]
    return [name for name in dict.fromkeys(case.name for case in taken) if name not in timed]


def of_name(cases: Sequence[Case], name: str) -> list[Case]:
    return [case for case in cases if name in (case.op, case.name)]


def fits(case: Case, given: Dims) -> bool:
    every = letters(case)
    return set(given) <= set(every) and set(every) - set(given) <= set(case.optional)


def expected(cases: Sequence[Case], name: str) -> str:
    """Return the letters of the shapes that a name accepts, as text: "B T C (hidden) or B T H D (heads)"."""
    by_letters: dict[str, list[str]] = {}
    for case in of_name(cases, name):
        by_letters.setdefault(letters_text(case), []).append(case.family)
    return " or ".join(f"{written} ({', '.join(families)})" for written, families in by_letters.items())


def read_shape(text: str) -> Dims:
    """Return the sizes in a text such as "B=1 T=300 C=777". Raises InputError if the text has another form."""
    given: Dims = {}
    for word in text.replace(",", " ").split():
        letter, sign, size = word.partition("=")
        if not letter or not sign or not re.fullmatch("-?[0-9]+", size):
            raise InputError(
                f'--shape {shown(text)}: expected letters with sizes, "B=1 T=300", got {shown(word)}'
            )
        if letter in given:
            raise InputError(f"--shape {shown(text)}: expected each letter once, got {letter} twice")
        if len(size) > 18:
            raise InputError(f"--shape {shown(text)}: expected a size of at most 18 digits, got {len(size)}")
        given[letter] = int(size)
    if not given:
        raise InputError('--shape: expected letters with sizes, "B=1 T=300", got none')
    return given
