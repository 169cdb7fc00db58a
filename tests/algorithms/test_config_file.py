"""--config: what a file of flags gives, what the command line overrides, and one sentence for what is wrong in it."""

import dataclasses
import importlib
import json
import tempfile
from math import inf
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from burnish.algorithms import sft
from burnish.algorithms.__main__ import COMMANDS, main
from burnish.algorithms.run.checks import as_json
from burnish.algorithms.run.config_file import MOST_BYTES, Misfit, fitted, read_config_file
from burnish.algorithms.run.flags import bounds
from burnish.algorithms.run.parsing import parsed
from burnish.model.errors import InputError
from faults import check_of, control, faults_of
from planted import plant

CONFIGS = {name: module for name, (module, _, _) in COMMANDS.items() if name != "bench"}
TEXTS = iter(["no", "1e-6", "null", "0x10", "a: b #c", "ü 🎉", "~", "true"] * 40)


def module_of(command: str) -> ModuleType:
    return importlib.import_module(CONFIGS[command])


def another(hint: Any, default: Any, within: Any) -> Any:
    """Return a value of a flag other than its default, of the kinds that YAML might read as something else."""
    parts = [part for part in get_args(hint) if part is not NoneType]
    if get_origin(hint) is tuple:
        return tuple(another(parts[0], None, within) for _ in range(2))
    if get_origin(hint) is Literal:
        return next(part for part in parts if part != default)
    if get_origin(hint) in (Union, UnionType):
        return another(parts[-1], default, within)  # of --data, several files
    if hint is bool:
        return not default
    if hint in (int, float):
        if within is not None and within.switch:
            return inf
        low, high = (0, 100) if within is None else (within.least, within.most)
        return next(hint(x) for x in (low, min(high, 2**53), low + 1) if hint(x) != default)
    return hint(next(TEXTS))


def full(command: str) -> Any:
    """Return a Config of the command with every flag off its default."""
    config = module_of(command).Config
    hints, within = get_type_hints(config), bounds(config)
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return config(**{name: another(hints[name], each, within.get(name)) for name, each in defaults.items()})


@pytest.mark.parametrize("command", CONFIGS)
def test_a_runs_own_file_reads_back(command, tmp_path):
    cfg = full(command)
    for field in dataclasses.fields(cfg):
        assert getattr(cfg, field.name) != field.default, field.name

    # --epochs and --steps exclude each other
    several = [cfg]
    if hasattr(cfg, "epochs"):
        steps = next(field.default for field in dataclasses.fields(cfg) if field.name == "steps")
        several = [dataclasses.replace(cfg, **change) for change in ({"epochs": None}, {"steps": steps})]
    for each in several:
        (tmp_path / "config.json").write_text(as_json(each))
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(json.loads(as_json(each)), allow_unicode=True))
        for file in tmp_path.iterdir():
            assert parsed(command, module_of(command), ["--config", str(file)]) == each

    required = {name: value for name, value in (("model", "m"), ("data", "d"), ("output", "o"))}
    names = {field.name for field in dataclasses.fields(cfg)}
    words = [f"--{name}={value}" for name, value in required.items() if name in names]
    words += {"grpo": ["--reward", "f.py:g"], "report": ["folder"]}.get(command, [])
    plain = parsed(command, module_of(command), words)
    (tmp_path / "config.json").write_text(as_json(plain))
    assert parsed(command, module_of(command), [f"--config={tmp_path / 'config.json'}"]) == plain


def test_the_file_of_a_resumed_run_starts_a_new_run(model_folder, demonstrations, tmp_path):
    flags = {"save_every": 1, "batch_size": 4, "device": "cpu", "output": tmp_path / "run"}
    cfg = sft.Config(model=model_folder, data=demonstrations, steps=1, **flags)
    sft.train(cfg)
    sft.train(dataclasses.replace(cfg, steps=2, resume=True))
    words = ["--config", str(cfg.output / "config.json"), "--output", str(tmp_path / "again")]
    again = sft.train(parsed("burnish sft", sft, words))
    assert again == tmp_path / "again" / "model"
    assert (cfg.output / "config.json").read_text() == as_json(dataclasses.replace(cfg, steps=2))


