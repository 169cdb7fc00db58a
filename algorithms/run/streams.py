"""Standard streams whose errors do not stop a run. A lost output is reported at the end of the program.

Such errors are a closed pipe, a full device, a closed terminal, a stream closed by the shell, or an encoding that lacks
characters of a model's answer. None of these errors should end a training run.
"""

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO


class Output:
    """A text stream that drops all further text after a write fails. error: the error of that write, or None."""

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
        """Keep the first error, and redirect the stream's descriptor to the null device.

        Buffered text, and text that a library writes to the descriptor, is then dropped as well.
        """
        self.error = self.error or error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def is_lost(stream: object) -> bool:
    """Return whether text written to the stream, sys.stdout for instance, is lost because of an earlier error."""
    return isinstance(stream, Output) and stream.error is not None


def run_program(name: str, main: Callable[[], int | None]) -> int:
    """Run a whole program. Returns the exit status of `main`, or 1 with a message on stderr if its output was lost.

    A closed pipe, as with `| head`, gives no message, because the reader of the pipe has read enough.
    """
    _open_all()
    output, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    sys.stdout = output
    with suppress(AttributeError, ValueError):  # sys.stdout replaced by other code
        output.reconfigure(errors="backslashreplace")

    try:
        status = main() or 0
    except SystemExit as stop:  # raised by tyro and argparse for --help and for wrong usage
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
    """Open /dev/null for each standard stream that the shell has closed (`>&-`).

    Otherwise a file that is opened later would get the stream's descriptor.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor
        if getattr(sys, name) is None:
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 (as long as the program)
            setattr(sys, name, stream)
