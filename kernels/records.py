"""NamedTuples ("records") of tensors and numbers that ops and CPU paths take as one argument.

A public op builds records from its arguments. torch.library sees their fields as flat arguments (_layout.py).
"""

from dataclasses import dataclass, fields, replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ._chip import FLOATS, cdiv, check_shape

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED = 256  # the number of absmax values that share a nested absmax, and the size of the nested code


@dataclass(frozen=True)
class NF4Weight:
    """A weight of any shape, quantised to 4 bits. All tensors are on one device, and `to` moves them together.

    packed: uint8 (numel / 2,), rounded up, two values in each byte.
    absmax: fp32 (blocks,), or uint8 (blocks,) if it is quantised itself. A block has `blocksize` values.
    code: fp32 (16,), the values that the 4 bits stand for.
    shape, dtype: those of the weight before it was quantised. dequantize_nf4 returns this dtype.
    blocksize: a power of 2 from 32 to 4096.
    nested_absmax, nested_code, offset: given if absmax is quantised itself, else all None. nested_absmax is fp32
        (blocks / 256,), rounded up. nested_code is fp32 (256,). offset is a single fp32 number.

    Raises ValueError for any other value, and for parts whose sizes, dtypes or devices do not fit together. Kernels
    take every size from shape and blocksize.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocksize: int = 64
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize: expected one of {BLOCKSIZES}, got {self.blocksize}")
        if any(size < 0 for size in self.shape):
            raise ValueError(f"shape: expected no negative size, got {tuple(self.shape)}")
        if self.dtype not in FLOATS:
            raise ValueError(f"dtype: expected a floating-point dtype, got {self.dtype}")
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
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {part.stride()}")

    @property
    def quant_type(self) -> str:
        """The kind of code, "nf4" or "fp4". On a GPU, reading this property makes the host wait."""
        return "fp4" if self.code[0] == 0 else "nf4"

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes. `code` takes 64 bytes; `nested_code` and `offset`, if given, take 1,028."""
        return sum(t.nbytes for t in self.tensors() if t is not None)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return self.packed, self.absmax, self.code, self.nested_absmax, self.nested_code, self.offset

    def to(self, device: torch.device | str) -> "NF4Weight":
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: t.to(device) for n, t in parts.items() if isinstance(t, Tensor)})


class Weight(NamedTuple):
    """A weight, either dense or in 4 bits.

    A dense weight has only `data`, and blocksize 0. A weight in 4 bits has the fields of an NF4Weight.
    """

    data: Tensor  # the dense weight, or packed uint8 (numel / 2,)
    absmax: Tensor | None = None
    code: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: Tensor | None = None
    shape: list[int] = []  # noqa: RUF012  the shape of a weight in 4 bits; a dense weight leaves it empty
    blocksize: int = 0

    @classmethod
    def of(cls, weight: "Tensor | NF4Weight") -> "Weight":
        if isinstance(weight, Tensor):
            return cls(weight)
        return cls(*weight.tensors(), [*weight.shape], weight.blocksize)


class Head(NamedTuple):
    """A linear head and its input: u = softcap tanh((hidden W^T + bias) / softcap) / temperature.

    With an adapter, `hidden` is (tokens, C + R), the columns [h, scaling h A^T]. They are multiplied with [W, B].
    """

    hidden: Tensor  # (tokens, C), or (tokens, C + R)
    weight: Tensor  # (V, C)
    lora_b: Tensor | None  # (V, R)
    bias: Tensor | None  # (V,)
    temperatures: Tensor | None  # (tokens,); without it, all rows have `temperature`
    temperature: float
    softcap: float | None


# ---- attention


class Rules(NamedTuple):
    """The rules by which attention scores keys and hides them.

    The score of a query and a visible key is scale q.k. With a softcap it is softcap tanh(scale q.k / softcap).
    """

    causal: bool = True
    scale: float | None = None  # None: 1 / sqrt(D)
    window: int | None = None
    softcap: float | None = None


