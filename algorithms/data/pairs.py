"""Rows of judged answers -> a prompt and completions to compare, and how they lie in one forward pass.

    chosen and rejected        with a prompt in a column of its own (text, question, instruction, messages), or as two
                               conversations that begin alike (HH-RLHF's "\\n\\nHuman: ...\\n\\nAssistant: ..." is one)
    completion and label       with a prompt, for KTO: label is true where the completion is wanted

Nothing is cut: half an answer is another answer, so what is longer than max_length is dropped and counted.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...model.errors import InputError
from ...model.packed import Packed, pack
from ...model.scalar import ScalarModel
from ...model.text.tokenizer import Tokenizer
from ...model.transformer import Transformer
from ..run.loop import autocast, report_counts
from ..run.processes import IDLE, rank, reshard, shares, sum_over_processes
from .examples import PROMPT_COLUMNS, answer_text, check_rendered, encode_completion, read_prompt
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
from .rows import Row, Tally, opened, read_rows

HH_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Completion:
    """What follows a prompt. mask: which tokens are the assistant's; the last one always is, and ends its turn."""

    tokens: list[int]
    mask: list[bool]


@dataclass(frozen=True)
class Preference:
    prompt: list[int]
    chosen: Completion
    rejected: Completion
    margin: float = 0.0  # the row's own number for how much better chosen is
    where: str = field(default="", kw_only=True, compare=False)  # its file and line

    @property
    def completions(self) -> list[Completion]:
        return [self.chosen, self.rejected]

    @property
    def sequences(self) -> list[list[int]]:
        """All ids that a model is to read of it."""
        return [self.prompt, self.chosen.tokens, self.rejected.tokens]


@dataclass(frozen=True)
class Judged:
    prompt: list[int]
    completion: Completion
    label: bool  # wanted
    where: str = field(default="", kw_only=True, compare=False)  # its file and line

    @property
    def completions(self) -> list[Completion]:
        return [self.completion]

    @property
    def sequences(self) -> list[list[int]]:
        """All ids that a model is to read of it."""
        return [self.prompt, self.completion.tokens]


Item = TypeVar("Item", Preference, Judged)


def num_tokens(item: Preference | Judged) -> int:
    """With the prompt once, as it is packed."""
    return len(item.prompt) + sum(len(completion.tokens) for completion in item.completions)


def longest(item: Preference | Judged) -> int:
    """Tokens of the prompt with its longest completion."""
    return len(item.prompt) + max(len(completion.tokens) for completion in item.completions)


# ---- rows


def load_pairs(
    path: Path | None, tokenizer: Tokenizer, cfg: Any, *, margins: bool = False
) -> list[Preference]:
    """The pairs of a file, none without one, after saying what became of its rows.

    cfg: of its flags row_template and max_length are read. margins: read that column.
    """
    if path is None:
        return []
    rows = read_rows(path, cfg.row_template)
    pairs, counts = preferences(rows, tokenizer, max_length=cfg.max_length, margins=margins)
    report_counts(path, counts)
    return pairs


