"""Turns of a row -> a conversation as the chat template reads it, with everything that the row says about it.

What is read, beside `role` and `content`, in the words of those who publish such rows:

    from, value                      ShareGPT's; function_call is a call of the assistant, observation a tool's answer
    tool_calls; function_call        OpenAI's, and its older name; arguments are an object or JSON text
    weight: 0, train: false          a turn of the assistant that is context, and not trained
    tools or functions               columns: a list, or JSON text
    chat_template_kwargs             a column: variables of the template, an object or JSON text
    system; history                  columns: what stands in front of the turns; pairs of question and answer

A null of a message, a call or a part is absent. `rendering.py` proves that the template renders messages whole.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...model.errors import InputError
from ...model.files.text_files import check_json, parse_json
from ...model.text.template import OWN_NAMES
from ...model.text.tokenizer import Message, Tokenizer
from .forms import is_parts, json_or_none
from .rendering import REASONING, NotRendered, changes_text, whole_form
from .row import Row

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
# roles that need no explanation where nothing is trained
NOT_TRAINED = ("system", "developer", "user", "tool")
FLAGS = ("weight", "train")  # of a turn: what the loss reads


class Turn(dict[str, Any]):
    """A message that knows its column and number, for errors."""

    where = ""
    column = ""


@dataclass(frozen=True)
class Talk:
    """A conversation for the chat template. Turns by index, from 0."""

    messages: list[Message]
    variables: dict[str, Any]
    given: int = 0  # the turns before this one are the prompt
    trained: list[int] = field(default_factory=list)  # of the assistant's turns behind it
    left_out: list[int] = field(default_factory=list)  # those of weight 0

    def ids(self, tokenizer: Tokenizer, end: int | None = None) -> list[int]:
        """Ids of the messages before `end`, with the generation prompt."""
        return tokenizer.encode_chat(self.messages[:end], add_generation_prompt=True, **self.variables)


def talk_of(row: Row, turns: Sequence[Turn], tokenizer: Tokenizer, given: int = 0) -> Talk:
    """All turns from `given` on may be trained.

    Raises InputError naming the message and the key that the chat template leaves out.
    """
    trained: list[int] = []
    left_out: list[int] = []
    variables = template_variables(row, tokenizer)

    # which turns are trained
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant" or i < given:
            _note_flags(row, turn)
        elif not _is_trained(turn):
            row.notes["turns that are not trained (weight 0, train false)"] += 1
            left_out.append(i)
        elif not says_something(turn):
            row.notes["turns of the assistant without text"] += 1
        else:
            trained.append(i)

    if not trained:
        return Talk([], variables)
    messages = _rendered(row, turns, tokenizer, variables, ask=False)
    return Talk(messages, variables, given, trained, left_out)


def prompt_of(row: Row, turns: Sequence[Turn], tokenizer: Tokenizer) -> Talk:
    """A conversation that is to be answered: no turn is trained."""
    for turn in turns:
        _note_flags(row, turn)
    variables = template_variables(row, tokenizer)
    return Talk(_rendered(row, turns, tokenizer, variables, ask=True), variables)


def _rendered(
    row: Row, turns: Sequence[Turn], tokenizer: Tokenizer, variables: dict[str, Any], ask: bool
) -> list[Message]:
    """The messages in the form that the template renders whole; what it does not read is noted with the row."""
    messages = [{key: value for key, value in turn.items() if key not in FLAGS} for turn in turns]
    try:
        messages, form = whole_form(messages, tokenizer, variables, ask=ask)
    except NotRendered as error:
        turn = turns[error.mark.message]
        raise InputError(
            f"{turn.where} (role '{turn['role']}'): {error.mark.key}: the chat template leaves it out; "
            "use one that renders it (--chat-template), or take it out of the row"
        ) from error
    except RecursionError as error:
        raise InputError(f"{turns[0].column}: nested too deeply to be read") from error

    # the row's account
    if form.dropped:
        row.notes["turns whose reasoning the chat template drops, as others follow"] += form.dropped
    row.ignored |= {f"{turns[i].column}.{path}" for i, path in form.unread}
    for name in (tokenizer.variables | variables).keys() - {"tools"}:
        if changes_text(name, messages, tokenizer, variables):
            row.read_variables.add(name)
        elif name in variables:
            row.ignored.add(f"chat_template_kwargs.{name}")
    return messages


def _note_flags(row: Row, turn: Turn) -> None:
    """Weights are read of the assistant's turns alone: name them where they would train something else."""
    row.ignored |= {f"{turn.column}.{name} of '{turn['role']}'" for name in FLAGS if turn.get(name)}


def _is_trained(turn: Turn) -> bool:
    return bool(turn.get("weight", 1)) and bool(turn.get("train", True))


