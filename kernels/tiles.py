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

# by the wider head dimension, padded: the first entry that is wide enough. M: rows, at least, of a tile of sequences
# that share a prefix. N: keys
_DECODE_SMALL = {
    64: Tile(16, 64, warps=8, stages=3),
    128: Tile(16, 32, stages=3),
    256: Tile(16, 16, warps=8, stages=3),
}
_DECODE_LARGE = {64: Tile(16, 64, stages=3), 128: Tile(16, 32, stages=3), 256: Tile(16, 16, stages=3)}
DECODE = {
    "sm_80": _DECODE_SMALL,
    "sm_86": _DECODE_SMALL,
    "sm_90": _DECODE_LARGE,
    "sm_100": _DECODE_LARGE,
    "sm_120": _DECODE_SMALL,  # untimed, as on sm_86; with 4 warps two of them spill
    "gfx942": _DECODE_LARGE,
    "fp32": {width: Tile(16, keys, warps=8, stages=2) for width, keys in ((64, 64), (128, 32), (256, 16))},
    "interpreted": {256: Tile(16, 16)},
}


# ---- head


# ---- lora


# ---- moe


# ---- nf4
