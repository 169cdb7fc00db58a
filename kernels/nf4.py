"""Weights in 4 bits, in the format of bitsandbytes, and products with them.

    w = code[nibble] * absmax[i // blocksize]                i is the weight's index in row-major order
    absmax = nested_code[byte] * nested_absmax[block // 256] + offset        if absmax is quantised itself
    nibble = the index of the code's value nearest to w / absmax; on a midpoint of two values, the smaller one

    y = x W^T + bias        dx = dy W        db = sum over rows of dy        W is frozen

NF4's code is 16 quantiles of a normal distribution. FP4's code has 1 sign bit, 2 exponent bits and 1 mantissa bit. Two
weights share a byte, the first in the high nibble. With blocks of 64, a weight takes 4 + 8 / 64 + 32 / 16384 = 4.127
bits.

Memory, in bytes for n weights: dequantising reads 0.516 n and writes 2 n in half precision. The product with few rows
(M <= 64) reads 0.516 n and does not write W. With more rows, W is dequantised and then read by a plain matrix product.
The 2.5 n bytes of dequantising are negligible beside the product's operations. See docs/nf4.md.

Source: QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3 and appendix E; the constants and the
        layout: https://github.com/bitsandbytes-foundation/bitsandbytes 0.50.2
"""

# A launch passes numbers where the kernel is annotated tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._chip import (
    DTYPES,
    FLOATS,
    autocast_dtype,
    cdiv,
    check_device,
    check_dtype,
    check_shape,
    multiprocessors,
    next_power_of_2,
    precision,
    use_triton,
)
from ._op import make_op, on_its_device
from ._triton import tl, triton
from .plain import nf4 as plain
from .records import BLOCKSIZES, NESTED, NF4Weight, Weight
from .tiles import NF4_PRODUCT, Tile, chip_of, row_of

# ---- reference


def quantize_nf4_reference(
    weight: Tensor, *, blocksize: int = 64, quant_type: str = "nf4", double_quant: bool = True
) -> NF4Weight:
    packed, absmax = plain.round_to_nibbles(weight, quant_type, blocksize)
    code = plain.code_of(quant_type, weight.device)
    rounded = NF4Weight(packed, absmax, code, tuple(weight.shape), weight.dtype, blocksize)
    return plain.with_nested_absmax(rounded) if double_quant else rounded


