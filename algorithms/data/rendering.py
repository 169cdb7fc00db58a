"""Proof that a chat template renders all that a conversation says.

A template may pass over a whole turn (a role that it does not know), a key (tool calls, reasoning), or all calls but
the first, and turns content that it does not expect into nothing or into Python's own notation. So each conversation
is rendered once with every word replaced by one that occurs nowhere else, tags like </think> left where they are; each
of these words has to be found in the text. Conversations that differ in their words alone are rendered once.

What a message says can be written in more than one form (FORMS). The first form in which nothing is missing is the one
that is trained; its text is that of transformers' apply_chat_template wherever that renders the row as it is.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple, TypeGuard

from ...model.errors import InputError
from ...model.files.text_files import parse_json
from ...model.text.template import Refused
from ...model.text.tokenizer import Message, Tokenizer

REASONING = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "analysis")
# the keys of a message that say something
SAYING = ("content", "tool_calls", "tool_plan", "refusal", *REASONING)
TAG = re.compile(r"(</?[^\W\d][\w-]{0,40}>|<[|｜][^<>\s]{1,40}>)")  # </think>, <|channel|>
FIRST_NUMBER = 70_000_001
CACHED = 1024  # conversations of which no two have the same roles, keys and tags

Change = Callable[[Message], Message]
Render = Callable[[list[Message], bool], str]


class Said(NamedTuple):
    """A word, and where in the conversation it stands."""

    message: int
    key: str
    word: str
    in_tags: bool = False  # between <think> and </think>
    exact: bool = False  # not as JSON escapes it


class Form(NamedTuple):
    """How messages are to be changed, and what the template makes of the rest.

    changes: one for each of FORMS. dropped: turns whose reasoning is not rendered because others follow. unread: keys
    that say nothing, as (message, path); without them the text is the same.
    """

    changes: tuple[int, ...]
    dropped: int = 0
    unread: tuple[tuple[int, str], ...] = ()


class Unsaid(InputError):
    """Something that the template leaves out of every form in which it renders the conversation."""

    def __init__(self, said: Said):
        super().__init__(f"message {said.message + 1}: {said.key}")
        self.said = said


def all_said(
    messages: Sequence[Message], tokenizer: Tokenizer, variables: Mapping[str, Any], *, ask: bool
) -> tuple[list[Message], Form]:
    """The messages in a form of which the chat template leaves nothing out, and which form that is.

    Reasoning of earlier turns, which templates drop by design, may be missing. ask: for the generation prompt behind
    the last message. Raises Unsaid where something is left out, InputError where the template refuses every form.
    """
    probe = dumped(_Marker().conversation(messages))
    render = _renderer(tokenizer, variables)
    try:
        form = _cached_form(tokenizer, probe, dumped(tokenizer.variables | dict(variables)), ask)
    except Refused:
        # a template may refuse other words: then it is believed where it renders the real ones
        form = _first_form(messages, render, ask, replace=False)
    changed = _changed(messages, form.changes)
    wrong, _ = _lacks(changed, render, ask, replace=False)  # a template may look at words, too
    if wrong:
        raise Unsaid(wrong[0])
    return changed, form


def changes_text(
    name: str, messages: Sequence[Message], tokenizer: Tokenizer, variables: Mapping[str, Any]
) -> bool:
    """Whether some value of a variable of the template changes its rendering of such a conversation."""
    if name not in tokenizer.template_variables:
        return False
    probe = dumped(_Marker().conversation(messages))
    return _cached_change(tokenizer, name, probe, dumped(tokenizer.variables | dict(variables)))


@lru_cache(CACHED)
def _cached_form(tokenizer: Tokenizer, probe: str, variables: str, ask: bool) -> Form:
    return _first_form(json.loads(probe), _renderer(tokenizer, json.loads(variables)), ask, replace=True)


@lru_cache(CACHED)
def _cached_change(tokenizer: Tokenizer, name: str, probe: str, variables: str) -> bool:
    others = json.loads(variables)
    given = [others.pop(name)] if name in others else []
    for ask in (True, False):
        texts = set()
        for value in [*given, "zq", False, True, 1, ["zq"]]:
            try:
                texts.add(_renderer(tokenizer, others | {name: value})(json.loads(probe), ask))
            except Refused:
                texts.add("")
            if len(texts) > 1:
                return True
    return False


def dumped(value: Any) -> str:
    """The value as JSON, what JSON does not know as its repr. Raises InputError where it is nested too deeply."""
    try:
        return json.dumps(value, ensure_ascii=False, default=repr)
    except RecursionError as error:
        raise InputError("nested too deeply to be read") from error


def _renderer(tokenizer: Tokenizer, variables: Mapping[str, Any]) -> Render:
    def render(messages: list[Message], ask: bool) -> str:
        return tokenizer.render_chat(messages, add_generation_prompt=ask, **variables)

    return render


def _first_form(messages: Sequence[Message], render: Render, ask: bool, replace: bool) -> Form:
    """The first form in which nothing is missing. replace: look for other words than the messages' own."""
    refusal: Refused | None = None
    least: list[Said] = []  # what is missing from the form that lacks least
    for changes in product(*(range(_alternatives(messages, forms)) for forms in FORMS)):
        try:
            wrong, dropped = _lacks(_changed(messages, changes), render, ask, replace)
        except Refused as error:
            refusal = refusal or error
            continue
        if not wrong:
            return Form(changes, dropped, _unread(messages, changes, render, ask))
        least = wrong if not least or len(wrong) < len(least) else least
    if least:
        raise Unsaid(least[0])
    assert refusal is not None, "there is always one form"
    raise refusal


