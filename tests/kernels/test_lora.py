"""The meaning of an adapter, beyond the accuracy that test_cases.py holds every op to."""

import pytest
import torch
import torch.nn.functional as F
from burnish.bench.cases.lora import by_path
from burnish.kernels import (
    _lora_paths,
    dequantize_nf4,
    lora,
    lora_linear,
    lora_linears,
    low_rank,
    quantize_nf4,
)
from burnish.kernels._chip import INTERPRET
from burnish.kernels.lora import PATHS, lora_linear_reference
from burnish.kernels.low_rank import launch_expand
from burnish.kernels.records import Rows
from torch.autograd.graph import saved_tensors_hooks

TRITON = INTERPRET or torch.cuda.is_available()
close = torch.testing.assert_close
SEED = 5 << 40 | 11


def adapter(N, K, R, device, stack=()):
    a = torch.randn(*stack, R, K, device=device) * K**-0.5
    return a.requires_grad_(), (torch.randn(*stack, N, R, device=device) * R**-0.5).requires_grad_()


def gradients(y, *tensors, upstream=None):
    return torch.autograd.grad(y, tensors, torch.ones_like(y) if upstream is None else upstream)


@pytest.mark.parametrize("path", PATHS if TRITON else PATHS[:1])
@pytest.mark.parametrize("R", [1, 3, 8, 16, 64, pytest.param(256, marks=pytest.mark.slow)])
def test_any_rank(R, path, device):
    """The gradients of x, A, B, the bias and DoRA's magnitude."""
    x, bias = torch.randn(19, 33, device=device, requires_grad=True), torch.randn(21, device=device)
    W, (a, b) = torch.randn(21, 33, device=device), adapter(21, 33, R, device)
    magnitude = torch.rand(21, device=device, requires_grad=True)
    upstream, bias = torch.randn(19, 21, device=device), bias.requires_grad_()
    dropout = {"dropout": 0.3, "seed": SEED}
    for options in ({}, {"magnitude": magnitude}, *([dropout] if path == "cublas" else [])):
        y = by_path(path)(x, W, a, b, 0.5, bias=bias, **options)
        truth = lora_linear_reference(x, W, a, b, 0.5, bias=bias, **options)
        close(y, truth, rtol=1e-5, atol=3e-5)
        wanted = x, a, b, bias, *([magnitude] if "magnitude" in options else [])
        for ours, true in zip(*(gradients(t, *wanted, upstream=upstream) for t in (y, truth)), strict=True):
            close(ours, true, rtol=1e-5, atol=5e-5)


def test_fresh_adapter_has_the_bits_of_the_base(device):
    if device == "cuda" or INTERPRET:
        pytest.skip("on CUDA the accuracy rule holds, not the bits")
    x, W, bias = torch.randn(7, 33), torch.randn(21, 33), torch.randn(21)
    a, _ = adapter(21, 33, 4, device)
    for weight in (W, quantize_nf4(W)):
        dense = W if weight is W else dequantize_nf4(quantize_nf4(W))
        expected, b = F.linear(x, dense, bias), torch.zeros(21, 4)
        assert torch.equal(lora_linear(x, weight, a, b, 2.0, bias=bias), expected)
        for out in lora_linears(x, [weight] * 2, [a, a], [b, b], [2.0, 2.0], biases=[bias, bias]):
            assert torch.equal(out, expected)


@pytest.mark.parametrize("dora", [False, True])
def test_merged_equals_unmerged(dora, device):
    x, W = torch.randn(7, 33, device=device), torch.randn(21, 33, device=device)
    a, b = adapter(21, 33, 4, device)
    merged = W + 0.5 * b @ a
    magnitude = torch.rand(21, device=device) if dora else None
    if magnitude is not None:
        merged = merged * (magnitude / merged.norm(dim=1))[:, None]
    close(lora_linear(x, W, a, b, 0.5, magnitude=magnitude), F.linear(x, merged), rtol=1e-5, atol=1e-5)


def test_dora_of_the_base_norm_changes_nothing(device):
    x, W = torch.randn(7, 33, device=device), torch.randn(21, 33, device=device)
    a, _ = adapter(21, 33, 4, device)
    y = lora_linear(x, W, a, torch.zeros(21, 4, device=device), 0.5, magnitude=W.norm(dim=1))
    close(y, F.linear(x, W), rtol=1e-5, atol=1e-5)


# ---- what the backward reads


