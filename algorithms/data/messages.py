"""Conversion of a row's messages to a conversation that the chat template can render.

These keys and columns are read beside `role` and `content`:

    from, value                      ShareGPT's keys; function_call is the assistant's call, observation a tool's answer
    tool_calls; function_call        OpenAI's key and its older name; arguments are an object or JSON text
    weight: 0, train: false          marks of an assistant turn that is context and is not trained
    tools or functions               columns of tools: a list or JSON text
    chat_template_kwargs             a column of template variables: an object or JSON text
    system; history                  columns: a system message; earlier pairs of question and answer

A null field of a message, a call or a part counts as absent. `rendering.py` checks that the template loses nothing.
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
# roles that a conversation without trained turns may have
NOT_TRAINED = ("system", "developer", "user", "tool")
FLAGS = ("weight", "train")  # keys of a turn that say whether it is trained


class Turn(dict[str, Any]):
    """A message that also holds the name of its column and its number in that column, for error messages."""

    where = ""
    column = ""


@dataclass(frozen=True)
class Talk:
    """A conversation for the chat template. Turns are numbered from 0."""

    messages: list[Message]
    variables: dict[str, Any]
    given: int = 0  # the number of turns at the start that are the prompt
    trained: list[int] = field(default_factory=list)  # the assistant turns that are trained
    left_out: list[int] = field(default_factory=list)  # the assistant turns with weight 0

    def ids(self, tokenizer: Tokenizer, end: int | None = None) -> list[int]:
        """Return the token ids of the messages before index `end` (default: all), followed by the generation prompt."""
        return tokenizer.encode_chat(self.messages[:end], add_generation_prompt=True, **self.variables)


def talk_of(row: Row, turns: Sequence[Turn], tokenizer: Tokenizer, given: int = 0) -> Talk:
    """Build a conversation from a row's turns. The assistant turns from index `given` on are trained.

    Turns with weight 0 or train false, and turns without content, are not trained. Raises InputError naming the message
    and the key that the chat template leaves out.
    """
    trained: list[int] = []
    left_out: list[int] = []
    variables = template_variables(row, tokenizer)

    # find the turns that are trained
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
    """Build a conversation that the model is to answer. None of its turns is trained."""
    for turn in turns:
        _note_flags(row, turn)
    variables = template_variables(row, tokenizer)
    return Talk(_rendered(row, turns, tokenizer, variables, ask=True), variables)


def _rendered(
    row: Row, turns: Sequence[Turn], tokenizer: Tokenizer, variables: dict[str, Any], ask: bool
) -> list[Message]:
    """Return the messages in a form that the chat template renders completely.

    The row records the keys and variables that the template does not read. ask: add the generation prompt.
    """
    messages = [{key: value for key, value in turn.items() if key not in FLAGS} for turn in turns]
    try:
        messages, form = whole_form(messages, tokenizer, variables, ask=ask)
    except NotRendered as error:
        turn = turns[error.mark.message]
        raise InputError(
            f"{turn.where} (role '{turn['role']}'): {error.mark.key}: the chat template leaves it out; "
            "use a template that renders it (--chat-template), or take it out of the row"
        ) from error
    except RecursionError as error:
        raise InputError(f"{turns[0].column}: nested too deeply to be read") from error

    # note in the row what was read and what was not
    if form.dropped:
        row.notes["turns whose reasoning the chat template drops, because other turns follow"] += form.dropped
    row.ignored |= {f"{turns[i].column}.{path}" for i, path in form.unread}
    for name in (tokenizer.variables | variables).keys() - {"tools"}:
        if changes_text(name, messages, tokenizer, variables):
            row.read_variables.add(name)
        elif name in variables:
            row.ignored.add(f"chat_template_kwargs.{name}")
    return messages


def _note_flags(row: Row, turn: Turn) -> None:
    """Note as unused the keys `weight` and `train` of a turn that is never trained."""
    row.ignored |= {f"{turn.column}.{name} of '{turn['role']}'" for name in FLAGS if turn.get(name)}


def _is_trained(turn: Turn) -> bool:
    return bool(turn.get("weight", 1)) and bool(turn.get("train", True))


def _text(turn: Message) -> Any:
    """Return the content of a turn. Text parts are joined to one text."""
    content = turn.get("content")
    return "".join(part["text"] for part in content) if is_parts(content) else content


def same_turn(one: Message, other: Message) -> bool:
    """Return whether two turns have the same role, text and tool calls. Other keys are not compared."""
    texts = [text.strip() if isinstance(text, str) else text for text in map(_text, (one, other))]
    calls = [turn.get("tool_calls") for turn in (one, other)]
    return one["role"] == other["role"] and texts[0] == texts[1] and calls[0] == calls[1]


def says_something(turn: Message) -> bool:
    """Return whether an assistant turn has any text, reasoning or tool call."""
    content = _text(turn)
    texts = [content, *(turn.get(key) for key in REASONING)]
    return bool(turn.get("tool_calls")) or any(
        text.strip() if isinstance(text, str) else text for text in texts
    )


# ---- messages


def read_messages(row: Row, column: str) -> list[Turn]:
    """Return the messages of a column, with the keys that chat templates read.

    Raises InputError naming the message and the key that is wrong.
    """
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
    """Return the message with its calls under `tool_calls`. `function_call` is the older key, which holds one call."""
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
    """Return a tool call without its null fields. Missing or empty arguments become an empty object."""
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
    """Return the content of a message: a text or a list of text parts. A tool's content may be any JSON value."""
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
            f"{where}: expected type 'text', the only type that can be trained, got {part['type']!r:.60}"
        )
    if not isinstance(part.get("text"), str):
        raise InputError(f"{where}: expected text, got {part.get('text')!r:.60}")
    return {name: field for name, field in part.items() if field is not None}


