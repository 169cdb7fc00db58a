"""`burnish ppo` as a user runs it: what a rollout is worth, and what must not depend on how a step is cut up."""

import dataclasses
import json

import pytest
import torch
from burnish.algorithms import ppo
from burnish.algorithms.data.examples import Prompt
from burnish.algorithms.data.groups import Group, Sampler
from burnish.algorithms.run.batch import Batch, make_split_batches, over_tokens
from burnish.model.checkpoint import load_model, load_scalar_model, save_model
from burnish.model.errors import InputError
from burnish.model.generate import Sample
from burnish.model.packed import pack
from burnish.model.text.tokenizer import Tokenizer

REWARD = "burnish.algorithms.recipes.sums:form"


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def cfg(form_model, prompts, tmp_path):
    return ppo.Config(
        model=form_model,
        data=prompts,
        reward=(REWARD,),
        output=tmp_path / "out",
        steps=2,
        prompts_per_step=16,
        max_new_tokens=12,
        learning_rate=3e-3,
        critic_learning_rate=1e-2,
        epochs_per_rollout=2,
        minibatches=2,
        device="cpu",  # fp32 throughout
    )


@pytest.fixture
def reward_model(cfg, tmp_path):
    """A head that is drawn at random, on the model that the policy starts from, shifted as `reward` shifts it."""
    model = load_scalar_model(cfg.model, seed=3)
    model.bias = 0.25
    save_model(model, tmp_path / "reward-model", Tokenizer.load(cfg.model))
    return tmp_path / "reward-model"


def seen_groups(monkeypatch):
    """Filled with the rollouts of a run."""
    seen, sample = [], Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda *a: seen.append(sample(*a)) or seen[-1])
    return seen


@pytest.mark.slow
def test_reward_rises_and_a_first_step_is_on_policy(cfg):
    ppo.train(dataclasses.replace(cfg, steps=25, prompts_per_step=32, kl_coefficient=0.01))
    metrics = metrics_of(cfg.output)
    first, last = (sum(line["score"] for line in part) / 5 for part in (metrics[:5], metrics[-5:]))
    assert first < 0.8 and last > first + 0.15
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-5) and metrics[-1]["kl"] > 0.05
    for line in metrics:
        assert line["first_ratio"] == pytest.approx(1, abs=1e-5)
        assert line["mismatch"] < 1e-4
        assert line["reward"] == pytest.approx(line["score"] - 0.01 * line["kl"], abs=1e-5)
        assert line["sampling_seconds"] > 0 and line["scoring_seconds"] > 0 and line["update_seconds"] > 0
    assert metrics[0]["approx_kl"] > 0 and metrics[0]["grad_norm"] > 0
    assert metrics[-1]["explained_variance"] > metrics[0]["explained_variance"]
    assert (cfg.output / "critic" / "config.json").is_file()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"advantage": "rloo", "group_size": 2},
        {"advantage": "reinforce_pp"},
        {"top_k": 5, "whiten_rewards": True},
    ],
    ids=str,
)
def test_gradients_do_not_depend_on_micro_batches(cfg, tmp_path, change):
    cfg = dataclasses.replace(cfg, steps=1, **change)
    found = []
    for tokens in (10**6, 30):
        output = tmp_path / f"out-{tokens}"
        ppo.train(dataclasses.replace(cfg, output=output, micro_batch_tokens=tokens))
        (line,) = metrics_of(output)
        found.append(line)
    for name, value in found[0].items():
        if "seconds" not in name and "second" not in name:
            assert found[1][name] == pytest.approx(value, abs=1e-4, rel=1e-3), name


def test_the_score_is_read_at_the_last_token(cfg, reward_model, monkeypatch):
    seen = seen_groups(monkeypatch)
    ppo.train(dataclasses.replace(cfg, reward=(), reward_model=reward_model, steps=1))
    model = load_scalar_model(reward_model)
    scores = []
    for group in seen[0]:
        packed = pack([group.prompt + group.samples[0].tokens])  # a row of its own, without parents
        scores += model.values(packed, torch.tensor([packed.tokens.numel() - 1])).tolist()
    (line,) = metrics_of(cfg.output)
    assert line["score"] == pytest.approx(sum(scores) / len(scores), abs=1e-5)
    assert max(scores) - min(scores) > 0.05


