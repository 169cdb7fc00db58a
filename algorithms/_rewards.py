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
import json
import math
import numbers
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model.checkpoint import has_score, load_scalar_model
from ..model.errors import InputError
from ..model.scalar import ScalarModel
from ..model.tokenizer import Tokenizer
from ._calls import Call, described, results, shown
from ._distributed import gathered, host, rank
from ._loop import check_tokenizer

# of a list of rewards, None for what it does not judge, or of an awaitable of one
RewardFunction = Callable[..., Any]


@dataclass
class TrainerState:
    """What is known here of transformers' class of this name."""

    global_step: int = 0  # steps done before this one
    max_steps: int = 0
    epoch: float = 0.0
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

    def labelled(self) -> dict[str, RewardFunction]:
        """The functions by what messages call them."""
        return {f"reward {name}": function for name, function in self.functions.items()}

    def check(self, columns: Iterable[str], answer: Callable[..., Any] | None = None) -> None:
        """Raises InputError where a function, or that of --answer, needs what is no column of the data."""
        for label, function in (self.labelled() | ({ANSWER: answer} if answer else {})).items():
            _arguments(label, function, Samples([], [], [], {name: [] for name in columns}), {})

    def begin(self, cfg: Any, step: int, draws: int, num_prompts: int) -> None:
        """A step, of which nothing is logged yet. draws: batches of prompts before it."""
        epoch = draws / math.ceil(num_prompts / cfg.prompts_per_step)
        self.state, self.logged = TrainerState(step, cfg.steps, epoch, save_steps=cfg.save_every), {}

    def add(self, logged: Mapping[str, list[float]]) -> None:
        for name, values in logged.items():
            self.logged.setdefault(name, []).extend(values)

    def metrics(self) -> dict[str, float]:
        """The step's metric/<name>: means over the calls of log_metric, those that are not finite left out."""
        return {f"metric/{name}": _mean(values) for name, values in self.logged.items()}


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
    if not source:
        raise InputError(f"--{flag} {specification}: expected FILE.py:function or package.module:function")
    if source.endswith(".py") and not Path(source).is_file():
        raise InputError(f"--{flag} {specification}: no file {source}")
    try:
        module = _load_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except (Exception, SystemExit) as error:  # whatever a user's file raises is the user's to read
        message = f"--{flag} {specification}: {source} cannot be imported: {described(error)}"
        raise InputError(message) from error
    function: RewardFunction | None = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"--{flag} {specification}: {source} has no function '{name}'")
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


def note_range(values: dict[str, float], scores: Tensor) -> None:
    """Widen a run's lowest and highest score, which its checkpoints keep."""
    values["lowest"] = min(values.get("lowest", math.inf), scores.min().item())
    values["highest"] = max(values.get("highest", -math.inf), scores.max().item())


def say_if_flat(values: dict[str, float]) -> None:
    """Print where all scores of a run were the same."""
    if values.get("lowest", 0) == values.get("highest", 1):
        print(f"every sample of the run scored {values['lowest']:g}: the rewards taught nothing")


