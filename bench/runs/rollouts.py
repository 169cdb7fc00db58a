"""Our generation beside transformers' `generate`, with the same weights, prompts and lengths, in one process.

    burnish bench rollouts [--model DIR] [--rounds 5] [--keep]

On a CPU the model has 4 layers of width 256 and 4,096 words (that of trainers.py), in fp32, on one thread. If there is
a GPU, the model has random weights in bf16, in the shape of a model of 1 billion parameters. --model adds a Hugging
Face folder. For each kind of work both sides run one round in turn (A B A B). Speed is the tokens of the answers over
the CPU seconds of the process, which other work on the machine disturbs less than wall time. On a GPU it is over wall
time. A ratio is taken from one pair of runs, and the median of the ratios is kept.

                      CPU: 32 at a time                            GPU: 64 at a time
    ragged prompts    32 prompts of 16 to 256 tokens,              64 of 64 to 1,024,
                      64 new tokens each                           128 new tokens each
    ragged answers    64 of the same; answers end at one of        128 of the same; answers end
                      a few ids, on average after 40 of 128        on average after 96 of 256
    groups            4 prompts of 192 to 256 tokens, 8 samples    8 of 512 to 1,024,
                      of 64 tokens for each                        8 samples of 128

transformers gets the prompts padded on the left, one row for each sample, with the same number of rows in a call, and
its default cache. Rows that have ended continue as padding until all rows have ended. First the greedy tokens of both
are compared. Then both sample at temperature 1 from all ids.
"""

import importlib
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ...algorithms.run.flags import Count
from ...model.cache import cache_bytes
from ...model.checkpoint import load_model
from ...model.generate import SamplingParams, generate
from ...model.transformer import Transformer
from ..record import machine
from .figures import write_figures
from .trainers import write_model


@dataclass(frozen=True, kw_only=True)
class Config:
    model: Path | None = None  # a Hugging Face folder to measure as well
    rounds: Count = 5  # rounds, each with both sides in turn
    json: Path | None = None  # write the figures to this file
    keep: bool = False  # keep the figures in bench/results, under their usual name


@dataclass(frozen=True)
class Work:
    """A kind of work: the number and length of prompts, the samples of each prompt, and the length of answers."""

    name: str
    prompts: int
    samples: int  # samples of each prompt
    shortest: int
    longest: int  # tokens of a prompt
    new_tokens: int
    mean_length: int | None = None  # of an answer without the limit new_tokens; None: no answer ends early

    def draw_prompts(self, vocabulary: int) -> list[list[int]]:
        draw = random.Random(0)
        return [
            [draw.randrange(2, vocabulary) for _ in range(draw.randint(self.shortest, self.longest))]
            for _ in range(self.prompts)
        ]

    def stop_ids(self, vocabulary: int) -> list[int]:
        """Return enough stop ids to give answers their mean length, for a model that draws all ids equally often."""
        count = 0 if self.mean_length is None else vocabulary // self.mean_length
        return random.Random(1).sample(range(2, vocabulary), count)


@dataclass(frozen=True)
class Setting:
    """The model, the kinds of work and the batch size that are measured on a CPU or on a GPU."""

    kind: str  # first word of the file's name in bench/results
    model: str
    changes: dict[str, int | bool]  # differences from the model of trainers.py
    dtype: torch.dtype
    batch: int  # sequences at a time
    works: tuple[Work, ...]
    given: tuple[Work, ...]  # the works for --model


_GPU_WORKS = (
    Work("ragged prompts", 64, 1, 64, 1024, 128),
    Work("ragged answers", 128, 1, 64, 1024, 256, 96),
    Work("groups", 8, 8, 512, 1024, 128),
)
SETTINGS = {
    "cpu": Setting(
        kind="rollouts",
        model="4 layers of 256",
        changes={},
        dtype=torch.float32,
        batch=32,
        works=(
            Work("ragged prompts", 32, 1, 16, 256, 64),
            Work("ragged answers", 64, 1, 16, 256, 128, 40),
            Work("groups", 4, 8, 192, 256, 64),
        ),
        given=(Work("ragged prompts", 32, 1, 16, 256, 32), Work("groups", 4, 8, 192, 256, 32)),
    ),
    "cuda": Setting(
        kind="gpu-rollouts",
        model="16 layers of 2,048",
        changes={  # the shape of Llama 3.2 1B
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
        },
        dtype=torch.bfloat16,
        batch=64,
        works=_GPU_WORKS,
        given=_GPU_WORKS,
    ),
}


# ---- the two sides: each returns the new tokens of each sequence


