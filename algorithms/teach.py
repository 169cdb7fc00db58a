"""A teacher's part of distillation, done beforehand: what it would say, kept in one file of lessons.

Sequences are the rows' own, or with --samples what the teacher answers to their prompts. For each of their trained
tokens the --top-k most likely ids and log-probabilities are kept, all the rest being one tail of known weight; with
--top-k 0 the sequences alone, for sequence-level distillation. `data/lessons.py` describes the file. The teacher is
then needed no more, and its answers can be learned from many times. The ids are tokens; their log-probabilities are
over the whole head, its padding included, as the student scores what it is given.

Source: sequence level: Kim and Rush 2016, https://arxiv.org/abs/1606.07947
        what top-k targets lose: Anshumann et al. 2025, https://arxiv.org/abs/2503.16870
Run:    burnish teach --model TEACHER --data FILE.jsonl
"""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..model.checkpoint import load_model
from ..model.errors import InputError
from ..model.transformer import Transformer
from ..model.vocabulary import Vocabulary
from .data.lessons import MicroBatch, answered, load_lessons, micro_batches, write_lessons
from .run.command import run_command
from .run.flags import RowFlags, load_tokenizer
from .run.loop import MOST_SAMPLES, autocast, check_flags, check_model, default_device, new_run_folder

LESSONS = "lessons.safetensors"


@dataclass(frozen=True)
class Config(RowFlags):
    model: Path  # the teacher: Hugging Face folder, or an adapter's
    data: Path  # rows as for SFT, or with --samples prompts: .jsonl, .json or .parquet
    output: Path = field(default_factory=lambda: new_run_folder("teach"))  # new folder: lessons.safetensors
    samples: int = 0  # answers to each prompt, in place of the rows' own completions; 0 keeps those
    top_k: int = 64  # ids kept for each trained token; 0 keeps the sequences alone
    temperature: float = 1.0  # of sampling, and of the log-probabilities
    max_length: int = 1024  # tokens; longer rows are truncated, longer prompts dropped, and counted
    max_new_tokens: int = 256  # cap on an answer's length
    sampling_batch_size: int | None = None  # answers at a time, which bounds the cache; all by default
    micro_batch_tokens: int = 8192  # tokens in one forward
    base_4bit: bool = False  # hold the teacher's weights in 4 bits (NF4)
    seed: int = 0  # of sampling
    device: str = field(default_factory=default_device)


def teach(cfg: Config) -> Path:
    """Returns the file of lessons."""
    check_flags(
        cfg,
        samples=(0, MOST_SAMPLES),
        top_k=(0, inf),
        temperature=(1e-3, 1e3),
        max_length=(2, inf),
        max_new_tokens=(1, inf),
        sampling_batch_size=(1, inf),
        micro_batch_tokens=(1, inf),
        seed=(0, 2**31 - 1),
    )
    if not cfg.samples and not cfg.top_k:
        raise InputError("--top-k 0: expected --samples beside it: the rows' own sequences are there already")
    tokenizer = load_tokenizer(cfg)
    lessons = load_lessons(
        cfg.data,
        tokenizer,
        row_template=cfg.row_template,
        max_length=cfg.max_length,
        prompts_alone=cfg.samples > 0,
        temperature=cfg.temperature,
    )
    dtype = torch.bfloat16 if cfg.device.startswith("cuda") else torch.float32
    model = load_model(cfg.model, dtype, cfg.device, cfg.base_4bit).requires_grad_(False).eval()
    longest = max(len(lesson.tokens) for lesson in lessons) + (cfg.max_new_tokens if cfg.samples else 0)
    check_model(model, tokenizer, lessons, longest)
    vocabulary = tokenizer.vocabulary.to(cfg.device)
    if cfg.top_k > vocabulary.size:
        raise InputError(f"--top-k: expected at most the vocabulary, {vocabulary.size}, got {cfg.top_k}")
    if cfg.samples:
        lessons, ended = answered(
            model,
            tokenizer,
            [lesson.prompt for lesson in lessons],
            temperature=cfg.temperature,
            max_new_tokens=cfg.max_new_tokens,
            batch_size=cfg.sampling_batch_size,
            seed=cfg.seed,
            samples_per_prompt=cfg.samples,
        )
        print(f"{len(lessons)} answers, {ended:.0%} ended by a stop token")
    if cfg.top_k:
        micros = micro_batches(lessons, cfg.micro_batch_tokens, cfg.device)
        for micro in tqdm(micros, desc="teach", unit="batch", dynamic_ncols=True):
            with torch.no_grad(), autocast(cfg.device):
                ids, logprobs = most_likely(model, micro, vocabulary, cfg)
            counts = [sum(lessons[i].mask) for i in micro.members]
            parts = zip(micro.members, ids.cpu().split(counts), logprobs.cpu().split(counts), strict=True)
            for i, own_ids, own_logprobs in parts:
                lessons[i] = dataclasses.replace(lessons[i], ids=own_ids.int(), logprobs=own_logprobs)
    try:
        cfg.output.mkdir(parents=True, exist_ok=True)
        (cfg.output / "config.json").write_text(
            json.dumps(dataclasses.asdict(cfg), indent=2, default=str) + "\n"
        )
    except OSError as error:
        raise InputError(f"--output {cfg.output}: cannot be written: {error}") from error
    write_lessons(cfg.output / LESSONS, lessons, tokenizer, cfg.temperature)
    return cfg.output / LESSONS


def most_likely(
    model: Transformer, micro: MicroBatch, vocabulary: Vocabulary, cfg: Config
) -> tuple[Tensor, Tensor]:
    """The likeliest tokens and their log-probabilities over the whole head, as a student scores them: each (n, K)."""
    hidden, head = model.before_head(micro.packed, micro.rows)
    tokens = head.among(vocabulary)
    rows, logprobs = tokens.topk_logprobs(hidden, cfg.top_k, temperature=cfg.temperature)
    ids = vocabulary.ids_of(rows)
    if tokens is not head:  # less by what the other rows have
        first, _, _ = head.token_logprobs(hidden, ids[:, 0].long(), temperature=cfg.temperature)
        logprobs = logprobs + (first - logprobs[:, 0])[:, None]
    return ids, logprobs


if __name__ == "__main__":
    sys.exit(run_command("teach", sys.modules[__name__], teach, sys.argv[1:]))
