"""Files and folders that are written beside their place and renamed: whole, or as they were."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from burnish.model.errors import InputError
from burnish.model.files.replacing import replacing, replacing_folder
from faults import check_of, control, faults_of
from planted import plant
from safetensors import SafetensorError

ERRORS = [
    OSError(28, "No space left on device", "/a/name/of/no/use"),
    SafetensorError("full"),
    KeyboardInterrupt(),
]


def contents(folder: Path) -> dict[str, str | None]:
    """Every entry below the folder, a file with its text."""
    entries = {entry.relative_to(folder).as_posix(): entry for entry in folder.rglob("*")}
    return {name: entry.read_text() if entry.is_file() else None for name, entry in entries.items()}


def write(writer, place: Path, text: str = "new", error: BaseException | None = None) -> None:
    """Write a file, or a folder with one file in it; in the middle of it the error is raised."""
    with writer(place) as beside:
        file = beside / "file" if writer is replacing_folder else beside
        file.write_text(text[:1])
        if error is not None:
            raise error
        file.write_text(text)


each_writer = pytest.mark.parametrize("writer", [replacing, replacing_folder])


# ---- the checks, which the planted faults must fail


@control
def whole(writer, folder: Path) -> None:
    """The new one, the earlier one replaced, and nothing beside it."""
    inside = "place/file" if writer is replacing_folder else "place"
    for text in ("first", "second"):
        write(writer, folder / "place", text)
        assert {k: v for k, v in contents(folder).items() if v is not None} == {inside: text}


@control
def as_it_was(writer, folder: Path) -> None:
    """A failure in the middle leaves the earlier one, or nothing."""
    for earlier in (False, True):
        if earlier:
            write(writer, folder / "place", "earlier")
        before = contents(folder)
        for error in ERRORS:
            with pytest.raises(InputError if isinstance(error, Exception) else type(error)):
                write(writer, folder / "place", error=error)
            assert contents(folder) == before


@control
def one_sentence(writer, folder: Path) -> None:
    """The message has the place and the reason, not the name of what was written meanwhile."""
    with pytest.raises(InputError) as caught:
        write(writer, folder / "place", error=ERRORS[0])
    assert str(caught.value) == f"{folder / 'place'}: cannot be written: No space left on device"


@control
def on_the_disk(writer, folder: Path) -> None:
    """A file is synchronised before it is renamed, and the folder around it after, where that is asked for."""
    calls: list[str] = []
    sync, rename = os.fsync, Path.replace
    name = lambda file: Path(os.readlink(f"/proc/self/fd/{file}")).name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: (calls.append(f"sync {name(file)}"), sync(file)))
        patch.setattr(Path, "replace", lambda file, to: (calls.append("rename"), rename(file, to))[1])
        for wanted in (False, True):
            with writer(folder / "place", sync=wanted) as beside:
                beside.write_text("new")
    assert calls == ["rename", "sync .place.partial", "rename", f"sync {folder.name}"]


@control
def of_an_ordinary_mode(writer, folder: Path) -> None:
    """A file that a library has written as private has the mode of every other new file."""
    (folder / "file").touch()
    mode = lambda path: stat.S_IMODE(path.stat().st_mode)
    with writer(folder / "place") as beside:
        os.close(os.open(beside, os.O_CREAT, 0o600))  # as safetensors writes
    assert mode(folder / "place") == mode(folder / "file")


@control
def not_through_a_link(writer, folder: Path) -> None:
    (folder / "elsewhere").write_text("kept")
    (folder / ".place.partial").symlink_to(folder / "elsewhere")
    write(writer, folder / "place")
    assert contents(folder) == {"elsewhere": "kept", "place": "new"}


@each_writer
@pytest.mark.parametrize("check", [whole, as_it_was, one_sentence], ids=lambda check: check.__name__)
def test_what_is_written_appears_whole_or_not_at_all(check, writer, tmp_path):
    check(writer, tmp_path)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_mode_follows_the_umask(umask, tmp_path):
    earlier = os.umask(umask)
    try:
        of_an_ordinary_mode(replacing, tmp_path)
    finally:
        os.umask(earlier)


@pytest.mark.parametrize("check", [on_the_disk, not_through_a_link], ids=lambda check: check.__name__)
def test_a_file(check, tmp_path):
    check(replacing, tmp_path)


def test_what_a_killed_process_has_left_is_replaced(tmp_path):
    (tmp_path / ".place.partial").write_text("half")
    write(replacing, tmp_path / "place")
    assert contents(tmp_path) == {"place": "new"}


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_what_is_no_file_is_not_replaced(kind, tmp_path):
    """A device is none either: root could replace /dev/null."""
    place = tmp_path / "place"
    if kind == "pipe":
        os.mkfifo(place)
    else:
        os.mknod(place, stat.S_IFSOCK | 0o600)
    with pytest.raises(
        InputError, match=f"{place}: expected a file, or a place for one, got a device or a pipe"
    ):
        write(replacing, place)
    assert not place.is_file()


def test_a_message_has_a_note(tmp_path):
    with (
        pytest.raises(InputError, match=r"place: cannot be written, the earlier one is kept: full$"),
        replacing(tmp_path / "place", note=", the earlier one is kept"),
    ):
        raise SafetensorError("full")


def test_other_errors_pass_as_they_are(tmp_path):
    for error in (InputError("another sentence"), RuntimeError("a bug")):
        with pytest.raises(type(error)) as caught:
            write(replacing, tmp_path / "place", error=error)
        assert caught.value is error and not contents(tmp_path)


# ---- places that cannot be written


@each_writer
def test_a_file_in_the_way_of_a_folder(writer, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match=r"file/place: cannot be written: (Not a directory|File exists)$"):
        write(writer, tmp_path / "file" / "place")
    assert contents(tmp_path) == {"file": "kept"}


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "place").mkdir()
    with pytest.raises(InputError, match="place: cannot be written: Is a directory"):
        write(replacing, tmp_path / "place")
    assert contents(tmp_path) == {"place": None}


def test_folders_around_a_folder_are_made_and_those_around_a_file_are_not(tmp_path):
    write(replacing_folder, tmp_path / "a" / "b" / "place")
    assert (tmp_path / "a" / "b" / "place" / "file").read_text() == "new"
    with pytest.raises(InputError, match="cannot be written: No such file or directory"):
        write(replacing, tmp_path / "c" / "place")
    with pytest.raises(InputError, match="cannot be written: No space left"):
        write(replacing_folder, tmp_path / "d" / "e" / "place", error=ERRORS[0])
    assert not (tmp_path / "c").exists() and not (tmp_path / "d").exists()


@contextmanager
def as_nobody() -> Iterator[None]:
    """The rights of a user who owns nothing here: root may write anywhere."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@each_writer
