"""Figures of several samples of a prompt, each right or wrong, and how far a mean of such figures can be trusted.

    pass@k       = 1 - C(n - c, k) / C(n, k)             c of n samples are right: the unbiased estimate
    majority     = is the most frequent answer right
    error(mean)  = s(x) / sqrt(m)                        s the standard deviation of x over m prompts, with m - 1
    error(ratio) = s(x - r y) sqrt(m) / sum y            of r = sum x / sum y, to first order

Samples of one prompt are no independent draws of the task: the unit of an error is a prompt, a row or a pair.

Source: pass@k: Chen et al. 2021, https://arxiv.org/abs/2107.03374, eq. 1
        majority: Wang et al. 2022, https://arxiv.org/abs/2203.11171
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb, sqrt
from statistics import stdev


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a right one. k: at most num_samples."""
    return 1 - comb(num_samples - num_right, k) / comb(num_samples, k)


def majority_is_right(answers: Sequence[Hashable | None], right: Sequence[bool]) -> bool:
    """Whether the most frequent answer is right, the earliest of equally frequent ones; None is no answer."""
    votes = Counter(answer for answer in answers if answer is not None)
    return bool(votes) and right[answers.index(votes.most_common(1)[0][0])]


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean of `values`; 0 of one value."""
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0


def standard_error_of_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The standard error of sum(numerators) / sum(denominators), pairs of them being the draws; 0 of one pair."""
    total = sum(denominators)
    ratio = sum(numerators) / total
    residuals = [x - ratio * y for x, y in zip(numerators, denominators, strict=True)]
    return stdev(residuals) * sqrt(len(residuals)) / total if len(residuals) > 1 else 0.0
