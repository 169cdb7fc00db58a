"""A reader for the sizes in an Arrow file's messages. They are checked before the data is unpacked.

    stream format   schema, dictionaries, batches of rows, end mark
    file format     ARROW1, two bytes of padding, a stream, a footer that lists its messages, ARROW1

A message is the mark ffffffff, the length of its metadata, the metadata (a flatbuffer), and a body of buffers. A
compressed buffer begins with its unpacked length. A file whose end mark is missing has lost rows, though pyarrow reads
it without an error.

Source: https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc
        https://github.com/apache/arrow/blob/main/format/Message.fbs
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ...model.errors import InputError

MAGIC, START_OF_FILE = b"ARROW1", 8  # the file format's first and last bytes; where its stream begins
MARK, END = b"\xff\xff\xff\xff", b"\xff\xff\xff\xff\0\0\0\0"
DICTIONARY, BATCH = 2, 3  # kinds of messages
KIND, HEADER, BODY = 1, 2, 3  # fields of a Message
LENGTH, NODES, BUFFERS, COMPRESSION = 0, 1, 2, 3  # fields of a RecordBatch
BATCH_OF_DICTIONARY = 1  # field of a DictionaryBatch


@dataclass
class Sizes:
    """The sizes in an Arrow file, summed over its messages.

    start: the first byte of the stream. rows: rows of all batches. values: values of all columns, nested ones and
    dictionaries included. unpacked_bytes: bytes of all buffers.
    """

    start: int
    rows: int = 0
    values: int = 0
    unpacked_bytes: int = 0


def read_sizes(path: Path) -> Sizes:
    """Read the sizes in the messages of an Arrow file. Raises InputError if the file is broken or cut off."""
    try:
        with open(path, "rb") as file:
            start = START_OF_FILE if file.read(len(MAGIC)) == MAGIC else 0
            sizes, end = Sizes(start), os.path.getsize(path)
            file.seek(start)
            while _read_message(file, sizes, end):
                pass
            _check_end(file, end, start)
        return sizes
    except (OSError, ValueError, struct.error) as error:
        raise InputError(f"{path}: not a readable Arrow file: {error}") from error


def _check_end(file: BinaryIO, end: int, start: int) -> None:
    """Raise ValueError if anything but the file format's footer follows the stream."""
    rest = end - file.tell()
    if not start:
        if rest:
            raise ValueError(f"{rest} bytes follow its end mark")
        return
    file.seek(max(end - len(MAGIC), 0))
    if rest < len(MAGIC) or file.read() != MAGIC:
        raise ValueError(f"its last bytes are not {MAGIC.decode()}")


def _read_message(file: BinaryIO, sizes: Sizes, end: int) -> bool:
    """Add the sizes of the next message. Return False at the end mark."""
    prefix = file.read(8)
    if prefix == END:
        return False
    length = int.from_bytes(prefix[4:], "little", signed=True)
    if len(prefix) < 8 or prefix[:4] != MARK or not 0 < length <= end - file.tell():
        raise ValueError("it ends too early, or is not in Arrow's IPC format")
    metadata = _Flatbuffer(file.read(length))
    message = metadata.root()

    body, size = file.tell(), metadata.number(message, BODY, "<q")
    if not 0 <= size <= end - body:
        raise ValueError("it ends too early")
    kind = metadata.number(message, KIND, "<B")
    if kind in (DICTIONARY, BATCH):
        batch = metadata.table(message, HEADER)
        if kind == DICTIONARY:
            batch = metadata.table(batch, BATCH_OF_DICTIONARY)
        else:
            sizes.rows += _count(metadata.number(batch, LENGTH, "<q"))
        sizes.values += sum(_count(values) for values, _ in metadata.pairs(batch, NODES))

        packed = metadata.field(batch, COMPRESSION) is not None
        for offset, bytes_ in metadata.pairs(batch, BUFFERS):
            if not (offset >= 0 and 0 <= bytes_ <= size - offset):
                raise ValueError("a buffer lies outside of its message")
            sizes.unpacked_bytes += _unpacked(file, body + offset, bytes_) if packed else bytes_
    file.seek(body + size)
    return True


def _unpacked(file: BinaryIO, start: int, length: int) -> int:
    """Return the unpacked length of a compressed buffer. It stands before the data; -1 means not packed."""
    if length < 8:
        return length
    file.seek(start)
    (unpacked,) = struct.unpack("<q", file.read(8))
    return length if unpacked == -1 else _count(unpacked)


def _count(number: int) -> int:
    if number < 0:
        raise ValueError(f"a negative count, {number}")
    return number


class _Flatbuffer:
    """The fields of a flatbuffer's tables. A table is the place where it begins; its fields go by number."""

    def __init__(self, data: bytes):
        self.data = data

    def read(self, form: str, place: int) -> int:
        if place < 0:  # struct counts it from the end
            raise ValueError("a field lies outside of its message")
        return struct.unpack_from(form, self.data, place)[0]

    def root(self) -> int:
        return self.read("<I", 0)

    def field(self, table: int, number: int) -> int | None:
        """Return the place of a field, or None if the table lacks it."""
        places = table - self.read("<i", table)
        entry = 4 + 2 * number
        offset = self.read("<H", places + entry) if entry < self.read("<H", places) else 0
        return table + offset if offset else None

    def number(self, table: int, number: int, form: str) -> int:
        place = self.field(table, number)
        return 0 if place is None else self.read(form, place)

    def table(self, table: int, number: int) -> int:
        place = self.field(table, number)
        if place is None:
            raise ValueError("a message without its header")
        return place + self.read("<I", place)

    def pairs(self, table: int, number: int) -> list[tuple[int, int]]:
        """Return a list of structs that hold two 64-bit integers."""
        place = self.field(table, number)
        if place is None:
            return []
        start = place + self.read("<I", place)
        count = self.read("<I", start)
        if count > len(self.data) // 16:
            raise ValueError("a list lies outside of its message")
        return list(struct.iter_unpack("<qq", self.data[start + 4 : start + 4 + 16 * count]))
