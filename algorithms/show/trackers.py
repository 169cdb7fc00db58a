"""Programs that follow a run beside metrics.jsonl, by the name of --log-to: one class each."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ...model.errors import InputError

EVENTS = "tensorboard"  # the folder of events in a run folder


class Tracker(Protocol):
    """A program that follows a run. log: write the numbers of a line of metrics.jsonl, at its step."""

    def log(self, line: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Events in FOLDER/tensorboard, for `tensorboard --logdir`.

    A resumed run writes another file there, which tells TensorBoard to drop the events from its first step on. Each
    line is flushed, so that events of steps before a checkpoint are never lost.
    """

    def __init__(self, folder: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / EVENTS), purge_step=start or None)

    def log(self, line: Mapping[str, Any]) -> None:
        for name, value in line.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


TRACKERS: dict[str, Callable[[Path, int], Tracker]] = {"tensorboard": TensorBoard}


def check_tracker(name: str | None) -> None:
    """Raise InputError if the package of --log-to is not installed. It has the tracker's name."""
    if name is not None and find_spec(name) is None:
        raise InputError(f"--log-to {name}: expected {name} to be installed: pip install {name}")
