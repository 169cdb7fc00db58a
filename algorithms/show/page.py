"""The jinja template of a run's report. report.py gives it its values, all of which are escaped."""

from .style import LEGEND

PAGE = (
    LEGEND
    + """
{%- macro folded(text) -%}{% if text.rest %}<pre dir="auto">{{ text.start }}...</pre><details><summary>{{
 text.rest | length }} more characters</summary><pre dir="auto">{{ text.rest }}</pre></details>{%
 else %}<pre dir="auto">{{ text.start }}</pre>{% endif %}{%- endmacro -%}
{%- macro pictures(curves) -%}<div class="curves">{% for one in curves %}<figure>
<h3>{{ one.name }}{% if one.unit %} <span class="quiet small">{{ one.unit }}</span>{% endif %}</h3>
{{ one.svg | safe }}{{ legend(one.series) }}</figure>
{% endfor %}</div>{%- endmacro -%}
{%- macro table(rows, kind="") -%}<table class="words {{ kind }}">{% for name, value in rows %}<tr><td>{{
 name }}</td><td>{{ value }}</td></tr>{% endfor %}</table>{%- endmacro -%}
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
{% if status.word == "running" %}<meta http-equiv="refresh" content="{{ reload }}">
{% endif %}<title>{{ status.text }}: {{ title }}</title>
<style>{{ style | safe }}</style></head><body>
<header><h1>{{ title }}</h1>
<p class="quiet">{{ subtitle }}</p>
<p><span class="badge {{ status.word }}">{{ status.text }}</span> {{ status.details }}
<span class="quiet small">{{ written }}</span></p>
{% for note in notes %}<p class="quiet small">{{ note }}</p>
{% endfor %}</header>
{% if figures %}<h2>Main figures</h2>
<div class="narrow scroll">
<table class="metrics"><thead><tr><th>metric</th><th>first</th><th>last</th>{% if has_best %}<th>best</th>{%
 endif %}</tr></thead><tbody>
{% for row in figures %}<tr><td>{{ row.name }} <span class="quiet small">{{ row.unit }}</span></td><td>{{ row.first
 }}</td><td>{{ row.last }}</td>{% if has_best %}<td>{{ row.best }}</td>{% endif %}</tr>
{% endfor %}</tbody></table></div>
<p class="quiet small">{{ averaged }}</p>
{% endif %}{% if held_out[1] %}<h2>Held-out rows</h2>
<div class="narrow scroll">
<table class="metrics"><thead><tr><th>metric</th>{% for name in held_out[0] %}<th>{{ name }}</th>{% endfor %}</tr>
</thead><tbody>{% for row in held_out[1] %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endif %}<h2>Curves</h2>
{% if main %}{{ pictures(main) }}{% else %}<p class="quiet">No step has been logged yet.</p>{% endif %}
{% if others %}<p></p><details><summary>All other metrics ({{ others | length }})</summary>
<p></p>{{ pictures(others) }}</details>{% endif %}
{% if left_out %}<p class="quiet small">Not drawn: {{ left_out }} more metrics. They are in metrics.jsonl.</p>
{% endif %}{% for heading, records in samples if records %}<h2>{{ heading }}</h2>
{% for one in records %}<div class="sample"><p class="quiet small">{{ one.facts }}</p>
{{ folded(one.prompt) }}{{ folded(one.completion) }}</div>
{% endfor %}{% endfor %}<h2>Flags</h2>
{% if changed %}<div class="narrow">{{ table(changed, "changed") }}</div>{% endif %}
{% if defaults %}<details{% if not changed %} open{% endif %}><summary>{{ defaults | length }} {{
 "at their defaults" if changed else "flags" }}</summary>
<div class="narrow">{{ table(defaults) }}</div></details>{% endif %}
{% if versions %}<h2>Versions</h2><div class="narrow">{{ table(versions) }}</div>
{% endif %}<h2>The model, and what to do next</h2>
<p>{{ model }}</p>
{% for command in commands %}<pre>{{ command }}</pre>
{% endfor %}</body></html>
"""
)
