"""Reading of tables by pyarrow: .parquet, and Arrow's IPC formats (.arrow, .feather).

Arrow stores one list of fields for a whole column. So an object has null for a field that only another row has, and
these nulls are left out. A null inside a JSON text (the type arrow.json) is data and stays.

A table may store one text for a million rows. So the sizes in a file's headers are checked first, and then each batch
is measured with every text counted for each row that has it, before it becomes Python values.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...model.errors import InputError, shown
from ...model.files.text_files import parse_json
from .arrow_messages import read_sizes
from .parquet_footer import read_footer

FREE_TABLE, TABLE_RATIO = (
    16 * 2**20,
    1000,
)  # limit on the unpacked bytes of a file of n bytes: FREE_TABLE + TABLE_RATIO * n
VALUE_BYTES = 16  # counted for each value beside its own bytes, which may be a single bit
FREE_ROWS = 300_000  # a file with more rows than this may have at most one row per byte
BATCH_ROWS = 32  # the most rows of a parquet file that are unpacked before their size is checked
MOST_NESTED = 25  # the most levels of nesting in the type of a column

Cells = dict[str, Any]
Reader = Callable[[Any], Any]


def read_parquet(path: Path) -> list[Cells]:
    """Return the rows of a parquet file. Raises InputError if the file is broken or unpacks to too much."""
    return _read(path, "parquet", _parquet_batches)


def read_arrow(path: Path) -> list[Cells]:
    """Return the rows of a file in Arrow's stream or file format. Raises InputError as `read_parquet` does."""
    return _read(path, "Arrow", _arrow_batches)


def _read(path: Path, kind: str, batches: Callable[[Path], Iterator[Any]]) -> list[Cells]:
    """Return the rows of all record batches. kind: the name of the format, for messages."""
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{path}: reading {kind} requires pyarrow: pip install 'burnish[parquet]'"
        ) from error

    try:
        return list(_rows(path, batches(path)))
    except InputError:
        raise
    except Exception as error:  # pyarrow's errors have no common class
        raise InputError(f"{path}: not a readable {kind} file: {error}") from error


def _rows(path: Path, batches: Iterable[Any]) -> Iterator[Cells]:
    """Yield the rows of record batches, which are valid."""
    unpacked_bytes = 0
    for batch in batches:
        unpacked_bytes += sum(map(_spelled_out, batch.columns))
        _check_unpacked(path, unpacked_bytes)
        names = batch.schema.names
        columns = [_cells(path, name, cells) for name, cells in zip(names, batch.columns, strict=True)]
        for cells in zip(*columns, strict=True):
            yield dict(zip(names, cells, strict=True))


def _check_schema(path: Path, schema: Any) -> None:
    """Raise InputError if a column occurs twice, or has a type that cannot be read."""
    for field in schema:
        _check_type(f"{path}: column {shown(field.name)}", field.type)
    if twice := [name for name, count in Counter(schema.names).items() if count > 1]:
        raise InputError(f"{path}: column {shown(twice[0])}: expected once, found twice")


def _check_type(where: str, type_: Any, depth: int = 0) -> None:
    """Raise InputError if a type is nested too deeply, because reading its values would exhaust the stack.

    Also raise InputError for types in which a few bytes stand for any number of values.
    """
    from pyarrow import types  # pyright: ignore[reportMissingImports]

    if depth > MOST_NESTED:
        raise InputError(f"{where}: expected a type with at most {MOST_NESTED} levels of nesting, got more")
    is_view = types.is_list_view(type_) or types.is_large_list_view(type_)
    is_nested_category = types.is_dictionary(type_) and types.is_nested(type_.value_type)
    if is_view or is_nested_category or types.is_run_end_encoded(type_) or types.is_union(type_):
        raise InputError(f"{where}: cannot read {type_!s:.100}; leave the column out, or write it as a list")
    for inner in _inner_types(type_):
        _check_type(where, inner, depth + 1)


