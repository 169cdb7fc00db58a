"""Cases of kernels/decode.py: attention of one new token of each sequence to a key/value cache."""

from dataclasses import replace

import torch
from torch import Tensor

from ...kernels.decode import decode_attention
from ...kernels.plain.decode import decode_attention_reference
from .case import Case, Dims, Tensors, Work, randn


def _eager(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    length: Tensor,
    *,
    prefix_slot: Tensor | None = None,
    prefix_length: Tensor | None = None,
) -> Tensor:
    """Compute attention on caches that are gathered by slot, with a mask for the length of each sequence."""
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


def _inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """Return inputs whose slots are in reverse order, with one slot free. Lengths are S, or slightly less."""
    B, S, D = dims["B"], dims["S"], dims["D"]
    k, v = (randn((B + 1, S, dims["G"], D), dtype, device) for _ in range(2))
    rows = torch.arange(B, device=device)
    return {
        "q": randn((B, dims["H"], D), dtype, device),
        "k_cache": k,
        "v_cache": v,
        "slot": B - rows,
        "length": S - rows % 3 * (S // 32),
    }


def _prefix_inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    """Return inputs in which one cached prompt, in the free slot, precedes every sequence but the first."""
    tensors = _inputs(dims, dtype, device)
    rows = torch.arange(dims["B"], device=device)
    return tensors | {"prefix_slot": 0 * rows, "prefix_length": (rows > 0) * (dims["S"] - 1)}


def _work(dims: Dims, size: int) -> tuple[Work, Work]:
    B, D = dims["B"], dims["D"]
    moved = 2 * B * (dims["S"] * dims["G"] + dims["H"]) * D * size
    return Work(4 * B * dims["S"] * dims["H"] * D, moved), Work(0, 0)


_TILES = tuple({"B": 2, "S": 256, "H": 4, "G": 2, "D": d} for d in (128, 64, 256))

_CASE = Case(
    op="decode_attention",
    family="own cache",
    inputs=_inputs,
    fused=decode_attention,
    reference=decode_attention_reference,
    eager=_eager,
    work=_work,
    formula="reads the cached keys and values: 2BSGD; no backward",
    shapes=(
        {"B": 1, "S": 1, "H": 1, "G": 1, "D": 1},
        {"B": 3, "S": 67, "H": 2, "G": 1, "D": 17},
        {"B": 1, "S": 131, "H": 2, "G": 2, "D": 16},
    ),
    empty=({"B": 0, "S": 5, "H": 2, "G": 1, "D": 8},),
    activations=("q", "v_cache"),
    fixed=("q", "k_cache", "v_cache"),
    reads_values=True,
)

CASES = (
    replace(
        _CASE,
        bench={
            "cuda": tuple({"B": b, "S": 4096, "H": 32, "G": 8, "D": 128} for b in (64, 1)),
            "cpu": ({"B": 4, "S": 512, "H": 8, "G": 2, "D": 64},),
        },
        configurations=_TILES,
    ),
    replace(_CASE, family="shared prefix", inputs=_prefix_inputs, configurations=_TILES),
)
