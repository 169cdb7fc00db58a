"""The tile tables of all ops: how much of a result one program of a kernel computes, for each chip.

A table has one row for each kind of chip (`chip_of`). More rows follow for products without matrix units or without
tensor descriptors, where these need tiles of their own.
"""

from functools import cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ._chip import capability, next_power_of_2, precision

T = TypeVar("T")


class Tile(NamedTuple):
    """The part of a result that a program computes at a time: [M, N], in steps of K."""

    M: int
    N: int
    K: int = 0  # 0 if the kernel has no third dimension, or always takes all of it
    warps: int = 4
    stages: int = 1

    def launch(self) -> dict[str, int]:
        """Return the tile as keyword arguments for a kernel: BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages."""
        blocks = {"BLOCK_M": self.M, "BLOCK_N": self.N, "BLOCK_K": self.K}
        return blocks | {"num_warps": self.warps, "num_stages": self.stages}


def chip_of(x: Tensor) -> str:
    """Return the kind of chip that x is on, as the tables name it, or "interpreted" under Triton's interpreter.

    "sm_80": A100. "sm_86": RTX 30 and 40, A10, A40, L4 and L40S, with 99 KB of shared memory. "sm_90": Hopper.
    "sm_100": Blackwell for data centres. "sm_120": RTX 50, also with 99 KB. "gfx942": AMD's MI300X, with 64 KB.
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
    """Return the row of a table for the first of these names that it has. Raises KeyError if it has none."""
    found = next((name for name in names if name in table), None)
    if found is None:
        raise KeyError(f"expected a row of tiles for {' or '.join(names)}, got {', '.join(table)}")
    return table[found]


def tile_width(width: int) -> int:
    """Return the number of columns of a tile that holds a whole row: a power of 2, at least 16, as products require."""
    return max(16, next_power_of_2(width))


# ---- attention


class AttentionTiles(NamedTuple):
    """The tiles, [M queries, N keys], of the three attention kernels: forward, dQ, and dK/dV.

    A chip's row is for fp16 and bf16. fp32 has rows of its own on every chip.
    """

    fwd: Tile
    dq: Tile
    dkdv: Tile
    # smaller tiles, where packing, or a window or softcap, needs too many registers for the tile above
    dkdv_packed: Tile | None = None
    dkdv_features: Tile | None = None
    dq_features: Tile | None = None  # for a window or a softcap together with parents

    def of_dq(self, features: bool, parents: bool) -> Tile:
        return (features and parents and self.dq_features) or self.dq

    def of_dkdv(self, features: bool, packed: bool) -> Tile:
        return (features and self.dkdv_features) or (packed and self.dkdv_packed) or self.dkdv


def _attention(*three: tuple[int, ...], **others: tuple[int, ...]) -> AttentionTiles:
    """Build a row of the attention table from tiles written as (queries, keys, warps, stages)."""
    tiles = dict(zip(AttentionTiles._fields, three, strict=False)) | others
    return AttentionTiles(**{name: Tile(M, N, 0, *rest) for name, (M, N, *rest) in tiles.items()})


# By chip, then by the wider head dimension: the first row that is wide enough applies. No tile spills registers in
# bf16 with any combination of features, nor in fp32 on sm_90 (tests/bench/test_static.py). The tiles of sm_80 and
# sm_100 were chosen by that rule alone, and not timed. Other possible tiles are in bench/candidates.json.
ATTENTION = {
    "sm_80": {
        # dQ: with 64 keys, a call with a softcap spills. dK/dV: with 64 keys, every call spills; with 32 keys, three
        # blocks fit. At 256, a call with a window, a softcap and a parent spills with 32 queries
        64: _attention((128, 64, 4, 3), (64, 32, 4, 3), (64, 32, 4, 3)),
        128: _attention((128, 32, 4, 3), (64, 32, 4, 2), (64, 64, 8, 2)),
        256: _attention((64, 64, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2), dkdv_features=(16, 64, 8, 2)),
    },
    # Timed on an H100. At D=64 and 128, two blocks of one warpgroup share a multiprocessor: one computes exponentials
    # while the other multiplies. At 256 only one block fits, so it has two warpgroups. dK/dV always has 64 keys, which
    # are the rows of a warpgroup's product. It takes fewer queries where registers are short. These smaller tiles were
    # not timed at 256, nor with a window or a softcap.
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
    # 99 KB of shared memory; these tiles were compiled but never run
    "sm_86": {
        64: _attention((128, 64, 4, 3), (64, 32, 4, 3), (64, 32, 4, 3)),
        128: _attention((128, 32, 8, 3), (64, 32, 4, 2), (64, 64, 8, 2)),
        256: _attention((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    },
    # compiled but never run; chosen because they do not spill
    "gfx942": {
        64: _attention((128, 64, 4, 3), (64, 64, 4, 3), (32, 64, 4, 1)),
        128: _attention((128, 32, 4, 3), (64, 64, 4, 2), (32, 64, 8, 1)),
        256: _attention((64, 32, 8, 2), (64, 16, 8, 1), (16, 32, 8, 1)),
    },
    # Products without matrix units. A thread holds whole rows of its operands, so tiles are small. The second stage
    # keeps dQ from holding its two operands across the loop.
    "fp32": {
        64: _attention((64, 32, 8, 2), (32, 32, 4, 2), (32, 64, 8, 2)),
        128: _attention((32, 16, 8, 1), (16, 32, 8, 2), (16, 32, 8, 1)),
        256: _attention((32, 16, 8, 1), (16, 16, 8, 2), (16, 32, 8, 1)),
    },
    "interpreted": {256: _attention((32, 16, 4, 1), (32, 16, 4, 1), (16, 32, 4, 1))},
}
ATTENTION["sm_120"] = ATTENTION["sm_86"]
# TF32 uses matrix units, whose operands are in shared memory, 99 KB on these chips. dK/dV at 256 with the tile of
# "fp32" would take 112 KB
ATTENTION["tf32"] = ATTENTION["fp32"] | {256: _attention((32, 16, 8, 1), (16, 16, 8, 2), (16, 16, 8, 1))}


def attention_tiles(q: Tensor, width: int) -> tuple[AttentionTiles, bool]:
    """Return (tiles, descriptors): the tiles for heads of this width, and whether loads use tensor descriptors."""
    chip, half = chip_of(q), q.dtype != torch.float32
    name = chip
    if not half and chip != "interpreted":
        name = "tf32" if chip in ("sm_86", "sm_120") and precision() == "tf32" else "fp32"
    tiles = next(tiles for widest, tiles in ATTENTION[name].items() if width <= widest)
    # fp32 has no descriptors: without matrix units a thread holds rows of a tile, and they would spill
    return tiles, half and chip in ("sm_90", "sm_100")


# ---- decode

# By the wider head dimension, padded: the first entry that is wide enough applies. M: the least number of rows in a
# tile of sequences that share a prefix. N: keys
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
    "sm_120": _DECODE_SMALL,  # not timed, as on sm_86; with 4 warps two of the kernels spill
    "gfx942": _DECODE_LARGE,
    "fp32": {width: Tile(16, keys, warps=8, stages=2) for width, keys in ((64, 64), (128, 32), (256, 16))},
    "interpreted": {256: Tile(16, 16)},
}


# ---- head

# The logits of one head. "without TMA": for rows whose bytes are no multiple of 16, which tensor descriptors require
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

# The logits of two heads: two accumulators, so half of the tile above. sm_120 would spill with as many stages as the
# others. On Hopper, the gradient of a mixture takes half a tile again
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

# the product with the base weight, whose accumulator starts from the adapter's product
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

# The largest tiles of a product over an expert's rows. M is cut to the average number of rows of an expert. N is
# divided among the accumulators of a program.
MOE = {
    "fp32": Tile(64, 64, 32, warps=4, stages=2),
    "few rows": Tile(32, 128, 64, warps=4, stages=3),
    "gfx942": Tile(128, 128, 64, warps=8, stages=2),
    "any": Tile(128, 128, 64, warps=8, stages=3),
}
# The largest tiles [M, N] of a gradient of weights, in steps of K rows.
MOE_WEIGHT_GRAD = {
    "fp32": Tile(64, 64, 32, warps=4, stages=2),
    "gfx942": Tile(128, 128, 64, warps=8, stages=2),
    "any": Tile(128, 128, 64, warps=8, stages=3),
}


def moe_tile(x: Tensor, block_m: int, *, accumulators: int = 1, width: int = 128) -> dict[str, int]:
    """Return the tile of a product over the rows of an expert.

    block_m: the largest number of rows. accumulators: the number of products that a program accumulates at once, and
        among which the columns of the tile are divided. width: the number of columns of the result, which may be an
        adapter's rank.
    """
    chip = "fp32" if x.dtype == torch.float32 else "few rows" if block_m < 64 else chip_of(x)
    return _moe_tile(chip, block_m, accumulators, width)


@cache
def _moe_tile(chip: str, block_m: int, accumulators: int, width: int) -> dict[str, int]:
    tile = row_of(MOE, chip, "any")
    M, N = min(tile.M, block_m), min(tile.N // accumulators, tile_width(width))
    return tile._replace(M=M, N=N).launch()


def moe_weight_tile(x: Tensor, N: int, C: int) -> dict[str, int]:
    """Return the tile of a weight gradient (N, C). N or C may be an adapter's rank."""
    tile = row_of(MOE_WEIGHT_GRAD, "fp32" if x.dtype == torch.float32 else chip_of(x), "any")
    blocks = {"BLOCK_R": tile.K, "BLOCK_N": min(tile.M, tile_width(N)), "BLOCK_C": min(tile.N, tile_width(C))}
    return blocks | {"num_warps": tile.warps if min(N, C) > 64 else 4, "num_stages": tile.stages}


