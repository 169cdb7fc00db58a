"""Losses, advantages and denominators as formulas: values by hand, gradients by finite differences, invariants."""

import math

import pytest
import torch
from burnish.algorithms.objectives.advantages import (
    batch_std_advantages,
    gae,
    group_advantages,
    mean_advantages,
    rloo_advantages,
    scale,
    whiten,
)
from burnish.algorithms.objectives.denominators import constant_length, sequence_mean, token_mean
from burnish.algorithms.objectives.kl import k2_loss, k3_loss, rho_k3_loss
from burnish.algorithms.objectives.policy import (
    cispo_loss,
    clipped_loss,
    gspo_loss,
    masked_weights,
    truncated_weights,
)
from burnish.algorithms.ppo import adapted, token_rewards, value_loss
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


def test_policy_losses_by_finite_differences():
    old, ref, advantage = logprobs(9), logprobs(9), torch.randn(9, dtype=torch.float64)
    logprob = (old + 0.6 * torch.randn(9, dtype=torch.float64)).requires_grad_()
    for loss in (
        lambda x: clipped_loss(x, old, advantage, 9.0)[0],
        lambda x: clipped_loss(x, old, advantage, 9.0, dual_clip=1.3)[0],
        lambda x: k2_loss(x, ref, 9.0)[0],
        lambda x: k3_loss(x, ref, 9.0)[0],
        lambda x: rho_k3_loss(x, old, ref, 9.0)[0],
        lambda x: value_loss(x, old, ref, 9.0, 0.3),
    ):
        assert torch.autograd.gradcheck(loss, logprob)


def test_gspo_is_the_clipped_loss_of_sequence_ratios():
    """Its value and its gradient are those of the formula with the geometric mean, which finite differences confirm."""
    lengths, advantage = torch.tensor([3, 1, 4]), torch.tensor([1.0, -2.0, -0.5], dtype=torch.float64)
    old = logprobs(8)
    logprob = (old + 0.3 * torch.randn(8, dtype=torch.float64)).requires_grad_()

    def formula(x):
        ratio = torch.stack([part.mean().exp() for part in (x - old).split(lengths.tolist())])
        terms = torch.min(ratio * advantage, ratio.clamp(0.95, 1.1) * advantage)
        return -terms.mean()  # over sequences: the denominator of sequence_mean

    assert torch.autograd.gradcheck(formula, logprob)
    per_token = advantage.repeat_interleave(lengths)
    denominator = sequence_mean(lengths).repeat_interleave(lengths)
    loss, _ = gspo_loss(logprob, old, per_token, lengths, denominator, 0.05, 0.1)
    assert loss.item() == pytest.approx(formula(logprob).item(), abs=1e-12)
    found, wanted = (torch.autograd.grad(value, logprob)[0] for value in (loss, formula(logprob)))
    torch.testing.assert_close(found, wanted)
    assert wanted.any() and not wanted.all()  # some sequences are clipped, others not


def test_cispo_clips_the_weight_from_above_and_every_token_has_a_gradient():
    ratio = torch.tensor([0.1, 0.1, 9.0, 9.0])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    logprob = ratio.log().requires_grad_()
    loss, metrics = cispo_loss(logprob, torch.zeros(4), advantage, 2.0, clip_high=1.0)
    (grad,) = torch.autograd.grad(loss, logprob)
    assert grad.tolist() == pytest.approx([-0.05, 0.05, -1.0, 1.0])
    assert loss.item() == pytest.approx((-0.1 * math.log(0.1) + 0.1 * math.log(0.1)) / 2)
    assert metrics["clip_fraction"].item() == 0.5


def test_dual_clip_bounds_what_a_bad_token_can_weigh():
    logprob = torch.tensor([10.0, 10.0]).log().requires_grad_()
    loss, _ = clipped_loss(logprob, torch.zeros(2), torch.tensor([-1.0, 1.0]), 1.0, dual_clip=3.0)
    assert loss.item() == pytest.approx(3.0 - 1.2)
    assert torch.autograd.grad(loss, logprob)[0].tolist() == [0, 0]


