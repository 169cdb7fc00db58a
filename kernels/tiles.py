"""The tile tables of every op: how much a program of a kernel computes, by chip.

A table has a row for each kind of chip (`chip_of`) and, where products without matrix units or without tensor
descriptors need tiles of their own, for these.
"""

from functools import cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ._chip import capability, next_power_of_2

T = TypeVar("T")


class Tile(NamedTuple):
    """What a program computes at a time: [M, N] of a result, in steps of K."""

    M: int
    N: int
    K: int = 0  # 0: of a kernel without a third dimension, or whose third is the whole of an operand
    warps: int = 4
    stages: int = 1

    def launch(self) -> dict[str, int]:
        """The keyword arguments of a kernel that names its tile BLOCK_M, BLOCK_N, BLOCK_K."""
        blocks = {"BLOCK_M": self.M, "BLOCK_N": self.N, "BLOCK_K": self.K}
        return blocks | {"num_warps": self.warps, "num_stages": self.stages}


def chip_of(x: Tensor) -> str:
    """The kind of chip that x is on, as tables name it; "interpreted" where Triton interprets.

    "sm_80": A100. "sm_86": RTX 30 and 40, A10, A40, L4, L40S, with 99 KB of shared memory. "sm_90": Hopper. "sm_100": a
    data centre's Blackwell. "sm_120": RTX 50, with 99 KB, too. "gfx942": AMD's MI300X, with 64 KB.
    """
    chip = capability(x)
    if chip == (0, 0):
        return "interpreted"
    if chip == (9, 4):
        return "gfx942"
    if chip[0] == 8:
        return "sm_86" if chip in ((8, 6), (8, 9)) else "sm_80"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100", 12: "sm_120"}[chip[0]]


def row_of(table: dict[str, T], *names: str) -> T:
    """The row of the first of these names that the table has."""
    return next(table[name] for name in names if name in table)


def tile_width(size: int) -> int:
    """A side for a dimension that may be small; 16 is the least that tl.dot takes."""
    return max(16, next_power_of_2(size))


# ---- attention


# ---- decode


# ---- head


# ---- lora


# ---- moe

# Of a product over the rows of an expert, at most: M is no more than what an expert has on average, N is shared by the
# accumulators that a program holds.
MOE = {
    "fp32": Tile(64, 64, 32, warps=4, stages=2),
    "few rows": Tile(32, 128, 64, warps=4, stages=3),
    "gfx942": Tile(128, 128, 64, warps=8, stages=2),
    "any": Tile(128, 128, 64, warps=8, stages=3),
}
# Of a gradient of weights [M, N], at most, in steps of K rows.
MOE_WEIGHT_GRAD = {
    "fp32": Tile(64, 64, 32, warps=4, stages=2),
    "gfx942": Tile(128, 128, 64, warps=8, stages=2),
    "any": Tile(128, 128, 64, warps=8, stages=3),
}


def moe_tile(x: Tensor, block_m: int, *, accumulators: int = 1, width: int = 128) -> dict[str, int]:
    """The tile of a product. accumulators: how many it holds at once. width: the result's, if it may be a rank."""
    chip = "fp32" if x.dtype == torch.float32 else "few rows" if block_m < 64 else chip_of(x)
    return _moe_tile(chip, block_m, accumulators, width)


@cache
def _moe_tile(chip: str, block_m: int, accumulators: int, width: int) -> dict[str, int]:
    tile = row_of(MOE, chip, "any")
    M, N = min(tile.M, block_m), min(tile.N // accumulators, tile_width(width))
    return tile._replace(M=M, N=N).launch()


def moe_weight_tile(x: Tensor, N: int, C: int) -> dict[str, int]:
    """The tile of a gradient (N, C), either of which may be a rank."""
    tile = row_of(MOE_WEIGHT_GRAD, "fp32" if x.dtype == torch.float32 else chip_of(x), "any")
    blocks = {"BLOCK_R": tile.K, "BLOCK_N": min(tile.M, tile_width(N)), "BLOCK_C": min(tile.N, tile_width(C))}
    return blocks | {"num_warps": tile.warps if min(N, C) > 64 else 4, "num_stages": tile.stages}


# ---- nf4
