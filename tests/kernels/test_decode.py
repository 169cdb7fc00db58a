from itertools import product

import pytest
import torch
from burnish.bench.ops.static import compile_only
from burnish.kernels._chip import INTERPRET
from burnish.kernels.decode import decode_attention
from burnish.kernels.plain import decode
from burnish.kernels.plain.decode import decode_attention_reference
from burnish.kernels.records import Scores
from torch.utils._python_dispatch import TorchDispatchMode

TRITON = INTERPRET or torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16] if INTERPRET else [torch.float32, torch.float16, torch.bfloat16]
FEATURES = ["prefix", "window", "softcap", "sinks"]
SHAPES = [(4, 2, 16, 16), (6, 2, 8, 12), (3, 1, 24, 5), (4, 4, 3, 33)]  # H, G, D, Dv


def make(features=(), dtype=torch.float32, device="cpu", shape=SHAPES[0], integers=torch.int64):
    """Arguments. Lengths are given in units, of which eight are just over a piece: 256 keys, 32 interpreted."""
    H, G, D, Dv = shape
    unit = 33 if device == "cuda" else 5

    def draw(*shape):
        return torch.randn(shape).to(device, dtype)

    arguments = {
        "q": draw(5, H, D),
        "k_cache": draw(7, 11 * unit, G, D),
        "v_cache": draw(7, 11 * unit, G, Dv),
    }

    numbers = {"slot": [4, 0, 5, 2, 6], "length": [1, 11 * unit, 7 * unit - 1, 8 * unit, 3]}
    if "prefix" in features:  # two share one, one has another, one has the same row as far as another length
        numbers |= {"prefix_slot": [1, 1, -1, 3, 1], "prefix_length": [9 * unit, 9 * unit, 5, unit, 2]}
    arguments |= {name: torch.tensor(x, device=device, dtype=integers) for name, x in numbers.items()}

    if "window" in features:
        arguments["window"] = 9 * unit
    if "softcap" in features:
        arguments["softcap"] = 2.0
    if "sinks" in features:
        arguments["sinks"] = draw(H)
    return arguments


def convert(arguments, dtype):
    return {
        name: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in arguments.items()
    }


