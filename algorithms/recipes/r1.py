"""DeepSeek-R1's recipe in miniature: nine training runs, from random weights to a distilled student.

    base       SFT from random weights on noisy demonstrations (stands in for pretraining)
    R1-Zero    base -> GRPO
    R1         base -> SFT on a few clean demonstrations (cold start) -> GRPO -> keep its right samples (rejection
               sampling) -> base again -> SFT on them -> GRPO
    student    a smaller base -> SFT on R1's right samples (distillation), beside the same smaller base -> GRPO

GRPO with two rule rewards, accuracy and form; no critic, no process reward model. Every stage is one call of
`sft.train` or `grpo.train` on files in the run folder, and leaves the flags of that call in its config.json. The task
is in `_sums.py`; figures are on its held-out problems. Published shape, AIME 2024 pass@1: R1-Zero 15.6 -> 71.0
(majority vote 86.7), R1 79.8, student 72.6 distilled and 47.0 by RL alone.

Source: DeepSeek-AI 2025, https://arxiv.org/abs/2501.12948
Run:    burnish r1
"""

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from statistics import mean, median

import torch

from ...model.checkpoint import load_model
from ...model.errors import InputError
from ...model.generate import generate
from ...model.text.tokenizer import Tokenizer
from .. import grpo, sft
from ..run.command import run_command
from ..run.loop import check_flags, default_device, new_run_folder
from . import page
from .parts import random_model, read_metric, write_rows, write_text
from .sums import accuracy, answer_of, demonstration_row, form, make_tokenizer, prompt_row, split_problems


@dataclass(frozen=True)
class Config:
    output: Path = field(default_factory=lambda: new_run_folder("r1"))  # new folder: stages, report.html
    seeds: int = 1  # repetitions of everything; figures are then medians
    demonstrations: int = 38_400  # noisy ones, for the bases
    base_steps: int = 600  # SFT steps from random weights to a base
    cold_start_demonstrations: int = 64  # clean ones
    cold_start_steps: int = 60  # SFT steps on them
    rl_steps: int = 150  # GRPO steps of R1-Zero and of the student by RL alone; R1's two stages share them
    rejection_samples: int = 4  # per training problem, of which the right ones are kept
    sft_steps: int = 300  # SFT steps on the kept samples
    distill_steps: int = 2500  # SFT steps of the student on R1's right samples
    evaluation_samples: int = 16  # per held-out problem, for pass@1 and the majority vote
    device: str = field(default_factory=default_device)


SIZES = {  # Llama shapes
    "teacher": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "student": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
}
PUBLISHED = {  # DeepSeek's pass@1 on AIME 2024, https://arxiv.org/abs/2501.12948
    "base": 15.6,
    "R1-Zero": 71.0,
    "R1": 79.8,
    "student, distilled": 72.6,
    "student, RL alone": 47.0,
}


@dataclass(frozen=True)
class Score:
    """Percentages over the held-out problems."""

    pass_at_1: float  # of single samples at temperature 1
    majority: float  # of the most frequent answer among the samples
    greedy: float
    form: float  # of single samples that have the form


