"""The dropout of an adapter: one mask forward and backward, a function of seed and place."""

import pytest
import torch
from burnish.kernels import (
    lora_linear,
)
from burnish.kernels.plain.lora import drop

close = torch.testing.assert_close
SEED = 5 << 40 | 11


def masks(x, W, a, b, dropout, seed):
    """The mask of the forward and of the backward, read from the op: with W = 0, a = I and b = I both are drop(1)."""
    y = lora_linear(x, W, a, b, 1.0, dropout=dropout, seed=seed)
    (dx,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), dx


def test_one_mask_forward_backward_and_everywhere(device):
    K = 40
    eye, x = torch.eye(K, device=device), torch.ones(33, K, device=device, requires_grad=True)
    forward, backward = masks(x, torch.zeros(K, K, device=device), eye, eye, 0.3, SEED)
    expected = drop(torch.ones(33, K), 0.3, torch.tensor(SEED)).to(device)
    close(forward, expected)
    close(backward, expected)
    a = eye.clone().requires_grad_()
    y = lora_linear(x, torch.zeros(K, K, device=device), a, eye, 1.0, dropout=0.3, seed=SEED)
    (da,) = torch.autograd.grad(y.sum(), a)
    close(da[0], expected.sum(0), rtol=1e-5, atol=1e-5)


def test_another_seed_another_mask(device):
    x = torch.ones(64, 64)
    first, *others = (
        drop(x, 0.5, torch.tensor(s)) != 0
        for s in (SEED, SEED + 1, SEED + (1 << 32), SEED + (1 << 40), -SEED)
    )
    for other in others:
        assert 0.45 < (first == other).float().mean() < 0.55


@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.9])
def test_expectation_and_variance(dropout):
    """Kept elements, by the whole, by row, by column and among neighbours: within four standard errors."""
    M, K = 512, 768
    kept = (drop(torch.ones(M, K), dropout, torch.tensor(SEED)) != 0).double()
    share, deviation = 1 - dropout, (dropout * (1 - dropout)) ** 0.5
    assert abs(kept.mean() - share) < 4 * deviation / (M * K) ** 0.5
    for dim, n in ((0, M), (1, K)):
        lines = (kept.mean(dim) - share) / (deviation / n**0.5)  # standard normal
        assert abs(lines.var() - 1) < 4 * (2 / len(lines)) ** 0.5 and lines.abs().max() < 5
    centred = kept - share
    for shifted in ((centred[1:] * centred[:-1]), (centred[:, 1:] * centred[:, :-1])):
        assert abs(shifted.mean()) < 4 * deviation**2 / shifted.numel() ** 0.5
    scaled = drop(torch.full((M, K), 3.0), dropout, torch.tensor(SEED))
    assert abs(scaled.mean() - 3) < 4 * 3 * (dropout / share / (M * K)) ** 0.5


def test_seed_as_a_number_or_a_tensor(device):
    x, W = torch.randn(7, 33, device=device), torch.randn(21, 33, device=device)
    a, b = torch.randn(4, 33, device=device), torch.randn(21, 4, device=device)
    first, second = (
        lora_linear(x, W, a, b, 0.5, dropout=0.5, seed=s) for s in (SEED, torch.tensor(SEED, device=device))
    )
    assert torch.equal(first, second)
