"""Reading of data files, and a printed summary of the rows and columns that were used or not.

Formats: .jsonl; .json, with a list or with JSON lines; both also as .gz; and the tables of tables.py.

`Row.take` returns a column and marks it as used. The summary names the columns that were never used (`Tally.unused`).

A small file may unpack to a huge one: a kilobyte of gzip can hold a megabyte. While a file is read, the unpacked size
is therefore limited in proportion to the file's size.
"""

import gzip
import io
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ...model.errors import InputError
from ...model.files.text_files import check_regular, parse_json
from ...model.text.tokenizer import Tokenizer
from ..run.calls import brief
from ..run.data_files import Source, data_source
from .row import Row
from .row_template import shaped
from .tables import read_arrow, read_parquet

MOST_LINE = 64 * 2**20  # the most bytes in a line: more text than any model reads
FREE_BYTES, MOST_RATIO = (
    16 * 2**20,
    200,
)  # limit on the unpacked bytes of n gzip bytes: FREE_BYTES + MOST_RATIO * n
ROW_BYTES = 200  # the least memory that a row takes
TEXT_OF_OBJECT = 16  # bytes; objects with less text than this count as rows
NAMED = 30  # the most columns that a printed line names
TABLES = {".parquet": read_parquet, ".arrow": read_arrow, ".feather": read_arrow}


class Tally(Counter[str]):
    """Counts by name: rows, items made from them, and dropped rows. unused: the columns that nothing read.

    rendered: whether a chat template rendered any of the rows. variables: the template variables that changed a text.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.unused: list[str] = []
        self.rendered = False
        self.variables: set[str] = set()

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
        self.rendered = any(row.rendered for row in rows)
        self.variables = {name for row in rows for name in row.read_variables}
        read = {f"chat_template_kwargs.{name}" for name in self.variables}
        inside = {
            name for row in rows for name in row.ignored
        } - read  # a variable that is read in any row is used
        self.unused = [name for name in columns if name not in taken and not used(name)]
        self.unused += [f"{name} (of the row template)" for name in written if name not in found]
        self.unused += sorted(inside)


def report_counts(source: Path | str, counts: Mapping[str, int]) -> None:
    """Print the counts of rows that were used, cut and dropped, and the names of the columns that nothing used."""
    print(f"{source}: " + ", ".join(f"{count} {reason}" for reason, count in counts.items()))
    if isinstance(counts, Tally) and counts.unused:
        names = [brief(name, 60) for name in counts.unused]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        print(f"{source}: columns not used: {', '.join(names[:NAMED])}{more}")


def check_rendered(tallies: Sequence[Tally], tokenizer: Tokenizer) -> None:
    """Raise InputError if --chat-template-kwargs has no effect on any of the rows that were counted."""
    if tokenizer.variables and not any(counts.rendered for counts in tallies):
        raise InputError("--chat-template-kwargs: the rows are plain texts, so no chat template is used")
    read = {name for counts in tallies for name in counts.variables}
    for name in tokenizer.variables.keys() - read:
        raise InputError(
            f"--chat-template-kwargs: '{name:.60}' does not change the text that the chat template writes"
        )


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
            one.original, one.read, one.kept = row.original, row.read, row.kept
        if one.original is not None and not one:
            counts["dropped: the row template wrote nothing"] += 1
        else:
            fresh.append(one)
    return fresh, counts


# ---- files


def read_rows(path: Path | str, row_template: Path | None = None) -> list[Row]:
    """Read the rows of one argument of --data, and apply a row template to them if one is given.

    path: a file, a glob, or a folder that `datasets.save_to_disk` wrote. Blank lines are skipped.
    Raises InputError if a file is missing, or if there is no row. If a line is broken, the InputError names that line.
    """
    return read_source(data_source(Path(path)), row_template)


def read_source(source: Source, row_template: Path | None = None) -> list[Row]:
    """Read the rows of all files of a source, as `read_rows` does."""
    rows = [row for file in source.files for row in _read_file(file)]
    if not rows:
        raise InputError(f"{source.name}: expected at least one row, got none")
    return rows if row_template is None else shaped(rows, row_template)


def _read_file(path: Path) -> list[Row]:
    check_regular(path)
    kinds = [suffix for suffix in path.suffixes if suffix != ".gz"]
    kind, packed = kinds[-1] if kinds else "", path.suffix == ".gz"
    if kind in TABLES and not packed:
        return [Row(cells, f"{path} row {i + 1}") for i, cells in enumerate(TABLES[kind](path))]
    if kind in (".jsonl", ".json"):
        return _read_json(path, packed, may_be_list=kind == ".json")
    raise InputError(f"{path}: expected .jsonl, .json, .jsonl.gz, .json.gz, .parquet or .arrow")


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object with named columns, got {value!r:.60}")
    return Row(value, where)


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
