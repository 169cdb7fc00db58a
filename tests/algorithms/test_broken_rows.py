"""Whatever stands in a file of rows, reading it ends in rows or in one sentence, within little memory and time."""

import gzip
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from burnish.algorithms.data.examples import rl_prompts, sft_examples
from burnish.algorithms.data.pairs import judged_completions, preferences
from burnish.algorithms.data.parquet_footer import read_footer
from burnish.algorithms.data.row import Row
from burnish.algorithms.data.rows import read_rows
from burnish.model.errors import InputError
from burnish.model.text.tokenizer import Tokenizer
from faults import check_of, control, faults_of
from fork import in_a_fork
from planted import copy_of

ROW = b'{"prompt": "1+2=", "completion": "3"}\n'
DEEP = b"[" * 100_000 + b"]" * 100_000


def refusal(file, read=read_rows) -> str:
    """The sentence that reading ends in."""
    try:
        found = read(file)
    except InputError as error:
        message = str(error)
        assert message.isprintable() and len(message) <= 600, f"expected one short line, got {message!r}"
        return message
    raise AssertionError(f"expected a refusal, got {len(found)} rows")


def write(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


# ---- lines

LINES = {
    "deep lists": (b'{"a": ' + DEEP + b"}", "line 2: not JSON: objects and lists deeper than"),
    "deep objects": (b'{"a":' * 5000 + b"1" + b"}" * 5000, "line 2: not JSON: objects and lists deeper than"),
    "a key twice": (b'{"prompt": "1", "prompt": "2", "completion": "3"}', "line 2: prompt: expected once"),
    "half of a pair": (b'{"prompt": "\\ud800", "completion": "1"}', "line 2: not valid Unicode"),
    "no UTF-8": (b'{"prompt": "\xff"}', "not UTF-8 text: line 2"),
    "UTF-16": ('{"prompt": "1"}'.encode("utf-16"), "not UTF-8 text: line 2"),
    "digits": (b'{"n": ' + b"9" * 5000 + b"}", "line 2: not JSON"),
    "NUL": (b"\x00", "line 2: not JSON"),
    "a control character": (b'{"a": "\x1b[2J"}', "line 2: not JSON"),
    "a tail": (b'{"prompt": "1"} \x1b[2J', "line 2: not JSON"),
    "a list": (b"[]", "line 2: expected an object with named columns, got []"),
    "text": (b'"x"', "line 2: expected an object with named columns, got 'x'"),
    "null": (b"null", "line 2: expected an object with named columns, got None"),
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
def test_a_line_that_is_no_row_is_named(tmp_path, name, ending):
    line, message = LINES[name]
    data = ending.join([ROW.strip(), line, ROW.strip()])
    for file in (write(tmp_path, "a.jsonl", data), write(tmp_path, "a.jsonl.gz", gzip.compress(data))):
        found = refusal(file)
        assert found.startswith(str(file)) and message in found


def test_what_is_a_row_is_read(tmp_path):
    odd = {
        "text": "\u2028\u0085\x00 \U0001f600",
        "": 1,
        "n": 10**400,
        "long": "1" * 300_000,
        "deep": [[[{}]]],
    }
    text = "\ufeff" + json.dumps(odd) + "\r\r\n \n\u00a0\n" + json.dumps(odd, ensure_ascii=False)
    for name in ("a.jsonl", "a.json"):
        assert read_rows(write(tmp_path, name, text.encode())) == [odd, odd]
    blank_first = "\n \n" + json.dumps([odd, odd])
    assert read_rows(write(tmp_path, "a.json", blank_first.encode())) == [odd, odd]
    rows = read_rows(write(tmp_path, "b.jsonl", b'{"x": NaN}\n{"x": 1e999}\n'))
    assert rows[0]["x"] != rows[0]["x"] and rows[1]["x"] == float("inf")


LISTS = {
    "deep": (DEEP, "not JSON: objects and lists deeper"),
    "open": (b'[{"a": 1}, ', "not JSON"),
    "an entry": (b'[{"a": 1}, null]', "entry 2: expected an object"),
    "a key twice": (b'[{"a": 1, "a": 2}]', "a: expected once, got 1 and 2"),
    "no UTF-8": (b'[{"a": "\xff"}]', "not UTF-8 text"),
    "nothing": (b"\n \n", "expected at least one row, got none"),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_that_holds_no_rows_is_named(tmp_path, name):
    data, message = LISTS[name]
    for file in (write(tmp_path, "a.json", data), write(tmp_path, "a.json.gz", gzip.compress(data))):
        assert message in refusal(file)


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "circle.jsonl").symlink_to(tmp_path / "circle.jsonl")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "circle.jsonl", "zero.json"):
        assert refusal(tmp_path / name).endswith(f"{name}: not a regular file")
    assert "folder.jsonl: expected a file, or a folder that datasets.save_to_disk wrote" in refusal(
        tmp_path / "folder.jsonl"
    )
    assert "no such file" in refusal(tmp_path / f"{'x' * 5000}.jsonl")
    assert "expected .jsonl" in refusal(write(tmp_path, "a.parquet.gz", b"x"))


# ---- gzip


@pytest.mark.parametrize("place", range(0, 60, 3))
def test_a_broken_byte_of_gzip_is_named(tmp_path, place):
    whole = bytearray(gzip.compress(ROW * 50, mtime=0))
    whole[place] ^= 0x55
    try:
        assert read_rows(write(tmp_path, "a.jsonl.gz", bytes(whole)))  # a name or a time in the header
    except InputError as error:
        assert str(error).startswith(str(tmp_path)) and str(error).isprintable()


def test_a_cut_and_a_wrong_sum_of_gzip_are_named(tmp_path):
    whole = gzip.compress(ROW * 50)
    for data in (whole[:-1], whole[: len(whole) // 2], whole[:5], whole[:-8] + bytes(8), whole + b"tail"):
        assert "incomplete or broken gzip file" in refusal(write(tmp_path, "a.jsonl.gz", data))
    assert len(read_rows(write(tmp_path, "a.jsonl.gz", whole + whole))) == 100  # two members are one file


def packed(piece: bytes, times: int) -> bytes:
    """Unpacks to piece * times, as several members are one file."""
    return gzip.compress(piece, 9) * times


def test_repeated_rows_are_no_bomb(tmp_path):
    assert len(read_rows(write(tmp_path, "a.jsonl.gz", gzip.compress(ROW * 20_000)))) == 20_000


def test_rows_that_differ_in_little_are_no_bomb(tmp_path):
    """Generated problems behind one long prompt: 20 MB in 150 KB."""
    draw, words = random.Random(0), [f"word{i * 7919 % 1000}" for i in range(1200)]
    lines = (
        json.dumps({"prompt": f"{' '.join(words)} {draw.randrange(100)} + {draw.randrange(100)}"})
        for _ in range(2000)
    )
    data = gzip.compress("\n".join(lines).encode())
    assert len(read_rows(write(tmp_path, "a.jsonl.gz", data))) == 2000


MEBIBYTE = 2**20
BOMBS = {
    "rows": (
        "a.jsonl.gz",
        lambda: packed((b'{"a": "' + b"0" * 1000 + b'"}\n') * 20_000, 25),
        "expected to unpack to at most 200 times",
    ),
    "one line": (
        "a.jsonl.gz",
        lambda: packed(b"[" * MEBIBYTE, 1000),
        "expected to unpack to at most 200 times",
    ),
    "one list": (
        "a.json.gz",
        lambda: packed(b"[{}," * (MEBIBYTE // 4), 1000),
        "expected to unpack to at most 200 times",
    ),
    "rows of no text": (
        "a.jsonl.gz",
        lambda: packed(b"{}\r" * (10 * MEBIBYTE) + b"\n", 1),
        "expected to unpack to at most 200 times",
    ),
    "a list of objects": (
        "a.json.gz",
        lambda: packed(b'{"":0},' * (2 * MEBIBYTE), 1),
        "expected to unpack to at most 200 times",
    ),
    "a long line": (
        "a.jsonl",
        lambda: b" " * (65 * MEBIBYTE),
        "line 1: expected at most 67108864 bytes in a line",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_stays_small(tmp_path, name):
    file, data, message = BOMBS[name]
    path = write(tmp_path, file, data())
    assert message in in_a_fork(lambda: refusal(path), seconds=10, gigabytes=1.5)


# ---- parquet


def parquet(folder: Path, table, **options) -> Path:
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, folder / "a.parquet", **options)
    return folder / "a.parquet"


def bomb(name: str):
    import pyarrow

    def in_one_list(numbers):
        return pyarrow.table({"l": pyarrow.ListArray.from_arrays([0, len(numbers)], pyarrow.array(numbers))})

    match name:
        case "a text for all rows":
            text, indices = pyarrow.array(["x" * 100_000]), pyarrow.array([0] * 50_000, pyarrow.int32())
            return pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(indices, text)})
        case "a long text for all rows":
            text, indices = pyarrow.array(["x" * 15_000_000]), pyarrow.array([0] * 300, pyarrow.int32())
            return pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(indices, text)})
        case "nulls":
            return pyarrow.table({"n": pyarrow.nulls(1_000_000)})
        case "bits":
            return in_one_list(np.zeros(3_000_000, bool))
        case _:
            return in_one_list(np.zeros(5_000_000))


SLOW = ("a list", "bits")
PACKED = [pytest.param(name, marks=pytest.mark.slow) for name in SLOW]


@pytest.mark.parametrize("name", ["a text for all rows", "a long text for all rows", "nulls", *PACKED])
def test_parquet_bombs_stay_small(tmp_path, name):
    pytest.importorskip("pyarrow")
    path = parquet(tmp_path, bomb(name), compression="zstd")
    assert path.stat().st_size < 100_000
    found = in_a_fork(lambda: refusal(path), seconds=10, gigabytes=1.5)
    assert "expected to unpack to at most" in found or "expected no more rows than" in found, found


@pytest.mark.parametrize("seed", range(3))
def test_broken_bytes_of_parquet_are_named(tmp_path, seed):
    pyarrow = pytest.importorskip("pyarrow")
    rows = [{"prompt": f"{i}+1=", "turns": [{"a": "x", "b": None}], "n": i} for i in range(50)]
    whole, draw = parquet(tmp_path, pyarrow.Table.from_pylist(rows)).read_bytes(), random.Random(seed)

    def read_all() -> str:
        for _ in range(60):
            data, i = bytearray(whole), draw.randrange(len(whole))
            if draw.random() < 0.5:
                i = len(whole) - 1 - draw.randrange(600)  # the footer
            data[i : i + draw.choice((1, 1, 4, 8))] = draw.choice((b"\xff", b"", b"\x00" * 8, b"\x7f" * 4))
            try:
                read_rows(write(tmp_path, "b.parquet", bytes(data)))
            except InputError as error:
                message = str(error)
                assert message.startswith(str(tmp_path)) and message.isprintable() and len(message) <= 600
        return "done"

    assert in_a_fork(read_all, seconds=10, gigabytes=3) == "done"


def test_columns_of_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from datetime import date
    from decimal import Decimal

    one = lambda value, type_=None: pyarrow.table({"odd": pyarrow.array([value], type_), "text": ["x"]})
    read = {  # what an unused column may be
        "date": (one(date(2020, 1, 2)), date(2020, 1, 2)),
        "decimal": (one(Decimal("1.5")), Decimal("1.5")),
        "bytes": (one(b"\xff"), b"\xff"),
        "map of texts": (one([("a", 1)], pyarrow.map_(pyarrow.string(), pyarrow.int64())), {"a": 1}),
        "map of numbers": (one([(1, "a")], pyarrow.map_(pyarrow.int64(), pyarrow.string())), [(1, "a")]),
    }
    for name, (table, value) in read.items():
        (row,) = read_rows(parquet(tmp_path, table))
        assert row["odd"] == value, name
        with pytest.raises(InputError, match="odd: expected text, got"):
            row.text("odd")

    twice = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 2, names=["a" * 5000] * 2)
    assert "expected once, found twice" in refusal(parquet(tmp_path, twice))

    deep = pyarrow.array(["x"])
    for _ in range(30):
        deep = pyarrow.ListArray.from_arrays([0, 1], deep)
    refused = {
        "column odd: cannot read timestamp": one(10**15, pyarrow.timestamp("s")),
        "column odd: cannot read map<string, int64": one(
            [("a", 1), ("a", 2)], pyarrow.map_(pyarrow.string(), pyarrow.int64())
        ),
        "a type with at most 25 levels of nesting": pyarrow.table({"deep": deep}),
    }
    for message, table in refused.items():
        assert message in refusal(parquet(tmp_path, table)), message
    assert len(read_rows(parquet(tmp_path, pyarrow.table({"": ["x"], "n": [1]})))) == 1


def test_categories_of_parquet_count_as_the_texts_that_they_are(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    names = pyarrow.array([f"{i:04}" * 250 for i in range(2000)])  # 2 MB, which each batch shares
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(pyarrow.array(range(2000)), names)})
    rows = read_rows(parquet(tmp_path, table, compression="zstd"))
    assert [row["text"] for row in rows] == names.to_pylist()


