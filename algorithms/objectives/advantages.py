"""From rewards to advantages.

Of samples: rewards (prompts, group), one row for the samples of one prompt. NaN marks a sample that no reward function
judged: it gets advantage 0 and counts in no statistic.
Of tokens: rewards, values and mask (samples, length), where mask is False on padding and on tokens that the policy did
not choose, such as a tool's output.
"""

import torch
from torch import Tensor

# ---- of samples


def _centred(rewards: Tensor) -> Tensor:
    """r - mean, and exactly 0 where all rewards are equal, which the rounding of a mean is not."""
    lowest = rewards.nan_to_num(torch.inf).amin(dim=1, keepdim=True)
    highest = rewards.nan_to_num(-torch.inf).amax(dim=1, keepdim=True)
    centred = rewards - rewards.nanmean(dim=1, keepdim=True)
    return centred.masked_fill(lowest >= highest, 0.0).nan_to_num(0.0)


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """(r - mean) / (std + eps) within the group, std with ddof 1 as TRL's; zeros where all rewards are equal.

    Source: GRPO, https://arxiv.org/abs/2402.03300, sec. 4.1.2.
    """
    centred = _centred(rewards)
    judged = (~rewards.isnan()).sum(dim=1, keepdim=True)
    std = (centred.square().sum(dim=1, keepdim=True) / (judged - 1).clamp(min=1)).sqrt()
    return centred / (std + eps)


def mean_advantages(rewards: Tensor) -> Tensor:
    """r - mean: no division, so hard and easy prompts weigh alike.

    Source: Dr. GRPO, https://arxiv.org/abs/2503.20783, sec. 3.2.
    """
    return _centred(rewards)


def batch_std_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """(r - group mean) / (std of all rewards of the batch + eps), ddof 1. Source: https://arxiv.org/abs/2508.08221."""
    judged = rewards[~rewards.isnan()]
    std = judged.std() if judged.numel() > 1 else torch.zeros((), device=rewards.device)
    return _centred(rewards) / (std + eps)


def rloo_advantages(rewards: Tensor) -> Tensor:
    """r - mean of the others in the group: the unbiased leave-one-out baseline.

    Source: RLOO, https://arxiv.org/abs/2402.14740, eq. 8.
    """
    judged = (~rewards.isnan()).sum(dim=1, keepdim=True)
    return _centred(rewards) * judged / (judged - 1).clamp(min=1)


# ---- of tokens


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """sum_k (gamma lam)^k delta_(t+k) over real tokens, delta_t = r_t + gamma V_(t+1) - V_t; V after the last is 0.

    Masked tokens do not exist: what follows them comes right after what precedes them, their rewards and values are not
    read, and their advantage is 0. With values 0 and lam 1 it is the discounted sum of the rewards to come.
    Source: https://arxiv.org/abs/1506.02438, eq. 16
    """
    advantages = torch.zeros_like(rewards)
    value = advantage = torch.zeros_like(rewards[:, 0])  # (samples,), of the real token after t
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        value = torch.where(mask[:, t], values[:, t], value)
        advantages[:, t] = advantage.masked_fill(~mask[:, t], 0.0)
    return advantages


def whiten(values: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """(x - mean) / std over the real tokens of the whole batch (ddof 0); 0 elsewhere. Any shape."""
    real = values[mask]
    return ((values - real.mean()) / (real.var(correction=0) + eps).sqrt()).masked_fill(~mask, 0.0)


def scale(values: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """x / std over the real tokens of the whole batch; 0 elsewhere. No mean is taken off: it would pay for length."""
    return (values / (values[mask].var(correction=0) + eps).sqrt()).masked_fill(~mask, 0.0)
