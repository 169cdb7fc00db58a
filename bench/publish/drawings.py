"""The drawings of docs/pictures. Each is a function that turns figures into a matplotlib figure.

Each contestant has its own line, with its name beside its bar. So no line hides another, and no legend is needed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import record
from ..cases.case import Work, label
from ..ops.roofline import CHIPS, datasheet
from .sheet import BODY, INK, MARGIN, OTHERS, OURS, WIDTH, Axis, Panel, Sheet, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINE = 13.0  # points from one line to the next
DIAMOND = {
    "marker": "D",
    "markersize": 6,
    "markerfacecolor": "white",
    "markeredgecolor": "#1f2328",
    "zorder": 3,
}
SHOWN_ON = "sm_90"  # the chip on whose roof the ops stand
CURVES = {  # the stages trained by RL: name in the figures -> name in the table
    "zero": "R1-Zero",
    "first-rl": "R1: cold start, RL",
    "r1": "R1",
    "student-rl": "student, RL alone",
}


# ---- bars


class Bar(NamedTuple):
    """A line of a bar chart: a name, a bar, and words at the right end. If the value is 0, a note replaces the bar."""

    name: str
    value: float
    words: Sequence[str]
    note: str = ""
    ours: bool = False  # thick, and in our colour
    bold: bool = False
    mark: float | None = None  # where a diamond stands


class Bars:
    """Bars below one another, all on one scale from 0 to `full`."""

    def __init__(self, sheet: Sheet, bars: Sequence[Bar], full: float, widest_name: float):
        self.sheet, self.full = sheet, full
        widths = [sheet.width(bar.name, weight="bold") for bar in bars]
        self.left = MARGIN + min(max(widths), widest_name) + 8

        # a column for each of the words, from the right
        columns = zip(*(bar.words for bar in bars), strict=True)
        ends = [WIDTH - MARGIN]
        for words in reversed(list(columns)):
            ends.insert(0, ends[0] - max(sheet.width(each, weight="bold") for each in words) - 10)
        self.ends = ends[1:]
        self.right = ends[0] - 2

    def place(self, value: float) -> float:
        return self.left + value / self.full * (self.right - self.left)

    def draw(self, bars: Sequence[Bar]) -> None:
        """Draw the bars at the lower end of the sheet."""
        sheet, top = self.sheet, self.sheet.y
        for bar in bars:
            weight = "bold" if bar.bold else "normal"
            middle = sheet.y + LINE / 2
            thickness, color = (9, OURS) if bar.ours else (5, OTHERS)
            width = self.place(bar.value) - self.left
            sheet.bar(self.left, middle, max(width, 1.5) if bar.value else 0, thickness, color)
            if bar.mark is not None:
                sheet.line([self.place(bar.mark)], [middle], **DIAMOND)

            sheet.text(self.left + 6, middle, bar.note)
            for end, words in zip(self.ends, bar.words, strict=True):
                sheet.text(end, middle, words, ha="right", weight=weight)
            for line in sheet.wrapped(bar.name, self.left - 8 - MARGIN, weight=weight):
                sheet.text(MARGIN, sheet.y + LINE / 2, line, weight=weight)
                sheet.y += LINE

        # the two ends of the scale stand behind the bars
        for value in (0.0, 1.0):
            sheet.line([self.place(value)] * 2, [top, sheet.y], alpha=0.6, zorder=0)
        sheet.y += 5


# ---- speed


def duration(microseconds: float) -> str:
    """Return a time as text: three significant digits and a unit."""
    for factor, unit in ((1e6, "s"), (1e3, "ms")):
        if microseconds >= 0.9995 * factor:
            return f"{digits(microseconds / factor)} {unit}"
    return f"{digits(microseconds)} us"


def digits(value: float) -> str:
    """Return a number as text with three significant digits, and all digits from 1,000: 0.100, 49.0, 249, 1,024."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def speed_bar(name: str, row: dict[str, Any] | None) -> Bar:
    """Return the Bar of a contestant. Its length is the share of the roofline, its words are the share and the time."""
    style: dict[str, Any] = {"ours": name == "burnish", "bold": name == "burnish"}
    if row is None or not row["accurate"]:
        return Bar(name, 0, ("", ""), "not measured" if row is None else "not accurate", **style)
    share = f"{row['share']:.0%}" if row["share"] >= 0.01 else "<1%"
    return Bar(name, row["share"], (share, duration(record.best(row)[1])), **style)


