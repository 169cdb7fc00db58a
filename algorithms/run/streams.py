"""The standard streams of a program: what cannot be written to them ends no run, and is told at its end.

A pipe whose reader has gone, a full device, a terminal that is no more, a stream that the shell has closed, an encoding
without the characters of a model's answer: none of them is a reason to lose what is being trained.
"""

import errno
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Output:
    """A text stream that swallows all further text once it cannot be written. error: why, or None."""

    def __init__(self, stream: TextIO):
        self.error: OSError | None = None
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Send what is still in a buffer, and what a library writes by the stream's number, nowhere, too."""
        self.error = self.error or error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def harmless(text: str) -> str:
    """A model's text for a terminal: control characters are escaped, but for line breaks and tabs."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def is_lost(stream: object) -> bool:
    """Whether text to the stream, sys.stdout for instance, goes nowhere any more."""
    return isinstance(stream, Output) and stream.error is not None


def run_program(name: str, main: Callable[[], int | None]) -> int:
    """The exit status of a whole program: that of `main`, or 1 where its output was lost, with a sentence on stderr.

    Nothing is said of a pipe whose reader has gone, like `head`: who reads it has read enough.
    """
    _open_all()
    output, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    sys.stdout = output
    with suppress(AttributeError, ValueError):  # a stand-in of somebody else's
        output.reconfigure(errors="backslashreplace")

    try:
        status = main() or 0
    except SystemExit as stop:  # tyro's and argparse's, of help and of wrong usage
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        status = 130
    except ValueError as error:
        from ...model.errors import InputError

        if not isinstance(error, InputError):
            raise
        print(f"\n{name}: {error}", file=sys.stderr)
        status = 1

    output.flush()
    if output.error is None:
        return status
    if output.error.errno != errno.EPIPE:
        print(f"{name}: standard output cannot be written: {output.error.strerror}", file=sys.stderr)
        sys.stderr.flush()
    return status or 1


def _open_all() -> None:
    """Give a stream that the shell has closed (`>&-`) to /dev/null: a file opened later would get its number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if getattr(sys, name) is None:
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 (as long as the program)
            setattr(sys, name, stream)
