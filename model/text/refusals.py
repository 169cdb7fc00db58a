"""Refusals of a rendering: the template fails, has no end, or writes too much. To know them needs no jinja2."""

from collections.abc import Callable

from ..errors import InputError

MOST_WRITTEN = 2**20  # characters of a rendering, and 100 for each character that it is given


class Refused(InputError):
    """The template fails on the conversation. It may accept it in another form."""


class OverBudget(InputError):
    """A template takes too long, or makes too much."""


def check_written(text: str, given: Callable[[], int]) -> None:
    """Raises OverBudget for a rendering out of all proportion to its input. given: counts the input's characters."""
    if len(text) > MOST_WRITTEN and len(text) > (most := MOST_WRITTEN + 100 * given()):
        raise OverBudget(f"writes {len(text):,} characters, expected at most {most:,}")
