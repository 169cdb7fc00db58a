"""A Hugging Face folder: whether it holds a model or an adapter, which base an adapter stands on, its place on disk."""

import os
from collections.abc import Iterable
from fnmatch import fnmatch
from os.path import lexists
from pathlib import Path

from ..errors import InputError
from . import peft
from .replacing import reason
from .tensors import INDEX
from .text_files import read_object

TEMPLATES = "additional_chat_templates"  # the only folder in it, transformers' own
MODEL_FILES = (  # a save may replace these alone
    *("config.json", "generation_config.json", "*.safetensors", INDEX),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *(f"{TEMPLATES}/*.jinja", peft.CONFIG),
)


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder holds an adapter.

    Other trainers write the base's config.json beside it. An adapter's weights then decide, even where a whole model's
    stand beside them, as in transformers.
    """
    folder = Path(folder)  # anything of these names counts: if it is no file, the reader refuses it
    weights = any(lexists(folder / name) for name in (peft.WEIGHTS, "adapter_model.bin"))
    return lexists(folder / peft.CONFIG) and (weights or not lexists(folder / "config.json"))


def base_of(folder: str | os.PathLike[str]) -> Path:
    """The folder of the model that an adapter belongs to. Raises InputError where there is none, only itself, or two.

    A relative name in its config is tried from the working folder, from the adapter's folder and from each one around
    that: a run inside a folder of work names its model from there, and the model is found from anywhere. An adapter on
    the same base, as a run's folders are, is not the base.
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
    file, adapter = folder / peft.CONFIG, folder.resolve()
    named = read_object(file).get("base_model_name_or_path")
    from_here: list[Path] = []
    from_adapter: list[Path] = []
    if isinstance(named, str) and named:
        from_here = _bases(named, adapter, [Path()])
        from_adapter = _bases(named, adapter, [adapter, *adapter.parents])

    if from_here and from_adapter and from_here[0] != from_adapter[0]:
        raise InputError(
            f"{file}: base_model_name_or_path: expected one model folder, found {from_here[0]} and {from_adapter[0]} "
            f"at {named!r:.200}: write the path of one there"
        )
    if not from_here and not from_adapter:
        raise InputError(
            f"{file}: base_model_name_or_path: expected a model folder, found none at {named!r:.200}: write its path "
            "there, or merge the adapter (burnish merge --base FOLDER)"
        )
    return [*from_here, *from_adapter][0]


def _bases(name: str, adapter: Path, starts: Iterable[Path]) -> list[Path]:
    """The folders called `name` at each of `starts` that may be the base of the adapter in the folder `adapter`."""
    found: list[Path] = []
    for start in starts:
        base = start / name
        if (
            not os.path.isdir(base) or base.resolve() == adapter
        ):  # False for a name that no file can have, too
            continue
        if not is_adapter(base) or read_object(base / peft.CONFIG).get("base_model_name_or_path") != name:
            found.append(base.resolve())
    return found


def holds_a_model(folder: Path) -> bool:
    """Whether a save may replace the folder, because nothing else would be lost.

    It is empty, or holds the config of a model or an adapter and nothing but files of such folders.
    """
    if not os.path.isdir(folder):
        return False
    templates = folder / TEMPLATES
    entries = [entry for entry in folder.iterdir() if entry != templates or not entry.is_dir()]
    entries += [*templates.iterdir()] if templates.is_dir() else []
    names = [entry.relative_to(folder).as_posix() for entry in entries]
    ours = all(any(fnmatch(name, pattern) for pattern in MODEL_FILES) for name in names)
    return not names or (ours and ("config.json" in names or peft.CONFIG in names))


def absolute(folder: str | os.PathLike[str]) -> Path:
    """The path with links followed. Raises InputError for a name that no folder can have, and for links in a circle."""
    try:
        found = Path(folder).resolve()
        if lexists(found):
            os.stat(found)  # Python 3.13 follows a circle to its start
        return found
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{folder}: expected a folder's name: {reason(error)}") from None