def _inner_types(type_: Any) -> list[Any]:
    """Return the types of a nested type's fields, of a category's values, or of an extension's storage."""
    if hasattr(type_, "storage_type"):
        return [type_.storage_type]
    if hasattr(type_, "value_type") and not type_.num_fields:  # a dictionary of categories
        return [type_.value_type]
    return [type_.field(i).type for i in range(type_.num_fields)]


# ---- formats


def _parquet_batches(path: Path) -> Iterator[Any]:
    """Yield the batches of a parquet file, with fewer rows at a time if they are long."""
    import pyarrow.parquet  # pyright: ignore[reportMissingImports]

    _check_footer(path)
    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        _check_schema(path, file.schema_arrow)
        first = next(file.iter_batches(1), None)
        batch_rows = FREE_TABLE // max(first.nbytes if first else 1, 1)
        for batch in file.iter_batches(min(max(batch_rows, 1), BATCH_ROWS)):
            batch.validate(full=True)
            yield batch


def _check_footer(path: Path) -> None:
    """Raise InputError if the footer's counts are too large for the file's size, before anything is unpacked."""
    footer = read_footer(path)
    if footer.rows != sum(footer.group_rows) or any(rows < 0 for rows in footer.group_rows):
        raise InputError(f"{path}: not a readable parquet file: its counts of rows differ")
    _check_size(path, footer.rows, footer.values, footer.unpacked_bytes)


def _arrow_batches(path: Path) -> Iterator[Any]:
    """Yield the batches of an Arrow file. The file format holds a stream behind its first bytes."""
    import pyarrow.ipc  # pyright: ignore[reportMissingImports]

    sizes = read_sizes(path)
    _check_size(path, sizes.rows, sizes.values, sizes.unpacked_bytes)
    with pyarrow.OSFile(str(path)) as file:
        file.seek(sizes.start)
        with pyarrow.ipc.open_stream(file) as stream:
            _check_schema(path, stream.schema)
            for batch in stream:
                batch.validate()
                _check_unpacked(path, sum(map(_bytes_of_views, batch.columns)))
                batch.validate(full=True)  # it reads the text of each view
                yield batch


def _check_size(path: Path, rows: int, values: int, unpacked_bytes: int) -> None:
    """Raise InputError if a file's headers give sizes that are too large for its own size."""
    size = os.path.getsize(path)
    if rows > max(FREE_ROWS, size):
        raise InputError(f"{path}: expected no more rows than the file's {size} bytes, got {rows}")
    _check_unpacked(path, unpacked_bytes + VALUE_BYTES * values)


def _check_unpacked(path: Path, unpacked_bytes: int) -> None:
    if unpacked_bytes > FREE_TABLE + TABLE_RATIO * os.path.getsize(path):
        raise InputError(f"{path}: expected to unpack to at most {TABLE_RATIO} times its size, got more")


# ---- values


def _spelled_out(cells: Any) -> int:
    """Return the bytes of an array's values, with a shared text counted for each value that refers to it."""
    from pyarrow import types  # pyright: ignore[reportMissingImports]

    type_ = cells.type
    if hasattr(cells, "storage"):
        return _spelled_out(cells.storage)
    if types.is_dictionary(type_):
        return int(_lengths(cells.dictionary)[cells.indices.drop_null().to_numpy(zero_copy_only=False)].sum())
    if _is_view(type_):
        return _bytes_of_views(cells)

    # nested values
    if types.is_struct(type_):
        return sum(_spelled_out(cells.field(i)) for i in range(type_.num_fields))
    if types.is_map(type_):
        offsets = cells.offsets
        first, end = offsets[0].as_py(), offsets[-1].as_py()
        return cells.nbytes + sum(
            _spelled_out(part.slice(first, end - first)) for part in (cells.keys, cells.items)
        )
    if types.is_nested(type_):
        return len(cells) + _spelled_out(cells.flatten())
    return cells.nbytes


