"""One self-contained HTML page of an `r1` run: table, learning curves, transcripts. No scripts, no network."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import matplotlib
from markupsafe import Markup

matplotlib.use("svg")
from matplotlib import pyplot as plt

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
<h2>Held-out problems, percent</h2>
<table><thead><tr>{% for name in header %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for stage, values in rows.items() %}<tr><td>{{ stage }}</td>{% for value in values %}
<td>{% if value is not none %}{% if loop.first %}
<span class="bar" style="width: {{ value * 0.06 }}rem"></span>{% endif %}
<span class="number">{{ '%.1f' | format(value) }}</span>{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>
<p class="quiet">{{ note }}</p>
<h2>Learning curves</h2>
<p>{{ curve_note }}</p>
{{ figure }}
<h2>Transcripts</h2>
<p>The first held-out problems, one sample each.</p>
{% for stage, lines in transcripts.items() %}<b>{{ stage }}</b><pre>{% for line in lines %}{{ line }}
{% endfor %}</pre>{% endfor %}
<h2>This run</h2>
<table>{% for name, value in facts.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}</table>
</body></html>
"""


def write(
    path: Path,
    *,
    title: str,
    subtitle: str,
    header: Sequence[str],
    rows: Mapping[str, Sequence[float | None]],
    note: str,
    curves: Sequence[Mapping[str, Sequence[float]]],
    curve_note: str,
    transcripts: Mapping[str, Sequence[str]],
    facts: Mapping[str, object],
) -> Path:
    """rows: numbers a stage, the first drawn as a bar of 0 to 100. curves: by stage, one mapping a seed.

    The page is written beside `path` and renamed, so a reader never finds half of it.
    """
    template = jinja2.Environment(autoescape=True).from_string(PAGE)
    page = template.render(
        title=title,
        subtitle=subtitle,
        header=header,
        rows=rows,
        note=note,
        curve_note=curve_note,
        figure=Markup(draw(curves)),
        transcripts=transcripts,
        facts=facts,
    )
    beside = path.with_suffix(".partial")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, path)
    return path


def draw(curves: Sequence[Mapping[str, Sequence[float]]], window: int = 5) -> str:
    """SVG text: a running mean over `window` steps for each stage, one thin line a seed."""
    figure, axes = plt.subplots(figsize=(9, 3.6))
    for index, stage in enumerate(curves[0]):
        for seed, stages in enumerate(curves):
            values = stages[stage]
            smooth = [
                sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))
            ]
            axes.plot(smooth, color=f"C{index}", linewidth=1.6, alpha=0.9, label=stage if seed == 0 else None)
    axes.set(xlabel="GRPO step", ylabel="share of right samples", ylim=(0, 1.02))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight")
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]
