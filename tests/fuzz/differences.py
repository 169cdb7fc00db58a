"""Differences of a changed file from the whole one, which is read by means of our own, more loosely than Burnish does.

A difference is a place, what stood there and what stands there now. None stands for a file that cannot be read so, or
that says one thing twice: whoever reads it has guessed.
"""

import gzip
import io
import json
import math
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from mutations import DTYPES, at, dumped, header_of
from programs import fields_of


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()
FORMATS = {
    "F64": "<d",
    "F32": "<f",
    "F16": "<e",
    "I64": "<q",
    "I32": "<i",
    "U8": "<B",
}  # BF16 is half of an F32
BROKEN = (OSError, EOFError, zlib.error, struct.error)
ROWS = ("lines", "list", "gzip", "parquet", "arrow")
FLOATS = ("F64", "F32", "F16", "BF16")


class Difference(NamedTuple):
    path: tuple[Any, ...]
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.path))[:80]}: {self.before!r:.60} -> {self.after!r:.60}"


class Numbers(NamedTuple):
    """A tensor's: dtype and shape as the header spells them."""

    dtype: str
    shape: tuple[Any, ...]
    raw: bytes
    numbers: tuple[float, ...] = ()  # where its dtype is one of FORMATS, or BF16

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, self.numbers))

    def within(self, least: float, most: float) -> bool:
        return all(least <= number <= most for number in self.numbers)

    def __repr__(self) -> str:
        return f"{self.dtype} {self.shape} finite={self.finite}"


class Ambiguous(ValueError):
    """A key twice."""


def differences(holds: str, whole: bytes, changed: bytes) -> list[Difference] | None:
    """holds: what kind of file it is, a key of readers.MUTATIONS."""
    try:
        one, other = (_VALUES[holds](data) for data in (whole, changed))
        return [*(_between_rows(one, other) if holds in ROWS else _between(one, other, ()))]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, *BROKEN):
        return None


def value_of(holds: str, data: bytes) -> Any:
    return _VALUES[holds](data)


def with_difference(whole: bytes, difference: Difference) -> bytes:
    """JSON with this one difference alone."""
    value = json.loads(whole)
    *before, key = difference.path
    parent = at(value, tuple(before))
    if difference.after is ABSENT:
        del parent[key]
    else:
        parent[key] = difference.after
    return dumped(value).encode("utf-8", "surrogatepass")


def same(one: Any, other: Any) -> bool:
    """Equal, and of one type: 1 is neither true nor 1.0; NaN is NaN."""
    return type(one) is type(other) and repr(one) == repr(other)


def _between(one: Any, other: Any, path: tuple[Any, ...]) -> Iterator[Difference]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one | other:
            yield from _between(one.get(key, ABSENT), other.get(key, ABSENT), (*path, key))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from _between(a, b, (*path, i))
    elif isinstance(one, Numbers) and isinstance(other, Numbers):
        if one != other:
            yield Difference(path, one, other)
    elif not same(one, other):
        yield Difference(path, one, other)


