"""`burnish grpo` as a user runs it, and what must not depend on how a step is cut up."""

import dataclasses
import json

import pytest
import torch
from burnish.algorithms import grpo, sft
from burnish.algorithms._data import Prompt
from burnish.algorithms._rollout import Group, micro_batches
from burnish.model.checkpoint import load_model
from burnish.model.errors import InputError
from burnish.model.generate import Sample
from burnish.model.transformer import Transformer

REWARD = "burnish.algorithms._sums:form"


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def cfg(model_folder, demonstrations, prompts, tmp_path):
    """From a model that has seen the form but does not hold to it."""
    start = sft.train(
        sft.Config(
            model=model_folder,
            data=demonstrations,
            output=tmp_path / "sft",
            steps=60,
            batch_size=16,
            learning_rate=1e-2,
            device="cpu",
        )
    )
    return grpo.Config(
        model=start,
        data=prompts,
        reward=(REWARD,),
        output=tmp_path / "out",
        steps=3,
        prompts_per_step=8,
        group_size=4,
        max_new_tokens=12,
        learning_rate=3e-3,
        device="cpu",  # fp32 throughout
    )


def same_weights(one, other, tolerance):
    for a, b in zip(load_model(one).parameters(), load_model(other).parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def test_reward_rises(cfg):
    grpo.train(dataclasses.replace(cfg, steps=40))
    metrics = metrics_of(cfg.output)
    first, last = (sum(line["reward"] for line in part) / 5 for part in (metrics[:5], metrics[-5:]))
    assert first < 0.8 and last > first + 0.15
    assert metrics[0]["ratio"] == 1 and metrics[0]["clip_fraction"] == 0
    assert max(line["mismatch"] for line in metrics if "mismatch" in line) < 1e-4


@pytest.mark.parametrize(
    "change",
    [{}, {"kl_coefficient": 0.1}, {"aggregation": "sequence_mean"}, {"top_k": 5, "temperature": 0.8}],
    ids=str,
)
def test_gradients_do_not_depend_on_micro_batches(cfg, tmp_path, change):
    cfg = dataclasses.replace(cfg, updates_per_rollout=2, **change)
    whole = grpo.train(cfg)
    cut = grpo.train(dataclasses.replace(cfg, output=tmp_path / "cut", micro_batch_tokens=30))
    same_weights(whole, cut, 5e-5)


def test_a_kl_term_needs_every_sample_and_starts_at_zero(cfg):
    grpo.train(dataclasses.replace(cfg, kl_coefficient=0.1))
    metrics = metrics_of(cfg.output)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and metrics[-1]["kl"] > 0


def test_a_reward_that_never_differs_changes_no_weight(cfg, tmp_path):
    (tmp_path / "flat.py").write_text("def flat(completions, **_):\n    return [1.0] * len(completions)\n")
    trained = grpo.train(dataclasses.replace(cfg, reward=(f"{tmp_path}/flat.py:flat",)))
    same_weights(cfg.model, trained, 0)
    assert metrics_of(cfg.output)[0]["flat_groups"] == 1


def test_a_failing_reward_ends_the_run_and_leaves_no_model(cfg, tmp_path):
    (tmp_path / "bad.py").write_text("def bad(completions, **_):\n    return [1.0]\n")
    with pytest.raises(InputError, match="reward bad: expected 32 rewards, one a completion, got 1"):
        grpo.train(dataclasses.replace(cfg, reward=(f"{tmp_path}/bad.py:bad",)))
    assert not (cfg.output / "model").exists()


def test_a_weight_for_each_reward_function(cfg):
    with pytest.raises(InputError, match="--reward-weights: expected 1, one a reward function, got 2"):
        grpo.train(dataclasses.replace(cfg, reward_weights=(1.0, 2.0)))


def test_micro_batches_share_the_prompt_and_keep_every_sample_once():
    def sample(prompt, tokens):
        return Sample(prompt, tokens, torch.arange(len(tokens)).float(), None, True)

    groups = [
        Group(
            Prompt([1, 2, 3], "a", {}), [sample(0, [4]), sample(0, [5, 5]), sample(0, [6])], torch.zeros(3)
        ),
        Group(Prompt([7], "b", {}), [sample(1, [8, 8, 8]), sample(1, [9])], torch.zeros(2)),
    ]
    needed = torch.tensor([True, True, False, True, True])
    (whole,) = micro_batches(groups, needed, 1000, "cpu")
    assert whole.packed.tokens.tolist() == [1, 2, 3, 4, 5, 5, 7, 8, 8, 8, 9]
    assert whole.packed.tokens[whole.rows].tolist() == [4, 5, 5, 8, 8, 8, 9]
    assert whole.per_token(torch.arange(5.0)).tolist() == [0, 1, 1, 3, 3, 3, 4]
    assert whole.lengths.tolist() == [1, 2, 3, 1]
    assert whole.positions.tolist() == [0, 1, 2, 4, 5, 6, 7]  # the third sample's token is the fourth of all
    assert whole.sampled_logprob.tolist() == [0, 0, 1, 0, 1, 2, 0]
    cut = micro_batches(groups, needed, 5, "cpu")
    assert [batch.packed.tokens.tolist() for batch in cut] == [[1, 2, 3, 4], [1, 2, 3, 5, 5], [7, 8, 8, 8, 9]]
    assert all(batch.packed.parents is not None for batch in cut)


def test_a_group_trains_on_its_prompt_once(cfg, monkeypatch):
    """P + sum(n_i) tokens go through the layers, not G * P + sum(n_i)."""
    trained = []
    forward = Transformer.forward

    def counted(model, packed, cache=None):
        if torch.is_grad_enabled():
            trained.append(packed.tokens.numel())
        return forward(model, packed, cache)

    monkeypatch.setattr(Transformer, "forward", counted)
    grpo.train(dataclasses.replace(cfg, kl_coefficient=0.1))  # with a KL term every sample is scored
    for step, line in enumerate(metrics_of(cfg.output)):
        sampled = line["length"] * cfg.prompts_per_step * cfg.group_size
        assert trained[step] == pytest.approx(cfg.prompts_per_step * 6 + sampled)  # prompts are 6 tokens
