"""The meaning of a rotation, beyond the accuracy that test_cases.py holds every op to."""

import mmap

import pytest
import torch
from burnish.kernels import apply_rope
from burnish.kernels._chip import INTERPRET
from burnish.kernels.rope import apply_rope_reference
from torch.utils._python_dispatch import TorchDispatchMode

TRITON = INTERPRET or torch.cuda.is_available()
LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
close = torch.testing.assert_close


def tables(positions, rotary, device, factor=1.0):
    angle = torch.arange(positions, device=device)[:, None] / 10.0 ** torch.linspace(
        0, 1, rotary // 2, device=device
    )
    return factor * angle.cos(), factor * angle.sin()


def interleave(x):
    """Half layout to interleaved: (x0, x1, y0, y1) -> (x0, y0, x1, y1)."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def test_a_pair_turns_as_a_complex_number(device):
    q, k = torch.randn(6, 3, 8, device=device), torch.randn(6, 1, 8, device=device)
    cos, sin = tables(6, 8, device)
    turned, _ = apply_rope(q, k, cos, sin, interleaved=True)
    z = torch.view_as_complex(q.unflatten(-1, (4, 2))) * torch.complex(cos, sin)[:, None]
    close(turned, torch.view_as_real(z).flatten(-2))


def test_the_layouts_differ_by_a_permutation(device):
    q, k = torch.randn(5, 3, 12, device=device), torch.randn(5, 1, 12, device=device)
    cos, sin = tables(5, 12, device)
    half = apply_rope(q, k, cos, sin)
    interleaved = apply_rope(interleave(q), interleave(k), cos, sin, interleaved=True)
    for a, b in zip(half, interleaved, strict=True):
        close(interleave(a), b)


@LAYOUTS
def test_scores_depend_on_the_distance_alone(interleaved, device):
    cos, sin = tables(40, 16, device)
    q, k = (
        torch.randn(2, 16, device=device).expand(20, 2, 16),
        torch.randn(1, 16, device=device).expand(20, 1, 16),
    )
    scores = []
    for start in (0, 17):
        positions = torch.arange(start, start + 20, device=device)
        turned_q, turned_k = apply_rope(q, k, cos, sin, positions, interleaved=interleaved)
        scores.append(torch.einsum("thd,shd->hts", turned_q, turned_k.expand(20, 2, 16)))
    close(scores[0], scores[1], atol=1e-4, rtol=1e-4)


@LAYOUTS
def test_partial_rotation_passes_the_rest(interleaved, device):
    q, k = torch.randn(4, 3, 22, device=device), torch.randn(4, 2, 22, device=device)
    cos, sin = tables(4, 6, device)
    partial = apply_rope(q, k, cos, sin, interleaved=interleaved)
    whole = apply_rope(q[..., :6], k[..., :6], cos, sin, interleaved=interleaved)
    for x, a, b in zip((q, k), partial, whole, strict=True):
        assert torch.equal(a[..., 6:], x[..., 6:])
        close(a[..., :6], b)


def test_positions_choose_the_row(device):
    cos, sin = tables(30, 8, device)
    q, k = torch.randn(2, 5, 3, 8, device=device), torch.randn(2, 5, 1, 8, device=device)
    positions = torch.randint(0, 30, (2, 5), device=device)
    batched = apply_rope(q, k, cos, sin, positions)
    packed = apply_rope(q.flatten(0, 1), k.flatten(0, 1), cos, sin, positions.flatten())
    row_by_row = apply_rope(
        q.flatten(0, 1), k.flatten(0, 1), cos[positions.flatten()], sin[positions.flatten()]
    )
    counted = apply_rope(q, k, cos, sin, torch.arange(5, device=device).expand(2, 5))
    for i in range(2):
        assert torch.equal(batched[i].flatten(0, 1), packed[i])
        assert torch.equal(packed[i], row_by_row[i])
        assert torch.equal(counted[i], apply_rope(q, k, cos, sin)[i])


@LAYOUTS
def test_the_gradient_turns_back(interleaved, device):
    q, k = (torch.randn(6, 2, 10, device=device, requires_grad=True) for _ in range(2))
    turned = apply_rope(q, k, *tables(6, 8, device), interleaved=interleaved)
    close(torch.autograd.grad(turned, (q, k), turned), (q, k))


@LAYOUTS
def test_a_scaled_table_scales_the_gradient(interleaved, device):
    """yarn multiplies both tables by a factor: the backward is the transpose, not the inverse."""
    q, k = (torch.randn(6, 2, 8, device=device, requires_grad=True) for _ in range(2))
    cos, sin = tables(6, 8, device, factor=1.7)
    upstream = [torch.randn_like(q), torch.randn_like(k)]
    ours, truth = (
        torch.autograd.grad(op(q, k, cos, sin, interleaved=interleaved), (q, k), upstream)
        for op in (apply_rope, apply_rope_reference)
    )
    close(ours, truth)


def test_the_tables_take_no_gradient(device):
    q, k = torch.randn(3, 2, 4, device=device, requires_grad=True), torch.randn(3, 1, 4, device=device)
    cos, sin = (t.requires_grad_() for t in tables(3, 4, device))
    dq, dcos = torch.autograd.grad(apply_rope(q, k, cos, sin)[0].sum(), (q, cos), allow_unused=True)
    assert dq is not None and dcos is None


class Copies(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += [func.__name__] * (
            func.__name__.split(".")[0] in {"clone", "copy_", "_to_copy", "contiguous"}
        )
        return func(*args, **(kwargs or {}))


def test_parts_of_a_fused_projection_are_read_in_place(device):
    total, H, G, D = 11, 4, 2, 16
    qkv = torch.randn(total, (H + 2 * G) * D, device=device)
    q, k = qkv[:, : H * D].view(total, H, D), qkv[:, H * D : (H + G) * D].view(total, G, D)
    heads_first = torch.randn(2, H, total, D, device=device).transpose(1, 2)
    cos, sin = tables(total, D, device)

    with Copies() as copies:
        strided = apply_rope(q, k, cos, sin)
        transposed = apply_rope(heads_first, heads_first, cos, sin)
        if TRITON:
            assert copies.seen == []
            apply_rope(q[..., ::2], k[..., ::2], cos[:, ::2].contiguous(), sin[:, ::2].contiguous())
            assert len(copies.seen) == 4, (
                "the control: two tables and two inputs that cannot be read in place"
            )

    for a, b in zip(strided, apply_rope(q.contiguous(), k.contiguous(), cos, sin), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(transposed[0], apply_rope(heads_first.contiguous(), heads_first, cos, sin)[0])


@pytest.mark.skipif(not TRITON, reason="the kernels' own addresses")
def test_tokens_past_2_31_elements(device):
    if device == "cuda":
        buffer = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    else:  # only the pages that are touched come into being
        buffer = torch.frombuffer(mmap.mmap(-1, 2 * (2**31 + 64)), dtype=torch.float16)
    for shape, strides in (
        ((3, 2, 8), (2**30, 8, 1)),
        ((2, 3, 8), (8, 2**30, 1)),
    ):  # tokens far apart, then heads
        q = buffer.as_strided(shape, strides)
        q.copy_(torch.randn(shape, device=device))
        far, near = (apply_rope(x, x, *tables(3, 8, device)) for x in (q, q.contiguous()))
        assert torch.equal(far[0], near[0])


@pytest.mark.skipif(TRITON, reason="there such tokens are NaN")
@pytest.mark.parametrize("position", [-1, 12])
def test_a_graph_refuses_a_position_too(position):
    """By an assertion of torch's: a graph cannot raise of its own."""
    q, positions = torch.randn(3, 2, 8), torch.arange(3)
    compiled = torch.compile(apply_rope, fullgraph=True, backend="eager")
    close(
        compiled(q, q, *tables(12, 8, "cpu"), positions), apply_rope(q, q, *tables(12, 8, "cpu"), positions)
    )
    positions[1] = position
    with pytest.raises(RuntimeError, match="positions: expected numbers from 0 to 11"):
        compiled(q, q, *tables(12, 8, "cpu"), positions)


