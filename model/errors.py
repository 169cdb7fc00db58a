"""The one exception that means: the input is at fault, not the program."""


class InputError(ValueError):
    """A file, a row, a flag or a user's function is wrong. The message names it, what was expected and what came.

    The command line prints it as one line and exits with status 1; anything else is a bug and keeps its traceback.
    """


def shown(value: object) -> str:
    """What a file says, in a message: on one line, and short; a name of ordinary length as it is."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
