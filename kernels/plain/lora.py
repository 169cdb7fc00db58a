"""Dropout by a hash, and stacks of adapters, in torch alone: what a CPU and the references of lora.py compute by.

torch's products take a stack as one wide adapter, A (adapters R, K) and B (N, adapters R), beside which a row of S has
its R numbers in the place of its own adapter and zeros elsewhere.

Source: the hash is lowbias32 of https://github.com/skeeto/hash-prospector
"""

import torch
from torch import Tensor

# ---- dropout


def mix(h: Tensor) -> Tensor:
    """A permutation of 32 bits that looks random, in int32, whose products wrap and whose shifts keep the sign."""
    h = h ^ ((h >> 16) & 0xFFFF)
    h = h * 0x7FEB352D
    h = h ^ ((h >> 15) & 0x1FFFF)
    h = h * (0x846CA68B - (1 << 32))
    return h ^ ((h >> 16) & 0xFFFF)


def drop(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """(M, K): the elements whose hash is not below `dropout`, divided by 1 - dropout."""
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
    """(M, R) -> (M, adapters R), zero but in the place of each row's adapter."""
    if adapter is None:
        return S
    chosen = adapter[:, None] == torch.arange(adapters, device=S.device)  # (M, adapters)
    return (S[:, None] * chosen[:, :, None]).flatten(1)


def gathered(S: Tensor, adapter: Tensor | None, adapters: int) -> Tensor:
    """(M, adapters R) -> (M, R), the place of each row's adapter; zero where it has none or one that is not there."""
    if adapter is None:
        return S
    ids, R = adapter.long(), S.shape[1] // adapters
    known = ids.clamp(0, adapters - 1)
    chosen = S.view(-1, adapters, R).gather(1, known[:, None, None].expand(-1, 1, R))[:, 0]
    return chosen.masked_fill((ids != known)[:, None], 0)