# ---- numbers

NO_NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", '"x"', "[]", "{}", "true", "9" * 400, '"1"', "[[1]]"]


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_what_is_no_number_is_named(tmp_path, model_folder, value):
    tokenizer = Tokenizer.load(model_folder)

    pair = f'{{"prompt": "1+2=", "chosen": "3", "rejected": "4", "margin": {value}}}'
    judged = f'{{"prompt": "1+2=", "completion": "3", "label": {value}}}'
    turn = f'{{"role": "assistant", "content": "2", "weight": {value}}}'
    for reader, row, message in (
        (preferences, pair, "margin: expected a number"),
        (judged_completions, judged, "label: expected true or false"),
        (sft_examples, f'{{"messages": [{turn}]}}', "messages, message 1: weight: expected 0 or 1"),
    ):
        if value == "true" and reader is not preferences:
            continue  # it is 1
        rows = read_rows(write(tmp_path, "a.jsonl", row.encode()))
        found = refusal(rows, lambda rows, reader=reader: reader(rows, tokenizer, max_length=64))
        assert f"a.jsonl line 1: {message}" in found


def test_a_prompt_of_no_text_is_named(tmp_path, model_folder):
    tokenizer = Tokenizer.load(model_folder)
    for value in ("1", "1e999", "{}", "[1]", "[[]]", "true", '{"role": "user"}'):
        rows = read_rows(write(tmp_path, "a.jsonl", f'{{"prompt": {value}}}'.encode()))
        message = refusal(rows, lambda rows: rl_prompts(rows, tokenizer, max_length=64)[0])
        assert "a.jsonl line 1: prompt" in message


