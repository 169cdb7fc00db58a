"""Lessons for distillation: training sequences for a student, with or without a teacher's log-probabilities.

They come from rows, from prompts that the student answers itself, or from a file that `burnish teach` wrote. The file
is in the safetensors format:

    tokens    (total,) int32         all sequences, concatenated
    trained   (total,) uint8         1 for each trained token; n of them are 1
    lengths   (lessons,) int64       the number of tokens of each sequence
    ids       (n, K) int32           the teacher's K most likely ids for each trained token, most likely first
    logprobs  (n, K) fp32            their log_softmax(logits / temperature), in nats, over the whole head

The probability outside the K ids counts as one tail. ids and logprobs are absent if the file holds only sequences. The
metadata entry `lessons` is a JSON object with the temperature and a hash of the tokenizer's vocabulary. The ids and
logprobs of a trained token take 8 K bytes: 512 with K = 64.
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
from ...model.generate import SamplingParams
from ...model.text.tokenizer import Tokenizer
from ...model.transformer import Transformer
from ...model.vocabulary import Vocabulary
from ..run.batch import Completion
from ..run.data_files import Source, arguments_of
from ..run.flags import Data, SamplingFlags
from .examples import Example, rl_prompts, sft_examples
from .groups import own_samples, samples_of_all
from .items import Items, collected, load_items
from .row import Row
from .rows import Tally

DTYPES = {"tokens": "I32", "trained": "U8", "lengths": "I64", "ids": "I32", "logprobs": "F32"}
ROUNDING = 1e-3  # rounding may put the log-probability of a certain token above 0 by this much


@dataclass(frozen=True)
class Lesson(Example):
    """A sequence with the teacher's most likely ids at its n trained tokens. With n = 0 the sequence is a prompt."""

    ids: Tensor | None = None  # (n, K) int32, the teacher's most likely ids
    logprobs: Tensor | None = None  # (n, K) fp32
    vocabulary: Vocabulary | None = None  # the ids that a sampled answer was drawn from

    @property
    def sequences(self) -> list[list[int]]:
        """All token ids that the model must have a row for: the sequence, and the teacher's ids if there are any."""
        return [self.tokens, *([] if self.ids is None else [self.ids.flatten().tolist()])]

    @property
    def num_ids(self) -> int:
        """K, the number of the teacher's ids for each token; 0 if there are none."""
        return 0 if self.ids is None else self.ids.shape[-1]

    @property
    def prefix(self) -> list[int]:
        """The tokens before the first trained token. They include at least the first token, which nothing predicts."""
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
) -> Items[Lesson]:
    """Load the lessons of --data, and print how many rows were used, cut and dropped.

    cfg: the flags; besides those that `load_items` reads, only max_length is read. prompts_alone: read only prompts
    from the rows. temperature: the temperature that a file's log-probabilities must have; None if they are not used.
    """
    if are_lessons(cfg.data):
        return _load_stored(cfg, tokenizer, temperature)

    def convert(rows: list[Row]) -> tuple[list[Lesson], Tally]:
        if prompts_alone:
            prompts, counts = rl_prompts(rows, tokenizer, max_length=cfg.max_length)
            return [Lesson(p.tokens, [False] * len(p.tokens), where=p.where) for p in prompts], counts
        examples, counts = sft_examples(rows, tokenizer, max_length=cfg.max_length)
        return [Lesson(e.tokens, e.mask, where=e.where) for e in examples], counts

    return load_items(cfg, tokenizer, convert)


def are_lessons(data: Data) -> bool:
    """Return whether --data names files of `burnish teach`. Raises InputError if it also names files of rows."""
    arguments = arguments_of(data)
    stored = [path for path in arguments if path.suffix == ".safetensors"]
    if stored and len(stored) < len(arguments):
        rows = next(path for path in arguments if path not in stored)
        raise InputError(
            f"--data: expected files of lessons or files of rows, got {stored[0]} beside {rows}; train on one kind, "
            "then on the other"
        )
    return bool(stored)


def _load_stored(cfg: Any, tokenizer: Tokenizer, temperature: float | None) -> Items[Lesson]:
    """Load the lessons of .safetensors files. Raises InputError if they keep different numbers of ids for a token."""
    flags = {"row-template": cfg.row_template, "chat-template-kwargs": tokenizer.variables}
    for flag, value in flags.items():
        if value:
            name = arguments_of(cfg.data)[0]
            raise InputError(f"--{flag}: {name} holds token ids, not rows: leave the flag out")

    def read(source: Source) -> tuple[list[Lesson], dict[str, int]]:
        found = [lesson for file in source.files for lesson in read_lessons(file, tokenizer, temperature)]
        return found, {"lessons": len(found), "trained tokens": sum(sum(lesson.mask) for lesson in found)}

    lessons = collected(cfg, read)
    for lesson in lessons:
        if lesson.num_ids != lessons[0].num_ids:
            raise InputError(
                f"{lesson.where}: expected {lessons[0].num_ids} ids for each token, as in {lessons[0].where}, got "
                f"{lesson.num_ids}; teach both with the same --top-k"
            )
    return lessons