def _between_rows(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> Iterator[Difference]:
    """(cell, column): of rows in one place, or, where there are more or fewer, of all that are new."""
    if len(one) != len(other):
        yield Difference(("number of rows",), len(one), len(other))
        one = [row if any(same(row, earlier) for earlier in one) else {} for row in other]
    for before, after in zip(one, other, strict=True):
        for column in before | after:
            cells = before.get(column, ABSENT), after.get(column, ABSENT)
            if not same(*cells):
                yield Difference(("cell", column), *cells)


# ---- values of files


def json_of(text: str | bytes) -> Any:
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if any(not same(found[key], value) for key, value in pairs):
        raise Ambiguous("a key twice")
    return found


def _rows_of_lines(data: bytes) -> list[Any]:
    lines = re.split(r"\r\n|\n|\r", data.decode("utf-8-sig"))
    return [json_of(line) for line in lines if line.strip()]


def _rows_of_list(data: bytes) -> list[Any]:
    return json_of(data.decode("utf-8-sig"))


def _rows_of_gzip(data: bytes) -> list[Any]:
    return _rows_of_lines(gzip.decompress(data))


def _rows_of_parquet(data: bytes) -> list[Any]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()


def _rows_of_arrow(data: bytes) -> list[Any]:
    import pyarrow.ipc

    table = pyarrow.ipc.open_stream(data).read_all()
    table.validate(full=True)
    return table.to_pylist()


def _tensors(data: bytes) -> dict[str, Any]:
    header, body = header_of(data)
    json_of(data[8 : len(data) - len(body)])  # raises where a name stands twice
    found: dict[str, Any] = {"metadata": {}}
    for key, text in header.pop("__metadata__", {}).items():
        try:
            found["metadata"][key] = json_of(text)
        except ValueError:
            found["metadata"][key] = text

    # the tensors lie without gap or overlap
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (a, b), dtype, shape = entry["data_offsets"], entry["dtype"], tuple(entry["shape"])
        if a != end or b - a != math.prod(shape) * DTYPES[dtype]:
            raise ValueError(f"{name}: its bytes are not those of its shape")
        found[name], end = Numbers(dtype, shape, body[a:b], _numbers(dtype, body[a:b])), b
    if end != len(body):
        raise ValueError("bytes that no tensor has")
    return found


def _numbers(dtype: str, raw: bytes) -> tuple[float, ...]:
    if dtype == "BF16":
        raw, dtype = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2)), "F32"
    if dtype not in FORMATS:
        return ()
    return tuple(number for (number,) in struct.iter_unpack(FORMATS[dtype], raw))


def _gguf(data: bytes) -> dict[str, Any]:
    """Fields by key, and each tensor's numbers; the offsets stand as they are."""
    fields = fields_of(data)
    found: dict[str, Any] = {"version": data[4:8], "fields": {}}
    for start, end, kind, key in fields:
        if key in found["fields"]:
            raise Ambiguous(key)
        found["fields"][key] = [kind, *_items(data[start:end], kind)]

    # the table of tensors, behind the fields
    at, count, tensors = fields[-1][1], struct.unpack("<Q", data[8:16])[0], []
    for _ in range(count):
        length = struct.unpack_from("<Q", data, at)[0]
        name, at = data[at + 8 : at + 8 + length].decode(), at + 8 + length
        dims = struct.unpack_from("<I", data, at)[0]
        shape = struct.unpack_from(f"<{dims}Q", data, at + 4)
        kind, offset = struct.unpack_from("<IQ", data, at + 4 + 8 * dims)
        at += 16 + 8 * dims
        tensors.append((name, shape, kind, offset))

    start = -(-at // 32) * 32
    for name, shape, kind, offset in tensors:
        raw = data[start + offset : start + offset + 4 * math.prod(shape)]
        found[name] = Numbers(f"{kind}", (*shape, offset), raw, _numbers("F32", raw) if kind == 0 else ())
    return found


def _items(raw: bytes, kind: int) -> list[Any]:
    """A string, a number's bytes, or the strings of a list."""
    if kind == 8:
        return [raw[8:].decode()]
    if kind != 9 or struct.unpack_from("<I", raw)[0] != 8:
        return [raw]
    at, found = 12, []
    while at < len(raw):
        length = struct.unpack_from("<Q", raw, at)[0]
        found.append(raw[at + 8 : at + 8 + length].decode())
        at += 8 + length
    return found


_VALUES = {
    **{"json": json_of, "adapter config": json_of, "safetensors": _tensors, "gguf": _gguf},
    **{"lines": _rows_of_lines, "list": _rows_of_list, "gzip": _rows_of_gzip, "parquet": _rows_of_parquet},
    "arrow": _rows_of_arrow,
    "template": lambda data: data.decode(),
}
