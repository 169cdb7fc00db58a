"""Attention against its reference and against eager torch, on both paths, and what it refuses."""

import random
from dataclasses import replace

import pytest
import torch
from attention_cases import CASES, draw, grads, lay, make, table
from burnish.bench.ops import tune
from burnish.kernels import attention, flash_attention
from burnish.kernels._chip import INTERPRET
from burnish.kernels.plain.attention import flash_attention_reference, positions, visible_keys
from burnish.kernels.records import Packing, Rules
from burnish.kernels.tiles import ATTENTION
from faults import check_of, control, faults_of
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.errors import InterpreterError

# the CPU path
on_cpu = pytest.mark.skipif(INTERPRET, reason="interpreted, the op runs Triton")


@on_cpu
@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("name", CASES)
def test_cpu_path_matches_reference(name, with_lse):
    tensors, options = make(name, torch.float64)
    out, lse = flash_attention_reference(**tensors, **options, return_lse=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse) if with_lse else None
    want = grads(flash_attention_reference, tensors, options, dout, dlse)
    got = grads(flash_attention, tensors, options, dout, dlse)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


# the Triton path

DTYPES = [torch.float32, torch.float16] if INTERPRET else [torch.float32, torch.float16, torch.bfloat16]
compiled_or_interpreted = pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()), reason="runs Triton"
)


def sight(q, k, rules, packing):
    """Whether a row sees a key: (T, S), of a packed call (total, total)."""
    if packing.cu_seqlens is None:
        T, S = q.shape[1], k.shape[1]
        row, column = (torch.arange(first, S, device=q.device) for first in (S - T, 0))
        return visible_keys(row, column, rules)

    segment, position = positions(*packing, q.shape[0])
    mask = segment[:, None] == segment
    if packing.parents is not None:
        parent = torch.cat([packing.parents, packing.parents.new_tensor([-1])])[segment]  # -1 for no segment
        mask = mask | (parent[:, None] == segment)
    return mask & (segment >= 0) & visible_keys(position, position, rules)


def eager(q, k, v, *, sinks=None, cu_seqlens=None, parents=None, **rules):
    """(out, lse) as torch users write it: every operand and intermediate in the inputs' dtype, the softmax in fp32."""
    rules = Rules(**rules)
    mask = sight(q, k, rules, Packing(cu_seqlens, parents))
    q, k, v = (x if cu_seqlens is None else x[None] for x in (q, k, v))

    # scores, a column more for sinks
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    s = torch.einsum("bthd,bshd->bhts", q, k) * (q.shape[-1] ** -0.5 if rules.scale is None else rules.scale)
    s = s if rules.softcap is None else rules.softcap * torch.tanh(s / rules.softcap)
    s = s.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks[:, None, None].expand(*s.shape[:3], 1)], -1)

    lse = s.float().logsumexp(-1)
    p = torch.where(lse.isfinite()[..., None], s.float().softmax(-1), 0.0).to(q.dtype)[..., : k.shape[1]]
    out, lse = torch.einsum("bhts,bshd->bthd", p, v), lse.transpose(1, 2)
    return (out, lse) if cu_seqlens is None else (out[0], lse[0])


def assert_as_accurate(tensors, options, with_lse=True, slack=2.0):
    """The op may err from the truth `slack` times as much as eager does, output by output."""
    wide = torch.float64 if tensors["q"].dtype == torch.float32 else torch.float32
    out, lse = flash_attention_reference(**tensors, **options, return_lse=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse) * (lse > -torch.inf) if with_lse else None

    def eager_op(return_lse=False, **arguments):
        return eager(**arguments) if return_lse else eager(**arguments)[0]

    truth = grads(flash_attention_reference, {n: x.to(wide) for n, x in tensors.items()}, options, dout, dlse)
    usual = grads(eager_op, tensors, options, dout, dlse)
    fused = grads(flash_attention, tensors, options, dout, dlse)

    names = ["out", *(["lse"] if with_lse else []), *(f"d{name}" for name in tensors)]
    for name, t, e, f in zip(names, truth, usual, fused, strict=True):
        assert f.shape == t.shape and (f.dtype == e.dtype or name == "lse")
        assert torch.equal(f == -torch.inf, t == -torch.inf), f"{name}: -inf in other places"
        t, e, f = (x.to(wide).masked_fill(t == -torch.inf, 0.0) for x in (t, e, f))
        if not t.numel():
            continue

        usual_error = (e - t).abs().nan_to_num(0.0).max()  # eager's own gradient of an empty softmax is NaN
        allowed = slack * usual_error + 1e-5 * (1 + t.abs().max())
        # eager is exact by luck on a few numbers: a unit in the last place is always allowed
        if t.numel() < 64:
            allowed += torch.finfo(tensors["q"].dtype).eps * t.abs().max()

        error = (f - t).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e} > allowed {allowed:.2e}"


