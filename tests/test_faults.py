"""The tables of faults and the copies in which one is planted: what they refuse, what is copied, what is shared."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from faults import between, plant, planted, read_faults

GOOD = 'name = "a", old = "x", new = "y", case = "op/family"'


def table(folder: Path, *rows: str) -> Path:
    path = folder / "faults" / "head" / "topk.toml"
    path.parent.mkdir(parents=True)
    path.write_text("faults = [\n" + "".join(f"{{ {row} }},\n" for row in rows) + "]\n")
    return folder / "faults"


def test_a_table_is_read_with_all_fields(tmp_path):
    first, second = read_faults(table(tmp_path, GOOD, f'{GOOD}, shape = 2, scale = 1e-3, path = "cpu"'))
    assert first == ("a", "x", "y", "op/family", 1, 1, "triton", "head/topk")
    assert second == ("a", "x", "y", "op/family", 2, 1e-3, "cpu", "head/topk")


@pytest.mark.parametrize(
    "row, sentence",
    [
        (f"{GOOD}, shapes = 2", "expected no field beside .*, got shapes"),
        (f'{GOOD}, file = "norm"', "expected no field beside .*, got file"),
        ('name = "a", old = "x", new = "y"', "expected the field case, got none"),
        (
            'old = "x", new = "y", case = "op/family"',
            "a fault without a name: expected the field name, got none",
        ),
        (f'{GOOD}, shape = "2"', "shape: got '2' of another type"),
        (f'{GOOD}, path = "gpu"', 'path: expected "cpu" or "triton", got \'gpu\''),
    ],
)
def test_a_fault_that_is_not_whole_is_refused(row, sentence, tmp_path):
    with pytest.raises(ValueError, match=f"faults/head/topk.toml: .*{sentence}"):
        read_faults(table(tmp_path, row))


@pytest.mark.parametrize("source, times", [("a + b", 0), ("x + x", 2)])
def test_a_text_that_is_not_there_once_is_refused(source, times):
    with pytest.raises(ValueError, match=f"kernels/norm.py: expected `x` once, got it {times} times"):
        planted(source, "x", "y", "norm")


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
    return plant(file, old, new, top, root.parent, root, "package_of_four")


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
