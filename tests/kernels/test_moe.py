"""Routing against its definition, the experts against a dense masked loop, and what the device alone must decide."""

import math
from dataclasses import replace

import pytest
import torch
from burnish.kernels import dequantize_nf4, moe, moe_mlp, moe_route, quantize_nf4, route
from burnish.kernels._chip import INTERPRET
from burnish.kernels.plain.moe import moe_mlp_reference
from burnish.kernels.records import ExpertLinear, Experts, Weight
from torch.utils._python_dispatch import TorchDispatchMode

TRITON = INTERPRET or torch.cuda.is_available()


def operands(T, C, F, E, K, device, dtype=torch.float32, activation="swiglu"):
    width = F if activation == "relu2" else 2 * F
    weights, indices, _ = moe_route(torch.randn(T, E, device=device), K)
    return {
        "x": torch.randn(T, C, device=device, dtype=dtype),
        "gate_up": torch.randn(E, width, C, device=device, dtype=dtype) / C**0.5,
        "down": torch.randn(E, C, F, device=device, dtype=dtype) / F**0.5,
        "weights": weights,
        "indices": indices,
    }


def op_and_reference(given, **options):
    """Output and gradients of the op and of the dense loop."""
    wanted = [n for n, t in given.items() if t.is_floating_point()]
    upstream = torch.randn_like(given["x"])
    results = []
    for op in (moe_mlp, moe_mlp_reference):
        leaves = {n: given[n].detach().requires_grad_() for n in wanted}
        out = op(**{**given, **leaves}, **options)
        grads = torch.autograd.grad(out, list(leaves.values()), upstream)
        results.append({"out": out.detach(), **dict(zip(wanted, grads, strict=True))})
    return results


def assert_close(ours, theirs, bound=2e-5):
    for name, t in theirs.items():
        torch.testing.assert_close(ours[name], t, atol=bound * (1 + float(t.abs().max())), rtol=0, msg=name)


# ---- routing


def test_softmax_routers_choose_and_weigh():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    p = logits.softmax(-1)[0]
    weights, indices, _ = moe_route(logits, 2)
    assert indices.tolist() == [[1, 2]]
    torch.testing.assert_close(weights[0], p[[1, 2]])
    weights, _, _ = moe_route(logits, 2, renormalize=True, scale=3.0)
    torch.testing.assert_close(weights[0], 3 * logits[0, [1, 2]].softmax(-1))  # top-k, then softmax


def test_the_bias_chooses_but_does_not_weigh():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    weights, indices, _ = moe_route(logits, 1, score="sigmoid", bias=torch.tensor([2.0, 0.0, 0.0]))
    assert indices.tolist() == [[0]]
    torch.testing.assert_close(weights, torch.tensor([[0.5]]))


def test_groups_limit_the_choice():
    s = torch.tensor([[9.0, -9.0, 2.0, 2.5, 3.0, -9.0, 0.0, 0.0]])  # the best expert stands in the worst pair
    _, by_two, _ = moe_route(s, 2, score="sigmoid", groups=4, top_groups=1)
    assert by_two.tolist() == [[3, 2]]  # DeepSeek-V3: the sum of the two best
    _, by_best, _ = moe_route(s, 2, groups=4, top_groups=1)
    assert by_best.tolist() == [[0, 1]]  # DeepSeek-V2: the best


def test_balance_and_z_loss():
    T, E, K = 6, 3, 2
    even = torch.zeros(T, E)
    for t in range(T):  # every expert chosen 4 times, probabilities all but even
        even[t, t % E], even[t, (t + 1) % E] = 1e-4, 1e-4
    _, _, statistics = moe_route(even, K)
    assert statistics.counts.tolist() == [4, 4, 4]
    assert statistics.balance.item() == pytest.approx(K, rel=1e-4)
    assert statistics.z_loss.item() == pytest.approx(math.log(3) ** 2, rel=1e-3)
    torch.testing.assert_close(statistics.probability, even.softmax(-1).mean(0))
    torch.testing.assert_close(E * (statistics.counts / T * statistics.probability).sum(), statistics.balance)
    _, _, worst = moe_route(torch.tensor([[50.0, 25.0, 0.0]] * T), K)
    assert worst.balance.item() == pytest.approx(E)  # all probability on one of the experts that all chose


