"""Mutations of programs and tables: jinja templates, rows, the metadata of a GGUF file."""

import gzip
import io
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

from mutations import DEEP, LONG, ODD, SHALLOW, Mutation, dumped, nested, of_bytes, of_text_of_json, of_value

# ---- templates

STATEMENTS = (  # what a stranger's template may hold: endless work, endless text, endless depth, faults of all kinds
    "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for a in range(10**9) %}{% endfor %}",
    "{{ range(99999999999) | list }}",
    "{{ 'x' * 10**10 }}",
    "{{ 10**10**9 }}",
    "{{ (10**4000) * (10**4000) }}",
    "{{ 2 ** 99999 }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%9999999999999999999d' | format(1) }}",
    "{{ '{:999999999}'.format('x') }}",
    "{{ 'x' | center(9999999999) }}",
    "{{ 'x'.ljust(9999999999) }}",
    "{{ 'x' | indent(999999999, true) }}",
    "{{ 'a\\nb' | indent(999999999) }}",
    "{{ [0] * 10**10 }}",
    "{{ 'x' | batch(99999999999, 'y') | list }}",
    "{{ 'xy' | slice(999999999) | list }}",
    "{{ lipsum(n=99999999) }}",
    "{{ 'x' | wordwrap(-1) }}",
    "{{ 'x' | truncate(-5) }}",
    "{{ 1.5 | round(99999999) }}",
    "{{ messages | tojson(indent=999999999) }}",
    "{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "{% set ns = namespace(s='x') %}{% for i in range(40) %}{% set ns.s = ns.s.replace('x', 'xx') %}{% endfor %}",
    "{% set ns = namespace(s=['x']) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% call(x) undefined_macro() %}{% endcall %}",
    "{% include 'x' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends 'x' %}",
    "{{ strftime_now('%' * 99999) }}",
    "{{ strftime_now('\\x00') }}",
    "{{ strftime_now(1) }}",
    "{{ raise_exception() }}",
    "{{ raise_exception('\\x1b[2J' * 9999) }}",
    "{{ raise_exception(messages) }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ messages[99] }}",
    "{{ messages[0].nothing.nothing }}",
    "{{ 1 / 0 }}",
    "{{ cycler().next() }}",
    "{{ joiner('x' * 99999999999)() }}",
    "{{ messages | map(attribute='x.y') | list }}",
    "{{ messages | sort(attribute='role') }}",
    "{{ messages | groupby('role') | list }}",
    "{{ messages | sum }}",
    "{{ 'x' | int(base=99) }}",
    "{{ 'x' | filesizeformat }}",
    "{{ x is sameas }}",
    "{{ messages | xmlattr }}",
    "{{ messages.append(1) }}",
    "{{ '\\ud800' }}",
    "{{ '\\ufdd0' }}",
    "{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}",
    "{% generation %}",
    "{% endgeneration %}",
    "{% break %}",
    "{% set messages = 1 %}",
    "{% set loop = 1 %}",
    "{{ [" + "(" * SHALLOW + "1" + ")" * SHALLOW + "] }}",
    "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "{% if x %}" * SHALLOW + "{% endif %}" * SHALLOW,
    "{{ " + "not " * 20_000 + "x }}",
    "{{ " + "-" * 20_000 + "1 }}",
    "{{ x" + ".y" * 20_000 + " }}",
    "{{ x" + " | upper" * 20_000 + " }}",
    "{{ " + "1 + " * 20_000 + "1 }}",
    "{{ '" + "x" * LONG + "' }}",
    "{% for x in messages %}",
    "{{ x",
    "{% x %}",
    "{# x",
    "{{ x | no_such_filter }}",
    "{{ x is no_such_test }}",
    "{% raw %}",
    "{% filter upper %}{% endfilter %}",
    "{% set x %}{{ x }}{% endset %}",
    "{{ self }}",
    "{{ caller() }}",
    "{% trans %}x{% endtrans %}",
    "{% do 1 %}",
    "|||",
    "{{ '[' * 99999 }}",
    "\x00",
    "\x1b[2J",
)


def of_template(data: bytes, draw: Random) -> Mutation:
    roll = draw.random()
    if roll < 0.3:
        return of_bytes(data, draw)
    text, new = data.decode(), draw.choice(STATEMENTS)
    if roll < 0.4:
        return Mutation(new.encode("utf-8", "surrogatepass"), f"only {new[:80]!r}")

    starts = [i for i in range(len(text)) if text.startswith(("{%", "{{"), i)] + [len(text)]
    at = draw.choice(starts)
    if roll < 0.5:
        end = draw.choice([start for start in starts if start >= at])
        return Mutation((text[:at] + text[end:]).encode(), f"cut from {at} to {end}")
    if roll < 0.6:
        end = draw.choice([start for start in starts if start >= at])
        repeated = text[at:end] * draw.choice((2, 2000))
        return Mutation((text[:at] + repeated + text[end:]).encode(), f"{at} to {end} repeated")
    written = (text[:at] + new + text[at:]).encode("utf-8", "surrogatepass")
    return Mutation(written, f"{new[:80]!r} at {at}")