def read(text: str, tmp_path: Path, *words: str, name: str = "run.yaml") -> sft.Config:
    (tmp_path / name).write_text(text)
    return parsed("sft", sft, ["--model", "m", "--data", "d", *words, "--config", str(tmp_path / name)])


def test_the_command_line_overrides_the_file(tmp_path):
    text = "steps: 5\nlearning-rate: 1e-6\nresume: yes\nlora_alpha: 3\nkeep_best: no\nseed: 0_7\nmodel: n\n"
    cfg = read(text, tmp_path)
    assert (cfg.steps, cfg.learning_rate, cfg.resume, cfg.lora_alpha) == (5, 1e-6, True, 3.0)
    assert (cfg.keep_best, cfg.seed, cfg.model) == ("no", 7, Path("m"))

    cfg = read(text, tmp_path, "--steps", "6", "--no-resume", "--lora-alpha", "None")
    assert (cfg.steps, cfg.learning_rate, cfg.resume, cfg.lora_alpha) == (6, 1e-6, False, None)


def test_null_and_quotes_are_as_written(tmp_path):
    assert read("keep_best: null", tmp_path).keep_best is None
    assert read("keep_best: ~", tmp_path).keep_best is None
    assert read("keep_best: 'null'", tmp_path).keep_best == "null"
    assert read("keep_best: 2026-12-01", tmp_path).keep_best == "2026-12-01"
    assert read("max_grad_norm: .5\n", tmp_path).max_grad_norm == 0.5
    assert read('{"max_grad_norm": Infinity}', tmp_path, name="config.json").max_grad_norm == inf
    assert read("max_grad_norm: inf", tmp_path).max_grad_norm == inf
    assert read("max_grad_norm: .inf", tmp_path).max_grad_norm == inf
    assert read("save_every: &n 3\nwarmup_steps: *n", tmp_path).warmup_steps == 3
    assert read("\ufeffsteps: 3", tmp_path).steps == 3


def test_one_value_stands_for_a_list_of_one():
    assert fitted(tuple[str, ...], "a") == ("a",) and fitted(tuple[int, ...], ["1", 2]) == (1, 2)


