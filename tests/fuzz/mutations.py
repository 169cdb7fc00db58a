"""Seeded mutations: the bytes of a file, and a generator of random numbers -> other bytes, and what was done in words.

What a file holds decides how it is changed: bytes anywhere, JSON as values, safetensors by its header, a template as a
program. Every kind is changed as bytes, too, and every file may give way to what is no regular file.
"""

import copy
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

DEEP = 100_000  # levels of nesting that no parser recurses into
SHALLOW = 500  # levels that a parser reads, and a careless walk over its result does not
LONG = 100_000  # characters
SPECIAL = ("fifo", "directory", "empty", "link to itself", "dangling link", "/dev/null", "/dev/zero")

ODD = (  # of every type
    *(None, True, False, 0, -1, 1, 2, 3, 7, 10**3, 10**6, 2**31 - 1, 2**31, 2**63, 10**18, 10**30, -(10**9)),
    *(0.5, -0.5, 1e308, 1e-308, 1e20, float("nan"), float("inf"), float("-inf")),
    *("", " ", "x", "0", "nan", "null", "true", "\x00", "\x1b[2J\n", "\ud800", "\u202e", "../x"),
    "/etc/passwd",
    *("x" * LONG, "(a+)+$", [], {}, [[]], [1], [-1], ["x"], [None], {"a": 1}, {"": None}),
)
BACKTRACKING = (  # regular expressions that take exponential time on a name that almost fits
    *(r"(.+)+\!", r"(.*)*\!", r"(\w|\.|_)*\!", r"(model\.|layers\.|.)*x\!", r"(([a-z_])+.)+\!", r"(.*.*)*\!"),
    *(r"^(?:[a-z0-9_]+\.?)+\!$", r"(.?){30}.{30}\!", "(" * 200 + ")" * 200, "(", "[", "*"),
    r"(?P<a>x)(?P<a>y)",
)


class Mutation(NamedTuple):
    """data: what the file then holds. special: what stands in its place instead, one of SPECIAL."""

    data: bytes
    what: str
    special: str = ""


# ---- bytes


def of_bytes(data: bytes, draw: Random) -> Mutation:
    """One change of a few bytes; half of them lie in the first 400, where headers are."""
    raw = bytearray(data or b"\x00")
    at = draw.randrange(len(raw) if draw.random() < 0.5 else min(len(raw), 400))
    kind = draw.choice(("bit", "bit", "cut", "behead", "insert", "delete", "repeat", "zero", "number"))

    match kind:
        case "bit":
            raw[at] ^= 1 << draw.randrange(8)
        case "cut":
            del raw[at:]
        case "behead":
            del raw[:at]

        case "insert":
            raw[at:at] = draw.randbytes(draw.choice((1, 4, 50)))
        case "delete":
            del raw[at : at + draw.choice((1, 2, 8, 100))]
        case "repeat":
            raw[at:at] = raw[max(0, at - 40) : at] * draw.choice((1, 3))

        # as long as before
        case "zero":
            size = len(raw[at : at + draw.choice((1, 8, 64))])
            raw[at : at + size] = bytes(size)
        case "number":
            size = draw.choice((4, 8))
            number = draw.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1))
            raw[at : at + size] = number.to_bytes(8, "little")[:size]
    return Mutation(bytes(raw), f"{kind} at {at}")


def of_special(draw: Random) -> Mutation:
    kind = draw.choice(SPECIAL)
    return Mutation(b"", f"{kind} in its place", kind)


def put(mutation: Mutation, file: Path) -> None:
    """Replace `file` by what a mutation left."""
    file.unlink()
    match mutation.special:
        case "":
            file.write_bytes(mutation.data)
        case "fifo":
            import os

            os.mkfifo(file)
        case "directory":
            file.mkdir()
        case "empty":
            file.touch()
        case "link to itself":
            file.symlink_to(file.name)
        case "dangling link":
            file.symlink_to("nowhere")
        case device:
            file.symlink_to(device)


