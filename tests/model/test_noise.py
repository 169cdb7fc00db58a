"""The noise that samples are drawn by: a pure function of seed, sample and step, and uniform."""

import pytest
import torch
from burnish.model.batch import _mix, _signed, uniform


def test_noise_is_a_pure_function_and_uniform():
    first = torch.tensor([_signed(0x9E3779B97F4A7C15)])
    assert _mix(first).item() == _signed(
        0xE220A8397B1DCDAF
    )  # the published generator's first output from seed 0

    sample, step = torch.arange(400).repeat_interleave(400), torch.arange(400).repeat(400)
    noise = uniform(5, sample, step)
    assert noise.dtype == torch.float64 and noise.min() >= 0 and noise.max() < 1
    assert noise.unique().numel() == 160_000
    zeros = torch.zeros(100, dtype=torch.int64)
    for corner in (uniform(0, torch.arange(100), zeros), uniform(0, zeros, torch.arange(100))):
        assert 0.001 < corner[0] < 0.999 and 0.35 < corner.mean() < 0.65
    assert torch.equal(uniform(5, sample[777:778], step[777:778]), noise[777:778])
    assert noise.mean().item() == pytest.approx(0.5, abs=0.003)

    counts = (noise * 64).long().bincount(minlength=64)
    assert ((counts - 2500) ** 2 / 2500).sum() < 120  # chi-squared with 63 degrees of freedom, p about 1e-5
    table = noise.view(400, 400)
    for a, b in (
        (table[:, 1:], table[:, :-1]),
        (table[1:], table[:-1]),
        (table, uniform(6, sample, step).view(400, 400)),
    ):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.0125  # five deviations
