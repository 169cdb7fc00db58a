"""A reader for text and JSON in other people's files: it returns a value, or raises an error of one sentence.

It reads only regular files, because a pipe may never end. Files must be UTF-8. Their size and nesting depth have limits
far above those of published files. A key that occurs twice in an object with different values is refused, because
readers differ in the value that they take.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from ..errors import InputError, shown

MOST_BYTES = 128 * 2**20  # of a file that is read whole; the largest tokenizer.json known has 35 MB
MOST_DEPTH = 100  # of nested objects and lists, because later code walks them recursively
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # "\ud83d\ude00" is one character; half of it is invalid


def read_text(file: Path, most_bytes: int = MOST_BYTES) -> str:
    """Return the text of a regular file. Raises InputError if it does not exist, is not UTF-8 or is too long."""
    check_regular(file)
    try:
        with open(file, "rb") as opened:
            # Python allocates the memory for the whole requested size
            data = opened.read(min(os.fstat(opened.fileno()).st_size, most_bytes) + 1)
        if len(data) > most_bytes:
            raise InputError(f"{file}: expected at most {most_bytes} bytes, got {os.path.getsize(file)}")
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text: {error}") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error


def check_regular(file: Path) -> None:
    """Raise InputError if `file` is neither a regular file nor a link to one."""
    if not os.path.isfile(file):  # False also for an invalid name
        what = "not a regular file" if os.path.lexists(file) else "no such file"
        raise InputError(f"{file}: {what}")


def read_json(file: Path) -> Any:
    """Return the JSON value of a file. Raises InputError as `read_text` and `parse_json` do."""
    return parse_json(read_text(file), str(file))


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises InputError as `read_json` does, and for any other JSON value."""
    value = read_json(file)
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def read_optional(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one if the file does not exist."""
    return read_object(file) if os.path.lexists(file) else {}


def parse_json(text: str | bytes, where: str) -> Any:
    """Return the value of a JSON text. where: its name in errors. Raises InputError for invalid JSON."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        elif not text.isascii():
            text.encode("utf-8")  # fails on half of a surrogate pair
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
    except ValueError as error:  # invalid UTF-8, invalid JSON, or a number with more digits than Python reads
        raise InputError(f"{where}: not JSON: {error}") from error
    return value


def check_json(value: Any, where: str) -> Any:
    """Return the value unchanged. Raises InputError for NaN and infinity, which JSON does not have."""
    try:
        json.dumps(value, allow_nan=False, default=str)
    except RecursionError:
        raise InputError(f"{where}: objects and lists nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{where}: expected finite numbers, as in JSON: {error}") from None
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


DECODER = json.JSONDecoder(
    object_pairs_hook=_object
)  # made once, since that takes longer than decoding a row
