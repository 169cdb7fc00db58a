"""The interface of users' reward and answer functions: their arguments, their log calls, and their return values.

    def f(prompts, completions, completion_ids, trainer_state, log_metric, log_extra, **columns) -> list[float | None]

The arguments are those of TRL. The first three entries below are lists with one item per completion:

    prompts, completions        texts, or lists of messages if the row's prompt is a list of messages
    completion_ids              token ids
    columns                     the other columns of the row, each under its own name
    trainer_state               a `TrainerState`
    log_metric(name, value)     logs a number for the step
    log_extra(column, values)   logs one value per completion

A reward of None means that the function does not judge this completion. `environments` is None, because Burnish has no
environments. A function may be async. It may leave out any argument; with **kwargs it receives all of them.

Source: TRL 1.16.0, trainer/grpo_trainer.py: _calculate_rewards, _log_metric, _log_completion_extra
"""

import copy
import inspect
import itertools
import math
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, NamedTuple

import torch

from ...model.errors import InputError
from ..run.calls import PASSES, brief, shown
from ..run.processes import rank

DEPTH = 20  # nested lists or tuples; a deeper logged value becomes its repr, and a deeper answer is refused
Parameters = Mapping[str, inspect.Parameter]
TOOLS = ("trainer_state", "log_metric", "log_extra")


@dataclass
class TrainerState:
    """The fields of transformers' TrainerState that Burnish sets."""

    global_step: int = 0  # number of completed steps
    max_steps: int = 0
    epoch: float = 0.0
    num_train_epochs: int = 1
    logging_steps: int = 1
    save_steps: int = 0
    is_world_process_zero: bool = field(default_factory=lambda: rank() == 0)
    is_local_process_zero: bool = field(default_factory=lambda: os.environ.get("LOCAL_RANK", "0") == "0")


class Samples(NamedTuple):
    """The completions that functions judge, with their prompts. Each list has one entry per completion."""

    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]


# ---- their arguments


def takes(function: Callable[..., Any], name: str) -> bool:
    """Return whether the function takes an argument of that name, by name or by **kwargs.

    Also return True if the function has no readable signature.
    """
    parameters = _parameters(function)
    if parameters is None or _takes_all(parameters):
        return True
    return name in parameters and parameters[name].kind in (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )


def _parameters(function: Callable[..., Any]) -> Parameters | None:
    """Return the parameters of a function, or None if it has no readable signature.

    A functools.wraps wrapper with **kwargs has the parameters of the function that it wraps.
    """
    outer = _outer_parameters(function)
    return _outer_parameters(function, follow_wrapped=True) if outer and _takes_all(outer) else outer


def _outer_parameters(function: Callable[..., Any], follow_wrapped: bool = False) -> Parameters | None:
    try:
        return inspect.signature(function, follow_wrapped=follow_wrapped).parameters
    except PASSES:
        raise
    except BaseException:  # a builtin, or an invalid __signature__
        return None


