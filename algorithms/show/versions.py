"""Burnish's version, and those of what a result depends on."""

import platform
from importlib.metadata import PackageNotFoundError, version

VERSIONS = "versions.json"  # in a run folder
__version__ = "0.1.0"  # the only place: setup.py reads it here, and burnish.algorithms names it, too


def versions(device: str | None = None) -> dict[str, str]:
    """Return the versions of Burnish, torch, Triton and Python. A package that is not installed is "absent".

    device: the device of a run; its name and the system are then returned as well. Without it no package is imported.
    """
    found = {"burnish": __version__}
    for package in ("torch", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    found["Python"] = platform.python_version()
    if device is None:
        return found
    import torch

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return found | {"device": f"{device}, {name}", "system": platform.platform()}
