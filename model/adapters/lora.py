"""An adapter's numbers: of one linear layer as a module, and of a whole model as named tensors."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .config import LoraConfig

SUFFIXES = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
EXPERTS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)\.(lora_[AB]\.weight)")


class Lora(nn.Module):
    """The adapter of one linear layer: a (R, K), b (N, R), fp32 whatever the base is; of experts (E, R, K), (E, N, R).

    Stacked, for a batch of several: a (adapters, R, K), b (adapters, N, R) with the scalings multiplied in.
    """

    def __init__(
        self, a: Tensor, b: Tensor, scaling: float, dropout: float = 0.0, magnitude: Tensor | None = None
    ):
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)  # (N,)
        self.scaling, self.dropout = scaling, dropout
        self.enabled = True


@dataclass(frozen=True)
class Adapter:
    """An adapter without its model. tensors: under their names in PEFT's files, less "base_model.model.", in fp32.

    dtypes: those that they have in their file, if it was one.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)


def filed_name(name: str, trained: Collection[str]) -> str:
    """The name of a tensor among `trained` as PEFT files it.

    PEFT wraps the module of the experts once for each parameter, gate_up_proj first: the outer one is not named.
    """
    found = EXPERTS.fullmatch(name)
    if found is None:
        return name
    experts, matrix, suffix = found.groups()
    inner = matrix == "gate_up_proj" and f"{experts}.down_proj.{suffix}" in trained
    return f"{experts}.base_layer.{suffix}" if inner else f"{experts}.{suffix}"
