"""What a student learns from: rows, prompts that it answers itself, or a file of lessons that `teach` wrote.

A file of lessons is one safetensors file:

    tokens    (total,) int32         all sequences, end to end
    trained   (total,) uint8         1 where a token is trained; n of them
    lengths   (lessons,) int64       of each sequence
    ids       (n, K) int32           the teacher's K most likely ids for each trained token, most likely first
    logprobs  (n, K) fp32            their log-probabilities, in nats, over the whole head at the temperature

What the K ids leave is one tail. ids and logprobs are absent where the sequences alone were kept. The metadata's
`lessons` is JSON: temperature, and tokenizer, a hash of its ids. 8 K bytes a trained token: 512 with K = 64.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...model.errors import InputError, shown
from ...model.files.text_files import check_regular, parse_json
from ...model.packed import Packed, pack
from ...model.text.tokenizer import Tokenizer
from ...model.transformer import Transformer
from ...model.vocabulary import Vocabulary
from ..run.loop import report_counts
from ..run.processes import IDLE, shares
from .examples import Example, rl_prompts, sft_examples
from .groups import own_samples, samples_of_all
from .rows import read_rows

DTYPES = {"tokens": "I32", "trained": "U8", "lengths": "I64", "ids": "I32", "logprobs": "F32"}
ROUNDING = 1e-3  # of a log-probability: that of a sure token may come out above 0


@dataclass(frozen=True)
class Lesson(Example):
    """Without a trained token it is a prompt. n is the number of trained tokens."""

    ids: Tensor | None = None  # (n, K) int32, the teacher's most likely ids
    logprobs: Tensor | None = None  # (n, K) fp32
    vocabulary: Vocabulary | None = None  # the ids that a model's own answer was drawn from

    @property
    def sequences(self) -> list[list[int]]:
        """All ids that a model is to read of it, or to score."""
        return [self.tokens, *([] if self.ids is None else [self.ids.flatten().tolist()])]

    @property
    def prompt(self) -> list[int]:
        """What stands before the first trained token; at least the first token, which nothing predicts."""
        return self.tokens[: self.mask.index(True)] if any(self.mask) else self.tokens


def load_lessons(
    data: Path,
    tokenizer: Tokenizer,
    *,
    row_template: Path | None = None,
    max_length: int,
    prompts_alone: bool,
    temperature: float | None,
) -> list[Lesson]:
    """The lessons of --data, after saying what became of its rows.

    prompts_alone: rows need no completion. temperature: that of stored log-probabilities; None where they are not read.
    """
    if data.suffix == ".safetensors":
        for flag, given in (("row-template", row_template), ("chat-template-kwargs", tokenizer.variables)):
            if given:
                raise InputError(f"--{flag}: {data} holds sequences, not rows: leave the flag out")
        lessons = read_lessons(data, tokenizer, temperature)
        counts = {"lessons": len(lessons), "trained tokens": sum(sum(lesson.mask) for lesson in lessons)}
    elif prompts_alone:
        prompts, counts = rl_prompts(read_rows(data, row_template), tokenizer, max_length=max_length)
        lessons = [Lesson(p.tokens, [False] * len(p.tokens), where=p.where) for p in prompts]
    else:
        examples, counts = sft_examples(read_rows(data, row_template), tokenizer, max_length=max_length)
        lessons = [Lesson(e.tokens, e.mask, where=e.where) for e in examples]
    report_counts(data, counts)
    return lessons


# ---- answers


def answered(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float,
    max_new_tokens: int,
    batch_size: int | None,
    seed: int,
    samples_per_prompt: int = 1,
) -> tuple[list[Lesson], float]:
    """Each prompt with what `model` says to it, all of it trained, the end token included; and the share that ended."""
    own = own_samples(
        model,
        tokenizer,
        prompts,
        samples_per_prompt=samples_per_prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
    )
    samples, lessons = samples_of_all(own, tokenizer.vocabulary), []
    for sample in samples:
        prompt = list(prompts[sample.prompt_index])
        mask = [False] * len(prompt) + [True] * len(sample.tokens)
        lessons.append(Lesson(prompt + sample.tokens, mask, vocabulary=sample.vocabulary))
    return lessons, sum(sample.ended for sample in samples) / len(samples)


# ---- micro-batches


@dataclass(frozen=True)
class MicroBatch:
    """Lessons laid end to end. n is the number of their trained tokens."""

    members: list[int]  # which lessons, by place
    packed: Packed
    rows: Tensor  # (n,) int64, into packed.tokens: the trained tokens
    ids: Tensor | None  # (n, K) int32
    logprobs: Tensor | None  # (n, K) fp32
    vocabulary: Vocabulary | None  # the ids that the answers were drawn from, None where they were given


def micro_batches(lessons: Sequence[Lesson], capacity: int, device: torch.device | str) -> list[MicroBatch]:
    """About `capacity` tokens in each: those of this process, the last perhaps without a lesson."""
    vocabulary = lessons[0].vocabulary
    vocabulary = None if vocabulary is None else vocabulary.to(device)
    batches, idle = [], replace(lessons[0], tokens=IDLE[0], mask=[False])
    if idle.ids is not None and idle.logprobs is not None:
        idle = replace(idle, ids=idle.ids[:0], logprobs=idle.logprobs[:0])
    for members in shares([len(lesson.tokens) for lesson in lessons], capacity):
        chosen = [lessons[i] for i in members] or [idle]
        trained = torch.tensor([m for lesson in chosen for m in lesson.mask])  # (total,)
        ids = [lesson.ids for lesson in chosen if lesson.ids is not None]
        logprobs = [lesson.logprobs for lesson in chosen if lesson.logprobs is not None]
        batches.append(
            MicroBatch(
                members,
                pack([lesson.tokens for lesson in chosen], device=device),
                trained.nonzero().squeeze(1).to(device),
                torch.cat(ids).to(device) if ids else None,
                torch.cat(logprobs).to(device) if logprobs else None,
                vocabulary,
            )
        )
    return batches


# ---- the file


def write_lessons(file: Path, lessons: Sequence[Lesson], tokenizer: Tokenizer, temperature: float) -> None:
    """All lessons have ids and logprobs of the same width, or none has."""
    tensors = {
        "tokens": torch.tensor([token for lesson in lessons for token in lesson.tokens], dtype=torch.int32),
        "trained": torch.tensor([m for lesson in lessons for m in lesson.mask], dtype=torch.uint8),
        "lengths": torch.tensor([len(lesson.tokens) for lesson in lessons]),
    }
    stored = [(lesson.ids, lesson.logprobs) for lesson in lessons]
    ids, logprobs = ([x for x in column if x is not None] for column in zip(*stored, strict=True))
    if ids:
        tensors |= {"ids": torch.cat(ids).contiguous(), "logprobs": torch.cat(logprobs).contiguous()}
    about = {"temperature": temperature, "tokenizer": _fingerprint(tokenizer)}
    beside = file.with_name(f".{file.name}.partial")
    try:
        save_file(tensors, beside, metadata={"lessons": json.dumps(about)})
        beside.replace(file)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise InputError(f"{file}: cannot be written: {error}") from error


def read_lessons(file: Path, tokenizer: Tokenizer, temperature: float | None) -> list[Lesson]:
    """Raises InputError where the file is broken, of another tokenizer, or its log-probabilities of a temperature."""
    tensors, about = _read_file(file)
    if about["tokenizer"] != _fingerprint(tokenizer):
        raise InputError(
            f"{file}: its teacher's tokenizer is not that of --model: the ids are of other tokens"
        )
    sizes = _check_sequences(file, tensors)
    tokens, trained = tensors["tokens"].long(), tensors["trained"].long()
    ids, logprobs = tensors.get("ids"), tensors.get("logprobs")
    _check_most_likely(file, ids, logprobs, int(trained.sum()))
    for name, x in (("tokens", tokens), ("ids", ids)):
        if x is not None and not (known := tokenizer.vocabulary.has(x)).all():
            end, wrong = tokenizer.vocabulary.end, int(x[~known][0])
            hole = ", which is none of them" if 0 <= wrong < end else ""
            raise InputError(
                f"{file}: {name}: expected the tokenizer's ids, 0 to {end - 1}, got {wrong}{hole}"
            )
    if ids is not None and temperature not in (None, about["temperature"]):
        raise InputError(
            f"{file}: its log-probabilities are at temperature {about['temperature']:g}, got --temperature "
            f"{temperature:g}"
        )
    counts = [int(part.sum()) for part in trained.split(sizes)]  # trained tokens of each
    none = [None] * len(sizes)
    parts = zip(
        tokens.split(sizes),
        trained.split(sizes),
        none if ids is None else ids.split(counts),
        none if logprobs is None else logprobs.split(counts),
        strict=True,
    )
    return [
        Lesson(t.tolist(), m.bool().tolist(), i, p, where=f"{file} lesson {n + 1}")
        for n, (t, m, i, p) in enumerate(parts)
    ]


def _read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, of the dtypes that `write_lessons` gives them, and what the metadata say."""
    check_regular(file)
    try:
        with safe_open(file, framework="pt") as opened:
            about = parse_json(opened.metadata()["lessons"], f"{file}: metadata: lessons")
            stored_at, made_for = about["temperature"], about["tokenizer"]
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                if name not in DTYPES:
                    raise InputError(f"{file}: {shown(name)}: expected one of {', '.join(DTYPES)} alone")
                if (dtype := str(opened.get_slice(name).get_dtype())) != DTYPES[name]:
                    raise InputError(f"{file}: {name}: expected the dtype {DTYPES[name]}, got {dtype}")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        for name in ("tokens", "trained", "lengths"):
            if tensors[name].ndim != 1:
                raise InputError(f"{file}: {name}: expected one dimension, got {tuple(tensors[name].shape)}")
    except InputError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{file}: not a file of lessons (burnish teach): {type(error).__name__}: {error}"
        ) from error
    is_number = isinstance(stored_at, int | float) and not isinstance(stored_at, bool)
    if not is_number or not 0 < stored_at <= sys.float_info.max:
        raise InputError(f"{file}: metadata: temperature: expected a number above 0, got {shown(stored_at)}")
    if not isinstance(made_for, str):
        raise InputError(f"{file}: metadata: tokenizer: expected text, got {shown(made_for)}")
    return tensors, about


