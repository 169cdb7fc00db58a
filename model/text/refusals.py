"""Errors for renderings that are refused: the template fails, does not end, or writes too much.

This file does not need jinja2.
"""

from collections.abc import Callable

from ..errors import InputError

MOST_WRITTEN = 2**20  # characters of a rendering, plus 100 for each character of its input


class Refused(InputError):
    """An error for a template that fails on a conversation. The template may accept it in another form."""


class OverBudget(InputError):
    """An error for a template that takes too long, or makes values that are too large."""


def check_written(text: str, given: Callable[[], int]) -> None:
    """Raise OverBudget if a rendering is far too long for its input.

    given: a function that counts the input's characters.
    """
    if len(text) > MOST_WRITTEN and len(text) > (most := MOST_WRITTEN + 100 * given()):
        raise OverBudget(f"writes {len(text):,} characters, expected at most {most:,}")
