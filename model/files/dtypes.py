"""The dtype of each tensor on disk: remembered from the folder that a model was read from, used again when it is saved.

Training keeps fp32 weights whatever the files have. So a bf16 folder comes back as a bf16 folder.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .bnb import read_state
from .tensors import Stored


@dataclass(frozen=True)
class Dtypes:
    """Dtypes of a folder's tensors. usual: of most of its numbers. others: the tensors in another, by name on disk."""

    usual: torch.dtype
    others: dict[str, torch.dtype] = field(default_factory=dict)

    def of(self, name: str) -> torch.dtype:
        return self.others.get(name, self.usual)


def read_dtypes(stored: Mapping[str, Stored]) -> Dtypes:
    """Read the dtypes from a folder's headers. That of a weight in 4 bits is the one that its state names."""
    found: dict[str, torch.dtype] = {}
    numbers: Counter[torch.dtype] = Counter()
    for name, tensor in stored.items():
        if isinstance(tensor.dtype, str) or not tensor.dtype.is_floating_point or ".weight." in name:
            continue
        found[name] = tensor.dtype
        numbers[tensor.dtype] += tensor.numel

    # a weight in 4 bits: its bytes may be stored as numbers of any dtype, which does not count
    for name, tensor in stored.items():
        weight, _, state = name.partition(".quant_state.")
        if state:
            stored_in = found.pop(weight, None)
            if stored_in is not None:
                numbers[stored_in] -= stored[weight].numel
            found[weight] = read_state(tensor).dtype

    usual = max(numbers, key=numbers.__getitem__, default=torch.float32)
    return Dtypes(usual, {name: dtype for name, dtype in found.items() if dtype != usual})
