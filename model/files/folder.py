"""A folder on disk: what kind it is, its JSON and safetensors files, and how a new one takes the place of an earlier.

A folder appears whole or not at all: it is written beside its place and renamed.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from math import prod
from os.path import lexists
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError, shown
from . import peft
from .text_files import check_regular, parse_json, read_object

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TEMPLATES = "additional_chat_templates"  # the only folder in it, transformers' own
MODEL_FILES = (  # what a save may replace
    *("config.json", "generation_config.json", "*.safetensors", INDEX),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *(f"{TEMPLATES}/*.jinja", peft.CONFIG),
)
DTYPES: dict[str, torch.dtype] = {  # as a header spells them; any other, float8 among them, stays a string
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"U8": torch.uint8, "I8": torch.int8},
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder holds an adapter.

    Other trainers write the base's config.json beside it: then an adapter's weights decide, also where a whole model's
    stand beside them, as transformers has it.
    """
    folder = Path(folder)  # what is no file is found, too, and refused when it is read
    weights = any(lexists(folder / name) for name in (peft.WEIGHTS, "adapter_model.bin"))
    return lexists(folder / peft.CONFIG) and (weights or not lexists(folder / "config.json"))


def base_of(folder: str | os.PathLike[str]) -> Path:
    """The folder of the model that an adapter belongs to. Raises InputError where none is found, only itself, or two.

    Its config names it from here, from the adapter's folder, or from one around that: a run inside a folder of work
    names its model from there, and is found from anywhere. An adapter on the same base, as a run's folders are, is not
    the base.
    """
    folder = Path(folder)
    first = base = _named_base(folder)
    seen = {folder.resolve()}
    while is_adapter(base):  # a reward model's base may be one
        if base in seen:
            raise InputError(
                f"{folder / peft.CONFIG}: base_model_name_or_path: leads back to {base}, an adapter"
            )
        seen.add(base)
        base = _named_base(base)
    return first


def _named_base(folder: Path) -> Path:
    file, own = folder / peft.CONFIG, folder.resolve()
    named = read_object(file).get("base_model_name_or_path")
    name = named if isinstance(named, str) and named else None
    here, there = (
        [] if name is None else _bases(name, own, starts) for starts in ([Path()], [own, *own.parents])
    )
    if here and there and here[0] != there[0]:
        raise InputError(
            f"{file}: base_model_name_or_path: expected one model folder, found {here[0]} and {there[0]} at "
            f"{named!r:.200}: write the path of one there"
        )
    if not here and not there:
        raise InputError(
            f"{file}: base_model_name_or_path: expected a model folder, found none at {named!r:.200}: write its path "
            "there, or merge the adapter (burnish merge --base FOLDER)"
        )
    return [*here, *there][0]


def _bases(name: str, own: Path, starts: Iterable[Path]) -> list[Path]:
    """The folders called `name` at each of `starts` that may be the base of the adapter in the folder `own`."""
    found: list[Path] = []
    for start in starts:
        base = start / name
        if not os.path.isdir(base) or base.resolve() == own:  # False for a name that no file can have, too
            continue
        if not is_adapter(base) or read_object(base / peft.CONFIG).get("base_model_name_or_path") != name:
            found.append(base.resolve())
    return found


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    try:
        with _open(file) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a whole safetensors file: {error}") from error


def _open(file: Path) -> Any:
    """Raises InputError also for what safetensors lets through: a tensor described twice, a size that is no int64."""
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
    """A tensor of a safetensors file: what the file's header says of it, until it is read."""

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
        """The tensor, mapped from the file: copy what is kept, since the file may change."""
        try:
            return self.tensors.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.file}: not a whole safetensors file: {error}") from error


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Name -> tensor, of model.safetensors or else of the files that the index names; no other file is looked at.

    As transformers does, tensors of these files that the index does not name are taken, too, and those of a model that
    was saved without its head, embed_tokens.weight, are called model.embed_tokens.weight. Only headers are read.
    Raises InputError naming the file, and the tensor that is missing or in two places.
    """
    weight_map = _weight_map(folder)
    files = dict.fromkeys(weight_map.values()) if weight_map else (WEIGHTS,)
    found: dict[str, Stored] = {}
    for file in files:
        tensors = _open(folder / file)
        for name in tensors.keys():  # noqa: SIM118 (not a dict)
            if weight_map.get(name, file) != file:
                continue  # a copy, which the index says is not the one
            if name in found:
                raise InputError(f"{folder / file}: {shown(name)}: stands in {found[name].file.name}, too")
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
    """Tensor -> file, of the index; empty where one file holds everything."""
    if lexists(folder / WEIGHTS):
        return {}
    index = folder / INDEX
    if not lexists(index):
        others = {  # pattern -> why such a file is of no use
            "*.bin": "pickled .bin and .pt files are not read",
            "*.pt*": "pickled .bin and .pt files are not read",
            "consolidated*.safetensors": "consolidated.safetensors has other names for everything",
        }
        why = next((f" ({why})" for pattern, why in others.items() if any(folder.glob(pattern))), "")
        raise InputError(f"{folder}: expected {WEIGHTS} or {INDEX}, found neither{why}")
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


def write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def holds_a_model(folder: Path) -> bool:
    """Empty, or a model's or adapter's config and nothing but files of such folders: anything else would be lost."""
    if not os.path.isdir(folder):
        return False
    templates = folder / TEMPLATES
    entries = [entry for entry in folder.iterdir() if entry != templates or not entry.is_dir()]
    entries += [*templates.iterdir()] if templates.is_dir() else []
    names = [entry.relative_to(folder).as_posix() for entry in entries]
    ours = all(any(fnmatch(name, pattern) for pattern in MODEL_FILES) for name in names)
    return not names or (ours and ("config.json" in names or peft.CONFIG in names))


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place once the block has ended without an exception.

    Raises InputError where it cannot be written; then nothing is left of it, nor of the folders around it.
    """
    beside = None
    new = [each for each in folder.parents if not lexists(each)]  # the innermost first
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        short = folder.name[:50]  # a file's name has at most 255 bytes
        beside = Path(tempfile.mkdtemp(prefix=f".{short}.", suffix=".partial", dir=folder.parent))
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o777 & ~umask)  # mkdtemp's folders are private, as are safetensors' files
        yield beside
        for entry in beside.rglob("*"):
            entry.chmod((0o777 if entry.is_dir() else 0o666) & ~umask)
        if os.path.isdir(folder):
            earlier = beside.with_suffix(".earlier")
            folder.rename(earlier)
            try:
                beside.rename(folder)
            except BaseException:
                earlier.rename(folder)
                raise
            shutil.rmtree(earlier)
        else:
            beside.rename(folder)
    except BaseException as error:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
        for each in new:
            with suppress(OSError):  # not made, or another's files are in it
                each.rmdir()
        if isinstance(error, (OSError, SafetensorError)):
            raise InputError(f"{folder}: cannot be written: {_why(error)}") from error
        raise


def _why(error: Exception) -> str:
    """Without the name of the file that was written meanwhile."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def absolute(folder: str | os.PathLike[str]) -> Path:
    """Its path with links followed. Raises InputError for a name that no folder can have, and for links in a circle."""
    try:
        found = Path(folder).resolve()
        if lexists(found):
            os.stat(found)  # Python 3.13 follows a circle to its start
        return found
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{folder}: expected a folder's name: {_why(error)}") from None
