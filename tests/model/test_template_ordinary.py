"""Templates that are no attack: what Jinja writes is written, and a refusal says why."""

import jinja2.sandbox
import pytest
from burnish.model.errors import InputError
from burnish.model.text import template
from burnish.model.text.refusals import Refused
from burnish.model.text.template import ChatTemplate, split_marks
from burnish.model.text.tokenizer import Tokenizer

TALK = [{"role": "user", "content": "a"}]
ORDINARY = [
    "'a' ~ 1 ~ none ~ [1, 'b']",
    "messages",
    "{'a': (1, 2.5)}",
    "ns",
    "undefined_name",
    "'%s|%5d|%%' % ('a', 3)",
    "'{:>5}{a!r}'.format(1, a='b')",
    "'{0[x]}'.format({'x': 1})",
    "messages[0]['content'][::-1]",
    "[1, 2][-1]",
    "1 < 2 < 3",
    "1 < 2 > 3",
    "'a' in messages[0]",
    "'b' not in ['a']",
    "(1, 2) in [(1, 2)]",
    "{(1, 2): 3}[(1, 2)]",
    "2 ** 10 + 7 % 3 - 1 // 2",
    "'ab' * 3 + 'c'",
    "[1] * 2 + [3]",
    "'a,b'.split(',')",
    "'aXb'.replace('X', '--')",
    "'x'.join(['a', 'b'])",
    "'  a '.strip().upper().center(9)",
    "'abc'|upper|replace('B', '')|trim|title|indent",
    "messages|map(attribute='content')|map('upper')|join(', ')",
    "messages|selectattr('role', 'equalto', 'user')|list",
    "[3, 1, 2]|sort|list",
    "[1, 1, 2]|unique|list",
    "messages|groupby('role')|first",
    "[1, 2, 3]|batch(2, 0)|list",
    "[1, 2, 3]|slice(2)|list",
    "[1, 2]|sum",
    "[[1], [2]]|sum(start=[])",
    "{'b': 1, 'a': 2}|dictsort",
    "3.14159|round(2)",
    "'f'|int(base=16)",
    "'7'|int + '1.5'|float",
    "range(5)|reject('odd')|list",
    "'<a> b'|e",
    "'a b c'|truncate(3, true)",
    "'a b c'|wordwrap(2)",
    "'%s!'|format('a')",
    "[1]|first",
    "[1]|last",
    "'abc'|reverse",
    "{'a': 1}|items|list",
    "['a']|map('replace', 'a', 'b')|list",
    "1 is odd",
    "'a' is in 'abc'",
    "messages is sequence",
    "none|default('x', true)",
    "messages|length",
    "cycler(1, 2).next()",
    "dict(a=1)|xmlattr",
    "'a\nb'|indent(2, true)",
    "messages|min(attribute='role')",
]


@pytest.mark.parametrize("expression", ORDINARY)
def test_what_jinja_writes_is_written(expression):
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment()
    source = "{% set ns = namespace(a=1) %}{{ " + expression + " }}{% if " + expression + " %}!{% endif %}"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert ChatTemplate(source).render(talk, {}) == plain.from_string(source).render(messages=talk)


def test_marks_are_the_templates_own_blocks():
    for source in (r"{{ '\ufdd0' }}", "{{ '%c' % 64977 }}"):
        with pytest.raises(InputError, match="noncharacter"):
            ChatTemplate(source).render(TALK, {})
    nested = "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}"
    marks = {"span_start": "\ufdd0", "span_end": "\ufdd1"}
    with pytest.raises(InputError, match="within another"):
        split_marks(template.chat_sandbox().from_string(nested).render(**marks))


@pytest.mark.parametrize("source", [r"{{ '\ud800' }}", "\x00{{ messages[0].content }}\ufdd2"])
def test_odd_characters_are_read_or_refused(data, source):
    tokenizer = Tokenizer.load(data / "tokenizer")
    tokenizer.chat_template = source
    if "ud800" not in source:
        assert tokenizer.decode(tokenizer.encode_chat(TALK)) == "\x00a\ufdd2"
        return
    with pytest.raises(InputError, match="valid Unicode"):
        tokenizer.encode_chat(TALK)


def test_a_refusal_says_why():
    with pytest.raises(Refused, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(TALK, {})
    with pytest.raises(InputError, match="refuses the conversation: it gives no reason"):
        ChatTemplate("{{ raise_exception(nothing) }}").render(TALK, {})
