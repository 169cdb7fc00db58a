"""Conversion of a file's rows to token sequences to train on, or to prompts to sample from.

docs/data.md shows every shape of a row. Every dropped row is counted. A line that is not a row raises an error with the
number of the line, so no file is read only in part. Prompt and completion are tokenized separately, and their ids are
joined. Training thus sees the same prompt ids as generation. The end token of a completion is trained, too. A row that
is truncated to max_length loses its end token.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...model.errors import InputError
from ...model.text.tokenizer import Message, Tokenizer, TurnRewritten
from ..run.batch import Completion
from .items import Items, load_items
from .messages import (
    Talk,
    Turn,
    answered,
    asked,
    no_assistant,
    prompt_of,
    read_messages,
    talk_of,
    with_system,
)
from .row import SHAPES, Row
from .rows import Tally, opened

PROMPT_COLUMNS = ("prompt", "question", "instruction", "messages", "conversations")  # in this order
RESERVED_COLUMNS = (  # arguments of a reward function that do not come from the row's columns
    *("prompt", "prompts", "completion", "completions", "completion_ids"),
    *("trainer_state", "log_metric", "log_extra"),
)

ALPACA_TASK = (  # for a base model; the text of https://github.com/tatsu-lab/stanford_alpaca
    "Below is an instruction that describes a task{and_input}. "
    "Write a response that appropriately completes the request."
)
ALPACA_INPUT = ", paired with an input that provides further context"


@dataclass(frozen=True)
class Example:
    """A token sequence with a mask of its trained tokens. mask[0] is False: no token predicts the first token."""

    tokens: list[int]
    mask: list[bool]  # True for each trained token
    where: str = field(default="", kw_only=True, compare=False)  # file and line of the row

    @property
    def sequences(self) -> list[list[int]]:
        """The one token sequence that the model reads for this example, in a list."""
        return [self.tokens]

    @property
    def prompt(self) -> list[int]:
        """An empty list: the whole row counts as a completion, and `mask` marks its trained tokens."""
        return []

    @property
    def completions(self) -> list[Completion]:
        return [Completion(self.tokens, self.mask)]


@dataclass(frozen=True)
class Prompt:
    tokens: list[int]
    text: str | list[Message]  # the prompt that a reward function receives
    columns: dict[str, Any]  # the row's other columns
    where: str = field(default="", kw_only=True, compare=False)  # file and line of the row

    @property
    def sequences(self) -> list[list[int]]:
        """The one token sequence that the model reads for this prompt, in a list."""
        return [self.tokens]


@dataclass(frozen=True)
class Pair:
    prompt: str
    completion: str


# ---- supervised fine-tuning


def load_examples(cfg: Any, tokenizer: Tokenizer, limit: int | None = None) -> Items[Example]:
    """Load the examples of --data, and print how many rows were used, cut and dropped.

    cfg: the flags; besides those that `load_items` reads, only max_length and train_on are read. limit: use
    only this many rows from the start of each argument of --data.
    """
    options = {"max_length": cfg.max_length, "train_on": cfg.train_on}
    return load_items(cfg, tokenizer, lambda rows: sft_examples(rows[:limit], tokenizer, **options))


def sft_examples(
    rows: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    train_on: Literal["completion", "all"] = "completion",
) -> tuple[list[Example], Tally]:
    """Return (examples, counts). The counts give rows, examples, and truncated and dropped rows with the reasons.

    A row becomes one example, with two exceptions. A self-instruct row becomes one example per instance. Some chat
    templates rewrite earlier turns (Qwen3's drops their reasoning). With such a template, a conversation becomes one
    example per assistant turn. Each example is then the sequence that the model sees when it generates this turn.

    Raises InputError if no example is left. Raises InputError naming the row if its shape is unknown or differs from
    the first row's, or if its trained tokens cannot be found in the rendered text.
    """
    rows, counts = opened(rows, "examples")
    examples: list[Example] = []
    first_drop = ""
    for row in rows:
        # 1. turn the row into one or more sequences of ids
        try:
            shape = _shape_as_in(row, rows[0])
            encoded = list(_encode_row(_units(row, shape, tokenizer), tokenizer, train_on))
        except InputError as error:
            raise InputError(f"{row.where}: {error}") from error
        if len(encoded) > 1 and shape != "self-instruct":
            counts["from conversations split by turn"] += len(encoded)

        # 2. cut each sequence and count it
        for tokens, mask in encoded or [([], [])]:
            tokens, mask, cut = tokens[:max_length], [False, *mask[1:max_length]], len(tokens) > max_length
            if any(mask):
                examples.append(Example(tokens, mask, where=row.where))
                counts.update(["examples", "truncated"] if cut else ["examples"])
            else:
                why = "no trained token within max_length" if cut else "no token to train on"
                counts[f"dropped: {why}"] += 1
                first_drop = first_drop or row.where

    counts.close(rows)
    if not examples:
        reasons = ", ".join(f"{n} {why}" for why, n in counts.items() if n and why != "rows")
        first = f" (the first: {first_drop}): {reasons}" if first_drop else ""
        first += f"; max_length is {max_length}" if "within max_length" in reasons else ""
        raise InputError(f"no row has a token to train on{first}")
    return examples, counts


def _shape_as_in(row: Row, first: Row) -> str:
    """Return the name of the row's shape. Raises InputError if no shape fits, or if it differs from the first row's."""
    found = _shape(row)
    if found is None:
        known = "; ".join(f"{name} ({', '.join(columns)})" for name, columns in SHAPES.items())
        raise InputError(f"expected the columns of one of these shapes: {known}; got {row.columns()}")
    if found != _shape(first):
        raise InputError(
            f"expected the shape '{_shape(first)}' of {first.where}, got '{found}'; one file has one shape"
        )
    return found


def _shape(row: Row) -> str | None:
    return next((shape for shape, names in SHAPES.items() if all(name in row for name in names)), None)


def _encode_row(
    units: Iterable[str | Pair | Talk], tokenizer: Tokenizer, train_on: Literal["completion", "all"]
) -> Iterator[tuple[list[int], list[bool]]]:
    for unit in units:
        if isinstance(unit, Talk):
            yield from _encode_talk(unit, tokenizer, train_on)
            continue

        prompt, completion = (unit.prompt, unit.completion) if isinstance(unit, Pair) else ("", unit)
        if not completion.strip():
            continue
        prompt_ids = tokenizer.encode_text(prompt) if prompt else []
        ids = encode_completion(completion, tokenizer, continues=bool(prompt))
        if ids:
            yield prompt_ids + ids, [train_on == "all"] * len(prompt_ids) + [True] * len(ids)


def encode_completion(text: str, tokenizer: Tokenizer, *, continues: bool) -> list[int]:
    """Return the ids of a text with an end token appended, or [] for a text without tokens.

    continues: the text follows a prompt. Raises InputError if the tokenizer has no end token.
    """
    ids = tokenizer.encode(text, continues=True) if continues else tokenizer.encode_text(text)
    if ids and ids[-1] not in tokenizer.stop_ids:
        if tokenizer.eos_id is None:
            raise InputError("the tokenizer has no eos_token, so a completion cannot be ended")
        ids.append(tokenizer.eos_id)
    return ids


def _encode_talk(
    talk: Talk, tokenizer: Tokenizer, train_on: Literal["completion", "all"]
) -> Iterator[tuple[list[int], list[bool]]]:
    if not talk.trained:
        return
    if train_on == "all":
        yield _encode_whole(talk, tokenizer)
        return
    try:
        tokens, mask = tokenizer.encode_chat_with_mask(talk.messages, turns=talk.trained, **talk.variables)
    except TurnRewritten:
        for turn in talk.trained:
            before = talk.messages[: turn + 1]
            yield tokenizer.encode_chat_with_mask(before, turns=[turn], **talk.variables)
        return

    # the given turns and the generation prompt are not trained
    if talk.given:
        prompt = talk.ids(tokenizer, talk.given)
        if tokens[: len(prompt)] != prompt:
            raise InputError(
                "the chat template renders the prompt with its completion differently from the prompt alone"
            )
        mask = [False] * len(prompt) + mask[len(prompt) :]
    yield tokens, mask


def _encode_whole(talk: Talk, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Return (ids, mask) of a conversation. All is trained except the assistant turns with weight 0 or train false."""
    if not talk.left_out:
        tokens = tokenizer.encode_chat(talk.messages, **talk.variables)
        return tokens, [True] * len(tokens)
    tokens, mask = tokenizer.encode_chat_with_mask(talk.messages, turns=talk.left_out, **talk.variables)
    return tokens, [not untrained for untrained in mask]


def _units(row: Row, shape: str, tokenizer: Tokenizer) -> Iterator[str | Pair | Talk]:
    """Yield the texts, pairs and conversations to train on from one row.

    A question becomes a user turn if the model has a chat template, and plain text otherwise.
    """
    if shape == "text":
        yield row.text("text")
    elif shape in ("messages", "ShareGPT"):
        turns = read_messages(row, "messages" if shape == "messages" else "conversations")
        yield _talk(row, turns, tokenizer)
    elif shape == "prompt and completion" and isinstance(row["prompt"], list):
        prompt, completion = read_messages(row, "prompt"), read_messages(row, "completion")
        if completion and completion[0]["role"] != "assistant":
            raise InputError(
                f"completion: expected to begin with the assistant, got role '{completion[0]['role']}'"
            )
        yield _talk(row, prompt + completion, tokenizer, len(completion))

    # texts
    elif shape == "prompt and completion":
        yield Pair(row.text("prompt"), row.text("completion"))
    elif shape in ("question and answer", "Alpaca", "self-instruct"):
        yield from _answers(row, shape, tokenizer)
    else:
        raise AssertionError(f"SHAPES has the shape '{shape}', for which nothing is built here")


def _talk(row: Row, turns: list[Turn], tokenizer: Tokenizer, last: int | None = None) -> Talk:
    """Return the conversation to train on. last: the number of final turns that form the completion (default: all)."""
    turns = with_system(row, turns)
    given = 0 if last is None else len(turns) - last
    no_assistant(turns[given:])
    return talk_of(row, turns, tokenizer, given)


def _answers(row: Row, shape: str, tokenizer: Tokenizer) -> Iterator[Pair | Talk]:
    """Yield the row's question with its answer. A self-instruct row yields one pair per instance."""
    column = "answer" if shape == "question and answer" else "output"
    for instance in _instances(row) if shape == "self-instruct" else [row]:
        question = read_question(instance, tokenizer)
        answer = instance.text(column)
        if isinstance(question, str):
            yield Pair(question, answer_text(question, answer))
        elif answer.strip():
            yield talk_of(row, with_system(row, [*question, answered(answer, column)]), tokenizer)


def _instances(row: Row) -> Iterator[Row]:
    instances = row.take("instances")
    if not isinstance(instances, list) or not all(isinstance(instance, dict) for instance in instances):
        raise InputError(f"instances: expected a list of objects, got {instances!r:.60}")
    for instance in instances:
        whole = Row(row | instance, row.where)
        yield whole
        row.used |= whole.used - instance.keys()
        row.ignored |= {f"instances.{name}" for name in instance if name not in whole.used}


def answer_text(question: str, answer: str) -> str:
    """Return the answer to append to the question, with a leading space if the question ends in a colon."""
    return " " + answer if question.endswith(":") else answer


def read_question(row: Row, tokenizer: Tokenizer) -> str | list[Turn]:
    """Return a row's question or instruction: as a user turn if the model has a chat template, else as plain text.

    As plain text, a question stands between "Question:" and "Answer:", and an instruction in Alpaca's frame.
    """
    if "question" in row:
        column, question = "question", row.text("question")
        text = f"Question: {question}\nAnswer:"
    else:
        column, question = "instruction", row.text("instruction")
        more = row.text("input") if row.take("input") else ""
        task = ALPACA_TASK.format(and_input=ALPACA_INPUT if more else "")
        context = f"### Input:\n{more}\n\n" if more else ""
        text = f"{task}\n\n### Instruction:\n{question}\n\n{context}### Response:\n"
        question = f"{question}\n\n{more}" if more else question
    if tokenizer.chat_template is not None:
        return asked(row, question, column)
    return text


# ---- reinforcement learning


def rl_prompts(
    rows: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    prompt_column: str | None = None,
    takes: Callable[[str], bool] = lambda column: False,
) -> tuple[list[Prompt], Tally]:
    """Return (prompts, counts). The counts give rows, prompts, and dropped rows with the reasons.

    prompt_column: the column of the prompt; by default the first of PROMPT_COLUMNS that the first row has. A list of
    messages goes through the chat template. The text of a `prompt` column is taken as it is. A question, an
    instruction, or the text of any other column becomes a user turn if the model has a chat template.
    takes: takes(name) is whether a reward function reads the column `name`.

    Every prompt has the same columns; a column that its row lacks is None. Raises InputError naming the row for
    a row without a usable prompt, and InputError if every row was dropped.
    """
    (rows, counts), total = opened(rows, "prompts"), len(rows)
    prompts: list[Prompt] = []
    column = prompt_column or next((name for name in PROMPT_COLUMNS if rows and name in rows[0]), None)
    if column is None and rows:
        expected = ", ".join(PROMPT_COLUMNS)
        raise InputError(
            f"{rows[0].where}: expected a prompt in one of the columns {expected}; got {rows[0].columns()}"
        )

    columns = dict.fromkeys(n for row in rows for n in row.of_file() if n not in RESERVED_COLUMNS)
    for row in rows:
        try:
            text, tokens = _encode_prompt(row, str(column), tokenizer)
        except InputError as error:
            raise InputError(f"{row.where}: {error}") from error
        if not tokens:
            counts["dropped: empty prompt"] += 1
        elif len(tokens) > max_length:
            counts["dropped: prompt longer than max_length"] += 1
        else:
            others = {name: row.of_file().get(name) for name in columns}
            prompts.append(Prompt(tokens, text, others, where=row.where))
            counts["prompts"] += 1

    counts.close(rows, lambda name: name not in RESERVED_COLUMNS and takes(name))
    if not prompts:
        drops = [f"{count} {reason}" for reason, count in counts.items() if count and reason != "rows"]
        first = f" (the first: {rows[0].where})" if rows else ""
        raise InputError(f"no prompt to sample from: {', '.join([f'{total} rows', *drops])}{first}")
    return prompts, counts


def _encode_prompt(row: Row, column: str, tokenizer: Tokenizer) -> tuple[str | list[Message], list[int]]:
    """Return (prompt, ids): the prompt as a reward function receives it, and its token ids, [] for an empty prompt."""
    prompt = read_prompt(row, column, tokenizer)
    if isinstance(prompt, str):
        return prompt, tokenizer.encode_text(prompt) if prompt.strip() else []
    turns = with_system(row, prompt)
    if not turns:
        return [], []
    return [dict(turn) for turn in turns], prompt_of(row, turns, tokenizer).ids(tokenizer)


def read_prompt(row: Row, column: str, tokenizer: Tokenizer) -> str | list[Turn]:
    """Return the prompt in a column, as text or as turns. The message of a `system` column is not added."""
    if column not in row:
        raise InputError(f"expected a prompt in column '{column}', got columns {row.columns()}")
    if isinstance(row[column], list):
        turns = read_messages(row, column)
        if turns and turns[-1]["role"] == "assistant":
            raise InputError(f"{column}: expected another role than 'assistant' in the last turn of a prompt")
        return turns
    if column == "prompt":
        return row.text(column)
    if column in ("question", "instruction"):
        question = read_question(row, tokenizer)
        return question if isinstance(question, str) or question[-1]["content"].strip() else ""
    text = row.text(column)
    return asked(row, text, column) if tokenizer.chat_template is not None and text.strip() else text
