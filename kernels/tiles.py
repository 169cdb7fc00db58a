"""The tile tables of every op: how much a program of a kernel computes, by chip.

A table has a row for each kind of chip (`chip_of`) and, where products without matrix units or without tensor
descriptors need tiles of their own, for these.
"""

from functools import cache
from typing import NamedTuple, TypeVar

from torch import Tensor

from ._chip import capability, next_power_of_2

T = TypeVar("T")


class Tile(NamedTuple):
    """The part of a result that a program computes at a time: [M, N] of a result, in steps of K."""

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


# ---- norm

NORM_WIDEST = 16384  # columns that the registers of one program hold; wider rows are read twice

# Times below: H100, bf16, 64 MB inputs, torch 2.11, Triton 3.6, best of the sweep against what lies near it.


def _norm_tile(N: int, elements: int) -> dict[str, int]:
    """[rows, columns]: one row, or several short ones."""
    block_n = next_power_of_2(N)
    return {"BLOCK_R": max(1, elements // block_n), "BLOCK_N": block_n}


@cache
def norm_forward(N: int, most_warps: int) -> dict[str, int]:
    if N <= 1024:
        warps = 4  # every width within 2 % of its best
    elif N <= 8192:
        warps = 8  # 2048: 46.0 us, 47.0 with 4 warps; 5120: 46.2 us, 49.1 with 16
    else:
        warps = most_warps  # 16384: 47.0 us with 32, 50.8 with 16
    return {**_norm_tile(N, 2048), "num_warps": warps}


@cache
def norm_backward(N: int, most_warps: int) -> dict[str, int]:
    """The tile of _rms_norm_bwd, and that of its programs for columns."""
    warps = 4 if N <= 1024 else 8 if N <= 2048 else 16 if N <= 8192 else most_warps
    return {
        **_norm_tile(N, 2048),
        "RELOAD": N > 4096,
        "DW_BLOCK_R": 128,
        "DW_BLOCK_N": 32,
        "num_warps": warps,
    }


@cache
def norm_walk(N: int, most_stages: int) -> tuple[int, dict[str, int]]:
    """Programs on each multiprocessor, and the tile."""
    if N <= 1024:  # 128: 69.6 us, 74.0 with [16, 128] taken twice by 4 warps; 1024: 71.2 us, 74.0
        per_sm, reload, stages, warps = 8, False, most_stages, 2
    elif N <= 2048:  # 2048: 72.4 us, 83.5 when the tile is taken twice
        per_sm, reload, stages, warps = 4, False, 1, 4
    elif N <= 4096:  # 4096: 74.0 us, 75.0 with 2 programs that hold the tile
        per_sm, reload, stages, warps = 4, True, 1, 8
    elif N <= 8192:  # 5120: 81.0 us, 87.3 with 4 programs of 16 warps; 8192: 75.4 us, 78.3
        per_sm, reload, stages, warps = 2, True, 1, 8
    else:  # 16384: 76.4 us, 83.3 with 4 programs, of which one is resident
        per_sm, reload, stages, warps = 1, True, 1, 16
    return per_sm, {**_norm_tile(N, 1024), "RELOAD": reload, "STAGES": stages, "num_warps": warps}


def norm_sum(P: int) -> dict[str, int]:
    """One look at all partial sums: the loop over them is a chain of loads that wait for each other."""
    if P <= 64:
        return {"BLOCK_P": 64, "BLOCK_N": 64, "num_warps": 8}
    if P <= 256:  # 132 x 16384: 3.6 us, 5.7 in blocks of 16 columns
        return {"BLOCK_P": 128, "BLOCK_N": 32, "num_warps": 4}
    return {"BLOCK_P": 512, "BLOCK_N": 16, "num_warps": 8}


NORM_FEW_ROWS = (
    2  # on each multiprocessor: up to here one launch that reads twice is faster than two launches
)
NORM_WIDE = {"BLOCK_N": 8192, "num_warps": 16}
NORM_WIDE_WEIGHT_GRAD = {"BLOCK_R": 16, "BLOCK_N": 128, "num_warps": 4}
