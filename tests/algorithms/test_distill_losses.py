"""Losses of `burnish distill`: beside TRL's on stored logits, by finite differences, and on average."""

import importlib.util
import json
from itertools import pairwise

import pytest
import torch
from burnish.algorithms.distill import divergence_loss, policy_gradient_loss, sequence_loss
from burnish.kernels import token_divergence, topk_divergence


@pytest.fixture
def golden(data):
    return json.loads((data / "trl_distill.json").read_text())


def test_the_divergence_loss_is_that_of_trls_gkd(golden):
    """Hidden states are logits where the head is the identity. No two cases agree, so that each setting is felt."""
    inputs, num_tokens = golden["inputs"], golden["num_tokens"]
    mask, head = torch.tensor(inputs["mask"]), torch.eye(7, dtype=torch.float64)

    for name, theirs in golden["losses"].items():
        beta, temperature = map(float, name.split(", "))
        student, teacher = (
            torch.tensor(inputs[who], dtype=torch.float64)[mask] for who in ("student", "teacher")
        )
        student.requires_grad_()
        found = token_divergence(student, head, teacher, head, beta=beta, temperature=temperature)
        loss = divergence_loss(found, num_tokens)
        assert loss.item() == pytest.approx(theirs["loss"], abs=1e-6), name
        (gradient,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(gradient, torch.tensor(theirs["gradient"]).double(), atol=1e-6, rtol=0)
        assert divergence_loss(found, num_tokens, 4.0).item() == pytest.approx(4 * theirs["loss"], abs=1e-5)

    losses = sorted(case["loss"] for case in golden["losses"].values())
    assert all(b - a > 1e-4 for a, b in pairwise(losses))


def test_the_stored_values_are_what_trl_computes(data, golden):
    pytest.importorskip("trl")
    spec = importlib.util.spec_from_file_location("make", data / "make_trl_distill_golden.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.make_inputs() == golden["inputs"]
    for name, found in module.compute(golden["inputs"]).items():
        assert found["loss"] == pytest.approx(golden["losses"][name]["loss"], rel=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_losses_by_finite_differences(beta):
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    hidden, head = draw(5, 3).requires_grad_(), draw(6, 3).requires_grad_()
    teacher_hidden, teacher_head = draw(5, 4), draw(6, 4)
    logprobs, ids = torch.log_softmax(teacher_hidden @ teacher_head.T / 1.7, -1).topk(2)

    def whole(hidden, head):
        found = token_divergence(hidden, head, teacher_hidden, teacher_head, beta=beta, temperature=1.7)
        return divergence_loss(found, 9, 1.7**2)

    def stored(hidden, head):
        found = topk_divergence(hidden, head, ids.int(), logprobs, beta=beta, temperature=1.7)
        return divergence_loss(found, 9)

    assert torch.autograd.gradcheck(whole, (hidden, head))
    assert torch.autograd.gradcheck(stored, (hidden, head))
    assert torch.autograd.gradcheck(lambda x: sequence_loss(x, 9), draw(5).requires_grad_())


def test_the_policy_gradient_is_that_of_the_reverse_kl_on_average():
    """Over a whole vocabulary: its expectation, value and gradient, are those of KL(p_S || p_T)."""
    logits, teacher = torch.randn(2, 6, dtype=torch.float64)
    logits.requires_grad_()
    log_s, log_t = torch.log_softmax(logits, 0), torch.log_softmax(teacher, 0)
    kl = (log_s.exp() * (log_s - log_t)).sum()
    p = log_s.detach().exp()
    mean = sum(p[i] * policy_gradient_loss(log_s[i : i + 1], log_t[i : i + 1], 1) for i in range(6))
    assert isinstance(mean, torch.Tensor) and mean.item() == pytest.approx(kl.item())
    found, wanted = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (mean, kl))
    torch.testing.assert_close(found, wanted)
    assert wanted.abs().max() > 1e-2


def test_each_loss_of_no_tokens_is_a_finite_zero_with_a_gradient_path():
    logprob = -torch.rand(3).requires_grad_()
    for loss in (
        divergence_loss(logprob[:0], 1),
        policy_gradient_loss(logprob[:0], torch.empty(0), 1),
        sequence_loss(logprob[:0], 1),
    ):
        (gradient,) = torch.autograd.grad(loss, logprob, retain_graph=True)
        assert loss.item() == 0 and not gradient.any()
