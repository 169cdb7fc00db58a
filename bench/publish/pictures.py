"""The pictures in docs/pictures, and the figures that they are drawn from.

There is one picture of times for each case that was measured on a GPU at three shapes or more. roofline.svg has the
rooflines of the chips' datasheets, with each op at its first benchmark shape. r1.svg has the newest run of `burnish r1`
in bench/results.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import record
from ..cases.case import Work, label
from ..cases.registry import CASES
from ..ops.roofline import CHIPS
from . import drawings, sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = record.ROOT / "docs" / "pictures"
# part of the stamp, so that changed drawing code makes pictures stale
CODE = [inspect.getsource(module).encode() for module in (drawings, sheet)]


@dataclass(frozen=True)
class Picture:
    """A file in docs/pictures, and the source that it is drawn from.

    The file has a stamp, a hash of the figures and of the drawing code, which shows whether they have changed.
    """

    path: Path
    words: str  # alternative text
    source: str
    figures: list[Any]
    draw: Callable[[], "Figure"]

    @property
    def stamp(self) -> str:
        digest = hashlib.sha256(json.dumps(self.figures, sort_keys=True).encode())
        for code in CODE:
            digest.update(code)
        return f"<!-- {self.source} {digest.hexdigest()[:16]} -->"


def pictures() -> list[Picture]:
    """Return the roofline, the picture of the newest run of r1, and the pictures of times on GPUs."""
    made = [roofline()]
    if run := record.newest_run("r1"):
        path, result = run
        words = "pass@1 of each stage of R1's recipe, and learning curves"
        made.append(Picture(PICTURES / "r1.svg", words, path, [result], partial(drawings.r1_figure, result)))
    for path, result in record.newest_results().items():
        with record.reading(path):
            made += _speed_pictures(path, result) if "driver" in result["machine"] else []
    return made


def roofline() -> Picture:
    """Return the picture of the chips' rooflines, with all ops on the roofline of one chip."""
    works = headline_works()
    figures = [[name, work.flops, work.bytes] for name, work in works.items()]
    figures += [[chip, of.name, of.bandwidth, of.rates["bf16"]] for chip, of in CHIPS.items()]
    words = "rooflines of six chips, and where each op stands on the H100's"
    draw = partial(drawings.roofline_figure, works)
    return Picture(PICTURES / "roofline.svg", words, "bench/cases/registry.py", figures, draw)


def roofline_picture() -> str:
    """Return the SVG of the roofline, for the HTML page."""
    return sheet.svg(roofline().draw())


def headline_works() -> dict[str, Work]:
    """Return case -> bytes and operations of the forward pass, at its first benchmark shape on a GPU, in bf16."""
    return {c.name: c.work(c.bench["cuda"][0], 2)[0] for c in CASES if c.bench.get("cuda")}


def _speed_pictures(path: str, result: dict[str, Any]) -> list[Picture]:
    by_case: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        by_case.setdefault((row["case"], row["pass"]), []).append(row)

    made = []
    for (case, which), rows in by_case.items():
        if len({label(row["dims"]) for row in rows}) >= 3:
            name = re.sub(r"\W+", "-", f"{case} {which}") + ".svg"
            where = f"{result['machine']['device']}, {'/'.join(dict.fromkeys(row['dtype'] for row in rows))}"
            words = f"{case}, {which}: each contestant's share of the roofline and its time, {where}"
            draw = partial(drawings.speed_figure, case, which, rows, where)
            made.append(Picture(PICTURES / name, words, path, [where, *rows], draw))
    return made
