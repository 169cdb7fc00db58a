"""Rows of a file -> token sequences to train on, or prompts to sample from. docs/data.md shows every shape.

A row is never dropped without a count, and a file never half read: a line that is no row is an error with its number.
Tokens are joined, so a prompt's ids are those that generation starts from; the end token is trained, and a row that
max_length cuts does not get one.
"""

import gzip
import json
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TextIO

from ..model.errors import InputError
from ..model.tokenizer import Message, Tokenizer, TurnRewritten

SHAPES = {  # what the columns of a row mean to SFT: the first shape that a row has all columns of
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "prompt and completion": ("prompt", "completion"),
    "text": ("text",),
    "question and answer": ("question", "answer"),
    "Alpaca": ("instruction", "output"),
    "self-instruct": ("instruction", "instances"),
}
PROMPT_COLUMNS = ("prompt", "question", "instruction", "messages", "conversations")  # in this order
RESERVED_COLUMNS = (
    "prompt",
    "prompts",
    "completion",
    "completions",
    "completion_ids",
)  # a reward function's own

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}

ALPACA_TASK = (  # for a base model, as https://github.com/tatsu-lab/stanford_alpaca trains it
    "Below is an instruction that describes a task{and_input}. "
    "Write a response that appropriately completes the request."
)
ALPACA_INPUT = ", paired with an input that provides further context"


class Row(dict[str, Any]):
    """A row that knows its file and line, for messages."""

    where = ""


@dataclass(frozen=True)
class Example:
    """mask[0] is False: nothing predicts a sequence's first token."""

    tokens: list[int]
    mask: list[bool]  # which tokens are trained


@dataclass(frozen=True)
class Prompt:
    tokens: list[int]
    text: str | list[Message]  # what a reward function sees
    columns: dict[str, Any]  # the row's other columns


@dataclass(frozen=True)
class Conversation:
    messages: list[Message]
    given: int  # the messages before this one are the prompt, and not trained


@dataclass(frozen=True)
class Pair:
    prompt: str
    completion: str


# ---- files


