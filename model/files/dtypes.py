"""The dtype of each tensor in a model's folder, kept so that the model can be saved in the same dtypes.

Training keeps fp32 weights, whatever the files have. With these dtypes, a bf16 folder is saved as a bf16 folder.
"""

from collections import Counter
from collections.abc import Mapping

import torch

from ..config import Dtypes
from .bnb import read_state
from .tensors import Stored


def read_dtypes(stored: Mapping[str, Stored]) -> Dtypes:
    """Read the dtypes from a folder's headers. A 4-bit weight has the dtype that its quantisation state names."""
    found: dict[str, torch.dtype] = {}
    numbers: Counter[torch.dtype] = Counter()
    for name, tensor in stored.items():
        if isinstance(tensor.dtype, str) or not tensor.dtype.is_floating_point or ".weight." in name:
            continue
        found[name] = tensor.dtype
        numbers[tensor.dtype] += tensor.numel

    # a 4-bit weight: its bytes may be stored as numbers of any dtype, and that dtype is ignored
    for name, tensor in stored.items():
        weight, _, state = name.partition(".quant_state.")
        if state:
            stored_in = found.pop(weight, None)
            if stored_in is not None:
                numbers[stored_in] -= stored[weight].numel
            found[weight] = read_state(tensor).dtype

    usual = max(numbers, key=numbers.__getitem__, default=torch.float32)
    return Dtypes(usual, {name: dtype for name, dtype in found.items() if dtype != usual})
