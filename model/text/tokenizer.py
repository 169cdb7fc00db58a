"""Text to token ids and back, chat templates, and the mask of the tokens that the assistant wrote.

A folder has `tokenizer.json` for the `tokenizers` package. The special tokens are in `tokenizer_config.json` and
`special_tokens_map.json`, the chat template in `chat_template.jinja` or `tokenizer_config.json`, and the end tokens in
`generation_config.json`. `template.py` runs the template.

The mask of a conversation is exact, or an error is raised:

    template has {% generation %} marks    the marked text, and the end token right behind it, unless it ends with one
    template has no marks                  from the end of the generation prompt to the end-of-turn token, provided that
                                           the template renders the turn in the conversation as it would for generation

A token of the whole text may cross the start or the end of a trained span: "assistant\\n" + "\\nHi" has one "\\n\\n".
Then the text is cut there, and the parts are encoded separately. So a prompt has the same ids as in generation.
"""

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from ..errors import InputError, shown
from ..files.folder import base_of, is_adapter, way_to_fetch
from ..files.replacing import recover, replacing
from ..files.text_files import read_optional
from ..vocabulary import Vocabulary
from .special_tokens import special_tokens
from .template import (
    OWN_NAMES,
    TOOL_TEMPLATE_FILE,
    ChatTemplate,
    Message,
    Span,
    split_marks,
    template_at,
    templates_of,
)
from .token_ids import read_stop_ids
from .tokenizer_file import continuing, distinct_ids, encoding_of, plain, read_backend, text_of

__all__ = ["Message", "Tokenizer", "TurnRewritten"]

WAY_OUT = "use a template with {% generation %} marks, or rows of prompt and completion text"


class TurnRewritten(InputError):
    """An error for a template that renders an assistant's turn differently once other turns follow it."""


class _Rendered(NamedTuple):
    """A conversation, the template's variables, and the text that the template renders from them."""

    messages: Sequence[Message]
    variables: Mapping[str, Any]
    text: str


