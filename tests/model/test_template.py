"""Templates are programs of strangers: none goes on for ever, fills the memory or ends in a traceback."""

import json
import os
import resource
import time
from typing import Any, NamedTuple

import pytest
from burnish.algorithms.data import rendering
from burnish.algorithms.data.row import Row
from burnish.algorithms.data.row_template import shaped
from burnish.model.errors import InputError
from burnish.model.text import bounded, meter, sandbox, template
from burnish.model.text.refusals import OverBudget
from burnish.model.text.template import ChatTemplate
from burnish.model.text.tokenizer import Tokenizer
from jinja2.visitor import NodeTransformer

TALK = [{"role": "user", "content": "a"}]
FEW = 100_000  # steps


def doubled(body: str, end: str = "") -> str:
    head = "{% set ns = namespace(x='ab', l=[1]) %}{% for i in range(60) %}"
    return head + body + "{% endfor %}" + end


def looped(body: str, before: str = "") -> str:
    loops = "{% for i in range(100000) %}{% for j in range(100000) %}"
    return before + loops + body + "{% endfor %}{% endfor %}"


LONG = "{% set b = 'a' * 10000000 %}"
PLACES = "{% set l = range(100000)|list %}"
NESTED = doubled("{% set ns.l = (1, 1) if i == 0 else (ns.l, ns.l) %}")
DEEP = "{% set ns = namespace(l=(1,)) %}{% for i in range(30000) %}{% set ns.l = (ns.l,) %}{% endfor %}"
DEEP_FIELD = (
    "{% set ns = namespace(l=[1]) %}{% for i in range(5000) %}{% set ns.l = ns.l|map('upper') %}{% endfor %}"
)
PATH = "{% set p = (['real'] * 100000)|join('.') %}"

