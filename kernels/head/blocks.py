"""Blocks of logits, shared by the ops on a linear head. A block never takes more than a memory budget.

    z = hidden W^T + bias        s = softcap tanh(z / softcap)        u = s / temperature

A block is some rows by some columns of the vocabulary, and is itself a Head. `chunk_of` selects columns and `rows_of`
selects rows. On a GPU the programs of a kernel compute the tiles of the products. On a CPU torch writes each block into
the same buffer.
"""

# Triton's launches and tuples are opaque to pyright
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._chip import (
    INTERPRET,
    capability,
    cdiv,
    multiprocessors,
    precision,
    use_triton,
)
from .._triton import TensorDescriptor, tl, triton
from ..records import Head
from ..tiles import HEAD, Tile, chip_of, row_of

# ---- kernels

# fmt: off


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    # (row, column) of a tile, ordered so that GROUP blocks of tokens stay in L2 while the vocabulary is walked
    group = tile // (GROUP * tiles_n)
    rows = tl.minimum(tiles_m - group * GROUP, GROUP)
    place = tile % (GROUP * tiles_n)
    return group * GROUP + place % rows, place // rows


@triton.jit
def _products(
    h, w, m, n, T, N, C, h_stride, w_stride,
    TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # h and w are descriptors with TMA, and pointers without; elements outside are 0
    z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if TMA:
        for k in range(0, C, BLOCK_K):
            z = tl.dot(h.load([m * BLOCK_M, k]), w.load([n * BLOCK_N, k]).T, z, input_precision=PRECISION)
    else:
        rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
        a_ptr = h + rows.to(tl.int64)[:, None] * h_stride
        b_ptr = w + cols.to(tl.int64)[None, :] * w_stride

        for k in range(0, C, BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            a = tl.load(a_ptr + ks[None, :], (rows < T)[:, None] & (ks < C)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
            b = tl.load(b_ptr + ks[:, None], (cols < N)[None, :] & (ks < C)[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
            z = tl.dot(a, b, z, input_precision=PRECISION)
    return z


@triton.jit
def _quarter(z, INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    # the epilogue works on a quarter of the tile at a time, so that 128x256 fits into sm_90's registers without spills
    half = tl.split(tl.permute(tl.reshape(z, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))[INDEX // 2]
    return tl.split(tl.permute(tl.reshape(half, (BLOCK_M, 2, BLOCK_N // 4)), (0, 2, 1)))[INDEX % 2]


@triton.jit
def _scaled(z, bias_ptr, cols, N, sharpness, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    if HAS_BIAS:
        z += tl.load(bias_ptr + cols, cols < N, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        z = softcap - 2 * softcap / (tl.exp(z * (2 / softcap)) + 1)  # tanh
    return z * sharpness


@triton.jit
def _sharpness(temperature_ptr, rows, T, temperature, HAS_TEMPERATURES: tl.constexpr):
    if HAS_TEMPERATURES:
        sharpness = 1 / tl.load(temperature_ptr + rows, rows < T, other=1.0)[:, None]  # [BLOCK_M, 1]
    else:
        sharpness = 1 / temperature
    return sharpness


@triton.jit
def _store_gradient(
    d, dz, db_ptr, m, first, rows, cols, T, N, dz_stride,
    WITH_DBIAS: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr,
):
    # d is a tile of the logits' gradient, from column `first` on; dbias is its sum over the rows
    if WITH_DBIAS:
        sums = tl.sum(tl.where((rows < T)[:, None], d, 0.0), 0)
        tl.store(db_ptr + m.to(tl.int64) * N + cols, sums, cols < N)

    if TMA:
        dz.store([m * BLOCK_M, first], d.to(dz.dtype))
    else:
        dz_ptr = dz + rows.to(tl.int64)[:, None] * dz_stride + cols[None, :]
        tl.store(dz_ptr, d.to(dz.dtype.element_ty), (rows < T)[:, None] & (cols < N)[None, :])

# fmt: on


# ---- launch

GROUP = 2 if INTERPRET else 8  # blocks of tokens


def has_tma(h: Tensor) -> bool:
    """Return whether the kernels load h through tensor descriptors (TMA).

    TMA is used for half precision and rows of a multiple of 16 bytes, on Hopper or Blackwell for data centres. AMD's
    gfx942 is excluded explicitly, because its capability (9, 4) looks like that of Hopper.
    """
    return h.itemsize == 2 and h.shape[1] % 8 == 0 and capability(h)[0] in (9, 10) and capability(h) != (9, 4)


def tile_of(h: Tensor) -> Tile:
    """Return the tile of u, the scaled logits, that one program computes without spilling (bench/static.json)."""
    if INTERPRET:
        return HEAD["interpreted"]
    if h.dtype == torch.float32:
        return HEAD["fp32"]
    chip = chip_of(h)
    return HEAD[chip] if has_tma(h) else row_of(HEAD, f"{chip} without TMA", chip)


def described(x: Tensor, block: list[int], tma: bool) -> Tensor | TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block) if tma else x


def grid_of(h: Tensor, N: int, tile: Tile, tma: bool) -> tuple[int]:
    """Return the grid of a kernel that computes logits of all rows of h and N columns.

    With TMA each multiprocessor has one program that loops over tiles, because a tile of 128x256 fills a
    multiprocessor. Otherwise each tile has its own program.
    """
    tiles = cdiv(h.shape[0], tile.M) * cdiv(N, tile.N)
    return (min(tiles, multiprocessors(h)) if tma or INTERPRET else tiles,)


def launch_arguments(block: Head, tile: Tile, tma: bool) -> dict[str, Any]:
    """Return the kernel arguments that describe a block, under the names that all kernels of this folder use."""
    h, w, _, bias, temperatures, temperature, softcap = block
    (T, C), N = h.shape, w.shape[0]

    # one dict that grows: merging several costs microseconds of the host
    arguments: dict[str, Any] = {"TMA": tma, "PRECISION": precision(), "GROUP": GROUP, **tile.launch()}
    arguments |= {"h": described(h, [tile.M, tile.K], tma), "w": described(w, [tile.N, tile.K], tma)}
    arguments |= {"T": T, "N": N, "C": C, "h_stride": h.stride(0), "w_stride": w.stride(0)}
    arguments |= {"bias_ptr": bias, "HAS_BIAS": bias is not None}
    arguments |= {"softcap": softcap or 1.0, "HAS_SOFTCAP": softcap is not None}
    arguments |= {"temperature": temperature, "temperature_ptr": temperatures}
    return arguments | {"HAS_TEMPERATURES": temperatures is not None}


# ---- a head and its blocks

CPU_NARROWEST = 256  # the fewest columns of a block, because narrower products are slow
GPU_NARROWEST = 4096


def bytes_of(hidden: Tensor, copies: int) -> int:
    """Return the bytes of memory that one element of a block takes.

    On the Triton path only the gradient of a block is in memory. On the torch path there are `copies` tensors of the
    block's size, in fp32 or wider.
    """
    return hidden.itemsize if use_triton(hidden) else copies * max(4, hidden.itemsize)


def blocks_of(head: Head, memory_budget: int, size: int) -> tuple[list[slice], list[slice]]:
    """Return (rows, columns), the slices that cut a head into blocks of equal width within the memory budget.

    A block has all rows, unless it would then have too few columns. size: the bytes that an element of a block takes.
    """
    tokens, V = head.hidden.shape[0], head.weight.shape[0]
    elements = memory_budget // size
    narrowest = GPU_NARROWEST if head.hidden.is_cuda else CPU_NARROWEST
    columns = min(V, max(narrowest, elements // max(tokens, 1)))
    columns = min(V, aligned(math.ceil(V / math.ceil(V / columns))))
    return slices(tokens, max(1, elements // columns)), slices(V, columns)


def aligned(columns: int) -> int:
    """Return the row stride of a block: its columns, rounded up to whole cache lines to suit the matrix units."""
    return (columns + 63) // 64 * 64


def slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def part_of(x: Tensor, part: slice) -> Tensor:
    """Return the rows `part` of x. For all rows return x itself, because making a view costs the host a microsecond."""
    return x if part.stop - part.start == x.shape[0] else x[part]


def operand(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return x as the products take it: contiguous, aligned to 16 bytes, and in `dtype`.

    The default dtype is that of x on the Triton path, and fp32 on the CPU, where half precision would be ten times
    slower. fp64 stays fp64.
    """
    dtype = dtype or (x.dtype if use_triton(x) else torch.promote_types(x.dtype, torch.float32))
    x = (x if x.dtype == dtype else x.to(dtype)).contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()  # a descriptor's address is a multiple of 16


def with_operand(head: Head) -> Head:
    hidden = operand(head.hidden)
    return head if hidden is head.hidden else head._replace(hidden=hidden)


def chunk_of(head: Head, columns: slice) -> Head:
    """Return the part of a head for some columns of the vocabulary. Its hidden states must have gone through `operand`.

    If the head has an adapter, its B is appended to W as additional columns: [h, scaling h A^T] [W, B]^T.
    """
    hidden, weight, lora_b, bias, temperatures, temperature, softcap = head
    w, dtype = operand(part_of(weight, columns), hidden.dtype), hidden.dtype
    if lora_b is not None:
        w = operand(torch.cat((w, lora_b[columns].to(dtype)), 1))
    b = None if bias is None else part_of(bias, columns)
    return Head(hidden, w, None, b, temperatures, temperature, softcap)


def rows_of(head: Head, rows: slice) -> Head:
    hidden, weight, lora_b, bias, temperatures, temperature, softcap = head
    temperatures = None if temperatures is None else part_of(temperatures, rows)
    return Head(part_of(hidden, rows), weight, lora_b, bias, temperatures, temperature, softcap)


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write the matrix product a b to `out`, and return it. The dtype of `out` may be wider than that of a and b."""
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def accumulate(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Add the matrix product a b to `out`, and return it. The dtype of `out` may be wider than that of a and b."""
    if out.dtype != a.dtype and a.is_cuda:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return out.addmm_(a.to(out.dtype), b.to(out.dtype))


CAST = 2**18  # elements of the weight cast at a time, whose fp32 copy stays in a core's cache


def logits_of(
    hidden: Tensor, weight: Tensor, low: Tensor | None = None, lora_b: Tensor | None = None
) -> Tensor:
    """Compute hidden W^T + low B^T, (tokens, V), in at least fp32, without a gradient.

    W and B are cast to the dtype of `hidden`. A GPU multiplies half precision and accumulates in fp32. A CPU would be
    slow at that, so it widens a part of W at a time.
    """
    V, C = weight.shape
    logits = hidden.new_empty(len(hidden), V, dtype=torch.promote_types(hidden.dtype, torch.float32))
    for columns in slices(V, V if hidden.is_cuda else max(1, CAST // C)):
        product(hidden, weight[columns].to(hidden.dtype).T, logits[:, columns])
        if low is not None and lora_b is not None:
            accumulate(low, lora_b[columns].to(hidden.dtype).T, logits[:, columns])
    return logits


# ---- blocks in torch


def buffer_of(h: Tensor, row_blocks: list[slice], chunks: list[slice]) -> Tensor:
    """Return a flat buffer that has room for the largest block."""
    return h.new_empty(row_blocks[0].stop * aligned(chunks[0].stop) if row_blocks else 0)


def block_of(buffer: Tensor, rows: slice, width: int) -> Tensor:
    height, stride = rows.stop - rows.start, aligned(width)
    return buffer.as_strided((height, width), (stride, 1))


def scaled_(z: Tensor, block: Head) -> Tensor:
    """Compute u from the raw products z of this block, in place: add the bias, apply softcap and temperature."""
    if block.bias is not None:
        z += block.bias
    if block.softcap is not None:
        z.div_(block.softcap).tanh_().mul_(block.softcap)
    return _tempered_(z, block)


def _tempered_(x: Tensor, block: Head) -> Tensor:
    if block.temperatures is not None:
        x.div_(block.temperatures[:, None])
    elif block.temperature != 1:
        x.div_(block.temperature)
    return x


def softcap_slope(u: Tensor, block: Head) -> Tensor | None:
    """Return ds/dz = 1 - (s / softcap)^2 for this block's u, or None without a softcap."""
    if block.softcap is None:
        return None
    temperature = block.temperature if block.temperatures is None else block.temperatures[:, None]
    return (u * temperature).div_(block.softcap).square_().neg_().add_(1)


def unscaled_(du: Tensor, slope: Tensor | None, block: Head) -> Tensor:
    """Compute dz from du in place: du ds/dz / temperature."""
    _tempered_(du, block)
    return du if slope is None else du.mul_(slope)


def exponential(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute exp(x) with x clamped to at least -87, so that the result is at least 1.6e-38.

    For a result below the normal fp32 numbers, torch's exp takes 15 to 50 times as long (measured on an AMD EPYC).
    """
    return torch.clamp(x, min=-87, out=out).exp_()


def locate(targets: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Return (column, inside) for targets in a chunk of the vocabulary that begins at `start`.

    column: (rows, 1), the target's column, clamped to the chunk.
    inside: (rows,) bool, whether the target is in the chunk.
    """
    column = targets - start
    return column.clamp(0, width - 1)[:, None], (column >= 0) & (column < width)


# ---- gradients


class HeadGradients(NamedTuple):
    """The gradients of an op whose argument `head` is a Head. A gradient that is not asked for is None."""

    head_hidden: Tensor | None
    head_weight: Tensor | None
    head_lora_b: Tensor | None
    head_bias: Tensor | None


def head_gradients(
    head: Head,
    needs: Any,
    memory_budget: int,
    size: int,
    fill: Callable[[Head, slice, slice, Tensor], Tensor],
) -> HeadGradients:
    """Compute the gradients of a head from the gradient of its logits, block by block.

    fill(block, rows, columns, dz): writes dz (rows, columns) of one block. It returns the sum of dz over the rows if
        dbias is asked for.
    size: the bytes that an element of a block takes.

    Each chunk of the vocabulary has its own rows of dW. If a block has all tokens, one product computes these rows.
    Otherwise the products of the blocks are summed in fp32.
    """
    operands, wide = with_operand(head), torch.promote_types(head.hidden.dtype, torch.float32)
    h, weight, lora_b = operands.hidden, head.weight, head.lora_b
    V, C = weight.shape
    row_blocks, chunks = blocks_of(head, memory_budget, size)

    dhidden = h.new_zeros(h.shape, dtype=wide) if needs.head_hidden else None
    dweight = weight.new_empty(weight.shape) if needs.head_weight else None
    dlora_b = lora_b.new_empty(lora_b.shape) if lora_b is not None and needs.head_lora_b else None
    dbias = weight.new_zeros(V, dtype=wide) if needs.head_bias else None
    sides = [(dw, x) for dw, x in ((dweight, h[:, :C]), (dlora_b, h[:, C:])) if dw is not None]
    buffer = buffer_of(h, row_blocks, chunks)

    for columns in chunks:
        chunk = chunk_of(operands, columns)
        w = chunk.weight

        # a chunk's dW is one product if one block has all rows; otherwise it is summed in fp32
        outs = []
        for dw, x in sides:
            direct = len(row_blocks) == 1 and dw.dtype in (h.dtype, wide)
            out = part_of(dw, columns) if direct else h.new_zeros(w.shape[0], x.shape[1], dtype=wide)
            outs.append((out, x, product if direct else accumulate))

        for rows in row_blocks:
            dz = block_of(buffer, rows, w.shape[0])
            db = fill(rows_of(chunk, rows), rows, columns, dz)
            if dhidden is not None:
                accumulate(dz, w, part_of(dhidden, rows))
            for out, x, write in outs:
                write(dz.T, part_of(x, rows), out)
            if dbias is not None:
                dbias[columns] += db

        for (dw, _), (out, _, write) in zip(sides, outs, strict=True):
            if write is accumulate:
                dw[columns] = out

    return HeadGradients(
        None if dhidden is None else dhidden.to(head.hidden.dtype),
        dweight,
        dlora_b,
        dbias if dbias is None or head.bias is None else dbias.to(head.bias.dtype),
    )
