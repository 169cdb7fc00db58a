"""The order of rows over epochs, and the steps that a number of epochs takes."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

import torch

from .flags import TrainingFlags

Flags = TypeVar("Flags", bound=TrainingFlags)


def with_steps(cfg: Flags, rows: int) -> Flags:
    """Return the flags with --steps set to the number of steps that --epochs takes, if it is given.

    rows: the number of rows of --data.
    """
    if cfg.epochs is None:
        return cfg
    return replace(cfg, steps=max(1, math.ceil(cfg.epochs * rows / cfg.rows_per_step)))


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
