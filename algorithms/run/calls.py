"""Calls of users' functions, with a time limit. Each failure becomes an InputError of one sentence.

    results([Call("reward f", f, {"completions": [...]}, "rewards", 4)], seconds=None)    a list of 4 entries per call

A function may be async. The async functions of one call of `results` run at the same time. As in TRL, they run on one
event loop for the whole process, in a daemon thread. A client thus keeps its connections from step to step, and a
notebook's own loop is not touched.

Time limit: an async function that is not done in time is abandoned. Any other function runs in the main thread, where
its own signal handlers and thread-bound clients work. SIGALRM interrupts it, which ends a Python loop, a sleep, a
blocking read, and a regular expression that backtracks forever. If a function catches the interruption, or holds the
interpreter's lock in C code, the whole process is ended. Reading the results counts as part of the call, because it may
run the user's code, too.
"""

import asyncio
import atexit
import concurrent.futures
import contextlib
import faulthandler
import functools
import inspect
import itertools
import os
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence, Set, Sized
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...model.errors import InputError
from .stopping import Terminated

PATIENCE = 5.0  # seconds that an interrupted function may take to return before the process is ended
GIVEN_UP = threading.Event()  # set if a function ran out of time: its threads may run forever
PATHS = sysconfig.get_paths()
LIBRARIES = (*(PATHS[name] + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")), "<")
DATA = Path(__file__).parents[1] / "data"
RUN = Path(__file__).parent
OURS = (
    __file__,
    *map(str, (DATA / "functions.py", DATA / "rewards.py", RUN / "user_files.py")),
)  # files whose frames do not belong to the user
CLASS_NAME = type.__dict__["__name__"]


class Expired(BaseException):
    """The exception raised inside a function that ran out of time. `except Exception` does not catch it."""


PASSES = (
    KeyboardInterrupt,
    Expired,
    Terminated,
)  # exceptions that are not errors of a user's code: they are raised again


class Call(NamedTuple):
    label: str  # the name of the function in messages
    function: Callable[..., Any]
    arguments: dict[str, Any]
    what: str  # the noun for its results in messages, in the plural
    count: int  # the expected number of results
    read: Callable[[Any], Any] = lambda entry: entry  # converts a result; raises if it is not valid
    expected: str = ""  # the words for a valid result in messages


def results(calls: Sequence[Call], seconds: float | None = None) -> list[list[Any]]:
    """Call the functions. Returns one list of `count` results per call.

    seconds: the time limit of a call; None for no limit. Raises InputError naming the function that raises, returns
    anything else, or runs out of time.
    """
    found: list[Any] = []
    with torch_as_it_was():
        try:
            for call in calls:
                found.append(_called(call, seconds))
        except BaseException:
            _close(found)
            raise
        waiting = [i for i, value in enumerate(found) if inspect.isawaitable(value)]
        if waiting:
            done = _awaited([(calls[i], found[i]) for i in waiting], seconds)
            for i, value in zip(waiting, done, strict=True):
                found[i] = value
    return found


@contextlib.contextmanager
def torch_as_it_was() -> Iterator[None]:
    """Restore torch's global settings after the block: grad mode, default dtype and number of threads."""
    gradients, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _called(call: Call, seconds: float | None) -> list[Any] | Awaitable[Any]:
    with _time_limit(seconds, _late([call], seconds)):
        try:
            value = call.function(**call.arguments)
            return value if inspect.isawaitable(value) else _entries(call, value)
        except (InputError, *PASSES):
            raise
        except BaseException as error:  # shown to the user, whatever the user's function raises
            raise InputError(f"{call.label} raised {described(error)}") from error


def _entries(call: Call, value: Any) -> list[Any]:
    """Return the results of a call as a list. Raises InputError if the value is not a list of the right length."""
    expected = f"{call.label}: expected a list of {call.count} {call.what}, one per completion"
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and len(shape) != 1:
        raise InputError(f"{expected}, got an array of shape {tuple(shape)}")
    iterator = _iterator(value)
    if iterator is None:
        _close([value])
        got = "None" if value is None else f"{class_name(value)} {shown(value)}"
        raise InputError(f"{expected}, got {got}")

    # as many as there are completions
    entries = list(itertools.islice(iterator, call.count + 1))  # the iterator may be infinite
    if len(entries) != call.count:
        more = f"more than {call.count}" if len(entries) > call.count else len(entries)
        got = len(value) if isinstance(value, Sized) else more
        _close(entries)
        raise InputError(f"{call.label}: expected {call.count} {call.what}, one per completion, got {got}")

    if any(inspect.isawaitable(entry) for entry in entries):
        _close(entries)
        raise InputError(f"{expected}, got a list of coroutines: await them with asyncio.gather")
    return [_read(call, i, entry) for i, entry in enumerate(entries)]


def _iterator(value: Any) -> Iterator[Any] | None:
    """Return an iterator over the value, or None for a text, a mapping, a set, or a value that cannot be iterated."""
    if isinstance(value, str | bytes | Mapping | Set):
        return None
    try:
        return iter(value)
    except TypeError:
        return None


def _read(call: Call, i: int, entry: Any) -> Any:
    try:
        return call.read(entry)
    except PASSES:
        raise
    except BaseException as error:
        got = shown(entry)
        raise InputError(f"{call.label}: expected {call.expected} for completion {i}, got {got}") from error


def _close(values: Iterable[Any]) -> None:
    """Close the coroutines among the values, because Python warns about each coroutine that is never awaited."""
    for value in values:
        if inspect.iscoroutine(value):
            value.close()


# ---- async functions


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()

    def serve() -> None:
        # a task that raises SystemExit would end the loop, and the main thread would wait forever
        while True:
            with contextlib.suppress(BaseException):
                loop.run_forever()

    threading.Thread(target=serve, name="users' async functions", daemon=True).start()
    return loop


def _awaited(calls: Sequence[tuple[Call, Awaitable[Any]]], seconds: float | None) -> list[list[Any]]:
    """Run all awaitables at the same time and return their results. The first failure cancels the others."""
    loop, tasks = _event_loop(), []

    async def entries(call: Call, awaitable: Awaitable[Any]) -> list[Any] | InputError:
        try:
            return _entries(call, await awaitable)
        except InputError:
            raise
        except BaseException as error:
            failure = InputError(f"{call.label} raised {described(error)}")
            if isinstance(error, GeneratorExit):  # a coroutine that is being destroyed must not raise
                return failure
            raise failure from error

    async def gather() -> list[list[Any] | InputError]:
        tasks.extend(asyncio.ensure_future(entries(*call)) for call in calls)
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    late = [call for call, _ in calls]
    # set the limit before any function can take the interpreter's lock
    with _ended_with(seconds, _late(late, seconds)):
        future = asyncio.run_coroutine_threadsafe(gather(), loop)
        try:
            if concurrent.futures.wait([future], seconds).done:
                late = []
            elif tasks:
                late = [call for call, task in zip(late, tasks, strict=True) if not task.done()]
        finally:
            if late:  # out of time, or interrupted: this loop may stay blocked
                loop.set_exception_handler(lambda *_: None)
                future.cancel()
                _event_loop.cache_clear()

    if late:
        raise _timed_out(_late(late, seconds))
    found = []
    for value in future.result():
        if isinstance(value, InputError):
            raise value
        found.append(value)
    return found


# ---- the time limit


@contextlib.contextmanager
def _time_limit(seconds: float | None, message: str) -> Iterator[None]:
    """Interrupt the block after `seconds`, then every second until it ends, and raise InputError(message)."""
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise InputError("--reward-timeout: expected a call from the main thread, where signals arrive")
    expired = False

    def expire(*_: object) -> None:
        nonlocal expired
        expired = True
        raise Expired

    handler, started = signal.signal(signal.SIGALRM, expire), time.monotonic()
    delay, interval = signal.getitimer(signal.ITIMER_REAL)  # the timer set by other code, restored below

    try:
        with _ended_with(seconds, message):
            try:
                signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
                yield
                _check_own_alarm(time.monotonic() - started, seconds, message)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    except Expired:
        pass
    finally:
        signal.signal(signal.SIGALRM, handler)
        left = max(delay - (time.monotonic() - started), 1e-3) if delay else 0.0
        signal.setitimer(signal.ITIMER_REAL, left, interval)

        # raise, even if the function replaced Expired with another exception
        if expired:
            raise _timed_out(message) from None


def _check_own_alarm(elapsed: float, seconds: float, message: str) -> None:
    """Raise InputError if a function returned late without being interrupted, because it uses SIGALRM itself."""
    if elapsed > seconds + 0.1:
        raise InputError(
            f"{message}: it took {elapsed:.1f} s; it uses SIGALRM itself, so it cannot be interrupted"
        )


LAST_WORDS = """exec >/dev/null; trap '' INT
while IFS= read -r line; do
    case $line in "Timeout ("*) printf '\\n%s\\n' "$words" >&2; exec cat;; esac
    words=$line
done"""


@functools.cache
def _speaker() -> int:
    """Start a shell process that prints a message if faulthandler ends this process.

    Returns the descriptor of a pipe to the shell. Messages are written to this pipe, one a line. When
    faulthandler's report follows on the pipe, the shell prints the last message and then the report.
    """
    read, write = os.pipe()
    os.posix_spawn(
        "/bin/sh", ["sh", "-c", LAST_WORDS], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, read, 0)]
    )
    os.close(read)
    return write