def _text(turn: Message) -> Any:
    """The content, its parts joined."""
    content = turn.get("content")
    return "".join(part["text"] for part in content) if is_parts(content) else content


def same_turn(one: Message, other: Message) -> bool:
    """Whether two turns say the same: what else is written beside them is no part of it."""
    texts = [text.strip() if isinstance(text, str) else text for text in map(_text, (one, other))]
    calls = [turn.get("tool_calls") for turn in (one, other)]
    return one["role"] == other["role"] and texts[0] == texts[1] and calls[0] == calls[1]


def says_something(turn: Message) -> bool:
    """Whether there is anything in a turn of the assistant."""
    content = _text(turn)
    texts = [content, *(turn.get(key) for key in REASONING)]
    return bool(turn.get("tool_calls")) or any(
        text.strip() if isinstance(text, str) else text for text in texts
    )


# ---- messages


def read_messages(row: Row, column: str) -> list[Turn]:
    """Messages as templates know them. Raises InputError naming the message and the key that is not as it should be."""
    return messages_in(row.take(column), column)


def messages_in(values: Any, column: str) -> list[Turn]:
    if not isinstance(values, list):
        raise InputError(f"{column}: expected a list of messages, got {values!r:.60}")
    turns = []
    for i, value in enumerate(values):
        where = f"{column}, message {i + 1}"
        turn = Turn(_message(value, where))
        turn.where, turn.column = where, column
        turns.append(turn)
    check_json(values, column)
    return turns


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object with a role and content, got {value!r:.60}")
    message = {name: field for name, field in value.items() if field is not None}
    if "from" in value and "value" in value and "role" not in message:
        message = _from_sharegpt(message, where)
    if not isinstance(message.get("role"), str):
        raise InputError(f"{where}: expected an object with a role and content, got {value!r:.60}")

    # role, calls and flags
    message = _with_calls(message, where)
    if message["role"] == "function":
        message["role"] = "tool"
    if message["role"] == "assistant":
        _check_flags(message, where)

    # content
    if "content" in message:
        message["content"] = _content(message["content"], message["role"], where)
    elif not says_something(message):
        got = "null" if "content" in value or "value" in value else "none"
        raise InputError(f"{where}: content: expected text, got {got}")
    elif "content" in value:
        message["content"] = None
    return message


def _check_flags(message: Message, where: str) -> None:
    if message.get("weight", 1) not in (0, 1):
        raise InputError(f"{where}: weight: expected 0 or 1, got {message['weight']!r:.60}")
    if message.get("train", True) not in (False, True):
        raise InputError(f"{where}: train: expected true or false, got {message['train']!r:.60}")


def _from_sharegpt(message: Message, where: str) -> Message:
    role = message.pop("from", None)
    if not isinstance(role, str) or role not in SHAREGPT_ROLES:
        known = ", ".join(SHAREGPT_ROLES)
        raise InputError(f"{where}: unknown 'from' {role!r:.60}; known are {known}")
    content = message.pop("value", None)
    if "content" in message:
        raise InputError(f"{where}: expected 'value' or 'content', got both")

    message = {"role": SHAREGPT_ROLES[role], "content": content} | message
    if role == "function_call":
        calls = json_or_none(content) if isinstance(content, str) else content
        calls = calls if isinstance(calls, list) else [calls]
        if not all(isinstance(call, dict) and "name" in call for call in calls):
            raise InputError(
                f"{where}: function_call: expected JSON of a name and arguments, got {content!r:.60}"
            )
        message["content"] = ""
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return {name: field for name, field in message.items() if field is not None}


def _with_calls(message: Message, where: str) -> Message:
    """The message with its calls under tool_calls, where it has some; function_call is the older name for one."""
    calls = message.get("tool_calls", [])
    if "function_call" in message:
        if calls:
            raise InputError(f"{where}: expected 'tool_calls' or 'function_call', got both")
        calls = [{"type": "function", "function": message["function_call"]}]
    if not isinstance(calls, list):
        raise InputError(f"{where}: tool_calls: expected a list of calls, got {calls!r:.60}")
    message = {key: value for key, value in message.items() if key not in ("tool_calls", "function_call")}
    return message | {"tool_calls": [_call(call, where) for call in calls]} if calls else message


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call without nulls; one without arguments has an empty object of them."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise InputError(f"{where}: tool_calls: expected a name and arguments, got {call!r:.60}")
    found = {name: field for name, field in inner.items() if field is not None}
    arguments = found.get("arguments", {})
    found["arguments"] = {} if isinstance(arguments, str) and not arguments.strip() else arguments
    if inner is call:
        return found
    return {name: field for name, field in call.items() if field is not None} | {"function": found}


