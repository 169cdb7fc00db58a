"""Weights in 4 bits, in the format of bitsandbytes, and the product with them.

    w = code[nibble] * absmax[i // blocksize]                i the weight's place in row-major order
    absmax = nested_code[byte] * nested_absmax[block // 256] + offset        where absmax is quantised itself
    nibble = the place of w / absmax among the midpoints of the sorted code; on a midpoint, the smaller value

    y = x W^T + bias        dx = dy W        db = sum over rows of dy        W is frozen

NF4's code is 16 quantiles of a normal distribution, FP4's is 1 sign, 2 exponent and 1 mantissa bits. Two weights share
a byte, the first in the high nibble. Storage with blocks of 64: 4 + 8 / 64 + 32 / 16384 = 4.127 bits a weight.

Memory, in bytes for n weights: dequantising reads 0.516 n and writes 2 n in half precision. The product with few rows
(M <= 64) reads 0.516 n and writes nothing of W; with more rows W is written once and read by a plain matrix product:
2.5 n bytes on the way there, nothing beside the product's operations. See docs/nf4.md.

Source: QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3 and appendix E; the constants and the
        layout: https://github.com/bitsandbytes-foundation/bitsandbytes 0.50.2
"""

# A launch passes numbers where the kernel is annotated tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false

from dataclasses import replace
from functools import cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ._chip import (
    DTYPES,
    FLOATS,
    autocast_dtype,
    capability,
    cdiv,
    check_device,
    check_dtype,
    check_shape,
    multiprocessors,
    next_power_of_2,
    precision,
    use_triton,
)
from ._op import on_its_device, register
from ._triton import tl, triton
from .records import BLOCKSIZES, NESTED, NF4Weight, Weight

