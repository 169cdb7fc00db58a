"""One axis of a picture: its range, its ticks, and their labels."""

from collections.abc import Sequence
from math import ceil, floor, log10
from typing import NamedTuple

LOG_SPREAD = 1000.0  # positive values with a larger ratio get a logarithmic axis
MOST_TICKS = 5  # about


class Axis(NamedTuple):
    """An axis. low, high: its ends, as logarithms to base 10 if `log`. ticks: (place from 0 to 1, label)."""

    low: float
    high: float
    log: bool
    ticks: Sequence[tuple[float, str]]

    def place(self, value: float) -> float:
        """Return where a value lies on the axis, from 0 to 1. A value outside is moved to the nearer end."""
        if self.log:
            value = log10(value) if value > 0 else self.low
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


def axis_of(values: Sequence[float], may_be_log: bool = False) -> Axis:
    """Return an axis for values, which may be none at all, one, equal, huge or tiny.

    may_be_log: whether positive values of very different sizes get a logarithmic axis.
    """
    low, high = min(values, default=0.0), max(values, default=1.0)
    usual = (
        sorted(values)[len(values) // 10] if values else low
    )  # without a few tiny ones, as a rate decayed to 0
    if may_be_log and low > 1e-290 and high / LOG_SPREAD > usual:
        return _log_axis(low, high)

    # equal values, up to rounding, stand in the middle
    if high - low <= 1e-12 * max(abs(low), abs(high)) or high - low < 1e-290:
        pad = 0.1 * abs(low) if abs(low) > 1e-280 else 1.0
        low, high = low - pad, high + pad
    return _linear_axis(low, high)


def steps_axis(steps: Sequence[float]) -> Axis:
    """Return an axis for whole numbers, whose ticks are whole numbers."""
    low, high = min(steps, default=0), max(steps, default=1)
    if high - low < 1:
        return Axis(low - 0.5, low + 0.5, False, [(0.5, f"{low:,.0f}")])
    step = max(1.0, _step((high - low) / MOST_TICKS))
    ticks = [i * step for i in range(ceil(low / step), floor(high / step) + 1)]
    labels = [f"{tick:,.0f}" if step < 1000 else _short_count(tick) for tick in ticks]
    places = [(tick - low) / (high - low) for tick in ticks]
    return Axis(low, high, False, [*zip(places, labels, strict=True)])


def _linear_axis(low: float, high: float) -> Axis:
    """Return an axis with a little room above and below the values."""
    step = _step((high - low) / MOST_TICKS)
    pad = 0.04 * (high - low)
    low, high = low - pad, high + pad
    numbers = [i * step for i in range(ceil(low / step), floor(high / step) + 1)]
    places = [(tick - low) / (high - low) for tick in numbers]
    return Axis(low, high, False, [*zip(places, _labels(numbers, step), strict=True)])


def _log_axis(low: float, high: float) -> Axis:
    first, last = floor(log10(low)), ceil(log10(high))
    every = ceil((last - first) / (MOST_TICKS - 1))
    decades = range(first, last + 1, every)
    ticks = [((e - first) / (last - first), f"{10.0**e:g}" if -4 < e < 5 else f"1e{e}") for e in decades]
    return Axis(first, last, True, ticks)


def _step(rough: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** floor(log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))


def _labels(ticks: Sequence[float], step: float) -> list[str]:
    """Return the ticks' texts, with as many digits as tell one from the next."""
    largest, digit = max(abs(tick) for tick in ticks), floor(log10(step) + 1e-9)
    if largest < 999_999.5 and digit >= -4:
        return [f"{tick + 0.0:.{max(0, -digit)}f}" for tick in ticks]
    exponent = floor(log10(largest))
    mantissas = [tick / 10.0**exponent for tick in ticks]
    return [f"{m + 0.0:.{max(0, exponent - digit)}f}e{exponent}" if m else "0" for m in mantissas]


def _short_count(count: float) -> str:
    """Return a multiple of 1,000 as 20k, 1,500k or 3M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count and count % size == 0:
            return f"{count / size:,.0f}{letter}"
    return "0"
