"""Tables and pictures from measured and accepted figures; no number in README or docs is typed by hand.

    burnish bench report [--check] [--keep-r1 RUN] [--html FILE]

A Markdown file asks for a table by a pair of marks, between which everything is generated:

    <!-- generated: speed -->
    <!-- /generated -->

speed is the newest file of bench/results for each machine, static tells of docs/data/static.csv, which is written from
bench/static.json, cards is that beside what bench/results has of each card, candidates is bench/candidates.json, floors
are the registry's formulas on the datasheets of roofline.py, pictures are those in docs/pictures, drawn from the same.
trainers, conformance and r1 are the newest runs of that kind in bench/results; --keep-r1 puts one of `burnish r1`
there. loads is the table of architectures of model/files/architectures.py.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...model.errors import InputError
from ...model.files.architectures import loadable
from .. import record
from ..ops.paths import table as paths
from ..record import markdown, reading, write_whole
from .highlights import highlights
from .page import write_page
from .pictures import pictures
from .proofs import candidates, cards, floors, proven, static, static_csv
from .sheet import svg
from .times import headlines, speed
from .whole_runs import conformance, embedding, keep_r1, r1, rollouts, trainers

DOCUMENTS = (record.ROOT / "README.md", *sorted((record.ROOT / "docs").glob("*.md")))
MARK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- /generated -->)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Config:
    check: bool = False  # write nothing; status 1 and a list where a part is stale
    keep_r1: Path | None = (
        None  # the folder of a run of `burnish r1`, whose figures are kept in bench/results
    )
    html: Path | None = None  # write the page of the static proof there, and nothing else
    figures: Path | None = (
        None  # for --html: a file of `burnish bench static --json`, or else bench/static.json
    )


# ---- documents


def loads() -> str:
    """The architectures whose folders are read and written."""
    rows = [[f"`{name}`", f"`{class_name}`", special] for name, class_name, special in loadable()]
    return markdown(["`model_type`", "class in transformers", "what sets it apart"], rows)


def gallery() -> str:
    """Every picture, for a document in docs/."""
    return "\n\n".join(f"![{p.words}](pictures/{p.path.name})" for p in pictures()) + "\n"


SECTIONS: dict[str, Callable[[], str]] = {
    "paths": paths,
    "rollouts": rollouts,
    "r1": r1,
    "trainers": trainers,
    "conformance": conformance,
    "highlights": highlights,
    "headlines": headlines,
    "embedding": embedding,
    "proven": proven,
    "speed": speed,
    "static": static,
    "cards": cards,
    "candidates": candidates,
    "floors": floors,
    "pictures": gallery,
    "loads": loads,
}


def fill(text: str) -> str:
    """The document with every generated part made anew."""

    def make(match: re.Match[str]) -> str:
        if match[2] not in SECTIONS:
            raise ValueError(f"generated: expected one of {sorted(SECTIONS)}, got {match[2]}")
        return f"{match[1]}\n{SECTIONS[match[2]]()}\n{match[3]}"

    return MARK.sub(make, text)


def texts() -> dict[Path, str]:
    """Each file that is text, as it should be."""
    made = {path: fill(path.read_text()) for path in DOCUMENTS if path.exists()}
    return made | {record.ROOT / "docs" / "data" / "static.csv": static_csv()}


# ---- command


def stale() -> list[str]:
    """The files that differ from their sources."""
    late = [path for path, text in texts().items() if not path.exists() or path.read_text() != text]
    for picture in pictures():
        if not picture.path.exists() or picture.stamp not in picture.path.read_text():
            late.append(picture.path)
    return [str(path.relative_to(record.ROOT)) for path in late]


def main(cfg: Config) -> int:
    """Write what is stale, or list it; returns the exit status."""
    if cfg.figures and not cfg.html:
        raise InputError("--figures: expected it beside --html")
    if cfg.html:
        if cfg.check or cfg.keep_r1:
            raise InputError("--html: expected it without --check and --keep-r1")
        write_page(cfg.html, cfg.figures or record.ROOT / "bench" / "static.json")
        return 0

    if cfg.keep_r1:
        keep_r1(cfg.keep_r1)
    if cfg.check:
        late = stale()
        print("\n".join(f"stale: {name}" for name in late), file=sys.stderr)
        return 1 if late else 0

    # pictures last: they alone need matplotlib
    for path, text in texts().items():
        write_whole(path, text)
    for picture in pictures():
        with reading(picture.source):
            drawn = svg(picture.draw())
        write_whole(picture.path, f"{drawn}{picture.stamp}\n")
    return 0
