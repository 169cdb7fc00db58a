"""Pictures as SVG text, drawn without a package: lines over steps with axes, points with error bars.

    draw(title, [Series("training", points), Series("held out", others, errors=errors, line=False)])

The colours are variables of the style sheet (style.py), so that a picture follows the page into the dark.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from math import isfinite

from .axis import Axis, axis_of, steps_axis
from .text import number

Points = Sequence[tuple[float, float | None]]  # (x, y); None is a gap

COLOURS = 6
MOST_POINTS = 300  # of a drawn line; a longer one keeps the smallest and largest value of each part
CHARACTER = 6.3  # width of a digit of the labels, in units of the picture
TOP, BOTTOM, RIGHT = 10, 34, 14  # margins


@dataclass(frozen=True)
class Series:
    """One line or row of points. errors: standard errors by x. colour: the number of a colour of the style sheet.

    faint: drawn behind the others, as the values that another series smooths. line: joined by a line.
    """

    label: str
    points: Points
    errors: Mapping[float, float] = field(default_factory=dict)
    colour: int = 0
    faint: bool = False
    line: bool = True
    dotted: bool = False


def smooth(values: Sequence[float | None], window: int = 5) -> list[float | None]:
    """Return a moving average: the mean of each value and up to `window` - 1 values before it. Gaps stay gaps."""
    found: list[float | None] = []
    for i, value in enumerate(values):
        span = [each for each in values[max(0, i - window + 1) : i + 1] if each is not None]
        found.append(None if value is None else sum(span) / len(span))
    return found


def training_series(points: Points, colour: int = 0) -> list[Series]:
    """Return the series of a training metric: its smoothed line, and behind it the values themselves."""
    known = {y for _, y in points if y is not None}
    if len(points) < 10 or len(known) <= 1:
        return [Series("training", _thinned(points), colour=colour)]
    means = _means(points)
    smoothed = smooth([y for _, y in means])
    xs = (x for x, _ in means)
    return [
        Series("each step", _thinned(points), colour=colour, faint=True),
        Series("smoothed", [*zip(xs, smoothed, strict=True)], colour=colour),
    ]


# ---- long lines


def _parts(points: Points, count: int) -> list[Points]:
    """Cut points into about `count` parts of equal length."""
    length = max(1, -(-len(points) // count))
    return [points[i : i + length] for i in range(0, len(points), length)]


def _means(points: Points) -> list[tuple[float, float | None]]:
    """Return one point for each part: the x in its middle, and the mean of its values."""
    found: list[tuple[float, float | None]] = []
    for part in _parts(points, MOST_POINTS // 2):
        values = [y for _, y in part if y is not None]
        found.append((part[len(part) // 2][0], sum(values) / len(values) if values else None))
    return found


def _thinned(points: Points) -> Points:
    """Return the smallest and largest point of each part, in their order, so that no spike is lost; and both ends."""
    if len(points) <= MOST_POINTS:
        return points
    found: list[tuple[float, float | None]] = []
    for part in _parts(points, MOST_POINTS // 2):
        known = [(y, x) for x, y in part if y is not None]
        if not known:
            found.append((part[0][0], None))
            continue
        kept = {(x, y) for y, x in (min(known), max(known))}
        found += sorted(kept)
    return [*points[:1], *found, *points[-1:]]


# ---- the picture


def draw(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str = "step",
    width: int = 360,
    height: int = 200,
    include: Sequence[float] = (),
) -> str:
    """Return the SVG text of a picture. title: its name for screen readers. width, height: in CSS pixels.

    x_label: the name of the x axis. An axis of steps has whole numbers. include: values that the y axis shows in any
    case. Positive values of very different sizes get a logarithmic y axis.
    """
    xs = [x for one in series for x, y in one.points if y is not None]
    ys = [*include, *(y for one in series for _, y in one.points if y is not None)]
    across = steps_axis(xs) if x_label.endswith("step") else axis_of(xs)
    up = axis_of(ys, may_be_log=True)
    if not up.log:  # error bars widen the axis
        bars = [
            y + sign * one.errors.get(x, 0.0) for one in series for x, y in _known(one) for sign in (-1, 1)
        ]
        up = axis_of([*ys, *(bar for bar in bars if isfinite(bar))], may_be_log=False)

    left = 12 + CHARACTER * max((len(label) for _, label in up.ticks), default=1)
    frame = _Frame(across, up, left, width - RIGHT, TOP, height - BOTTOM)
    parts = [*_grid(frame, x_label, width, height)]
    for one in sorted(series, key=lambda one: not one.faint):
        parts += _drawn(one, frame)
    summary = escape(f"{title}: {_summary(series)}", quote=True)
    return (
        f'<svg class="curve" viewBox="0 0 {width} {height}" role="img" aria-label="{summary}">'
        + "".join(parts)
        + "</svg>"
    )


def _known(one: Series) -> list[tuple[float, float]]:
    return [(x, y) for x, y in one.points if y is not None]


def _summary(series: Sequence[Series]) -> str:
    """Return the first and last values of each series, for readers who do not see the picture."""
    texts = []
    for one in series:
        if (known := _known(one)) and one.label and not one.faint:
            texts.append(f"{one.label} from {number(known[0][1])} to {number(known[-1][1])}")
    return "; ".join(texts) or "no values"


@dataclass(frozen=True)
class _Frame:
    """The axes and where they lie in the picture."""

    across: Axis
    up: Axis
    left: float
    right: float
    top: float
    bottom: float

    def x(self, value: float) -> float:
        return self.left + self.across.place(value) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - self.up.place(value) * (self.bottom - self.top)


def _grid(frame: _Frame, x_label: str, width: int, height: int) -> list[str]:
    """Return the grid lines, the labels of the ticks, and the name of the x axis."""
    parts = []
    for place, label in frame.up.ticks:
        y = frame.bottom - place * (frame.bottom - frame.top)
        parts.append(f'<path class="grid" d="M{frame.left:.1f} {y:.1f}H{frame.right:.1f}"/>')
        parts.append(f'<text x="{frame.left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')

    # labels that would overlap the one before are left out; none crosses the picture's edge
    end = 0.0
    for place, label in frame.across.ticks:
        half = CHARACTER * len(label) / 2
        x = frame.left + place * (frame.right - frame.left)
        centre = min(x, width - half - 1)
        parts.append(f'<path class="grid" d="M{x:.1f} {frame.bottom:.1f}v4"/>')
        if centre - half > end + 6:
            parts.append(
                f'<text x="{centre:.1f}" y="{frame.bottom + 16:.1f}" text-anchor="middle">{label}</text>'
            )
            end = centre + half

    middle = (frame.left + frame.right) / 2
    scale = " (y: log scale)" if frame.up.log else ""
    parts.append(
        f'<text x="{middle:.1f}" y="{height - 4}" text-anchor="middle">{escape(x_label)}{scale}</text>'
    )
    return parts


def _drawn(one: Series, frame: _Frame) -> list[str]:
    """Return the parts of one series: its error bars, and its line or its points."""
    parts, colour = [], f"c{one.colour % COLOURS}"
    for x, y in _known(one):
        if error := one.errors.get(x):
            low, high = frame.y(y - error), frame.y(y + error)
            parts.append(f'<path class="bar {colour}" d="M{frame.x(x):.1f} {low:.1f}V{high:.1f}"/>')

    if one.line and (path := _path(one.points, frame)):
        kind = " faint" * one.faint + " dotted" * one.dotted
        parts.append(f'<path class="line{kind} {colour}" d="{path}"/>')
    known = _known(one)
    if not one.line or len(known) == 1:
        marks = "".join(f"M{frame.x(x):.1f} {frame.y(y):.1f}h0" for x, y in known)
        parts.append(f'<path class="marks {colour}" d="{marks}"/>')
        if one.dotted:
            parts.append(f'<path class="hole" d="{marks}"/>')
    return parts


def _path(points: Points, frame: _Frame) -> str:
    """Return the path of a line with gaps. A value between two gaps is a dot."""
    path, pen = [], "M"
    for i, (x, y) in enumerate(points):
        if y is None:
            pen = "M"
            continue
        path.append(f"{pen}{frame.x(x):.1f} {frame.y(y):.1f}")
        alone = pen == "M" and (i + 1 == len(points) or points[i + 1][1] is None)
        path.append("h0" * alone)
        pen = "L"
    return "".join(path)
