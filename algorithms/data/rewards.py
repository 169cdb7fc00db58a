"""Reward functions from a user's file, called as TRL calls them:

    def f(prompts, completions, completion_ids, trainer_state, log_metric, log_extra, **columns) -> list[float | None]

prompts and completions are text (or message lists where the row's prompt is one), completion_ids lists of token ids,
columns the row's other columns, each a list with one entry a completion. None: this function does not judge that one.
trainer_state is a `TrainerState`; log_metric(name, value) and log_extra(column, values) note a number of the step and a
value a completion. `environments` is None: nothing here has any yet, and where TRL has none it passes none. A function
may be async, and may leave out any argument; with **kwargs it gets them all.

Source: TRL 1.16.0, trainer/grpo_trainer.py: _calculate_rewards, _log_metric, _log_completion_extra
"""

import copy
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import numbers
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...model.checkpoint import has_score, load_scalar_model
from ...model.errors import InputError
from ...model.scalar import ScalarModel
from ...model.text.tokenizer import Tokenizer
from ..run.calls import PASSES, Call, brief, described, results, shown
from ..run.loop import check_model, check_tokenizer
from ..run.processes import gathered, host, rank, world
from .ids import Item

ANSWER = "--answer"
NOTHING = "None for every sample: it has judged nothing"
DEPTH = 20  # of lists in lists and tuples in tuples, beyond which a value is its text, and no answer

# of a list of rewards, None for what it does not judge, or of an awaitable of one
RewardFunction = Callable[..., Any]


@dataclass
class TrainerState:
    """What is known here of transformers' class of this name."""

    global_step: int = 0  # steps done before this one
    max_steps: int = 0
    epoch: float = 0.0
    num_train_epochs: int = 1
    logging_steps: int = 1
    save_steps: int = 0
    is_world_process_zero: bool = field(default_factory=lambda: rank() == 0)
    is_local_process_zero: bool = field(default_factory=lambda: os.environ.get("LOCAL_RANK", "0") == "0")


@dataclass
class Rewards:
    """Reward functions with their weights, and what a step of training adds to them."""

    functions: dict[str, RewardFunction]
    weights: tuple[float, ...]
    timeout: float | None = None  # seconds a call
    state: TrainerState = field(default_factory=TrainerState)
    logged: dict[str, list[float]] = field(default_factory=dict)  # by log_metric, of all processes

    def labelled(self) -> list[tuple[str, RewardFunction]]:
        """The functions with what messages call them."""
        return [(f"reward {brief(name, 100)}", function) for name, function in self.functions.items()]

    def check(self, columns: Iterable[str], answer: Callable[..., Any] | None = None) -> None:
        """Raises InputError where a function, or that of --answer, needs what is no column of the data."""
        for label, function in self.labelled() + ([(ANSWER, answer)] if answer else []):
            _arguments(label, function, Samples([], [], [], {name: [] for name in columns}), {})

    def begin(self, cfg: Any, step: int, draws: int, num_prompts: int) -> None:
        """A step, of which nothing is logged yet. draws: batches of prompts before it."""
        batches = math.ceil(num_prompts / cfg.prompts_per_step)  # in an epoch
        epoch, num_epochs = draws / batches, math.ceil(cfg.steps / batches)
        self.state = TrainerState(step, cfg.steps, epoch, num_epochs, save_steps=cfg.save_every)
        self.logged = {}

    def add(self, logged: Mapping[str, list[float]]) -> None:
        for name, values in logged.items():
            self.logged.setdefault(name, []).extend(values)

    def metrics(self) -> dict[str, float]:
        """The step's metric/<name>: means over the calls of log_metric, those that are not finite left out."""
        return {f"metric/{name}": _mean(values) for name, values in self.logged.items()}

    def count(self, values: dict[str, float], parts: Mapping[str, Tensor], scores: Tensor) -> None:
        """Add a step to the counts of a run, which its checkpoints keep; one that began without "varied" has none.

        parts: each function's own, (samples,). scores: (groups, samples of each), NaN where a sample is left out.
        """
        if "varied" not in values:
            return
        for name, part in parts.items():
            values[f"judged/{name}"] = values.get(f"judged/{name}", 0) + int((~part.isnan()).sum())
        high, low = scores.nan_to_num(-math.inf).amax(1), scores.nan_to_num(math.inf).amin(1)  # (groups,)
        values["varied"] += int((high > low).sum())
        if (high >= low).any():
            values["lowest"] = min(values.get("lowest", math.inf), low.min().item())
            values["highest"] = max(values.get("highest", -math.inf), high.max().item())

    def say_what_taught_nothing(
        self, values: Mapping[str, float], *, in_groups: bool, among: str = ""
    ) -> None:
        """Print at the end of a run which functions never judged, and where the rewards never differed.

        in_groups: a sample is compared with those of its group, otherwise with all. among: which samples counted.
        """
        if "varied" not in values:
            return
        judged = {name: values.get(f"judged/{name}", 0) for name in self.functions}
        if judged and not any(judged.values()):
            print("every reward was None: the rewards taught nothing")
            return
        for name in (name for name, count in judged.items() if not count):
            print(f"reward {brief(name, 100)}: {NOTHING}")
        if in_groups and not values["varied"]:
            print(f"no group's rewards ever differed{among}: the rewards taught nothing")
        elif not in_groups and values["lowest"] == values["highest"]:
            print(f"every sample of the run scored {values['lowest']:g}: the rewards taught nothing")


