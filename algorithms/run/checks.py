"""Checks of a command's flags before anything is loaded: bounds, device, output folder, and changes at --resume."""

import dataclasses
import json
import os
import re
from math import inf
from pathlib import Path
from typing import Any, get_args

import torch

from ...model.errors import InputError, shown
from ...model.files.config_keys import LARGEST
from ...model.files.text_files import read_object
from .flags import Bounds, SaveDtype, bounds
from .processes import check_joined, rank

CHECKPOINT = "checkpoint.safetensors"
MOST = 2**53  # the largest count; sums of counts still fit 64 bits
MAY_DIFFER = (  # flags that --resume may change, such as --steps for a longer run
    "output",
    "resume",
    "reward_timeout",
    "save_dtype",
    "save_every",
    "steps",
)


def check_flags(config: Any, **narrower: tuple[float, float]) -> None:
    """Raise InputError if a flag is out of its bounds or NaN. narrower: bounds by name that depend on other flags.

    Also checks that torch can use the device, that all processes have joined, and that the output folder is not in use.
    With --resume the folder must hold a checkpoint of a run with the same flags.
    """
    check_joined()
    torch_dtype(getattr(config, "save_dtype", "auto"))
    of_flags = bounds(type(config))
    for name, found in of_flags.items():
        check_number(name, getattr(config, name), found)
    for name, ends in narrower.items():
        check_number(name, getattr(config, name), Bounds(*ends, of_flags[name].switch))

    check_device(config.device)
    folder = config.output
    if getattr(config, "resume", False):  # compositions have no such flag
        _check_resumable(folder, config)
    elif rank() == 0 and _is_used(folder):
        raise InputError(f"--output {folder}: expected a new or empty folder, found one in use")


def check_number(name: str, value: Any, within: Bounds) -> None:
    """Raise InputError if the number of a flag, or one of several, is outside its bounds."""
    if isinstance(value, tuple):
        for each in value:
            check_number(name, each, within)
        return
    if value is None or (within.switch and value == inf):
        return
    most = min(within.most, MOST if isinstance(value, int) else LARGEST)
    if not within.least <= value <= most:
        if most < MOST:
            expected = f"between {within.least:g} and {most:g}"
        else:
            expected = f"at most {most:g}" if value > most else f"at least {within.least:g}"
        got = shown(value)  # an integer may have more digits than Python writes
        raise InputError(f"--{name.replace('_', '-')}: expected a number {expected}, got {got}")


def torch_dtype(name: str, flag: str = "save-dtype") -> torch.dtype | None:
    """Return the dtype of a name in SaveDtype, or None for "auto", which keeps each tensor's dtype in the model folder.

    flag: the flag to name in the InputError for any other name.
    """
    if name not in get_args(SaveDtype):
        raise InputError(f"--{flag}: expected one of {', '.join(get_args(SaveDtype))}, got {name!r}")
    return None if name == "auto" else getattr(torch, name)


def check_device(device: str) -> None:
    """Raise InputError if --device is not a device that torch can use here."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise InputError(f"--device: expected cpu, cuda or cuda:N, got {shown(device)}")
    if device != "cpu" and int(device[5:] or 0) >= (found := torch.cuda.device_count()):
        raise InputError(f"--device {device}: torch finds {found} CUDA devices; use --device cpu")


def _is_used(folder: Path) -> bool:
    try:
        return os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder))
    except OSError as error:
        raise InputError(f"--output {folder}: cannot be read: {error.strerror}") from error


def _check_resumable(folder: Path, config: Any) -> None:
    if not os.path.isfile(folder / CHECKPOINT):  # False also for a name that no file can have
        raise InputError(f"--resume: {folder} holds no {CHECKPOINT}: give the folder of the run by --output")
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink():  # the target of the link would be truncated and overwritten
            raise InputError(
                f"--resume: {entry}: expected the run's own file, got a link: replace it by the file itself"
            )

    try:
        earlier = read_object(folder / "config.json")
    except InputError as error:
        raise InputError(f"--resume: {error}") from error
    for name, value in json.loads(as_json(config)).items():
        if name not in MAY_DIFFER and earlier.get(name) != value:
            had = shown(repr(earlier[name])) if name in earlier else "none"
            raise InputError(
                f"--resume: --{name.replace('_', '-')} is {shown(repr(value))}, but the run in {folder} had {had}"
            )


def make_folder(output: Path) -> None:
    """Create the folder of --output. Raises InputError if it cannot be created."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written: {error}") from error


def as_json(config: Any) -> str:
    """Return the text of a run's config.json."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"
