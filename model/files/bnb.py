"""4-bit weights on disk in the format of bitsandbytes and transformers, where one weight is several tensors.

    X.weight                                   (N K / 2, 1) uint8, two weights a byte, the first in the high nibble; or
                                               the same bytes as numbers of another dtype (bnb_4bit_quant_storage)
    X.weight.absmax                            fp32 (blocks,); uint8 if the scales themselves are quantised
    X.weight.quant_map                         fp32 (16,), the value of each nibble
    X.weight.nested_absmax, .nested_quant_map  fp32 (blocks / 256,) and (256,), only if absmax is quantised
    X.weight.quant_state.bitsandbytes__nf4     JSON as bytes: blocksize, dtype, shape, nested_offset

Any layer of the folder may be dense. transformers then needs its name in llm_int8_skip_modules.

Source: https://github.com/bitsandbytes-foundation/bitsandbytes (functional.py, QuantState)
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import NF4Weight
from ...kernels.plain.nf4 import unnested
from ...kernels.records import BLOCKSIZES
from ..errors import InputError, shown
from .config_keys import LARGEST
from .finite import check_finite
from .tensors import FLOATS, Stored
from .text_files import parse_json

STATE = "quant_state.bitsandbytes__"
STATE_BYTES = 10_000  # the most bytes of the state's JSON; bitsandbytes writes about 200
STORAGE = (torch.uint8, torch.int8, *FLOATS)


# ---- writing


def config(weight: NF4Weight, compute_dtype: str, dense: Sequence[str] = ()) -> dict[str, Any]:
    """Return quantization_config of config.json for weights in this weight's format.

    dense: names of linear modules that are not in 4 bits. If none is named, transformers keeps only the head dense.
    """
    skipped = {"llm_int8_skip_modules": [*dense]} if dense else {}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": weight.quant_type,
        "bnb_4bit_use_double_quant": weight.nested_absmax is not None,
        **skipped,
    }


def tensors(name: str, weight: NF4Weight) -> dict[str, Tensor]:
    """Return the tensors that store the 4-bit weight `name`, by their names on disk."""
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
    # copies, because weights share their tables, and the tensors of one file may share no memory
    found = {f"{name}.{part}": tensor.cpu().clone() for part, tensor in parts.items()}
    return {name: weight.packed.cpu().reshape(-1, 1), **found}


# ---- reading


@dataclass(frozen=True)
class Packed:
    """A 4-bit weight in a folder. Its sizes are checked, and its large tensors are not read yet."""

    parts: dict[str, Stored]  # by name without "X.weight."; the weight itself is "packed"
    shape: torch.Size
    blocksize: int
    offset: float

    def read(self, dtype: torch.dtype) -> NF4Weight:
        """Read the weight. dtype: the dtype that the weight gets when it is dequantised."""
        mapped = {part: tensor.read().flatten() for part, tensor in self.parts.items()}
        mapped["packed"] = mapped["packed"].view(torch.uint8)
        for part, tensor in mapped.items():
            check_finite(f"{self.parts[part].file}: {shown(self.parts[part].name)}", tensor)

        read = {
            part: tensor.clone() for part, tensor in mapped.items()
        }  # the file may change while it is mapped
        return NF4Weight(
            packed=read["packed"],
            absmax=read["absmax"],
            code=read["quant_map"],
            shape=tuple(self.shape),
            dtype=dtype,
            blocksize=self.blocksize,
            nested_absmax=read.get("nested_absmax"),
            nested_code=read.get("nested_quant_map"),
            offset=torch.tensor(self.offset) if "nested_absmax" in read else None,
        )


def packed(name: str, parts: dict[str, Stored], shape: torch.Size, source: str) -> Packed:
    """Return the 4-bit weight `name`, made of `parts`. Raises InputError naming a part that does not fit.

    parts: the tensors by their names without "X.weight."; the weight's own tensor is called "packed".
    """
    for part in parts:
        known = ("packed", "absmax", "quant_map", "nested_absmax", "nested_quant_map")
        if part not in known and not part.startswith(STATE):
            raise InputError(
                f"{source}: {name}.{shown(part)}: unexpected, it is not a part of a 4-bit weight"
            )
    blocksize, offset = _state(name, parts, shape, source)

    # the scales: one for each block of weights; if they are quantised, also one for each 256 scales
    blocks, nested = -(-prod(shape) // blocksize), "nested_absmax" in parts
    sizes: dict[str, tuple[torch.dtype, int]] = {
        "quant_map": (torch.float32, 16),
        "absmax": (torch.uint8 if nested else torch.float32, blocks),
    }
    if nested:
        sizes["nested_absmax"] = torch.float32, -(-blocks // 256)
        sizes["nested_quant_map"] = torch.float32, 256

    for part, (dtype, count) in sizes.items():
        if part not in parts:
            raise InputError(f"{source}: {name}.{part}: missing, although the weight is in 4 bits")
        found = parts[part]
        if found.dtype != dtype or found.numel != count:
            raise InputError(
                f"{source}: {name}.{part}: expected {count} numbers of {dtype}, got {found.numel} of {found.dtype}"
            )

    # the weights themselves, two in a byte
    if "packed" not in parts:
        raise InputError(f"{source}: {name}: missing, although its parts are there")
    whole, count = parts["packed"], -(-prod(shape) // 2)
    if whole.dtype not in STORAGE or whole.nbytes != count:
        raise InputError(
            f"{source}: {name}: expected {count} bytes for a weight {tuple(shape)} in 4 bits, "
            f"got {tuple(whole.shape)} of {whole.dtype}"
        )
    return Packed({part: parts[part] for part in ("packed", *sizes)}, shape, blocksize, offset)


class State(NamedTuple):
    """The quantisation state of a 4-bit weight, which is stored beside it as JSON."""

    blocksize: int
    offset: float
    dtype: torch.dtype  # the weight's dtype before it was quantised
    shape: list[int]


def read_state(stored: Stored) -> State:
    """Read the quantisation state of a 4-bit weight. Raises InputError if it is not a valid state for nf4 or fp4."""
    where = f"{stored.file}: {shown(stored.name)}"
    expected = f"{where}: expected a quantisation state as JSON"
    if stored.dtype != torch.uint8 or stored.numel > STATE_BYTES:
        raise InputError(f"{expected}, got {stored.numel} numbers of {stored.dtype}")
    state = parse_json(bytes(stored.read().flatten().tolist()), expected)
    if not isinstance(state, dict):
        raise InputError(f"{expected}, got {shown(state)}")

    dtypes = {str(known).removeprefix("torch."): known for known in FLOATS}
    offset, shape = state.get("nested_offset", 0.0), state.get("shape")
    blocksize, dtype = state.get("blocksize"), state.get("dtype")
    is_blocksize = type(blocksize) is int and blocksize in BLOCKSIZES
    is_offset = type(offset) in (int, float) and abs(offset) <= LARGEST
    is_shape = isinstance(shape, list) and all(type(n) is int for n in shape)
    checks: dict[str, tuple[bool, str]] = {
        "quant_type": (state.get("quant_type") in ("nf4", "fp4"), "nf4 or fp4"),
        "blocksize": (is_blocksize, f"a blocksize of {BLOCKSIZES[0]} to {BLOCKSIZES[-1]}"),
        "nested_blocksize": (state.get("nested_blocksize", 256) == 256, "nested blocks of 256"),
        "nested_offset": (is_offset, "a finite offset"),
        "dtype": (isinstance(dtype, str) and dtype in dtypes, f"one of {', '.join(dtypes)}"),
        "shape": (is_shape, "a list of sizes"),
    }

    for key, (fits, what) in checks.items():
        if not fits:
            raise InputError(f"{where}: {key}: expected {what}, got {shown(repr(state.get(key)))}")
    return State(state["blocksize"], float(offset), dtypes[state["dtype"]], state["shape"])


def _state(name: str, parts: dict[str, Stored], shape: torch.Size, source: str) -> tuple[int, float]:
    """Return (blocksize, offset) from the quantisation state among a weight's parts.

    Raises InputError if there is not exactly one state, or if its shape differs from `shape`.
    """
    keys = [part for part in parts if part.startswith(STATE)]
    if not keys:
        raise InputError(f"{source}: {name}.{STATE}nf4: missing, although the weight is in 4 bits")
    if len(keys) > 1:
        raise InputError(f"{source}: {name}: expected one quantisation state, got {shown(keys)}")
    state = read_state(parts[keys[0]])
    if state.shape != [*shape]:
        raise InputError(
            f"{source}: {name}.{keys[0]}: expected shape {[*shape]}, got {shown(repr(state.shape))}"
        )
    return state.blocksize, state.offset


def stack(weights: Sequence[NF4Weight], shape: torch.Size) -> NF4Weight | None:
    """Concatenate several weights into one weight with the shape `shape`, without any change of value.

    Returns None if the weights differ in block size or code, or if a block would span two weights. The scales of the
    result are in fp32, because the quantised scales of several weights have no common offset.
    """
    first = weights[0]
    for weight in weights:
        alike = weight.blocksize == first.blocksize and torch.equal(weight.code, first.code)
        if not alike or weight.numel % weight.blocksize:
            return None

    scales = [unnested(weight) for weight in weights]
    return NF4Weight(
        packed=torch.cat([weight.packed for weight in weights]),
        absmax=torch.cat(scales),
        code=first.code,
        shape=tuple(shape),
        dtype=first.dtype,
        blocksize=first.blocksize,
    )
