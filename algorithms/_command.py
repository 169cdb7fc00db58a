"""How a Config and a function become a command: flags by tyro, one message for wrong input, an exit status."""

import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import tyro

from ..model.errors import InputError
from ._calls import left
from ._distributed import processes


def run_command(
    name: str, module: ModuleType, function: Callable[[Any], object], arguments: Sequence[str]
) -> int:
    """Returns the exit status: 0, 1 for wrong input, 130 when interrupted. Wrong usage exits with 2 in tyro."""
    status = _status(name, module, function, arguments)
    return left(status) if module.__name__ == "__main__" else status


def _status(
    name: str, module: ModuleType, function: Callable[[Any], object], arguments: Sequence[str]
) -> int:
    summary = (module.__doc__ or "").splitlines()[0]
    config = tyro.cli(module.Config, prog=name, args=arguments, description=summary)
    try:
        with processes(name.split()[-1], getattr(config, "device", "cpu")):
            function(config)
    except InputError as error:
        print(f"\n{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; what was saved until now is whole", file=sys.stderr)
        return 130
    return 0
