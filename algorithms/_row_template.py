"""--row-template FILE: a jinja template that makes a row of any columns into a prompt and a completion, or messages.

    {{ premise }} Does it follow that {{ hypothesis }}? ||| {{ ["yes", "maybe", "no"][label] }}

It reads the row's columns by name. What it writes is one of these:

    a text with ||| in it       prompt and completion, without the white space around them (PromptSource's templates)
    a text without              the prompt: for reinforcement learning, or beside the columns chosen and rejected
    a JSON list                 messages, each an object with a role: use `tojson` for their content
    a JSON object               a row of its own, of any shape

Columns that the template does not read stay in the row, as do those that a reward function takes. A ||| in a cell
separates nothing. The template runs in the sandbox of chat templates; a column that no row has is an error, and so is
printing a cell that is null.

Source: Bach et al. 2022, https://arxiv.org/abs/2202.01279, section 3
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta

from ..model.errors import InputError
from ..model.template import sandbox
from ._rows import Row
from ._said import parse_object

SEPARATOR, MARK = "|||", "\ufdd2"  # a noncharacter stands for it while the template runs: no cell holds one
SHAPING = (  # columns that say what a row is: those of the file give way to what the template writes
    *("messages", "conversations", "prompt", "completion", "text", "question", "instruction", "instances"),
)


def shaped(rows: Sequence[Row], file: Path) -> list[Row]:
    """The rows that the template makes. Raises InputError naming the row for which it fails or writes nothing."""
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--row-template {file}: cannot be read: {error}") from error
    environment = sandbox(undefined=jinja2.StrictUndefined, finalize=_printed)
    environment.globals |= {"zip": zip, "enumerate": enumerate}
    try:
        tree = environment.parse(source)
        template = environment.from_string(source.replace(SEPARATOR, MARK))
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", "?")
        raise InputError(f"--row-template {file}: cannot be parsed: line {line}: {error}") from error
    columns = dict.fromkeys(column for row in rows for column in row)
    read = jinja2.meta.find_undeclared_variables(tree) & columns.keys()
    found = []
    for row in rows:
        try:
            text = template.render(**{**dict.fromkeys(columns), **row})
        except Exception as error:  # a template is a program: it may fail in any way
            raise InputError(f"{row.where}: --row-template {file} fails: {error}") from error
        found.append(_row(row, _cells(text, row.where, file), read))
    return found


def _printed(value: Any) -> Any:
    if value is None:
        raise jinja2.TemplateError("it prints a cell that is null: test for it with {% if ... %}")
    return value


def _cells(text: str, where: str, file: Path) -> dict[str, Any]:
    parts = [part.strip() for part in text.split(MARK)]
    if len(parts) == 2:
        return {"prompt": parts[0], "completion": parts[1]}
    if len(parts) > 2:
        raise InputError(f"{where}: --row-template {file}: expected one {SEPARATOR}, got {len(parts) - 1}")
    value = parse_object(parts[0]) if parts[0][:1] in ("[", "{") else None
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return {"messages": value}
    if not parts[0]:
        raise InputError(f"{where}: --row-template {file}: expected a prompt, messages or a row, got nothing")
    return {"prompt": parts[0]}


def _row(row: Row, cells: dict[str, Any], read: set[str]) -> Row:
    kept = {name: cell for name, cell in row.items() if name not in read and name not in SHAPING}
    made = Row(kept | cells, row.where, row.from_arrow)
    made.original = row
    made.used |= read
    return made
