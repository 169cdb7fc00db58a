"""The peers of each op: implementations by other libraries, which are built on request.

A builder takes a Case, and returns a callable with the op's signature. It raises ImportError if the library is not
installed, and Unsuitable if the peer cannot compute the Case. The benchmark lists both with the reason.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from ...kernels import lora
from ..cases.case import Case
from ..cases.lora import by_path


class Unsuitable(Exception):
    """An exception for a peer that cannot compute a Case. The message tells what the peer supports."""


def _compiled(case: Case) -> Callable[..., Any]:
    """Return the eager composition under torch.compile, with one graph for each shape."""
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
        raise Unsuitable("supports only the half layout")

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


def _sdpa(backend: str) -> Callable[[Case], Callable[..., Any]]:
    """Return the function that builds a peer from one backend of F.scaled_dot_product_attention.

    The peer repeats a shared prompt for each of its completions.
    """

    def build(case: Case) -> Callable[..., Any]:
        chosen = getattr(SDPBackend, backend)

        def dense(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
            grouped = q.shape[2] != k.shape[2]
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
            with sdpa_kernel(chosen):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
            return out.transpose(1, 2)

        plan: list[int] = []

        def repeated(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, parents: Tensor) -> Tensor:
            if not plan:  # read once: a graph cannot wait for the host
                plan.extend(cu_seqlens.tolist())
            prompt, each, children = plan[1], plan[2] - plan[1], len(plan) - 2

            def unshare(x: Tensor) -> Tensor:  # (total, H, D) to (children, prompt + each, H, D)
                before = x[:prompt].expand(children, *x[:prompt].shape)
                return torch.cat((before, x[prompt:].unflatten(0, (children, each))), 1)

            out = dense(unshare(q), unshare(k), unshare(v))
            return torch.cat((out[0, :prompt], out[:, prompt:].flatten(0, 1)))

        if case.family == "causal":
            return dense
        if case.family == "shared prompt":
            return repeated
        raise Unsuitable("lacks a feature of this case")

    return build


def _varlen_attn(case: Case) -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    if case.family != "packed":
        raise Unsuitable("supports only packed sequences")
    named = inspect.signature(varlen_attn).parameters  # torch 2.10 had is_causal
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in named else {"is_causal": True}
    longest: list[int] = []

    def peer(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor) -> Tensor:
        if not longest:  # read once: a graph cannot wait for the host
            longest.append(int(cu_seqlens.diff().max()))
        grouped: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest[0], longest[0], **causal, **grouped)
        assert isinstance(out, Tensor)  # no second output was requested
        return out

    return peer


def _sdpa_decode(case: Case) -> Callable[..., Any]:
    """Return decode attention without a kernel of its own: SDPA on gathered caches, with a mask of the lengths."""
    if case.family != "own cache":
        raise Unsuitable("supports only one cache per sequence")

    def peer(q: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor, length: Tensor) -> Tensor:
        keys, values = (cache[slot].transpose(1, 2) for cache in (k_cache, v_cache))  # (B, G, S, D)
        seen = torch.arange(keys.shape[2], device=q.device) < length[:, None]  # (B, S)
        mask = seen[:, None, None]
        return F.scaled_dot_product_attention(q[:, :, None], keys, values, mask, enable_gqa=True)[:, :, 0]

    return peer


def _flex_attention(case: Case) -> Callable[..., Any]:
    if case.family != "causal":
        raise Unsuitable("not written for this case")
    compiled = torch.compile(flex_attention, dynamic=False)
    masks: dict[int, Any] = {}

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = q.shape[1]
        if T not in masks:
            masks[T] = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=q.device.type)
        grouped = q.shape[2] != k.shape[2]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        out: Any = compiled(q, k, v, block_mask=masks[T], enable_gqa=grouped)
        return out.transpose(1, 2)

    return peer


def _chunked_cross_entropy(case: Case) -> Callable[..., Any]:
    """Return cross-entropy in chunks of 1,024 rows, as a careful user of torch writes it.

    The backward pass computes the logits of each chunk again.
    """
    if case.family != "target only":
        raise Unsuitable("supports only log-probabilities of the target")

    def rows(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")

    def peer(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        blocks = zip(hidden.split(1024), targets.split(1024), strict=True)
        return torch.cat([checkpoint(rows, h, weight, t, use_reentrant=False) for h, t in blocks])  # pyright: ignore

    return peer


def _liger_cross_entropy(case: Case) -> Callable[..., Any]:
    from liger_kernel.ops.fused_linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyFunction,
    )

    if case.family != "target only":
        raise Unsuitable("supports only log-probabilities of the target")

    def peer(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        out = LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, targets, None, None, -100, 0.0, 0.0, "none"
        )
        return -(out[0] if isinstance(out, tuple) else out)

    return peer


def _cut_cross_entropy(case: Case) -> Callable[..., Any]:
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    if case.family != "target only":
        raise Unsuitable("supports only log-probabilities of the target")
    return lambda hidden, weight, targets: -linear_cross_entropy(hidden, weight, targets, reduction="none")


def _grouped_mm(case: Case) -> Callable[..., Any]:
    """Return the mixture of experts as transformers computes it on a GPU.

    The rows are sorted by expert, multiplied in two grouped products, and put back into their order.
    """
    if case.family != "swiglu":
        raise Unsuitable("supports only swiglu without biases")

    def peer(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        (T, K), E = indices.shape, gate_up.shape[0]
        expert, order = indices.flatten().sort(stable=True)
        ends = torch.searchsorted(expert, torch.arange(E, device=x.device), right=True).int()
        gate, up = F.grouped_mm(x[order // K], gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
        y = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)  # (T K, C), sorted
        y = y * weights.flatten()[order, None].to(y.dtype)
        return y[order.argsort()].unflatten(0, (T, K)).sum(1)

    return peer


def _lora_path(path: str) -> Callable[[Case], Callable[..., Any]]:
    """Return the function that builds a peer from one path of our lora_linear. paths.py compares the paths' times."""

    def build(case: Case) -> Callable[..., Any]:
        if case.family != "dense":
            raise Unsuitable("supports only a plain product")
        return by_path(path)

    return build


