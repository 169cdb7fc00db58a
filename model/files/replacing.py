"""The way to write a file or a folder: under a temporary name beside it, and renamed once it is complete.

    with replacing(file) as beside:              with replacing_folder(folder) as beside:
        beside.write_text(text)                      (beside / "config.json").write_text(text)

If the block fails, the earlier file or folder is still there, and the temporary file or folder is removed.
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
    """Yield the path `.NAME.partial` beside `file`. The block writes a file there, which then replaces `file`.

    sync: flush the new file to the disk before the rename, so that a power cut leaves either the old or the new file
        whole.
    note: words of the message after "cannot be written".

    Raises InputError if the file cannot be written. The folder around it must exist.
    """
    beside = file.with_name(f".{file.name}.partial")
    with _cannot_be_written(file, note):
        if file.exists() and not file.is_file() and not file.is_dir():
            raise InputError(f"{file}: expected a file, or a place for one, got a device or a pipe")

        # a killed process may have left such a file; a link of this name would be written through
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
    """Yield a new folder beside `folder`. After the block, the new folder replaces `folder`, with ordinary permissions.

    Raises InputError if it cannot be written. If the block fails, parent folders that were created are removed, too.
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
                with suppress(OSError):  # it was not created, or holds files of another process
                    each.rmdir()
            raise


def _move(beside: Path, folder: Path) -> None:
    """Move `beside` to the place of `folder`.

    The old folder gets another name first, since two folders cannot be exchanged.
    """
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
        # by the name of the class, because the benchmark also writes files on machines without safetensors
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise InputError(f"{path}: cannot be written{note}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return the system's message without the file's name, which is a temporary one here."""
    return (isinstance(error, OSError) and error.strerror) or str(error)
