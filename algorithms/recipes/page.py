"""The report of a recipe's run: one self-contained HTML page with table, figure and transcripts.

The page has no scripts and loads nothing from the network.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ...model.errors import InputError
from ..show.curve import Series, draw, smooth
from ..show.style import LEGEND, STYLE
from .parts import write_text

PAGE = (
    LEGEND
    + """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style | safe }}</style></head><body>
<h1>{{ title }}</h1>
<p class="quiet">{{ subtitle }}</p>
<h2>{{ table.heading }}</h2>
<div class="scroll"><table><thead><tr>{% for name in table.header %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for stage, values in table.rows.items() %}<tr><td>{{ stage }}</td>{% for value in values %}
<td>{% if value is not none %}{% if loop.first %}
<span class="meter" style="width: {{ 6 * [value, 0] | max / table.full_bar }}rem"></span>{% endif %}
<span class="number">{{ table.format % value }}</span>{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<p class="quiet">{{ table.note }}</p>
<h2>{{ figure.heading }}</h2>
<p>{{ figure.note }}</p>
<figure class="wide"><h3>{{ figure.y_label }}</h3>
{{ svg | safe }}{{ legend(labels) }}</figure>
<h2>Transcripts</h2>
<p>{{ transcripts.note }}</p>
{% for stage, lines in transcripts.lines.items() %}<b>{{ stage }}</b><pre>{% for line in lines %}{{ line }}
{% endfor %}</pre>{% endfor %}
<h2>This run</h2>
<table class="words narrow">{% for name, value in facts.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table>
</body></html>
"""
)


class Table(NamedTuple):
    """A table with one row of numbers per stage. The first number is also drawn as a bar, full at `full_bar`."""

    heading: str
    header: Sequence[str]
    rows: Mapping[str, Sequence[float | None]]
    note: str
    full_bar: float = 100
    format: str = "%.1f"


class Picture(NamedTuple):
    series: Sequence[Series]  # from `steps_series` or `rewards_series`; one of several seeds has no label
    note: str
    x_label: str = "GRPO step"
    y_label: str = "share of right samples"
    heading: str = "Learning curves"
    include: Sequence[float] = (0.0, 1.0)  # values that the y axis shows in any case


class Transcripts(NamedTuple):
    lines: Mapping[str, Sequence[str]]  # stage: its lines
    note: str = "The first held-out problems, one sample each."


class Page(NamedTuple):
    title: str
    subtitle: str
    table: Table
    figure: Picture
    transcripts: Transcripts
    facts: Mapping[str, object]  # name: value, about the run


def check_packages() -> None:
    """Raise InputError if the package that the report needs is not installed."""
    if find_spec("jinja2") is None:
        raise InputError("the report: expected jinja2 to be installed: pip install jinja2")


def write(path: Path, page: Page) -> Path:
    """Render the page and write it to `path` atomically. Return `path`."""
    import jinja2

    figure = page.figure
    svg = draw(
        figure.y_label, figure.series, x_label=figure.x_label, width=400, height=240, include=figure.include
    )
    labels = [one for one in figure.series if one.label]
    template = jinja2.Environment(autoescape=True).from_string(PAGE)
    return write_text(path, template.render(page._asdict(), style=STYLE, svg=svg, labels=labels))


def steps_series(curves: Sequence[Mapping[str, Sequence[float]]]) -> list[Series]:
    """Return the smoothed share of right samples over GRPO steps. Each seed and stage has its own line."""
    return [
        Series(stage if seed == 0 else "", [*enumerate(smooth(stages[stage]))], colour=index)
        for index, stage in enumerate(curves[0])
        for seed, stages in enumerate(curves)
    ]


def rewards_series(
    paths: Sequence[Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]]],
) -> list[Series]:
    """Return gold and proxy reward, smoothed over steps, over the square root of the KL.

    paths: for each seed, a dict from stage to the lists (KL, gold, proxy) over its steps. A stage with one step is a
    mark: filled for gold, hollow for proxy.
    """
    found = []
    for index, stage in enumerate(paths[0]):
        for seed, stages in enumerate(paths):
            kl, *rewards = (smooth(values) for values in stages[stage])
            distance = [max(0.0, value or 0.0) ** 0.5 for value in kl]
            for values, name in zip(rewards, ("gold", "proxy"), strict=True):
                points = [*zip(distance, values, strict=True)]
                label = f"{stage}, {name}" if seed == 0 else ""
                line, dotted = len(points) > 1, name == "proxy"
                found.append(Series(label, points, colour=index, line=line, dotted=dotted))
    return found
