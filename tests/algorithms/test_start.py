"""The text at the start of a run, and the steps that a number of epochs takes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from burnish.algorithms import distill, dpo, grpo, ppo, reward, sft
from burnish.algorithms.run.batch import Completion, Family
from burnish.algorithms.run.flags import TrainingFlags
from burnish.algorithms.run.held_out import Evaluation
from burnish.algorithms.run.order import epochs, with_steps
from burnish.algorithms.run.start import report_start, short, trained_tokens
from burnish.algorithms.run.trainee import load_scalar_trainee, load_trainee
from burnish.model.errors import InputError
from faults import check_of, control, faults_of
from planted import copy_of


@pytest.fixture
def cfg(model_folder: Path, demonstrations: Path, tmp_path: Path) -> sft.Config:
    return sft.Config(model=model_folder, data=demonstrations, output=tmp_path / "run", device="cpu")


def lines(
    cfg: TrainingFlags, capsys: Any, rows: int = 10_000, tokens: float = 128.0, **models: Any
) -> list[str]:
    evaluation = Evaluation("pairs", 1200, dict) if cfg.eval_data else None
    capsys.readouterr()
    report_start(cfg, rows, tokens, models or {"model": load_trainee(cfg)}, evaluation)
    return capsys.readouterr().out.splitlines()


# ---- the text


def test_a_run_tells_what_will_happen(cfg, capsys):
    flags = {"eval_data": cfg.data, "eval_every": 50, "keep_best": "loss", "save_every": 100}
    assert lines(dataclasses.replace(cfg, **flags), capsys) == [
        "1,000 steps of 32 rows: 3.19 epochs of 10,000 rows, about 4,096 trained tokens a step",
        "learning rate: reaches 2e-05 after 20 of 1,000 steps, then falls to 0 by the end (cosine)",
        "model: all 4.7 k weights are trained",
        "memory: 75.3 kB for weights, gradients and optimizer, beside activations "
        "(burnish memory counts all of a run)",  # 16 bytes of each of 4,704 weights
        "evaluates on 1,200 held-out pairs before training, every 50 steps and at the end; keeps the "
        "best model by loss",
        f"writes {cfg.output}: the model at the end, and a checkpoint every 100 steps",
    ]


def test_every_step_is_not_called_every_1_step(cfg, capsys):
    printed = lines(dataclasses.replace(cfg, eval_data=cfg.data, eval_every=1, save_every=1), capsys)
    assert printed[-2].endswith("before training, every step and at the end")
    assert printed[-1].endswith("and a checkpoint every step")


WARMED = {
    (0, 9, "constant"): "learning rate: starts at 0.001, then stays there",
    (1, 9, "linear"): "learning rate: reaches 0.001 after 1 of 9 steps, then falls to 0 by the end (linear)",
    (
        9,
        9,
        "linear",
    ): "learning rate: reaches 0.001 in the last of 9 steps, because all are warm-up (--warmup-steps)",
    (20, 5, "cosine"): (
        "learning rate: only up to 0.00025 of 0.001, because the warm-up takes 20 steps and the run has 5 "
        "(--warmup-steps)"
    ),
}


@pytest.mark.parametrize("warmup_steps, steps, schedule", WARMED)
def test_a_warm_up_that_does_not_end_is_told(cfg, capsys, warmup_steps, steps, schedule):
    flags = {"warmup_steps": warmup_steps, "steps": steps, "schedule": schedule, "learning_rate": 1e-3}
    assert lines(dataclasses.replace(cfg, **flags), capsys)[1] == WARMED[warmup_steps, steps, schedule]


def test_an_adapter_is_told_with_its_frozen_weights_and_a_hint(cfg, capsys):
    adapted = dataclasses.replace(cfg, lora_rank=2)
    found = lines(adapted, capsys)
    hint = "hint: 2e-05 is the default for whole weights; LoRA usually takes a rate about ten times as large"
    assert found[2] == f"{hint} (--learning-rate 0.0002)"
    assert found[3] == "model: a LoRA adapter of 992 weights is trained, beside 4.7 k frozen"
    assert not any("hint" in line for line in lines(dataclasses.replace(adapted, learning_rate=2e-4), capsys))

    four = lines(dataclasses.replace(adapted, base_4bit=True), capsys)
    assert four[3].endswith("beside 4.7 k frozen in 4 bits")
    scalar = load_scalar_trainee(adapted, cfg.model)
    assert "LoRA adapter of 1.0 k" in lines(adapted, capsys, model=scalar)[3]


def test_sampled_tokens_are_told_by_their_most(cfg, capsys):
    common = {"model": cfg.model, "data": cfg.data, "device": "cpu"}
    rl = grpo.Config(**common, reward=("f.py:f",), max_new_tokens=100)
    assert lines(rl, capsys, rows=1600, tokens=0)[0] == (
        "200 steps of 16 rows: 2 epochs of 1,600 rows, at most 12,800 sampled tokens a step"
    )
    student = distill.Config(**common, student_samples=1.0, max_new_tokens=100, steps=50)
    assert lines(student, capsys, rows=10, tokens=0)[0] == (
        "50 steps of 10 rows: 50 epochs of 10 rows, at most 1,000 sampled tokens a step"
    )
    judge = reward.Config(**common, steps=1)
    assert lines(judge, capsys, rows=64, tokens=0)[0] == "1 step of 64 rows: 1 epoch of 64 rows"


def test_trained_tokens_are_a_mean_of_rows():
    items = [Family([1], [Completion([1, 2], [True, i % 2 == 0]), Completion([3], [True])]) for i in range(4)]
    assert trained_tokens(items) == 2.5
    assert trained_tokens(items[:1] * 30_001) == 3
    assert [short(n) for n in (999, 4_700, 134_515_008, 8_030_261_248)] == [
        "999",
        "4.7 k",
        "134.5 M",
        "8.0 B",
    ]


def test_every_trainer_prints_it_once(cfg, pairs, capsys):
    run = dpo.Config(model=cfg.model, data=pairs, output=cfg.output, steps=1, batch_size=8, device="cpu")
    dpo.train(run)
    assert capsys.readouterr().out.count("\n1 step of 8 rows: 0.125 epochs of 64 rows, about 14") == 1


# ---- epochs


@control
def whole_epochs_are_as_many_steps(module: Any) -> None:
    """The batches that the order of rows has in these epochs. The last one of each may be smaller."""
    for rows in (1, 7, 8, 9, 30):
        for passes in (1, 2, 3):
            cfg = sft.Config(model=Path("m"), data=Path("d"), batch_size=4, epochs=float(passes))
            seen, order = [], epochs(rows, 4, seed=0)
            for _ in range(module.with_steps(cfg, rows).steps):
                seen += next(order)
            assert sorted(seen) == sorted([*range(rows)] * passes), (rows, passes)


def test_whole_epochs_are_as_many_steps():
    from burnish.algorithms.run import order

    whole_epochs_are_as_many_steps(order)


@pytest.mark.parametrize("fault", faults_of(__file__), ids=lambda fault: fault.id)
def test_a_planted_fault_is_caught(fault, tmp_path, monkeypatch):
    module = copy_of("algorithms/run/order", tmp_path, monkeypatch, fault)
    with pytest.raises(AssertionError):
        check_of(fault)(module)


def test_parts_of_an_epoch(cfg):
    steps_of = lambda share: with_steps(dataclasses.replace(cfg, epochs=share, batch_size=1), 30).steps
    assert [steps_of(share) for share in (1e-6, 0.1, 0.11, 0.5, 1.5)] == [1, 3, 4, 15, 45]
    assert with_steps(cfg, 30) is cfg


def test_epochs_and_steps_together_are_refused(cfg):
    with pytest.raises(InputError, match="--epochs: expected it in place of --steps, got --steps 7 as well"):
        sft.train(dataclasses.replace(cfg, epochs=2.0, steps=7))
    with pytest.raises(
        InputError, match="--epochs: expected it in place of --steps, got --steps 1000 as well"
    ):
        common = {"model": cfg.model, "data": cfg.data, "reward": ("f.py:f",), "device": "cpu"}
        ppo.train(ppo.Config(**common, epochs=2.0, steps=1000))  # the default of ppo is 200


def test_a_run_of_epochs_is_read_back_and_grows_by_epochs(cfg):
    """config.json keeps what was given, so that it can be given again."""
    torch.set_num_threads(1)
    short_run = dataclasses.replace(cfg, epochs=1.0, batch_size=24, save_every=3)
    sft.train(short_run)
    written = json.loads((cfg.output / "config.json").read_text())
    assert written["epochs"] == 1 and written["steps"] == 1000
    assert len((cfg.output / "metrics.jsonl").read_text().splitlines()) == 3  # 24, 24 and 16 rows

    sft.train(dataclasses.replace(short_run, resume=True, epochs=2.0))
    assert len((cfg.output / "metrics.jsonl").read_text().splitlines()) == 6
    with pytest.raises(InputError, match=r"--steps: expected at least 6, .* got 3, which --epochs 1 takes"):
        sft.train(dataclasses.replace(short_run, resume=True))
