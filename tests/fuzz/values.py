"""Checks of a value in a file by its meaning, of which classes are made."""

import json
import math
import sys
from types import NoneType
from typing import Any

MOST = 2**31 - 1  # of sizes and ids


def is_number(value: Any, least: float = 0, most: float = sys.float_info.max) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST


is_id = is_whole  # a model may name one that it has no row for, as Gemma 3 does: it is never drawn


def is_text(value: Any) -> bool:
    """Text that UTF-8 can hold: without half of a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def is_json(value: Any) -> bool:
    """However deep, without numbers that JSON does not have."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            left += value
        elif not (value is None or isinstance(value, int) or is_text(value) or _is_finite(value)):
            return False
    return True


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


# ---- cells of rows

TEXTS = ("prompt", "completion", "text", "chosen", "rejected", "system")
TALKS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
OPTIONAL = ("tools", "functions", "chat_template_kwargs", "system", "margin")
ABOUT = ("tools", "functions", "chat_template_kwargs", "system")  # what a row says about its messages
READ = {  # rows of a kind -> the columns that their reader looks at, or would, were they there
    "completions": ("messages", "conversations", "prompt", "completion"),
    "text": ("messages", "conversations", "text"),
    **dict.fromkeys(("messages", "tools"), ("messages", *ABOUT)),
    "prompts": ("prompt",),
    "preferences": ("prompt", "chosen", "rejected", "margin"),
    "judged": ("prompt", "completion", "label"),
}


def is_cell(kind: str, column: str, value: Any, absent: Any) -> bool:
    """A cell of a column that is not read is named in a printed line, or is the reward function's."""
    if column not in READ[kind]:
        return True
    if value is None or value is absent:
        return column in OPTIONAL
    if column in TEXTS and is_text(value):
        return True
    if column in TALKS:  # one without a turn is dropped, and counted
        return isinstance(value, list) and all(map(is_message, value))

    match column:
        case "label":
            return isinstance(value, int) and value in (0, 1)
        case "margin":
            return is_number(value, -sys.float_info.max)
        case "tools":
            return is_json(value) and isinstance(of_text(value), list | NoneType)
        case "system":  # another's, and named, where it is no text
            return not isinstance(value, str)
        case "functions":  # tools where they are a list, and else a column of another's
            return not isinstance(value, list) or is_json(value)
        case "chat_template_kwargs":
            return is_json(value) and isinstance(of_text(value), dict | NoneType)
    return False


def of_text(value: Any) -> Any:
    """Some rows hold JSON as text; a blank one is nothing."""
    if isinstance(value, str) and not value.strip():
        return None
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def is_message(value: Any) -> bool:
    """A turn: a role, and content as text, as parts of text, or none where it calls tools; a tool says any JSON."""
    if not isinstance(value, dict) or not is_json(value):
        return False
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    calls = value.get("tool_calls", value.get("function_call"))
    if role in ("tool", "observation", "function"):
        has_content = True
    elif isinstance(content, list):
        has_content = all(is_text(part.get("text") if isinstance(part, dict) else part) for part in content)
    else:
        has_content = is_text(content) or (content is None and bool(calls))
    flags = value.get("weight", 1) in (0, 1, None) and value.get("train", True) in (True, False, None)
    return is_text(role) and has_content and flags