@contextlib.contextmanager
def _ended_with(seconds: float | None, message: str) -> Iterator[None]:
    """End the process with status 1 and the message if the block takes longer than `seconds` + PATIENCE.

    faulthandler's thread does this without the interpreter's lock. Its traceback goes to a shell process, which then
    prints the message.
    """
    if seconds is None:
        yield
        return
    speaker = _speaker()
    with contextlib.suppress(OSError):
        os.write(speaker, f"{message}, nor within {PATIENCE:g} s more\n".encode(errors="replace"))
    faulthandler.dump_traceback_later(seconds + PATIENCE, exit=True, file=speaker)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _late(calls: Sequence[Call], seconds: float | None) -> str:
    labels = " or ".join(call.label for call in calls)
    return f"{labels}: expected to return within {seconds or 0:g} s (--reward-timeout), but it did not"


def _timed_out(message: str) -> InputError:
    GIVEN_UP.set()
    return InputError(message)


def left(status: int) -> int:
    """Return the exit status. If users' functions left threads running, end the process instead of waiting for them."""
    if GIVEN_UP.is_set():
        leave(status)
    here = threading.current_thread()
    if any(thread is not here and not thread.daemon for thread in threading.enumerate()):
        atexit._run_exitfuncs()
        leave(status)
    return status


