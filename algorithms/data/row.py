"""A row of a file, which records the columns that were read from it."""

from collections import Counter
from collections.abc import Callable, Set
from typing import Any

from ...model.errors import InputError

SHAPES = {  # the columns of each shape; a row has the first shape whose columns it has all
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "prompt and completion": ("prompt", "completion"),
    "text": ("text",),
    "question and answer": ("question", "answer"),
    "Alpaca": ("instruction", "output"),
    "self-instruct": ("instruction", "instances"),
}
ACCOUNT: dict[str, Callable[[], Any]] = {"used": set, "ignored": set, "notes": Counter, "read_variables": set}


class Row(dict[str, Any]):
    """A row with its file and line, which records what was read from it. Null cells are left out.

    original: the file's row, if a row template made this row from it. read: the columns of the original that the row
    template read. kept: the columns of the original that this row has unchanged.

    used: the columns of this row that reached an example. ignored: keys inside these columns that did not. notes:
    counts of turns to report, such as turns without text. rendered: whether a chat template rendered the row.
    read_variables: template variables that change the text.
    """

    __slots__ = ("kept", "original", "read", "rendered", "where", *ACCOUNT)
    used: set[str]
    ignored: set[str]
    notes: Counter[str]
    read_variables: set[str]

    def __init__(self, cells: dict[str, Any], where: str):
        super().__init__({name: cell for name, cell in cells.items() if cell is not None})
        self.where = where
        self.original: Row | None = None
        self.read: Set[str] = frozenset()
        self.kept: Set[str] = self.keys()
        self.rendered = False

    def __getattr__(self, name: str) -> Any:
        """Create the attribute used, ignored, notes or read_variables on first access. Most rows need few of them."""
        if name not in ACCOUNT:
            raise AttributeError(name)
        setattr(self, name, ACCOUNT[name]())
        return getattr(self, name)

    def take(self, column: str) -> Any:
        """Return the cell of a column, or None if the row lacks it, and mark the column as used."""
        self.used.add(column)
        return self.get(column)

    def text(self, column: str) -> str:
        """Return the cell and mark its column as used. Raises InputError if the cell is not a text."""
        if not isinstance(cell := self.take(column), str):
            raise InputError(f"{column}: expected text, got {cell!r:.60}")
        return cell

    def columns(self) -> str:
        """Return the names of the columns as one text, for messages."""
        return ", ".join(self) or "(none)"

    def of_file(self) -> "Row":
        """Return the row as it stands in the file, before any row template. Reward functions receive its columns."""
        return self if self.original is None else self.original
