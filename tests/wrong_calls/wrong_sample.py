"""Wrong calls of sample_tokens."""

import math
from collections.abc import Callable
from typing import Any

import torch
from burnish.kernels import sample_tokens
from wrong import Wrong, calling, meta, of_shapes, randn

NAN, INF = math.nan, math.inf
LOGITS, NOISE = randn(3, 9), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
draw = calling(sample_tokens, {"logits": LOGITS, "noise": NOISE})


def an_id(nan: bool = True) -> Callable[[Any], None]:
    """Ids of the vocabulary, whatever was drawn from; and NaN for their log-probability."""

    def check(found: Any) -> None:
        token, logprob, support = found
        assert ((token >= 0) & (token < LOGITS.shape[1])).all(), token
        assert support is None or ((support >= -1) & (support < LOGITS.shape[1])).all(), support
        assert bool(logprob.isnan().all()) == nan, logprob

    return check


def most_likely(found: Any) -> None:
    assert torch.equal(found[0], LOGITS.argmax(-1)) and not found[1].any()


KEPT = {"top_k": 5, "top_p": 0.9}
CALLS = (
    Wrong(
        "sample_tokens: one dimension",
        draw(logits=LOGITS[0]),
        r"logits: expected \(B, V\) with V at least 1, got \(9,\)",
    ),
    Wrong(
        "sample_tokens: V 0",
        draw(logits=LOGITS[:, :0]),
        r"logits: expected \(B, V\) with V at least 1, got \(3, 0\)",
    ),
    Wrong(
        "sample_tokens: int64 logits",
        draw(logits=LOGITS.long()),
        "logits: expected dtype torch.float32 or .*, got torch.int64",
    ),
    Wrong(
        "sample_tokens: fp8 logits",
        draw(logits=LOGITS.to(torch.float8_e4m3fn)),
        "logits: expected dtype .*, got torch.float8_e4m3fn",
    ),
    Wrong(
        "sample_tokens: a number too few", draw(noise=NOISE[:2]), r"noise: expected shape \(B=3\), got \(2,\)"
    ),
    Wrong(
        "sample_tokens: fp32 noise",
        draw(noise=NOISE.float()),
        "noise: expected dtype torch.float64, got torch.float32",
    ),
    Wrong(
        "sample_tokens: noise on meta", draw(noise=NOISE.to("meta")), "noise: expected on cpu, got on meta"
    ),
    *(
        Wrong(
            f"sample_tokens: temperature {t}",
            draw(temperature=t),
            f"temperature: expected a finite number of at least 0, got {t}",
        )
        for t in (-1.0, NAN, INF)
    ),
    *(
        Wrong(
            f"sample_tokens: top_k {k}",
            draw(top_k=k),
            f"top_k: expected a whole number of at least 1, got {k}",
        )
        for k in (0, -1, 2.5)
    ),
    *(
        Wrong(f"sample_tokens: top_p {p}", draw(top_p=p), rf"top_p: expected a number in \(0, 1\], got {p}")
        for p in (0.0, 1.5, NAN, INF)
    ),
    *(
        Wrong(f"sample_tokens: min_p {p}", draw(min_p=p), rf"min_p: expected a number in \[0, 1\], got {p}")
        for p in (-0.1, 1.5, NAN)
    ),
    *(
        Wrong(
            f"sample_tokens: noise {number}, {how}",
            draw(noise=torch.full((3,), number, dtype=torch.float64), **how),
            r"noise: expected numbers in \[0, 1\), got one outside",
            an_id(nan=False),
        )
        for number in (1.0, -1.0, NAN, INF)
        for how in ({}, KEPT)
    ),
    *(
        Wrong(f"sample_tokens: {name}, {how}", draw(logits=logits, **how), an_id())
        for name, logits in (
            ("NaN", LOGITS * NAN),
            ("one NaN", LOGITS.index_fill(1, torch.tensor([4]), NAN)),
            ("all -inf", torch.full_like(LOGITS, -INF)),
            ("one +inf", LOGITS.index_fill(1, torch.tensor([4]), INF)),
        )
        for how in ({}, {"temperature": 0}, KEPT, {"top_p": 0.5})
    ),
    *(
        Wrong(f"sample_tokens: temperature {t}, {how}", draw(temperature=t, **how), most_likely)
        for t in (1e-45, 1e-300)
        for how in ({}, KEPT)
    ),
    Wrong("sample_tokens: top_k above V", draw(top_k=99), of_shapes((3,), (3,))),
    Wrong("sample_tokens: no rows", draw(logits=LOGITS[:0], noise=NOISE[:0]), of_shapes((0,), (0,))),
    *(
        Wrong(
            f"sample_tokens: all on meta, {how}",
            draw(**meta(logits=LOGITS, noise=NOISE), **how),
            of_shapes((3,), (3,), *more),
        )
        for how, more in (({}, ()), ({"temperature": 0}, ()), (KEPT, ((3, 5),)))
    ),
)
