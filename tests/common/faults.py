"""Faults in the files of kernels/: their tables, and copies of the files in which one is planted.

A table is tests/faults/<file>.toml for the text of kernels/<file>.py, rooms included (tests/faults/head/topk.toml):

    faults = [
        { name = "eps dropped", old = "/ N + eps", new = "/ N", case = "rms_norm/hidden", scale = 1e-3 },
    ]

A fault replaces `old`, which must stand in the file exactly once, by `new`; the case, at its `shape` and `scale`, must
then fail on its `path`: "triton" unless it says "cpu". `\\n` in a text between double quotes is the end of a line.
"""

import ast
import importlib.util
import sys
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
PACKAGE = "burnish.kernels"
# of a copy's ops: one that is registered anew frees the one that others still call
NAMESPACE = "burnish_control"


class Fault(NamedTuple):
    name: str
    old: str
    new: str
    case: str
    shape: int = 1  # index into the case's shapes
    scale: float = 1
    path: str = "triton"
    file: str = ""  # of kernels/, without its ending: where the table stands says it


# ---- tables


def read_faults(folder: Path = TESTS / "faults") -> list[Fault]:
    """Every fault of every table. Raises ValueError for one that lacks a field or has one too many."""
    return [fault for path in sorted(folder.rglob("*.toml")) for fault in _read_table(folder, path)]


def _read_table(folder: Path, path: Path) -> Iterator[Fault]:
    file = path.relative_to(folder).with_suffix("").as_posix()
    kinds = {field: str for field in Fault._fields} | {"shape": int, "scale": (int, float)}
    del kinds["file"]

    for row in tomllib.loads(path.read_text())["faults"]:
        place = f"faults/{file}.toml: {row.get('name', 'a fault without a name')}"
        if unknown := [field for field in row if field not in kinds]:
            raise ValueError(f"{place}: expected no field beside {', '.join(kinds)}, got {unknown[0]}")
        for field, kind in kinds.items():
            if field not in row and field not in Fault._field_defaults:
                raise ValueError(f"{place}: expected the field {field}, got none")
            if field in row and not isinstance(row[field], kind):
                raise ValueError(f"{place}: {field}: got {row[field]!r} of another type")
        fault = Fault(**row, file=file)
        if fault.path not in ("cpu", "triton"):
            raise ValueError(f'{place}: path: expected "cpu" or "triton", got {fault.path!r}')
        yield fault


def planted(source: str, old: str, new: str, file: str) -> str:
    """The source with the fault in it. Raises ValueError where `old` does not stand there exactly once."""
    if (count := source.count(old)) != 1:
        raise ValueError(
            f"kernels/{file}.py: expected `{old}` once, got it {count} times: plant the fault anew"
        )
    return source.replace(old, new)


# ---- which files import which


def _path(file: str, root: Path) -> Path:
    """The source of a file or of a room, in which its __init__.py stands for it."""
    return root / file / "__init__.py" if (root / file).is_dir() else root / f"{file}.py"


def imported(file: str, root: Path, package: str = PACKAGE) -> set[str]:
    """The files and rooms of `root` from which a file of it imports, as "_chip" or "head/blocks"."""
    ours = package.split(".")
    here = ours + file.split("/")
    parents = here if (root / file).is_dir() else here[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(_path(file, root).read_text())):
        if isinstance(node, ast.Import):
            wanted = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = parents[: len(parents) - node.level + 1] if node.level else []
            start = start + (node.module.split(".") if node.module else [])
            wanted = [[*start, alias.name] for alias in node.names]
        else:
            continue
        for parts in wanted:
            if parts[: len(ours)] == ours:
                names = parts[len(ours) :]
                whole, room = "/".join(names), "/".join(names[:-1])
                found.add(whole if names and _path(whole, root).is_file() else room)
    return found - {""}


def between(file: str, top: str, root: Path, package: str = PACKAGE) -> list[str]:
    """What has to be copied so that `top` sees another `file`: both, and what imports the one for the other, in order.

    Raises ValueError where `top` does not import `file`, neither itself nor through others.
    """
    arrows: dict[str, set[str]] = {}
    rest = [top]
    while rest:
        if (name := rest.pop()) not in arrows:
            arrows[name] = imported(name, root, package) if name != file else set()
            rest += arrows[name]
    order = [*TopologicalSorter(arrows).static_order()]
    reached = {file}
    for name in order:
        if arrows[name] & reached:
            reached.add(name)
    if file not in arrows:
        raise ValueError(
            f"{package}: expected that {top}.py imports {file}.py, got no way from one to the other"
        )
    return [name for name in order if name in reached]


# ---- copies


def plant(
    file: str,
    old: str,
    new: str,
    top: str,
    folder: Path,
    root: Path = ROOT / "kernels",
    package: str = PACKAGE,
) -> ModuleType:
    """A copy of the module `top` that sees `file` with the fault in it; without `old`, a faithful one.

    The files between the two are copied, too, everything else is shared. The copies have the names of the originals,
    and stand in their places only while they are imported. A class that the package exports, as NF4Weight, stays the
    original where the fault leaves it as it is, so that a copy takes what a case makes.
    """
    names = between(file, top, root, package)
    with _set_back(package, names):
        for name in names:
            original = _path(name, root).read_text()
            source = planted(original, old, new, file) if name == file and old else original
            copy = folder / f"control_{name.replace('/', '_')}.py"
            copy.write_text(source)
            module = _import_copy(name, copy, root, package)
            for exported in _same_classes(original, source) & vars(sys.modules[package]).keys():
                setattr(module, exported, getattr(sys.modules[package], exported))
        return sys.modules[_module(top, package)]


@contextmanager
def _set_back(package: str, names: Iterable[str]) -> Iterator[None]:
    """Give the copies their own namespace of ops, and afterwards every module its place again."""
    originals = {name: importlib.import_module(name) for name in (_module(n, package) for n in names)}
    register = [m for n, m in sys.modules.items() if n.startswith(f"{package}.") and hasattr(m, "NAMESPACE")]
    namespaces = [(module, module.NAMESPACE) for module in register]
    try:
        for module in register:
            module.NAMESPACE = NAMESPACE
        yield
    finally:
        for module, namespace in namespaces:
            module.NAMESPACE = namespace
        sys.modules.update(originals)
        for name, original in originals.items():
            _put(name, original)


def _module(file: str, package: str) -> str:
    return f"{package}.{file.replace('/', '.')}"


def _put(name: str, module: ModuleType) -> None:
    parent, _, last = name.rpartition(".")
    sys.modules[name] = module
    setattr(sys.modules[parent], last, module)


def _import_copy(file: str, copy: Path, root: Path, package: str) -> ModuleType:
    name = _module(file, package)
    room = [str(root / file)] if (root / file).is_dir() else None
    spec = importlib.util.spec_from_file_location(name, copy, submodule_search_locations=room)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _put(name, module)
    if room:  # its files are imported already, and only a first import makes them attributes
        files = {n: m for n, m in sys.modules.items() if n.rpartition(".")[0] == name}
        vars(module).update({n.rpartition(".")[2]: m for n, m in files.items()})

    spec.loader.exec_module(module)
    if hasattr(module, "NAMESPACE"):
        module.NAMESPACE = NAMESPACE
    return module


def _same_classes(*sources: str) -> set[str]:
    """The names of the classes that stand in all sources alike."""
    found = [
        {(node.name, ast.dump(node)) for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
        for source in sources
    ]
    return {name for name, _ in set.intersection(*found)}
