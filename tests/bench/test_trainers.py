"""The comparison with TRL: what both sides train is the same, and the figures are of what was run."""

import importlib.util
import json
import subprocess
import sys

import pytest
from burnish.bench import trainers


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(trainers, "STEPS", 3)
    monkeypatch.setattr(trainers, "SHAPE", trainers.SHAPE | {"hidden_size": 32, "num_hidden_layers": 1})
    trainers.write_model(tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize("task", ["sft", "grpo"])
def test_tokens_are_those_that_the_trainer_counts(folder, task):
    trainers.write_rows(folder / f"{task}.jsonl", task)
    steps = trainers.train_burnish(task, folder)()
    if task == "grpo":
        assert [step["tokens"] for step in steps] == [step["length"] * 64 for step in steps]
    else:
        assert [step["tokens"] for step in steps] == [trainers.count_tokens(task, folder)] * 3
        assert steps[2]["loss"] < steps[0]["loss"]  # the same rows each step


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_losses_equal_trl(task):
    row = trainers.measure(task, rounds=1)
    assert row["loss_difference"] < 1e-5
    assert row["burnish"]["growth_bytes"] > 0


def test_a_worker_that_fails_says_why(folder):
    command = [sys.executable, "-m", "burnish.bench.trainers", "--worker", "burnish", "sft", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode != 0 and "sft.jsonl: no such file" in done.stderr


def test_rows_are_the_same_for_both_sides(folder):
    for task, columns in {"sft": {"completion"}, "dpo": {"chosen", "rejected"}, "grpo": set()}.items():
        file = folder / f"{task}.jsonl"
        trainers.write_rows(file, task)
        first = file.read_text()
        trainers.write_rows(file, task)
        assert file.read_text() == first
        assert all(set(json.loads(line)) == {"prompt", *columns} for line in first.splitlines())