def speed_figure(case: str, which: str, rows: Sequence[dict[str, Any]], where: str) -> "Figure":
    """Draw each contestant's share of the measured roofline and its time at each shape, with ours first."""
    shapes: dict[str, dict[str, dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["floor_us"]):
        shapes.setdefault(label(row["dims"]), {})[row["provider"]] = row
    names = sorted(dict.fromkeys(row["provider"] for row in rows), key=lambda name: name != "burnish")

    sheet = Sheet()
    sheet.title(f"{case}, {which}", where, "Bar: share of the measured roofline. Time: the median.")
    groups = {shape: [speed_bar(name, of.get(name)) for name in names] for shape, of in shapes.items()}
    every = [bar for bars in groups.values() for bar in bars]
    scale = Bars(sheet, every, max(1.0, *(bar.value for bar in every)), 132)
    for shape, bars in groups.items():
        sheet.paragraph(shape)
        scale.draw(bars)
    return sheet.finished()


# ---- roofline


def intensity(work: Work) -> float:
    """Return the number of operations for each byte that must be moved."""
    return work.flops / work.bytes


def roof(chip: str, at: float) -> float:
    """Return the TFLOP/s that a chip's datasheet allows in bf16, at this number of operations per byte."""
    top = datasheet(CHIPS[chip], "bf16")
    return min(top.rate, at * top.bandwidth) / 1e12


def roofline_figure(works: Mapping[str, Work]) -> "Figure":
    """Draw the rooflines of all chips by their datasheets, and each op on the roofline of the chip SHOWN_ON.

    The ops are numbered, and a key below explains the numbers.
    """
    sheet = Sheet()
    sheet.title(
        "Roofline",
        f"The most that a datasheet allows in bf16, and each op's first benchmark shape on the "
        f"{CHIPS[SHOWN_ON].name}'s roof. TFLOP/s, against operations per byte.",
    )

    # the axes hold every op, and every roof
    places = [intensity(work) for work in works.values()]
    low, high = (
        min([0.25, *(place / 1.5 for place in places)]),
        max([16384.0, *(place * 1.5 for place in places)]),
    )
    least, most = (pick(roof(chip, end) for chip in CHIPS) for pick, end in ((min, low), (max, high)))
    axes = logarithmic(low, high), logarithmic(least / 1.2, most * 1.8)
    panel = Panel(sheet, 40, sheet.y + 20, 272, 240, *axes)
    panel.frame()
    name_roofs(panel, low, high)

    groups = grouped(panel, works)
    number_groups(panel, groups)
    sheet.y = panel.top + panel.height + 24
    write_key(sheet, groups)
    return sheet.finished()


def logarithmic(low: float, high: float) -> Axis:
    """Return a logarithmic axis with at most seven ticks, at each power of ten or at every n-th power."""
    powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    return Axis(low, high, [10.0**power for power in powers[:: -(-len(powers) // 7)]], True)


def name_roofs(panel: Panel, low: float, high: float) -> None:
    """Draw the roofline of each chip, and the chip's name at the right end of the roofline."""
    sheet, right = panel.sheet, panel.left + panel.width
    chips = sorted(CHIPS, key=lambda chip: -roof(chip, high))
    ends = [panel.place(high, roof(chip, high))[1] for chip in chips]

    for chip, end, y in zip(chips, ends, spread(ends, 14, panel.top + panel.height), strict=True):
        ours = chip == SHOWN_ON
        style = {"color": OURS, "linewidth": 2.2, "zorder": 3} if ours else {"color": INK, "linewidth": 1.1}
        ridge = CHIPS[chip].rates["bf16"] / CHIPS[chip].bandwidth
        panel.plot([low, ridge, high], [roof(chip, at) for at in (low, ridge, high)], **style)
        sheet.line((right, right + 8), (end, y), linewidth=0.8)
        sheet.text(right + 11, y, CHIPS[chip].name, weight="bold" if ours else "normal")


Group = list[tuple[str, Work]]


def grouped(panel: Panel, works: Mapping[str, Work]) -> list[Group]:
    """Group ops that the same ceiling binds, and whose points are so close that their numbers would overlap."""
    groups: list[Group] = []
    top = datasheet(CHIPS[SHOWN_ON], "bf16")
    across = lambda work: panel.place(intensity(work), 1)[0]
    for name, work in sorted(works.items(), key=lambda item: intensity(item[1])):
        first = groups[-1][0][1] if groups else None
        if first and across(work) - across(first) < 16 and top.binds(work) == top.binds(first):
            groups[-1].append((name, work))
        else:
            groups.append([(name, work)])
    return groups


def number_groups(panel: Panel, groups: Sequence[Group]) -> None:
    """Draw a point for each op, and above the panel a number for each group of ops."""
    sheet = panel.sheet
    middles = []
    for group in groups:
        places = [panel.place(intensity(work), roof(SHOWN_ON, intensity(work))) for _, work in group]
        for x, y in places:
            sheet.line([x], [y], marker="o", markersize=5, color=OURS, zorder=4)
        middles.append((sum(x for x, _ in places) / len(places), sum(y for _, y in places) / len(places)))

    numbers = spread([x for x, _ in middles], 15.5, panel.left + panel.width)
    for number, (x, y), above in zip(range(1, len(groups) + 1), middles, numbers, strict=True):
        sheet.line((x, x, above), (y, panel.top, panel.top - 7), linewidth=0.7, linestyle=(0, (2, 2)))
        sheet.text(above, panel.top - 13, str(number), weight="bold", ha="center")


def write_key(sheet: Sheet, groups: Sequence[Group]) -> None:
    """Write the key: the ops of each numbered group of points. A heading says if bytes or operations limit them."""
    top = datasheet(CHIPS[SHOWN_ON], "bf16")
    heading = ""
    for number, group in enumerate(groups, 1):
        binds = top.binds(group[0][1])
        if binds != heading:
            heading = binds
            sheet.y += 4
            sheet.paragraph(f"Bound by {binds} on the {CHIPS[SHOWN_ON].name}", weight="bold")

        ends = dict.fromkeys(digits(intensity(work)) for _, work in (group[0], group[-1]))
        names = ", ".join(name for name, _ in group)
        sheet.text(MARGIN + 14, sheet.y + 0.65 * BODY, str(number), weight="bold", ha="right")
        sheet.paragraph(f"{' to '.join(ends)}:  {names}", MARGIN + 22)


# ---- r1


def r1_figure(result: dict[str, Any]) -> "Figure":
    """Draw pass@1 of each stage beside DeepSeek's and, below, the learning curves of the stages trained by RL."""
    sheet = Sheet()
    sheet.title(
        "pass@1, %", "Bar: held-out problems of our task.", "Diamond: DeepSeek-R1's paper, AIME 2024."
    )
    bars = []
    for stage, score in result["scores"].items():
        published = None if score["published"] is None else score["published"] / 100
        words = (f"{score['pass_at_1']:.1f}",)
        bars.append(Bar(stage, score["pass_at_1"] / 100, words, ours=True, mark=published))
    if bars:
        Bars(sheet, bars, 1.0, 180).draw(bars)

    sheet.y += 6
    sheet.title("Share of right samples, by GRPO step", "One line per seed, a mean over five steps.")
    draw_curves(sheet, result["curves"])
    return sheet.finished()


def draw_curves(sheet: Sheet, curves: Sequence[Mapping[str, Sequence[float]]]) -> None:
    """Draw a panel for each stage trained by RL, two side by side, all on the same axes."""
    steps = max((len(values) for seed in curves for values in seed.values()), default=1)
    ticks = [step for step in (0, 50, 100, 150) if step <= steps] if steps <= 150 else (0, steps)
    stages = list(curves[0]) if curves else []

    for index, stage in enumerate(stages):
        left = MARGIN + 26 + 188 * (index % 2)
        sheet.text(left, sheet.y + 8, CURVES[stage], weight="bold")
        panel = Panel(
            *(sheet, left, sheet.y + 22, 144, 74), Axis(0, max(steps, 1), ticks), Axis(0, 1, (0, 0.5, 1))
        )
        panel.frame()
        for seed in curves:
            panel.plot(range(len(seed[stage])), running_mean(seed[stage]), color=OURS, linewidth=1.4)
        if index % 2 or index == len(stages) - 1:
            sheet.y += 122


def running_mean(values: Sequence[float], window: int = 5) -> list[float]:
    parts = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]
