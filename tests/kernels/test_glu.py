"""The meaning of the gated units, beyond the accuracy that test_cases.py holds every op to."""

import math
import mmap

import pytest
import torch
from burnish.kernels import clamped_swiglu, geglu, swiglu
from burnish.kernels._chip import INTERPRET
from torch.autograd.graph import saved_tensors_hooks

TRITON = INTERPRET or torch.cuda.is_available()
OPS = pytest.mark.parametrize("op", [swiglu, geglu, clamped_swiglu])
close = torch.testing.assert_close


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    "op, formula",
    [
        (swiglu, lambda g, u: g * sigmoid(g) * u),
        (geglu, lambda g, u: 0.5 * g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u),
        (clamped_swiglu, lambda g, u: (min(max(u, -7), 7) + 1) * min(g, 7) * sigmoid(1.702 * min(g, 7))),
    ],
)
def test_equals_the_formula_of_its_source(op, formula, device):
    values = [-9.0, -7.0, -1.5, -0.1, 0.0, 0.3, 2.0, 7.0, 11.0]
    gate, up = torch.meshgrid(*[torch.tensor(values, device=device)] * 2, indexing="ij")
    expected = torch.tensor([[formula(g, u) for u in values] for g in values], device=device)
    close(op(gate, up), expected)


def test_clamped_elements_have_no_gradient(device):
    gate = torch.tensor([-9.0, 6.9, 7.0, 7.1, 1.0, 1.0, 1.0], device=device, requires_grad=True)
    up = torch.tensor([1.0, 1.0, 1.0, 1.0, 7.1, -7.1, 7.0], device=device, requires_grad=True)
    dgate, dup = torch.autograd.grad(clamped_swiglu(gate, up).sum(), (gate, up))
    assert dgate.ne(0).tolist() == [True, True, True, False, True, True, True]
    assert dup.ne(0).tolist() == [True, True, True, True, False, False, True]


def test_limit_and_alpha_are_arguments(device):
    gate, up = torch.randn(2, 5, 9, device=device)
    close(clamped_swiglu(gate, up - 1, alpha=1.0, limit=1e6), swiglu(gate, up))
    assert clamped_swiglu(gate, up, limit=0.5).max() <= 1.5 * 0.5


@OPS
def test_halves_of_a_fused_projection_are_read_in_place(op, device):
    fused = torch.randn(2, 5, 2 * 67, device=device, requires_grad=True)
    gate, up = fused.chunk(2, -1)
    copies = [t.detach().contiguous().requires_grad_() for t in (gate, up)]
    upstream = torch.randn(2, 5, 67, device=device)
    out, separate = op(gate, up), op(*copies)
    assert out.is_contiguous()
    close(out, separate)
    (dfused,) = torch.autograd.grad(out, fused, upstream)
    close(dfused, torch.cat(torch.autograd.grad(separate, copies, upstream), -1))


def past_2_31(device):
    """More than 2^31 elements, of which only the pages that are touched come into being."""
    if device == "cuda":
        return torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    return torch.frombuffer(mmap.mmap(-1, 2 * (2**31 + 64)), dtype=torch.float16)


@pytest.mark.skipif(not TRITON, reason="the kernels' own addresses")
def test_rows_past_2_31_elements(device):
    gate = past_2_31(device).as_strided((3, 8), (2**30, 1))
    gate.copy_(torch.randn(3, 8, device=device))
    up = torch.randn(3, 8, device=device).half()
    assert torch.equal(swiglu(gate, up), swiglu(gate.contiguous(), up))


@pytest.mark.skipif(not TRITON, reason="the CPU path is plain autograd, which saves the activation")
@OPS
def test_saves_its_inputs_alone(op, device):
    gate, up = (torch.randn(4, 33, device=device, requires_grad=True) for _ in range(2))
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        op(gate, up)
    assert set(saved) == {gate.data_ptr(), up.data_ptr()}


@OPS
def test_far_from_zero(op, device):
    """exp overflows on the way: the sigmoid is still 0 or 1 and its slope 0."""
    gate = torch.tensor([-1e4, -200.0, 200.0, 1e4], device=device, requires_grad=True)
    up = torch.full((4,), 2.0, device=device, requires_grad=True)
    out = op(gate, up)
    dgate, dup = torch.autograd.grad(out.sum(), (gate, up))
    ceiling = [7.0, 7.0] if op is clamped_swiglu else [200.0, 1e4]
    factor = 3.0 if op is clamped_swiglu else 2.0
    close(dup, torch.tensor([0.0, 0.0, *ceiling], device=device), rtol=1e-5, atol=1e-5)
    close(out, factor * dup)
    close(dgate, torch.tensor([0.0, 0.0, *[0.0 if op is clamped_swiglu else 2.0] * 2], device=device))


@OPS
def test_nan_passes(op, device):
    x = torch.tensor([float("nan"), 1.0], device=device)
    assert op(x, x.flip(0)).isnan().all()


@OPS
def test_refusals(op, device):
    gate = torch.zeros(2, 8, device=device)
    with pytest.raises(
        ValueError, match=r"up: expected shape \(gate.shape\[0\]=2, gate.shape\[1\]=8\), got \(2, 4\)"
    ):
        op(gate, gate[:, :4])
    with pytest.raises(ValueError, match=r"up: expected dtype torch\.float32, got torch\.float16"):
        op(gate, gate.half())
    if TRITON:
        with pytest.raises(ValueError, match=r"gate: expected dtype .*, got torch.float64"):
            op(gate.double(), gate.double())
