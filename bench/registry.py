"""One Case per op and shape family: all that the tests, the static proof and the benchmark know about an op.

The accuracy rule, for every output and every gradient:

    max|fused - truth| <= 2 max|eager - truth| + 1e-5 (1 + max|truth|)

truth is the reference in fp32 (fp64 for fp32 inputs); eager is the composition as torch users write it, in the input's
dtype. An op is held to what its users would otherwise have had; NaN never passes.

Adding an op is one kernel file and its Cases here.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import NF4Weight, attention, decode, divergence, glu, logprob, lora, moe, nf4, norm, rope, topk

Dims = dict[str, int]  # a shape by the house's letters: {"B": 2, "T": 5, "C": 100}
Tensors = dict[str, Tensor | None]  # by the name of the op's argument


class Work(NamedTuple):
    """The least that one pass must do: arithmetic operations, and bytes when each operand is read or written once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Case:
    op: str
    family: str
    inputs: Callable[[Dims, torch.dtype, str], Tensors]
    fused: Callable[..., Any]
    reference: Callable[..., Any]
    eager: Callable[..., Any]
    work: Callable[[Dims, int], tuple[Work, Work]]  # (dims, bytes per element) -> forward, backward
    formula: str  # the traffic in work, in words: elements forward; elements backward
    shapes: tuple[Dims, ...]  # tests: one, odd, prime, just over a tile
    empty: tuple[Dims, ...]
    bench: dict[str, tuple[Dims, ...]]  # by device, "cuda" or "cpu"; the one to know first
    configurations: tuple[
        Dims, ...
    ]  # one for each row of the kernel's tile table: what the static proof compiles
    activations: tuple[str, ...]  # what is scaled by 30; the other tensors are parameters
    options: dict[str, Any] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()  # float tensors that have no gradient
    half_scales: tuple[float, ...] = (1e-3, 30)  # those at which the eager composition is finite in fp16
    reads_values: bool = False  # the CPU path looks into integer tensors, which those on meta do not have
    check: Callable[[Dims], Dims] = dict  # the shape at which a benchmark shape is checked before it is timed

    @property
    def name(self) -> str:
        return f"{self.op}/{self.family}"


def label(dims: Dims) -> str:
    return " ".join(f"{letter}={size}" for letter, size in dims.items())


# ---- running a case


def make_inputs(case: Case, dims: Dims, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensors:
    """Scale 30 is for activations only; 1e-3 is for every tensor that is learned or computed."""
    tensors = case.inputs(dims, dtype, device)
    for name, t in tensors.items():
        if t is not None and t.is_floating_point() and (name in case.activations or name not in case.fixed):
            tensors[name] = t * scale if scale < 1 or name in case.activations else t
    return tensors


def leaves(case: Case, tensors: Tensors) -> list[str]:
    """The names of the tensors that have a gradient."""
    return [n for n, t in tensors.items() if t is not None and t.is_floating_point() and n not in case.fixed]


def run(
    op: Callable[..., Any], case: Case, tensors: Tensors, upstream: list[Tensor] | None = None
) -> dict[str, Tensor]:
    """Outputs by number and, given their upstream gradients, the gradient of every leaf by name."""
    names = leaves(case, tensors)
    if upstream is None or not names:
        with torch.no_grad():
            outputs = op(**tensors, **case.options)
        return {f"output {i}": t for i, t in enumerate(_tuple(outputs))}
    wanted = {n: _tensor(tensors, n).detach().requires_grad_() for n in names}
    outputs = _tuple(op(**{**tensors, **wanted}, **case.options))
    upstream = [g.to(t.dtype) for g, t in zip(upstream, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, list(wanted.values()), upstream)
    return {f"output {i}": t.detach() for i, t in enumerate(outputs)} | {
        f"gradient of {n}": g for n, g in zip(names, grads, strict=True)
    }


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _tensor(tensors: Tensors, name: str) -> Tensor:
    t = tensors[name]
    assert t is not None
    return t


def widen(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {n: t.to(dtype) if t is not None and t.is_floating_point() else t for n, t in tensors.items()}


def make_upstream(case: Case, tensors: Tensors) -> list[Tensor]:
    """Random upstream gradients, in the shapes and dtypes that the reference says the op returns."""
    return [
        torch.randn(t.shape, dtype=t.dtype, device=t.device)
        for t in run(case.reference, case, tensors).values()
    ]


def assert_accurate(
    case: Case,
    tensors: Tensors,
    upstream: list[Tensor] | None = None,
    under: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Hold case.fused to the accuracy rule on these tensors. `under` is a context for both, such as autocast."""
    floats = [t.dtype for t in tensors.values() if t is not None and t.is_floating_point()]
    wide = torch.float64 if torch.float32 in floats else torch.float32
    upstream = upstream or make_upstream(case, tensors)
    with under():
        fused = run(case.fused, case, tensors, upstream)
        eager = run(case.eager, case, tensors, upstream)
    truth = run(case.reference, case, widen(tensors, wide), upstream)
    dtypes = [g.dtype for g in upstream] + [_tensor(tensors, n).dtype for n in leaves(case, tensors)]
    assert fused.keys() == truth.keys(), f"{case.name}: expected {list(truth)}, got {list(fused)}"
    for (name, t), dtype in zip(truth.items(), dtypes, strict=True):
        f, e = fused[name], eager[name].to(dtype)
        assert f.shape == t.shape, (
            f"{case.name}: {name}: expected shape {tuple(t.shape)}, got {tuple(f.shape)}"
        )
        assert f.dtype == dtype, f"{case.name}: {name}: expected {dtype}, got {f.dtype}"
        finite = t.isfinite()  # a log-sum-exp over nothing is -inf
        assert torch.equal(f[~finite].to(wide), t[~finite]), (
            f"{case.name}: {name}: differs where the truth is infinite"
        )
        if finite.any():
            t, f, e = t[finite], f[finite].to(wide), e[finite].to(wide)
            allowed = 2 * (e - t).abs().max() + 1e-5 * (1 + t.abs().max())
            error = (f - t).abs().max()
            assert error <= allowed, f"{case.name}: {name}: error {error:.2e}, allowed {allowed:.2e}"


# ---- norm


def _rms_norm_eager(x: Tensor, weight: Tensor, eps: float = 1e-6, *, unit_offset: bool = False) -> Tensor:
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y * (1 + weight if unit_offset else weight)


def _add_rms_norm_eager(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, unit_offset: bool = False
):
    total = x + residual
    return _rms_norm_eager(total, weight, eps, unit_offset=unit_offset), total


def _norm_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    shape = tuple(dims.values())  # the last letter is the normalised dimension
    return {"x": _randn(shape, dtype, device), "weight": _randn(shape[-1:], dtype, device)}


def _add_norm_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    shape = tuple(dims.values())
    residual = _randn(shape, dtype, device)
    return {
        "x": _randn(shape, dtype, device),
        "residual": residual,
        "weight": _randn(shape[-1:], dtype, device),
    }


def _norm_work(dims: Dims, size: int) -> tuple[Work, Work]:
    *lead, n = dims.values()
    rn = _product(lead) * n
    return Work(5 * rn, (2 * rn + n) * size), Work(10 * rn, (3 * rn + 2 * n) * size)


def _add_norm_work(dims: Dims, size: int) -> tuple[Work, Work]:
    *lead, n = dims.values()
    rn = _product(lead) * n
    return Work(6 * rn, (4 * rn + n) * size), Work(11 * rn, (4 * rn + 2 * n) * size)


_NORM_SHAPES = (
    {"B": 1, "T": 1, "C": 1},
    {"B": 2, "T": 5, "C": 100},
    {"B": 1, "T": 37, "C": 33},  # more rows than one tile holds
    {"B": 1, "T": 11, "C": 1031},  # more tiles than programs
    {"B": 1, "T": 2, "C": 16411},  # wider than one program holds
)
_HEAD_SHAPES = ({"B": 1, "T": 1, "H": 1, "D": 3}, {"B": 2, "T": 5, "H": 3, "D": 65})
_NORM_EMPTY = ({"B": 0, "T": 5, "C": 8}, {"B": 2, "T": 0, "C": 8})
_WIDTHS = tuple(  # 256 rows make dw by columns, 600 by walking over rows
    {"B": 1, "T": t, "C": c} for c in (4096, 128, 16384, 1024, 8192, 2048, 5120, 32768) for t in (600, 256)
)[:-1]
_NORM_BENCH = {
    "cuda": tuple(
        {"B": 1, "T": t, "C": c}
        for t, c in [(8192, 4096), (2048, 16384), (65536, 1024), (2048, 4096), (32768, 4096)]
    ),
    "cpu": ({"B": 1, "T": 512, "C": 1024}, {"B": 1, "T": 2048, "C": 2048}),
}
_ADD_NORM_BENCH = {"cuda": _NORM_BENCH["cuda"][:2], "cpu": _NORM_BENCH["cpu"][:1]}
_HEAD_BENCH = {
    "cuda": ({"B": 1, "T": 8192, "H": 32, "D": 128},),
    "cpu": ({"B": 1, "T": 512, "H": 8, "D": 64},),
}


# ---- rope


def _apply_rope_eager(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    rows = torch.arange(q.shape[-3], device=q.device) if positions is None else positions
    c, s = (t[rows].unsqueeze(-2).to(q.dtype) for t in (cos, sin))  # (..., T, 1, rotary/2)

    def rotate(x: Tensor) -> Tensor:
        turned, rest = x[..., : 2 * c.shape[-1]], x[..., 2 * c.shape[-1] :]
        if interleaved:
            a, b = turned[..., ::2], turned[..., 1::2]
            turned = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
        else:
            a, b = turned.chunk(2, -1)
            turned = turned * torch.cat((c, c), -1) + torch.cat((-b, a), -1) * torch.cat((s, s), -1)
        return torch.cat((turned, rest), -1) if rest.shape[-1] else turned

    return rotate(q), rotate(k)


def _rope_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    t, rotary = dims["T"], dims.get("rotary", dims["D"])
    lead = (dims["B"], t) if "B" in dims else (t,)  # without a batch: packed rows, each with its own position
    places = 2 * t + 1 if "B" not in dims else t
    angle = torch.arange(places, device=device)[:, None] / 100.0 ** torch.linspace(
        0, 1, rotary // 2, device=device
    )
    return {
        "q": _randn((*lead, dims["H"], dims["D"]), dtype, device),
        "k": _randn((*lead, dims["G"], dims["D"]), dtype, device),
        "cos": angle.cos(),
        "sin": angle.sin(),
        "positions": None if "B" in dims else torch.arange(t, device=device).flip(0) * 2,
    }


def _rope_work(dims: Dims, size: int) -> tuple[Work, Work]:
    tokens, rotary = dims.get("B", 1) * dims["T"], dims.get("rotary", dims["D"])
    heads = tokens * (dims["H"] + dims["G"])
    one = Work(3 * heads * rotary, 2 * heads * dims["D"] * size + dims["T"] * rotary * 4)
    return one, one


_ROPE_SHAPES = (
    {"B": 1, "T": 1, "H": 1, "G": 1, "D": 2},
    {"B": 2, "T": 7, "H": 3, "G": 1, "D": 34},
    {"B": 1, "T": 17, "H": 4, "G": 2, "D": 64},
)
_ROPE_EMPTY = ({"B": 2, "T": 0, "H": 2, "G": 1, "D": 8},)
_ROPE_BENCH = {
    "cuda": tuple({"B": 1, "T": t, "H": 32, "G": 8, "D": 128} for t in (8192, 1024, 32768)),
    "cpu": ({"B": 1, "T": 512, "H": 8, "G": 2, "D": 64},),
}
_ROPE_TILES = tuple({"B": 1, "T": 256, "H": 8, "G": 2, "D": d} for d in (128, 64, 256, 80))


# ---- glu


def _swiglu_eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _geglu_eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _clamped_swiglu_eager(gate: Tensor, up: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(alpha * gate))


def _glu_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    shape = tuple(dims.values())
    return {"gate": _randn(shape, dtype, device), "up": _randn(shape, dtype, device)}


def _glu_work(dims: Dims, size: int) -> tuple[Work, Work]:
    n = _product(dims.values())
    return Work(6 * n, 3 * n * size), Work(15 * n, 5 * n * size)


_GLU_SHAPES = (
    {"B": 1, "T": 1, "F": 1},
    {"B": 2, "T": 5, "F": 101},
    {"B": 1, "T": 3, "F": 1031},
    {"B": 2, "T": 2, "F": 1024},
)
_GLU_EMPTY = ({"B": 0, "T": 5, "F": 8}, {"B": 2, "T": 5, "F": 0})
_GLU_BENCH = {
    "cuda": tuple({"B": 1, "T": t, "F": 14336} for t in (2048, 512, 8192)),
    "cpu": ({"B": 1, "T": 512, "F": 2048},),
}


# ---- attention


def _attention_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    parents: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """The score matrix in the input's dtype, its softmax in fp32, as the model files of Hugging Face have it."""
    if cu_seqlens is not None:
        q, k, v = q[None], k[None], v[None]
    T, S, repeats = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    i, j = torch.arange(S - T, S, device=q.device)[:, None], torch.arange(S, device=q.device)[None, :]
    related = torch.ones(T, S, dtype=torch.bool, device=q.device)
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff()
        segment = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), lengths, output_size=T)
        start = cu_seqlens[segment]
        related = segment[:, None] == segment[None, :]
        if parents is not None:
            parent = parents[segment].long()
            related = related | (parent[:, None] == segment[None, :])
            start = start - torch.where(parent >= 0, lengths[parent], 0)
        i = i - start[:, None]
        j = j - start[None, :]
    related = related & (j <= i) if causal else related
    related = related & (j > i - window) if window is not None else related
    q, k, v = (
        x.transpose(1, 2) for x in (q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2))
    )
    s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)  # (B, H, T, S)
    s = softcap * torch.tanh(s / softcap) if softcap is not None else s
    blind = ~related.any(-1, keepdim=True)  # (T, 1)
    s = s.masked_fill(~related, -torch.inf).masked_fill(blind & (sinks is None), 0)
    if sinks is not None:
        s = torch.cat((s, sinks[None, :, None, None].to(s.dtype).expand(*s.shape[:-1], 1)), -1)
    p = torch.softmax(s, -1, dtype=torch.promote_types(s.dtype, torch.float32)).to(q.dtype)
    out = (p[..., :S] @ v).masked_fill(blind, 0).transpose(1, 2)
    if not return_lse:
        return out[0] if cu_seqlens is not None else out
    lse = torch.logsumexp(s.to(torch.promote_types(s.dtype, torch.float32)), -1)
    lse = (lse.masked_fill(blind[:, 0], -torch.inf) if sinks is None else lse).transpose(1, 2)
    return (out[0], lse[0]) if cu_seqlens is not None else (out, lse)


