"""DeepSeek-R1's recipe in miniature: nine training runs, from random weights to a distilled student.

    base       SFT from random weights on noisy demonstrations (stands in for pretraining)
    R1-Zero    base -> GRPO
    R1         base -> SFT on a few clean demonstrations (cold start) -> GRPO -> keep the right samples (rejection
               sampling) -> base again -> SFT on these samples -> GRPO
    student    a smaller base -> SFT on R1's right samples (distillation), compared with smaller base -> GRPO

GRPO has two rule rewards, accuracy and form. There is no critic and no process reward model. Every stage is one call of
`sft.train` or `grpo.train` on files in the run folder. Its config.json holds the flags of that call. The task is
defined in `sums.py`, and all figures are on its held-out problems. The published pass@1 on AIME 2024, for comparison of
the shape: R1-Zero 15.6 -> 71.0 (majority vote 86.7), R1 79.8, student 72.6 distilled and 47.0 by RL alone.

Source: DeepSeek-AI 2025, https://arxiv.org/abs/2501.12948
Run:    burnish r1
"""

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from ...model.errors import InputError
from ...model.text.tokenizer import Tokenizer
from .. import grpo, sft
from ..run.checks import check_flags
from ..run.command import run_command
from ..run.flags import Count, run_folder
from . import page
from .parts import (
    RecipeFlags,
    Stages,
    median_scores,
    numbers_of,
    print_table,
    random_model,
    read_metric,
    run_seeds,
    sample,
    write_text,
)
from .sums import accuracy, answer_of, demonstration_row, form, make_tokenizer, prompt_row, split_problems

Problem = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Config(RecipeFlags):
    output: Path = run_folder("r1")
    demonstrations: Count = 38_400  # noisy demonstrations, for the bases
    base_steps: Count = 600  # SFT steps from random weights to a base
    cold_start_demonstrations: Count = 64  # clean demonstrations, for the cold start
    cold_start_steps: Count = 60  # SFT steps on the clean demonstrations
    rl_steps: Count = 150  # GRPO steps of R1-Zero and of the student by RL alone; each RL stage of R1: half
    rejection_samples: Count = 4  # samples per training problem; the right ones are kept
    sft_steps: Count = 300  # SFT steps on the kept samples
    distill_steps: Count = 2500  # SFT steps of the student on R1's right samples
    evaluation_samples: Count = 16  # samples per held-out problem, for pass@1 and the majority vote


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
    """Results on the held-out problems, in percent."""

    pass_at_1: float  # accuracy of single samples at temperature 1
    majority: float  # accuracy of the most frequent answer among the samples
    greedy: float
    form: float  # share of single samples with the right form


RL_STAGES = {  # folders of the GRPO stages, and their names in the table
    "zero": "R1-Zero",
    "first-rl": "R1: cold start, RL",
    "r1": "R1",
    "student-rl": "student, RL alone",
}
MAX_NEW_TOKENS = 12
HEADING = "Held-out problems, percent"


def train(cfg: Config) -> Path:
    """Run the recipe for each seed, and return the path of the report."""
    # 1. the stages of every seed
    started = time.perf_counter()
    check_flags(cfg)
    page.check_packages()
    recipes = run_seeds(Recipe, cfg)
    seconds = time.perf_counter() - started

    # 2. medians over the seeds
    table = median_scores(recipes)
    print_table(HEADING, table, cfg.seeds, print_row)

    # 3. figures and report
    curves = [recipe.curves() for recipe in recipes]
    scores = {stage: vars(score) | {"published": PUBLISHED.get(stage)} for stage, score in table.items()}
    figures = {"seeds": cfg.seeds, "seconds": round(seconds), "scores": scores, "curves": curves}
    write_text(cfg.output / "figures.json", json.dumps(figures) + "\n")
    facts = {"seeds": cfg.seeds, "wall time": f"{seconds:.0f} s", "folder": cfg.output}
    content = page_of(cfg, scores, curves, recipes[0].transcripts, facts)
    report = page.write(cfg.output / "report.html", content)
    print(f"\n{seconds:.0f} s; report: {report}")
    return report


