"""A function that dies by SIGKILL before one of its file operations, in a process of its own.

File operations are Python's audit events on paths in one folder or on the folder itself, and os.fsync.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

EVENTS = {  # name: the places of the paths among the event's arguments, and of their folders' descriptors
    "open": ((0, None),),
    "os.rename": ((0, 2), (1, 3)),
    "os.remove": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.rmdir": ((0, 1),),
    "os.chmod": ((0, 2),),
    "os.truncate": ((0, None),),
    "shutil.rmtree": ((0, None),),
    "os.listdir": ((0, None),),
    "os.scandir": ((0, None),),
}


class Ended(NamedTuple):
    """The way a process ended, and the operations that it began."""

    status: int  # -9 where it was killed
    operations: list[str]
    output: str  # of both its streams


def in_a_process(function: Callable[[], object], folder: Path, die_at: int | None = None) -> Ended:
    """Call the function in a fork. It is killed before its operation number `die_at`, counted from 0.

    Its status is what the function returns, 0 for what is no number, 99 for an exception.
    """
    log = folder.parent / f"{folder.name}.log"
    pid = os.fork()
    if pid == 0:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for stream in (sys.stdout, sys.stderr):  # pytest's own
            stream.flush()
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = sys.stderr = os.fdopen(out, "w", buffering=1)

        begun = _watch(folder, die_at)
        try:
            status = function()
        except SystemExit as error:
            status = error.code
        except BaseException:
            traceback.print_exc()
            status = 99

        sys.stdout.flush()
        log.with_suffix(".operations").write_text("\n".join(begun))
        os._exit(status if isinstance(status, int) else 0)

    _, status = os.waitpid(pid, 0)
    operations = log.with_suffix(".operations")
    found = operations.read_text().splitlines() if operations.exists() else []
    operations.unlink(missing_ok=True)
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return Ended(code, found, log.read_text(errors="replace"))


def _watch(folder: Path, die_at: int | None) -> list[str]:
    """The list that grows by each operation, until the process kills itself."""
    begun: list[str] = []
    inside = os.path.realpath(folder)

    def begin(what: str) -> None:
        if len(begun) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        begun.append(what)

    def hook(event: str, arguments: tuple) -> None:
        for path, descriptor in EVENTS.get(event, ()):
            name = _path(arguments, path, descriptor)
            if name == inside or name.startswith(f"{inside}/"):
                begin(f"{event} {name.removeprefix(inside)}")
                return

    fsync = os.fsync

    def watched(descriptor: int) -> None:
        begin("os.fsync")
        fsync(descriptor)

    os.fsync = watched
    sys.addaudithook(hook)
    return begun


def _path(arguments: tuple, path: int, descriptor: int | None) -> str:
    """The absolute path of an event; "" for what is none."""
    found = arguments[path]
    if not isinstance(found, str | bytes | os.PathLike):
        return ""
    name, start = os.fsdecode(found), os.getcwd()
    if descriptor is not None and isinstance(arguments[descriptor], int) and arguments[descriptor] >= 0:
        start = os.readlink(f"/proc/self/fd/{arguments[descriptor]}")
    return os.path.normpath(os.path.join(start, name))
