"""A way around a name clash: this folder has the name of Hugging Face's package `kernels`.

A script in the root of a clone has that root on its import path. `import kernels` would then import this folder instead
of the package.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def gives_way(name: str) -> bool:
    """Import another installed package called `kernels` in place of this folder, and return whether that was done.

    name: the name under which this folder is being imported. Nothing is done unless it is "kernels".
    """
    root = Path(__file__).resolve().parents[1]
    if name != "kernels":
        return False
    other = PathFinder.find_spec(name, [place for place in sys.path if Path(place).resolve() != root])
    if other is None or other.loader is None:  # a folder without an __init__.py has no loader
        return False
    sys.modules[name] = module_from_spec(other)
    other.loader.exec_module(sys.modules[name])
    return True
