"""A run goes on only with the rows, the models and the bits that it had; how a flag is spelled does not matter."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from burnish.algorithms import distill, dpo, grpo, sft
from burnish.algorithms.run import inputs as inputs_file
from burnish.algorithms.run.checkpoint import read_checkpoint, write_checkpoint
from burnish.algorithms.run.checks import CHECKPOINT, MAY_DIFFER
from burnish.algorithms.run.flags import TrainingFlags
from burnish.algorithms.run.inputs import CHANGED, Inputs, check_inputs
from burnish.algorithms.run.loop import Run
from burnish.algorithms.run.optimizer import make_optimizer, scheduled
from burnish.model.adapter import add_lora
from burnish.model.checkpoint import load_model, save_model
from burnish.model.errors import InputError
from burnish.model.text.tokenizer import Tokenizer
from crash import in_a_process
from crash_runs import content, make_tasks
from faults import check_of, control, faults_of
from planted import plant
from safetensors.torch import load_file, save_file
from torch import nn


@pytest.fixture
def tasks(tmp_path):
    torch.set_num_threads(1)
    return make_tasks(tmp_path)


def refusal(train, cfg) -> str:
    with pytest.raises(InputError) as caught:
        train(cfg)
    return str(caught.value)


def rows_changed(file: Path) -> None:
    """Let the file keep its size, and its time of change."""
    before = os.stat(file)
    text = file.read_text()
    place = next(i for i, c in enumerate(text) if c.isdigit())
    file.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    inputs_file.digest_of_file.__globals__["_digest_of_file"].cache_clear()  # as in another process


def weights_changed(folder: Path) -> None:
    (file,) = folder.glob("*model.safetensors")
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})


def text_changed(file: Path) -> None:
    file.write_text(file.read_text() + "\n")


# ---- files


def test_other_rows_are_refused(tasks, tmp_path):
    cfg = dataclasses.replace(tasks["sft"].config, output=tmp_path / "out")
    sft.train(cfg)
    before, whole = content(cfg.output), cfg.data.read_text()
    again = dataclasses.replace(cfg, steps=3, resume=True)
    rows_changed(cfg.data)
    message = refusal(sft.train, again)
    assert f"--data: {cfg.data}: expected the content that the run has read (SHA-256 " in message
    assert content(cfg.output) == before and not list(cfg.output.glob(".*"))

    cfg.data.write_text(whole)  # the time of change is another: only the content counts
    sft.train(again)


def test_another_base_is_refused_by_its_file(tasks, tmp_path):
    cfg = dataclasses.replace(tasks["sft"].config, output=tmp_path / "out")
    sft.train(cfg)
    again = dataclasses.replace(cfg, steps=3, resume=True)

    for change, name in (
        (weights_changed, "model.safetensors"),
        (lambda folder: text_changed(folder / "config.json"), "config.json"),
        (lambda folder: text_changed(folder / "tokenizer.json"), "tokenizer.json"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"), "chat_template.jinja"),
    ):
        shutil.copytree(cfg.model, tmp_path / "kept")
        change(cfg.model)
        message = refusal(sft.train, again)
        assert message.startswith("--resume: --model: ") and name in message
        shutil.rmtree(cfg.model)
        (tmp_path / "kept").rename(cfg.model)
    (cfg.model / "README.md").write_text("not read")
    sft.train(again)


def test_every_file_that_a_flag_names_counts(tasks, tmp_path):
    """Templates, functions, a teacher, an adapter's base."""
    template, rows = tmp_path / "chat.jinja", tmp_path / "rows.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    rows.write_text('{"prompt": {{ prompt | tojson }}, "completion": {{ completion | tojson }}}')
    model = load_model(tasks["sft"].config.model)
    add_lora(model, 2, base=str(tasks["sft"].config.model))
    save_model(model, tmp_path / "adapter", Tokenizer.load(tasks["sft"].config.model))

    given = {"chat_template": str(template), "row_template": rows, "output": tmp_path / "sft"}
    runs = [
        (sft, dataclasses.replace(tasks["sft"].config, model=tmp_path / "adapter", **given)),
        (grpo, dataclasses.replace(tasks["grpo"].config, output=tmp_path / "grpo")),
        (distill, dataclasses.replace(tasks["distill"].config, output=tmp_path / "distill")),
    ]
    for module, cfg in runs:
        module.train(dataclasses.replace(cfg, steps=1))

    for i, change, where, flag in (
        (0, text_changed, template, "--chat-template: "),
        (0, text_changed, rows, "--row-template: "),
        (0, weights_changed, tmp_path / "adapter", "--model: "),
        (0, weights_changed, tasks["sft"].config.model, "--model: "),  # the adapter's base
        (1, text_changed, tmp_path / "odd.py", "--reward: "),
        (2, weights_changed, tmp_path / "teacher", "--teacher: "),
    ):
        # refused while the file is another, and accepted after it is what it was
        module, cfg = runs[i]
        files = {file: file.read_bytes() for file in ([where] if where.is_file() else where.iterdir())}
        change(where)
        message = refusal(module.train, dataclasses.replace(cfg, steps=1, resume=True))
        assert message.startswith(f"--resume: {flag}") and where.name in message
        for file, data in files.items():
            file.write_bytes(data)
    for module, cfg in runs:
        module.train(dataclasses.replace(cfg, steps=1, resume=True))