def _lacks(messages: Sequence[Message], render: Render, ask: bool, replace: bool) -> tuple[list[Said], int]:
    """What is missing from the rendering, and how many turns lose their reasoning by design. Raises InputError."""
    marker = _Marker(replace)
    probe = marker.conversation(messages)
    text = render(probe, ask)
    missing = [said for said in marker.said if not _stands(said, text)]
    dropped = [said for said in missing if _dropped_by_design(said, probe, render)]
    wrong = [said for said in missing if said not in dropped]
    if replace:  # these are no words of the messages' own
        wrong += [said for said in marker.python if said.word in text]
    wrong += _nulls_written(probe, text, render, ask)
    return wrong, len({said.message for said in dropped})


def _dropped_by_design(said: Said, probe: list[Message], render: Render) -> bool:
    """Whether a turn of the assistant loses this only because others follow."""
    turn, after = probe[said.message], probe[said.message + 1 :]
    if turn["role"] != "assistant" or not after:
        return False
    # gpt-oss takes what stands beside a call for its reasoning
    if (
        said.key not in REASONING
        and not said.in_tags
        and not (said.key == "content" and "tool_calls" in turn)
    ):
        return False
    if said.in_tags and any(message["role"] == "user" for message in after):
        return True
    try:
        return _stands(said, render(probe[: said.message + 1], False))
    except Refused:
        return False


def _nulls_written(probe: list[Message], text: str, render: Render, ask: bool) -> list[Said]:
    """The contents that are null, where the template writes them as Python's None."""
    nulls = [i for i, message in enumerate(probe) if message.get("content", "") is None]
    if not nulls or "None" not in text:
        return []
    try:
        without = render([_empty_content(message) for message in probe], ask)
    except Refused:
        return []
    return [Said(nulls[0], "content", "None")] if text.count("None") > without.count("None") else []


def _unread(
    messages: Sequence[Message], changes: tuple[int, ...], render: Render, ask: bool
) -> tuple[tuple[int, str], ...]:
    """The keys without which the text is the same, beside those that say something: as (message, path)."""
    places: dict[tuple[str, str], list[int]] = {}  # messages by role and path
    for i, message in enumerate(messages):
        for path in _further_paths(message):
            places.setdefault((message["role"], path), []).append(i)
    text = render(_changed(messages, changes), ask) if places else ""
    unread = []
    for (_, path), members in places.items():
        without = [_without(m, path.split(".")) if i in members else m for i, m in enumerate(messages)]
        try:
            same = render(_changed(without, changes), ask) == text
        except Refused:
            same = False
        unread += [(i, path) for i in members if same]
    return tuple(unread)