class Tokenizer:
    """The tokenizer and the chat template of a folder.

    bos_id, eos_id, pad_id: int or None.
    stop_ids: every id that ends a generation.
    prefix_ids: the ids that a text begins with, which is bos or nothing.
    variables: variables that are always passed to the chat template.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        stop_ids: Iterable[int] = (),
        chat_template: str | None = None,
        tool_template: str | None = None,
        config: dict[str, Any] | None = None,
    ):
        """Wrap a tokenizer, and switch off its truncation, padding and dropout.

        tool_template: the template that replaces chat_template if there are tools.
        config: further keys of tokenizer_config.json, such as other special tokens that a template may name.

        Raises InputError if a special token is not in the vocabulary.
        """
        plain(backend)
        self.backend = backend
        self.config = {"tokenizer_class": "PreTrainedTokenizerFast", **(config or {})}
        self.config |= {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        self.chat_template, self.tool_template = chat_template, tool_template
        self.variables: dict[str, Any] = {}
        self.bos_id, self.eos_id, self.pad_id = self._id_of(bos), self._id_of(eos), self._id_of(pad)
        self.stop_ids = frozenset(stop_ids) | ({self.eos_id} if self.eos_id is not None else set())
        self.prefix_ids = [self.bos_id] if self.bos_id is not None and self._adds_bos() else []
        self._added = backend.get_added_tokens_decoder()
        self._ends = tuple(t.content for i, t in self._added.items() if t.special or i in self.stop_ids)

    @classmethod
    def load(cls, folder: Path | str, chat_template: Path | str | None = None) -> "Tokenizer":
        """Read a Hugging Face folder. chat_template: a jinja file, or "plain", in place of the folder's template.

        Raises InputError naming the file and the error.
        """
        folder = Path(folder)
        recover(folder)
        if not os.path.isdir(folder):
            raise InputError(
                f"{folder}: no such folder; expected a Hugging Face folder with a tokenizer.json{way_to_fetch(folder)}"
            )
        file = folder / "tokenizer.json"
        if not os.path.lexists(file) and is_adapter(folder):  # an adapter may use its base's tokenizer
            return cls.load(base_of(folder), chat_template)
        if not os.path.lexists(file):
            inside = folder / "model"
            if (inside / "tokenizer.json").is_file():
                raise InputError(f"{folder}: expected a model's folder, got a run's; its model is {inside}")
            raise InputError(f"{file}: not found; only tokenizers with a tokenizer.json can be read")

        backend, vocabulary = read_backend(file)
        config = read_optional(folder / "tokenizer_config.json")
        tokens_map = folder / "special_tokens_map.json"
        names = special_tokens(read_optional(tokens_map), tokens_map)
        names |= special_tokens(config, folder / "tokenizer_config.json")

        configured = config.pop("chat_template", None)
        templates = {} if chat_template is None else template_at(chat_template)
        try:
            templates = templates or templates_of(folder, configured)
            tokenizer = cls(
                backend,
                bos=names.pop("bos_token", None),
                eos=names.pop("eos_token", None),
                pad=names.pop("pad_token", None),
                stop_ids=read_stop_ids(folder, backend.id_to_token),
                chat_template=templates.get("default"),
                tool_template=templates.get("tool_use"),
                config=config | names,
            )

            tokenizer.vocabulary = vocabulary
            return tokenizer
        except InputError as error:
            raise InputError(f"{folder}: {error}") from error

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json, tokenizer_config.json, chat templates, and the end tokens of generation_config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)

        stops = sorted(self.stop_ids, key=lambda token: (token != self.eos_id, token))  # eos first
        end = stops[0] if len(stops) == 1 else stops or None
        ids = {"bos_token_id": self.bos_id, "eos_token_id": end, "pad_token_id": self.pad_id}
        generation = read_optional(folder / "generation_config.json")
        generation |= {name: value for name, value in ids.items() if value is not None}

        files = {
            "tokenizer.json": self.backend.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(self.config, indent=2, ensure_ascii=False) + "\n",
            "generation_config.json": json.dumps(generation, indent=2) + "\n",
        }
        if self.chat_template is not None:
            files["chat_template.jinja"] = self.chat_template
        if self.tool_template is not None:
            files[TOOL_TEMPLATE_FILE] = self.tool_template
            (folder / TOOL_TEMPLATE_FILE).parent.mkdir(exist_ok=True)
        for name, text in files.items():
            with replacing(folder / name) as beside:
                beside.write_text(text, encoding="utf-8")

    # ---- text

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Return the ids of a text. No special token is added, but those that the text contains are recognised.

        continues: the text continues other tokens, so the space that some tokenizers put before a text is left out.
        """
        return encoding_of(self._continuing if continues else self.backend, text).ids

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a whole text.

        If the tokenizer adds bos, the ids begin with bos. It is not added twice if the text already begins with it.
        """
        ids = self.encode(text)
        return ids if ids[:1] == self.prefix_ids else self.prefix_ids + ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return text_of(self.backend, ids, skip_special_tokens)

    def keep_below(self, rows: int) -> None:
        """Remove ids of `rows` or more from `vocabulary`, because the model has no rows for them."""
        self.vocabulary = self.vocabulary.below(rows)

    # ---- conversations

    def render_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """Return the text of a conversation.

        variables: others that the template reads, such as tools and enable_thinking.

        Raises InputError if the template fails.
        """
        return self._render(messages, add_generation_prompt, variables)

    def encode_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, **variables: Any
    ) -> list[int]:
        """Return the ids of the text that `render_chat` returns."""
        return self.encode(self._render(messages, add_generation_prompt, variables))

    @property
    def template_variables(self) -> frozenset[str]:
        """The variables that the chat template reads, for instance `tools`. Empty if there is no template."""
        return frozenset().union(
            *(template.variables for template in (self._template, self._tools) if template)
        )

    def encode_chat_with_mask(
        self, messages: Sequence[Message], *, turns: Collection[int] | None = None, **variables: Any
    ) -> tuple[list[int], list[bool]]:
        """Return (ids, mask). The mask is True on the assistant's tokens, including the end-of-turn token.

        turns: the indices of the messages to train on; by default all of the assistant's.
        Raises InputError if one of these messages is not the assistant's, or if the mask would be empty or cannot be
        exact. Raises TurnRewritten, a subclass, if the template changes earlier turns.
        """
        text, marked = split_marks(self._render(messages, False, variables, marks=True))
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = answers if turns is None else sorted(turns)
        if not wanted or not set(wanted) <= set(answers):
            raise InputError("no assistant turn to train on")
        if marked and len(marked) < len(answers):
            raise InputError(
                f"the chat template marks {len(marked)} of the {len(answers)} assistant turns: "
                "its {% generation %} block must enclose every one"
            )

        # the spans of the text where the mask is True
        if marked:
            of_turn = self._spans_of_turns(marked, _Rendered(messages, variables, text), wanted)
            spans = [span for turn in wanted for span in of_turn[turn]]
            spans = [self._with_end(text, span) for span in spans if span[0] < span[1]]
        else:
            spans = [self._turn_span(_Rendered(messages, variables, text), turn) for turn in wanted]

        pieces = self._encode_pieces(text, sorted({boundary for span in spans for boundary in span}))
        ids = [token for _, piece in pieces for token in piece]
        starts = {start for start, _ in spans}
        mask = [start in starts for start, piece in pieces for _ in piece]
        if not any(mask):
            raise InputError("the assistant's turns are empty: no token to train on")
        return ids, mask

    def _spans_of_turns(
        self, spans: Sequence[Span], rendered: _Rendered, wanted: Sequence[int]
    ) -> dict[int, list[Span]]:
        """Return the marked spans of each assistant turn. A turn may have several, for reasoning and answer.

        Raises InputError if a turn has no span. If the template changes earlier messages, it is unknown which turn a
        span belongs to. The mask of all turns does not depend on that, so InputError is raised only if some turns are
        not wanted.
        """
        messages, variables, text = rendered
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]

        # the start of each turn in the text: up to there, the messages before it are rendered the same
        starts, exact = {answers[0]: 0}, True
        for turn in answers[1:]:
            before = self._render(messages[:turn], True, variables)
            starts[turn] = _common_length(before, text)
            # exact if the turn changes at most the rendering of the generation prompt
            exact &= starts[turn] >= _common_length(before, self._render(messages[:turn], False, variables))
        found: dict[int, list[Span]] = {turn: [] for turn in answers}
        for begin, end in spans:  # a mark may begin within the generation prompt
            found[max(turn for turn in answers if starts[turn] < max(end, begin + 1))].append((begin, end))

        if not exact and len(wanted) < len(answers):
            raise InputError(
                "the chat template renders earlier turns differently once other turns follow, so the marks of the "
                "turns to train on cannot be found"
            )
        if exact and not all(found.values()):
            raise InputError(
                f"the chat template marks {[len(of) for of in found.values()]} spans in the {len(answers)} assistant "
                "turns: its {% generation %} block must enclose every one"
            )
        return found

    def _with_end(self, text: str, span: Span) -> Span:
        """Return a marked span. If it does not end with a special token, include the special token right behind it."""
        start, end = span
        if text[start:end].rstrip().endswith(self._ends):
            return span
        behind = [len(token) for token in self._ends if text.startswith(token, end)]
        return start, end + max(behind, default=0)

    def _turn_span(self, rendered: _Rendered, turn: int) -> Span:
        """Return the span of messages[turn] in the text: exactly the characters that generation would have written.

        Raises InputError if the span cannot be found, and TurnRewritten if the template renders the turn differently
        once other turns follow.
        """
        messages, variables, text = rendered
        name = f"assistant message {turn + 1} of {len(messages)}"
        prompt = self._render(messages[:turn], True, variables)
        answered = text if turn == len(messages) - 1 else self._render(messages[: turn + 1], False, variables)
        if not answered.startswith(prompt):
            raise InputError(
                f"{name}: the chat template does not render the answer after its own generation prompt "
                f"{prompt[-40:]!r}, so the mask cannot be exact; {WAY_OUT}"
            )

        # the end of the span: the first stop token after the prompt, else the last special token
        written = encoding_of(self.backend, answered[len(prompt) :])
        added = self._spelled_out(written, answered, len(prompt))
        stops = [end for i, (_, end) in added if written.ids[i] in self.stop_ids]
        ends = stops[:1] or [end for i, (_, end) in added if self._added[written.ids[i]].special][-1:]
        if not ends or (not stops and answered[ends[0] :].strip()):
            raise InputError(
                f"{name}: the chat template writes no end-of-turn token, so the turn's end is unknown; {WAY_OUT}"
            )

        if not text.startswith(answered[: ends[0]]):
            raise TurnRewritten(
                f"{name}: the chat template renders it differently once other turns follow; "
                "use a template with {% generation %} marks, or end the conversation there"
            )
        return len(prompt), ends[0]

    def _encode_pieces(self, text: str, boundaries: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Return (start, ids) of each piece of `text` between the boundaries.

        The joined ids are those of `encode(text)`, unless a token of the whole text crosses a boundary. Then the text
        is cut at the boundary, and encoded anew from there. To test a boundary, the text before it is encoded alone and
        compared with the ids in the whole text. The ids before an added token do not depend on the text after it, so
        encoding can start at the nearest added token.
        """

        def read(origin: int) -> tuple[list[int], list[tuple[int, Span]]]:
            reader = self._continuing if origin else self.backend
            encoding = encoding_of(reader, text[origin:])
            return encoding.ids, self._spelled_out(encoding, text, origin)

        pieces: list[tuple[int, list[int]]] = []
        ids, added = read(0)
        last, taken = 0, 0  # the previous boundary, in characters of the text and in `ids`
        for boundary in boundaries:
            start, first, window = last, taken, self._continuing if last else self.backend
            for i, (opens, closes) in added:
                if i >= taken - 1 and closes <= boundary:
                    start, first, window = opens, i, self.backend
            head = ids[:first] + encoding_of(window, text[start:boundary]).ids
            pieces.append((last, head[taken:]))
            last, taken = boundary, len(head)
            if ids[:taken] != head:
                ids, added = read(boundary)
                taken = 0
        return [*pieces, (last, ids[taken:])]

    def _spelled_out(self, encoding: tokenizers.Encoding, text: str, origin: int) -> list[tuple[int, Span]]:
        """Return (index, span in `text`) of each added token in the encoding of text[origin:].

        An added token that stands for an unknown character is left out, because the text does not contain it.
        """
        found = []
        for i, (token, (start, end)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            if (
                token in self._added
                and text[origin + start : origin + end].strip() == self._added[token].content
            ):
                found.append((i, (origin + start, origin + end)))
        return found

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        marks: bool = False,
    ) -> str:
        template = self._template
        if self._tools is not None and variables.get("tools") is not None:
            template = self._tools
        if template is None:
            raise InputError(
                "the model has no chat template: name one (--chat-template FILE.jinja, or plain), put a "
                "chat_template.jinja into its folder, or use rows of prompt and completion text"
            )
        if reserved := OWN_NAMES & variables.keys():
            raise InputError(f"the chat template's variable '{min(reserved)}' is set by Burnish itself")
        context = {name: token for name, token in self.config.items() if name.endswith("_token") and token}
        context |= {"tools": None, "documents": None} | self.variables | dict(variables)
        context["add_generation_prompt"] = add_generation_prompt
        return template.render(messages, context, marks=marks)

    # ---- made once

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The ids of the tokenizer, including those of added tokens.

        Some ids may be missing, so the number of ids may be smaller than the last id.
        """
        return distinct_ids(self.backend)

    @cached_property
    def _template(self) -> ChatTemplate | None:
        return None if self.chat_template is None else ChatTemplate(self.chat_template)

    @cached_property
    def _tools(self) -> ChatTemplate | None:
        return None if self.tool_template is None else ChatTemplate(self.tool_template)

    @cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        """The tokenizer for a text that continues other tokens."""
        return continuing(self.backend)

    def _id_of(self, token: str | None) -> int | None:
        if token is None:
            return None
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise InputError(f"special token {shown(token)!r} is not in the vocabulary of tokenizer.json")
        return token_id

    def _adds_bos(self) -> bool:
        """Return whether the tokenizer puts bos before a text.

        tokenizer_config.json decides, or tokenizer.json if that file has no such key.
        """
        setting = self.config.get("add_bos_token")
        if setting is not None:
            return setting
        return encoding_of(self.backend, "", add_special_tokens=True).ids[:1] == [self.bos_id]


def _common_length(one: str, other: str) -> int:
    """Return the number of leading characters that two texts share."""
    different = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(different, min(len(one), len(other)))