def test_what_each_kl_estimator_is_for():
    """Summed over a whole vocabulary, off policy: values and expected gradients against the exact KLs'."""
    logits = torch.randn(6, dtype=torch.float64).requires_grad_()
    log_p = torch.log_softmax(logits, 0)
    log_q, log_old = (torch.log_softmax(torch.randn(6, dtype=torch.float64), 0) for _ in range(2))
    p, q, old = (x.detach().exp() for x in (log_p, log_q, log_old))
    expected = lambda weights, loss: sum(weights[i] * loss(i) for i in range(6))
    grad = lambda value: torch.autograd.grad(value, logits, retain_graph=True)[0]
    reverse, forward = (log_p.exp() * (log_p - log_q)).sum(), (q * (log_q - log_p)).sum()

    k1 = expected(p, lambda i: log_p[i] - log_q[i])
    k2 = expected(p, lambda i: k2_loss(log_p[i], log_q[i], 1.0)[0])
    k3 = expected(p, lambda i: k3_loss(log_p[i], log_q[i], 1.0)[0])
    rho_k3 = expected(old, lambda i: rho_k3_loss(log_p[i], log_old[i], log_q[i], 1.0)[0])

    for value in (k1, k3, rho_k3):
        assert value.item() == pytest.approx(reverse.item())
    assert abs(k2.item() - reverse.item()) > 1e-3
    torch.testing.assert_close(grad(k1), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(grad(k2), grad(reverse))
    torch.testing.assert_close(grad(k3), grad(forward))
    torch.testing.assert_close(grad(rho_k3), grad(reverse))


def test_mismatch_weights_are_bounded():
    old, sampled = torch.tensor([0.5, 1.0, 3.0, 1e9]).log(), torch.zeros(4)
    assert truncated_weights(old, sampled, 2.0).tolist() == pytest.approx([0.5, 1, 2, 2])
    assert masked_weights(old, sampled, 2.0).tolist() == pytest.approx([0.5, 1, 0, 0])
    assert truncated_weights(old, sampled, math.inf)[3].item() == pytest.approx(math.exp(20))


def test_each_loss_of_no_tokens_is_a_finite_zero_with_a_gradient_path():
    logprob, none = logprobs(3).requires_grad_(), torch.empty(0, dtype=torch.float64)
    x = logprob[:0]
    lengths = torch.empty(0, dtype=torch.int64)
    for value in (
        clipped_loss(x, none, none, 1)[0],
        gspo_loss(x, none, none, lengths, 1)[0],
        cispo_loss(x, none, none, 1)[0],
        k2_loss(x, none, 1)[0],
        k3_loss(x, none, 1)[0],
        rho_k3_loss(x, none, none, 1)[0],
        value_loss(x, none, none, 1),
    ):
        logprob.grad = None
        value.backward()
        assert value.item() == 0 and logprob.grad is not None and not logprob.grad.any()


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
    """A step on policy has ratio 1, KL 0, a loss of -sum A n / N, and a gradient that is not zero."""
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


# ---- of tokens


def brute_force_gae(rewards, values, gamma, lam):
    """The advantages of one sequence of real tokens: the sum over k as the paper writes it."""
    values = [*values, 0.0]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(rewards))]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_gae_against_brute_force(gamma, lam):
    """Sequences of all kinds: padded, of one token, with a tool's output in the middle, at the start, at the end."""
    mask = torch.tensor(
        [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 1], [0, 1, 1, 0, 0], [1, 0, 1, 0, 1]]
    ).bool()
    rewards, values = torch.randn(2, 6, 5, dtype=torch.float64)
    poisoned = [x.masked_fill(~mask, NAN) for x in (rewards, values)]  # what is masked is not read
    found = gae(*poisoned, mask, gamma, lam)
    for i in range(6):
        wanted = brute_force_gae(rewards[i][mask[i]].tolist(), values[i][mask[i]].tolist(), gamma, lam)
        assert found[i][mask[i]].tolist() == pytest.approx(wanted)
    assert not found[~mask].any()


def test_every_token_returns_the_score():
    """Returns at gamma = lambda = 1 and beta = 0."""
    lengths, score = torch.tensor([3, 1, 5]), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    mask = torch.arange(5) < lengths[:, None]
    reward = token_rewards(score, torch.randn(3, 5, dtype=torch.float64), lengths, 0.0)
    assert [reward[i, n - 1].item() for i, n in enumerate(lengths)] == score.tolist()
    assert reward.count_nonzero() == 3
    value = torch.randn(3, 5, dtype=torch.float64)
    returns = gae(reward, value, mask, 1.0, 1.0) + value
    torch.testing.assert_close(returns[mask], score.repeat_interleave(lengths))


def test_the_kl_is_paid_token_by_token():
    k1 = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.0, 0.0]])
    reward = token_rewards(torch.tensor([1.0, NAN]), k1, torch.tensor([3, 1]), 0.5)
    torch.testing.assert_close(reward, torch.tensor([[-0.05, -0.1, 0.85], [-0.2, 0.0, 0.0]]))


def test_whitening_sees_real_tokens_only():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    values = torch.tensor([[1.0, 2.0, 1e6], [6.0, NAN, -1e6]])
    whitened = whiten(values, mask)
    assert whitened[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert whitened[mask].std(correction=0).item() == pytest.approx(1)
    scaled = scale(values, mask)
    assert (scaled[mask] / values[mask]).tolist() == pytest.approx(
        [1 / values[mask].std(correction=0).item()] * 3
    )
    assert not whitened[~mask].any() and not scaled[~mask].any()
    assert (
        whiten(values, torch.tensor([[True, False, False], [False] * 3])).isfinite().all()
    )  # one token alone


def test_value_loss_by_hand():
    """Half of the larger square: a value that left the clip's range towards the return is held by the clipped one."""
    value, old, returns = torch.tensor([1.0, 0.1, -1.0]), torch.zeros(3), torch.tensor([1.0, 1.0, 1.0])
    assert value_loss(value, old, returns, 2, 0.2).item() == pytest.approx((0.64 + 0.81 + 4.0) / 4)
    assert value_loss(value, old, returns, 2, math.inf).item() == pytest.approx((0.0 + 0.81 + 4.0) / 4)


def test_the_kl_controller():
    """Ziegler et al. 2019, section 2.2: an error clipped to 0.2 either way, over a horizon of samples."""
    assert adapted(0.1, 6.0, 6.0, 64, 1000) == 0.1
    assert adapted(0.1, 6.6, 6.0, 100, 1000) == pytest.approx(0.1 * 1.01)
    assert adapted(0.1, 600.0, 6.0, 100, 1000) == pytest.approx(0.1 * 1.02)
    assert adapted(0.1, 0.0, 6.0, 100, 1000) == pytest.approx(0.1 * 0.98)
