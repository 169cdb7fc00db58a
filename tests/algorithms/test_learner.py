"""A Learner beside the same steps written out, and a Run that resumes between its constructor and `with`."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from burnish.algorithms.recipes.sums import make_tokenizer
from burnish.algorithms.run.checks import CHECKPOINT
from burnish.algorithms.run.learner import Learner
from burnish.algorithms.run.loop import Run
from burnish.algorithms.run.order import epochs
from burnish.algorithms.sft import Config
from burnish.model.checkpoint import load_model
from burnish.model.errors import InputError
from burnish.model.packed import pack
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer
from faults import check_of, control, faults_of
from planted import copy_of

ROWS = 7  # of data that are never read


@pytest.fixture
def cfg(model_folder, tmp_path) -> Config:
    (tmp_path / "none.jsonl").touch()
    return Config(
        model=model_folder,
        data=tmp_path / "none.jsonl",
        output=tmp_path / "run",
        steps=6,
        learning_rate=1e-2,
        warmup_steps=2,
        schedule="linear",
        weight_decay=0.1,
        max_grad_norm=0.5,
        save_every=3,
        batch_size=2,
        device="cpu",
    )


def loss_of(model: Transformer, row: int) -> torch.Tensor:
    packed = pack([[row, row + 1, row + 2, 3]])
    return -model.score(packed, torch.tensor([1, 2, 3]))[0].sum()


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


# ---- Learner


@control
def steps_are_those_written_out(cfg: Config, learner_class: Any = Learner) -> None:
    """Two micro-batches a step, three steps: gradients, norm, rate, weights and sums."""
    model, plain = load_model(cfg.model), load_model(cfg.model)
    learner = learner_class(cfg, model)
    learner.start()
    parameters = list(plain.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for step in range(3):
        for row, share in ((step, 0.25), (step + 4, 0.75)):
            learner.backward(share * loss_of(model, row), share, {"rows": 1, "share": torch.tensor(share)})
        found = learner.step(step)

        total = 0.25 * loss_of(plain, step) + 0.75 * loss_of(plain, step + 4)
        total.backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt().item()
        for gradient in gradients:
            gradient *= min(1.0, 0.5 / (norm + 1e-6))
        for group in adam.param_groups:
            group["lr"] = 1e-2 * ((step + 1) / 2 if step < 2 else 1 - (step - 2) / 4)
        adam.step()
        adam.zero_grad()

        assert found["loss"] == pytest.approx(total.item(), abs=1e-6)
        assert (found["rows"], found["share"]) == (2, 1)
        assert found["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert found["learning_rate"] == pytest.approx(adam.param_groups[0]["lr"])
        assert all(parameter.grad is None for parameter in model.parameters())
        for one, other in zip(weights(model), weights(plain), strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_steps_are_those_written_out(cfg):
    steps_are_those_written_out(cfg)


def test_what_a_learner_peaks_at_may_be_its_own(cfg):
    critic = Learner(cfg, load_model(cfg.model), learning_rate=0.5, eps=1e-5)
    critic.start()
    assert critic.optimizer.defaults["eps"] == 1e-5
    critic.backward(loss_of(critic.model, 1), 1.0)
    assert critic.step(2)["learning_rate"] == 0.5


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_step_that_diverges_moves_nothing(cfg, factor):
    one = Learner(cfg, load_model(cfg.model))
    one.start()
    before = weights(one.model)
    one.backward(loss_of(one.model, 1) * factor, 1.0)
    with pytest.raises(InputError, match="training has diverged and stopped before this update"):
        one.step(0)
    assert same(weights(one.model), before)


@pytest.mark.parametrize("fault", faults_of(__file__), ids=lambda fault: fault.id)
def test_a_planted_fault_is_caught(fault, cfg, tmp_path, monkeypatch):
    module = copy_of("algorithms/run/learner", tmp_path, monkeypatch, fault)
    with pytest.raises(AssertionError):
        check_of(fault)(cfg, module.Learner)


# ---- Run


def train(cfg: Config) -> tuple[Path, list[list[int]], list[list[torch.Tensor]]]:
    """Train as a method does. Returns the result, the rows of each step, and the weights after it."""
    model = load_model(cfg.model)
    policy, tokenizer = Learner(cfg, model), Tokenizer(make_tokenizer(), eos="<eos>")
    rows, states = [], []
    with Run(cfg, tokenizer, rows=ROWS, model=policy) as run:
        for step in run.steps():
            rows.append(run.next())
            for row in rows[-1]:
                policy.backward(loss_of(model, row) / 2, 0.5)
            run.values["highest"] = float(step)
            run.log(policy.step(step), tokens=8)
            states.append(weights(model))
        return run.save(), rows, states


def logged(cfg: Config) -> list[dict]:
    return [json.loads(line) for line in (cfg.output / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_stops_and_resumes_is_one_that_does_not(cfg, tmp_path):
    _, rows, states = train(cfg)
    order = epochs(ROWS, 2, cfg.seed)
    assert rows == [next(order) for _ in range(6)]

    # as one that is killed in its fourth step
    first = dataclasses.replace(cfg, output=tmp_path / "first")
    policy = Learner(first, load_model(cfg.model))
    with Run(first, Tokenizer(make_tokenizer()), rows=ROWS, model=policy) as run:
        for step in run.steps():
            if step == 3:
                break
            for row in run.next():
                policy.backward(loss_of(policy.model, row) / 2, 0.5)
            run.values["highest"] = float(step)
            run.log(policy.step(step), tokens=8)
    assert same(weights(policy.model), states[2])

    _, later_rows, later_states = train(dataclasses.replace(first, resume=True))
    assert later_rows == rows[3:] and all(map(same, later_states, states[3:]))
    assert [line["step"] for line in logged(first)] == list(range(6))
    assert [line["loss"] for line in logged(first)] == [line["loss"] for line in logged(cfg)]


def test_until_with_a_resumed_model_is_the_untrained_one(cfg):
    """There a method may ask what the model says that training started from."""
    train(dataclasses.replace(cfg, steps=3))
    resumed = dataclasses.replace(cfg, steps=4, resume=True)
    model = load_model(cfg.model)
    untrained = weights(model)
    policy = Learner(resumed, model)
    run = Run(resumed, Tokenizer(make_tokenizer()), rows=ROWS, model=policy)
    assert same(weights(model), untrained) and run.start == 0 and run.values == {}
    assert not policy.optimizer.state

    with run:
        assert run.start == 3 and run.values == {"highest": 2.0}
        assert not same(weights(model), untrained) and policy.optimizer.state
        assert list(run.steps()) == [3]


def test_a_folder_is_made_inside_of_with_and_a_model_saved_under_its_name(cfg):
    tokenizer = Tokenizer(make_tokenizer(), eos="<eos>")
    model, critic = (Learner(cfg, load_model(cfg.model)) for _ in range(2))
    run = Run(cfg, tokenizer, rows=ROWS, frozen=(None,), model=model, critic=critic, reward_model=None)
    assert not cfg.output.exists()
    with run:
        assert sorted(path.name for path in cfg.output.iterdir()) == ["config.json", "metrics.jsonl"]
        assert run.save() == cfg.output / "model"
    assert same(weights(load_model(cfg.output / "critic")), weights(critic.model))
    assert not (cfg.output / CHECKPOINT).exists()


def test_a_step_has_its_own_seconds_and_null_for_what_is_no_number(cfg):
    cfg = dataclasses.replace(cfg, steps=2, save_every=0)
    with Run(cfg, Tokenizer(make_tokenizer()), rows=ROWS, model=Learner(cfg, load_model(cfg.model))) as run:
        for step in run.steps():
            assert run.seconds == {}
            for _ in range(step + 1):
                with run.timed("sampling_seconds"):
                    pass
            run.log({"mean": math.nan, "one": torch.tensor(1.0), **run.seconds}, tokens=5)
            run.log_samples([{"text": "\ud800"}] * step)
    assert [(line["mean"], line["one"], line["tokens"]) for line in logged(cfg)] == [(None, 1.0, 5)] * 2
    assert all(line["sampling_seconds"] >= 0 for line in logged(cfg))
    (completion,) = (cfg.output / "samples.jsonl").read_text().splitlines()
    assert json.loads(completion)["step"] == 1
