"""Wrong calls of moe, sampling, norms, gated linear units and rotary embeddings."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from burnish.kernels import (
    add_rms_norm,
    apply_rope,
    clamped_swiglu,
    geglu,
    moe_mlp,
    moe_route,
    quantize_nf4,
    rms_norm,
    swiglu,
)
from torch import Tensor
from wrong import (
    Wrong,
    equals,
    finite,
    int32,
    meta,
    nan_rows,
    not_finite,
    randn,
    shape,
    tensors_of,
    with_gradients,
)

NAN, INF = float("nan"), float("inf")

# ---- mixture of experts

GATE_UP, DOWN = randn(3, 16, 8), randn(3, 8, 8, seed=1)
EXPERTS: dict[str, Any] = {
    "x": randn(5, 8),
    "gate_up": GATE_UP,
    "down": DOWN,
    "weights": randn(5, 2, seed=2).abs(),
    "indices": torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [1, 0]]),
}
BY_TOKEN = ("x", "weights", "indices")


def moe(**changed: Any) -> Callable[[], Any]:
    return lambda: moe_mlp(**EXPERTS | changed)


def choice(index: int, dtype: torch.dtype = torch.int64) -> dict[str, Any]:
    """Token 2's first choice is `index`."""
    indices = EXPERTS["indices"].to(dtype)
    indices[2, 0] = index
    return EXPERTS | {"indices": indices}


@cache
def without_the_choice() -> list[Tensor]:
    """Out and gradients of a weight of 0, which itself has none."""
    weights = EXPERTS["weights"].clone()
    weights[2, 0] = 0
    found = with_gradients(moe_mlp, EXPERTS | {"weights": weights})()
    found[4][2, 0] = 0
    return found


def passed_over(found: Any) -> None:
    for result, expected in zip(tensors_of(found), without_the_choice(), strict=False):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def route(top_k: int = 2, **changed: Any) -> Callable[[], Any]:
    logits = changed.pop("logits", randn(4, 3))
    return lambda: moe_route(logits, top_k, **changed)


def nan_weights_of_known_experts(found: Any) -> None:
    weights, indices, _ = found
    assert weights.isnan().all() and ((indices >= 0) & (indices < 3)).all()


