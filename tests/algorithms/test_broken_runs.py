"""Broken lessons, checkpoints and run folders: one sentence that names the thing, and a folder that is as it was."""

import dataclasses
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from burnish.algorithms import sft
from burnish.algorithms.data.lessons import Lesson, read_lessons, write_lessons
from burnish.algorithms.run import checkpoint as checkpoint_file  # `checkpoint` is a fixture
from burnish.algorithms.run.checkpoint import read_checkpoint, write_checkpoint
from burnish.algorithms.run.checks import CHECKPOINT, check_flags
from burnish.algorithms.run.digests import DIGESTS, with_digests
from burnish.algorithms.run.optimizer import make_optimizer
from burnish.model.errors import InputError
from burnish.model.text.tokenizer import Tokenizer
from faults import check_of, control, faults_of
from planted import copy_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

NAN, INF = float("nan"), float("inf")


def refusal(function) -> str:
    try:
        function()
    except InputError as error:
        message = str(error)
        assert message.isprintable() and len(message) <= 600, f"expected one short line, got {message!r}"
        return message
    raise AssertionError("expected a refusal")


def change(file: Path, edit) -> None:
    """edit(tensors, metadata), in place. A checkpoint gets the digests of what it then holds, as if a run wrote it."""
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata() or {})
    edit(tensors, metadata)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, file, with_digests(tensors, metadata) if DIGESTS in metadata else metadata or None)