@pytest.mark.parametrize("together", [True, False])
def test_biases_may_be_stepped_before_the_backward(together, device):
    """Nobody reads their values in the backward, as behind F.linear. Each gradient has its bias' dtype."""
    (x, *each), options, _ = layers(device, biases=True)
    biases = [
        options["biases"][0],
        *(bias.detach().half().requires_grad_() for bias in options["biases"][1:]),
    ]
    if not together:
        each = zip(*each, biases, strict=True)
        outs = [lora_linear(x, W, a, b, s, bias=bias) for W, a, b, s, bias in each]
    else:
        outs = lora_linears(x, *each, biases=biases)

    with torch.no_grad():
        for bias in biases:
            bias.add_(1)
    sum(out.sum() for out in outs).backward()
    for bias in biases:
        assert torch.equal(bias.grad, torch.full_like(bias, len(x)))


def test_saves_x_and_s_but_no_mask(device):
    """Nor the weight multiplied out. What is saved beside the inputs is S, (rows, R), and an empty norm."""
    x, (a, b) = torch.randn(40, 64, device=device, requires_grad=True), adapter(48, 64, 8, device)
    four_bit = quantize_nf4(torch.randn(48, 64, device=device))
    inputs = {t.data_ptr() for t in (x, a, b, *four_bit.tensors()) if t is not None}
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, four_bit, a, b, 0.5, dropout=0.5, seed=torch.tensor(SEED, device=device))
    own = [t for t in saved if t.data_ptr() not in inputs and t.numel() > 1]
    assert [tuple(t.shape) for t in own] == [(40, 8)]


# ---- several adapters


def test_rows_have_their_own_adapter(device):
    x, W = torch.randn(2, 9, 33, device=device, requires_grad=True), torch.randn(21, 33, device=device)
    a, b = adapter(21, 33, 4, device, stack=(3,))
    which = torch.tensor(
        [[0] * 4 + [2] * 5, [-1] * 3 + [2, 0, 2, -1, 0, 0]], device=device
    )  # nobody has adapter 1
    y = lora_linear(x, W, a, b, 0.5, adapter=which)
    for e in (-1, 0, 2):
        alone = F.linear(x, W) if e < 0 else lora_linear(x, W, a[e], b[e], 0.5)
        close(y[which == e], alone[which == e], rtol=1e-5, atol=1e-5)
    da, db = gradients(y, a, b)
    assert not da[1].any() and not db[1].any()
    rows = x[which == 2]
    ea, eb = gradients(lora_linear(rows, W, a[2], b[2], 0.5), a, b)
    close(da[2], ea[2], rtol=1e-5, atol=1e-4)
    close(db[2], eb[2], rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not TRITON, reason="a CPU multiplies the base out at any number of rows")
@pytest.mark.parametrize("options", [{}, {"dropout": 0.3, "seed": SEED}, {"adapter": True}], ids=str)
def test_few_rows_read_the_base_in_4_bits(options, monkeypatch, device):
    """The op reads it as nf4_linear does; the backward, and more rows, multiply it out."""
    calls = []
    whole = lora.dense_of
    monkeypatch.setattr(lora, "dense_of", lambda *args: calls.append(1) or whole(*args))
    four_bit, bias = quantize_nf4(torch.randn(21, 64, device=device)), torch.randn(21, device=device)
    a, b = adapter(21, 64, 4, device, stack=(3,) if "adapter" in options else ())

    for M, forward in ((19, 0), (65, 1)):
        x = torch.randn(M, 64, device=device, requires_grad=True)
        given = options | (
            {"adapter": torch.arange(M, device=device) % 4 - 1} if "adapter" in options else {}
        )
        calls.clear()
        y = lora_linear(x, four_bit, a, b, 0.5, bias=bias, **given)
        assert len(calls) == forward

        truth = lora_linear_reference(x, four_bit, a, b, 0.5, bias=bias, **given)
        close(y, truth, rtol=1e-5, atol=3e-5)
        for ours, true in zip(*(gradients(t, x, a, b) for t in (y, truth)), strict=True):
            close(ours, true, rtol=1e-5, atol=1e-4)


# ---- several layers of one x

WIDTHS, RANKS = (21, 7, 7), (3, 8, 3)
TOGETHER = {
    "plain": {},
    "bias": {"biases": True},
    "dropout": {"dropout": 0.3, "seed": SEED},
    "DoRA": {"magnitudes": True, "biases": True},
    "4 bits": {"four_bit": True},
    "several adapters": {"adapter": torch.arange(19) % 4 - 1, "dropout": 0.3, "seed": SEED},
}


