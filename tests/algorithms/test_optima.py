"""The ends of training, beside those that the mathematics gives, on tasks small enough to enumerate.

Completions are of one or two tokens, so the policy is a table that can be read off the model exactly.
"""

import dataclasses
import json
from typing import Any, NamedTuple

import pytest
import torch
from burnish.algorithms import distill, grpo, ppo
from burnish.algorithms.recipes.sums import VOCABULARY, make_tokenizer, prompt_row
from burnish.model.checkpoint import load_model, save_model
from burnish.model.config import ModelConfig
from burnish.model.packed import pack
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer
from torch import Tensor

V, EOS = len(VOCABULARY), 0
COMPLETIONS = [[EOS]] + [[a, b] for a in range(V) if a != EOS for b in range(V)]  # all there are
PROBLEMS = [(1, 2, 3), (4, 5, 6), (7, 8, 9), (0, 0, 1)]
SUCCESS = {5, 6, 7}  # first tokens that `right` rewards
REWARDS = """
import random
noise = random.Random(0)
def worth(completion_ids, **_):
    return [(7 * ids[0] + 5 * ids[-1]) % 11 / 10 for ids in completion_ids]
def right(completion_ids, **_):
    return [float(ids[0] in (5, 6, 7)) for ids in completion_ids]
def chance(completion_ids, **_):
    return [float(noise.random() < 0.5) for _ in completion_ids]
"""
WORTH = torch.tensor([(7 * ids[0] + 5 * ids[-1]) % 11 / 10 for ids in COMPLETIONS], dtype=torch.float64)


class Task(NamedTuple):
    common: dict[str, Any]  # flags
    rewards: str

    def train(self, module, reward, output, **flags) -> Tensor:
        cfg = module.Config(
            reward=(f"{self.rewards}:{reward}",),
            output=output,
            **{**self.common, "max_new_tokens": 2, **flags},
        )
        return table(module.train(cfg))


@pytest.fixture
def task(tmp_path, seed) -> Task:
    config = ModelConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        eos_token_id=EOS,
    )

    tokenizer = Tokenizer(make_tokenizer(), eos="<eos>")
    save_model(Transformer(config, seed=seed), tmp_path / "start", tokenizer)
    prompts, rewards = tmp_path / "prompts.jsonl", tmp_path / "rewards.py"
    prompts.write_text("".join(json.dumps(prompt_row(problem)) + "\n" for problem in PROBLEMS))
    rewards.write_text(REWARDS)
    start = tmp_path / "start"
    return Task(
        {"model": start, "data": prompts, "prompts_per_step": 4, "seed": seed, "device": "cpu"}, str(rewards)
    )


@torch.no_grad()
def table(folder) -> Tensor:
    """log pi(completion | prompt), exactly: (prompts, completions) fp64."""
    model, tokenizer, rows = load_model(folder), Tokenizer.load(folder), []
    for problem in PROBLEMS:
        prompt = tokenizer.encode(prompt_row(problem)["prompt"])
        packed = pack([prompt] + COMPLETIONS, [-1] + [0] * len(COMPLETIONS))
        logprob, _, _ = model.score(packed, torch.arange(len(prompt), packed.tokens.numel()))
        lengths = torch.tensor([len(ids) for ids in COMPLETIONS])
        rows.append(torch.segment_reduce(logprob.double(), "sum", lengths=lengths))
    return torch.stack(rows)


def kl(log_p: Tensor, log_q: Tensor) -> float:
    return (log_p.exp() * (log_p - log_q)).sum(1).mean().item()


def successes(log_p: Tensor) -> Tensor:
    """The probability of success for each prompt."""
    wanted = torch.tensor([ids[0] in SUCCESS for ids in COMPLETIONS])
    return log_p.exp()[:, wanted].sum(1)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("seed", "advantage"),
    [
        *(pytest.param(seed, "gae", marks=SLOW) for seed in (0, 1, 2)),
        *(pytest.param(0, advantage, marks=SLOW) for advantage in ("rloo", "reinforce_pp")),
    ],
)
def test_ppo_reaches_the_known_optimum(task, tmp_path, advantage):
    """pi_ref e^(r / beta) / Z, the optimum of E[r] - beta KL(pi || pi_ref), which k1 in the reward has."""
    beta = 0.3
    reference = table(task.common["model"])
    optimum = torch.log_softmax(reference + WORTH / beta, 1)
    assert (reference.exp().sum(1) - 1).abs().max() < 1e-5  # the completions are all there are

    critic = {"critic_learning_rate": 1e-2} if advantage == "gae" else {}
    trained = task.train(
        ppo,
        "worth",
        tmp_path / "out",
        steps=60,
        group_size=64,
        kl_coefficient=beta,
        advantage=advantage,
        learning_rate=1e-2,
        schedule="linear",
        epochs_per_rollout=2,
        minibatches=2,
        **critic,
    )

    assert kl(reference, optimum) > 0.5 and kl(trained, optimum) < 0.02