# bit for bit what the files hold: the quantiles as defined differ by up to 2e-7
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = tuple(v / 12 for v in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3))
# the nibbles by value. The two zeros: bitsandbytes 0.50.2 has 0 before 8 on a CPU, its CUDA code the sign of the weight
ORDER = {"nf4": tuple(range(16)), "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)}


# ---- reference


def quantize_nf4_reference(
    weight: Tensor, *, blocksize: int = 64, quant_type: str = "nf4", double_quant: bool = True
) -> NF4Weight:
    code = _code(quant_type, weight.device)
    packed, absmax = _quantize_torch(weight, code, quant_type, blocksize)
    return _held(weight, packed, absmax, code, blocksize, double_quant)


def dequantize_nf4_reference(weight: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    absmax = weight.absmax
    if weight.nested_absmax is not None:
        assert weight.nested_code is not None and weight.offset is not None
        nested = weight.nested_absmax.repeat_interleave(NESTED)[: absmax.numel()]
        absmax = weight.nested_code[absmax.int()] * nested + weight.offset
    nibbles = torch.stack((weight.packed >> 4, weight.packed & 15), -1).flatten()[: weight.numel]
    values = weight.code[nibbles.int()] * absmax.repeat_interleave(weight.blocksize)[: weight.numel]
    return values.to(dtype or weight.dtype).view(weight.shape)


def nf4_linear_reference(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    y = x @ dequantize_nf4_reference(weight, x.dtype).T
    return (y if bias is None else y + bias).to(x.dtype)


@cache
def _code(quant_type: str, device: torch.device) -> Tensor:
    """(16,)"""
    return torch.tensor(NF4 if quant_type == "nf4" else FP4, device=device)


@cache
def _nested_code(device: torch.device) -> Tensor:
    """(256,) sorted: 0, 1, and for each power of ten from 1e-6 to 1 twice as many even steps as for the one before.

    Source: Dettmers 2016, https://arxiv.org/abs/1511.04561, the dynamic tree of 8 bits
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2
        scaled = 10.0 ** (exponent - 6) * means
        values += scaled.tolist() + (-scaled).tolist()
    return torch.tensor(sorted(values), device=device)


@cache
def _bounds(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 15 midpoints of the sorted code, and the nibble of each place among them."""
    order = torch.tensor(ORDER[quant_type], device=device)
    code = _code(quant_type, device)[order]
    return (code[:-1] + code[1:]) / 2, order.to(torch.uint8)


def _quantize_torch(weight: Tensor, code: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """packed (numel / 2,) and absmax (blocks,)."""
    flat = weight.detach().reshape(-1).float()
    whole = flat.numel() // blocksize * blocksize
    blocks, rest = flat[:whole].view(-1, blocksize), flat[whole:]
    absmax = blocks.abs().amax(1)
    # a product with the reciprocal, but a quotient in the last block if it is cut short: that is the format's rounding
    scaled = (blocks * (1 / absmax.clamp(min=1e-38))[:, None]).flatten()
    if rest.numel():
        most = rest.abs().amax().clamp(min=1e-38)
        absmax, scaled = torch.cat((absmax, most[None])), torch.cat((scaled, rest / most))
    bounds, order = _bounds(quant_type, weight.device)
    nibbles = order[torch.bucketize(scaled.clamp(-1, 1), bounds, out_int32=True)]
    if nibbles.numel() % 2:  # the nibble of 0 fills the last byte
        nibbles = torch.cat((nibbles, order[torch.bucketize(torch.zeros_like(scaled[:1]), bounds)]))
    return (nibbles[::2] << 4) | nibbles[1::2], absmax


def _held(
    weight: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, double_quant: bool
) -> NF4Weight:
    held = NF4Weight(packed, absmax, code, tuple(weight.shape), weight.dtype, blocksize)
    if not double_quant:
        return held
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    centred, nested_code = absmax - offset, _nested_code(weight.device)
    padded = F.pad(centred, (0, -centred.numel() % NESTED)).view(-1, NESTED)
    most = padded.abs().amax(1)
    scaled = (padded * (1 / most)[:, None]).nan_to_num(-1).clamp(-1, 1)  # a block of zeros: byte 0
    if not weight.is_cuda:  # bitsandbytes on a CPU looks the byte up by 16 bits of the number
        scaled = ((scaled + 1) * 32767.5 + 0.5).int() / 32767.5 - 1
    bytes_ = torch.bucketize(scaled, (nested_code[:-1] + nested_code[1:]) / 2, out_int32=True)
    return replace(
        held,
        absmax=bytes_.flatten()[: absmax.numel()].to(torch.uint8),
        nested_absmax=most,
        nested_code=nested_code,
        offset=offset,
    )


# ---- kernels


@triton.jit
def _absmax_of(
    absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, blocks, mask, DOUBLE: tl.constexpr
):  # fmt: skip
    """The absmax of these blocks of weights, fp32."""
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
):  # fmt: skip
    # Program (i, j): columns of block i of the result, the share j of K. Even and odd weights are multiplied apart,
    # so nothing is interleaved; a step stays inside one block of weights, so absmax scales the step's sum.
    rows, cols = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live, seen = (rows < M)[:, None], (cols < N)[:, None]
    code = tl.load(code_ptr + tl.arange(0, 16)).to(x_ptr.dtype.element_ty)
    starts = cols.to(tl.int64) * K  # the places of the rows of W
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(tl.program_id(1) * steps, tl.minimum((tl.program_id(1) + 1) * steps, K // (2 * BLOCK_K))):
        bytes_ = starts[:, None] // 2 + k * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # [BLOCK_N, BLOCK_K]
        pairs = tl.load(packed_ptr + bytes_, seen, other=0, eviction_policy="evict_first").to(tl.int32)
        pairs = tl.reshape(pairs, [BLOCK_N * BLOCK_K])
        first = tl.reshape(tl.gather(code, pairs >> 4, 0), [BLOCK_N, BLOCK_K])
        second = tl.reshape(tl.gather(code, pairs & 15, 0), [BLOCK_N, BLOCK_K])
        even = x_ptr + rows[:, None] * K + 2 * (k * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
        step = tl.dot(tl.load(even, live, other=0.0), tl.trans(first), input_precision=PRECISION)
        step = tl.dot(tl.load(even + 1, live, other=0.0), tl.trans(second), step, input_precision=PRECISION)
        blocks = (starts + 2 * k * BLOCK_K) // BLOCKSIZE
        acc += step * _absmax_of(
            absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, blocks, cols < N, DOUBLE
        )[None, :]  # fmt: skip
    places = (tl.program_id(1) * M + rows).to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(partial_ptr + places, acc, live & (cols < N)[None, :])


@triton.jit
def _add_splits(
    partial_ptr, bias_ptr, y_ptr, numel, N, SPLITS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
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
):  # fmt: skip
    # a row of the tile is a block of weights, HALF bytes; a thread takes 16 bytes and has one absmax for them
    rows = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    absmax = _absmax_of(
        absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, rows, rows < blocks, DOUBLE
    )  # fmt: skip
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
    w_ptr, bounds_ptr, order_ptr, packed_ptr, absmax_ptr, numel, blocks,
    HALF: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    places = rows[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]  # [BLOCKS, 2 HALF]
    w = tl.load(w_ptr + places, places < numel, other=0.0).to(tl.float32)
    # in the numbers' order, NaN above all: a float's maximum passes over it
    bits = tl.abs(w).to(tl.int32, bitcast=True)
    absmax = tl.max(bits, 1).to(tl.float32, bitcast=True)
    short = (rows + 1) * (2 * HALF) > numel  # the last block: a quotient there, elsewhere a product
    tl.store(absmax_ptr + rows, tl.where(short & (absmax == 0), 1e-38, absmax), rows < blocks)
    divisor = tl.where(absmax == 0, 1.0, absmax)
    scaled = tl.where(
        short[:, None],
        tl.div_rn(w, tl.broadcast_to(divisor[:, None], [BLOCKS, 2 * HALF])),
        w * tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), divisor)[:, None],
    )
    place = tl.zeros([BLOCKS, 2 * HALF], tl.int32)
    for i in tl.static_range(15):
        place += (scaled > tl.load(bounds_ptr + i)).to(tl.int32)
    order = tl.load(order_ptr + tl.arange(0, 16)).to(tl.int32)
    nibbles = tl.gather(order, tl.reshape(place, [BLOCKS * 2 * HALF]), 0)
    first, second = tl.split(tl.reshape(nibbles, [BLOCKS, HALF, 2]))
    places = rows[:, None] * HALF + tl.arange(0, HALF)[None, :]
    tl.store(packed_ptr + places, ((first << 4) | second).to(tl.uint8), 2 * places < numel)


# ---- autograd

FEW_ROWS = 64  # up to here a product reads W in its 4 bits; beyond, W is multiplied out and cuBLAS takes it
TILE = 4096  # bytes that one program multiplies out, 16 a thread


def _lookup(packed: Tensor, code: Tensor, absmax: Tensor, numel: int, blocksize: int) -> Tensor:
    """The CPU path: two values at a time, from a table of 256 bytes. (numel,) fp32."""
    nibbles = torch.arange(256)
    pairs = code[torch.stack((nibbles >> 4, nibbles & 15), -1)]  # (256, 2)
    values = F.embedding(packed.int(), pairs).flatten()
    whole = numel // blocksize * blocksize
    values[:whole].view(-1, blocksize).mul_(absmax[: whole // blocksize, None])
    if whole < numel:
        values[whole:].mul_(absmax[-1])
    return values[:numel]


def unnested(
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """absmax in fp32, (blocks,)."""
    if nested_absmax is None or nested_code is None or offset is None:
        return absmax
    nested = nested_absmax.repeat_interleave(NESTED)[: absmax.numel()]
    return nested_code[absmax.int()].mul_(nested).add_(offset)


@on_its_device  # references and CPU paths call it, too
def dequantize(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight of `shape` in `dtype`: one launch, or on a CPU table lookups."""
    if use_triton(packed):
        out = packed.new_empty(shape, dtype=dtype)
        if out.numel():
            half = blocksize // 2
            rows = max(1, TILE // half)
            _dequantize_fwd[(cdiv(absmax.numel(), rows),)](
                packed, absmax, code, nested_absmax, nested_code, offset, out,
                out.numel(), packed.numel(), absmax.numel(),
                nested_absmax is not None, half, rows, num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip
        return out
    absmax = unnested(absmax, nested_absmax, nested_code, offset)
    return _lookup(packed, code, absmax, prod(shape), blocksize).to(dtype).view(shape)


def dense_of(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A dense weight as it is; one in 4 bits multiplied out."""
    data, absmax, code, nested_absmax, nested_code, offset, shape, blocksize = weight
    if absmax is None or code is None:
        return data
    return dequantize(data, absmax, code, nested_absmax, nested_code, offset, shape, blocksize, dtype)


def multiplied_out(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    return dequantize(*weight.tensors(), [*weight.shape], weight.blocksize, dtype)


def product(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    N: int,
    blocksize: int,
) -> Tensor:
    """x W^T + bias (M, N), for x (M, K), contiguous, and W (N, K): few rows read W in its 4 bits."""
    M, K = x.shape
    four_bit = packed, absmax, code, nested_absmax, nested_code, offset
    step = min(blocksize, 64)
    if not use_triton(x) or M > FEW_ROWS or K % blocksize or 0 in (M, N, K):
        b = None if bias is None else bias.to(x.dtype)
        return F.linear(x, dequantize(*four_bit, [N, K], blocksize, x.dtype), b)
    block_n, warps = (32, 8) if x.dtype == torch.float32 else (64, 4)
    stages = 1 if capability(x) == (9, 4) else 4  # Triton 3.6 fails to pipeline this loop for an MI300X
    columns = cdiv(N, block_n)
    splits = max(1, min(cdiv(4 * multiprocessors(x), columns), K // step, 64))
    steps = cdiv(K // step, splits)
    splits = cdiv(K // step, steps)
    partial = x.new_empty(splits, M, N, dtype=torch.float32)
    _few_rows_fwd[(columns, splits)](
        x, *four_bit, partial, M, N, K, steps, nested_absmax is not None, blocksize, precision(),
        max(16, next_power_of_2(M)), block_n, step // 2, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    y = x.new_empty(M, N)
    _add_splits[(cdiv(M * N, 256),)](partial, bias, y, M * N, N, splits, bias is not None, 256, num_warps=4)
    return y


def _quantize(
    weight: Tensor, bounds: Tensor, order: Tensor, blocksize: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    packed, absmax = _quantize_fake(weight, bounds, order, blocksize)
    if absmax.numel():
        half = blocksize // 2
        rows = max(1, TILE // blocksize)
        _quantize_fwd[(cdiv(absmax.numel(), rows),)](
            weight, bounds, order, packed, absmax, weight.numel(), absmax.numel(), half, rows, num_warps=8
        )
    return packed, absmax


def _quantize_fake(weight, bounds, order, blocksize):
    n = weight.numel()
    absmax = weight.new_empty(cdiv(n, blocksize), dtype=torch.float32)
    return weight.new_empty(cdiv(n, 2), dtype=torch.uint8), absmax


def _dequantize_fake(packed, absmax, code, nested_absmax, nested_code, offset, shape, blocksize, dtype):
    return packed.new_empty(shape, dtype=dtype)


def _linear_fake(x, packed, absmax, code, nested_absmax, nested_code, offset, bias, N, blocksize):
    return x.new_empty(x.shape[0], N)


def _linear_backward(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    K: int,
    blocksize: int,
    with_dx: bool,
    with_dbias: bool,
) -> tuple[Tensor, Tensor]:
    """dx and dbias, each empty where it is not asked for."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    dx, dbias = dy.new_empty(0), dy.new_empty(0, dtype=wide)
    if with_dx:
        shape = [dy.shape[1], K]
        dx = dy @ dequantize(
            packed, absmax, code, nested_absmax, nested_code, offset, shape, blocksize, dy.dtype
        )
    if with_dbias:
        dbias = dy.sum(0, dtype=wide)
    return dx, dbias


def _linear_backward_fake(
    dy, packed, absmax, code, nested_absmax, nested_code, offset, K, blocksize, with_dx, with_dbias
):  # fmt: skip
    M, N = dy.shape
    wide = torch.promote_types(dy.dtype, torch.float32)
    return dy.new_empty((M, K) if with_dx else 0), dy.new_empty(N if with_dbias else 0, dtype=wide)


def _save(ctx, inputs, output):
    x, *four_bit, bias, _N, blocksize = inputs
    ctx.save_for_backward(*four_bit)
    ctx.numbers, ctx.bias_dtype = (x.shape[1], blocksize), None if bias is None else bias.dtype


def _differentiate(ctx, dy: Tensor):
    with_dx, with_dbias = ctx.needs_input_grad[0], ctx.needs_input_grad[7]
    dx, dbias = _nf4_backward(dy.contiguous(), *ctx.saved_tensors, *ctx.numbers, with_dx, with_dbias)
    return dx if with_dx else None, *[None] * 6, dbias.to(ctx.bias_dtype) if with_dbias else None, None, None


_nf4_backward = register("nf4_linear_backward", _linear_backward, _linear_backward_fake)
_nf4 = register("nf4_linear", product, _linear_fake, _save, _differentiate)
_dequantize = register("dequantize_nf4", dequantize, _dequantize_fake)
_quantize_4bit = register("quantize_nf4", _quantize, _quantize_fake)


# ---- public op


def quantize_nf4(
    weight: Tensor, *, blocksize: int = 64, quant_type: str = "nf4", double_quant: bool = True
) -> NF4Weight:
    """Round to 4 bits, in bitsandbytes' format and to its bits (fp4: which of two zeros may differ from its CUDA code).

    weight: any shape, fp32, bf16 or fp16; blocks run over it in row-major order
    blocksize: weights that share an absmax, a power of two from 32 to 4096    quant_type: "nf4" or "fp4"
    double_quant: absmax in 8 bits, too
    A number that is not finite makes its block NaN or infinite; with double_quant the whole weight, on any device.
    """
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize: expected one of {BLOCKSIZES}, got {blocksize}")
    if quant_type not in ORDER:
        raise ValueError(f"quant_type: expected one of {tuple(ORDER)}, got {quant_type!r}")
    check_dtype("weight", weight, *DTYPES)
    if not use_triton(weight):
        return quantize_nf4_reference(
            weight, blocksize=blocksize, quant_type=quant_type, double_quant=double_quant
        )
    flat = weight.detach().contiguous()
    packed, absmax = _quantize_4bit(flat, *_bounds(quant_type, weight.device), blocksize)
    return _held(weight, packed, absmax, _code(quant_type, weight.device), blocksize, double_quant)


def dequantize_nf4(weight: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight in `dtype`, or in the one that it had: code[nibble] * absmax in fp32, rounded once. No gradient."""
    if dtype is not None and dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    return _dequantize(*weight.tensors(), list(weight.shape), weight.blocksize, dtype or weight.dtype)


def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, W frozen; what is saved for the backward is W in its 4 bits.

    x: (..., in)    weight: shape (out, in)    bias: (out,), any float dtype
    Returns (..., out) in x's dtype, in which W is multiplied out.
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
    x = x.to(autocast_dtype(x))
    bias = None if bias is None else bias.contiguous()
    y = _nf4(x.reshape(-1, K).contiguous(), *weight.tensors(), bias, N, weight.blocksize)
    return y.view(*x.shape[:-1], N)