class Packing(NamedTuple):
    """cu_seqlens and parents, the int32 tables of packed sequences. Both are None in a call over a padded batch."""

    cu_seqlens: Tensor | None  # (segments + 1,)
    parents: Tensor | None  # (segments,)

    def check(self, total: int, causal: bool) -> None:
        """Raise ValueError if cu_seqlens or parents have a dtype or shape that does not fit a call of `total` rows.

        It also raises for parents without cu_seqlens, and for parents without causal attention. Values are not read.
        """
        cu_seqlens, parents = self
        if cu_seqlens is None:
            if parents is not None:
                raise ValueError("parents: expected cu_seqlens beside them, got None")
            return
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or not cu_seqlens.numel():
            got = f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
            raise ValueError(f"cu_seqlens: expected (segments + 1,) torch.int32, got {got}")
        if cu_seqlens.numel() == 1 and total:
            raise ValueError(f"cu_seqlens: expected two entries or more for total={total}, got one")

        if parents is not None:
            if not causal:
                raise ValueError("parents: expected causal=True, got causal=False")
            if parents.dtype != torch.int32:
                raise ValueError(f"parents: expected torch.int32, got {parents.dtype}")
            check_shape("parents", parents, segments=cu_seqlens.numel() - 1)


# ---- decode


class Cache(NamedTuple):
    """Cached keys and values, and the row of the cache that each sequence reads."""

    keys: Tensor  # (rows, S_max, G, D)
    values: Tensor  # (rows, S_max, G, Dv)
    slot: Tensor  # (B,), the row of each sequence; in a cache of prefixes, -1 for a sequence without a prefix
    length: Tensor  # (B,), the number of keys in that row


class Scores(NamedTuple):
    """The rules by which decode_attention computes scores. Unlike in `Rules`, the scale is always a number."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None  # (H,)


# ---- sample

TOP_P_WIDTH = 1024  # the number of most likely ids that top_p and min_p choose from without top_k


class Sampling(NamedTuple):
    """The rules of sample_tokens. A rule is None if it removes no ids."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None

    @classmethod
    def of(
        cls, V: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
    ) -> "Sampling":
        """Build the rules for a vocabulary of V ids. A top_k, top_p or min_p that removes no ids becomes None."""
        top_k = None if top_k is None or top_k >= V else top_k
        return cls(temperature, top_k, None if top_p == 1 else top_p, min_p or None)

    def width(self, V: int) -> int | None:
        """Return the width of the support, the ids that truncation keeps, or None if nothing is truncated."""
        truncated = self.top_k is not None or self.top_p is not None or self.min_p is not None
        return min(self.top_k or TOP_P_WIDTH, V) if truncated and self.temperature != 0 else None


# ---- lora


class Rows(NamedTuple):
    """The choice of a low-rank adapter for each row of x, and the dropout on x."""

    adapter: Tensor | None  # (M,), the index of each row's adapter in a stack, -1 for no adapter
    seed: Tensor | None  # 0-d int64, the seed of dropout; None without dropout
    dropout: float


# ---- moe


class ExpertLinear(NamedTuple):
    """A linear layer of every expert, with an optional adapter: y = x (W + B A)^T + bias."""

    weight: Weight  # (E, out, in)
    bias: Tensor | None  # (E, out)
    a: Tensor | None  # (E, R, in)
    b: Tensor | None  # (E, out, R)

    @property
    def sizes(self) -> list[int] | torch.Size:
        """The sizes of the weight: (experts, output features, input features)."""
        return self.weight.shape or self.weight.data.shape

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return (weight, bias, A, B), the tensors that may have a gradient. A missing one is None."""
        return self.weight.data, self.bias, self.a, self.b

    def contiguous(self) -> "ExpertLinear":
        if all(t is None or t.is_contiguous() for t in self.tensors()):
            return self
        others = (None if t is None else t.contiguous() for t in self[1:])
        return ExpertLinear(self.weight._replace(data=self.weight.data.contiguous()), *others)


class Experts(NamedTuple):
    """The feed-forward layers of all experts: E(x) = act(x W_gu^T + b_gu) W_d^T + b_d."""

    gate_up: ExpertLinear  # 2F output features, the gate's rows first; F for relu2
    down: ExpertLinear
    activation: str
    alpha: float  # alpha and limit are for clamped_swiglu
    limit: float
