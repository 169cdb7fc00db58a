"""Reward functions from a user's file, called as TRL calls them:

    def f(prompts, completions, completion_ids, **columns) -> list[float | None]

prompts and completions are text (or message lists where the row's prompt is one), completion_ids lists of token ids,
columns the row's other columns, each a list with one entry a completion. None: this function does not judge that one.
"""

import copy
import importlib
import importlib.util
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..model.checkpoint import has_score, load_scalar_model
from ..model.errors import InputError
from ..model.scalar import ScalarModel
from ..model.tokenizer import Tokenizer
from ._distributed import host
from ._loop import check_tokenizer

RewardFunction = Callable[..., Sequence[float | None]]


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
        message = f"--{flag} {specification}: {source} cannot be imported: {type(error).__name__}: {error}"
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


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function takes an argument of this name, by name or by **kwargs."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some of Python's own have no signature
        return True
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return any(p.kind == p.VAR_KEYWORD or (p.name == name and p.kind in named) for p in parameters)


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


def _number(value: Any) -> float | None:
    """A reward as fp32 holds it, NaN for None; None where it is no finite number. numpy's and torch's numbers count."""
    if value is None:
        return float("nan")
    value = value.item() if hasattr(value, "item") else value
    try:
        number = float(value) if isinstance(value, numbers.Real) else math.nan
    except OverflowError:  # an int beyond fp64
        return None
    return number if abs(number) <= torch.finfo(torch.float32).max else None


def judge(
    functions: dict[str, RewardFunction],
    weights: Sequence[float],
    prompts: list,
    completions: list,
    completion_ids: list[list[int]],
    columns: dict[str, list],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the weighted sum (samples,) and each function's own rewards (samples,), fp32, NaN for None.

    A sample's sum is over the functions that judged it, NaN where none did. Raises InputError naming the function that
    raised, returned the wrong count, or returned something that is not a finite number.
    """
    parts: dict[str, Tensor] = {}
    for name, function in functions.items():
        given = copy.deepcopy(
            (prompts, completions, completion_ids, columns)
        )  # what a function edits is its own
        try:
            values = list(
                function(prompts=given[0], completions=given[1], completion_ids=given[2], **given[3])
            )
        except (Exception, SystemExit) as error:
            raise InputError(f"reward {name} raised {type(error).__name__}: {error}") from error
        if len(values) != len(completions):
            raise InputError(
                f"reward {name}: expected {len(completions)} rewards, one a completion, got {len(values)}"
            )
        rewards = [_number(value) for value in values]
        if None in rewards:
            i = rewards.index(None)
            raise InputError(
                f"reward {name}: expected a finite number or None for completion {i}, got {values[i]!r}"
            )
        parts[name] = torch.tensor(rewards)
    stacked = torch.stack([weight * part for weight, part in zip(weights, parts.values(), strict=True)])
    total = stacked.nansum(dim=0).masked_fill(stacked.isnan().all(dim=0), float("nan"))
    return total, parts
