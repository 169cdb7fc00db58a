"""The tile tables of every op: how much a program of a kernel computes, by chip.

A table has a row for each kind of chip (`chip_of`) and, where products without matrix units or without tensor
descriptors need tiles of their own, for these.
"""

from typing import NamedTuple, TypeVar

from torch import Tensor

from ._chip import capability

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
    return {9: "sm_90", 10: "sm_100", 12: "sm_120"}[chip[0]]


def row_of(table: dict[str, T], *names: str) -> T:
    """The row of the first of these names that the table has."""
    return next(table[name] for name in names if name in table)


# ---- attention


# ---- decode


# ---- head

# a head's logits; of rows whose bytes are no multiple of 16, which no tensor descriptor takes, "without TMA"
HEAD = {
    "interpreted": Tile(16, 128, 32),
    "fp32": Tile(64, 32, 16, stages=2),
    "sm_80": Tile(128, 128, 32, warps=8, stages=3),
    "sm_86": Tile(128, 128, 32, warps=8, stages=3),
    "sm_90": Tile(128, 256, 64, warps=8, stages=4),
    "sm_90 without TMA": Tile(128, 64, 32, warps=8, stages=3),
    "sm_100": Tile(128, 128, 64, stages=4),
    "sm_100 without TMA": Tile(128, 64, 32, warps=8, stages=3),
    "sm_120": Tile(128, 128, 32, warps=8, stages=3),
    "gfx942": Tile(128, 64, 32, stages=2),
}

# two heads' logits: two accumulators, so half of the tile above. With the stages of the others sm_120 spills; on Hopper
# the gradient of a mixture takes half of the tile again
DIVERGENCE = {
    "interpreted": Tile(16, 128, 32),
    "fp32": Tile(32, 32, 16, stages=2),
    "sm_120 fp32": Tile(32, 32, 16, stages=3),
    "sm_80": Tile(128, 64, 32, warps=8, stages=3),
    "sm_86": Tile(128, 64, 32, warps=8, stages=3),
    "sm_90": Tile(128, 128, 64, warps=8, stages=3),
    "sm_90 mixture": Tile(128, 64, 64, warps=8, stages=3),
    "sm_90 without TMA": Tile(128, 64, 32, warps=8, stages=3),
    "sm_100": Tile(128, 128, 64, warps=8, stages=3),
    "sm_100 without TMA": Tile(128, 64, 32, warps=8, stages=3),
    "sm_120": Tile(128, 64, 32, warps=8, stages=2),
    "gfx942": Tile(64, 64, 32, stages=2),
}


# ---- lora


# ---- moe


# ---- nf4
