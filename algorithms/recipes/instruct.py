"""InstructGPT's recipe in miniature: six training runs, from random weights to PPO and DPO on the same preferences.

    base           SFT from random weights on text that follows no instruction (stands in for pretraining)
    SFT            base -> SFT on demonstrations
    reward model   SFT -> Bradley and Terry's loss on preferences between SFT's own samples
    PPO            SFT -> PPO on the reward model's score minus beta KL(policy || SFT)
    PPO, no KL     the same with beta 0, which shows over-optimisation
    DPO            SFT -> DPO on the preferences, the same beta

The judge of the preferences has a gold reward, defined in `letters.py`, and errs with the odds of Bradley and Terry. So
the reward model, also called the proxy, estimates the gold reward up to a constant. PPO and DPO with the same beta
share one optimum, pi_SFT e^(gold / beta) / Z. PPO logs the gold reward as a reward function of weight 0. Every stage is
one call of an algorithm's `train` on files in the run folder. Its config.json holds the flags of that call.

Source: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155
        gold and proxy reward by sqrt(KL): Gao et al. 2022, https://arxiv.org/abs/2210.10760
Run:    burnish instruct
"""

import json
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Literal

from torch import Tensor

from ...model.checkpoint import load_model, load_scalar_model
from ...model.generate import Sample
from ...model.text.tokenizer import Tokenizer
from .. import dpo, ppo, reward, sft
from ..run.batch import Completion, Family, over_completions
from ..run.checks import check_flags
from ..run.command import run_command
from ..run.flags import Bounds, Count, run_folder
from . import page
from .letters import (
    BEST,
    FOLLOWED,
    LENGTH,
    LETTERS,
    answer_row,
    gold,
    make_tokenizer,
    optimum,
    preference_row,
    prompt_row,
)
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
)


@dataclass(frozen=True, kw_only=True)
class Config(RecipeFlags):
    output: Path = run_folder("instruct")
    texts: Count = 16_000  # texts that follow no instruction, for the base
    base_steps: Count = 250  # SFT steps from random weights to a base
    demonstrations: Count = 6400  # completions that follow the instruction, for SFT
    sft_steps: Count = 300  # SFT steps on the demonstrations
    preferences: Count = 12_800  # pairs of SFT's samples, for the reward model and DPO
    labels: Literal["gold", "coin"] = "gold"  # coin is the control: random preferences
    reward_steps: Count = 400  # training steps of the reward model
    beta: Annotated[float, Bounds(1e-9)] = 1.0  # weight of the KL to SFT, in PPO and DPO
    ppo_steps: Count = 50  # rollouts of each PPO stage, with and without KL
    dpo_steps: Count = 200  # DPO steps on the preferences
    evaluation_samples: Count = 64  # samples per instruction in each measurement


SIZE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
MAX_NEW_TOKENS = LENGTH + 4
CAPACITY = 16_384  # tokens in one forward
NO_KL = "PPO, no KL"
HEADING = "Means over fresh samples"


@dataclass(frozen=True)
class Score:
    """Means over fresh samples at temperature 1."""

    gold: float
    proxy: float  # the reward model's score, shifted so that SFT's mean equals its gold reward
    kl: float  # from the stage to SFT, in nats per sample
    wins: float  # percent of samples with more gold than a sample of SFT's; a tie counts half
    length: float  # tokens, the end token included


def train(cfg: Config) -> Path:
    """Run the recipe for each seed, and return the path of the report."""
    # 1. the stages of every seed, and their medians
    started = time.perf_counter()
    check_flags(cfg)
    page.check_packages()
    recipes = run_seeds(Recipe, cfg)
    table = median_scores(recipes)
    judged = [median(values) for values in zip(*(recipe.judged for recipe in recipes), strict=True)]

    # 2. for comparison, gold and KL of the best policy
    best, kl = optimum(cfg.beta)
    facts = {
        "reward model": f"right about {judged[0]:.1f} % of held-out preferences; gold itself {judged[1]:.1f} %",
        "beta": cfg.beta,
        "optimum at this beta": f"gold {best:.2f} at KL {kl:.2f}, from demonstrations learned exactly",
        "preferences": f"{cfg.preferences}, labelled by {cfg.labels}",
        "seeds": cfg.seeds,
        "wall time": f"{time.perf_counter() - started:.0f} s",
        "folder": cfg.output,
    }
    print_table(HEADING, table, cfg.seeds, print_row)

    # 3. the report
    report = page.write(cfg.output / "report.html", page_of(cfg, table, recipes, facts))
    print("\n" + "\n".join(f"{name}: {facts[name]}" for name in list(facts)[:3]))
    print(f"{facts['wall time']}; report: {report}")
    return report


