"""A chat template: a jinja program from an untrusted source that turns messages into text. It runs in a jinja2 sandbox.

A template reads `messages`, `add_generation_prompt`, the names of the special tokens, and further variables such as
`tools` and `enable_thinking`. It has all features that vendors' templates use: `raise_exception`, `strftime_now`,
`tojson` without HTML escapes, `break` and `continue`, and `{% generation %}...{% endgeneration %}` around the
assistant's text.

Source: https://huggingface.co/docs/transformers/chat_templating_writing
"""

import json
import os
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, shown
from ..files.text_files import read_text
from .refusals import OverBudget, Refused, check_written

if TYPE_CHECKING:
    from .sandbox import BoundedEnvironment

Message = dict[str, Any]  # role, content, and other keys that the template may read
Span = tuple[int, int]

SPAN_START, SPAN_END = "\ufdd0", "\ufdd1"  # Unicode noncharacters, which are not meant for text

TOOL_TEMPLATE_FILE = "additional_chat_templates/tool_use.jinja"  # as transformers names it
OWN_NAMES = {"messages", "add_generation_prompt", "span_start", "span_end"}  # set for each rendering

PLAIN_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- message.role | capitalize + ':\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + eos_token }}{% endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:\\n' }}
{%- endif %}
"""  # for a base model, which was not trained on any chat format


class ChatTemplate:
    """A compiled chat template.

    Raises InputError if the source is not a valid template, or if jinja2 is not installed.
    """

    def __init__(self, source: str):
        self.source = source
        try:
            self._environment = chat_sandbox()
            self._tree, self._program = self._environment.compiled(source)
        except InputError as error:
            raise InputError(f"the chat template: {error}") from error

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads but does not set itself, for instance `tools`."""
        try:
            names = self._environment.names_read(self._tree)
        except InputError as error:
            raise InputError(f"the chat template: {error}") from error
        return frozenset(names - {"span_start", "span_end"} - self._environment.globals.keys())

    def render(
        self, messages: Sequence[Message], variables: Mapping[str, Any], *, marks: bool = False
    ) -> str:
        """Return the text of a conversation.

        marks: enclose the text of `{% generation %}` blocks in SPAN_START and SPAN_END.
        Raises InputError for a message that is not an object with a role, Refused if the template fails, and OverBudget
        if it does not end. Both are subclasses of InputError.
        """
        given = 0
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise InputError(
                    f"message {i + 1}: expected an object with a role and content, got {message!r:.80}"
                )
            written = json.dumps(message, ensure_ascii=False, default=str)
            given += len(written)
            if SPAN_START in written or SPAN_END in written:
                raise InputError(
                    f"message {i + 1}: has the Unicode noncharacter U+FDD0 or U+FDD1, which is reserved as a mark"
                )

        spans = {"span_start": SPAN_START, "span_end": SPAN_END} if marks else {}
        try:
            text = self._program.render(**{**variables, **spans, "messages": list(messages)})
            check_written(text, lambda: given + len(str(variables)))
            if not marks and (SPAN_START in text or SPAN_END in text):
                raise InputError(
                    "it writes the Unicode noncharacter U+FDD0 or U+FDD1, which is reserved as a mark"
                )
            return text
        except OverBudget as error:
            raise OverBudget(f"the chat template {error}") from error
        except Exception as error:  # a template is a program, and may raise any exception
            raise Refused(f"the chat template refuses the conversation: {error}") from error


def split_marks(marked: str) -> tuple[str, list[Span]]:
    """Return a rendered text without the marks SPAN_START and SPAN_END, and the spans that they enclosed.

    Raises InputError if a span lies within another.
    """
    text, spans = "", []
    for i, piece in enumerate(marked.split(SPAN_START)):
        if piece.count(SPAN_END) != bool(i):
            raise InputError("the chat template has a {% generation %} block within another")
        inside, _, after = piece.partition(SPAN_END) if i else ("", "", piece)
        if i:
            spans.append((len(text), len(text) + len(inside)))
        text += inside + after
    return text, spans


# ---- where templates lie


def templates_of(folder: Path, configured: Any) -> dict[str, Any]:
    """Return a folder's chat templates by name, such as `default`.

    configured: the chat_template of tokenizer_config.json, a text or a list. Of additional_chat_templates, only
    `tool_use` is read, which transformers takes if there are tools.
    """
    named = {"default": configured} if configured is not None else {}
    if isinstance(configured, list):  # [{"name": ..., "template": ...}]
        for entry in configured:
            if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
                raise InputError(
                    f"chat_template: expected objects with a name and a template, got {shown(entry)}"
                )
        named = {entry["name"]: entry.get("template") for entry in configured}

    for name, file in (("default", "chat_template.jinja"), ("tool_use", TOOL_TEMPLATE_FILE)):
        if os.path.lexists(folder / file):
            named[name] = read_text(folder / file)
    for name in ("default", "tool_use"):
        if not isinstance(named.get(name, ""), str):
            raise InputError(f"chat_template: expected a text, got {type(named[name]).__name__}")
    return named


def template_at(chat_template: Path | str) -> dict[str, str]:
    """Return {"default": template}, read from a jinja file, or the built-in template for the name "plain".

    Raises InputError if there is no such file.
    """
    if str(chat_template) == "plain":
        return {"default": PLAIN_TEMPLATE}
    if not os.path.isfile(chat_template):
        raise InputError(f"{chat_template}: no such chat template: expected a jinja file, or 'plain'")
    return {"default": read_text(Path(chat_template))}


# ---- the sandbox


def sandbox(*, strict: bool = False) -> "BoundedEnvironment":
    """Return an environment for untrusted templates, as `environment` of sandbox.py makes it.

    jinja2 is imported here, so that a caller without templates does not need it. Raises InputError if it is not
    installed.
    """
    try:
        from .sandbox import environment
    except ModuleNotFoundError as error:
        if "jinja2" not in str(error.name):  # jinja2 is installed, but a module that it needs is missing
            raise
        raise InputError("expected jinja2 to be installed: pip install jinja2") from None
    return environment(strict)


@cache
def chat_sandbox() -> "BoundedEnvironment":
    """Return the environment that all chat templates share."""
    return sandbox()
