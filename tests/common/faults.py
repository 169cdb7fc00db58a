"""Planted faults: the tables that tell them, and what a table is refused for.

A table is tests/faults/<file>.toml for the text of <file>.py: tests/faults/kernels/norm.toml for kernels/norm.py.

    faults = [
        { name = "eps dropped", old = "/ N + eps", new = "/ N", case = "rms_norm/hidden", scale = 1e-3 },
        { name = "one row too many", old = ">= rows:", new = "> rows:", check = "test_ids:finds_each" },
    ]

A fault replaces `old`, which must stand in the file exactly once, by `new`. Where it names a `function` of the file, as
"Linear.dropout", the text must stand once in that function, which gets the changed code while it runs. What must then
fail is one of two things. A `case` of bench/cases fails the accuracy rule of tests/test_controls.py, at its `shape` and
`scale`. A `check` is a function marked with @control in a test file, which stands in the folder of tests/ that is named
as the table's first; where it has several things to look at, the fault says which one `on` is. In a file of kernels/
the `path` is "triton" unless the fault says "cpu". `\\n` in a text between double quotes is the end of a line.
"""

import ast
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent


class Fault(NamedTuple):
    name: str
    old: str
    new: str
    function: str = ""  # "" for a fault in a copy of the file
    case: str = ""
    shape: int = 1  # index into the case's shapes
    scale: float = 1
    check: str = ""
    on: str = ""
    path: str = "triton"
    file: str = ""  # below the root, without its ending: where the table stands says it

    @property
    def place(self) -> str:
        """The file and, of a fault that is put into a running one, the function."""
        return f"{self.file}.py, {self.function}" if self.function else f"{self.file}.py"

    @property
    def id(self) -> str:
        check = self.check.partition(":")[2]
        return ": ".join(part for part in (self.file, self.function, check, self.name) if part)

    @property
    def control(self) -> str:
        """The check with the folder of tests/ in which its file stands: "algorithms/test_ids:finds_each"."""
        return f"{self.file.partition('/')[0]}/{self.check}"


FIELDS = {field: str for field in Fault._fields if field != "file"} | {"shape": int, "scale": (int, float)}
OF_A_CASE, OF_A_CHECK = ("shape", "scale"), ("on", "function")


# ---- tables


@cache
def read_faults(folder: Path = TESTS / "faults", root: Path = ROOT) -> list[Fault]:
    """Every fault of every table. Raises ValueError for a table of no file, and for a fault that is not whole."""
    return [fault for path in sorted(folder.rglob("*.toml")) for fault in _read_table(folder, path, root)]


def faults_of(test_file: str) -> list[Fault]:
    """The faults whose check stands in a test file, which gives its __file__."""
    place = Path(test_file).resolve().relative_to(TESTS).with_suffix("").as_posix()
    return [fault for fault in read_faults() if fault.check and fault.control.partition(":")[0] == place]


def _read_table(folder: Path, path: Path, root: Path) -> Iterator[Fault]:
    file = path.relative_to(folder).with_suffix("").as_posix()
    table = f"faults/{file}.toml"
    if not (root / f"{file}.py").is_file():
        raise ValueError(f"{table}: expected the table of a file, got no {file}.py")

    content = tomllib.loads(path.read_text())
    if [*content] != ["faults"] or not isinstance(content["faults"], list) or not content["faults"]:
        raise ValueError(f"{table}: expected a list of faults alone, got {', '.join(content) or 'nothing'}")

    for row in content["faults"]:
        where = f"{table}: {row.get('name', 'a fault without a name')}"
        _check_fields(row, where)
        fault = Fault(**row, file=file)
        _check_values(row, fault, where)
        yield fault


def _check_fields(row: dict[str, Any], where: str) -> None:
    if unknown := [field for field in row if field not in FIELDS]:
        raise ValueError(f"{where}: expected no field beside {', '.join(FIELDS)}, got {unknown[0]}")

    for field, kind in FIELDS.items():
        if field not in row and field not in Fault._field_defaults:
            raise ValueError(f"{where}: expected the field {field}, got none")
        if field in row and (not isinstance(row[field], kind) or isinstance(row[field], bool)):
            raise ValueError(f"{where}: {field}: got {row[field]!r} of another type")
        if row.get(field) == "" and field != "new":
            raise ValueError(f"{where}: {field}: expected a text, got an empty one")

    given = [field for field in ("case", "check") if field in row]
    if len(given) != 1:
        raise ValueError(f"{where}: expected a case or a check, got {' and '.join(given) or 'none'}")
    for field in OF_A_CHECK if given == ["case"] else OF_A_CASE:
        if field in row:
            raise ValueError(f"{where}: expected no {field} beside a {given[0]}, got {row[field]!r}")


def _check_values(row: dict[str, Any], fault: Fault, where: str) -> None:
    in_kernels = fault.file.startswith("kernels/")
    if fault.path not in ("cpu", "triton"):
        raise ValueError(f'{where}: path: expected "cpu" or "triton", got {fault.path!r}')
    for field in ("path", "case"):
        if field in row and not in_kernels:
            raise ValueError(f"{where}: expected no {field} outside of kernels/, got {row[field]!r}")
    if fault.old == fault.new:
        raise ValueError(f"{where}: expected another text in the place of `{fault.old}`, got the same")

    file, colon, function = fault.check.partition(":")
    if fault.check and not (colon and file.startswith("test_") and function.isidentifier()):
        raise ValueError(f'{where}: check: expected "test_<file>:<function>", got {fault.check!r}')


# ---- texts


def planted(fault: Fault, source: str) -> str:
    """The source with the fault in it. Raises ValueError where its text does not stand there exactly once."""
    start, end = _span(fault, source)
    if (count := source[start:end].count(fault.old)) != 1:
        raise ValueError(
            f"{fault.place}: {fault.name}: expected `{fault.old}` once, got it {count} times: plant the fault anew"
        )
    return source[:start] + source[start:end].replace(fault.old, fault.new) + source[end:]


def _span(fault: Fault, source: str) -> tuple[int, int]:
    """The start and end of the fault's function in the source, or of all of it."""
    if not fault.function:
        return 0, len(source)

    node: ast.AST = ast.parse(source)
    for name in fault.function.split("."):
        children = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        found = [child for child in children if child.name == name]
        if len(found) != 1:
            raise ValueError(f"{fault.place}: {fault.name}: expected {name} once, got it {len(found)} times")
        node = found[0]

    assert isinstance(node, ast.FunctionDef), f"{fault.place}: {fault.name}: expected a function"
    lines = source.splitlines(keepends=True)
    return sum(map(len, lines[: node.lineno - 1])), sum(map(len, lines[: node.end_lineno]))


# ---- checks

Check = TypeVar("Check", bound=Callable[..., Any])
CONTROLS: dict[str, Callable[..., Any]] = {}


def control(check: Check) -> Check:
    """Mark a check of a test file as one that faults must fail: tests/test_faults.py finds those of no fault."""
    file = Path(check.__code__.co_filename).resolve().relative_to(TESTS).with_suffix("")
    CONTROLS[f"{file.as_posix()}:{check.__name__}"] = check
    return check


def check_of(fault: Fault) -> Callable[..., Any]:
    return CONTROLS[fault.control]


def controls_in(tests: Path = TESTS) -> set[str]:
    """The checks that the test files mark, as Fault.control names them, without an import of the files."""
    return {
        f"{path.relative_to(tests).with_suffix('').as_posix()}:{node.name}"
        for path in tests.rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(d, ast.Name) and d.id == "control" for d in node.decorator_list)
    }