def train(cfg: Config) -> Path:
    """Returns the path of the report."""
    torch.set_num_threads(1)  # a second thread costs more than it gives on models this small
    started = time.perf_counter()
    counts = [name for name, value in vars(cfg).items() if isinstance(value, int)]
    check_flags(cfg, **{name: (1, inf) for name in counts})
    folders = [cfg.output / f"seed-{seed}" for seed in range(cfg.seeds)]
    recipes = [Recipe(cfg, folder, seed).run() for seed, folder in enumerate(folders)]
    table = {
        stage: Score(
            *(
                median(values)
                for values in zip(*(vars(r.scores[stage]).values() for r in recipes), strict=True)
            )
        )
        for stage in recipes[0].scores
    }
    seconds = time.perf_counter() - started
    print_table(table, cfg.seeds)
    curves = [recipe.curves() for recipe in recipes]
    scores = {stage: vars(score) | {"published": PUBLISHED.get(stage)} for stage, score in table.items()}
    figures = {"seeds": cfg.seeds, "seconds": round(seconds), "scores": scores, "curves": curves}
    write_text(cfg.output / "figures.json", json.dumps(figures) + "\n")
    report = page.write(
        cfg.output / "report.html",
        title="DeepSeek-R1's recipe in miniature",
        subtitle="The last digit of a sum of three digits, reasoned out as running sums: "
        "R1-Zero, R1 and a distilled student, each trained here from random weights.",
        heading="Held-out problems, percent",
        header=["stage", "pass@1", "vote", "greedy", "form", "published"],
        rows={stage: [*vars(score).values(), PUBLISHED.get(stage)] for stage, score in table.items()},
        note=f"pass@1, vote and form over {cfg.evaluation_samples} samples a problem at temperature 1. published: "
        "DeepSeek's pass@1 on AIME 2024 (arXiv 2501.12948; R1-Zero's vote: 86.7), another task: compare the shape.",
        figure=page.draw_steps(curves),
        figure_note="Share of right samples on training problems in each GRPO step, a mean over five steps.",
        transcripts=recipes[0].transcripts,
        facts={"seeds": cfg.seeds, "wall time": f"{seconds:.0f} s", "folder": cfg.output},
    )
    print(f"\n{seconds:.0f} s; report: {report}")
    return report


