"""Reading of data files, and a printed summary of the rows and columns that were used or not.

Formats: .jsonl; .json, with a list or with JSON lines; both also as .gz; and .parquet.

`Row.take` returns a column and marks it as used. The summary names the columns that were never used (`Tally.unused`).

A small file may unpack to a huge one: a kilobyte of gzip can hold a megabyte, and parquet can store one value for a
million rows. While a file is read, the unpacked size is therefore limited in proportion to the file's size.
"""

import gzip
import io
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ...model.errors import InputError, shown
from ...model.files.text_files import check_regular, parse_json
from ..run.calls import brief
from .parquet_footer import read_footer
from .row import Row
from .row_template import shaped

MOST_LINE = 64 * 2**20  # the most bytes in a line: more text than any model reads
FREE_BYTES, MOST_RATIO = (
    16 * 2**20,
    200,
)  # limit on the unpacked bytes of n gzip bytes: FREE_BYTES + MOST_RATIO * n
ROW_BYTES = 200  # the least memory that a row takes
TEXT_OF_OBJECT = 16  # bytes; objects with less text than this count as rows
FREE_TABLE, TABLE_RATIO = (
    16 * 2**20,
    1000,
)  # the same limit for parquet, which stores values shared by all rows once
VALUE_BYTES = 16  # counted for each parquet value beside its own bytes, which may be a single bit
FREE_ROWS = 300_000  # a parquet file with more rows than this may have at most one row per byte
BATCH_ROWS = 32  # the most rows of a parquet file that are unpacked before their size is checked
NAMED = 30  # the most columns that a printed line names
MOST_NESTED = 25  # the most levels of nesting in the type of a column


