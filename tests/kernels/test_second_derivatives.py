"""A gradient penalty, sum(dy/dx ** 2) of a loss of y, has the right gradient or raises."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from burnish.bench.cases.case import Case, leaves, make_inputs, tensor, widen
from burnish.bench.cases.registry import CASES
from burnish.kernels import _chip, _op, norm, rms_norm
from burnish.kernels.norm import rms_norm_reference
from faults import check_of, control, faults_of
from planted import plant
from torch import Tensor
from torch.utils.checkpoint import checkpoint

DIFFERENTIABLE = [
    case for case in CASES if leaves(case, make_inputs(case, case.shapes[-1], torch.float32, "cpu"))
]
ONE_OF_EACH_OP = {case.op: case for case in reversed(DIFFERENTIABLE)}.values()
TRITON = _chip.INTERPRET or torch.cuda.is_available()


def small_inputs(case: Case, device: str) -> dict[str, Any]:
    return make_inputs(case, case.shapes[min(1, len(case.shapes) - 1)], torch.float32, device)


def penalty_gradients(
    case: Case, op: Callable[..., Any], tensors: dict[str, Any], usage: str
) -> dict[str, Tensor | None]:
    names = leaves(case, tensors)
    wanted = {n: tensor(tensors, n).detach().requires_grad_() for n in names}
    given = tensors | {n: t + t.sin() if usage == "of a function" else t for n, t in wanted.items()}
    if usage == "recomputed":
        outputs = checkpoint(lambda **given: op(**given, **case.options), use_reentrant=False, **given)
    else:
        outputs = op(**given, **case.options)
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.requires_grad]
    total = torch.stack([(y if usage == "of the sum" else y.square()).sum() for y in outputs]).sum()
    first = torch.autograd.grad(total, list(wanted.values()), create_graph=True, allow_unused=True)
    if not any(g is not None and g.requires_grad for g in first):
        return dict.fromkeys(names)  # the op is linear in all of them
    penalty = torch.stack([g.square().sum() for g in first if g is not None]).sum()
    found = torch.autograd.grad(penalty, list(wanted.values()), allow_unused=True)
    return dict(zip(names, found, strict=True))


@control
def check(case: Case, usage: str, device: str) -> None:
    tensors = small_inputs(case, device)
    try:
        found = penalty_gradients(case, case.fused, tensors, usage)
    except (NotImplementedError, RuntimeError) as error:
        assert "only first derivatives" in str(error) or "is not implemented" in str(error)
        return
    truth = penalty_gradients(case, case.reference, widen(tensors, torch.float64), usage)
    for name, expected in truth.items():
        if expected is None:
            assert found[name] is None or not found[name].any()
            continue
        scale = 1 + expected.abs().max()
        assert found[name] is not None, f"{case.name}: {name}: expected a gradient, got none"
        assert (found[name] - expected).abs().max() < 1e-3 * scale, f"{case.name}: {name}"


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.name)
def test_a_gradient_penalty_is_right_or_raises(case, device):
    check(case, "of the sum", device)


@pytest.mark.parametrize("usage", ["of squares", "of a function", "recomputed"])
@pytest.mark.parametrize("case", ONE_OF_EACH_OP, ids=lambda case: case.name)
def test_a_gradient_penalty_in_other_places(case, usage, device):
    """The loss is not linear, the inputs are computed, or activations are checkpointed."""
    check(case, usage, device)


def first_of(op: str) -> Case:
    return next(case for case in ONE_OF_EACH_OP if case.op == op)


@pytest.mark.parametrize("usage", ["of the sum", "of squares", "of a function", "recomputed"])
def test_without_the_guard_it_is_wrong(usage, device, copy_of, monkeypatch):
    """The controls: rms_norm's own statistics on a CPU, and what every registered op goes through on a GPU."""
    (fault,) = faults_of(__file__)
    if TRITON:
        monkeypatch.setattr(_op, "_first_order", lambda _name, backward: backward)
        monkeypatch.setattr(norm, "rms_norm", copy_of("norm").rms_norm)
    else:
        plant(fault, monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check_of(fault)(replace(first_of("rms_norm"), fused=norm.rms_norm), usage, device)


@pytest.mark.parametrize("op", ["rms_norm", "swiglu", "lora_linear", "moe_mlp"])
def test_a_graph_that_nothing_derives_again_is_left_alone(op, device):
    """create_graph and retain_graph, without a second derivative: the gradients of a plain backward."""
    case = first_of(op)
    tensors = small_inputs(case, device)
    names = leaves(case, tensors)
    wanted = {n: tensor(tensors, n).detach().requires_grad_() for n in names}
    y = case.fused(**{**tensors, **wanted}, **case.options)
    grads = [
        torch.autograd.grad(y.square().sum(), list(wanted.values()), **options)
        for options in ({"retain_graph": True}, {"create_graph": True}, {})
    ]
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_compiled_penalty_is_right_or_raises(backend, device):
    """Added to a loss, so that a penalty without a gradient of its own would pass in silence."""
    x, weight = torch.randn(4, 8, device=device), torch.randn(8, device=device)

    def gradient(op: Callable[..., Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        loss = op(leaf, weight).square().sum()
        (g,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return torch.autograd.grad(loss + g.square().sum(), leaf)[0]

    try:
        found = gradient(torch.compile(rms_norm, fullgraph=True, backend=backend))
    except (NotImplementedError, RuntimeError) as error:
        assert "only first derivatives" in str(error) or "does not currently support double backward" in str(
            error
        )
        return
    torch.testing.assert_close(found, gradient(rms_norm_reference), rtol=1e-4, atol=1e-4)
