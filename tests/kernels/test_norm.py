"""The meaning of RMSNorm, beyond the accuracy that test_cases.py holds every op to."""

import pytest
import torch
import torch.nn.functional as F
from burnish.kernels import add_rms_norm, norm, rms_norm
from burnish.kernels._chip import INTERPRET
from burnish.kernels.norm import add_rms_norm_reference, rms_norm_reference
from torch.autograd.graph import saved_tensors_hooks

TRITON = INTERPRET or torch.cuda.is_available()
HALF = torch.float16 if INTERPRET else torch.bfloat16
close = torch.testing.assert_close


def leaf(*shape, device, dtype=torch.float32):
    return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(
    "rows", [3, 5, 40]
)  # interpreted: dw by columns, of one tile each, of tiles that are walked
def test_equals_torch(rows, device):
    x, w, dy = leaf(rows, 70, device=device), leaf(70, device=device), torch.randn(rows, 70, device=device)
    ours, theirs = rms_norm(x, w, 1e-5), F.rms_norm(x, (70,), w, 1e-5)
    close(ours, theirs)
    close(torch.autograd.grad(ours, (x, w), dy), torch.autograd.grad(theirs, (x, w), dy))


def test_a_row_has_unit_root_mean_square(device):
    y = rms_norm(100 * torch.randn(9, 130, device=device), torch.ones(130, device=device))
    close(y.square().mean(-1), torch.ones(9, device=device))


def test_eps_carries_a_row_of_zeros(device):
    x, w = torch.zeros(2, 8, device=device, requires_grad=True), leaf(8, device=device)
    y = rms_norm(x, w, eps=1e-4)
    dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert not y.any() and not dw.any()
    close(dx, (100 * w).detach().expand(2, 8))  # 1 / sqrt(eps)


def test_unit_offset_is_one_plus_weight(device):
    x, w = leaf(6, 40, device=device), leaf(40, device=device)
    offset, plain = rms_norm(x, w, unit_offset=True), rms_norm(x, 1 + w)
    close(offset, plain)
    close(torch.autograd.grad(offset.sum(), (x, w)), torch.autograd.grad(plain.sum(), (x, w)))


def test_heads_are_rows(device):
    x, w = torch.randn(2, 7, 3, 16, device=device), torch.randn(16, device=device)
    alone = torch.stack([rms_norm(x[:, :, h], w) for h in range(3)], 2)
    assert torch.equal(rms_norm(x, w), alone)


def test_the_sum_that_is_returned_is_the_sum_that_is_normalised(device):
    x, residual = (torch.randn(4, 33, device=device, dtype=HALF) for _ in range(2))
    w = torch.randn(33, device=device, dtype=HALF)
    y, h = add_rms_norm(x, residual, w)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, rms_norm(h, w))


@pytest.mark.parametrize("used", ["y", "h", "both"])
def test_gradient_of_the_sum(used, device):
    x, residual, w = leaf(3, 50, device=device), leaf(3, 50, device=device), leaf(50, device=device)
    upstream = torch.randn(2, 3, 50, device=device)

    def gradients(op):
        y, h = op(x, residual, w)
        terms = {"y": (y * upstream[0]).sum(), "h": (h * upstream[1]).sum()}
        loss = terms["y"] + terms["h"] if used == "both" else terms[used]
        return torch.autograd.grad(loss, (x, residual, w), allow_unused=True)

    (dx, dresidual, dw), truth = gradients(add_rms_norm), gradients(add_rms_norm_reference)
    assert torch.equal(dx, dresidual)
    close((dx, dresidual), truth[:2])
    assert (dw is None and truth[2] is None) if used == "h" else torch.allclose(dw, truth[2], atol=1e-5)


def test_a_half_precision_branch_on_a_full_precision_stream(device):
    x, residual, w = (
        leaf(4, 64, device=device, dtype=HALF),
        leaf(4, 64, device=device),
        leaf(64, device=device),
    )
    y, h = add_rms_norm(x, residual, w)
    assert (y.dtype, h.dtype) == (HALF, torch.float32)
    assert torch.equal(h, x + residual)
    dx, dresidual, dw = torch.autograd.grad((y.float() + h).sum(), (x, residual, w))
    assert (dx.dtype, dresidual.dtype, dw.dtype) == (HALF, torch.float32, torch.float32)
    assert torch.equal(dx, dresidual.to(HALF))


