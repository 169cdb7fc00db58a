"""Losses on sampled tokens: the clipped policy gradient and its relatives, KL estimators, importance weights.

PPO and the GRPO family share them. logprob is the trained policy's, with gradient; old_logprob that of the policy
before the rollout's first update, ref_logprob the reference's, sampled_logprob what the sampler itself computed; all
(tokens,), in nats. denominator: scalar or (tokens,), of the whole optimizer step (denominators.py), so that
micro-batches add up. Log-ratios are clamped to [-20, 20] before exp.

    KL(pi || ref) from samples of pi, d = logprob - ref_logprob       value            gradient, as a loss
    k1  d                                                             exact            0 in expectation: only in rewards
    k2  d^2 / 2                                                       biased           exact on policy
    k3  exp(-d) + d - 1                                               exact, >= 0      that of KL(ref || pi): GRPO's
    rho k3, rho = pi / pi_old                                         exact, >= 0      exact, also off policy
"""

from math import inf

import torch
from torch import Tensor


def _exp(log_ratio: Tensor) -> Tensor:
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
    """-min(rho A, clip(rho, 1 - lo, 1 + hi) A). advantage (tokens,).

    dual_clip: where A < 0, rho counts for at most this much; above 1 + clip_high.
    Source: PPO, https://arxiv.org/abs/1707.06347, eq. 7; dual clip, https://arxiv.org/abs/1912.09729, eq. 5
    """
    ratio = _exp(logprob - old_logprob)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    bounded = ratio.clamp(max=dual_clip)
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
    """The clipped loss with one ratio a sequence, the geometric mean of its tokens': s = exp(mean log rho).

    lengths (sequences,): tokens of each, in order; a micro-batch holds whole sequences. Written as GSPO-token, whose
    gradient is the same where the tokens of a sequence share their advantage. The paper's denominator: sequence_mean.
    Source: https://arxiv.org/abs/2507.18071, eq. 5, 7, 13 and 14; the clip's defaults from its sec. 5.1
    """
    log_ratio = (logprob - old_logprob).detach()
    log_mean = torch.segment_reduce(
        log_ratio, "mean", lengths=lengths, initial=0, unsafe=True
    )  # (sequences,)
    ratio = _exp(log_mean).repeat_interleave(lengths) * (logprob - logprob.detach()).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -(torch.min(ratio * advantage, clipped * advantage) / denominator).sum()
    is_clipped = (clipped * advantage < ratio * advantage).float()
    return loss, {"ratio": ratio.detach().mean(), "clip_fraction": is_clipped.mean()}


def cispo_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    denominator: Tensor | float,
    clip_high: float = 4.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-sg(min(rho, 1 + hi)) A log pi: the weight is clipped, so every token keeps a gradient. There is no lower bound.

    TRL's epsilon_high is our 1 + clip_high.
    Source: https://arxiv.org/abs/2506.13585, eq. 4 and 5
    """
    ratio = _exp((logprob - old_logprob).detach())
    loss = -(ratio.clamp(max=1 + clip_high) * advantage * logprob / denominator).sum()
    return loss, {"ratio": ratio.mean(), "clip_fraction": (ratio > 1 + clip_high).float().mean()}


# ---- KL to the reference


def k2_loss(
    logprob: Tensor, ref_logprob: Tensor, denominator: Tensor | float
) -> tuple[Tensor, dict[str, Tensor]]:
    """d^2 / 2. Source: http://joschu.net/blog/kl-approx.html"""
    k2 = (logprob - ref_logprob).clamp(-20, 20).square() / 2
    return (k2 / denominator).sum(), {"kl": k2.detach().mean()}


def k3_loss(
    logprob: Tensor, ref_logprob: Tensor, denominator: Tensor | float
) -> tuple[Tensor, dict[str, Tensor]]:
    """exp(-d) + d - 1. Source: http://joschu.net/blog/kl-approx.html; https://arxiv.org/abs/2402.03300, eq. 4"""
    k3 = _k3(logprob, ref_logprob)
    return (k3 / denominator).sum(), {"kl": k3.detach().mean()}


def rho_k3_loss(
    logprob: Tensor, old_logprob: Tensor, ref_logprob: Tensor, denominator: Tensor | float
) -> tuple[Tensor, dict[str, Tensor]]:
    """rho (exp(-d) + d - 1). Source: DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, eq. 7"""
    weighted = _exp(logprob - old_logprob) * _k3(logprob, ref_logprob)
    return (weighted / denominator).sum(), {"kl": weighted.detach().mean()}


def _k3(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    log_ratio = (logprob - ref_logprob).clamp(-20, 20)
    return (-log_ratio).exp() + log_ratio - 1


# ---- where the sampler is not quite the trainer


def truncated_weights(old_logprob: Tensor, sampled_logprob: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_sampler, cap): bounded, at the price of a bias. Multiplies the advantage.

    Source: TIS, https://fengyao.notion.site/off-policy-rl
    """
    return _exp(old_logprob - sampled_logprob).clamp(max=cap)


def masked_weights(old_logprob: Tensor, sampled_logprob: Tensor, cap: float) -> Tensor:
    """pi_old / pi_sampler, and 0 where it exceeds cap: such a token has no gradient, but stays in the denominator.

    Source: MIS, https://richardli.xyz/rl-collapse
    """
    weight = _exp(old_logprob - sampled_logprob)
    return weight.masked_fill(weight > cap, 0.0)
