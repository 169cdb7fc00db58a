"""Files of rows, and what became of each row: nothing that a row says is passed over without a word.

    .jsonl, .json (a list, or JSONL by another name), either also .gz; .parquet

A reader takes what it uses of a row by `Row.take`. What no reader took of any row is named in one printed line
(`Tally.unused`).
"""

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from ..model.errors import InputError


class Row(dict[str, Any]):
    """A row that knows its file and line, and keeps account of what was read of it.

    original: the file's row, where a row template has made this one of it. read: the columns of that which the template
    has read. kept: those that stand here as they were.
    """

    def __init__(self, cells: dict[str, Any], where: str, from_arrow: bool = False):
        super().__init__({name: cell for name, cell in cells.items() if cell is not None})
        self.where, self.from_arrow = where, from_arrow
        self.original: Row | None = None
        self.read: Set[str] = frozenset()
        self.kept: Set[str] = self.keys()
        self.used: set[str] = set()  # columns
        self.ignored: set[str] = set()  # what lies inside of a column that was read, and was not read itself
        self.notes: Counter[str] = Counter()  # what happened to its turns
        self.rendered = False  # by a chat template
        self.read_variables: set[str] = set()  # of the chat template, which change what it renders

    def take(self, column: str) -> Any:
        """The cell, None where there is none; of parquet without the nulls that Arrow fills in."""
        self.used.add(column)
        return self.plain(column)

    def plain(self, column: str) -> Any:
        """As `take`, without an account of it."""
        cell = self.get(column)
        return without_nulls(cell) if self.from_arrow else cell

    def text(self, column: str) -> str:
        """The cell, which has to be text."""
        if not isinstance(cell := self.take(column), str):
            raise InputError(f"{column}: expected text, got {cell!r:.60}")
        return cell

    def columns(self) -> str:
        """Their names, for messages."""
        return ", ".join(self) or "(none)"

    def of_file(self) -> "Row":
        """The file's row, which reward functions see."""
        return self if self.original is None else self.original


class Tally(Counter[str]):
    """How many rows there are and what was made of them, by name. unused: the columns that nothing read."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.unused: list[str] = []

    def close(self, rows: Sequence[Row], used: Callable[[str], bool] = lambda column: False) -> None:
        """Add what was noted of the rows. used: whether somebody else, a reward function, reads a column."""
        for row in rows:
            self.update(row.notes)
        columns = dict.fromkeys(name for row in rows for name in row.of_file())
        taken = {name for row in rows for name in (row.used & row.kept) | row.read}
        written = dict.fromkeys(name for row in rows for name in row if name not in row.kept)
        found = {name for row in rows for name in row.used - row.kept}
        read = {f"chat_template_kwargs.{name}" for row in rows for name in row.read_variables}
        inside = {name for row in rows for name in row.ignored} - read  # in some row they may change nothing
        self.unused = [name for name in columns if name not in taken and not used(name)]
        self.unused += [f"{name} (of the row template)" for name in written if name not in found]
        self.unused += sorted(inside)


def without_nulls(value: Any) -> Any:
    """Objects without their null fields, however deep; a null in a list stays.

    Arrow has one list of fields for a whole column, so a field that another row has is null in this one.
    """
    if isinstance(value, dict):
        return {name: without_nulls(field) for name, field in value.items() if field is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def opened(rows: Sequence[dict[str, Any]], made: str) -> tuple[list[Row], Tally]:
    """Rows with nothing read of them yet, those of no file named by their number; and an account of what is made."""
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
    """The rows of a file, or those that a row template makes of them. Blank lines are no rows.

    Raises InputError for a file that is missing, broken or empty, naming the line.
    """
    rows = _read_file(Path(path))
    if row_template is None:
        return rows
    from ._row_template import shaped  # which is built on rows

    return shaped(rows, row_template)


def _read_file(path: Path) -> list[Row]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    kinds = [suffix for suffix in path.suffixes if suffix != ".gz"]
    kind = kinds[-1] if kinds else ""
    if kind == ".parquet":
        rows = _read_parquet(path)
    elif kind in (".jsonl", ".json"):
        opener = gzip.open if path.suffix == ".gz" else open
        try:
            with opener(path, "rt", encoding="utf-8-sig") as file:
                rows = list(_read_json(path, file, may_be_list=kind == ".json"))
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text: {error}") from error
        except (EOFError, gzip.BadGzipFile) as error:
            raise InputError(f"{path}: not a whole gzip file: {error}") from error
    else:
        raise InputError(f"{path}: expected .jsonl, .json, .jsonl.gz, .json.gz or .parquet")
    if not rows:
        raise InputError(f"{path}: has no rows")
    return rows


def _read_json(path: Path, file: TextIO, may_be_list: bool) -> Iterator[Row]:
    first = file.readline() if may_be_list else ""
    if may_be_list and first.lstrip()[:1] in ("[", ""):
        try:
            values = json.loads(first + file.read())
        except ValueError as error:
            raise InputError(f"{path}: not JSON: {error}") from error
        if not isinstance(values, list):
            raise InputError(f"{path}: expected a list of objects, got {type(values).__name__}")
        for i, value in enumerate(values):
            yield _row(value, f"{path} entry {i + 1}")
        return
    for i, line in enumerate(chain([first] if may_be_list else [], file)):
        if not line.strip():
            continue
        where = f"{path} line {i + 1}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: not JSON: {error}; the line begins {line.strip()[:60]!r}") from error
        yield _row(value, where)


def _read_parquet(path: Path) -> list[Row]:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(f"{path}: reading parquet needs pyarrow: pip install 'burnish[parquet]'") from error
    try:
        values = pyarrow.parquet.read_table(path).to_pylist(maps_as_pydicts="strict")
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: not a parquet file that can be read: {error}") from error
    return [_row(value, f"{path} row {i + 1}", from_arrow=True) for i, value in enumerate(values)]


def _row(value: Any, where: str, from_arrow: bool = False) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object with named columns, got {value!r:.60}")
    return Row(value, where, from_arrow)
