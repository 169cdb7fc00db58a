"""The entries of tile tables for which tune.py searches tiles, and the means to run an op with a given tile.

An op whose tiles are to be tuned adds a Slot for each entry of its tile table.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import torch

from ...kernels import attention
from ...kernels.tiles import ATTENTION, AttentionTiles
from ...kernels.tiles import Tile as LaunchTile
from ..cases.case import Case, Dims
from ..cases.registry import CASES
from .roofline import CHIPS

Tile = tuple[int, ...]
WIDTHS = (128, 64, 256)  # head dimensions, one for each row of the table; the most important first
# the matrix instruction of each chip that tiles are searched for
OWN = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}


@dataclass(frozen=True)
class Slot:
    """One entry of an op's tile table: the tile (side, other side, warps, stages) of one kernel."""

    op: str
    name: str
    module: str
    kernel: str  # its name in the module
    cases: tuple[str, ...]  # names of the Cases that use the tile
    resident: int  # the side (0 or 1) that stays on the chip while the kernel loops over the other
    grid: Callable[["Slot", str, int], Iterator[Tile]]  # (slot, chip, row of the table) -> candidates
    shipped: Callable[["Slot", str, int], Tile]
    placed: Callable[["Slot", Tile], AbstractContextManager[None]]  # a context in which the op uses this tile
    timed: Callable[["Slot", int], list[tuple[Case, Dims]]]

    def key(self, chip: str, width: int) -> str:
        return f"{self.op} {self.name} | D={width} | {chip}"


def case_of(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


# ---- flash_attention

_FEATURES = "window, softcap, sinks"


def _attention_grid(slot: Slot, chip: str, width: int) -> Iterator[Tile]:
    """Yield tiles that may fit the chip, all with two pipeline stages.

    The operands of a tile must fit in shared memory, and its accumulators and scores in registers.
    """
    # numbers of [resident, D] accumulators, and of [resident, walked] scores; as many [resident, D] operands as scores
    accumulators, scores = {"_flash_fwd": (1, 1), "_flash_dq": (1, 2), "_flash_dkdv": (2, 2)}[slot.kernel]
    for resident in (64, 128):
        for walked in (32, 64, 128) if width < 256 else (16, 32, 64):
            for warps in (4, 8):
                numbers = (accumulators * resident * width + scores * resident * walked) / (
                    32 * warps
                )  # per thread
                shared = 2 * width * (resident * scores + 4 * walked)
                if 40 <= numbers <= 224 and shared <= CHIPS[chip].shared_block:
                    yield *((resident, walked) if slot.resident == 0 else (walked, resident)), warps, 2


def _attention_shipped(slot: Slot, chip: str, width: int) -> Tile:
    tiles = next(tiles for widest, tiles in ATTENTION[chip].items() if width <= widest)
    shipped = getattr(tiles, slot.name) or tiles.dkdv
    return shipped.M, shipped.N, shipped.warps, shipped.stages


@contextmanager
def _attention_placed(slot: Slot, tile: Tile) -> Iterator[None]:
    look_up = attention.attention_tiles
    M, N, warps, stages = tile

    def placed(q: torch.Tensor, width: int) -> tuple[AttentionTiles, bool]:
        tiles, descriptors = look_up(q, width)
        return tiles._replace(**{slot.name: LaunchTile(M, N, warps=warps, stages=stages)}), descriptors

    attention.attention_tiles = placed
    try:
        yield
    finally:
        attention.attention_tiles = look_up


def _attention_timed(slot: Slot, width: int) -> list[tuple[Case, Dims]]:
    """Return the (Case, shape) pairs on which a slot's tiles are timed.

    Dense calls have 16,384 tokens and 2048 / D heads, as in docs/attention.md. Packed sequences and shared prompts have
    the shapes of their Cases.
    """
    heads = 2048 // width
    dense = [{"B": 16384 // T, "T": T, "H": heads, "G": heads, "D": width} for T in (4096, 16384, 1024)]
    packed = {"T": 8192, "H": heads, "G": heads, "D": width}
    shared = {"T": 10240, "P": 2048, "R": 512, "H": heads, "G": heads // 4, "D": width}
    wide = {"window": 1024, "softcap": 50.0}

    trials = {
        "causal": [(case_of("flash_attention/causal"), dims) for dims in dense],
        "shared prompt": [
            (case_of("flash_attention/shared prompt"), shared),
            (case_of("flash_attention/packed"), packed),
        ],
        _FEATURES: [
            (replace(case, options=case.options | wide), dims)
            for case in [case_of(f"flash_attention/{_FEATURES}")]
            for dims in dense[:2]
        ],
    }
    return [trial for name in slot.cases for trial in trials[name.split("/")[1]]]


_ATTENTION = {  # name: kernel, families, resident side
    "fwd": ("_flash_fwd", ("causal", _FEATURES), 0),
    "dq": ("_flash_dq", ("causal", _FEATURES), 0),
    "dkdv": ("_flash_dkdv", ("causal",), 1),
    "dkdv_packed": ("_flash_dkdv", ("shared prompt",), 1),
    "dkdv_features": ("_flash_dkdv", (_FEATURES,), 1),
}
SLOTS = tuple(
    Slot(
        "flash_attention",
        name,
        attention.__name__,
        kernel,
        tuple(f"flash_attention/{family}" for family in families),
        resident,
        _attention_grid,
        _attention_shipped,
        _attention_placed,
        _attention_timed,
    )
    for name, (kernel, families, resident) in _ATTENTION.items()
)
