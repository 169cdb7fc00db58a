"""The files of a run folder, read for a report. Broken files and lines are counted and passed over.

A report must be possible for the folder of a killed run, of an earlier version, or of a person who edited it.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from ...model.errors import InputError
from ...model.files.text_files import check_regular, parse_json, read_object
from .metrics import ERROR

MOST_LINES = 20_000  # of metrics.jsonl that are parsed; a longer file gives every k-th of its lines
MOST_BYTES = 2**18  # read from each end of samples.jsonl
LAST_STEP = 2**53
LARGEST = 1e300  # of the values that are drawn

Points = list[tuple[float, float | None]]  # (step, value); None where the step has no finite value


class Records(NamedTuple):
    """The contents of a run folder. columns: the points of each metric, in the order in which the names came.

    lines, last_step: of metrics.jsonl; -1 without a line. notes: sentences about what could not be read.
    """

    folder: Path
    flags: Mapping[str, Any]
    columns: Mapping[str, Points]
    lines: int
    last_step: int
    samples: Sequence[Sequence[Mapping[str, Any]]]  # the first ones, and the newest, newest first
    held_out: Mapping[str, Mapping[str, float]]
    versions: Mapping[str, Any]
    notes: Sequence[str]


def read_records(folder: Path) -> Records:
    """Read a run folder. Raises InputError if the folder holds neither config.json nor metrics.jsonl."""
    files = [folder / name for name in ("config.json", "metrics.jsonl")]
    if not any(os.path.isfile(file) for file in files):  # False also for a name that no file can have
        raise InputError(f"{folder}: expected the folder of a run, with config.json and metrics.jsonl")

    notes: list[str] = []
    columns, lines, last_step = _read_metrics(folder / "metrics.jsonl", notes)
    held_out = {
        name: {key: number for key, value in of_name.items() if (number := _number(value)) is not None}
        for name, of_name in _read_optional(folder / "held_out.json", notes).items()
        if isinstance(of_name, dict)
    }

    return Records(
        folder=folder,
        flags=_read_optional(folder / "config.json", notes),
        columns=columns,
        lines=lines,
        last_step=last_step,
        samples=_read_samples(folder / "samples.jsonl", notes),
        held_out=held_out,
        versions=_read_optional(folder / "versions.json", notes),
        notes=notes,
    )


def _read_optional(file: Path, notes: list[str]) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one with a note if it cannot be read."""
    if not os.path.lexists(file):
        return {}
    try:
        return read_object(file)
    except InputError as error:
        notes.append(str(error))
        return {}


# ---- metrics


def _read_metrics(file: Path, notes: list[str]) -> tuple[dict[str, Points], int, int]:
    """Return the columns of metrics.jsonl, the number of its lines and its last step."""
    columns: defaultdict[str, Points] = defaultdict(list)
    count = unread = 0
    last, in_order = -1, True
    for line in _lines(file, notes):
        count += 1
        record = _record(line)
        step = record.setdefault("step", count - 1) if record is not None else None
        if record is None or not isinstance(step, int) or not 0 <= step <= LAST_STEP:
            unread += 1
            continue

        last, in_order = max(last, step), in_order and step >= last
        del record["step"]
        for name, value in record.items():
            kind = type(value)
            if kind is float or kind is int or value is None:
                finite = value is not None and -LARGEST < value < LARGEST  # False for NaN
                columns[name].append((step, value if finite else None))

    if unread:
        notes.append(f"{file.name}: {unread} of {count} lines cannot be read and are left out.")
    if not in_order:
        for points in columns.values():
            points.sort(key=lambda point: point[0])  # stable, so that a step that came twice keeps its order
    known = {name: points for name, points in columns.items() if any(v is not None for _, v in points)}
    return known, count, last


def _lines(file: Path, notes: list[str]) -> Iterator[bytes]:
    """Yield the lines of a file. Of a long file, yield every k-th, those with held-out metrics, and the last."""
    if not os.path.lexists(file):
        return
    try:
        check_regular(file)
        with open(file, "rb") as opened:
            first = opened.readline()
            size = os.fstat(opened.fileno()).st_size
            every = ceil(size / max(len(first), 1) / MOST_LINES)
            if every > 1:
                notes.append(f"{file.name} is long: one of {every} lines is read.")
            yield from [first] * bool(first)

            last = b""
            for i, line in enumerate(opened, start=1):
                last = b"" if i % every == 0 or b'"eval_' in line else line
                if not last:
                    yield line
            if last:
                yield last
    except (OSError, InputError) as error:
        notes.append(f"{file.name} cannot be read: {error}")


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line, "")
    except InputError:
        return None
    return record if isinstance(record, dict) else None


def _number(value: Any) -> float | None:
    """Return a number as a float, or None for another value, or one that is not finite or too large to be drawn."""
    return float(value) if type(value) in (int, float) and -LARGEST < value < LARGEST else None


# ---- samples


def _read_samples(file: Path, notes: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the first lines of samples.jsonl, and its newest in reverse order. Only the file's ends are read."""
    if not os.path.lexists(file):
        return [], []
    try:
        check_regular(file)
        with open(file, "rb") as opened:
            head = opened.read(MOST_BYTES)
            size = os.fstat(opened.fileno()).st_size
            start = max(len(head), size - MOST_BYTES)
            opened.seek(start)
            tail = opened.read(MOST_BYTES)
    except (OSError, InputError) as error:
        notes.append(f"{file.name} cannot be read: {error}")
        return [], []

    lines = head.splitlines()
    if len(head) < size:  # the line at the cut is not whole
        lines = lines[:-1]
    later = tail.splitlines()[1:] if start > len(head) else tail.splitlines()
    if start == len(head) and len(head) < size:  # a short file: the two parts are one
        lines, later = (head + tail).splitlines(), []
    found = [record for line in (*lines, *later) if line.strip() and (record := _record(line)) is not None]
    return found, found[::-1]


# ---- first and last


def ends(points: Points) -> tuple[float, float, int]:
    """Return the means of a metric's first and last values, and over how many values: a fifth, at most ten."""
    values = [value for _, value in points if value is not None]
    count = max(1, min(10, len(values) // 5))
    return sum(values[:count]) / count, sum(values[-count:]) / count, count


def errors_of(columns: Mapping[str, Points], name: str) -> dict[float, float]:
    """Return the standard errors of a held-out metric by step."""
    return {step: value for step, value in columns.get(f"{name}{ERROR}", ()) if value is not None}