def answered(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    cfg: SamplingFlags,
    seed: int,
    samples_per_prompt: int = 1,
) -> tuple[list[Lesson], list[bool]]:
    """Return (lessons, ended): each prompt with the model's own answer, and whether a stop token ended each answer.

    All tokens of an answer are trained, the end token included.
    """
    params = SamplingParams(
        samples_per_prompt=samples_per_prompt,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        seed=seed,
    )
    own = own_samples(model, tokenizer, prompts, params, batch_size=cfg.sampling_batch_size)
    samples = samples_of_all(own, tokenizer.vocabulary)

    lessons = []
    for sample in samples:
        prompt = list(prompts[sample.prompt_index])
        mask = [False] * len(prompt) + [True] * len(sample.tokens)
        lessons.append(Lesson(prompt + sample.tokens, mask, vocabulary=sample.vocabulary))
    return lessons, [sample.ended for sample in samples]


# ---- the file


def write_lessons(file: Path, lessons: Sequence[Lesson], tokenizer: Tokenizer, temperature: float) -> None:
    """Write lessons to a safetensors file. Raises InputError if writing fails.

    Either all lessons have ids and logprobs, of the same width K, or no lesson has.
    """
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
    """Read the lessons of a file.

    Raises InputError if the file is broken, belongs to another tokenizer, or has log-probabilities at another
    temperature.
    """
    # 1. check that the tensors fit one another, the tokenizer, and the temperature
    tensors, about = _read_file(file)
    if about["tokenizer"] != _fingerprint(tokenizer):
        raise InputError(
            f"{file}: expected the tokenizer of --model, got a teacher's whose ids mean other tokens"
        )
    lengths = _check_sequences(file, tensors)
    _check_most_likely(file, tensors)
    _check_ids(file, tensors, tokenizer)
    if "ids" in tensors and temperature not in (None, about["temperature"]):
        raise InputError(
            f"{file}: expected --temperature {about['temperature']:g}, that of its log-probabilities, got "
            f"{temperature:g}"
        )

    # 2. split tokens and trained, (total,) each, into sequences
    tokens, trained = tensors["tokens"].split(lengths), tensors["trained"].bool().split(lengths)
    lessons = [
        Lesson(tokens[i].tolist(), trained[i].tolist(), where=f"{file} lesson {i + 1}")
        for i in range(len(lengths))
    ]
    if "ids" not in tensors:
        return lessons

    # 3. split ids and logprobs, (all n, K) each, into those of each lesson
    counts = [sum(lesson.mask) for lesson in lessons]
    ids, logprobs = tensors["ids"].split(counts), tensors["logprobs"]
    of_each = zip(lessons, ids, logprobs.split(counts), strict=True)
    return [replace(lesson, ids=its_ids, logprobs=its_own) for lesson, its_ids, its_own in of_each]


def _read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, metadata) of a file of lessons.

    Raises InputError if a name, dtype or dimension differs from those that `write_lessons` writes.
    """
    check_regular(file)
    try:
        with safe_open(file, framework="pt") as opened:
            about = parse_json(opened.metadata()["lessons"], f"{file}: metadata: lessons")
            stored_at, made_for = about["temperature"], about["tokenizer"]

            for name in opened.keys():  # noqa: SIM118 (not a dict)
                if name not in DTYPES:
                    raise InputError(f"{file}: expected only tensors {', '.join(DTYPES)}, got {shown(name)}")
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
    """Return the lengths of the sequences.

    Raises InputError if the lengths do not sum to the number of tokens, or if a sequence's first token is trained.
    """
    total, trained = tensors["tokens"].numel(), tensors["trained"]
    sizes: list[int] = tensors["lengths"].tolist()
    if wrong := [size for size in sizes if not 1 <= size <= total]:
        raise InputError(f"{file}: lengths: expected 1 to {total}, the number of tokens, got {wrong[0]}")
    if not (sum(sizes) == total == trained.numel() and sizes):
        raise InputError(
            f"{file}: lengths: expected at least one, with the sum {total}, the number of tokens; got the sum "
            f"{sum(sizes)}"
        )
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
    """Raise InputError if ids and logprobs are not both (n, K), or if a number is not a log-probability."""
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
    """Raise InputError if a token, or an id of the teacher, is not in the tokenizer."""
    vocabulary = tokenizer.vocabulary
    for name in ("tokens", "ids"):
        ids = tensors.get(name)
        if ids is not None and not (known := vocabulary.has(ids)).all():
            wrong = int(ids[~known][0])
            hole = ", which no token has" if 0 <= wrong < vocabulary.end else ""
            raise InputError(
                f"{file}: {name}: expected the tokenizer's ids, 0 to {vocabulary.end - 1}, got {wrong}{hole}"
            )


def _fingerprint(tokenizer: Tokenizer) -> str:
    """Return a hash of the tokenizer's vocabulary: its tokens and their ids."""
    vocabulary = json.dumps(sorted(tokenizer.backend.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()