def leave(status: int) -> None:
    """End the process without waiting for any thread."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


# ---- texts for messages


def described(error: BaseException) -> str:
    """Return the exception on one line, with the innermost file and line that belong to the user."""
    try:
        message = brief(str(error), 200)
    except PASSES:
        raise
    except BaseException:  # an exception's own __str__ may fail, too
        message = ""
    places = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    places = [(file, line) for file, line in places if not file.startswith(LIBRARIES) and file not in OURS]
    place = f" ({Path(places[-1][0]).name}:{places[-1][1]})" if places else ""
    return f"{class_name(error)}{': ' if message else ''}{message}{place}"


def class_name(value: object) -> str:
    """Return the real name of a value's class, even if the class overrides `__name__`."""
    return CLASS_NAME.__get__(type(value))


def shown(value: Any) -> str:
    """Return the repr of a value on one line, cut at 60 characters."""
    try:
        return brief(repr(value), 60)
    except PASSES:
        raise
    except BaseException:  # raised by a user's __repr__, or by an int with too many digits
        return f"a value of {class_name(value)}"


def brief(text: str, length: int) -> str:
    """Return the text on one line, without control characters, cut at `length` characters."""
    words = "".join(c if c.isprintable() else " " for c in text[: 4 * length]).split()
    line = " ".join(words)
    return line if len(line) <= length else line[: length - 3] + "..."
