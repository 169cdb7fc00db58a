"""The output of a run's figures: to bench/results with --keep, and to FILE with --json FILE."""

from typing import Any

from .. import record
from ..flags import spelled


def write_figures(command: str, cfg: Any, *, kind: str = "", **figures: Any) -> None:
    """Write figures with the date, the commit and the command line: to bench/results if cfg.keep, and to cfg.json.

    kind: the first word of the file <kind>-<date>.json in bench/results, if it differs from the command's name.
    """
    files = [cfg.json] if cfg.json is not None else []
    record.keep(kind or command, spelled(f"burnish bench {command}", cfg), *files, kept=cfg.keep, **figures)
