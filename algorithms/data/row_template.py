"""The flag --row-template FILE: a jinja template that turns any row into a prompt and completion, or into messages.

    {{ premise }} Does it follow that {{ hypothesis }}? ||| {{ ["yes", "maybe", "no"][label] }}

The template reads the row's columns by name. Its output is read as one of these:

    a text with |||             prompt and completion, without the white space around them, as in PromptSource
    a text without |||          the prompt: for reinforcement learning, or beside the columns chosen and rejected
    a JSON list                 messages, each an object with a role: use `tojson` for their content
    a JSON object               a new row, of any shape
    nothing                     no row: the row is dropped and counted

Columns that the template does not read stay in the row, and reward functions receive the file's columns. A ||| inside a
cell separates nothing. The template runs in the sandbox of chat templates. Reading a column that no row has raises an
error, and so does printing a null cell.

Source: Bach et al. 2022, https://arxiv.org/abs/2202.01279, section 3
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...model.errors import InputError
from ...model.files.text_files import read_text
from ...model.text.refusals import OverBudget, check_written
from ...model.text.template import sandbox
from .forms import dumped, json_or_none
from .row import SHAPES, Row

SEPARATOR, MARK = "|||", "\ufdd2"  # while the template runs, the noncharacter MARK replaces the separator
# the columns that determine a row's shape: those of the file are dropped for the template's output
SHAPING = {"completion", *(columns[0] for columns in SHAPES.values())}


def shaped(rows: Sequence[Row], file: Path) -> list[Row]:
    """Return the rows that the template makes: an empty row if it writes nothing.

    Raises InputError naming the row for which the template fails.
    """
    template, names = _compiled(file)
    columns = dict.fromkeys(column for row in rows for column in row)
    nulls = {column: template.environment.null(column) for column in columns}
    made = []
    for row in rows:
        try:
            text = template.render(**{**nulls, **row})
            if MARK in (given := dumped(row)):
                raise InputError("expected cells without the Unicode noncharacter U+FDD2, got one with it")
            check_written(text, lambda given=given: len(given))
        except OverBudget as error:
            raise OverBudget(f"{row.where}: --row-template {file} {error}") from error
        except Exception as error:  # a template is a program: it may fail in any way
            raise InputError(f"{row.where}: --row-template {file} fails: {error}") from error

        made.append(_row(row, _cells(text, row.where, file), names & columns.keys()))
    return made


def _compiled(file: Path) -> tuple[Any, set[str]]:
    """Return (template, names): the compiled template of the file, and the names of the variables that it reads."""
    try:
        source = read_text(file)
    except InputError as error:
        raise InputError(f"--row-template {error}") from None

    try:
        environment = sandbox(strict=True)
        environment.globals |= {"zip": _zip, "enumerate": _enumerate}
        tree, template = environment.compiled(source, lambda text: text.replace(SEPARATOR, MARK))
        return template, environment.names_read(tree)
    except InputError as error:
        raise InputError(f"--row-template {file}: {error}") from error


def _zip(*columns: Any) -> list[Any]:
    """Return the result of zip as a list, because deeply nested iterators overflow the C stack."""
    return list(zip(*columns, strict=False))


def _enumerate(column: Any, start: int = 0) -> list[Any]:
    return list(enumerate(column, start))


def _cells(text: str, where: str, file: Path) -> dict[str, Any]:
    parts = [part.strip() for part in text.split(MARK)]
    if len(parts) == 2:
        return {"prompt": parts[0], "completion": parts[1]}
    if len(parts) > 2:
        raise InputError(f"{where}: --row-template {file}: expected one {SEPARATOR}, got {len(parts) - 1}")
    if not parts[0]:
        return {}

    # a row or messages as JSON, otherwise a prompt
    value = json_or_none(parts[0]) if parts[0][0] in "[{" else None
    if isinstance(value, dict) and value:
        return value
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return {"messages": value}
    if value is None and re.match(r"\[\s*\{|\{\s*[\"']", parts[0]):
        raise InputError(
            f"{where}: --row-template {file}: expected valid JSON (write texts with `tojson`), got {parts[0]!r:.60}"
        )
    return {"prompt": parts[0]}


def _row(row: Row, cells: dict[str, Any], read: set[str]) -> Row:
    gone = {*read, *SHAPING, *cells}
    kept = {name: cell for name, cell in row.items() if name not in gone} if cells else {}
    made = Row(kept | cells, row.where)
    made.original, made.read, made.kept = row, read, kept.keys()
    return made