@control
def folders_patterns_and_versions(place: Path) -> None:
    """Rows may be several files or a pattern; a file that changes after it was read has no digest."""
    folder = place / "rows"
    folder.mkdir()
    for name in ("b", "a"):
        (folder / f"{name}.jsonl").write_text(name)
    (place / "held_out.jsonl").write_text("c")
    checkpoint, base = place / CHECKPOINT, {"keep_best": None, "eval_data": place / "held_out.jsonl"}
    config = lambda **flags: type("Config", (), base | flags)()
    named = lambda cfg: {flag: [name for name, _ in found] for flag, found in Inputs(cfg).digests().items()}
    several = folder / "*.jsonl"
    for data in (several, (folder / "a.jsonl", folder / "b.jsonl")):
        assert named(config(data=data)) == {"--data": ["a.jsonl", "b.jsonl"]}

    # what names no file, and held-out rows
    assert named(config(data=folder / "a.jsonl", chat_template="plain", reward=("json:loads",))) == {
        "--data": ["a.jsonl"]
    }
    evaluated = {"data": folder / "a.jsonl", "eval_data": folder / "b.jsonl"}
    assert named(config(**evaluated)) == {"--data": ["a.jsonl"]}
    assert named(config(**evaluated, keep_best="loss")) == {"--data": ["a.jsonl"], "--eval-data": ["b.jsonl"]}

    # a file less, a file that has changed while the run went on, and a file that is gone
    read = Inputs(config(data=several))
    (folder / "a.jsonl").write_text("changed")
    (folder / "b.jsonl").unlink()
    assert read.digests() == {"--data": [["a.jsonl", CHANGED], ["b.jsonl", CHANGED]]}
    write_checkpoint(checkpoint, {"model": nn.Linear(1, 1)}, {"step": 1}, read.digests())
    with pytest.raises(
        InputError, match=r"expected the files that the run has read, a\.jsonl, b\.jsonl, found a"
    ):
        check_inputs(checkpoint, config(data=several))
    (folder / "b.jsonl").write_text("b")
    with pytest.raises(
        InputError, match=r"a\.jsonl: expected the content that the run has read \(which changed"
    ):
        check_inputs(checkpoint, config(data=several))


def test_folders_patterns_and_versions(tmp_path):
    folders_patterns_and_versions(tmp_path)


def test_files_are_hashed_once_and_only_for_checkpoints(tasks, tmp_path, monkeypatch):
    hashed = []
    digest = inputs_file.digest_of_file
    monkeypatch.setattr(
        inputs_file, "digest_of_file", lambda file: (hashed.append(file.name), digest(file))[1]
    )
    cfg = tasks["sft"].config
    sft.train(dataclasses.replace(cfg, output=tmp_path / "none", save_every=0, keep=None))
    assert hashed == []
    sft.train(dataclasses.replace(cfg, output=tmp_path / "some"))
    assert sorted(hashed) == sorted(set(hashed)) and {"rows.jsonl", "model.safetensors"} <= set(hashed)


# ---- bits


def trained(seed: int = 0):
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, 1e-2)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


@control
def a_flipped_bit_is_found(place: Path) -> None:
    """A bit of each tensor's bytes is named; one of the header is found, or the checkpoint reads as it was."""
    file, parts = place / CHECKPOINT, trained()
    inputs = {"--data": [["rows.jsonl", "0" * 64]]}
    write_checkpoint(file, parts, {"step": 3, "kl_coefficient": 0.5}, inputs)
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    for name, found in header.items():
        for byte in range(*found["data_offsets"], 3) if name != "__metadata__" else ():
            data = bytearray(whole)
            data[start + byte] ^= 1 << byte % 8
            file.write_bytes(data)
            with pytest.raises(InputError, match=f"{name}: differs from what was written"):
                read_checkpoint(file, trained(1))

    for byte in range(8, start, 6):
        data = bytearray(whole)
        data[byte] ^= 1 << byte % 7
        file.write_bytes(data)
        try:
            values, others = read_checkpoint(file, read := trained(1)), inputs_file.read_inputs(file)
        except InputError:
            continue
        assert values == {"step": 3, "kl_coefficient": 0.5} and others in (inputs, {})
        assert torch.equal(read["model"].weight, parts["model"].weight)