class Tally(Counter[str]):
    """Counts by name: rows, items made from them, and dropped rows. unused: the columns that nothing read."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.unused: list[str] = []

    def close(self, rows: Sequence[Row], used: Callable[[str], bool] = lambda column: False) -> None:
        """Add the rows' notes to the counts, and find the columns that nothing used.

        used: a function that returns whether a reward function reads the column of that name.
        """
        for row in rows:
            self.update(row.notes)
        columns = dict.fromkeys(name for row in rows for name in row.of_file())
        taken = {name for row in rows for name in (row.used & row.kept) | row.read}
        written = dict.fromkeys(name for row in rows for name in row if name not in row.kept)
        found = {name for row in rows for name in row.used - row.kept}
        read = {f"chat_template_kwargs.{name}" for row in rows for name in row.read_variables}
        inside = {
            name for row in rows for name in row.ignored
        } - read  # a variable that is read in any row is used
        self.unused = [name for name in columns if name not in taken and not used(name)]
        self.unused += [f"{name} (of the row template)" for name in written if name not in found]
        self.unused += sorted(inside)


def report_counts(source: Path, counts: Mapping[str, int]) -> None:
    """Print the counts of rows that were used, cut and dropped, and the names of the columns that nothing used."""
    print(f"{source}: " + ", ".join(f"{count} {reason}" for reason, count in counts.items()))
    if isinstance(counts, Tally) and counts.unused:
        names = [brief(name, 60) for name in counts.unused]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        print(f"{source}: columns not used: {', '.join(names[:NAMED])}{more}")


def opened(rows: Sequence[dict[str, Any]], made: str) -> tuple[list[Row], Tally]:
    """Return (rows, counts) for the start of a conversion: copies of the rows, and a Tally with no items made yet.

    No column of the copies is marked as used. A plain dict becomes a row named by its number. Rows that are empty
    because the row template wrote nothing are dropped and counted. made: the plural name of the items, for the counts.
    """
    counts = Tally({"rows": len(rows), made: 0})
    fresh = []
    for i, row in enumerate(rows):
        one = Row(row, row.where if isinstance(row, Row) else f"row {i + 1}")
        if isinstance(row, Row):
            one.from_arrow = row.from_arrow
            one.original, one.read, one.kept = row.original, row.read, row.kept
        if one.original is not None and not one:
            counts["dropped: the row template wrote nothing"] += 1
        else:
            fresh.append(one)
    return fresh, counts


# ---- files


def read_rows(path: Path | str, row_template: Path | None = None) -> list[Row]:
    """Read the rows of a file, and apply a row template to them if one is given. Blank lines are skipped.

    Raises InputError if the file is missing or empty. If a line is broken, the InputError names that line.
    """
    rows = _read_file(Path(path))
    if row_template is None:
        return rows
    return shaped(rows, row_template)


def _read_file(path: Path) -> list[Row]:
    check_regular(path)
    kinds = [suffix for suffix in path.suffixes if suffix != ".gz"]
    kind, packed = kinds[-1] if kinds else "", path.suffix == ".gz"
    if kind == ".parquet" and not packed:
        rows = _read_parquet(path)
    elif kind in (".jsonl", ".json"):
        rows = _read_json(path, packed, may_be_list=kind == ".json")
    else:
        raise InputError(f"{path}: expected .jsonl, .json, .jsonl.gz, .json.gz or .parquet")
    if not rows:
        raise InputError(f"{path}: expected at least one row, got none")
    return rows


def _row(value: Any, where: str, from_arrow: bool = False) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object with named columns, got {value!r:.60}")
    return Row(value, where, from_arrow)


# ---- JSON


def _read_json(path: Path, packed: bool, may_be_list: bool) -> list[Row]:
    try:
        with open(path, "rb") as raw:
            if packed:
                with io.BufferedReader(gzip.GzipFile(fileobj=raw), 2**16) as file:
                    return list(_json_rows(path, file, Bound(path, raw), may_be_list))
            return list(_json_rows(path, raw, None, may_be_list))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: incomplete or broken gzip file: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


class Bound:
    """A limit on the size of an unpacked gzip file, in proportion to the packed bytes read so far."""

    def __init__(self, path: Path, raw: BinaryIO):
        self.path, self.raw, self.found = path, raw, 0

    def add(self, text: bytes, lines: int) -> None:
        objects = text.count(b"{") - len(text) // TEXT_OF_OBJECT
        self.found += len(text) + ROW_BYTES * max(lines, objects)
        if self.found > FREE_BYTES + MOST_RATIO * self.raw.tell():
            raise InputError(
                f"{self.path}: expected to unpack to at most {MOST_RATIO} times its size, got more; if the rows are "
                "right, unpack it with gunzip"
            )


def _json_rows(path: Path, file: Any, bound: Bound | None, may_be_list: bool) -> Iterator[Row]:
    """Yield the rows of a JSON or JSONL file. file: a reader of the unpacked bytes."""
    if may_be_list and file.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
        yield from _entries(path, file, bound)
        return
    for number, line in _lines(path, file, bound):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            value = parse_json(line, where)
        except InputError as error:
            raise InputError(f"{error}; the line begins {line.strip()[:60]!r}") from error
        yield _row(value, where)


def _lines(path: Path, file: Any, bound: Bound | None) -> Iterator[tuple[int, str]]:
    """Yield (number, text) for each line that is not empty.

    Lines may end in \\n, \\r\\n or \\r. Raises InputError naming a line that is too long or not UTF-8.
    """
    number = 0
    while line := file.readline(MOST_LINE + 1):
        if bound is not None:
            bound.add(line, 1 + line.count(b"\r", 0, -2))
        if line == b"\n":
            number += 1
            continue
        if len(line) > MOST_LINE:
            raise InputError(f"{path} line {number + 1}: expected at most {MOST_LINE} bytes in a line")
        for part in line.rstrip(b"\r\n").split(b"\r") if b"\r" in line else (line,):
            number += 1
            try:
                yield number, part.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: not UTF-8 text: line {number}: {error}") from error


def _entries(path: Path, file: Any, bound: Bound | None) -> Iterator[Row]:
    """Yield the rows of a JSON file that holds one list."""
    pieces = []
    while piece := file.read(2**20):
        pieces.append(piece)
        if bound is not None:
            bound.add(piece, 0)
    try:
        values = parse_json(b"".join(pieces).decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error}") from error
    if not isinstance(values, list):
        raise InputError(f"{path}: expected a list of objects, got {type(values).__name__}")
    for i, value in enumerate(values):
        yield _row(value, f"{path} entry {i + 1}")


# ---- parquet


def _read_parquet(path: Path) -> list[Row]:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            f"{path}: reading parquet requires pyarrow: pip install 'burnish[parquet]'"
        ) from error

    try:
        _check_footer(path)
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            return list(_parquet_rows(path, file))
    except InputError:
        raise
    except Exception as error:  # pyarrow's errors have no common class
        raise InputError(f"{path}: not a readable parquet file: {error}") from error


def _parquet_rows(path: Path, file: Any) -> Iterator[Row]:
    """Yield the rows of a ParquetFile. A few rows are unpacked at a time."""
    # 1. check the columns
    for field in file.schema_arrow:
        _check_type(f"{path}: column {shown(field.name)}", field.type)
    names, size = file.schema_arrow.names, os.path.getsize(path)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{path}: column {shown(twice[0])}: expected once, found twice")

    # 2. read the rows, fewer at a time if they are long
    first = next(file.iter_batches(1), None)
    batch_rows = FREE_TABLE // max(first.nbytes if first else 1, 1)
    unpacked_bytes = number = 0
    for batch in file.iter_batches(min(max(batch_rows, 1), BATCH_ROWS)):
        arrays = [_decoded(cells) for cells in batch.columns]
        unpacked_bytes += sum(cells.nbytes for cells in arrays)
        if unpacked_bytes > FREE_TABLE + TABLE_RATIO * size:
            raise InputError(f"{path}: expected to unpack to at most {TABLE_RATIO} times its size, got more")
        for cells in arrays:
            cells.validate(full=True)

        columns = [_cells(path, name, cells) for name, cells in zip(names, arrays, strict=True)]
        for cells in zip(*columns, strict=True):
            number += 1
            yield _row(dict(zip(names, cells, strict=True)), f"{path} row {number}", from_arrow=True)


def _check_footer(path: Path) -> None:
    """Raise InputError if the footer's counts are too large for the file's size, before anything is unpacked."""
    size, footer = os.path.getsize(path), read_footer(path)
    if footer.rows != sum(footer.group_rows) or any(rows < 0 for rows in footer.group_rows):
        raise InputError(f"{path}: not a readable parquet file: its counts of rows differ")
    if footer.rows > max(FREE_ROWS, size):
        raise InputError(f"{path}: expected no more rows than the file's {size} bytes, got {footer.rows}")
    if footer.unpacked_bytes + VALUE_BYTES * footer.values > FREE_TABLE + TABLE_RATIO * size:
        raise InputError(f"{path}: expected to unpack to at most {TABLE_RATIO} times its size, got more")


def _check_type(where: str, type_: Any, depth: int = 0) -> None:
    """Raise InputError if a column's type is nested too deeply, because reading its values would exhaust the stack."""
    if depth > MOST_NESTED:
        raise InputError(f"{where}: expected a type with at most {MOST_NESTED} levels of nesting, got more")
    for i in range(type_.num_fields):
        _check_type(where, type_.field(i).type, depth + 1)


def _decoded(cells: Any) -> Any:
    """Return a parquet column with one value per row. Dictionary encoding, if used, is undone."""
    return cells.dictionary_decode() if hasattr(cells, "dictionary_decode") else cells


def _cells(path: Path, name: str, cells: Any) -> list[Any]:
    """Return the values of a parquet column in Python types.

    A map with texts as keys becomes a dict. Another map becomes a list of pairs, because JSON objects have only texts
    as keys.
    """
    import pyarrow  # pyright: ignore[reportMissingImports]

    maps = "strict" if _maps_are_of_text(cells.type, pyarrow.types) else None
    try:
        return cells.to_pylist(maps_as_pydicts=maps)
    except (
        Exception
    ) as error:  # a repeated key of a map, a date out of Python's range, text that is not UTF-8
        raise InputError(
            f"{path}: column {shown(name)}: cannot read {cells.type}: {type(error).__name__}: {error}; "
            "leave the column out, or write it as text"
        ) from error


def _maps_are_of_text(type_: Any, types: Any) -> bool:
    if types.is_map(type_) and not (types.is_string(type_.key_type) or types.is_large_string(type_.key_type)):
        return False
    return all(_maps_are_of_text(type_.field(i).type, types) for i in range(type_.num_fields))
