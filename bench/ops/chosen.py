"""The Cases and shapes that a command line names."""

import re
from collections.abc import Sequence
from difflib import get_close_matches

import torch

from ...model.errors import InputError, shown
from ..cases.case import Case, Dims
from ..cases.shapes import letters
from .shapes import check_dims


def chosen(cases: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """The Cases of ops (rms_norm), or those themselves (rms_norm/heads), in the order named; all without names."""
    if not names:
        return list(cases)
    found: list[Case] = []
    for name in names:
        matches = [case for case in cases if name in (case.op, case.name)]
        if not matches:
            known = list(dict.fromkeys(x for case in cases for x in (case.op, case.name)))
            near = get_close_matches(name, known, 3) or list(dict.fromkeys(case.op for case in cases))
            raise InputError(f"op: expected one of --list, such as {', '.join(near)}, got {shown(name)}")
        found += [case for case in matches if case not in found]
    return found


def shaped(
    cases: list[Case], names: Sequence[str], shapes: Sequence[str], dtype: torch.dtype, device: str
) -> list[tuple[Case, Dims]]:
    """Each Case that has the letters of a shape, with that shape. Of an op, which has several, those that are timed.

    Raises InputError where no Case of a name takes a shape.
    """
    found: list[tuple[Case, Dims]] = []
    for text in shapes:
        given = read_shape(text)
        for name in names:
            fitting = [c for c in cases if name in (c.op, c.name) and fits(c, given)]
            if not fitting:
                raise InputError(f"--shape {shown(text)}: expected {expected(cases, name)}")
            for case in [c for c in fitting if c.bench] or fitting[:1]:
                dims = {letter: given[letter] for letter in letters(case) if letter in given}
                check_dims(case, dims, dtype, device)
                found.append((case, dims))
    return found


def fits(case: Case, given: Dims) -> bool:
    every = letters(case)
    return set(given) <= set(every) and set(every) - set(given) <= set(case.optional)


def expected(cases: Sequence[Case], name: str) -> str:
    """The letters of a name's Cases: "B T C (hidden) or B T H D (heads)"."""
    by_letters: dict[str, list[str]] = {}
    for case in cases:
        if name in (case.op, case.name):
            written = " ".join(f"[{x}]" if x in case.optional else x for x in letters(case))
            by_letters.setdefault(written, []).append(case.family)
    return " or ".join(f"{written} ({', '.join(families)})" for written, families in by_letters.items())


def read_shape(text: str) -> Dims:
    """The sizes of "B=1 T=300 C=777". Raises InputError."""
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
