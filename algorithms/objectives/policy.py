"""Losses on sampled tokens: the clipped policy gradient and its variants, and weights against sampler mismatch.

PPO and the GRPO family share these functions. logprob is the trained policy's, with gradient. old_logprob is the
policy's before the first update of the rollout. sampled_logprob was computed by the sampler. These and advantage are
(tokens,) fp32, log-probabilities in nats. denominator, a scalar or (tokens,), is that of the whole optimizer step
(denominators.py), so micro-batches add up. Log-ratios are clamped to [-20, 20] before exp.

Each loss returns a scalar with its gradient, and two means over the tokens, ratio and clip_fraction.
"""

from math import inf

import torch
from torch import Tensor


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """Return exp of the log-ratio clamped to [-20, 20], so that the result is always finite."""
    return log_ratio.clamp(-20, 20).exp()


# ---- policy losses


def clipped_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    denominator: Tensor | float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = inf,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the clipped policy-gradient loss: the sum of -min(rho A, clip(rho, 1 - lo, 1 + hi) A) / denominator.

    rho = pi / pi_old. lo and hi are clip_low and clip_high. dual_clip: where A < 0, rho is capped at this number, which
    must exceed 1 + clip_high. clip_fraction counts the tokens that clip_low and clip_high stop, not those of dual_clip.
    Source: PPO, https://arxiv.org/abs/1707.06347, eq. 7; dual clip, https://arxiv.org/abs/1912.09729, eq. 5
    """
    ratio = bounded_exp(logprob - old_logprob)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)  # PPO, eq. 7
    bounded = ratio.clamp(max=dual_clip)  # dual clip, eq. 5
    loss = -(torch.min(bounded * advantage, clipped * advantage) / denominator).sum()
    is_clipped = (clipped * advantage < ratio * advantage).float()
    return loss, {"ratio": ratio.detach().mean(), "clip_fraction": is_clipped.mean()}


def gspo_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    lengths: Tensor,
    denominator: Tensor | float,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the clipped loss with one ratio per sequence, s = exp(mean_t log rho_t), the geometric mean over tokens.

    lengths (sequences,): tokens of each sequence, in order. A micro-batch holds whole sequences. The formula is
    GSPO-token. Its gradient is that of GSPO if all tokens of a sequence share one advantage. The paper's denominator is
    sequence_mean.
    Source: https://arxiv.org/abs/2507.18071, eq. 5, 7, 13 and 14; the clip's defaults from its sec. 5.1
    """
    log_ratio = (logprob - old_logprob).detach()  # (tokens,)
    per_sequence = {"lengths": lengths, "initial": 0, "unsafe": True}
    log_mean = torch.segment_reduce(log_ratio, "mean", **per_sequence)  # (sequences,), eq. 7
    sequence_ratio = bounded_exp(log_mean).repeat_interleave(lengths)  # (tokens,)
    # eq. 14: the sequence's value, with the token's gradient
    ratio = sequence_ratio * (logprob - logprob.detach()).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -(torch.min(ratio * advantage, clipped * advantage) / denominator).sum()  # eq. 13
    is_clipped = (clipped * advantage < ratio * advantage).float()
    return loss, {"ratio": ratio.detach().mean(), "clip_fraction": is_clipped.mean()}


def cispo_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    denominator: Tensor | float,
    clip_high: float = 4.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the CISPO loss: the sum of -sg(min(rho, 1 + hi)) A log pi / denominator.

    rho = pi / pi_old, hi is clip_high, and sg stops the gradient. Only the weight is clipped, and only from above, so
    every token keeps a gradient. TRL's epsilon_high is our 1 + clip_high.
    Source: https://arxiv.org/abs/2506.13585, eq. 4 and 5
    """
    ratio = bounded_exp((logprob - old_logprob).detach())
    weight = ratio.clamp(max=1 + clip_high)  # eq. 5
    loss = -(weight * advantage * logprob / denominator).sum()  # eq. 4
    return loss, {"ratio": ratio.mean(), "clip_fraction": (ratio > 1 + clip_high).float().mean()}


# ---- correction of the difference between sampler and trainer


def truncated_weights(old_logprob: Tensor, sampled_logprob: Tensor, cap: float) -> Tensor:
    """Return the weights min(pi_old / pi_sampler, cap) of the advantages. They are bounded, but biased.

    Source: TIS, https://fengyao.notion.site/off-policy-rl
    """
    return bounded_exp(old_logprob - sampled_logprob).clamp(max=cap)


def masked_weights(old_logprob: Tensor, sampled_logprob: Tensor, cap: float) -> Tensor:
    """Return the weights pi_old / pi_sampler of the advantages, or 0 where the ratio exceeds cap.

    A token of weight 0 has no gradient, but stays in the denominator.
    Source: MIS, https://richardli.xyz/rl-collapse
    """
    weight = bounded_exp(old_logprob - sampled_logprob)
    return weight.masked_fill(weight > cap, 0.0)
