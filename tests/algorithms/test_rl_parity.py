"""GRPO's family on the same tensors beside TRL 1.16's own code: stored values, and where trl is installed, that code.

docs/conventions.md says where trainers differ. CISPO's bound is 1 + clip_high here and epsilon_high there; GSPO's
denominator is the mean over sequences in both.
"""

import importlib.util
import json
from itertools import pairwise

import pytest
import torch
from burnish.algorithms.data.rewards import overlong_punishment
from burnish.algorithms.objectives.denominators import constant_length, sequence_mean, token_mean
from burnish.algorithms.objectives.kl import k3_loss, rho_k3_loss
from burnish.algorithms.objectives.policy import cispo_loss, clipped_loss, gspo_loss


@pytest.fixture
def golden(data):
    return json.loads((data / "trl_rl.json").read_text())


def ours(golden) -> dict[str, tuple[float, list[float]]]:
    """Name -> loss, and gradient of each token."""
    given = {name: torch.tensor(values) for name, values in golden["inputs"].items()}
    lengths = given["lengths"]
    real = torch.arange(given["logprob"].shape[1]) < lengths[:, None]
    logprob = given["logprob"][real].requires_grad_()
    old, ref, weights = (given[name][real] for name in ("old_logprob", "ref_logprob", "weights"))
    advantage = given["advantage"].repeat_interleave(lengths)

    tokens, sequences, constant = (
        denominators.repeat_interleave(lengths)
        for denominators in (
            token_mean(lengths),
            sequence_mean(lengths),
            constant_length(lengths, golden["max_length"]),
        )
    )

    clip, beta = (0.2, 0.28), golden["beta"]
    policy = clipped_loss(logprob, old, advantage, tokens, *clip)[0]
    losses = {
        "dapo": policy,
        "grpo": clipped_loss(logprob, old, advantage, sequences, *clip)[0],
        "dr_grpo": clipped_loss(logprob, old, advantage, constant, *clip)[0],
        "dual_clip": clipped_loss(logprob, old, advantage, tokens, *clip, dual_clip=1.3)[0],
        "gspo": gspo_loss(logprob, old, advantage, lengths, sequences, 0.05, 0.08)[0],
        "cispo": cispo_loss(logprob, old, advantage, tokens, clip_high=0.4)[0],
        "k3": policy + beta * k3_loss(logprob, ref, tokens)[0],
        "rho_k3": policy + beta * rho_k3_loss(logprob, old, ref, tokens)[0],
        "weights": clipped_loss(logprob, old, advantage * weights, tokens, *clip)[0],
    }

    gradient = lambda loss: torch.autograd.grad(loss, logprob, retain_graph=True)[0].tolist()
    return {name: (loss.item(), gradient(loss)) for name, loss in losses.items()}


def test_losses_and_gradients_are_those_of_trl(golden):
    found = ours(golden)
    assert set(found) == set(golden["losses"])
    for name, theirs in golden["losses"].items():
        loss, gradient = found[name]
        assert loss == pytest.approx(theirs["loss"], rel=1e-6, abs=1e-6), name
        assert gradient == pytest.approx(theirs["gradient"], rel=1e-5, abs=1e-6), name


def test_no_two_cases_agree(golden):
    """A control: the stored tensors tell the losses apart, so that none can stand in for another."""
    losses = sorted(loss for loss, _ in ours(golden).values())
    assert all(b - a > 1e-4 for a, b in pairwise(losses))


def test_the_overlong_punishment_is_that_of_trl(golden):
    found = overlong_punishment(12, 5)(completion_ids=[[1] * n for n in range(13)])
    assert list(found) == pytest.approx(golden["overlong"]) and found[-1] == -1 and found[7] == 0


def test_the_stored_values_are_what_trl_computes(data, golden):
    pytest.importorskip("trl")
    spec = importlib.util.spec_from_file_location("make_trl_rl_golden", data / "make_trl_rl_golden.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.make_inputs() == golden["inputs"] and module.overlong() == pytest.approx(golden["overlong"])
    for name, found in module.compute(golden["inputs"]).items():
        assert found["loss"] == pytest.approx(golden["losses"][name]["loss"], rel=1e-6)
        assert found["gradient"] == pytest.approx(golden["losses"][name]["gradient"], rel=1e-5, abs=1e-7)