def _further_paths(message: Message) -> set[str]:
    paths = {key for key in message.keys() - {"role", "content", "tool_calls"} if not _says(message, key)}
    for call in message.get("tool_calls", []):
        inner = call.get("function", call)
        paths |= {f"tool_calls.{key}" for key in call.keys() - {"function", "name", "arguments", "type"}}
        if inner is not call:
            paths |= {f"tool_calls.function.{key}" for key in inner.keys() - {"name", "arguments"}}
    if is_parts(message.get("content")):
        paths |= {f"content.{key}" for part in message["content"] for key in part.keys() - {"type", "text"}}
    return paths


def _without(value: Any, path: Sequence[str]) -> Any:
    """A copy of an object, or of a list of them, without what stands at the path."""
    if isinstance(value, list):
        return [_without(item, path) for item in value]
    if len(path) == 1 or not isinstance(value, dict):
        return {key: field for key, field in value.items() if key != path[0]}
    return value | {path[0]: _without(value[path[0]], path[1:])} if path[0] in value else value


def _stands(said: Said, text: str) -> bool:
    if said.word in text:
        return True
    return not said.exact and any(json.dumps(said.word, ensure_ascii=x)[1:-1] in text for x in (False, True))


# ---- words that occur nowhere else


class _Marker:
    """Copies of messages with every word replaced. said: what has to be found; python: what must not be."""

    def __init__(self, replace: bool = True):
        self.replace, self.said, self.python = replace, [], []
        self.message, self.key, self.count = 0, "", 0

    def conversation(self, messages: Sequence[Message]) -> list[Message]:
        marked = []
        for self.message, message in enumerate(messages):
            copy = dict(message)
            for self.key in SAYING:
                if self.key in copy and _says(message, self.key):
                    copy[self.key] = self._value(copy[self.key])
            marked.append(copy)
        return marked

    def _value(self, value: Any) -> Any:
        if self.key == "tool_calls":
            return [self._call(call) for call in value]
        if isinstance(value, str):
            return self._words(value)
        if is_parts(value):
            parts = [part | {"text": self._words(part["text"])} for part in value]
            self._must_not_stand(*map(repr, parts), *map(dumped, parts))  # a template that takes no list
            return parts
        data = self._data(value)
        self._expect(dumped(data))  # as JSON
        return data

    def _word(self) -> str:
        self.count += 1
        return f"zq{self.count}x"

    def _expect(self, word: str, in_tags: bool = False) -> None:
        self.said.append(Said(self.message, self.key, word, in_tags))

    def _must_not_stand(self, *notations: str) -> None:
        self.python += [Said(self.message, self.key, notation) for notation in notations]

    def _words(self, text: str) -> str:
        """Tags stay, for templates look for them."""
        pieces = TAG.split(text)
        end = max((i for i, piece in enumerate(pieces) if piece == "</think>"), default=0)
        begin = max((i for i, piece in enumerate(pieces[:end]) if piece == "<think>"), default=0)
        for i, piece in enumerate(pieces):
            if i % 2 == 0 and piece.strip():
                word = self._word() if self.replace else piece.strip()
                self._expect(word, begin <= i < end)
                pieces[i] = piece.replace(piece.strip(), word)
        return "".join(pieces)

    def _call(self, call: Any) -> Any:
        """A tool call, with or without the object `function` around name and arguments."""
        inner = call.get("function", call)
        inner = inner | {"name": self._leaf(inner["name"])}
        arguments = inner.get("arguments")
        if isinstance(arguments, str) and isinstance(parsed := json_or_none(arguments), dict | list):
            expected = len(self.said)
            if self.replace:
                # a text with quotes in it, which are escaped where it is encoded twice
                data = self._data(parsed)
                inner["arguments"] = dumped(
                    [self._word(), data] if isinstance(data, list) or not data else data
                )
            del self.said[expected:]  # the text itself has to be found, without further quotes
            self.said.append(Said(self.message, self.key, inner["arguments"], exact=True))
        elif arguments is not None:
            inner["arguments"] = self._data(arguments)
        return call | {"function": inner} if "function" in call else inner

    def _data(self, value: Any) -> Any:
        """Objects and lists, which a template writes as JSON; Python's notation is that of one that expects text."""
        data = self._leaf(value)
        if isinstance(data, dict | list) and repr(data) != dumped(data):
            self._must_not_stand(repr(data))
        return data

    def _leaf(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {self._leaf(name): self._leaf(field) for name, field in value.items()}
        if isinstance(value, list):
            return [self._leaf(item) for item in value]
        if isinstance(value, bool) or value is None or (isinstance(value, str) and not value.strip()):
            return value
        if isinstance(value, int | float):
            self.count += 1
            value = (
                FIRST_NUMBER + self.count + (0.5 if isinstance(value, float) else 0)
                if self.replace
                else value
            )
            self._expect(dumped(value))
            return value
        self._expect(self._word() if self.replace else str(value).strip())
        return self.said[-1].word if self.replace else value


# ---- forms of the same message


def is_parts(content: Any) -> TypeGuard[list[dict[str, Any]]]:
    """Whether a content is a list of parts of text."""
    return isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content)


