"""Loading of users' functions, given as FILE.py:function or package.module:function. Loading runs the file's code."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ...model.errors import InputError
from .calls import PASSES, brief, described


def load_function(specification: str, flag: str = "reward") -> Callable[..., Any]:
    """Load the function of FILE.py:function or package.module:function.

    flag: the flag that messages name; "" if the function is not from a flag. Raises InputError if loading fails.
    """
    source, _, name = specification.rpartition(":")
    given, file = (
        f"--{flag} {brief(specification, 200)}" if flag else brief(specification, 200),
        brief(source, 100),
    )
    if not source:
        raise InputError(f"{given}: expected FILE.py:function or package.module:function")
    if source.endswith(".py") and not os.path.isfile(source):  # Path.is_file raises if the name is too long
        raise InputError(f"{given}: no file {file}")

    try:
        module = _load_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
        function: Callable[..., Any] | None = getattr(module, name, None)
    except PASSES:
        raise
    except BaseException as error:  # shown to the user, whatever the user's file raises
        raise InputError(f"{given}: {file} cannot be imported: {described(error)}") from error

    if not callable(function):
        raise InputError(f"{given}: {file} has no function '{brief(name, 60)}'")
    return function


def _load_file(path: Path) -> ModuleType:
    """Import a .py file as a module. The file may import other modules in its folder."""
    spec = importlib.util.spec_from_file_location(f"burnish_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    sys.path.append(str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module