def _peft_lora(case: Case) -> Callable[..., Any]:
    """Return LoRA as PEFT's modules compute it: two linear layers, a product with the scaling, and a sum."""
    if case.family != "dense":
        raise Unsuitable("supports only a plain product")

    def peer(
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        *,
        bias: Tensor | None = None,
    ):
        return F.linear(x, weight, bias) + F.linear(F.linear(x, lora_a), lora_b) * scaling

    return peer


def _bitsandbytes(case: Case) -> Callable[..., Any]:
    """Return the function of bitsandbytes for the Case's op: 4-bit product, dequantisation or quantisation.

    Our op and bitsandbytes work on the same bytes, because both use the same 4-bit format.
    """
    from bitsandbytes import (  # pyright: ignore[reportMissingImports]
        functional,
        matmul_4bit,  # pyright: ignore[reportPrivateImportUsage]
    )

    def state(tensors: dict[str, Any], K: int, dtype: torch.dtype) -> Any:
        inner = functional.QuantState(
            absmax=tensors["nested_absmax"], code=tensors["nested_code"], blocksize=256, dtype=torch.float32
        )
        return functional.QuantState(
            absmax=tensors["absmax"],
            shape=torch.Size((2 * tensors["packed"].numel() // K, K)),
            dtype=dtype,
            blocksize=64,
            code=tensors["code"],
            quant_type="nf4",
            offset=tensors["offset"],
            state2=inner,
        )

    def linear(x: Tensor, *, bias: Tensor | None = None, **tensors: Any) -> Tensor:
        packed = tensors["packed"].view(-1, 1)
        return matmul_4bit(x, packed.t(), state(tensors, x.shape[-1], x.dtype), bias=bias)

    def dequantize(like: Tensor, **tensors: Any) -> Tensor:
        packed = tensors["packed"].view(-1, 1)
        return functional.dequantize_4bit(packed, state(tensors, like.shape[-1], like.dtype))

    def quantize(weight: Tensor) -> Tensor:
        return functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")[1].absmax

    return {"nf4_linear": linear, "dequantize_nf4": dequantize, "quantize_nf4": quantize}[case.op]


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
    "flash_attention": {
        "SDPA flash": _sdpa("FLASH_ATTENTION"),
        "SDPA cuDNN": _sdpa("CUDNN_ATTENTION"),
        "SDPA efficient": _sdpa("EFFICIENT_ATTENTION"),
        "flex_attention": _flex_attention,
        "varlen_attn": _varlen_attn,
    },
    "decode_attention": {"SDPA": _sdpa_decode},
    "token_logprobs": {
        "torch.compile": _compiled,
        "chunked": _chunked_cross_entropy,
        "liger-kernel": _liger_cross_entropy,
        "cut-cross-entropy": _cut_cross_entropy,
    },
    "token_divergence": {"torch.compile": _compiled},  # Liger's returns only the mean over tokens
    "moe_mlp": {"grouped_mm": _grouped_mm},
    "lora_linear": {  # eager is F.linear, then addmm
        "torch.compile": _compiled,
        "PEFT's pattern": _peft_lora,
        **{f"burnish, {path}": _lora_path(path) for path in lora.PATHS},
    },
    "nf4_linear": {"bitsandbytes": _bitsandbytes},
    "dequantize_nf4": {"bitsandbytes": _bitsandbytes},
    "quantize_nf4": {"bitsandbytes": _bitsandbytes},
}
