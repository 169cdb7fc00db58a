"""The two doors to the benchmark's commands: tyro's and argparse's read the same Config from the same words."""

import dataclasses
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import pytest
from burnish.algorithms.run.flags import POSITIONAL, Bounds
from burnish.algorithms.run.parsing import parsed
from burnish.bench import command
from burnish.bench.command import COMMANDS
from burnish.bench.flags import check, parse, spelled
from burnish.bench.ops import speed
from burnish.model.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    ops: Annotated[tuple[str, ...], POSITIONAL] = ()  # all when none is named
    rounds: Annotated[int, Bounds(1, 9)] = 3  # of both, 100 % of them
    budget: float | None = None  # seconds
    chip: Literal["sm_80", "sm_90"] | None = None  # a card
    file: Path | None = None
    against: tuple[str, ...] = ()
    peers: bool = False


CLASS = type("Module", (), {"Config": Config, "__doc__": "A command."})
LINES = [
    ([], Config()),
    (["a", "b", "--peers"], Config(ops=("a", "b"), peers=True)),
    (["a", "--rounds", "5", "--budget", "1.5"], Config(ops=("a",), rounds=5, budget=1.5)),
    (["--chip", "sm_90", "--file", "x y.json"], Config(chip="sm_90", file=Path("x y.json"))),
    (["a", "--against", "m.py:f", "m.py:g"], Config(ops=("a",), against=("m.py:f", "m.py:g"))),
]


@pytest.mark.parametrize("words, config", LINES)
def test_both_doors_read_the_same(words, config):
    assert parse("p", Config, words, "") == config
    read = parsed("p", CLASS, words)  # pyright: ignore[reportArgumentType]
    assert dataclasses.asdict(read) == dataclasses.asdict(config)


@pytest.mark.parametrize("words, config", LINES)
def test_a_config_is_spelled_as_it_is_read(words, config):
    import shlex

    assert parse("p", Config, shlex.split(spelled("p", config))[1:], "") == config


@pytest.mark.parametrize("words", [["--rounds", "x"], ["--chip", "sm_1"], ["--unknown"], ["--rounds"]])
def test_words_that_are_no_flags_are_wrong_usage(words, capsys):
    for door in (lambda: parse("p", Config, words, ""), lambda: parsed("p", CLASS, words)):  # pyright: ignore[reportArgumentType]
        with pytest.raises(SystemExit) as stop:
            door()
        assert stop.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_a_number_out_of_bounds_is_one_sentence():
    with pytest.raises(InputError, match="--rounds: expected a number between 1 and 9, got 10"):
        check(Config(rounds=10))


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_every_command_has_a_config_whose_flags_have_help(name):
    module = import_module(f"burnish.bench.{COMMANDS[name][0]}") if name else speed
    from burnish.algorithms.run.flags import helps

    fields = {field.name for field in dataclasses.fields(module.Config)}
    assert fields == helps(module.Config).keys() and callable(module.main)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_of_every_command(name, plain, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main([*name.split(), "--help"], plain)
    out = " ".join(capsys.readouterr().out.split())  # lines are as long as the terminal is wide
    assert stop.value.code == 0 and ("python -m burnish.bench" if plain else "burnish bench") in out
    assert all(line in out for line in ([] if name else [text for _, text in COMMANDS.values()]))


@pytest.mark.parametrize("plain", [True, False])
def test_wrong_input_is_one_line_and_status_1(plain, capsys):
    assert command.main(["rms_norms"], plain) == 1
    err = capsys.readouterr().err.strip()
    door = "python -m burnish.bench" if plain else "burnish bench"
    assert (
        err.startswith(f"{door}: op: expected one of --list, such as")
        and "\n" not in err
        and "rms_norms" in err
    )


@pytest.mark.parametrize("words", [["--compare"], ["swiglu", "--shape"], ["swiglu", "--against", "--peers"]])
@pytest.mark.parametrize("plain", [True, False])
def test_a_flag_without_its_values_is_not_taken_for_absent(words, plain, capsys, monkeypatch):
    monkeypatch.setattr(speed, "main", lambda cfg: pytest.fail("it runs"))
    try:
        status = command.main(words, plain)
    except SystemExit as stop:
        status = stop.code
    assert status == (2 if plain else 1)
    assert "expected at least one" in capsys.readouterr().err


@pytest.mark.parametrize("plain", [True, False])
def test_a_package_that_is_missing_is_one_sentence(plain, capsys, monkeypatch):
    def needs(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(speed, "main", lambda cfg: needs("transformers"))
    assert command.main([], plain) == 1
    assert (
        capsys.readouterr().err.strip().endswith("expected the package transformers, which is not installed")
    )
    monkeypatch.setattr(speed, "main", lambda cfg: needs("burnish.nothing"))
    with pytest.raises(ModuleNotFoundError):  # a fault of ours
        command.main([], plain)
