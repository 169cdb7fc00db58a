"""The commands of `burnish bench`, each a module with a Config and a `main`, and their two entry points.

    burnish bench [COMMAND] ...               flags are read by tyro
    python -m burnish.bench [COMMAND] ...     flags are read by argparse; torch, triton and numpy are enough

Without a COMMAND, ops are timed.
"""

import importlib
from collections.abc import Sequence
from typing import Any

from ..algorithms.run.command import status_of
from ..algorithms.run.parsing import parsed
from ..algorithms.run.words import did_you_mean
from ..model.errors import InputError
from .flags import check, flag, parse

COMMANDS = {  # name: (module with a Config and a main, one line)
    "static": ("ops.static", "compile every kernel for six chips, and list the figures that got worse"),
    "tune": ("ops.tune", "rank candidate tiles, and time them on a GPU"),
    "paths": ("ops.paths", "write the table of lora_linear's fastest paths from measured times"),
    "gpu": ("runs.gpu", "run everything that needs a GPU: compiled tests, times, tiles, within a time limit"),
    "trainers": ("runs.trainers", "compare our trainers with TRL's: tokens per second, memory, losses"),
    "rollouts": (
        "runs.rollouts",
        "compare our generation with transformers': tokens per second, cache sizes",
    ),
    "scale": ("runs.scale", "measure the memory of a training step in several processes"),
    "embedding": ("runs.embedding", "measure memory and time of a TRL step with our ops inside"),
    "conformance": ("runs.conformance", "check whether a trainer computes what its papers define"),
    "report": ("publish.report", "generate the tables and pictures of README and docs"),
}
# packages that some commands need, and others do not
PACKAGES = ("transformers", "peft", "trl", "accelerate", "datasets", "matplotlib", "jinja2", "pytest")


def usage() -> str:
    return "commands, each with --help:\n" + "\n".join(
        f"  {name:12} {line}" for name, (_, line) in COMMANDS.items()
    )


def main(words: Sequence[str], plain: bool = False) -> int:
    """Run one command, and return its exit status. plain: read the flags with argparse instead of tyro."""
    door = "python -m burnish.bench" if plain else "burnish bench"
    name = words[0] if words and words[0] in COMMANDS else ""
    module = importlib.import_module(f"burnish.bench.{COMMANDS[name][0] if name else 'ops.speed'}")
    door, rest = f"{door} {name}".strip(), list(words[1:] if name else words)
    summary = (module.__doc__ or "").splitlines()[0]
    summary = summary if name else f"{summary}\n\n{usage()}"
    read = lambda: parse(door, module.Config, rest, summary) if plain else parsed(door, module, rest, summary)

    def run() -> int:
        if not name and rest:
            check_command(rest[0])
        cfg = read()
        check(cfg)
        check_values(cfg, rest)
        try:
            return module.main(cfg)
        except ModuleNotFoundError as error:
            if error.name not in PACKAGES:
                raise
            raise InputError(f"expected the package {error.name}, which is not installed") from error

    return status_of(door, run)


def check_values(cfg: Any, words: Sequence[str]) -> None:
    """Raise InputError if a flag that takes several values got none. tyro treats such a flag as absent."""
    for name, value in vars(cfg).items():
        if value == () and flag(name) in words:
            raise InputError(f"{flag(name)}: expected at least one value, got none")


def check_command(word: str) -> None:
    """Raise InputError if the first word is neither a command nor an op, but is like a command."""
    from .cases.registry import CASES  # imports all ops, which most commands do without

    near = did_you_mean(word, COMMANDS)
    if near and word not in {name for case in CASES for name in (case.op, case.name)}:
        raise InputError(f"{word}: no command or op of this name{near}")
