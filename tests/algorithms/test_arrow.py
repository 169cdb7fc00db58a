"""Arrow files and folders of `datasets.save_to_disk`: read as JSONL of the same rows, or refused in a sentence."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from burnish.algorithms.data.arrow_messages import read_sizes
from burnish.algorithms.data.rows import read_rows
from burnish.model.errors import InputError
from faults import check_of, control, faults_of
from fork import in_a_fork
from planted import copy_of

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.ipc")
parquet = pytest.importorskip("pyarrow.parquet")

TURN = {"role": "user", "content": "ü", "name": "n"}
WITHOUT_NULLS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": True}]},
    {"messages": [TURN], "source": "x"},
    {"messages": []},
]
TALKS = [{"source": None} | row for row in WITHOUT_NULLS]


def arrow(path: Path, table, *, file: bool = False, **options) -> Path:
    """Write a table in Arrow's stream format, or with `file` in its file format."""
    writer = pyarrow.ipc.new_file if file else pyarrow.ipc.new_stream
    batch_rows = options.pop("batch_rows", None)
    with writer(str(path), table.schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as out:
        out.write_table(table, batch_rows)
    return path


def saved(folder: Path, *tables, **state) -> Path:
    """A folder as `datasets.save_to_disk` writes it, with one file for each table."""
    folder.mkdir()
    names = [f"data-{i:05}-of-{len(tables):05}.arrow" for i in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        arrow(folder / name, table)
    listed = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": listed, "_split": None} | state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def refusal(path: Path, read: Callable[[Path], object] = read_rows) -> str:
    try:
        read(path)
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) <= 600
        return str(error)
    return "read"


# ---- what is read


@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}, {"compression": "lz4"}, {"batch_rows": 2}])
@pytest.mark.parametrize("name", ["a.arrow", "a.feather"])
def test_both_formats_are_read_as_jsonl_is(tmp_path, name, options):
    table = pyarrow.Table.from_pylist(TALKS)
    path = arrow(tmp_path / name, table, file=name.endswith("feather"), **options)
    rows = read_rows(path)
    assert rows == WITHOUT_NULLS
    assert [row.where for row in rows] == [f"{path} row {i}" for i in (1, 2, 3)]


def test_every_type_of_text_is_text(tmp_path):
    texts = pyarrow.array(["a", None, "a text of more than twelve bytes"])
    lists = pyarrow.array([["a"], [], ["b" * 20, None]], pyarrow.list_(pyarrow.string_view()))
    columns = {
        "large": texts.cast(pyarrow.large_string()),
        "view": texts.cast(pyarrow.string_view()),
        "category": texts.dictionary_encode(),
        "views": lists,
        "large list": pyarrow.array([["a"], None, ["b"]], pyarrow.large_list(pyarrow.string())),
        "two": pyarrow.array([["a", "b"], None, ["c", None]], pyarrow.list_(pyarrow.string(), 2)),
        # nested, and extensions
        "categories": pyarrow.ListArray.from_arrays([0, 1, 1, 3], texts.dictionary_encode()),
        "map": pyarrow.array(
            [[("k", "v")], None, [("n", None)]], pyarrow.map_(pyarrow.string(), pyarrow.string())
        ),
        "extension": pyarrow.array(['{"a": [1, null]}', None, "null"], pyarrow.json_()),
    }

    first, second, third = read_rows(arrow(tmp_path / "a.arrow", pyarrow.table(columns)))
    assert first == {
        **{"large": "a", "view": "a", "category": "a", "views": ["a"], "large list": ["a"]},
        **{"two": ["a", "b"], "categories": ["a"], "map": {"k": "v"}, "extension": {"a": [1, None]}},
    }
    assert second == {"views": [], "categories": []}
    assert third["view"] == third["large"] == third["category"] == "a text of more than twelve bytes"
    assert third["views"] == ["b" * 20, None] and third["map"] == {}


def test_json_texts_are_values_whose_nulls_stay(tmp_path):
    """The type of `datasets.Json`, also inside messages; a null of an object that Arrow has made is left out."""
    storage = pyarrow.array(['{"x": null}', '"text"'], pyarrow.json_())
    inner = pyarrow.StructArray.from_arrays(
        [storage, pyarrow.array([None, "b"])], names=["arguments", "name"]
    )
    table = pyarrow.table({"calls": pyarrow.ListArray.from_arrays([0, 1, 2], inner)})
    assert read_rows(arrow(tmp_path / "a.arrow", table)) == [
        {"calls": [{"arguments": {"x": None}}]},
        {"calls": [{"arguments": "text", "name": "b"}]},
    ]

    parquet.write_table(table, tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == read_rows(tmp_path / "a.arrow")
    broken = pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(["{"]))
    found = refusal(arrow(tmp_path / "b.arrow", pyarrow.table({"x": broken})))
    assert "b.arrow: column x: cannot read extension<arrow.json>" in found and "not JSON" in found


