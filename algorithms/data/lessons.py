"""Lessons for a student: rows, prompts that it answers itself, or a file of them that `teach` wrote.

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
from ...model.files.replacing import replacing
from ...model.files.text_files import check_regular, parse_json
from ...model.text.tokenizer import Tokenizer
from ...model.transformer import Transformer
from ...model.vocabulary import Vocabulary
from ..run.batch import Completion
from ..run.flags import SamplingFlags
from .examples import Example, rl_prompts, sft_examples
from .groups import own_samples, samples_of_all
from .rows import read_rows, report_counts

DTYPES = {"tokens": "I32", "trained": "U8", "lengths": "I64", "ids": "I32", "logprobs": "F32"}
ROUNDING = 1e-3  # of a log-probability: that of a sure token may come out above 0


@dataclass(frozen=True)
class Lesson(Example):
    """A sequence, and what the teacher would say at its n trained tokens. Without a trained token it is a prompt."""

    ids: Tensor | None = None  # (n, K) int32, the teacher's most likely ids
    logprobs: Tensor | None = None  # (n, K) fp32
    vocabulary: Vocabulary | None = None  # the ids that a model's own answer was drawn from

    @property
    def sequences(self) -> list[list[int]]:
        """All ids that a model is to read of it, or to score."""
        return [self.tokens, *([] if self.ids is None else [self.ids.flatten().tolist()])]

    @property
    def prefix(self) -> list[int]:
        """The tokens before the first trained one; at least the first token, which nothing predicts."""
        return self.tokens[: self.mask.index(True)] if any(self.mask) else self.tokens

    @property
    def completions(self) -> list[Completion]:
        return [
            Completion(
                self.tokens,
                self.mask,
                teacher_ids=self.ids,
                teacher_logprobs=self.logprobs,
                vocabulary=self.vocabulary,
            )
        ]


def load_lessons(
    cfg: Any, tokenizer: Tokenizer, *, prompts_alone: bool, temperature: float | None
) -> list[Lesson]:
    """The lessons of --data, after saying what became of its rows. cfg: also row_template and max_length.

    prompts_alone: rows need no completion. temperature: that of stored log-probabilities; None where they are not read.
    """
    if cfg.data.suffix == ".safetensors":
        flags = {"row-template": cfg.row_template, "chat-template-kwargs": tokenizer.variables}
        for flag, value in flags.items():
            if value:
                raise InputError(f"--{flag}: {cfg.data} holds sequences, not rows: leave the flag out")
        lessons = read_lessons(cfg.data, tokenizer, temperature)
        counts = {"lessons": len(lessons), "trained tokens": sum(sum(lesson.mask) for lesson in lessons)}

    elif prompts_alone:
        rows = read_rows(cfg.data, cfg.row_template)
        prompts, counts = rl_prompts(rows, tokenizer, max_length=cfg.max_length)
        lessons = [Lesson(p.tokens, [False] * len(p.tokens), where=p.where) for p in prompts]

    else:
        rows = read_rows(cfg.data, cfg.row_template)
        examples, counts = sft_examples(rows, tokenizer, max_length=cfg.max_length)
        lessons = [Lesson(e.tokens, e.mask, where=e.where) for e in examples]

    report_counts(cfg.data, counts)
    return lessons


def answered(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    cfg: SamplingFlags,
    seed: int,
    samples_per_prompt: int = 1,
) -> tuple[list[Lesson], float]:
    """Each prompt with what `model` says to it, all of it trained, the end token included; and the share that ended."""
    own = own_samples(
        model,
        tokenizer,
        prompts,
        samples_per_prompt=samples_per_prompt,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        seed=seed,
        batch_size=cfg.sampling_batch_size,
    )
    samples = samples_of_all(own, tokenizer.vocabulary)

    lessons = []
    for sample in samples:
        prompt = list(prompts[sample.prompt_index])
        mask = [False] * len(prompt) + [True] * len(sample.tokens)
        lessons.append(Lesson(prompt + sample.tokens, mask, vocabulary=sample.vocabulary))
    return lessons, sum(sample.ended for sample in samples) / len(samples)


# ---- the file


def write_lessons(file: Path, lessons: Sequence[Lesson], tokenizer: Tokenizer, temperature: float) -> None:
    """All lessons have ids and logprobs of the same width, or none has. Raises InputError where writing fails."""
    tensors = {
        "tokens": torch.tensor([token for lesson in lessons for token in lesson.tokens], dtype=torch.int32),
        "trained": torch.tensor([m for lesson in lessons for m in lesson.mask], dtype=torch.uint8),
        "lengths": torch.tensor([len(lesson.tokens) for lesson in lessons]),
    }
    ids = [lesson.ids for lesson in lessons if lesson.ids is not None]  # (n, K) each
    logprobs = [lesson.logprobs for lesson in lessons if lesson.logprobs is not None]
    if ids:  # (all n, K)
        tensors |= {"ids": torch.cat(ids).contiguous(), "logprobs": torch.cat(logprobs).contiguous()}

    about = {"temperature": temperature, "tokenizer": _fingerprint(tokenizer)}
    with replacing(file) as beside:
        save_file(tensors, beside, metadata={"lessons": json.dumps(about)})


def read_lessons(file: Path, tokenizer: Tokenizer, temperature: float | None) -> list[Lesson]:
    """Raises InputError where the file is broken, of another tokenizer, or its log-probabilities of a temperature."""
    # 1. tensors that fit one another, the tokenizer, and the temperature
    tensors, about = _read_file(file)
    if about["tokenizer"] != _fingerprint(tokenizer):
        raise InputError(
            f"{file}: its teacher's tokenizer is not that of --model: the ids are of other tokens"
        )
    lengths = _check_sequences(file, tensors)
    _check_most_likely(file, tensors)
    _check_ids(file, tensors, tokenizer)
    if "ids" in tensors and temperature not in (None, about["temperature"]):
        raise InputError(
            f"{file}: its log-probabilities are at temperature {about['temperature']:g}, got --temperature "
            f"{temperature:g}"
        )

    # 2. (total,) each, cut into sequences
    tokens, trained = tensors["tokens"].split(lengths), tensors["trained"].bool().split(lengths)
    lessons = [
        Lesson(tokens[i].tolist(), trained[i].tolist(), where=f"{file} lesson {i + 1}")
        for i in range(len(lengths))
    ]
    if "ids" not in tensors:
        return lessons

    # 3. (n, K) of all, cut into those of each
    counts = [sum(lesson.mask) for lesson in lessons]
    ids, logprobs = tensors["ids"].split(counts), tensors["logprobs"]
    of_each = zip(lessons, ids, logprobs.split(counts), strict=True)
    return [replace(lesson, ids=its_ids, logprobs=its_own) for lesson, its_ids, its_own in of_each]


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


def _check_most_likely(file: Path, tensors: dict[str, Tensor]) -> None:
    """Raises InputError where ids and logprobs are not both (n, K), or a log-probability is none."""
    ids, logprobs = tensors.get("ids"), tensors.get("logprobs")
    count = int(tensors["trained"].sum(dtype=torch.int64))
    shape = (count, 0 if ids is None else ids.shape[-1] if ids.ndim else 0)
    found = [None if x is None else tuple(x.shape) for x in (ids, logprobs)]
    if found != [None, None] and (found != [shape, shape] or shape[1] == 0):
        raise InputError(f"{file}: ids and logprobs: expected (trained tokens, K) = {shape}, got {found}")

    if logprobs is not None and not (valid := (logprobs <= ROUNDING) & logprobs.isfinite()).all():
        wrong = logprobs[~valid][0].item()
        raise InputError(f"{file}: logprobs: expected finite numbers of at most 0, got {wrong:g}")


def _check_ids(file: Path, tensors: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """Raises InputError where a token, or an id of the teacher's, is none of the tokenizer's."""
    vocabulary = tokenizer.vocabulary
    for name in ("tokens", "ids"):
        ids = tensors.get(name)
        if ids is not None and not (known := vocabulary.has(ids)).all():
            wrong = int(ids[~known][0])
            hole = ", which is none of them" if 0 <= wrong < vocabulary.end else ""
            raise InputError(
                f"{file}: {name}: expected the tokenizer's ids, 0 to {vocabulary.end - 1}, got {wrong}{hole}"
            )


def _fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of which id means which token."""
    vocabulary = json.dumps(sorted(tokenizer.backend.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()