@pytest.mark.parametrize("T, E, K", [(1, 1, 1), (0, 5, 2), (37, 2048, 3), (8, 4, 4), (64, 3, 2)])
def test_capacity_drops_exactly_what_is_too_much(T, E, K, device):
    logits = torch.randn(T, E, device=device) + 3 * torch.arange(E, device=device) / E
    _, plain, _ = moe_route(logits, K)
    weights, indices, statistics = moe_route(logits, K, capacity_factor=0.5)
    capacity = math.ceil(0.5 * T * K / E)

    taken, dropped = [0] * E, 0
    for k in range(K):  # all first choices before all second ones
        for t in range(T):
            e = int(plain[t, k])
            if taken[e] < capacity:
                taken[e] += 1
                assert indices[t, k] == e and weights[t, k] > 0
            else:
                dropped += 1
                assert indices[t, k] == E and weights[t, k] == 0

    assert statistics.dropped == dropped
    assert statistics.counts.tolist() == plain.flatten().bincount(minlength=E).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"renormalize": True, "scale": 2.5},
        {"score": "sigmoid", "renormalize": True, "groups": 3, "top_groups": 2},
    ],
)
def test_gradient_through_the_weights_by_finite_differences(options):
    logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)

    def outputs(z):
        weights, _, statistics = moe_route(z, 2, **options)
        return weights, statistics.balance, statistics.z_loss, statistics.probability

    assert torch.autograd.gradcheck(outputs, logits)


def test_gradient_of_logits_through_the_experts_by_finite_differences():
    given = {n: t.double() if t.is_floating_point() else t for n, t in operands(4, 3, 2, 5, 2, "cpu").items()}
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def outputs(z, x):
        weights, indices, _ = moe_route(z, 2, renormalize=True)
        return moe_mlp_reference(x, given["gate_up"], given["down"], weights, indices)

    assert torch.autograd.gradcheck(outputs, (logits, given["x"].requires_grad_()))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"top_k": 0}, "logits: expected"),
        ({"top_k": 7}, "logits: expected"),
        ({"top_k": 2, "score": "tanh"}, "score: expected softmax or sigmoid"),
        ({"top_k": 2, "groups": 4}, "groups, top_groups: expected a divisor of 6"),
        ({"top_k": 3, "groups": 3, "top_groups": 1}, "groups, top_groups"),
        ({"top_k": 2, "capacity_factor": 0}, "capacity_factor: expected a positive"),
        ({"top_k": 2, "bias": torch.zeros(3)}, r"bias: expected shape \(experts=6\)"),
    ],
)
def test_routing_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        moe_route(torch.zeros(4, 6), **arguments)


# ---- experts


@pytest.mark.parametrize(
    "T, C, F, E, K",
    [
        (1, 5, 3, 1, 1),
        (7, 16, 8, 3, 3),
        (33, 17, 19, 4, 2),
        pytest.param(9, 4, 4, 2048, 2, marks=pytest.mark.slow),
    ],
)
def test_a_dense_masked_loop_gives_the_same(T, C, F, E, K, device):
    assert_close(*op_and_reference(operands(T, C, F, E, K, device)))


@pytest.mark.parametrize("activation", moe.ACTIVATIONS)
def test_dropped_choices_and_biases(activation, device):
    given = operands(37, 20, 24, 5, 2, device, activation=activation)
    given["indices"][3, 1], given["indices"][4, 0], given["indices"][5] = 5, -1, 5
    given["gate_up_bias"] = torch.randn(given["gate_up"].shape[:2], device=device)
    given["down_bias"] = torch.randn(5, 20, device=device)
    ours, theirs = op_and_reference(given, activation=activation, limit=0.8)
    assert_close(ours, theirs)
    assert not ours["out"][5].any() and not ours["x"][5].any()


def test_one_expert_takes_all(device):
    given = operands(150, 16, 16, 6, 1, device)
    given["indices"].fill_(4)
    ours, theirs = op_and_reference(given)
    assert_close(ours, theirs)
    assert not ours["gate_up"][:4].any() and ours["gate_up"][4].any()


def test_all_dropped(device):
    given = operands(6, 8, 8, 1, 1, device)
    given["indices"].fill_(1)
    ours, _ = op_and_reference(given)
    assert not any(t.any() for t in ours.values())


def test_frozen_experts_have_no_gradient_and_cost_none(device):
    given = operands(20, 8, 8, 3, 2, device)
    x = given["x"].requires_grad_()
    out = moe_mlp(**given)
    out.sum().backward()
    assert given["gate_up"].grad is None and x.grad is not None
    torch.testing.assert_close(out, moe_mlp_reference(**given))


