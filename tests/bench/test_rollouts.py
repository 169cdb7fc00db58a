"""The comparison with transformers: both sides answer the same prompts, and what is counted is what was drawn."""

import importlib.util

import pytest
from burnish.bench import record
from burnish.bench.publish import report
from burnish.bench.runs import rollouts, trainers
from burnish.model import Transformer
from burnish.model.checkpoint import load_model
from burnish.model.files.config_json import read_config
from burnish.model.files.text_files import read_object

WORK = rollouts.Work("ragged", 5, 2, 3, 9, 6, mean_length=8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(trainers, "SHAPE", trainers.SHAPE | {"hidden_size": 32, "num_hidden_layers": 1})
    trainers.write_model(tmp_path / "model")
    return tmp_path / "model"


def test_prompts_and_stop_ids_are_drawn_alike_each_time():
    prompts = WORK.draw_prompts(100)
    assert prompts == WORK.draw_prompts(100) and len(prompts) == 5
    assert all(3 <= len(prompt) <= 9 and min(prompt) >= 2 and max(prompt) < 100 for prompt in prompts)
    assert len({len(prompt) for prompt in prompts}) > 1
    assert len(set(WORK.stop_ids(100))) == 100 // 8


def test_an_answer_ends_with_its_first_stop_id():
    assert rollouts.until([5, 7, 9, 7], [7]) == [5, 7]
    assert rollouts.until([5, 9], [7]) == [5, 9]


def test_our_answers_are_what_is_counted(folder, monkeypatch):
    model = load_model(folder)
    answers = rollouts.ours(model, WORK, greedy=True)
    stops = set(WORK.stop_ids(model.config.vocab_size))
    assert len(answers) == 10
    assert all(len(answer) == 6 or answer[-1] in stops for answer in answers)
    assert answers[0] == answers[1]  # two samples of one prompt, greedily
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(rollouts.time, "process_time", lambda: next(clock))
    assert rollouts.speed(lambda: answers, "cpu") == sum(map(len, answers)) / 2


def test_the_gpus_model_has_a_billion_parameters():
    config = read_config(trainers.SHAPE | rollouts.SETTINGS["cuda"].changes, "test")
    assert 1.2e9 < sum(p.numel() for p in Transformer(config, device="meta").parameters()) < 1.3e9


def test_a_gpus_run_is_reported_before_a_cpus(tmp_path, monkeypatch):
    row = {"model": "m", "work": "w", "rounds": 1, "ratio": 6.0, "ratios": [6.0], "same_greedy_answers": 0.75}
    row |= {"tokens_per_second": {"burnish": 60.0, "transformers": 10.0}}
    row |= {"cache_bytes": 1_000_000, "copied_cache_bytes": 2_000_000}
    facts = {"torch": "2", "transformers": "5"}
    machines = {
        "rollouts": facts | {"device": "a CPU"},
        "gpu-rollouts": facts | {"device": "a GPU", "driver": "1"},
    }
    monkeypatch.setattr(record, "RESULTS", tmp_path / "bench" / "results")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    for kind, machine in machines.items():
        record.keep(kind, "command", machine=machine, rows=[row])
    text = report.rollouts()
    assert text.index("a GPU, torch 2") < text.index("a CPU, one thread, torch 2")
    assert text.count("| 75% |") == 2 and "6.00x" in text


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_both_sides_draw_the_same_greedy_tokens(folder):
    row = rollouts.measure("tiny", folder, WORK, 1, "cpu")
    assert row["same_greedy_answers"] == 1 and row["ratio"] > 0
    assert row["cache_bytes"] < row["copied_cache_bytes"]


def test_the_kept_command_does_not_say_where_a_model_lies(tmp_path, monkeypatch):
    row = {"model": "m", "work": "w", "ratio": 1.0, "cache_bytes": 0, "same_greedy_answers": 1.0}
    row |= {"tokens_per_second": {"burnish": 1.0, "transformers": 1.0}}
    monkeypatch.setattr(rollouts, "measure", lambda *_: row)
    monkeypatch.setattr(rollouts, "version", lambda name: "1")
    monkeypatch.setattr(rollouts, "write_model", lambda *_, **__: None)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert rollouts.main(rollouts.Config(model=tmp_path / "mine", keep=True)) == 0
    (kept,) = tmp_path.iterdir()
    assert read_object(kept)["command"] == "burnish bench rollouts --model mine --keep"