def _is_view(type_: Any) -> bool:
    from pyarrow import types  # pyright: ignore[reportMissingImports]

    return types.is_string_view(type_) or types.is_binary_view(type_)


def _bytes_of_views(cells: Any) -> int:
    """Return the bytes of all texts that an array refers to as views, at any depth. Many views may share one text."""
    if _is_view(cells.type):
        return int(_lengths(cells).sum())
    if hasattr(cells, "field"):  # of objects
        inner = [cells.field(i) for i in range(cells.type.num_fields)]
    else:
        names = ("keys", "items") if hasattr(cells, "keys") else ("storage", "dictionary", "values")
        inner = [getattr(cells, name) for name in names if hasattr(cells, name)]
    return sum(map(_bytes_of_views, inner))


def _lengths(texts: Any) -> Any:
    """Return the length in bytes of each value of an array that is not nested, 0 for null."""
    from pyarrow import compute, types  # pyright: ignore[reportMissingImports]

    type_ = texts.type
    if hasattr(texts, "storage"):
        return _lengths(texts.storage)
    if _is_view(type_):
        _, views, *_ = texts.buffers()  # 16 bytes a value; the first 4 are its length
        lengths = np.frombuffer(views, np.int32)[::4][texts.offset : texts.offset + len(texts)]
        return lengths.clip(min=0).astype(np.int64)
    if types.is_primitive(type_) or types.is_null(type_) or types.is_decimal(type_):
        return np.full(len(texts), VALUE_BYTES)
    lengths = compute.fill_null(compute.call_function("binary_length", [texts]), 0)
    return lengths.to_numpy(zero_copy_only=False).astype(np.int64)


def _cells(path: Path, name: str, cells: Any) -> list[Any]:
    """Return the values of a column in Python types, without the nulls that Arrow adds to objects.

    A map with texts as keys becomes a dict. Another map becomes a list of pairs, because JSON objects have only texts
    as keys.
    """
    maps = "strict" if _maps_are_of_text(cells.type) else None
    try:
        values = cells.to_pylist(maps_as_pydicts=maps)
        read = _reader(cells.type)
        return values if read is None else [None if value is None else read(value) for value in values]
    except (
        Exception
    ) as error:  # a repeated key of a map, a date out of Python's range, text that is not UTF-8 or JSON
        raise InputError(
            f"{path}: column {shown(name)}: cannot read {cells.type}: {type(error).__name__}: {error}; "
            "leave the column out, or write it as text"
        ) from error


def _maps_are_of_text(type_: Any) -> bool:
    from pyarrow import types  # pyright: ignore[reportMissingImports]

    if types.is_map(type_) and not (types.is_string(type_.key_type) or types.is_large_string(type_.key_type)):
        return False
    return all(map(_maps_are_of_text, _inner_types(type_)))


def _reader(type_: Any) -> Reader | None:
    """Return the function that makes a row's value of pyarrow's, or None if both are the same.

    It leaves out null fields of objects at any depth, and reads JSON texts. A null in a list stays.
    """
    from pyarrow import types  # pyright: ignore[reportMissingImports]

    if getattr(type_, "extension_name", "") == "arrow.json":
        return lambda text: parse_json(text, "its JSON")
    if types.is_struct(type_):
        fields = {type_.field(i).name: _reader(type_.field(i).type) for i in range(type_.num_fields)}
        return lambda value: {
            name: cell if (read := fields[name]) is None else read(cell)
            for name, cell in value.items()
            if cell is not None
        }

    # lists, and maps whose keys are texts
    if not types.is_nested(type_):
        return None
    if not types.is_map(type_):
        item = _reader(type_.value_type)
        return item and (lambda values: [None if value is None else item(value) for value in values])
    item = _reader(type_.item_type) or (lambda value: value)
    return lambda entries: (
        {key: item(cell) for key, cell in entries.items() if cell is not None}
        if isinstance(entries, dict)
        else entries
    )
