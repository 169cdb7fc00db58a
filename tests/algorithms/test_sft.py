"""`burnish sft` as a user runs it, and what must not depend on how a step is cut up."""

import dataclasses
import json

import pytest
import torch
from burnish.algorithms import sft
from burnish.model.checkpoint import load_model
from burnish.model.errors import InputError


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def cfg(model_folder, demonstrations, tmp_path):
    return sft.Config(
        model=model_folder,
        data=demonstrations,
        output=tmp_path / "out",
        steps=3,
        batch_size=16,
        learning_rate=1e-2,
        warmup_steps=0,
        device="cpu",  # fp32 throughout
    )


def test_loss_falls_and_the_result_is_a_model(cfg):
    trained = sft.train(dataclasses.replace(cfg, steps=30))
    metrics = metrics_of(cfg.output)
    assert len(metrics) == 30 and metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
    assert metrics[0]["trained_tokens"] == 16 * 8  # 8 of a row's 14 tokens are its completion and end
    assert load_model(trained).config.vocab_size == 17
    assert json.loads((cfg.output / "config.json").read_text())["steps"] == 30


@pytest.mark.parametrize("loss", ["nll", "dft"])
@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 100])
def test_gradients_do_not_depend_on_micro_batches(cfg, tmp_path, loss, micro_batch_tokens):
    whole = sft.train(dataclasses.replace(cfg, loss=loss))
    cut = dataclasses.replace(cfg, loss=loss, output=tmp_path / "cut", micro_batch_tokens=micro_batch_tokens)
    for one, other in zip(
        load_model(whole).parameters(), load_model(sft.train(cut)).parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)
    for one, other in zip(metrics_of(cfg.output), metrics_of(tmp_path / "cut"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_activation_checkpointing_changes_nothing(cfg, tmp_path):
    plain = sft.train(cfg)
    again = sft.train(dataclasses.replace(cfg, output=tmp_path / "again", checkpoint_activations=True))
    for one, other in zip(load_model(plain).parameters(), load_model(again).parameters(), strict=True):
        assert torch.equal(one, other)


def test_checkpoints_on_the_way(cfg):
    sft.train(dataclasses.replace(cfg, save_every=2))
    assert sorted(path.name for path in cfg.output.iterdir() if path.is_dir()) == ["model", "step-2"]


def test_a_folder_in_use_is_left_alone(cfg):
    cfg.output.mkdir()
    (cfg.output / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="expected a new or empty folder, found one in use"):
        sft.train(cfg)
    assert [path.name for path in cfg.output.iterdir()] == ["mine.txt"]


def test_divergence_ends_with_one_message_and_no_model(cfg):
    with pytest.raises(InputError, match="training has diverged and stopped before this update"):
        sft.train(dataclasses.replace(cfg, learning_rate=1e30, max_grad_norm=1e30, steps=10))
    assert not (cfg.output / "model").exists()
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in metrics_of(cfg.output))
