"""The output of a whole run's figures, to the files that --keep and --json FILE name."""

from typing import Any

from .. import record
from ..flags import spelled


def write_figures(command: str, cfg: Any, *, kind: str = "", **figures: Any) -> None:
    """Write figures, with their date, commit and command line, to the files that --keep and --json name.

    kind: the first word of the file <kind>-<date>.json in bench/results, if it differs from the command's name.
    """
    files = [cfg.json] if cfg.json is not None else []
    record.keep(kind or command, spelled(f"burnish bench {command}", cfg), *files, kept=cfg.keep, **figures)
