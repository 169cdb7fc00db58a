"""AdamW with its two moments in 8 bits, by the op of bitsandbytes: about 2 bytes a parameter in place of 8.

    moment = absmax of its block * (one of 256 numbers, named by the 8-bit code)

A block is up to 256 numbers of one row. bitsandbytes' own optimizer lets blocks run on from row to row. Blocks within
rows give the same numbers on any number of processes, which share a parameter by rows, and a checkpoint that any
number of processes reads. A row whose length is no multiple of 256 is padded with zeros, for the step alone.

Vectors, parameters of fewer than 4,096 numbers, and the embedding have AdamW's moments in fp32 (`make_optimizer`).

Source: Dettmers et al. 2021, https://arxiv.org/abs/2110.02861; the op: https://github.com/bitsandbytes-foundation
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...model.errors import InputError
from .processes import own, shared_as

BLOCK = 256  # fixed in the op's CUDA kernels
LEAST = 4096  # parameters with fewer numbers keep moments in fp32, as in bitsandbytes
MOMENTS = ("exp_avg", "exp_avg_sq")


def load_bitsandbytes() -> Any:
    """Return the functions of bitsandbytes. Raises InputError if the package is not installed."""
    # on import it warns that a package is missing which only its 4-bit products need
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as functional  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            "--optimizer adamw8bit: expected the package bitsandbytes, found none: "
            f"pip install 'burnish[adamw8bit]' ({error})"
        ) from error
    return functional


class AdamW8bit(torch.optim.Optimizer):
    """AdamW for matrices (..., K) in fp32, with 8-bit moments.

    The state of a parameter is `step`, and for each moment its codes, uint8 in the parameter's shape, and the absmax of
    each block, fp32 (..., blocks of a row).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        functional = load_bitsandbytes()
        self._tables = [functional.create_dynamic_map(signed=signed) for signed in (True, False)]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step for each parameter that has a gradient."""
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in trained:
                if not self.state[parameter]:
                    self.state[parameter] |= _zeros(parameter)
                self.state[parameter]["step"] += 1
            if not trained:
                continue

            # one transfer from the device for all steps
            steps = torch.stack([self.state[parameter]["step"] for parameter in trained]).tolist()
            for parameter, step in zip(trained, steps, strict=True):
                self._update(parameter, int(step), group)

    def _update(self, parameter: Tensor, step: int, group: dict[str, Any]) -> None:
        weight, grad = own(parameter), own(parameter.grad)
        if not weight.numel():  # more processes than rows
            return
        self._tables = [table.to(weight.device) for table in self._tables]
        state = {name: own(tensor) for name, tensor in self.state[parameter].items()}
        kept = [weight, *(state[f"{moment}_codes"] for moment in MOMENTS)]
        wide = [padded(tensor) for tensor in kept]
        absmax = [state[f"{moment}_absmax"].view(-1) for moment in MOMENTS]

        # in place, on the rows as one line of blocks
        torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
            "adam",
            padded(grad),
            *wide,
            *group["betas"],
            0.0,  # beta3 and alpha, of AdEMAMix
            0.0,
            group["eps"],
            step,
            group["lr"],
            *self._tables,
            *absmax,
            group["weight_decay"],
            1.0,
        )

        for place, result in zip(kept, wide, strict=True):
            if result.shape != place.shape:
                place.copy_(result[..., : place.shape[-1]])


def padded(matrix: Tensor) -> Tensor:
    """Return a matrix (..., K) with zeros after each row, up to a multiple of BLOCK, or itself if none are missing."""
    missing = -matrix.shape[-1] % BLOCK
    return F.pad(matrix, (0, missing)) if missing else matrix


def blocks_of(shape: Iterable[int]) -> list[int]:
    """Return the shape (..., blocks of a row) of the absmax of a parameter of `shape` (..., K)."""
    *rows, width = shape
    return [*rows, -(-width // BLOCK)]


def _zeros(parameter: Tensor) -> dict[str, Tensor]:
    """Return the state of a parameter before its first step, shared over processes as the parameter is."""
    rows = own(parameter)
    found = {"step": torch.zeros((), device=rows.device)}
    for moment in MOMENTS:
        absmax = torch.zeros(blocks_of(rows.shape), device=rows.device)
        found[f"{moment}_codes"] = shared_as(parameter, torch.zeros_like(rows, dtype=torch.uint8))
        found[f"{moment}_absmax"] = shared_as(parameter, absmax)
    return found
