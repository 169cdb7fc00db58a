"""4-bit weights on disk, as bitsandbytes and transformers keep them: one weight is several tensors.

    X.weight                                   uint8 (N K / 2, 1), two weights a byte, the first in the high nibble
    X.weight.absmax                            fp32 (blocks,); where it is quantised itself, uint8
    X.weight.quant_map                         fp32 (16,), the value of each nibble
    X.weight.nested_absmax, .nested_quant_map  fp32 (blocks / 256,) and (256,), where absmax is quantised
    X.weight.quant_state.bitsandbytes__nf4     JSON as bytes: blocksize, dtype, shape, nested_offset

Source: https://github.com/bitsandbytes-foundation/bitsandbytes (functional.py, QuantState)
"""

import json
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..kernels import NF4Weight
from .errors import InputError

CONFIG = "quantization_config"
STATE = "quant_state.bitsandbytes__"


def is_4bit(raw: dict[str, Any], source: str) -> bool:
    """Says a parsed config.json that weights are in 4 bits? Raises InputError for any other quantisation."""
    quantization = raw.get(CONFIG)
    if not quantization:
        return False
    wanted = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    if not isinstance(quantization, dict) or wanted.items() - quantization.items():
        raise InputError(
            f"{source}: {CONFIG}: not supported, expected bitsandbytes in 4 bits, got {quantization!r}"
        )
    return True


def config(weight: NF4Weight, compute_dtype: str) -> dict[str, Any]:
    """quantization_config of config.json for weights like this one."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": weight.quant_type,
        "bnb_4bit_use_double_quant": weight.nested_absmax is not None,
    }


def tensors(name: str, weight: NF4Weight) -> dict[str, Tensor]:
    """Name on disk -> tensor, for the weight called `name`."""
    state: dict[str, Any] = {
        "quant_type": weight.quant_type,
        "blocksize": weight.blocksize,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    parts = {"absmax": weight.absmax, "quant_map": weight.code}
    if weight.nested_absmax is not None:
        assert weight.nested_code is not None and weight.offset is not None
        parts |= {"nested_absmax": weight.nested_absmax, "nested_quant_map": weight.nested_code}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": weight.offset.item()}
    parts[f"{STATE}{weight.quant_type}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    # copies: weights share their tables, tensors of one file may not
    found = {f"{name}.{part}": tensor.cpu().clone() for part, tensor in parts.items()}
    return {name: weight.packed.cpu().reshape(-1, 1), **found}


def weight(name: str, parts: dict[str, Tensor], shape: torch.Size, source: str) -> NF4Weight:
    """The weight of `parts`, by their names less "X.weight.", and "packed". Raises InputError naming the part."""

    def refuse(part: str, expected: str, got: Any) -> InputError:
        where = name if part == "packed" else f"{name}.{part}"
        return InputError(f"{source}: {where}: expected {expected}, got {got}")

    def take(part: str, dtype: torch.dtype, count: int) -> Tensor:
        if part not in parts:
            raise InputError(f"{source}: {name}.{part}: missing, although the weight is in 4 bits")
        tensor = parts[part]
        if tensor.dtype != dtype or tensor.numel() != count:
            raise refuse(part, f"{count} numbers of {dtype}", f"{tensor.numel()} of {tensor.dtype}")
        return tensor.flatten().clone()  # a copy: the file may change while mapped

    known = ("packed", "absmax", "quant_map", "nested_absmax", "nested_quant_map")
    for part in parts:
        if part not in known and not part.startswith(STATE):
            raise InputError(f"{source}: {name}.{part}: unexpected, it is no part of a weight in 4 bits")
    key = next((part for part in parts if part.startswith(STATE)), None)
    if key is None:
        raise InputError(f"{source}: {name}.{STATE}nf4: missing, although the weight is in 4 bits")
    try:
        state = json.loads(bytes(parts[key].tolist()))
        quant_type, blocksize = state["quant_type"], int(state["blocksize"])
        stored, dtype = torch.Size(state["shape"]), getattr(torch, state["dtype"])
        nested_size, offset = int(state.get("nested_blocksize", 256)), float(state.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise refuse(key, "a quantisation state as JSON", f"{type(error).__name__}: {error}") from error
    if stored != shape:
        raise refuse(key, f"shape {list(shape)}", list(stored))
    if quant_type not in ("nf4", "fp4") or nested_size != 256 or blocksize < 1:
        raise refuse(key, "nf4 or fp4, a blocksize, and nested blocks of 256", state)
    blocks, nested = -(-prod(shape) // blocksize), "nested_absmax" in parts
    return NF4Weight(
        packed=take("packed", torch.uint8, -(-prod(shape) // 2)),
        absmax=take("absmax", torch.uint8 if nested else torch.float32, blocks),
        code=take("quant_map", torch.float32, 16),
        shape=tuple(shape),
        dtype=dtype,
        blocksize=blocksize,
        nested_absmax=take("nested_absmax", torch.float32, -(-blocks // 256)) if nested else None,
        nested_code=take("nested_quant_map", torch.float32, 256) if nested else None,
        offset=torch.tensor(offset) if nested else None,
    )
