"""Losses on pairs of completions: DPO's family, and the likelihood of what was chosen.

chosen, rejected (pairs,): the scores of the two completions, h their difference. For DPO a score is the log-ratio to a
reference, log pi(y|x) - log pi_ref(y|x), a sum over the completion's tokens; the table at the head of dpo.py says what
it is for each loss. num_pairs: of the whole optimizer step, so that micro-batches add up.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- DPO and its family


def dpo_loss(chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float) -> Tensor:
    """-log sigmoid(beta h). Gradient: -beta sigmoid(-beta h) (grad chosen - grad rejected), on each pair.

    Source: https://arxiv.org/abs/2305.18290, eq. 7
    """
    return -F.logsigmoid(beta * (chosen - rejected)).sum() / num_pairs


def cdpo_loss(
    chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float, label_smoothing: float | Tensor
) -> Tensor:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h). Its optimum is a finite h.

    label_smoothing: e, scalar or (pairs,), the probability that the label is wrong.
    Source: https://ericmitchell.ai/cdpo.pdf
    """
    h = beta * (chosen - rejected)
    return -((1 - label_smoothing) * F.logsigmoid(h) + label_smoothing * F.logsigmoid(-h)).sum() / num_pairs


def robust_loss(
    chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float, label_smoothing: float
) -> Tensor:
    """[-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1 - 2e).

    On labels flipped with probability label_smoothing < 1/2, in expectation DPO's loss on the true ones.
    Source: https://arxiv.org/abs/2403.00409
    """
    h = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * F.logsigmoid(h) + label_smoothing * F.logsigmoid(-h)
    return losses.sum() / (1 - 2 * label_smoothing) / num_pairs


def hinge_loss(chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float) -> Tensor:
    """max(0, 1 - beta h).

    Source: SLiC in the form of https://arxiv.org/abs/2309.06657
    """
    return torch.relu(1 - beta * (chosen - rejected)).sum() / num_pairs


def ipo_loss(chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float) -> Tensor:
    """(h - 1 / (2 beta))^2. beta is the paper's tau.

    --loss ipo gives it log-ratios per token, as its authors do, ipo_sum the paper's sums.
    Source: https://arxiv.org/abs/2310.12036, eq. 17
    """
    return (chosen - rejected - 1 / (2 * beta)).square().sum() / num_pairs


def apo_zero_loss(chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float) -> Tensor:
    """1 - sigmoid(beta chosen) + sigmoid(beta rejected).

    Raises chosen and lowers rejected: for chosen completions better than the model's own.
    Source: https://arxiv.org/abs/2408.06266, eq. 7
    """
    return (1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)).sum() / num_pairs


def apo_down_loss(chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float) -> Tensor:
    """sigmoid(beta chosen) + 1 - sigmoid(beta h).

    Lowers both, rejected more: for chosen completions worse than the model's own.
    Source: https://arxiv.org/abs/2408.06266, eq. 8
    """
    return (torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * (chosen - rejected))).sum() / num_pairs


def simpo_loss(chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta h - gamma).

    Source: https://arxiv.org/abs/2405.14734, eq. 6
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma).sum() / num_pairs


def orpo_loss(chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float) -> Tensor:
    """-beta log sigmoid(log odds of chosen - log odds of rejected). beta is the paper's lambda.

    The odds p / (1 - p) are those of the mean token probability p = exp(score).
    Source: https://arxiv.org/abs/2403.07691, eq. 6 and 7
    """

    def log_odds(score: Tensor) -> Tensor:
        score = score.clamp(max=-1e-6)  # at p = 1 the odds are infinite
        return score - torch.log(-torch.expm1(score))

    return -beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected)).sum() / num_pairs


def nll_loss(logprob: Tensor, num_tokens: Tensor | float) -> Tensor:
    """-log pi of the chosen completions, a mean over their tokens: the second term of CPO and of ORPO.

    logprob (pairs,): sums over the chosen completions. num_tokens: of theirs in the whole optimizer step.
    Source: https://arxiv.org/abs/2401.08417; https://arxiv.org/abs/2403.07691, eq. 6
    """
    return -logprob.sum() / num_tokens


# ---- metrics


def pair_metrics(chosen: Tensor, rejected: Tensor, num_pairs: int) -> dict[str, float]:
    """Terms that two scores (pairs,) of a micro-batch add to the means over the step's num_pairs pairs."""
    chosen, rejected = chosen.detach(), rejected.detach()
    values = {
        "accuracy": (chosen > rejected).float(),
        "margin": chosen - rejected,
        "chosen": chosen,
        "rejected": rejected,
    }
    return {name: value.sum().item() / num_pairs for name, value in values.items()}