def test_a_place_without_permission(writer, tmp_path):
    place = tmp_path / "theirs" / "place"
    write(replacing_folder, tmp_path / "theirs", "earlier")
    place.parent.chmod(0o500)
    before = contents(tmp_path)
    with as_nobody(), pytest.raises(InputError, match="place: cannot be written: Permission denied"):
        write(writer, place)
    place.parent.chmod(0o700)
    assert contents(tmp_path) == before


def test_modes_are_those_of_ordinary_files(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    mode = lambda path: stat.S_IMODE(path.stat().st_mode)
    with replacing_folder(tmp_path / "place") as beside:
        os.close(os.open(beside / "private", os.O_CREAT, 0o600))  # as safetensors writes
    write(replacing, tmp_path / "new")
    assert mode(tmp_path / "place") == mode(tmp_path / "folder")
    assert mode(tmp_path / "place" / "private") == mode(tmp_path / "new") == mode(tmp_path / "file")


def test_folders_in_a_folder_of_a_group_are_the_group_s_too(tmp_path):
    """mkdir hands the set-group-ID bit down."""
    tmp_path.chmod(0o2755)
    (tmp_path / "folder").mkdir()
    with replacing_folder(tmp_path / "place") as beside:
        (beside / "inside").mkdir()
    folders = (tmp_path / name for name in ("folder", "place", "place/inside"))
    assert {path.stat().st_mode & stat.S_ISGID for path in folders} == {stat.S_ISGID}


# ---- planted faults

WRITERS = {"replacing": replacing, "replacing_folder": replacing_folder}


@pytest.mark.parametrize("fault", faults_of(__file__), ids=lambda fault: fault.id)
def test_a_planted_fault_is_caught(fault, tmp_path, monkeypatch):
    plant(fault, monkeypatch)
    with pytest.raises((AssertionError, OSError, pytest.fail.Exception, InputError)):
        check_of(fault)(WRITERS[fault.function], tmp_path)
