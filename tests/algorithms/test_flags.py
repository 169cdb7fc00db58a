"""Flags: each with its help in --help, each number within bounds, defaults that change neither."""

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import pytest
from burnish.algorithms import dpo, grpo, ppo
from burnish.algorithms.__main__ import COMMANDS, main
from burnish.algorithms.run.checks import check_flags
from burnish.algorithms.run.command import FIRST
from burnish.algorithms.run.flags import (
    POSITIONAL,
    Bounds,
    DropoutFlags,
    Limit,
    Seed,
    Share,
    SupervisedFlags,
    TrainingFlags,
    bounds,
    helps,
)
from burnish.model.errors import InputError
from faults import check_of, control, faults_of
from planted import plant

NAN, INF = float("nan"), float("inf")
MODULES = {name: module for name, (module, _, _) in COMMANDS.items() if name != "bench"}  # it has its own
UNBOUNDED = {"reward_weights"}  # of any sign, one a reward function
ELSEWHERE = {
    "right_at",
    "k",
}  # of `evaluate`: a reward, which may be any number; several numbers, each looked at


def config_of(command: str) -> Any:
    return importlib.import_module(MODULES[command]).Config


def is_number(hint: Any) -> bool:
    return hint in (int, float) or any(map(is_number, get_args(hint)))


def without_help(config: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config)} - {*helps(config)}


def without_bounds(config: Any) -> set[str]:
    hints = get_type_hints(config)
    numbers = {name for name, hint in hints.items() if is_number(hint)}
    return numbers - {*bounds(config)} - UNBOUNDED - ELSEWHERE