def retype(file: Path, name: str, dtype: str) -> None:
    """Call a tensor's bytes another dtype's of the same width."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header[name]["dtype"] = dtype
    if dtype.startswith("F8"):
        header[name]["shape"] = [header[name]["data_offsets"][1] - header[name]["data_offsets"][0]]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def set_item(name: str, value, place=0):
    def edit(tensors, metadata):
        tensors[name].view(-1)[place] = value

    return edit


def about(**changes):
    def edit(tensors, metadata):
        metadata["lessons"] = json.dumps(json.loads(metadata["lessons"]) | changes)

    return edit


def say(name: str, text: str):
    def edit(tensors, metadata):
        metadata[name] = text

    return edit


# ---- lessons

LESSONS = {
    "no metadata": (lambda t, m: m.clear(), "not a file of lessons"),
    "no JSON": (say("lessons", "x"), "metadata: lessons: not JSON"),
    "deep": (say("lessons", "[" * 9999), "metadata: lessons: not JSON"),
    "a list": (say("lessons", "[]"), "not a file of lessons"),
    "temperature of text": (about(temperature="1"), "temperature: expected a number above 0, got 1"),
    "temperature NaN": (about(temperature=NAN), "temperature: expected a number above 0, got nan"),
    "temperature true": (about(temperature=True), "temperature: expected a number above 0"),
    "tokenizer of a list": (about(tokenizer=[1]), "tokenizer: expected text, got [1]"),
    "nothing": (lambda t, m: t.update({n: x[:0] for n, x in t.items()}), "lengths: expected at least one"),
    "a negative length": (set_item("lengths", -1), "lengths: expected 1 to 5, the number of tokens, got -1"),
    "no length": (set_item("lengths", 0), "lengths: expected 1 to 5"),
    "a sum that overflows": (lambda t, m: t["lengths"].fill_(2**62 + 3), "lengths: expected 1 to 5"),
    "other lengths": (set_item("lengths", 4), "with the sum 5, the number of tokens; got the sum 6"),
    "trained twice": (set_item("trained", 2, 1), "trained: expected 0 or 1, got 2"),
    "first trained": (set_item("trained", 1, 3), "trained: lesson 2: expected 0 for its first token"),
    "an id beyond": (set_item("ids", 2**30), "ids: expected the tokenizer's ids"),
    "logprob NaN": (set_item("logprobs", NAN), "logprobs: expected finite numbers of at most 0, got nan"),
    "logprob infinite": (set_item("logprobs", -INF), "logprobs: expected finite numbers"),
    "logprob above 0": (set_item("logprobs", 0.5), "logprobs: expected finite numbers of at most 0, got 0.5"),
    "another tensor": (lambda t, m: t.update(more=torch.ones(1)), "ids, logprobs, got more"),
    "tokens in a table": (lambda t, m: t.update(tokens=t["tokens"][None]), "tokens: expected one dimension"),
    "lengths without": (lambda t, m: t.update(lengths=torch.tensor(5)), "lengths: expected one dimension"),
    "ids without": (lambda t, m: t.update(ids=torch.tensor(5).int()), "ids and logprobs: expected"),
    "no K": (
        lambda t, m: t.update(ids=t["ids"][:, :0], logprobs=t["logprobs"][:, :0]),
        "ids and logprobs: expected",
    ),
    "long tokens": (
        lambda t, m: t.update(tokens=t["tokens"].long()),
        "tokens: expected the dtype I32, got I64",
    ),
    "float tokens": (
        lambda t, m: t.update(tokens=t["tokens"].float()),
        "tokens: expected the dtype I32, got F32",
    ),
    "half": (
        lambda t, m: t.update(logprobs=t["logprobs"].half()),
        "logprobs: expected the dtype F32, got F16",
    ),
}


@pytest.fixture
def lessons(model_folder, tmp_path):
    """A file of two, and how it is read."""
    tokenizer, file = Tokenizer.load(model_folder), tmp_path / "lessons.safetensors"
    ids, logprobs = torch.tensor([[3, 1], [2, 0], [1, 2]]).int(), -torch.ones(3, 2)
    given = [
        Lesson([1, 2, 3], [False, True, True], ids[:2], logprobs[:2]),
        Lesson([4, 5], [False, True], ids[2:], logprobs[2:]),
    ]
    write_lessons(file, given, tokenizer, 1.0)
    return file, lambda: read_lessons(file, tokenizer, 1.0)


@pytest.mark.parametrize("name", LESSONS)
def test_broken_lessons_are_named(lessons, name):
    file, read = lessons
    assert len(read()) == 2
    edit, message = LESSONS[name]
    change(file, edit)
    found = refusal(read)
    assert found.startswith(str(file)) and message in found


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "U32"])
@pytest.mark.parametrize("name", ["tokens", "logprobs"])
def test_lessons_of_another_dtype_are_named(lessons, name, dtype):
    retype(lessons[0], name, dtype)
    assert f"{name}: expected the dtype" in refusal(lessons[1])


def test_lessons_that_are_no_file(lessons, model_folder, tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    tokenizer = Tokenizer.load(model_folder)
    for file in (tmp_path / "pipe.safetensors", tmp_path, tmp_path / ("x" * 5000)):
        assert refusal(lambda file=file: read_lessons(file, tokenizer, 1.0))


# ---- checkpoints


def trained(seed: int = 0):
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, 1e-2)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def values(**changes):
    def edit(tensors, metadata):
        metadata["values"] = json.dumps(json.loads(metadata["values"]) | changes)

    return edit


def rename(old: str, new: str | None):
    def edit(tensors, metadata):
        tensor = tensors.pop(old)
        if new is not None:
            tensors[new] = tensor

    return edit


MOMENT = "optimizer/0/exp_avg_sq"
OTHER = "expected names like checkpoint-3-1-of-2.safetensors"
CHECKPOINTS = {
    "no metadata": (lambda t, m: m.clear(), "metadata: values: not JSON"),
    "values of a list": (say("values", "[1]"), "metadata: values: expected an object"),
    "no step": (say("values", "{}"), "metadata: values: step: expected a finite number, got None"),
    "step of text": (values(step="3"), "step: expected a finite number, got 3"),
    "step below 0": (values(step=-1), "step: expected a finite number, got -1"),
    "step too large": (values(step=10**30), "step: expected a finite number"),
    "half a step": (values(step=1.5), "step: expected a whole number, got 1.5"),
    "step true": (values(step=True), "step: expected a finite number, got True"),
    "a value NaN": (values(kl_coefficient=NAN), "kl_coefficient: expected a finite number, got nan"),
    "a value of an object": (values(varied={"a": []}), "varied: expected a finite number"),
    "a name of 5,000": (values(**{"k\x1b" * 2500: None}), "expected a finite number, got None"),
    "another count": (values(tensors=9), "tensors are missing"),
    "a state less": (rename(MOMENT, None), "tensors are missing"),
    "a state renamed": (rename(MOMENT, "optimizer/0/exp_avg_sqx"), f"{MOMENT}: missing"),
    "no number": (rename(MOMENT, "optimizer/x/exp_avg_sq"), f"{MOMENT}: missing"),
    "a parameter beyond": (rename(MOMENT, "optimizer/9/exp_avg_sq"), f"{MOMENT}: missing"),
    "a weight renamed": (rename("model/bias", "model/other"), "model/bias: missing"),
    "another part": (rename("model/bias", "critic/bias"), "model/bias: missing"),
    "another shape": (
        lambda t, m: t.update({MOMENT: t[MOMENT].T}),
        "expected F32 of shape [2, 3], got F32 of",
    ),
    "no shape": (lambda t, m: t.update({MOMENT: torch.tensor(1.0)}), "got F32 of shape []"),
    "a step with a shape": (
        lambda t, m: t.update({"optimizer/0/step": torch.ones(1)}),
        "expected F32 of shape []",
    ),
    "double": (lambda t, m: t.update({MOMENT: t[MOMENT].double()}), "got F64"),
    "a weight NaN": (
        set_item("model/weight", NAN),
        "model/weight: expected finite numbers, got NaN or infinity",
    ),
    "a moment infinite": (set_item(MOMENT, INF), f"{MOMENT}: expected finite numbers"),
    "a moment below 0": (set_item(MOMENT, -1.0), f"{MOMENT}: expected numbers of at least 0, got -1"),
    "a step of 0": (lambda t, m: t["optimizer/0/step"].zero_(), "expected numbers of at least 1, got 0"),
    "others above": (say("others", '["../x.safetensors"]'), OTHER),
    "others elsewhere": (say("others", '["/etc/passwd"]'), OTHER),
    "others with NUL": (say("others", '["\\u0000"]'), OTHER),
    "others itself": (say("others", f'["{CHECKPOINT}"]'), OTHER),
    "others of numbers": (say("others", "[1]"), OTHER),
    "others of an object": (say("others", "{}"), OTHER),
    "others missing": (
        say("others", '["checkpoint-3-1-of-2.safetensors"]'),
        "1-of-2.safetensors: no such file",
    ),
    "starts of a list": (say("starts", "[]"), "metadata: starts: expected an object"),
    "starts later": (
        say("starts", '{"model/bias": 1}'),
        "model/bias: expected its first row to be row 0, got 1",
    ),
    "starts of text": (
        say("starts", '{"model/bias": "x"}'),
        "model/bias: expected its first row to be row 0, got x",
    ),
}


@pytest.fixture
def checkpoint(tmp_path):
    write_checkpoint(tmp_path / CHECKPOINT, trained(), {"step": 3, "kl_coefficient": 0.5})
    return tmp_path / CHECKPOINT


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_broken_checkpoint_is_named(checkpoint, name):
    assert read_checkpoint(checkpoint, trained(1)) == {"step": 3, "kl_coefficient": 0.5}
    edit, message = CHECKPOINTS[name]
    change(checkpoint, edit)
    found = refusal(lambda: read_checkpoint(checkpoint, trained(1)))
    assert found.startswith(str(checkpoint.parent)) and message in found


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E8M0", "I32", "U32"])
@pytest.mark.parametrize("name", [MOMENT, "model/weight", "optimizer/1/step"])
def test_a_checkpoint_of_another_dtype_is_named(checkpoint, name, dtype):
    """Float8 ends the process where torch casts it."""
    retype(checkpoint, name, dtype)
    assert f"{name}: expected F32" in refusal(lambda: read_checkpoint(checkpoint, trained(1)))


def test_a_parameter_without_a_gradient_has_no_state(tmp_path):
    parts = trained()
    del parts["optimizer"].state[parts["model"].bias]
    write_checkpoint(tmp_path / CHECKPOINT, parts, {"step": 1})
    read_checkpoint(tmp_path / CHECKPOINT, others := trained(1))
    assert torch.equal(others["model"].weight, parts["model"].weight)
    assert others["model"].bias not in others["optimizer"].state


# ---- run folders


@pytest.fixture
def run(model_folder, demonstrations, tmp_path):
    """A run of three steps, with a checkpoint of the second."""
    cfg = sft.Config(
        model=model_folder,
        data=demonstrations,
        output=tmp_path / "out",
        batch_size=8,
        steps=3,
        save_every=2,
        device="cpu",
    )
    sft.train(cfg)
    return dataclasses.replace(cfg, resume=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CONFIGS = {
    "nothing": (b"", "config.json: not JSON"),
    "a list": (b"[]", "config.json: expected a JSON object"),
    "deep": (b'{"a": ' + b"[" * 9999, "config.json: not JSON"),
    "no UTF-8": (b"\xff\xfe", "config.json: not UTF-8"),
    "twice": (b'{"steps": 1, "steps": 2}', "steps: expected once"),
    "another run's": (b'{"model": "\\u001b[2J' + b"x" * 5000 + b'"}', "but the run in"),
    "empty": (b"{}", "but the run in"),
}


def test_a_refused_resume_changes_nothing(run):
    file, whole = run.output / "config.json", (run.output / "config.json").read_bytes()
    for name, (data, message) in CONFIGS.items():
        file.write_bytes(data)
        before = contents(run.output)
        assert message in refusal(lambda: sft.train(run)), name
        assert contents(run.output) == before, name

    file.write_bytes(whole)
    before = contents(run.output)
    assert "--steps: expected at least 2" in refusal(lambda: sft.train(dataclasses.replace(run, steps=1)))
    (run.output / "samples.jsonl").write_bytes(b'{"step": 0}\n{}\n{"step": 1}\n')
    assert "samples.jsonl line 2: expected an object with its step" in refusal(lambda: sft.train(run))
    (run.output / "samples.jsonl").unlink()
    assert contents(run.output) == before

    (run.output / "metrics.jsonl").rename(run.output / "kept")
    os.mkfifo(run.output / "metrics.jsonl")
    assert "metrics.jsonl: not a regular file" in refusal(lambda: sft.train(run))


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "samples.jsonl", ".config.json.partial", "model", "step-2"]
)
def test_a_link_in_a_run_folder_is_not_written_through(run, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "notes").write_text("mine\n" * 9)
    place, is_folder = run.output / name, name in ("model", "step-2")
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.symlink_to(elsewhere if is_folder else elsewhere / "notes")
    assert f"{name}: expected the run's own file, got a link" in refusal(lambda: sft.train(run))
    assert (elsewhere / "notes").read_text() == "mine\n" * 9


def test_broken_lines_of_metrics_are_kept_and_said(run, capsys):
    """Nothing but people reads them: a broken byte is no reason to lose a run."""
    metrics = run.output / "metrics.jsonl"
    first, second, third = metrics.read_bytes().splitlines(keepends=True)
    steps = lambda: [line.split(b",")[0] for line in metrics.read_bytes().splitlines()]
    expected = [b'{"step": 0', b'{"step": 1', b'{"step": 2']

    for data, kept, is_whole in (
        (first + second + third + b'{"step": 3, "to', expected, True),  # a crash has torn it
        (first + second[:-1], expected, True),  # and its end
        (first + second.replace(b"loss", b"lo\xffs") + third, expected, True),
        (b"\xff\n" + second + third, [b"\xff", *expected[1:]], False),
        (b"[" * 9999 + b"\n" + second + b"{}\n" + third, [b"[" * 9999, *expected[1:]], False),
        (first + third, [expected[0], expected[2]], False),
        (b"", [expected[2]], False),
    ):
        metrics.write_bytes(data)
        capsys.readouterr()
        sft.train(run)
        assert steps() == kept
        assert ("steps can be read; the file is continued" in capsys.readouterr().err) != is_whole


def test_names_that_no_folder_can_have(run):
    for resume in (False, True):
        cfg = dataclasses.replace(run, output=Path("x" * 5000), resume=resume)
        assert "xxx" in refusal(lambda cfg=cfg: sft.train(cfg))


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "model", CHECKPOINT])
def test_a_full_device_is_one_sentence(run, monkeypatch, tmp_path, name):
    """Every write of a file whose name begins so fails; what was there is whole."""
    before = contents(run.output)
    full = lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    if name == CHECKPOINT:
        monkeypatch.setattr(checkpoint_file, "save_file", full)
    elif name == "model":
        monkeypatch.setattr("burnish.model.files.tensors.save_file", full)
    else:
        write = Path.write_text
        text = lambda file, *a, **k: full() if name in file.name else write(file, *a, **k)
        monkeypatch.setattr(Path, "write_text", text)
        monkeypatch.setattr(os, "truncate", full if name == "metrics.jsonl" else os.truncate)

    message = refusal(lambda: sft.train(dataclasses.replace(run, steps=4)))
    assert "cannot be written" in message and "No space left on device" in message
    after = contents(run.output)
    for file, data in before.items():
        if Path(file).name not in ("config.json", "metrics.jsonl", "report.html"):
            assert after[file] == data, file
    began = name in ("model", CHECKPOINT)  # the others are refused before the first step
    assert (b">stopped at step" in after[str(run.output / "report.html")]) == began
    assert json.loads((run.output / "config.json").read_text())["batch_size"] == 8
    assert not [path for path in run.output.rglob("*partial*")]


def test_a_folder_in_use_is_named(run, tmp_path):
    assert "found one in use" in refusal(lambda: check_flags(dataclasses.replace(run, resume=False)))


# ---- planted faults


@control
def every_broken_checkpoint_is_named(module, file: Path) -> None:
    whole = file.read_bytes()
    for name, (edit, message) in CHECKPOINTS.items():
        file.write_bytes(whole)
        change(file, edit)
        try:
            found = refusal(lambda: module.read_checkpoint(file, trained(1)))
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        assert message in found, f"{name}: expected {message}, got {found}"


FILE = "algorithms/run/checkpoint"
QUICK = ("any file", "not finite")


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, id=fault.id, marks=[] if fault.name in QUICK else pytest.mark.slow)
        for fault in faults_of(__file__)
    ],
)
def test_a_planted_fault_is_caught(fault, checkpoint, tmp_path, monkeypatch):
    module = copy_of(FILE, tmp_path, monkeypatch, fault)
    with pytest.raises(AssertionError, match="expected"):
        check_of(fault)(module, checkpoint)


def test_a_faithful_copy_passes(checkpoint, tmp_path, monkeypatch):
    every_broken_checkpoint_is_named(copy_of(FILE, tmp_path, monkeypatch), checkpoint)
