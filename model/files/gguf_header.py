"""A check of a GGUF file's header before the package gguf reads it, because the package trusts every count.

    "GGUF", version, tensors, keys       uint32, uint32, uint64, uint64
    key, type, value                     for each key: a string, a uint32, and the value
    name, sizes, type, offset            for each tensor: a string, a uint32 and as many uint64, a uint32, a uint64

A string is its length (uint64) and that many bytes. An array is the type of its values (uint32), their number (uint64)
and the values. The package makes a Python object of each value, and does not stop at the end of the file.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from pathlib import Path
from typing import BinaryIO, NoReturn

from ..errors import InputError, shown
from .text_files import check_regular

MOST_VALUES = 2_000_000  # in all arrays together; a vocabulary of 128,256 tokens and its merges have 540,000
MOST_DIMENSIONS = 4
BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of a number, by its type
STRING, ARRAY = 8, 9


def check_header(file: Path) -> None:
    """Raise InputError if a count, a length or a type is invalid, or needs more bytes than the file has."""
    check_regular(file)
    try:
        with open(file, "rb") as opened:
            _Header(file, opened.seek(0, 2), opened).check()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error


class _Header:
    """A walk through the header of the file `opened`, which has `size` bytes."""

    def __init__(self, file: Path, size: int, opened: BinaryIO):
        self.file, self.size, self.opened = file, size, opened
        self.opened.seek(0)
        self.values = 0  # in arrays so far

    def check(self) -> None:
        if self.opened.read(4) != b"GGUF":
            raise InputError(f"{self.file}: not a whole GGUF file: it does not begin with GGUF")
        version = self.number(4, "version")
        if version not in (2, 3):
            raise InputError(f"{self.file}: version: expected 2 or 3, little-endian, got {version}")

        tensors = self.count("tensors", 24)  # each takes at least 24 bytes
        for i in range(self.count("metadata keys", 13)):
            key = self.string(f"metadata key {i}")
            self.value(key, self.number(4, key))
        for i in range(tensors):
            name = self.string(f"name of tensor {i}")
            dimensions = self.number(4, name)
            if dimensions > MOST_DIMENSIONS:
                raise InputError(
                    f"{self.file}: {shown(name)}: expected up to {MOST_DIMENSIONS} sizes, got {dimensions}"
                )
            self.skip(8 * dimensions + 12, name)

    def value(self, key: str, kind: int) -> None:
        if kind == STRING:
            self.string(key)
        elif kind in BYTES:
            self.skip(BYTES[kind], key)
        elif kind == ARRAY:
            self.array(key)
        else:
            raise InputError(f"{self.file}: {shown(key)}: expected a type from 0 to 12, got {kind}")

    def array(self, key: str) -> None:
        kind = self.number(4, key)
        if kind != STRING and kind not in BYTES:
            raise InputError(
                f"{self.file}: {shown(key)}: expected numbers or strings in an array, got type {kind}"
            )
        length = self.count(f"values of {shown(key)}", BYTES.get(kind, 8))
        self.values += length
        if self.values > MOST_VALUES:
            raise InputError(
                f"{self.file}: {shown(key)}: expected at most {MOST_VALUES} values, got {self.values}"
            )
        if kind != STRING:
            return self.skip(length * BYTES[kind], key)
        for _ in range(length):
            self.skip(self.number(8, key), key)

    def count(self, what: str, least: int) -> int:
        """Read a count of items that take at least `least` bytes each.

        Raises InputError if the file is too short for them.
        """
        count = self.number(8, what)
        if count * least > self.size:
            raise InputError(
                f"{self.file}: expected as many {what} as its {self.size} bytes hold, got {count}"
            )
        return count

    def string(self, what: str) -> str:
        length = self.number(8, what)
        start = self.opened.tell()
        self.skip(length, what)
        self.opened.seek(start)
        return self.opened.read(length).decode("utf-8", "replace")

    def number(self, size: int, what: str) -> int:
        raw = self.opened.read(size)
        if len(raw) < size:
            self.refuse(what)
        return struct.unpack("<I" if size == 4 else "<Q", raw)[0]

    def skip(self, count: int, what: str) -> None:
        if self.opened.tell() + count > self.size:
            self.refuse(what)
        self.opened.seek(count, 1)

    def refuse(self, what: str) -> NoReturn:
        raise InputError(f"{self.file}: not a whole GGUF file: it ends in {shown(what)}: download it again")