INTERPRETED_IN_HALF = {"gqa", "odd dimensions", "sinks, more queries", "parents, all"}


@compiled_or_interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels_match_reference(name, dtype, device):
    if INTERPRET and dtype == torch.float16 and name not in INTERPRETED_IN_HALF:
        pytest.skip("the interpreter is slow; the pairwise cover has the rest")
    assert_as_accurate(*make(name, dtype, device))


LAYOUTS = {
    "square": {"T": 33, "S": 33},
    "more keys": {"T": 17, "S": 50},
    "more queries": {"T": 50, "S": 17},
    "packed": {"cu_seqlens": [17, 0, 1, 33]},
    "parents": {"cu_seqlens": [17, 9, 1, 16, 3, 18], "parents": [-1, 0, 0, -1, -1, 4]},
}
FACTORS = {
    "D": [8, 16, 48, 64, 80, 96, 128, 192, 256],
    "Dv": ["as D", "other"],
    "layout": list(LAYOUTS),
    "causal": [True, False],
    "window": [None, 6],
    "softcap": [None, 3.0],
    "sinks": [False, True],
    "heads": [(2, 2), (4, 1)],
    "lse": [False, True],
    "dtype": [torch.float32, torch.float16],
}


def pairwise():
    """Rows of factors such that every two values of two factors meet in one, where they may; greedily, from a seed."""
    draw_row = random.Random(0)

    def allowed(row):
        return row["causal"] or (row["window"] is None and row["layout"] != "parents")

    def pairs(row):
        values = [(name, str(value)) for name, value in row.items()]
        return {(a, b) for n, a in enumerate(values) for b in values[:n]}

    def random_row():
        return {name: draw_row.choice(values) for name, values in FACTORS.items()}

    missing = set().union(*(pairs(row) for row in (random_row() for _ in range(20000)) if allowed(row)))
    rows = []
    while missing:
        candidates = (row for row in (random_row() for _ in range(300)) if allowed(row))
        rows.append(max(candidates, key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(rows[-1])
    return rows


@compiled_or_interpreted
@pytest.mark.slow
@pytest.mark.parametrize("row", pairwise(), ids=lambda row: "-".join(str(x) for x in row.values()))
def test_every_pair_of_features(row, device):
    H, G = row["heads"]
    D, Dv = row["D"], row["D"] if row["Dv"] == "as D" else 24
    options = {name: row[name] for name in ("causal", "window", "softcap")}
    layout = dict(LAYOUTS[row["layout"]])
    if "T" in layout:
        q_lead, k_lead = (1, layout["T"]), (1, layout["S"])
    else:
        q_lead = k_lead = (sum(layout["cu_seqlens"]),)
        options["cu_seqlens"] = lay(layout["cu_seqlens"], device)
        options["parents"] = table(layout["parents"], device) if "parents" in layout else None
    shapes = {"q": (*q_lead, H, D), "k": (*k_lead, G, D), "v": (*k_lead, G, Dv)}
    if row["sinks"]:
        shapes["sinks"] = (H,)
    tensors = {name: draw(*shape, dtype=row["dtype"], device=device) for name, shape in shapes.items()}
    assert_as_accurate(tensors, options, row["lse"])


@compiled_or_interpreted
@pytest.mark.skipif(not INTERPRET, reason="compiled, the chip decides")
@pytest.mark.parametrize("name", ["gqa", "parents, window"])
def test_tensor_descriptors(name, monkeypatch):
    """A head dimension that is no power of two, on the path that Hopper and later take."""
    tiles = ATTENTION["interpreted"][256]
    monkeypatch.setattr(attention, "attention_tiles", lambda q, width: (tiles, True))
    tensors, options = make(name)
    tensors = {n: draw(*x.shape[:-1], 24) for n, x in tensors.items()}
    assert_as_accurate(tensors, options)


@compiled_or_interpreted
@pytest.mark.slow
@pytest.mark.skipif(not INTERPRET, reason="compiled, `python -m burnish.bench tune` does it")
def test_candidate_tiles_are_checked_and_timed(monkeypatch):
    """Small ones of dQ and of dK/dV; one with which the scale is lost is refused."""
    monkeypatch.setattr(tune, "ROUNDS", 1)
    dims = {"B": 1, "T": 21, "H": 2, "G": 1, "D": 16}
    sound, wrong = (16, 16, 4, 1), (16, 32, 4, 1)
    for slot in tune.SLOTS[1:3]:
        kernel, shipped = getattr(attention, slot.kernel), slot.shipped(slot, "interpreted", 16)
        slot = replace(slot, timed=lambda slot, width: [(tune.case_of("flash_attention/causal"), dims)])
        rows = list(tune.measure(slot, 16, [sound], shipped, torch.float32, "cpu"))
        assert [row["tile"] for row in rows] == [list(sound)] and rows[0]["us"] > 0, rows
        assert getattr(attention, slot.kernel) is kernel
    numbers = attention._numbers
    lost = lambda *args: numbers(*args) | {"inner": 1.0}
    monkeypatch.setattr(attention, "_numbers", lost)
    (row,) = tune.measure(slot, 16, [wrong], sound, torch.float32, "cpu")
    assert row["refused"].startswith("AssertionError: flash_attention/causal: output 0: error")


@compiled_or_interpreted
def test_nothing_is_read_on_the_host(device):
    """Fake tensors have no values: whoever asks for one, as for a longest segment, raises."""
    with FakeTensorMode():
        q, k = torch.empty(31, 4, 16, device=device), torch.empty(31, 2, 16, device=device)
        cu_seqlens = torch.empty(4, dtype=torch.int32, device=device)
        out, lse = flash_attention(q, k, k, cu_seqlens=cu_seqlens, parents=cu_seqlens[1:], return_lse=True)
        assert out.shape == (31, 4, 16) and lse.shape == (31, 4) and lse.dtype == torch.float32


@pytest.mark.parametrize(
    "name", ["gqa", "more queries", "parents, all", "packed, not causal", "odd dimensions"]
)
def test_reference_gradients_by_finite_differences(name):
    tensors, options = make(name, torch.float64)

    def op(*leaves):
        out, lse = flash_attention_reference(
            **dict(zip(tensors, leaves, strict=True)), **options, return_lse=True
        )
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    leaves = tuple(x.requires_grad_() for x in tensors.values())
    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)


def test_a_query_that_sees_nothing_is_zero_with_zero_gradients(device):
    q, k, v = (
        draw(1, 5, 2, 16, device=device),
        draw(1, 2, 1, 16, device=device),
        draw(1, 2, 1, 16, device=device),
    )
    for op in (flash_attention, flash_attention_reference):
        out, lse, dq, dk, dv = grads(
            op, {"q": q, "k": k, "v": v}, {}, torch.ones_like(q), torch.ones(1, 5, 2, device=device)
        )
        assert (out[:, :3] == 0).all() and (lse[:, :3] == -torch.inf).all() and (dq[:, :3] == 0).all()
        assert out[:, 3:].isfinite().all() and (dq[:, 4] != 0).any()
        assert dk.isfinite().all() and dv.isfinite().all() and (dk != 0).any()


def test_lse_of_a_query_that_sees_only_the_sink(device):
    tensors = {"q": draw(1, 3, 2, 16, device=device), "k": draw(1, 1, 1, 16, device=device)}
    tensors |= {"v": draw(1, 1, 1, 16, device=device), "sinks": draw(2, device=device)}
    out, lse = flash_attention(**tensors, return_lse=True)
    assert (out[:, :2] == 0).all()
    torch.testing.assert_close(lse[:, :2], tensors["sinks"].expand(1, 2, 2))


def test_strided_inputs(device):
    qkv = draw(2, 19, 3, 4, 16, device=device)
    got = flash_attention(*qkv.unbind(2))
    assert torch.equal(got, flash_attention(*(x.contiguous() for x in qkv.unbind(2))))


REFUSALS = {
    "q: expected (B, T, H, D) without cu_seqlens": {"q": (3, 4, 8)},
    "k, v: expected 4 dimensions": {"k": (3, 2, 8)},
    "k: expected shape (batch=2, keys=3, kv_heads=2, head_dim=8), got (2, 3, 2, 9)": {"k": (2, 3, 2, 9)},
    "v: expected shape (batch=2, keys=3, kv_heads=2, head_dim=8), got (1, 3, 2, 8)": {"v": (1, 3, 2, 8)},
    "q: expected a multiple of the 2 key/value heads, got 3": {"q": (2, 3, 3, 8)},
    "q: expected a head dimension of 1 to 256, got 257": {"q": (2, 3, 4, 257)},
    "window: expected at least 1, got 0": {"window": 0},
    "window: expected causal=True": {"window": 2, "causal": False},
    "softcap: expected a positive number, got 0.0": {"softcap": 0.0},
    "scale: expected a positive number, got -1.0": {"scale": -1.0},
    "sinks: expected shape (heads=4), got (2,)": {"sinks": torch.zeros(2)},
    "parents: expected cu_seqlens beside them": {"parents": table([-1])},
    "q: expected (total, H, D) with cu_seqlens": {"cu_seqlens": lay([3])},
    "expected one dtype": {"dtype": torch.float16},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refuses(message, device):
    options = {name: x.to(device) if torch.is_tensor(x) else x for name, x in REFUSALS[message].items()}
    shapes = {
        name: options.pop(name, shape)
        for name, shape in (("q", (2, 3, 4, 8)), ("k", (2, 3, 2, 8)), ("v", (2, 3, 2, 8)))
    }
    tensors = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
    tensors["q"] = tensors["q"].to(options.pop("dtype", torch.float32))
    with pytest.raises(ValueError) as caught:
        flash_attention(**tensors, **options)
    assert message in str(caught.value)


PACKED_REFUSALS = {
    "cu_seqlens: expected (segments + 1,) torch.int32": {"cu_seqlens": torch.tensor([0, 5])},
    "k: expected shape (total=5, kv_heads=2, head_dim=8), got (6, 2, 8)": {"k": (6, 2, 8)},
    "parents: expected causal=True": {"parents": table([-1, 0]), "causal": False},
    "parents: expected torch.int32, got torch.int64": {"parents": torch.tensor([-1, 0])},
    "parents: expected shape (segments=2), got (1,)": {"parents": table([-1])},
}


@pytest.mark.parametrize("message", PACKED_REFUSALS)
def test_refuses_packed(message, device):
    options = {"cu_seqlens": lay([2, 3])} | PACKED_REFUSALS[message]
    options = {name: x.to(device) if torch.is_tensor(x) else x for name, x in options.items()}
    q, k = torch.zeros(5, 4, 8, device=device), torch.zeros(options.pop("k", (5, 2, 8)), device=device)
    with pytest.raises(ValueError) as caught:
        flash_attention(q, k, k, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["padded", "padded, not causal", "padded, all"])
def test_autocast_changes_nothing(name, device):
    """fp16 under bf16, too, of which torch.cat knows no common dtype."""
    tensors, options = make(name, torch.float16, device)
    expected = flash_attention(**tensors, **options)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(flash_attention(**tensors, **options), expected)


@on_cpu
def test_a_graph_may_leave_every_size_open():
    graph = torch.compile(flash_attention, backend="eager", fullgraph=True, dynamic=True)
    for T, H, G, window in ((20, 4, 2, 3), (33, 6, 3, 11)):
        q, k = draw(2, T, H, 8), draw(2, T + 3, G, 8)
        torch.testing.assert_close(graph(q, k, k, window=window), flash_attention(q, k, k, window=window))


@control
def batch_of_five(module, monkeypatch, device):
    """On a grid whose third dimension ends at 2."""
    monkeypatch.setattr(module, "GRID", 2)
    q, k = draw(5, 35, 2, 16, device=device), draw(5, 37, 1, 16, device=device)
    out = torch.ones(5, 35, 2, 16, device=device)
    tensors = {"q": q, "k": k, "v": k}
    want = grads(flash_attention_reference, tensors, {}, out)
    torch.testing.assert_close(grads(module.flash_attention, tensors, {}, out), want, rtol=1e-3, atol=1e-4)


@control
def padded(module, monkeypatch, device):
    tensors, options = make("padded, all", device=device)
    out, lse = module.flash_attention(**tensors, **options, return_lse=True)
    want = flash_attention_reference(**tensors, **options, return_lse=True)
    torch.testing.assert_close((out, lse), want, rtol=1e-3, atol=1e-4)


@control
def falling(module, monkeypatch, device):
    x = draw(40, 1, 16, device=device)
    cu_seqlens = torch.tensor([0, 35, 3, 40], dtype=torch.int32, device=device)
    assert (module.flash_attention(x, x, x, cu_seqlens=cu_seqlens) == 0).all()


@compiled_or_interpreted
def test_a_batch_larger_than_a_grid(monkeypatch, device):
    batch_of_five(attention, monkeypatch, device)


@compiled_or_interpreted
@pytest.mark.parametrize("fault", faults_of(__file__), ids=lambda fault: fault.id)
def test_fault_is_caught(fault, copy_of, monkeypatch, device):
    module = copy_of(fault.file, fault, "attention")
    with pytest.raises((AssertionError, InterpreterError)):  # or the guard sees it first
        check_of(fault)(module, monkeypatch, device)
