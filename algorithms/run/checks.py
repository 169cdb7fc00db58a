"""Checks of a command's flags before anything is loaded: bounds, device, output folder, and changes at --resume."""

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from ...model.errors import InputError, shown
from ...model.files.folder import absolute
from ...model.files.text_files import read_object
from ..show.trackers import check_tracker
from .adamw8bit import load_bitsandbytes
from .flags import Bounds, SaveDtype, TrainingFlags, bounds, check_number
from .held_out import check_evaluation
from .inputs import check_inputs
from .order import check_epochs, default_of
from .processes import check_joined, rank

CHECKPOINT, LOCK = "checkpoint.safetensors", ".lock"
MAY_DIFFER = (  # flags that --resume may change, because they change no mathematics of the steps that are left
    *("output", "resume", "save_every", "save_dtype", "keep", "log_every", "log_to", "samples"),
    *("steps", "epochs"),  # a longer run, or a shorter one
    *("eval_data", "eval_every", "patience"),  # eval_data only without --keep-best
    *("device", "micro_batch_tokens", "checkpoint_activations", "sampling_batch_size"),  # other roundings
    "reward_timeout",
)
SPELLED = ("chat_template", "reward")  # flags of text that may name a file
ONE_OR_SEVERAL = ("data", "eval_data")  # flags that take a file, or a list of files
WEIGHTS = ("data_weights", "reward_weights")  # flags whose default is a weight of 1 each


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

    if issubclass(type(config), TrainingFlags):
        check_epochs(config)
        check_evaluation(config)
    check_device(config.device)
    check_tracker(getattr(config, "log_to", None))
    if getattr(config, "optimizer", "") == "adamw8bit":
        load_bitsandbytes()
    folder = config.output
    if getattr(config, "keep", None) is not None and not config.save_every:
        raise InputError("--keep: expected --save-every, too, which writes the folders to keep")
    if getattr(config, "resume", False):  # compositions have no such flag
        _check_resumable(folder, config)
    elif rank() == 0:
        check_unused(folder, but=(LOCK,) if isinstance(config, TrainingFlags) else ())  # claim.py locks it


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


def check_unused(folder: Path, but: Sequence[str] = ()) -> None:
    """Raise InputError unless the folder is new or empty. but: names of files that may be there."""
    try:
        is_used = os.path.lexists(folder) and not (
            os.path.isdir(folder) and set(os.listdir(folder)) <= set(but)
        )
    except OSError as error:
        raise InputError(f"--output {folder}: cannot be read: {error.strerror}") from error
    if is_used:
        raise InputError(f"--output {folder}: expected a new or empty folder, found one in use")


def check_checkpoint(folder: Path) -> None:
    """Raise InputError unless the folder holds the checkpoint of a run."""
    if not os.path.isfile(folder / CHECKPOINT):  # False also for a name that no file can have
        raise InputError(f"--resume: {folder} holds no {CHECKPOINT}: give the folder of the run by --output")


def _check_resumable(folder: Path, config: Any) -> None:
    check_checkpoint(folder)
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink():  # the target of the link would be truncated and overwritten
            raise InputError(
                f"--resume: {entry}: expected the run's own file, got a link: replace it by the file itself"
            )

    try:
        earlier = read_object(folder / "config.json")
    except InputError as error:
        raise InputError(f"--resume: {error}") from error
    _check_same(folder, config, earlier)
    if rank() == 0:
        check_inputs(folder / CHECKPOINT, config)


def _check_same(folder: Path, config: Any, earlier: dict[str, Any]) -> None:
    """Raise InputError naming a flag whose value differs from that in `earlier`, the content of config.json.

    Spellings of one value are equal: paths are compared as paths. A flag that config.json does not have counts as its
    default, because it is newer than the run.
    """
    now, defaults = json.loads(as_json(config)), _defaults(config)
    for name, value in now.items():
        if name in MAY_DIFFER and not (name == "eval_data" and config.keep_best is not None):
            continue
        was = earlier[name] if name in earlier else defaults.get(name, "none")
        if _spelled(config, name, was) != _spelled(config, name, value):
            raise InputError(
                f"--resume: --{name.replace('_', '-')} is {shown(repr(value))}, but the run in {folder} had "
                f"{shown(repr(was)) if name in earlier or name in defaults else was}"
            )


def _defaults(config: Any) -> dict[str, Any]:
    """Return the defaults of a config's flags, as JSON has them. A flag that must be given has none."""
    found = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(config)
    }
    found = {name: value for name, value in found.items() if value is not dataclasses.MISSING}
    return json.loads(json.dumps(found, default=str))


def _spelled(config: Any, name: str, value: Any) -> Any:
    """Return the value of a flag in JSON, with every path absolute and its links followed.

    The function of FILE.py:function stays behind its file. A list of one file is the file, and weights of 1 are none.
    """
    if name in ONE_OR_SEVERAL and isinstance(value, list) and len(value) == 1:
        return _spelled(config, name, value[0])
    if name in WEIGHTS and isinstance(value, list) and all(each == 1 for each in value):
        return []
    if isinstance(value, list):
        return [_spelled(config, name, each) for each in value]
    is_path = "Path" in str(get_type_hints(type(config)).get(name))
    if not isinstance(value, str) or not (is_path or name in SPELLED):
        return value

    source, _, function = value.rpartition(":") if name == "reward" else (value, "", "")
    if not is_path and not os.path.isfile(source):
        return value
    try:
        return f"{absolute(source)}:{function}"
    except InputError:  # a name that no file can have
        return value


def make_folder(output: Path) -> None:
    """Create the folder of --output. Raises InputError if it cannot be created."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written: {error}") from error


def as_json(config: Any) -> str:
    """Return the text of a run's config.json. With --epochs, --steps is at its default, as it was given."""
    flags = dataclasses.asdict(config)
    if flags.get("epochs") is not None:
        flags["steps"] = default_of(config, "steps")
    return json.dumps(flags, indent=2, default=str) + "\n"
