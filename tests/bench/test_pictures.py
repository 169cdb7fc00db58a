"""Pictures can be read: no text upon another, on a bar or on a line, none outside, all large enough on a phone."""

import random
import re

import numpy as np
import pytest
from burnish.bench.cases.case import Work
from burnish.bench.publish import drawings, sheet
from burnish.bench.publish.pictures import pictures
from burnish.bench.publish.sheet import Sheet
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.transforms import Bbox

PHONE = 390  # pixels of width
LEAST = 8.5  # pixels of a letter
GROUNDS = ("#ffffff", "#0d1117")


def faults(figure: Figure) -> list[str]:
    """Sentences, one for each thing in a picture that cannot be read."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    shown = [t for t in figure.findobj(Text) if isinstance(t, Text) and t.get_visible() and t.get_text()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in shown]
    found = [] if boxes else ["no text"]

    scale = PHONE / (figure.get_figwidth() * 72)
    found += [f"{t.get_text()!r} is small" for t in shown if float(t.get_fontsize()) * scale < LEAST]
    drawn = marks(figure, renderer)
    for index, (words, box) in enumerate(boxes):
        if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.width or box.y1 > figure.bbox.height:
            found.append(f"{words!r} leaves the picture")
        found += [f"{words!r} is upon {other!r}" for other, of in boxes[:index] if box.overlaps(of)]
        found += [f"{words!r} is crossed by {name}" for name, mark in drawn if touches(mark, box)]
    return found


def marks(figure: Figure, renderer) -> list[tuple[str, Bbox | Path]]:
    """The place that each bar, marker and line takes."""
    (axes,) = figure.axes
    bars = [bar for bar in axes.patches if isinstance(bar, Rectangle) and bar.get_width()]
    found: list[tuple[str, Bbox | Path]] = [("a bar", bar.get_window_extent(renderer)) for bar in bars]
    for line in axes.lines:
        path = line.get_path().transformed(line.get_transform())
        if line.get_marker() in ("None", "", None):
            found.append(("a line", path))
        else:
            reach = line.get_markersize() * figure.dpi / 72 / 2
            for x, y in np.asarray(path.vertices):
                found.append(("a marker", Bbox.from_extents(x - reach, y - reach, x + reach, y + reach)))
    return found


def touches(mark: Bbox | Path, box: Bbox) -> bool:
    return bool(mark.overlaps(box) if isinstance(mark, Bbox) else mark.intersects_bbox(box, filled=False))


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2: 1 for the same colour, 21 for white on black."""
    luminances = []
    for colour in (one, other):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        luminances.append(0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2])
    dark, light = sorted(luminances)
    return (light + 0.05) / (dark + 0.05)


# ---- what is drawn


@pytest.mark.parametrize("picture", pictures(), ids=lambda picture: picture.path.stem)
def test_every_picture_can_be_read(picture):
    figure = picture.draw()
    assert faults(figure) == []
    text = sheet.svg(figure)
    assert re.findall(r'width="([\d.]+)pt"', text) == [f"{sheet.WIDTH:g}"]
    written = [t.get_text() for t in figure.findobj(Text) if isinstance(t, Text) and t.get_text()]
    assert text.count("<text ") == len(written) > 0  # words, no outlines of letters


NAMES = (
    "eager",
    "torch.compile",
    "a_file_with_a_long_name.py:a_kernel_with_one,_too_and_words",
    "SDPA efficient",
    "W" * 40,
    "$x$ costs $y$",
    "liger-kernel",
    "burnish, one_pass",
)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_was_measured_can_be_read(seed):
    draw = random.Random(seed)
    names = ["burnish", *draw.sample(NAMES, seed % 8)]
    rows = []
    for shape in range(draw.randint(3, 7)):
        dims = {letter: draw.choice([1, 128, 1 << 20]) for letter in "BTHGDPRC"[: draw.randint(1, 8)]} | {
            "S": shape
        }
        floor = 10 ** draw.uniform(-1, 6)

        for name in names:
            share = 10 ** draw.uniform(-5, 0.1)
            times = [floor / share] * 3
            of_name = {"provider": name, "accurate": draw.random() > 0.1, "rounds_us": {"device": [times]}}
            if name == "burnish" or draw.random() > 0.1:
                row = {"dims": dims, "floor_us": floor, "share": share, "device_us": times, "eager_us": times}
                rows.append(row | of_name)
    which = draw.choice(["forward", "forward+backward"])
    figure = drawings.speed_figure("an_op_with_a_long_name/and a family", which, rows, "a machine " * 9)
    assert faults(figure) == []


@pytest.mark.parametrize("seed", range(8))
def test_a_roofline_of_any_ops_can_be_read(seed):
    draw = random.Random(seed)
    reach = 1.0 + seed % 3
    works = {}
    for index in range(1 + 8 * seed):
        works[f"op_{index}/{'w' * draw.randint(1, 30)}"] = Work(
            10 ** draw.uniform(6 - reach, 10 + reach), 1e6
        )
    assert faults(drawings.roofline_figure(works)) == []