def test_a_folder_of_save_to_disk_is_its_files_in_order(tmp_path):
    tables = [pyarrow.table({"text": texts}) for texts in (["b", "a"], [], ["c"])]
    folder = saved(tmp_path / "saved", *tables)
    rows = read_rows(folder)
    assert [row["text"] for row in rows] == ["b", "a", "c"]
    assert rows[2].where == f"{folder / 'data-00002-of-00003.arrow'} row 1"

    # a list that lacks one of them, or names one twice
    for kept in ([0, 1], [1, 2], [0, 1, 1], [2, 1, 0]):
        listed = [{"filename": f"data-{i:05}-of-00003.arrow"} for i in kept]
        other = saved(tmp_path / f"kept-{kept}", *tables, _data_files=listed)
        assert "state.json: _data_files: expected 3 files in order" in refusal(other)

    # files that state.json does not list are no part of it
    arrow(folder / "cache-1.arrow", tables[0])
    assert len(read_rows(folder)) == 3
    assert refusal(saved(tmp_path / "none")).endswith("none: expected at least one row, got none")


def test_folders_that_are_not_one_dataset_are_refused_with_the_way_out(tmp_path):
    table = pyarrow.table({"text": ["a"]})
    splits = tmp_path / "splits"
    splits.mkdir()
    (splits / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split in ("train", "test"):
        saved(splits / split, table)
    assert f"give one of {splits / 'test'}, {splits / 'train'}" in refusal(splits)
    assert len(read_rows(splits / "train")) == 1
    assert "selected or shuffled by an index file" in refusal(
        saved(tmp_path / "indices", table, _indices_files=[{"filename": "indices.arrow"}])
    )

    # a list of files that leads out of the folder, or is none
    for i, listed in enumerate(["x", [3], [{"filename": "../a.arrow"}], [{"filename": ""}], [{}], None]):
        folder = saved(tmp_path / f"broken-{i}", table, _data_files=listed)
        assert "state.json: _data_files: expected" in refusal(folder)
    gone = saved(tmp_path / "gone", table, _data_files=[{"filename": "gone.arrow"}])
    assert refusal(gone).endswith("gone.arrow: no such file")
    (gone / "state.json").write_text("{")
    assert "state.json: not JSON" in refusal(gone)


def test_without_pyarrow_the_way_out_is_named(tmp_path, monkeypatch):
    path = arrow(tmp_path / "a.arrow", pyarrow.table({"text": ["a"]}))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert "reading Arrow requires pyarrow: pip install 'burnish[parquet]'" in refusal(path)


# ---- what is broken


def test_the_sizes_are_those_of_pyarrow(tmp_path):
    table = pyarrow.Table.from_pylist(TALKS * 50)
    for options in ({}, {"compression": "zstd"}, {"batch_rows": 7}):
        for file in (False, True):
            sizes = read_sizes(arrow(tmp_path / "a.arrow", table, file=file, **options))
            assert sizes.rows == 150 and sizes.start == 8 * file
            # 150 cells of two columns, and 150 messages with four fields each
            assert sizes.values == 150 * 2 + 150 * 5
            assert sizes.unpacked_bytes >= table.nbytes * 0.9


def messages_of(whole: bytes) -> list[int]:
    """The places where messages of a stream end."""
    ends, place = [], 0
    while whole[place + 4 : place + 8] != bytes(4):
        (length,) = struct.unpack_from("<i", whole, place + 4)
        metadata = pyarrow.ipc.read_message(whole[place:])
        place += 8 + length + (0 if metadata.body is None else metadata.body.size)
        ends.append(place)
    return ends


@pytest.mark.parametrize("file", [False, True])
def test_a_file_that_was_cut_off_is_refused_wherever_it_ends(tmp_path, file):
    """Also between two messages: pyarrow takes the end of a stream there for its end."""
    path = arrow(tmp_path / "a.arrow", pyarrow.Table.from_pylist(TALKS), file=file, batch_rows=1)
    whole = path.read_bytes()
    places = [*range(0, len(whole), 23), *range(len(whole) - 9, len(whole))]
    if not file:
        ends = messages_of(whole)
        assert len(ends) == 4 and pyarrow.ipc.open_stream(whole[: ends[2]]).read_all().num_rows == 2
        places += ends
    for end in places:
        path.write_bytes(whole[:end])
        assert "a.arrow: not a readable Arrow file: " in refusal(path), end
    for more in (b"x", whole):
        path.write_bytes(whole + more)
        assert "not a readable Arrow file: " in refusal(path) or file


def test_other_files_under_that_name_are_refused(tmp_path):
    for text in (b"", b"FEA1" + b"\0" * 40, b'{"text": "a"}\n', b"ARROW1\0\0", b"PAR1" * 10):
        (tmp_path / "a.arrow").write_bytes(text)
        assert "a.arrow: not a readable Arrow file: " in refusal(tmp_path / "a.arrow")


@pytest.mark.parametrize("seed", range(3))
def test_broken_bytes_end_in_a_sentence_or_in_rows(tmp_path, seed):
    rows = [{"prompt": f"{i}+1=", "turns": [{"a": "x", "b": None}], "n": i} for i in range(50)]
    table, draw = pyarrow.Table.from_pylist(rows), random.Random(seed)
    table = table.append_column("category", pyarrow.array(["a", "b"] * 25).dictionary_encode())
    table = table.append_column("view", pyarrow.array(["a" * 20, "b"] * 25, pyarrow.string_view()))
    options = ({}, {"compression": "zstd"}, {"batch_rows": 20})[seed]
    whole = arrow(tmp_path / "a.arrow", table, file=seed == 1, **options).read_bytes()

    def read_all() -> str:
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(draw.choice((1, 1, 3))):
                i = draw.randrange(len(whole))
                data[i : i + draw.choice((1, 1, 4, 8))] = draw.choice(
                    (b"\xff", b"", b"\x00" * 8, b"\x7f" * 4)
                )
            (tmp_path / "b.arrow").write_bytes(data)
            refusal(tmp_path / "b.arrow")
        return "done"

    assert in_a_fork(read_all, seconds=10, gigabytes=3) == "done"


def test_every_bit_of_the_metadata_may_be_wrong(tmp_path):
    """One bit of every third byte, in turn: lengths, offsets, counts and types."""
    path = arrow(tmp_path / "a.arrow", pyarrow.table({"t": ["x", "y"]}), compression="lz4")
    whole = path.read_bytes()

    def read_all() -> str:
        for place in range(0, len(whole), 3):
            broken = bytearray(whole)
            broken[place] ^= 1 << place % 8
            path.write_bytes(broken)
            refusal(path)
        return "done"

    assert in_a_fork(read_all, seconds=10, gigabytes=2) == "done"


# ---- what would fill the memory


def categories(count: int, size: int) -> pyarrow.Array:
    indices = pyarrow.array(np.zeros(count, np.int32))
    return pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["x" * size]))


