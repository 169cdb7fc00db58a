"""Cases of kernels/attention.py: attention over whole sequences, packed sequences and shared prompts."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import flash_attention
from ...kernels.plain.attention import flash_attention_reference
from ...kernels.records import Rules
from .case import Case, Dims, Tensors, Work, check_most, randn


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    parents: Tensor | None = None,
    return_lse: bool = False,
    **numbers: Any,
) -> Any:
    """Compute attention with all scores in the input's dtype and the softmax in fp32, as Hugging Face's models do."""
    rules = Rules(**numbers)
    if cu_seqlens is not None:
        q, k, v = q[None], k[None], v[None]
    T, S, repeats = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    i, j = torch.arange(S - T, S, device=q.device)[:, None], torch.arange(S, device=q.device)[None, :]
    visible = torch.ones(T, S, dtype=torch.bool, device=q.device)
    if cu_seqlens is not None:
        visible, start = _related(cu_seqlens, parents, T)
        i = i - start[:, None]
        j = j - start[None, :]
    visible = visible & (j <= i) if rules.causal else visible
    visible = visible & (j > i - rules.window) if rules.window is not None else visible

    q, k, v = (
        x.transpose(1, 2) for x in (q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2))
    )
    s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if rules.scale is None else rules.scale)
    s = rules.softcap * torch.tanh(s / rules.softcap) if rules.softcap is not None else s  # (B, H, T, S)
    blind = ~visible.any(-1, keepdim=True)  # (T, 1)
    s = s.masked_fill(~visible, -torch.inf).masked_fill(blind & (sinks is None), 0)
    if sinks is not None:
        s = torch.cat((s, sinks[None, :, None, None].to(s.dtype).expand(*s.shape[:-1], 1)), -1)
    p = torch.softmax(s, -1, dtype=torch.promote_types(s.dtype, torch.float32)).to(q.dtype)
    out = (p[..., :S] @ v).masked_fill(blind, 0).transpose(1, 2)
    if not return_lse:
        return out[0] if cu_seqlens is not None else out

    lse = torch.logsumexp(s.to(torch.promote_types(s.dtype, torch.float32)), -1)
    lse = (lse.masked_fill(blind[:, 0], -torch.inf) if sinks is None else lse).transpose(1, 2)
    return (out[0], lse[0]) if cu_seqlens is not None else (out, lse)


def _related(cu_seqlens: Tensor, parents: Tensor | None, total: int) -> tuple[Tensor, Tensor]:
    """Return two tensors for packed rows: related (total, total) bool, and start (total,).

    related is True if the key's row is in the segment of the query's row, or in the parent of that segment. The
    position of a row is its number minus start.
    """
    lengths = cu_seqlens.diff()
    place = torch.arange(len(lengths), device=cu_seqlens.device)
    segment = torch.repeat_interleave(place, lengths, output_size=total)
    start = cu_seqlens[segment]
    related = segment[:, None] == segment[None, :]
    if parents is not None:
        parent = parents[segment].long()
        related = related | (parent[:, None] == segment[None, :])
        start = start - torch.where(parent >= 0, lengths[parent], 0)
    return related, start


def _inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    T, S, D = dims["T"], dims.get("S", dims["T"]), dims["D"]
    lead = (dims["B"],) if "B" in dims else ()
    q, k, v = (
        randn((*lead, length, heads, D), dtype, device)
        for length, heads in ((T, dims["H"]), (S, dims["G"]), (S, dims["G"]))
    )
    return {"q": q, "k": k, "v": v}


def _sinks_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    return _inputs(dims, dtype, device) | {"sinks": randn((dims["H"],), dtype, device)}


def _packed_ends(T: int) -> list[int]:
    """Return the boundaries of four segments. One of the segments is empty."""
    return [0, T // 5, T // 5, T // 2, T]


def _packed_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    ends = torch.tensor(_packed_ends(dims["T"]), dtype=torch.int32, device=device)
    return _inputs(dims, dtype, device) | {"cu_seqlens": ends}


def _shared_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """Return inputs with one prompt of P tokens and completions of R tokens that continue it.

    Tokens that are left over form a separate segment.
    """
    check_most(dims, "P", "T")
    T, P, R = dims["T"], dims["P"], dims["R"]
    children, left = divmod(T - P, R)
    starts = torch.arange(P, T + 1, R, device=device)
    cu_seqlens = F.pad(starts, (1, 0))
    parents = F.pad(torch.zeros(children, device=device), (1, 0), value=-1)
    if left:
        cu_seqlens, parents = F.pad(cu_seqlens, (0, 1), value=T), F.pad(parents, (0, 1), value=-1)
    return _inputs(dims, dtype, device) | {"cu_seqlens": cu_seqlens.int(), "parents": parents.int()}


def _shared_sinks_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    return _shared_inputs(dims, dtype, device) | {"sinks": randn((dims["H"],), dtype, device)}


def _pairs(dims: Dims) -> int:
    """Return the number of visible (query, key) pairs over the batch, for causal attention with S >= T."""
    if "B" not in dims and "P" not in dims:
        return sum(n * (n + 1) // 2 for n in (b - a for a, b in pairwise(_packed_ends(dims["T"]))))
    if "P" not in dims:
        T, S = dims["T"], dims.get("S", dims["T"])
        return dims.get("B", 1) * (T * (T + 1) // 2 + T * (S - T))
    P, R = dims["P"], dims["R"]
    children, last = divmod(dims["T"] - P, R)
    return P * (P + 1) // 2 + children * (R * (R + 1) // 2 + R * P) + last * (last + 1) // 2


def _work(dims: Dims, size: int) -> tuple[Work, Work]:
    rows, keys = (dims.get("B", 1) * n for n in (dims["T"], dims.get("S", dims["T"])))
    products, D = dims["H"] * _pairs(dims), dims["D"]
    moved = 2 * (rows * dims["H"] + keys * dims["G"]) * D * size  # q and out, k and v
    return Work(4 * products * D, moved), Work(10 * products * D, 2 * moved)


MOST_SCORES = 2**26  # 512 MB in fp64


def _fewer_heads(dims: Dims) -> Dims:
    """Return a smaller shape, if needed, at which the accuracy of a benchmark shape is checked.

    The reference holds the scores of all heads in memory. If a shape has more than MOST_SCORES scores, only one
    sequence and one group of query heads are checked, or two heads if H = G.
    """
    if dims.get("B", 1) * dims["H"] * dims["T"] * dims.get("S", dims["T"]) <= MOST_SCORES:
        return dims
    return (
        dims
        | {
            "H": 2 if dims["H"] == dims["G"] else dims["H"] // dims["G"],
            "G": 2 if dims["H"] == dims["G"] else 1,
        }
        | ({"B": 1} if "B" in dims else {})
    )


_SHAPES = (
    {"B": 1, "T": 1, "S": 1, "H": 1, "G": 1, "D": 1},
    {"B": 2, "T": 33, "S": 33, "H": 2, "G": 1, "D": 17},
    {"B": 1, "T": 7, "S": 37, "H": 2, "G": 2, "D": 16},
    {"B": 1, "T": 43, "S": 13, "H": 4, "G": 2, "D": 16},  # thirty rows see no key
)
_PACKED = {"T": 41, "H": 2, "G": 1, "D": 16}
_SHARED = {"T": 45, "P": 13, "R": 9, "H": 2, "G": 1, "D": 16}
_BENCH = {
    "cuda": tuple({"B": 16384 // t, "T": t, "H": 16, "G": 16, "D": 128} for t in (4096, 1024, 16384)),
    "cpu": ({"B": 2, "T": 256, "H": 8, "G": 2, "D": 64},),
}
_TILES = tuple({"B": 1, "T": 256, "H": 2, "G": 1, "D": d} for d in (128, 64, 256, 80, 100))
_PACKED_TILES, _SHARED_TILES = (  # a shared prompt's keys may be split by query head
    tuple({"T": 256, **prompt, "H": 2, "G": 1, "D": d} for d in (128, 64, 256))
    for prompt in ({}, {"P": 64, "R": 64})
)

_CASE = Case(
    op="flash_attention",
    family="causal",
    inputs=_inputs,
    fused=flash_attention,
    reference=flash_attention_reference,
    eager=_eager,
    work=_work,
    formula="4D operations for each visible pair and head; 10D",
    shapes=_SHAPES,
    empty=({"B": 0, "T": 3, "H": 2, "G": 1, "D": 8}, {"B": 1, "T": 0, "H": 2, "G": 1, "D": 8}),
    # k is not scaled: q and k at 30 make scores of thousands, where fp32 rounding dominates exp(s - lse)
    activations=("q", "v"),
    half_scales=(1e-3,),
    check=_fewer_heads,
    optional={"S": "T"},
)

CASES = (
    replace(_CASE, bench=_BENCH, configurations=_TILES),
    replace(_CASE, family="full", shapes=_SHAPES[:3], options={"causal": False, "return_lse": True}),
    replace(
        _CASE,
        family="window, softcap, sinks",
        inputs=_sinks_inputs,
        shapes=_SHAPES,
        options={"window": 9, "softcap": 5.0, "return_lse": True},
        configurations=_TILES,
    ),
    replace(
        _CASE,
        family="packed",
        inputs=_packed_inputs,
        reads_values=True,
        shapes=(_PACKED,),
        optional={},
        empty=(),
        bench={"cuda": ({"T": 8192, "H": 16, "G": 16, "D": 128},)},
        configurations=_PACKED_TILES,
    ),
    replace(
        _CASE,
        family="shared prompt",
        inputs=_shared_inputs,
        reads_values=True,
        shapes=(_SHARED,),
        optional={},
        empty=(),
        bench={"cuda": ({"T": 10240, "P": 2048, "R": 512, "H": 16, "G": 4, "D": 128},)},
        configurations=_SHARED_TILES,
    ),
    replace(
        _CASE,
        family="shared prompt, window, softcap, sinks",
        inputs=_shared_sinks_inputs,
        reads_values=True,
        shapes=(
            {"T": 45, "P": 37, "R": 4, "H": 1, "G": 1, "D": 16},
        ),  # the prompt's first keys are in no completion's window
        optional={},
        empty=(),
        options={"window": 5, "softcap": 5.0, "return_lse": True},
        half_scales=(),
        configurations=_SHARED_TILES,
    ),
)
