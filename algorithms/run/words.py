"""Words for the terminal: the name that a mistyped word may have meant, and text that fits the width."""

import re
import shutil
import textwrap
from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: str, names: Iterable[str], prefix: str = "") -> str:
    """Return "; did you mean NAME?" for the nearest name, or "" without one. prefix: stands before the name."""
    near = get_close_matches(word, list(names), 1, 0.6)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def wrapped(text: str) -> str:
    """Return lines of text that fit the terminal. The rest of "  name   words" stands under the words.

    The rest of any other line is indented, because tyro would join it to the line before.
    """
    width = shutil.get_terminal_size().columns
    lines: list[str] = []
    for line in text.split("\n"):
        names = re.match(r" +\S+ +", line)
        lines += textwrap.wrap(line, width, subsequent_indent=" " * len(names[0] if names else "  ")) or [""]
    return "\n".join(lines)
