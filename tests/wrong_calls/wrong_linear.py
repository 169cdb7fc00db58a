"""Wrong calls of lora_linear, lora_linears, nf4_linear and the 4-bit functions."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from burnish.kernels import dequantize_nf4, lora_linear, lora_linears, moe_mlp, nf4_linear, quantize_nf4
from torch import Tensor
from wrong import Wrong, finite, int32, meta, nan_rows, not_finite, randn, shape, with_gradients

NAN, INF = float("nan"), float("inf")
X, W, A, B = randn(6, 16), randn(8, 16, seed=1), randn(4, 16, seed=2), randn(8, 4, seed=3)
STACK_A, STACK_B = randn(2, 4, 16, seed=2), randn(2, 8, 4, seed=3)
FOUR_BIT = quantize_nf4(randn(8, 64))
SINGLE = quantize_nf4(randn(8, 64), double_quant=False)


def lora(**changed: Any) -> Callable[[], Any]:
    return lambda: lora_linear(**{"x": X, "weight": W, "lora_a": A, "lora_b": B, "scaling": 1.0, **changed})


def routed(adapter: Tensor, **changed: Any) -> Callable[[], Any]:
    """Out and the gradients of x, A and B."""
    given = {"x": X[: len(adapter)], "lora_a": STACK_A, "lora_b": STACK_B, **changed}
    return with_gradients(lambda **wanted: lora(adapter=adapter, **wanted)(), given)


def linears(**changed: Any) -> Callable[[], Any]:
    given = {"weights": [W, W], "lora_a": [A, A], "lora_b": [B, B], "scalings": [1.0, 1.0], **changed}
    return lambda: lora_linears(X, **given)


def four_bit(weight=FOUR_BIT, **changed: Any) -> Callable[[], Any]:
    return lambda: dequantize_nf4(replace(weight, **changed))


def experts_in_4_bits() -> Tensor:
    """Two experts, whose packed bytes are of one."""
    whole = quantize_nf4(randn(2, 64, 64))
    weights, indices = torch.rand(3, 1), torch.zeros(3, 1, dtype=torch.int64)
    return moe_mlp(
        randn(3, 64), replace(whole, packed=whole.packed[:2048]), whole, weights, indices, activation="relu2"
    )


ADAPTERS = r"adapter: expected numbers from -1 to 1, got "
ROWS = nan_rows(2)  # of the result and of dx; the gradients of A and B are those of the other rows
EMPTY = torch.zeros(0, dtype=torch.int32)

CALLS = (
    # which adapter
    Wrong("lora: adapter past the stack", routed(int32(0, 1, 2, 0, -1, 0)), ADAPTERS + "2", ROWS),
    Wrong("lora: adapter 10^9", routed(int32(0, 1, 10**9, 0, -1, 0)), ADAPTERS + "1000000000", ROWS),
    Wrong("lora: adapter 2^40", routed(torch.tensor([0, 1, 1 << 40])), ADAPTERS + str(1 << 40), ROWS),
    Wrong("lora: adapter 2^31 - 1", routed(int32(0, 1, 2**31 - 1)), ADAPTERS + str(2**31 - 1), ROWS),
    Wrong("lora: adapter -2", routed(int32(0, 1, -2, 0, -1, 0)), ADAPTERS + "-2", ROWS),
    Wrong("lora: adapter int64 min", routed(torch.tensor([0, 1, -(2**63)])), ADAPTERS + str(-(2**63)), ROWS),
    Wrong("lora: adapter int8", routed(torch.tensor([0, 1, -9], dtype=torch.int8)), ADAPTERS + "-9", ROWS),
    Wrong(
        "lora: adapter past the stack, dropout",
        routed(int32(0, 1, 2), dropout=0.3, seed=1),
        ADAPTERS + "2",
        lambda found: ROWS(found[0]),
    ),
    Wrong("lora: nobody has an adapter", routed(int32(-1, -1, -1)), finite),
    Wrong("lora: adapter float", routed(torch.zeros(6)), "adapter: expected dtype .*got torch.float32"),
    Wrong("lora: adapter bool", routed(torch.zeros(6).bool()), "adapter: expected dtype .*got torch.bool"),
    Wrong(
        "lora: adapter of another length",
        lora(lora_a=STACK_A, lora_b=STACK_B, adapter=int32(0, 1)),
        r"adapter: expected shape \(x.shape\[0\]=6\), got \(2,\)",
    ),
    Wrong(
        "lora: adapter, plain A", lora(adapter=int32(0, 0, 0, 0, 0, 0)), r"lora_a: expected shape \(adapters"
    ),
    Wrong(
        "lora: stacked A, no adapter",
        lora(lora_a=STACK_A, lora_b=STACK_B),
        r"lora_a: expected shape \(rank=4",
    ),
    Wrong(
        "lora: empty stack",
        routed(int32(-1, -1), lora_a=STACK_A[:0], lora_b=STACK_B[:0]),
        "lora_a: expected at",
    ),
    # no rows
    Wrong(
        "lora: no rows",
        with_gradients(lambda **t: lora(**t)(), {"x": X[:0], "lora_a": A, "lora_b": B}),
        finite,
    ),
    Wrong("lora: no rows, adapter", routed(EMPTY), finite),
    Wrong("lora: no rows, dropout", lora(x=X[:0], dropout=0.5, seed=1), shape(0, 8)),
    Wrong("lora: no rows, DoRA", lora(x=X[:0], magnitude=torch.ones(8)), shape(0, 8)),
    Wrong("lora: no rows, adapter and dropout", routed(EMPTY, dropout=0.5, seed=1), finite),
    # numbers
    Wrong("lora: scaling nan", lora(scaling=NAN), "scaling: expected a finite number, got nan"),
    Wrong("lora: scaling inf", lora(scaling=INF), "scaling: expected a finite number, got inf"),
    Wrong("lora: scaling -inf", lora(scaling=-INF), "scaling: expected a finite number, got -inf"),
    Wrong("lora: dropout 1", lora(dropout=1.0, seed=1), "dropout: expected a share from 0 to below 1, got 1"),
    Wrong("lora: dropout -0.1", lora(dropout=-0.1, seed=1), "dropout: expected a share from 0 to below 1"),
    Wrong(
        "lora: dropout nan", lora(dropout=NAN, seed=1), "dropout: expected a share from 0 to below 1, got nan"
    ),
    Wrong("lora: no seed", lora(dropout=0.5), "seed: expected an int or a 0-d int64 tensor, .* got none"),
    Wrong(
        "lora: seed 2^70",
        lora(dropout=0.5, seed=2**70),
        "seed: expected an int of 64 bits, got 1180591620717",
    ),
    Wrong("lora: seed 1.5", lora(dropout=0.5, seed=1.5), "seed: expected an int of 64 bits, got 1.5"),
    Wrong(
        "lora: seed int32",
        lora(dropout=0.5, seed=torch.tensor(1).int()),
        "seed: expected a 0-d int64 tensor on",
    ),
    Wrong(
        "lora: seed 1-d", lora(dropout=0.5, seed=torch.tensor([1])), "seed: expected a 0-d int64 .* got 1-d"
    ),
    Wrong(
        "lora: seed on meta", lora(dropout=0.5, seed=torch.tensor(1).to("meta")), "seed: expected .* on meta"
    ),
    Wrong("lora: magnitude 0", lora(magnitude=torch.zeros(8)), finite),
    # 0 / 0, as the formula has it
    Wrong("lora: DoRA of nothing", lora(weight=W * 0, lora_b=B * 0, magnitude=torch.ones(8)), not_finite),
    # shapes, dtypes, devices
    Wrong(
        "lora: rank 0", lora(lora_a=A[:0], lora_b=B[:, :0]), "lora_a: expected at least one adapter of rank 1"
    ),
    Wrong(
        "lora: A of one dimension",
        lora(lora_a=A[0]),
        r"lora_a: expected shape \(rank=1, in=16\), got \(16,\)",
    ),
    Wrong("lora: A 0-d", lora(lora_a=torch.tensor(1.0)), r"lora_a: expected shape .* got \(\)"),
    Wrong("lora: x 0-d", lora(x=torch.tensor(1.0)), r"x: expected shape \(..., in=16\), got \(\)"),
    Wrong("lora: x int", lora(x=X.int()), "x: expected dtype .* got torch.int32"),
    Wrong("lora: weight int", lora(weight=W.int()), "weight: expected dtype .* got torch.int32"),
    Wrong("lora: A int", lora(lora_a=A.int()), "lora_a: expected dtype .* got torch.int32"),
    Wrong("lora: bias int", lora(bias=torch.ones(8).int()), "bias: expected dtype .* got torch.int32"),
    Wrong("lora: x fp64", lora(x=X.double()), finite, "x: expected dtype .* got torch.float64"),
    Wrong("lora: A fp64", lora(lora_a=A.double()), finite),
    Wrong("lora: meta weight", lora(weight=W.to("meta")), "weight: expected on cpu, got on meta"),
    Wrong("lora: meta x", lora(x=X.to("meta")), "weight: expected on meta, got on cpu"),
    Wrong("lora: meta B", lora(lora_b=B.to("meta")), "lora_b: expected on cpu, got on meta"),
    Wrong("lora: meta adapter", routed(EMPTY.to("meta"), x=X[:0]), "adapter: expected on cpu, got on meta"),
    Wrong("lora: all on meta", lora(**meta(x=X, weight=W, lora_a=A, lora_b=B)), shape(6, 8)),
    Wrong(
        "lora: 4-bit weight on meta",
        lora(x=randn(2, 64), weight=FOUR_BIT.to("meta"), lora_a=randn(4, 64)),
        "weight: expected on cpu, got on meta",
    ),
    # several layers
    Wrong("linears: one B too few", linears(lora_b=[B]), "lora_b: expected one for each of 2 weights, got 1"),
    Wrong(
        "linears: one A too many",
        linears(lora_a=[A] * 3),
        "lora_a: expected one for each of 2 weights, got 3",
    ),
    Wrong(
        "linears: one scaling", linears(scalings=[1.0]), "scalings: expected one for each of 2 weights, got 1"
    ),
    Wrong(
        "linears: one bias", linears(biases=[W[:, 0]]), "biases: expected none, or one for each of 2 weights"
    ),
    Wrong(
        "linears: none",
        linears(weights=[], lora_a=[], lora_b=[], scalings=[]),
        "weights: expected at least one, .* got 0",
    ),
    Wrong("linears: scaling nan", linears(scalings=[1.0, NAN]), "scaling: expected a finite number, got nan"),
    Wrong("linears: meta weight", linears(weights=[W, W.to("meta")]), "weight: expected on cpu, got on meta"),
    Wrong(
        "linears: stacks of different heights",
        linears(
            lora_a=[STACK_A, STACK_A[:1]], lora_b=[STACK_B, STACK_B[:1]], adapter=int32(0, 0, 0, 0, 0, 0)
        ),
        r"lora_a: expected as many stacked adapters in every layer, got \[2, 1\]",
    ),
    Wrong(
        "linears: adapter past the stack",
        linears(lora_a=[STACK_A] * 2, lora_b=[STACK_B] * 2, adapter=int32(0, 1, 2, 0, -1, 0)),
        ADAPTERS + "2",
        ROWS,
    ),
    # weights in 4 bits
    Wrong(
        "nf4: packed too short",
        four_bit(packed=FOUR_BIT.packed[:10]),
        "packed: expected 256 numbers of torch",
    ),
    Wrong(
        "nf4: packed too long", four_bit(packed=FOUR_BIT.packed.repeat(2)), "packed: expected 256 .* got 512"
    ),
    Wrong(
        "nf4: packed int64",
        four_bit(packed=FOUR_BIT.packed.long()),
        "packed: expected .* got 256 of torch.int64",
    ),
    Wrong(
        "nf4: packed strided",
        four_bit(packed=FOUR_BIT.packed.repeat(2)[::2]),
        "packed: expected a contiguous tensor",
    ),
    Wrong("nf4: absmax too short", four_bit(absmax=FOUR_BIT.absmax[:1]), "absmax: expected 8 numbers"),
    Wrong(
        "nf4: absmax of the other kind", four_bit(absmax=SINGLE.absmax), "absmax: expected 8 numbers of torch"
    ),
    Wrong(
        "nf4: code too short", four_bit(code=FOUR_BIT.code[:15]), "code: expected 16 numbers of torch.float32"
    ),
    Wrong(
        "nf4: nested absmax too short",
        four_bit(nested_absmax=torch.zeros(0)),
        "nested_absmax: expected 1 numbers",
    ),
    Wrong(
        "nf4: nested code too short",
        four_bit(nested_code=torch.zeros(16)),
        "nested_code: expected 256 numbers",
    ),
    Wrong(
        "nf4: no offset",
        four_bit(offset=None),
        "nested_absmax, nested_code, offset: expected all three or none",
    ),
    Wrong(
        "nf4: offset alone",
        four_bit(SINGLE, offset=torch.tensor(0.0)),
        "nested_absmax, nested_code, offset: exp",
    ),
    Wrong("nf4: several offsets", four_bit(offset=torch.zeros(2)), "offset: expected 1 numbers"),
    Wrong("nf4: shape too large", four_bit(shape=(800, 64)), "packed: expected 25600 numbers of torch.uint8"),
    Wrong("nf4: shape of two negatives", four_bit(shape=(-8, -64)), r"shape: expected no negative size, got"),
    Wrong("nf4: another blocksize", four_bit(blocksize=32), "absmax: expected 16 numbers"),
    Wrong("nf4: odd blocksize", four_bit(blocksize=100), "blocksize: expected one of .* got 100"),
    Wrong("nf4: blocksize 0", four_bit(blocksize=0), "blocksize: expected one of .* got 0"),
    Wrong(
        "nf4: of ints", four_bit(dtype=torch.int32), "dtype: expected a floating-point dtype, got torch.int32"
    ),
    Wrong(
        "nf4: code on meta",
        four_bit(code=FOUR_BIT.code.to("meta")),
        "code: expected 16 .* on cpu, .* on meta",
    ),
    Wrong("nf4: all on meta", lambda: dequantize_nf4(FOUR_BIT.to("meta")), shape(8, 64)),
    Wrong("nf4: to an int", lambda: dequantize_nf4(FOUR_BIT, torch.int8), "dtype: expected float32, float16"),
    Wrong("nf4: experts packed too short", experts_in_4_bits, "packed: expected 4096 numbers of torch.uint8"),
    Wrong("nf4: NaN", lambda: dequantize_nf4(quantize_nf4(randn(8, 64) * NAN)), not_finite),
    Wrong("nf4: inf", lambda: dequantize_nf4(quantize_nf4(randn(8, 64) * INF)), not_finite),
    Wrong(
        "nf4: inf, single",
        lambda: dequantize_nf4(quantize_nf4(randn(8, 64) * INF, double_quant=False)),
        not_finite,
    ),
    Wrong("nf4: empty", lambda: dequantize_nf4(quantize_nf4(randn(0, 64))), shape(0, 64)),
    Wrong(
        "nf4: empty, single",
        lambda: dequantize_nf4(quantize_nf4(randn(0, 64), double_quant=False)),
        shape(0, 64),
    ),
    Wrong("nf4: 0-d", lambda: dequantize_nf4(quantize_nf4(torch.tensor(2.0))), finite),
    Wrong(
        "nf4: int weight",
        lambda: quantize_nf4(randn(8, 64).int()),
        "weight: expected dtype .* got torch.int32",
    ),
    Wrong(
        "nf4: fp64 weight", lambda: quantize_nf4(randn(8, 64).double()), "weight: expected dtype .* torch.fl"
    ),
    Wrong(
        "nf4: blocksize 48", lambda: quantize_nf4(randn(8, 64), blocksize=48), "blocksize: expected one of"
    ),
    Wrong("nf4: int4", lambda: quantize_nf4(randn(8, 64), quant_type="int4"), "quant_type: expected one of"),
    Wrong(
        "nf4_linear: another width",
        lambda: nf4_linear(randn(3, 65), FOUR_BIT),
        r"x: expected shape \(..., in=64",
    ),
    Wrong("nf4_linear: no rows", lambda: nf4_linear(randn(0, 64), FOUR_BIT), shape(0, 8)),
    Wrong(
        "nf4_linear: x 0-d", lambda: nf4_linear(torch.tensor(1.0), FOUR_BIT), r"x: expected shape .* got \(\)"
    ),
    Wrong(
        "nf4_linear: x int",
        lambda: nf4_linear(randn(3, 64).int(), FOUR_BIT),
        "x: expected dtype .* torch.int32",
    ),
    Wrong(
        "nf4_linear: weight of 3 dimensions",
        lambda: nf4_linear(randn(3, 64), quantize_nf4(randn(2, 2, 64))),
        r"weight: expected shape \(out, in\), got \(2, 2, 64\)",
    ),
    Wrong(
        "nf4_linear: bias int",
        lambda: nf4_linear(randn(3, 64), FOUR_BIT, torch.ones(8).int()),
        "bias: expected d",
    ),
    Wrong(
        "nf4_linear: meta weight",
        lambda: nf4_linear(randn(3, 64), FOUR_BIT.to("meta")),
        "weight: expected on cpu",
    ),
    Wrong(
        "nf4_linear: meta bias",
        lambda: nf4_linear(randn(3, 64), FOUR_BIT, torch.ones(8).to("meta")),
        "bias: expected on cpu, got on meta",
    ),
    Wrong(
        "nf4_linear: all on meta",
        lambda: nf4_linear(randn(3, 64).to("meta"), FOUR_BIT.to("meta")),
        shape(3, 8),
    ),
)
