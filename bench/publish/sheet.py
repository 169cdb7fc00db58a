"""A sheet on which a picture is drawn from the top down: text, bars and lines in points, without overlapping texts.

A sheet is as wide as a phone, so that letters keep their size there. Every colour is readable on white and on GitHub's
black. The text has a lighter colour if the viewer reports a dark scheme. No colour alone carries information: the words
beside it say the same.
"""

import io
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ...model.errors import InputError, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 390.0  # points, and as many pixels on a phone
MARGIN = 8.0
SMALL, BODY, TITLE = 9.5, 10.0, 12.0  # points of a letter
INK, OURS, OTHERS = "#656c76", "#d64b1a", "#7f868e"
INK_ON_BLACK = "#9aa1a9"
STYLE = f"<style>@media (prefers-color-scheme: dark) {{ text {{ fill: {INK_ON_BLACK} !important }} }}</style>"
DPI = 288  # for the measurement of text, because a viewer does not hint letters
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "burnish", "font.family": ["DejaVu Sans"]}


def matplotlib() -> Any:
    """Return the package matplotlib, which only pictures need. Raises InputError if it is not installed."""
    try:
        import matplotlib.artist
        import matplotlib.backends.backend_agg
        import matplotlib.figure
        import matplotlib.lines
        import matplotlib.patches
        import matplotlib.text
    except ImportError as error:
        raise InputError(
            "pictures need the package matplotlib, which is not installed: pip install matplotlib"
        ) from error
    return matplotlib


class Sheet:
    """A figure that is WIDTH points wide and as high as its contents. `y` is the height of the contents so far."""

    def __init__(self) -> None:
        self.library = matplotlib()
        with self.library.rc_context(SETTINGS):
            self.figure: Figure = self.library.figure.Figure(figsize=(WIDTH / 72, 1), dpi=DPI)
            self.renderer = self.library.backends.backend_agg.FigureCanvasAgg(self.figure).get_renderer()
            self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self.y = MARGIN

    # ---- marks

    def text(self, x: float, y: float, words: str, size: float = BODY, **style: Any) -> None:
        """Write one line with its middle at the height y. Markup is not interpreted, so a `$` stays a `$`."""
        style = {"ha": "left", "va": "center", "color": INK, "parse_math": False} | style
        with self.library.rc_context(SETTINGS):
            self.axes.text(x, y, shown(words), fontsize=size, **style)

    def bar(self, x: float, y: float, width: float, thickness: float, color: str) -> None:
        """Fill a rectangle that begins at x and has its middle at the height y."""
        corner = (x, y - thickness / 2)
        self.axes.add_patch(
            self.library.patches.Rectangle(corner, width, thickness, color=color, linewidth=0)
        )

    def line(self, xs: Sequence[float], ys: Sequence[float], **style: Any) -> None:
        style = {"color": INK, "linewidth": 0.5, "solid_capstyle": "round"} | style
        self.axes.add_line(self.library.lines.Line2D(xs, ys, **style))

    # ---- running text

    def width(self, words: str, size: float = BODY, weight: str = "normal") -> float:
        """Return the width of a line in points."""
        font = self.library.font_manager.FontProperties(family="DejaVu Sans", size=size, weight=weight)
        pixels, _, _ = self.renderer.get_text_width_height_descent(shown(words), font, ismath=False)
        return 1.02 * pixels * 72 / DPI  # letters of a viewer's own font may be wider

    def wrapped(self, words: str, most: float, size: float = BODY, weight: str = "normal") -> list[str]:
        """Break words into lines of at most the given width in points. A word that is too long is cut."""
        average = self.width(words, size, weight) / max(len(words), 1)
        for letters in range(int(most / max(average, 0.25 * size)) + 4, 0, -1):
            lines = textwrap.wrap(words, letters, break_on_hyphens=False) or [""]
            if all(self.width(line, size, weight) <= most for line in lines):
                return lines
        return list(words)

    def paragraph(self, words: str, x: float = MARGIN, size: float = BODY, **style: Any) -> None:
        """Write words at the lower end of the sheet, in as many lines as they need."""
        most = WIDTH - MARGIN - x
        for line in self.wrapped(words, most, size, style.get("weight", "normal")):
            self.text(x, self.y + 0.65 * size, line, size, **style)
            self.y += 1.35 * size

    def title(self, words: str, *below: str) -> None:
        """Write a heading at the lower end of the sheet, and small lines below the heading."""
        self.paragraph(words, size=TITLE, weight="bold")
        for line in below:
            self.paragraph(line, size=SMALL)
        self.y += 6

    def finished(self) -> "Figure":
        """Return the figure, cut to the height of its contents."""
        height = self.y + MARGIN
        self.figure.set_size_inches(WIDTH / 72, height / 72)
        self.axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        return self.figure


def svg(figure: "Figure") -> str:
    """Return the SVG of a figure with a transparent background. Its words stay text."""
    out = io.StringIO()
    with matplotlib().rc_context(SETTINGS):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue().replace("<defs>", f"<defs>\n  {STYLE}", 1)


# ---- panels


class Axis(NamedTuple):
    """One axis of a Panel: its two ends, its ticks, and whether it is logarithmic."""

    low: float
    high: float
    ticks: Sequence[float]
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Return the position of a value on the axis: 0 at the low end, 1 at the high end."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


class Panel(NamedTuple):
    """A part of a sheet with two axes. left and top are its upper left corner."""

    sheet: Sheet
    left: float
    top: float
    width: float
    height: float
    x: Axis
    y: Axis

    def place(self, x: float, y: float) -> tuple[float, float]:
        return self.left + self.x.share(x) * self.width, self.top + (1 - self.y.share(y)) * self.height

    def frame(self) -> None:
        """Draw a line and a number for each tick."""
        bottom, right = self.top + self.height, self.left + self.width
        for value in self.x.ticks:
            x, _ = self.place(value, self.y.low)
            self.sheet.line((x, x), (self.top, bottom), alpha=0.35)
            self.sheet.text(x, bottom + 8, f"{value:,g}", SMALL, ha="center")
        for value in self.y.ticks:
            _, y = self.place(self.x.low, value)
            self.sheet.line((self.left, right), (y, y), alpha=0.35)
            self.sheet.text(self.left - 4, y, f"{value:,g}", SMALL, ha="right")

    def plot(self, xs: Sequence[float], ys: Sequence[float], **style: Any) -> None:
        """Draw a curve through the points."""
        places = [self.place(x, y) for x, y in zip(xs, ys, strict=True)]
        self.sheet.line([x for x, _ in places], [y for _, y in places], **style)


def spread(places: Sequence[float], gap: float, most: float) -> list[float]:
    """Return ascending positions, moved so that neighbours are `gap` apart or more, and the last is at most `most`."""
    moved = list(places)
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], most if i == len(moved) - 1 else moved[i + 1] - gap)
    return moved
