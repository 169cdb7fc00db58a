"""The exception for a mistake in the input, as opposed to a bug of the program."""

MOST_CHARACTERS = 600  # of a message; a longer one loses its middle


class InputError(ValueError):
    """An error in a file, a row, a flag or a user's function.

    The message names the thing, what was expected and what came. It is one line without control characters, even if a
    file or another library supplied a part of it. The command line prints it and exits with status 1. Any other
    exception is a bug and keeps its traceback.
    """

    def __init__(self, message: str):
        # a first cut, so that _one_line reads few characters
        message = _short(message, 10 * MOST_CHARACTERS, 5 * MOST_CHARACTERS)
        super().__init__(_short(_one_line(message), MOST_CHARACTERS, MOST_CHARACTERS // 3))


def shown(value: object) -> str:
    """Return the text of a value for an error message: on one line, cut after 200 characters."""
    text = value if isinstance(value, str) and value.isprintable() else _repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _repr(value: object) -> str:
    try:
        return repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of too many digits
        return f"a {type(value).__name__}"


def _one_line(text: str) -> str:
    lines = " ".join(line.strip() for line in text.splitlines() if line.strip())
    if lines.isprintable():
        return lines
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in lines)


def _short(text: str, most: int, end: int) -> str:
    """Return the text. If it is longer than `most`, only its beginning and its last `end` characters are kept."""
    return text if len(text) <= most else f"{text[: most - end - 5]} ... {text[-end:]}"
