"""GRPO teaches a real chat model to get sums right: SmolLM2-135M-Instruct, all weights, LoRA or QLoRA.

    What is 15 + 20? Answer in one short sentence.
        before   "One-fifth of 20 is 20, which is a naturally"             after   "15 + 20 equals 35."

The problems are all sums of two numbers from 1 to 20, and a quarter of them is held out. The only reward is a rule: 1
if the last number of the answer is the sum. An answer has at most 16 tokens. Each held-out problem is answered once
before training and once after it, at the temperature of training. So the standard error is over problems. The answers
after training come from the saved folder: the model, or the adapter on its base.

Source: GRPO, Shao et al. 2024, https://arxiv.org/abs/2402.03300; the model, https://arxiv.org/abs/2502.02737
Run:    burnish chat-demo --mode lora
"""

import random
import re
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, Literal

from ...model.adapters.config import LoraConfig
from ...model.files.config_json import read_config
from ...model.files.text_files import read_object
from ...model.memory import Training, training_memory
from ...model.text.tokenizer import Tokenizer
from .. import grpo
from ..run.checks import check_flags
from ..run.command import run_command
from ..run.flags import MOST_SAMPLES, Bounds, Count, SamplingSeed, Temperature, default_device, run_folder
from ..show.ending import brief_endings
from ..show.text import harmless
from . import page
from .parts import read_metric, sample, write_rows

SMOLLM2 = Path("models/SmolLM2-135M-Instruct")
LARGEST = 20
MAX_NEW_TOKENS = 16
MODES: dict[str, dict[str, Any]] = {  # mode: its flags of grpo
    "full": {"learning_rate": 1e-5},
    "lora": {"learning_rate": 5e-4, "lora_rank": 16},
    "qlora": {"learning_rate": 5e-4, "lora_rank": 16, "base_4bit": True},
}


@dataclass(frozen=True, kw_only=True)
class Config:
    model: Path = SMOLLM2  # a chat model; `make models/SmolLM2-135M-Instruct` downloads the default
    mode: Literal["full", "lora", "qlora"] = "lora"  # train all weights, an adapter, or an adapter on 4 bits
    output: Path = run_folder("chat-demo")  # new folder: model, report.html
    steps: Count = 30  # GRPO steps
    prompts_per_step: Count = 8  # problems in one rollout
    group_size: Annotated[int, Bounds(2, MOST_SAMPLES)] = 8  # samples of one problem
    temperature: Temperature = 0.8  # temperature of sampling, in training and in measurement
    held_out: Annotated[int, Bounds(2)] = 100  # problems to measure on
    seed: SamplingSeed = 0  # seed of the order of problems, and of sampling
    device: str = field(default_factory=default_device)  # cpu, cuda or cuda:N


@dataclass(frozen=True)
class Score:
    """Results on the held-out problems, in percent."""

    right: float
    error: float  # standard error of `right`
    ended: float  # answers that ended with a stop token
    answers: list[str]


