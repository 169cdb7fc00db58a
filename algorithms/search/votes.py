"""Statistics of several samples of a prompt, each right or wrong, and standard errors of their means.

    pass@k       = 1 - C(n - c, k) / C(n, k)             c of n samples are right; the unbiased estimate
    majority     = 1 if the most frequent answer is right
    error(mean)  = s(x) / sqrt(m)                        s: standard deviation of x over m prompts, with ddof 1
    error(ratio) = s(x - r y) sqrt(m) / sum y            for r = sum x / sum y, to first order

Samples of one prompt are not independent draws of the task. So the unit of each error is a prompt, a row or a pair.

Source: pass@k: Chen et al. 2021, https://arxiv.org/abs/2107.03374, eq. 1
        majority: Wang et al. 2022, https://arxiv.org/abs/2203.11171
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb, isfinite, nan, sqrt
from statistics import stdev


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the probability that k samples, drawn without replacement, include a right one (k <= num_samples)."""
    return 1 - comb(num_samples - num_right, k) / comb(num_samples, k)


def majority_is_right(answers: Sequence[Hashable | None], right: Sequence[bool]) -> bool:
    """Return whether the most frequent answer is right. None is not counted. On a tie, the earliest answer wins."""
    votes = Counter(answer for answer in answers if answer is not None)
    return bool(votes) and right[answers.index(votes.most_common(1)[0][0])]


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of `values`, or 0 for a single value. NaN if a value is not finite."""
    if not all(map(isfinite, values)):
        return nan
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0


def standard_error_of_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the standard error of sum(numerators) / sum(denominators), or 0 for a single pair.

    The pairs (numerator, denominator) are the independent draws. NaN if a numerator is not finite.
    """
    if not all(map(isfinite, numerators)):
        return nan
    total = sum(denominators)
    ratio = sum(numerators) / total
    residuals = [x - ratio * y for x, y in zip(numerators, denominators, strict=True)]
    return stdev(residuals) * sqrt(len(residuals)) / total if len(residuals) > 1 else 0.0