def preferences(
    rows: Sequence[dict[str, Any]], tokenizer: Tokenizer, *, max_length: int, margins: bool = True
) -> tuple[list[Preference], Tally]:
    """Rows of chosen and rejected. max_length: of the prompt with either completion, in tokens.

    margins: read the column; otherwise all are 0. Returns the pairs, and how many rows and pairs there are and how many
    were dropped, and why. Raises InputError naming the row that is of another shape or impossible to mask, and where no
    pair is left.
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
    """Rows of a prompt, completion and label; or of chosen and rejected, each row two completions. As `preferences`."""

    def read(row: Row) -> tuple[list[Judged], str]:
        if "chosen" in row and "rejected" in row:
            prompt, (chosen, rejected) = _prompt_and_answers(row, ("chosen", "rejected"), tokenizer)
            judged = [Judged(prompt, chosen, True), Judged(prompt, rejected, False)]
        else:
            if "completion" not in row or "label" not in row:
                raise InputError(f"expected the columns completion and label, got {row.columns()}")
            if row.take("label") not in (0, 1):  # also False and True
                raise InputError(f"label: expected true or false, got {row['label']!r:.60}")
            prompt, answer = _prompt_and_answers(row, ("completion",), tokenizer)
            judged = [Judged(prompt, answer[0], bool(row["label"]))]
        if not all(one.completion.tokens for one in judged):
            return [], "dropped: empty completion"
        if max(map(longest, judged)) > max_length:
            return [], "dropped: longer than max_length"
        return judged, ""

    return _read_all(rows, read, "completions", tokenizer)


def _read_all(
    rows: Sequence[dict[str, Any]],
    read: Callable[[Row], tuple[list[Item], str]],
    name: str,
    tokenizer: Tokenizer,
) -> tuple[list[Item], Tally]:
    rows, counts = opened(rows, name)
    found: list[Item] = []
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
    check_rendered(rows, tokenizer)
    return found, counts


def _margin(row: Row) -> float:
    margin = row.take("margin") if "margin" in row else 0.0
    is_number = isinstance(margin, int | float) and not isinstance(margin, bool)
    if not is_number or not abs(margin) < 1e38:  # what fp32 holds
        raise InputError(f"margin: expected a number, got {margin!r:.60}")
    return float(margin)


def _prompt_and_answers(
    row: Row, columns: tuple[str, ...], tokenizer: Tokenizer
) -> tuple[list[int], list[Completion]]:
    """The prompt's ids and the completion in each of `columns`; empty ones where there is nothing to train."""
    name = next((name for name in PROMPT_COLUMNS if name in row), None)
    given = read_prompt(row, name, tokenizer) if name else []
    if isinstance(given, str) and (
        all(isinstance(row[column], str) for column in columns) or not given.strip()
    ):
        if not given.strip():
            raise InputError(f"{name}: empty")
        answers = [row.text(column) for column in columns]
        if name != "prompt":
            answers = [answer_text(given, answer) for answer in answers]
        tokens = [encode_completion(a, tokenizer, continues=True) if a.strip() else [] for a in answers]
        return tokenizer.encode_text(given), [Completion(t, [True] * len(t)) for t in tokens]
    if isinstance(given, str):  # the answers are messages
        given = asked(row, given, str(name))
    talks = [_conversation(row, column, given) for column in columns]
    shared = _shared_turns(talks) if len(given) == 0 or len(talks) > 1 else _end_of(given, talks[0])
    if shared < len(given):
        raise InputError(f"{' and '.join(columns)}: expected to begin with the assistant, behind the prompt")
    if shared == 0:
        raise InputError(
            f"{' and '.join(columns)}: no prompt: expected a column for it, or a shared beginning"
        )
    whole = [with_system(row, [*talks[0][:shared], *talk[shared:]]) for talk in talks]
    shared += len(whole[0]) - len(talks[0])
    for column, talk in zip(columns, whole, strict=True):
        if talk[-1]["role"] != "assistant":
            row.ignored.add(f"{column}: what stands behind the last answer")
    said = [talk_of(row, talk, tokenizer, shared) for talk in whole]
    if not all(talk.trained for talk in said):
        return [], [Completion([], []) for _ in said]
    prompt = said[0].ids(tokenizer, shared)
    return prompt, [_completion(talk, prompt, tokenizer) for talk in said]


def _conversation(row: Row, column: str, given: list[Turn]) -> list[Turn]:
    """The messages of the prompt and of row[column], which may repeat the prompt."""
    value = row.take(column)
    if isinstance(value, str):
        parts = HH_TURN.split(value)
        if not given and len(parts) > 1 and not parts[0]:
            roles = {"Human": "user", "Assistant": "assistant"}
            turns = zip(parts[1::2], parts[2::2], strict=True)
            return messages_in([{"role": roles[who], "content": text.strip()} for who, text in turns], column)
        if not given:
            raise InputError(
                f"{column}: a text without a prompt; expected a prompt column, messages, or HH-RLHF's "
                f"'\\n\\nHuman: ...\\n\\nAssistant: ...', got {value!r:.60}"
            )
        return [*given, answered(value, column)]
    turns = messages_in([value] if isinstance(value, dict) else value, column)
    return turns if given and _end_of(given, turns) else [*given, *turns]


def _end_of(given: list[Turn], talk: list[Turn]) -> int:
    """How many turns of a talk stand before its answer: the prompt, perhaps behind a system message; 0 without it."""
    for start, turn in enumerate(talk):
        repeated = talk[start : start + len(given)]
        if len(repeated) == len(given) and all(map(same_turn, repeated, given)):
            return start + len(given)
        if turn["role"] not in ("system", "developer"):
            break
    return 0


def _shared_turns(talks: Sequence[list[Turn]]) -> int:
    """How many messages all begin with, before a turn of the assistant in each."""
    alike = len(
        list(takewhile(lambda turn: all(same_turn(one, turn[0]) for one in turn), zip(*talks, strict=False)))
    )
    return next(
        (
            count
            for count in range(min(alike, *map(len, talks)), 0, -1)
            if all(talk[count : count + 1] and talk[count]["role"] == "assistant" for talk in talks)
        ),
        0,
    )


def _completion(talk: Talk, prompt: list[int], tokenizer: Tokenizer) -> Completion:
    """The tokens behind the prompt up to the end of the assistant's last turn, what others said in it unmasked."""
    own = [i for i in range(talk.given, len(talk.messages)) if talk.messages[i]["role"] == "assistant"]
    if not all(says_something(talk.messages[i]) for i in own):
        return Completion([], [])
    messages = talk.messages[: talk.trained[-1] + 1]
    tokens, mask = tokenizer.encode_chat_with_mask(messages, turns=talk.trained, **talk.variables)
    if tokens[: len(prompt)] != prompt:
        raise InputError(
            "the chat template's generation prompt does not begin its rendering of the completion"
        )
    end = max(i for i, trained in enumerate(mask) if trained) + 1
    last_turn = max((i + 1 for i in range(end) if not mask[i]), default=0)
    stops = (i + 1 for i in range(last_turn, end) if tokens[i] in tokenizer.stop_ids)
    end = next(stops, end)  # a template's marks may go on behind the token where sampling stops
    return Completion(tokens[len(prompt) : end], mask[len(prompt) : end])