def read_rows(path: Path | str) -> list[Row]:
    """path: .jsonl or .json (a list, or JSONL by another name), either also .gz; or .parquet, which needs pyarrow.

    Blank lines are no rows. Raises InputError for a file that is missing, broken or empty, naming the line.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    kinds = [suffix for suffix in path.suffixes if suffix != ".gz"]
    kind = kinds[-1] if kinds else ""
    if kind == ".parquet":
        rows = _read_parquet(path)
    elif kind in (".jsonl", ".json"):
        opener = gzip.open if path.suffix == ".gz" else open
        try:
            with opener(path, "rt", encoding="utf-8-sig") as file:
                rows = list(_read_json(path, file, may_be_list=kind == ".json"))
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text: {error}") from error
        except (EOFError, gzip.BadGzipFile) as error:
            raise InputError(f"{path}: not a whole gzip file: {error}") from error
    else:
        raise InputError(f"{path}: expected .jsonl, .json, .jsonl.gz, .json.gz or .parquet")
    if not rows:
        raise InputError(f"{path}: has no rows")
    return rows


def _read_json(path: Path, file: TextIO, may_be_list: bool) -> Iterator[Row]:
    first = file.readline() if may_be_list else ""
    if may_be_list and first.lstrip()[:1] in ("[", ""):
        try:
            values = json.loads(first + file.read())
        except ValueError as error:
            raise InputError(f"{path}: not JSON: {error}") from error
        if not isinstance(values, list):
            raise InputError(f"{path}: expected a list of objects, got {type(values).__name__}")
        for i, value in enumerate(values):
            yield _row(value, f"{path} entry {i + 1}")
        return
    for i, line in enumerate(chain([first] if may_be_list else [], file)):
        if not line.strip():
            continue
        where = f"{path} line {i + 1}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: not JSON: {error}; the line begins {line.strip()[:60]!r}") from error
        yield _row(value, where)


def _read_parquet(path: Path) -> list[Row]:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(f"{path}: reading parquet needs pyarrow: pip install 'burnish[parquet]'") from error
    try:
        values = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a parquet file that can be read: {error}") from error
    return [_row(value, f"{path} row {i + 1}") for i, value in enumerate(values)]


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object with named columns, got {value!r:.60}")
    row = Row({name: cell for name, cell in value.items() if cell is not None})
    row.where = where
    return row


def place_of(row: dict[str, Any], index: int) -> str:
    return row.where if isinstance(row, Row) else f"row {index + 1}"


# ---- supervised fine-tuning


def sft_examples(
    rows: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    train_on: Literal["completion", "all"] = "completion",
) -> tuple[list[Example], Counter[str]]:
    """Returns the examples, and how many rows and examples there are and what was truncated or dropped, and why.

    A row is one example, except that self-instruct rows have one an instance, and a conversation whose template
    rewrites earlier turns (Qwen3 drops their reasoning) one an assistant turn: the sequence that generation would see.
    Raises InputError naming the row: of another shape than the first, of no known shape, or impossible to mask; and
    where no example is left.
    """
    examples: list[Example] = []
    counts = Counter(rows=len(rows), examples=0)
    shape = _shape(rows[0]) if rows else None
    first_drop = ""
    known = "; ".join(f"{name} ({', '.join(columns)})" for name, columns in SHAPES.items())
    for index, row in enumerate(rows):
        where = place_of(row, index)
        found = _shape(row)
        if found is None:
            raise InputError(
                f"{where}: no shape that SFT reads has the columns {column_names(row)}; known are {known}"
            )
        if found != shape:
            raise InputError(
                f"{where}: is of the shape '{found}', {place_of(rows[0], 0)} is '{shape}'; one file has one shape"
            )
        try:
            encoded = list(
                _encode_row(_units(row, found, tokenizer.chat_template is not None), tokenizer, train_on)
            )
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        counts["from conversations split by turn"] += (
            len(encoded) if len(encoded) > 1 and found != "self-instruct" else 0
        )
        for tokens, mask in encoded or [([], [])]:
            tokens, mask, cut = tokens[:max_length], [False, *mask[1:max_length]], len(tokens) > max_length
            if any(mask):
                examples.append(Example(tokens, mask))
                counts["examples"] += 1
                counts["truncated"] += cut
            else:
                counts[
                    "dropped: no trained token within max_length" if cut else "dropped: no token to train on"
                ] += 1
                first_drop = first_drop or where
    if not examples:
        raise InputError(
            f"no row has a token to train on{f' (the first: {first_drop})' if first_drop else ''}"
        )
    return examples, +counts


def _encode_row(
    units: Iterable[str | Pair | Conversation], tokenizer: Tokenizer, train_on: Literal["completion", "all"]
) -> Iterator[tuple[list[int], list[bool]]]:
    for unit in units:
        if isinstance(unit, Conversation):
            yield from _encode_conversation(unit, tokenizer, train_on)
            continue
        prompt, completion = (unit.prompt, unit.completion) if isinstance(unit, Pair) else ("", unit)
        if not completion.strip():
            continue
        given = tokenizer.encode_text(prompt) if prompt else []
        written = encode_completion(completion, tokenizer, continues=bool(prompt))
        if not written:
            continue
        yield given + written, [train_on == "all"] * len(given) + [True] * len(written)


def encode_completion(text: str, tokenizer: Tokenizer, *, continues: bool) -> list[int]:
    """The ids of a text and its end token; none where the text has none. continues: it stands behind a prompt."""
    written = tokenizer.encode(text, continues=True) if continues else tokenizer.encode_text(text)
    if written and written[-1] not in tokenizer.stop_ids:
        if tokenizer.eos_id is None:
            raise InputError("the tokenizer names no eos_token, so a completion cannot be ended")
        written.append(tokenizer.eos_id)
    return written


def _encode_conversation(
    unit: Conversation, tokenizer: Tokenizer, train_on: Literal["completion", "all"]
) -> Iterator[tuple[list[int], list[bool]]]:
    messages = unit.messages
    turns = [i for i, m in enumerate(messages) if i >= unit.given and m["role"] == "assistant"]
    if not turns:
        return
    if train_on == "all":
        tokens = tokenizer.encode_chat(messages)
        yield tokens, [True] * len(tokens)
        return
    try:
        tokens, mask = tokenizer.encode_chat_with_mask(messages)
    except TurnRewritten:
        for turn in turns:
            yield tokenizer.encode_chat_with_mask(messages[: turn + 1], last_turn_only=True)
        return
    if unit.given:
        given = tokenizer.encode_chat(messages[: unit.given], add_generation_prompt=True)
        if tokens[: len(given)] != given:
            raise InputError(
                "the chat template's generation prompt does not begin its rendering of the completion"
            )
        mask = [False] * len(given) + mask[len(given) :]
    yield tokens, mask


def _units(row: dict[str, Any], shape: str, has_template: bool) -> Iterator[str | Pair | Conversation]:
    """What there is to train in a row. A question or instruction is a user's turn where there is a chat template."""
    if shape == "text":
        yield read_text(row, "text")
    elif shape in ("messages", "ShareGPT"):
        yield Conversation(read_messages(row, "messages" if shape == "messages" else "conversations"), 0)
    elif shape == "prompt and completion" and isinstance(row["prompt"], list):
        prompt, completion = read_messages(row, "prompt"), read_messages(row, "completion")
        if completion and completion[0]["role"] != "assistant":
            raise InputError(
                f"completion: expected to begin with the assistant, got role '{completion[0]['role']}'"
            )
        yield Conversation(prompt + completion, len(prompt))
    elif shape == "prompt and completion":
        yield Pair(read_text(row, "prompt"), read_text(row, "completion"))
    else:
        instances = row["instances"] if shape == "self-instruct" else [row]
        if not isinstance(instances, list) or not all(isinstance(instance, dict) for instance in instances):
            raise InputError(f"instances: expected a list of objects, got {instances!r:.60}")
        for instance in instances:
            question = _question(row | instance, has_template)
            answer = read_text(instance, "answer" if shape == "question and answer" else "output")
            if not has_template:
                yield Pair(question, answer_text(question, answer))
            elif answer.strip():
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                yield Conversation(turns, 0)


