"""The tables and pictures of README and docs, generated from measured and accepted figures.

    burnish bench report [--check] [--keep-r1 RUN] [--html FILE]

No number in these tables is typed by hand. A Markdown file marks the place of a table, and everything between the marks
is replaced:

    <!-- generated: speed -->
    <!-- /generated -->

The sources of the parts are:

    speed, headlines     the newest benchmark file of each machine in bench/results
    highlights           runs of several kinds in bench/results, for README.md
    static               docs/data/static.csv, which is written from bench/static.json
    proven               bench/static.json
    cards                bench/static.json, and the runs on each card in bench/results
    candidates           bench/candidates.json, and runs of `burnish bench tune` in bench/results
    paths                the times of lora_linear's paths in bench/results
    floors               the registry's formulas on the datasheets of roofline.py
    pictures             docs/pictures, which are drawn from the same figures
    loads                the table of architectures of model/files/architectures.py
    trainers, rollouts, embedding, conformance, r1
                         the newest run of that kind in bench/results

--keep-r1 copies the figures of a run of `burnish r1` to bench/results.
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
    check: bool = False  # write nothing; list stale files, with exit status 1 if there are any
    keep_r1: Path | None = None  # folder of a `burnish r1` run; keep its figures in bench/results
    html: Path | None = None  # write the page of the static proof to this file, and nothing else
    figures: Path | None = None  # for --html: a file of static --json (default: bench/static.json)


# ---- documents


def loads() -> str:
    """Return the table of the architectures whose folders can be read and written."""
    rows = [[f"`{name}`", f"`{class_name}`", special] for name, class_name, special in loadable()]
    return markdown(["`model_type`", "class in transformers", "what sets it apart"], rows)


def gallery() -> str:
    """Return the Markdown of every picture, for a document in docs/."""
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
    """Return the text of a document, with new text between all marks."""

    def make(match: re.Match[str]) -> str:
        if match[2] not in SECTIONS:
            raise ValueError(f"generated: expected one of {sorted(SECTIONS)}, got {match[2]}")
        return f"{match[1]}\n{SECTIONS[match[2]]()}\n{match[3]}"

    return MARK.sub(make, text)


def texts() -> dict[Path, str]:
    """Return the up-to-date text of each generated text file, by path."""
    made = {path: fill(path.read_text()) for path in DOCUMENTS if path.exists()}
    return made | {record.ROOT / "docs" / "data" / "static.csv": static_csv()}


# ---- command


def stale() -> list[str]:
    """Return the generated files that differ from their sources."""
    late = [path for path, text in texts().items() if not path.exists() or path.read_text() != text]
    for picture in pictures():
        if not picture.path.exists() or picture.stamp not in picture.path.read_text():
            late.append(picture.path)
    return [str(path.relative_to(record.ROOT)) for path in late]


def main(cfg: Config) -> int:
    """Write all generated files or, with --check, list the stale ones. Return the exit status."""
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
