"""The pictures in docs/pictures: what each is drawn from, and how.

speed: a case that was measured on a GPU at three shapes or more. roofline: the datasheets' roofs, with each op's first
benchmark shape. r1: the newest kept run of `burnish r1`.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .. import record
from ..cases.case import Work, label
from ..cases.registry import CASES
from ..ops.roofline import CHIPS, datasheet

PICTURES = record.ROOT / "docs" / "pictures"
INK = "#808080"  # reads on white and on black
COLOURS = {"burnish": "#e4572e", "eager": "#808080", "torch.compile": "#4c9be8", "liger-kernel": "#5fad56"}
OTHER_COLOURS = ("#b18fcf", "#d9a441", "#2a9d8f", "#c75b7a")


@dataclass(frozen=True)
class Picture:
    """What a file in docs/pictures is drawn from. Its stamp, kept in the file, tells whether that has changed."""

    path: Path
    source: str
    rows: list[dict[str, Any]]
    draw: Callable[[], str]

    @property
    def stamp(self) -> str:
        digest = hashlib.sha256(json.dumps(self.rows, sort_keys=True).encode()).hexdigest()[:16]
        return f"<!-- {self.source} {digest} -->"


def pictures() -> list[Picture]:
    """The roofs, and every case that was measured on a GPU at three shapes or more."""
    works = [
        {"case": name, "flops": work.flops, "bytes": work.bytes} for name, work in headline_works().items()
    ]
    made = [Picture(PICTURES / "roofline.svg", "bench/cases/registry.py", works, roofline_picture)]
    if run := record.newest_run("r1"):
        path, result = run
        made.append(Picture(PICTURES / "r1.svg", path, [result], partial(r1_picture, result)))
    for path, result in record.newest_results().items():
        with record.reading(path):
            made += _speed_pictures(path, result) if "driver" in result["machine"] else []
    return made


def _speed_pictures(path: str, result: dict[str, Any]) -> list[Picture]:
    by_case: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        by_case.setdefault((row["case"], row["pass"]), []).append(row)
    made = []
    for (case, which), rows in by_case.items():
        if len({label(r["dims"]) for r in rows}) >= 3:
            name = re.sub(r"\W+", "-", f"{case} {which}") + ".svg"
            made.append(Picture(PICTURES / name, path, rows, partial(speed_picture, case, which, rows)))
    return made


def figure(width: float, height: float, columns: int = 1):
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "burnish", "font.size": 9})
    for part in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
        matplotlib.rcParams[part] = INK
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    for ax in axes[0]:
        ax.grid(True, which="major", color=INK, alpha=0.25, linewidth=0.5)
    return fig, list(axes[0])


def svg(fig: Any) -> str:
    import matplotlib.pyplot as plt

    out = io.StringIO()
    fig.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    plt.close(fig)
    return out.getvalue()


def colour(provider: str, others: list[str]) -> str:
    return COLOURS.get(provider) or OTHER_COLOURS[others.index(provider) % len(OTHER_COLOURS)]


def speed_picture(case: str, which: str, rows: list[dict[str, Any]]) -> str:
    """Latency, and share of the measured roofline, against the bytes that the op must move."""
    fig, (left, right) = figure(8, 3, 2)
    providers = list(dict.fromkeys(r["provider"] for r in rows))
    others = [p for p in providers if p not in COLOURS]
    for provider in providers:
        mine = sorted((r for r in rows if r["provider"] == provider), key=lambda r: r["floor_us"])
        size = [r["floor_us"] for r in mine]
        style: dict[str, Any] = {
            "color": colour(provider, others),
            "marker": "o",
            "markersize": 3,
            "label": provider,
        }
        left.plot(size, [record.best(r)[1] for r in mine], **style)
        right.plot(size, [r["share"] * 100 for r in mine], **style)
    left.set(xscale="log", yscale="log", xlabel="floor, us", ylabel="time, us", title=f"{case}, {which}")
    right.set(xscale="log", xlabel="floor, us", ylabel="share of the measured roofline, %", ylim=(0, 105))
    left.legend(frameon=False, labelcolor=INK)
    return svg(fig)


def headline_works() -> dict[str, Work]:
    """The forward work of each case's first benchmark shape, in bf16."""
    return {c.name: c.work(c.bench["cuda"][0], 2)[0] for c in CASES if c.bench.get("cuda")}


def roofline_picture() -> str:
    """The datasheet roofs, and each op's first benchmark shape on the H100's."""
    fig, (ax,) = figure(8, 4.5)
    intensities = [2.0**e for e in range(-3, 15)]
    for chip in CHIPS.values():
        top = datasheet(chip, "bf16")
        roof = [min(top.rate, i * top.bandwidth) / 1e12 for i in intensities]
        ax.plot(intensities, roof, label=chip.name, linewidth=1)
    top = datasheet(CHIPS["sm_90"], "bf16")
    works = headline_works()
    anchor, stacked = (0.0, 0.0), 0
    for name, work in sorted(works.items(), key=lambda item: item[1].flops / item[1].bytes):
        place = (work.flops / work.bytes, work.flops / top.floor(work) / 1e12)
        stacked = stacked + 1 if place[0] < 10 * anchor[0] else 0  # neighbours' names stand under one another
        anchor = anchor if stacked else place
        ax.plot(*place, "o", markersize=4, color=COLOURS["burnish"])
        shift = (6, -14 - 9 * stacked)
        ax.annotate(name, anchor, fontsize=7, xytext=shift, textcoords="offset points", annotation_clip=False)
    ax.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s at the roof, bf16")
    ax.legend(frameon=False, labelcolor=INK)
    return svg(fig)


def r1_picture(result: dict[str, Any]) -> str:
    """pass@1 of each stage beside DeepSeek's, and the learning curves of the stages by RL."""
    fig, (left, right) = figure(9, 3.2, 2)
    stages = list(result["scores"])
    scores = [result["scores"][stage] for stage in stages]
    left.barh(stages, [score["pass_at_1"] for score in scores], color=COLOURS["burnish"], height=0.6)
    known = [
        (score["published"], stage) for stage, score in zip(stages, scores, strict=True) if score["published"]
    ]
    left.plot(
        *zip(*known, strict=True), "D", color=COLOURS["torch.compile"], label="DeepSeek-R1's paper, AIME 2024"
    )
    left.invert_yaxis()
    left.set(xlabel="pass@1 on held-out problems, %", xlim=(0, 100))
    left.legend(frameon=False, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.4, 1.16))
    names = {
        "zero": "R1-Zero",
        "first-rl": "R1: cold start, RL",
        "r1": "R1",
        "student-rl": "student, RL alone",
    }
    colours = (COLOURS["burnish"], *OTHER_COLOURS)
    for seed, curves in enumerate(result["curves"]):
        for (stage, values), color in zip(curves.items(), colours, strict=False):
            label = names[stage] if seed == 0 else None
            right.plot(running_mean(values), color=color, linewidth=1.2, label=label)
    right.set(xlabel="GRPO step", ylabel="share of right samples", ylim=(0, 1.02))
    right.legend(frameon=False, labelcolor=INK, loc="lower right")
    return svg(fig)


def running_mean(values: list[float], window: int = 5) -> list[float]:
    parts = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]