def answer_text(question: str, answer: str) -> str:
    """What a base model writes behind a question's text: one that ends in a colon is followed by a space."""
    return " " + answer if question.endswith(":") else answer


def _question(row: dict[str, Any], has_template: bool) -> str:
    """A row's question or instruction as a user's turn, or as the text that has a base model go on with the answer."""
    if row.get("question") is not None:
        question = read_text(row, "question")
        return question if has_template else f"Question: {question}\nAnswer:"
    instruction = read_text(row, "instruction")
    more = read_text(row, "input") if row.get("input") else ""
    if has_template:
        return f"{instruction}\n\n{more}" if more else instruction
    task = ALPACA_TASK.format(and_input=ALPACA_INPUT if more else "")
    context = f"### Input:\n{more}\n\n" if more else ""
    return f"{task}\n\n### Instruction:\n{instruction}\n\n{context}### Response:\n"


def _shape(row: dict[str, Any]) -> str | None:
    return next(
        (shape for shape, names in SHAPES.items() if all(row.get(name) is not None for name in names)), None
    )


def read_text(row: dict[str, Any], column: str) -> str:
    if not isinstance(value := row.get(column), str):
        raise InputError(f"{column}: expected text, got {value!r:.60}")
    return value


def read_messages(row: dict[str, Any], column: str) -> list[Message]:
    """Messages as templates know them; ShareGPT's from and value become role and content."""
    values = row.get(column)
    if not isinstance(values, list):
        raise InputError(f"{column}: expected a list of messages, got {values!r:.60}")
    messages = []
    if column == "conversations" and isinstance(system := row.get("system"), str):
        messages.append({"role": "system", "content": system})
    for i, value in enumerate(values):
        if isinstance(value, dict) and "from" in value and "value" in value:
            if value["from"] not in SHAREGPT_ROLES:
                known = ", ".join(SHAREGPT_ROLES)
                raise InputError(
                    f"{column}, message {i + 1}: unknown 'from' {value['from']!r:.60}; known are {known}"
                )
            value = {"role": SHAREGPT_ROLES[value["from"]], "content": value["value"]}
        if not isinstance(value, dict) or not isinstance(value.get("role"), str):
            raise InputError(
                f"{column}, message {i + 1}: expected an object with a role and content, got {value!r:.60}"
            )
        messages.append(value)
    return messages


