"""The comparison with TRL: what both sides train is the same, and the figures are of what was run."""

import importlib.util
import json

import pytest
from burnish.bench import record
from burnish.bench.runs import trainers
from burnish.model import InputError


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
        assert [step["tokens"] for step in steps] == [step["length"] * 32 for step in steps]
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


def test_a_measurement_is_of_a_process_of_its_own(folder):
    trainers.write_rows(folder / "sft.jsonl", "sft")
    result = trainers.forked(trainers.worker, "burnish", "sft", folder)
    assert len(result["losses"]) == 3 and result["growth_bytes"] > 0
    assert result["tokens_per_second"] > 0 and result["tokens_per_cpu_second"] > 0


def test_a_measurement_that_fails_says_why(folder, capfd):
    with pytest.raises(SystemExit, match=r"worker.*sft.* failed"):
        trainers.forked(trainers.worker, "burnish", "sft", folder)
    assert "sft.jsonl: no such file" in capfd.readouterr().err


def test_rows_are_the_same_for_both_sides(folder):
    for task, columns in {"sft": {"completion"}, "dpo": {"chosen", "rejected"}, "grpo": set()}.items():
        file = folder / f"{task}.jsonl"
        trainers.write_rows(file, task)
        first = file.read_text()
        trainers.write_rows(file, task)
        assert file.read_text() == first
        assert all(set(json.loads(line)) == {"prompt", *columns} for line in first.splitlines())


def test_a_task_of_another_name_is_refused():
    with pytest.raises(InputError, match="expected trainers among sft, dpo, grpo, got 'ppo'"):
        trainers.main(trainers.Config(tasks=("sft", "ppo")))


def test_figures_are_written_where_the_flags_say(tmp_path, monkeypatch):
    side = {"tokens_per_second": 2.0, "growth_bytes": 1e6, "import_seconds": 1.0}
    row = {
        "task": "sft",
        "burnish": side,
        "trl": side,
        "speed_ratio": 1.0,
        "cpu_ratio": 1.0,
        "growth_ratio": 1.0,
    }
    monkeypatch.setattr(trainers, "measure", lambda task, rounds: row | {"rounds": rounds})
    monkeypatch.setattr(trainers, "import_both", lambda: None)
    monkeypatch.setattr(trainers, "version", lambda name: f"{name} 1")
    monkeypatch.setattr(record, "RESULTS", tmp_path / "kept")

    file = tmp_path / "figures.json"
    assert trainers.main(trainers.Config(tasks=("sft",), rounds=2)) == 0
    assert not [*tmp_path.iterdir()]
    assert trainers.main(trainers.Config(tasks=("sft",), rounds=2, json=file)) == 0
    assert [*tmp_path.iterdir()] == [file]
    assert trainers.main(trainers.Config(tasks=("sft",), rounds=2, keep=True)) == 0
    (kept,) = (tmp_path / "kept").iterdir()
    found, written = json.loads(kept.read_text()), json.loads(file.read_text())
    assert found.pop("command") == "burnish bench trainers sft --rounds 2 --keep"
    assert written.pop("command") == f"burnish bench trainers sft --rounds 2 --json {file}"
    assert found == written and found["rows"] == [row | {"rounds": 2}] and found["machine"]["trl"] == "trl 1"