def test_the_critic_starts_from_the_reward_model(cfg, reward_model):
    ppo.train(
        dataclasses.replace(cfg, reward=(), reward_model=reward_model, steps=1, critic_learning_rate=0.0)
    )
    one, other = load_scalar_model(reward_model), load_scalar_model(cfg.output / "critic")
    assert one.bias == other.bias == 0.25
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_value_is_that_of_the_state_before_its_token(reward_model):
    """A token itself, and those behind it, change nothing in its value."""
    critic = load_scalar_model(reward_model)
    values = []
    for tokens in ([5, 6, 7], [5, 6, 8], [5, 9, 7]):
        group = Group(
            Prompt([3, 4], "p", {}), [Sample(0, tokens, torch.zeros(3), None, True)], torch.zeros(1)
        )
        real = torch.ones(1, 3, dtype=torch.bool)
        batches = make_split_batches([group], torch.tensor([True]), 100, "cpu")
        found = over_tokens(critic, batches, Batch.values, real)
        values.append(found[0].tolist())
    assert values[0] == pytest.approx(values[1]) and values[0][:2] == pytest.approx(values[2][:2])
    assert abs(values[0][2] - values[2][2]) > 1e-3


def test_a_missing_end_costs_whatever_stop_token_it_is_that_ends(cfg, monkeypatch):
    """Two stop tokens: a sample that either of them ends is not punished."""
    file = cfg.model / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [0, 4]}))  # <eos> and </answer>
    seen = seen_groups(monkeypatch)
    cfg = dataclasses.replace(cfg, steps=1, max_new_tokens=7, missing_end_penalty=2.0, kl_coefficient=0.0)
    ppo.train(cfg)
    (line,) = metrics_of(cfg.output)
    lasts = [group.samples[0].tokens[-1] for group in seen[0]]
    assert 4 in lasts and not all(last in (0, 4) for last in lasts)
    missing = sum(last not in (0, 4) for last in lasts) / len(lasts)
    assert line["ended"] == pytest.approx(1 - missing)
    assert line["reward"] == pytest.approx(line["score"] - 2 * missing, abs=1e-5)


def test_the_kl_coefficient_is_adapted(cfg):
    ppo.train(dataclasses.replace(cfg, kl_target=1e-6, kl_horizon=16, steps=3))
    found = [line["kl_coefficient"] for line in metrics_of(cfg.output)]
    assert found[0] == 0.05
    kl = [line["kl"] for line in metrics_of(cfg.output)]
    assert found[1] == pytest.approx(0.05 * (1 + min(0.2, max(-0.2, kl[0] / 1e-6 - 1))))
    assert found[2] == pytest.approx(found[1] * 1.2) and kl[1] > 1e-3


def test_each_epoch_has_a_fresh_order_of_all_samples(cfg, monkeypatch):
    chosen, whole = [], ppo.make_split_batches
    monkeypatch.setattr(
        ppo,
        "make_split_batches",
        lambda groups, needed, *a: chosen.append(needed.tolist()) or whole(groups, needed, *a),
    )
    ppo.train(dataclasses.replace(cfg, epochs_per_rollout=3))
    for rollout in (chosen[:7], chosen[7:]):  # one scoring, then three epochs of two minibatches
        assert all(rollout[0])
        epochs = [rollout[1:3], rollout[3:5], rollout[5:7]]
        assert all([a != b for a, b in zip(*epoch, strict=True)] == [True] * 16 for epoch in epochs)
        assert len({tuple(epoch[0]) for epoch in epochs}) == 3
    assert chosen[1] != chosen[8]


def test_a_sample_without_a_judgement_is_left_out(cfg, tmp_path, monkeypatch):
    (tmp_path / "some.py").write_text(
        "def some(completions, **_):\n    return [None if i % 2 else float(i) for i in range(len(completions))]\n"
        "def none(completions, **_):\n    return [None] * len(completions)\n"
    )
    chosen, whole = [], ppo.make_split_batches
    monkeypatch.setattr(
        ppo,
        "make_split_batches",
        lambda groups, needed, *a: chosen.append(needed) or whole(groups, needed, *a),
    )
    ppo.train(dataclasses.replace(cfg, reward=(f"{tmp_path}/some.py:some",), steps=1))
    assert not any(needed[1::2].any() for needed in chosen) and chosen[0][::2].all()
    assert metrics_of(cfg.output)[0]["score"] == pytest.approx(7)
    with pytest.raises(InputError, match="no sample of this rollout was judged"):
        ppo.train(dataclasses.replace(cfg, reward=(f"{tmp_path}/some.py:none",), output=tmp_path / "none"))


