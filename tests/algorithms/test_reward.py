"""`burnish reward`: its loss as a formula, where the score is read, what a step may not depend on, what it recovers."""

import dataclasses
import json
import math

import pytest
import torch
from burnish.algorithms import reward
from burnish.algorithms.data.pairs import Preference, preferences
from burnish.algorithms.data.rows import read_rows
from burnish.algorithms.objectives.preference import pair_metrics
from burnish.algorithms.reward import bradley_terry_loss, centering_loss
from burnish.algorithms.run.batch import make_batches, over_completions
from burnish.algorithms.run.optimizer import make_optimizer
from burnish.model import pack
from burnish.model.checkpoint import load_scalar_model
from burnish.model.text.tokenizer import Tokenizer


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def completion_scores(model, pairs, capacity):
    return over_completions(model, pairs, lambda batch: batch.scores(model), capacity)


@pytest.fixture
def cfg(model_folder, pairs, tmp_path):
    return reward.Config(
        model=model_folder,
        data=pairs,
        eval_data=pairs,
        output=tmp_path / "out",
        steps=3,
        batch_size=12,
        learning_rate=1e-2,
        warmup_steps=0,
        device="cpu",  # fp32 throughout
    )


# ---- the loss


def test_values_by_hand():
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0])
    margin = torch.tensor([0.5, 0.0])
    expected = (math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(3))) / 2
    assert bradley_terry_loss(chosen, rejected, margin, 2).item() == pytest.approx(expected)
    assert bradley_terry_loss(chosen, chosen, 0.0, 2).item() == pytest.approx(math.log(2))
    assert centering_loss(chosen, rejected, 2).item() == pytest.approx((9 + 9) / 2)


def test_gradients_by_finite_differences():
    chosen, rejected, margin = torch.randn(3, 5, dtype=torch.float64)
    inputs = (chosen.requires_grad_(), rejected.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: bradley_terry_loss(a, b, margin, 5), inputs)
    assert torch.autograd.gradcheck(lambda a, b: centering_loss(a, b, 5), inputs)


@pytest.mark.parametrize(
    "loss",
    [lambda a, b, n: bradley_terry_loss(a, b, 0.3, n), centering_loss],
    ids=["bradley_terry", "centering"],
)
def test_micro_batches_add_up_and_an_empty_one_is_zero(loss):
    chosen, rejected = torch.randn(2, 7, dtype=torch.float64)
    parts = loss(chosen[:2], rejected[:2], 7) + loss(chosen[2:], rejected[2:], 7)
    assert parts.item() == pytest.approx(loss(chosen, rejected, 7).item(), abs=1e-12)
    empty = torch.zeros(0, requires_grad=True)
    value = loss(empty, empty, 1)
    value.backward()
    assert value.item() == 0 and empty.grad is not None


def test_known_scores_are_recovered():
    """The scores of 5, up to a shift, follow from the probabilities with which each beats each other."""
    truth = torch.tensor([-1.5, -0.5, 0.0, 0.7, 1.6], dtype=torch.float64)
    first, second = torch.combinations(torch.arange(5)).unbind(1)
    wins = torch.sigmoid(truth[first] - truth[second])
    scores = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=200, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        f, s = scores[first], scores[second]
        losses = torch.stack(  # a pair of either order, weighed by how often it occurs
            [
                p * bradley_terry_loss(a[None], b[None], 0.0, 1)
                + (1 - p) * bradley_terry_loss(b[None], a[None], 0.0, 1)
                for p, a, b in zip(wins, f, s, strict=True)
            ]
        )
        losses.sum().backward()
        return losses.sum()

    optimizer.step(closure)
    found = scores.detach() - scores.detach().mean()
    torch.testing.assert_close(found, truth - truth.mean(), atol=1e-5, rtol=0)


# ---- the score


def test_the_score_stands_on_the_end_token(cfg):
    tokenizer = Tokenizer.load(cfg.model)
    pairs, _ = preferences(read_rows(cfg.data), tokenizer, max_length=64)
    (batch,) = make_batches(pairs, 10**6, "cpu")
    assert (batch.packed.tokens[batch.last] == tokenizer.eos_id).all()
    scores = completion_scores(load_scalar_model(cfg.model), pairs, 10**6)
    model = load_scalar_model(cfg.model)
    for pair, pair_scores in zip(pairs[:6], scores, strict=False):
        # alone, its prompt not shared
        for completion, expected in zip(pair.completions, pair_scores, strict=True):
            alone = pack([pair.prompt + completion.tokens])
            value = model.values(alone, torch.tensor([alone.tokens.numel() - 1]))
            torch.testing.assert_close(value[0], expected, atol=1e-6, rtol=0)