def test_refusals(device):
    q, k, table = (torch.zeros(*s, device=device) for s in ((5, 4, 8), (5, 2, 8), (9, 4)))
    with pytest.raises(ValueError, match=r"k: expected shape \(T=5, G=2, D=8\), got \(6, 2, 8\)"):
        apply_rope(q, torch.zeros(6, 2, 8, device=device), table, table)
    with pytest.raises(ValueError, match="cos: expected at most D/2 = 4 columns, got 5"):
        apply_rope(q, k, torch.zeros(9, 5, device=device), torch.zeros(9, 5, device=device))
    with pytest.raises(ValueError, match=r"sin: expected shape \(positions=9, half_rotary=4\), got \(9, 3\)"):
        apply_rope(q, k, table, table[:, :3])
    with pytest.raises(ValueError, match="cos: expected at least T = 5 rows, got 3"):
        apply_rope(q, k, table[:3], table[:3])
    with pytest.raises(ValueError, match=r"positions: expected shape \(T=5\), got \(4,\)"):
        apply_rope(q, k, table, table, torch.arange(4, device=device))
    with pytest.raises(ValueError, match=r"positions: expected dtype torch\.int64, got torch\.int32"):
        apply_rope(q, k, table, table, torch.arange(5, device=device, dtype=torch.int32))
