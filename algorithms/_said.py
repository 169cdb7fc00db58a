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

from ..model.errors import InputError
from ..model.tokenizer import Message, Tokenizer

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
    """How messages are to be changed, and how many turns lose their reasoning to later ones."""

    changes: tuple[int, ...]  # one for each of FORMS
    left_out: int = 0


class Unsaid(InputError):
    """Something that the template leaves out of every form in which it renders the conversation."""

    def __init__(self, said: Said):
        super().__init__(f"message {said.message + 1}: {said.key}")
        self.said = said


def all_said(
    messages: Sequence[Message], tokenizer: Tokenizer, variables: Mapping[str, Any], *, ask: bool
) -> tuple[list[Message], int]:
    """The messages in a form of which the chat template leaves nothing out, and how many turns lose their reasoning.

    Reasoning of earlier turns, which templates drop by design, may be missing. ask: for the generation prompt behind
    the last message. Raises Unsaid where something is left out, InputError where the template refuses every form.
    """
    probe = json.dumps(_Marker().conversation(messages), default=repr)
    render = _renderer(tokenizer, variables)
    try:
        form = _cached_form(tokenizer, probe, json.dumps(dict(variables), default=repr), ask)
    except Unsaid:
        raise
    except (
        InputError
    ):  # a template may refuse other words: then it is believed where it renders the real ones
        form = _first_form(messages, render, ask, replace=False)
    changed = _changed(messages, form.changes)
    wrong, _ = _lacks(changed, render, ask, replace=False)  # a template may look at words, too
    if wrong:
        raise Unsaid(wrong[0])
    return changed, form.left_out


@lru_cache(CACHED)
def _cached_form(tokenizer: Tokenizer, probe: str, variables: str, ask: bool) -> Form:
    return _first_form(json.loads(probe), _renderer(tokenizer, json.loads(variables)), ask, replace=True)


def _renderer(tokenizer: Tokenizer, variables: Mapping[str, Any]) -> Render:
    def render(messages: list[Message], ask: bool) -> str:
        return tokenizer.render_chat(messages, add_generation_prompt=ask, **variables)

    return render


def _first_form(messages: Sequence[Message], render: Render, ask: bool, replace: bool) -> Form:
    """The first form in which nothing is missing. replace: look for other words than the messages' own."""
    refusal: InputError | None = None
    least: list[Said] = []  # what is missing from the form that lacks least
    for changes in product(*(range(_alternatives(messages, forms)) for forms in FORMS)):
        try:
            wrong, dropped = _lacks(_changed(messages, changes), render, ask, replace)
        except InputError as error:
            refusal = refusal or error
            continue
        if not wrong:
            return Form(changes, dropped)
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
    wrong += [said for said in marker.python if said.word in text]
    wrong += _nulls_written(probe, text, render, ask)
    return wrong, len({said.message for said in dropped})


def _dropped_by_design(said: Said, probe: list[Message], render: Render) -> bool:
    """Whether a turn of the assistant loses this only because others follow."""
    after = probe[said.message + 1 :]
    if probe[said.message]["role"] != "assistant" or not after:
        return False
    if said.in_tags and any(message["role"] == "user" for message in after):
        return True
    try:
        return _stands(said, render(probe[: said.message + 1], False))
    except InputError:
        return False


def _nulls_written(probe: list[Message], text: str, render: Render, ask: bool) -> list[Said]:
    """The contents that are null, where the template writes them as Python's None."""
    nulls = [i for i, message in enumerate(probe) if message.get("content", "") is None]
    if not nulls or "None" not in text:
        return []
    try:
        without = render([_empty_content(message) for message in probe], ask)
    except InputError:
        return []
    return [Said(nulls[0], "content", "None")] if text.count("None") > without.count("None") else []


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
                if copy.get(self.key) is not None:
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
            self._must_not_stand(*map(repr, parts), *map(json.dumps, parts))  # a template that takes no list
            return parts
        return self._data(value)

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
        if isinstance(arguments, str) and isinstance(parsed := parse_object(arguments), dict):
            expected = len(self.said)
            inner["arguments"] = json.dumps(self._data(parsed)) if self.replace else arguments
            del self.said[expected:]  # the text itself has to be found, without further quotes
            if parsed:
                self.said.append(Said(self.message, self.key, inner["arguments"], exact=True))
        elif arguments is not None:
            inner["arguments"] = self._data(arguments)
        return call | {"function": inner} if "function" in call else inner

    def _data(self, value: Any) -> Any:
        """Objects and lists, which a template writes as JSON; Python's notation is that of one that expects text."""
        data = self._leaf(value)
        if isinstance(data, dict | list) and repr(data) != json.dumps(data):
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
            self._expect(json.dumps(value))
            return value
        self._expect(self._word() if self.replace else str(value).strip())
        return self.said[-1].word if self.replace else value


# ---- forms of the same message


def is_parts(content: Any) -> TypeGuard[list[dict[str, Any]]]:
    """Whether a content is a list of parts of text."""
    return isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content)


def parse_object(text: str) -> Any:
    """What a text is as JSON, None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _joined(message: Message) -> Message:
    content = message.get("content")
    return message | {"content": "".join(p["text"] for p in content)} if is_parts(content) else message


def _wrapped(message: Message) -> Message:
    content = message.get("content")
    return message | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _without_content(message: Message) -> Message:
    if message.get("content", "") is not None:
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
    value = parse_object(arguments) if isinstance(arguments, str) else arguments
    return value if isinstance(value, dict) else arguments


def _dumped(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _as_it_is(message: Message) -> Message:
    return message


FORMS: tuple[tuple[Change, ...], ...] = (
    (_as_it_is, _joined, _wrapped),  # content in parts, or a text
    (_as_it_is, _without_content, _empty_content),  # content that is null or absent, beside tool calls
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
