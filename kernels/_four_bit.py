"""What nf4.py and lora.py share: a weight in 4 bits, and how it is multiplied out. The format is told in nf4.py."""

# A launch passes numbers where the kernel is annotated tl.constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false

from dataclasses import dataclass, fields, replace
from math import prod

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, use_triton

NESTED = 256  # blocks whose absmax share a nested absmax; also the size of the nested code
TILE = 4096  # bytes that one program multiplies out, 16 a thread


@dataclass(frozen=True)
class NF4Weight:
    """A weight of any shape in 4 bits. The tensors lie on one device; `to` moves them together."""

    packed: Tensor  # uint8 (numel / 2,), rounded up
    absmax: Tensor  # fp32 (blocks,), or uint8 where it is quantised itself
    code: Tensor  # fp32 (16,)
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the weight before, and of what dequantize_nf4 returns
    blocksize: int = 64
    nested_absmax: Tensor | None = None  # fp32 (blocks / 256,), rounded up
    nested_code: Tensor | None = None  # fp32 (256,)
    offset: Tensor | None = None  # fp32, 0-d

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
    return absmax


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