def _content(content: Any, role: str, where: str) -> Any:
    """Text, a list of text parts, or of a tool whatever JSON holds."""
    if isinstance(content, str):
        return content
    if role == "tool" and not (content and is_parts(content)):
        return content if content and isinstance(content, dict | list) else json.dumps(content)
    parts = content if isinstance(content, list) else [None]
    if all(isinstance(part, str) or (isinstance(part, dict) and "type" in part) for part in parts):
        return [_part(part, f"{where}: content, part {i + 1}") for i, part in enumerate(parts)]
    raise InputError(f"{where}: content: expected text, got {content!r:.60}")


def _part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if part["type"] != "text":
        raise InputError(
            f"{where}: expected type 'text', which alone can be trained, got {part['type']!r:.60}"
        )
    if not isinstance(part.get("text"), str):
        raise InputError(f"{where}: expected text, got {part.get('text')!r:.60}")
    return {name: field for name, field in part.items() if field is not None}


def no_assistant(turns: Sequence[Turn]) -> None:
    """Raises InputError where nothing of a conversation is trained because of a role that means nothing here."""
    if any(turn["role"] == "assistant" for turn in turns):
        return
    for turn in turns:
        if turn["role"] not in NOT_TRAINED:
            raise InputError(
                f"{turn.where}: role {turn['role']!r:.60}: no turn here is the assistant's: expected role "
                "'assistant' for what is to be trained"
            )


# ---- what stands beside the messages


def with_system(row: Row, turns: list[Turn]) -> list[Turn]:
    """The turns behind the column `system`, where the row has one."""
    if not isinstance(row.get("system"), str) or not turns:
        return turns
    system = row.text("system")
    if not system.strip():
        return turns
    if turns[0]["role"] in ("system", "developer"):
        if turns[0].get("content") == system:
            return turns
        raise InputError(f"system: {turns[0].where} is a system message, too: expected one of the two")
    return [_made("system", system, "system"), *turns]


def asked(row: Row, question: str, column: str) -> list[Turn]:
    """A question as the user's turn, behind the column `history`."""
    return [*_history(row), _made("user", question, column)]


def answered(answer: str, column: str) -> Turn:
    return _made("assistant", answer, column)


def _made(role: str, content: str, column: str) -> Turn:
    turn = Turn(role=role, content=content)
    turn.where = turn.column = column
    return turn


def _history(row: Row) -> list[Turn]:
    """Earlier questions and answers: pairs of texts, as LLaMA-Factory's rows have them, or messages."""
    if "history" not in row or not (history := row.take("history")):
        return []
    if isinstance(history, list) and all(isinstance(turn, dict) for turn in history):
        return messages_in(history, "history")
    turns: list[Turn] = []
    for pair in history if isinstance(history, list) else [history]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise InputError(f"history: expected pairs of a question and its answer, got {pair!r:.60}")
        turns += [_made("user", pair[0], "history"), _made("assistant", pair[1], "history")]
    return turns


def template_variables(row: Row, tokenizer: Tokenizer) -> dict[str, Any]:
    """Variables of the chat template that the row gives it: its tools, and its chat_template_kwargs."""
    row.rendered = True
    variables = _keywords(row)
    column = "tools" if "tools" in row else "functions" if isinstance(row.get("functions"), list) else None
    if column and "tools" in tokenizer.template_variables:
        variables["tools"] = _tools(row.take(column), column)
    return variables


def _tools(cell: Any, column: str) -> list[Any] | None:
    tools = from_json(cell, column)
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise InputError(f"{column}: expected a list of tools, or JSON text of one, got {tools!r:.60}")
    tools = [from_json(tool, column) for tool in tools]
    if column == "tools":
        return tools
    bare = [isinstance(tool, dict) and "function" not in tool for tool in tools]
    return [
        {"type": "function", "function": t} if is_bare else t for t, is_bare in zip(tools, bare, strict=True)
    ]


def _keywords(row: Row) -> dict[str, Any]:
    column = "chat_template_kwargs"
    if column not in row:
        return {}
    variables = from_json(row.take(column), column)
    if not isinstance(variables, dict | None):
        raise InputError(f"{column}: expected an object, or JSON text of one, got {variables!r:.60}")
    check_names(variables or {}, column)
    return dict(variables or {})


def check_names(variables: dict[str, Any], source: str) -> None:
    """Raises InputError for a variable that is set otherwise."""
    for name in variables:
        if name in OWN_NAMES or name == "tools":
            raise InputError(
                f"{source}: '{name}' is not set here: tools have a column, the rest is Burnish's own"
            )


def from_json(value: Any, column: str) -> Any:
    """The value of a JSON text, None of an empty one; what is no text is itself."""
    if not isinstance(value, str):
        return check_json(value, column)
    if not value.strip():
        return None
    try:
        return check_json(parse_json(value, column), column)
    except InputError as error:
        raise InputError(f"{error}; it begins {value[:60]!r}") from None