@pytest.mark.parametrize("steps", [1, 2, 40, 51, 75, 149, 150, 152, 1000, 100_000])
def test_curves_of_any_length_can_be_read(steps):
    score = {"pass_at_1": 99.9, "published": None}
    scores = {"base": score | {"pass_at_1": 0.0, "published": 0.5}, "R1": score | {"published": 99.0}}
    scores |= {"a stage with a name that takes two lines": score | {"pass_at_1": 100.0}}
    curves = [{name: [0.0, 1.0] * (steps // 2) + [0.5] for name in drawings.CURVES}] * (1 + (steps < 1000))
    assert faults(drawings.r1_figure({"scores": scores, "curves": curves})) == []


# ---- how it is drawn


def test_the_curves_have_the_names_of_the_table():
    (r1,) = [picture for picture in pictures() if picture.path.stem == "r1"]
    scores = r1.figures[0]["scores"]
    assert set(drawings.CURVES.values()) < set(scores)
    written = {t.get_text() for t in r1.draw().findobj(Text) if isinstance(t, Text)}
    assert set(scores) <= written and not set(drawings.CURVES) - {"r1"} & written


def test_ours_is_first_thicker_and_bold():
    row = {"dims": {"T": 1}, "floor_us": 1.0, "share": 0.5, "device_us": [2, 2, 2], "accurate": True}
    rows = [row | {"provider": name} for name in ("eager", "burnish", "peer")]
    figure = drawings.speed_figure("case", "forward", rows, "GPU")
    bars = [bar for bar in figure.axes[0].patches if isinstance(bar, Rectangle)]
    ours = max(bars, key=lambda bar: bar.get_height())
    assert ours is bars[0] and [bar.get_height() for bar in bars[1:]] == [5, 5]
    bold = [
        t.get_text() for t in figure.findobj(Text) if isinstance(t, Text) and t.get_fontweight() == "bold"
    ]
    assert bold == ["case, forward", "50%", "2.00 us", "burnish"]


def test_the_roof_of_the_ops_is_above_the_others_and_thicker():
    figure = drawings.roofline_figure({"op": Work(1e9, 1e6)})
    lines = figure.axes[0].lines
    ours = [line for line in lines if line.get_color() == sheet.OURS]
    others = [line for line in lines if line not in ours]
    assert min(line.zorder for line in ours) > max(line.zorder for line in others)
    assert ours[0].get_linewidth() > max(line.get_linewidth() for line in others)


def test_every_colour_reads_on_white_and_on_black():
    for ground, ink in zip(GROUNDS, (sheet.INK, sheet.INK_ON_BLACK), strict=True):
        assert contrast(ink, ground) >= 4.5
        assert all(contrast(colour, ground) >= 3 for colour in (sheet.INK, sheet.OURS, sheet.OTHERS))
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert sheet.INK_ON_BLACK in sheet.svg(drawings.roofline_figure({"op": Work(1e9, 1e6)}))


def test_a_duration_has_three_digits():
    found = [drawings.duration(us) for us in (0.0123, 1.1, 49, 249.4, 999.4, 999.6, 1e4, 999_600, 1.5e8)]
    assert found == [
        "0.0123 us",
        "1.10 us",
        "49.0 us",
        "249 us",
        "999 us",
        "1.00 ms",
        "10.0 ms",
        "1.00 s",
        "150 s",
    ]


def test_spread_places_keep_their_distance():
    assert sheet.spread([0, 1, 50], 10, 60) == [0, 10, 50]
    assert sheet.spread([0, 58, 59, 60], 10, 60) == [0, 40, 50, 60]


# ---- the check itself


def upon(of: Sheet) -> None:
    of.text(30, 30, "one")
    of.text(35, 33, "another")


def outside(of: Sheet) -> None:
    of.text(sheet.WIDTH - 20, 30, "a long way")


def small(of: Sheet) -> None:
    of.text(30, 30, "words", 8)


def barred(of: Sheet) -> None:
    of.text(30, 30, "words")
    of.bar(10, 30, 50, 5, sheet.OURS)


def marked(of: Sheet) -> None:
    of.text(30, 30, "words")
    of.line([40], [33], marker="o", markersize=5, color=sheet.OURS)


def struck(of: Sheet) -> None:
    of.text(30, 30, "words")
    of.line([0, 100], [30, 30])


PLANTED = {
    "is upon": upon,
    "leaves the picture": outside,
    "is small": small,
    "a bar": barred,
    "a marker": marked,
    "a line": struck,
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_caught(fault):
    planted = Sheet()
    planted.y = 60
    PLANTED[fault](planted)
    assert [fault in sentence for sentence in faults(planted.finished())] == [True]
