"""The display of one training run: its progress, its report, its tracker and the text at its end.

    display = Display(cfg, folder, start)        run/loop.py makes one on the first process
    display.begin()                              before the first step
    display.log(line)                            a line of metrics.jsonl
    display.close(error)                         error: what ended the run, or None

Nothing here ends a run: what fails gives one warning and is left out from then on.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...model.files.replacing import replacing
from .ending import ending
from .metrics import main_metrics, method_of
from .progress import Progress
from .report import REPORT, Status, ended, write_report
from .text import duration, one_line
from .trackers import TRACKERS, Tracker
from .versions import VERSIONS, versions

MOST_TIME = 0.05  # share of a run's time that its report may take, unless --log-every is given
LINES = 50  # printed in a run, unless --log-every is given


class Display:
    """The display of one run. cfg: its flags. folder: its folder, which exists. start: the steps done before."""

    def __init__(self, cfg: Any, folder: Path, start: int):
        self._cfg, self._folder = cfg, folder
        self._flags = dataclasses.asdict(cfg)
        self._method = method_of(self._flags)
        self._done = start
        self._every = cfg.log_every or max(1, cfg.steps // LINES)
        self._progress: Progress | None = None
        self._failed: set[str] = set()
        self._report_from = time.perf_counter() + 1.0  # no report before this time
        self._tracker: Tracker | None = None
        if cfg.log_to is not None:
            self._attempt("--log-to", lambda: setattr(self, "_tracker", TRACKERS[cfg.log_to](folder, start)))

    def begin(self) -> Progress:
        """Start the clock of the steps and write the versions of this run. Returns the progress."""
        self._attempt(VERSIONS, self._write_versions)
        self._progress = Progress(self._folder.name, self._done, self._cfg.steps, self._every)
        return self._progress

    def log(self, line: Mapping[str, Any]) -> None:
        """Show one line of metrics.jsonl, which has been written."""
        progress = self._progress or self.begin()
        self._done = line["step"] + 1
        progress.log(line, main_metrics(self._method, line))
        if self._tracker is not None:
            self._attempt("--log-to", lambda: self._tracker and self._tracker.log(line))
        if progress.is_due(self._done) and self._done < self._cfg.steps:
            self._report_progress(progress)

    def close(self, error: BaseException | None) -> None:
        """Write the last report, and print the text at the end of a run that has saved its model."""
        if self._progress is not None:
            self._progress.close()
        if self._tracker is not None:
            self._attempt("--log-to", self._tracker.close)
        self._attempt(REPORT, lambda: self._write(self._final_status(error)))
        if error is None and (self._folder / "model").is_dir():
            self._attempt(
                "the figures of the run", lambda: print(ending(self._folder, REPORT not in self._failed))
            )

    # -- the report

    def _report_progress(self, progress: Progress) -> None:
        """Write the report of the running run, unless reports would take more than MOST_TIME of its time."""
        started = time.perf_counter()
        if self._cfg.log_every is None and started < self._report_from:
            return
        total, seconds = self._cfg.steps, progress.seconds
        left = duration(progress.left(self._done))
        details = f"step {self._done:,} of {total:,} · {duration(seconds)} elapsed, about {left} left"
        self._attempt(REPORT, lambda: self._write(Status("running", "running", details)))
        finished = time.perf_counter()
        self._report_from = finished + (finished - started) / MOST_TIME

    def _write(self, status: Status) -> None:
        defaults = {
            field.name: field.default
            for field in dataclasses.fields(self._cfg)
            if field.default is not dataclasses.MISSING
        }
        write_report(self._folder, status, defaults)

    def _final_status(self, error: BaseException | None) -> Status:
        if error is None:
            return ended(self._done, self._cfg.steps, bool(self._cfg.patience))
        reasons = {KeyboardInterrupt: "interrupted", SystemExit: "terminated"}
        reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), "")
        details = reason or one_line(f"{type(error).__name__}: {error}", 300)
        return Status("stopped", f"stopped at step {self._done:,}", f"of {self._cfg.steps:,}: {details}")

    def _write_versions(self) -> None:
        with replacing(self._folder / VERSIONS) as beside:
            beside.write_text(json.dumps(versions(self._cfg.device), indent=2) + "\n")

    def _attempt(self, name: str, work: Callable[[], object]) -> None:
        """Do what only shows the run. If it fails, print one warning; after that, leave it out without a word."""
        if name in self._failed and name != REPORT:
            return
        try:
            work()
        except Exception as error:  # whatever it is, the training goes on
            if name not in self._failed:
                text = one_line(f"{type(error).__name__}: {error}", 300)
                print(f"warning: {name}: cannot be shown: {text}", file=sys.stderr)
            self._failed.add(name)
        else:
            self._failed.discard(name)
