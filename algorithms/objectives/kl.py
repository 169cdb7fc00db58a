"""Estimators of the KL to a reference from samples of the policy, as terms of a loss.

    KL(pi || ref), d = logprob - ref_logprob          value            gradient, as a loss
    k1  d                                             unbiased         0 in expectation: only in rewards (PPO's)
    k2  d^2 / 2                                       biased           unbiased on policy
    k3  exp(-d) + d - 1                               unbiased, >= 0   that of KL(ref || pi): GRPO's
    rho k3, rho = pi / pi_old                         unbiased, >= 0   unbiased, off policy, too

logprob is the trained policy's, with gradient. old_logprob is the policy's before the first update of the rollout, and
ref_logprob the reference's. All are (tokens,) fp32, in nats. denominator, a scalar or (tokens,), is that of the whole
optimizer step (denominators.py). d is clamped to [-20, 20]. Each function returns a scalar loss with its gradient, and
kl, the mean over the tokens.
"""

from torch import Tensor

from .policy import bounded_exp


def k2_loss(
    logprob: Tensor, ref_logprob: Tensor, denominator: Tensor | float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the sum of d^2 / 2, divided by the denominator, with d = logprob - ref_logprob.

    Source: http://joschu.net/blog/kl-approx.html
    """
    k2 = (logprob - ref_logprob).clamp(-20, 20).square() / 2
    return (k2 / denominator).sum(), {"kl": k2.detach().mean()}


def k3_loss(
    logprob: Tensor, ref_logprob: Tensor, denominator: Tensor | float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the sum of exp(-d) + d - 1, divided by the denominator, with d = logprob - ref_logprob.

    Source: http://joschu.net/blog/kl-approx.html; https://arxiv.org/abs/2402.03300, eq. 4
    """
    k3 = _k3(logprob, ref_logprob)
    return (k3 / denominator).sum(), {"kl": k3.detach().mean()}


def rho_k3_loss(
    logprob: Tensor, old_logprob: Tensor, ref_logprob: Tensor, denominator: Tensor | float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the sum of rho (exp(-d) + d - 1), divided by the denominator.

    rho = pi / pi_old, and d = logprob - ref_logprob.
    Source: DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, eq. 7
    """
    weighted = bounded_exp(logprob - old_logprob) * _k3(logprob, ref_logprob)
    return (weighted / denominator).sum(), {"kl": weighted.detach().mean()}


def _k3(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """Return exp(-d) + d - 1 for each token, (tokens,), with d = logprob - ref_logprob."""
    log_ratio = (logprob - ref_logprob).clamp(-20, 20)
    return (-log_ratio).exp() + log_ratio - 1
