"""`burnish grpo` as a user runs it, and what must not depend on how a step is cut up."""

import dataclasses
import json
import math

import pytest
import torch
from burnish.algorithms import grpo
from burnish.algorithms.data import groups as groups_file
from burnish.algorithms.data.examples import Prompt
from burnish.algorithms.data.groups import Group
from burnish.algorithms.data.rewards import overlong_punishment
from burnish.algorithms.run.batch import make_split_batches
from burnish.model.checkpoint import load_model
from burnish.model.errors import InputError
from burnish.model.generate import Sample
from burnish.model.transformer import Layer, Transformer

REWARD = "burnish.algorithms.recipes.sums:form"


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def cfg(form_model, prompts, tmp_path):
    return grpo.Config(
        model=form_model,
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


@pytest.mark.slow
def test_reward_rises(cfg):
    grpo.train(dataclasses.replace(cfg, steps=40))
    metrics = metrics_of(cfg.output)
    first, last = (sum(line["reward"] for line in part) / 5 for part in (metrics[:5], metrics[-5:]))
    assert first < 0.8 and last > first + 0.15
    assert metrics[0]["ratio"] == 1 and metrics[0]["clip_fraction"] == 0
    assert max(line["mismatch"] for line in metrics if "mismatch" in line) < 1e-4


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"kl_coefficient": 0.1},
        {"kl_coefficient": 0.1, "kl_estimator": "rho_k3"},
        {"aggregation": "sequence_mean"},
        {"top_k": 5, "temperature": 0.8},
        {"loss": "gspo", "aggregation": "sequence_mean", "clip_low": 0.1, "clip_high": 0.1},
        {"loss": "cispo", "mismatch_weights": "truncated", "mask_truncated": True},
    ],
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


def test_a_reward_that_never_differs_changes_no_weight(cfg, tmp_path, capsys):
    (tmp_path / "flat.py").write_text("def flat(completions, **_):\n    return [1.0] * len(completions)\n")
    trained = grpo.train(dataclasses.replace(cfg, reward=(f"{tmp_path}/flat.py:flat",)))
    same_weights(cfg.model, trained, 0)
    assert metrics_of(cfg.output)[0]["flat_groups"] == 1
    assert capsys.readouterr().out.endswith("no group's rewards ever differed: the rewards taught nothing\n")


@pytest.fixture
def small(model_folder, prompts, tmp_path):
    """A run from random weights."""
    return grpo.Config(
        model=model_folder,
        data=prompts,
        reward=(REWARD,),
        output=tmp_path / "out",
        steps=3,
        prompts_per_step=4,
        group_size=2,
        max_new_tokens=4,
        device="cpu",
    )


def test_a_run_in_which_nothing_is_judged_says_so(small, tmp_path, capsys):
    (tmp_path / "none.py").write_text("def none(completions, **_):\n    return [None for _ in completions]\n")
    run = dataclasses.replace(small, reward=(f"{tmp_path}/none.py:none",), steps=2)
    same_weights(run.model, grpo.train(run), 0)
    assert [line["reward"] for line in metrics_of(run.output)] == [None, None]
    assert capsys.readouterr().out.endswith("every reward was None: the rewards taught nothing\n")


CURIOUS = """
import asyncio


async def curious(completions, completion_ids, trainer_state, log_metric, log_extra):
    await asyncio.sleep(0)
    log_metric("progress", trainer_state.global_step / trainer_state.max_steps)
    log_metric("reward", trainer_state.epoch)
    log_extra("number", list(range(len(completions))))
    return [float(sum(i % 2 for i in ids)) for ids in completion_ids]
"""


def test_a_damaged_file_of_completions_is_named(small, tmp_path):
    (tmp_path / "curious.py").write_text(CURIOUS)
    run = dataclasses.replace(small, reward=(f"{tmp_path}/curious.py:curious",), steps=1, save_every=1)
    grpo.train(run)
    file = run.output / "samples.jsonl"
    whole = file.read_text().splitlines()
    for damaged in ("{", "[1]", '{"step": null}', "{}", "[" * 100_000):
        file.write_text("\n".join([whole[0], damaged, *whole[2:], ""]))
        with pytest.raises(
            InputError, match=r"samples.jsonl line 2: expected an object with its step, got '"
        ):
            grpo.train(dataclasses.replace(run, resume=True, steps=2))


