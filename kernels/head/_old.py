"""Blocks of logits, of which there is never more than a memory budget holds: what ops on a linear head share.

    z = hidden W^T + bias        s = softcap tanh(z / softcap)        u = s / temperature

A block is some rows by some columns of the vocabulary. On a GPU a program of a kernel walks tiles of products; on a CPU
torch writes a block into one buffer, used again for the next.
"""

# Triton's launches and tuples are opaque to pyright
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._chip import (
    INTERPRET,
    autocast_dtype,
    capability,
    check_device,
    check_dtype,
    check_number,
    check_shape,
    multiprocessors,
    readable,
    use_triton,
    whole_number,
)
from .._triton import TensorDescriptor, tl, triton

# ---- kernels


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    # GROUP blocks of tokens stay in L2 while the vocabulary passes by
    group = tile // (GROUP * tiles_n)
    rows = tl.minimum(tiles_m - group * GROUP, GROUP)
    place = tile % (GROUP * tiles_n)
    return group * GROUP + place % rows, place // rows


@triton.jit
def _products(
    h, w, m, n, T, N, C, h_stride, w_stride,
    TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # h and w are descriptors with TMA, pointers without; what lies outside is 0
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
            a = tl.load(
                a_ptr + ks[None, :], (rows < T)[:, None] & (ks < C)[None, :], other=0.0
            )  # [BLOCK_M, BLOCK_K]
            b = tl.load(
                b_ptr + ks[:, None], (cols < N)[None, :] & (ks < C)[:, None], other=0.0
            )  # [BLOCK_K, BLOCK_N]
            z = tl.dot(a, b, z, input_precision=PRECISION)
    return z


@triton.jit
def _quarter(z, INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    # an epilogue on a quarter of the tile at a time: 128x256 then fits into sm_90's registers without spills
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
):  # fmt: skip
    # a tile of the logits' gradient, of whose columns `first` is the first; and its sum over the rows
    if WITH_DBIAS:
        sums = tl.sum(tl.where((rows < T)[:, None], d, 0.0), 0)
        tl.store(db_ptr + m.to(tl.int64) * N + cols, sums, cols < N)
    if TMA:
        dz.store([m * BLOCK_M, first], d.to(dz.dtype))
    else:
        at = dz + rows.to(tl.int64)[:, None] * dz_stride + cols[None, :]
        tl.store(at, d.to(dz.dtype.element_ty), (rows < T)[:, None] & (cols < N)[None, :])


# ---- reference


def scaled_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """u (tokens, vocabulary), all of it, in fp32 or fp64."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    z = hidden.to(wide) @ weight.to(wide).T
    if lora_a is not None and lora_b is not None:
        z = z + scaling * (hidden.to(wide) @ lora_a.to(wide).T) @ lora_b.to(wide).T
    if bias is not None:
        z = z + bias.to(wide)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)


# ---- blocks of logits

CPU_BUDGET = 2**23  # bytes; a block that stays in the caches: larger ones are slower
GPU_BUDGET = 2**28  # 16k columns of bf16 gradients at 8k tokens: on an H100, wider ones gain nothing
CPU_NARROWEST = 256  # columns, below which the products slow down; then fewer rows make a block
GPU_NARROWEST = 4096


def bytes_of(hidden: Tensor, copies: int) -> int:
    """What an element of a block takes: of its gradient, which Triton writes alone; in torch, of that many copies."""
    return hidden.itemsize if use_triton(hidden) else copies * max(4, hidden.itemsize)


def blocks_of(
    hidden: Tensor, vocabulary: int, memory_budget: int, size: int
) -> tuple[list[slice], list[slice]]:
    """Rows and columns of the blocks: all rows if their block is wide enough, and blocks of equal width.

    size: bytes that an element of a block takes.
    """
    tokens = hidden.shape[0]
    elements = memory_budget // size
    narrowest = GPU_NARROWEST if hidden.is_cuda else CPU_NARROWEST
    columns = min(vocabulary, max(narrowest, elements // max(tokens, 1)))
    columns = math.ceil(vocabulary / math.ceil(vocabulary / columns))
    columns = min(vocabulary, aligned(columns))
    return slices(tokens, max(1, elements // columns)), slices(vocabulary, columns)


def aligned(columns: int) -> int:
    """The stride of a block's rows: whole cache lines, which the matrix units load, whatever the vocabulary."""
    return (columns + 63) // 64 * 64


def slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a b into out, which may be wider than a and b."""
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def accumulate(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out + a b into out, which may be wider than a and b."""
    if out.dtype != a.dtype and a.is_cuda:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return out.addmm_(a.to(out.dtype), b.to(out.dtype))


CAST = 2**18  # elements of a head: their fp32 stays in a core's cache


def logits_of(
    hidden: Tensor, weight: Tensor, low: Tensor | None = None, lora_b: Tensor | None = None
) -> Tensor:
    """hidden W^T + low B^T, (tokens, vocabulary) in fp32, of operands in the dtype of `hidden`. No gradient.

    A GPU multiplies half precision into fp32. A CPU, where that is slow, widens a part of W at a time, never all of it.
    """
    V, C = weight.shape
    logits = hidden.new_empty(len(hidden), V, dtype=torch.promote_types(hidden.dtype, torch.float32))
    for columns in slices(V, V if hidden.is_cuda else max(1, CAST // C)):
        product(hidden, weight[columns].to(hidden.dtype).T, logits[:, columns])
        if low is not None and lora_b is not None:
            accumulate(low, lora_b[columns].to(hidden.dtype).T, logits[:, columns])
    return logits


# ---- blocks on a GPU


def tile_of(h: Tensor) -> dict[str, int]:
    """What a program computes, by architecture; on none of them does an epilogue spill (bench/static.json)."""
    if INTERPRET:
        return {"GROUP": 2, "BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 32}
    if h.dtype == torch.float32:
        return {"GROUP": 8, "BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    if capability(h) == (9, 4):
        return {"GROUP": 8, "BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if not has_tma(h):
        columns = (
            64 if capability(h)[0] in (9, 10) else 128
        )  # rows of odd bytes, which no copy to shared memory takes
        return {
            "GROUP": 8,
            "BLOCK_M": 128,
            "BLOCK_N": columns,
            "BLOCK_K": 32,
            "num_warps": 8,
            "num_stages": 3,
        }
    if capability(h)[0] == 10:
        return {"GROUP": 8, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
    return {"GROUP": 8, "BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}


def has_tma(h: Tensor) -> bool:
    """Half precision in rows of whole 16 bytes, on Hopper or a data centre's Blackwell (gfx942 calls itself 9.4)."""
    return h.itemsize == 2 and h.shape[1] % 8 == 0 and capability(h)[0] in (9, 10) and capability(h) != (9, 4)


def described(x: Tensor, block: list[int], tma: bool) -> Tensor | TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block) if tma else x


def grid_of(h: Tensor, N: int, tile: dict[str, int], tma: bool) -> tuple[int]:
    """One program a processor walks the tiles where a tile of 128x256 fills it; elsewhere one program a tile."""
    tiles = triton.cdiv(h.shape[0], tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"])
    return (min(tiles, multiprocessors(h)) if tma or INTERPRET else tiles,)  # pyright: ignore[reportReturnType]


# ---- blocks on a CPU


def operand(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x as the products take it: rows on end, and fp32 on the CPU, whose half precision is ten times slower."""
    wide = x.dtype if use_triton(x) else torch.promote_types(x.dtype, torch.float32)
    x = x.to(dtype or wide).contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()  # a descriptor starts at 16 bytes


def buffer_of(h: Tensor, row_blocks: list[slice], chunks: list[slice]) -> Tensor:
    """Room for the largest block."""
    return h.new_empty(row_blocks[0].stop * aligned(chunks[0].stop) if row_blocks else 0)


def block_of(buffer: Tensor, rows: slice, width: int) -> Tensor:
    height, stride = rows.stop - rows.start, aligned(width)
    return buffer[: height * stride].view(height, stride)[:, :width]


def scaled_(z, bias, temperatures, temperature, softcap):
    """u from raw products, in place."""
    if bias is not None:
        z += bias
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    if temperatures is not None:
        z.div_(temperatures[:, None])
    elif temperature != 1:
        z.div_(temperature)
    return z


def exponential(x: Tensor, out: Tensor | None = None) -> Tensor:
    """At least 1.6e-38: where no normal fp32 holds the result, torch's takes 15 to 50 times as long (AMD EPYC)."""
    return torch.clamp(x, min=-87, out=out).exp_()


def locate(targets: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """The target's column (rows, 1) in a chunk of the vocabulary, and (rows,) whether it is in the chunk at all."""
    column = targets - start
    return column.clamp(0, width - 1)[:, None], (column >= 0) & (column < width)


# ---- distributions


def divergence_of(log_t: Tensor, log_s: Tensor, beta: float) -> Tensor:
    """KL(t || s) at beta = 0, KL(s || t) at 1, between them beta KL(t || m) + (1 - beta) KL(s || m): (rows,).

    log_t, log_s (rows, n), log-probabilities, finite: -1e30 in both where there is nothing.
    """
    if beta == 0:
        return (log_t.exp() * (log_t - log_s)).sum(-1)
    if beta == 1:
        return (log_s.exp() * (log_s - log_t)).sum(-1)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log(1 - beta))
    of_teacher, of_student = ((log_p.exp() * (log_p - log_m)).sum(-1) for log_p in (log_t, log_s))
    return beta * of_teacher + (1 - beta) * of_student


# ---- gradients


def rows_of(weight: Tensor, lora_b: Tensor | None, columns: slice, dtype: torch.dtype) -> Tensor:
    """A chunk of the head, as the products take it. An adapter's B stands beside W: [h, s h A^T] [W, B]^T."""
    w = operand(weight[columns], dtype)
    return w if lora_b is None else operand(torch.cat((w, lora_b[columns].to(dtype)), 1))


def head_gradients(
    hidden: Tensor,
    weight: Tensor,
    lora_b: Tensor | None,
    bias: Tensor | None,
    memory_budget: int,
    size: int,
    fill: Callable[[slice, slice, Tensor, Tensor, Tensor | None, Tensor], Tensor],
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dhidden, dweight, dlora_b and dbias from the logits' gradient; each empty where `needs` does not ask for it.

    fill(rows, columns, h, w, b, dz) writes that of one block, (rows, columns), and returns its sum over the rows where
    dbias is asked for. A chunk of the vocabulary owns its rows of dW: they come out of one product, in fp32.
    """
    h, wide = operand(hidden), torch.promote_types(hidden.dtype, torch.float32)
    row_blocks, chunks = blocks_of(hidden, weight.shape[0], memory_budget, size)
    with_dhidden, with_dweight, with_dlora_b, with_dbias = needs
    dhidden = hidden.new_zeros(hidden.shape if with_dhidden else 0, dtype=wide)
    dweight = weight.new_empty(weight.shape if with_dweight else 0)
    b_like = weight if lora_b is None else lora_b
    dlora_b = b_like.new_empty(b_like.shape if with_dlora_b else 0)
    dbias = weight.new_zeros(weight.shape[0] if with_dbias else 0, dtype=wide)
    C = weight.shape[1]
    owned = [(dweight, h[:, :C])] * with_dweight + [(dlora_b, h[:, C:])] * with_dlora_b
    buffer = buffer_of(h, row_blocks, chunks)
    for columns in chunks:
        w, b = rows_of(weight, lora_b, columns, h.dtype), None if bias is None else bias[columns]
        outs = []  # a chunk's dw is one product where all rows are one block
        for dw, x in owned:
            whole = len(row_blocks) == 1 and dw.dtype in (h.dtype, wide)
            outs.append((dw[columns] if whole else h.new_zeros(w.shape[0], x.shape[1], dtype=wide), x, whole))
        for rows in row_blocks:
            dz = block_of(buffer, rows, w.shape[0])
            db = fill(rows, columns, h[rows], w, b, dz)
            if with_dhidden:
                accumulate(dz, w, dhidden[rows])
            for out, x, whole in outs:
                (product if whole else accumulate)(dz.T, x[rows], out)
            if with_dbias:
                dbias[columns] += db
        for (dw, _), (out, _, whole) in zip(owned, outs, strict=True):
            if not whole:
                dw[columns] = out
    return dhidden.to(hidden.dtype), dweight, dlora_b, dbias if bias is None else dbias.to(bias.dtype)


def head_gradients_fake(hidden, weight, lora_b, bias, needs):
    b_like = weight if lora_b is None else lora_b
    return (
        hidden.new_empty(hidden.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0),
        b_like.new_empty(b_like.shape if needs[2] else 0),
        (weight if bias is None else bias).new_empty(weight.shape[0] if needs[3] else 0),
    )


# ---- public op


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    prefix: str = "",
) -> None:
    """Raises ValueError for a head that does not fit its hidden states. prefix: of the arguments' names."""
    if hidden.ndim != 2 or hidden.shape[1] == 0:
        raise ValueError(f"{prefix}hidden: expected shape (tokens, hidden), got {tuple(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{prefix}weight: expected shape (vocabulary, hidden={hidden.shape[1]}), got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_shape(f"{prefix}bias", bias, vocabulary=weight.shape[0])
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{prefix}softcap: expected a finite number above 0, got {softcap}")
    _check_operands(hidden, prefix, hidden=hidden, weight=weight, bias=bias)


def _check_operands(like: Tensor, prefix: str, /, **operands: Tensor | None) -> None:
    check_device(like, **{f"{prefix}{name}": x for name, x in operands.items()})
    for name, x in operands.items():
        if x is not None:
            check_dtype(f"{prefix}{name}", x)


def check_adapter(
    hidden: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    prefix: str = "",
) -> None:
    check_number(f"{prefix}scaling", scaling)  # math.isfinite would break a graph with dynamic shapes
    if lora_a is None and lora_b is None:
        return
    if lora_a is None or lora_b is None:
        raise ValueError(f"{prefix}lora_a, {prefix}lora_b: expected both or neither")
    if lora_a.ndim != 2:
        raise ValueError(f"{prefix}lora_a: expected shape (rank, hidden), got {tuple(lora_a.shape)}")
    R = lora_a.shape[0]
    check_shape(f"{prefix}lora_a", lora_a, rank=R, hidden=hidden.shape[1])
    check_shape(f"{prefix}lora_b", lora_b, vocabulary=weight.shape[0], rank=R)
    _check_operands(hidden, prefix, lora_a=lora_a, lora_b=lora_b)


def checked_temperature(hidden: Tensor, temperature: float | Tensor) -> float | Tensor:
    """A number, or one of each row: there what is not above 0 raises ValueError on a CPU, and elsewhere is NaN."""
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
        return temperature
    check_shape("temperature", temperature, tokens=hidden.shape[0])
    check_device(hidden, temperature=temperature)
    if temperature.requires_grad:
        raise ValueError("temperature: it has no gradient here; pass temperature.detach()")
    if not temperature.is_floating_point():
        raise ValueError(f"temperature: expected a floating dtype, got {temperature.dtype}")
    if not readable(hidden):
        return torch.where(temperature > 0, temperature, torch.nan)
    check_rows("temperature", temperature, (temperature > 0) & temperature.isfinite(), "finite and above 0")
    return temperature


def check_rows(name: str, values: Tensor, right: Tensor, expected: str) -> None:
    """Raises ValueError naming the first row, of (tokens,), that is not right. It reads numbers on the host."""
    if not right.all():
        row = int((~right).nonzero()[0])
        raise ValueError(f"{name}: expected each row {expected}, got {values[row].item()} in row {row}")


def check_ids(name: str, ids: Tensor, vocabulary: int, counts: Tensor | None) -> None:
    """Raises ValueError for ids (tokens, K) outside a vocabulary, and for a row that counts and has one twice.

    Negative ids are padding; counts: (tokens,) bool, None for all. It reads numbers on the host.
    """
    if (ids >= vocabulary).any():
        raise ValueError(f"{name}: id {int(ids.max())} is outside a vocabulary of {vocabulary}")
    ordered = ids.sort(-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if counts is not None:
        twice &= counts[:, None]
    if twice.any():
        row, column = twice.nonzero()[0].tolist()
        raise ValueError(f"{name}: row {row} has id {int(ordered[row, column])} twice")


def check_budget(hidden: Tensor, memory_budget: int | None, times: int = 1) -> int:
    """Bytes: what was asked for, or what suits the device, so many times."""
    if memory_budget is None:
        return times * (GPU_BUDGET if hidden.is_cuda else CPU_BUDGET)
    budget = whole_number(memory_budget)
    if budget is None or budget <= 0:
        raise ValueError(f"memory_budget: expected a whole number of bytes above 0, got {memory_budget}")
    return budget


def cast(hidden: Tensor) -> Tensor:
    """Hidden states in autocast's dtype, where it is on."""
    return hidden.to(autocast_dtype(hidden))


def low_rank(hidden: Tensor, lora_a: Tensor, scaling: float) -> Tensor:
    """(tokens, R): what an adapter's B is multiplied with."""
    return scaling * (hidden @ lora_a.to(hidden.dtype).T)


def widened(hidden: Tensor, lora_a: Tensor | None, scaling: float) -> Tensor:
    """(tokens, C + R): an adapter is more columns of hidden, and of the weight (rows_of). No sum of the two is made."""
    return hidden if lora_a is None else torch.cat((hidden, low_rank(hidden, lora_a, scaling)), 1)


def split_temperature(temperature: float | Tensor, wide: torch.dtype) -> tuple[Tensor | None, float]:
    """One of each row, and a number for all where there are none: what a registered op takes."""
    if isinstance(temperature, Tensor):
        return temperature.to(wide).contiguous(), 1.0
    return None, float(temperature)


def check_mask(hidden: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        return
    check_shape("mask", mask, tokens=hidden.shape[0])
    check_device(hidden, mask=mask)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: expected bool, got {mask.dtype}")