# ---- packing


@dataclass(frozen=True)
class MicroBatch:
    """Prompts with their completions, packed. members: the index of each prompt among the items of the step."""

    packed: Packed
    members: list[int]
    last: Tensor  # (completions,) int64: the row of each completion's last token, in the order of the items
    rows: Tensor  # (tokens,) int64: the rows of the completions' trained tokens, completion by completion
    lengths: Tensor  # (completions,) int64: how many of them each completion has
    share: float  # of the step's tokens

    def sums(self, logprob: Tensor) -> Tensor:
        """logprob (tokens,) of `rows` -> its sum over each completion, (completions,)."""
        return torch.segment_reduce(logprob, "sum", lengths=self.lengths, unsafe=True)


def micro_batches(items: Sequence[Preference | Judged], capacity: int, device: str) -> list[MicroBatch]:
    """Items in micro-batches of about `capacity` tokens: [prompt][chosen][rejected], the prompt being their parent.
    Those of this process, the last perhaps without an item.

    A preference has two completions, 2i and 2i + 1; a judged completion is one.
    """
    lengths = [num_tokens(item) for item in items]
    batches = []
    for members in shares(lengths, capacity):
        share = sum(lengths[i] for i in members) / sum(lengths)
        batches.append(_micro_batch([items[i] for i in members], members, share, device))
    return batches


def _micro_batch(
    items: Sequence[Preference | Judged], members: list[int], share: float, device: str
) -> MicroBatch:
    sequences: list[list[int]] = []
    parents: list[int] = []
    trained: list[bool] = []
    lengths: list[int] = []
    ends: list[int] = []
    for item in items:
        parent = len(sequences)
        sequences.append(item.prompt)
        parents.append(-1)
        trained += [False] * len(item.prompt)
        for completion in item.completions:
            sequences.append(completion.tokens)
            parents.append(parent)
            trained += completion.mask
            lengths.append(sum(completion.mask))
            ends.append(len(trained) - 1)
    return MicroBatch(
        packed=pack(sequences or IDLE, parents or None, device),
        members=members,
        last=torch.tensor(ends, dtype=torch.int64, device=device),
        rows=torch.tensor(trained).nonzero().squeeze(1).to(device),
        lengths=torch.tensor(lengths, dtype=torch.int64, device=device),
        share=share,
    )


def completion_logprobs(
    model: Transformer, items: Sequence[Preference | Judged], capacity: int, device: str
) -> Tensor:
    """Sums over the completions' tokens, (items, completions of each) fp32 on the CPU. Dropout is off."""
    return _over_completions(
        model, items, lambda m: m.sums(model.score(m.packed, m.rows)[0]), capacity, device
    )


def completion_scores(
    model: ScalarModel, items: Sequence[Preference | Judged], capacity: int, device: str
) -> Tensor:
    """A reward model's, (items, completions of each) fp32 on the CPU. Dropout is off."""
    return _over_completions(model, items, lambda m: model.values(m.packed, m.last), capacity, device)


@torch.no_grad()
def _over_completions(
    model: Transformer | ScalarModel,
    items: Sequence[Preference | Judged],
    function: Callable[[MicroBatch], Tensor],
    capacity: int,
    device: str,
) -> Tensor:
    training = model.training
    model.eval()
    found = torch.zeros(len(items), len(items[0].completions) if items else 0)
    for micro in micro_batches(items, capacity, device):
        with autocast(device):
            values = function(micro)  # (completions,)
        found[micro.members] = values.view(-1, found.shape[1]).float().cpu()
    model.train(training)
    reshard(model)
    return sum_over_processes(found)


def pair_metrics(chosen: Tensor, rejected: Tensor, num_pairs: int) -> dict[str, float]:
    """What two scores (pairs,) of a micro-batch add to the means over the step's num_pairs pairs."""
    chosen, rejected = chosen.detach(), rejected.detach()
    values = {
        "accuracy": (chosen > rejected).float(),
        "margin": chosen - rejected,
        "chosen": chosen,
        "rejected": rejected,
    }
    return {name: value.sum().item() / num_pairs for name, value in values.items()}


# ---- held-out pairs


def report_held_out(folder: Path, **scores: Tensor) -> None:
    """Print accuracy and margin of scores (pairs, 2), and keep them in held_out.json: one entry a keyword.

    The standard error of an accuracy p over n pairs is sqrt(p (1 - p) / n).
    """
    results = {}
    for name, both in scores.items():
        chosen, rejected = both.unbind(1)
        p, n = (chosen > rejected).float().mean().item(), len(both)
        error = (p * (1 - p) / n) ** 0.5
        margin = (chosen - rejected).mean().item()
        results[name] = {"accuracy": p, "standard_error": error, "margin": margin, "pairs": n}
        print(
            f"held out, {name}: accuracy {100 * p:.1f} ± {100 * error:.1f} %, margin {margin:.3g}, {n} pairs"
        )
    if rank():
        return
    try:
        (folder / "held_out.json").write_text(json.dumps(results, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"{folder / 'held_out.json'}: cannot be written: {error}") from error
