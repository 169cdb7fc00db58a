"""The tensors of an adapter: a module for one linear layer, and named tensors for a whole model."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .config import LoraConfig

SUFFIXES = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
EXPERTS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)\.(lora_[AB]\.weight)")


class Lora(nn.Module):
    """The adapter of one linear layer, in fp32 whatever the base's dtype is.

    a is (R, K) and b (N, R); for experts they are (E, R, K) and (E, N, R). For a batch with several adapters they are
    stacked: a (adapters, R, K), and b (adapters, N, R) with the scalings multiplied in.
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
    """An adapter without its model.

    tensors: fp32, under their names in PEFT's files without "base_model.model.".
    dtypes: the dtype of each tensor in the adapter's file; empty if it was not read from a file.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)


def filed_name(name: str, trained: Collection[str]) -> str:
    """Return the name that an adapter's tensor `name` has in PEFT's files.

    trained: the names of all tensors that the adapter trains. PEFT wraps the experts' module once for each of its
        parameters that has an adapter, gate_up_proj first. If there are two wrappers, the tensors of the inner one have
        "base_layer" in their names. The outer wrapper adds nothing to the names.
    """
    found = EXPERTS.fullmatch(name)
    if found is None:
        return name
    experts, matrix, suffix = found.groups()
    inner = matrix == "gate_up_proj" and f"{experts}.down_proj.{suffix}" in trained
    return f"{experts}.base_layer.{suffix}" if inner else f"{experts}.{suffix}"
