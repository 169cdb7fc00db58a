"""The one reader of text and JSON: a value, or one short sentence, whatever stands in the file."""

import json
import os

import pytest
from burnish.model.errors import InputError
from burnish.model.files.text_files import MOST_DEPTH, parse_json, read_json, read_object, read_text

DEEP = 100_000
NO_JSON = {
    "nothing": b"",
    "no UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "cut": b'{"a": [1, 2',
    "two values": b'{"a": 1} {"b": 2}',
    "deep lists": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deep and open": b"[" * DEEP,
    "deep in a key": b'{"a": ' + b"[" * (MOST_DEPTH + 1) + b"1" + b"]" * (MOST_DEPTH + 1) + b"}",
    "digits": b"[" + b"9" * 5000 + b"]",
    "half of a pair": b'["\\ud800"]',
    "other half, in a key": b'{"\\uDC00x": 1}',
    "a key twice": b'{"a": {"b": 1, "b": 2}}',
    "true and 1": b'{"a": true, "a": 1}',
    "a long key twice": b'{"' + b"k" * 5000 + b'": 1, "' + b"k" * 5000 + b'": 2}',
    "control characters": b'{"a\x1b[2J": 1}',
}


@pytest.mark.parametrize("name", NO_JSON)
def test_what_is_no_json_is_one_sentence(tmp_path, name):
    file = tmp_path / "any.json"
    file.write_bytes(NO_JSON[name])
    with pytest.raises(InputError) as error:
        read_json(file)
    check_message(str(error.value), str(file))
    with pytest.raises(InputError):
        parse_json(NO_JSON[name], "here")


def check_message(message: str, start: str) -> None:
    assert message.startswith(start) and message.isprintable() and len(message) <= 600


def test_what_is_json_is_its_value():
    values = [None, True, 1.5, "\U0001f600", [[]], {"a": {"b": [1, {"c": "\u2028"}]}}, {"": "\\ud83d"}]
    for value in values:
        assert parse_json(json.dumps(value), "here") == value
        assert parse_json("\ufeff" + json.dumps(value, ensure_ascii=False), "here") == value
    assert parse_json('{"a": [1], "a": [1]}', "here") == {"a": [1]}
    nested = "[" * MOST_DEPTH + "]" * MOST_DEPTH
    assert json.dumps(parse_json(nested, "here")) == nested
    wide = [[i] for i in range(3 * MOST_DEPTH)]
    assert parse_json(json.dumps(wide), "here") == wide


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # a reader would wait for ever
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "to_pipe").symlink_to("pipe")
    for name in ("pipe", "folder", "loop", "to_pipe", "absent", "x" * 300, "a\0b", "\ud800", "pipe/x"):
        with pytest.raises(InputError, match=r"regular|no such") as error:
            read_text(tmp_path / name)
        check_message(str(error.value), str(tmp_path))
    with pytest.raises(InputError, match="regular"):
        read_text(tmp_path / "/dev/zero")


def test_a_file_is_read_up_to_a_size(tmp_path):
    file = tmp_path / "long.json"
    with open(file, "wb") as long:
        long.truncate(2**40)  # sparse: no disk is used
    with pytest.raises(InputError, match=r"long\.json: expected at most \d+ bytes, got 1099511627776"):
        read_text(file)


def test_an_object_is_asked_for(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError, match=r"list\.json: expected a JSON object, got list"):
        read_object(tmp_path / "list.json")


def test_a_message_is_one_short_line():
    error = InputError(f"file: \x1b[31mred\x07\n\n   second {'x' * 5000} line\u202e, got {'y' * 90}")
    text = str(error)
    assert text.startswith("file: \\x1b[31mred\\x07 second xxx") and text.endswith("y" * 90)
    assert text.isprintable() and len(text) <= 600 and str(InputError("short")) == "short"
    assert "\\ud800" in str(InputError("\ud800"))