MOE = (
    # a choice outside of 0..E-1 is passed over: right, not wrong
    Wrong("moe: index E", moe(**choice(3)), passed_over),
    Wrong("moe: index -1", with_gradients(moe_mlp, choice(-1)), passed_over),
    Wrong("moe: index int64 min", moe(**choice(-(2**63))), passed_over),
    Wrong("moe: index 2^40", moe(**choice(1 << 40)), passed_over),
    Wrong("moe: index 2^40 + 1", with_gradients(moe_mlp, choice((1 << 40) + 1)), passed_over),
    Wrong("moe: index int32 max", moe(**choice(2**31 - 1, torch.int32)), passed_over),
    Wrong("moe: nobody has an expert", moe(indices=torch.full((5, 2), 9)), equals(0)),
    Wrong("moe: an expert twice", moe(indices=torch.zeros(5, 2, dtype=torch.int64)), finite),
    Wrong("moe: index int8", moe(**choice(0, torch.int8)), "indices: expected dtype .* got torch.int8"),
    Wrong(
        "moe: index float", moe(**choice(0, torch.float32)), "indices: expected dtype .* got torch.float32"
    ),
    Wrong("moe: weights NaN", moe(weights=torch.full((5, 2), NAN)), not_finite),
    Wrong(
        "moe: weights int", moe(weights=torch.ones(5, 2).int()), "weights: expected dtype .* got torch.int"
    ),
    Wrong("moe: one token NaN", moe(x=randn(5, 8).index_fill(0, torch.tensor([2]), NAN)), nan_rows(2)),
    Wrong("moe: no tokens", with_gradients(moe_mlp, EXPERTS | {n: EXPERTS[n][:0] for n in BY_TOKEN}), finite),
    Wrong(
        "moe: no choices",
        with_gradients(moe_mlp, EXPERTS | {n: EXPERTS[n][:, :0] for n in BY_TOKEN[1:]}),
        equals(0),
    ),
    Wrong(
        "moe: no experts",
        moe(gate_up=GATE_UP[:0], down=DOWN[:0]),
        "down: expected at least one expert, got none",
    ),
    Wrong("moe: no ffn", moe(gate_up=GATE_UP[:, :0], down=DOWN[..., :0]), equals(0)),
    Wrong("moe: relu", moe(activation="relu"), "activation: expected one of swiglu, .* got 'relu'"),
    Wrong(
        "moe: alpha nan",
        moe(activation="clamped_swiglu", alpha=NAN),
        "alpha: expected a finite number, got nan",
    ),
    Wrong(
        "moe: limit -1",
        moe(activation="clamped_swiglu", limit=-1.0),
        "limit: expected a number of at least 0",
    ),
    Wrong(
        "moe: limit nan",
        moe(activation="clamped_swiglu", limit=NAN),
        "limit: expected a number of at least 0",
    ),
    Wrong(
        "moe: x of 3 dimensions",
        moe(x=randn(1, 5, 8)),
        r"x, down, weights: expected \(T, C\), .* got \(1, 5, 8\)",
    ),
    Wrong(
        "moe: another gate_up", moe(gate_up=GATE_UP[:, :8]), r"gate_up: expected shape \(experts=3, width=16"
    ),
    Wrong("moe: x int", moe(x=randn(5, 8).int()), "x: expected dtype .* got torch.int32"),
    Wrong(
        "moe: x bf16",
        moe(x=randn(5, 8).bfloat16()),
        "gate_up: expected dtype torch.bfloat16, got torch.float32",
    ),
    Wrong(
        "moe: adapter int",
        moe(down_a=torch.ones(3, 2, 8).int(), down_b=torch.ones(3, 8, 2)),
        "down_a: expected d",
    ),
    Wrong(
        "moe: adapter of rank 0",
        moe(down_a=randn(3, 0, 8), down_b=randn(3, 8, 0)),
        "down_a, down_b: expected",
    ),
    Wrong("moe: meta down", moe(down=DOWN.to("meta")), "down: expected on cpu, got on meta"),
    Wrong(
        "moe: meta indices",
        moe(indices=EXPERTS["indices"].to("meta")),
        "indices: expected on cpu, got on meta",
    ),
    Wrong(
        "moe: 4-bit on meta",
        moe(gate_up=quantize_nf4(randn(3, 16, 8)).to("meta")),
        "gate_up: expected on cpu",
    ),
    Wrong("moe: all on meta", lambda: moe_mlp(**meta(**EXPERTS)), shape(5, 8)),
    Wrong("route: top_k > E", route(5), "logits: expected .*top_k=5"),
    Wrong("route: top_k 0", route(0), "logits: expected .*top_k=0"),
    Wrong("route: NaN", route(logits=randn(4, 3) * NAN), nan_weights_of_known_experts),
    Wrong("route: no tokens", route(logits=randn(0, 3)), shape(0, 2)),
    Wrong("route: int logits", route(logits=randn(4, 3).int()), "logits: expected dtype .* got torch.int32"),
    Wrong(
        "route: capacity 0", route(capacity_factor=0), "capacity_factor: expected a positive number, got 0"
    ),
    Wrong(
        "route: capacity nan",
        route(capacity_factor=NAN),
        "capacity_factor: expected a positive number, got nan",
    ),
    Wrong("route: capacity inf", route(capacity_factor=INF), finite),
    Wrong("route: capacity 10^300", route(capacity_factor=1e300), finite),
    Wrong("route: scale nan", route(scale=NAN), "scale: expected a finite number, got nan"),
    Wrong("route: another bias", route(bias=randn(4)), r"bias: expected shape \(experts=3\), got \(4,\)"),
    Wrong("route: bias int", route(bias=torch.ones(3).int()), "bias: expected dtype .* got torch.int32"),
    Wrong("route: meta bias", route(bias=randn(3).to("meta")), "bias: expected on cpu, got on meta"),
    Wrong("route: all on meta", route(logits=randn(4, 3).to("meta")), shape(4, 2)),
)

# ---- rotary embeddings

Q, K, COS, SIN = randn(12, 4, 20), randn(12, 2, 20, seed=1), randn(12, 8, seed=2), randn(12, 8, seed=3)


def rope(**changed: Any) -> Callable[[], Any]:
    return lambda: apply_rope(**{"q": Q, "k": K, "cos": COS, "sin": SIN, **changed})


def at(position: int, **changed: Any) -> Callable[[], Any]:
    """Token 5 stands at `position`: q, and the gradients of q and k."""
    positions = torch.arange(12)
    positions[5] = position
    tables = {"cos": COS, "sin": SIN, "positions": positions}
    return with_gradients(lambda q, k: apply_rope(q, k, **tables, **changed), {"q": Q, "k": K})


def token_5(found: Any) -> None:
    """Dimensions that would turn are NaN, others pass through as they are, and other tokens are finite."""
    q, dq, _ = found
    assert torch.equal(q[..., 16:], Q[..., 16:])
    for t in (q, dq):
        assert t[5, :, :16].isnan().all() and t[:5].isfinite().all() and t[6:].isfinite().all()


POSITIONS = "positions: expected numbers from 0 to 11, got "

