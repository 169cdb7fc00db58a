"""Conversion of rows with compared or labelled answers to prompts with completions.

    chosen and rejected        with a prompt in its own column (text, question, instruction, messages), or as two
                               conversations that begin alike (as HH-RLHF's "\\n\\nHuman: ...\\n\\nAssistant: ...")
    completion and label       with a prompt, for KTO; label is true if the completion is desirable

Answers are never cut, because a cut answer is a different answer. Rows longer than max_length are dropped and counted.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, TypeVar

from ...model.errors import InputError
from ...model.text.tokenizer import Tokenizer
from ..run.batch import Completion, longest
from .examples import PROMPT_COLUMNS, answer_text, encode_completion, read_prompt
from .items import Items, load_items
from .messages import (
    Talk,
    Turn,
    answered,
    asked,
    messages_in,
    same_turn,
    says_something,
    talk_of,
    with_system,
)
from .row import Row
from .rows import Tally, opened

HH_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Preference:
    """A prompt with a chosen and a rejected completion. Both completions end with a trained token, the end token."""

    prompt: list[int]
    chosen: Completion
    rejected: Completion
    margin: float = 0.0  # how much better the chosen completion is, from the column `margin`
    where: str = field(default="", kw_only=True, compare=False)  # file and line of the row

    @property
    def completions(self) -> list[Completion]:
        return [self.chosen, self.rejected]

    @property
    def sequences(self) -> list[list[int]]:
        """The token sequences that the model reads for this pair: the prompt and both completions."""
        return [self.prompt, self.chosen.tokens, self.rejected.tokens]


@dataclass(frozen=True)
class Judged:
    """A prompt with one completion and a label: whether the completion is desirable."""

    prompt: list[int]
    completion: Completion
    label: bool  # True if the completion is desirable
    where: str = field(default="", kw_only=True, compare=False)  # file and line of the row

    @property
    def completions(self) -> list[Completion]:
        return [self.completion]

    @property
    def sequences(self) -> list[list[int]]:
        """The token sequences that the model reads for this row: the prompt and the completion."""
        return [self.prompt, self.completion.tokens]


Answers = TypeVar("Answers", Preference, Judged)


# ---- rows


def load_pairs(
    cfg: Any, tokenizer: Tokenizer, *, margins: bool = False, limit: int | None = None
) -> Items[Preference]:
    """Load the pairs of --data, and print how many rows were used and dropped.

    cfg: the flags; besides those that `load_items` reads, only max_length is read. margins: whether to read the column
    `margin`. limit: use only this many rows from the start of each argument.
    """
    convert = lambda rows: preferences(rows[:limit], tokenizer, max_length=cfg.max_length, margins=margins)
    return load_items(cfg, tokenizer, convert)


def load_judged(cfg: Any, tokenizer: Tokenizer) -> Items[Judged]:
    """Load the labelled completions of --data, and print how many rows were used and dropped.

    cfg: the flags; besides those that `load_items` reads, only max_length is read.
    """
    convert = lambda rows: judged_completions(rows, tokenizer, max_length=cfg.max_length)
    return load_items(cfg, tokenizer, convert)


def preferences(
    rows: Sequence[dict[str, Any]], tokenizer: Tokenizer, *, max_length: int, margins: bool = True
) -> tuple[list[Preference], Tally]:
    """Convert rows of chosen and rejected answers to pairs. Returns (pairs, counts).

    The counts give rows, pairs, and dropped rows with the reasons. max_length: the maximum number of tokens of a prompt
    with its longer completion. margins: whether to read the column `margin`; otherwise all margins are 0.
    Raises InputError if no pair is left. Raises InputError naming a row that has another shape, or whose completion
    cannot be found in the rendered conversation.
    """

    def read(row: Row) -> tuple[list[Preference], str]:
        if "chosen" not in row or "rejected" not in row:
            raise InputError(f"expected the columns chosen and rejected, got {row.columns()}")
        prompt, (chosen, rejected) = _prompt_and_answers(row, ("chosen", "rejected"), tokenizer)
        margin = _margin(row) if margins else 0.0

        if not chosen.tokens or not rejected.tokens:
            return [], "dropped: empty completion"
        if chosen == rejected:
            return [], "dropped: chosen is rejected"
        pair = Preference(prompt, chosen, rejected, margin)
        return ([], "dropped: longer than max_length") if longest(pair) > max_length else ([pair], "")

    return _read_all(rows, read, "pairs", tokenizer)


def judged_completions(
    rows: Sequence[dict[str, Any]], tokenizer: Tokenizer, *, max_length: int
) -> tuple[list[Judged], Tally]:
    """Convert rows of prompt, completion and label to labelled completions. Returns (completions, counts).

    A row of chosen and rejected answers becomes two completions. The counts give rows, completions, and dropped rows
    with the reasons. max_length: the maximum number of tokens of a prompt with its completion.
    Raises InputError if no completion is left. Raises InputError naming a row that has another shape, or whose
    completion cannot be found in the rendered conversation.
    """

    def read(row: Row) -> tuple[list[Judged], str]:
        if "chosen" in row and "rejected" in row:
            prompt, (chosen, rejected) = _prompt_and_answers(row, ("chosen", "rejected"), tokenizer)
            judged = [Judged(prompt, chosen, True), Judged(prompt, rejected, False)]
        else:
            if "completion" not in row or "label" not in row:
                raise InputError(f"expected the columns completion and label, got {row.columns()}")
            if row.take("label") not in (0, 1):  # also False and True
                raise InputError(f"label: expected true or false, got {row['label']!r:.60}")
            prompt, (completion,) = _prompt_and_answers(row, ("completion",), tokenizer)
            judged = [Judged(prompt, completion, bool(row["label"]))]

        if not all(one.completion.tokens for one in judged):
            return [], "dropped: empty completion"
        if max(map(longest, judged)) > max_length:
            return [], "dropped: longer than max_length"
        return judged, ""

    return _read_all(rows, read, "completions", tokenizer)


def _read_all(
    rows: Sequence[dict[str, Any]],
    read: Callable[[Row], tuple[list[Answers], str]],
    name: str,
    tokenizer: Tokenizer,
) -> tuple[list[Answers], Tally]:
    """Convert all rows with `read`. Returns (items, counts).

    read: a function of a row that returns (items, reason). For a dropped row, items is []. For any other row,
    the reason is "".
    name: the plural name of the items, for the counts.
    """
    rows, counts = opened(rows, name)
    found: list[Answers] = []
    for row in rows:
        try:
            items, dropped = read(row)
        except InputError as error:
            raise InputError(f"{row.where}: {error}") from error
        found += [replace(item, where=row.where) for item in items]
        counts[dropped or name] += len(items) or 1
    counts.close(rows)

    if not found:
        raise InputError(
            "no " + name + " to train on: " + ", ".join(f"{n} {why}" for why, n in counts.items())
        )
    return found, counts


def _margin(row: Row) -> float:
    """Return the row's margin, 0 by default. Raises InputError if the margin is not a number that fp32 can hold."""
    margin = row.take("margin") if "margin" in row else 0.0
    is_number = isinstance(margin, int | float) and not isinstance(margin, bool)
    if not is_number or not abs(margin) < 1e38:
        raise InputError(f"margin: expected a number, got {margin!r:.60}")
    return float(margin)


