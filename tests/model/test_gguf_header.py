"""GGUF headers whose counts and lengths are more than the file: refused before the package gguf counts so far."""

import resource
import struct
import time

import pytest
from burnish.model import InputError
from burnish.model.files.gguf_header import MOST_VALUES, check_header

UINT8, UINT32, STRING, ARRAY = 0, 4, 8, 9


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def array(kind: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(name: str, sizes: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def file_of(keys: list[tuple[str, int, bytes]], tensors: list[bytes], version=3, counts=None) -> bytes:
    tensor_count, key_count = counts or (len(tensors), len(keys))
    body = b"".join(string(key) + struct.pack("<I", kind) + value for key, kind, value in keys)
    return b"GGUF" + struct.pack("<IQQ", version, tensor_count, key_count) + body + b"".join(tensors)


GOOD = [
    ("general.architecture", STRING, string("llama")),
    ("llama.block_count", UINT32, struct.pack("<I", 2)),
    ("tokenizer.ggml.tokens", ARRAY, array(STRING, 2, string("a") + string("b"))),
    ("tokenizer.ggml.token_type", ARRAY, array(UINT8, 2, b"\x01\x01")),
]
NORM = tensor("output_norm.weight", [4])
WRONG = {
    "keys": (file_of(GOOD, [], counts=(0, 2**60)), "as many metadata keys as"),
    "tensors": (file_of(GOOD, [NORM], counts=(2**60, 4)), "as many tensors as"),
    "strings": (file_of([("a", ARRAY, array(STRING, 2**60, b""))], []), "as many values of a as"),
    "numbers": (file_of([("a", ARRAY, array(UINT8, 2**60, b""))], []), "as many values of a as"),
    "behind the end": (file_of([("a", ARRAY, array(UINT8, 50, b"\0"))], []), "ends in a"),
    "array of arrays": (
        file_of([("a", ARRAY, array(ARRAY, 1, b""))], [NORM]),
        "a: expected numbers or strings",
    ),
    "a type": (file_of([("a", 13, b"")], []), "a: expected a type from 0 to 12, got 13"),
    "a string": (file_of([("a", STRING, struct.pack("<Q", 2**63))], []), "ends in a"),
    "a name": (file_of([], [struct.pack("<Q", 2**40) + b"x" * 30]), "ends in name of tensor 0"),
    "dimensions": (
        file_of([], [string("t") + struct.pack("<I", 2**31) + b"\0" * 40]),
        "t: expected up to 4 sizes",
    ),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version: expected 2 or 3, little-endian"),
    "control characters": (file_of([("a\x1b[2J", 99, b"")], []), "expected a type from 0 to 12"),
    "nothing": (b"", "does not begin with GGUF"),
    "a start": (b"GGUF\x03\0\0\0\x01", "ends in tensors"),
    "many values": (
        file_of([("a", ARRAY, array(UINT8, MOST_VALUES + 1, bytes(MOST_VALUES + 1)))], []),
        "values",
    ),
}


def test_a_whole_header_passes(tmp_path):
    (tmp_path / "f.gguf").write_bytes(file_of(GOOD, [NORM]) + bytes(64))
    check_header(tmp_path / "f.gguf")


@pytest.mark.parametrize("name", WRONG)
def test_a_count_that_the_file_has_no_room_for_is_refused_at_once(tmp_path, name):
    content, expected = WRONG[name]
    (tmp_path / "f.gguf").write_bytes(content)
    memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(InputError, match=expected) as error:
        check_header(tmp_path / "f.gguf")
    assert str(error.value).startswith(str(tmp_path)) and str(error.value).isprintable()
    assert time.process_time() - started < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 20_000  # kB


def test_every_cut_ends_in_a_sentence(tmp_path):
    whole = file_of(GOOD, [NORM])
    for end in range(0, len(whole), 3):
        (tmp_path / "f.gguf").write_bytes(whole[:end])
        with pytest.raises(InputError):
            check_header(tmp_path / "f.gguf")
