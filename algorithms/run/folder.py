"""The files of a run folder: config.json, and the logs and models that a resumed run continues or removes."""

import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...model.errors import InputError
from ...model.files.folder import holds_a_model
from ...model.files.replacing import remove_folder, replacing, sweep
from ...model.files.text_files import check_regular, parse_json, read_optional
from ..show.report import REPORT
from ..show.trackers import EVENTS
from ..show.versions import VERSIONS
from .checkpoint import sweep_checkpoint
from .checks import CHECKPOINT, as_json
from .flags import TrainingFlags
from .order import with_steps
from .processes import rank

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
LOGS = (METRICS, SAMPLES)  # a resumed run cuts off what they hold of the steps that it runs again
CONFIG = "config.json"


def open_metrics(folder: Path, cfg: TrainingFlags, start: int) -> Any:
    """Open metrics.jsonl for appending, after removing all lines of the steps from `start` on. Write config.json.

    With --resume, first remove what killed processes have left in the folder.
    """
    if rank():
        return open(os.devnull, "a")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ends = {name: _end_of_steps(folder / name, start, a_line_a_step=name == METRICS) for name in LOGS}

        # change files only after all have been read
        if cfg.resume:
            sweep(folder)
            sweep_checkpoint(folder / CHECKPOINT)
        with replacing(folder / CONFIG, sync=True) as beside:
            beside.write_text(as_json(replace(cfg, resume=False)))  # --config then starts a run of its own
        for name, end in ends.items():
            _cut(folder / name, end)
        return open(folder / METRICS, "a")
    except OSError as error:
        raise InputError(f"--output {folder}: cannot be written: {error}") from error


def flush_logs(folder: Path) -> None:
    """Flush the logs to the disk, before a checkpoint that counts on their lines."""
    for name in LOGS:
        if rank() == 0 and os.path.lexists(folder / name):
            try:
                with open(folder / name, "rb") as opened:
                    os.fsync(opened.fileno())
            except OSError as error:
                raise InputError(f"{folder / name}: cannot be written: {error}") from error


def remove_start(folder: Path) -> None:
    """Remove the files of a run that ends before its first step is done."""
    for name in (CONFIG, *LOGS, VERSIONS, REPORT):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / EVENTS, ignore_errors=True)


def keep_newest(folder: Path, keep: int | None, done: int) -> None:
    """Remove all but the `keep` newest step-N folders with N up to `done`. None keeps all.

    A folder that holds anything but a model is kept, and not counted.
    """
    if keep is None or rank():
        return
    models: list[tuple[int, Path]] = []
    for entry in folder.iterdir():
        number = re.fullmatch(r"step-([1-9]\d{0,15})", entry.name)
        if number and int(number[1]) <= done and not entry.is_symlink() and holds_a_model(entry):
            models.append((int(number[1]), entry))
    for _, entry in sorted(models)[:-keep]:
        remove_folder(entry)


def steps_of(folder: Path, cfg: TrainingFlags, rows: int) -> int | None:
    """Return the steps of the run that was last in the folder, by its config.json, or None if it has none.

    cfg: the flags of the resumed run, which takes as many rows a step. rows: the rows of an epoch.
    """
    earlier = read_optional(folder / CONFIG)
    steps, passes = earlier.get("steps"), earlier.get("epochs")
    if isinstance(passes, int | float):
        return with_steps(replace(cfg, epochs=passes), rows).steps
    return steps if isinstance(steps, int) else None


def _end_of_steps(file: Path, step: int, a_line_a_step: bool) -> int:
    """Return the number of bytes up to the first line of `step` or a later step; 0 if the file does not exist.

    Broken lines before that place are kept, because only people read them again. A last line that a crash has cut off
    is not counted. a_line_a_step: the file has one line per step. The number of a broken line then gives its step. In
    other files a broken line raises InputError.
    """
    if not os.path.lexists(file):
        return 0
    check_regular(file)
    end = unread = count = 0
    with open(file, "rb") as lines:
        for i, line in enumerate(lines):
            found = _step_of(line)
            if found is None and not line.endswith(b"\n"):  # cut off by a crash
                break

            if found is None and not a_line_a_step:
                got = line[:60].decode("utf-8", "replace")
                raise InputError(f"{file} line {i + 1}: expected an object with its step, got {got!r}")
            if (i if found is None else found) >= step:
                break
            end, count, unread = end + len(line), count + 1, unread + (found is None)

    if a_line_a_step and (unread or count != step):
        print(
            f"warning: {file}: only {count - unread} of the first {step} steps can be read; the file is continued",
            file=sys.stderr,
        )
    return end


def _step_of(line: bytes) -> int | None:
    try:
        record = parse_json(line.decode("utf-8", "replace"), "")
    except InputError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) and step >= 0 else None


def _cut(file: Path, end: int) -> None:
    """Truncate a file, if it exists, to its first `end` bytes. Add a newline if the last line lacks it."""
    if not os.path.lexists(file):
        return
    os.truncate(file, end)
    with open(file, "rb+") as opened:
        opened.seek(max(end - 1, 0))
        if opened.read(1) not in (b"", b"\n"):
            opened.write(b"\n")