@pytest.mark.parametrize(
    ("seed", "estimator"),
    [
        *(pytest.param(seed, "k3", marks=SLOW) for seed in (0, 1, 2)),
        *(pytest.param(seed, estimator, marks=SLOW) for seed in (0, 1, 2) for estimator in ("k2", "rho_k3")),
    ],
)
def test_grpo_settles_at_its_fixed_point(task, tmp_path, estimator):
    """GRPO pulls p, the rate of success, up by sqrt(p (1 - p)) where groups are large; q is the reference's.

    k3 in the loss pulls back by beta (p - q), the gradient of KL(ref || pi). k2 and rho k3 have that of KL(pi || ref):
    beta p (1 - p) (logit p - logit q).
    """
    beta = 1.5
    q = successes(table(task.common["model"]))

    p = successes(
        task.train(
            grpo,
            "right",
            tmp_path / "out",
            steps=50,
            group_size=256,
            max_new_tokens=1,
            kl_coefficient=beta,
            kl_estimator=estimator,
            learning_rate=1e-2,
            schedule="linear",
        )
    )

    pull = (p * (1 - p)).sqrt()
    forward, reverse = beta * (p - q), beta * p * (1 - p) * (p.logit() - q.logit())
    here, elsewhere = (forward, reverse) if estimator == "k3" else (reverse, forward)
    assert (p > q + 0.2).all()
    assert (here - pull).abs().max() < 0.025 and (elsewhere - pull).abs().min() > 0.05


@SLOW
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("module", [grpo, ppo], ids=["grpo", "ppo"])
def test_random_rewards_improve_nothing(task, tmp_path, module):
    flags = {"steps": 40, "group_size": 32, "learning_rate": 3e-3}
    if module is ppo:
        flags |= {
            "critic_learning_rate": 1e-2,
            "kl_coefficient": 0.0,
            "epochs_per_rollout": 1,
            "minibatches": 1,
        }
    before = successes(table(task.common["model"])).mean()
    chance = successes(task.train(module, "chance", tmp_path / "chance", **flags)).mean()
    right = successes(task.train(module, "right", tmp_path / "right", **flags)).mean()
    assert before < 0.25 and right > 0.7 and abs(chance - before) < 0.12


@pytest.fixture
def teacher(task, tmp_path):
    """A model that has preferences, as far from the student's as two draws are."""
    model = load_model(task.common["model"])
    config = dataclasses.replace(model.config, initializer_range=0.15)
    folder = tmp_path / "teacher"
    save_model(
        Transformer(config, seed=task.common["seed"] + 100), folder, Tokenizer.load(task.common["model"])
    )
    return folder


@pytest.mark.parametrize(
    ("seed", "flags"),
    [
        (0, {"beta": 0.0}),
        *(pytest.param(seed, {"beta": beta}, marks=SLOW) for seed in (0, 1, 2) for beta in (0.5, 1.0)),
        *(
            pytest.param(seed, {"loss": "policy_gradient", "batch_size": 128}, marks=SLOW)
            for seed in (0, 1, 2)
        ),
    ],
    ids=str,
)
def test_a_student_becomes_its_teacher(task, teacher, tmp_path, flags):
    """Both KLs, their mixture, and the policy gradient have one optimum where the student can be the teacher."""
    target, prompts = table(teacher), tmp_path / "many.jsonl"
    prompts.write_text("".join(json.dumps(prompt_row(problem)) + "\n" for problem in PROBLEMS * 64))

    cfg = distill.Config(
        model=task.common["model"],
        teacher=teacher,
        data=prompts,
        student_samples=1.0,
        max_new_tokens=2,
        output=tmp_path / "out",
        learning_rate=2e-2,
        schedule="linear",
        warmup_steps=0,
        seed=task.common["seed"],
        device="cpu",
        **{"steps": 150, "batch_size": 16, **flags},
    )

    trained = table(distill.train(cfg))
    assert kl(target, table(cfg.model)) > 0.2
    assert kl(target, trained) < 0.01 and kl(trained, target) < 0.01