def test_scores_that_never_differ_are_said(cfg, tmp_path, capsys):
    (tmp_path / "flat.py").write_text(
        "def flat(completions, log_metric, log_extra, trainer_state):\n"
        "    log_metric('step', trainer_state.global_step)\n"
        "    log_extra('half', ['\\ud800'] * len(completions))\n"
        "    return [0.5] * len(completions)\n"
    )

    run = dataclasses.replace(cfg, reward=(f"{tmp_path}/flat.py:flat",), reward_timeout=60.0)
    ppo.train(run)
    assert "every sample of the run scored 0.5: the rewards taught nothing\n" in capsys.readouterr().out
    assert [line["metric/step"] for line in metrics_of(run.output)] == [0, 1]
    records = [json.loads(line) for line in (run.output / "samples.jsonl").read_text().splitlines()]
    assert len(records) == 32 and records[-1]["extra"] == {"half": "\ud800"} and records[-1]["step"] == 1

    ppo.train(dataclasses.replace(cfg, output=tmp_path / "varied"))
    assert "taught nothing" not in capsys.readouterr().out

    (tmp_path / "flat.py").write_text("def flat(prompts):\n    return [len(set(p)) for p in prompts]\n")
    by_prompt = {"advantage": "rloo", "group_size": 2, "output": tmp_path / "by-prompt", "steps": 1}
    ppo.train(dataclasses.replace(run, **by_prompt))
    assert capsys.readouterr().out.endswith("no group's rewards ever differed: the rewards taught nothing\n")
    records = [json.loads(line) for line in (tmp_path / "varied" / "samples.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0] * 8 + [1] * 8  # --samples, and none by log_extra
    assert not any("extra" in record for record in records)


@pytest.mark.parametrize("advantage", ["rloo", "reinforce_pp"])
def test_without_a_critic_there_is_none(cfg, advantage):
    ppo.train(dataclasses.replace(cfg, advantage=advantage, group_size=2))
    assert not (cfg.output / "critic").exists()
    assert not {"value_loss", "explained_variance"} & set(metrics_of(cfg.output)[0])


def test_an_adapter_is_trained_beside_a_critic_with_one(cfg):
    trained = ppo.train(dataclasses.replace(cfg, lora_rank=4))
    for folder in (trained, cfg.output / "critic"):
        assert (folder / "adapter_config.json").is_file()
    base, adapted = load_model(cfg.model), load_model(trained)
    assert torch.equal(base.embed_tokens.weight, adapted.embed_tokens.weight)
    assert (
        metrics_of(cfg.output)[0]["kl"] == pytest.approx(0, abs=1e-5) and metrics_of(cfg.output)[1]["kl"] != 0
    )


def test_wrong_flags_are_one_line(cfg, reward_model, model_folder, tmp_path):
    def refused(**changes):
        with pytest.raises(InputError) as error:
            ppo.train(dataclasses.replace(cfg, **changes))
        return str(error.value)

    assert "expected --reward-model DIR or --reward" in refused(reward=())
    assert "--critic: --advantage rloo has none" in refused(critic=cfg.model, advantage="rloo", group_size=2)
    assert "--group-size: expected a number between 2 and 65536" in refused(advantage="rloo")
    assert "got one without a score head" in refused(reward_model=cfg.model)
    assert "--dual-clip" in refused(dual_clip=1.1)
    assert "--reward-weights: expected 1, one per reward function, got 2" in refused(
        reward_weights=(1.0, 2.0)
    )
    tokenizer = json.loads((reward_model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["8"], vocabulary["9"] = vocabulary["9"], vocabulary["8"]
    (reward_model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "expected the tokenizer of --model, got another" in refused(reward_model=reward_model)
    assert not cfg.output.exists()
