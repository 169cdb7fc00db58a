"""Progress on stderr: a bar on a terminal, and otherwise one line every few steps, for log files."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from .text import duration, number


def on_terminal() -> bool:
    """Return whether stderr is a terminal, where a bar can be drawn."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # replaced by other code, or closed
        return False


def print_line(text: str) -> None:
    """Print a line to stderr. A log that can no longer be written does not end the work."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


class Progress:
    """The progress of a run's steps. name: of the run. start, total: the steps done before, and the steps in all.

    every: without a terminal, a line is printed for every step that this number divides, for the first and the last.
    """

    def __init__(self, name: str, start: int, total: int, every: int):
        self._start, self._total, self._every = start, total, every
        self._clock = time.perf_counter()
        self._tokens, self._seconds = 0.0, 0.0  # since the last line
        silent = not on_terminal()
        self._bar = tqdm(
            total=total, initial=start, desc=name, unit="step", dynamic_ncols=True, disable=silent
        )

    @property
    def seconds(self) -> float:
        """The time since the first step began, in seconds."""
        return time.perf_counter() - self._clock

    def left(self, done: int) -> float:
        """Return the time that the remaining steps will take, if they take as long as those since the start."""
        return self.seconds / max(1, done - self._start) * (self._total - done)

    def log(self, line: Mapping[str, Any], names: Sequence[str]) -> None:
        """Show one logged line. names: its main metrics, in their order."""
        done = line["step"] + 1
        known = [(name, line[name]) for name in names if line.get(name) is not None]
        self._tokens, self._seconds = self._tokens + line["tokens"], self._seconds + line["seconds"]
        if not self._bar.disable:
            self._bar.set_postfix({name: f"{value:.3g}" for name, value in known[:3]}, refresh=False)
            self._bar.update()
            return

        if self.is_due(done) or done == self._start + 1:
            rate = self._tokens / max(self._seconds, 1e-9)
            times = f"{duration(self.seconds)} elapsed, {duration(self.left(done))} left"
            metrics = [f"{name} {number(value)}" for name, value in known]
            print_line("  ".join([f"step {done} of {self._total}", *metrics, f"{rate:,.0f} tokens/s", times]))
            self._tokens = self._seconds = 0.0

    def is_due(self, done: int) -> bool:
        """Return whether a line is due after `done` steps."""
        return done % self._every == 0 or done == self._total

    def close(self) -> None:
        self._bar.close()


@contextmanager
def counted(total: int, name: str, unit: str) -> Iterator[tqdm]:
    """Yield a progress bar for `total` units. Without a terminal, print one line at the start and one at the end."""
    silent, clock = not on_terminal(), time.perf_counter()
    if silent:
        plural = "es" if unit.endswith("h") else "s"
        print_line(f"{name}: {total:,} {unit}{plural * (total != 1)}")
    with tqdm(total=total, desc=name, unit=unit, dynamic_ncols=True, disable=silent) as bar:
        yield bar
    if silent:
        print_line(f"{name}: done in {duration(time.perf_counter() - clock)}")
