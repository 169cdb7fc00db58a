"""Faults planted in our own sources: a check that passes beside one is a check that cannot fail."""

import importlib.util
import inspect
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest


class Fault(NamedTuple):
    """A function with one place changed, and the check that must then fail."""

    name: str
    function: Any
    old: str
    new: str
    check: Callable[..., None]


def plant(function: Any, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the function the code of its source with `old`, which stands in it once, replaced by `new`."""
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{function.__name__} no longer has `{old}` once: plant this control anew"
    planted = compile(source.replace(old, new), "planted", "exec")
    (code,) = (c for c in planted.co_consts if inspect.iscode(c) and c.co_name == function.__name__)
    monkeypatch.setattr(function, "__code__", code)


def copy_of(
    module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, old: str = "", new: str = ""
) -> ModuleType:
    """The file of a module as a module of its own, with `old` replaced by `new`."""
    assert module.__file__ is not None
    file = Path(module.__file__)
    source = file.read_text()
    assert old in source, f"{file.name} no longer has `{old}`: plant this control anew"
    path = folder / f"control_{file.name}"
    path.write_text(source.replace(old, new) if old else source)
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.control_{file.stem}", path)
    assert spec is not None and spec.loader is not None
    copied = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, copied)
    spec.loader.exec_module(copied)
    return copied
