"""The files that a run's mathematics depends on: its rows, templates, reward functions and models, with their SHA-256.

A checkpoint holds the digests. --resume compares them with those of the files that the flags name now.
"""

import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ...model.errors import InputError, shown
from ...model.files.folder import MODEL_FILES, TEMPLATES, base_of, is_adapter
from .checkpoint import read_inputs
from .data_files import data_files
from .digests import digest_of_file, in_threads

ROWS = ("data", "eval_data", "row_template", "chat_template", "reward")  # flags of files, or folders of files
MODELS = ("model", "teacher", "reward_model", "critic")  # flags of model folders
CHANGED = "changed during the run"  # in the place of a digest

Digests = dict[str, list[list[str]]]  # by flag: the name and the digest of each file


class Inputs:
    """The files that the flags name. Files that change after this object was made have no digest.

    digests: computed when they are first asked for, and kept.
    """

    def __init__(self, cfg: Any):
        self._files = {flag: [*files] for flag, files in _files(cfg)}
        self._versions = {file: _version(file) for files in self._files.values() for file in files}
        self._digests: Digests | None = None

    def digests(self) -> Digests:
        """Return the name and the SHA-256 of each file, by flag."""
        if self._digests is None:
            files = [*self._versions]
            nbytes = sum(os.path.getsize(file) for file in files if os.path.isfile(file))
            found = dict(zip(files, in_threads(self._digest, files, nbytes), strict=True))
            self._digests = {
                flag: [[file.name, found[file]] for file in files] for flag, files in self._files.items()
            }
        return self._digests

    def _digest(self, file: Path) -> str:
        try:
            found = digest_of_file(file)
        except InputError:  # removed meanwhile; a checkpoint is still worth writing
            return CHANGED
        return found if _version(file) == self._versions[file] else CHANGED


def check_inputs(checkpoint: Path, cfg: Any) -> None:
    """Raise InputError naming a file that is not what the run of the checkpoint has read."""
    stored = read_inputs(checkpoint)
    if not stored:  # a checkpoint without them
        return

    files = {flag: [*found] for flag, found in _files(cfg)}
    found = Inputs(cfg).digests()
    for flag, now in found.items():
        was = stored.get(flag, now)  # a flag that the earlier run did not have to keep
        if [name for name, _ in was] != [name for name, _ in now]:
            names = [", ".join(name for name, _ in each[:5]) or "none" for each in (was, now)]
            raise InputError(
                f"--resume: {flag}: expected the files that the run has read, {names[0]}, found {names[1]}"
            )

        for (_, before), (_, after), file in zip(was, now, files[flag], strict=True):
            if before != after:
                was_read = "which changed while it ran" if before == CHANGED else f"SHA-256 {before[:16]}"
                raise InputError(
                    f"--resume: {flag}: {shown(str(file))}: expected the content that the run has read ({was_read}), "
                    f"got another ({after[:16]}): restore the file, or begin a new run"
                )


def _files(cfg: Any) -> Iterator[tuple[str, list[Path]]]:
    """Yield each flag with the files that it names. The bases of adapters count as the flag's own."""
    for name in ROWS:
        if name == "eval_data" and getattr(cfg, "keep_best", None) is None:
            continue  # it changes nothing that is kept
        if found := _of_rows(getattr(cfg, name, None), name):
            yield f"--{name.replace('_', '-')}", found
    for name in MODELS:
        if getattr(cfg, name, None) is not None:
            yield f"--{name.replace('_', '-')}", [*_of_model(Path(getattr(cfg, name)))]


def _of_rows(value: Any, name: str) -> list[Path]:
    """Return the files that a flag of ROWS names.

    Text that names no file, as "plain" for a template or a module for a function, has none.
    """
    if value is None:
        return []
    if name in ("data", "eval_data"):
        return data_files(value)
    paths = [each.rpartition(":")[0] for each in value if ".py:" in each] if name == "reward" else [value]
    return [Path(path) for path in paths if os.path.isfile(path)]


def _of_model(folder: Path) -> Iterator[Path]:
    """Yield the files of a model folder that are read, and those of an adapter's base."""
    for file in sorted([*folder.glob("*"), *folder.glob(f"{TEMPLATES}/*")]):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and any(fnmatch(name, pattern) for pattern in MODEL_FILES):
            yield file
    if is_adapter(folder):
        yield from _of_model(base_of(folder))


def _version(file: Path) -> tuple[int, ...]:
    """Return numbers that differ if a file has been written since."""
    try:
        stat = os.stat(file)
    except OSError:
        return ()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
