"""Cases of kernels/rope.py: rotary position embedding."""

from dataclasses import replace

import torch
from torch import Tensor

from ...kernels import rope
from .case import Case, Dims, Tensors, Work, randn


def _eager(
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


def _inputs(dims: Dims, dtype: torch.dtype, device: str) -> Tensors:
    t, turned = dims["T"], "rotary" if "rotary" in dims else "D"
    rotary = dims[turned]
    if rotary % 2:
        raise ValueError(f"{turned}: expected an even size, got {rotary}")

    lead = (dims["B"], t) if "B" in dims else (t,)  # without a batch: packed rows, each with its own position
    places = 2 * t + 1 if "B" not in dims else t
    angle = torch.arange(places, device=device)[:, None] / 100.0 ** torch.linspace(
        0, 1, rotary // 2, device=device
    )
    return {
        "q": randn((*lead, dims["H"], dims["D"]), dtype, device),
        "k": randn((*lead, dims["G"], dims["D"]), dtype, device),
        "cos": angle.cos(),
        "sin": angle.sin(),
        "positions": None if "B" in dims else torch.arange(t, device=device).flip(0) * 2,
    }


def _work(dims: Dims, size: int) -> tuple[Work, Work]:
    tokens, rotary = dims.get("B", 1) * dims["T"], dims.get("rotary", dims["D"])
    heads = tokens * (dims["H"] + dims["G"])
    one = Work(3 * heads * rotary, 2 * heads * dims["D"] * size + dims["T"] * rotary * 4)
    return one, one


_SHAPES = (
    {"B": 1, "T": 1, "H": 1, "G": 1, "D": 2},
    {"B": 2, "T": 7, "H": 3, "G": 1, "D": 34},
    {"B": 1, "T": 17, "H": 4, "G": 2, "D": 64},
)
_EMPTY = ({"B": 2, "T": 0, "H": 2, "G": 1, "D": 8},)
_BENCH = {
    "cuda": tuple({"B": 1, "T": t, "H": 32, "G": 8, "D": 128} for t in (8192, 1024, 32768)),
    "cpu": ({"B": 1, "T": 512, "H": 8, "G": 2, "D": 64},),
}
_TILES = tuple({"B": 1, "T": 256, "H": 8, "G": 2, "D": d} for d in (128, 64, 256, 80))

_CASE = Case(
    op="apply_rope",
    family="half",
    inputs=_inputs,
    fused=rope.apply_rope,
    reference=rope.apply_rope_reference,
    eager=_eager,
    work=_work,
    formula="reads and writes q and k: 2T(H + G)D; the same backward",
    shapes=_SHAPES,
    empty=_EMPTY,
    activations=("q", "k"),
    fixed=("cos", "sin"),
)

CASES = (
    replace(_CASE, bench=_BENCH, configurations=_TILES),
    replace(_CASE, family="interleaved", options={"interleaved": True}, configurations=_TILES[:1]),
    replace(
        _CASE,
        family="partial",
        shapes=({"B": 2, "T": 5, "H": 3, "G": 1, "D": 34, "rotary": 10},),
        empty=({"B": 2, "T": 0, "H": 2, "G": 1, "D": 8, "rotary": 4},),
    ),
    replace(
        _CASE,
        family="packed",
        shapes=({"T": 19, "H": 3, "G": 1, "D": 16},),
        empty=({"T": 0, "H": 3, "G": 1, "D": 16},),
    ),
)
