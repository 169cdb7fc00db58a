"""The tile tables of every op: how much a program of a kernel computes, by chip.

A table has a row for each kind of chip (`chip_of`) and, where products without matrix units or without tensor
descriptors need tiles of their own, for these.
"""

from functools import cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ._chip import capability, next_power_of_2, precision

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


def tile_width(width: int) -> int:
    """Columns of a tile that holds a row whole, of at least 16, as products ask for."""
    return max(16, next_power_of_2(width))


# ---- attention


class AttentionTiles(NamedTuple):
    """[M queries, N keys] of the three kernels."""

    fwd: Tile
    dq: Tile
    dkdv: Tile
    # where what packing, or a window or a softcap, holds in registers is too much for the tile above
    dkdv_packed: Tile | None = None
    dkdv_features: Tile | None = None
    dq_features: Tile | None = None  # a window or a softcap, with parents

    def of_dq(self, features: bool, parents: bool) -> Tile:
        return (features and parents and self.dq_features) or self.dq

    def of_dkdv(self, features: bool, packed: bool) -> Tile:
        return (features and self.dkdv_features) or (packed and self.dkdv_packed) or self.dkdv


def _attention(*three: tuple[int, ...], **others: tuple[int, ...]) -> AttentionTiles:
    """A row, each tile of which is written as (queries, keys, warps, stages)."""
    tiles = dict(zip(AttentionTiles._fields, three, strict=False)) | others
    return AttentionTiles(**{name: Tile(M, N, 0, *rest) for name, (M, N, *rest) in tiles.items()})


# By chip, then by the wider head dimension: the first row that is wide enough. None spills in bf16, whatever
# is combined, nor in fp32 on sm_90 (tests/bench/test_static.py); those of sm_80 and sm_100 are picked by that, untimed.
# What else could stand here: bench/candidates.json.
ATTENTION = {
    "sm_80": {
        # dQ: with 64 keys a softcap spills. dK/dV: with 64 keys any call does, with 32 three blocks fit; at 256 a
        # window, a softcap and a parent together do with 32 queries
        64: _attention((128, 64, 4, 3), (64, 32, 4, 3), (64, 32, 4, 3)),
        128: _attention((128, 32, 4, 3), (64, 32, 4, 2), (64, 64, 8, 2)),
        256: _attention((64, 64, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2), dkdv_features=(16, 64, 8, 2)),
    },
    # Timed on an H100. At D=64 and 128 two blocks of one warpgroup share a multiprocessor: one takes exponentials while
    # the other multiplies. At 256 only one block fits, and two warpgroups make up for it. dK/dV keeps 64 keys
    # throughout, the rows of a warpgroup's product, and takes fewer queries where registers are short; those were never
    # timed at 256, nor with a window or a softcap.
    "sm_90": {
        64: _attention(
            (64, 128, 4, 2),
            (64, 64, 4, 3),
            (128, 64, 4, 2),
            dkdv_packed=(64, 64, 4, 2),
            dkdv_features=(64, 64, 4, 2),
        ),
        128: _attention((64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2), dkdv_features=(32, 64, 4, 2)),
        256: _attention(
            (128, 64, 8, 2),
            (128, 32, 8, 3),
            (64, 64, 8, 2),
            dkdv_packed=(32, 64, 8, 2),
            dkdv_features=(16, 64, 8, 2),
            dq_features=(64, 32, 8, 3),
        ),
    },
    "sm_100": {
        64: _attention((128, 64, 4, 3), (128, 64, 4, 3), (64, 128, 8, 3)),
        128: _attention((128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2)),
        256: _attention((128, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2)),
    },
    # 99 KB of shared memory; compiled, never run
    "sm_86": {
        64: _attention((128, 64, 4, 3), (64, 32, 4, 3), (64, 32, 4, 3)),
        128: _attention((128, 32, 8, 3), (64, 32, 4, 2), (64, 64, 8, 2)),
        256: _attention((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    },
    # compiled, never run: they are picked because they do not spill
    "gfx942": {
        64: _attention((128, 64, 4, 3), (64, 64, 4, 3), (32, 64, 4, 1)),
        128: _attention((128, 32, 4, 3), (64, 64, 4, 2), (32, 64, 8, 1)),
        256: _attention((64, 32, 8, 2), (64, 16, 8, 1), (16, 32, 8, 1)),
    },
    # Products without matrix units: a thread holds whole rows of its operands, so tiles are small, and a second stage
    # keeps dQ's two from being held across the loop.
    "fp32": {
        64: _attention((64, 32, 8, 2), (32, 32, 4, 2), (32, 64, 8, 2)),
        128: _attention((32, 16, 8, 1), (16, 32, 8, 2), (16, 32, 8, 1)),
        256: _attention((32, 16, 8, 1), (16, 16, 8, 2), (16, 32, 8, 1)),
    },
    "interpreted": {256: _attention((32, 16, 4, 1), (32, 16, 4, 1), (16, 32, 4, 1))},
}
ATTENTION["sm_120"] = ATTENTION["sm_86"]
# TF32 has matrix units, whose operands lie in shared memory, here 99 KB: of "fp32", dK/dV at 256 would take 112 KB
ATTENTION["tf32"] = ATTENTION["fp32"] | {256: _attention((32, 16, 8, 1), (16, 16, 8, 2), (16, 16, 8, 1))}


def attention_tiles(q: Tensor, width: int) -> tuple[AttentionTiles, bool]:
    """The row for heads this wide, and whether the chip has tensor descriptors for them."""
    chip, half = chip_of(q), q.dtype != torch.float32
    name = chip
    if not half and chip != "interpreted":
        name = "tf32" if chip in ("sm_86", "sm_120") and precision() == "tf32" else "fp32"
    tiles = next(tiles for widest, tiles in ATTENTION[name].items() if width <= widest)
    # without matrix units a tile is held by rows, and spills
    return tiles, half and chip in ("sm_90", "sm_100")


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

_DEEP = Tile(128, 128, 64, warps=8, stages=3)
_SHALLOW = Tile(128, 64, 32, warps=4, stages=2)

# of the product with the base, whose accumulator starts from the adapter's
LORA_FUSED = {
    "fp32": Tile(64, 64, 32, warps=4, stages=2),
    "interpreted": _SHALLOW,
    "sm_80": _SHALLOW,
    "sm_86": _SHALLOW,
    "sm_90": _DEEP,
    "sm_100": _DEEP,
    "sm_120": _DEEP,
    "gfx942": _SHALLOW,
}


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

# of the product with few rows: M is their number, K at most half a block of weights, which are taken in pairs
NF4_PRODUCT = {
    "fp32": Tile(0, 32, warps=8, stages=4),
    "half": Tile(0, 64, warps=4, stages=4),
    # Triton 3.6 fails to pipeline this loop for an MI300X
    "gfx942, fp32": Tile(0, 32, warps=8, stages=1),
    "gfx942, half": Tile(0, 64, warps=4, stages=1),
}


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


# on each multiprocessor: up to here one launch that reads twice is faster than two launches
NORM_FEW_ROWS = 2
NORM_WIDE = {"BLOCK_N": 8192, "num_warps": 16}
NORM_WIDE_WEIGHT_GRAD = {"BLOCK_R": 16, "BLOCK_N": 128, "num_warps": 4}