def layers(device, *, four_bit=False, biases=False, magnitudes=False, **options):
    """x, the arguments of lora_linears, and every tensor that has a gradient."""
    stack = (3,) if "adapter" in options else ()
    x = torch.randn(19, 64, device=device, requires_grad=True)
    weights = [torch.randn(N, 64, device=device) for N in WIDTHS]
    weights = [quantize_nf4(W) for W in weights] if four_bit else weights
    a, b = zip(*(adapter(N, 64, R, device, stack) for N, R in zip(WIDTHS, RANKS, strict=True)), strict=True)
    vectors = {
        name: [torch.rand(N, device=device, requires_grad=True) for N in WIDTHS]
        for name, given in (("biases", biases), ("magnitudes", magnitudes))
        if given
    }
    options = {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in options.items()}
    wanted = [x, *a, *b, *(t for given in vectors.values() for t in given)]
    return (x, weights, a, b, (0.5, 1.0, 2.0)), vectors | options, wanted


@pytest.mark.parametrize("features", TOGETHER)
def test_together_as_each_alone(features, device):
    """Outputs and every gradient; the mask of a seed is one for all."""
    (x, *each), options, wanted = layers(device, **TOGETHER[features])
    upstream = [torch.randn(19, N, device=device) for N in WIDTHS]
    together = lora_linears(x, *each, **options)
    vectors = [options.pop(name, [None for _ in WIDTHS]) for name in ("biases", "magnitudes")]
    alone = [
        lora_linear(x, W, a, b, s, bias=bias, magnitude=m, **options)
        for W, a, b, s, bias, m in zip(*each, *vectors, strict=True)
    ]
    for ours, true in zip(together, alone, strict=True):
        close(ours, true, rtol=1e-5, atol=1e-5)
    found, expected = (torch.autograd.grad(outs, wanted, upstream) for outs in (together, alone))
    for ours, true in zip(found, expected, strict=True):
        close(ours, true, rtol=1e-5, atol=1e-4)


def test_together_x_is_read_once(monkeypatch, device):
    """Forward by one S, backward by one dA: with dropout each would hash x anew; S is saved as one."""
    reads = []
    for name in ("low_rank_forward", "a_gradient", "add_adapter_dx_"):
        whole = getattr(lora, name)
        monkeypatch.setattr(
            lora, name, lambda *args, name=name, whole=whole: reads.append(name) or whole(*args)
        )
    (x, *each), options, wanted = layers(device, dropout=0.3, seed=SEED, four_bit=True)
    inputs = {t.data_ptr() for t in (*wanted, *(p for W in each[0] for p in W.tensors()))}
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outs = lora_linears(x, *each, **options)
    assert [t.shape for t in saved if t.data_ptr() not in inputs and t.numel() > 1] == [(19, sum(RANKS))]
    torch.autograd.grad(outs, wanted, [torch.ones_like(out) for out in outs])
    assert reads == ["low_rank_forward", "a_gradient", "add_adapter_dx_"]


def test_together_only_what_is_asked_for(device):
    (x, W, a, b, s), _, _ = layers(device)
    a = [t.detach() for t in a]
    b = [b[0], b[1].detach(), b[2]]
    outs = lora_linears(x.detach(), W, a, b, s)
    assert [out.requires_grad for out in outs] == [True] * 3
    sum(out.sum() for out in outs).backward()
    assert b[0].grad is not None and b[2].grad is not None and b[1].grad is None and x.grad is None


def test_together_refusals(device):
    (x, W, a, b, s), _, _ = layers(device)
    with pytest.raises(ValueError, match="lora_b: expected one for each of 3 weights, got 2"):
        lora_linears(x, W, a, b[:2], s)
    with pytest.raises(ValueError, match="biases: expected none, or one for each of 3 weights, got 1"):
        lora_linears(x, W, a, b, s, biases=[torch.zeros(21, device=device)])
    some = [torch.zeros(21, device=device), None, torch.zeros(7, device=device)]
    with pytest.raises(ValueError, match="magnitudes: expected none, or one for each of 3 weights, got 2"):
        lora_linears(x, W, a, b, s, magnitudes=some)  # a graph would drop their gradients
    with pytest.raises(
        ValueError, match="weights: expected at least one, all dense or all 4-bit of one format, got 3"
    ):
        lora_linears(x, [quantize_nf4(W[0]), *W[1:]], a, b, s)
    with pytest.raises(ValueError, match=r"lora_a: expected shape \(rank=3, in=64\), got \(3, 8\)"):
        lora_linears(x, W, [t[:, :8] for t in a], b, s)


# ---- which path