# ---- rows

CELLS: tuple[Any, ...] = (
    *ODD,
    *(
        [{"role": "user"}],
        [{"role": 1, "content": "x"}],
        [{"role": "user", "content": None}],
        {"role": "user"},
    ),
    [{"role": "user", "content": [{"type": "text", "text": "1"}]}, {"role": "assistant", "content": "2"}],
    [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
    [
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "2", "tool_calls": [{"function": 1}]},
    ],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": nested(SHALLOW)}}]}],
    [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2", "weight": 7}],
    [{"from": "x", "value": "y"}],
    [{"from": ["x"], "value": "y"}],
    *([["x"]], [[["x"]]], "1" * 300_000, "\ufdd0", "\u2028", "|||", "<eos>", "\ufdd2"),
)
COLUMNS = (
    *(
        "prompt",
        "completion",
        "messages",
        "conversations",
        "text",
        "question",
        "answer",
        "instruction",
        "output",
    ),
    *(
        "input",
        "instances",
        "chosen",
        "rejected",
        "margin",
        "label",
        "tools",
        "functions",
        "system",
        "history",
    ),
    *("chat_template_kwargs", "weight", "", "\x1b[2J", "y" * 5000),
)
LINES = (
    *(
        "[]",
        "null",
        "1",
        '"x"',
        "{}",
        "{'prompt': 1}",
        '{"prompt": "1"} x',
        "\x00",
        "\ufeff{}",
        "",
        " ",
        "}{",
        "nan",
    ),
    *(f'{{"a": {nested(DEEP)}}}', f'{{"prompt": {nested(SHALLOW)}}}', '{"a":' * DEEP + "1" + "}" * DEEP),
    *(
        '{"n": ' + "9" * 5000 + "}",
        '{"prompt": "\\ud800", "completion": "1"}',
        '{"prompt": 1e999, "completion": NaN}',
    ),
    *('{"prompt": "1", "prompt": "2", "completion": "3"}', '{"text": "' + "x" * LONG + '"}'),
)


def of_row(row: dict[str, Any], draw: Random) -> tuple[dict[str, Any], str]:
    """A row with another value in one cell, or changed as JSON is."""
    if draw.random() < 0.4:
        value, what = of_value(row, draw)
        return value, what
    column, cell = draw.choice((*row, *row, *COLUMNS)), draw.choice(CELLS)
    return row | {column: cell}, f"{column[:60]!r} = {cell!r:.60}"


def of_lines(data: bytes, draw: Random) -> Mutation:
    """JSONL."""
    roll, lines = draw.random(), data.decode().splitlines()
    if roll < 0.2:
        return of_bytes(data, draw)

    i = draw.randrange(len(lines))
    if roll < 0.45:
        new = draw.choice(LINES)
        lines[i:i] = [new]
        end = draw.choice(("\n", "\n", "\r\n", "\r", "\n\n"))
        return Mutation(end.join(lines).encode("utf-8", "surrogatepass"), f"line {new[:50]!r} at {i + 1}")
    if roll < 0.5:
        text = "\n".join(lines)
        encoded = draw.choice((text.encode("utf-16"), text.encode("utf-8-sig"), b"\n" * 9 + text.encode()))
        return Mutation(encoded, "another encoding")
    row, what = of_row(json.loads(lines[i]), draw)
    lines[i] = json.dumps(row)
    return Mutation("\n".join(lines).encode("utf-8", "surrogatepass"), f"line {i + 1}: {what}")


def of_list(data: bytes, draw: Random) -> Mutation:
    """A JSON list of rows."""
    roll, rows = draw.random(), json.loads(data)
    if roll < 0.2:
        return of_bytes(data, draw)
    if roll < 0.4:
        return of_text_of_json(data.decode(), draw)
    i = draw.randrange(len(rows))
    if roll < 0.5:
        rows[i] = draw.choice(CELLS)
        return Mutation(dumped(rows).encode("utf-8", "surrogatepass"), f"entry {i + 1} = {rows[i]!r:.60}")
    rows[i], what = of_row(rows[i], draw)
    return Mutation(json.dumps(rows).encode(), f"entry {i + 1}: {what}")


def of_gzip(data: bytes, draw: Random) -> Mutation:
    """The compressed bytes; or what is in them, which may grow a thousandfold."""
    roll = draw.random()
    if roll < 0.6:
        return of_bytes(data, draw)
    if roll < 0.7:
        line = b'{"text": "' + b"x" * 200_000_000 + b'"}' if draw.random() < 0.3 else b"\n" * 10_000_000
        return Mutation(gzip.compress(line, 1, mtime=0), "a bomb")
    inside = of_lines(gzip.decompress(data), draw)
    return Mutation(gzip.compress(inside.data, 1, mtime=0), f"inside: {inside.what}")


def of_parquet(data: bytes, draw: Random) -> Mutation:
    """The bytes, or a table of other columns."""
    import pyarrow.parquet

    read = lambda: pyarrow.parquet.read_table(io.BytesIO(data))
    return _of_table(data, draw, read, pyarrow.parquet.write_table)


def of_arrow(data: bytes, draw: Random) -> Mutation:
    """The bytes of a stream, or a stream of other columns."""
    import pyarrow.ipc

    def write(table: Any, target: io.BytesIO) -> None:
        with pyarrow.ipc.new_stream(target, table.schema) as stream:
            stream.write_table(table)

    return _of_table(data, draw, lambda: pyarrow.ipc.open_stream(data).read_all(), write)


def _of_table(
    data: bytes, draw: Random, read: Callable[[], Any], write: Callable[[Any, io.BytesIO], None]
) -> Mutation:
    if draw.random() < 0.7:
        return of_bytes(data, draw)
    import pyarrow

    rows = read().to_pylist()
    i = draw.randrange(len(rows))
    for _ in range(20):  # Arrow has one type for a column
        changed, what = of_row(rows[i], draw)
        others = [row if draw.random() < 0.2 else dict(changed) for row in rows]
        target = io.BytesIO()
        try:
            write(pyarrow.Table.from_pylist([changed, *others]), target)
        except Exception:  # what Arrow cannot hold
            continue
        return Mutation(target.getvalue(), f"table: {what}")
    return of_bytes(data, draw)


# ---- GGUF

_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}


