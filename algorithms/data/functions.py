"""Users' functions of completions: what they are given, what they may log, and what they may return.

    def f(prompts, completions, completion_ids, trainer_state, log_metric, log_extra, **columns) -> list[float | None]

as TRL calls them: prompts and completions are text (or message lists where the row's prompt is one), completion_ids
lists of token ids, columns the row's other columns, each a list with one entry a completion. None: this function does
not judge that one. trainer_state is a `TrainerState`; log_metric(name, value) and log_extra(column, values) note a
number of the step and a value a completion. `environments` is None: nothing here has any yet, and where TRL has none it
passes none. A function may be async, and may leave out any argument; with **kwargs it gets them all.

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

DEPTH = 20  # of lists in lists and tuples in tuples, beyond which a value is its text, and no answer
Parameters = Mapping[str, inspect.Parameter]
TOOLS = ("trainer_state", "log_metric", "log_extra")


@dataclass
class TrainerState:
    """The fields known here of transformers' class of this name."""

    global_step: int = 0  # steps done before this one
    max_steps: int = 0
    epoch: float = 0.0
    num_train_epochs: int = 1
    logging_steps: int = 1
    save_steps: int = 0
    is_world_process_zero: bool = field(default_factory=lambda: rank() == 0)
    is_local_process_zero: bool = field(default_factory=lambda: os.environ.get("LOCAL_RANK", "0") == "0")


class Samples(NamedTuple):
    """Completions that functions are asked about, one entry each."""

    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]


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


def _parameters(function: Callable[..., Any]) -> Parameters | None:
    """Those of the function that functools.wraps names, where the wrapper passes all on."""
    outer = _outer_parameters(function)
    return _outer_parameters(function, follow_wrapped=True) if outer and _takes_all(outer) else outer


def _outer_parameters(function: Callable[..., Any], follow_wrapped: bool = False) -> Parameters | None:
    try:
        return inspect.signature(function, follow_wrapped=follow_wrapped).parameters
    except KeyboardInterrupt:
        raise
    except BaseException:  # a builtin, or a __signature__ that is none
        return None


def _takes_all(parameters: Parameters) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def arguments_for(
    label: str, function: Callable[..., Any], samples: Samples, tools: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments that the function takes of all that there is; samples are a copy of its own, which it may edit.

    Raises InputError where it needs what there is not.
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
    outer = _outer_parameters(function) or {}  # what a wrapper passes on may be what it adds
    for parameter in (parameter for parameter in needed if parameter.name in outer):
        if parameter.kind is parameter.POSITIONAL_ONLY or parameter.name not in taken:
            _check_needed(label, parameter, samples)

    return {
        name: value if name in tools else copy.deepcopy(value)
        for name, value in taken.items()  # what a function edits is its own
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


# ---- what they log


class Log:
    """Numbers and values that the functions of one batch log, each through tools that know its name.

    count: completions of the batch, for each of which log_extra wants a value.
    """

    def __init__(self, count: int):
        self.count = count
        self.metrics: dict[str, list[float]] = {}
        self.extras: dict[str, list[Any]] = {}
        self.owners: dict[str, str] = {}  # of the extras

    def tools(self, label: str, state: TrainerState) -> dict[str, Any]:
        """The arguments TOOLS of one function."""

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


# ---- what they return


def _item(value: Any) -> Any:
    """Python's own number or value for one of numpy's or torch's."""
    try:
        return value.item() if hasattr(value, "item") else value
    except PASSES:
        raise
    except BaseException:  # of several elements
        return value


def _real(value: Any) -> float | None:
    """The number as fp64; None where it is no number, infinite where it is too large."""
    value = _item(value)
    if not isinstance(value, numbers.Real | Decimal):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def read_reward(value: Any) -> float:
    """A reward as fp32 holds it, NaN for None. Raises ValueError where it is no finite number."""
    if value is None:
        return math.nan
    number = _real(value)
    if number is None or not abs(number) <= torch.finfo(torch.float32).max:
        raise ValueError
    return number


def read_answer(value: Any, depth: int = DEPTH) -> Any:
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
        return tuple(read_answer(entry, depth - 1) for entry in value)
    raise ValueError


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
