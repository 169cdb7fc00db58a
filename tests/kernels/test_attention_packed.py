"""Attention over segments: prompts that are shared, rows of no segment."""

import pytest
import torch
from attention_cases import draw, grads, lay, make, table
from burnish.kernels import attention, flash_attention
from burnish.kernels.plain.attention import flash_attention_reference
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """The bytes of the largest new tensor of three dimensions or more, by a factory of torch."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.new_empty.default, torch.ops.aten.empty.memory_format):
            self.bytes = max(self.bytes, out.numel() * out.element_size())
        return out


def unshared(lengths, parents):
    """Rows of the shared layout in the order of the unshared batch, and the lengths of that batch."""
    cu = lay(lengths).tolist()
    rows, lengths_alone = [], []
    for i, parent in enumerate(parents):
        if parent == -1 and i in parents:
            continue  # a prompt that its children repeat
        own = [*range(cu[parent], cu[parent + 1])] if parent != -1 else []
        own += range(cu[i], cu[i + 1])
        rows += own
        lengths_alone.append(len(own))
    return torch.tensor(rows), lengths_alone


@pytest.mark.parametrize("options", [{}, {"window": 6}, {"softcap": 2.0}, {"sinks": True}], ids=str)
def test_shared_prompt_is_the_unshared_batch(options):
    lengths, parents = [9, 4, 6, 1, 5, 8, 7], [-1, 0, 0, -1, -1, 4, 4]
    rows, lengths_alone = unshared(lengths, parents)
    leaves = {
        name: draw(sum(lengths), heads, 8, dtype=torch.float64)
        for name, heads in (("q", 4), ("k", 2), ("v", 2))
    }
    if options.pop("sinks", False):
        options = {"sinks": draw(4, dtype=torch.float64)}
    for x in leaves.values():
        x.requires_grad_()
    shared = flash_attention_reference(**leaves, **options, cu_seqlens=lay(lengths), parents=table(parents))
    copies = {name: x[rows] for name, x in leaves.items()}
    alone = flash_attention_reference(**copies, **options, cu_seqlens=lay(lengths_alone))
    torch.testing.assert_close(shared[rows], alone, rtol=1e-13, atol=1e-13)

    # every copy of a prompt's row passes its own gradient; the shared row gets their sum
    dout = torch.randn_like(alone)
    got = torch.autograd.grad(shared[rows], list(leaves.values()), dout)
    want = torch.autograd.grad(alone, list(leaves.values()), dout)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[0, 9, 4], [9, 0, 0]])
def test_an_empty_prompt_and_empty_samples(lengths, device):
    tensors = {
        name: draw(sum(lengths), heads, 16, device=device)
        for name, heads in zip("qkv", (4, 2, 2), strict=True)
    }
    options = {"cu_seqlens": lay(lengths, device), "parents": table([-1, 0, 0], device)}
    expected = flash_attention_reference(**tensors, **options)
    torch.testing.assert_close(flash_attention(**tensors, **options), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["padded", "padded, all"])
def test_rows_of_no_segment_are_zero_with_zero_gradients(name, device):
    tensors, options = make(name, device=device)
    cu = options["cu_seqlens"]
    row = torch.arange(tensors["q"].shape[0], device=device)
    outside = (row < cu[0]) | (row >= cu[-1])
    assert 0 < outside.sum() < row.numel()
    ones = torch.ones(row.numel(), 4, tensors["v"].shape[-1], device=device)
    out, lse, *gradients = grads(flash_attention, tensors, options, ones, ones[..., 0] * ~outside[:, None])
    assert (lse[outside] == -torch.inf).all() and lse[~outside].isfinite().all()
    for x in (out, *gradients[:3]):
        assert (x[outside] == 0).all() and (x[~outside] != 0).any() and x.isfinite().all()
    assert all(x.isfinite().all() for x in gradients[3:])


def test_shares_of_a_shared_prompt_are_bounded(monkeypatch, device):
    """fp32 shares of dk and dv, of the query heads of a group: as many as fit, the same gradients."""
    tensors = {"q": draw(40, 8, 8, device=device), "k": draw(40, 1, 8, device=device)}
    tensors["v"] = draw(40, 1, 8, device=device)
    options = {"cu_seqlens": lay([9, 20, 11], device), "parents": table([-1, 0, 0], device)}
    share = 4 * 2 * 40 * 8
    assert (
        attention._parts(8, share) == 8
        and attention._parts(8, 2**28) == 1
        and attention._parts(6, 2**26) == 3
    )

    want = grads(flash_attention_reference, tensors, options, torch.ones_like(tensors["q"]))
    for most in (1, 5 * share):
        monkeypatch.setattr(attention, "SHARES", most)
        with Largest() as largest:
            got = grads(flash_attention, tensors, options, torch.ones_like(tensors["q"]))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        assert largest.bytes <= max(most // 2, 4 * tensors["q"].numel())
