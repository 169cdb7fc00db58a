"""Records of tensors and numbers that always travel together, which ops and CPU paths take as one argument.

A record is a NamedTuple. Behind a public op it is made once; torch.library sees it laid out flat (_layout.py).
"""

from dataclasses import dataclass, fields, replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ._chip import FLOATS, cdiv

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED = 256  # blocks whose absmax share a nested absmax; also the size of the nested code


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
        self._check_part("absmax", blocks, *((torch.uint8,) if double else FLOATS))
        self._check_part("code", 16, *FLOATS)
        if double:
            self._check_part("nested_absmax", cdiv(blocks, NESTED), *FLOATS)
            self._check_part("nested_code", NESTED, *FLOATS)
            self._check_part("offset", 1, *FLOATS)

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
        """Bytes, those of the tables included: 64 bytes, and 1,028 more where absmax is quantised."""
        return sum(t.nbytes for t in self.tensors() if t is not None)

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.packed, self.absmax, self.code, self.nested_absmax, self.nested_code, self.offset

    def to(self, device: torch.device | str) -> "NF4Weight":
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: t.to(device) for n, t in held.items() if isinstance(t, Tensor)})


class Weight(NamedTuple):
    """A weight, dense or in 4 bits. Dense: `data` alone, blocksize 0. In 4 bits: what an NF4Weight holds."""

    data: Tensor  # dense (...); packed uint8 (numel / 2,)
    absmax: Tensor | None = None
    code: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: Tensor | None = None
    shape: list[int] = []  # noqa: RUF012  of a weight in 4 bits; a dense one has its own
    blocksize: int = 0

    @classmethod
    def of(cls, weight: "Tensor | NF4Weight") -> "Weight":
        if isinstance(weight, Tensor):
            return cls(weight)
        data, *tables = weight.tensors()
        assert data is not None
        return cls(data, *tables, shape=[*weight.shape], blocksize=weight.blocksize)


class Head(NamedTuple):
    """A linear head and what it is applied to: u = softcap tanh((hidden W^T + bias) / softcap) / temperature.

    Beside an adapter, `hidden` is (tokens, C + R): [h, scaling h A^T], which is multiplied with [W, B].
    """

    hidden: Tensor  # (tokens, C), or (tokens, C + R)
    weight: Tensor  # (V, C)
    lora_b: Tensor | None  # (V, R)
    bias: Tensor | None  # (V,)
    temperatures: Tensor | None  # (tokens,); where it is None, `temperature` is that of all
    temperature: float
    softcap: float | None