def combinations(dtypes):
    """All of the features; where interpreted each with one dtype, so that they are covered pairwise."""
    for i, on in enumerate(product([False, True], repeat=len(FEATURES))):
        features = [name for name, is_on in zip(FEATURES, on, strict=True) if is_on]
        for dtype in [dtypes[sum(on) % len(dtypes)]] if INTERPRET else dtypes:
            name = f"{' '.join(features) or 'plain'}, {dtype}"
            yield pytest.param(features, dtype, SHAPES[(i + i // 4) % 4], id=name)


triton_path = pytest.mark.skipif(not TRITON, reason="runs Triton")
cpu_path = pytest.mark.skipif(INTERPRET, reason="interpreted, the op runs Triton")


@cpu_path
@pytest.mark.parametrize("features, dtype, shape", [*combinations([torch.float64])])
def test_cpu_path_matches_reference(features, dtype, shape):
    arguments = make(features, dtype, shape=shape)
    torch.testing.assert_close(
        decode_attention(**arguments), decode_attention_reference(**arguments), rtol=1e-12, atol=1e-12
    )


@cpu_path
def test_cpu_path_reads_slots_that_stand_in_order_in_place():
    arguments = make(dtype=torch.float64)
    arguments["slot"] = torch.arange(5)
    for cache in ("k_cache", "v_cache"):
        arguments[cache] = arguments[cache][:5]
    torch.testing.assert_close(
        decode_attention(**arguments), decode_attention_reference(**arguments), rtol=1e-12, atol=1e-12
    )


def test_reference_is_the_formula():
    """One head, by hand: a sequence of three keys after a prefix of two, of which the window keeps four."""
    q, k, v = torch.randn(1, 1, 3), torch.randn(2, 4, 1, 3), torch.randn(2, 4, 1, 2)
    sink = torch.randn(1)
    keys, values = (torch.cat([x[1, 1:2, 0], x[0, :3, 0]]) for x in (k, v))
    s = 2 * torch.tanh(0.7 * keys @ q[0, 0] / 2)
    want = s.exp() @ values / (s.exp().sum() + sink.exp())
    numbers = dict(slot=[0], length=[3], prefix_slot=[1], prefix_length=[2])
    numbers = {name: torch.tensor(x) for name, x in numbers.items()}
    got = decode_attention_reference(q, k, v, **numbers, scale=0.7, window=4, softcap=2.0, sinks=sink)
    torch.testing.assert_close(got[0, 0], want)


def eager(q, k_cache, v_cache, slot, length, prefix_slot=None, prefix_length=None, **rules):
    """Decoding as torch users write it, one sequence after the other, every intermediate in the inputs' dtype."""
    rules = Scores(**{"scale": q.shape[-1] ** -0.5, "window": None, "softcap": None, "sinks": None} | rules)
    outs = []
    for b in range(q.shape[0]):
        k, v = k_cache[slot[b], : length[b]], v_cache[slot[b], : length[b]]
        if prefix_slot is not None and prefix_slot[b] >= 0:
            k = torch.cat([k_cache[prefix_slot[b], : prefix_length[b]], k])
            v = torch.cat([v_cache[prefix_slot[b], : prefix_length[b]], v])
        k, v = (x if rules.window is None else x[-rules.window :] for x in (k, v))

        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        s = rules.scale * torch.einsum("hd,shd->hs", q[b], k)
        s = s if rules.softcap is None else rules.softcap * torch.tanh(s / rules.softcap)
        s = s if rules.sinks is None else torch.cat([s, rules.sinks[:, None]], 1)
        p = s.float().softmax(-1).to(q.dtype)[:, : k.shape[0]]
        outs.append(torch.einsum("hs,shd->hd", p, v))
    return torch.stack(outs)


def assert_as_accurate(arguments):
    """The op may err from the truth twice as much as eager does."""
    wide = torch.float64 if arguments["q"].dtype == torch.float32 else torch.float32
    truth = decode_attention_reference(**convert(arguments, wide))
    got = decode_attention(**arguments)
    assert got.dtype == arguments["q"].dtype and got.shape == truth.shape
    allowed = 2 * (eager(**arguments).to(wide) - truth).abs().max() + 1e-5 * (1 + truth.abs().max())
    error = (got.to(wide) - truth).abs().max()
    assert error <= allowed, f"error {error:.2e} > allowed {allowed:.2e}"


@triton_path
@pytest.mark.parametrize("features, dtype, shape", [*combinations(DTYPES)])
def test_accuracy(features, dtype, shape, device):
    assert_as_accurate(make(features, dtype, device, shape))


@triton_path
@pytest.mark.parametrize("scale", [1e-3, 30])
def test_accuracy_at_scale(scale, device):
    arguments = make(["prefix", "sinks"], device=device)
    assert_as_accurate(arguments | {"q": arguments["q"] * scale})


@triton_path
@pytest.mark.parametrize(
    "shape", [(10, 2, 20, 33), (16, 1, 128, 64), (3, 3, 256, 256), (20, 1, 64, 64), (34, 1, 24, 5)], ids=str
)
def test_any_width_and_group(shape, device):
    assert_as_accurate(make(["prefix", "window"], torch.float16, device, shape))


def test_autocast_changes_nothing(device):
    for features in ([], ["softcap"], FEATURES):
        arguments = make(features, device=device)
        for op in (decode_attention, decode_attention_reference):
            expected = op(**arguments)
            with torch.autocast(device, torch.bfloat16):
                assert torch.equal(op(**arguments), expected), features


def test_any_strides_and_integers(device):
    arguments = make(["prefix", "window", "sinks"], device=device, integers=torch.int32)
    spread, turned = {}, {}
    for name, x in arguments.items():
        if torch.is_tensor(x):
            wide = x.new_full((*x.shape, 2), float("nan") if x.is_floating_point() else 0)
            wide[..., 0] = x
            spread[name] = wide[..., 0]
    for name in ("q", "k_cache", "v_cache"):
        turned[name] = arguments[name].transpose(0, 1).contiguous().transpose(0, 1)
    want = decode_attention(**arguments)
    assert torch.equal(decode_attention(**arguments | spread), want)
    assert torch.equal(decode_attention(**arguments | turned), want)


@triton_path
def test_what_lies_past_the_lengths_is_not_read(device):
    arguments = make(["prefix", "window"], device=device)
    want = decode_attention(**arguments)
    pairs = [
        *zip(arguments["slot"].tolist(), arguments["length"].tolist(), strict=True),
        (1, 45 if device == "cpu" else 297),
    ]
    pairs += [(3, 5 if device == "cpu" else 33)]
    for cache in ("k_cache", "v_cache"):
        for slot, length in pairs:
            arguments[cache][slot, length:] = float("nan")
    assert torch.equal(decode_attention(**arguments), want)


@triton_path
def test_same_bits_alone_and_in_any_batch(device):
    arguments = make(["prefix", "window"], torch.float16, device)
    together = decode_attention(**arguments)

    def rows(index):
        own = {"q", "slot", "length", "prefix_slot", "prefix_length"}
        return {name: x[index] if name in own else x for name, x in arguments.items()}

    for b in (0, 1, 4):
        assert torch.equal(decode_attention(**rows(slice(b, b + 1)))[0], together[b])
    order = torch.tensor([3, 1, 4, 1, 0, 2] * 3, device=device)
    assert torch.equal(decode_attention(**rows(order)), together[order])


@triton_path
def test_same_bits_in_a_longer_cache(device):
    arguments = make(["prefix"], device=device)
    longer = {name: torch.cat([arguments[name]] * 3, 1) for name in ("k_cache", "v_cache")}
    assert torch.equal(decode_attention(**arguments | longer), decode_attention(**arguments))


def test_a_prefix_is_the_same_as_its_copy(device):
    arguments = make(["prefix", "window", "softcap", "sinks"], device=device)
    copied = {name: x for name, x in arguments.items() if not name.startswith("prefix")}
    before = torch.where(arguments["prefix_slot"] >= 0, arguments["prefix_length"], 0)
    for name in ("k_cache", "v_cache"):
        cache = arguments[name]
        copied[name] = cache.new_zeros(5, 2 * cache.shape[1], *cache.shape[2:])
        for b in range(5):
            own = cache[arguments["slot"][b], : arguments["length"][b]]
            joined = torch.cat([cache[arguments["prefix_slot"][b], : before[b]], own])
            copied[name][b, : joined.shape[0]] = joined
    copied |= {"slot": torch.arange(5, device=device), "length": arguments["length"] + before}
    torch.testing.assert_close(
        decode_attention(**arguments), decode_attention(**copied), rtol=1e-4, atol=1e-5
    )


def test_prefixes_may_lie_in_a_cache_of_their_own(device):
    """That cache has another length, its rows another order, its heads stand outside positions; every feature is on."""
    arguments = make(["prefix", "window", "softcap", "sinks"], device=device)
    want = decode_attention(**arguments)
    moved = torch.tensor([3, 1], device=device)  # row 0 of the new cache was row 3
    arguments["prefix_slot"] = torch.tensor([1, 1, -1, 0, 1], device=device)
    for name, cache in (("k_prefix", "k_cache"), ("v_prefix", "v_cache")):
        rows = arguments[cache][moved, : arguments["prefix_length"].max()]
        arguments[name] = rows.transpose(1, 2).contiguous().transpose(1, 2)
        arguments[cache] = arguments[cache].clone()
        arguments[cache][[1, 3]] = float("nan")  # no sequence's own rows
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(decode_attention_reference(**arguments), want, **close)
    torch.testing.assert_close(decode_attention(**arguments), want, **close)


@cpu_path
@pytest.mark.parametrize("slots", [[0, 0, 1, 1], [1, 0, 2, 0], [900, 900, 5, 7], [3, 3, 3, 3]], ids=str)
def test_cpu_path_shares_rows_in_any_arrangement(slots):
    arguments = {
        "q": torch.randn(4, 4, 8),
        "slot": torch.tensor([0, 1, 2, 3]),
        "length": torch.tensor([3, 1, 2, 5]),
    }
    arguments |= {"k_cache": torch.randn(4, 6, 2, 8), "v_cache": torch.randn(4, 6, 2, 5)}
    arguments |= {"k_prefix": torch.randn(901, 9, 2, 8), "v_prefix": torch.randn(901, 9, 2, 5)}
    arguments |= {"prefix_slot": torch.tensor(slots), "prefix_length": torch.tensor([9, 2, 5, 7])}
    arguments = convert(arguments, torch.float64)
    torch.testing.assert_close(
        decode_attention(**arguments), decode_attention_reference(**arguments), rtol=1e-12, atol=1e-12
    )


@cpu_path
@pytest.mark.parametrize("call", [0, 2**14, 2**40])
@pytest.mark.parametrize("window", [None, 4, 9])
def test_cpu_path_in_any_buckets(call, window, monkeypatch):
    """One call a row, a few, and one for all of them: uneven groups, gaps, prefixes out of sight, repeated numbers."""
    monkeypatch.setattr(decode, "CALL", call)
    decode._plan.cache_clear()
    draw = torch.Generator().manual_seed(1)
    for _ in range(6):
        B = int(torch.randint(1, 14, (), generator=draw))
        arguments = {"q": torch.randn(B, 6, 8), "k_cache": torch.randn(20, 12, 2, 8)}
        arguments |= {"v_cache": torch.randn(20, 12, 2, 8), "k_prefix": torch.randn(9, 15, 2, 8)}
        arguments |= {"v_prefix": torch.randn(9, 15, 2, 8), "slot": torch.randperm(20, generator=draw)[:B]}
        arguments |= {"length": torch.randint(0, 13, (B,), generator=draw), "window": window}
        arguments |= {"prefix_slot": torch.randint(-1, 9, (B,), generator=draw).sort().values}
        arguments |= {"prefix_length": torch.randint(0, 16, (9,), generator=draw)[arguments["prefix_slot"]]}

        arguments = convert(arguments, torch.float64)
        want = decode_attention_reference(**arguments)
        for _ in range(2):  # the second time by what the first found out
            torch.testing.assert_close(decode_attention(**arguments), want, rtol=1e-12, atol=1e-12)

        # a step later, each sequence is longer by one
        arguments["length"] = (arguments["length"] + 1).clamp(max=12)
        want = decode_attention_reference(**arguments)
        torch.testing.assert_close(decode_attention(**arguments), want, rtol=1e-12, atol=1e-12)


def test_empty_batch_and_empty_sequences(device):
    arguments = make(["prefix"], device=device)
    none = {name: x[:0] for name, x in arguments.items() if "cache" not in name}
    assert decode_attention(**arguments | none).shape == (0, 4, 16)
    arguments["length"][2] = 0  # the one without a prefix
    for op in (decode_attention, decode_attention_reference):
        out = op(**arguments)
        assert (out[2] == 0).all() and (out[:2] != 0).any(2).all() and out.isfinite().all()


REFUSALS = {
    "q, k_cache, v_cache: expected (B, H, D), (slots, S_max, G, D), (slots, S_max, G, Dv), got (2, 4, 8), (3, 2, 8)": {
        "k_cache": (3, 2, 8)
    },
    "k_cache: expected shape (slots=3, S_max=5, kv_heads=2, head_dim=8), got (3, 5, 2, 9)": {
        "k_cache": (3, 5, 2, 9)
    },
    "v_cache: expected shape (slots=3, S_max=5, kv_heads=2, head_dim=8), got (3, 6, 2, 8)": {
        "v_cache": (3, 6, 2, 8)
    },
    "q: expected a multiple of the 2 key/value heads, got 3": {"q": (2, 3, 8)},
    "q: expected a head dimension of 1 to 256, got 257": {"q": (2, 4, 257)},
    "q, k_cache, v_cache: expected one dtype, got torch.float16": {
        "q": torch.zeros(2, 4, 8, dtype=torch.float16)
    },
    "slot: expected shape (batch=2), got (3,)": {"slot": torch.zeros(3, dtype=torch.int64)},
    "slot: expected dtype torch.int32 or torch.int64, got torch.float32": {"slot": torch.zeros(2)},
    "length: expected shape (batch=2), got (1,)": {"length": torch.ones(1, dtype=torch.int64)},
    "prefix_slot, prefix_length: expected both or neither, got one": {
        "prefix_slot": torch.zeros(2, dtype=torch.int64)
    },
    "k_prefix, v_prefix: expected both and a prefix_slot, or neither": {"k_prefix": (1, 5, 2, 8)},
    "k_prefix: expected shape (prefixes=1, P_max=4, kv_heads=2, head_dim=8), got (1, 4, 3, 8)": {
        "k_prefix": (1, 4, 3, 8),
        "v_prefix": (1, 4, 2, 8),
        "prefix_slot": torch.zeros(2, dtype=torch.int64),
        "prefix_length": torch.zeros(2, dtype=torch.int64),
    },
    "k_prefix, v_prefix: expected torch.float32, got torch.float32, torch.float16": {
        "k_prefix": (1, 4, 2, 8),
        "v_prefix": torch.zeros(1, 4, 2, 8, dtype=torch.float16),
        "prefix_slot": torch.zeros(2, dtype=torch.int64),
        "prefix_length": torch.zeros(2, dtype=torch.int64),
    },
    "window: expected at least 1, got 0": {"window": 0},
    "softcap: expected a positive number, got -1.0": {"softcap": -1.0},
    "sinks: expected shape (heads=4), got (2,)": {"sinks": torch.zeros(2)},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refuses(message):
    arguments = {"q": (2, 4, 8), "k_cache": (3, 5, 2, 8), "v_cache": (3, 5, 2, 8)}
    arguments |= {"slot": torch.tensor([0, 1]), "length": torch.tensor([1, 2])} | REFUSALS[message]
    arguments = {name: torch.zeros(x) if isinstance(x, tuple) else x for name, x in arguments.items()}
    with pytest.raises(ValueError) as caught:
        decode_attention(**arguments)
    assert message in str(caught.value)


def test_refuses_a_gradient(device):
    arguments = make(device=device)
    arguments["q"].requires_grad_()
    with pytest.raises(NotImplementedError, match="train through flash_attention"):
        decode_attention(**arguments)
    with torch.no_grad():
        assert decode_attention(**arguments).isfinite().all()


class NoHostRead(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}, func
        return func(*args, **(kwargs or {}))


@cpu_path
def test_reads_no_tensor_on_the_host():
    arguments = make(["prefix", "window"], torch.float16)
    with compile_only("sm_90"), NoHostRead():
        decode_attention(**arguments)
    with NoHostRead(), pytest.raises(AssertionError):
        int(arguments["length"].max())
