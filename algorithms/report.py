"""Write the page of a run anew, from the files of its folder.

A run writes report.html itself. This command is for folders of earlier versions, and for files that have changed. It
passes over broken lines, and says on the page how many there are.

Run:    burnish report FOLDER
"""

import dataclasses
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from .run.command import run_command
from .run.flags import POSITIONAL
from .show.metrics import method_of
from .show.records import read_records
from .show.report import write_report


@dataclass(frozen=True, kw_only=True)
class Config:
    folder: Annotated[Path, POSITIONAL]  # folder of a run, its --output


def report(cfg: Config) -> Path:
    """Write report.html into the run folder, and return its path."""
    method = method_of(read_records(cfg.folder).flags)
    written = write_report(cfg.folder, defaults=_defaults(method))
    print(f"written: {written}")
    return written


def _defaults(method: str) -> dict[str, Any]:
    """Return the defaults of a method's flags, by name; none for a method that is not known."""
    if not method:
        return {}
    config = importlib.import_module(f"{__package__}.{method}").Config
    return {
        field.name: field.default
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING
    }


if __name__ == "__main__":
    sys.exit(run_command("report", sys.modules[__name__], report, sys.argv[1:]))
