"""Reward functions from a user's file, called as TRL calls them:

    def f(prompts, completions, completion_ids, **columns) -> list[float | None]

prompts and completions are text (or message lists where the row's prompt is one), completion_ids lists of token ids,
columns the row's other columns, each a list with one entry a completion. None: this function does not judge that one.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..model.errors import InputError

RewardFunction = Callable[..., Sequence[float | None]]


def load_reward(specification: str) -> RewardFunction:
    """FILE.py:function, or package.module:function."""
    source, _, name = specification.rpartition(":")
    if not source:
        raise InputError(f"--reward {specification}: expected FILE.py:function or package.module:function")
    try:
        if source.endswith(".py"):
            if not Path(source).is_file():
                raise InputError(f"--reward {specification}: no file {source}")
            spec = importlib.util.spec_from_file_location(Path(source).stem, source)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
    except (ImportError, SyntaxError, NameError) as error:
        raise InputError(f"--reward {specification}: {source} cannot be imported: {error}") from error
    function: RewardFunction | None = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"--reward {specification}: {source} has no function '{name}'")
    return function


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
        try:
            values = list(
                function(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
            )
        except Exception as error:  # whatever a user's function raises is the user's to read
            raise InputError(f"reward {name} raised {type(error).__name__}: {error}") from error
        if len(values) != len(completions):
            raise InputError(
                f"reward {name}: expected {len(completions)} rewards, one a completion, got {len(values)}"
            )
        for i, value in enumerate(values):
            if value is not None and not (isinstance(value, int | float) and abs(value) < float("inf")):
                raise InputError(
                    f"reward {name}: expected a finite number or None for completion {i}, got {value!r}"
                )
        parts[name] = torch.tensor([float("nan") if value is None else float(value) for value in values])
    stacked = torch.stack([weight * part for weight, part in zip(weights, parts.values(), strict=True)])
    total = stacked.nansum(dim=0).masked_fill(stacked.isnan().all(dim=0), float("nan"))
    return total, parts
