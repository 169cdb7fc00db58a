"""Text and JSON of other people's files: one reader, which ends in a value or in one sentence.

It reads regular files alone, since a pipe never ends. They are in UTF-8, and of a size and a depth that no published
file comes near. A key that an object has twice, with two values, is refused: readers differ in which of them they take.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from ..errors import InputError, shown

MOST_BYTES = 128 * 2**20  # of a file that is read whole; the largest tokenizer.json known has 35 MB
MOST_DEPTH = 100  # of objects and lists in one another: what walks them later recurses
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # "\ud83d\ude00" is one character, each half alone is none


def read_text(file: Path, most_bytes: int = MOST_BYTES) -> str:
    """The text of a regular file. Raises InputError where there is none, or where it is not UTF-8, or too long."""
    check_regular(file)
    try:
        with open(file, "rb") as opened:
            # Python takes the memory for as much as is asked for
            data = opened.read(min(os.fstat(opened.fileno()).st_size, most_bytes) + 1)
        if len(data) > most_bytes:
            raise InputError(f"{file}: expected at most {most_bytes} bytes, got {os.path.getsize(file)}")
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text: {error}") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error


def check_regular(file: Path) -> None:
    """Raises InputError where `file` is no regular file, nor a link to one."""
    if not os.path.isfile(file):  # False also for a name that no file can have
        what = "not a regular file" if os.path.lexists(file) else "no such file"
        raise InputError(f"{file}: {what}")


def read_json(file: Path) -> Any:
    """Raises InputError as `read_text` and `parse_json` do."""
    return parse_json(read_text(file), str(file))


def read_object(file: Path) -> dict[str, Any]:
    """The object of a file that holds one JSON object. Raises InputError as `read_json` does, and for another value."""
    value = read_json(file)
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def read_optional(file: Path) -> dict[str, Any]:
    """The JSON object of a file that may be absent: then an empty one."""
    return read_object(file) if os.path.lexists(file) else {}


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of a JSON text; `where` names it in errors. Raises InputError where it is no JSON."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        elif not text.isascii():
            text.encode("utf-8")  # fails where it has half of a surrogate pair
        value = DECODER.decode(text.removeprefix("\ufeff"))

        if text.count("[") + text.count("{") > MOST_DEPTH and _deeper_than(MOST_DEPTH, value):
            raise RecursionError
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")

    except RecursionError:
        raise InputError(f"{where}: not JSON: objects and lists deeper than {MOST_DEPTH}") from None
    except UnicodeEncodeError:
        raise InputError(f"{where}: not valid Unicode: half of a surrogate pair") from None
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except ValueError as error:  # broken UTF-8, broken JSON, a number of more digits than Python reads
        raise InputError(f"{where}: not JSON: {error}") from error
    return value


def check_json(value: Any, where: str) -> Any:
    """Return the value as it is. Raises InputError for a number that JSON does not have, NaN or infinity."""
    try:
        json.dumps(value, allow_nan=False, default=str)
    except RecursionError:
        raise InputError(f"{where}: objects and lists too deep in one another") from None
    except ValueError as error:
        raise InputError(f"{where}: expected numbers that JSON has: {error}") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if repr(value) != repr(found[key]):
                raise InputError(f"{shown(key)}: expected once, got {shown(value)} and {shown(found[key])}")
    return found


def _deeper_than(most: int, value: Any) -> bool:
    level = [value]
    for _ in range(most):
        level = [
            child
            for each in level
            if isinstance(each, dict | list)
            for child in (each.values() if isinstance(each, dict) else each)
            if isinstance(child, dict | list)
        ]
    return bool(level)


DECODER = json.JSONDecoder(object_pairs_hook=_object)  # made once: a row of a file takes less time than that