def test_a_shared_prompt_changes_no_gradient(cfg):
    tokenizer = Tokenizer.load(cfg.model)
    pairs, _ = preferences(read_rows(cfg.data), tokenizer, max_length=64)

    def gradients(packed, last):
        model = load_scalar_model(cfg.model)
        chosen, rejected = model.values(packed, last).view(-1, 2).unbind(1)
        bradley_terry_loss(chosen, rejected, 0.0, len(pairs)).backward()
        return [parameter.grad for parameter in model.parameters()]

    (batch,) = make_batches(pairs, 10**6, "cpu")
    alone = pack([pair.prompt + c.tokens for pair in batch_order(pairs, batch) for c in pair.completions])
    shared, unshared = gradients(batch.packed, batch.last), gradients(alone, alone.cu_seqlens[1:].long() - 1)
    for one, other in zip(shared, unshared, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def batch_order(pairs: list[Preference], batch) -> list[Preference]:
    return [pairs[i] for i in batch.members]


def test_metrics_are_means_over_the_step():
    chosen, rejected = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 5.0])
    parts = [pair_metrics(chosen[:1], rejected[:1], 3), pair_metrics(chosen[1:], rejected[1:], 3)]
    found = {name: sum(part[name] for part in parts) for name in parts[0]}
    assert found == pytest.approx({"accuracy": 1 / 3, "margin": -1 / 3, "chosen": 2, "rejected": 7 / 3})


# ---- the run


def test_it_learns_and_the_chosen_average_zero(cfg, capsys):
    trained = reward.train(dataclasses.replace(cfg, steps=30))
    metrics = metrics_of(cfg.output)
    assert metrics[0]["loss"] > 0.6 and metrics[-1]["loss"] < 0.4 and metrics[-1]["accuracy"] > 0.8
    assert metrics[0]["margin"] == pytest.approx(metrics[0]["chosen"] - metrics[0]["rejected"], abs=1e-6)

    held_out = json.loads((cfg.output / "held_out.json").read_text())
    assert (
        held_out["after"]["accuracy"] > 0.8
        and held_out["after"]["margin"] > 10 * held_out["before"]["margin"]
    )
    p = held_out["after"]["accuracy"]
    assert held_out["after"]["accuracy_error"] == pytest.approx(math.sqrt(p * (1 - p) / 63))
    assert held_out["before"]["pairs"] == held_out["after"]["pairs"] == 64
    line = f"accuracy {100 * held_out['before']['accuracy']:.1f} -> {100 * p:.1f} +- "
    assert line in capsys.readouterr().out
    model, tokenizer = load_scalar_model(trained), Tokenizer.load(trained)
    pairs, _ = preferences(read_rows(cfg.data), tokenizer, max_length=64)
    assert completion_scores(model, pairs, 10**6)[:, 0].mean().item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("micro_batch_tokens", [1, 90])
def test_gradients_do_not_depend_on_micro_batches(cfg, tmp_path, micro_batch_tokens):
    cfg = dataclasses.replace(cfg, centering=0.01)
    whole = reward.train(cfg)
    cut = dataclasses.replace(cfg, output=tmp_path / "cut", micro_batch_tokens=micro_batch_tokens)
    for one, other in zip(
        load_scalar_model(whole).parameters(), load_scalar_model(reward.train(cut)).parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)
    for one, other in zip(metrics_of(cfg.output), metrics_of(tmp_path / "cut"), strict=True):
        for name in ("loss", "accuracy", "margin", "chosen"):
            assert one[name] == pytest.approx(other[name], abs=2e-6), name
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_centering_and_margins_are_heard(cfg, pairs, tmp_path):
    cfg = dataclasses.replace(cfg, steps=1, batch_size=64, eval_data=None)
    reward.train(cfg)
    (plain,) = metrics_of(cfg.output)
    reward.train(dataclasses.replace(cfg, centering=2.0, output=tmp_path / "centered"))
    (centered,) = metrics_of(tmp_path / "centered")

    tokenizer = Tokenizer.load(cfg.model)
    items, _ = preferences(read_rows(pairs), tokenizer, max_length=64)
    scores = completion_scores(load_scalar_model(cfg.model), items, 10**6)
    assert centered["loss"] - plain["loss"] == pytest.approx(
        2 * scores.sum(1).square().mean().item(), abs=1e-5
    )

    rows = [json.loads(line) | {"margin": 3.0} for line in pairs.read_text().splitlines()]
    (tmp_path / "margins.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward.train(dataclasses.replace(cfg, data=tmp_path / "margins.jsonl", output=tmp_path / "margins"))
    (first,) = metrics_of(tmp_path / "margins")
    assert first["margin"] == plain["margin"] and first["loss"] > plain["loss"] + 1.5


def test_it_goes_on_from_a_reward_model(cfg, tmp_path):
    first = reward.train(cfg)
    reward.train(dataclasses.replace(cfg, model=first, output=tmp_path / "more"))
    before = json.loads((tmp_path / "more" / "held_out.json").read_text())["before"]
    assert before == json.loads((cfg.output / "held_out.json").read_text())["after"]


def test_labels_without_a_preference_teach_none(cfg, pairs, tmp_path):
    """Control: where every second pair is turned round, the margin on the pairs as they were stays near 0."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for row in rows[::2]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    margins = []
    for name, data in (("true", pairs), ("both", tmp_path / "both.jsonl")):
        reward.train(dataclasses.replace(cfg, data=data, steps=20, output=tmp_path / name))
        margins.append(json.loads((tmp_path / name / "held_out.json").read_text())["after"]["margin"])
    assert margins[0] > 1 and abs(margins[1]) < 0.3 * margins[0]


def test_the_optimizer_trains_head_and_body(cfg):
    model = load_scalar_model(cfg.model)
    trained = {id(p) for group in make_optimizer(model, 1e-3).param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters()} and id(model.score.weight) in trained
