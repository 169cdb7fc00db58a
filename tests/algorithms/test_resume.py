"""A run that was stopped and goes on ends with the same bits as one that was not; saving never harms what was saved."""

import dataclasses
import json
import resource
import subprocess
import sys
import time

import pytest
import torch
from burnish.algorithms import distill, dpo, grpo, kto, ppo, reward, sft
from burnish.algorithms.run.checkpoint import read_checkpoint, write_checkpoint
from burnish.algorithms.run.checks import CHECKPOINT
from burnish.algorithms.run.optimizer import make_optimizer
from burnish.algorithms.run.order import epochs
from burnish.model.checkpoint import load_model, save_model
from burnish.model.errors import InputError
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer
from safetensors.torch import load_file
from torch import nn

COMMON = {"steps": 4, "save_every": 2, "learning_rate": 1e-2, "device": "cpu"}


@pytest.fixture
def configs(model_folder, demonstrations, prompts, pairs, tmp_path):
    """Every trainer on a small task, with each of its states that a checkpoint has to keep."""
    odd = tmp_path / "odd.py"
    odd.write_text(
        "def ones(completion_ids, **_):\n    return [float(sum(i % 2 for i in ids)) for ids in completion_ids]\n"
    )
    other = tmp_path / "other"
    config = load_model(model_folder).config
    save_model(Transformer(config, seed=7), other, Tokenizer.load(model_folder))

    return {
        "sft": sft.Config(model=model_folder, data=demonstrations, batch_size=24, **COMMON),
        "reward": reward.Config(model=model_folder, data=pairs, batch_size=24, **COMMON),
        "dpo": dpo.Config(model=model_folder, data=pairs, batch_size=24, **COMMON),
        "kto": kto.Config(model=model_folder, data=pairs, batch_size=24, **COMMON),
        "grpo": grpo.Config(
            model=model_folder,
            data=prompts,
            reward=(f"{odd}:ones",),
            prompts_per_step=5,
            group_size=4,
            max_new_tokens=8,
            kl_coefficient=0.1,
            updates_per_rollout=2,
            max_draws=2,
            **COMMON,
        ),
        "ppo": ppo.Config(
            model=model_folder,
            data=prompts,
            reward=(f"{odd}:ones",),
            prompts_per_step=10,
            max_new_tokens=8,
            epochs_per_rollout=2,
            minibatches=2,
            kl_target=0.01,
            kl_horizon=20,
            critic_learning_rate=1e-2,
            **COMMON,
        ),
        "distill": distill.Config(
            model=model_folder,
            teacher=other,
            data=demonstrations,
            student_samples=0.5,
            max_new_tokens=8,
            batch_size=24,
            **COMMON,
        ),
    }


TRAINERS = {
    "sft": sft,
    "reward": reward,
    "dpo": dpo,
    "kto": kto,
    "grpo": grpo,
    "ppo": ppo,
    "distill": distill,
}
TIMES = (
    *("seconds", "sampling_seconds", "scoring_seconds", "update_seconds", "tokens_per_second"),
    "eval_seconds",
)
BEST = {  # the metric by which each trainer keeps its best model
    "sft": "loss",
    "reward": "accuracy",
    "dpo": "margin",
    "kto": "kl",
    "grpo": "reward/ones",
    "ppo": "score",
    "distill": "divergence",
}


def metrics_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def stopped_after(monkeypatch, module, cfg, step):
    """Run until the log of `step`, then end as a crash would, before anything more is saved."""

    class Crash(BaseException):
        pass

    log = module.Run.log

    def log_or_crash(self, metrics, tokens):
        log(self, metrics, tokens)
        if self._step == step:
            raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(module.Run, "log", log_or_crash)
        with pytest.raises(Crash):
            module.train(cfg)


@pytest.mark.parametrize("name", TRAINERS)
def test_resumed_equals_uninterrupted(configs, name, tmp_path, monkeypatch):
    """Each run evaluates after every step and keeps its best model; a run that does neither has the same weights."""
    module, plain = TRAINERS[name], dataclasses.replace(configs[name], output=tmp_path / "plain")
    (tmp_path / "held.jsonl").write_text("".join(plain.data.read_text().splitlines(keepends=True)[:10]))
    best = {"eval_data": tmp_path / "held.jsonl", "eval_every": 1, "keep_best": BEST[name], "patience": 4}
    whole = dataclasses.replace(plain, output=tmp_path / "whole", **best)
    cut = dataclasses.replace(whole, output=tmp_path / "cut")
    trained = module.train(whole)
    stopped_after(monkeypatch, module, cut, step=2)  # one step after the checkpoint: done again
    assert len(metrics_of(cut.output)) == 3 and not (cut.output / "model").exists()
    resumed = module.train(dataclasses.replace(cut, resume=True))
    assert metrics_of(cut.output) == metrics_of(whole.output)
    assert [line["step"] for line in metrics_of(cut.output)] == [0, 1, 2, 3]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (trained, resumed)]
    assert weights[0] == weights[1] != (cut.output / "step-2" / "model.safetensors").read_bytes()

    # held-out figures and the best model
    for file in ("held_out.json", "best/model.safetensors"):
        assert (cut.output / file).read_bytes() == (whole.output / file).read_bytes(), file
    figures = [line[f"eval_{BEST[name]}"] for line in metrics_of(whole.output)]
    assert all(value is not None for value in figures)

    # evaluation moves no bit of training
    assert (module.train(plain) / "model.safetensors").read_bytes() == weights[0]
    without = [{k: v for k, v in line.items() if k[:5] != "eval_"} for line in metrics_of(whole.output)]
    assert metrics_of(plain.output) == without