def ours(model: Transformer, work: Work, greedy: bool) -> list[list[int]]:
    samples = generate(
        model,
        work.draw_prompts(model.config.vocab_size),
        SamplingParams(
            samples_per_prompt=work.samples,
            max_new_tokens=work.new_tokens,
            temperature=0.0 if greedy else 1.0,
            stop_ids=work.stop_ids(model.config.vocab_size),
        ),
        batch_size=SETTINGS[model.device.type].batch,
    )
    return [sample.tokens for sample in samples]


def theirs(model: Any, work: Work, greedy: bool) -> list[list[int]]:
    stops, batch = work.stop_ids(model.config.vocab_size), SETTINGS[model.device.type].batch
    every = [prompt for prompt in work.draw_prompts(model.config.vocab_size) for _ in range(work.samples)]
    answers = []

    for prompts in (every[i : i + batch] for i in range(0, len(every), batch)):
        width = max(map(len, prompts))
        rows = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[int(i >= width - len(prompt)) for i in range(width)] for prompt in prompts]

        out = model.generate(
            torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=work.new_tokens,
            do_sample=not greedy,
            temperature=None if greedy else 1.0,
            top_k=None if greedy else 0,
            top_p=None if greedy else 1.0,
            eos_token_id=stops or None,
            pad_token_id=0,
        )
        answers += [until(row, stops) for row in out[:, width:].tolist()]
    return answers


def until(tokens: list[int], stops: list[int]) -> list[int]:
    """Return the tokens up to and including the first stop id, or all tokens if there is no stop id."""
    ends = [i + 1 for i, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0]] if ends else tokens


def speed(run: Callable[[], list[list[int]]], device: str) -> float:
    """Return the tokens of the answers per second of CPU time of this process, or on a GPU per second of wall time."""

    def clock() -> float:
        if device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    started = clock()
    answers = run()
    return sum(map(len, answers)) / (clock() - started)


# ---- the comparison


def measure(name: str, folder: Path, work: Work, rounds: int, device: str) -> dict[str, Any]:
    transformers = importlib.import_module("transformers")  # here, because the tests run without it
    dtype, slots = SETTINGS[device].dtype, SETTINGS[device].batch
    model = load_model(folder, dtype, device)
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    peer.generation_config = transformers.GenerationConfig()  # ignore the settings of the folder
    greedy = list(zip(ours(model, work, True), theirs(peer, work, True), strict=True))

    runs: dict[str, list[float]] = {"burnish": [], "transformers": []}
    for index in range(rounds):
        runs["burnish"].append(speed(lambda: ours(model, work, False), device))
        runs["transformers"].append(speed(lambda: theirs(peer, work, False), device))
        pair = f"{runs['burnish'][-1]:9,.0f} beside {runs['transformers'][-1]:9,.0f} tokens/s"
        print(f"{name}, {work.name}, round {index + 1}: {pair}", flush=True)

    # the sizes of the caches
    ratios = [a / b for a, b in zip(runs["burnish"], runs["transformers"], strict=True)]

    sizes = [len(prompt) for prompt in work.draw_prompts(model.config.vocab_size)]
    caches = [
        cache_bytes(model.config, rows, max(sizes), slots, capacity, dtype)
        for rows, capacity in (
            (min(slots, work.prompts), work.new_tokens),
            (0, max(sizes) + work.new_tokens),
        )
    ]

    return {
        "model": name,
        "work": work.name,
        "rounds": rounds,
        "tokens_per_second": {side: median(speeds) for side, speeds in runs.items()},
        "ratio": median(ratios),
        "ratios": ratios,
        "same_greedy_answers": sum(a == b for a, b in greedy) / len(greedy),  # 1: all of them
        "cache_bytes": caches[0],
        "copied_cache_bytes": caches[1],  # with a copy of the prompt for each of its samples
    }


def main(cfg: Config) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = SETTINGS[device]
    torch.set_num_threads(1)

    # the small model, then a model of the user
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), **setting.changes)
        rows = [measure(setting.model, Path(name), work, cfg.rounds, device) for work in setting.works]
    if given := cfg.model:
        rows += [measure(given.name, given, work, cfg.rounds, device) for work in setting.given]

    for row in rows:
        a, b = row["tokens_per_second"].values()
        print(
            f"{row['model']}, {row['work']}: {row['ratio']:.2f}x transformers' tokens/s ({a:,.0f} beside {b:,.0f}), "
            f"cache {row['cache_bytes'] / 1e6:.1f} MB, "
            f"{row['same_greedy_answers']:.0%} of the greedy answers are the same"
        )

    facts = machine(device) | {name: version(name) for name in ("torch", "transformers")}
    shown = replace(
        cfg, model=cfg.model and Path(cfg.model.name)
    )  # its name without its path on this machine
    write_figures("rollouts", shown, kind=setting.kind, machine=facts, rows=rows)
    return 0