# ---- nf4

# The product with few rows. M is their number. K is at most half a block of weights, because values come in pairs
NF4_PRODUCT = {
    "fp32": Tile(0, 32, warps=8, stages=4),
    "half": Tile(0, 64, warps=4, stages=4),
    # Triton 3.6 fails to pipeline this loop for an MI300X
    "gfx942, fp32": Tile(0, 32, warps=8, stages=1),
    "gfx942, half": Tile(0, 64, warps=4, stages=1),
}


# ---- norm

NORM_WIDEST = 16384  # the most columns that the registers of one program hold; wider rows are read twice

# Times below: H100, bf16, 64 MB inputs, torch 2.11, Triton 3.6. They compare the best of a sweep with its neighbours.


def _norm_tile(N: int, elements: int) -> dict[str, int]:
    """Return the tile [rows, columns] of an RMSNorm kernel: one row of width N, or several rows if N is small."""
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
    """Return the tile of _rms_norm_bwd. Its programs that compute the weight gradient use the entries DW_*."""
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
    """Return (programs, tile) for _rms_norm_bwd_walk: its programs on each multiprocessor, and their tile."""
    if N <= 1024:  # 128: 69.6 us, 74.0 with [16, 128] loaded twice by 4 warps; 1024: 71.2 us, 74.0
        per_sm, reload, stages, warps = 8, False, most_stages, 2
    elif N <= 2048:  # 2048: 72.4 us, 83.5 when the tile is loaded twice
        per_sm, reload, stages, warps = 4, False, 1, 4
    elif N <= 4096:  # 4096: 74.0 us, 75.0 with 2 programs that hold the tile
        per_sm, reload, stages, warps = 4, True, 1, 8
    elif N <= 8192:  # 5120: 81.0 us, 87.3 with 4 programs of 16 warps; 8192: 75.4 us, 78.3
        per_sm, reload, stages, warps = 2, True, 1, 8
    else:  # 16384: 76.4 us, 83.3 with 4 programs, only one of them resident
        per_sm, reload, stages, warps = 1, True, 1, 16
    return per_sm, {**_norm_tile(N, 1024), "RELOAD": reload, "STAGES": stages, "num_warps": warps}


def norm_sum(P: int) -> dict[str, int]:
    """Return the tile of the kernel that adds P partial sums.

    BLOCK_P is large, because each step of the loop waits for the loads of the step before.
    """
    if P <= 64:
        return {"BLOCK_P": 64, "BLOCK_N": 64, "num_warps": 8}
    if P <= 256:  # 132 x 16384: 3.6 us, 5.7 in blocks of 16 columns
        return {"BLOCK_P": 128, "BLOCK_N": 32, "num_warps": 4}
    return {"BLOCK_P": 512, "BLOCK_N": 16, "num_warps": 8}


# rows on each multiprocessor: up to this number, one launch that reads twice is faster than two launches
NORM_FEW_ROWS = 2
NORM_WIDE = {"BLOCK_N": 8192, "num_warps": 16}
NORM_WIDE_WEIGHT_GRAD = {"BLOCK_R": 16, "BLOCK_N": 128, "num_warps": 4}
