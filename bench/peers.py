"""The other contestants of each op, asked for by name and built when asked.

A builder takes the Case and returns a callable with the op's signature. It raises ImportError where a library is not
installed, which the benchmark lists as such, and Unsuitable where the peer has no such feature.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import Case


class Unsuitable(Exception):
    """The peer cannot compute this case; the message says what it lacks."""


def _compiled(case: Case) -> Callable[..., Any]:
    """The eager composition as torch.compile fuses it, one graph for each shape."""
    return torch.compile(case.eager, fullgraph=True, dynamic=False)


def _torch_rms_norm(case: Case) -> Callable[..., Any]:
    def peer(x: Tensor, weight: Tensor, eps: float = 1e-6, *, unit_offset: bool = False) -> Tensor:
        return F.rms_norm(x, weight.shape, 1 + weight if unit_offset else weight, eps)

    return peer


def _torch_add_rms_norm(case: Case) -> Callable[..., Any]:
    def peer(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, unit_offset: bool = False):
        total = x + residual
        return F.rms_norm(total, weight.shape, 1 + weight if unit_offset else weight, eps), total

    return peer


def _liger_rms_norm(case: Case) -> Callable[..., Any]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]

    def peer(x: Tensor, weight: Tensor, eps: float = 1e-6, *, unit_offset: bool = False) -> Tensor:
        return LigerRMSNormFunction.apply(x, weight, eps, 1.0 if unit_offset else 0.0, "llama", False)

    return peer


def _liger_add_rms_norm(case: Case) -> Callable[..., Any]:
    from liger_kernel.ops.fused_add_rms_norm import (  # pyright: ignore[reportMissingImports]
        LigerFusedAddRMSNormFunction,
    )

    def peer(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, unit_offset: bool = False):
        return LigerFusedAddRMSNormFunction.apply(
            x, residual, weight, eps, 1.0 if unit_offset else 0.0, "llama", False
        )

    return peer


def _liger_rope(case: Case) -> Callable[..., Any]:
    from liger_kernel.ops.rope import LigerRopeFunction  # pyright: ignore[reportMissingImports]

    if case.family != "half":
        raise Unsuitable("the half layout only")

    def peer(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None):
        c, s = (torch.cat((t, t), -1)[None, : q.shape[-3]].to(q.dtype) for t in (cos, sin))  # (1, T, D)
        # it rotates in place, (B, H, T, D)
        rotated = LigerRopeFunction.apply(q.transpose(1, 2).clone(), k.transpose(1, 2).clone(), c, s)
        return tuple(t.transpose(1, 2) for t in rotated)

    return peer


def _liger_swiglu(case: Case) -> Callable[..., Any]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # pyright: ignore[reportMissingImports]

    return lambda gate, up: LigerSiLUMulFunction.apply(gate, up)


def _liger_geglu(case: Case) -> Callable[..., Any]:
    from liger_kernel.ops.geglu import LigerGELUMulFunction  # pyright: ignore[reportMissingImports]

    return lambda gate, up: LigerGELUMulFunction.apply(gate, up)


PEERS: dict[str, dict[str, Callable[[Case], Callable[..., Any]]]] = {
    "rms_norm": {"torch.compile": _compiled, "F.rms_norm": _torch_rms_norm, "liger-kernel": _liger_rms_norm},
    "add_rms_norm": {
        "torch.compile": _compiled,
        "F.rms_norm": _torch_add_rms_norm,
        "liger-kernel": _liger_add_rms_norm,
    },
    "apply_rope": {"torch.compile": _compiled, "liger-kernel": _liger_rope},
    "swiglu": {"torch.compile": _compiled, "liger-kernel": _liger_swiglu},
    "geglu": {"torch.compile": _compiled, "liger-kernel": _liger_geglu},
    "clamped_swiglu": {"torch.compile": _compiled},
}
