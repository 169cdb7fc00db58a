"""Flags: each with its help in --help, each number within bounds, defaults that change neither."""

import contextlib
import dataclasses
import importlib
import io
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import pytest
from burnish.algorithms import dpo, grpo, ppo
from burnish.algorithms.__main__ import COMMANDS, main
from burnish.algorithms.run.checks import check_flags
from burnish.algorithms.run.flags import (
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
from burnish.algorithms.run.parsing import FIRST, GROUPS, group_of, parsed
from burnish.bench.command import COMMANDS as BENCH
from burnish.model.errors import InputError
from faults import check_of, control, faults_of
from planted import plant

NAN, INF = float("nan"), float("inf")
MODULES = {name: module for name, (module, _, _) in COMMANDS.items() if name != "bench"}  # it has its own
EVERY = [*MODULES, "bench", *(f"bench {name}" for name in BENCH)]
POSITIONALS = {"ops", "adapters", "tasks", "arguments", "folder"}  # of `bench` and `report`
UNBOUNDED = {"reward_weights"}  # of any sign, one a reward function
ELSEWHERE = {
    "right_at",
    "k",
}  # of `evaluate`: a reward, which may be any number; several numbers, each looked at


def config_of(command: str) -> Any:
    command, _, name = command.partition(" ")
    if command == "bench":
        return importlib.import_module(f"burnish.bench.{BENCH[name][0] if name else 'ops.speed'}").Config
    return importlib.import_module(MODULES[command]).Config


def is_number(hint: Any) -> bool:
    return hint in (int, float) or any(map(is_number, get_args(hint)))


def without_help(config: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config)} - {*helps(config)}


def without_bounds(config: Any) -> set[str]:
    hints = get_type_hints(config)
    numbers = {name for name, hint in hints.items() if is_number(hint)}
    return numbers - {*bounds(config)} - UNBOUNDED - ELSEWHERE


class Page(io.StringIO):
    encoding = "utf-8"  # tyro draws boxes


@cache
def page_of(command: str, columns: int = 80) -> str:
    """Return what `burnish COMMAND --help` prints on a terminal of this width."""
    page = Page()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(page):
        patch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as stop:
            main([*command.split(), "--help"])
    assert stop.value.code == 0
    return page.getvalue()


def groups_in(printed: str) -> dict[str, list[str]]:
    """Return the flags by group, as --help lists them. The group of those that come first is "options"."""
    groups: dict[str, list[str]] = {}
    for line in printed.splitlines():
        if found := re.match(r"╭─ ([\w ]+) ─", line):
            groups[found[1].removesuffix(" options")] = flags = []
        elif found := re.match(r"│ --([a-z][\w-]*)", line):
            flags.append(found[1].replace("-", "_"))
    return groups


@pytest.mark.parametrize("command", EVERY)
def test_every_flag_of_every_command_has_its_help(command):
    config = config_of(command)
    assert not without_help(config)
    page = page_of(command)
    lines = [line for line in page.splitlines() if not line.startswith("usage: ")]
    assert not [line for line in lines if len(line) > 80 or re.fullmatch("│ *│", line)]

    printed = " ".join(re.sub("[│╭╰─╮╯]", " ", page).split())
    for name, text in helps(config).items():
        flag = f" --{name.replace('_', '-')}" if name not in POSITIONALS else f"{name.upper()} "
        assert flag in printed, name
        words = re.sub(r" \(default: .*\)$", "", text)  # may be replaced by another default
        assert "".join(words.split()) in printed.replace(" ", ""), f"{name}: {text}"
    for ugly in ("{None}", "--no-", "(default: )", "(default: None)", "e-0"):
        assert ugly not in printed


@pytest.mark.parametrize("command", EVERY)
def test_every_flag_stands_in_its_group(command):
    config = config_of(command)
    groups = groups_in(page_of(command))
    names = [field.name for field in dataclasses.fields(config) if field.name not in POSITIONALS]
    assert sorted(name for flags in groups.values() for name in flags) == sorted([*names, "config"])
    assert [group for group in groups if group in GROUPS] == [group for group in GROUPS if group in groups]

    first = [name for name in (*FIRST, "config") if name in [*names, "config"]]
    assert groups["options"][: len(first)] == first
    for group, flags in groups.items():
        for name in flags:
            if name not in first:
                assert (group_of(config, name) or "options") == group, name


def test_the_groups_are_those_that_a_user_would_look_in():
    groups = groups_in(page_of("grpo"))
    assert list(groups) == ["options", *GROUPS]
    expected = {
        "objective": ["loss", "kl_coefficient", "clip_high", "reward", "advantage"],
        "data": ["chat_template", "row_template"],
        "sampling": ["group_size", "temperature", "top_p", "max_new_tokens", "prompts_per_step"],
        "optimizer": ["steps", "learning_rate", "schedule"],
        "adapter": ["lora_rank", "base_4bit"],
        "evaluation": ["eval_data", "patience"],
        "run": ["device", "resume", "save_every", "seed"],
    }
    assert all({*flags} <= {*groups[group]} for group, flags in expected.items())
    assert {"batch_size", "max_length"} <= {*groups_in(page_of("sft"))["data"]}
    merge = groups_in(page_of("merge"))
    assert merge == {"options": ["model", "output", "config", "dtype", "base"]}


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["sft", "--modle", "x"], "burnish sft: --modle: no such flag; did you mean --model? "),
        (
            ["sft", "--lerning_rate=1"],
            "burnish sft: --lerning_rate: no such flag; did you mean --learning-rate",
        ),
        (["sft", "--no-resum"], "burnish sft: --no-resum: no such flag; did you mean --no-resume? "),
        (["bench", "tune", "--serch"], "burnish bench tune: --serch: no such flag; did you mean --search? "),
        (["merge", "--qqqq"], "burnish merge: --qqqq: no such flag; burnish merge --help lists all flags"),
        (["sft", "--steps", "many"], "burnish sft: --steps: expected a whole number, got many"),
        (["sft", "--lora-alpha=x"], "burnish sft: --lora-alpha: expected a number, got x"),
        (["grpo", "--reward-weights", "1", "x"], "burnish grpo: --reward-weights: expected a number, got x"),
        (
            ["sft", "--schedule", "line"],
            "burnish sft: --schedule: expected one of constant, linear, cosine, got line",
        ),
        (["sfft"], "burnish: no command 'sfft'; did you mean sft?"),
        (["qqqq"], "burnish: no command 'qqqq'\n"),
    ],
)
def test_a_wrong_flag_or_command_names_the_nearest(words, sentence, capsys):
    try:
        status = main(words)
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and capsys.readouterr().err.startswith(sentence)


def test_a_wrong_command_of_bench_names_the_nearest(capsys):
    assert main(["bench", "staitc"]) == 1
    assert "staitc: no command or op of this name; did you mean static?" in capsys.readouterr().err
    assert main(["bench", "rms_nrom"]) == 1  # nearer to an op
    assert "op: expected one of --list, such as rms_norm" in capsys.readouterr().err


def test_a_switch_can_be_switched_off():
    module = importlib.import_module(MODULES["sft"])
    words = ["--model", "m", "--data", "d"]
    assert parsed("sft", module, [*words, "--resume"]).resume
    assert not parsed("sft", module, [*words, "--resume", "--no-resume"]).resume


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