def dequantize_nf4_reference(weight: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    absmax = weight.absmax
    if weight.nested_absmax is not None:
        assert weight.nested_code is not None and weight.offset is not None
        nested = weight.nested_absmax.repeat_interleave(NESTED)[: absmax.numel()]
        absmax = weight.nested_code[absmax.int()] * nested + weight.offset

    # unpack: the high nibble of a byte comes first
    nibbles = torch.stack((weight.packed >> 4, weight.packed & 15), -1).flatten()[: weight.numel]
    values = weight.code[nibbles.int()] * absmax.repeat_interleave(weight.blocksize)[: weight.numel]
    return values.to(dtype or weight.dtype).view(weight.shape)


def nf4_linear_reference(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    y = x @ dequantize_nf4_reference(weight, x.dtype).T
    return (y if bias is None else y + bias).to(x.dtype)


# ---- kernels

# fmt: off


@triton.jit
def _absmax_of(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, blocks, mask, DOUBLE: tl.constexpr):
    # the absmax of these blocks of weights, fp32
    absmax = tl.load(absmax_ptr + blocks, mask, other=0)
    if DOUBLE:
        nested = tl.load(nested_absmax_ptr + blocks // 256, mask, other=0.0)
        absmax = tl.load(nested_code_ptr + absmax.to(tl.int32)) * nested + tl.load(offset_ptr)
    return absmax.to(tl.float32)


@triton.jit
def _few_rows_fwd(
    x_ptr, packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, partial_ptr,
    M, N, K, steps, DOUBLE: tl.constexpr, BLOCKSIZE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # Program (i, j) takes block i of the result's columns and the share j of K. Even and odd weights are multiplied
    # separately, so nothing is interleaved. A step stays inside one block of weights, so absmax scales the step's sum.
    rows, cols = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_live, w_live = (rows < M)[:, None], (cols < N)[:, None]
    code = tl.load(code_ptr + tl.arange(0, 16)).to(x_ptr.dtype.element_ty)
    starts = cols.to(tl.int64) * K  # where the rows of W start

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(tl.program_id(1) * steps, tl.minimum((tl.program_id(1) + 1) * steps, K // (2 * BLOCK_K))):
        bytes_ = starts[:, None] // 2 + k * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # [BLOCK_N, BLOCK_K]
        pairs = tl.load(packed_ptr + bytes_, w_live, other=0, eviction_policy="evict_first").to(tl.int32)
        pairs = tl.reshape(pairs, [BLOCK_N * BLOCK_K])
        first = tl.reshape(tl.gather(code, pairs >> 4, 0), [BLOCK_N, BLOCK_K])
        second = tl.reshape(tl.gather(code, pairs & 15, 0), [BLOCK_N, BLOCK_K])

        even = x_ptr + rows[:, None] * K + 2 * (k * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
        step = tl.dot(tl.load(even, x_live, other=0.0), tl.trans(first), input_precision=PRECISION)
        step = tl.dot(tl.load(even + 1, x_live, other=0.0), tl.trans(second), step, input_precision=PRECISION)
        blocks = (starts + 2 * k * BLOCK_K) // BLOCKSIZE
        acc += step * _absmax_of(
            absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, blocks, cols < N, DOUBLE
        )[None, :]

    places = (tl.program_id(1) * M + rows).to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(partial_ptr + places, acc, x_live & (cols < N)[None, :])


@triton.jit
def _add_splits(partial_ptr, bias_ptr, y_ptr, numel, N, SPLITS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    # y = the sum of the partial results, in a fixed order, + bias
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(SPLITS):
        total += tl.load(partial_ptr + tl.cast(split, tl.int64) * numel + places, places < numel, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + places % N, places < numel, other=0.0).to(tl.float32)
    tl.store(y_ptr + places, total.to(y_ptr.dtype.element_ty), places < numel)


@triton.jit
def _dequantize_fwd(
    packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, out_ptr,
    numel, pairs_numel, blocks, DOUBLE: tl.constexpr, HALF: tl.constexpr, BLOCKS: tl.constexpr,
):
    # A row of the tile is a block of weights, HALF bytes. A thread takes 16 bytes, which have one absmax.
    rows = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    absmax = _absmax_of(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, rows, rows < blocks, DOUBLE)
    places = rows[:, None] * HALF + tl.arange(0, HALF)[None, :]  # [BLOCKS, HALF]
    pairs = tl.load(packed_ptr + places, places < pairs_numel, other=0, eviction_policy="evict_first")

    code = tl.load(code_ptr + tl.arange(0, 16))
    pairs = tl.reshape(pairs, [BLOCKS * HALF]).to(tl.int32)
    first = tl.reshape(tl.gather(code, pairs >> 4, 0), [BLOCKS, HALF]) * absmax[:, None]
    second = tl.reshape(tl.gather(code, pairs & 15, 0), [BLOCKS, HALF]) * absmax[:, None]

    values = tl.reshape(tl.join(first, second), [BLOCKS, 2 * HALF])
    places = rows[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out_ptr + places, values.to(out_ptr.dtype.element_ty), places < numel)


@triton.jit
def _quantize_fwd(
    w_ptr, bounds_ptr, order_ptr, packed_ptr, absmax_ptr, numel, blocks, HALF: tl.constexpr, BLOCKS: tl.constexpr
):
    # The rounding is that of plain.round_to_nibbles. A row of the tile is a block of weights.
    rows = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    places = rows[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]  # [BLOCKS, 2 HALF]
    w = tl.load(w_ptr + places, places < numel, other=0.0).to(tl.float32)

    # as integers, absolute values keep their order with NaN above all; a maximum of floats would ignore NaN
    bits = tl.abs(w).to(tl.int32, bitcast=True)
    absmax = tl.max(bits, 1).to(tl.float32, bitcast=True)

    short = (rows + 1) * (2 * HALF) > numel  # a short last block divides by absmax, the others multiply
    tl.store(absmax_ptr + rows, tl.where(short & (absmax == 0), 1e-38, absmax), rows < blocks)
    divisor = tl.where(absmax == 0, 1.0, absmax)
    scaled = tl.where(
        short[:, None],
        tl.div_rn(w, tl.broadcast_to(divisor[:, None], [BLOCKS, 2 * HALF])),
        w * tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), divisor)[:, None],
    )

    # the place in the sorted code, which is how many midpoints lie below, and its nibble
    place = tl.zeros([BLOCKS, 2 * HALF], tl.int32)
    for i in tl.static_range(15):
        place += (scaled > tl.load(bounds_ptr + i)).to(tl.int32)
    order = tl.load(order_ptr + tl.arange(0, 16)).to(tl.int32)
    nibbles = tl.gather(order, tl.reshape(place, [BLOCKS * 2 * HALF]), 0)

    first, second = tl.split(tl.reshape(nibbles, [BLOCKS, HALF, 2]))
    places = rows[:, None] * HALF + tl.arange(0, HALF)[None, :]
    tl.store(packed_ptr + places, ((first << 4) | second).to(tl.uint8), 2 * places < numel)

# fmt: on


# ---- launch

FEW_ROWS = 64  # up to this many rows a product reads W in its 4 bits; for more, W is dequantised for cuBLAS
TILE = 4096  # bytes that one program dequantises, 16 for each thread
TENSORS = 6  # the tensors of a Weight, which are its first fields


@on_its_device  # not only ops call it: references and CPU paths do, too
def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return a 4-bit weight as a dense tensor, by one launch or, on a CPU, by table lookups."""
    packed, absmax = weight.data, weight.absmax
    if not use_triton(packed):
        return plain.dequantize(weight, dtype)

    out = packed.new_empty(weight.shape, dtype=dtype)
    if out.numel():
        assert absmax is not None
        double, half = weight.nested_absmax is not None, weight.blocksize // 2
        sizes, rows = (out.numel(), packed.numel(), absmax.numel()), max(1, TILE // half)
        _dequantize_fwd[(cdiv(absmax.numel(), rows),)](
            *weight[:TENSORS], out, *sizes, double, half, rows, num_warps=8, enable_fp_fusion=False
        )
    return out


def operand(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return t.to(dtype).contiguous(). If t already has this dtype, `to` is not called, which saves microseconds."""
    return (t if t.dtype == dtype else t.to(dtype)).contiguous()


def dense_of(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return a dense weight unchanged, or a 4-bit weight dequantised to `dtype`."""
    return weight.data if weight.absmax is None else dequantize(weight, dtype)


@cache
def _plan(
    chip: str, dtype: torch.dtype, M: int, N: int, K: int, blocksize: int, programs: int
) -> tuple[Tile, tuple[int, int], int]:
    """Return the tile of a product with few rows, its grid, and the number of steps through K for each program."""
    kind, step = "fp32" if dtype == torch.float32 else "half", min(blocksize, 64)
    tile = row_of(NF4_PRODUCT, f"{chip}, {kind}", kind)._replace(M=max(16, next_power_of_2(M)), K=step // 2)

    # each program takes a block of columns and a share of K
    columns = cdiv(N, tile.N)
    splits = max(1, min(cdiv(programs, columns), K // step, 64))
    steps = cdiv(K // step, splits)
    return tile, (columns, cdiv(K // step, steps)), steps


def product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Compute x W^T + bias, (M, N), for a contiguous x (M, K) and a 4-bit W (N, K).

    On a GPU a kernel reads the 4 bits of W if x has at most FEW_ROWS rows and K is a multiple of the blocksize.
    Otherwise W is dequantised first.
    """
    (M, K), (N, _), blocksize = x.shape, weight.shape, weight.blocksize
    if not use_triton(x) or M > FEW_ROWS or K % blocksize or 0 in (M, N, K):
        return F.linear(x, dequantize(weight, x.dtype), None if bias is None else bias.to(x.dtype))

    # about four programs for each multiprocessor
    tile, grid, steps = _plan(chip_of(x), x.dtype, M, N, K, blocksize, 4 * multiprocessors(x))
    *blocks, warps, stages = tile
    splits, double = grid[1], weight.nested_absmax is not None
    partial = x.new_empty(splits, M, N, dtype=torch.float32)
    numbers = M, N, K, steps, double, blocksize, precision(), *blocks
    _few_rows_fwd[grid](x, *weight[:TENSORS], partial, *numbers, num_warps=warps, num_stages=stages)

    # the partial results are added in a fixed order
    y = x.new_empty(M, N)
    _add_splits[(cdiv(M * N, 256),)](partial, bias, y, M * N, N, splits, bias is not None, 256, num_warps=4)
    return y


def _linear_shapes(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


class _Saved(NamedTuple):
    """The values that are saved for the backward: W in its 4 bits and the dtype of the bias, but not x."""

    weight: Weight
    bias_dtype: torch.dtype | None


class _Gradients(NamedTuple):
    x: Tensor | None
    bias: Tensor | None


def _save(y, x, weight, bias):
    return _Saved(weight, None if bias is None else bias.dtype)


def _linear_backward(saved: _Saved, needs: Any, dy: Tensor) -> _Gradients:
    dy, dx, dbias = dy.contiguous(), None, None
    if needs.x:
        dx = dy @ dequantize(saved.weight, dy.dtype)
    if needs.bias:
        wide = torch.promote_types(dy.dtype, torch.float32)
        dbias = dy.sum(0, dtype=wide).to(saved.bias_dtype)
    return _Gradients(dx, dbias)


def _gradient_shapes(saved, needs, dy):
    M, (N, K) = dy.shape[0], saved.weight.shape
    return _Gradients(
        dy.new_empty(M, K) if needs.x else None,
        dy.new_empty(N, dtype=saved.bias_dtype) if needs.bias else None,
    )


def _dequantize_shapes(weight, dtype):
    return weight.data.new_empty(weight.shape, dtype=dtype)


def _quantize(weight: Tensor, midpoints: Tensor, order: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Return packed (numel / 2,) uint8 and absmax (blocks,) fp32 of a contiguous weight."""
    packed, absmax = _quantize_shapes(weight, midpoints, order, blocksize)
    if absmax.numel():
        rows = max(1, TILE // blocksize)
        sizes = weight.numel(), absmax.numel()
        _quantize_fwd[(cdiv(absmax.numel(), rows),)](
            weight, midpoints, order, packed, absmax, *sizes, blocksize // 2, rows, num_warps=8
        )
    return packed, absmax


def _quantize_shapes(weight, midpoints, order, blocksize):
    n = weight.numel()
    absmax = weight.new_empty(cdiv(n, blocksize), dtype=torch.float32)
    return weight.new_empty(cdiv(n, 2), dtype=torch.uint8), absmax


_nf4_linear = make_op("nf4_linear", product, _linear_shapes, _save, _linear_backward, _gradient_shapes)
_dequantize_nf4 = make_op("dequantize_nf4", dequantize, _dequantize_shapes)
_quantize_nf4 = make_op("quantize_nf4", _quantize, _quantize_shapes)


# ---- op


def quantize_nf4(
    weight: Tensor, *, blocksize: int = 64, quant_type: str = "nf4", double_quant: bool = True
) -> NF4Weight:
    """Quantise a weight to 4 bits, in the format of bitsandbytes and with the same bits.

    There is one exception: fp4 has two codes for zero, and the CUDA code of bitsandbytes may choose the other one.

    weight: any shape, fp32, bf16 or fp16. Blocks run over it in row-major order.
    blocksize: the number of weights that share an absmax, a power of two from 32 to 4096.
    quant_type: "nf4" or "fp4".
    double_quant: quantise absmax to 8 bits, too.
    A number that is not finite makes its block NaN or infinite. With double_quant it makes the whole weight NaN or
    infinite. This holds on any device.
    Raises ValueError for another dtype, blocksize or quant_type.
    """
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize: expected one of {BLOCKSIZES}, got {blocksize}")
    if quant_type not in plain.ORDER:
        raise ValueError(f"quant_type: expected one of {tuple(plain.ORDER)}, got {quant_type!r}")
    check_dtype("weight", weight, *DTYPES)
    if not use_triton(weight):
        return quantize_nf4_reference(
            weight, blocksize=blocksize, quant_type=quant_type, double_quant=double_quant
        )

    midpoints, order = plain.midpoints_of(quant_type, weight.device)
    packed, absmax = _quantize_nf4(weight.detach().contiguous(), midpoints, order, blocksize)
    code = plain.code_of(quant_type, weight.device)
    rounded = NF4Weight(packed, absmax, code, tuple(weight.shape), weight.dtype, blocksize)
    return plain.with_nested_absmax(rounded) if double_quant else rounded


def dequantize_nf4(weight: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """Return the weight as a dense tensor in `dtype`, by default the dtype before quantisation. No gradient.

    code[nibble] * absmax is computed in fp32 and rounded once. Raises ValueError unless dtype is float32, float16 or
    bfloat16.
    """
    if dtype is not None and dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    return _dequantize_nf4(Weight.of(weight), dtype or weight.dtype)


def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """Compute x W^T + bias with a frozen 4-bit W. Only W, in its 4 bits, is saved for the backward.

    x: (..., in)    weight: shape (out, in)    bias: (out,), any float dtype
    Returns (..., out) in x's dtype, to which W is dequantised.
    Raises ValueError for other shapes and dtypes, and for tensors on several devices.
    """
    if len(weight.shape) != 2:
        raise ValueError(f"weight: expected shape (out, in), got {weight.shape}")
    N, K = weight.shape
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x: expected shape (..., in={K}), got {tuple(x.shape)}")
    check_dtype("x", x)
    check_device(x, weight=weight.packed, bias=bias)
    if bias is not None:
        check_shape("bias", bias, out=N)
        check_dtype("bias", bias, *FLOATS)

    x, bias = operand(x, autocast_dtype(x)), None if bias is None else bias.contiguous()
    y = _nf4_linear(x if x.ndim == 2 else x.reshape(-1, K), Weight.of(weight), bias)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], N)
