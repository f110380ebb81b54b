"""What the footer of a Parquet file announces of its columns, read without Arrow.

Arrow offers the same numbers, but ends the whole process over a footer whose size statistics contradict its schema (as
of 26.0). The footer is a struct in Thrift's compact protocol; the numbers of its fields stand in parquet.thrift.
"""

import os
import struct
from collections.abc import Callable
from typing import Any

LONGEST = 4 << 20  # bytes of a footer, which are looked at one by one
_TAIL = 8  # bytes at the end of the file: the footer's length, and the magic number
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
_DAMAGED = "its footer is damaged"
# the way to what is wanted: {field number: (type, what is wanted of it)}; the rest is passed over
_META = {5: (I64, {}), 6: (I64, {})}  # num_values, total_uncompressed_size
_FILE = {4: (LIST, {1: (LIST, {3: (STRUCT, _META)})})}  # row_groups, columns, meta_data


def announced_chunks(source) -> list[list[tuple[int, int]]]:
    """(values, uncompressed bytes) of each column in each row group, in the order of the schema's columns.

    source: a path or a pyarrow.Buffer. ValueError or OSError where the footer is damaged, or longer than LONGEST.
    """
    try:
        groups = _Compact(_footer(source)).struct(_FILE)[4]
        chunks = [[(chunk[3][5], chunk[3][6]) for chunk in group[1]] for group in groups]
    except (IndexError, KeyError, RecursionError, struct.error) as error:
        raise ValueError(_DAMAGED) from error
    if any(min(chunk) < 0 for group in chunks for chunk in group):
        raise ValueError(_DAMAGED)
    return chunks


def _footer(source) -> bytes:
    if not isinstance(source, (str, os.PathLike)):
        held = memoryview(source)
        return _cut(lambda start, end: bytes(held[start:end]), len(held))
    with open(source, "rb") as file:
        return _cut(lambda start, end: file.seek(start) * b"" + file.read(end - start), file.seek(0, 2))


def _cut(read: Callable[[int, int], bytes], size: int) -> bytes:
    end = max(0, size - _TAIL)
    (length,) = struct.unpack("<I", read(end, size)[:4])
    if length > end:
        raise ValueError(_DAMAGED)
    if length > LONGEST:
        raise ValueError(f"its footer of {length} bytes is longer than {LONGEST}")
    return read(end - length, end)


class _Compact:
    """A reader of Thrift's compact protocol. It refuses what readers in C++ would take for another number than it does.

    IndexError where the data end early, ValueError where they are none.
    """

    def __init__(self, data: bytes):
        self.data = data
        self.at = 0

    def struct(self, wanted: dict) -> dict[int, Any]:
        """The wanted fields that are there in the wanted type, by number. Of one that is there twice, the last."""
        fields, number = {}, 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._number()
            if not 0 < number < 1 << 15:
                raise ValueError(_DAMAGED)
            kind, parts = wanted.get(number, (0, {}))
            if kind == head & 15:
                fields[number] = self._wanted(kind, parts)
            else:
                self._pass(head & 15)
        return fields

    def _wanted(self, kind: int, parts: dict) -> Any:
        if kind == I64:
            return self._number()
        if kind == STRUCT:
            return self.struct(parts)
        count, kind = self._list_head()
        if kind != STRUCT:
            raise ValueError(_DAMAGED)
        return [self.struct(parts) for _ in range(count)]

    def _pass(self, kind: int, in_list: bool = False) -> None:
        if kind in (TRUE, FALSE):  # of a field it is the type that says it
            self._skip(in_list)
        elif kind == BYTE:
            self._skip(1)
        elif kind in (I16, I32, I64):
            self._varint()
        elif kind == DOUBLE:
            self._skip(8)
        elif kind == BINARY:
            self._skip(self._varint())
        elif kind in (LIST, SET):
            count, kind = self._list_head()
            for _ in range(count):
                self._pass(kind, in_list=True)
        elif kind == MAP:
            count = self._varint()
            kinds = self._byte() if count else 0
            for _ in range(count):
                self._pass(kinds >> 4, in_list=True)
                self._pass(kinds & 15, in_list=True)
        elif kind == STRUCT:
            self.struct({})
        else:
            raise ValueError(_DAMAGED)

    def _list_head(self) -> tuple[int, int]:
        head = self._byte()
        return head >> 4 if head >> 4 < 15 else self._varint(), head & 15

    def _number(self) -> int:
        number = self._varint()
        return (number >> 1) ^ -(number & 1)  # zigzag

    def _varint(self) -> int:
        number = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number
        raise ValueError(_DAMAGED)

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise IndexError(self.at)
