"""The structure of the tree, held by a test: floors, rooms, reading order, size, names; in tests/, size and reading.

Each rule is a function from a file's name and source to its faults; they stand in tests/architecture/. Every file must
have none, and for every rule there is a planted source in which it must find one, for a check that cannot fail is a
defect. No file is exempt.
"""

import runpy
from unittest.mock import patch

import pytest
from general import (
    algorithm_files_read_in_one_order,
    docstrings_start_with_a_phrase,
    files_are_short,
    floor_0_stands_on_torch_and_triton,
    functions_are_short,
    functions_have_paragraphs,
    functions_take_few_parameters,
    gradients_and_inputs_go_by_name,
    imports_point_down,
    losses_require_their_denominator,
    names_are_words,
    optional_packages_are_imported_on_demand,
    precision_is_decided_once,
    the_formatter_is_not_fought,
)
from of_kernels import (
    every_op_has_its_reference,
    kernel_files_read_in_one_order,
    kernel_files_say_what_they_compute,
    kernels_name_their_arguments,
    no_op_hides_its_module,
    references_use_all_they_take,
    what_stands_under_op_is_exported,
)
from rooms import (
    ARROWS,
    ROOMS,
    algorithms_never_import_one_another,
    circle,
    circle_of_rooms,
    files_import_in_no_circle,
    objectives_stand_on_torch,
    rooms_import_what_they_may,
)
from sources import ALGORITHMS, FILES, FLOORS, KERNELS, PUBLIC, ROOT, TESTS, functions, is_reference
from violations import ALGORITHM, ALLOWED, FORBIDDEN, KERNEL
from writing import IN_PLACE, files_are_written_beside_their_place, writes

FOLDERS = {
    folder: {name: source for name, source in FILES.items() if name.startswith(f"{folder}/")}
    for folder in FLOORS
}
EVERY = {**FILES, **TESTS}
RULES = {
    imports_point_down: FILES,
    floor_0_stands_on_torch_and_triton: FILES,
    optional_packages_are_imported_on_demand: FILES,
    rooms_import_what_they_may: {name: s for folder in ARROWS for name, s in FOLDERS[folder].items()},
    files_import_in_no_circle: FILES,
    objectives_stand_on_torch: FILES,
    algorithms_never_import_one_another: FILES,
    kernel_files_say_what_they_compute: KERNELS,
    kernel_files_read_in_one_order: KERNELS,
    what_stands_under_op_is_exported: KERNELS,
    every_op_has_its_reference: KERNELS,
    references_use_all_they_take: KERNELS,
    no_op_hides_its_module: KERNELS,
    kernels_name_their_arguments: FILES,
    precision_is_decided_once: FILES,
    algorithm_files_read_in_one_order: ALGORITHMS,
    losses_require_their_denominator: FILES,
    functions_take_few_parameters: EVERY,
    functions_are_short: EVERY,
    files_are_short: EVERY,
    functions_have_paragraphs: EVERY,
    the_formatter_is_not_fought: EVERY,
    gradients_and_inputs_go_by_name: EVERY,
    names_are_words: EVERY,
    docstrings_start_with_a_phrase: EVERY,
    files_are_written_beside_their_place: FILES,
}
NAMES = [rule.__name__ for rule in RULES]


@pytest.mark.parametrize("rule, files", RULES.items(), ids=NAMES)
def test_rule(rule, files):
    assert files
    faults = [fault for name, source in files.items() for fault in rule(name, source)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("folder", ["model", "algorithms", "bench"])
def test_no_circles_of_rooms(folder):
    assert not circle_of_rooms(FOLDERS[folder])


def test_what_is_written_in_place_is_listed_with_a_reason():
    found = {(name, way) for name in FILES for _, way, _ in writes(FILES[name])}
    stale = IN_PLACE.keys() - found
    assert not stale, f"nothing is written so: take it from the list: {stale}"


def test_the_list_of_ops_is_the_api():
    referenced = {
        node.name.removesuffix("_reference")
        for source in KERNELS.values()
        for node in functions(source)
        if is_reference(node)
    }
    types = {"NF4Weight"}  # what ops take and return beside tensors
    assert referenced | types == PUBLIC


def test_one_level_of_rooms():
    """A file lies in a folder or in a room of it, and setup.py lists both."""
    nested = [p for folder in FLOORS for p in (ROOT / folder).glob("*/*/**/*.py")]
    assert not nested, f"expected one level of rooms: {nested}"
    places = {name.rpartition("/")[0] for name in FILES}
    assert all(f"{place}/__init__.py" in FILES for place in places)
    named = {*FLOORS, *(f"{folder}/{room}" for folder, rooms in ROOMS.items() for room in rooms)}
    assert places <= named, f"ROOMS has them not: {places - named}"
    with patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    given = setup.call_args.kwargs
    assert given["package_dir"] == {f"burnish.{place.replace('/', '.')}": place for place in places}
    assert sorted(given["packages"]) == sorted(given["package_dir"])


# ---- controls


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_clean_file_has_no_fault(rule):
    name, source = (
        ("algorithms/x.py", ALGORITHM) if "algorithm" in rule.__name__ else ("kernels/norm.py", KERNEL)
    )
    assert list(rule(name, source)) == []


@pytest.mark.parametrize("rule, name, source", ALLOWED)
def test_what_a_rule_allows(rule, name, source):
    assert list(rule(name, source)) == []


@pytest.mark.parametrize("rule, name, source", FORBIDDEN)
def test_a_planted_fault_is_found(rule, name, source):
    assert list(rule(name, source))


def test_every_rule_has_a_planted_fault():
    assert {rule for rule, _, _ in FORBIDDEN} == RULES.keys()
    of_tests = {rule for rule, files in RULES.items() if files.keys() & TESTS.keys()}
    assert {rule for rule, name, _ in FORBIDDEN if name.startswith("tests/")} == of_tests


def test_a_planted_circle_of_files_is_found():
    files = {
        "kernels/_op.py": "from . import records",
        "kernels/records.py": "from .head.blocks import block",
        "kernels/head/blocks.py": "def f():\n    from .._op import make_op",
    }
    assert circle(files, "kernels/_op.py") == ["_op", "records", "head/blocks", "_op"]
    assert not circle(files | {"kernels/records.py": ""}, "kernels/_op.py")


def test_a_planted_circle_of_rooms_is_found():
    files = {
        "model/errors.py": "def f():\n    from .adapters import config",
        "model/adapters/expressions.py": "from ..errors import InputError",
    }
    assert set(circle_of_rooms(files)) == {"errors", "adapters"}
    assert not circle(files, "model/errors.py")
    assert not circle_of_rooms(files | {"model/errors.py": ""})

    # an arrow that the list forbids is its own rule's to find
    files = {"algorithms/run/x.py": "from ..data import y", "algorithms/data/z.py": "from ..run import w"}
    assert not circle_of_rooms(files)
    assert list(rooms_import_what_they_may("algorithms/run/x.py", files["algorithms/run/x.py"]))
