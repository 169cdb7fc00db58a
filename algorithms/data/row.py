"""A row of a file, which keeps account of what is read of it."""

from collections import Counter
from collections.abc import Callable, Set
from typing import Any

from ...model.errors import InputError

ACCOUNT: dict[str, Callable[[], Any]] = {"used": set, "ignored": set, "notes": Counter, "read_variables": set}


class Row(dict[str, Any]):
    """A row that knows its file and line, and keeps account of what was read of it.

    original: the file's row, where a row template has made this one of it. read: the columns of that which the template
    has read. kept: those that stand here as they were.

    used: columns. ignored: what lies inside of a column that was read, and was not read itself. notes: what happened to
    its turns. rendered: by a chat template. read_variables: of that, which change what it renders.
    """

    __slots__ = ("from_arrow", "kept", "original", "read", "rendered", "where", *ACCOUNT)
    used: set[str]
    ignored: set[str]
    notes: Counter[str]
    read_variables: set[str]

    def __init__(self, cells: dict[str, Any], where: str, from_arrow: bool = False):
        super().__init__({name: cell for name, cell in cells.items() if cell is not None})
        self.where, self.from_arrow = where, from_arrow
        self.original: Row | None = None
        self.read: Set[str] = frozenset()
        self.kept: Set[str] = self.keys()
        self.rendered = False

    def __getattr__(self, name: str) -> Any:
        """Begin an account where it is first asked for: most of a file's rows, and many accounts, stay without."""
        if name not in ACCOUNT:
            raise AttributeError(name)
        setattr(self, name, ACCOUNT[name]())
        return getattr(self, name)

    def take(self, column: str) -> Any:
        """The cell, None where there is none; of parquet without the nulls that Arrow fills in."""
        self.used.add(column)
        return self.plain(column)

    def plain(self, column: str) -> Any:
        """The cell as `take` returns it, without an account."""
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


def without_nulls(value: Any) -> Any:
    """Objects without their null fields, however deep; a null in a list stays.

    Arrow has one list of fields for a whole column, so a field that another row has is null in this one.
    """
    if isinstance(value, dict):
        return {name: without_nulls(field) for name, field in value.items() if field is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