class Samples(NamedTuple):
    """What functions are asked about, one entry a completion."""

    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]


class Judgement(NamedTuple):
    total: Tensor  # (samples,) fp32, the weighted sum; NaN where no reward function judged
    parts: dict[str, Tensor]  # each function's own, (samples,)
    logged: dict[str, list[float]]  # by log_metric
    extras: dict[str, list[Any]]  # by log_extra, one a completion


# ---- functions from files


def load_reward(specification: str, flag: str = "reward") -> RewardFunction:
    """FILE.py:function, or package.module:function. flag: what a message names."""
    source, _, name = specification.rpartition(":")
    given, file = f"--{flag} {brief(specification, 200)}", brief(source, 100)
    if not source:
        raise InputError(f"{given}: expected FILE.py:function or package.module:function")
    if source.endswith(".py") and not os.path.isfile(source):  # Path's raises where a name is too long
        raise InputError(f"{given}: no file {file}")
    try:
        module = _load_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
        function: RewardFunction | None = getattr(module, name, None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a user's file raises is the user's to read
        raise InputError(f"{given}: {file} cannot be imported: {described(error)}") from error
    if not callable(function):
        raise InputError(f"{given}: {file} has no function '{brief(name, 60)}'")
    return function


def _load_file(path: Path) -> ModuleType:
    """The module of a .py file, which may import the modules beside it."""
    spec = importlib.util.spec_from_file_location(f"reward_from_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    sys.path.append(str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


def load_rewards(specifications: Sequence[str]) -> dict[str, RewardFunction]:
    """By function name, or by whole specification where two functions share one."""
    if not specifications:
        raise InputError("--reward: expected at least one FILE.py:function, got none")
    names = [specification.rpartition(":")[2] for specification in specifications]
    return {
        name if names.count(name) == 1 else specification: load_reward(specification)
        for name, specification in zip(names, specifications, strict=True)
    }


def check_weights(weights: Sequence[float], count: int) -> tuple[float, ...]:
    """The weights of `count` reward functions, all 1 where none are given."""
    if weights and len(weights) != count:
        raise InputError(f"--reward-weights: expected {count}, one a reward function, got {len(weights)}")
    if not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"--reward-weights: expected finite numbers, got {weights}")
    return tuple(weights) or (1.0,) * count


def weighted_rewards(cfg: Any, functions: dict[str, RewardFunction]) -> Rewards:
    """The functions as the flags have them: --reward-weights, --reward-timeout."""
    return Rewards(functions, check_weights(cfg.reward_weights, len(functions)), cfg.reward_timeout)


def load_reward_model(cfg: Any, tokenizer: Tokenizer, prompts: Sequence[Item]) -> ScalarModel:
    """That of --reward-model, frozen; no id is drawn from then on that it has no row for.

    Raises InputError where it has no score head, another tokenizer than the policy's, or no row for a prompt's id.
    """
    folder = cfg.reward_model
    if not has_score(folder):
        raise InputError(
            f"--reward-model {folder}: expected a reward model (burnish reward), got a model without a score"
        )
    check_tokenizer(folder, tokenizer, "reward-model")
    dtype = torch.bfloat16 if cfg.device.startswith("cuda") else torch.float32
    model = load_scalar_model(folder, dtype, host(cfg.device)).requires_grad_(False).eval()
    check_model(model, tokenizer, prompts, 0, f"--reward-model {folder}")
    return model


def overlong_punishment(max_length: int, buffer: int) -> RewardFunction:
    """DAPO's soft punishment of long answers, a reward function: 0 up to max_length - buffer tokens, then down to -1.

    Source: https://arxiv.org/abs/2503.14476, eq. 13
    """

    def punishment(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [max(-1.0, min(0.0, (max_length - buffer - len(ids)) / buffer)) for ids in completion_ids]

    return punishment


# ---- their arguments


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether the function takes an argument of that name, by name or by **kwargs; True where it has no signature."""
    parameters = _parameters(function)
    if parameters is None or _takes_all(parameters):
        return True
    return name in parameters and parameters[name].kind in (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )


Parameters = Mapping[str, inspect.Parameter]


def _parameters(function: Callable[..., Any]) -> Parameters | None:
    """Those of the function that functools.wraps names, where the wrapper passes all on."""
    own = _own_parameters(function)
    return _own_parameters(function, follow_wrapped=True) if own and _takes_all(own) else own


def _own_parameters(function: Callable[..., Any], follow_wrapped: bool = False) -> Parameters | None:
    try:
        return inspect.signature(function, follow_wrapped=follow_wrapped).parameters
    except KeyboardInterrupt:
        raise
    except BaseException:  # a builtin, or a __signature__ that is none
        return None


def _takes_all(parameters: Parameters) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _arguments(
    label: str, function: Callable[..., Any], samples: Samples, tools: Mapping[str, Any]
) -> dict[str, Any]:
    """What the function takes of all that there is; samples are its own copy, which it may edit."""
    offered = {"prompts": samples.prompts, "completions": samples.completions}
    given = {**samples.columns, **offered, "completion_ids": samples.completion_ids, **tools}
    given = {name: value for name, value in given.items() if takes(function, name)}
    needed = [
        parameter
        for parameter in (_parameters(function) or {}).values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in TOOLS
    ]
    for parameter in needed:
        if parameter.name == "environments":
            given["environments"] = None
    own = _own_parameters(function) or {}  # what a wrapper passes on may be what it adds
    for parameter in (parameter for parameter in needed if parameter.name in own):
        if parameter.kind is parameter.POSITIONAL_ONLY or parameter.name not in given:
            _check_needed(label, parameter, samples)
    return {
        name: value if name in tools else copy.deepcopy(value)
        for name, value in given.items()  # what a function edits is its own
    }


def _check_needed(label: str, parameter: inspect.Parameter, samples: Samples) -> None:
    """Raises InputError where the function needs what it is not given."""
    name = brief(parameter.name, 60)
    if parameter.kind is parameter.POSITIONAL_ONLY:
        raise InputError(f"{label}: expected to be called by name, got '{name}' by position only")
    if name in ("prompt", "completion"):
        raise InputError(f"{label}: expected '{name}s', as the {name}s of all samples arrive, got '{name}'")
    columns = brief(", ".join(samples.columns), 200) or "no column"
    raise InputError(f"{label}: expected a column '{name}', which it takes; the data has {columns}")


TOOLS = ("trainer_state", "log_metric", "log_extra")


class _Log:
    """What the functions of one batch log, each through tools that know its name."""

    def __init__(self, count: int):
        self.count = count
        self.metrics: dict[str, list[float]] = {}
        self.extras: dict[str, list[Any]] = {}
        self.owners: dict[str, str] = {}  # of the extras

    def tools(self, label: str, state: TrainerState) -> dict[str, Any]:
        def log_metric(name: str, value: float) -> None:
            name = _name(f"{label}: log_metric", name)
            number = _real(value)
            if number is None:
                raise InputError(f"{label}: log_metric: expected a number as '{name}', got {shown(value)}")
            self.metrics.setdefault(name, []).append(number)

        def log_extra(column: str, values: Sequence[Any]) -> None:
            column = _name(f"{label}: log_extra", column)
            if self.owners.setdefault(column, label) != label:
                raise InputError(
                    f"{label}: log_extra: column '{column}' is that of {self.owners[column]}: expected another"
                )
            if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
                raise InputError(f"{label}: log_extra: expected a list as '{column}', got {shown(values)}")
            entries = self.extras.setdefault(column, [])  # a function may pass them piece by piece
            room = self.count + 1 - len(entries)  # an iterator may have no end
            entries.extend(plain(value) for value in itertools.islice(values, max(room, 0)))

        return dict(zip(TOOLS, (replace(state), log_metric, log_extra), strict=True))

    def check(self) -> None:
        """Raises InputError where a column has not one value a completion."""
        for column, values in self.extras.items():
            if len(values) != self.count:
                got = len(values) if len(values) < self.count else f"more than {self.count}"
                raise InputError(
                    f"{self.owners[column]}: log_extra: expected {self.count} values as '{column}', "
                    f"one a completion, got {got}"
                )


def _name(where: str, name: Any) -> str:
    if not isinstance(name, str) or not 1 <= len(name) <= 100 or not name.isprintable():
        raise InputError(f"{where}: expected a name of 1 to 100 printable characters, got {shown(name)}")
    return str.__str__(name)


# ---- their results


def _item(value: Any) -> Any:
    """A number or a value of numpy's or torch's as Python's own."""
    try:
        return value.item() if hasattr(value, "item") else value
    except PASSES:
        raise
    except BaseException:  # of several elements
        return value


def _real(value: Any) -> float | None:
    """None where it is no number, infinite where it is beyond fp64."""
    value = _item(value)
    if not isinstance(value, numbers.Real | Decimal):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _reward(value: Any) -> float:
    """A reward as fp32 holds it, NaN for None. Raises ValueError where it is no finite number."""
    if value is None:
        return math.nan
    number = _real(value)
    if number is None or not abs(number) <= torch.finfo(torch.float32).max:
        raise ValueError
    return number


def _answer(value: Any, depth: int = DEPTH) -> Any:
    """Text, a number, or a tuple of these, of Python's own types, so that all can be compared. Raises ValueError."""
    value = _item(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, numbers.Real | Decimal):
        return float(value)
    if isinstance(value, tuple) and depth:
        return tuple(_answer(entry, depth - 1) for entry in value)
    raise ValueError


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    mean = sum(finite) / len(finite) if finite else math.nan
    return mean if math.isfinite(mean) else math.nan


def plain(value: Any, depth: int = DEPTH) -> Any:
    """The value in JSON's types: arrays and other sequences are lists, what JSON does not know is its text."""
    try:
        return _plain(value, depth)
    except PASSES:
        raise
    except BaseException:  # of a user's object, or an int of too many digits
        return shown(value)


def _plain(value: Any, depth: int) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(str(int.__int__(value)))
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if not depth:
        return shown(value)
    if isinstance(value, Mapping):
        return {str(key): plain(entry, depth - 1) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry, depth - 1) for entry in value]
    return str.__str__(str(value))


def judge(rewards: Rewards, samples: Samples) -> Judgement:
    """Returns each function's rewards, NaN for None, and their weighted sum.

    A sample's sum is over the functions that judged it, NaN where none did. Raises InputError naming the function that
    raised, was not done in time, or returned anything else than one finite number or None a completion.
    """
    count, log = len(samples.completions), _Log(len(samples.completions))
    calls = [
        Call(
            label,
            function,
            _arguments(label, function, samples, log.tools(label, rewards.state)),
            "rewards",
            count,
            _reward,
            "a finite number or None",
        )
        for label, function in rewards.labelled()
    ]
    found = zip(rewards.functions, results(calls, rewards.timeout), strict=True)
    parts = {name: torch.tensor(values, dtype=torch.float32) for name, values in found}
    log.check()
    stacked = torch.stack(
        [weight * part for weight, part in zip(rewards.weights, parts.values(), strict=True)]
    )
    total = stacked.nansum(dim=0).masked_fill(stacked.isnan().all(dim=0), float("nan"))
    return Judgement(total, parts, log.metrics, log.extras)


def unjudged(rewards: Rewards, count: int) -> Judgement:
    """The judgement of no function, or of no sample: all rewards are 0."""
    return Judgement(torch.zeros(count), {name: torch.zeros(count) for name in rewards.functions}, {}, {})


def of_all_processes(own: Judgement) -> Judgement:
    """The judgement of the samples of all, in their order. None stands where a process has not logged a column."""
    if world() == 1:
        return own
    logged = json.dumps([own.logged, own.extras]).encode()
    told = gathered(
        {
            "rewards": torch.stack([own.total, *own.parts.values()]),
            "logged": torch.frombuffer(bytearray(logged), dtype=torch.uint8),
        }
    )
    total, *parts = torch.cat([said["rewards"] for said in told], 1)  # (samples,)
    logs = [json.loads(said["logged"].numpy().tobytes()) for said in told]
    counts = [said["rewards"].shape[1] for said in told]
    metrics = {
        name: [value for one, _ in logs for value in one.get(name, [])] for one, _ in logs for name in one
    }
    extras = {
        column: [
            value
            for (_, one), count in zip(logs, counts, strict=True)
            for value in one.get(column, [None] * count)
        ]
        for _, one in logs
        for column in one
    }
    return Judgement(total, dict(zip(own.parts, parts, strict=True)), metrics, extras)


def answers(
    function: Callable[..., Any], rewards: Rewards, samples: Samples
) -> tuple[list[Any], dict[str, list[Any]]]:
    """Each completion's answer, which --answer's function gives, None for none; and what it logs by log_extra.

    Answers are compared, so they are text, numbers, or tuples of these. Raises InputError as `judge` does.
    """
    log = _Log(len(samples.completions))
    arguments = _arguments(ANSWER, function, samples, log.tools(ANSWER, rewards.state))
    call = Call(ANSWER, function, arguments, "answers", log.count, _answer, "text, a number, a tuple or None")
    (found,) = results([call], rewards.timeout)
    log.check()
    rewards.add(log.metrics)
    # NaN equals nothing, itself included, so it is no answer
    return [None if isinstance(value, float) and math.isnan(value) else value for value in found], log.extras
