"""The Cases and shapes that a command line names."""

import re
from collections.abc import Sequence
from difflib import get_close_matches

import torch

from ...model.errors import InputError, shown
from ..cases.case import Case, Dims, label
from ..cases.shapes import letters, letters_text
from .shapes import check_dims


def chosen(cases: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """Return the Cases of the named ops (rms_norm) and the named Cases (rms_norm/heads), in that order.

    Without names, return all Cases. Raises InputError for an unknown name.
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
    """Return a (Case, shape) pair for each shape and each named Case that has its letters.

    If an op has several such Cases, those with benchmark shapes are taken, or else the first. Raises InputError if no
    Case takes a shape, or if a name takes none of the shapes.
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
    """Return the shapes. If every word has only one letter, join the words: they are one shape that lost its quotes."""
    lone = len(shapes) > 1 and all(text.count("=") == 1 for text in shapes)
    return [" ".join(shapes)] if lone else list(shapes)


def left_out(cases: Sequence[Case], names: Sequence[str], found: Sequence[tuple[Case, Dims]]) -> list[str]:
    """Return the names of Cases that also take one of the shapes, but are timed only if they are named."""
    timed = {case.name for case, _ in found}
    taken = [case for name in names for case in of_name(cases, name) for _, dims in found if fits(case, dims)]
    return [name for name in dict.fromkeys(case.name for case in taken) if name not in timed]


def of_name(cases: Sequence[Case], name: str) -> list[Case]:
    return [case for case in cases if name in (case.op, case.name)]


def fits(case: Case, given: Dims) -> bool:
    every = letters(case)
    return set(given) <= set(every) and set(every) - set(given) <= set(case.optional)


def expected(cases: Sequence[Case], name: str) -> str:
    """Return the letters of a name's Cases as text: "B T C (hidden) or B T H D (heads)"."""
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
