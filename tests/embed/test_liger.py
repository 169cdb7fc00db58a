"""The seam beside Liger's fused losses: the same loss and the same gradients, composed of our ops.

Its chunked losses are plain torch; its kernels for cross-entropy and JSD are Triton, so Triton interprets them here, in
a process of their own.
"""

import os
import subprocess
import sys

import pytest
import torch
from burnish.algorithms.distill import divergence_loss
from burnish.algorithms.objectives.kl import k3_loss
from burnish.algorithms.objectives.policy import clipped_loss
from burnish.algorithms.objectives.preference import dpo_loss
from burnish.kernels import token_divergence, token_logprobs

pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")

B, T, C, V = 4, 5, 8, 301
BUDGET = 20_000  # bytes: several blocks


def make(*shapes):
    return [(torch.randn(*shape) * shape[-1] ** -0.5).requires_grad_() for shape in shapes]


def assert_same(ours, theirs, leaves):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    got, want = (torch.autograd.grad(loss, leaves) for loss in (ours, theirs))
    for g, w in zip(got, want, strict=True):
        assert w.abs().max() > 0
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)


def test_dpo():
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    hidden, weight, bias = make((B, T, C), (V, C), (V,))
    reference, reference_weight = torch.randn(B, T, C), torch.randn(V, C) * C**-0.5
    targets = torch.randint(V, (B, T))
    targets[0, :2], targets[3, 4] = -100, -100
    liger = LigerFusedLinearDPOLoss(beta=0.3, compiled=False)
    theirs, _ = liger(
        weight,
        hidden,
        targets,
        bias,
        ref_input=reference,
        ref_weight=reference_weight,
        ref_bias=bias.detach(),
    )

    def sums(hidden, weight, bias):
        flat = hidden.reshape(B * T, C), weight, targets.reshape(B * T)
        return token_logprobs(*flat, bias=bias, memory_budget=BUDGET)[0].view(B, T).sum(1)

    gain = sums(hidden, weight, bias) - sums(reference, reference_weight, bias.detach())
    assert_same(dpo_loss(gain[: B // 2], gain[B // 2 :], B // 2, 0.3), theirs, [hidden, weight, bias])


def test_grpo():
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    hidden, weight = make((B, T, C), (V, C))
    targets, mask = torch.randint(V, (B, T)), torch.ones(B, T)
    mask[1, 3:], mask[2, 1:] = 0, 0
    advantage = torch.tensor([1.0, -0.5, 0.3, -2.0])

    score = {"temperature": 0.8, "memory_budget": BUDGET}
    flat = hidden.reshape(B * T, C), weight, targets.reshape(B * T).where(mask.flatten() > 0, -100)
    logprob = token_logprobs(*flat, **score)[0]
    old, ref = (logprob.detach() + scale * torch.randn(B * T) for scale in (0.3, 0.5))  # some are clipped

    liger = LigerFusedLinearGRPOLoss(beta=0.1, compiled=False, loss_type="bnpo", temperature=0.8)
    logps = {"ref_per_token_logps": ref.view(B, T), "old_per_token_logps": old.view(B, T)}
    theirs, _ = liger(hidden, weight, targets, mask, advantage, **logps)

    live = mask.flatten() > 0
    ours = [x[live] for x in (logprob, old, advantage.repeat_interleave(T))]
    loss, metrics = clipped_loss(*ours, mask.sum())
    assert 0 < metrics["clip_fraction"] < 1
    kl, _ = k3_loss(logprob[live], ref[live], mask.sum())
    assert_same(loss + 0.1 * kl, theirs, [hidden, weight])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_distillation(beta):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    hidden, weight = make((B * T, C), (V, C))
    teacher, teacher_weight = torch.randn(B * T, 6), torch.randn(V, 6)
    labels = torch.randint(V, (B * T,))
    labels[3:6] = -100
    liger = LigerFusedLinearJSDLoss(0.0, 1.0, beta, temperature=0.7, compiled=False, chunk_size=8)
    theirs = liger(hidden, weight, teacher, teacher_weight, labels)
    options = {"beta": beta, "temperature": 0.7, "mask": labels >= 0, "memory_budget": BUDGET}
    found = token_divergence(hidden, weight, teacher, teacher_weight, **options)
    assert_same(divergence_loss(found, int((labels >= 0).sum())), theirs, [hidden, weight])


KERNELS = """
import sys, torch
from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD
given = torch.load(sys.argv[1])
hidden, weight = (given[name].requires_grad_() for name in ("hidden", "weight"))
found = []
for loss in (
    LigerFusedLinearCrossEntropyLoss(lse_square_scale=1e-2)(weight, hidden, given["labels"]),
    LigerFusedLinearJSD(0.3, temperature=0.7)(
        hidden, weight, given["teacher"], given["teacher_weight"], given["labels"]
    ),
):
    found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
torch.save(found, sys.argv[1])
"""


def test_kernels(tmp_path):
    hidden, weight = make((7, C), (V, C))  # the interpreter pays for each row
    labels = torch.randint(V, (7,))
    labels[3:5] = -100
    teacher = {"teacher": torch.randn(7, C), "teacher_weight": torch.randn(V, C)}
    torch.save({"hidden": hidden, "weight": weight, "labels": labels} | teacher, tmp_path / "file.pt")
    command = [sys.executable, "-c", KERNELS, str(tmp_path / "file.pt")]
    subprocess.run(command, check=True, env=os.environ | {"TRITON_INTERPRET": "1"})

    count = int((labels >= 0).sum())
    logprob, lse, _ = token_logprobs(hidden, weight, labels, memory_budget=BUDGET)
    options = {"beta": 0.3, "temperature": 0.7, "mask": labels >= 0, "memory_budget": BUDGET}
    divergence = token_divergence(hidden, weight, *teacher.values(), **options)
    losses = (1e-2 * lse.square() - logprob).sum() / count, divergence.sum() / count
    for loss, want in zip(losses, torch.load(tmp_path / "file.pt"), strict=True):
        got = loss.detach(), *torch.autograd.grad(loss, (hidden, weight))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)