def load_reward_model(folder: Path, tokenizer: Tokenizer, device: str) -> ScalarModel:
    """Frozen. Raises InputError where `folder` has no score head, or another tokenizer than the policy's."""
    if not has_score(folder):
        raise InputError(
            f"--reward-model {folder}: expected a reward model (burnish reward), got a model without a score"
        )
    check_tokenizer(folder, tokenizer, "reward-model")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    return load_scalar_model(folder, dtype, host(device)).requires_grad_(False).eval()


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
    if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return True
    return name in parameters and parameters[name].kind in (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    try:
        return inspect.signature(function).parameters
    except (ValueError, TypeError):  # a builtin
        return None


def _arguments(
    label: str, function: Callable[..., Any], samples: Samples, tools: Mapping[str, Any]
) -> dict[str, Any]:
    """What the function takes of all that there is; samples are its own copy, which it may edit."""
    offered = {"prompts": samples.prompts, "completions": samples.completions}
    given = {**samples.columns, **offered, "completion_ids": samples.completion_ids, **tools}
    given = {name: value for name, value in given.items() if takes(function, name)}
    for name, parameter in (_parameters(function) or {}).items():
        if parameter.default is not parameter.empty or name in given or name in TOOLS:
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise InputError(f"{label}: expected to be called by name, got '{name}' by position only")
        if name == "environments":
            given[name] = None
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            columns = ", ".join(samples.columns) or "no column"
            raise InputError(f"{label}: expected a column '{name}', which it takes; the data has {columns}")
    return {
        name: value if name in tools else copy.deepcopy(value)
        for name, value in given.items()  # what a function edits is its own
    }


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
            if not isinstance(name, str):
                raise InputError(f"{label}: log_metric: expected a name, got {shown(name)}")
            number = _real(value)
            if number is None:
                raise InputError(f"{label}: log_metric: expected a number as '{name}', got {shown(value)}")
            self.metrics.setdefault(name, []).append(number)

        def log_extra(column: str, values: Sequence[Any]) -> None:
            if not isinstance(column, str):
                raise InputError(f"{label}: log_extra: expected a column's name, got {shown(column)}")
            if self.owners.setdefault(column, label) != label:
                raise InputError(
                    f"{label}: log_extra: column '{column}' is that of {self.owners[column]}: expected another"
                )
            if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
                raise InputError(f"{label}: log_extra: expected a list as '{column}', got {shown(values)}")
            entries = self.extras.setdefault(column, [])
            entries.extend(plain(value) for value in values)  # a function may pass them piece by piece

        return dict(zip(TOOLS, (state, log_metric, log_extra), strict=True))

    def check(self) -> None:
        """Raises InputError where a column has not one value a completion."""
        for column, values in self.extras.items():
            if len(values) != self.count:
                raise InputError(
                    f"{self.owners[column]}: log_extra: expected {self.count} values as '{column}', "
                    f"one a completion, got {len(values)}"
                )


# ---- their results


def _item(value: Any) -> Any:
    """A number or a value of numpy's or torch's as Python's own."""
    try:
        return value.item() if hasattr(value, "item") else value
    except Exception:  # of several elements
        return value


def _real(value: Any) -> float | None:
    """None where it is no number, infinite where it is beyond fp64."""
    value = _item(value)
    if not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _reward(value: Any) -> float | None:
    """A reward as fp32 holds it, NaN for None; None where it is no finite number."""
    if value is None:
        return math.nan
    number = _real(value)
    return number if number is not None and abs(number) <= torch.finfo(torch.float32).max else None


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    mean = sum(finite) / len(finite) if finite else math.nan
    return mean if math.isfinite(mean) else math.nan


def plain(value: Any) -> Any:
    """The value in JSON's types: arrays and other sequences are lists, what JSON does not know is its text."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    return str(value)


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
        )
        for label, function in rewards.labelled().items()
    ]
    parts: dict[str, Tensor] = {}
    for name, values in zip(rewards.functions, results(calls, rewards.timeout), strict=True):
        numbers = [_reward(value) for value in values]
        if None in numbers:
            i = numbers.index(None)
            raise InputError(
                f"reward {name}: expected a finite number or None for completion {i}, got {shown(values[i])}"
            )
        parts[name] = torch.tensor(numbers, dtype=torch.float32)
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
    logged = json.dumps([own.logged, own.extras]).encode()
    told = gathered(
        {
            "rewards": torch.stack([own.total, *own.parts.values()]),
            "logged": torch.tensor(list(logged), dtype=torch.uint8),
        }
    )
    total, *parts = torch.cat([said["rewards"] for said in told], 1)  # (samples,)
    logs = [json.loads(bytes(said["logged"].tolist())) for said in told]
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
    (values,) = results([Call(ANSWER, function, arguments, "answers", log.count)], rewards.timeout)
    log.check()
    rewards.add(log.metrics)
    found = [_item(value) for value in values]
    for i, value in enumerate(found):
        if not _is_answer(value):
            raise InputError(
                f"{ANSWER}: expected text, a number, a tuple or None for completion {i}, got {shown(value)}"
            )
    # NaN equals nothing, itself included, so it is no answer
    return [None if isinstance(value, float) and math.isnan(value) else value for value in found], log.extras


ANSWER = "--answer"


def _is_answer(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_answer(entry) for entry in value)
    return value is None or isinstance(value, str | int | float)
