"""SHA-256 of tensors and files: a checkpoint holds those of its tensors, and of the files that its run has read."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...model.errors import InputError, shown
from ...model.files.replacing import reason
from ...model.files.text_files import parse_json

DIGESTS = "digests"  # the entry of a safetensors file's metadata
OTHERS = "metadata"  # the name, among the tensors', of the other entries; tensors have a slash in theirs
BYTES_OF_A_THREAD = 2**20
MOST_THREADS = 8  # hashlib works without the interpreter's lock

One = TypeVar("One")
Other = TypeVar("Other")


def in_threads(function: Callable[[One], Other], things: Iterable[One], nbytes: int) -> list[Other]:
    """Return the function's results, computed by as many threads as there are cores, at most MOST_THREADS.

    nbytes: the number of bytes to hash in all. A thread takes longer to start than a few of them.
    """
    things = [*things]
    threads = min(len(things), os.cpu_count() or 1, MOST_THREADS, nbytes // BYTES_OF_A_THREAD)
    if threads <= 1:
        return [function(each) for each in things]
    with ThreadPoolExecutor(threads) as pool:
        return [*pool.map(function, things)]


# ---- files


def digest_of_file(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal. Raises InputError if it cannot be read.

    A file is read once in the life of the process, unless its size or its time of change differs.
    """
    try:
        name, stat = os.path.realpath(file), os.stat(file)
        return _digest_of_file(name, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {reason(error)}") from error


@functools.lru_cache(maxsize=4096)
def _digest_of_file(name: str, *version: int) -> str:
    with open(name, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# ---- tensors of a safetensors file


def with_digests(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return a file's metadata with the digests of its tensors, which are on the CPU, and of the metadata itself."""
    others = {name: value for name, value in metadata.items() if name != DIGESTS}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    found = dict(zip(tensors, in_threads(_digest, tensors.values(), nbytes), strict=True))
    return {**others, DIGESTS: json.dumps({**found, OTHERS: _digest_of_metadata(others)})}


def check_metadata(file: Path, metadata: Mapping[str, str]) -> None:
    """Raise InputError if a file's metadata is not what was written. A file without digests passes."""
    expected = _digests(file, metadata)
    others = {name: value for name, value in metadata.items() if name != DIGESTS}
    if expected and expected.get(OTHERS) != _digest_of_metadata(others):
        raise InputError(f"{file}: metadata: differs from what was written: the file is damaged")


def check_tensors(file: Path, opened: Any) -> None:
    """Raise InputError naming a tensor of an open safetensors file that is not what was written."""
    expected = _digests(file, opened.metadata() or {})
    names = [*opened.keys()] if expected else []

    def check(name: str) -> None:
        if _digest(opened.get_tensor(name)) != expected.get(name):
            raise InputError(
                f"{file}: {shown(name)}: differs from what was written: the file is damaged; resume from another run"
            )

    in_threads(check, names, os.path.getsize(file))


def _digests(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    found = parse_json(metadata.get(DIGESTS, "{}"), f"{file}: metadata: {DIGESTS}")
    if not isinstance(found, dict):
        raise InputError(f"{file}: metadata: {DIGESTS}: expected an object, got {shown(found)}")
    return found


def _digest(tensor: Tensor) -> str:
    numbers = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(numbers.numpy().data).hexdigest()


def _digest_of_metadata(metadata: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode()).hexdigest()