@pytest.mark.parametrize("command", MODULES)
def test_every_flag_of_every_command_has_its_help(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert not without_help(config_of(command))
    with pytest.raises(SystemExit):
        main([command, "--help"])
    printed = " ".join(re.sub("[│╭╰─╮╯]", " ", capsys.readouterr().out).split())
    hints = get_type_hints(config_of(command), include_extras=True)
    positional = {name for name, hint in hints.items() if POSITIONAL in getattr(hint, "__metadata__", ())}
    for name, text in helps(config_of(command)).items():
        flag = f" {name.upper()} " if name in positional else f" --{name.replace('_', '-')}"
        assert flag in printed and text in printed, f"{name}: {text}"


def test_every_choice_of_a_flag_has_its_function():
    """A name without a row of the table would end a run in a KeyError."""
    tables = {
        (dpo, "loss"): dpo.VARIANTS,
        (grpo, "loss"): grpo.LOSSES,
        (grpo, "kl_estimator"): grpo.KL,
        (grpo, "advantage"): grpo.ADVANTAGES,
        (grpo, "aggregation"): grpo.DENOMINATORS,
        (grpo, "mismatch_weights"): {"none", *grpo.MISMATCH_WEIGHTS},
        (ppo, "advantage"): ppo.ADVANTAGES,
    }
    for (method, flag), table in tables.items():
        assert set(get_args(get_type_hints(method.Config)[flag])) == set(table), flag


@pytest.mark.parametrize("command", MODULES)
def test_a_commands_own_flags_are_listed_before_those_it_shares(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    printed = [
        flag.replace("-", "_") for flag in re.findall(r"^[│ ]+--([a-z][\w-]*)", capsys.readouterr().out, re.M)
    ]

    config = config_of(command)
    shared = {field.name for field in dataclasses.fields(config)} - {*vars(config)["__annotations__"], *FIRST}
    places = [
        name in shared for name in printed if name in {field.name for field in dataclasses.fields(config)}
    ]
    assert places == sorted(places)


@pytest.mark.parametrize("command", [name for name in MODULES if name not in ("chat", "convert", "merge")])
def test_every_number_has_bounds(command):
    assert not without_bounds(config_of(command))


@pytest.mark.parametrize("command", MODULES)
def test_a_default_is_within_the_bounds(command):
    config = config_of(command)
    for field in dataclasses.fields(config):
        if (within := bounds(config).get(field.name)) and isinstance(field.default, int | float):
            is_off = within.switch and field.default == INF
            assert within.least <= field.default <= within.most or is_off, field.name


# ---- classes of flags


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(DropoutFlags, SupervisedFlags):
    """A method's own flags: three other defaults, one flag more, one with other bounds and another help."""

    output: Path = Path("runs")
    learning_rate: float = 3e-4
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    steps: int = 7
    margin: Share = 0.5  # of nothing in particular
    limit: Limit | None = None  # a bound, or none
    batch_size: Annotated[int, Bounds(2, 64)] = 4  # pairs, not rows


def method(**changes: Any) -> Method:
    return Method(**{"model": Path("m"), "data": Path("d"), "output": Path("no such folder"), **changes})


def test_a_default_alone_keeps_help_and_bounds():
    for name in ("output", "learning_rate", "schedule", "steps"):
        assert helps(Method)[name] == helps(TrainingFlags)[name]
        assert bounds(Method).get(name) == bounds(TrainingFlags).get(name)
    assert method().steps == 7 and bounds(Method)["steps"] == Bounds(1)


def test_a_flag_that_is_written_anew_has_the_new_help_and_bounds():
    assert helps(Method)["batch_size"] == "pairs, not rows" and bounds(Method)["batch_size"] == Bounds(2, 64)
    assert helps(Method)["margin"] == "of nothing in particular" and bounds(Method)["margin"] == Bounds(0, 1)
    assert bounds(Method)["lora_dropout"] == Bounds(0, 0.99)  # of the class beside


@pytest.mark.parametrize(
    "name, inside, outside",
    [
        ("steps", [1, 2**53], [0, -1, 2**53 + 1, 10**6000]),
        ("warmup_steps", [0], [-1]),
        ("max_length", [2], [1]),
        ("learning_rate", [0, 1e30], [-1e-9, NAN, INF, 1e39]),
        ("lora_rank", [0, 256], [-1, 257]),
        ("lora_alpha", [None, 1e-6], [0.0, NAN, INF]),
        ("max_grad_norm", [1e-12, INF], [0.0, NAN, -INF]),
        ("router_aux_loss_coef", [None, 0, 1e9], [-1.0, 1.1e9, INF]),
        ("lora_dropout", [0, 0.99], [1.0, -0.1]),
        ("seed", [0, 2**53], [-1, 2**63]),
        ("margin", [0, 1], [-0.01, 1.01, NAN]),
        ("limit", [None, 0, 5.0, INF], [-1.0, NAN, -INF]),
        ("batch_size", [2, 64], [1, 65]),
    ],
)
def test_a_number_outside_its_bounds_is_refused_by_name(name, inside, outside):
    flag = f"--{name.replace('_', '-')}: expected a number "
    for value in inside:
        check_flags(method(**{name: value, "device": "cpu"}))
    for value in outside:
        with pytest.raises(InputError, match=re.escape(flag)):
            check_flags(method(**{name: value, "device": "cpu"}))


def test_bounds_that_hang_on_other_flags_add_to_those_of_the_type():
    with pytest.raises(InputError, match="--steps: expected a number between 3 and 5, got 7"):
        check_flags(method(device="cpu"), steps=(3, 5))
    with pytest.raises(InputError, match="--batch-size: expected a number between 2 and 64, got 65"):
        check_flags(method(device="cpu", batch_size=65), batch_size=(1, 99))
    check_flags(method(device="cpu", limit=INF), limit=(2, 3))  # off, as its type allows


# ---- planted faults


def test_a_flag_without_help_is_found():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Silent(SupervisedFlags):
        wrapped: Annotated[
            int | None, Bounds(1), "which says nothing, at such a length that it does not fit"
        ] = None  # as the formatter does it
        bare: Seed = 0
        spoken: Seed = 0  # heard

    assert without_help(Silent) == {"bare"}
    assert helps(Silent)["wrapped"] == "as the formatter does it" and helps(Silent)["spoken"] == "heard"


def test_a_number_without_bounds_is_found():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Boundless(SupervisedFlags):
        free: float = 0.0  # as it likes
        several: tuple[int, ...] = ()  # as they like
        maybe: float | None = None  # or not

    assert without_bounds(Boundless) == {"free", "several", "maybe"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wider(SupervisedFlags):
    steps: Annotated[int, Bounds(0)] = 5  # none, too


@dataclasses.dataclass(frozen=True, kw_only=True)
class Below(Wider):
    steps: int = 6


@control
def the_class_that_is_named_last_counts() -> None:
    assert bounds(Below)["steps"] == Bounds(0) != bounds(TrainingFlags)["steps"]


def test_a_class_that_overrides_a_bound_is_seen(monkeypatch):
    """A bound stands in any class of a Config's line: the one that is named last counts."""
    the_class_that_is_named_last_counts()
    assert helps(Below)["steps"] == "none, too"

    (fault,) = faults_of(__file__)
    plant(fault, monkeypatch)
    with pytest.raises(AssertionError):
        check_of(fault)()
    assert bounds(Below)["steps"] == Bounds(1)  # that of the class above all