# ---- JSON


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value but the whole; of long lists and objects the first 40."""
    members: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        members = [*value.items()]
    elif isinstance(value, list):
        members = [*enumerate(value)]
    for key, member in members[:40]:
        yield (*path, key)
        yield from places(member, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def of_value(
    value: Any, draw: Random, only: Callable[[tuple[Any, ...]], bool] | None = None
) -> tuple[Any, str]:
    """A copy of a JSON value with one place changed. only: which places may be; all by default."""
    found = [path for path in places(value) if only is None or only(path)]
    if not found:
        return draw.choice(ODD), "whole value"
    value, path = copy.deepcopy(value), draw.choice(found)
    parent, key = at(value, path[:-1]), path[-1]
    kind = draw.choice((*("set", "number", "retype") * 2, "delete", "rename", "add", "swap"))
    what = f"{kind} {'.'.join(map(str, path))[:120]}"

    if kind == "delete":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[draw.choice((f"{key}x", "", "\x1b[2J", "y" * 5000))] = parent.pop(key)
    elif kind == "add" and isinstance(parent, dict):
        parent[draw.choice(("unknown_key", "__proto__", "\n", "z" * 5000))] = draw.choice(ODD)
    elif kind == "swap":
        parent[key] = copy.deepcopy(at(value, other := draw.choice(found)))
        what += f" from {'.'.join(map(str, other))[:120]}"

    # another value at the place
    elif kind == "retype":
        parent[key] = new = draw.choice(_retyped_values(parent[key]))
        what += f" = {new!r:.60}"
    elif kind == "number" and isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
        factor = draw.choice((-1, 2, 3, 0.5, 10**6))
        parent[key] = type(parent[key])(parent[key] * factor + draw.choice((-1, 0, 1)))
        what += f" = {parent[key]!r:.60}"
    else:
        parent[key] = new = draw.choice(ODD)
        what += f" = {new!r:.60}"
    return value, what


def _retyped_values(value: Any) -> list[Any]:
    """Values that a careless reader takes for the same."""
    found = [[value], {"x": value}, str(value), str(value), bool(value)]
    if isinstance(value, bool | int | float):
        found += [int(value), float(value), value + 0.5] if abs(value) < 1e300 else []  # NaN is not, either
    elif isinstance(value, list):
        found += [
            value[1:],
            value[:-1],
            value + value[:1],
            dict.fromkeys(map(str, value)),
            value[0] if value else None,
        ]
    return found


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1)


def of_text_of_json(text: str, draw: Random) -> Mutation:
    """Texts that JSON's own tools do not write: another encoding, a key twice, a number that is none, deep nesting."""
    end, levels = text.rfind("}"), draw.choice((DEEP, SHALLOW))
    keys = [*json.loads(text)] if text.lstrip()[:1] == "{" else []
    key = json.dumps(draw.choice(keys)) if keys else '"x"'

    odd = {
        "byte-order mark": "\ufeff" + text,
        "key twice": f"{text[:end]}, {key}: {json.dumps(draw.choice(ODD))}{text[end:]}",
        f"nested {levels} deep": f'{text[:end]}, "deep": {nested(levels)}{text[end:]}',
        f"nested {levels} deep in a key": f"{text[:end]}, {key}: {nested(levels)}{text[end:]}",
        f"only nesting, {levels} deep": nested(levels),
        "objects nested": '{"a":' * levels + "1" + "}" * levels,
        "long number": f"{text[:end]}, {key}: {'9' * 5000}{text[end:]}",
        "long fraction": f"{text[:end]}, {key}: 0.{'3' * LONG}{text[end:]}",
        "two values": text + text,
        "comment": "// comment\n" + text,
        "trailing comma": text[:end] + "," + text[end:],
        "bare word": f"{text[:end]}, {key}: -Infinity{text[end:]}",
        "lone surrogate": f'{text[:end]}, {key}: "\\ud800"{text[end:]}',
        "control character": f'{text[:end]}, {key}: "\x1b[2J"{text[end:]}',
        **{value: value for value in ("null", "[]", "{}", "1", '"x"', "[{}]", "NaN")},
    }

    what = draw.choice((*odd, "UTF-16", "Latin-1"))
    if what == "UTF-16":
        return Mutation(text.encode("utf-16", "surrogatepass"), what)
    if what == "Latin-1":
        return Mutation(text.encode("latin-1", "replace") + b"\xe9", what)
    return Mutation(odd[what].encode("utf-8", "surrogatepass"), what)