def _attention_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    T, S, D = dims["T"], dims.get("S", dims["T"]), dims["D"]
    lead = (dims["B"],) if "B" in dims else ()
    q, k, v = (
        _randn((*lead, length, heads, D), dtype, device)
        for length, heads in ((T, dims["H"]), (S, dims["G"]), (S, dims["G"]))
    )
    return {"q": q, "k": k, "v": v}


def _sinks_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    return _attention_inputs(dims, dtype, device) | {"sinks": _randn((dims["H"],), dtype, device)}


def _packed_ends(T: int) -> list[int]:
    """Four segments, one of them empty."""
    return [0, T // 5, T // 5, T // 2, T]


def _packed_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    ends = torch.tensor(_packed_ends(dims["T"]), dtype=torch.int32, device=device)
    return _attention_inputs(dims, dtype, device) | {"cu_seqlens": ends}


def _shared_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """A prompt of P tokens and completions of R that continue it; tokens left over are a segment of their own."""
    T, P, R = dims["T"], dims["P"], dims["R"]
    ends = [0, *range(P, T + 1, R)]
    parents = [-1] + [0] * (len(ends) - 2)
    if ends[-1] < T:
        ends, parents = [*ends, T], [*parents, -1]
    cu_seqlens, whose = (torch.tensor(x, dtype=torch.int32, device=device) for x in (ends, parents))
    return _attention_inputs(dims, dtype, device) | {"cu_seqlens": cu_seqlens, "parents": whose}


def _shared_sinks_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    return _shared_inputs(dims, dtype, device) | {"sinks": _randn((dims["H"],), dtype, device)}


def _pairs(dims: Dims) -> int:
    """(query, key) pairs in sight, over the batch: causal, S >= T."""
    if "B" not in dims and "P" not in dims:
        return sum(n * (n + 1) // 2 for n in (b - a for a, b in pairwise(_packed_ends(dims["T"]))))
    if "P" not in dims:
        T, S = dims["T"], dims.get("S", dims["T"])
        return dims.get("B", 1) * (T * (T + 1) // 2 + T * (S - T))
    P, R = dims["P"], dims["R"]
    children, last = divmod(dims["T"] - P, R)
    return P * (P + 1) // 2 + children * (R * (R + 1) // 2 + R * P) + last * (last + 1) // 2


def _attention_work(dims: Dims, size: int) -> tuple[Work, Work]:
    rows, keys = (dims.get("B", 1) * n for n in (dims["T"], dims.get("S", dims["T"])))
    products, D = dims["H"] * _pairs(dims), dims["D"]
    moved = 2 * (rows * dims["H"] + keys * dims["G"]) * D * size  # q and out, k and v
    return Work(4 * products * D, moved), Work(10 * products * D, 2 * moved)


def _fewer_heads(dims: Dims) -> Dims:
    """The reference holds the scores of every head: two heads of one sequence stand for all of them."""
    return (
        dims
        | {
            "H": 2 if dims["H"] == dims["G"] else dims["H"] // dims["G"],
            "G": 2 if dims["H"] == dims["G"] else 1,
        }
        | ({"B": 1} if "B" in dims else {})
    )


def _decode_eager(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    length: Tensor,
    *,
    prefix_slot: Tensor | None = None,
    prefix_length: Tensor | None = None,
) -> Tensor:
    """Gathered caches, masked by length."""
    repeats = q.shape[1] // k_cache.shape[2]
    keys, values = k_cache[slot], v_cache[slot]  # (B, S, G, D)
    place = torch.arange(k_cache.shape[1], device=q.device)
    seen = place < length[:, None]  # (B, S)
    if prefix_slot is not None and prefix_length is not None:
        keys = torch.cat((k_cache[prefix_slot], keys), 1)
        values = torch.cat((v_cache[prefix_slot], values), 1)
        seen = torch.cat((place < prefix_length[:, None], seen), 1)
    keys, values = keys.repeat_interleave(repeats, 2), values.repeat_interleave(repeats, 2)  # (B, S, H, D)
    s = (q[:, None] * keys).sum(-1) * q.shape[-1] ** -0.5  # (B, S, H)
    s = s.masked_fill(~seen[..., None], -torch.inf)
    p = torch.softmax(s, 1, dtype=torch.promote_types(s.dtype, torch.float32)).to(q.dtype)
    return (p[..., None] * values).sum(1)


def _decode_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """Slots in reverse, one of them free; lengths a little below S."""
    B, S, D = dims["B"], dims["S"], dims["D"]
    k, v = (_randn((B + 1, S, dims["G"], D), dtype, device) for _ in range(2))
    rows = torch.arange(B, device=device)
    return {
        "q": _randn((B, dims["H"], D), dtype, device),
        "k_cache": k,
        "v_cache": v,
        "slot": B - rows,
        "length": S - rows % 3 * (S // 32),
    }


def _decode_prefix_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """One cached prompt, in the free slot, before every sequence but the first."""
    tensors = _decode_inputs(dims, dtype, device)
    rows = torch.arange(dims["B"], device=device)
    return tensors | {"prefix_slot": 0 * rows, "prefix_length": (rows > 0) * (dims["S"] - 1)}


def _decode_work(dims: Dims, size: int) -> tuple[Work, Work]:
    B, D = dims["B"], dims["D"]
    moved = 2 * B * (dims["S"] * dims["G"] + dims["H"]) * D * size
    return Work(4 * B * dims["S"] * dims["H"] * D, moved), Work(0, 0)


_ATTENTION_SHAPES = (
    {"B": 1, "T": 1, "S": 1, "H": 1, "G": 1, "D": 1},
    {"B": 2, "T": 33, "S": 33, "H": 2, "G": 1, "D": 17},
    {"B": 1, "T": 7, "S": 37, "H": 2, "G": 2, "D": 16},
    {"B": 1, "T": 43, "S": 13, "H": 4, "G": 2, "D": 16},  # thirty rows see nothing
)
_ATTENTION_BENCH = {
    "cuda": tuple({"B": 16384 // t, "T": t, "H": 16, "G": 16, "D": 128} for t in (4096, 1024, 16384)),
    "cpu": ({"B": 2, "T": 256, "H": 8, "G": 2, "D": 64},),
}
_ATTENTION_TILES = tuple({"B": 1, "T": 256, "H": 2, "G": 1, "D": d} for d in (128, 64, 256, 80))
_PACKED_TILES, _SHARED_TILES = (  # a shared prompt's keys are a program for each query head
    tuple({"T": 256, **prompt, "H": 2, "G": 1, "D": d} for d in (128, 64, 256))
    for prompt in ({}, {"P": 64, "R": 64})
)
_DECODE_TILES = tuple({"B": 2, "S": 256, "H": 4, "G": 2, "D": d} for d in (128, 64, 256))


# ---- logprob


def _token_logprobs_eager(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    support: Tensor | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in the input's dtype, then fp32, as the trainers have it."""
    logits = _in_fp32(_linear(hidden, weight, bias, lora_a, lora_b, scaling), temperature, softcap)
    if support is not None:
        kept = torch.zeros(logits.shape[0], logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
        kept = kept.scatter(1, torch.where(support < 0, logits.shape[1], support).long(), True)[:, :-1]
        logits = logits.masked_fill(~kept, -torch.inf)
    trained = targets != ignore_index
    log_p = torch.log_softmax(logits, -1)
    logprob = log_p.gather(1, targets.masked_fill(~trained, 0).long()[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)  # 0 log 0 = 0
    return tuple(torch.where(trained, t, 0) for t in (logprob, torch.logsumexp(logits, -1), entropy))  # pyright: ignore


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
) -> Tensor:
    out = F.linear(x, weight, bias)
    return out if lora_a is None or lora_b is None else out + scaling * F.linear(F.linear(x, lora_a), lora_b)


def _in_fp32(logits: Tensor, temperature: float | Tensor, softcap: float | None) -> Tensor:
    """Logits in the input's dtype, capped, then scaled in fp32."""
    logits = softcap * torch.tanh(logits / softcap) if softcap is not None else logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)


def _logprob_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """A head of unit-variance logits; every seventh row is ignored."""
    T, C, V = dims["T"], dims["C"], dims["V"]
    weight = torch.randn(V, C, dtype=dtype, device=device) * C**-0.5
    targets = torch.randint(V, (T,), device=device)
    targets[3::7] = -100
    return {"hidden": _randn((T, C), dtype, device), "weight": weight, "targets": targets}


def _logprob_features(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    temperature = torch.linspace(0.5, 2, dims["T"], device=device)
    return _logprob_inputs(dims, dtype, device) | {
        "bias": _randn((dims["V"],), dtype, device),
        "temperature": temperature,
    }


def _logprob_support(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """Rows keep 1 to K ids, their target among them."""
    tensors = _logprob_inputs(dims, dtype, device)
    T, V, K = dims["T"], dims["V"], dims["K"]
    ids = torch.rand(T, V, device=device).argsort(-1)[:, :K].int()
    target = tensors["targets"]
    assert target is not None
    ids = torch.where((ids == target[:, None]) & (torch.arange(K, device=device) > 0), -1, ids)
    ids[:, 0] = target.clamp(min=0)
    ids = torch.where((ids == ids[:, :1]) & (torch.arange(K, device=device) > 0), -1, ids)
    return tensors | {"support": ids}


def _with_adapter(inputs: Callable[[Dims, torch.dtype, str], Tensors]) -> Callable[..., Tensors]:
    def adapted(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
        return inputs(dims, dtype, device) | {
            "lora_a": _randn((dims["R"], dims["C"]), dtype, device) * dims["C"] ** -0.5,
            "lora_b": _randn((dims["V"], dims["R"]), dtype, device),
        }

    return adapted


def _logprob_work(dims: Dims, size: int) -> tuple[Work, Work]:
    T, C, V = dims["T"], dims["C"], dims["V"]
    operands = (T + V) * C * size
    return Work(2 * T * C * V, operands + 20 * T), Work(4 * T * C * V, 2 * operands + 20 * T)


def _first(op: Callable[..., Any]) -> Callable[..., Any]:
    def logprob(*args: Any, **kwargs: Any) -> Tensor:
        return op(*args, **kwargs)[0]

    return logprob


_LOGPROB_SHAPES = ({"T": 1, "C": 1, "V": 2}, {"T": 11, "C": 33, "V": 101}, {"T": 5, "C": 16, "V": 1031})
_LOGPROB_BENCH = {
    "cuda": (
        {"T": 8192, "C": 4096, "V": 151936},
        {"T": 8192, "C": 2048, "V": 128256},
        {"T": 1024, "C": 4096, "V": 151936},
    ),
    "cpu": ({"T": 512, "C": 256, "V": 32768},),
}


# ---- divergence, topk


def _token_divergence_eager(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    beta: float = 0.0,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    teacher_lora_a: Tensor | None = None,
    teacher_lora_b: Tensor | None = None,
    teacher_scaling: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    mask: Tensor | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Both logits, and F.kl_div of their logarithms, as the trainers of GKD have it."""
    logits = _linear(hidden, weight, bias, lora_a, lora_b, scaling)
    log_s = _in_fp32(logits, temperature, softcap).log_softmax(-1)
    with torch.no_grad():
        adapter = teacher_lora_a, teacher_lora_b, teacher_scaling
        teacher_logits = _linear(teacher_hidden, teacher_weight, teacher_bias, *adapter)
        log_t = _in_fp32(teacher_logits, temperature, teacher_softcap).log_softmax(-1)
    return _kl_div(log_t, log_s, beta, mask)


def _kl_div(log_t: Tensor, log_s: Tensor, beta: float, mask: Tensor | None) -> Tensor:
    def kl(log_q: Tensor, log_p: Tensor) -> Tensor:
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

    if 0 < beta < 1:
        weights = torch.tensor([beta, 1 - beta], dtype=log_s.dtype, device=log_s.device).log()
        log_m = torch.logsumexp(torch.stack((log_t + weights[0], log_s + weights[1])), 0)
        divergence = beta * kl(log_m, log_t) + (1 - beta) * kl(log_m, log_s)
    else:
        divergence = kl(log_t, log_s) if beta else kl(log_s, log_t)
    return divergence if mask is None else torch.where(mask, divergence, 0)


def _topk_divergence_eager(
    hidden: Tensor,
    weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    beta: float = 0.0,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Gathered from the whole log_softmax; padding is given probability 0."""
    logits = _linear(hidden, weight, bias, lora_a, lora_b, scaling)
    log_s = _in_fp32(logits, temperature, softcap).log_softmax(-1)
    padding = teacher_ids < 0
    listed = torch.zeros(log_s.shape[0], log_s.shape[1] + 1, dtype=torch.bool, device=log_s.device)
    listed = listed.scatter(1, torch.where(padding, log_s.shape[1], teacher_ids).long(), True)[:, :-1]
    rest = log_s.masked_fill(listed, -1e30).logsumexp(-1, keepdim=True)
    log_s = log_s.gather(1, teacher_ids.clamp(min=0).long()).masked_fill(padding, -1e30)
    log_t = teacher_logprobs.to(log_s.dtype).masked_fill(padding, -1e30)
    tail = (1 - log_t.exp().sum(-1, keepdim=True)).clamp(min=2.0**-24).log()
    log_t = torch.cat((log_t, tail), -1).log_softmax(-1)
    return _kl_div(log_t, torch.cat((log_s, rest), -1), beta, mask)


def _topk_logprobs_eager(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    logits = _linear(hidden, weight, None, lora_a, lora_b, scaling)
    logprobs, ids = _in_fp32(logits, 1.0, None).log_softmax(-1).topk(k, -1)
    return ids, logprobs


def _second(op: Callable[..., Any]) -> Callable[..., Any]:
    """Ids that tie stand in any order: their log-probabilities alone."""

    def logprobs(*args: Any, **kwargs: Any) -> Tensor:
        return op(*args, **kwargs)[1]

    return logprobs


def _head_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    weight = torch.randn(dims["V"], dims["C"], dtype=dtype, device=device) * dims["C"] ** -0.5
    return {"hidden": _randn((dims["T"], dims["C"]), dtype, device), "weight": weight}


def _divergence_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """The teacher's head is of its own width."""
    teacher = _head_inputs(dims | {"C": dims["teacher"]}, dtype, device)
    return _head_inputs(dims, dtype, device) | {f"teacher_{n}": t for n, t in teacher.items()}


def _divergence_features(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    T, V = dims["T"], dims["V"]
    return _divergence_inputs(dims, dtype, device) | {
        "bias": _randn((V,), dtype, device),
        "teacher_bias": _randn((V,), dtype, device),
        "temperature": torch.linspace(0.5, 2, T, device=device),
        "mask": torch.arange(T, device=device) % 7 != 3,
    }


def _divergence_adapters(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """Of both heads, the teacher's of another rank."""
    teacher = _with_adapter(_head_inputs)(dims | {"C": dims["teacher"], "R": dims["R"] + 2}, dtype, device)
    return _with_adapter(_head_inputs)(dims, dtype, device) | {f"teacher_{n}": t for n, t in teacher.items()}


def _topk_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """Every second row lists half of the ids; every seventh does not count."""
    T, V, K = dims["T"], dims["V"], dims["K"]
    logprobs, ids = torch.randn(T, V, device=device).log_softmax(-1).topk(K, -1)
    ids[::2, (K + 1) // 2 :] = -1
    return _head_inputs(dims, dtype, device) | {
        "teacher_ids": ids.int(),
        "teacher_logprobs": logprobs,
        "bias": _randn((V,), dtype, device),
        "temperature": torch.linspace(0.5, 2, T, device=device),
        "mask": torch.arange(T, device=device) % 7 != 3,
    }


def _divergence_work(dims: Dims, size: int) -> tuple[Work, Work]:
    T, C, D, V = dims["T"], dims["C"], dims["teacher"], dims["V"]
    operands = (T + V) * C * size
    return (
        Work(2 * T * (C + D) * V, operands + (T + V) * D * size + 4 * T),
        Work(4 * T * C * V, 2 * operands + 4 * T),
    )


def _topk_work(dims: Dims, size: int) -> tuple[Work, Work]:
    forward, backward = _logprob_work(dims, size)
    stored = 8 * dims["T"] * dims["K"]
    return Work(forward.flops, forward.bytes + stored), Work(backward.flops, backward.bytes + stored)


_DIVERGENCE_SHAPES = (
    {"T": 1, "C": 1, "teacher": 2, "V": 2},
    {"T": 11, "C": 33, "teacher": 17, "V": 101},
    {"T": 5, "C": 16, "teacher": 24, "V": 1031},
)
_DIVERGENCE_BENCH = {
    "cuda": (
        {"T": 8192, "C": 2048, "teacher": 4096, "V": 151936},
        {"T": 1024, "C": 2048, "teacher": 4096, "V": 151936},
    ),
    "cpu": ({"T": 256, "C": 128, "teacher": 256, "V": 32768},),
}


# ---- moe


def _moe_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """The last expert is empty where there are several."""
    T, C, F_, E, K = (dims[letter] for letter in "TCFEK")
    logits = torch.randn(T, E, dtype=torch.promote_types(dtype, torch.float32), device=device)
    logits[:, -1] -= 100.0 * (E > K)
    weights, indices = logits.softmax(-1).topk(K, -1)
    return {
        "x": _randn((T, C), dtype, device),
        "gate_up": _randn((E, 2 * F_, C), dtype, device) / C**0.5,
        "down": _randn((E, C, F_), dtype, device) / F_**0.5,
        "weights": weights,
        "indices": indices,
    }


def _moe_features(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    E, C, F_ = dims["E"], dims["C"], dims["F"]
    biases = {
        "gate_up_bias": _randn((E, 2 * F_), dtype, device),
        "down_bias": _randn((E, C), dtype, device),
    }
    return _moe_inputs(dims, dtype, device) | biases


def _moe_relu2(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    tensors = _moe_inputs(dims, dtype, device)
    gate_up = _tensor(tensors, "gate_up")
    return tensors | {"gate_up": gate_up[:, : dims["F"]].contiguous()}


def _moe_adapters(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    C, F_, E, R = (dims[letter] for letter in "CFER")
    return _moe_inputs(dims, dtype, device) | {
        "gate_up_a": _randn((E, R, C), dtype, device) * C**-0.5,
        "gate_up_b": _randn((E, 2 * F_, R), dtype, device) * R**-0.5,
        "down_a": _randn((E, R, F_), dtype, device) * F_**-0.5,
        "down_b": _randn((E, C, R), dtype, device) * R**-0.5,
    }


def _moe_4bit_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """Experts of C F weights, a multiple of 64; their tensors as gate_up_packed and so on."""
    tensors = _moe_adapters(dims, dtype, device)
    for name in ("gate_up", "down"):
        weight = nf4.quantize_nf4_reference(_tensor(tensors, name))
        del tensors[name]
        parts = zip(_FOUR_BIT, weight.tensors(), strict=True)
        tensors |= {f"{name}_{part}": tensor for part, tensor in parts}
    return tensors


def _moe_4bit(op: Callable[..., Any]) -> Callable[..., Any]:
    """An op on experts, for a case that has their 4-bit tensors."""

    def mlp(x: Tensor, **tensors: Any) -> Tensor:
        E, C, F_ = tensors["gate_up_a"].shape[0], x.shape[1], tensors["down_a"].shape[2]
        experts = {}
        for name, shape in (("gate_up", (E, 2 * F_, C)), ("down", (E, C, F_))):
            parts = {part: tensors.pop(f"{name}_{part}") for part in _FOUR_BIT}
            experts[name] = NF4Weight(shape=shape, dtype=x.dtype, **parts)
        return op(x, **experts, **tensors)

    mlp.__module__ = op.__module__
    return mlp


def _eager_moe_4bit(x: Tensor, *, gate_up: NF4Weight, down: NF4Weight, **others: Any) -> Tensor:
    dense = (nf4.dequantize_nf4_reference(weight, _operand_dtype(x)) for weight in (gate_up, down))
    return _moe_eager(x, *dense, **others)


def _moe_eager(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    indices: Tensor,
    *,
    activation: str = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_up_a: Tensor | None = None,
    gate_up_b: Tensor | None = None,
    down_a: Tensor | None = None,
    down_b: Tensor | None = None,
) -> Tensor:
    """The loop over experts that model code has."""
    out = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        token, choice = torch.where(indices == e)
        h = F.linear(x[token], gate_up[e], None if gate_up_bias is None else gate_up_bias[e])
        if gate_up_a is not None and gate_up_b is not None:
            h = h + F.linear(F.linear(x[token], gate_up_a[e]), gate_up_b[e])
        if activation == "relu2":
            a = h.relu().square()
        elif activation == "swiglu":
            a = _swiglu_eager(*h.chunk(2, -1))
        else:
            gate, up = h.chunk(2, -1)
            a = _clamped_swiglu_eager(gate, up)
        y = F.linear(a, down[e], None if down_bias is None else down_bias[e])
        if down_a is not None and down_b is not None:
            y = y + F.linear(F.linear(a, down_a[e]), down_b[e])
        out = out.index_add(0, token, (y * weights[token, choice, None].to(y.dtype)).to(out.dtype))
    return out


def _moe_work(dims: Dims, size: int) -> tuple[Work, Work]:
    T, C, F_, E, K = (dims[letter] for letter in "TCFEK")
    experts, choices = 3 * E * F_ * C * size, 12 * T * K  # a weight in fp32, an index in int64
    return (
        Work(6 * T * K * C * F_, experts + 2 * T * C * size + choices),
        Work(12 * T * K * C * F_, 2 * experts + 3 * T * C * size + choices),
    )


def _moe_adapter_work(dims: Dims, size: int) -> tuple[Work, Work]:
    """The experts frozen: a product fewer in the backward; 8-bit absmax and nibbles are not counted apart."""
    T, C, F_, E, K, R = (dims[letter] for letter in "TCFEKR")
    forward, _ = _moe_work(dims, size)
    low, held = 2 * T * K * R * (2 * C + 3 * F_), E * R * (2 * C + 3 * F_) * size
    return (
        Work(forward.flops + low, forward.bytes + held),
        Work(forward.flops + 2 * low, forward.bytes + T * C * size + 2 * held),
    )


# ---- lora, nf4

_FOUR_BIT = ("packed", "absmax", "code", "nested_absmax", "nested_code", "offset")


def _lora_eager(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    adapter: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """F.linear, then addmm: the leanest that torch users write. The mask is our own hash's."""
    rows = x.flatten(0, -2)
    dropped = lora._drop(rows, dropout, torch.tensor(seed, device=x.device)) if dropout else rows
    a, b = (t if t.dtype == weight.dtype else t.to(weight.dtype) for t in (lora_a, lora_b))
    low_bias = bias if magnitude is None else None
    out = F.linear(rows, weight, low_bias)
    if adapter is None:
        out = torch.addmm(out, F.linear(dropped, a).to(out.dtype), b.T.to(out.dtype), alpha=scaling)
    else:
        for e in range(a.shape[0]):
            mine = (adapter.flatten() == e)[:, None]
            out = out + mine * scaling * F.linear(F.linear(dropped, a[e]), b[e])
    if magnitude is not None:
        norm = (weight + scaling * (b @ a)).detach().norm(dim=1)
        out = out * (magnitude / norm)
        out = out if bias is None else out + bias
    return out.view(*x.shape[:-1], -1).to(x.dtype)


def _held(tensors: Tensors, K: int, dtype: torch.dtype) -> NF4Weight:
    """The NF4Weight (out, K) of a case's flat tensors."""
    four_bit = {n: tensors[n] for n in _FOUR_BIT}
    shape = (2 * _tensor(tensors, "packed").numel() // max(K, 1), K)
    return NF4Weight(shape=shape, dtype=dtype, **four_bit)  # pyright: ignore[reportArgumentType]


def _four_bit(op: Callable[..., Any]) -> Callable[..., Any]:
    """An op that takes (x, weight, ...), for a case that has x and a 4-bit weight's tensors."""

    def linear(x: Tensor, **tensors: Any) -> Tensor:
        others = {n: t for n, t in tensors.items() if n not in _FOUR_BIT}
        return op(x, _held(tensors, x.shape[-1], x.dtype), **others)

    linear.__module__ = op.__module__
    return linear


def _eager_four_bit(op: Callable[..., Any]) -> Callable[..., Any]:
    """The same, the weight multiplied out by torch."""

    def linear(x: Tensor, weight: NF4Weight, **others: Any) -> Tensor:
        dtype = _operand_dtype(x)
        return op(x, nf4.dequantize_nf4_reference(weight, dtype), **others).to(x.dtype)

    return _four_bit(linear)


def _operand_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _multiplied_out(op: Callable[..., Any]) -> Callable[..., Any]:
    def dequantize(like: Tensor, **tensors: Any) -> Tensor:
        return op(_held(tensors, like.shape[-1], like.dtype), like.dtype)

    dequantize.__module__ = op.__module__
    return dequantize


def _absmax(op: Callable[..., Any]) -> Callable[..., Any]:
    """The nibbles are compared in tests/kernels/test_nf4.py: they are no numbers to hold to a rule on errors."""

    def quantize(weight: Tensor) -> Tensor:
        return op(weight, double_quant=False).absmax

    quantize.__module__ = op.__module__
    return quantize


def _by_path(path: str) -> Callable[..., Any]:
    def linear(*args: Any, **options: Any) -> Tensor:
        return lora._lora_linear(*args, **options, path=path)

    linear.__module__ = lora.__name__
    return linear


_BESIDE = ("weight", "lora_a", "lora_b", "bias")  # what each of several linear layers has


def _several(op: Callable[..., Any]) -> Callable[..., Any]:
    """An op on sequences, for a case whose tensors are numbered: weight_0, weight_1, ..."""

    def linears(
        x: Tensor, *, scaling: float, adapter: Tensor | None = None, **tensors: Any
    ) -> tuple[Tensor, ...]:
        each = {n: [t for key, t in tensors.items() if key[: -len("_0")] == n] for n in _BESIDE}
        scalings = [scaling * (i + 1) for i in range(len(each["weight"]))]
        return tuple(
            op(
                x, each["weight"], each["lora_a"], each["lora_b"], scalings,
                biases=each["bias"],
            )
        )  # fmt: skip

    linears.__module__ = op.__module__
    return linears


def _lora_eager_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scalings: Sequence[float],
    *,
    biases: Sequence[Tensor],
) -> list[Tensor]:
    each = zip(weights, lora_a, lora_b, scalings, biases, strict=True)
    return [_lora_eager(x, W, a, b, s, bias=bias) for W, a, b, s, bias in each]


def _lora_several_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """q, k and v: F columns, G and G, with an adapter of rank R, R + 1 and R + 2."""
    T, C, F_, G, R = (dims[letter] for letter in "TCFGR")
    parts = [
        _lora_bias_inputs({"T": T, "C": C, "F": n, "R": R + i}, dtype, device)
        for i, n in enumerate((F_, G, G))
    ]
    numbered = {f"{n}_{i}": t for i, part in enumerate(parts) for n, t in part.items() if n != "x"}
    return {"x": parts[0]["x"]} | numbered


def _lora_several_work(dims: Dims, size: int) -> tuple[Work, Work]:
    """x is read once, dx written once."""
    T, C, F_, G, R = (dims[letter] for letter in "TCFGR")
    works = [_lora_work({"T": T, "C": C, "F": n, "R": R + i}, size) for i, n in enumerate((F_, G, G))]
    forward, backward = (Work(*map(sum, zip(*w, strict=True))) for w in zip(*works, strict=True))
    return (
        Work(forward.flops, forward.bytes - 2 * T * C * size),
        Work(backward.flops, backward.bytes - 4 * T * C * size),
    )


def _lora_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """Weights such that base and adapter are of unit scale. E: that many stacked adapters, -1 among the rows' own."""
    T, C, F_, R, E = dims["T"], dims["C"], dims["F"], dims["R"], dims.get("E", 0)
    stack = (E,) if E else ()
    tensors: Tensors = {
        "x": _randn((T, C), dtype, device),
        "weight": _randn((F_, C), dtype, device) * C**-0.5,
        "lora_a": _randn((*stack, R, C), dtype, device) * C**-0.5,
        "lora_b": _randn((*stack, F_, R), dtype, device) * R**-0.5,
    }
    return tensors | ({"adapter": torch.arange(T, device=device) // 3 % (E + 1) - 1} if E else {})


def _lora_bias_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    return _lora_inputs(dims, dtype, device) | {"bias": _randn((dims["F"],), dtype, device)}


def _dora_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    return _lora_bias_inputs(dims, dtype, device) | {"magnitude": _randn((dims["F"],), dtype, device)}


def _four_bit_tensors(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    weight = torch.randn(dims["F"], dims["C"], device=device) * dims["C"] ** -0.5
    return dict(zip(_FOUR_BIT, nf4.quantize_nf4_reference(weight).tensors(), strict=True))


def _qlora_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    tensors = _lora_inputs(dims, dtype, device)
    del tensors["weight"]
    return tensors | _four_bit_tensors(dims, dtype, device)


def _nf4_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    bias = _randn((dims["F"],), dtype, device)
    return {"x": _randn((dims["T"], dims["C"]), dtype, device), "bias": bias} | _four_bit_tensors(
        dims, dtype, device
    )


def _dequantize_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    like = _randn((1, dims["C"]), dtype, device)
    return {"like": like} | _four_bit_tensors(dims, dtype, device)


def _lora_work(dims: Dims, size: int) -> tuple[Work, Work]:
    T, C, F_, R = dims["T"], dims["C"], dims["F"], dims["R"]
    low, held = T * R * (C + F_), (F_ * C + R * (C + F_)) * size
    forward = Work(2 * T * C * F_ + 2 * low, T * (C + F_) * size + held)
    return forward, Work(2 * T * C * F_ + 4 * low, T * (2 * C + F_) * size + held + R * (C + F_) * size)


def _packed_bytes(dims: Dims) -> int:
    n = dims["C"] * dims["F"]
    return n // 2 + n // 64 + n // 4096


def _nf4_work(dims: Dims, size: int) -> tuple[Work, Work]:
    T, C, F_ = dims["T"], dims["C"], dims["F"]
    one = Work(2 * T * C * F_, T * (C + F_) * size + _packed_bytes(dims))
    return one, one


def _dequantize_work(dims: Dims, size: int) -> tuple[Work, Work]:
    n = dims["C"] * dims["F"]
    return Work(n, _packed_bytes(dims) + n * size), Work(0, 0)


def _quantize_work(dims: Dims, size: int) -> tuple[Work, Work]:
    n = dims["C"] * dims["F"]
    return Work(20 * n, n // 2 + n // 16 + n * size), Work(0, 0)


_LORA_SHAPES = (
    {"T": 1, "C": 1, "F": 1, "R": 1},
    {"T": 37, "C": 67, "F": 41, "R": 3},
    {"T": 5, "C": 32, "F": 130, "R": 16},  # more columns than a tile
)
_LORA_EMPTY = ({"T": 0, "C": 8, "F": 16, "R": 4},)
_LORA_BENCH = {
    "cuda": tuple(
        {"T": t, "C": c, "F": f, "R": r}
        for t, c, f, r in (
            (8192, 4096, 4096, 16), (8192, 4096, 14336, 16), (4096, 4096, 4096, 64), (1024, 4096, 4096, 16),
        )
    ),
    "cpu": ({"T": 256, "C": 576, "F": 1536, "R": 16}, {"T": 256, "C": 576, "F": 576, "R": 16}),
}  # fmt: skip
_LORA_SEVERAL_SHAPES = (
    {"T": 7, "C": 9, "F": 11, "G": 5, "R": 3},
    {"T": 37, "C": 67, "F": 41, "G": 17, "R": 16},
)
_LORA_SEVERAL_EMPTY = ({"T": 0, "C": 8, "F": 16, "G": 4, "R": 4},)
_LORA_SEVERAL_BENCH = {
    "cuda": ({"T": 8192, "C": 4096, "F": 4096, "G": 1024, "R": 16},),
    "cpu": ({"T": 256, "C": 576, "F": 576, "G": 192, "R": 16},),
}
_LORA_TILES = tuple({"T": 256, "C": 256, "F": 256, "R": r} for r in (16, 64, 256))
_NF4_BENCH = {
    "cuda": tuple({"T": t, "C": 4096, "F": 14336} for t in (1, 16, 64, 4096)),
    "cpu": ({"T": 1, "C": 1024, "F": 1024}, {"T": 128, "C": 1024, "F": 1024}),
}
_NF4_SIZES = {
    "cuda": ({"C": 4096, "F": 14336}, {"C": 4096, "F": 4096}),
    "cpu": ({"C": 1024, "F": 1024},),
}


# ---- shared by the families


def _randn(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


def _product(sizes: Any) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _norm_case(family: str, **changes: Any) -> Case:
    return Case(
        **{
            "op": "rms_norm",
            "family": family,
            "inputs": _norm_inputs,
            "fused": norm.rms_norm,
            "reference": norm.rms_norm_reference,
            "eager": _rms_norm_eager,
            "work": _norm_work,
            "formula": "reads x, writes y: 2RN; reads x and dy, writes dx: 3RN",
            "shapes": _NORM_SHAPES,
            "empty": _NORM_EMPTY,
            "bench": _NORM_BENCH,
            "configurations": _WIDTHS,
            "activations": ("x",),
            "half_scales": (30,),
        }
        | changes
    )


_ADD_NORM: dict[str, Any] = {
    "op": "add_rms_norm",
    "inputs": _add_norm_inputs,
    "fused": norm.add_rms_norm,
    "reference": norm.add_rms_norm_reference,
    "eager": _add_rms_norm_eager,
    "work": _add_norm_work,
    "formula": "reads x and the residual, writes y and the sum: 4RN; reads the sum and two gradients, writes one: 4RN",
    "activations": ("x", "residual"),
    "bench": _ADD_NORM_BENCH,
}


def _rope_case(family: str, **changes: Any) -> Case:
    return Case(
        **{
            "op": "apply_rope",
            "family": family,
            "inputs": _rope_inputs,
            "fused": rope.apply_rope,
            "reference": rope.apply_rope_reference,
            "eager": _apply_rope_eager,
            "work": _rope_work,
            "formula": "reads and writes q and k: 2T(H + G)D; the same backward",
            "shapes": _ROPE_SHAPES,
            "empty": _ROPE_EMPTY,
            "bench": {},
            "configurations": (),
            "activations": ("q", "k"),
            "fixed": ("cos", "sin"),
        }
        | changes
    )


def _glu_case(op: str, fused: Any, reference: Any, eager: Any) -> Case:
    return Case(
        op=op,
        family="elementwise",
        inputs=_glu_inputs,
        fused=fused,
        reference=reference,
        eager=eager,
        work=_glu_work,
        formula="reads gate and up, writes y: 3TF; reads both and dy, writes two gradients: 5TF",
        shapes=_GLU_SHAPES,
        empty=_GLU_EMPTY,
        bench=_GLU_BENCH if op == "swiglu" else {device: shapes[:1] for device, shapes in _GLU_BENCH.items()},
        configurations=({"B": 1, "T": 256, "F": 14336},),
        activations=("gate", "up"),
    )


def _attention_case(family: str, **changes: Any) -> Case:
    return Case(
        **{
            "op": "flash_attention",
            "family": family,
            "inputs": _attention_inputs,
            "fused": attention.flash_attention,
            "reference": attention.flash_attention_reference,
            "eager": _attention_eager,
            "work": _attention_work,
            "formula": "4D operations for each pair in sight and head; 10D",
            "shapes": _ATTENTION_SHAPES,
            "empty": ({"B": 0, "T": 3, "H": 2, "G": 1, "D": 8}, {"B": 1, "T": 0, "H": 2, "G": 1, "D": 8}),
            "bench": {},
            "configurations": (),
            # k stays at 1: both at 30 make scores of thousands, whose last bit in fp32 is all that exp(s - lse) sees
            "activations": ("q", "v"),
            "half_scales": (1e-3,),
            "check": _fewer_heads,
        }
        | changes
    )


def _decode_case(family: str, inputs: Any, **changes: Any) -> Case:
    return Case(
        **{
            "op": "decode_attention",
            "family": family,
            "inputs": inputs,
            "fused": decode.decode_attention,
            "reference": decode.decode_attention_reference,
            "eager": _decode_eager,
            "work": _decode_work,
            "formula": "reads the cached keys and values: 2BSGD; no backward",
            "shapes": (
                {"B": 1, "S": 1, "H": 1, "G": 1, "D": 1},
                {"B": 3, "S": 67, "H": 2, "G": 1, "D": 17},
                {"B": 1, "S": 131, "H": 2, "G": 2, "D": 16},
            ),
            "empty": ({"B": 0, "S": 5, "H": 2, "G": 1, "D": 8},),
            "bench": {},
            "configurations": (),
            "activations": ("q", "v_cache"),
            "fixed": ("q", "k_cache", "v_cache"),
            "reads_values": True,
        }
        | changes
    )


_DIVERGENCE_TILES = ({"T": 64, "C": 128, "teacher": 256, "V": 4096},)


def _divergence_case(family: str, **changes: Any) -> Case:
    return Case(
        **{
            "op": "token_divergence",
            "family": family,
            "inputs": _divergence_inputs,
            "fused": divergence.token_divergence,
            "reference": divergence.token_divergence_reference,
            "eager": _token_divergence_eager,
            "work": _divergence_work,
            "formula": "2T(C+D)V operations, D the teacher's width; 4TCV",
            "shapes": _DIVERGENCE_SHAPES,
            "empty": ({"T": 0, "C": 8, "teacher": 4, "V": 16},),
            "bench": {},
            "configurations": (),
            "activations": ("hidden", "teacher_hidden"),
            "fixed": (
                *("teacher_hidden", "teacher_weight", "teacher_bias"),
                *("teacher_lora_a", "teacher_lora_b", "temperature"),
            ),
            "check": lambda dims: dims | {"T": min(dims["T"], 1024)},  # the reference holds all logits
            "half_scales": (1e-3,),
        }
        | changes
    )


def _topk_case(family: str, **changes: Any) -> Case:
    return Case(
        **{
            "op": "topk_divergence",
            "family": family,
            "inputs": _topk_inputs,
            "fused": topk.topk_divergence,
            "reference": topk.topk_divergence_reference,
            "eager": _topk_divergence_eager,
            "work": _topk_work,
            "formula": "2TCV operations; 4TCV",
            "shapes": tuple(dims | {"K": 7} for dims in _LOGPROB_SHAPES[1:]),
            "empty": ({"T": 0, "C": 8, "V": 16, "K": 3},),
            "bench": {},
            "configurations": (),
            "activations": ("hidden",),
            "fixed": ("teacher_logprobs", "temperature"),
            "reads_values": True,
            "half_scales": (1e-3,),
        }
        | changes
    )


def _logprob_case(family: str, **changes: Any) -> Case:
    return Case(
        **{
            "op": "token_logprobs",
            "family": family,
            "inputs": _logprob_inputs,
            "fused": logprob.token_logprobs,
            "reference": logprob.token_logprobs_reference,
            "eager": _token_logprobs_eager,
            "work": _logprob_work,
            "formula": "2TCV operations; 4TCV",
            "shapes": _LOGPROB_SHAPES,
            "empty": ({"T": 0, "C": 8, "V": 16},),
            "bench": {},
            "configurations": (),
            "activations": ("hidden",),
            "fixed": ("temperature",),
            "check": lambda dims: dims | {"T": min(dims["T"], 2048)},  # the reference holds all logits
            "half_scales": (1e-3,),
        }
        | changes
    )


def _moe_case(family: str, **changes: Any) -> Case:
    return Case(
        **{
            "op": "moe_mlp",
            "family": family,
            "inputs": _moe_inputs,
            "fused": moe.moe_mlp,
            "reference": moe.moe_mlp_reference,
            "eager": _moe_eager,
            "work": _moe_work,
            "formula": "6TKCF operations; 12TKCF",
            "shapes": ({"T": 1, "C": 1, "F": 1, "E": 1, "K": 1}, {"T": 19, "C": 20, "F": 35, "E": 3, "K": 2}),
            "empty": ({"T": 0, "C": 8, "F": 8, "E": 3, "K": 2},),
            "bench": {},
            "configurations": (),
            "activations": ("x",),
            "half_scales": (1e-3,),
            "reads_values": True,
            "check": lambda dims: (
                dims | {"T": min(dims["T"], 1024)}
            ),  # the reference runs every expert on every token
        }
        | changes
    )


def _lora_case(family: str, **changes: Any) -> Case:
    return Case(
        **{
            "op": "lora_linear",
            "family": family,
            "inputs": _lora_bias_inputs,
            "fused": lora.lora_linear,
            "reference": lora.lora_linear_reference,
            "eager": _lora_eager,
            "work": _lora_work,
            "formula": "2TCF + 2TR(C + F) operations; 2TCF + 4TR(C + F)",
            "shapes": _LORA_SHAPES[1:2],
            "empty": (),
            "bench": {},
            "configurations": (),
            "activations": ("x",),
            "fixed": ("weight",),
            "options": {"scaling": 0.5},
            "half_scales": (30,),
        }
        | changes
    )


def _nf4_case(op: str, family: str, **changes: Any) -> Case:
    return Case(
        **{
            "op": op,
            "family": family,
            "work": _dequantize_work,
            "shapes": ({"C": 2, "F": 1}, {"C": 66, "F": 33}, {"C": 128, "F": 130}),
            "empty": (),
            "bench": _NF4_SIZES,
            "configurations": ({"C": 256, "F": 256},),
            "activations": (),
        }
        | changes
    )


_PACKED = {"T": 41, "H": 2, "G": 1, "D": 16}
_SHARED = {"T": 45, "P": 13, "R": 9, "H": 2, "G": 1, "D": 16}

CASES: tuple[Case, ...] = (
    _norm_case("hidden"),
    _norm_case("unit offset", options={"unit_offset": True}, bench={}, configurations=()),
    _norm_case("heads", shapes=_HEAD_SHAPES, empty=(), bench=_HEAD_BENCH, configurations=()),
    _norm_case("hidden", **_ADD_NORM),
    _norm_case("unit offset", **_ADD_NORM | {"bench": {}}, options={"unit_offset": True}, configurations=()),
    _rope_case("half", bench=_ROPE_BENCH, configurations=_ROPE_TILES),
    _rope_case("interleaved", options={"interleaved": True}, configurations=_ROPE_TILES[:1]),
    _rope_case("partial", shapes=({"B": 2, "T": 5, "H": 3, "G": 1, "D": 34, "rotary": 10},)),
    _rope_case(
        "packed", shapes=({"T": 19, "H": 3, "G": 1, "D": 16},), empty=({"T": 0, "H": 3, "G": 1, "D": 16},)
    ),
    _glu_case("swiglu", glu.swiglu, glu.swiglu_reference, _swiglu_eager),
    _glu_case("geglu", glu.geglu, glu.geglu_reference, _geglu_eager),
    _glu_case("clamped_swiglu", glu.clamped_swiglu, glu.clamped_swiglu_reference, _clamped_swiglu_eager),
    _attention_case("causal", bench=_ATTENTION_BENCH, configurations=_ATTENTION_TILES),
    _attention_case("full", shapes=_ATTENTION_SHAPES[:3], options={"causal": False, "return_lse": True}),
    _attention_case(
        "window, softcap, sinks",
        inputs=_sinks_inputs,
        shapes=_ATTENTION_SHAPES,
        options={"window": 9, "softcap": 5.0, "return_lse": True},
        configurations=_ATTENTION_TILES,
    ),
    _attention_case(
        "packed",
        inputs=_packed_inputs,
        reads_values=True,
        shapes=(_PACKED,),
        empty=(),
        bench={"cuda": ({"T": 8192, "H": 16, "G": 16, "D": 128},)},
        configurations=_PACKED_TILES,
    ),
    _attention_case(
        "shared prompt",
        inputs=_shared_inputs,
        reads_values=True,
        shapes=(_SHARED,),
        empty=(),
        bench={"cuda": ({"T": 10240, "P": 2048, "R": 512, "H": 16, "G": 4, "D": 128},)},
        configurations=_SHARED_TILES,
    ),
    _attention_case(
        "shared prompt, window, softcap, sinks",
        inputs=_shared_sinks_inputs,
        reads_values=True,
        shapes=(
            {"T": 45, "P": 37, "R": 4, "H": 1, "G": 1, "D": 16},
        ),  # its first keys are in no child's window
        empty=(),
        options={"window": 5, "softcap": 5.0, "return_lse": True},
        half_scales=(),
        configurations=_SHARED_TILES,
    ),
    _decode_case(
        "own cache",
        _decode_inputs,
        bench={
            "cuda": tuple({"B": b, "S": 4096, "H": 32, "G": 8, "D": 128} for b in (64, 1)),
            "cpu": ({"B": 4, "S": 512, "H": 8, "G": 2, "D": 64},),
        },
        configurations=_DECODE_TILES,
    ),
    _decode_case("shared prefix", _decode_prefix_inputs, configurations=_DECODE_TILES),
    _logprob_case("dense", bench=_LOGPROB_BENCH, configurations=({"T": 64, "C": 128, "V": 4096},)),
    _logprob_case(
        "target only",
        fused=_first(logprob.token_logprobs),
        reference=_first(logprob.token_logprobs_reference),
        eager=_first(_token_logprobs_eager),
        bench={device: shapes[:1] for device, shapes in _LOGPROB_BENCH.items()},
    ),
    _logprob_case("chunks", options={"memory_budget": 1 << 12}),
    _logprob_case("bias, softcap, temperatures", inputs=_logprob_features, options={"softcap": 5.0}),
    _logprob_case(
        "support",
        inputs=_logprob_support,
        reads_values=True,
        shapes=({"T": 11, "C": 33, "V": 101, "K": 7},),
        empty=(),
        configurations=({"T": 64, "C": 1024, "V": 4096, "K": 64},),
    ),
    _logprob_case(
        "adapter",
        inputs=_with_adapter(_logprob_inputs),
        options={"scaling": 0.5},
        shapes=tuple(dims | {"R": 5} for dims in _LOGPROB_SHAPES),
        empty=(),
        configurations=({"T": 64, "C": 128, "V": 4096, "R": 16},),
    ),
    _logprob_case(
        "adapter, support",
        inputs=_with_adapter(_logprob_support),
        options={"scaling": 0.5},
        reads_values=True,
        shapes=({"T": 11, "C": 33, "V": 101, "K": 7, "R": 5},),
        empty=(),
    ),
    _divergence_case("forward KL", bench=_DIVERGENCE_BENCH, configurations=_DIVERGENCE_TILES),
    _divergence_case("reverse KL", options={"beta": 1.0}, configurations=_DIVERGENCE_TILES),
    _divergence_case(
        "JSD",
        options={"beta": 0.3},
        bench={device: shapes[:1] for device, shapes in _DIVERGENCE_BENCH.items()},
        configurations=_DIVERGENCE_TILES,
    ),
    _divergence_case("chunks", options={"beta": 0.3, "memory_budget": 1 << 15}),
    *(
        _divergence_case(
            f"features, beta {beta}",
            inputs=_divergence_features,
            options={"beta": beta, "softcap": 5.0, "teacher_softcap": 4.0, "memory_budget": 1 << 15},
            configurations=_DIVERGENCE_TILES if beta == 0.3 else (),
        )
        for beta in (0.0, 0.3, 1.0)
    ),
    _divergence_case(
        "adapters",
        inputs=_divergence_adapters,
        options={"scaling": 0.5, "teacher_scaling": 2.0, "memory_budget": 1 << 12},
        shapes=tuple(dims | {"R": 5} for dims in _DIVERGENCE_SHAPES[1:2]),  # one token is one rounding
        empty=(),
    ),
    *(
        _topk_case(f"beta {beta}", options={"beta": beta, "softcap": 5.0, "memory_budget": 1 << 13})
        for beta in (0.0, 0.3, 1.0)
    ),
    _topk_case(
        "adapter",
        inputs=_with_adapter(_topk_inputs),
        options={"beta": 0.3, "scaling": 0.5, "memory_budget": 1 << 13},
        shapes=({"T": 11, "C": 33, "V": 101, "K": 7, "R": 5},),
        empty=(),
    ),
    _topk_case(
        "likeliest",
        op="topk_logprobs",
        inputs=_head_inputs,
        fused=_second(topk.topk_logprobs),
        reference=_second(topk.topk_logprobs_reference),
        eager=_second(_topk_logprobs_eager),
        options={"k": 2, "memory_budget": 1 << 13},
        fixed=("hidden", "weight"),
        reads_values=False,
    ),
    _moe_case(
        "swiglu",
        bench={
            "cuda": tuple({"T": t, "C": 2048, "F": 768, "E": 128, "K": 8} for t in (32768, 4096)),
            "cpu": ({"T": 512, "C": 128, "F": 256, "E": 8, "K": 2},),
        },
        configurations=(
            {"T": 256, "C": 128, "F": 128, "E": 2, "K": 2},
            {"T": 64, "C": 128, "F": 128, "E": 8, "K": 1},
        ),
    ),
    _moe_case(
        "clamped, biases",
        inputs=_moe_features,
        options={"activation": "clamped_swiglu"},
        configurations=({"T": 256, "C": 128, "F": 128, "E": 2, "K": 2},),
    ),
    _moe_case("relu2", inputs=_moe_relu2, options={"activation": "relu2"}),
    _moe_case(
        "adapters",
        inputs=_moe_adapters,
        work=_moe_adapter_work,
        formula="6TKCF + 2TKR(2C + 3F) operations; 6TKCF + 4TKR(2C + 3F)",
        shapes=({"T": 19, "C": 20, "F": 35, "E": 3, "K": 2, "R": 3},),
        empty=({"T": 0, "C": 8, "F": 8, "E": 3, "K": 2, "R": 3},),
        fixed=("gate_up", "down"),
        configurations=({"T": 256, "C": 128, "F": 128, "E": 2, "K": 2, "R": 16},),
    ),
    _moe_case(
        "4-bit experts, adapters",
        inputs=_moe_4bit_inputs,
        fused=_moe_4bit(moe.moe_mlp),
        reference=_moe_4bit(moe.moe_mlp_reference),
        eager=_moe_4bit(_eager_moe_4bit),
        work=_moe_adapter_work,
        formula="6TKCF + 2TKR(2C + 3F) operations; 6TKCF + 4TKR(2C + 3F)",
        shapes=({"T": 19, "C": 20, "F": 48, "E": 3, "K": 2, "R": 17},),
        empty=(),
        fixed=tuple(f"{name}_{part}" for name in ("gate_up", "down") for part in _FOUR_BIT),
    ),
    _lora_case("dense", shapes=_LORA_SHAPES, empty=_LORA_EMPTY, bench=_LORA_BENCH),
    _lora_case("fused", fused=_by_path("fused"), shapes=_LORA_SHAPES, configurations=_LORA_TILES),
    _lora_case(
        "epilogue",
        fused=_by_path("epilogue"),
        shapes=_LORA_SHAPES,
        empty=_LORA_EMPTY,
        configurations=_LORA_TILES,
    ),
    _lora_case("DoRA", inputs=_dora_inputs, configurations=_LORA_TILES[:1]),
    _lora_case(
        "dropout", options={"scaling": 0.5, "dropout": 0.3, "seed": 1 << 40 | 7}, configurations=_LORA_TILES
    ),
    _lora_case(
        "several adapters",
        inputs=_lora_inputs,
        shapes=({"T": 37, "C": 35, "F": 41, "R": 3, "E": 3},),
        configurations=({"T": 256, "C": 256, "F": 256, "R": 16, "E": 4},),
    ),
    _lora_case(
        "4-bit base",
        inputs=_qlora_inputs,
        fused=_four_bit(lora.lora_linear),
        reference=_four_bit(lora.lora_linear_reference),
        eager=_eager_four_bit(_lora_eager),
        shapes=({"T": 7, "C": 66, "F": 33, "R": 8},),
        fixed=_FOUR_BIT,
    ),
    _lora_case(
        "q, k, v",
        op="lora_linears",
        inputs=_lora_several_inputs,
        fused=_several(lora.lora_linears),
        reference=_several(lora.lora_linears_reference),
        eager=_several(_lora_eager_linears),
        work=_lora_several_work,
        formula="2TC(F + 2G) + 2TR(3C + F + 2G) operations; 2TC(F + 2G) + 4TR(3C + F + 2G)",
        shapes=_LORA_SEVERAL_SHAPES,
        empty=_LORA_SEVERAL_EMPTY,
        bench=_LORA_SEVERAL_BENCH,
        fixed=tuple(f"weight_{i}" for i in range(3)),
    ),
    _nf4_case(
        "nf4_linear",
        "bias",
        inputs=_nf4_inputs,
        fused=_four_bit(nf4.nf4_linear),
        reference=_four_bit(nf4.nf4_linear_reference),
        eager=_eager_four_bit(F.linear),
        work=_nf4_work,
        formula="2TCF operations, or 0.516 CF bytes; the same backward",
        shapes=({"T": 1, "C": 2, "F": 1}, {"T": 3, "C": 128, "F": 67}, {"T": 70, "C": 64, "F": 33}),
        empty=({"T": 0, "C": 64, "F": 16},),
        bench=_NF4_BENCH,
        configurations=tuple({"T": t, "C": 256, "F": 256} for t in (1, 64)),
        activations=("x",),
        fixed=_FOUR_BIT,
        half_scales=(30,),
    ),
    _nf4_case(
        "dequantize_nf4",
        "absmax quantised",
        inputs=_dequantize_inputs,
        fused=_multiplied_out(nf4.dequantize_nf4),
        reference=_multiplied_out(nf4.dequantize_nf4_reference),
        eager=_multiplied_out(nf4.dequantize_nf4_reference),
        formula="reads 0.516 CF bytes, writes CF elements; no backward",
        fixed=("like", *_FOUR_BIT),
    ),
    _nf4_case(
        "quantize_nf4",
        "absmax",
        inputs=lambda dims, dtype, device: {"weight": _randn((dims["F"], dims["C"]), dtype, device)},
        fused=_absmax(nf4.quantize_nf4),
        reference=_absmax(nf4.quantize_nf4_reference),
        eager=_absmax(nf4.quantize_nf4_reference),
        work=_quantize_work,
        formula="reads CF elements, writes 0.56 CF bytes; no backward",
        fixed=("weight",),
    ),
)
