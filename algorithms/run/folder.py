"""The files of a run folder: config.json, and the logs that a resumed run continues."""

import os
import sys
from pathlib import Path
from typing import Any

from ...model.errors import InputError
from ...model.files.replacing import replacing
from ...model.files.text_files import check_regular, parse_json
from .checks import as_json
from .flags import TrainingFlags
from .processes import rank

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


def open_metrics(folder: Path, cfg: TrainingFlags, start: int) -> Any:
    """Open metrics.jsonl for appending, after removing all lines of the steps from `start` on. Write config.json."""
    if rank():
        return open(os.devnull, "a")
    metrics, samples = folder / METRICS, folder / SAMPLES
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ends = [_end_of_steps(file, start, a_line_a_step=file == metrics) for file in (metrics, samples)]

        # change files only after both have been read
        with replacing(folder / "config.json") as beside:
            beside.write_text(as_json(cfg))
        _cut(metrics, ends[0])
        _cut(samples, ends[1])
        return open(metrics, "a")
    except OSError as error:
        raise InputError(f"--output {folder}: cannot be written: {error}") from error


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