# ---- planted faults


@control
def broken_files_are_named(module, folder: Path) -> None:
    """Those of each kind that a planted fault below lets pass."""
    bomb = write(folder, "bomb.jsonl.gz", packed(b'{"a":"' + b"0" * 100_000 + b'"}\n', 400))
    broken = gzip.compress(ROW * 50, mtime=0)
    broken = write(folder, "broken.jsonl.gz", broken[:3] + b"\x00" + broken[4:10] + b"\x00" * 8 + broken[18:])
    twice = write(folder, "twice.jsonl", LINES["a key twice"][0])
    latin = write(folder, "latin.jsonl", ROW + LINES["no UTF-8"][0])
    unpacks = (bomb, "to unpack to at most")
    for file, message in (unpacks, (broken, "gzip"), (twice, "once"), (latin, "line 2")):
        try:
            found = refusal(file, module.read_rows)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        assert message in found and "expected a refusal" not in found, f"expected {message}, got {found}"


FILE = "algorithms/data/rows"


@pytest.mark.parametrize("fault", faults_of(__file__), ids=lambda fault: fault.id)
def test_a_planted_fault_is_caught(fault, tmp_path, monkeypatch):
    module = copy_of(FILE, tmp_path, monkeypatch, fault)
    with pytest.raises(AssertionError, match="expected"):
        check_of(fault)(module, tmp_path)


