"""The order of rows over epochs, and the steps that a number of epochs takes.

    w = 2       each row comes twice in an epoch
    w = 0.5     half of the rows come in an epoch; no row comes again before all have come
    w = 1.5     each row comes once, and half of them a second time

w is a weight of --data-weights, which holds for the rows of one argument of --data. The rows of all arguments are
shuffled together in each epoch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple, TypeVar

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


class Part(NamedTuple):
    """The rows of one argument of --data. weight: how often each of them comes in an epoch."""

    rows: int
    weight: float = 1.0

    @property
    def share(self) -> int:
        """The number of rows that come once more often than the others in an epoch; they differ in each epoch."""
        fraction = self.weight % 1
        return max(1, round(fraction * self.rows)) if fraction and self.rows else 0

    @property
    def rows_per_epoch(self) -> int:
        return int(self.weight) * self.rows + self.share


Rows = int | Sequence[Part]  # the rows of --data: their number, or their parts


def parts_of(rows: Rows) -> Sequence[Part]:
    return [Part(rows)] if isinstance(rows, int) else rows


def rows_per_epoch(rows: Rows) -> int:
    """Return the number of rows in an epoch. A row that comes twice counts twice."""
    return sum(part.rows_per_epoch for part in parts_of(rows))


def with_steps(cfg: Flags, rows: Rows) -> Flags:
    """Return the flags with --steps set to the number of steps that --epochs takes, if it is given.

    rows: the rows of --data. An epoch ends with a batch of its own, which may be smaller than the others.
    """
    if cfg.epochs is None:
        return cfg
    batches = math.ceil(rows_per_epoch(rows) / cfg.rows_per_step)  # in an epoch
    steps = math.ceil(round(cfg.epochs * batches, 6))  # 0.1 * 30 is above 3 in fp64
    return replace(cfg, steps=max(1, steps))


def epochs(rows: Rows, batch_size: int, seed: int, skip: int = 0) -> Iterator[list[int]]:
    """Yield batches of row indices without end: in each epoch the rows that their weights ask for, in a new order.

    rows: the rows of --data; without weights each comes once per epoch. The last batch of an epoch is smaller if
    batch_size does not divide its rows. skip: the number of batches to leave out at the start, because a resumed run
    has already used them.
    """
    generator = torch.Generator().manual_seed(seed)
    for members in _members(parts_of(rows), seed):
        order = torch.randperm(len(members), generator=generator).tolist()
        for start in range(0, len(order), batch_size):
            if skip:
                skip -= 1
                continue
            yield [members[i] for i in order[start : start + batch_size]]


def _members(parts: Sequence[Part], seed: int) -> Iterator[list[int]]:
    """Yield the row indices of each epoch, unordered."""
    generator = torch.Generator().manual_seed(
        (seed + 0x9E3779B97F4A7C15) % 2**63
    )  # other numbers than the order's
    always: list[int] = []
    shares = []
    first = 0
    for part in parts:
        of_part = range(first, first + part.rows)
        always += [*of_part] * int(part.weight)
        shares.append(_shares(of_part, part.share, generator))
        first += part.rows
    while True:
        yield always + [i for share in shares for i in next(share)]


def _shares(rows: range, count: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield `count` different rows for each epoch. No row comes again before all have come."""
    left: list[int] = []
    while True:
        taken, left = left[:count], left[count:]
        if missing := count - len(taken):
            order = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
            order.sort(key=set(taken).__contains__)  # rows of this epoch come last in the new round
            taken, left = taken + order[:missing], order[missing:]
        yield taken