def _check_sequences(file: Path, tensors: dict[str, Tensor]) -> list[int]:
    """The lengths of the sequences, which share out all tokens; the first of each is not trained."""
    total, trained = tensors["tokens"].numel(), tensors["trained"]
    sizes: list[int] = tensors["lengths"].tolist()
    if wrong := [size for size in sizes if not 1 <= size <= total]:
        raise InputError(f"{file}: lengths: expected 1 to {total}, the number of tokens, got {wrong[0]}")
    if not (sum(sizes) == total == trained.numel() and sizes):
        raise InputError(f"{file}: lengths sum to {sum(sizes)}, expected {total}, the number of tokens")
    if (trained > 1).any():
        raise InputError(f"{file}: trained: expected 0 or 1, got {int(trained.max())}")
    first = torch.tensor([0, *accumulate(sizes[:-1])])
    if trained[first].any():
        lesson = int(trained[first].nonzero()[0]) + 1
        raise InputError(
            f"{file}: trained: lesson {lesson}: expected 0 for its first token, which nothing predicts"
        )
    return sizes


def _check_most_likely(file: Path, ids: Tensor | None, logprobs: Tensor | None, count: int) -> None:
    shape = (count, 0 if ids is None else ids.shape[-1] if ids.ndim else 0)
    found = [None if x is None else tuple(x.shape) for x in (ids, logprobs)]
    if found != [None, None] and (found != [shape, shape] or shape[1] == 0):
        raise InputError(f"{file}: ids and logprobs: expected (trained tokens, K) = {shape}, got {found}")
    if logprobs is not None and not ((logprobs <= ROUNDING) & logprobs.isfinite()).all():
        wrong = logprobs[~((logprobs <= ROUNDING) & logprobs.isfinite())][0].item()
        raise InputError(f"{file}: logprobs: expected finite numbers of at most 0, got {wrong:g}")


def _fingerprint(tokenizer: Tokenizer) -> str:
    """Of which id means which token."""
    vocabulary = json.dumps(sorted(tokenizer.backend.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()