def no_assistant(turns: Sequence[Turn]) -> None:
    """Raise InputError if no turn has the role `assistant` and some turn has an unknown role."""
    if any(turn["role"] == "assistant" for turn in turns):
        return
    for turn in turns:
        if turn["role"] not in NOT_TRAINED:
            raise InputError(
                f"{turn.where}: role: expected a conversation with a turn of role 'assistant' to train on, got "
                f"{turn['role']!r:.60}"
            )


# ---- columns beside the messages


def with_system(row: Row, turns: list[Turn]) -> list[Turn]:
    """Return the turns, with the column `system` as a system message before them if the row has that column.

    Raises InputError if the turns begin with a different system message.
    """
    if not isinstance(row.get("system"), str) or not turns:
        return turns
    system = row.text("system")
    if not system.strip():
        return turns
    if turns[0]["role"] in ("system", "developer"):
        if turns[0].get("content") == system:
            return turns
        raise InputError(f"system: expected one system message, got another in {turns[0].where}")
    return [_made("system", system, "system"), *turns]


def asked(row: Row, question: str, column: str) -> list[Turn]:
    """Return a question as a user turn, after the turns of the column `history`."""
    return [*_history(row), _made("user", question, column)]


def answered(answer: str, column: str) -> Turn:
    return _made("assistant", answer, column)


def _made(role: str, content: str, column: str) -> Turn:
    turn = Turn(role=role, content=content)
    turn.where = turn.column = column
    return turn


def _history(row: Row) -> list[Turn]:
    """Return the turns of the column `history`: pairs of question and answer as in LLaMA-Factory, or messages."""
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
    """Return the variables that the row gives to the chat template: its tools and its chat_template_kwargs."""
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
    """Raise InputError if `variables` contains `tools`, or a name that Burnish sets itself.

    source: the flag or column that holds the variables.
    """
    for name in variables:
        if name in OWN_NAMES or name == "tools":
            raise InputError(
                f"{source}: '{name}' cannot be set here: tools have a column, Burnish sets the others itself"
            )


def from_json(value: Any, column: str) -> Any:
    """Return the value of a JSON text, or None if the text is empty. Any other value is returned as it is."""
    if not isinstance(value, str):
        return check_json(value, column)
    if not value.strip():
        return None
    try:
        return check_json(parse_json(value, column), column)
    except InputError as error:
        raise InputError(f"{error}; it begins {value[:60]!r}") from None