# ---- a prompt and its answers


def _prompt_and_answers(
    row: Row, columns: tuple[str, ...], tokenizer: Tokenizer
) -> tuple[list[int], list[Completion]]:
    """Return (prompt ids, completions), one completion for each of `columns`.

    A completion is empty if its answer has no text to train on.
    """
    name = next((name for name in PROMPT_COLUMNS if name in row), None)
    prompt = read_prompt(row, name, tokenizer) if name else []
    if not isinstance(prompt, str):
        return _in_messages(row, prompt, columns, tokenizer)
    if not prompt.strip():
        raise InputError(f"{name}: expected a prompt, got an empty text")
    if all(isinstance(row[column], str) for column in columns):
        return _in_texts(row, str(name), prompt, columns, tokenizer)
    return _in_messages(row, asked(row, prompt, str(name)), columns, tokenizer)


def _in_texts(
    row: Row, name: str, prompt: str, columns: tuple[str, ...], tokenizer: Tokenizer
) -> tuple[list[int], list[Completion]]:
    """Return (prompt ids, completions) of plain texts. All tokens of an answer are trained.

    name: the column of the prompt.
    """
    answers = [row.text(column) for column in columns]
    if name != "prompt":
        answers = [answer_text(prompt, answer) for answer in answers]
    tokens = [
        encode_completion(answer, tokenizer, continues=True) if answer.strip() else [] for answer in answers
    ]
    return tokenizer.encode_text(prompt), [Completion(ids, [True] * len(ids)) for ids in tokens]


