"""What nf4.py and lora.py share: a weight in 4 bits, multiplied out or in a product. The format is told in nf4.py."""

# A launch passes numbers where the kernel is annotated tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false

from dataclasses import dataclass, fields, replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import (
    FLOATS,
    capability,
    cdiv,
    multiprocessors,
    next_power_of_2,
    on_its_device,
    precision,
    use_triton,
)
from ._triton import tl, triton

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED = 256  # blocks whose absmax share a nested absmax; also the size of the nested code
FEW_ROWS = 64  # up to here a product reads W in its 4 bits; beyond, W is multiplied out and cuBLAS takes it
TILE = 4096  # bytes that one program multiplies out, 16 a thread


@dataclass(frozen=True)
class NF4Weight:
    """A weight of any shape in 4 bits. The tensors lie on one device; `to` moves them together.

    Raises ValueError for parts that do not belong together: kernels take every size from shape and blocksize.
    """

    packed: Tensor  # uint8 (numel / 2,), rounded up
    absmax: Tensor  # fp32 (blocks,), or uint8 where it is quantised itself
    code: Tensor  # fp32 (16,)
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the weight before, and of what dequantize_nf4 returns
    blocksize: int = 64
    nested_absmax: Tensor | None = None  # fp32 (blocks / 256,), rounded up
    nested_code: Tensor | None = None  # fp32 (256,)
    offset: Tensor | None = None  # fp32, 0-d

    def __post_init__(self) -> None:
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize: expected one of {BLOCKSIZES}, got {self.blocksize}")
        if any(size < 0 for size in self.shape):
            raise ValueError(f"shape: expected no negative size, got {tuple(self.shape)}")
        if self.dtype not in FLOATS:
            raise ValueError(f"dtype: expected that of a float, got {self.dtype}")
        double = self.nested_absmax is not None
        if (self.nested_code is not None, self.offset is not None) != (double, double):
            raise ValueError("nested_absmax, nested_code, offset: expected all three or none, got some")

        blocks = cdiv(self.numel, self.blocksize)
        self._check_part("packed", cdiv(self.numel, 2), torch.uint8)
        wide = torch.float32, torch.float64  # fp64 for references
        self._check_part("absmax", blocks, *((torch.uint8,) if double else wide))
        self._check_part("code", 16, *wide)
        if double:
            self._check_part("nested_absmax", cdiv(blocks, NESTED), *wide)
            self._check_part("nested_code", NESTED, *wide)
            self._check_part("offset", 1, *wide)

    def _check_part(self, name: str, numel: int, *dtypes: torch.dtype) -> None:
        part, device = getattr(self, name), self.packed.device
        if (part.numel(), part.device) != (numel, device) or part.dtype not in dtypes:
            raise ValueError(
                f"{name}: expected {numel} numbers of {dtypes[0]} on {device}, "
                f"got {part.numel()} of {part.dtype} on {part.device}"
            )
        if not part.is_contiguous():
            raise ValueError(f"{name}: expected it contiguous, got strides {part.stride()}")

    @property
    def quant_type(self) -> str:
        """ "nf4" or "fp4". It reads the code: on a GPU, the host waits."""
        return "fp4" if self.code[0] == 0 else "nf4"

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """With the tables: 64 bytes, and 1,028 more where absmax is quantised."""
        return sum(t.nbytes for t in self.tensors() if t is not None)

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.packed, self.absmax, self.code, self.nested_absmax, self.nested_code, self.offset

    def to(self, device: torch.device | str) -> "NF4Weight":
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: t.to(device) for n, t in held.items() if isinstance(t, Tensor)})


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