def views(count: int, size: int) -> pyarrow.Array:
    """`count` views of the same text."""
    _, one, *texts = pyarrow.array(["x" * size], pyarrow.string_view()).buffers()
    return pyarrow.Array.from_buffers(
        pyarrow.string_view(), count, [None, pyarrow.py_buffer(one.to_pybytes() * count), *texts]
    )


def in_a_list(values: pyarrow.Array) -> pyarrow.Array:
    return pyarrow.ListArray.from_arrays(pyarrow.array([0, len(values)], pyarrow.int32()), values)


UNPACKS = "expected to unpack to at most 1000 times its size, got more"
BOMBS = {
    "a text for all rows": (lambda: categories(20_000, 100_000), UNPACKS),
    "a text for a list": (lambda: in_a_list(categories(50_000, 100_000)), UNPACKS),
    "views of one text": (lambda: views(100_000, 1_000_000), UNPACKS),
    "views in a list": (lambda: in_a_list(views(100_000, 1_000_000)), UNPACKS),
    "zeros": (lambda: pyarrow.array(["0" * 100_000_000]), UNPACKS),
    "nulls": (lambda: pyarrow.nulls(1_000_000), "expected no more rows than the file's"),
    "nulls in a list": (lambda: in_a_list(pyarrow.nulls(100_000_000)), UNPACKS),
    "runs": (
        lambda: pyarrow.RunEndEncodedArray.from_arrays(pyarrow.array([10**6], pyarrow.int32()), ["x"]),
        "",
    ),
    "views of lists": (
        lambda: pyarrow.array([[1]], pyarrow.list_view(pyarrow.int64())),
        "column t: cannot read list_view<item: int64>; leave the column out, or write it as a list",
    ),
    "categories of lists": (
        lambda: pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, 0]), pyarrow.array([["a"]])),
        "column t: cannot read dictionary<values=list",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_stays_small(tmp_path, name):
    make, message = BOMBS[name]
    compression = "zstd" if name == "zeros" else None
    path = arrow(tmp_path / "a.arrow", pyarrow.table({"t": make()}), compression=compression)
    found = in_a_fork(lambda: refusal(path), seconds=5, gigabytes=0.5)
    assert found != "read" and message in found, found


