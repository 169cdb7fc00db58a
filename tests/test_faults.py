"""The tables of faults and what plants one: what is refused, what is copied, what is shared.

Every fault of every table is looked for in its file here, in less than a second; the checks run beside what they test.
"""

import inspect
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from burnish.algorithms.objectives.denominators import token_mean
from burnish.model import linear
from faults import ROOT, TESTS, Fault, controls_in, faults_of, planted, read_faults
from planted import between, copies, copy_of, plant

FAULTS = read_faults()

# ---- the tables of this tree


@pytest.mark.parametrize("file", sorted({fault.file for fault in FAULTS}))
def test_every_text_stands_there_once(file: str):
    """On every path, also that of the faults which this run does not plant."""
    source = (ROOT / f"{file}.py").read_text()
    for fault in FAULTS:
        if fault.file == file:
            planted(fault, source)


def test_names_are_unique():
    names = [(fault.file, fault.function, fault.check, fault.name, fault.path) for fault in FAULTS]
    assert len(set(names)) == len(names)


def loose_ends(faults: list[Fault], controls: set[str]) -> list[str]:
    """Checks that a fault names and no test file has, and checks of which no fault is."""
    named = {fault.control: fault for fault in faults if fault.check}
    return sorted(
        [f"{named[place].id}: expected the check {place}, got none" for place in named.keys() - controls]
        + [f"{place}: expected a fault that it finds, got none" for place in controls - named.keys()]
    )


def test_every_check_has_a_fault_and_every_fault_its_check():
    assert loose_ends(FAULTS, controls_in()) == []


def test_every_test_file_with_checks_plants_their_faults():
    for file in {place.partition(":")[0] for place in controls_in()}:
        assert "faults_of(__file__)" in (TESTS / f"{file}.py").read_text(), file


# ---- tables that are refused

TEXTS = 'name = "a", old = "x", new = "y"'
GOOD, CHECKED = f'{TEXTS}, case = "op/family"', f'{TEXTS}, check = "test_a:holds"'


def table(folder: Path, *rows: str, file: str = "kernels/head/topk", text: str = "") -> tuple[Path, Path]:
    """A folder of tables with one for the file, and a root where the file stands."""
    for path in (folder / "faults" / f"{file}.toml", folder / f"{file}.py"):
        path.parent.mkdir(parents=True)
        path.touch()
    rows_of_it = "".join(f"{{ {row} }},\n" for row in rows)
    (folder / "faults" / f"{file}.toml").write_text(text or f"faults = [\n{rows_of_it}]\n")
    return folder / "faults", folder


def test_a_table_is_read_with_all_fields(tmp_path):
    first, second, third = read_faults(
        *table(tmp_path, GOOD, f'{GOOD}, shape = 2, scale = 1e-3, path = "cpu"', CHECKED)
    )
    assert first == Fault("a", "x", "y", case="op/family", file="kernels/head/topk")
    assert (first.shape, first.scale, first.path) == (1, 1, "triton")
    assert second == first._replace(shape=2, scale=1e-3, path="cpu")
    assert third == first._replace(case="", check="test_a:holds")
    assert third.control == "kernels/test_a:holds"

    row = f'{CHECKED}, function = "A.b", on = "llama"'
    (fault,) = read_faults(*table(tmp_path / "model", row, file="model/linear"))
    assert (fault.function, fault.on, fault.place) == ("A.b", "llama", "model/linear.py, A.b")
    assert fault.id == "model/linear: A.b: holds: a"


@pytest.mark.parametrize(
    "row, sentence",
    [
        (f"{GOOD}, shapes = 2", "expected no field beside .*, got shapes"),
        (f'{GOOD}, file = "norm"', "expected no field beside .*, got file"),
        (
            'old = "x", new = "y", case = "op/family"',
            "a fault without a name: expected the field name, got none",
        ),
        ('name = "a", new = "y", case = "op/family"', "expected the field old, got none"),
        ('name = "a", old = "x", check = "test_a:b"', "expected the field new, got none"),
        (f'{GOOD}, shape = "2"', "shape: got '2' of another type"),
        (f"{GOOD}, shape = true", "shape: got True of another type"),
        (f'{GOOD}, scale = "1"', "scale: got '1' of another type"),
        ('name = "a", old = 3, new = "y", case = "op/family"', "old: got 3 of another type"),
        (f'{TEXTS}, check = ["test_a:b"]', "check: got .* of another type"),
        (f"{CHECKED}, function = 3", "function: got 3 of another type"),
        (f"{CHECKED}, on = 3", "on: got 3 of another type"),
        ('name = "a", old = "", new = "y", case = "op/family"', "old: expected a text, got an empty one"),
        (f'{CHECKED}, function = ""', "function: expected a text, got an empty one"),
        ('name = "a", old = "x", new = "x", case = "op/family"', "expected another text .*, got the same"),
        (f'{GOOD}, path = "gpu"', 'path: expected "cpu" or "triton", got \'gpu\''),
        (TEXTS, "expected a case or a check, got none"),
        (f'{GOOD}, check = "test_a:b"', "expected a case or a check, got case and check"),
        (f"{CHECKED}, shape = 2", "expected no shape beside a check, got 2"),
        (f"{CHECKED}, scale = 2.0", "expected no scale beside a check, got 2.0"),
        (f'{GOOD}, on = "llama"', "expected no on beside a case, got 'llama'"),
        (f'{GOOD}, function = "f"', "expected no function beside a case, got 'f'"),
        (f'{TEXTS}, check = "holds"', 'check: expected "test_<file>:<function>"'),
        (f'{TEXTS}, check = "a:holds"', 'check: expected "test_<file>:<function>"'),
        (f'{TEXTS}, check = "test_a:"', 'check: expected "test_<file>:<function>"'),
    ],
)
def test_a_fault_that_is_not_whole_is_refused(row, sentence, tmp_path):
    with pytest.raises(ValueError, match=f"faults/kernels/head/topk.toml: .*{sentence}"):
        read_faults(*table(tmp_path, row))