class Recipe(Stages):
    """The training stages of the recipe for one seed. `run` executes all of them."""

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

    def sft(self, name: str, model: Path, data: Path, steps: int, learning_rate: float) -> Path:
        flags = {"steps": steps, "batch_size": 64, "learning_rate": learning_rate}
        return self.stage(sft, name, model, data=data, **flags)

    def grpo(self, name: str, model: Path, prompts: Path, steps: int) -> Path:
        rewards = ("burnish.algorithms.recipes.sums:accuracy", "burnish.algorithms.recipes.sums:form")
        flags = {"reward": rewards, "reward_weights": (1.0, 0.1), "prompts_per_step": 32}
        flags |= {"steps": steps, "max_new_tokens": MAX_NEW_TOKENS, "learning_rate": 1e-3}
        return self.stage(grpo, name, model, data=prompts, **flags)

    def sample(self, model: Path, problems: list[Problem], count: int, temperature: float) -> list[list[str]]:
        """Sample `count` completions for each problem. Return their texts, one list per problem."""
        tokenizer = Tokenizer.load(model)
        prompts = [tokenizer.encode(prompt_row(problem)["prompt"]) for problem in problems]
        options = {"samples_per_prompt": count, "max_new_tokens": MAX_NEW_TOKENS, "seed": self.seed}
        drawn = sample(model, tokenizer, prompts, self.cfg.device, temperature=temperature, **options)
        texts = [tokenizer.decode(one.tokens) for one in drawn]
        return [texts[i : i + count] for i in range(0, len(texts), count)]

    def right_samples(self, model: Path, problems: list[Problem]) -> list[dict[str, str]]:
        """Sample completions, and return the distinct ones with a right answer as rows (rejection sampling).

        Raises InputError if no completion is right.
        """
        drawn = self.sample(model, problems, self.cfg.rejection_samples, 1.0)
        kept = [row for each in zip(problems, drawn, strict=True) for row in right_rows(*each)]
        if not kept:
            raise InputError(f"{model}: none of its samples is right: train it longer")
        return kept

    def measure(self, stage: str, model: Path) -> None:
        # 1. samples and a greedy completion for every problem
        answers = [prompt_row(problem)["answer"] for problem in self.held_out]
        samples = self.sample(model, self.held_out, self.cfg.evaluation_samples, 1.0)
        greedy = [texts[0] for texts in self.sample(model, self.held_out, 1, 0.0)]

        # 2. the share of right answers
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

        # 3. the first samples, for the report
        first = zip(self.held_out[:4], samples, answers, strict=False)
        self.transcripts[stage] = [
            f"{prompt_row(problem)['prompt']}{texts[0]}   {'right' if answer_of(texts[0]) == answer else 'wrong'}"
            for problem, texts, answer in first
        ]

    def curves(self) -> dict[str, list[float]]:
        """Return the accuracy reward of each GRPO step, by stage."""
        return {name: read_metric(self.folder / name, "reward/accuracy") for name in RL_STAGES}


def page_of(
    cfg: Config,
    scores: Mapping[str, Mapping[str, float | None]],
    curves: Sequence[Mapping[str, list[float]]],
    transcripts: Mapping[str, Sequence[str]],
    facts: Mapping[str, object],
) -> page.Page:
    named = [{RL_STAGES[name]: values for name, values in of_seed.items()} for of_seed in curves]
    note = (
        f"pass@1, vote and form over {cfg.evaluation_samples} samples a problem at temperature 1. published: "
        "DeepSeek's pass@1 on AIME 2024 (arXiv 2501.12948; R1-Zero's vote: 86.7), another task: compare the shape."
    )

    return page.Page(
        title="DeepSeek-R1's recipe in miniature",
        subtitle="The last digit of a sum of three digits, reasoned out as running sums: "
        "R1-Zero, R1 and a distilled student, each trained here from random weights.",
        table=page.Table(
            heading=HEADING,
            header=["stage", "pass@1", "vote", "greedy", "form", "published"],
            rows={stage: [*score.values()] for stage, score in scores.items()},
            note=note,
        ),
        figure=page.Picture(
            page.steps_series(named),
            "Share of right samples on training problems in each GRPO step, a mean over five steps.",
        ),
        transcripts=page.Transcripts(transcripts),
        facts=facts,
    )


def right_rows(problem: Problem, texts: list[str]) -> Iterator[dict[str, str]]:
    """Yield a row for each distinct completion with a right answer, sorted by text."""
    row = prompt_row(problem)
    rewards = accuracy(texts, [row["answer"]] * len(texts))
    for text in sorted({text for text, reward in zip(texts, rewards, strict=True) if reward}):
        yield {"prompt": row["prompt"], "completion": text}


def print_row(stage: str, score: Score) -> None:
    published = f"   published {PUBLISHED[stage]:.1f}" if stage in PUBLISHED else ""
    print(f"{stage:<31} {numbers_of(score, '5.1f')}{published}")


if __name__ == "__main__":
    sys.exit(run_command("r1", sys.modules[__name__], train, sys.argv[1:]))