def _in_messages(
    row: Row, prompt: list[Turn], columns: tuple[str, ...], tokenizer: Tokenizer
) -> tuple[list[int], list[Completion]]:
    """Return (prompt ids, completions) of turns, rendered by the chat template.

    If `prompt` is empty, the prompt is the beginning that all conversations in `columns` share.
    """
    # 1. find the end of the prompt: the row's own prompt, or the beginning that all conversations share
    talks = [_conversation(row, column, prompt) for column in columns]
    several = not prompt or len(talks) > 1
    num_shared = _num_shared_turns(talks) if several else _end_of_prompt(prompt, talks[0])
    if num_shared < len(prompt):
        raise InputError(f"{' and '.join(columns)}: expected an assistant turn first after the prompt")
    if num_shared == 0:
        raise InputError(
            f"{' and '.join(columns)}: expected a prompt in its own column or as a shared beginning, got none"
        )

    # 2. all conversations take the prompt of the first, after the row's system message
    whole = [with_system(row, [*talks[0][:num_shared], *talk[num_shared:]]) for talk in talks]
    num_shared += len(whole[0]) - len(talks[0])
    for column, talk in zip(columns, whole, strict=True):
        if talk[-1]["role"] != "assistant":
            row.ignored.add(f"{column}: the turns after the last answer")

    # 3. tokenize the turns
    rendered = [talk_of(row, talk, tokenizer, num_shared) for talk in whole]
    if not all(talk.trained for talk in rendered):
        return [], [Completion([], []) for _ in rendered]
    prompt_ids = rendered[0].ids(tokenizer, num_shared)
    return prompt_ids, [_completion(talk, prompt_ids, tokenizer) for talk in rendered]


def _conversation(row: Row, column: str, prompt: list[Turn]) -> list[Turn]:
    """Return the prompt and row[column] as one list of turns. If the column repeats the prompt, it is taken once."""
    value = row.take(column)
    if not isinstance(value, str):
        turns = messages_in([value] if isinstance(value, dict) else value, column)
        return turns if prompt and _end_of_prompt(prompt, turns) else [*prompt, *turns]
    if prompt:
        return [*prompt, answered(value, column)]

    # one text that holds a whole conversation
    parts = HH_TURN.split(value)
    if len(parts) > 1 and not parts[0]:
        roles = {"Human": "user", "Assistant": "assistant"}
        turns = zip(parts[1::2], parts[2::2], strict=True)
        return messages_in([{"role": roles[who], "content": text.strip()} for who, text in turns], column)
    raise InputError(
        f"{column}: expected a prompt column beside this text, or messages, or a text like "
        f"'\\n\\nHuman: ...\\n\\nAssistant: ...', got {value!r:.60}"
    )


def _end_of_prompt(prompt: list[Turn], talk: list[Turn]) -> int:
    """Return the number of turns in `talk` up to the end of the prompt, or 0 if `talk` does not begin with the prompt.

    System messages before the prompt are allowed, and counted.
    """
    for start, turn in enumerate(talk):
        repeated = talk[start : start + len(prompt)]
        if len(repeated) == len(prompt) and all(map(same_turn, repeated, prompt)):
            return start + len(prompt)
        if turn["role"] not in ("system", "developer"):
            break
    return 0


def _num_shared_turns(talks: Sequence[list[Turn]]) -> int:
    """Return the largest number of leading turns that all conversations share and follow with an answer, or 0."""
    is_shared = lambda turns: all(same_turn(turn, turns[0]) for turn in turns)
    num_alike = len(list(takewhile(is_shared, zip(*talks, strict=False))))

    # the last shared turn may be an answer; the prompt then ends earlier
    for count in range(num_alike, 0, -1):
        following = [talk[count]["role"] for talk in talks if count < len(talk)]
        if following == ["assistant"] * len(talks):
            return count
    return 0


def _completion(talk: Talk, prompt: list[int], tokenizer: Tokenizer) -> Completion:
    """Return the completion: the tokens after the prompt, up to the end of the assistant's last turn.

    Tokens of other roles are not trained. The completion is empty if an assistant turn has no content.
    """
    answers = [turn for turn in talk.messages[talk.given :] if turn["role"] == "assistant"]
    if not all(map(says_something, answers)):
        return Completion([], [])

    # render the whole conversation once, so that each turn is masked as the template writes it in this place
    messages = talk.messages[: talk.trained[-1] + 1]
    tokens, mask = tokenizer.encode_chat_with_mask(messages, turns=talk.trained, **talk.variables)
    if tokens[: len(prompt)] != prompt:
        raise InputError(
            "the chat template renders the prompt with its completion differently from the prompt alone"
        )

    # a template may write more after the stop token: the last turn ends with the stop token
    end = max(i for i, trained in enumerate(mask) if trained) + 1
    last_turn = max((i + 1 for i in range(end) if not mask[i]), default=0)
    stops = (i + 1 for i in range(last_turn, end) if tokens[i] in tokenizer.stop_ids)
    end = next(stops, end)
    return Completion(tokens[len(prompt) : end], mask[len(prompt) : end])