ENDLESS = {  # by kind
    "loops": [
        looped(""),
        "{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
        looped("{% for k in range(100000)|map('string') %}{{ loop.length }}{% break %}{% endfor %}"),
        looped("x" * 5000),
        looped("{{ '" + "x" * 5000 + "' }}"),
    ],
    "macros and blocks": [
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f(n) %}{{ g(n) }}{% endmacro %}{% macro g(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% for x in [[1]] recursive %}{{ loop([[1],[1]]) }}{{ loop([[1],[2]]) }}{% endfor %}",
        "{% block a %}x{% endblock %}" + looped("{{ self.a() }}"),
        "{% for i in range(100000) %}{% block c scoped %}" + looped("") + "{% endblock %}{% endfor %}",
        "{% macro f() %}{% endmacro %}" + PLACES + looped("{{ f(*l) }}"),
    ],
    "numbers": [
        "{{ 9**(9**9) }}",
        "{% set x = 10**1000000000 %}",
        doubled("{% set ns.x = 3 if i == 0 else ns.x * ns.x %}"),
        "{{ (5).to_bytes(10**9, 'big') }}",
        "{{ ('f' * 10000000)|int(base=16) // ('f' * 5000000)|int(0, 16) }}",
        "{{ 5|round(10**9, 'ceil') }}",
    ],
    "texts that double": [
        doubled(f"{{% set ns.x = {grown} %}}")
        for grown in (
            "ns.x ~ ns.x",
            "ns.x + ns.x",
            "[ns.x, ns.x]|join(ns.x)",
            "ns.x|replace('a', ns.x)",
            "ns.x.replace('a', ns.x)",
            "ns.x.join([ns.x, ns.x])",
            "'%s%s' % (ns.x, ns.x)",
            "'%s%s'|format(ns.x, ns.x)",
            "'{0}{0}'.format(ns.x)",
        )
    ]
    + [
        doubled("{% set ns.l = ns.l + ns.l %}"),
        doubled("{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
        doubled(
            "{% set y %}{% filter upper %}{{ ns.x }}{{ ns.x }}{% endfilter %}{% endset %}{% set ns.x = y %}"
        ),
    ],
    "one large result": [
        f"{{{{ {large} }}}}"
        for large in (
            "'a' * 10**10",
            "10**10 * 'a'",
            "([0] * 10**10)|length",
            "'a'|center(10**9)",
            "'a'|center(1000000000)",
            "'a'.ljust(10**9)",
            "'a'.encode().zfill(10**9)",
            "('\t' * 1000).expandtabs(10**8)",
            "('a\n' * 1000)|indent(10**8)",
            "('a' * 100000)|wordwrap(1, wrapstring='x' * 100000)",
            "'%9999999999d' % 1",
            "'%*d' % (10**9, 1)",
            "'%(a)9999999999d' % {'a': 1}",
            "'%.999999999f'|format(1.5)",
            "'{:>9999999999}'.format(1)",
            "'{:>{}}'.format(1, 10**9)",
            "('{a}' * 100000).format_map({'a': 'x' * 100000})",
            "[[1]]|tojson(indent=10**9)",
            "[1]|tojson(separators=('x' * 1000000, 'y'))",
            "[1]|batch(10**9, 'x')|list",
            "[1]|slice(10**9, 'x')|list",
            "range(10**9)|list",
            "strftime_now('%c' * 100000)",
            "lipsum(n=10**7)",
        )
    ],
    "lists in lists": [
        doubled("{% set ns.l = [ns.l, ns.l] %}", end)
        for end in (
            "{{ ns.l }}",
            "{{ ns.l|string|length }}",
            "{{ ns.l|tojson }}",
            "{{ ns.l == [ns.l] }}",
            "{{ ns }}",
        )
    ]
    + [
        NESTED + end
        for end in (
            "{{ {ns.l: 1} }}",
            "{{ {}[ns.l] }}",
            "{{ {}.get(ns.l) }}",
            "{{ ns.l in {} }}",
            "{{ {}|attr(ns.l) }}",
        )
        + ("{{ [[ns.l]]|map('first')|unique|list }}", "{{ dict([(ns.l, 1)]) }}", "{{ {}.fromkeys([ns.l]) }}")
        + (
            "{{ ns.l is filter }}",
            "{{ ns.l is in({}) }}",
            "{% for q in [1, ns.l] %}{{ loop.changed(q) }}{% endfor %}",
        )
    ]
    + [DEEP + "{{ {ns.l: 1} }}", DEEP + "{{ ns.l }}", DEEP_FIELD + "{{ ns.l|list }}"],
    "reading again and again": [
        LONG + looped(body)
        for body in ("{{ b == b ~ 'c' }}", "{{ 'b' in b }}", "{% set x = b[1:] %}", "{{ b|title|length }}")
        + ("{{ b|upper|length }}", "{{ b is lower }}", "{{ b.split()|length }}", "{{ b|truncate(3) }}")
    ]
    + [
        PLACES + looped(body)
        for body in (
            "{{ 'x' in l }}",
            "{{ l|sort|length }}",
            "{{ l|max }}",
            "{{ l.count('x') }}",
            "{% set c = cycler(*l) %}",
        )
    ]
    + [
        looped(body)
        for body in (
            "{{ range(100000)|sum }}",
            "{{ 'x' in range(100000) }}",
            "{{ range(100000)|select('none')|list }}",
        )
        + (
            "{{ range(100000)|map(attribute='real')|list|length }}",
            "{{ 'x' in range(100000)|map('string') }}",
        )
    ]
    + [
        LONG + "{{ b.rfind('b' ~ b[:4000000]) }}",
        LONG + "{{ b.strip('b' * 4000000 ~ 'a') }}",
        "{{ ('<!---->' * 1000000)|striptags|length }}",
        "{{ ([[1]] * 300000)|sum(start=[])|length }}",
        PATH + "{{ range(100000)|map(attribute=p)|list|length }}",
        PATH + "{{ range(100000)|sort(attribute=p)|length }}",
        "{{ [-10**15]|map('a step')|list }}" + looped(""),
    ],
    "long results": ["{{ 'hello ' * 300000 }}", "{% for i in range(90000) %}hello world and all{% endfor %}"],
}

UNREADABLE = {
    "parentheses": "{{ " + "(" * 30000 + "1" + ")" * 30000 + " }}",
    "signs": "{{ " + "-" * 30000 + "1 }}",
    "terms": "{{ 1" + "+1" * 3000 + " }}",
    "attributes": "{{ x" + ".y" * 3000 + " }}",
    "filters": "{{ x" + "|upper" * 3000 + " }}",
    "statements": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "loops": "{% for i in x %}" * 30 + "{% endfor %}" * 30,
    "a number": "{{ " + "9" * 5000 + " }}",
    "a break": "{% break %}",
    "a keyword": "{{ f(a=1, a=2) }}",
    "an argument": "{% macro f(a, a) %}{% endmacro %}",
    "raw": "{% raw %}" * 1000,
    "size": "x" * 10**6,
}


def outcome(source: str) -> str:
    try:
        made = ChatTemplate(source)
        made.variables  # noqa: B018 (it walks the template)
        return f"wrote {len(made.render(TALK, {}))} characters"
    except InputError as error:
        return f"{type(error).__name__}: {error}"


def in_a_fork(sources: dict[str, str], seconds: int = 20, gigabytes: float = 1.5) -> dict[str, str]:
    """The outcome of each; those without an entry were not reached."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        with open("/proc/self/statm") as statm:
            size = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + int(gigabytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))

        for name, source in sources.items():
            started = time.process_time()
            try:
                found = outcome(source)
            except BaseException as error:
                found = f"traceback: {type(error).__name__}: {error}"
            entry = {"name": name, "found": found, "seconds": time.process_time() - started}
            os.write(write_end, json.dumps(entry).encode() + b"\n")
        os._exit(0)

    os.close(write_end)
    with open(read_end, encoding="utf-8") as pipe:
        entries = [json.loads(line) for line in pipe]
    os.waitpid(pid, 0)
    assert max((entry["seconds"] for entry in entries), default=0) < 5, max(
        entries, key=lambda e: e["seconds"]
    )
    return {entry["name"]: entry["found"] for entry in entries}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_without_end_is_refused(kind, monkeypatch):
    monkeypatch.setattr(meter, "MOST_STEPS", FEW)
    found = in_a_fork({source[-400:]: source for source in ENDLESS[kind]})
    assert len(found) == len(ENDLESS[kind]), f"the fork died after {list(found)[-1:]}"
    wrong = {name: text for name, text in found.items() if not text.startswith(("OverBudget", "Refused"))}
    assert not wrong


def test_a_template_that_cannot_be_compiled_is_refused():
    found = in_a_fork(UNREADABLE)
    assert found.keys() == UNREADABLE.keys()
    assert all(text.startswith("InputError: the chat template: ") for text in found.values()), found


def test_an_endless_template_of_rows_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(meter, "MOST_STEPS", FEW)
    file = tmp_path / "row.jinja"
    for source in (
        looped(""),
        "{{ a * 10**10 }}",
        "{{ a * 2000000 }}",
        "{{ zip(*[range(100000)] * 1000)|list }}",
    ):
        file.write_text(source)
        with pytest.raises(
            OverBudget, match=r"^rows line 1: --row-template .*row\.jinja (takes|makes|writes)"
        ):
            shaped([Row({"a": "b"}, "rows line 1")], file)

    file.write_text("{{ a" + ".b" * 3000 + " }}")
    with pytest.raises(InputError, match=r"row\.jinja: cannot be parsed: nested too deeply"):
        shaped([Row({"a": "b"}, "rows line 1")], file)


def test_a_template_without_end_is_rendered_once(data, monkeypatch):
    """And not in each of the forms that a conversation can have."""
    tokenizer = Tokenizer.load(data / "tokenizer")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}" + looped("")
    monkeypatch.setattr(meter, "MOST_STEPS", FEW)
    renderings = []
    monkeypatch.setattr(ChatTemplate, "render", counted(ChatTemplate.render, renderings))
    with pytest.raises(OverBudget, match="the chat template takes more than 150,000 steps"):
        rendering.whole_form(
            [{"role": "user", "content": [{"type": "text", "text": "a"}]}], tokenizer, {}, ask=True
        )
    assert len(renderings) == 1


def counted(function, calls):
    def wrapper(*args, **options):
        calls.append(args)
        return function(*args, **options)

    return wrapper


def test_a_long_conversation_has_a_larger_budget():
    """Some published templates read all messages for each of them."""
    inner = "{% for b in messages %}{% if a.content == b.content %}{% endif %}{% endfor %}"
    source = "{% for a in messages %}" + inner + "{% endfor %}"
    assert ChatTemplate(source).render(TALK * 400, {}) == ""


def test_methods_that_can_grow_are_those_that_are_bounded():
    """A method that a new Python brings has to be looked at."""
    looked_at = {
        str: "capitalize casefold center count encode endswith expandtabs find format format_map index isalnum "
        "isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper "
        "join ljust lower lstrip maketrans partition removeprefix removesuffix replace rfind rindex rjust "
        "rpartition rsplit rstrip split splitlines startswith strip swapcase title translate upper zfill",
        bytes: "capitalize center count decode endswith expandtabs find fromhex hex index isalnum isalpha isascii "
        "isdigit islower isspace istitle isupper join ljust lower lstrip maketrans partition removeprefix "
        "removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip "
        "swapcase title translate upper zfill",
        int: "as_integer_ratio bit_count bit_length conjugate denominator from_bytes imag is_integer numerator "
        "real to_bytes",
        float: "as_integer_ratio conjugate from_number fromhex hex imag is_integer real",
        dict: "clear copy fromkeys get items keys pop popitem setdefault update values",
        list: "append clear copy count extend index insert pop remove reverse sort",
        tuple: "count index",
    }

    for kind, names in looked_at.items():
        assert {name for name in dir(kind) if not name.startswith("_")} <= set(names.split())


# ---- planted faults: a charge that is taken out lets a template through


class Fault(NamedTuple):
    name: str
    owner: Any
    attribute: str
    planted: Any
    source: str  # what then ends by itself, since it is short


TEXT = "{% set x = 'a' * 10000 %}{% set z = 'a' * 10000 %}"
PASSED = NodeTransformer.generic_visit


def many(body: str) -> str:
    return TEXT + "{% for i in range(1000) %}" + body + "{% endfor %}"


FAULTS = [
    Fault(
        "loops",
        sandbox._Charges,
        "visit_For",
        PASSED,
        "{% set l = range(450)|list %}{% for i in l %}{% for j in l %}{% endfor %}{% endfor %}",
    ),
    Fault(
        "macros",
        sandbox._Charges,
        "visit_Macro",
        PASSED,
        "{% macro f() %}" + "x" * 9000 + "{% endmacro %}" + many("{% set y = f() %}"),
    ),
    Fault("output", sandbox._Charges, "visit_Output", PASSED, many("{% set y %}{{ x }}{% endset %}")),
    Fault("concat", sandbox._Charges, "visit_Concat", PASSED, many("{% set y = x ~ z %}")),
    Fault("compare", sandbox._Charges, "visit_Compare", PASSED, many("{% if x == z %}{% endif %}")),
    Fault("parts", sandbox._Charges, "visit_Getitem", PASSED, many("{% set y = x[1:] %}")),
    Fault("keys", sandbox._Charges, "visit_Pair", PASSED, many("{% set y = {x: 1} %}")),
    Fault(
        "plus", sandbox.BoundedEnvironment, "intercepted_binops", frozenset("*%"), many("{% set y = x + z %}")
    ),
    Fault(
        "times",
        sandbox.BoundedEnvironment,
        "intercepted_binops",
        frozenset("+%"),
        "{{ ('a' * 20000000)|length }}",
    ),
    Fault("power", sandbox, "MOST_BITS", 10**9, "{{ 2**20000 // 2**19999 }}"),
    Fault("percent", sandbox, "check_percent", lambda *_: None, "{{ ('%1000000d' % 1)|length }}"),
    Fault("format", bounded, "_check_format", lambda *_: None, "{{ '{:1000000}'.format(1)|length }}"),
    Fault(
        "methods",
        sandbox,
        "check_method",
        lambda *_: None,
        "{{ 'a'.center(1000000)|length + 'a'.center(900000)|length }}",
    ),
    Fault(
        "filters",
        bounded,
        "_check_filter",
        lambda *_: None,
        "{{ ('a'|center(1000000))|length + ('a'|center(900000))|length }}",
    ),
    Fault(
        "lazy filters",
        bounded,
        "_metered",
        lambda _, values, cost: values,
        "{{ range(60000)|select('none')|list }}",
    ),
    Fault("names of charges", sandbox, "HOOKS", {}, "{{ [-10**6]|map('a step')|list }}"),
    Fault("results", template, "check_written", lambda *_: None, "{{ 'hello ' * 200000 }}"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_faults_are_caught(fault, monkeypatch):
    monkeypatch.setattr(meter, "MOST_STEPS", 10**6 if fault.name in ("times", "results") else FEW)
    if fault.name in ("methods", "filters", "percent", "format"):
        monkeypatch.setattr(meter, "LARGEST", 10**5)
        monkeypatch.setattr(meter, "MOST_STEPS", 10**6)
    assert outcome(fault.source).startswith(
        ("OverBudget", "Refused: the chat template refuses the conversation: No filter")
    )
    monkeypatch.setattr(fault.owner, fault.attribute, fault.planted)
    if fault.name == "times":
        monkeypatch.setattr(meter, "MOST_STEPS", 10**7)
    assert outcome(fault.source).startswith("wrote ")
