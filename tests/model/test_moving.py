"""A folder in the place of another: exchanged in one step or moved in two, it is never away, and it is on the disk."""

import os
import shutil
from pathlib import Path

import pytest
from burnish.model.checkpoint import has_score, load_model, load_scalar_model, read_adapter, save_model
from burnish.model.errors import InputError
from burnish.model.files import replacing as replacing_file
from burnish.model.files.folder import base_of, is_adapter
from burnish.model.files.replacing import recover, remove_folder, replacing_folder, sweep
from burnish.model.transformer import Transformer
from crash import in_a_process
from faults import check_of, control, faults_of
from planted import plant
from tiny import TINY

STEPS = ("one", "two")


@pytest.fixture(params=STEPS)
def steps(request, monkeypatch):
    """One step as this file system can, or two as another has to."""
    in_steps(monkeypatch, request.param)


def in_steps(monkeypatch, steps: str) -> None:
    if steps == "two":
        monkeypatch.setattr(replacing_file, "_exchange", lambda one, other: False)


def write(place: Path, text: str) -> None:
    with replacing_folder(place) as beside:
        (beside / "inside").mkdir()
        (beside / "inside" / "file").write_text(text)
        (beside / "other").write_text(text)


def write_one(place: Path, text: str) -> None:
    """Write fewer files than `write`, and so fewer operations to be killed before."""
    with replacing_folder(place) as beside:
        (beside / "other").write_text(text)


def texts(place: Path) -> set[str]:
    return {file.read_text() for file in place.rglob("*") if file.is_file()}


def entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# ---- checks, which the planted faults must fail


@control
def in_order(folder: Path) -> None:
    """Files, then the folders around them, then the renames, each on the disk before what counts on it."""
    calls: list[str] = []
    fsync, exchange = os.fsync, replacing_file._exchange
    name = lambda path: "new" if path.endswith(".partial") else os.path.basename(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            os, "fsync", lambda file: (calls.append(name(os.readlink(f"/proc/self/fd/{file}"))), fsync(file))
        )
        patch.setattr(
            replacing_file, "_exchange", lambda *given: (calls.append("exchange"), exchange(*given))[1]
        )
        patch.setattr(shutil, "rmtree", lambda *_, **__: calls.append("remove"))
        write(folder / "place", "first")
        first = [*calls]
        calls.clear()
        write(folder / "place", "second")

    assert set(first[:2]) == {"file", "other"} and first[2:] == ["inside", "new", folder.name]
    assert set(calls[:2]) == {"file", "other"}
    assert calls[2:] == ["inside", "new", "exchange", folder.name, "remove"]


@control
def exchanged(folder: Path) -> None:
    """The place is never empty: no file operation of a replacement finds it so."""
    write(folder / "place", "earlier")
    count = len(in_a_process(lambda: write(folder / "place", "new"), folder).operations)
    for k in range(count):
        shutil.rmtree(folder / "place")
        write(folder / "place", "earlier")
        assert in_a_process(lambda: write(folder / "place", "new"), folder, k).status == -9
        assert texts(folder / "place") in ({"earlier"}, {"new"})


@control
def no_kill_takes_it_away(folder: Path) -> None:
    """Killed anywhere in two steps: a reader finds one of the two whole, and a sweep leaves it alone."""
    with pytest.MonkeyPatch.context() as patch:
        in_steps(patch, "two")
        write_one(folder / "place", "earlier")
        count = len(in_a_process(lambda: write_one(folder / "place", "new"), folder).operations)
        for k in range(count):
            for after in ("a reader", "a writer"):
                for entry in folder.iterdir():
                    shutil.rmtree(entry)
                write_one(folder / "place", "earlier")
                assert in_a_process(lambda: write_one(folder / "place", "new"), folder, k).status == -9

                if after == "a reader":
                    recover(folder / "place")
                    assert texts(folder / "place") in ({"earlier"}, {"new"})
                else:
                    write_one(folder / "place", "third")
                    assert texts(folder / "place") == {"third"}
                    assert all(name == "place" or name.endswith(".partial") for name in entries(folder))
                sweep(folder)
                assert entries(folder) == ["place"] and len(texts(folder / "place")) == 1


@control
def beside_a_writer(folder: Path) -> None:
    """A reader that puts the earlier folder back between the two renames delays the new one and loses neither."""
    write(folder / "place", "earlier")
    rename, seen = Path.rename, []

    def renamed(path: Path, to: Path) -> Path:
        found = rename(path, to)
        if to.name == ".place.earlier" and len(seen) < 3:  # a reader, three times
            recover(folder / "place")
            seen.append(texts(folder / "place"))
        return found

    with pytest.MonkeyPatch.context() as patch:
        in_steps(patch, "two")
        patch.setattr(Path, "rename", renamed)
        write(folder / "place", "new")
    assert seen == [{"earlier"}] * 3 and texts(folder / "place") == {"new"}
    assert entries(folder) == ["place"]


# ---- folders


@pytest.mark.parametrize(
    "check", [in_order, exchanged, no_kill_takes_it_away, beside_a_writer], ids=lambda check: check.__name__
)
def test_a_folder(check, tmp_path):
    (tmp_path / "folder").mkdir()
    check(tmp_path / "folder")


def test_a_folder_replaces_one(steps, tmp_path):
    for text in ("first", "second"):
        write(tmp_path / "place", text)
        assert texts(tmp_path / "place") == {text} and entries(tmp_path) == ["place"]