def test_a_flipped_bit(tmp_path):
    a_flipped_bit_is_found(tmp_path)


def test_a_flipped_bit_of_a_run_is_refused_and_the_folder_left_alone(tasks, tmp_path):
    cfg = dataclasses.replace(tasks["sft"].config, output=tmp_path / "out")
    sft.train(cfg)
    file = cfg.output / CHECKPOINT
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    before = {path: path.read_bytes() for path in cfg.output.rglob("*") if path.is_file()}
    message = refusal(sft.train, dataclasses.replace(cfg, steps=3, resume=True))
    assert message.startswith(f"{file}: ") and "differs from what was written" in message
    assert {path: path.read_bytes() for path in cfg.output.rglob("*") if path.is_file()} == before


# ---- flags


def test_a_path_may_be_spelled_otherwise(tasks, tmp_path, monkeypatch):
    cfg = dataclasses.replace(tasks["grpo"].config, steps=1, output=tmp_path / "out")
    grpo.train(cfg)
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    spellings = (lambda p: tmp_path / "link" / ".." / p.parent.name / p.name, lambda p: Path(p.name))
    for spelled in spellings:
        again = {"model": spelled(cfg.model), "data": spelled(cfg.data), "output": spelled(cfg.output)}
        again["reward"] = (f"{spelled(tmp_path / 'odd.py')}:odd",)
        grpo.train(dataclasses.replace(cfg, resume=True, **again))

    shutil.copytree(cfg.model, tmp_path / "copy")
    assert "--model is" in refusal(grpo.train, dataclasses.replace(cfg, resume=True, model=tmp_path / "copy"))
    other = dataclasses.replace(cfg, resume=True, reward=(f"{tmp_path}/odd.py:even",))
    assert "--reward is" in refusal(grpo.train, other)


def test_a_list_of_one_file_and_weights_of_one_are_other_spellings(tasks, tmp_path):
    cfg = dataclasses.replace(tasks["grpo"].config, steps=1, output=tmp_path / "out")
    grpo.train(cfg)
    again = dataclasses.replace(cfg, resume=True)
    grpo.train(dataclasses.replace(again, data=(cfg.data,), data_weights=(1.0,), reward_weights=(1.0,)))
    grpo.train(again)
    for other in ({"data_weights": (2.0,)}, {"reward_weights": (0.5,)}, {"data": (cfg.data, cfg.data)}):
        (name,) = other
        message = refusal(grpo.train, dataclasses.replace(again, **other))
        assert f"--{name.replace('_', '-')} is" in message


def test_a_file_that_changes_before_the_first_step_counts_as_changed(tasks, tmp_path, monkeypatch):
    """The log-probabilities of dpo's reference may take hours."""
    cfg = dataclasses.replace(tasks["dpo"].config, steps=1, output=tmp_path / "out")
    first_batches = Run.first_batches

    def slow(self):
        text_changed(cfg.data)
        return first_batches(self)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "first_batches", slow)
        dpo.train(cfg)
    message = refusal(dpo.train, dataclasses.replace(cfg, steps=2, resume=True))
    assert "which changed while it ran" in message


def test_a_flag_that_an_older_run_lacks_counts_as_its_default(tasks, tmp_path):
    cfg = dataclasses.replace(tasks["sft"].config, output=tmp_path / "out")
    sft.train(cfg)
    file = cfg.output / "config.json"
    flags = json.loads(file.read_text())
    assert flags.pop("balance") == "pooled" and flags.pop("optimizer") == "adamw"
    file.write_text(json.dumps(flags))
    again = dataclasses.replace(cfg, resume=True)
    message = refusal(sft.train, dataclasses.replace(again, balance="layer"))
    assert "--balance is 'layer', but the run in" in message and message.endswith("had 'pooled'")
    sft.train(again)


