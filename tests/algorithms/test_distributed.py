"""Two processes train as one does: the same gradients, losses and weights, checkpoints that either goes on from."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import two_processes
from burnish.algorithms import teach
from burnish.algorithms.__main__ import COMMANDS
from burnish.algorithms.run.processes import TRAINERS, parts, processes, shares
from burnish.model.adapter import adapters, add_lora, merge_lora
from burnish.model.checkpoint import load_model, save_model
from burnish.model.errors import InputError
from burnish.model.scalar import ScalarModel
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer
from safetensors.torch import load_file
from two_processes import CASES, FAULTS, MODULES, RESUMED, SHAPES, checkpointed, train, trained_adapter

SHIFT = re.compile(rb'"score_bias": ([-+.e0-9]+)')  # a mean of scores, so within rounding
TIMES = (
    "seconds",
    "tokens_per_second",
    "sampling_seconds",
    "scoring_seconds",
    "update_seconds",
    "eval_seconds",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and rows, what one process makes of them, and what two do."""
    return tmp_path_factory.mktemp("several")


@pytest.fixture
def inputs(folder, model_folder, demonstrations, prompts, pairs):
    if not (folder / "odd.py").exists():
        for rows in (demonstrations, prompts, pairs):
            shutil.copy(rows, folder)
        tied = load_model(model_folder).config
        for shape, changes in SHAPES.items():
            model = Transformer(dataclasses.replace(tied, **changes), seed=0)
            save_model(model, folder / shape, Tokenizer.load(model_folder))
        save_model(ScalarModel(tied, seed=5), folder / "scores", Tokenizer.load(model_folder))

        adapted = load_model(folder / "tied")
        add_lora(adapted, 3, targets=("q_proj", "lm_head"), base=str(folder / "tied"))
        torch.nn.init.normal_(adapters(adapted)["lm_head"].b, std=0.1)
        save_model(adapted, folder / "adapted-head", Tokenizer.load(model_folder))

        taught = {"model": folder / "untied", "data": folder / "demonstrations.jsonl", "device": "cpu"}
        lessons = teach.teach(teach.Config(output=folder / "taught", top_k=4, **taught))
        shutil.copy(lessons, folder)

        rows = [json.loads(line) for line in demonstrations.read_text().splitlines()]
        judged = [json.dumps(row | {"label": i % 4 > 0}) + "\n" for i, row in enumerate(rows)]
        (folder / "judged.jsonl").write_text("".join(judged))  # mostly wanted: the KL baseline is not 0
        (folder / "odd.py").write_text(
            "def odd(completion_ids, **_):\n    return [float(sum(i % 2 for i in ids)) for ids in completion_ids]\n"
        )
    return folder


def torchrun(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options
    )


@pytest.fixture
def done(inputs):
    if not (inputs / "streamed.safetensors").exists():
        for name in RESUMED:
            checkpointed(inputs, "cut-by-one", name, steps=2)
        ran = torchrun(two_processes.__file__, inputs)
        assert ran.returncode == 0, ran.stderr[-4000:]
    return inputs