def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(steps, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/place")
    for text in ("first", "second"):
        write(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and texts(tmp_path / "there" / "place") == {text}
        assert entries(tmp_path) == ["link", "there"] and entries(tmp_path / "there") == ["place"]


def test_a_system_without_an_exchange_moves_in_two_steps(tmp_path, monkeypatch):
    """A library without renameat2, a kernel that does not know it, and a file system that cannot."""
    write(tmp_path / "place", "first")
    for broken in (lambda *_, **__: (_ for _ in ()).throw(OSError("no library")), lambda *_, **__: object()):
        monkeypatch.setattr(replacing_file.ctypes, "CDLL", broken)
        write(tmp_path / "place", "second")
    library = type("Library", (), {"renameat2": staticmethod(lambda *_: -1)})
    for code in (38, 22, 95):  # ENOSYS, EINVAL, ENOTSUP
        monkeypatch.setattr(replacing_file.ctypes, "CDLL", lambda *_, **__: library)
        monkeypatch.setattr(replacing_file.ctypes, "get_errno", lambda code=code: code)
        write(tmp_path / "place", str(code))
        assert texts(tmp_path / "place") == {str(code)} and entries(tmp_path) == ["place"]

    monkeypatch.setattr(replacing_file.ctypes, "get_errno", lambda: 28)
    with pytest.raises(InputError, match="place: cannot be written: No space left on device"):
        write(tmp_path / "place", "full")
    assert texts(tmp_path / "place") == {"95"} and entries(tmp_path) == ["place"]


def test_a_name_too_long_for_a_second_one_is_one_sentence(tmp_path, monkeypatch):
    """An exchange needs none."""
    place = tmp_path / ("x" * 250)
    write(place, "first")
    write(place, "second")
    in_steps(monkeypatch, "two")
    with pytest.raises(InputError, match="cannot be written: File name too long"):
        write(place, "third")
    assert texts(place) == {"second"} and entries(tmp_path) == [place.name]


def test_a_sweep_removes_what_is_temporary_and_nothing_else(tmp_path):
    for text, name in (("new", "place"), ("old", ".place.earlier"), ("lost", ".gone.earlier")):
        write(tmp_path / name, text)
    (tmp_path / ".place.abc.partial").mkdir()
    (tmp_path / ".place.abc.partial" / "file").write_text("half")
    (tmp_path / ".file.partial").write_text("half")
    (tmp_path / "kept").write_text("kept")
    (tmp_path / ".link.partial").symlink_to(tmp_path / "kept")
    (tmp_path / "file.partial").write_text("theirs")
    sweep(tmp_path)
    assert entries(tmp_path) == ["file.partial", "gone", "kept", "place"]
    assert texts(tmp_path / "place") == {"new"} and texts(tmp_path / "gone") == {"lost"}


def test_what_is_removed_has_a_temporary_name_first(tmp_path):
    write(tmp_path / "place", "old")
    count = len(in_a_process(lambda: remove_folder(tmp_path / "place"), tmp_path).operations)
    assert entries(tmp_path) == [] and count > 5
    for k in range(count):
        shutil.rmtree(tmp_path / "place", ignore_errors=True)
        write(tmp_path / "place", "old")
        in_a_process(lambda: remove_folder(tmp_path / "place"), tmp_path, k)
        assert not (tmp_path / "place").exists() or texts(tmp_path / "place") == {"old"}
        sweep(tmp_path)
    with pytest.raises(InputError, match="nothing: cannot be removed: No such file or directory"):
        remove_folder(tmp_path / "nothing")
    assert not [name for name in entries(tmp_path) if name.endswith(".partial")]


# ---- doors


@pytest.fixture
def cut_off(tmp_path):
    """A model whose replacement was cut off between the two renames: it is found by its name all the same."""
    save_model(Transformer(TINY, seed=1), tmp_path / "model")

    def again() -> Path:
        if (tmp_path / "model").exists():
            (tmp_path / "model").rename(tmp_path / ".model.earlier")
        return tmp_path / "model"

    return again


@pytest.mark.parametrize(
    "door", [load_model, load_scalar_model, has_score, is_adapter], ids=lambda f: f.__name__
)
def test_whoever_opens_a_model_recovers_it(door, cut_off):
    door(cut_off())
    assert entries(cut_off().parent) == [".model.earlier"]


def test_a_link_to_a_model_recovers_it(cut_off, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "model")
    cut_off()
    load_model(tmp_path / "link")
    assert entries(tmp_path) == ["link", "model"]


def test_whoever_opens_an_adapter_recovers_it_and_its_base(tmp_path, cut_off):
    from burnish.model.adapter import add_lora

    model = load_model(cut_off())
    add_lora(model, 2, base=str(tmp_path / "model"))
    save_model(model, tmp_path / "adapter")
    for door in (load_model, base_of, read_adapter):
        cut_off()
        if door is not base_of:
            (tmp_path / "adapter").rename(tmp_path / ".adapter.earlier")
        door(tmp_path / "adapter")
        assert (tmp_path / "adapter").exists()
        assert (tmp_path / "model").exists() or door is read_adapter


def test_what_cannot_be_recovered_is_one_sentence(cut_off, monkeypatch):
    folder = cut_off()
    monkeypatch.setattr(
        Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system"))
    )
    with pytest.raises(InputError, match=r"\.model\.earlier, which cannot be renamed: Read-only file system"):
        load_model(folder)


@pytest.mark.parametrize("name", ["", ".", "/", "..", "x" * 5000, "a\0b", "no/such/place"])
def test_names_of_nothing_are_no_folders_to_recover(name):
    recover(Path(name))


# ---- planted faults


@pytest.mark.parametrize("fault", faults_of(__file__), ids=lambda fault: fault.id)
def test_a_planted_fault_is_caught(fault, tmp_path, monkeypatch):
    plant(fault, monkeypatch)
    (tmp_path / "folder").mkdir()
    with pytest.raises((AssertionError, OSError, InputError)):
        check_of(fault)(tmp_path / "folder")