def _says(message: Message, key: str) -> bool:
    """Whether the key is one that says something; reasoning is text of the assistant."""
    if key in ("content", "tool_calls"):
        return message[key] is not None
    return key in SAYING and message["role"] == "assistant" and isinstance(message[key], str)


def json_or_none(text: str) -> Any:
    """What a text is as JSON, None where it is none."""
    try:
        return parse_json(text, "")
    except InputError:
        return None


def _joined(message: Message) -> Message:
    content = message.get("content")
    return message | {"content": "".join(p["text"] for p in content)} if is_parts(content) else message


def _wrapped(message: Message) -> Message:
    content = message.get("content")
    return message | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _written(message: Message) -> Message:
    """What a tool answers, as JSON text."""
    content = message.get("content")
    if isinstance(content, dict | list) and not is_parts(content):
        return message | {"content": dumped(content)}
    return message


def _null_content(message: Message) -> Message:
    return message | {"content": None} if "tool_calls" in message and not message.get("content") else message


def _without_content(message: Message) -> Message:
    if "tool_calls" not in message or message.get("content"):
        return message
    return {name: value for name, value in message.items() if name != "content"}


def _empty_content(message: Message) -> Message:
    return message | {"content": ""} if message.get("content") is None else message


def _arguments(change: Callable[[Any], Any]) -> Change:
    def changed(message: Message) -> Message:
        if "tool_calls" not in message:
            return message
        calls = []
        for call in message["tool_calls"]:
            inner = call.get("function", call)
            inner = inner | {"arguments": change(inner["arguments"])} if "arguments" in inner else inner
            calls.append(call | {"function": inner} if "function" in call else inner)
        return message | {"tool_calls": calls}

    return changed


def _parsed(arguments: Any) -> Any:
    value = json_or_none(arguments) if isinstance(arguments, str) else arguments
    return value if isinstance(value, dict | list) else arguments


def _dumped(arguments: Any) -> Any:
    return dumped(arguments) if isinstance(arguments, dict | list) else arguments


def _as_it_is(message: Message) -> Message:
    return message


FORMS: tuple[tuple[Change, ...], ...] = (
    (_as_it_is, _joined, _wrapped),  # content in parts, or a text
    (_as_it_is, _written),  # a tool's answer that is no text
    (_as_it_is, _null_content, _without_content, _empty_content),  # beside tool calls
    (_as_it_is, _arguments(_parsed), _arguments(_dumped)),  # a call's arguments, an object or JSON text
)


def _alternatives(messages: Sequence[Message], forms: tuple[Change, ...]) -> int:
    """How many of the forms there are to try: one where the others would change nothing."""
    changes = any(form(message) != message for form in forms[1:] for message in messages)
    return len(forms) if changes else 1


def _changed(messages: Sequence[Message], changes: tuple[int, ...]) -> list[Message]:
    form = [dict(message) for message in messages]
    for which, forms in zip(changes, FORMS, strict=True):
        form = [forms[which](message) for message in form]
    return form
