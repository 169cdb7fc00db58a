"""A reader for the row and byte counts in a parquet file's footer. They are checked before the data is unpacked.

pyarrow can read these counts too, but a broken statistic in the footer makes pyarrow end the process. The footer is one
struct in Thrift's compact protocol. The whole footer is parsed, and a few of its fields are used.

Source: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
        https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

from ...model.errors import InputError

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT, UUID = range(1, 14)
FIXED = {BYTE: 1, DOUBLE: 8, UUID: 16}  # bytes
MOST_DEPTH = 32
# fields of FileMetaData, RowGroup, ColumnChunk and ColumnMetaData
FILE_ROWS, GROUPS, COLUMNS, GROUP_ROWS, META_DATA, VALUES, BYTES = 3, 4, 1, 3, 3, 5, 6


@dataclass(frozen=True)
class Footer:
    """The counts in a parquet footer.

    rows: rows of the file. group_rows: rows of each row group. values, unpacked_bytes: values and uncompressed bytes,
    summed over all columns of all row groups.
    """

    rows: int
    group_rows: list[int]
    values: int
    unpacked_bytes: int


def read_footer(path: Path) -> Footer:
    """Read the counts in the footer of a parquet file. Raises InputError if the footer is missing or broken."""
    try:
        with open(path, "rb") as file:
            file.seek(-8, 2)
            length = int.from_bytes(file.read(4), "little")
            if file.read(4) != b"PAR1":
                raise ValueError("the last bytes of the file are not PAR1")
            file.seek(-8 - length, 2)
            data = file.read(length)

        found = _Reader(data).value(STRUCT)
        groups = found.get(GROUPS, [])
        columns = [column.get(META_DATA, {}) for group in groups for column in group[COLUMNS]]
        values, unpacked = ([max(index(column[field]), 0) for column in columns] for field in (VALUES, BYTES))
        rows = [index(group[GROUP_ROWS]) for group in groups]
        return Footer(index(found[FILE_ROWS]), rows, sum(values), sum(unpacked))
    except (OSError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a readable parquet file: its footer: {error}") from error


class _Reader:
    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError("it ends too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def varint(self) -> int:
        found = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            found |= (byte & 127) << shift
            if byte < 128:
                return found
        raise ValueError("an integer of more than 64 bits")

    def integer(self) -> int:
        found = self.varint()  # 0, -1, 1, -2, ...
        return found >> 1 ^ -(found & 1)

    def value(self, kind: int, depth: int = 0) -> Any:
        """Read a value of a Thrift type. A struct becomes a dict by field number. A map is skipped and gives None."""
        if depth > MOST_DEPTH:
            raise ValueError(f"more than {MOST_DEPTH} nested values")
        if kind in (I16, I32, I64):
            return self.integer()
        if kind in FIXED:
            return self.take(FIXED[kind])
        if kind == BINARY:
            return self.take(self.varint())
        if kind == STRUCT:
            return self.struct(depth)

        # lists and maps: no more values than the remaining bytes can hold
        if kind in (LIST, SET):
            head = self.take(1)[0]
            count = head >> 4 if head >> 4 < 15 else self.varint()
            return [self.item(head & 15, depth) for _ in range(self.checked(count))]
        if kind == MAP:
            if count := self.checked(self.varint()):
                kinds = self.take(1)[0]
                for _ in range(count):
                    self.item(kinds >> 4, depth)
                    self.item(kinds & 15, depth)
            return None
        raise ValueError(f"a value of the unknown kind {kind}")

    def item(self, kind: int, depth: int) -> Any:
        return self.take(1) if kind in (TRUE, FALSE) else self.value(kind, depth + 1)

    def checked(self, count: int) -> int:
        """Return `count`, a number of values. Raises ValueError if fewer bytes than this are left in the footer."""
        if count > len(self.data) - self.at:
            raise ValueError("it ends too early")
        return count

    def struct(self, depth: int) -> dict[int, Any]:
        found: dict[int, Any] = {}
        field = 0
        while head := self.take(1)[0]:
            field = field + (head >> 4) if head >> 4 else self.integer()
            kind = head & 15
            found[field] = kind == TRUE if kind in (TRUE, FALSE) else self.value(kind, depth + 1)
        return found