def test_resume_wants_the_same_flags(configs, tmp_path):
    cfg = dataclasses.replace(configs["sft"], output=tmp_path / "out")
    sft.train(cfg)
    with pytest.raises(InputError, match=r"--batch-size is 23, but the run in .* had 24"):
        sft.train(dataclasses.replace(cfg, resume=True, batch_size=23))
    assert len(metrics_of(cfg.output)) == 4
    sft.train(dataclasses.replace(cfg, resume=True, steps=6))  # a longer run is no contradiction
    assert [line["step"] for line in metrics_of(cfg.output)] == [0, 1, 2, 3, 4, 5]


def test_resume_without_a_checkpoint(configs, tmp_path):
    cfg = dataclasses.replace(configs["sft"], output=tmp_path / "out", save_every=0)
    with pytest.raises(InputError, match=f"holds no {CHECKPOINT}"):
        sft.train(dataclasses.replace(cfg, resume=True))
    assert not cfg.output.exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "other model"])
def test_a_broken_checkpoint_is_named(configs, tmp_path, damage):
    cfg = dataclasses.replace(configs["sft"], output=tmp_path / "out", steps=2)
    sft.train(cfg)
    file = cfg.output / CHECKPOINT
    if damage == "other model":
        write_checkpoint(file, {"model": nn.Linear(2, 2)}, {"step": 1})
    else:
        file.write_bytes(file.read_bytes()[: 200 if damage == "truncated" else 0])
    with pytest.raises(InputError, match=CHECKPOINT):
        sft.train(dataclasses.replace(cfg, resume=True))
    assert len(metrics_of(cfg.output)) == 2


def _frozen_and_trained():
    frozen, trained = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2)
    return frozen, trained, make_optimizer(trained, 1e-2)


def test_a_checkpoint_holds_what_is_trained_and_no_more(tmp_path):
    frozen, trained, optimizer = _frozen_and_trained()
    model = nn.Sequential(frozen, trained)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    file = tmp_path / CHECKPOINT
    write_checkpoint(file, {"model": model, "optimizer": optimizer}, {"step": 1, "kl_coefficient": 0.1})

    # the second layer's 8 numbers, Adam's two moments of them, its two counts of steps; a digest of each is text
    tensors = load_file(file)
    assert sum(tensor.nbytes for tensor in tensors.values()) == 3 * 8 * 4 + 2 * 4
    assert file.stat().st_size < 3 * 8 * 4 + 1200 + 100 * len(tensors)

    other_frozen, other_trained, moments = _frozen_and_trained()
    values = read_checkpoint(
        file, {"model": nn.Sequential(other_frozen, other_trained), "optimizer": moments}
    )
    assert values == {"step": 1, "kl_coefficient": 0.1}
    assert torch.equal(other_trained.weight, trained.weight)
    assert not torch.equal(other_frozen.weight, frozen.weight)
    for one, other in zip(optimizer.state.values(), moments.state.values(), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def test_skipped_batches_are_those_that_were_had():
    whole, rest = epochs(7, 3, seed=1), epochs(7, 3, seed=1, skip=4)
    first = [next(whole) for _ in range(10)]
    assert [next(rest) for _ in range(6)] == first[4:]


WRITER = """
import sys, torch
from pathlib import Path
from burnish.algorithms.run.checkpoint import write_checkpoint
model = torch.nn.Linear(500, 500)
step = 0
while True:
    torch.nn.init.constant_(model.weight, step)
    write_checkpoint(Path(sys.argv[1]), {"model": model}, {"step": step})
    step += 1
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path):
    file, model = tmp_path / CHECKPOINT, nn.Linear(500, 500)
    with subprocess.Popen([sys.executable, "-c", WRITER, str(file)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        reported = [int(writer.stdout.readline()) for _ in range(5)][-1]
        time.sleep(0.02)
        writer.kill()
    values = read_checkpoint(file, {"model": model})
    assert values["step"] >= reported - 1 and (model.weight == values["step"]).all()
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(file.read_bytes()[:25_000])  # as a kill leaves it
    write_checkpoint(file, {"model": model}, {"step": 7})
    assert read_checkpoint(file, {"model": model}) == {"step": 7} and not partial.exists()


def test_a_full_disk_is_one_clear_error(configs, tmp_path):
    """The limit on a file's size stands for a disk that fills up while the second checkpoint is written."""
    file, model = tmp_path / CHECKPOINT, nn.Linear(200, 200)
    write_checkpoint(file, {"model": model}, {"step": 1})
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot be written, the earlier checkpoint is kept"):
            write_checkpoint(file, {"model": nn.Linear(200, 200)}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before and [path.name for path in tmp_path.glob(".*")] == []
