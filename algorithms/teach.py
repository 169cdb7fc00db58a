"""The teacher's part of distillation, done in advance and kept in one file of lessons.

The sequences are the rows' own, or with --samples the teacher's answers to the rows' prompts. For each trained token,
the file holds the --top-k most likely ids with their log-probabilities. All other ids form one tail, whose total
probability is known. With --top-k 0 the file holds only the sequences, for sequence-level distillation.
`data/lessons.py` describes the file. Distillation then runs without the teacher, and can be repeated on the same file.

The stored ids are tokens of the vocabulary. Their log-probabilities are over the whole head, padding rows included,
because the student scores given text in that way.

Source: sequence level: Kim and Rush 2016, https://arxiv.org/abs/1606.07947
        what top-k targets lose: Anshumann et al. 2025, https://arxiv.org/abs/2503.16870
Run:    burnish teach --model TEACHER --data FILE.jsonl
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..model.errors import InputError
from ..model.files.replacing import replacing
from ..model.transformer import Transformer
from ..model.vocabulary import Vocabulary
from .data.lessons import Lesson, answered, load_lessons, write_lessons
from .data.tokenizer import load_tokenizer
from .run.batch import Batch, LazyBatches, longest
from .run.checks import as_json, check_flags, make_folder
from .run.command import run_command
from .run.flags import Count, Data, DeviceFlags, Length, RowFlags, Samples, SamplingFlags, Size, run_folder
from .run.ids import check_model
from .run.trainee import load_frozen
from .show.progress import counted

LESSONS = "lessons.safetensors"


@dataclass(frozen=True, kw_only=True)
class Config(DeviceFlags, SamplingFlags, RowFlags):
    model: Path  # the teacher: Hugging Face folder, or an adapter's folder
    data: Data  # rows as for sft, or with --samples prompts: .jsonl, .json, .parquet or .arrow
    output: Path = run_folder("teach")  # new folder: lessons.safetensors
    samples: Samples = 0  # answers to sample for each prompt; 0 keeps the rows' own completions
    top_k: Size = 64  # ids kept for each trained token; 0 keeps only the sequences
    temperature: float = 1.0  # temperature of sampling, and of the stored log-probabilities
    seed: int = 0  # seed of sampling
    max_length: Length = 1024  # tokens; longer rows are truncated, longer prompts dropped; both are counted
    micro_batch_tokens: Count = 8192  # tokens per forward pass
    base_4bit: bool = False  # hold the teacher's weights in 4 bits (NF4)


def teach(cfg: Config) -> Path:
    """Write the file of lessons, and return its path."""
    # 1. the rows, or their prompts, and the teacher
    check_flags(cfg)
    if not cfg.samples and not cfg.top_k:
        raise InputError("--top-k 0: expected --samples beside it: the rows' own sequences are there already")
    tokenizer = load_tokenizer(cfg)
    lessons = load_lessons(cfg, tokenizer, prompts_alone=cfg.samples > 0, temperature=cfg.temperature)
    model = load_frozen(cfg.model, cfg.device, cfg.base_4bit)
    most_tokens = max(map(longest, lessons)) + (cfg.max_new_tokens if cfg.samples else 0)
    check_model(model, tokenizer, lessons, most_tokens)
    vocabulary = tokenizer.vocabulary
    if cfg.top_k > vocabulary.size:
        raise InputError(f"--top-k: expected at most the vocabulary, {vocabulary.size}, got {cfg.top_k}")

    # 2. the teacher's answers, and its most likely ids for each token
    if cfg.samples:
        prompts = [lesson.prefix for lesson in lessons]
        lessons, ended = answered(model, tokenizer, prompts, cfg, cfg.seed, cfg.samples)
        print(f"{len(lessons)} answers, {sum(ended) / len(ended):.0%} ended by a stop token")
    if cfg.top_k:
        lessons = annotated(model, lessons, vocabulary, cfg)

    # 3. the file, and beside it the flags
    make_folder(cfg.output)
    with replacing(cfg.output / "config.json") as beside:
        beside.write_text(as_json(cfg))
    write_lessons(cfg.output / LESSONS, lessons, tokenizer, cfg.temperature)
    print(f"written: {cfg.output / LESSONS}, which is --data of burnish distill")
    return cfg.output / LESSONS


def annotated(model: Transformer, lessons: list[Lesson], vocabulary: Vocabulary, cfg: Config) -> list[Lesson]:
    """Return the lessons, each with the teacher's most likely ids and log-probabilities for its trained tokens."""
    found, vocabulary = list(lessons), vocabulary.to(cfg.device)
    batches = LazyBatches(lessons, cfg.micro_batch_tokens, cfg.device)
    with counted(len(batches), "teach", "batch") as bar:
        for batch in batches:
            ids, logprobs = most_likely(model, batch, vocabulary, cfg)  # (tokens, K) each

            # split by lesson
            counts = batch.lengths.tolist()
            of_each = zip(
                batch.members, ids.int().cpu().split(counts), logprobs.cpu().split(counts), strict=True
            )
            for i, its_ids, its_logprobs in of_each:
                found[i] = dataclasses.replace(lessons[i], ids=its_ids, logprobs=its_logprobs)
            bar.update()
    return found


@torch.no_grad()
def most_likely(
    model: Transformer, batch: Batch, vocabulary: Vocabulary, cfg: Config
) -> tuple[Tensor, Tensor]:
    """Return the K most likely ids of each token and their log-probabilities, (tokens, K) each.

    The ids are from the tokenizer's vocabulary. The log-probabilities are normalised over the whole head, as the
    student's are.
    """
    hidden, head = batch.before_head(model)  # (tokens, C), of V rows
    tokens = head.among(vocabulary)
    rows, logprobs = tokens.topk_logprobs(hidden, cfg.top_k, temperature=cfg.temperature)
    ids = vocabulary.ids_of(rows)
    if tokens is not head:  # normalise over all rows of the head
        first, _, _ = head.token_logprobs(hidden, ids[:, 0].long(), temperature=cfg.temperature)
        logprobs = logprobs + (first - logprobs[:, 0])[:, None]
    return ids, logprobs


if __name__ == "__main__":
    sys.exit(run_command("teach", sys.modules[__name__], teach, sys.argv[1:]))
