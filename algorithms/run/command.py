"""The command line of a method, made from its Config and its function: flags, one-line errors, an exit status."""

import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from ...model.errors import InputError, shown
from .calls import brief, left
from .parsing import parsed
from .processes import processes
from .streams import run_program

CPU_IS_FULL = "can't allocate memory"  # part of the message of torch's RuntimeError


def run_command(
    name: str, module: ModuleType, function: Callable[[Any], object], arguments: Sequence[str]
) -> int:
    """Run a command with command-line arguments. name: its name in messages. module: the module with its Config.

    Returns the exit status: 0 for success, 1 for wrong input, 130 if interrupted. For wrong usage tyro exits with 2.
    """
    if module.__name__ != "__main__":
        return _status(name, module, function, arguments)
    return left(run_program(name, lambda: _status(name, module, function, arguments)))


def _status(
    name: str, module: ModuleType, function: Callable[[Any], object], arguments: Sequence[str]
) -> int:
    def run() -> None:
        config = parsed(name, module, arguments)
        with processes(name.split()[-1], getattr(config, "device", "cpu")):
            function(config)

    return status_of(name, run)


def status_of(name: str, run: Callable[[], int | None]) -> int:
    """Call `run`, and return its exit status or 0 for None. Wrong input gives 1 and a message, an interruption 130."""
    try:
        return run() or 0
    except InputError as error:
        print(f"\n{name}: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a name that is too long, a full device, a folder without permission
        where = "" if error.filename is None else f"{shown(error.filename)}: "
        print(f"\n{name}: {InputError(f'{where}{error.strerror or error}')}", file=sys.stderr)
        return 1

    # missing package or memory
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        print(f"\n{name}: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and CPU_IS_FULL not in str(error):
            raise
        print(f"\n{name}: not enough memory: {brief(str(error), 200) or 'of the host'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; all files saved so far are complete", file=sys.stderr)
        return 130