class Recipe(Stages):
    """The training stages of the recipe for one seed. `run` executes all of them."""

    def __init__(self, cfg: Config, folder: Path, seed: int):
        super().__init__(cfg, folder, seed)
        self.noise = random.Random(seed)
        self.tokenizer = Tokenizer(make_tokenizer(), eos="<eos>")

    def run(self) -> "Recipe":
        cfg = self.cfg
        random_weights = random_model(self.folder / "random", make_tokenizer(), self.seed, **SIZE)
        texts = self.answers("texts", cfg.texts, 0)
        demonstrations = self.answers("demonstrations", cfg.demonstrations, FOLLOWED)
        flags = {"batch_size": 64, "learning_rate": 5e-3}
        base = self.stage(sft, "base", random_weights, data=texts, steps=cfg.base_steps, **flags)
        flags = {"batch_size": 64, "learning_rate": 2e-3}
        self.sft = self.stage(sft, "sft", base, data=demonstrations, steps=cfg.sft_steps, **flags)

        preferences = self.pairs("preferences", cfg.preferences, seed=1)
        held_out = self.pairs("held-out", 800, seed=2)
        flags = {"data": preferences, "eval_data": held_out, "batch_size": 32, "learning_rate": 1e-3}
        self.proxy = self.stage(reward, "reward", self.sft, steps=cfg.reward_steps, **flags)
        self.judged = self.judge(held_out)
        self.opponents = self.sample(self.sft, cfg.evaluation_samples, seed=3)
        self.measure("base", base)
        self.measure("SFT", self.sft)

        flags = {"steps": cfg.ppo_steps, "data": self.write("prompts", map(prompt_row, LETTERS))}
        flags |= {"reward": ("burnish.algorithms.recipes.letters:gold",), "reward_weights": (0.0,)}  # logged
        flags |= {"reward_model": self.proxy, "prompts_per_step": len(LETTERS), "group_size": 16}
        flags |= {"max_new_tokens": MAX_NEW_TOKENS, "epochs_per_rollout": 2, "minibatches": 1}
        flags |= {"learning_rate": 3e-4, "critic_learning_rate": 1e-3}
        self.measure("PPO", self.stage(ppo, "ppo", self.sft, kl_coefficient=cfg.beta, **flags))
        self.measure(NO_KL, self.stage(ppo, "ppo-no-kl", self.sft, kl_coefficient=0.0, **flags))

        flags = {"data": preferences, "beta": cfg.beta, "batch_size": 64, "learning_rate": 3e-4}
        self.measure("DPO", self.stage(dpo, "dpo", self.sft, steps=cfg.dpo_steps, **flags))
        return self

    def answers(self, name: str, count: int, followed: float) -> Path:
        letters = self.noise.choices(LETTERS, k=count)
        return self.write(name, (answer_row(letter, followed, self.noise) for letter in letters))

    def sample(self, model: Path, count: int, seed: int) -> list[Sample]:
        """Draw `count` samples for each instruction. Every use passes a different seed."""
        prompts = [self.tokenizer.encode(prompt_row(letter)["prompt"]) for letter in LETTERS]
        options = {"samples_per_prompt": count, "max_new_tokens": MAX_NEW_TOKENS}
        seed = (self.seed << 8) + seed
        return sample(model, self.tokenizer, prompts, self.cfg.device, seed=seed, **options)

    def pairs(self, name: str, count: int, seed: int) -> Path:
        """Write the judge's preferences between SFT's samples: `count` pairs, rounded up to a multiple of 8."""
        coin = self.cfg.labels == "coin"
        drawn = self.sample(self.sft, 2 * -(-count // len(LETTERS)), seed)
        couples = zip(drawn[::2], drawn[1::2], strict=True)
        texts = [(LETTERS[a.prompt_index], self.decode(a), self.decode(b)) for a, b in couples]
        return self.write(name, (preference_row(*text, self.noise, coin) for text in texts))

    def judge(self, held_out: Path) -> tuple[float, float]:
        """Return the accuracy of the reward model and of the gold reward on the held-out preferences, in percent.

        A tie counts half for the gold reward, and as wrong for the reward model.
        """
        accuracy = json.loads((self.folder / "reward" / "held_out.json").read_text())["after"]["accuracy"]
        rows = [json.loads(line) for line in held_out.read_text().splitlines()]
        letters = [row["prompt"][0] for row in rows]
        chosen, rejected = (
            gold([row[name] for row in rows], letter=letters) for name in ("chosen", "rejected")
        )
        return 100 * accuracy, win_rate(chosen, rejected)

    def measure(self, stage: str, model: Path) -> None:
        # 1. samples, each paired with one of SFT's, and their gold rewards
        samples = self.sample(model, self.cfg.evaluation_samples, seed=4)
        letters = [LETTERS[one.prompt_index] for one in samples]
        golds, others = (
            gold(list(map(self.decode, drawn)), letter=letters) for drawn in (samples, self.opponents)
        )
        prompts = [self.tokenizer.encode(prompt_row(letter)["prompt"]) for letter in letters]
        pairs = [
            Family(prompt, [as_completion(one), as_completion(other)])
            for prompt, one, other in zip(prompts, samples, self.opponents, strict=True)
        ]

        # 2. the reward model's scores, and the KL from the stage to SFT
        proxy_model = load_scalar_model(self.proxy, device=self.cfg.device)
        scores = over_completions(proxy_model, pairs, lambda batch: batch.scores(proxy_model), CAPACITY)
        proxy, opponents_proxy = scores.mean(0).tolist()
        self.shift = mean(others) - opponents_proxy
        logprob, reference = (self.logprobs(folder, pairs) for folder in (model, self.sft))
        self.scores[stage] = Score(
            gold=mean(golds),
            proxy=proxy + self.shift,
            kl=(logprob - reference).mean().item(),
            wins=win_rate(golds, others),
            length=mean(len(one.tokens) for one in samples),
        )
        print_row(stage, self.scores[stage])

        # 3. the first samples, for the report
        first = range(0, 4 * self.cfg.evaluation_samples, self.cfg.evaluation_samples)
        self.transcripts[stage] = [
            f"{letters[i]}:{self.decode(samples[i]):<20}{golds[i]:4.0f}" for i in first
        ]

    def logprobs(self, folder: Path, pairs: list[Family]) -> Tensor:
        """Return the log-probability of each pair's first completion under the policy in `folder`, (pairs,)."""
        model = load_model(folder, device=self.cfg.device)
        return over_completions(model, pairs, lambda b: b.sums(b.score(model)[0]), CAPACITY)[:, 0]

    def decode(self, sample: Sample) -> str:
        return self.tokenizer.decode(sample.tokens)

    def paths(self) -> dict[str, tuple[list[float], list[float], list[float]]]:
        """Return the lists (KL, gold, proxy) of each stage: one entry per rollout of PPO, one at the end of DPO."""
        found = {}
        for stage, name in (("PPO", "ppo"), (NO_KL, "ppo-no-kl")):
            kl, golds, proxy = (read_metric(self.folder / name, m) for m in ("kl", "reward/gold", "score"))
            found[stage] = (kl, golds, [score + self.shift for score in proxy])
        end = self.scores["DPO"]
        return found | {"DPO": ([end.kl], [end.gold], [end.proxy])}


def page_of(
    cfg: Config, table: Mapping[str, Score], recipes: list[Recipe], facts: Mapping[str, object]
) -> page.Page:
    return page.Page(
        title="InstructGPT's recipe in miniature",
        subtitle="Write twelve letters with many of one kind, but not only that kind. Demonstrations, a reward model "
        "from preferences, PPO and DPO, each trained here from random weights.",
        table=page.Table(
            heading="Gold reward by stage",
            header=["stage", "gold", "proxy", "KL to SFT", "wins over SFT, %", "length"],
            rows={stage: [*vars(score).values()] for stage, score in table.items()},
            full_bar=BEST,
            format="%.2f",
            note=f"gold: the judge's reward, at most {BEST}, which no stage has seen. proxy: the reward model's score, "
            "shifted so that SFT's is its gold reward. wins: samples with more gold than one of SFT's; a tie "
            f"counts half. Means over {cfg.evaluation_samples} samples an instruction at temperature 1.",
        ),
        figure=page.Picture(
            page.rewards_series([recipe.paths() for recipe in recipes]),
            "Gold reward (solid, filled) and proxy (dotted, hollow) of PPO's rollouts, averaged over five, by the "
            "policy's distance from SFT. Where the two part, the policy exploits errors of the reward model (Gao et "
            "al. 2022). DPO has no rollouts and is one mark.",
            x_label="distance from SFT: square root of the KL",
            y_label="reward",
            heading="Over-optimisation",
            include=(),
        ),
        transcripts=page.Transcripts(
            recipes[0].transcripts, "The first instructions, one sample each, with its gold reward."
        ),
        facts=facts,
    )


def as_completion(sample: Sample) -> Completion:
    return Completion(sample.tokens, [True] * len(sample.tokens))


def win_rate(rewards: list[float], others: list[float]) -> float:
    """Return the percentage of `rewards` above their counterparts in `others`. A tie counts half."""
    return 100 * mean((a > b) + 0.5 * (a == b) for a, b in zip(rewards, others, strict=True))


def print_row(stage: str, score: Score) -> None:
    print(f"{stage:<12}{numbers_of(score, '6.2f')}")


if __name__ == "__main__":
    sys.exit(run_command("instruct", sys.modules[__name__], train, sys.argv[1:]))