ROPE = (
    Wrong("rope: position past the table", at(12), POSITIONS + "12", token_5),
    Wrong("rope: position 2^40", at(1 << 40), POSITIONS + str(1 << 40), token_5),
    Wrong("rope: position -1", at(-1), POSITIONS + "-1", token_5),
    Wrong("rope: position int64 min", at(-(2**63)), POSITIONS + str(-(2**63)), token_5),
    Wrong("rope: position past the table, interleaved", at(12, interleaved=True), POSITIONS + "12", token_5),
    Wrong(
        "rope: an empty table",
        rope(cos=COS[:0], sin=SIN[:0], positions=torch.zeros(12).long()),
        "positions: expected numbers from 0 to -1, got 0",
        lambda found: not_finite(found[0][..., :16]),
    ),
    Wrong(
        "rope: positions int32", rope(positions=int32(*range(12))), "positions: expected dtype torch.int64"
    ),
    Wrong(
        "rope: positions of another length",
        rope(positions=torch.arange(11)),
        r"positions: expected shape .*T=12",
    ),
    Wrong(
        "rope: table too short", rope(cos=COS[:4], sin=SIN[:4]), "cos: expected at least T = 12 rows, got 4"
    ),
    Wrong("rope: tables differ", rope(sin=SIN[:11]), r"sin: expected shape \(positions=12, half_rotary=8\)"),
    Wrong(
        "rope: table too wide",
        rope(cos=randn(12, 11), sin=randn(12, 11)),
        "cos: expected at most D/2 = 10 columns",
    ),
    Wrong(
        "rope: table of one dimension", rope(cos=COS[0], sin=SIN[0]), r"q, k, cos: expected .* got .*\(8,\)"
    ),
    Wrong("rope: int table", rope(cos=COS.int(), sin=SIN.int()), "cos: expected dtype .* got torch.int32"),
    Wrong("rope: fp64 table", rope(cos=COS.double(), sin=SIN.double()), finite),
    Wrong("rope: NaN table", rope(cos=COS * NAN), lambda found: not_finite(found[0][..., :16])),
    Wrong("rope: a table of no columns", rope(cos=COS[:, :0], sin=SIN[:, :0]), finite),
    Wrong("rope: q int", rope(q=Q.int(), k=K.int()), "q: expected dtype .* got torch.int32"),
    Wrong("rope: k of another dtype", rope(k=K.half()), "k: expected dtype torch.float32, got torch.float16"),
    Wrong(
        "rope: q of 2 dimensions", rope(q=Q[0]), r"q, k, cos: expected \(\.\.\., T, H, D\), .* got \(4, 20\)"
    ),
    Wrong("rope: k of 2 dimensions", rope(k=K[0]), r"q, k, cos: expected .* got \(12, 4, 20\), \(2, 20\)"),
    Wrong("rope: another T", rope(k=K[:11]), r"k: expected shape \(T=12, G=2, D=20\), got \(11, 2, 20\)"),
    Wrong("rope: no tokens", rope(q=Q[:0], k=K[:0]), shape(0, 4, 20)),
    Wrong("rope: no key heads", rope(k=K[:, :0]), shape(12, 4, 20)),
    Wrong("rope: meta k", rope(k=K.to("meta")), "k: expected on cpu, got on meta"),
    Wrong("rope: meta table", rope(cos=COS.to("meta")), "cos: expected on cpu, got on meta"),
    Wrong(
        "rope: meta positions",
        rope(positions=torch.arange(12).to("meta")),
        "positions: expected on cpu, got on me",
    ),
    Wrong(
        "rope: all on meta",
        lambda: apply_rope(**meta(q=Q, k=K, cos=COS, sin=SIN, positions=torch.arange(12))),
        shape(12, 4, 20),
    ),
)

# ---- norms and gated linear units

X, W = randn(3, 8), randn(8, seed=1)

