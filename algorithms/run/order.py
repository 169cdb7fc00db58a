"""The order of rows over epochs, and the steps that a number of epochs takes."""

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch

from ...model.errors import InputError
from .flags import TrainingFlags

Flags = TypeVar("Flags", bound=TrainingFlags)


def default_of(cfg: TrainingFlags, name: str) -> Any:
    """Return the default of a flag of this method."""
    return next(field.default for field in fields(cfg) if field.name == name)


def check_epochs(cfg: TrainingFlags) -> None:
    """Raise InputError if --epochs and --steps are given together. Only --epochs may then say how long the run is."""
    if cfg.epochs is not None and cfg.steps != default_of(cfg, "steps"):
        raise InputError(
            f"--epochs: expected it in place of --steps, got --steps {cfg.steps} as well: leave one out"
        )


def with_steps(cfg: Flags, rows: int) -> Flags:
    """Return the flags with --steps set to the number of steps that --epochs takes, if it is given.

    rows: the number of rows of --data. An epoch ends with a batch of its own, which may be smaller than the others.
    """
    if cfg.epochs is None:
        return cfg
    batches = math.ceil(rows / cfg.rows_per_step)  # in an epoch
    return replace(
        cfg, steps=max(1, math.ceil(round(cfg.epochs * batches, 6)))
    )  # 0.1 * 30 is above 3 in fp64


def epochs(count: int, batch_size: int, seed: int, skip: int = 0) -> Iterator[list[int]]:
    """Yield batches of the indices 0..count-1 without end: each index once per epoch, in a new order from `seed`.

    The last batch of an epoch is smaller if batch_size does not divide count. skip: the number of batches to leave out
    at the start, because a resumed run has already used them.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, batch_size):
            if skip:
                skip -= 1
                continue
            yield order[start : start + batch_size]