@pytest.mark.parametrize("field", ['path = "cpu"', 'path = "triton"', 'case = "op/family"'])
def test_what_is_said_of_kernels_is_refused_of_others(field, tmp_path):
    row = f"{TEXTS}, {field}" + ("" if "case" in field else ', check = "test_a:b"')
    with pytest.raises(
        ValueError, match=r"faults/model/moe.toml: a: expected no \w+ outside of kernels/, got"
    ):
        read_faults(*table(tmp_path, row, file="model/moe"))


@pytest.mark.parametrize(
    "text, got",
    [("faults = []", "faults"), ("# nothing", "nothing"), ("faults = 3", "faults"), ("fault = [{}]", "fault")]
    + [(f"more = 1\nfaults = [{{ {GOOD} }}]", "more, faults")],
)
def test_a_table_of_anything_else_is_refused(text, got, tmp_path):
    sentence = f"kernels/norm.toml: expected a list of faults alone, got {got}"
    with pytest.raises(ValueError, match=sentence):
        read_faults(*table(tmp_path, file="kernels/norm", text=text))


def test_a_table_of_no_file_is_refused(tmp_path):
    folder, root = table(tmp_path, GOOD)
    (root / "kernels" / "head" / "topk.py").unlink()
    with pytest.raises(ValueError, match=r"expected the table of a file, got no kernels/head/topk\.py"):
        read_faults(folder, root)


# ---- texts

CLASSES = """
class First:
    @property
    def number(self):
        return x


class Second:
    def number(self):
        return x + x


def number():
    return 3
"""
WHOLE = Fault("a", "x", "y", check="test_a:b", file="model/norm")


@pytest.mark.parametrize("source, times", [("a + b", 0), ("x + x", 2)])
def test_a_text_that_is_not_there_once_is_refused(source, times):
    with pytest.raises(ValueError, match=f"model/norm.py: a: expected `x` once, got it {times} times"):
        planted(WHOLE, source)


def test_a_text_is_looked_for_in_its_function_alone():
    found = planted(WHOLE._replace(function="First.number"), CLASSES)
    assert found == CLASSES.replace("return x\n", "return y\n")
    for function, times in (("Second.number", 2), ("number", 0)):
        sentence = f"model/norm.py, {function}: a: expected `x` once, got it {times} times"
        with pytest.raises(ValueError, match=sentence):
            planted(WHOLE._replace(function=function), CLASSES)


@pytest.mark.parametrize("function, name", [("Third.number", "Third"), ("First.size", "size")])
def test_a_function_that_is_not_there_is_refused(function, name):
    sentence = f"model/norm.py, {function}: a: expected {name} once, got it 0 times"
    with pytest.raises(ValueError, match=sentence):
        planted(WHOLE._replace(function=function), CLASSES)


# ---- checks


def test_a_check_without_a_fault_and_a_fault_without_its_check_are_found(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "test_a.py").write_text(
        "@control\ndef b():\n    pass\n\n\n@control\ndef c():\n    pass\n\n\ndef d():\n    pass\n"
    )
    controls = controls_in(tmp_path)
    assert controls == {"model/test_a:b", "model/test_a:c"}

    b, c = WHOLE, WHOLE._replace(check="test_a:c")
    assert loose_ends([b, c], controls) == []
    assert loose_ends([b], controls) == ["model/test_a:c: expected a fault that it finds, got none"]
    for check in ("test_a:d", "test_b:b"):
        stale = f"model/norm: {check[-1]}: a: expected the check model/{check}, got none"
        assert loose_ends([b, c, b._replace(check=check)], controls) == [stale]


def test_each_test_file_gets_the_faults_of_its_checks():
    files = {fault.control.partition(":")[0] for fault in FAULTS if fault.check}
    found = [fault for file in sorted(files) for fault in faults_of(str(TESTS / f"{file}.py"))]
    assert sorted(found) == sorted(fault for fault in FAULTS if fault.check)


# ---- a running function, and a copy of one file