def right(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1 for each completion whose last number is the answer, else 0."""
    texts = (c if isinstance(c, str) else c[-1]["content"] for c in completions)
    found = (re.findall(r"\d+", text) for text in texts)
    return [float(numbers[-1:] == [wanted]) for numbers, wanted in zip(found, answer, strict=True)]


def problems(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return held-out rows and training rows. Each sum occurs once, in a random order from `seed`."""
    pairs = [(a, b) for a in range(1, LARGEST + 1) for b in range(1, LARGEST + 1)]
    random.Random(seed).shuffle(pairs)
    rows = [
        {"question": f"What is {a} + {b}? Answer in one short sentence.", "answer": str(a + b)}
        for a, b in pairs
    ]
    return rows[: len(rows) // 4], rows[len(rows) // 4 :]


def measure(cfg: Config, folder: Path, rows: list[dict[str, str]]) -> Score:
    """Sample an answer to each row from the model or adapter in `folder`, and return the answers' score."""
    tokenizer = Tokenizer.load(folder)
    questions = [[{"role": "user", "content": row["question"]}] for row in rows]
    prompts = [tokenizer.encode_chat(messages, add_generation_prompt=True) for messages in questions]
    options = {"max_new_tokens": MAX_NEW_TOKENS, "temperature": cfg.temperature, "seed": cfg.seed}
    samples = sample(folder, tokenizer, prompts, cfg.device, **options)

    texts = [tokenizer.decode(one.tokens) for one in samples]
    rewards = [100 * reward for reward in right(texts, [row["answer"] for row in rows])]
    return Score(
        right=fmean(rewards),
        error=stdev(rewards) / len(rewards) ** 0.5,
        ended=100 * fmean(one.ended for one in samples),
        answers=[f"{row['question']}   {text!r}" for row, text in zip(rows[:8], texts, strict=False)],
    )


def train(cfg: Config) -> Path:
    """Measure, train and measure again. Return the path of the report."""
    started, cpu_before = time.perf_counter(), time.process_time()
    held_out, training = problems(cfg.seed)
    check_flags(cfg, held_out=(2, len(held_out)))
    page.check_packages()
    held_out = held_out[: cfg.held_out]

    # 1. the model before training
    before = measure(cfg, cfg.model, held_out)
    print_score("before", before)

    # 2. training on the other problems
    data = write_rows(cfg.output / "problems.jsonl", training)
    clock, cpu = time.perf_counter(), time.process_time()
    with brief_endings():
        trained = grpo.train(grpo_flags(cfg, data))
    facts = {
        "mode": cfg.mode,
        "training": f"{time.perf_counter() - clock:.0f} s, {time.process_time() - cpu:.0f} s of CPU time",
        "peak memory of the process": f"{peak_memory() / 1e9:.2f} GB",
    }

    # 3. the saved model on the same problems
    after = measure(cfg, trained, held_out)
    print_score("after", after)
    gain, error = after.right - before.right, (before.error**2 + after.error**2) ** 0.5
    in_errors = f" points, {gain / error:.1f} of its standard errors" if error else ""
    facts["gain"] = f"{gain:.1f}{in_errors}"
    facts |= {f"{mode}: tensors in training": training_bytes(cfg, mode) for mode in MODES}
    facts |= {
        "whole run": f"{time.perf_counter() - started:.0f} s, {time.process_time() - cpu_before:.0f} s of CPU time",
        "saved in": trained,
    }

    # 4. the report
    report = page.write(cfg.output / "report.html", page_of(cfg, {"before": before, "after": after}, facts))
    print("\n" + "\n".join(f"{name}: {value}" for name, value in facts.items()))
    print(f"\nThe first four again, from {trained}:")
    for was, now in zip(before.answers[:4], after.answers, strict=False):
        print(f"    before  {harmless(was)}\n    after   {harmless(now)}")
    print(f"\nreport: {report}")
    return report


def grpo_flags(cfg: Config, data: Path) -> grpo.Config:
    return grpo.Config(
        model=cfg.model,
        data=data,
        reward=("burnish.algorithms.recipes.chat_demo:right",),
        output=cfg.output / "grpo",
        steps=cfg.steps,
        prompts_per_step=cfg.prompts_per_step,
        group_size=cfg.group_size,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=cfg.temperature,
        schedule="linear",
        micro_batch_tokens=512,  # a few groups; otherwise activations take most of the memory
        seed=cfg.seed,
        device=cfg.device,
        **MODES[cfg.mode],
    )


def page_of(cfg: Config, scores: Mapping[str, Score], facts: Mapping[str, object]) -> page.Page:
    return page.Page(
        title="A chat model learns to get sums right",
        subtitle=f"GRPO on {cfg.model.name}: the reward is 1 where the last number of the answer is the sum.",
        table=page.Table(
            heading="Held-out problems, percent",
            header=["", "right", "standard error", "ended"],
            rows={name: [score.right, score.error, score.ended] for name, score in scores.items()},
            note=f"{cfg.held_out} held-out sums, one answer to each at temperature {cfg.temperature:g}.",
        ),
        figure=page.Picture(
            page.steps_series([{cfg.mode: read_metric(cfg.output / "grpo", "reward")}]),
            "Share of right samples on training problems in each GRPO step, a mean over five steps.",
        ),
        transcripts=page.Transcripts({name: score.answers for name, score in scores.items()}),
        facts=facts,
    )


def training_bytes(cfg: Config, mode: str) -> str:
    """Format the memory of a mode's weights, gradients and optimizer state in GB, for fp32 as on a CPU."""
    file = cfg.model / "config.json"
    config = read_config(read_object(file), str(file))
    rank = MODES[mode].get("lora_rank")
    lora = LoraConfig(rank, 2 * rank) if rank else None
    memory = training_memory(config, Training(lora, "base_4bit" in MODES[mode], tokens=0, on_gpu=False))
    return f"{memory.total / 1e9:.2f} GB"


def peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def print_score(name: str, score: Score) -> None:
    print(f"{name:<8} right {score.right:5.1f} +- {score.error:.1f} percent   ended {score.ended:5.1f}")


if __name__ == "__main__":
    sys.exit(run_command("chat-demo", sys.modules[__name__], train, sys.argv[1:]))
