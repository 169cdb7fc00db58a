"""An HTML page of all compiled kernels: a sortable table of their figures, and the roofline. No network is needed."""

from pathlib import Path
from typing import Any

from ...model.errors import InputError
from ...model.files.text_files import read_object
from ..record import reading, write_whole
from .pictures import roofline_picture
from .proofs import COLUMNS, distinct_builds

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Burnish: the static proof</title>
<style>
 :root { color-scheme: light dark; --ground: #fff; --ink: #1f2328; --line: #d1d9e0; --head: #f3f5f8 }
 @media (prefers-color-scheme: dark) {
  :root { --ground: #0d1117; --ink: #e6edf3; --line: #30363d; --head: #161b22 } }
 body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 0 auto;
  padding: 1rem; max-width: 90rem }
 svg { max-width: 100%; height: auto }
 input { font: inherit; color: inherit; background: var(--ground); border: 1px solid var(--line); padding: .4rem;
  width: min(100%, 24rem); box-sizing: border-box }
 .wide { overflow: auto; max-height: 85vh; border: 1px solid var(--line); margin-top: .6rem }
 table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
 th, td { padding: .15rem .6rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap }
 th { position: sticky; top: 0; background: var(--head) }
 th button { all: unset; cursor: pointer; font-weight: 600 }
 th button:focus-visible { outline: 2px solid }
 th[aria-sort=ascending] button::after { content: " \\25b2" }
 th[aria-sort=descending] button::after { content: " \\25bc" }
 td:first-child, th:first-child { position: sticky; left: 0; background: var(--head) }
 th:first-child { z-index: 1 }
 .number { text-align: right }
</style></head><body>
<h1>The static proof</h1>
<p>{{ "{:,}".format(builds | length) }} distinct builds, read from their machine code; Triton {{ triton }}.</p>
{{ picture | safe }}
<h2>Builds</h2>
<p><label>Filter by words <input type="search" placeholder="sm_90 flash_attention"></label> <output></output></p>
<div class="wide" tabindex="0"><table><thead><tr>
{% for name in columns %}<th><button>{{ name }}</button></th>
{% endfor %}</tr></thead><tbody>
{% for build in builds %}<tr>{% for value in build.values() -%}
<td{% if value is number %} class="number"{% endif %}>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<script>
const body = document.querySelector("tbody"), heads = [...document.querySelectorAll("th")];
const search = document.querySelector("input"), count = document.querySelector("output");
const order = new Intl.Collator("en", { numeric: true }).compare;

heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
  const sign = head.ariaSort === "ascending" ? -1 : 1;
  for (const each of heads) each.ariaSort = null;
  head.ariaSort = sign > 0 ? "ascending" : "descending";
  const text = row => row.cells[column].textContent;
  body.append(...[...body.rows].sort((a, b) => sign * order(text(a), text(b))));
}));

search.addEventListener("input", () => {
  const words = search.value.toLowerCase().split(/\\s+/);
  for (const row of body.rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every(word => text.includes(word));
  }
  count.textContent = [...body.rows].filter(row => !row.hidden).length + " lines";
});
</script></body></html>
"""


def write_page(path: Path, figures: Path) -> None:
    """Write the HTML page for a file of `burnish bench static --json`. Raises InputError if jinja2 is missing."""
    try:
        import jinja2
    except ImportError as error:
        raise InputError(
            "the page needs the package jinja2, which is not installed: pip install jinja2"
        ) from error

    accepted = read_object(figures)
    with reading(figures):
        builds, triton = distinct_builds(accepted), accepted["triton"]
    picture = roofline_picture()
    template = jinja2.Environment(autoescape=True).from_string(PAGE)
    content: dict[str, Any] = {"columns": COLUMNS, "builds": builds, "triton": triton}
    write_whole(path, template.render(picture=picture[picture.index("<svg") :], **content))