def test_a_faithful_copy_passes(tmp_path, monkeypatch):
    broken_files_are_named(copy_of(FILE, tmp_path, monkeypatch), tmp_path)


def test_a_row_is_small():
    rows = [Row({"a": 1}, "x") for _ in range(1000)]
    assert not any(hasattr(row, "__dict__") for row in rows)
    assert sum(sys.getsizeof(row) for row in rows) < 400 * len(rows)


def test_the_counts_of_a_footer_are_those_of_pyarrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    rows = [{"a": i, "l": [i] * (i % 3), "m": {"b": [{"c": "x"}]}, "n": None} for i in range(100)]
    table = pyarrow.Table.from_pylist(rows)
    for options in ({}, {"row_group_size": 7}, {"compression": "zstd", "write_page_index": True}):
        path = parquet(tmp_path, table, **options)
        metadata = pyarrow.parquet.ParquetFile(path).metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]
        footer = read_footer(path)
        assert (footer.rows, footer.group_rows) == (100, [group.num_rows for group in groups])
        assert footer.values == sum(column.num_values for column in columns)
        assert footer.unpacked_bytes == sum(column.total_uncompressed_size for column in columns)


def test_a_broken_footer_ends_in_a_sentence(tmp_path):
    """Every bit of it, in turn, among them those where pyarrow would end the process."""
    pyarrow = pytest.importorskip("pyarrow")
    path = parquet(tmp_path, pyarrow.Table.from_pylist([{"prompt": "1", "completion": "2"}] * 3))
    whole = path.read_bytes()
    start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for place in range(start, len(whole), 5):
        broken = bytearray(whole)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        reply = in_a_fork(lambda: outcome(path), seconds=10, gigabytes=2)
        assert reply is not None, f"ended by byte {place - start} of the footer"


def outcome(path: Path) -> str:
    try:
        return f"{len(read_rows(path))} rows"
    except InputError as error:
        return str(error)