def metrics_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def close(got: dict, expected: dict, tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def check_alike(two: Path, one: Path, name: str) -> None:
    """The first step's gradients and three steps' metrics."""
    close(load_file(two / f"{name}.safetensors"), load_file(one / f"{name}.safetensors"), 1e-6)
    lines, expected = metrics_of(two / name), metrics_of(one / name)
    assert len(lines) == len(expected) == 3
    for got, line in zip(lines, expected, strict=True):
        close(got, line, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(done, name):
    train(name, done, "one")
    one, two = done / "one", done / "two"
    check_alike(two, one, name)

    files = [{file.name: file for file in (run / name / "model").iterdir()} for run in (one, two)]
    assert files[0].keys() == files[1].keys()  # the same Hugging Face folder
    for file in files[0].keys() - {"model.safetensors", "adapter_model.safetensors"}:
        expected, got = (folder[file].read_bytes() for folder in files)
        assert SHIFT.sub(b"", got) == SHIFT.sub(b"", expected), file
        shifts = [[float(number) for number in SHIFT.findall(text)] for text in (got, expected)]
        torch.testing.assert_close(*shifts, rtol=1e-4, atol=1e-4)

    for trained in {"model", "critic"} & {folder.name for folder in (one / name).iterdir()}:
        close(weights_of(two / name / trained), weights_of(one / name / trained), 1e-4)
    if "eval_data" in CASES[name][2]:
        results = [json.loads((run / name / "held_out.json").read_text()) for run in (one, two)]
        for when in ("before", "after"):
            close(results[1][when], results[0][when], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_resumed_on_as_many_processes_to_the_bit(done, name):
    cut, whole = done / "cut" / name, done / "whole" / name
    assert metrics_of(cut) == metrics_of(whole)
    weights, expected = weights_of(cut / "model"), weights_of(whole / "model")
    assert weights.keys() == expected.keys() and all(
        torch.equal(weights[name], expected[name]) for name in weights
    )
    names = sorted(file.name for file in cut.glob("checkpoint*"))
    assert names == ["checkpoint-4-1-of-2.safetensors", "checkpoint.safetensors"]  # step 2's are gone


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("cut", ["cut-by-one", "cut-for-one"])
def test_resumed_on_another_number_of_processes(done, cut, name):
    if cut == "cut-for-one":
        shutil.copytree(done / cut / name, done / "one-resumed" / name)
        checkpointed(done, "one-resumed", name, resume=True)
        assert [file.name for file in (done / "one-resumed" / name).glob("checkpoint*")] == [
            "checkpoint.safetensors"
        ]
        cut = "one-resumed"
    for got, line in zip(metrics_of(done / cut / name), metrics_of(done / "whole" / name), strict=True):
        close(got, line, 1e-5)
    close(weights_of(done / cut / name / "model"), weights_of(done / "whole" / name / "model"), 1e-5)


@pytest.mark.slow
def test_a_missing_shard_is_named(done, tmp_path):
    shutil.copytree(done / "cut-for-one", tmp_path / "run")
    (tmp_path / "run" / "sft-lora" / "checkpoint-2-1-of-2.safetensors").unlink()
    with pytest.raises(InputError, match="checkpoint-2-1-of-2"):
        checkpointed(done, tmp_path / "run", resume=True)


@pytest.mark.slow
def test_a_sigterm_to_one_process_ends_all_after_the_same_step(done):
    at_3 = done / "stopped-at-3" / "sft-lora"
    assert [line["step"] for line in metrics_of(at_3)] == [0, 1, 2]
    assert sorted(file.name for file in at_3.glob("checkpoint*")) == [
        "checkpoint-3-1-of-2.safetensors",
        "checkpoint.safetensors",
    ]
    cut, whole = done / "stopped" / "sft-lora", done / "whole" / "sft-lora"
    assert metrics_of(cut) == metrics_of(whole)
    weights, expected = weights_of(cut / "model"), weights_of(whole / "model")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert not list(cut.glob(".*"))


@pytest.mark.slow
def test_a_flipped_bit_of_another_process_is_named(done, tmp_path):
    """One process reads all files and checks them."""
    shutil.copytree(done / "cut-for-one", tmp_path / "run")
    file = tmp_path / "run" / "sft-lora" / "checkpoint-2-1-of-2.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        InputError, match=r"checkpoint-2-1-of-2\.safetensors: .* differs from what was written"
    ):
        checkpointed(done, tmp_path / "run", resume=True)


@pytest.mark.slow
def test_a_sharded_model_streams_what_a_merged_one_saves(done, tmp_path):
    model = trained_adapter(done)
    merge_lora(model)
    save_model(model, tmp_path / "merged")
    streamed, saved = load_file(done / "streamed.safetensors"), weights_of(tmp_path / "merged")
    assert streamed.keys() == saved.keys() and all(torch.equal(streamed[name], saved[name]) for name in saved)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_missing_sum_over_processes_is_caught(done, name):
    """The planted faults."""
    train(name, done, "right")
    with pytest.raises(AssertionError, match="not close"):
        check_alike(done / "faulty", done / "right", name)


@pytest.mark.slow
@pytest.mark.parametrize("death", ["exception", "kill"])
def test_a_process_that_dies_ends_the_job(inputs, tmp_path, death):
    """The command line, of which the reward function fails on rank 1 in the second step."""
    last_words = (
        "raise KeyError('planted')" if death == "exception" else "os.kill(os.getpid(), signal.SIGKILL)"
    )
    (tmp_path / "fails.py").write_text(
        "import os, signal\ncalls = []\n\n\ndef fails(completions, **_):\n    calls.append(1)\n"
        f"    if os.environ['RANK'] == '1' and len(calls) > 1:\n        {last_words}\n"
        "    return [float(len(c)) for c in completions]\n"
    )

    flags = {
        "model": inputs / "tied",
        "data": inputs / "prompts.jsonl",
        "reward": f"{tmp_path}/fails.py:fails",
    }
    flags |= {
        "output": tmp_path / "run",
        "steps": 3,
        "prompts-per-step": 4,
        "group-size": 2,
        "max-new-tokens": 4,
    }

    given = [word for flag, value in flags.items() for word in (f"--{flag}", value)]
    started = time.monotonic()
    ran = torchrun("-m", "burnish.algorithms.grpo", *given, "--device", "cpu")

    assert ran.returncode == 1 and time.monotonic() - started < 120
    if death == "exception":
        assert "planted" in ran.stderr and "grpo: process 1 of 2" in ran.stderr
    else:
        assert f"Signal {signal.SIGKILL.value}" in ran.stderr and "rank      : 1" in ran.stderr
    assert len(metrics_of(tmp_path / "run")) == 1 and not (tmp_path / "run" / "model").exists()
    assert ran.stdout.count("32 prompts") == 1  # rank 0 alone prints


@pytest.mark.slow
def test_what_runs_on_one_process_says_so(inputs, tmp_path):
    flags = ("--model", inputs / "tied", "--data", inputs / "prompts.jsonl")
    ran = torchrun("-m", "burnish.algorithms.evaluate", *flags, "--reward", f"{inputs}/odd.py:odd")
    assert ran.returncode == 1 and "evaluate: expected one process, got torchrun" in ran.stderr


# ---- on one process


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - TRAINERS - {"bench"}))
def test_other_commands_refuse_torchrun(monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(InputError, match=f"{command}: expected one process, got torchrun"),
        processes(command, "cpu"),
    ):
        raise AssertionError("it ran")


