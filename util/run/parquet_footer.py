"""What the footer of a Parquet file announces of its columns, without the accessor of Arrow that ends the process.

`RowGroupMetaData.column` has the same numbers, but over a footer whose size statistics contradict its schema it takes
the whole process down (Arrow 26.0). What is read here is the footer as Arrow has understood it and writes it again, and
not the bytes of a stranger, which two readers could understand differently: a struct in Thrift's compact protocol, the
numbers of whose fields stand in parquet.thrift. Maps do not occur in it.
"""

import os
import struct
from typing import Any

LONGEST = 2 << 20  # bytes of a footer: a hostile one of that length takes seconds
_TAIL = 8  # bytes at the end of the file: the footer's length, and the magic number
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, _, STRUCT = range(1, 13)
# the way to what is wanted, by field number; the rest is passed over
_META = {5: {}, 6: {}}  # num_values, total_uncompressed_size
_FILE = {4: {1: {3: _META}}}  # row_groups, columns, meta_data


def check_length(source) -> None:
    """ValueError where the footer of a file, a path or a pyarrow.Buffer, says that it is longer than LONGEST."""
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            tail = file.read()
    else:
        tail = bytes(memoryview(source)[-_TAIL:])
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] == b"PAR1" and length > LONGEST:
        raise ValueError(f"its footer of {length} bytes is longer than {LONGEST}")


def announced_chunks(metadata) -> list[list[tuple[int, int]]]:
    """(values, uncompressed bytes) of each column in each row group, in the order of the schema's columns.

    metadata: a pyarrow.parquet.FileMetaData.
    """
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    metadata.write_metadata_file(sink)
    file = sink.getvalue().to_pybytes()
    (length,) = struct.unpack("<I", file[-_TAIL:-4])
    groups = _Compact(file[-_TAIL - length : -_TAIL]).struct(_FILE)[4]
    return [[(chunk[3][5], chunk[3][6]) for chunk in group[1]] for group in groups]


class _Compact:
    """A reader of well-formed data in Thrift's compact protocol."""

    def __init__(self, data: bytes):
        self.data = data
        self.at = 0

    def struct(self, wanted: dict) -> dict[int, Any]:
        """The wanted fields that are there, by number."""
        fields, number = {}, 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._number()
            kind = head & 15
            value = None if kind in (TRUE, FALSE) else self._value(kind, wanted.get(number, {}))
            if number in wanted:
                fields[number] = value
        return fields

    def _value(self, kind: int, wanted: dict) -> Any:
        """A whole number, a list or a struct; None for what nobody wants."""
        if kind in (I16, I32, I64):
            return self._number()
        if kind == STRUCT:
            return self.struct(wanted)
        if kind in (LIST, SET):
            return self._list(wanted)
        length = self._varint() if kind == BINARY else {TRUE: 1, FALSE: 1, BYTE: 1, DOUBLE: 8}[kind]
        self.at += length
        return None

    def _list(self, wanted: dict) -> list:
        head = self._byte()
        count = head >> 4 if head >> 4 < 15 else self._varint()
        if wanted:
            return [self._value(head & 15, wanted) for _ in range(count)]
        for _ in range(count):
            self._value(head & 15, wanted)
        return []

    def _number(self) -> int:
        number = self._varint()
        return (number >> 1) ^ -(number & 1)  # zigzag

    def _varint(self) -> int:
        number = shift = 0
        while True:
            byte = self._byte()
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number
            shift += 7

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]
