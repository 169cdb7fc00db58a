"""Negative controls: faults planted in copies of ppo, grpo and their batches, each caught by the named check.

The checks are those of the tests beside this file in their smallest form. A faithful copy must pass them all.
"""

import json
from types import ModuleType
from typing import Any

import pytest
import torch
from burnish.algorithms.data.examples import Prompt
from burnish.algorithms.data.groups import Group, Groups
from burnish.model.checkpoint import load_model, load_scalar_model, save_model
from burnish.model.generate import SamplingParams, generate
from burnish.model.packed import pack
from burnish.model.text.tokenizer import Tokenizer
from controlled import Place, assert_a_stopped_run_goes_on, assert_caught, assert_faithful, metrics_of, same
from faults import Fault, control, faults_of


def rl_config(module: ModuleType, place: Place, **changes: Any) -> Any:
    """A run of one step, with a reward that differs from sample to sample."""
    folder = place.output.parent
    rows = [{"prompt": row["prompt"]} for row in map(json.loads, place.data.read_text().splitlines())]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))
    (folder / "rewards.py").write_text(
        "def odd(completion_ids, **_):\n    return [float(sum(i % 2 for i in ids)) for ids in completion_ids]\n"
    )
    common = {"model": place.model, "data": folder / "prompts.jsonl", "output": place.output, "device": "cpu"}
    common |= {"reward": (f"{folder}/rewards.py:odd",), "max_new_tokens": 6, "learning_rate": 1e-2}
    if hasattr(module, "value_loss"):
        common |= {"epochs_per_rollout": 1, "minibatches": 1}
    return module.Config(**{**common, "steps": 1, "prompts_per_step": 8, "group_size": 2, **changes})


# ---- the checks


@control
def rl_micro_batches_change_nothing(module: ModuleType, place: Place) -> None:
    found = []
    for tokens in (10**6, 40):
        output = place.output / str(tokens)
        module.train(rl_config(module, place, micro_batch_tokens=tokens, output=output))
        found.append(metrics_of(output)[0])
    for name in {"loss", "policy_loss", "value_loss", "grad_norm", "value_grad_norm"} & set(found[0]):
        same(found[0][name], found[1][name], 1e-4)


@control
def rewards_and_values_of_tokens(module: ModuleType, place: Place) -> None:
    """PPO's score stands on the last token, k1 on each; half of the larger square; the controller's direction."""
    k1, lengths = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.0, 0.0]]), torch.tensor([3, 1])
    found = module.token_rewards(torch.tensor([1.0, 2.0]), k1, lengths, 0.5)
    for a, b in zip(found.flatten().tolist(), [-0.05, -0.1, 0.85, 1.8, 0, 0], strict=True):
        same(a, b)
    value, old, returns = torch.tensor([1.0, 0.1, -1.0]), torch.zeros(3), torch.ones(3)
    same(module.value_loss(value, old, returns, 2, 0.2).item(), (0.64 + 0.81 + 4.0) / 4)
    same(module.adapted(0.1, 6.6, 6.0, 100, 1000), 0.1 * 1.01)


@control
def returns_are_those_before_whitening(module: ModuleType, place: Place) -> None:
    """Returns at gamma = lambda = 1, each of them the score; advantages with mean 0 and variance 1."""
    cfg = rl_config(module, place, gae_lambda=1.0)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    reward = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, -2.0]])
    advantage, returns = module.ADVANTAGES[cfg.advantage](cfg, reward, torch.randn(2, 3) * mask, mask)
    for a, b in zip(returns[mask].tolist(), [1.0, 1.0, -2.0, -2.0, -2.0], strict=True):
        same(a, b)
    same(advantage[mask].mean().item(), 0)
    same(advantage[mask].var(correction=0).item(), 1, 1e-4)


@control
def ppo_starts_on_policy(module: ModuleType, place: Place) -> None:
    module.train(rl_config(module, place, missing_end_penalty=0.7, temperature=1.4))
    (line,) = metrics_of(place.output)
    same(line["first_ratio"], 1)
    same(line["kl"], 0)
    same(line["mismatch"], 0, 1e-4)
    assert 0 <= line["ended"] < 1, "expected samples without an end"
    same(line["reward"], line["score"] - 0.7 * (1 - line["ended"]), 1e-4)


@control
def the_policy_leaves_its_reference(module: ModuleType, place: Place) -> None:
    module.train(rl_config(module, place, steps=2, kl_coefficient=0.05))
    first, second = metrics_of(place.output)
    same(first["kl"], 0)
    assert second["kl"] > 1e-4, f"expected a distance from the start, got {second['kl']}"


@control
def the_score_is_read_at_the_end(module: ModuleType, place: Place) -> None:
    """The mean of a reward model's scores, each computed on a row of its own."""
    scorer, folder = load_scalar_model(place.model, seed=3), place.output.parent / "scorer"
    save_model(scorer, folder, Tokenizer.load(place.model))
    seen, measure = [], module.measure
    module.measure = lambda cfg, groups, models: seen.append(groups) or measure(cfg, groups, models)
    module.train(rl_config(module, place, reward=(), reward_model=folder))
    rows = [group.prompt + one.tokens for group in seen[0] for one in group.samples]
    scores = [scorer.values(pack([row]), torch.tensor([len(row) - 1])).item() for row in rows]
    same(metrics_of(place.output)[0]["score"], sum(scores) / len(scores))