@pytest.mark.parametrize("name", MODULES)
def test_processes_that_have_not_joined_do_not_train(monkeypatch, inputs, name):
    """train() called by a script of the user's under torchrun: each process would train a model of its own."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes, but only 1 joined"):
        train(name, inputs, "unjoined")
    assert not (inputs / "unjoined" / name).exists()


def test_parts_are_even_and_whole():
    lengths = [5, 90, 7, 30, 61, 8, 44, 12, 3]
    for count in (1, 2, 4, 12):
        found = parts(lengths, count)
        assert sorted(i for part in found for i in part) == [*range(len(lengths))] and len(found) == count
        loads = [sum(lengths[i] for i in part) for part in found]
        assert loads == sorted(loads, reverse=True) and max(loads) <= max(90, 4 / 3 * sum(lengths) / count)


@pytest.mark.parametrize("several", [2, 3])
def test_shares_are_the_batch_in_as_many_rounds(monkeypatch, several):
    lengths = [5, 90, 7, 30, 61, 8, 44, 12, 3, 200]
    monkeypatch.setattr("burnish.algorithms.run.processes.world", lambda: several)
    by_rank = []
    for place in range(several):
        monkeypatch.setattr("burnish.algorithms.run.processes.rank", lambda place=place: place)
        by_rank.append(shares(lengths, 100))
    assert len({len(rounds) for rounds in by_rank}) == 1
    members = [part for rounds in by_rank for part in rounds]
    assert sorted(i for part in members for i in part) == [*range(len(lengths))]
    assert all(
        sum(lengths[i] for i in part) <= 200 for part in members
    )  # the longest, which is beyond the capacity
    assert shares([3], 100) == [[]]  # of the last rank, with nothing to do