def test_what_an_async_function_logs_is_found_in_the_run(small, tmp_path, capsys):
    """Resumed, too: the lines of the step after the checkpoint are written once."""
    (tmp_path / "curious.py").write_text(CURIOUS)
    reward = (f"{tmp_path}/curious.py:curious", REWARD)
    run = dataclasses.replace(small, reward=reward, save_every=2, reward_timeout=60.0)
    grpo.train(run)
    with open(run.output / "samples.jsonl", "a") as file:
        file.write('{"step": 3, "torn')  # as a crash leaves it
    grpo.train(dataclasses.replace(run, resume=True, steps=4, reward_timeout=None))
    lines = metrics_of(run.output)
    # the epoch has 8 batches; a metric of theirs hides none of ours
    assert [line["metric/progress"] for line in lines] == [0, 1 / 3, 1 / 2, 3 / 4]
    assert [line["metric/reward"] for line in lines] == [0, 1 / 8, 2 / 8, 3 / 8]
    records = [json.loads(line) for line in (run.output / "samples.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [step for step in range(4) for _ in range(8)]
    assert [record["extra"]["number"] for record in records] == [*range(8)] * 4
    for record in records:
        assert record["reward"] == record["rewards"]["curious"] + record["rewards"]["form"]
    mean = sum(record["reward"] for record in records[-8:]) / 8
    assert mean == pytest.approx(lines[-1]["reward"])
    assert isinstance(records[0]["prompt"], str) and isinstance(records[0]["completion"], str)
    assert "taught nothing" not in capsys.readouterr().out


def test_a_column_that_is_missing_is_named_before_anything_is_sampled(small, tmp_path):
    (tmp_path / "wants.py").write_text("def wants(completions, solution):\n    return []\n")
    with pytest.raises(
        InputError, match="expected a column 'solution' for its argument; the data has answer"
    ):
        grpo.train(dataclasses.replace(small, reward=(f"{tmp_path}/wants.py:wants",)))
    assert not small.output.exists()


def test_a_failing_reward_ends_the_run_and_leaves_no_model(cfg, tmp_path):
    (tmp_path / "bad.py").write_text("def bad(completions, **_):\n    return [1.0]\n")
    with pytest.raises(InputError, match="reward bad: expected 32 rewards, one per completion, got 1"):
        grpo.train(dataclasses.replace(cfg, reward=(f"{tmp_path}/bad.py:bad",)))
    assert not (cfg.output / "model").exists()


def test_a_weight_for_each_reward_function(cfg):
    with pytest.raises(InputError, match="--reward-weights: expected 1, one per reward function, got 2"):
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
    (whole,) = make_split_batches(groups, needed, 1000, "cpu")
    assert whole.packed.tokens.tolist() == [1, 2, 3, 4, 5, 5, 7, 8, 8, 8, 9]
    assert whole.packed.tokens[whole.rows].tolist() == [4, 5, 5, 8, 8, 8, 9]
    assert whole.per_token(torch.arange(5.0)).tolist() == [0, 1, 1, 3, 3, 3, 4]
    assert whole.lengths.tolist() == [1, 2, 3, 1]
    assert whole.positions.tolist() == [0, 1, 2, 4, 5, 6, 7]  # the third sample's token is the fourth of all
    assert whole.sampled_logprob.tolist() == [0, 0, 1, 0, 1, 2, 0]

    cut = make_split_batches(groups, needed, 5, "cpu")
    assert [batch.packed.tokens.tolist() for batch in cut] == [[1, 2, 3, 4], [1, 2, 3, 5, 5], [7, 8, 8, 8, 9]]
    assert all(batch.packed.parents is not None for batch in cut)


def test_a_group_trains_on_its_prompt_once(cfg, monkeypatch):
    """P + sum(n_i) tokens go through the layers, not G * P + sum(n_i)."""
    trained = []
    forward = Layer.forward

    def counted(layer, x, now, rows=None):
        if torch.is_grad_enabled():
            trained.append(len(x))
        return forward(layer, x, now, rows)

    monkeypatch.setattr(Layer, "forward", counted)
    grpo.train(dataclasses.replace(cfg, kl_coefficient=0.1))  # with a KL term every sample is scored
    lines = metrics_of(cfg.output)
    layers = len(load_model(cfg.model).layers)
    assert len(trained) == len(lines) * layers
    for n, tokens in enumerate(trained):
        sampled = lines[n // layers]["length"] * cfg.prompts_per_step * cfg.group_size
        assert tokens == pytest.approx(cfg.prompts_per_step * 6 + sampled)  # prompts are 6 tokens


@pytest.mark.parametrize(
    "change", [{}, {"temperature": 0.7}, {"top_k": 4}, {"top_p": 0.8, "temperature": 1.3}], ids=str
)
def test_the_sampler_is_the_scorer(cfg, change):
    """The sampler's log-probabilities are the trainer's, in fp32 and with the support that truncation kept."""
    grpo.train(dataclasses.replace(cfg, kl_coefficient=0.01, steps=2, **change))
    assert all(0 <= line["mismatch"] < 1e-4 for line in metrics_of(cfg.output))


def test_mismatch_weights_are_one_where_the_sampler_is_the_trainer(cfg, tmp_path):
    plain = grpo.train(dataclasses.replace(cfg, steps=1))
    for name in ("truncated", "masked"):
        weighted = grpo.train(
            dataclasses.replace(cfg, steps=1, mismatch_weights=name, output=tmp_path / name)
        )
        same_weights(plain, weighted, 5e-5)
        assert metrics_of(tmp_path / name)[0]["weight"] == pytest.approx(1, abs=1e-4)


def test_a_mismatch_changes_the_weights(cfg, tmp_path, monkeypatch):
    """A sampler that says half of its probabilities: pi_old / pi_sampler is 2."""
    generate = groups_file.generate
    halved = lambda *a, **k: [
        dataclasses.replace(s, logprobs=s.logprobs - math.log(2)) for s in generate(*a, **k)
    ]
    monkeypatch.setattr(groups_file, "generate", halved)
    for name, cap, expected in (("truncated", 1.5, 1.5), ("masked", 1.5, 0.0), ("masked", 3.0, 2.0)):
        output = tmp_path / f"{name}-{cap}"
        trained = grpo.train(
            dataclasses.replace(cfg, steps=1, mismatch_weights=name, mismatch_cap=cap, output=output)
        )
        (line,) = metrics_of(output)
        assert line["weight"] == pytest.approx(expected, abs=1e-3)
        assert line["mismatch"] == pytest.approx(math.log(2), abs=1e-3)
        if expected == 0:  # every token is left out: nothing moves
            same_weights(cfg.model, trained, 0)


def test_dynamic_sampling_replaces_flat_groups(cfg, tmp_path, monkeypatch):
    """Rewards differ for the prompts alone that begin with an even digit."""
    (tmp_path / "even.py").write_text(
        "def even(prompts, completion_ids, **_):\n"
        "    return [float(i % 2) if int(p[0]) % 2 == 0 else 1.0 for i, p in enumerate(prompts)]\n"
    )

    seen, whole = [], grpo.make_split_batches
    monkeypatch.setattr(
        grpo,
        "make_split_batches",
        lambda groups, *a: seen.append([g.row.text for g in groups]) or whole(groups, *a),
    )

    cfg = dataclasses.replace(cfg, reward=(f"{tmp_path}/even.py:even",), max_draws=6)
    grpo.train(cfg)
    lines = metrics_of(cfg.output)
    for line, texts in zip(lines, seen, strict=True):
        assert len(texts) == line["groups"] == 8 and all(int(text[0]) % 2 == 0 for text in texts)
        assert 1 < line["draws"] <= 6 and line["flat_groups"] > 0
        assert line["tokens"] == pytest.approx(line["length"] * line["draws"] * 8 * 4)  # all that was sampled

    grpo.train(dataclasses.replace(cfg, max_draws=1, output=tmp_path / "one"))
    assert all(line["draws"] == 1 and line["groups"] == 8 for line in metrics_of(tmp_path / "one"))

    flat = tmp_path / "flat"
    (tmp_path / "same.py").write_text("def same(completions, **_):\n    return [1.0] * len(completions)\n")
    trained = grpo.train(
        dataclasses.replace(cfg, reward=(f"{tmp_path}/same.py:same",), max_draws=3, output=flat, steps=1)
    )
    same_weights(cfg.model, trained, 0)  # the tries are bounded, and without a group nothing is trained
    assert metrics_of(flat)[0]["draws"] == 3 and metrics_of(flat)[0]["groups"] == 0


def test_truncated_samples_leave_numerator_and_denominator(cfg, monkeypatch):
    """They leave the mean of their group, too: what is left is a step on the others alone."""
    seen, whole = [], grpo.make_split_batches

    def recorded(groups, needed, *a):
        seen.append((groups, needed))
        return whole(groups, needed, *a)

    monkeypatch.setattr(grpo, "make_split_batches", recorded)
    losses, clipped = [], grpo.clipped_loss
    monkeypatch.setattr(grpo, "clipped_loss", lambda *a, **k: losses.append(a) or clipped(*a, **k))
    cfg = dataclasses.replace(cfg, steps=1, max_new_tokens=8, mask_truncated=True, kl_coefficient=0.1)
    grpo.train(dataclasses.replace(cfg, temperature=1.3))
    (groups, needed), (_, _, advantage, denominator) = seen[0], losses[0]
    ended = torch.tensor([sample.ended for group in groups for sample in group.samples])
    assert not ended.all() and torch.equal(needed, ended)
    lengths = torch.tensor([len(sample.tokens) for group in groups for sample in group.samples])
    assert (denominator == lengths[ended].sum()).all() and len(advantage) == lengths[ended].sum()
    per_sample = torch.zeros(len(lengths))
    starts = lengths[ended].cumsum(0) - lengths[ended]
    per_sample[ended] = advantage[starts]
    assert per_sample.view(-1, 4).sum(1).abs().max() < 1e-3  # centred on those that ended


def test_the_overlong_punishment_is_one_more_reward(cfg):
    grpo.train(dataclasses.replace(cfg, overlong_buffer=6, temperature=1.5))
    for line in metrics_of(cfg.output):
        assert -1 <= line["reward/overlong-punishment"] < 0
        assert line["reward"] == pytest.approx(
            line["reward/form"] + line["reward/overlong-punishment"], abs=1e-5
        )
    punish = overlong_punishment(12, 6)
    assert punish(completion_ids=[[1] * n for n in (1, 6, 9, 12)]) == [0, 0, -0.5, -1]


def test_the_end_token_is_trained(cfg, monkeypatch):
    rows, score = [], Transformer.score

    def recorded(model, packed, at, **k):
        rows.append(packed.tokens[at].tolist())
        return score(model, packed, at, **k)

    monkeypatch.setattr(Transformer, "score", recorded)
    grpo.train(dataclasses.replace(cfg, steps=1, kl_coefficient=0.1))
    (line,) = metrics_of(cfg.output)
    assert rows[1].count(0) == round(line["ended"] * 32) > 0 and len(rows[1]) == line["tokens"]


def test_cispo_has_no_lower_bound(cfg):
    with pytest.raises(InputError, match="--clip-low: --loss cispo has no lower bound"):
        grpo.train(dataclasses.replace(cfg, loss="cispo", clip_low=0.1))


def test_time_is_told_apart(cfg, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "def slow(completions, **_):\n    time.sleep(0.2)\n    return [float(i) for i in range(len(completions))]\n"
    )
    grpo.train(dataclasses.replace(cfg, reward=(f"{tmp_path}/slow.py:slow",), steps=2))
    for line in metrics_of(cfg.output):
        parts = [line[f"{name}_seconds"] for name in ("sampling", "scoring", "update")]
        assert min(parts) > 0 and 0.2 < parts[1] < 0.4
        assert sum(parts) <= line["seconds"] + 0.01
