"""Properties of a Hugging Face folder: the kind of its content, the base of an adapter, and the absolute path."""

import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from os.path import lexists
from pathlib import Path

from ..errors import InputError
from . import peft
from .replacing import reason, recover
from .tensors import INDEX
from .text_files import read_object

TEMPLATES = "additional_chat_templates"  # the only subfolder that may be there; transformers writes it
MODEL_FILES = (  # the only files that a save may replace
    *("config.json", "generation_config.json", "*.safetensors", INDEX),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *(f"{TEMPLATES}/*.jinja", peft.CONFIG),
)


USUAL_FOLDERS = ("models", "runs", "data", "checkpoints", "output", "outputs")  # no owners of models


def way_to_fetch(name: str | os.PathLike[str], kind: str = "model", into: str = "") -> str:
    """Return "; fetch it from the hub with ...", if `name` may be a name on the hub, owner/name, and else "".

    A name is not one of the hub if it is here, or if its owner is the name of a folder, here or by custom. Nothing is
    looked up elsewhere. kind: model or dataset. into: the folder to fetch it into, which the words then say to pass; by
    default of the second part of the name, in models/ or data/.
    """
    found = re.fullmatch(r"([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)", os.fspath(name))
    if found is None or lexists(found[0]) or lexists(found[1]) or found[1] in USUAL_FOLDERS:
        return ""
    into = into or f"{'models' if kind == 'model' else 'data'}/{found[2]}"
    option = "" if kind == "model" else f" --repo-type {kind}"
    passed = "" if into == found[0] else f", and pass {into}"
    return f"; fetch it from the hub with `hf download {found[0]}{option} --local-dir {into}`{passed}"


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Return whether the folder holds an adapter.

    Other trainers also write the base's config.json into an adapter's folder. Such a folder counts as an adapter if
    it has adapter weights, even if it also has the weights of a whole model. transformers decides in the same way.
    A folder whose replacement was cut off is put back first.
    """
    recover(Path(folder))
    folder = Path(folder)  # any entry with these names counts; the reader raises if it is not a file
    weights = any(lexists(folder / name) for name in (peft.WEIGHTS, "adapter_model.bin"))
    return lexists(folder / peft.CONFIG) and (weights or not lexists(folder / "config.json"))


def base_of(folder: str | os.PathLike[str]) -> Path:
    """Return the folder of the model that an adapter belongs to.

    A relative name in the adapter's config is looked up from the working folder, from the adapter's folder, and from
    each folder around the adapter's. So a base whose name is relative to a folder around the adapter is found from any
    working folder. Another adapter of the same base is never taken for the base itself.
    Raises InputError if there is no base, if two different folders fit, or if the bases lead back to an adapter.
    """
    folder = Path(folder)
    first = base = _named_base(folder)
    seen = {folder.resolve()}
    while is_adapter(base):  # the base of a reward model may itself be an adapter
        if base in seen:
            raise InputError(
                f"{folder / peft.CONFIG}: base_model_name_or_path: expected a model, leads back to {base}, an adapter"
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
            f"at {named!r:.200}: write the path of one of them into the file"
        )
    if not from_here and not from_adapter:
        fetch = way_to_fetch(named, into=named) if isinstance(named, str) else ""
        raise InputError(
            f"{file}: base_model_name_or_path: expected a model folder, found none at {named!r:.200}: write its path "
            f"into the file, or merge the adapter (burnish merge --base FOLDER){fetch}"
        )
    return [*from_here, *from_adapter][0]


def _bases(name: str, adapter: Path, starts: Iterable[Path]) -> list[Path]:
    """Return the folders called `name` in any of `starts` that can be the base of the adapter in folder `adapter`."""
    found: list[Path] = []
    for start in starts:
        base = start / name
        recover(base)
        if not os.path.isdir(base) or base.resolve() == adapter:  # isdir is False also for an invalid name
            continue
        if not is_adapter(base) or read_object(base / peft.CONFIG).get("base_model_name_or_path") != name:
            found.append(base.resolve())
    return found


def holds_a_model(folder: Path) -> bool:
    """Return whether a save may replace the folder, because no other files would be lost.

    This is the case for an empty folder. It is also the case for a folder with the config of a model or an adapter, if
    all its files are those of a model, adapter or tokenizer.
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
    """Return the absolute path, with links followed.

    Raises InputError for an invalid name and for links in a circle.
    """
    try:
        found = Path(folder).resolve()
        if lexists(found):
            os.stat(found)  # raises for a circle of links, which Python 3.13 resolves to its start
        return found
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{folder}: expected a folder's name: {reason(error)}") from None