def test_weight_gradient_sums_every_row(device):
    """More rows than all programs hold at once, so each program walks; x = 1 makes the sum known."""
    rows, programs = 1027, 8
    x, w = torch.ones(rows, 16, device=device), torch.zeros(16, device=device, requires_grad=True)
    dy = torch.arange(rows, device=device).remainder(programs + 1).float()[:, None].expand(rows, 16)
    (dw,) = torch.autograd.grad(rms_norm(x, w), w, dy)
    close(dw, dy.sum(0), rtol=1e-5, atol=0.0)


def test_a_frozen_weight_changes_no_other_gradient(device):
    x, w, dy = leaf(5, 48, device=device), leaf(48, device=device), torch.randn(5, 48, device=device)
    dx, _ = torch.autograd.grad(rms_norm(x, w), (x, w), dy)
    frozen = w.detach()
    (dx_frozen,) = torch.autograd.grad(rms_norm(x, frozen), x, dy)
    assert torch.equal(dx, dx_frozen)


@pytest.mark.parametrize("N", [1, 3, 64, 100, 576, 1024, 5120, 6144, 16384])
def test_every_width_has_a_tile(N):
    for tile in (norm.norm_forward(N, 32), norm.norm_backward(N, 32), norm.norm_walk(N, 2)[1]):
        rows, columns, warps = tile["BLOCK_R"], tile["BLOCK_N"], tile["num_warps"]
        assert all(n.bit_count() == 1 for n in (rows, columns, warps)) and N <= columns < 2 * N
        assert rows * columns in (1024, 2048) or rows == 1


@pytest.mark.skipif(not TRITON, reason="the CPU path has one way for every number of rows")
@pytest.mark.parametrize("residual", [False, True])
def test_few_rows_by_columns(residual, monkeypatch, device):
    monkeypatch.setattr(norm, "NORM_FEW_ROWS", 1 << 20)
    shape = (150, 100)  # more rows, and more columns, than one program of dw takes at once
    h, dy, dh = (torch.randn(shape, device=device) for _ in range(3))
    w, rstd = torch.randn(100, device=device), torch.rand(150, device=device)
    one_launch = norm._input_and_weight_grad(dy, dh if residual else None, h, w, rstd, False, True)
    monkeypatch.setattr(norm, "NORM_FEW_ROWS", 0)
    close(one_launch, norm._input_and_weight_grad(dy, dh if residual else None, h, w, rstd, False, True))


@pytest.mark.skipif(not TRITON, reason="the CPU path has one way for every width")
@pytest.mark.parametrize("residual", [False, True])
def test_rows_wider_than_the_registers(residual, monkeypatch, device):
    monkeypatch.setattr(norm, "NORM_WIDEST", 64)
    monkeypatch.setattr(norm, "NORM_WIDE", {"BLOCK_N": 128, "num_warps": 4})
    shape = (19, 300)
    tensors = [leaf(*shape, device=device) for _ in range(1 + residual)] + [leaf(300, device=device)]
    op, reference = (add_rms_norm, add_rms_norm_reference) if residual else (rms_norm, rms_norm_reference)
    outputs = [out if residual else (out,) for out in (op(*tensors), reference(*tensors))]
    upstream = [torch.randn(shape, device=device) for _ in outputs[0]]
    close(outputs[0], outputs[1])
    close(*(torch.autograd.grad(out, tensors, upstream) for out in outputs), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not TRITON, reason="what Triton's path saves")
def test_saves_one_number_a_row(device):
    x, w = leaf(8, 64, device=device), leaf(64, device=device)
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, w)
    own = {x.data_ptr(), w.data_ptr()}
    assert sum(t.numel() for t in saved if t.data_ptr() not in own) == 8


def test_refusals(device):
    x = torch.zeros(2, 64, device=device)
    with pytest.raises(ValueError, match=r"weight: expected shape \(hidden=64\), got \(32,\)"):
        rms_norm(x, torch.zeros(32, device=device))
    with pytest.raises(
        ValueError, match=r"residual: expected shape \(x.shape\[0\]=2, x.shape\[1\]=64\), got \(64,\)"
    ):
        add_rms_norm(x, torch.zeros(64, device=device), torch.zeros(64, device=device))
    if TRITON:
        with pytest.raises(ValueError, match=r"x: expected dtype .*, got torch.float64"):
            rms_norm(x.double(), torch.zeros(64, device=device))
