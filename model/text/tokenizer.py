"""Text to token ids and back, chat templates, and the mask of the tokens that the assistant wrote.

A folder has `tokenizer.json` (the `tokenizers` package), the names of the special tokens in `tokenizer_config.json` and
`special_tokens_map.json`, the chat template in `chat_template.jinja` or `tokenizer_config.json`, and the end tokens in
`generation_config.json`. `template.py` runs the template.

The mask of a conversation is exact, or there is an error:

    template has {% generation %} marks    the marked text, and the end token right behind it where it has none inside
    template has none                      from the end of the generation prompt to the end-of-turn token, provided that
                                           the template renders the turn in the conversation as it would for generation

Tokens are joined, never re-read: where a token of the whole text would cross the start or the end of a trained span
("assistant\\n" + "\\nHi" has one "\\n\\n"), the text is cut there. So a prompt has the ids that it has in generation.
"""

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from ..errors import InputError, shown
from ..files.folder import base_of, is_adapter
from ..files.replacing import replacing
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
    """The template renders an assistant's turn differently once other turns follow it."""


class _Rendered(NamedTuple):
    """A conversation, the template's variables, and the text that the template makes of them."""

    messages: Sequence[Message]
    variables: Mapping[str, Any]
    text: str


class Tokenizer:
    """A folder's tokenizer and chat template.

    bos_id, eos_id, pad_id: int or None. stop_ids: every id that ends a generation. prefix_ids: of the bos that a text
    begins with, or empty. variables: those that the chat template always gets.
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
        """Take a tokenizer, whose truncation, padding and dropout are switched off, and what a folder says about it.

        tool_template: in place of chat_template where there are tools. config: further keys of tokenizer_config.json,
        among them other special tokens that a template may name. Raises InputError where a special token is not in the
        vocabulary.
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
        """Read a Hugging Face folder. chat_template: a jinja file, or "plain", in place of the folder's.

        Raises InputError naming the file, and what is wrong with it.
        """
        folder = Path(folder)
        if not os.path.isdir(folder):
            raise InputError(
                f"{folder}: no such folder; expected a Hugging Face folder with a tokenizer.json"
            )
        file = folder / "tokenizer.json"
        if not os.path.lexists(file) and is_adapter(folder):  # it may leave the tokenizer to its base
            return cls.load(base_of(folder), chat_template)
        if not os.path.lexists(file):
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
        """Write tokenizer.json, tokenizer_config.json, generation_config.json's end tokens, and chat templates."""
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
        """The ids of a text. No special token is added; those that the text spells out are recognised.

        continues: the text goes on where other tokens end, so that no space is put before it, as some tokenizers do.
        """
        return encoding_of(self._continuing if continues else self.backend, text).ids

    def encode_text(self, text: str) -> list[int]:
        """The ids of a whole text: bos is in front, once, if the tokenizer wants it; the text may spell it out."""
        ids = self.encode(text)
        return ids if ids[:1] == self.prefix_ids else self.prefix_ids + ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return text_of(self.backend, ids, skip_special_tokens)

    def keep_below(self, rows: int) -> None:
        """Leave ids of `rows` or more out of `vocabulary`: the model that reads what is drawn has no row for them."""
        self.vocabulary = self.vocabulary.below(rows)

    # ---- conversations

    def render_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """The text of a conversation. variables: others that the template reads: tools, enable_thinking.

        Raises InputError where the template fails.
        """
        return self._render(messages, add_generation_prompt, variables)

    def encode_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, **variables: Any
    ) -> list[int]:
        """The ids of `render_chat`."""
        return self.encode(self._render(messages, add_generation_prompt, variables))

    @property
    def template_variables(self) -> frozenset[str]:
        """The variables that the chat template reads, for instance `tools`. Empty without a template."""
        return frozenset().union(
            *(template.variables for template in (self._template, self._tools) if template)
        )

    def encode_chat_with_mask(
        self, messages: Sequence[Message], *, turns: Collection[int] | None = None, **variables: Any
    ) -> tuple[list[int], list[bool]]:
        """Return (ids, mask), the mask True on the assistant's tokens, its end-of-turn token included.

        turns: the messages that are masked in, by index from 0; by default all of the assistant's. Raises InputError
        where one of these is not the assistant's, and where the mask would be empty or cannot be exact; its subclass
        TurnRewritten where the template alters earlier turns.
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

        # the spans of the text that are masked in
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
        """The marked spans by the assistant's turn that they lie in: reasoning and answer may have one each.

        Raises InputError where a turn has none, unless the template rewrites earlier messages and all turns are wanted:
        then it matters to no mask which turn a span is of.
        """
        messages, variables, text = rendered
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]

        # where in the text each turn begins: as far as the messages before it are rendered the same
        starts, exact = {answers[0]: 0}, True
        for turn in answers[1:]:
            before = self._render(messages[:turn], True, variables)
            starts[turn] = _common_length(before, text)
            # exact if no more than the generation prompt is rendered otherwise once the turn is there
            exact &= starts[turn] >= _common_length(before, self._render(messages[:turn], False, variables))
        found: dict[int, list[Span]] = {turn: [] for turn in answers}
        for begin, end in spans:  # a mark may begin within the generation prompt
            found[max(turn for turn in answers if starts[turn] < max(end, begin + 1))].append((begin, end))

        if not exact and len(wanted) < len(answers):
            raise InputError(
                "the chat template writes earlier turns otherwise once others follow, so which marks are of the turns "
                "to be trained is not known"
            )
        if exact and not all(found.values()):
            raise InputError(
                f"the chat template marks {[len(of) for of in found.values()]} spans in the {len(answers)} assistant "
                "turns: its {% generation %} block must enclose every one"
            )
        return found

    def _with_end(self, text: str, span: Span) -> Span:
        """A marked span, with the special token right behind it where the mark ends before the turn does."""
        start, end = span
        if text[start:end].rstrip().endswith(self._ends):
            return span
        behind = [len(token) for token in self._ends if text.startswith(token, end)]
        return start, end + max(behind, default=0)

    def _turn_span(self, rendered: _Rendered, turn: int) -> Span:
        """The place of messages[turn] in the text: exactly the characters that generation would have written."""
        messages, variables, text = rendered
        name = f"assistant message {turn + 1} of {len(messages)}"
        prompt = self._render(messages[:turn], True, variables)
        answered = text if turn == len(messages) - 1 else self._render(messages[: turn + 1], False, variables)
        if not answered.startswith(prompt):
            raise InputError(
                f"{name}: the chat template renders no answer behind its own generation prompt {prompt[-40:]!r}, "
                f"so the mask cannot be exact; {WAY_OUT}"
            )

        # its end: the first stop token behind the prompt, else the last special one
        written = encoding_of(self.backend, answered[len(prompt) :])
        added = self._spelled_out(written, answered, len(prompt))
        stops = [end for i, (_, end) in added if written.ids[i] in self.stop_ids]
        ends = stops[:1] or [end for i, (_, end) in added if self._added[written.ids[i]].special][-1:]
        if not ends or (not stops and answered[ends[0] :].strip()):
            raise InputError(
                f"{name}: the chat template writes no end-of-turn token, so where the turn ends is not known; {WAY_OUT}"
            )

        if not text.startswith(answered[: ends[0]]):
            raise TurnRewritten(
                f"{name}: the chat template renders it differently once other turns follow; "
                "use a template with {% generation %} marks, or end the conversation there"
            )
        return len(prompt), ends[0]

    def _encode_pieces(self, text: str, boundaries: Sequence[int]) -> list[tuple[int, list[int]]]:
        """The ids of `text` in the pieces (start, ids) between the boundaries.

        Joined they are `encode(text)`, except where that has a token across a boundary: there the text is cut, and read
        on from the cut. A boundary is clean where the text before it has the same ids with the rest behind it and
        without. The ids before an added token do not depend on the text behind it, so it is enough to read from the
        nearest one on.
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
        """The added tokens in the encoding of text[origin:]: index, and where in `text`. Not those that an unknown
        character has become.
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
        """The ids that the tokenizer has, those of added tokens included. Their count may be less than the last id."""
        return distinct_ids(self.backend)

    @cached_property
    def _template(self) -> ChatTemplate | None:
        return None if self.chat_template is None else ChatTemplate(self.chat_template)

    @cached_property
    def _tools(self) -> ChatTemplate | None:
        return None if self.tool_template is None else ChatTemplate(self.tool_template)

    @cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        """The tokenizer for a text that goes on where another ended."""
        return continuing(self.backend)

    def _id_of(self, token: str | None) -> int | None:
        if token is None:
            return None
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise InputError(f"special token {shown(token)!r} is not in the vocabulary of tokenizer.json")
        return token_id

    def _adds_bos(self) -> bool:
        """Whether a text begins with bos, by tokenizer_config.json, else by tokenizer.json's post-processor."""
        setting = self.config.get("add_bos_token")
        if setting is not None:
            return setting
        return encoding_of(self.backend, "", add_special_tokens=True).ids[:1] == [self.bos_id]


def _common_length(one: str, other: str) -> int:
    """The number of characters that two texts have in common at their beginning."""
    different = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(different, min(len(one), len(other)))