def fields_of(data: bytes) -> list[tuple[int, int, int, str]]:
    """(start of the value, its end, its type, its key) of every key in the metadata."""
    count = struct.unpack("<Q", data[16:24])[0]
    found, at = [], 24
    for _ in range(count):
        length = struct.unpack_from("<Q", data, at)[0]
        key = data[at + 8 : at + 8 + length].decode()
        kind = struct.unpack_from("<I", data, at + 8 + length)[0]
        start = at + 12 + length
        at = _end(data, start, kind)
        found.append((start, at, kind, key))
    return found


def _end(data: bytes, at: int, kind: int) -> int:
    if kind == _STRING:
        return at + 8 + struct.unpack_from("<Q", data, at)[0]
    if kind != _ARRAY:
        return at + struct.calcsize(_NUMBERS[kind])
    kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    for _ in range(count):
        at = _end(data, at, kind)
    return at


def of_gguf(data: bytes, draw: Random) -> Mutation:
    """Half of them in the metadata: a value, its type, its key, or how many there are."""
    if draw.random() < 0.5:
        return of_bytes(data, draw)

    start, end, kind, key = draw.choice(fields_of(data))
    raw, change = bytearray(data), draw.choice(("value", "value", "value", "type", "key", "count"))
    if change == "type":
        new = draw.choice((*range(13), 99))
        raw[start - 4 : start] = struct.pack("<I", new)
        return Mutation(bytes(raw), f"{key}: type {new}")

    if change == "key":
        raw[start - 5] ^= 1 << draw.randrange(8)
        return Mutation(bytes(raw), f"{key}: another last letter")
    if change == "count":
        which = draw.choice((4, 8, 16))
        number = draw.choice((0, 1, 2, 10**6, 2**31, 2**63 - 1))
        raw[which : which + (4 if which == 4 else 8)] = struct.pack("<Q", number)[: 4 if which == 4 else 8]
        return Mutation(bytes(raw), f"number at byte {which}: {number}")

    # another value: of a number all of it, of a text or list one bit
    if kind in _NUMBERS:
        size = end - start
        new = draw.choice(
            (
                b"\0" * 8,
                b"\xff" * 8,
                b"\1" + b"\0" * 7,
                struct.pack("<f", float("nan")) * 2,
                draw.randbytes(8),
            )
        )
        raw[start:end] = new[:size]
        return Mutation(bytes(raw), f"{key}: {new[:size].hex()}")

    where = start + (0 if kind == _STRING else draw.choice((0, 4, 12 + draw.randrange(end - start - 12))))
    raw[where] ^= 1 << draw.randrange(8)
    return Mutation(bytes(raw), f"{key}: bit at {where - start}")
