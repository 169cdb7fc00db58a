"""A gradient penalty, sum(dy/dx ** 2) of y.sum(), has the right gradient or raises."""

import pytest
import torch
from burnish.bench.case import Case, leaves, make_inputs, tensor, widen
from burnish.bench.registry import CASES

DIFFERENTIABLE = [
    case for case in CASES if leaves(case, make_inputs(case, case.shapes[-1], torch.float32, "cpu"))
]


def penalty_gradients(case: Case, op, tensors) -> dict[str, torch.Tensor | None]:
    names = leaves(case, tensors)
    wanted = {n: tensor(tensors, n).detach().requires_grad_() for n in names}
    outputs = op(**{**tensors, **wanted}, **case.options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum(y.sum() for y in outputs if y.requires_grad)
    first = torch.autograd.grad(total, list(wanted.values()), create_graph=True, allow_unused=True)
    if not any(g is not None and g.requires_grad for g in first):
        return dict.fromkeys(names)  # the op is linear in all of them
    penalty = sum(g.square().sum() for g in first if g is not None)
    found = torch.autograd.grad(penalty, list(wanted.values()), allow_unused=True)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.name)
def test_a_gradient_penalty_is_right_or_raises(case, device):
    tensors = make_inputs(case, case.shapes[-1], torch.float32, device)
    try:
        found = penalty_gradients(case, case.fused, tensors)
    except (NotImplementedError, RuntimeError) as error:
        assert "first derivatives alone" in str(error) or "is not implemented" in str(error)
        return
    truth = penalty_gradients(case, case.reference, widen(tensors, torch.float64))
    for name, expected in truth.items():
        if expected is None:
            assert found[name] is None or not found[name].any()
            continue
        scale = 1 + expected.abs().max()
        assert found[name] is not None, f"{case.name}: {name}: expected a gradient, got none"
        assert (found[name] - expected).abs().max() < 1e-3 * scale, f"{case.name}: {name}"
