"""Negative controls: faults planted in copies of objectives/ and of sft's losses, each caught by the named check.

The checks are those of the tests beside this file in their smallest form. A faithful copy must pass them all.
"""

import math
from types import ModuleType

import pytest
import torch
from controlled import Place, assert_caught, assert_faithful, same
from faults import Fault, control, faults_of

# ---- the checks


@control
def policy_losses_have_their_values(module: ModuleType, place: Place) -> None:
    """By hand, for each side of the clip and each sign of the advantage; gradients where the loss stops one."""
    ratio, advantage = torch.tensor([0.5, 0.5, 1.5, 1.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    logprob, zero = ratio.log().requires_grad_(), torch.zeros(4)
    grad = lambda loss: torch.autograd.grad(loss, logprob)[0].tolist()

    def agree(loss: torch.Tensor, value: float, gradient: list[float]) -> None:
        same(loss.item(), value)
        for found, expected in zip(grad(loss), gradient, strict=True):
            same(found, expected)

    # PPO's clip, and the second one for negative advantages
    clip = (0.2, 0.28)
    agree(
        module.clipped_loss(logprob, zero, advantage, 2, *clip)[0],
        -(0.5 - 0.8 + 1.28 - 1.5) / 2,
        [-0.25, 0, 0, 0.75],
    )
    dual = module.clipped_loss(logprob, zero, advantage, 1, *clip, 1.3)[0]
    agree(dual, -(0.5 - 0.8 + 1.28 - 1.3), [-0.5, 0, 0, 0])

    # CISPO: the clipped ratio is a weight without a gradient
    weighed = sum(
        w * a * x for w, a, x in zip([0.5, 0.5, 1.4, 1.4], advantage.tolist(), logprob.tolist(), strict=True)
    )
    cispo = module.cispo_loss(logprob, zero, advantage, 1, clip_high=0.4)[0]
    agree(cispo, -weighed, [-0.5, 0.5, -1.4, 1.4])

    # GSPO: a sequence has one ratio, the geometric mean of its tokens'
    mean = (0.5 * 1.5) ** 0.5
    gspo = module.gspo_loss(logprob, zero, torch.ones(4), torch.tensor([2, 2]), 4, 0.6, 1.0)[0]
    agree(gspo, -(0.5 + 0.5 + 1.5 + 1.5) / 4, [-0.125, -0.125, -0.375, -0.375])
    mixed = module.gspo_loss(logprob[1:3], zero[:2], torch.ones(2), torch.tensor([2]), 2, 0.6, 1.0)[0]
    same(mixed.item(), -mean)

    far = module.clipped_loss(torch.tensor([0.0]), torch.tensor([-1e4]), torch.tensor([-1.0]), 1.0)[0]
    assert far.isfinite(), "expected a bounded weight"

    old = torch.tensor([0.5, 2.5]).log()
    assert module.truncated_weights(old, zero[:2], 2.0).tolist() == [0.5, 2], "expected weights of 0.5 and 2"
    assert module.masked_weights(old, zero[:2], 2.0).tolist() == [0.5, 0], "expected weights of 0.5 and 0"


@control
def kl_losses_have_their_values(module: ModuleType, place: Place) -> None:
    """By hand, with a reference that finds all tokens sure."""
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5])
    logprob, zero = ratio.log().requires_grad_(), torch.zeros(4)

    def agree(loss: torch.Tensor, value: float, gradient: list[float]) -> None:
        same(loss.item(), value)
        for found, expected in zip(torch.autograd.grad(loss, logprob)[0].tolist(), gradient, strict=True):
            same(found, expected)

    d = [math.log(x) for x in ratio.tolist()]
    k3 = [math.exp(-x) + x - 1 for x in d]
    agree(module.k2_loss(logprob, zero, 1)[0], sum(x * x for x in d) / 2, d)
    agree(module.k3_loss(logprob, zero, 1)[0], sum(k3), [1 - math.exp(-x) for x in d])
    same(
        module.rho_k3_loss(logprob, zero, zero, 2)[0].item(),
        sum(r * k for r, k in zip(ratio.tolist(), k3, strict=True)) / 2,
    )


@control
def advantages_have_their_values(module: ModuleType, place: Place) -> None:
    rewards = torch.tensor([[0.0, 1.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    for function, expected in (
        (lambda r: module.group_advantages(r, 0.0)[:1], [-1.5, 0.5, 0.5, 0.5]),
        (lambda r: module.group_advantages(r)[1:], [0, 0, 0, 0]),
        (lambda r: module.mean_advantages(r)[:1], [-0.75, 0.25, 0.25, 0.25]),
        (lambda r: module.rloo_advantages(r)[:1], [-1, 1 / 3, 1 / 3, 1 / 3]),
    ):
        for a, b in zip(function(rewards)[0].tolist(), expected, strict=True):
            same(a, b)

    # GAE passes over what is off the mask, here gamma = 0.9 and lambda = 0.8
    mask = torch.tensor([[True, True, False, True, False]])
    r, v = torch.tensor([[0.1, 0.2, 9.0, 1.0, 9.0]]), torch.tensor([[0.3, -0.2, 9.0, 0.5, 9.0]])
    d = [0.1 + 0.9 * -0.2 - 0.3, 0.2 + 0.9 * 0.5 + 0.2, 1.0 - 0.5]
    expected = [d[0] + 0.72 * d[1] + 0.72**2 * d[2], d[1] + 0.72 * d[2], 0, d[2], 0]
    for a, b in zip(module.gae(r, v, mask, 0.9, 0.8)[0].tolist(), expected, strict=True):
        same(a, b)

    whitened, scaled = module.whiten(r, mask), module.scale(r, mask)
    same(whitened[mask].mean().item(), 0)
    same(whitened[mask].var(correction=0).item(), 1, 1e-4)
    same((scaled[mask] / r[mask]).std().item(), 0)
    same(scaled[mask].var(correction=0).item(), 1, 1e-4)
    assert not whitened[~mask].any() and not scaled[~mask].any(), "expected nothing off the mask"


@control
def denominators_have_their_values(module: ModuleType, place: Place) -> None:
    lengths, values = torch.tensor([1, 4]), torch.tensor([10.0, 1.0, 2.0, 3.0, 6.0])
    for denominators, expected in (
        (module.token_mean(lengths), 22 / 5),
        (module.sequence_mean(lengths), (10 + 3) / 2),
        (module.constant_length(lengths, 8), 22 / 16),
    ):
        same((values / denominators.repeat_interleave(lengths)).sum().item(), expected)


@control
def sft_losses_have_their_values(module: ModuleType, place: Place) -> None:
    logprob = torch.tensor([-0.5, -1.0, -2.0], requires_grad=True)
    same(module.sft_loss(logprob, 4).item(), 3.5 / 4)
    (gradient,) = torch.autograd.grad(module.dft_loss(logprob, 4), logprob)
    for found, x in zip(gradient.tolist(), (-0.5, -1.0, -2.0), strict=True):
        same(found, -math.exp(x) / 4)


# ---- planted faults

FAULTS = faults_of(__file__)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_fault_is_caught(fault: Fault, place: Place, monkeypatch):
    assert_caught(fault, place, monkeypatch)


@pytest.mark.parametrize("file", sorted({fault.file for fault in FAULTS}))
def test_a_faithful_copy_passes(file: str, place: Place, monkeypatch):
    assert_faithful(file, FAULTS, place, monkeypatch)
