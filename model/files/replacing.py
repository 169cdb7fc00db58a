"""The one way to write a file or a folder: beside its place, and renamed once it is whole.

    with replacing(file) as beside:              with replacing_folder(folder) as beside:
        beside.write_text(text)                      (beside / "config.json").write_text(text)

Where the block fails, what was there before is there still, and nothing is left beside it.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os.path import lexists
from pathlib import Path

from ..errors import InputError


@contextmanager
def replacing(file: Path, *, sync: bool = False, note: str = "") -> Iterator[Path]:
    """Yield the path `.NAME.partial` beside `file`, which takes its place once the block has written it.

    sync: flush it to the disk before it is renamed, so that a power cut leaves one of the two whole. note: words of the
    message behind "cannot be written". Raises InputError where it cannot be written. The folder around it must exist.
    """
    beside = file.with_name(f".{file.name}.partial")
    with _cannot_be_written(file, note):
        if file.exists() and not file.is_file() and not file.is_dir():
            raise InputError(f"{file}: expected a file, or a place for one, got a device or a pipe")

        # a killed process may have left one, and a link would be written through
        beside.unlink(missing_ok=True)
        try:
            yield beside
            if sync:
                with open(beside, "rb+") as written:
                    os.fsync(written.fileno())
            beside.replace(file)
        except BaseException:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder`, which takes its place, with ordinary permissions, once the block has ended.

    Raises InputError where it cannot be written; then the folders around it that were made for it are gone, too.
    """
    beside = None
    new = [each for each in folder.parents if not lexists(each)]  # the innermost first
    with _cannot_be_written(folder):
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
            _move(beside, folder)
        except BaseException:
            if beside is not None:
                shutil.rmtree(beside, ignore_errors=True)
            for each in new:
                with suppress(OSError):  # not made, or another's files are in it
                    each.rmdir()
            raise


def _move(beside: Path, folder: Path) -> None:
    """Put `beside` in the place of `folder`, which meanwhile has another name: no system call exchanges two folders."""
    if not os.path.isdir(folder):
        beside.rename(folder)
        return
    earlier = beside.with_suffix(".earlier")
    folder.rename(earlier)
    try:
        beside.rename(folder)
    except BaseException:
        earlier.rename(folder)
        raise
    shutil.rmtree(earlier)


@contextmanager
def _cannot_be_written(path: Path, note: str = "") -> Iterator[None]:
    """Turn an error of the system, or of safetensors, into an InputError that names the path."""
    try:
        yield
    except Exception as error:
        # by its name: the benchmark writes files, too, on machines without safetensors
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise InputError(f"{path}: cannot be written{note}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The system's words, without the name of the file that was written meanwhile."""
    return (isinstance(error, OSError) and error.strerror) or str(error)
