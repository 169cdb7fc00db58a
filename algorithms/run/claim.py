"""The claim of a run on its folder: made and locked at once, and left as it was if the run wrote nothing.

    @in_run_folder
    def train(cfg: Config) -> Path: ...

The lock is on the file `.lock`, which is removed at the end of the run. The system releases the lock of a killed
process. A worker process that a reward function forks does not inherit it (fcntl.lockf). Only rank 0 takes it.
"""

import contextlib
import errno
import functools
import os
import platform
import stat
import sys
from collections.abc import Callable, Iterator
from os.path import lexists
from pathlib import Path
from typing import TypeVar

from ...model.errors import InputError, shown
from ...model.files.replacing import reason
from .checks import LOCK, check_checkpoint, check_unused, make_folder
from .flags import TrainingFlags
from .folder import remove_start
from .processes import check_joined, rank
from .stopping import Terminated, immediate, terminable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Flags = TypeVar("Flags", bound=TrainingFlags)
TAKEN = (errno.EACCES, errno.EAGAIN)  # the errors of a lock that another process has
_claimed: set[str] = set()  # folders of this process; closing a second descriptor would release the lock


def in_run_folder(train: Callable[[Flags], Path]) -> Callable[[Flags], Path]:
    """Let `train` run in a folder that no other run uses, and end in good order on SIGTERM.

    The folder of --output is made and locked before anything else, --resume included. A run that ends before it has
    written anything leaves no folder that it made.
    """

    @functools.wraps(train)
    def claimed(cfg: Flags) -> Path:
        with terminable(), _claim(cfg.output, cfg.resume), immediate():
            return train(cfg)

    return claimed


@contextlib.contextmanager
def _claim(folder: Path, resume: bool) -> Iterator[None]:
    """Make and lock a run folder inside the block. Raises InputError if it cannot be made, or is in use."""
    check_joined()
    if rank():
        yield
        return
    if resume:
        check_checkpoint(folder)
    else:
        check_unused(folder, but=(LOCK,))

    made = [each for each in (folder, *folder.parents) if not lexists(each)]  # the innermost first
    with contextlib.ExitStack() as stack:
        for each in reversed(made):  # the last callback is called first
            stack.callback(_remove_if_empty, each)
        make_folder(folder)
        stack.enter_context(_locked(folder))
        try:
            yield
        except Terminated as end:
            if not resume and not end.saved:
                remove_start(folder)
            raise


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


# ---- the lock


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder inside the block, and remove its file afterwards.

    Where the file system has no locks, a sentence says so, and the block runs without one.
    """
    file, name = folder / LOCK, os.path.realpath(folder)
    if name in _claimed:
        raise InputError(_in_use(folder, "this process"))
    opened = _lock(file)
    if opened is None:
        yield
        return

    _claimed.add(name)
    try:
        os.ftruncate(opened, 0)
        os.write(opened, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        _claimed.discard(name)
        with contextlib.suppress(OSError):  # the whole folder may have been removed, or moved away
            if _is_at(file, opened):  # and not the file of another run in its place
                file.unlink()
        os.close(opened)


def _lock(file: Path) -> int | None:
    """Open and lock a file. Returns its descriptor, or None where locks do not work."""
    while True:
        is_new = not lexists(file)
        try:
            opened = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:  # a link, a folder, or no permission
            raise InputError(
                f"{file}: expected the run's own file, or a place for it: {reason(error)}"
            ) from error
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            os.close(opened)
            raise InputError(f"{file}: expected the run's own file, or a place for it, got something else")

        why = _taken(opened, file)
        if why is not None:
            os.close(opened)
            if is_new:
                file.unlink(missing_ok=True)
            print(
                f"note: {file.parent} cannot be locked ({why}): start no other run with this --output",
                file=sys.stderr,
            )
            return None

        # the run that had the lock may have removed the file in between
        with contextlib.suppress(FileNotFoundError):
            if _is_at(file, opened):
                return opened
        os.close(opened)


def _is_at(file: Path, opened: int) -> bool:
    """Return whether an open file is the one at this path."""
    return os.path.samestat(os.fstat(opened), os.lstat(file))


def _taken(opened: int, file: Path) -> str | None:
    """Lock an open file. Returns None, or the reason why locks do not work here.

    Raises InputError if another process has the lock.
    """
    if fcntl is None:
        return "the system has no such locks"
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in TAKEN:
            return reason(error)
        user = os.read(opened, 200).decode("utf-8", "replace") or "another process"
        os.close(opened)
        raise InputError(_in_use(file.parent, user)) from error
    return None


def _in_use(folder: Path, user: str) -> str:
    return f"--output {folder}: expected a folder that no other run uses, but {shown(user)} trains in it"