class Recipe:
    """One seed's stages. Each stage's folder holds its config.json, metrics.jsonl and model."""

    def __init__(self, cfg: Config, folder: Path, seed: int):
        self.cfg, self.folder, self.seed = cfg, folder, seed
        self.scores: dict[str, Score] = {}
        self.transcripts: dict[str, list[str]] = {}
        self.rl_stages: dict[str, Path] = {}

    def run(self) -> "Recipe":
        cfg, noise = self.cfg, random.Random(self.seed)
        training, self.held_out = split_problems(self.seed)
        noisy = (demonstration_row(noise.choice(training), noise) for _ in range(cfg.demonstrations))
        cold = (demonstration_row(problem) for problem in training[: cfg.cold_start_demonstrations])
        prompts = self.write("prompts", map(prompt_row, training))
        demonstrations = self.write("noisy-demonstrations", noisy)

        base = self.sft("base", self.random_model("teacher"), demonstrations, cfg.base_steps, 5e-3)
        self.measure("base", base)
        zero = self.grpo("zero", base, prompts, cfg.rl_steps)
        self.measure("R1-Zero", zero)

        cold_start = self.sft("cold-start", base, self.write("cold-start", cold), cfg.cold_start_steps, 1e-3)
        self.measure("R1: cold start", cold_start)
        first_rl = self.grpo("first-rl", cold_start, prompts, cfg.rl_steps // 2)
        self.measure("R1: cold start, RL", first_rl)
        kept = self.write("rejection-sampled", self.right_samples(first_rl, training))
        second_sft = self.sft("second-sft", base, kept, cfg.sft_steps, 1e-3)
        self.measure("R1: base, SFT on right samples", second_sft)
        r1 = self.grpo("r1", second_sft, prompts, cfg.rl_steps // 2)
        self.measure("R1", r1)

        student = self.sft("student-base", self.random_model("student"), demonstrations, cfg.base_steps, 5e-3)
        self.measure("student base", student)
        lessons = self.write("r1-samples", self.right_samples(r1, training))
        self.measure("student, distilled", self.sft("distilled", student, lessons, cfg.distill_steps, 3e-3))
        self.measure("student, RL alone", self.grpo("student-rl", student, prompts, cfg.rl_steps))
        return self

    def random_model(self, size: str) -> Path:
        return random_model(self.folder / f"{size}-random", make_tokenizer(), self.seed, **SIZES[size])

    def write(self, name: str, rows: Iterable[dict[str, str]]) -> Path:
        return write_rows(self.folder / "data" / f"{name}.jsonl", rows)

    def sft(self, name: str, model: Path, data: Path, steps: int, learning_rate: float) -> Path:
        return sft.train(
            sft.Config(
                model=model,
                data=data,
                output=self.folder / name,
                steps=steps,
                batch_size=64,
                learning_rate=learning_rate,
                seed=self.seed,
                device=self.cfg.device,
            )
        )

    def grpo(self, name: str, model: Path, prompts: Path, steps: int) -> Path:
        self.rl_stages[name] = self.folder / name
        return grpo.train(
            grpo.Config(
                model=model,
                data=prompts,
                reward=("burnish.algorithms.recipes.sums:accuracy", "burnish.algorithms.recipes.sums:form"),
                reward_weights=(1.0, 0.1),
                output=self.folder / name,
                steps=steps,
                prompts_per_step=32,
                max_new_tokens=12,
                learning_rate=1e-3,
                seed=self.seed,
                device=self.cfg.device,
            )
        )

    def sample(self, model: Path, problems: list, samples: int, temperature: float) -> list[list[str]]:
        tokenizer = Tokenizer.load(model)
        drawn = generate(
            load_model(model, device=self.cfg.device),
            [tokenizer.encode(prompt_row(problem)["prompt"]) for problem in problems],
            samples_per_prompt=samples,
            max_new_tokens=12,
            temperature=temperature,
            vocabulary=tokenizer.vocabulary,
            stop_ids=tokenizer.stop_ids,
            seed=self.seed,
        )
        texts = [tokenizer.decode(sample.tokens) for sample in drawn]
        return [texts[i : i + samples] for i in range(0, len(texts), samples)]

    def right_samples(self, model: Path, problems: list) -> list[dict[str, str]]:
        """Rejection sampling: distinct samples whose answer is right."""
        kept = []
        for problem, texts in zip(
            problems, self.sample(model, problems, self.cfg.rejection_samples, 1.0), strict=True
        ):
            row = prompt_row(problem)
            right = [
                t for t, r in zip(texts, accuracy(texts, [row["answer"]] * len(texts)), strict=True) if r
            ]
            kept += [{"prompt": row["prompt"], "completion": text} for text in sorted(set(right))]
        if not kept:
            raise InputError(
                f"{model}: none of its samples is right, so there is nothing to learn from; train it longer"
            )
        return kept

    def measure(self, stage: str, model: Path) -> None:
        answers = [prompt_row(problem)["answer"] for problem in self.held_out]
        samples = self.sample(model, self.held_out, self.cfg.evaluation_samples, 1.0)
        greedy = [texts[0] for texts in self.sample(model, self.held_out, 1, 0.0)]
        flat = [text for texts in samples for text in texts]
        repeated = [answer for answer in answers for _ in range(self.cfg.evaluation_samples)]
        votes = [Counter(map(answer_of, texts)).most_common(1)[0][0] for texts in samples]
        self.scores[stage] = Score(
            pass_at_1=100 * mean(accuracy(flat, repeated)),
            majority=100 * mean(vote == answer for vote, answer in zip(votes, answers, strict=True)),
            greedy=100 * mean(accuracy(greedy, answers)),
            form=100 * mean(form(flat)),
        )
        print_row(stage, self.scores[stage])
        shown = zip(self.held_out[:4], samples, answers, strict=False)
        self.transcripts[stage] = [
            f"{prompt_row(problem)['prompt']}{texts[0]}   {'right' if answer_of(texts[0]) == answer else 'wrong'}"
            for problem, texts, answer in shown
        ]

    def curves(self) -> dict[str, list[float]]:
        """Reward per GRPO step, by stage."""
        return {name: read_metric(folder, "reward/accuracy") for name, folder in self.rl_stages.items()}


def print_table(table: dict[str, Score], seeds: int) -> None:
    print(f"\nHeld-out problems, percent{f', medians of {seeds} seeds' if seeds > 1 else ''}:\n")
    for stage, score in table.items():
        print_row(stage, score)


def print_row(stage: str, score: Score) -> None:
    values = "   ".join(f"{name.replace('_at_', '@')} {value:5.1f}" for name, value in vars(score).items())
    published = f"   published {PUBLISHED[stage]:.1f}" if stage in PUBLISHED else ""
    print(f"{stage:<31} {values}{published}")


if __name__ == "__main__":
    sys.exit(run_command("r1", sys.modules[__name__], train, sys.argv[1:]))
