"""The files behind --data: files, globs, and folders that `datasets.save_to_disk` wrote.

    data_files(cfg.data)       every file, in the order of its rows
    data_sources(cfg.data)     the same files, by argument

A folder of `save_to_disk` lists its .arrow files in state.json. Its rows are those of these files, one after another.
"""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...model.errors import InputError, shown
from ...model.files.text_files import read_object
from .flags import Data

STATE, SPLITS = "state.json", "dataset_dict.json"  # in a folder of a Dataset, and of a DatasetDict
INDICES = (
    "_indices_files",
    "_indices_data_files",
)  # keys of state.json, of rows that were selected or shuffled
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FORMATS = (".jsonl", ".json", ".gz", ".parquet", ".arrow", ".feather", ".safetensors")
SHARD = re.compile(r"data-(\d{5})-of-(\d{5})\.arrow")
GLOB = re.compile(r"[*?[]")


class Source(NamedTuple):
    """One argument of --data. name: the argument, for messages. files: its files, in the order of their rows."""

    name: str
    files: list[Path]


def data_files(data: Data) -> list[Path]:
    """Return all files behind --data, in the order of their rows. Raises InputError as `data_sources` does."""
    return [file for source in data_sources(data) for file in source.files]


def data_sources(data: Data) -> list[Source]:
    """Return the files of each argument of --data.

    Raises InputError for an argument that is not there, for a glob that matches nothing, and for a folder that
    `datasets.save_to_disk` did not write.
    """
    return [data_source(argument) for argument in arguments_of(data)]


def arguments_of(data: Data) -> Sequence[Path]:
    """Return the arguments of --data. Raises InputError if there is none."""
    arguments = data if isinstance(data, tuple) else (Path(data),)
    if not arguments:
        raise InputError("--data: expected at least one file, got none")
    return arguments


def data_source(argument: Path) -> Source:
    """Return the files of one argument of --data: a file, a glob, or a folder. Raises as `data_sources` does."""
    name = str(argument)
    if os.path.lexists(argument):
        return Source(name, _files_of(argument))
    if GLOB.search(name):
        found = sorted(glob.glob(name, recursive=True)) if "\0" not in name else []
        if not found:
            raise InputError(f"{name}: no file has a name like this")
        return Source(name, [file for entry in found for file in _files_of(Path(entry))])

    # a mistyped path is far more common than a hub name whose owner is also a folder here
    if HUB_NAME.fullmatch(name) and argument.suffix not in FORMATS and not os.path.isdir(argument.parent):
        raise InputError(
            f"{name}: no such file; if it is a dataset of the Hugging Face hub, fetch it by "
            f"`hf download --repo-type dataset {name} --local-dir DIR`, and give the files in it: "
            "--data 'DIR/**/*.parquet'"
        )
    raise InputError(f"{name}: no such file")


def _files_of(path: Path) -> list[Path]:
    """Return the file itself, or the files of a folder that `datasets.save_to_disk` wrote."""
    if not os.path.isdir(path):
        return [path]
    if os.path.lexists(path / STATE):
        return _files_of_state(path)
    if os.path.lexists(path / SPLITS):
        splits = sorted(entry.name for entry in path.iterdir() if os.path.lexists(entry / STATE))
        raise InputError(
            f"{path}: expected one split of this DatasetDict; give one of "
            f"{', '.join(str(path / split) for split in splits) or 'its splits, but it holds none'}"
        )
    raise InputError(
        f"{path}: expected a file, or a folder that datasets.save_to_disk wrote; for the files in a folder give a "
        f"glob: '{path / '*.jsonl'}'"
    )


def _files_of_state(folder: Path) -> list[Path]:
    state = read_object(folder / STATE)
    if any(state.get(key) for key in INDICES):
        raise InputError(
            f"{folder / STATE}: the rows were selected or shuffled by an index file, which is not read; write them "
            "by datasets.flatten_indices() and save_to_disk() again"
        )
    listed = state.get("_data_files")
    if not isinstance(listed, list):
        raise InputError(f"{folder / STATE}: _data_files: expected a list, got {shown(listed)}")
    names = [_name_of(entry, folder) for entry in listed]

    # a name tells how many files there are: data-00000-of-00002.arrow
    if numbered := [match for name in names if (match := SHARD.fullmatch(name))]:
        count = int(numbered[0][2])
        if len(names) != count or [int(match[1]) for match in numbered] != list(range(count)):
            raise InputError(
                f"{folder / STATE}: _data_files: expected {count} files in order, as in {names[0]}, got {len(names)}: "
                f"{shown(', '.join(names))}"
            )
    return [folder / name for name in names]


def _name_of(entry: Any, folder: Path) -> str:
    """Return the name of a file in an entry of state.json's list. Raises InputError for a file of another folder."""
    name = entry.get("filename") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name or "\0" in name or name != Path(name).name:
        raise InputError(
            f"{folder / STATE}: _data_files: expected names of files in the folder, got {shown(entry)}"
        )
    return name
