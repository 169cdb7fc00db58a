"""`burnish bench`: the benchmark's commands, each a Config and a `main`, behind two doors.

    burnish bench [COMMAND] ...               flags are read by tyro
    python -m burnish.bench [COMMAND] ...     by argparse: torch, triton and numpy are enough

Without a COMMAND ops are timed.
"""

import importlib
from collections.abc import Sequence
from typing import Any

from ..algorithms.run.command import parsed, status_of
from ..model.errors import InputError
from .flags import check, flag, parse

COMMANDS = {  # name: (module with a Config and a main, one line)
    "static": ("ops.static", "compile every kernel for six chips, and say what got worse"),
    "tune": ("ops.tune", "candidate tiles, ranked without a GPU, and timed on one"),
    "paths": ("ops.paths", "the table of lora_linear's fastest paths, from measured times"),
    "gpu": ("runs.gpu", "all that a GPU is asked: compiled tests, times, tiles, within a budget"),
    "trainers": ("runs.trainers", "our trainers beside TRL's: tokens a second, memory, losses"),
    "rollouts": ("runs.rollouts", "sampling beside transformers': tokens a second, caches"),
    "scale": ("runs.scale", "a training step in several processes"),
    "embedding": ("runs.embedding", "a TRL step with our ops inside: memory and time"),
    "conformance": ("runs.conformance", "whether a trainer does what its papers say, check by check"),
    "report": ("publish.report", "write the tables and pictures of README and docs anew"),
}
# what a command may lack, beside what every command needs
PACKAGES = ("transformers", "peft", "trl", "accelerate", "datasets", "matplotlib", "jinja2", "pytest")


def usage() -> str:
    return "commands, each with --help:\n" + "\n".join(
        f"  {name:12} {line}" for name, (_, line) in COMMANDS.items()
    )


def main(words: Sequence[str], plain: bool = False) -> int:
    """Run one command, and return its exit status. plain: flags are read without tyro."""
    door = "python -m burnish.bench" if plain else "burnish bench"
    name = words[0] if words and words[0] in COMMANDS else ""
    module = importlib.import_module(f"burnish.bench.{COMMANDS[name][0] if name else 'ops.speed'}")
    door, rest = f"{door} {name}".strip(), list(words[1:] if name else words)
    summary = (module.__doc__ or "").splitlines()[0]
    summary = summary if name else f"{summary}\n\n{usage()}"
    cfg = parse(door, module.Config, rest, summary) if plain else parsed(door, module, rest, summary)

    def run() -> int:
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
    """Raises InputError where a flag of several values was given none: tyro takes that for one that is absent."""
    for name, value in vars(cfg).items():
        if value == () and flag(name) in words:
            raise InputError(f"{flag(name)}: expected at least one value, got none")
