"""The report of a recipe's run: one self-contained HTML page with table, figure and transcripts.

The page has no scripts and loads nothing from the network.
"""

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from ...model.errors import InputError
from .parts import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2.5rem auto; padding: 0 1rem; color: #1c2430 }
 h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin-top: 2.2rem } .quiet { color: #5d6b7c }
 table { border-collapse: collapse; width: 100% }
 th, td { padding: .4rem .6rem; text-align: right; border-bottom: 1px solid #dde3ea }
 th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #1c2430 }
 .bar { display: inline-block; height: .6rem; background: #3267a8; vertical-align: middle; margin-right: .5rem }
 .number { display: inline-block; min-width: 3rem; font-variant-numeric: tabular-nums }
 pre { background: #f4f6f9; padding: .7rem 1rem; overflow-x: auto; margin: .3rem 0 1rem }
 svg { width: 100%; height: auto }
</style></head><body>
<h1>{{ title }}</h1>
<p class="quiet">{{ subtitle }}</p>
<h2>{{ table.heading }}</h2>
<table><thead><tr>{% for name in table.header %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for stage, values in table.rows.items() %}<tr><td>{{ stage }}</td>{% for value in values %}
<td>{% if value is not none %}{% if loop.first %}
<span class="bar" style="width: {{ 6 * [value, 0] | max / table.full_bar }}rem"></span>{% endif %}
<span class="number">{{ table.format % value }}</span>{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>
<p class="quiet">{{ table.note }}</p>
<h2>{{ figure.heading }}</h2>
<p>{{ figure.note }}</p>
{{ figure.svg | safe }}
<h2>Transcripts</h2>
<p>{{ transcripts.note }}</p>
{% for stage, lines in transcripts.lines.items() %}<b>{{ stage }}</b><pre>{% for line in lines %}{{ line }}
{% endfor %}</pre>{% endfor %}
<h2>This run</h2>
<table>{% for name, value in facts.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}</table>
</body></html>
"""


class Table(NamedTuple):
    """A table with one row of numbers per stage. The first number is also drawn as a bar, full at `full_bar`."""

    heading: str
    header: Sequence[str]
    rows: Mapping[str, Sequence[float | None]]
    note: str
    full_bar: float = 100
    format: str = "%.1f"


class Picture(NamedTuple):
    svg: str  # from `draw_steps` or `draw_rewards`
    note: str
    heading: str = "Learning curves"


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
    """Raise InputError if a package that the report needs is not installed."""
    if missing := [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]:
        names = " and ".join(missing)
        raise InputError(f"the report: expected {names} to be installed: pip install {' '.join(missing)}")


def write(path: Path, page: Page) -> Path:
    """Render the page and write it to `path` atomically. Return `path`."""
    import jinja2

    template = jinja2.Environment(autoescape=True).from_string(PAGE)
    return write_text(path, template.render(page._asdict()))


def smooth(values: Sequence[float], window: int = 5) -> list[float]:
    """Return a moving average: the mean of each value and up to `window` - 1 values before it."""
    spans = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    return [sum(span) / len(span) for span in spans]


def _figure(height: float) -> "Figure":
    """Return a figure with one pair of axes, as wide as the page and `height` inches high."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height))
    figure.subplots()
    return figure


def draw_steps(curves: Sequence[Mapping[str, Sequence[float]]]) -> str:
    """Draw the smoothed share of right samples over GRPO steps as SVG text. Each seed and stage has its own line."""
    figure = _figure(3.6)
    (axes,) = figure.axes
    for index, stage in enumerate(curves[0]):
        for seed, stages in enumerate(curves):
            label = stage if seed == 0 else None
            axes.plot(smooth(stages[stage]), color=f"C{index}", linewidth=1.6, alpha=0.9, label=label)
    axes.set(xlabel="GRPO step", ylabel="share of right samples", ylim=(0, 1.02))
    return _finish(figure, "lower right")


def draw_rewards(
    paths: Sequence[Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]]],
) -> str:
    """Return SVG text that plots gold and proxy reward, smoothed over steps, against the square root of the KL.

    paths: for each seed, a dict from stage to the lists (KL, gold, proxy) over its steps. A stage with one step is
    drawn as a mark.
    """
    figure = _figure(4.2)
    (axes,) = figure.axes
    for index, stage in enumerate(paths[0]):
        for seed, stages in enumerate(paths):
            kl, *rewards = (smooth(values) for values in stages[stage])
            distance = [max(0.0, value) ** 0.5 for value in kl]
            for values, name, line, marker in zip(rewards, ("gold", "proxy"), ("-", ":"), "os", strict=True):
                label = f"{stage}, {name}" if seed == 0 else None
                mark = marker if len(values) == 1 else ""
                axes.plot(distance, values, line, marker=mark, color=f"C{index}", linewidth=1.6, label=label)
    axes.set(xlabel="distance from SFT: square root of the KL divergence", ylabel="reward")
    return _finish(figure, "best")


def _finish(figure: "Figure", legend: Literal["lower right", "best"]) -> str:
    (axes,) = figure.axes
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc=legend)
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight")
    return text.getvalue()[text.getvalue().index("<svg") :]
