"""Small templates that would take minutes or gigabytes: what each step of them costs is what it takes."""

import gc
import resource
import sys
from typing import Any

import jinja2
import pytest
from burnish.model.errors import MOST_CHARACTERS, InputError
from burnish.model.text import meter, sandbox
from burnish.model.text.refusals import OverBudget
from burnish.model.text.template import ChatTemplate
from fork import in_a_fork

TURN = {"role": "user", "content": "a"}
PRIME = "(2**61 - 1)"  # Python's hash of an integer is its remainder by this number
SETS = "".join(f"{{% set a{i} = 1 %}}" for i in range(3000))
WIDE = "{% set a = ('9' * 4200)|int %}{% set b = ('8' * 2100)|int %}"
ASTRAL = "\U000e0001"  # not printable: its repr has ten characters


def looped(body: str) -> str:
    return f"{{% for i in range(100000) %}}{{% for j in range(100000) %}}{body}{{% endfor %}}{{% endfor %}}"


def kept(value: str) -> str:
    return "".join(f"{{% set x{i} = {value} %}}" for i in range(60))


ATTACKS = {
    "a power of ten": "{{ 1|round(16000000, 'ceil') }}",
    "a negative power of ten": "{{ 5|round(-16000000) }}",
    "keywords in another order": "{{ ('a' * 60000)|replace(new='y' * 40000, old='a')|length }}",
    "written integers": "{{ ([10**4000] * 900000)|string|length }}",
    "joined integers": "{{ ([10**4000] * 900000)|join|length }}",
    "escapes of a list": f"{{% set s = '{ASTRAL}' * 10000000 %}}{{{{ [s, s, s, s, s, s, s, s, s, s, s, s, s] }}}}",
    "escapes of JSON": f"{{% set s = '{ASTRAL}' * 10000000 %}}{{{{ [s, s, s, s]|tojson(ensure_ascii=true) }}}}",
    "keys that collide": f"{{{{ range(0, {PRIME} * 90000, {PRIME})|unique|list|length }}}}",
    "keys of an object that collide": f"{{{{ dict.fromkeys(range(0, {PRIME} * 90000, {PRIME}))|length }}}}",
    "read keys that collide": "{% set s %}"
    f"{{% for i in range(90000) %}}{{{{ i * {PRIME} }}}} {{% endfor %}}{{% endset %}}"
    "{{ s.split()|map('int')|unique|list|length }}",
    "widths of fields": "{{ ('{0:9999}' * 1000000).format('a')|length }}",
    "widths of %": "{{ ('%(a)9999d' * 150000 % {'a': 1})|length }}",
    "digits of %": "{{ ('%(a).9999f' * 150000 % {'a': 1.5})|length }}",
    "digits of a number": "{{ ('{0:f}' * 3000000).format(1e308)|length }}",
    "fields": "{% set s = '{}' * 8000000 %}" + "{% set x = s.format_map(messages[0]) %}" * 10,
    "names of many blocks": SETS + "{% if a %}{% endif %}" * 3000,
    "names of many loops": SETS + "{% for b in a %}{% endfor %}" * 2000,
    "a long literal": f"{{% set a = 0x{'f' * 80000} %}}" + looped(f"{{% set x = a // 0x{'e' * 40000} %}}"),
    "division": WIDE + looped("{% set x = a // b %}"),
    "divisors": WIDE + looped("{% set x = a is divisibleby b %}"),
    "differences": "{% set ns = namespace(x=1) %}" + looped("{% set ns.x = ns.x - (-ns.x) %}"),
    "dates": "{% set f = '%c' * 490 %}" + looped("{% set x = strftime_now(f) %}"),
    "a refusal of control characters": "{{ raise_exception('\x01' * 16000000) }}",
    "escapes of HTML": f"{{% set s = '\"' * 16000000 ~ '{ASTRAL}' %}}{{% autoescape true %}}"
    + "{{ s }}" * 9
    + "{% endautoescape %}",
    "joined with HTML": f"{{% set s = '\"' * 16000000 ~ '{ASTRAL}' %}}" + kept("s ~ (''|safe)"),
    "lists that are summed": "{{ ([[1] * 1000] * 4900)|sum(start=[])|length }}",
    "kept texts": f"{{% set s = '{ASTRAL}' * 16000000 %}}" + kept("s ~ 'x'"),
    "kept characters": f"{{% set s = '{ASTRAL}' * 900000 %}}" + kept("s|list"),
    "kept numbers": kept("range(100000, 200000)|list"),
    "kept words": f"{{% set s = '{ASTRAL} ' * 1000000 %}}" + kept("s.split()"),
    "kept objects": looped("{% set ns = namespace() %}"),
    "written JSON": looped("{{ 1|tojson }}"),
    "marks": looped("{% generation %}{% endgeneration %}"),
    "formats": looped("{% set x = '{}'.format(i) %}"),
}