def _takes_all(parameters: Parameters) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def arguments_for(
    label: str, function: Callable[..., Any], samples: Samples, tools: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments that the function takes, by name. Samples are copied, so the function may edit them.

    label: the name of the function in messages. tools: the values of trainer_state, log_metric and log_extra.
    Raises InputError if the function requires an argument that is not available.
    """
    offered = {"prompts": samples.prompts, "completions": samples.completions}
    offered = {**samples.columns, **offered, "completion_ids": samples.completion_ids, **tools}
    taken = {name: value for name, value in offered.items() if takes(function, name)}

    needed = [
        parameter
        for parameter in (_parameters(function) or {}).values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in TOOLS
    ]
    if any(parameter.name == "environments" for parameter in needed):
        taken["environments"] = None
    outer = _outer_parameters(function) or {}  # a wrapper may itself add the other arguments
    for parameter in (parameter for parameter in needed if parameter.name in outer):
        if parameter.kind is parameter.POSITIONAL_ONLY or parameter.name not in taken:
            _check_needed(label, parameter, samples)

    return {
        name: value if name in tools else copy.deepcopy(value)
        for name, value in taken.items()  # each function may edit its own copy
    }


def _check_needed(label: str, parameter: inspect.Parameter, samples: Samples) -> None:
    """Raise InputError for a required parameter for which there is no value to pass."""
    name = brief(parameter.name, 60)
    if parameter.kind is parameter.POSITIONAL_ONLY:
        raise InputError(f"{label}: expected arguments passed by name, got '{name}' by position only")
    if name in ("prompt", "completion"):
        raise InputError(f"{label}: expected the argument '{name}s', a list for all samples, got '{name}'")
    columns = brief(", ".join(samples.columns), 200) or "no column"
    raise InputError(f"{label}: expected a column '{name}' for its argument; the data has {columns}")


# ---- what they log


class Log:
    """The numbers and values that the functions log for one batch.

    count: the number of completions in the batch; log_extra takes one value for each completion.
    """

    def __init__(self, count: int):
        self.count = count
        self.metrics: dict[str, list[float]] = {}
        self.extras: dict[str, list[Any]] = {}
        self.owners: dict[str, str] = {}  # the function that logs each column of extras

    def tools(self, label: str, state: TrainerState) -> dict[str, Any]:
        """Return the arguments trainer_state, log_metric and log_extra for the function called `label`."""

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
                    f"{label}: log_extra: expected a new column, got '{column}', which {self.owners[column]} logs"
                )
            if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
                raise InputError(f"{label}: log_extra: expected a list as '{column}', got {shown(values)}")

            entries = self.extras.setdefault(column, [])  # a function may log a column in several calls
            room = self.count + 1 - len(entries)  # the iterator may be infinite
            entries.extend(plain(value) for value in itertools.islice(values, max(room, 0)))

        return dict(zip(TOOLS, (replace(state), log_metric, log_extra), strict=True))

    def check(self) -> None:
        """Raise InputError if a logged column does not have exactly one value per completion."""
        for column, values in self.extras.items():
            if len(values) != self.count:
                got = len(values) if len(values) < self.count else f"more than {self.count}"
                raise InputError(
                    f"{self.owners[column]}: log_extra: expected {self.count} values as '{column}', "
                    f"one per completion, got {got}"
                )


def _name(where: str, name: Any) -> str:
    if not isinstance(name, str) or not 1 <= len(name) <= 100 or not name.isprintable():
        raise InputError(f"{where}: expected a name of 1 to 100 printable characters, got {shown(name)}")
    return str.__str__(name)


# ---- what they return


def _item(value: Any) -> Any:
    """Return a scalar of numpy or torch as a plain Python value. Other values stay as they are."""
    try:
        return value.item() if hasattr(value, "item") else value
    except PASSES:
        raise
    except BaseException:  # an array of several elements
        return value


def _real(value: Any) -> float | None:
    """Return the number as a float: None if the value is not a number, infinity if it is too large."""
    value = _item(value)
    if not isinstance(value, numbers.Real | Decimal):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def read_reward(value: Any) -> float:
    """Return a reward as a float, and NaN for None. Raises ValueError if the value is not a number that fits fp32."""
    if value is None:
        return math.nan
    number = _real(value)
    if number is None or not abs(number) <= torch.finfo(torch.float32).max:
        raise ValueError
    return number


def read_answer(value: Any, depth: int = DEPTH) -> Any:
    """Return an answer in plain Python types, so that answers can be compared.

    Raises ValueError if the value is not None, a text, a number, or a tuple of these.
    """
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
        return tuple(read_answer(entry, depth - 1) for entry in value)
    raise ValueError


def plain(value: Any, depth: int = DEPTH) -> Any:
    """Return the value in JSON's types. Arrays, tuples and sets become lists, and other objects become str(object)."""
    try:
        return _plain(value, depth)
    except PASSES:
        raise
    except BaseException:  # raised by a user's object, or by an int with too many digits
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
