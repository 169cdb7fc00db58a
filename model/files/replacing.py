"""The way to write a file or a folder: under a temporary name beside it, and renamed once it is complete.

    with replacing(file) as beside:              with replacing_folder(folder) as beside:
        beside.write_text(text)                      (beside / "config.json").write_text(text)

If the block fails, the earlier file or folder is still there, and the temporary file or folder is removed. A killed
process may leave `.NAME.partial` or `.NAME.*.partial`, which is no use to anyone.

An earlier folder and the new one are exchanged in one step, where the system and the file system can do so. Elsewhere
the earlier folder is called `.NAME.earlier` until the new one stands in its place. A process that is killed in between
leaves only `.NAME.earlier`; `recover`, which every reader of a folder calls, then puts it back.
"""

import ctypes
import errno
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os.path import lexists
from pathlib import Path

from ..errors import InputError

PARTIAL, EARLIER = ".partial", ".earlier"
HERE, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
MOST_TRIES = 100  # of a rename that another process may undo


@contextmanager
def replacing(file: Path, *, sync: bool = False, note: str = "") -> Iterator[Path]:
    """Yield the path `.NAME.partial` beside `file`. The block writes a file there, which then replaces `file`.

    sync: flush the new file to the disk before the rename and the folder after it, so that a power cut leaves either
        the old or the new file whole, and the new one once this block has ended.
    note: words of the message after "cannot be written".

    The new file has the mode of an ordinary new file. Raises InputError if it cannot be written. The folder around it
    must exist.
    """
    beside = file.with_name(f".{file.name}{PARTIAL}")
    with _cannot_be_written(file, note):
        if file.exists() and not file.is_file() and not file.is_dir():
            raise InputError(f"{file}: expected a file, or a place for one, got a device or a pipe")

        # a killed process may have left such a file; a link of this name would be written through
        beside.unlink(missing_ok=True)
        try:
            yield beside
            _make_ordinary(beside)
            if sync:
                _flush(beside)
            beside.replace(file)
        except BaseException:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise
        if sync:
            _flush(file.parent)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder`. After the block, the new folder replaces `folder`, with ordinary permissions.

    Its files are flushed to the disk before it replaces the earlier folder, and the folder around it afterwards. If
    `folder` is a link to a folder, the link stays, and the folder that it names is replaced.
    Raises InputError if it cannot be written. If the block fails, parent folders that were created are removed, too.
    """
    beside = None
    folder = Path(os.path.realpath(folder)) if os.path.islink(folder) else folder
    new = [each for each in folder.parents if not lexists(each)]  # the innermost first
    with _cannot_be_written(folder):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=_start(folder), suffix=PARTIAL, dir=folder.parent))
            yield beside

            # files first, so that a folder is flushed after all that it holds
            entries = sorted(beside.rglob("*"), key=lambda entry: entry.is_dir())
            for entry in [*entries, beside]:  # mkdtemp's folders are private, as are safetensors' files
                _make_ordinary(entry)
                _flush(entry)
            _move(beside, folder)
            for each in new:
                _flush(each.parent)
        except BaseException:
            if beside is not None:
                shutil.rmtree(beside, ignore_errors=True)
            for each in new:
                with suppress(OSError):  # it was not created, or holds files of another process
                    each.rmdir()
            raise


def remove_folder(folder: Path) -> None:
    """Remove a folder. If the process is killed meanwhile, the rest has a temporary name.

    Raises InputError if it cannot be removed.
    """
    try:
        shutil.rmtree(_out_of_the_way(folder))
    except OSError as error:
        raise InputError(f"{folder}: cannot be removed: {reason(error)}") from error


def recover(folder: Path) -> None:
    """Put `.NAME.earlier` back in the place of `folder` if `folder` is missing, because its replacement was cut off.

    Several processes may do so at the same time, and a live writer may be about to replace the folder: a rename onto a
    folder that holds anything fails, so that neither the earlier nor the new folder is ever lost.
    Raises InputError if the earlier folder cannot be put back.
    """
    if os.path.exists(folder) or "\0" in os.fspath(folder):
        return
    folder = Path(os.path.realpath(folder))  # a link may lead to a folder that was being replaced
    for _ in range(MOST_TRIES):
        if lexists(folder) or not folder.name or not os.path.isdir(_earlier(folder)):
            return
        try:
            _earlier(folder).rename(folder)
        except OSError as error:
            # another process has put it back, or the writer has put the new one there
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                where = f"{folder}: missing; its earlier content is in {_earlier(folder).name}"
                raise InputError(f"{where}, which cannot be renamed: {reason(error)}") from error


def sweep(folder: Path) -> None:
    """Remove temporary files and folders that killed processes have left in `folder`.

    An earlier folder is put back if its replacement was cut off. No process may be writing in `folder`.
    """
    for entry in sorted(folder.glob(f".*{EARLIER}")):
        name = entry.name.removeprefix(".").removesuffix(EARLIER)
        if name and lexists(folder / name):
            remove_folder(entry)
        elif name:
            recover(folder / name)
    for entry in sorted(folder.glob(f".*{PARTIAL}")):
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


# ---- moving folders


def _move(beside: Path, folder: Path) -> None:
    """Move `beside` to the place of `folder`, flush the renames to the disk, and remove the folder that was there."""
    recover(folder)
    if not os.path.isdir(folder):
        beside.rename(folder)
        _flush(folder.parent)
    elif _exchange(beside, folder):
        _flush(folder.parent)
        shutil.rmtree(beside)
    else:
        _move_in_two_steps(beside, folder)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step. Returns False if the system or the file system cannot do so."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2 if sys.platform == "linux" else None
    except (OSError, AttributeError):  # a C library without it
        renameat2 = None
    if renameat2 is None:
        return False

    sys.audit("os.rename", os.fspath(one), os.fspath(other), -1, -1)  # as Python's own renames do
    if renameat2(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), os.fspath(other))


def _move_in_two_steps(beside: Path, folder: Path) -> None:
    """Rename `folder` to `.NAME.earlier` and `beside` to `folder`, in this order.

    Between the two a reader may put the earlier folder back. The second rename then fails, and both are done again.
    """
    earlier = _earlier(folder)
    if os.path.isdir(earlier):  # both folders stand: a process was killed after the second rename
        remove_folder(earlier)

    for tries in range(MOST_TRIES):
        try:
            folder.rename(earlier)
            beside.rename(folder)
            break
        except OSError as error:
            recover(folder)
            if tries == MOST_TRIES - 1 or error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise
        except BaseException:
            recover(folder)
            raise

    _flush(folder.parent)
    remove_folder(earlier)


def _earlier(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{EARLIER}")


def _out_of_the_way(folder: Path) -> Path:
    """Give a folder a temporary name, and return it."""
    beside = Path(tempfile.mkdtemp(prefix=_start(folder), suffix=PARTIAL, dir=folder.parent))
    try:
        return folder.rename(beside)  # onto an empty folder
    except OSError:
        beside.rmdir()
        raise


def _start(folder: Path) -> str:
    """Return the beginning of a temporary name beside the folder."""
    return f".{folder.name.removeprefix('.')[:50]}."  # a file's name has at most 255 bytes


# ---- modes and flushing


def _make_ordinary(path: Path) -> None:
    """Give a file or folder the mode that a new one has by the umask. A folder keeps the set-group-ID bit.

    It has that bit from the folder around it, whose group all that is written there is to have.
    """
    umask = os.umask(0)
    os.umask(umask)
    mode = path.lstat().st_mode
    ordinary = (0o777 & ~umask | mode & stat.S_ISGID) if stat.S_ISDIR(mode) else 0o666 & ~umask
    if stat.S_IMODE(mode) != ordinary and not stat.S_ISLNK(mode):
        path.chmod(ordinary)


def _flush(path: Path) -> None:
    """Flush a file, or a folder's list of entries, to the disk."""
    try:
        opened = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder that may be written and not read, and every folder on Windows
        return
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without it for folders
            raise
    finally:
        os.close(opened)


# ---- messages


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
