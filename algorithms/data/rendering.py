"""A check that a chat template renders every part of a conversation.

A template may leave out a whole turn (with an unknown role), a key (tool calls, reasoning), or all calls but the first.
It may also drop unexpected content, or render it in Python's own notation. So each conversation is rendered once with
every word replaced by a unique marker. Tags like </think> stay in place. Each marker must occur in the rendered text.
Conversations that differ only in their words are checked once.

A message can be written in several forms (FORMS), such as its content as a text or as a list of parts. Training uses
the first form that is rendered completely. The row's own form is tried first, so transformers' apply_chat_template
gives the same text for any row that it renders completely.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from ...model.errors import InputError
from ...model.text.refusals import Refused
from ...model.text.tokenizer import Message, Tokenizer
from .forms import FORMS, changed, content_empty, dumped, is_parts, json_or_none, num_forms

REASONING = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "analysis")
# keys of a message, beside its role, that the rendered text must contain
CONTENT_KEYS = ("content", "tool_calls", "tool_plan", "refusal", *REASONING)
TAG = re.compile(r"(</?[^\W\d][\w-]{0,40}>|<[|｜][^<>\s]{1,40}>)")  # </think>, <|channel|>
FIRST_NUMBER = 70_000_001
CACHED = 1024  # results kept; conversations with the same roles, keys and tags share one

Render = Callable[[list[Message], bool], str]


class Mark(NamedTuple):
    """A text that the rendered conversation must contain, with the message index and key that it stands under."""

    message: int
    key: str
    text: str
    in_tags: bool = False  # between <think> and </think>
    exact: bool = False  # must occur unescaped; otherwise JSON escapes are accepted, too


class Form(NamedTuple):
    """A form of a conversation's messages, and the parts that the template does not render.

    changes: for each entry of FORMS, the index of the change that was made. dropped: the number of turns whose
    reasoning is not rendered because other turns follow. unread: keys that do not affect the text, as (message
    index, path).
    """

    changes: tuple[int, ...]
    dropped: int = 0
    unread: tuple[tuple[int, str], ...] = ()


class NotRendered(InputError):
    """The error for a part of a conversation that the template leaves out in every form. `mark` names the part."""

    def __init__(self, mark: Mark):
        super().__init__(f"message {mark.message + 1}: {mark.key}")
        self.mark = mark


def whole_form(
    messages: Sequence[Message], tokenizer: Tokenizer, variables: Mapping[str, Any], *, ask: bool
) -> tuple[list[Message], Form]:
    """Return (messages, form): the messages in the first form that the chat template renders completely.

    Reasoning of earlier turns may be missing, because templates drop it by design. ask: add the generation prompt after
    the last message. Raises NotRendered if every form loses something, and InputError if the template refuses every
    form.
    """
    probe = dumped(_Marker().conversation(messages))
    render = _renderer(tokenizer, variables)
    try:
        form = _cached_form(tokenizer, probe, dumped(tokenizer.variables | dict(variables)), ask)
    except Refused:
        # a template may refuse the markers: then check with the real words
        form = _first_form(messages, render, ask, replace=False)

    # a template may also depend on the words, so check the real ones
    whole = changed(messages, form.changes)
    wrong, _ = _missing(whole, render, ask, replace=False)
    if wrong:
        raise NotRendered(wrong[0])
    return whole, form


def changes_text(
    name: str, messages: Sequence[Message], tokenizer: Tokenizer, variables: Mapping[str, Any]
) -> bool:
    """Return whether any value of the template variable `name` changes how the messages are rendered."""
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


def _renderer(tokenizer: Tokenizer, variables: Mapping[str, Any]) -> Render:
    def render(messages: list[Message], ask: bool) -> str:
        return tokenizer.render_chat(messages, add_generation_prompt=ask, **variables)

    return render


def _first_form(messages: Sequence[Message], render: Render, ask: bool, replace: bool) -> Form:
    """Return the first form that is rendered completely. replace: check with markers instead of the real words.

    Raises NotRendered if every form loses something, and Refused if the template refuses every form.
    """
    refusal: Refused | None = None
    fewest: list[Mark] = []  # the missing parts of the form that loses the fewest
    for changes in product(*(range(num_forms(messages, forms)) for forms in FORMS)):
        try:
            wrong, dropped = _missing(changed(messages, changes), render, ask, replace)
        except Refused as error:
            refusal = refusal or error
            continue
        if not wrong:
            return Form(changes, dropped, _unread(messages, changes, render, ask))
        fewest = wrong if not fewest or len(wrong) < len(fewest) else fewest

    if fewest:
        raise NotRendered(fewest[0])
    assert refusal is not None, "there is always one form"
    raise refusal


def _missing(messages: Sequence[Message], render: Render, ask: bool, replace: bool) -> tuple[list[Mark], int]:
    """Return (marks of parts that are lost or written wrongly, number of turns whose reasoning is dropped by design).

    Raises Refused if the template refuses the messages.
    """
    marker = _Marker(replace)
    probe = marker.conversation(messages)
    text = render(probe, ask)
    missing = [mark for mark in marker.marks if not _is_found(mark, text)]
    dropped = [mark for mark in missing if _is_dropped_by_design(mark, probe, render)]

    wrong = [mark for mark in missing if mark not in dropped]
    if replace:  # real words may contain Python's notation themselves
        wrong += [mark for mark in marker.python if mark.text in text]
    wrong += _nulls_written(probe, text, render, ask)
    return wrong, len({mark.message for mark in dropped})


def _is_dropped_by_design(mark: Mark, probe: list[Message], render: Render) -> bool:
    """Return whether the template drops this part of an assistant turn only because other turns follow."""
    turn, after = probe[mark.message], probe[mark.message + 1 :]
    if turn["role"] != "assistant" or not after:
        return False

    # gpt-oss treats the content beside a call as reasoning
    beside_a_call = mark.key == "content" and "tool_calls" in turn
    if mark.key not in REASONING and not mark.in_tags and not beside_a_call:
        return False
    if mark.in_tags and any(message["role"] == "user" for message in after):
        return True
    try:
        return _is_found(mark, render(probe[: mark.message + 1], False))
    except Refused:
        return False


def _nulls_written(probe: list[Message], text: str, render: Render, ask: bool) -> list[Mark]:
    """Return [mark] of the first null content if the template writes null contents as "None", otherwise []."""
    nulls = [i for i, message in enumerate(probe) if message.get("content", "") is None]
    if not nulls or "None" not in text:
        return []
    try:
        without = render([content_empty(message) for message in probe], ask)
    except Refused:
        return []
    return [Mark(nulls[0], "content", "None")] if text.count("None") > without.count("None") else []


def _unread(
    messages: Sequence[Message], changes: tuple[int, ...], render: Render, ask: bool
) -> tuple[tuple[int, str], ...]:
    """Return the keys outside CONTENT_KEYS that do not affect the text, as (message index, path)."""
    places: dict[tuple[str, str], list[int]] = {}  # indices of messages, by role and path
    for i, message in enumerate(messages):
        for path in _other_paths(message):
            places.setdefault((message["role"], path), []).append(i)

    text = render(changed(messages, changes), ask) if places else ""
    unread = []
    for (_, path), members in places.items():
        without = [_without(m, path.split(".")) if i in members else m for i, m in enumerate(messages)]
        try:
            same = render(changed(without, changes), ask) == text
        except Refused:
            same = False
        unread += [(i, path) for i in members if same]
    return tuple(unread)


def _other_paths(message: Message) -> set[str]:
    paths = {
        key for key in message.keys() - {"role", "content", "tool_calls"} if not _has_content(message, key)
    }
    for call in message.get("tool_calls", []):
        inner = call.get("function", call)
        paths |= {f"tool_calls.{key}" for key in call.keys() - {"function", "name", "arguments", "type"}}
        if inner is not call:
            paths |= {f"tool_calls.function.{key}" for key in inner.keys() - {"name", "arguments"}}
    if is_parts(message.get("content")):
        paths |= {f"content.{key}" for part in message["content"] for key in part.keys() - {"type", "text"}}
    return paths


def _without(value: Any, path: Sequence[str]) -> Any:
    """Return a copy of an object, or of a list of objects, without the field at the path."""
    if isinstance(value, list):
        return [_without(item, path) for item in value]
    if len(path) == 1 or not isinstance(value, dict):
        return {key: field for key, field in value.items() if key != path[0]}
    return value | {path[0]: _without(value[path[0]], path[1:])} if path[0] in value else value


def _is_found(mark: Mark, text: str) -> bool:
    if mark.text in text:
        return True
    escaped = (json.dumps(mark.text, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
    return not mark.exact and any(form in text for form in escaped)


# ---- unique markers


class _Marker:
    """A builder of copies of messages in which every word is replaced by a unique marker.

    marks: texts that the rendering must contain. python: texts in Python's notation that the rendering must not
    contain.
    """

    def __init__(self, replace: bool = True):
        self.replace, self.marks, self.python = replace, [], []
        self.message, self.key, self.count = 0, "", 0

    def conversation(self, messages: Sequence[Message]) -> list[Message]:
        marked = []
        for self.message, message in enumerate(messages):
            copy = dict(message)
            for self.key in CONTENT_KEYS:
                if self.key in copy and _has_content(message, self.key):
                    copy[self.key] = self._value(copy[self.key])
            marked.append(copy)
        return marked

    def _value(self, value: Any) -> Any:
        if self.key == "tool_calls":
            return [self._call(call) for call in value]
        if isinstance(value, str):
            return self._text(value)
        if is_parts(value):
            parts = [part | {"text": self._text(part["text"])} for part in value]
            self._forbid(*map(repr, parts), *map(dumped, parts))  # written by a template that expects a text
            return parts
        data = self._data(value)
        self._add_mark(dumped(data))  # as JSON
        return data

    def _word(self) -> str:
        self.count += 1
        return f"zq{self.count}x"

    def _add_mark(self, text: str, in_tags: bool = False) -> None:
        self.marks.append(Mark(self.message, self.key, text, in_tags))

    def _forbid(self, *notations: str) -> None:
        self.python += [Mark(self.message, self.key, notation) for notation in notations]

    def _text(self, text: str) -> str:
        """Return the text with its words replaced. Tags stay, because templates search for them."""
        pieces = TAG.split(text)
        end = max((i for i, piece in enumerate(pieces) if piece == "</think>"), default=0)
        begin = max((i for i, piece in enumerate(pieces[:end]) if piece == "<think>"), default=0)
        for i, piece in enumerate(pieces):
            if i % 2 == 0 and piece.strip():
                word = self._word() if self.replace else piece.strip()
                self._add_mark(word, begin <= i < end)
                pieces[i] = piece.replace(piece.strip(), word)
        return "".join(pieces)

    def _call(self, call: Any) -> Any:
        """Return a marked copy of a tool call, with or without an object `function` around name and arguments."""
        inner = call.get("function", call)
        inner = inner | {"name": self._leaf(inner["name"])}
        arguments = inner.get("arguments")
        if isinstance(arguments, str) and isinstance(parsed := json_or_none(arguments), dict | list):
            count = len(self.marks)
            if self.replace:
                # a text with quotes in it: encoding it twice would escape them
                data = self._data(parsed)
                is_bare = isinstance(data, list) or not data
                inner["arguments"] = dumped([self._word(), data] if is_bare else data)
            del self.marks[count:]  # the whole text must be found, without escaped quotes
            self.marks.append(Mark(self.message, self.key, inner["arguments"], exact=True))
        elif arguments is not None:
            inner["arguments"] = self._data(arguments)
        return call | {"function": inner} if "function" in call else inner

    def _data(self, value: Any) -> Any:
        """Return a marked copy of an object or list. Only JSON is accepted as its rendering, not Python's notation."""
        data = self._leaf(value)
        if isinstance(data, dict | list) and repr(data) != dumped(data):
            self._forbid(repr(data))
        return data

    def _leaf(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {self._leaf(name): self._leaf(field) for name, field in value.items()}
        if isinstance(value, list):
            return [self._leaf(item) for item in value]
        if isinstance(value, bool) or value is None or (isinstance(value, str) and not value.strip()):
            return value

        # a number or a word
        if isinstance(value, int | float):
            self.count += 1
            half = 0.5 if isinstance(value, float) else 0
            value = FIRST_NUMBER + self.count + half if self.replace else value
            self._add_mark(dumped(value))
            return value
        self._add_mark(self._word() if self.replace else str(value).strip())
        return self.marks[-1].text if self.replace else value


def _has_content(message: Message, key: str) -> bool:
    """Return whether a message has content under the key. Reasoning counts only if it is an assistant's text."""
    if key in ("content", "tool_calls"):
        return message[key] is not None
    return key in CONTENT_KEYS and message["role"] == "assistant" and isinstance(message[key], str)