def test_the_path_is_the_measured_one(monkeypatch, device):
    """By device, dtype and shape, up to twice as many rows; elsewhere the baseline's own calls."""
    x = torch.randn(37, 33, device=device)
    key = ("chip", "float32", 32, 21, 33, 4)
    monkeypatch.setitem(_lora_paths.PATHS, key, "fused")
    assert lora._measured_path(x, (21, 4)) == "cublas"  # another device
    monkeypatch.setattr(lora, "device_name", lambda _: "chip")
    rows = {M: lora._measured_path(x[:1].expand(M, -1), (21, 4)) for M in (16, 31, 32, 63, 64)}
    assert rows == {16: "cublas", 31: "cublas", 32: "fused", 63: "fused", 64: "cublas"}
    assert [
        lora._measured_path(x, (22, 4)),
        lora._measured_path(x, (21, 3)),
        lora._measured_path(x.half(), (21, 4)),
    ] == ["cublas"] * 3


@pytest.mark.skipif(not TRITON, reason="a CPU has one path")
@pytest.mark.parametrize("path", PATHS)
def test_the_op_takes_the_measured_path(path, monkeypatch, device):
    a, b = adapter(21, 33, 4, device)
    x, W = torch.randn(37, 33, device=device), torch.randn(21, 33, device=device)
    called = []
    for name in ("_launch_fused", "launch_expand", "launch_ds_and_db"):
        whole = getattr(lora, name)
        monkeypatch.setattr(
            lora,
            name,
            lambda *args, name=name, whole=whole, **more: called.append(name) or whole(*args, **more),
        )

    monkeypatch.setattr(lora, "device_name", lambda _: "chip")
    monkeypatch.setitem(_lora_paths.PATHS, ("chip", "float32", 32, 21, 33, 4), path)
    expected = {
        "cublas": [],
        "epilogue": ["launch_expand", "launch_ds_and_db"],
        "fused": ["_launch_fused", "launch_ds_and_db"],
    }

    for op in (lora_linear, lambda x, W, a, b, s: lora_linears(x, [W], [a], [b], [s])[0]):
        called.clear()
        y = op(x, W, a, b, 0.5)
        gradients(y, a, b)
        assert called == expected[path]
        close(y, lora_linear_reference(x, W, a, b, 0.5), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not TRITON, reason="a CPU makes dB in one product")
def test_partial_sums_have_a_budget(monkeypatch, device):
    """Beyond it, dS and dB are two products; the gradients stay what they are."""
    x, W = torch.randn(37, 33, device=device), torch.randn(21, 33, device=device)
    (a, b), called = adapter(21, 33, 4, device), []
    whole = lora.launch_ds_and_db
    monkeypatch.setattr(lora, "launch_ds_and_db", lambda *args: called.append(1) or whole(*args))
    expected = gradients(lora_linear_reference(x, W, a, b, 0.5), a, b)
    for budget, calls in ((21 * 4 * 4, 1), (21 * 4 * 4 - 1, 0)):
        monkeypatch.setattr(low_rank, "PARTIAL_BUDGET", budget)
        called.clear()
        found = gradients(by_path("fused")(x, W, a, b, 0.5), a, b)
        assert len(called) == calls
        for ours, true in zip(found, expected, strict=True):
            close(ours, true, rtol=1e-5, atol=1e-4)


def test_the_budget_at_sizes_of_models():
    """32,768 rows of an up projection with 14,336 columns: 0.94 GB at rank 64, 3.8 GB at 256."""
    assert low_rank.partial_sums_fit(8192, 4096, 16) and low_rank.partial_sums_fit(32768, 14336, 16)
    assert not low_rank.partial_sums_fit(32768, 14336, 64) and not low_rank.partial_sums_fit(
        32768, 14336, 256
    )


@pytest.mark.skipif(not TRITON, reason="torch's own products follow torch's own setting")
def test_products_follow_torchs_precision(monkeypatch, device):
    """Every product of the file, at every path: none is rounded otherwise than torch says."""
    asked = []
    for module in (lora, low_rank):
        monkeypatch.setattr(module, "precision", lambda: asked.append(1) or "tf32")
    for path, options, least in (
        ("cublas", {"dropout": 0.3, "seed": SEED}, 3),
        ("epilogue", {}, 3),
        ("fused", {"magnitude": torch.rand(21, device=device)}, 4),
    ):
        x, (a, b) = torch.randn(19, 33, device=device, requires_grad=True), adapter(21, 33, 4, device)
        asked.clear()
        gradients(by_path(path)(x, torch.randn(21, 33, device=device), a, b, 0.5, **options), x, a, b)
        assert len(asked) >= least


