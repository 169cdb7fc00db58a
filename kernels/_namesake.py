"""The root of a clone is on the path of what runs there, and our folder has the name of Hugging Face's package."""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def gives_way(name: str) -> bool:
    """Whether another installed package `kernels` now stands in sys.modules where ours was to be imported as `name`."""
    root = Path(__file__).resolve().parents[1]
    if name != "kernels":
        return False
    other = PathFinder.find_spec(name, [place for place in sys.path if Path(place).resolve() != root])
    if other is None or other.loader is None:  # a folder without an __init__.py is no package of anybody's
        return False
    sys.modules[name] = module_from_spec(other)
    other.loader.exec_module(sys.modules[name])
    return True
