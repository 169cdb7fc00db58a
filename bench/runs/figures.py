"""The figures of a whole run, written where --keep and --json FILE say."""

from typing import Any

from .. import record
from ..flags import spelled


def write_figures(command: str, cfg: Any, *, kind: str = "", **figures: Any) -> None:
    """Write figures with their day, their commit and the command line that gives `cfg`, wherever that says.

    kind: of the file in bench/results, <kind>-<date>.json, where it is not the command's name.
    """
    files = [cfg.json] if cfg.json is not None else []
    record.keep(kind or command, spelled(f"burnish bench {command}", cfg), *files, kept=cfg.keep, **figures)
