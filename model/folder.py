"""A folder on disk: what kind it is, its JSON and safetensors files, and how a new one takes the place of an earlier.

A folder appears whole or not at all: it is written beside its place and renamed.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from . import peft
from .errors import InputError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MODEL_FILES = (  # what a save may replace
    *("config.json", "generation_config.json", "*.safetensors", INDEX),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    peft.CONFIG,
)


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Does the folder hold an adapter? Other trainers write the base's config.json beside it: then an adapter's weights
    decide, also where a whole model's stand beside them, as transformers has it."""
    folder = Path(folder)
    weights = any((folder / name).exists() for name in (peft.WEIGHTS, "adapter_model.bin"))
    return (folder / peft.CONFIG).is_file() and (weights or not (folder / "config.json").exists())


def base_of(folder: str | os.PathLike[str]) -> Path:
    """The folder of the model that an adapter belongs to. Raises InputError where none is found, or only itself.

    Its config names it from here, from the adapter's folder, or from one around that: a run inside a folder of work
    names its model from there, and is found from anywhere.
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
    named = read_json(file).get("base_model_name_or_path")
    starts = (Path(), own, *own.parents) if isinstance(named, str) and named else ()
    for start in starts:
        base = start / str(named)
        if os.path.isdir(base) and base.resolve() != own:  # False for a name that no file can have, too
            return base.resolve()
    raise InputError(
        f"{file}: base_model_name_or_path: expected a model folder, found none at {named!r:.200}: write its path "
        "there, or merge the adapter (burnish merge --base FOLDER)"
    )


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    if not file.is_file():
        raise InputError(f"{file}: missing")
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a whole safetensors file: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: missing") from None
    except (OSError, ValueError) as error:  # ValueError: broken UTF-8 or JSON
        raise InputError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def holds_a_model(folder: Path) -> bool:
    """Empty, or a model's or adapter's config and nothing but files of such folders: anything else would be lost."""
    if not folder.is_dir():
        return False
    names = [entry.name for entry in folder.iterdir()]
    ours = all(any(fnmatch(name, pattern) for pattern in MODEL_FILES) for name in names)
    return not names or (ours and ("config.json" in names or peft.CONFIG in names))


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place once the block has ended without an exception."""
    beside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o777 & ~umask)  # mkdtemp's folders are private, as are safetensors' files
        yield beside
        for file in beside.iterdir():
            file.chmod(0o666 & ~umask)
        if folder.exists():
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
        if isinstance(error, (OSError, SafetensorError)):
            raise InputError(f"{folder}: cannot be written: {error}") from error
        raise