POINTWISE = (
    Wrong("norm: x int", lambda: rms_norm(X.int(), W), "x: expected dtype .* got torch.int32"),
    Wrong("norm: x bool", lambda: rms_norm(X > 0, W), "x: expected dtype .* got torch.bool"),
    Wrong("norm: x fp64", lambda: rms_norm(X.double(), W), finite, "x: expected dtype .* got torch.float64"),
    Wrong("norm: weight int", lambda: rms_norm(X, W.int()), "weight: expected dtype .* got torch.int32"),
    Wrong(
        "norm: another weight",
        lambda: rms_norm(X, randn(9)),
        r"weight: expected shape \(hidden=8\), got \(9,\)",
    ),
    Wrong("norm: dtypes differ", lambda: rms_norm(X.bfloat16(), W.double()), finite),
    Wrong(
        "norm: eps -1",
        lambda: rms_norm(X, W, eps=-1.0),
        "eps: expected a finite number of at least 0, got -1.0",
    ),
    Wrong(
        "norm: eps nan",
        lambda: rms_norm(X, W, eps=NAN),
        "eps: expected a finite number of at least 0, got nan",
    ),
    Wrong(
        "norm: eps inf",
        lambda: rms_norm(X, W, eps=INF),
        "eps: expected a finite number of at least 0, got inf",
    ),
    Wrong("norm: zeros, eps 0", lambda: rms_norm(X * 0, W, eps=0.0), not_finite),  # 0 / 0
    Wrong("norm: NaN row", lambda: rms_norm(X.index_fill(0, torch.tensor([1]), NAN), W), nan_rows(1)),
    Wrong("norm: hidden 0", lambda: rms_norm(X[:, :0], W[:0]), shape(3, 0)),
    Wrong("norm: no rows", with_gradients(rms_norm, {"x": X[:0], "weight": W}), finite),
    Wrong(
        "norm: 0-d",
        lambda: rms_norm(torch.tensor(1.0), W[:1]),
        r"x: expected shape \(..., hidden\), got \(\)",
    ),
    Wrong("norm: meta weight", lambda: rms_norm(X, W.to("meta")), "weight: expected on cpu, got on meta"),
    Wrong("norm: meta x", lambda: rms_norm(X.to("meta"), W), "weight: expected on meta, got on cpu"),
    Wrong("norm: all on meta", lambda: rms_norm(X.to("meta"), W.to("meta")), shape(3, 8)),
    Wrong(
        "add norm: residual fp64",
        lambda: add_rms_norm(X, X.double(), W),
        finite,
        "residual: expected dtype .* got torch.float64",
    ),
    Wrong(
        "add norm: residual int",
        lambda: add_rms_norm(X, X.int(), W),
        "residual: expected dtype .* torch.int32",
    ),
    Wrong("add norm: residual bf16", lambda: add_rms_norm(X, X.bfloat16(), W), finite),
    Wrong(
        "add norm: another residual",
        lambda: add_rms_norm(X, X[:2], W),
        r"residual: expected shape .* got \(2, 8\)",
    ),
    Wrong(
        "add norm: meta residual",
        lambda: add_rms_norm(X, X.to("meta"), W),
        "residual: expected on cpu, got on m",
    ),
    Wrong(
        "add norm: eps nan",
        lambda: add_rms_norm(X, X, W, eps=NAN),
        "eps: expected a finite number of at least 0",
    ),
    Wrong("glu: shapes", lambda: swiglu(X, randn(3, 9)), r"up: expected shape .* got \(3, 9\)"),
    Wrong(
        "glu: dtypes", lambda: swiglu(X, X.bfloat16()), "up: expected dtype torch.float32, got torch.bfloat16"
    ),
    Wrong("glu: int", lambda: swiglu(X.int(), X.int()), "gate: expected dtype .* got torch.int32"),
    Wrong("glu: int, geglu", lambda: geglu(X.int(), X.int()), "gate: expected dtype .* got torch.int32"),
    Wrong(
        "glu: int, clamped",
        lambda: clamped_swiglu(X.int(), X.int()),
        "gate: expected dtype .* got torch.int32",
    ),
    Wrong(
        "glu: 0-d", lambda: swiglu(torch.tensor(1.0), torch.tensor(1.0)), r"gate: expected shape .* got \(\)"
    ),
    Wrong("glu: no columns", lambda: swiglu(X[:, :0], X[:, :0]), shape(3, 0)),
    Wrong("glu: meta up", lambda: swiglu(X, X.to("meta")), "up: expected on cpu, got on meta"),
    Wrong("glu: all on meta", lambda: geglu(X.to("meta"), X.to("meta")), shape(3, 8)),
    Wrong("glu: NaN row", lambda: geglu(X.index_fill(0, torch.tensor([1]), NAN), X), nan_rows(1)),
    Wrong(
        "glu: limit -1",
        lambda: clamped_swiglu(X, X, limit=-1.0),
        "limit: expected a number of at least 0, got -1",
    ),
    Wrong(
        "glu: limit nan",
        lambda: clamped_swiglu(X, X, limit=NAN),
        "limit: expected a number of at least 0, got nan",
    ),
    Wrong("glu: limit inf", with_gradients(clamped_swiglu, {"gate": X, "up": X, "limit": INF}), finite),
    Wrong(
        "glu: alpha nan", lambda: clamped_swiglu(X, X, alpha=NAN), "alpha: expected a finite number, got nan"
    ),
    Wrong(
        "glu: alpha inf", lambda: clamped_swiglu(X, X, alpha=INF), "alpha: expected a finite number, got inf"
    ),
)

CALLS = MOE + ROPE + POINTWISE