@pytest.mark.skipif(not TRITON, reason="the device's dispatch")
@pytest.mark.parametrize(
    "T, K, E, block_m",
    [(1, 1, 1, 16), (200, 3, 5, 16), (300, 1, 70, 64), pytest.param(16, 4, 2048, 16, marks=pytest.mark.slow)],
)
def test_every_kept_choice_lands_exactly_once(T, K, E, block_m, device):
    indices = torch.randint(-1, E + 1, (T, K), device=device)
    starts, row, choice, tile_expert, tile_row = route._dispatch(indices, E, block_m)
    ids = indices.flatten().tolist()
    kept = sorted((e, n) for n, e in enumerate(ids) if 0 <= e < E)  # by expert, and as they come
    assert starts.tolist() == [sum(e < i for e, _ in kept) for i in range(E + 1)]
    assert choice[: len(kept)].tolist() == [n for _, n in kept]
    at = {n: i for i, (_, n) in enumerate(kept)}
    assert row.tolist() == [at.get(n, -1) for n in range(T * K)]
    covered = []
    for e, first in zip(tile_expert.tolist(), tile_row.tolist(), strict=True):
        if e >= 0:
            covered += [(e, r) for r in range(first, min(first + block_m, int(starts[e + 1])))]
    assert covered == [(e, i) for i, (e, _) in enumerate(kept)]


class NoHostRead(TorchDispatchMode):
    """Fails where a number goes from the device to the host, or a shape hangs on the values of a tensor."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name().split("::")[1].split(".")[0] not in self.READS, func.name()
        return func(*args, **(kwargs or {}))


def test_the_router_reads_nothing_on_the_host(device):
    logits = torch.randn(12, 8, device=device, requires_grad=True)
    with NoHostRead():
        weights, _, statistics = moe_route(
            logits, 2, score="sigmoid", groups=4, top_groups=2, capacity_factor=0.5
        )
        (weights.sum() + statistics.balance + statistics.z_loss).backward()


def test_no_shape_hangs_on_the_values(monkeypatch, device):
    """The launches replaced: what is left is what the host does, and on fake tensors it cannot read a number."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Launch:
        def __getitem__(self, grid):
            assert all(isinstance(size, int) for size in grid)
            return lambda *args, **kwargs: None

    for name in ("_histogram", "_scatter", "_tiles"):
        monkeypatch.setattr(route, name, Launch())
    for name in ("_up_fwd", "_rows_product", "_combine", "_activation_bwd", "_weight_bwd"):
        monkeypatch.setattr(moe, name, Launch())

    with FakeTensorMode():
        given = operands(20, 8, 8, 3, 2, device)
        routes = route.Routes(*route._dispatch(given["indices"], 3, 16), 16, 2)
        experts = Experts(
            ExpertLinear(
                Weight(given["gate_up"]), torch.zeros(3, 16), torch.zeros(3, 2, 8), torch.zeros(3, 16, 2)
            ),
            ExpertLinear(
                Weight(given["down"]), torch.zeros(3, 8), torch.zeros(3, 5, 8), torch.zeros(3, 8, 5)
            ),
            "swiglu",
            0.0,
            0.0,
        )

        x, weights = given["x"], given["weights"]
        outputs = moe._forward(x, experts, weights, routes, True)
        saved = moe._save(outputs, x, experts, weights, routes, True)
        needs = moe._Gradients(*(True for _ in moe._Gradients._fields))
        grads = moe._backward(saved, needs, outputs[0])
        inputs = [x, *experts.gate_up.tensors(), *experts.down.tensors(), weights]
        assert [g.shape for g in grads] == [t.shape for t in inputs]

        with pytest.raises(Exception, match=r"data-dependent|DataDependent|_local_scalar"):
            given["weights"].sum().item()  # the control: such a read is seen


