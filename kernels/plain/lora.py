"""Dropout by a hash, and stacks of adapters, in plain torch: used by the CPU path and the references of lora.py.

For torch's products a stack is one wide adapter, A (adapters R, K) and B (N, adapters R). A row of S = x A^T then has R
numbers in the columns of its own adapter, and zeros elsewhere.

Source: the hash is lowbias32 of https://github.com/skeeto/hash-prospector
"""

import torch
from torch import Tensor

# ---- dropout


def mix(h: Tensor) -> Tensor:
    """Hash int32 numbers by a permutation of 32 bits that looks random.

    In int32, products wrap around and right shifts keep the sign, so shifted values are masked.
    """
    h = h ^ ((h >> 16) & 0xFFFF)
    h = h * 0x7FEB352D
    h = h ^ ((h >> 15) & 0x1FFFF)
    h = h * (0x846CA68B - (1 << 32))
    return h ^ ((h >> 16) & 0xFFFF)


def drop(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """Apply dropout to x (M, K).

    An element is kept, and divided by 1 - dropout, if its hash is at least `threshold(dropout)`.
    """
    low, high = mix(seed.int()), mix((seed >> 32).int() ^ 0x2545F491)
    rows = mix(torch.arange(x.shape[0], dtype=torch.int32, device=x.device) ^ low)
    columns = mix(torch.arange(x.shape[1], dtype=torch.int32, device=x.device) ^ high)
    kept = ((mix(rows[:, None] ^ columns) >> 8) & 0xFFFFFF) >= threshold(dropout)
    return torch.where(kept, x * (1 / (1 - dropout)), 0)


def threshold(dropout: float) -> int:
    return round(dropout * (1 << 24))


# ---- stacks


def wide_a(a: Tensor) -> Tensor:
    return a if a.ndim == 2 else a.flatten(0, 1)


def wide_b(b: Tensor) -> Tensor:
    return b if b.ndim == 2 else b.transpose(0, 1).flatten(1)


def scattered(S: Tensor, adapter: Tensor | None, adapters: int) -> Tensor:
    """Widen S from (M, R) to (M, adapters R).

    Each row's R numbers go to the columns of its adapter. Its other columns are zero.
    """
    if adapter is None:
        return S
    chosen = adapter[:, None] == torch.arange(adapters, device=S.device)  # (M, adapters)
    return (S[:, None] * chosen[:, :, None]).flatten(1)


def gathered(S: Tensor, adapter: Tensor | None, adapters: int) -> Tensor:
    """Pick the columns of each row's adapter from S (M, adapters R). Returns (M, R).

    A row without an adapter, or with an index that no adapter has, gives zeros.
    """
    if adapter is None:
        return S
    ids, R = adapter.long(), S.shape[1] // adapters
    known = ids.clamp(0, adapters - 1)
    chosen = S.view(-1, adapters, R).gather(1, known[:, None, None].expand(-1, 1, R))[:, 0]
    return chosen.masked_fill((ids != known)[:, None], 0)
