"""Equivalent forms of one chat message. A chat template may render some of the forms and not the others."""

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

from ...model.errors import InputError
from ...model.files.text_files import parse_json
from ...model.text.tokenizer import Message

Change = Callable[[Message], Message]


def dumped(value: Any) -> str:
    """Return the value as JSON text; a value that JSON cannot hold is written as its repr.

    Raises InputError if the value is nested too deeply.
    """
    try:
        return json.dumps(value, ensure_ascii=False, default=repr)
    except RecursionError as error:
        raise InputError(
            "expected a value that is nested less deeply, got one too deep to be read"
        ) from error


def is_parts(content: Any) -> TypeGuard[list[dict[str, Any]]]:
    """Return whether the content of a message is a list of text parts."""
    return isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content)


def json_or_none(text: str) -> Any:
    """Return the value of a JSON text, or None if the text is not JSON."""
    try:
        return parse_json(text, "")
    except InputError:
        return None


def _parts_joined(message: Message) -> Message:
    content = message.get("content")
    return message | {"content": "".join(p["text"] for p in content)} if is_parts(content) else message


def _text_in_parts(message: Message) -> Message:
    content = message.get("content")
    return message | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _answer_as_json(message: Message) -> Message:
    """Return the message with its content as JSON text, if the content is an object or list, as in a tool's answer."""
    content = message.get("content")
    if isinstance(content, dict | list) and not is_parts(content):
        return message | {"content": dumped(content)}
    return message


def _content_null(message: Message) -> Message:
    return message | {"content": None} if "tool_calls" in message and not message.get("content") else message


def _content_left_out(message: Message) -> Message:
    if "tool_calls" not in message or message.get("content"):
        return message
    return {name: value for name, value in message.items() if name != "content"}


def content_empty(message: Message) -> Message:
    return message | {"content": ""} if message.get("content") is None else message


def _arguments(change: Callable[[Any], Any]) -> Change:
    def of_message(message: Message) -> Message:
        if "tool_calls" not in message:
            return message
        calls = []
        for call in message["tool_calls"]:
            inner = call.get("function", call)
            inner = inner | {"arguments": change(inner["arguments"])} if "arguments" in inner else inner
            calls.append(call | {"function": inner} if "function" in call else inner)
        return message | {"tool_calls": calls}

    return of_message


def _as_object(arguments: Any) -> Any:
    value = json_or_none(arguments) if isinstance(arguments, str) else arguments
    return value if isinstance(value, dict | list) else arguments


def _as_json_text(arguments: Any) -> Any:
    return dumped(arguments) if isinstance(arguments, dict | list) else arguments


def _unchanged(message: Message) -> Message:
    return message


FORMS: tuple[tuple[Change, ...], ...] = (
    (_unchanged, _parts_joined, _text_in_parts),  # content as one text or as a list of parts
    (_unchanged, _answer_as_json),  # a tool's answer as an object or as JSON text
    (_unchanged, _content_null, _content_left_out, content_empty),  # empty content beside tool calls
    (_unchanged, _arguments(_as_object), _arguments(_as_json_text)),  # arguments as an object or as JSON text
)


def num_forms(messages: Sequence[Message], forms: tuple[Change, ...]) -> int:
    """Return the number of forms to try: len(forms), or 1 if all other forms leave the messages unchanged."""
    changes = any(form(message) != message for form in forms[1:] for message in messages)
    return len(forms) if changes else 1


def changed(messages: Sequence[Message], changes: tuple[int, ...]) -> list[Message]:
    form = [dict(message) for message in messages]
    for choice, forms in zip(changes, FORMS, strict=True):
        form = [forms[choice](message) for message in form]
    return form
