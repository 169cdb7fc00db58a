"""Denominators of a token loss: the number by which each sequence's terms are divided.

They are computed from the lengths of *all* sequences of the optimizer step, so micro-batches add up to the whole step's
loss. Each function returns (sequences,) fp32.

    token mean       sum over all tokens / all tokens             DAPO, https://arxiv.org/abs/2503.14476, eq. 8
    sequence mean    mean over sequences of their token means     GRPO, https://arxiv.org/abs/2402.03300, eq. 3
    constant         sum over all tokens / (sequences * length)   Dr. GRPO, https://arxiv.org/abs/2503.20783
"""

import torch
from torch import Tensor


def token_mean(lengths: Tensor) -> Tensor:
    """Return the sum of all lengths, repeated for each sequence, (sequences,) fp32. lengths: (sequences,) int64."""
    return lengths.sum().float().expand(lengths.shape[0])


def sequence_mean(lengths: Tensor) -> Tensor:
    """Return each sequence's own length times the number of sequences, (sequences,) fp32. lengths: int64."""
    return (lengths * lengths.shape[0]).float()


def constant_length(lengths: Tensor, max_length: int) -> Tensor:
    """Return the number of sequences times max_length, repeated for each sequence, (sequences,) fp32.

    max_length: the limit of a completion's length, the same in every step.
    """
    return torch.full(lengths.shape, float(lengths.shape[0] * max_length))