def test_categories_and_views_count_as_the_texts_that_they_are(tmp_path):
    names = [f"{i:04}" * 250 for i in range(2000)]  # 2 MB
    table = pyarrow.table(
        {
            "category": pyarrow.DictionaryArray.from_arrays(pyarrow.array(range(2000)), names),
            "view": pyarrow.array(names, pyarrow.string_view()),
        }
    )
    rows = read_rows(arrow(tmp_path / "a.arrow", table, compression="zstd"))
    assert [row["category"] for row in rows] == [row["view"] for row in rows] == names


# ---- planted faults


@control
def a_cut_off_file_is_refused(module, folder: Path) -> None:
    """Cut between two messages, behind its end, in a body, and in the file format before its last bytes."""
    path = folder / "a.arrow"
    table = pyarrow.Table.from_pylist(TALKS)
    stream = arrow(path, table, batch_rows=1).read_bytes()
    whole = arrow(path, table, file=True).read_bytes()
    for data in (stream[: messages_of(stream)[2]], stream + b"x" * 8, stream[:-40], whole[:-6]):
        path.write_bytes(data)
        assert "not a readable Arrow file" in refusal(path, module.read_sizes), "expected a refusal"


@control
def unpacked_sizes_are_read(module, folder: Path) -> None:
    """Those of compressed buffers, nested values and dictionaries."""
    table = pyarrow.table({"t": ["0" * 1_000_000], "n": [list(range(100))]})
    sizes = module.read_sizes(arrow(folder / "a.arrow", table, compression="zstd"))
    assert sizes.unpacked_bytes > 1_000_000 and sizes.values == 102 and sizes.rows == 1, (
        f"expected, got {sizes}"
    )
    sizes = module.read_sizes(
        arrow(folder / "a.arrow", pyarrow.table({"t": categories(10, 50_000)}), compression="zstd")
    )
    assert sizes.unpacked_bytes > 50_000 and sizes.values == 11, f"expected the dictionary, got {sizes}"


@control
def bombs_are_found(module, folder: Path) -> None:
    """Those of which pyarrow itself unpacks nothing."""
    for values in (in_a_list(categories(30_000, 20_000)), in_a_list(views(30_000, 20_000))):
        path = arrow(folder / "a.arrow", pyarrow.table({"t": values}))
        assert UNPACKS in refusal(path, module.read_arrow), "expected a refusal"
    deep = pyarrow.ListArray.from_arrays([0, 1], BOMBS["views of lists"][0]())
    path = arrow(folder / "a.arrow", pyarrow.table({"t": deep}))
    assert "cannot read" in refusal(path, module.read_arrow), "expected a refusal"


@control
def nulls_are_left_out_of_objects_alone(module, folder: Path) -> None:
    test_table = pyarrow.table(
        {
            "t": [[{"a": {"b": None, "c": 1}}, None]],
            "j": pyarrow.array(['{"n": null}'], pyarrow.json_()),
        }
    )
    (found,) = module.read_arrow(arrow(folder / "a.arrow", test_table))
    assert found == {"t": [{"a": {"c": 1}}, None], "j": {"n": None}}, f"expected other nulls, got {found}"


@pytest.mark.parametrize("fault", faults_of(__file__), ids=lambda fault: fault.id)
def test_a_planted_fault_is_caught(fault, tmp_path, monkeypatch):
    module = copy_of(fault.file, tmp_path, monkeypatch, fault)
    with pytest.raises(AssertionError, match="expected"):
        check_of(fault)(module, tmp_path)


def test_faithful_copies_pass(tmp_path, monkeypatch):
    messages = copy_of("algorithms/data/arrow_messages", tmp_path, monkeypatch)
    tables = copy_of("algorithms/data/tables", tmp_path, monkeypatch)
    a_cut_off_file_is_refused(messages, tmp_path)
    unpacked_sizes_are_read(messages, tmp_path)
    bombs_are_found(tables, tmp_path)
    nulls_are_left_out_of_objects_alone(tables, tmp_path)
