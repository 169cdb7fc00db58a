"""The command line of a method, made from its Config and its function: flags, one-line errors, an exit status."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from math import inf
from types import ModuleType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import torch

from ...model.errors import InputError, shown
from .calls import brief, left
from .flags import POSITIONAL, helps
from .processes import processes
from .streams import run_program

FIRST = ("model", "data", "output")  # the first flags in --help
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
    config = parsed(name, module, arguments)

    def run() -> None:
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


def parsed(name: str, module: ModuleType, arguments: Sequence[str], summary: str = "") -> Any:
    """Parse command-line arguments to the module's Config.

    summary: the first line of --help, by default that of the module's docstring.
    """
    import tyro  # not needed for a Config that is made in Python

    # 1. give each flag its help, which tyro does not find if a class sets only the default; the order is FIRST, then
    # the command's own flags, then the shared flags
    config, hints = module.Config, get_type_hints(module.Config, include_extras=True)
    texts, of_command = helps(config), list(vars(config)["__annotations__"])
    order = {name: i for i, name in reversed(list(enumerate([*FIRST, *of_command])))}
    fields: list[Any] = []
    for field in sorted(dataclasses.fields(config), key=lambda field: order.get(field.name, inf)):
        default: Any = {"default": field.default, "default_factory": field.default_factory}
        hint = Annotated[hints[field.name], tyro.conf.arg(help=texts.get(field.name))]
        if POSITIONAL in getattr(hints[field.name], "__metadata__", ()):
            several = get_origin(get_args(hints[field.name])[0]) is tuple
            metavar = f"[{field.name.upper()} ...]" if several else field.name.upper()
            shown = tyro.conf.arg(help=texts.get(field.name), metavar=metavar)
            hint = tyro.conf.Positional[Annotated[hints[field.name], shown]]
        fields.append((field.name, hint, dataclasses.field(**default)))
    flags: Any = dataclasses.make_dataclass("Flags", fields, frozen=True, kw_only=True)

    # 2. parse the arguments to a Config
    summary = summary or (module.__doc__ or "").splitlines()[0]
    given = tyro.cli(flags, prog=name, args=arguments, description=summary)
    return config(**vars(given))
