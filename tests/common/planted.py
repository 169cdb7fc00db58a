"""Faults planted in our own sources: a check that passes beside one is a check that cannot fail.

A fault is put into a running function, into a copy of one file, or into copies of a file and of all that lies between
it and a public op. tests/common/faults.py tells where the faults stand.
"""

import ast
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest
from faults import ROOT, Fault, planted

PACKAGE = "burnish.kernels"
# of a copy's ops: one that is registered anew frees the one that others still call
NAMESPACE = "burnish_control"


def plant(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the fault's function the code that it has with the fault in it."""
    path = ROOT / f"{fault.file}.py"
    *owners, name = fault.function.split(".")
    module = importlib.import_module(f"burnish.{fault.file.replace('/', '.')}")
    function = getattr(reduce(getattr, owners, module), name)
    function = inspect.unwrap(getattr(function, "fget", function))

    code = compile(planted(fault, path.read_text()), path, "exec", dont_inherit=True)
    for part in (*owners, name):
        (code,) = (c for c in code.co_consts if inspect.iscode(c) and c.co_name == part)
    monkeypatch.setattr(getattr(function, "__func__", function), "__code__", code)


def copy_of(
    file: str, folder: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault | None = None
) -> ModuleType:
    """A file below the root, as "algorithms/dpo", as a module of its own, which is not the one others import."""
    source = (ROOT / f"{file}.py").read_text()
    room, _, stem = file.rpartition("/")
    path = folder / f"control_{stem}.py"
    path.write_text(planted(fault, source) if fault else source)

    spec = importlib.util.spec_from_file_location(f"burnish.{room.replace('/', '.')}.control_{stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


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
    """The copies that `top` needs to see another `file`: both, and what imports the one for the other, in order.

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


# ---- copies of files of kernels/ and of what imports them


def copies(
    file: str,
    top: str,
    folder: Path,
    fault: Fault | None = None,
    root: Path = ROOT / "kernels",
    package: str = PACKAGE,
) -> ModuleType:
    """A copy of the module `top` that sees the file with the fault in it; without a fault, a faithful one.

    The files between the two are copied, too, everything else is shared. The copies have the names of the originals,
    and stand in their places only while they are imported. A class that the package exports, as NF4Weight, stays the
    original where the fault leaves it as it is, so that a copy takes what a case makes.
    """
    names = between(file, top, root, package)
    with _set_back(package, names):
        for name in names:
            original = _path(name, root).read_text()
            source = planted(fault, original) if name == file and fault else original
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
