"""Functions of a user's files, by FILE.py:function or package.module:function. The file is code, and runs."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ...model.errors import InputError
from .calls import brief, described


def load_function(specification: str, flag: str = "reward") -> Callable[..., Any]:
    """The function of FILE.py:function, or package.module:function. flag: what a message names; none of a place."""
    source, _, name = specification.rpartition(":")
    given, file = (
        f"--{flag} {brief(specification, 200)}" if flag else brief(specification, 200),
        brief(source, 100),
    )
    if not source:
        raise InputError(f"{given}: expected FILE.py:function or package.module:function")
    if source.endswith(".py") and not os.path.isfile(source):  # Path's raises where a name is too long
        raise InputError(f"{given}: no file {file}")

    try:
        module = _load_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
        function: Callable[..., Any] | None = getattr(module, name, None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a user's file raises is the user's to read
        raise InputError(f"{given}: {file} cannot be imported: {described(error)}") from error

    if not callable(function):
        raise InputError(f"{given}: {file} has no function '{brief(name, 60)}'")
    return function


def _load_file(path: Path) -> ModuleType:
    """The module of a .py file, which may import the modules beside it."""
    spec = importlib.util.spec_from_file_location(f"burnish_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    sys.path.append(str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module
