"""Burnish's version, and those of what a result depends on."""

import platform
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"  # the only place: setup.py reads it here, and burnish.algorithms names it, too


def versions() -> dict[str, str]:
    """Return the versions of Burnish, torch, Triton and Python. A package that is not installed is "absent".

    No package is imported.
    """
    found = {"burnish": __version__}
    for package in ("torch", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found | {"Python": platform.python_version()}
