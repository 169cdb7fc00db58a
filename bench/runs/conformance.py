"""Invariants that all trainers of language models share, checked on any trainer.

    burnish bench conformance FILE.py:adapter [FILE.py:adapter ...] [--keep]

FILE.py is written by the user. Its function after the colon returns a `Trainer` of bench/conformance.py, which connects
the trainer to the checks of checks.py. The outcome of a check is "holds", "does not hold" with the finding, or "not
applicable" if the trainer lacks the checked feature.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch

from ...algorithms.run.flags import POSITIONAL
from ...algorithms.run.user_files import load_function
from ...model.errors import InputError
from ..conformance import NotApplicable, Toy, Trainer
from .checks import CHECKS, make_toy
from .figures import write_figures


@dataclass(frozen=True, kw_only=True)
class Config:
    adapters: Annotated[tuple[str, ...], POSITIONAL] = ()  # FILE.py:adapter, one or more
    json: Path | None = None  # write the outcomes to this file
    keep: bool = False  # keep the outcomes in bench/results, under their usual name


class Outcome(NamedTuple):
    """The outcome of one check, with a detail: the finding, or the reason why the check does not apply."""

    status: Literal["holds", "does not hold", "not applicable"]
    detail: str = ""


def outcome(name: str, trainer: Trainer, toy: Toy) -> Outcome:
    """Run the named check, and return its outcome."""
    needs, _, function = CHECKS[name]
    subject = getattr(trainer, needs)
    if subject is None:
        return Outcome("not applicable", trainer.absent.get(needs, f"the adapter has no {needs}"))

    try:
        function(subject, toy, trainer)
    except NotApplicable as reason:
        return Outcome("not applicable", str(reason))
    except AssertionError as found:
        return Outcome("does not hold", str(found))
    return Outcome("holds")


def run(trainer: Trainer, toy: Toy, names: tuple[str, ...] = ()) -> dict[str, Outcome]:
    """Run the named checks, by default all of CHECKS, and return the outcome of each by name."""
    return {name: outcome(name, trainer, toy) for name in names or CHECKS}


def main(cfg: Config) -> int:
    if not cfg.adapters:
        raise InputError("expected one adapter or more, each as FILE.py:adapter, got none")
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        toy = make_toy(Path(folder))
        for specification in cfg.adapters:
            adapter: Any = load_function(specification, "")
            trainer: Trainer = adapter()
            outcomes = run(trainer, toy)
            found.append({"name": trainer.name, "version": trainer.version, "outcomes": outcomes})

            print(f"{trainer.name} {trainer.version}")
            for name, (status, detail) in outcomes.items():
                print(f"  {name:<26} {status}" + (f": {detail}" if detail else ""))

    write_figures("conformance", cfg, trainers=found)
    return 0
