"""Losses on pairs of completions: DPO's family, and the likelihood of chosen completions.

chosen, rejected (pairs,) are the scores of the two completions, and h = chosen - rejected. For DPO, a score is the
log-ratio to a reference, log pi(y|x) - log pi_ref(y|x), summed over the completion's tokens. The table at the head of
dpo.py defines the score of each loss. num_pairs is the number of pairs in the whole optimizer step, so micro-batches
add up. Each formula below is summed over the pairs and divided by num_pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- DPO and its family


def dpo_loss(chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float) -> Tensor:
    """Compute DPO's loss, -log sigmoid(beta h), with h = chosen - rejected.

    The gradient of each pair is -beta sigmoid(-beta h) (grad chosen - grad rejected).

    Source: https://arxiv.org/abs/2305.18290, eq. 7
    """
    return -F.logsigmoid(beta * (chosen - rejected)).sum() / num_pairs


def cdpo_loss(
    chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float, label_smoothing: float | Tensor
) -> Tensor:
    """Compute conservative DPO's loss, -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h).

    h = chosen - rejected. label_smoothing: e, scalar or (pairs,), the probability that the label is wrong. The optimal
    h is finite.
    Source: https://ericmitchell.ai/cdpo.pdf
    """
    h = beta * (chosen - rejected)
    return -((1 - label_smoothing) * F.logsigmoid(h) + label_smoothing * F.logsigmoid(-h)).sum() / num_pairs


def robust_loss(
    chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float, label_smoothing: float
) -> Tensor:
    """Compute robust DPO's loss, [-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1 - 2e).

    h = chosen - rejected. label_smoothing: e < 1/2, the probability that a label is flipped. The expectation of this
    loss over flips is DPO's loss on the true labels.
    Source: https://arxiv.org/abs/2403.00409
    """
    h = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * F.logsigmoid(h) + label_smoothing * F.logsigmoid(-h)
    return losses.sum() / (1 - 2 * label_smoothing) / num_pairs


def hinge_loss(chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float) -> Tensor:
    """Compute the hinge loss, max(0, 1 - beta h), with h = chosen - rejected.

    Source: SLiC in the form of https://arxiv.org/abs/2309.06657
    """
    return torch.relu(1 - beta * (chosen - rejected)).sum() / num_pairs


def ipo_loss(chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float) -> Tensor:
    """Compute IPO's loss, (h - 1 / (2 beta))^2, with h = chosen - rejected. beta is the paper's tau.

    With --loss ipo, the scores are log-ratios per token, as in the authors' code. With ipo_sum, they are the sums of
    the paper.
    Source: https://arxiv.org/abs/2310.12036, eq. 17
    """
    return (chosen - rejected - 1 / (2 * beta)).square().sum() / num_pairs


def apo_zero_loss(chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float) -> Tensor:
    """Compute APO-zero's loss, 1 - sigmoid(beta chosen) + sigmoid(beta rejected).

    Training raises chosen and lowers rejected. The loss suits data whose chosen completions are better than the model's
    own.
    Source: https://arxiv.org/abs/2408.06266, eq. 7
    """
    return (1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)).sum() / num_pairs


def apo_down_loss(chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float) -> Tensor:
    """Compute APO-down's loss, sigmoid(beta chosen) + 1 - sigmoid(beta h), with h = chosen - rejected.

    Training lowers both scores, rejected more than chosen. The loss suits data whose chosen completions are worse than
    the model's own.
    Source: https://arxiv.org/abs/2408.06266, eq. 8
    """
    return (torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * (chosen - rejected))).sum() / num_pairs


def simpo_loss(chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float, gamma: float) -> Tensor:
    """Compute SimPO's loss, -log sigmoid(beta h - gamma), with h = chosen - rejected.

    Source: https://arxiv.org/abs/2405.14734, eq. 6
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma).sum() / num_pairs


def orpo_loss(chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float) -> Tensor:
    """Compute ORPO's odds-ratio loss, -beta log sigmoid(log odds of chosen - log odds of rejected).

    The odds are p / (1 - p), where p = exp(score) is the geometric mean of the token probabilities. beta is the paper's
    lambda.
    Source: https://arxiv.org/abs/2403.07691, eq. 6 and 7
    """

    def log_odds(score: Tensor) -> Tensor:
        score = score.clamp(max=-1e-6)  # at p = 1 the odds are infinite
        return score - torch.log(-torch.expm1(score))

    return -beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected)).sum() / num_pairs


def nll_loss(logprob: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Compute the negative log-likelihood per token of the chosen completions, the second term of CPO and of ORPO.

    logprob (pairs,): sums over each chosen completion. num_tokens: tokens of all chosen completions in the whole
    optimizer step.
    Source: https://arxiv.org/abs/2401.08417; https://arxiv.org/abs/2403.07691, eq. 6
    """
    return -logprob.sum() / num_tokens


# ---- metrics


def pair_metrics(chosen: Tensor, rejected: Tensor, num_pairs: int) -> dict[str, float]:
    """Return a micro-batch's part of the step's metrics: accuracy, margin, chosen and rejected.

    chosen, rejected (pairs,): the scores. The parts of all micro-batches add up to the means over the step's num_pairs
    pairs.
    """
    chosen, rejected = chosen.detach(), rejected.detach()
    values = {
        "accuracy": (chosen > rejected).float(),
        "margin": chosen - rejected,
        "chosen": chosen,
        "rejected": rejected,
    }
    return {name: value.sum().item() / num_pairs for name, value in values.items()}