# ---- reinforcement learning


def rl_prompts(
    rows: Sequence[dict[str, Any]], tokenizer: Tokenizer, *, max_length: int, prompt_column: str | None = None
) -> tuple[list[Prompt], Counter[str]]:
    """Returns the prompts, and how many rows and prompts there are and how many were dropped, and why.

    prompt_column: where the prompt stands; by default the first of PROMPT_COLUMNS that the first row has. A list of
    messages goes through the chat template; so does a question, an instruction, or the text of a column that was named,
    as a user's turn, where the model has a template. The text of a `prompt` column is taken as it is.
    Every prompt has the same columns, None where its row lacks one. Raises InputError naming the row without a usable
    prompt, and where no prompt is left.
    """
    prompts: list[Prompt] = []
    counts = Counter(rows=len(rows), prompts=0)
    column = prompt_column or next(
        (name for name in PROMPT_COLUMNS if rows and rows[0].get(name) is not None), None
    )
    if column is None and rows:
        expected = ", ".join(PROMPT_COLUMNS)
        raise InputError(
            f"{place_of(rows[0], 0)}: no prompt among columns {column_names(rows[0])}; expected one of {expected}"
        )
    columns = dict.fromkeys(name for row in rows for name in row if name not in RESERVED_COLUMNS)
    for index, row in enumerate(rows):
        try:
            text = read_prompt(row, str(column), tokenizer.chat_template is not None)
            if isinstance(text, str):
                tokens = tokenizer.encode_text(text) if text.strip() else []
            else:
                tokens = tokenizer.encode_chat(text, add_generation_prompt=True) if text else []
        except InputError as error:
            raise InputError(f"{place_of(row, index)}: {error}") from error
        if not tokens:
            counts["dropped: empty prompt"] += 1
        elif len(tokens) > max_length:
            counts["dropped: prompt longer than max_length"] += 1
        else:
            prompts.append(Prompt(tokens, text, {name: row.get(name) for name in columns}))
            counts["prompts"] += 1
    if not prompts:
        reasons = ", ".join(
            f"{count} {reason}" for reason, count in counts.items() if count and reason != "rows"
        )
        raise InputError(f"no prompt to sample from: {len(rows)} rows{f', {reasons}' if reasons else ''}")
    return prompts, counts


def read_prompt(row: dict[str, Any], column: str, has_template: bool) -> str | list[Message]:
    if column not in row:
        raise InputError(f"expected a prompt in column '{column}', got columns {column_names(row)}")
    if isinstance(row[column], list):
        messages = read_messages(row, column)
        if messages and messages[-1]["role"] == "assistant":
            raise InputError(f"{column}: ends with the assistant's turn, so nothing is left to answer")
        return messages
    if column == "prompt":
        return read_text(row, column)
    text = _question(row, has_template) if column in ("question", "instruction") else read_text(row, column)
    return [{"role": "user", "content": text}] if has_template and text.strip() else text


def column_names(row: dict[str, Any]) -> str:
    return ", ".join(row) or "(none)"


# ---- packing


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `capacity`, best-fit-decreasing: the longest first, each into the fullest
    bin that has room. Sequences are never split: one longer than capacity has a bin of its own. Deterministic.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(rooms, (lengths[index], -1))
        if place == len(rooms):
            room, chosen = capacity, len(bins)
            bins.append([])
        else:
            room, chosen = rooms.pop(place)
        bins[chosen].append(index)
        insort(rooms, (room - lengths[index], chosen))
    return bins
