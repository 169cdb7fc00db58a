"""Advantages from rewards, per sample and per token.

Per sample: rewards (prompts, group) has one row for each prompt's samples. NaN marks a sample that no reward function
judged. Its advantage is 0, and it counts in no statistic.

Per token: rewards, values and mask are (samples, length). mask is False on padding, and on tokens that the policy did
not choose, such as a tool's output.
"""

import torch
from torch import Tensor

# ---- per sample


def _centred(rewards: Tensor) -> Tensor:
    """Return r - mean of the group. If all rewards are equal, the result is exactly 0, without rounding error."""
    lowest = rewards.nan_to_num(torch.inf).amin(dim=1, keepdim=True)
    highest = rewards.nan_to_num(-torch.inf).amax(dim=1, keepdim=True)
    centred = rewards - rewards.nanmean(dim=1, keepdim=True)
    return centred.masked_fill(lowest >= highest, 0.0).nan_to_num(0.0)


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """Return (r - mean) / (std + eps) within the group, with ddof 1 as in TRL, and 0 if all rewards are equal.

    Source: GRPO, https://arxiv.org/abs/2402.03300, sec. 4.1.2.
    """
    centred = _centred(rewards)
    judged = (~rewards.isnan()).sum(dim=1, keepdim=True)
    std = (centred.square().sum(dim=1, keepdim=True) / (judged - 1).clamp(min=1)).sqrt()
    return centred / (std + eps)


def mean_advantages(rewards: Tensor) -> Tensor:
    """Return r - mean of the group. Without a division by std, hard and easy prompts have the same weight.

    Source: Dr. GRPO, https://arxiv.org/abs/2503.20783, sec. 3.2.
    """
    return _centred(rewards)


def batch_std_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """Return (r - group mean) / (std of the batch + eps), with std over all rewards of the batch (ddof 1).

    Source: https://arxiv.org/abs/2508.08221
    """
    judged = rewards[~rewards.isnan()]
    std = judged.std() if judged.numel() > 1 else torch.zeros((), device=rewards.device)
    return _centred(rewards) / (std + eps)


def rloo_advantages(rewards: Tensor) -> Tensor:
    """Return r - mean of the other rewards in the group, the unbiased leave-one-out baseline.

    Source: RLOO, https://arxiv.org/abs/2402.14740, eq. 8.
    """
    judged = (~rewards.isnan()).sum(dim=1, keepdim=True)
    return _centred(rewards) * judged / (judged - 1).clamp(min=1)


# ---- per token


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Return generalized advantage estimates: sum_k (gamma lam)^k delta_(t+k), (samples, length).

    delta_t = r_t + gamma V_(t+1) - V_t, and V after the last token is 0. Masked tokens are skipped: their rewards and
    values are not read, and their advantage is 0. With values 0 and lam 1, the result is the discounted sum of the
    following rewards.
    Source: https://arxiv.org/abs/1506.02438, eq. 16
    """
    advantages = torch.zeros_like(rewards)
    value = advantage = torch.zeros_like(rewards[:, 0])  # (samples,), at the next unmasked token after t
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        value = torch.where(mask[:, t], values[:, t], value)
        advantages[:, t] = advantage.masked_fill(~mask[:, t], 0.0)
    return advantages


def whiten(values: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Return (x - mean) / std over the unmasked tokens of the whole batch (ddof 0), and 0 elsewhere. Any shape."""
    real = values[mask]
    return ((values - real.mean()) / (real.var(correction=0) + eps).sqrt()).masked_fill(~mask, 0.0)


def scale(values: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Return x / std over the unmasked tokens of the whole batch (ddof 0), and 0 at masked tokens.

    The mean is not subtracted, because that would reward length.
    """
    return (values / (values[mask].var(correction=0) + eps).sqrt()).masked_fill(~mask, 0.0)
