"""Figures of held-out rows: means with their standard errors, for the evaluation during training.

The unit of each error is an item: a row, a pair, or a prompt with its one sample (votes.py has the formulas).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from ...model.text.tokenizer import Tokenizer
from ...model.transformer import Transformer
from ..data.examples import Prompt
from ..data.groups import Groups, Sampler
from ..data.rewards import Rewards
from ..run.flags import RolloutFlags
from ..run.held_out import Figure, Figures
from .votes import standard_error, standard_error_of_ratio


def mean_figure(values: Tensor) -> Figure:
    """Return the mean of values (items,). If one of them is NaN, so is the mean: the model has diverged there."""
    numbers = values.double().tolist()
    if not numbers:
        return Figure(math.nan, math.nan, 0)
    mean = fmean(numbers) if all(map(math.isfinite, numbers)) else values.double().mean().item()
    return Figure(mean, standard_error(numbers), len(numbers))


def judged_figure(rewards: Tensor) -> Figure:
    """Return the mean of rewards (items,). NaN marks an item that no function has judged, which does not count."""
    return mean_figure(rewards[~rewards.isnan()])


def ratio_figure(numerators: Tensor, denominators: Sequence[int]) -> Figure:
    """Return sum(numerators) / sum(denominators), such as nats a token: both have one number per item."""
    found = numerators.double().tolist()
    error = standard_error_of_ratio(found, denominators)
    return Figure(sum(found) / sum(denominators), error, len(found))


def perplexity_figure(nats: Figure) -> Figure:
    """Return exp of a figure in nats a token. The error is that of the nats, to first order."""
    perplexity = math.exp(min(nats.mean, 700.0))
    return Figure(perplexity, perplexity * nats.error, nats.count)


def pair_figures(chosen: Tensor, rejected: Tensor, prefix: str = "") -> Figures:
    """Return accuracy and margin of scores (pairs,). A tie is wrong."""
    return {
        f"{prefix}accuracy": mean_figure((chosen > rejected).double()),
        f"{prefix}margin": mean_figure(chosen - rejected),
    }


def unpaired_figures(wanted: Tensor, unwanted: Tensor) -> Figures:
    """Return accuracy and margin of scores that are not in pairs: (wanted completions,), (unwanted completions,).

    accuracy: the share of all combinations of a wanted and an unwanted completion in which the wanted one has the
    larger score. margin: the difference of the means. Both are NaN without a completion of each kind, and if a score is
    not finite. The errors are those of differences of two means.
    """
    if not len(wanted) or not len(unwanted) or not torch.cat([wanted, unwanted]).isfinite().all():
        nothing = Figure(math.nan, math.nan, 0)
        return {"accuracy": nothing, "margin": nothing}

    # of each completion: the share of the other kind over which it is right (DeLong et al. 1988, Biometrics 44)
    below = torch.searchsorted(unwanted.sort().values, wanted) / len(unwanted)
    above = 1 - torch.searchsorted(wanted.sort().values, unwanted, right=True) / len(wanted)
    count = len(wanted) + len(unwanted)
    (accuracy, error, _), (_, other, _) = mean_figure(below), mean_figure(above)
    (one, one_error, _), (two, two_error, _) = mean_figure(wanted), mean_figure(unwanted)
    return {
        "accuracy": Figure(accuracy, math.hypot(error, other), count),
        "margin": Figure(one - two, math.hypot(one_error, two_error), count),
    }


# ---- samples


def sampled(
    cfg: RolloutFlags, model: Transformer, tokenizer: Tokenizer, rewards: Rewards, prompts: Sequence[Prompt]
) -> tuple[Groups, Figures]:
    """Sample and judge one completion of each held-out prompt, always from the same noise.

    Each call of a reward function judges as many samples as in a step of training. Their seeds are the last ones of the
    range of --seed, which no step of training reaches. Returns the samples in groups of one, and their figures: reward,
    reward/<function>, metric/<name>, length and ended.
    """
    judging = replace(rewards, logged={})  # a step's own numbers stay
    sampler = Sampler(replace(cfg, group_size=1), tokenizer, judging)
    groups, size, seed = Groups([]), cfg.prompts_per_step * cfg.group_size, (cfg.seed + 1) << 32
    for start in range(0, len(prompts), size):
        seed -= 1
        groups = Groups([*groups, *sampler.sample(model, prompts[start : start + size], seed)])
    return groups, sample_figures(groups, judging.metrics())


def sample_figures(groups: Groups, metrics: Mapping[str, float]) -> Figures:
    """Return the figures of samples, of which the means are over the judged ones, except of length and ended.

    metrics: means of numbers that reward functions have logged; their errors are not known.
    """
    return {
        "reward": judged_figure(groups.rewards),
        **{f"reward/{name}": judged_figure(part) for name, part in groups.parts.items()},
        **{name: Figure(mean, math.nan, len(groups.samples)) for name, mean in metrics.items()},
        "length": mean_figure(groups.lengths.double()),
        "ended": mean_figure(groups.ended.double()),
    }