@pytest.mark.skipif(not TRITON, reason="the kernel alone")
def test_more_adapters_than_a_grid_has_layers(device):
    """65,536 adapters: a grid's second and third dimension end at 65,535, so theirs is the first."""
    if INTERPRET:
        grids = []
        kernel = type("Kernel", (), {"__getitem__": lambda _, grid: lambda *a, **k: grids.append(grid)})()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(low_rank, "_lora_a_bwd", kernel)
            a = torch.empty(1 << 16, 1, 2)
            low_rank._launch_da(
                torch.zeros(3, 1), torch.zeros(3, 2), a, Rows(torch.zeros(3).int(), None, 0.0)
            )
        assert grids == [(1 << 16, 1)]
        return

    E = 1 << 16
    x, which = torch.randn(3, 16, device=device), torch.tensor([0, E - 1, 5], device=device)
    a, b = adapter(8, 16, 1, device, stack=(E,))
    (da,) = gradients(lora_linear(x, torch.randn(8, 16, device=device), a, b, 1.0, adapter=which), a)
    close(da[E - 1, 0], b[E - 1].sum() * x[1])


# ---- the base


def test_the_base_gets_no_gradient(device):
    W, (a, b) = torch.randn(21, 33, device=device), adapter(21, 33, 4, device)
    x = torch.randn(7, 33, device=device)
    lora_linear(x, W, a, b, 0.5).sum().backward()
    assert W.grad is None and a.grad is not None and b.grad is not None
    with pytest.raises(
        ValueError, match=r"weight: expected requires_grad=False, got True; pass weight\.detach\(\)"
    ):
        lora_linear(x, W.requires_grad_(), a, b, 0.5)


def test_only_what_is_asked_for(device):
    W, (a, b) = torch.randn(21, 33, device=device), adapter(21, 33, 4, device)
    x = torch.randn(7, 33, device=device, requires_grad=True)
    (dx,) = gradients(lora_linear(x, W, a.detach(), b.detach(), 0.5), x)
    close(dx, torch.ones(7, 21, device=device) @ (W + 0.5 * b @ a), rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not TRITON, reason="the kernel alone")
def test_rows_past_2_31_elements(device):
    """The epilogue's addresses, on a strided view of a small allocation's worth of touched pages."""
    if device == "cpu":
        pytest.skip("torch's product on the CPU would need the whole matrix; on a GPU this takes 4.3 GB")
    M, N = (1 << 31) // 4096 + 64, 4096
    out = torch.zeros(M, N, device=device, dtype=torch.float16)
    S = torch.zeros(M, 16, device=device, dtype=torch.float16)
    S[-1] = 1
    b = torch.ones(N, 16, device=device, dtype=torch.float16)
    launch_expand(out, S, b, 1.0, Rows(None, None, 0.0), None, None)
    assert (out[-1] == 16).all() and not out[:-1].any()


def test_refusals(device):
    x, W = torch.zeros(3, 8, device=device), torch.zeros(4, 8, device=device)
    a, b = torch.zeros(2, 8, device=device), torch.zeros(4, 2, device=device)
    with pytest.raises(ValueError, match=r"x: expected shape \(..., in=8\), got \(3, 4\)"):
        lora_linear(x[:, :4], W, a, b, 1.0)
    with pytest.raises(ValueError, match=r"lora_b: expected shape \(out=4, rank=2\), got \(2, 4\)"):
        lora_linear(x, W, a, b.T, 1.0)
    with pytest.raises(ValueError, match=r"magnitude: expected shape \(out=4\), got \(3,\)"):
        lora_linear(x, W, a, b, 1.0, magnitude=torch.zeros(3, device=device))

    with pytest.raises(ValueError, match="seed: expected an int or a 0-d int64 tensor"):
        lora_linear(x, W, a, b, 1.0, dropout=0.5)
    with pytest.raises(ValueError, match="dropout: expected a share from 0 to below 1, got 1"):
        lora_linear(x, W, a, b, 1.0, dropout=1.0, seed=0)

    stacked = {"adapter": torch.zeros(3, dtype=torch.int32, device=device)}
    with pytest.raises(
        ValueError, match=r"lora_b: expected shape \(adapters=5, out=4, rank=2\), got \(4, 2\)"
    ):
        lora_linear(x, W, a.expand(5, 2, 8), b, 1.0, **stacked)
    with pytest.raises(NotImplementedError, match="magnitude: expected none with `adapter`"):
        lora_linear(x, W, a[None], b[None], 1.0, magnitude=torch.zeros(4, device=device), **stacked)