@pytest.mark.skipif(not TRITON, reason="a CPU's rows depend on what else an expert has")
def test_a_token_has_the_same_bits_whatever_stands_beside_it(device):
    given = operands(40, 16, 16, 3, 2, device)
    alone = moe_mlp(**{n: t[:16] if n in ("x", "weights", "indices") else t for n, t in given.items()})
    torch.testing.assert_close(moe_mlp(**given)[:16], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation": "gelu"}, "activation: expected one of swiglu"),
        ({"gate_up": torch.zeros(3, 8, 4)}, r"gate_up: expected shape \(experts=3, width=10, hidden=4\)"),
        ({"indices": torch.zeros(6, 1, dtype=torch.int64)}, "indices: expected shape"),
        ({"indices": torch.zeros(6, 2)}, "indices: expected dtype"),
        ({"down": torch.zeros(3, 4, 5, dtype=torch.float64)}, "down: expected dtype"),
        ({"down_bias": torch.zeros(3, 5)}, r"down_bias: expected shape \(experts=3, width=4\)"),
        ({"x": torch.zeros(4)}, r"x, down, weights: expected"),
        ({"down_a": torch.zeros(3, 2, 5)}, r"down_a, down_b: expected .* got \(3, 2, 5\) and none"),
        (
            {"down_a": torch.zeros(3, 2, 4), "down_b": torch.zeros(3, 4, 2)},
            r"down_a: expected shape \(experts=3, rank=2, in=5\)",
        ),
        (
            {"down": quantize_nf4(torch.ones(3, 4, 5))},
            "down: expected whole blocks of 64 weights in each expert",
        ),
    ],
)
def test_experts_refuse(change, message):
    with pytest.raises(ValueError, match=message):
        moe_mlp(**{**operands(6, 4, 5, 3, 2, "cpu"), **change})


# ---- adapters and 4-bit experts


def with_adapters(given, R, ranks=None):
    (E, width, C), F = given["gate_up"].shape, given["down"].shape[2]
    S = ranks or R
    shapes = {"gate_up_a": (E, R, C), "gate_up_b": (E, width, R), "down_a": (E, S, F), "down_b": (E, C, S)}
    return given | {n: torch.randn(s, device=given["x"].device) * s[-1] ** -0.5 for n, s in shapes.items()}


@pytest.mark.parametrize("activation", moe.ACTIVATIONS)
def test_adapters_equal_weights_added_up(activation, device):
    """Ranks that differ and pass a block's edge, biases, dropped choices; the base trained, too."""
    given = with_adapters(operands(37, 20, 24, 4, 2, device, activation=activation), 17, 3)
    given["indices"][3, 1], given["indices"][4, 0] = 4, -1
    given["gate_up_bias"] = torch.randn(given["gate_up"].shape[:2], device=device)
    given["down_bias"] = torch.randn(4, 20, device=device)
    assert_close(*op_and_reference(given, activation=activation, limit=0.8), bound=5e-5)


def test_an_adapter_on_one_of_the_two(device):
    for names in (("gate_up_a", "gate_up_b"), ("down_a", "down_b")):
        given = operands(20, 16, 8, 3, 2, device)
        adapters = with_adapters(given, 4)
        assert_close(*op_and_reference(given | {n: adapters[n] for n in names}))


def test_a_fresh_adapter_changes_no_bit(device):
    given = operands(20, 16, 8, 3, 2, device)
    fresh = with_adapters(given, 4)
    fresh["gate_up_b"].zero_(), fresh["down_b"].zero_()
    assert torch.equal(moe_mlp(**given), moe_mlp(**fresh))


@pytest.mark.parametrize("double_quant", [False, True])
def test_experts_in_4_bits_are_the_dense_ones_multiplied_out(double_quant, device):
    given = with_adapters(operands(30, 64, 24, 5, 2, device), 4)
    packed = {n: quantize_nf4(given[n], double_quant=double_quant) for n in ("gate_up", "down")}
    dense = {n: dequantize_nf4(w) for n, w in packed.items()}
    wanted = ("x", "weights", "gate_up_a", "gate_up_b", "down_a", "down_b")
    upstream, results = torch.randn(30, 64, device=device), []
    for experts in (packed, dense):
        leaves = {n: given[n].detach().requires_grad_() for n in wanted}
        out = moe_mlp(**{**given, **leaves, **experts})
        results.append([out, *torch.autograd.grad(out, list(leaves.values()), upstream)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_shape_of_experts_in_4_bits_may_be_a_list(device):
    given = operands(6, 64, 64, 8, 2, device)
    packed = {n: quantize_nf4(given[n]) for n in ("gate_up", "down")}
    listed = {n: replace(w, shape=[*w.shape]) for n, w in packed.items()}
    assert torch.equal(moe_mlp(**{**given, **listed}), moe_mlp(**{**given, **packed}))


def test_experts_in_4_bits_are_saved_in_4_bits(device):
    given = operands(6, 64, 64, 8, 2, device)
    packed = {n: quantize_nf4(given[n]) for n in ("gate_up", "down")}
    saved: list[torch.Tensor] = []

    def keep(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        moe_mlp(**{**given, **packed, "x": given["x"].requires_grad_()}).sum().backward()
    assert all(t.numel() < given["down"].numel() for t in saved if t.is_floating_point())
