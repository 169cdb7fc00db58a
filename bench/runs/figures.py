"""The figures of a whole run, written where --keep and --json FILE say."""

import json
from datetime import date
from typing import Any

from .. import record
from ..flags import spelled


def write_figures(command: str, cfg: Any, *, kind: str = "", **figures: Any) -> None:
    """Write figures with their day, their commit and the command line that gives `cfg`, wherever that says.

    kind: of the file in bench/results, <kind>-<date>.json, where it is not the command's name.
    """
    today = date.today().isoformat()
    kind = kind or command
    result = {
        "kind": kind,
        "date": today,
        "commit": record.run_text("git", "rev-parse", "--short", "HEAD"),
        "command": spelled(f"burnish bench {command}", cfg),
        **figures,
    }

    paths = [record.RESULTS / f"{kind}-{today}.json"] if cfg.keep else []
    paths += [cfg.json] if cfg.json is not None else []
    for path in paths:
        record.write_whole(path, json.dumps(result, indent=1) + "\n")
        print(f"written: {path}")