def rendered(source: str) -> str:
    try:
        return f"wrote {len(ChatTemplate(source).render([TURN] * 1000, {}))} characters"
    except InputError as error:
        return f"refused: {error}"


DEAR = {  # a second and more
    *("kept objects", "formats", "widths of fields", "written JSON", "marks", "lists that are summed"),
    *("read keys that collide", "divisors", "names of many blocks"),
}
MARKED = [
    pytest.param(source, id=name, marks=[pytest.mark.slow] if name in DEAR else [])
    for name, source in ATTACKS.items()
]


@pytest.mark.parametrize("source", MARKED)
def test_it_is_refused_before_it_takes_seconds_or_a_gigabyte(source):
    """The conversations are the longest, which have the largest budget."""
    found: Any = in_a_fork(lambda: rendered(source), seconds=20, gigabytes=1)  # of a slow machine
    assert isinstance(found, str) and found.startswith("refused: the chat template"), found
    assert len(found) <= MOST_CHARACTERS + 20


def most_page_faults(template: ChatTemplate) -> int:
    """The most page faults of a rendering, over depths of Python's stack that end anywhere in one of its pieces."""

    def faults(depth: int) -> int:
        if depth:
            return faults(depth - 1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        with pytest.raises(OverBudget):
            template.render([TURN], {})
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults(0)
    gc.collect()  # it has a fault for each page that a fork has shared
    return max(faults(depth) for depth in range(0, 200, 4))


@pytest.mark.slow
def test_a_rendering_takes_no_longer_on_a_deep_stack(monkeypatch):
    """A call that maps a piece of Python's stack, and gives it back, has a page fault each time."""
    template = ChatTemplate(
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    )
    monkeypatch.setattr(meter, "MOST_STEPS", 100_000)
    assert most_page_faults(template) < 500
    if sys.version_info < (3, 14):  # later ones were not seen
        monkeypatch.setattr(sandbox.RoomyTemplate, "render", jinja2.Template.render)
        assert most_page_faults(template) > 2_000


@pytest.mark.parametrize(
    "expression, text",
    [
        ("'{:>5}|{:,}|{:.2f}'.format(1, 12345, 0.5)", "    1|12,345|0.50"),
        ("'%5d|%.3f|%s' % (7, 1.5, 'a')", "    7|1.500|a"),
        ("'a-b'|replace(old='-', new='+')", "a+b"),
        ("'a-b'|replace('-', new='+')", "a+b"),
        ("2.567|round(2)", "2.57"),
        ("[3, 3, 12345678901234567890123, 3]|unique|list", "[3, 12345678901234567890123]"),
        ("7 // 2 - 1", "2"),
        ("6 is divisibleby 3", "True"),
        ("[[1], [2]]|sum(start=[])", "[1, 2]"),
        ("{'id': 12345678901234567890}|tojson", '{"id": 12345678901234567890}'),
        ("'日本' ~ '語'", "日本語"),
    ],
)
def test_what_is_ordinary_is_written(expression, text):
    assert ChatTemplate(f"{{{{ {expression} }}}}").render([TURN], {}) == text


def test_texts_of_html_are_escaped_once():
    source = "{% autoescape true %}{{ '<' }}{{ '<'|safe }}{{ '<'|e }}{% endautoescape %}{{ '<' }}"
    assert ChatTemplate(source).render([TURN], {}) == "&lt;<&lt;<"


def test_a_planted_price_of_nothing_is_caught(monkeypatch):
    source = "{{ range(0, (2**61 - 1) * 4000, 2**61 - 1)|unique|list|length }}"
    assert rendered(source).startswith("refused")
    monkeypatch.setattr(meter, "WIDE", 0)
    assert rendered(source) == "wrote 4 characters"