@control
def a_stopped_run_goes_on(module: ModuleType, place: Place) -> None:
    assert_a_stopped_run_goes_on(module, rl_config, place, kl_target=0.01, kl_horizon=10)


@control
def grpo_starts_on_policy(module: ModuleType, place: Place) -> None:
    """The sum of A n / N, which with the paper's denominator is 0; then two updates on one rollout."""
    flags = {"aggregation": "sequence_mean", "kl_coefficient": 0.1, "temperature": 1.4}
    module.train(rl_config(module, place, **flags))
    (line,) = metrics_of(place.output)
    for name, expected in (("loss", 0), ("kl", 0), ("ratio", 1), ("mismatch", 0)):
        same(line[name], expected)
    assert line["grad_norm"] > 1e-3, "expected a gradient"
    module.train(rl_config(module, place, updates_per_rollout=2, output=place.output / "two"))
    ratio = metrics_of(place.output / "two")[0]["ratio"]
    assert abs(ratio - 1) > 1e-4, f"expected a ratio off 1 in a second update, got {ratio}"


@control
def unjudged_samples_leave_the_denominator(module: ModuleType, place: Place) -> None:
    seen, objective = [], module.objective
    module.objective = lambda cfg, terms: seen.append(terms) or objective(cfg, terms)
    module.train(rl_config(module, place, mask_truncated=True, temperature=1.3, prompts_per_step=8, steps=6))
    assert seen, "expected samples that ended"
    for terms in seen:
        assert terms.lengths.sum() == len(terms.logprob), "expected whole samples"
        assert (terms.denominator >= len(terms.logprob)).all(), "expected the step's tokens"
    line = metrics_of(place.output)[0]
    counted = seen[0].denominator[0].item()
    assert counted < line["tokens"], f"expected fewer than all {line['tokens']} tokens, got {counted}"


@control
def the_sampler_is_the_scorer(module: ModuleType, place: Place) -> None:
    """One log-probability under truncation and a temperature; values and scores stand where they should."""
    model, tokenizer = load_model(place.model), Tokenizer.load(place.model)
    prompts = [Prompt(tokenizer.encode(text), text, {}) for text in ("1+2+3=", "4+5+6=")]
    drawn = generate(
        model,
        [prompt.tokens for prompt in prompts],
        SamplingParams(
            samples_per_prompt=4, max_new_tokens=6, temperature=0.7, top_k=9, stop_ids=tokenizer.stop_ids
        ),
    )
    groups = Groups(Group(prompts[i], drawn[4 * i : 4 * i + 4], torch.zeros(4)) for i in range(2))

    # every sampled token is a row of a batch
    lengths, tokens = groups.lengths, [token for sample in drawn for token in sample.tokens]
    whole = module.make_split_batches(groups, torch.ones(8, dtype=torch.bool), 10**6, "cpu")
    assert len(whole) == 1, "expected one micro-batch"
    assert whole[0].packed.tokens[whole[0].rows].tolist() == tokens, "expected every sampled token"
    parents = whole[0].packed.parents
    assert parents is not None, "expected parents"
    assert parents.tolist() == [-1, 0, 0, 0, 0, -1, 5, 5, 5, 5], "expected samples under their prompts"

    # in one micro-batch or several, the scorer finds what the sampler found
    real = torch.arange(int(lengths.max())) < lengths[:, None]
    sampled = module.over_tokens(model, whole, lambda batch, _: batch.sampled_logprob, real)
    cut = module.make_split_batches(groups, torch.ones(8, dtype=torch.bool), 14, "cpu")
    assert len(cut) > 2, "expected several micro-batches"
    for batches in (whole, cut):
        found = module.over_tokens(model, batches, lambda batch, policy: batch.score(policy, 0.7)[0], real)
        off = (found - sampled).abs().max().item()
        assert off < 1e-5, f"expected the sampler's log-probabilities, got one {off} away"

    # a scalar head, against the same row by itself
    scorer = load_scalar_model(place.model, seed=3)
    score, value = (
        module.over_tokens(scorer, whole, function, real)
        for function in (module.Batch.token_scores, module.Batch.values)
    )

    row = pack([prompts[0].tokens + drawn[0].tokens])
    at = torch.arange(len(prompts[0].tokens), row.tokens.numel())
    n = len(drawn[0].tokens)
    assert (score[0, :n] - scorer.values(row, at)).abs().max() < 1e-5, (
        "expected scores of what ends with a token"
    )
    assert (value[0, :n] - scorer.values(row, at - 1)).abs().max() < 1e-5, (
        "expected values of what stands before it"
    )


# ---- planted faults

FAULTS = faults_of(__file__)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_fault_is_caught(fault: Fault, place: Place, monkeypatch):
    assert_caught(fault, place, monkeypatch)


@pytest.mark.parametrize("file", sorted({fault.file for fault in FAULTS}))
def test_a_faithful_copy_passes(file: str, place: Place, monkeypatch):
    assert_faithful(file, FAULTS, place, monkeypatch)
