"""Denominators of a token loss: what one sequence's terms are divided by, given the lengths of *all* sequences of the
optimizer step. Each returns (sequences,) fp32, so that micro-batches add up to the whole step's loss.

    token mean       sum over all tokens / all tokens             DAPO, https://arxiv.org/abs/2503.14476, eq. 8
    sequence mean    mean over sequences of their token means     GRPO, https://arxiv.org/abs/2402.03300, eq. 3
    constant         sum over all tokens / (sequences * length)   Dr. GRPO, https://arxiv.org/abs/2503.20783
"""

import torch
from torch import Tensor


def token_mean(lengths: Tensor) -> Tensor:
    """Sum of all lengths, the same for every sequence. lengths (sequences,) int64, here and below."""
    return lengths.sum().float().expand(lengths.shape[0])


def sequence_mean(lengths: Tensor) -> Tensor:
    """Each sequence's own length, times how many sequences there are."""
    return (lengths * lengths.shape[0]).float()


def constant_length(lengths: Tensor, max_length: int) -> Tensor:
    """The number of sequences times max_length: the cap on a completion's length, the same for every step."""
    return torch.full(lengths.shape, float(lengths.shape[0] * max_length))