BOMB = "a: &a [x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
WRONG = {
    "lerning_rate: 1": "lerning_rate: expected a flag of burnish sft, got another key; did you mean learning_rate?",
    "qqqq: 1": "qqqq: expected a flag of burnish sft, got another key",
    "config: x.yaml": "config: expected a flag of burnish sft, got another key",
    "<<: {steps: 1}": "<<: expected a flag of burnish sft",
    "- steps": "expected a mapping of flags, such as `steps: 100`, got a list",
    "steps": "expected a mapping of flags, such as `steps: 100`, got one value",
    "": "expected a mapping of flags, such as `steps: 100`, got nothing",
    "steps: 1\nsteps: 1": "steps: expected once, got it twice",
    "save-every: 1\nsave_every: 2": "save_every: expected once, got it twice",
    "steps: many": "steps: expected a whole number, got many",
    "steps: 1.5": "steps: expected a whole number, got 1.5",
    "steps: 1e3": "steps: expected a whole number, got 1e3",
    "steps: yes": "steps: expected a whole number, got yes",
    "steps: null": "steps: expected a whole number, got null",
    "steps: ''": "steps: expected a whole number, got ''",
    f"steps: {'9' * 5000}": "steps: expected a whole number, got 999",
    "steps: 0": "--steps: expected a number at least 1, got 0",
    "learning_rate: fast": "learning_rate: expected a number, got fast",
    "learning_rate: .nan": "learning_rate: expected a number, got .nan",
    "learning_rate: NaN": "learning_rate: expected a number, got NaN",
    "learning_rate: inf": "--learning-rate: expected a number at most",
    "lora_alpha: [1]": "lora_alpha: expected a number or null, got ['1']",
    "lora_alpha: {a: 1}": "lora_alpha: expected a number or null, got a mapping",
    "resume: maybe": "resume: expected true or false, got maybe",
    "schedule: linea": "schedule: expected one of constant, linear, cosine, got linea",
    "data:": "data: expected a path, got null",
    "model: !!python/object/apply:os.system [ls]": "model: expected a path, got the tag !!python/object/apply:",
    "model: !!binary aGk=": "model: expected a path, got the tag !!binary",
    "? [a]\n: 1": "line 1: expected a flag's name as key, got a list or a mapping",
    "steps: [": "not YAML: line 1: ",
    "a: b: c": "not YAML: line 1: mapping values are not allowed here",
    "steps: 1\n---\nsteps: 2": "not YAML: line 2: but found another document",
    "steps: *n": "not YAML: line 1: found undefined alias",
    "steps: \x01": "not YAML: ",
    "[" * 500: "not YAML: lists and mappings nested too deeply",
    f"steps: {' ' * MOST_BYTES}1": f"expected at most {MOST_BYTES} bytes",
    BOMB: "a: expected a flag of burnish sft",
    f"{BOMB}".replace("a: &a", "keep_best: &a"): "keep_best: expected text or null, got [",
}


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_a_wrong_file_is_one_sentence(text, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    assert main(["sft", "--model", "m", "--data", "d", "--config", str(tmp_path / "run.yaml")]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"burnish sft: --config {tmp_path / 'run.yaml'}: ") and "\n" not in error
    assert WRONG[text] in error


JSON = {
    "[1]": "expected an object of flags, got a list",
    "1": "expected an object of flags, got 1",
    "{": "not JSON",
    '{"steps": 1, "steps": 2}': "steps: expected once",
    '{"steps": true}': "steps: expected a whole number, got True",
    '{"keep_best": 5}': "keep_best: expected text or null, got 5",
    '{"keep_best": "a\\u0000"}': "keep_best: expected text or null, got 'a\\x00'",
    '{"model": {"a": 1}}': "model: expected a path, got an object",
    '{"learning_rate": NaN}': "learning_rate: expected a number, got nan",
    f'{{"learning_rate": 1{"0" * 400}}}': "learning_rate: expected a number, got 1",
}


@pytest.mark.parametrize("text", JSON)
def test_a_wrong_json_file_is_one_sentence(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    assert main(["sft", "--model", "m", "--data", "d", "--config", str(tmp_path / "config.json")]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"burnish sft: --config {tmp_path / 'config.json'}: ") and "\n" not in error
    assert JSON[text] in error


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, capsys):
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9")
    for name, sentence in (("none.yaml", "no such file"), ("latin.yaml", "not UTF-8"), ("", "not a regular")):
        assert main(["bench", "static", "--config", str(tmp_path / name)]) == 1
        assert f"--config {tmp_path / name}: {sentence}" in capsys.readouterr().err


# ---- planted faults


def values_in(text: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder) / "run.yaml").write_text(text)
        return read_config_file(file, sft.Config, "burnish sft")


@control
def values_are_read_as_on_the_command_line() -> None:
    try:
        read = values_in("keep_best: 'null'\nlearning_rate: 1e-6\nmax_grad_norm: .inf\nlora_alpha: null")
    except InputError as error:
        raise AssertionError(error) from error
    assert read == {"keep_best": "null", "learning_rate": 1e-6, "max_grad_norm": inf, "lora_alpha": None}


@control
def what_is_wrong_is_refused() -> None:
    for text in ("steps: 0", "steps: 1\nsteps: 2", "learning_rate: .nan", "seed: !!python/name:os.system 1"):
        try:
            values_in(text)
        except InputError:
            continue
        raise AssertionError(f"read: {text}")
    try:
        raise AssertionError(f"read: {fitted(float, 'nan')}")
    except Misfit:
        pass


@pytest.mark.parametrize("fault", faults_of(__file__), ids=lambda fault: fault.id)
def test_the_checks_can_fail(fault, monkeypatch):
    check_of(fault)()
    plant(fault, monkeypatch)
    with pytest.raises(AssertionError):
        check_of(fault)()
