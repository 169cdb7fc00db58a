"""Losses, advantages and denominators as formulas: values by hand, gradients by finite differences, invariants."""

import math

import pytest
import torch
from burnish.algorithms._advantages import (
    batch_std_advantages,
    group_advantages,
    mean_advantages,
    rloo_advantages,
)
from burnish.algorithms._policy import clipped_loss, k3_loss
from burnish.algorithms._tokens import constant_length, sequence_mean, token_mean
from burnish.algorithms.sft import dft_loss, sft_loss

NAN = float("nan")


def logprobs(count: int) -> torch.Tensor:
    return -torch.rand(count, dtype=torch.float64) * 3


def test_sft_loss_is_the_mean_over_the_whole_step():
    logprob = logprobs(7)
    assert sft_loss(logprob, 7).item() == pytest.approx(-logprob.mean().item())
    halves = sft_loss(logprob[:2], 7) + sft_loss(logprob[2:], 7)
    assert halves.item() == pytest.approx(sft_loss(logprob, 7).item(), abs=1e-12)


@pytest.mark.parametrize("loss", [sft_loss, dft_loss])
def test_a_batch_without_trained_tokens_is_a_finite_zero_with_a_gradient_path(loss):
    logprob = logprobs(3).requires_grad_()
    value = loss(logprob[:0], 1)
    value.backward()
    assert value.item() == 0 and logprob.grad is not None and not logprob.grad.any()


def test_dft_gradient_is_minus_the_probability():
    logprob = logprobs(5).requires_grad_()
    (grad,) = torch.autograd.grad(dft_loss(logprob, 5), logprob)
    torch.testing.assert_close(grad, -logprob.detach().exp() / 5)


def test_clipped_loss_by_finite_differences():
    old, advantage = logprobs(9), torch.randn(9, dtype=torch.float64)
    logprob = (old + 0.3 * torch.randn(9, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: clipped_loss(x, old, advantage, 9.0)[0], logprob)
    assert torch.autograd.gradcheck(lambda x: k3_loss(x, old, 9.0)[0], logprob)


def test_grpo_clips_each_sign_of_advantage_on_its_own_side():
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    logprob = ratio.log().requires_grad_()
    loss, metrics = clipped_loss(logprob, torch.zeros(4), advantage, 1.0, clip_low=0.2, clip_high=0.28)
    assert loss.item() == pytest.approx(-(0.5 - 0.8 + 1.28 - 1.5))
    (grad,) = torch.autograd.grad(loss, logprob)
    assert grad.tolist() == pytest.approx(
        [-0.5, 0, 0, 1.5]
    )  # only the side that clipping leaves free has a gradient
    assert metrics["clip_fraction"].item() == 0.5


def test_grpo_first_step_identities():
    """On policy: ratio 1, KL 0, a loss of -sum A n / N, and a gradient that is not zero."""
    lengths = torch.tensor([3, 1, 4, 2])
    advantage = torch.tensor([1.5, -0.5, -0.5, -0.5], dtype=torch.float64)
    logprob = logprobs(10).requires_grad_()
    per_token = advantage.repeat_interleave(lengths)
    loss, metrics = clipped_loss(
        logprob, logprob.detach(), per_token, token_mean(lengths).repeat_interleave(lengths)
    )
    assert loss.item() == pytest.approx(-(advantage * lengths).sum().item() / 10)
    assert metrics["ratio"].item() == 1 and k3_loss(logprob, logprob.detach(), 10.0)[0].item() == 0
    assert torch.autograd.grad(loss, logprob)[0].abs().sum() > 0
    paper, _ = clipped_loss(
        logprob, logprob.detach(), per_token, sequence_mean(lengths).repeat_interleave(lengths)
    )
    assert paper.item() == pytest.approx(0, abs=1e-7)


def test_log_ratios_are_bounded_before_exp():
    loss, _ = clipped_loss(torch.tensor([0.0]), torch.tensor([-1e4]), torch.tensor([-1.0]), 1.0)
    assert loss.item() == pytest.approx(math.exp(20))


def test_k3_estimates_the_reverse_kl():
    p, q = (torch.softmax(torch.randn(5, dtype=torch.float64), 0) for _ in range(2))
    k3 = sum(p[i] * k3_loss(p[i].log(), q[i].log(), 1.0)[0] for i in range(5))
    assert k3.item() == pytest.approx((p * (p / q).log()).sum().item())


def test_denominators():
    lengths = torch.tensor([1, 4])
    values = torch.tensor([10.0, 1.0, 2.0, 3.0, 6.0])
    for denominators, expected in [
        (token_mean(lengths), 22 / 5),
        (sequence_mean(lengths), (10 + 3) / 2),
        (constant_length(lengths, 8), 22 / 16),
    ]:
        assert (values / denominators.repeat_interleave(lengths)).sum().item() == pytest.approx(expected)


def test_group_advantages():
    rewards = torch.tensor([[0.0, 1.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    advantages = group_advantages(rewards, eps=0.0)
    assert advantages[0].tolist() == pytest.approx([-(0.75**0.5), 0.75**0.5] * 2)  # ddof 1
    assert group_advantages(rewards)[1].tolist() == [0, 0, 0, 0]
    assert mean_advantages(rewards)[0].tolist() == [-0.5, 0.5, -0.5, 0.5]
    assert rloo_advantages(rewards)[0].tolist() == pytest.approx([-2 / 3, 2 / 3] * 2)
    torch.testing.assert_close(
        batch_std_advantages(rewards, eps=0.0), mean_advantages(rewards) / rewards.std()
    )


@pytest.mark.parametrize(
    "advantages", [group_advantages, mean_advantages, rloo_advantages, batch_std_advantages]
)
def test_a_sample_without_a_judgement_changes_nothing(advantages):
    rewards = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    with_holes = torch.tensor([[0.0, NAN, 1.0, 1.0], [0.0, 0.0, NAN, 1.0]])
    found = advantages(with_holes)
    assert found[0, 1] == 0 and found[1, 2] == 0
    torch.testing.assert_close(found[~with_holes.isnan()], advantages(rewards).flatten())


@pytest.mark.parametrize("value", [0.1, 1000.1, 1e6 + 0.3])
@pytest.mark.parametrize(
    "advantages", [group_advantages, mean_advantages, rloo_advantages, batch_std_advantages]
)
def test_equal_rewards_give_exactly_no_advantage(advantages, value):
    """Their mean, rounded, is not the reward itself."""
    rewards = torch.full((2, 8), value)
    rewards[1, 3] = NAN
    assert not advantages(rewards).any()


def test_a_group_of_one_has_no_advantage():
    for advantages in (group_advantages, mean_advantages, rloo_advantages):
        assert advantages(torch.tensor([[2.0]])).item() == 0
