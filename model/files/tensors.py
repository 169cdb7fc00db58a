"""The safetensors files of a folder: reading their headers and single tensors, and writing new files.

A folder has model.safetensors, or several files and an index from tensors to files.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from os.path import lexists
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError, shown
from .text_files import check_regular, parse_json, read_object

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FILE_BYTES = 5_000_000_000  # of weights in one file
DTYPES: dict[str, torch.dtype] = {  # by their names in a header; any other, such as float8, stays a string
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"U8": torch.uint8, "I8": torch.int8},
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# ---- reading


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Yield the open safetensors file. Raises InputError if it is broken, even if only a read in the block shows it."""
    try:
        with _open(file) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a whole safetensors file: {error}") from error


def _open(file: Path) -> Any:
    """Open a safetensors file. Raises InputError if it is broken.

    This includes two errors that safetensors accepts: a tensor described twice, and a size beyond int64.
    """
    check_regular(file)
    try:
        tensors = safe_open(file, framework="pt")
        with open(file, "rb") as raw:
            header = parse_json(raw.read(int.from_bytes(raw.read(8), "little")), f"{file}: header")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a whole safetensors file: {error}") from error

    for name, described in header.items():
        if name != "__metadata__" and not all(size < 2**63 for size in described["shape"]):
            raise InputError(
                f"{file}: {shown(name)}: expected sizes below 2^63, got {shown(described['shape'])}"
            )
    return tensors


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file. Its dtype and shape are from the file's header; its numbers are not read yet."""

    file: Path
    name: str
    dtype: torch.dtype | str
    shape: torch.Size
    tensors: Any  # the open file

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize if isinstance(self.dtype, torch.dtype) else 0

    def read(self) -> Tensor:
        """Return the tensor, mapped from the file. Copy it to keep it, because the file may change."""
        try:
            return self.tensors.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.file}: not a whole safetensors file: {error}") from error


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return name -> tensor, from model.safetensors or else from the files that the index names.

    Only headers are read. As in transformers, tensors of these files that the index does not name are included. If the
    model was saved without its head, its names lack the prefix "model.", which is then added.
    Raises InputError naming the file, and a tensor that is missing or in two files.
    """
    weight_map = _weight_map(folder)
    files = dict.fromkeys(weight_map.values()) if weight_map else (WEIGHTS,)
    found: dict[str, Stored] = {}
    for file in files:
        tensors = _open(folder / file)
        for name in tensors.keys():  # noqa: SIM118 (not a dict)
            if weight_map.get(name, file) != file:
                continue  # a copy: the index names another file
            if name in found:
                raise InputError(f"{folder / file}: {shown(name)}: is also in {found[name].file.name}")
            header = tensors.get_slice(name)
            dtype, shape = str(header.get_dtype()), torch.Size(header.get_shape())
            found[name] = Stored(folder / file, name, DTYPES.get(dtype, dtype), shape, tensors)

    for name, file in weight_map.items():
        if name not in found:
            raise InputError(
                f"{folder / file}: {shown(name)}: missing, although {INDEX} says that it is there"
            )

    if "embed_tokens.weight" in found:
        heads = ("lm_head.", "score.")
        found = {name if name.startswith(heads) else f"model.{name}": t for name, t in found.items()}
    return found


def _weight_map(folder: Path) -> dict[str, str]:
    """Return tensor name -> file name from the index, or {} if the folder has model.safetensors."""
    if lexists(folder / WEIGHTS):
        return {}
    index = folder / INDEX
    if not lexists(index):
        raise InputError(f"{folder}: expected {WEIGHTS} or {INDEX}, found neither{_other_weights(folder)}")

    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            f"{index}: weight_map: expected an object from tensor to file, got {weight_map!r:.200}"
        )
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file == os.path.basename(file) and file.isprintable()
        if not plain or not file.endswith(".safetensors") or len(file) > 255:
            raise InputError(
                f"{index}: {shown(name)}: expected a .safetensors file of the same folder, got {file!r:.200}"
            )
    return weight_map


def _other_weights(folder: Path) -> str:
    """Return a remark that says why the folder's weights in another format are not read, or "" if it has none."""
    reasons = {  # by pattern
        "*.bin": "pickled .bin and .pt files are not read",
        "*.pt*": "pickled .bin and .pt files are not read",
        "consolidated*.safetensors": "consolidated.safetensors is not read: its tensors have other names",
    }
    return next((f" ({reason})" for pattern, reason in reasons.items() if any(folder.glob(pattern))), "")


# ---- writing


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write (name, tensor) pairs into one file. If they exceed FILE_BYTES, write several files and an index.

    At most the tensors of one file are in memory at a time.
    """
    files: list[list[str]] = []  # the names in each
    pending: dict[str, Tensor] = {}
    total = 0

    def close() -> None:
        save_file(pending, folder / f"{len(files)}.safetensors", metadata={"format": "pt"})
        files.append([*pending])
        pending.clear()

    for name, tensor in tensors:
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > FILE_BYTES:
            close()
        pending[name] = tensor
        total += tensor.nbytes
    close()

    # the names of the files contain their number, which is known only now
    if len(files) == 1:
        (folder / "0.safetensors").rename(folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(files):
        file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        (folder / f"{i}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