@pytest.mark.slow
def test_flags_that_change_no_mathematics_may_differ(tasks, tmp_path):
    """The step that is left is the same within rounding; to the bit, where the sums have the same order."""
    names = {field.name for field in dataclasses.fields(grpo.Config)}
    assert set(MAY_DIFFER) <= names
    cfg = dataclasses.replace(tasks["sft"].config, steps=3, output=tmp_path / "whole")
    sft.train(cfg)
    expected = load_file(cfg.output / "model" / "model.safetensors")

    for i, (changes, bound) in enumerate(
        (
            ({"micro_batch_tokens": 9}, 1e-5),
            ({"checkpoint_activations": True}, 0.0),
            ({"keep": 2, "save_every": 3}, 0.0),
            ({"keep": None, "log_every": 2}, 0.0),
            ({"eval_data": cfg.data, "eval_every": 1}, 0.0),
        )
    ):
        cut = dataclasses.replace(cfg, steps=2, output=tmp_path / str(i))
        sft.train(cut)

        # the first steps with the learning rates of three
        shutil.rmtree(cut.output)
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, 2)
            assert (
                in_a_process(lambda cut=cut: sft.train(dataclasses.replace(cut, steps=3)), cut.output).status
                == 7
            )
        sft.train(dataclasses.replace(cut, steps=3, resume=True, **changes))
        got = load_file(cut.output / "model" / "model.safetensors")
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=bound, atol=bound)


def stop_after(patch, steps: int) -> None:
    save = Run._save_step

    def saved(self, done, *given):
        save(self, done, *given)
        if done == steps:
            os._exit(7)

    patch.setattr(Run, "_save_step", saved)


def test_held_out_rows_may_differ_unless_the_best_model_is_kept(tasks, tmp_path):
    from burnish.algorithms.run.checks import _check_same, as_json

    cfg = tasks["sft"].config
    other = dataclasses.replace(cfg, eval_data=tmp_path / "others.jsonl", eval_every=3, patience=4)
    _check_same(tmp_path, other, json.loads(as_json(cfg)))
    kept = dataclasses.replace(cfg, eval_data=tmp_path / "rows.jsonl", keep_best="loss")
    with pytest.raises(InputError, match="--eval-data is"):
        _check_same(tmp_path, dataclasses.replace(kept, eval_data=other.eval_data), json.loads(as_json(kept)))


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_another_number_of_steps_says_what_it_does_to_the_rate(tasks, tmp_path, capsys, schedule):
    cfg = dataclasses.replace(tasks["sft"].config, schedule=schedule, warmup_steps=0, output=tmp_path / "out")
    sft.train(cfg)
    capsys.readouterr()
    sft.train(dataclasses.replace(cfg, resume=True))
    assert "in place of" not in capsys.readouterr().out
    sft.train(dataclasses.replace(cfg, steps=4, resume=True))

    lines = [line for line in capsys.readouterr().out.splitlines() if "in place of" in line]
    if schedule == "constant":
        assert lines == []
        return
    rates = [scheduled(1e-2, 1, 2, 0, schedule), scheduled(1e-2, 2, 4, 0, schedule)]
    assert lines == [
        "4 steps in place of 2: the learning rate, which decays until the last step, goes from "
        f"{rates[0]:.3g} in step 1 to {rates[1]:.3g} in step 2"
    ]
    logged = [json.loads(line) for line in (cfg.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in logged[1:3]] == pytest.approx(rates)


def test_within_the_warm_up_another_number_of_steps_changes_no_rate(tasks, tmp_path, capsys):
    changes = {"schedule": "cosine", "warmup_steps": 9, "output": tmp_path / "out"}
    cfg = dataclasses.replace(tasks["sft"].config, **changes)
    sft.train(cfg)
    sft.train(dataclasses.replace(cfg, steps=3, resume=True))
    assert "in place of" not in capsys.readouterr().out


def test_steps_and_epochs_are_two_ways_to_the_same(tasks, tmp_path):
    """12 rows, 3 a step: half an epoch is 2 steps."""
    cfg = dataclasses.replace(tasks["sft"].config, epochs=0.5, steps=1000, output=tmp_path / "out")
    sft.train(cfg)
    sft.train(dataclasses.replace(cfg, epochs=None, steps=3, resume=True))
    assert len((cfg.output / "metrics.jsonl").read_text().splitlines()) == 3
    message = refusal(sft.train, dataclasses.replace(cfg, epochs=0.5, resume=True))
    assert "--steps: expected at least 3" in message


def test_all_flags_of_trainers_are_known():
    """A flag that holds a path is compared as one."""
    assert {"model", "data", "eval_data", "row_template", "output"} <= {
        field.name for field in dataclasses.fields(TrainingFlags) if "Path" in str(field.type)
    }


# ---- planted faults


@pytest.mark.parametrize("fault", faults_of(__file__), ids=lambda fault: fault.id)
def test_a_planted_fault_is_caught(fault, tmp_path, monkeypatch):
    plant(fault, monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_of(fault)(tmp_path)
