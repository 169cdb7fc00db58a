"""The end of a run by SIGTERM, which Slurm, Kubernetes and spot machines send some time before they end a process.

    with terminable():              around a whole run: SIGTERM is handled
        with immediate():           while nothing would be lost: SIGTERM raises Terminated at once
            ...
            defer()                 from the first step on: SIGTERM is only noted
            if is_asked(): ...      after each step: save, then raise Terminated

The exit status is 143, as of a process that a SIGTERM ends. A second SIGTERM ends the process without saving.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from .processes import summed, world

STATUS = 128 + signal.SIGTERM
SAME = 2.0  # seconds in which torchrun and a scheduler may send the same request to a process


class Terminated(SystemExit):
    """The end of a run that SIGTERM has asked for. saved: whether the run can go on from what it has written."""

    def __init__(self, saved: bool = False):
        super().__init__(int(STATUS))
        self.saved = saved


class _State:
    """The state of the process: whether SIGTERM is handled, when it came, and whether it ends the run at once."""

    handled = False
    came: float | None = None
    at_once = False


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Handle SIGTERM inside the block, if this is the main thread and SIGTERM is not ignored.

    Raises Terminated at the end of the block if SIGTERM has come meanwhile.
    """
    earlier: Any = signal.getsignal(signal.SIGTERM)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or earlier in (None, signal.SIG_IGN):  # None: installed by other code than Python's
        yield
        return

    _State.handled, _State.came, _State.at_once = True, None, False
    signal.signal(signal.SIGTERM, _handle)
    try:
        yield
        if _State.came is not None:
            print("\nSIGTERM: the run has ended; all its results are saved", file=sys.stderr)
            raise Terminated(saved=True)
    finally:
        signal.signal(signal.SIGTERM, earlier)
        _State.handled, _State.came = False, None


@contextlib.contextmanager
def immediate() -> Iterator[None]:
    """Let SIGTERM raise Terminated at once inside the block, until `defer` is called."""
    try:
        _State.at_once = True
        if _State.came is not None:
            raise Terminated
        yield
    finally:
        _State.at_once = False


def defer() -> None:
    """Let SIGTERM only be noted from now on, for `is_asked`."""
    _State.at_once = False


def is_asked() -> bool:
    """Return whether SIGTERM has come to any of the processes that train together. All of them must call this."""
    return summed({"asked": float(_State.came is not None)})["asked"] > 0


def _handle(number: int, frame: object) -> None:
    now = time.monotonic()
    if _State.came is not None and not (world() > 1 and now - _State.came < SAME):  # a second one
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        return

    _State.came = now if _State.came is None else _State.came
    if _State.at_once:
        _State.at_once = False  # raised once, so that nothing interrupts the clean-up
        raise Terminated


# ---- processes that a user's function forks: SIGTERM ends them, as multiprocessing's pools expect

_masks = threading.local()  # the forking thread's blocked signals


def _before_fork() -> None:
    """Hold SIGTERM back, because Python drops a signal that comes to the new process before it has begun."""
    _masks.earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}) if _State.handled else None


def _after_fork() -> None:
    if _masks.earlier is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _masks.earlier)


def _after_fork_in_child() -> None:
    if _State.handled:
        _State.handled = False
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