@pytest.mark.parametrize("function", ["linears_of", "Adaptable.merged", "Linear.dropout"])
def test_a_running_function_has_the_fault_and_then_its_own_code_again(function, monkeypatch):
    """A function, a method and a property."""
    fault = next(f for f in FAULTS if (f.file, f.function) == ("model/linear", function))
    found = linear
    for name in function.split("."):
        found = getattr(found, name)
    found = inspect.unwrap(getattr(found, "fget", found))

    before = found.__code__
    with monkeypatch.context() as patch:
        plant(fault, patch)
        assert found.__code__.co_code != before.co_code
        assert found.__code__.co_qualname == function
    assert found.__code__ is before


def test_a_copy_of_one_file_has_the_fault_alone(tmp_path, monkeypatch):
    fault = Fault("larger", "lengths.sum()", "2 * lengths.sum()", file="algorithms/objectives/denominators")
    lengths = torch.tensor([1, 3])
    faulty, faithful = (copy_of(fault.file, tmp_path, monkeypatch, f) for f in (fault, None))
    assert faulty.token_mean(lengths).tolist() == [8, 8]
    assert faithful.token_mean(lengths).tolist() == [4, 4] == token_mean(lengths).tolist()


# ---- copies, in a package of its own

FILES = {
    "__init__.py": "from .room.low import Weight as Weight\nfrom .top import op as op",
    "shared.py": "NAMESPACE = 'four'\nLOADS = []",
    "room/__init__.py": "",
    "room/low.py": """
        from dataclasses import dataclass
        from typing import NamedTuple
        from ..shared import NAMESPACE

        @dataclass
        class Weight:
            number: int

        class Pair(NamedTuple):
            first: int
            factor: int = 1

        def low(weight):
            assert isinstance(weight, Weight)
            return 2 * weight.number * Pair(1).factor
    """,
    "room/beside.py": "def other(x):\n    return x",
    "middle.py": "from .room.low import low as low\nfrom .room import beside",
    "top.py": """
        from . import middle, shared
        from .room import low
        from .room.beside import other

        shared.LOADS.append(shared.NAMESPACE)

        def op(number):
            return middle.low(low.Weight(number)), other(low.Pair(number))
    """,
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for file, text in FILES.items():
        path = tmp_path / "package_of_four" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("\n        ", "\n"))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "package_of_four"
    for name in [name for name in sys.modules if name.split(".")[0] == "package_of_four"]:
        del sys.modules[name]


def package(root: Path, file: str, old: str = "", new: str = "", top: str = "top"):
    fault = Fault("planted", old, new, file=file) if old else None
    return copies(file, top, root.parent, fault, root, "package_of_four")


def test_what_lies_between_is_copied_in_order(root):
    assert between("room/low", "top", root, "package_of_four") == ["room/low", "middle", "top"]
    assert between("shared", "middle", root, "package_of_four") == ["shared", "room/low", "middle"]
    with pytest.raises(ValueError, match=r"expected that middle.py imports top.py"):
        between("top", "middle", root, "package_of_four")


def test_a_fault_two_files_below_the_op_reaches_it_alone(root):
    original = import_module("package_of_four.top")
    modules = {name: module for name, module in sys.modules.items() if name.startswith("package_of_four")}
    copy = package(root, "room/low", "return 2", "return 3")

    assert (copy.op(5)[0], original.op(5)[0]) == (15, 10)
    assert {name: sys.modules[name] for name in modules} == modules
    assert original.middle is modules["package_of_four.middle"] is modules["package_of_four"].middle
    assert modules["package_of_four.room"].low is modules["package_of_four.room.low"]

    assert copy.other is original.other and copy.shared is original.shared
    assert copy.shared.NAMESPACE == "four" and copy.shared.LOADS == ["four", "burnish_control"]


def test_an_exported_class_stays_the_original_unless_the_fault_changes_it(root):
    original = import_module("package_of_four.top")
    copy = package(root, "room/low", "return 2", "return 3")
    assert copy.low.Weight is original.low.Weight and copy.low.Pair is not original.low.Pair
    assert copy.middle.low(original.low.Weight(1)) == 3

    copy = package(root, "room/low", "number: int", "number: int = 7")
    assert copy.low.Weight().number == 7 and copy.low.Weight is not original.low.Weight


def test_a_copy_without_a_fault_is_faithful(root):
    copy = package(root, "room/low")
    assert copy.op(5)[0] == 10 and copy.op is not import_module("package_of_four.top").op


def test_a_room_that_hands_on_a_name_is_copied(root):
    (root / "room" / "__init__.py").write_text("from .low import low as low_")
    (root / "middle.py").write_text("from .room import low_ as low")
    original = import_module("package_of_four.top")
    assert between("room/low", "middle", root, "package_of_four") == ["room/low", "room", "middle"]
    assert package(root, "room/low", "return 2", "return 3").op(5)[0] == 15 and original.op(5)[0] == 10
    assert sys.modules["package_of_four.room"].low is original.low