def of_json(data: bytes, draw: Random) -> Mutation:
    roll = draw.random()
    if roll < 0.12:
        return of_bytes(data, draw)
    if roll < 0.27:
        return of_text_of_json(data.decode(), draw)
    value, what = of_value(json.loads(data), draw)
    if draw.random() < 0.2 and isinstance(value, dict | list) and value:
        value, more = of_value(value, draw)
        what += f"; {more}"
    return Mutation(dumped(value).encode("utf-8", "surrogatepass"), what)


PATTERN_KEYS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")


def of_adapter_config(data: bytes, draw: Random) -> Mutation:
    """A quarter gets a regular expression where an adapter may have one."""
    if draw.random() > 0.25:
        return of_json(data, draw)
    value, key, pattern = json.loads(data), draw.choice(PATTERN_KEYS), draw.choice(BACKTRACKING)
    value[key] = pattern
    if key.startswith("layers"):
        value[key] = draw.choice((pattern, [pattern]))
        value["layers_to_transform"] = [0]
    elif key.endswith("_pattern"):
        value[key] = {pattern: 2}
    elif draw.random() < 0.2:
        value[key] = [pattern]
    return Mutation(dumped(value).encode(), f"{key}: {pattern[:60]!r}")


# ---- safetensors

DTYPES = {  # bytes of one number
    **{"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2},
    **{"U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F4": 1, "X": 1},
}


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header, and the bytes behind it."""
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: str, body: bytes) -> bytes:
    raw = header.encode("utf-8", "surrogatepass")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + body


def of_safetensors(data: bytes, draw: Random) -> Mutation:
    if draw.random() < 0.25:
        return of_bytes(data, draw)
    header, body = header_of(data)
    name = draw.choice([name for name in header if name != "__metadata__"])
    kind = draw.choice((*_OF_TENSORS, "header length", "doubled key", "nested", "value of the header"))
    what = f"{kind} {name}"

    match kind:
        case "header length":
            size = len(data) - len(body) - 8
            new = draw.choice((0, 1, size - 1, size + 1, 2**31, 2**63 - 1, 2**64 - 1, 100_000_001))
            return Mutation(struct.pack("<Q", new) + data[8:], f"{kind} {new}")
        case "doubled key":
            other = draw.choice([*header])
            text = f"{json.dumps(header)[:-1]}, {json.dumps({name: header[other]})[1:]}"
            return Mutation(with_header(text, body), f"{what} as {other}")
        case "nested":
            levels = draw.choice((DEEP, SHALLOW))
            return Mutation(with_header(f'{json.dumps(header)[:-1]}, "x": {nested(levels)}}}', body), what)

        # the header, or what it says of one tensor
        case "value of the header":
            header, what = of_value(header, draw)
        case _:
            body, more = _OF_TENSORS[kind](header, body, name, draw)
            what += f": {more}"
    return Mutation(with_header(json.dumps(header), body), what)


def _offsets(header: dict[str, Any], body: bytes, name: str, draw: Random) -> tuple[bytes, str]:
    a, b = header[name]["data_offsets"]
    choices = ([b, a], [a, b + 4], [a + 4, b + 4], [-1, b], [a, 10**18], [0, b - a], [a, a], [a], [a, b, b])
    header[name]["data_offsets"] = new = draw.choice(choices)
    return body, str(new)


def _dtype(header: dict[str, Any], body: bytes, name: str, draw: Random) -> tuple[bytes, str]:
    """Mostly such that the bytes still fit, in one dimension."""
    entry = header[name]
    entry["dtype"] = draw.choice([*DTYPES])
    a, b = entry["data_offsets"]
    if draw.random() < 0.7:
        entry["shape"] = [(b - a) // DTYPES[entry["dtype"]]]
    return body, f"{entry['dtype']} {entry['shape']}"


def _retyped(header: dict[str, Any], body: bytes, name: str, draw: Random) -> tuple[bytes, str]:
    """The same shape in another dtype; zeros where that takes more or fewer bytes, and the offsets behind are moved."""
    dtype = draw.choice([*DTYPES])
    a, b = header[name]["data_offsets"]
    count = 1
    for size in header[name]["shape"]:
        count *= size
    data = body[a:b] if b - a == count * DTYPES[dtype] else bytes(count * DTYPES[dtype])
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= b:
            entry["data_offsets"] = [offset + len(data) - (b - a) for offset in entry["data_offsets"]]
    header[name] |= {"dtype": dtype, "data_offsets": [a, a + len(data)]}
    return body[:a] + data + body[b:], dtype


def _shape(header: dict[str, Any], body: bytes, name: str, draw: Random) -> tuple[bytes, str]:
    shape = header[name]["shape"]
    grown = [*shape[:-1], shape[-1] * 2] if shape else [2]
    huge, deep = [2**62, 2**62, 4], [1] * 70 + shape
    choices = (shape[::-1], [1, *shape], [*shape, 1], huge, deep, [0], [], [-1], [2**64], grown, [0, 2**62])
    header[name]["shape"] = new = draw.choice(choices)
    return body, f"{new!s:.60}"


def _metadata(header: dict[str, Any], body: bytes, name: str, draw: Random) -> tuple[bytes, str]:
    metadata = header.setdefault("__metadata__", {})
    key = draw.choice(
        [*metadata, "format", "values", "lessons", "score_bias", "base_4bit", "starts", "others"]
    )
    text = metadata.get(key, "")
    try:
        value, what = of_value(json.loads(text), draw)
        text = dumped(value)
    except ValueError:
        what = ""

    if not what or draw.random() < 0.3:
        choices = (
            *("", "x", "null", "[]", "{}", "1e999", "NaN", "1", nested(DEEP), nested(SHALLOW)),
            "9" * 5000,
        )
        text = what = draw.choice(choices)
    metadata[key] = text
    return body, f"{key}: {what[:120]}"


def _numbers(header: dict[str, Any], body: bytes, name: str, draw: Random) -> tuple[bytes, str]:
    """One number of the tensor, or all of them; as fp32."""
    a, b = header[name]["data_offsets"]
    number = draw.choice((float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1e-45, 0.0, 1.0, -1.0))
    whole = draw.random() < 0.5
    data = (struct.pack("<f", number) * ((b - a) // 4 + 1))[: b - a] if whole else struct.pack("<f", number)
    new = bytearray(body)
    new[a : a + len(data)] = data
    return bytes(new[: len(body)]), f"{number} {'everywhere' if whole else 'once'}"


def _name(header: dict[str, Any], body: bytes, name: str, draw: Random) -> tuple[bytes, str]:
    names = (f"{name}.x", "", "../x", name.upper(), "lm_head.weight", "score.weight", "\x1b[2J", "y" * 5000)
    new = draw.choice((*names, f"model.{name}", name.replace("0", "1"), name.replace("0", "9" * 30)))
    header[new] = header.pop(name)
    return body, f"{new[:60]!r}"


def _drop(header: dict[str, Any], body: bytes, name: str, draw: Random) -> tuple[bytes, str]:
    """The tensor and its bytes."""
    a, b = header.pop(name)["data_offsets"]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= b:
            entry["data_offsets"] = [offset - (b - a) for offset in entry["data_offsets"]]
    return body[:a] + body[b:], "with its bytes"


def _twice(header: dict[str, Any], body: bytes, name: str, draw: Random) -> tuple[bytes, str]:
    """The tensor under a second name, with bytes of its own."""
    a, b = header[name]["data_offsets"]
    new = draw.choice((f"{name}.x", "lm_head.weight", "model.layers.99.x.weight", "score.bias", "z" * 5000))
    header[new] = header[name] | {"data_offsets": [len(body), len(body) + b - a]}
    return body + body[a:b], f"{new[:60]!r}"


def _other(header: dict[str, Any], body: bytes, name: str, draw: Random) -> tuple[bytes, str]:
    other = draw.choice([name for name in header if name != "__metadata__"])
    header[name], header[other] = header[other], header[name]
    return body, f"changes places with {other}"


def _length(header: dict[str, Any], body: bytes, name: str, draw: Random) -> tuple[bytes, str]:
    size = draw.choice((1, 4, 8, 100))
    longer = draw.random() < 0.5
    return (body + b"x" * size if longer else body[:-size]), f"{size} bytes {'more' if longer else 'fewer'}"


_OF_TENSORS = {
    **{"offsets": _offsets, "dtype": _dtype, "retyped": _retyped, "shape": _shape, "metadata": _metadata},
    **{
        "numbers": _numbers,
        "name": _name,
        "drop": _drop,
        "twice": _twice,
        "other": _other,
        "length": _length,
    },
}
