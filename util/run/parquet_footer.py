"""What the footer of a Parquet file announces of its columns, read without Arrow.

Arrow has the same numbers, but over some damaged footers its accessor (`RowGroupMetaData.column`, where size statistics
contradict the schema) and its writer (`write_metadata_file`) end the whole process, as of 26.0. The footer is a struct
in Thrift's compact protocol; its fields stand in parquet.thrift.
"""

import os
import struct
from typing import Any

LONGEST = 2 << 20  # bytes of a footer, which are looked at one by one
_TAIL = 8  # bytes at the end of the file: the footer's length, and the magic number
_DAMAGED = "its footer is damaged"
STOP, TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(13)


def _list_of(kind: int, fields: dict | None = None) -> tuple:
    return LIST, kind, fields or {}


# what counts in parquet.thrift, by field number: the numbers that are wanted, and the lists. Readers that know a list
# do not ask what it says it is made of: one that says something else would be read as two different things.
_NUMBER = I64, STOP, {}
_PAIRS, _STRUCTS, _I32S, _I64S = _list_of(STRUCT), _list_of(STRUCT), _list_of(I32), _list_of(I64)
_SIZES, _SHAPES = (STRUCT, STOP, {2: _I64S, 3: _I64S}), (STRUCT, STOP, {2: _I32S})
_META = {2: _I32S, 3: _list_of(BINARY), 5: _NUMBER, 6: _NUMBER, 8: _PAIRS, 13: _STRUCTS, 16: _SIZES, 17: _SHAPES}
_GROUP = {1: _list_of(STRUCT, {3: (STRUCT, STOP, _META)}), 4: _STRUCTS}
_FILE = {2: _STRUCTS, 4: _list_of(STRUCT, _GROUP), 5: _PAIRS, 7: _STRUCTS}


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
    import pyarrow as pa

    with open(source, "rb") if isinstance(source, (str, os.PathLike)) else pa.BufferReader(source) as file:
        end = max(0, file.seek(0, os.SEEK_END) - _TAIL)
        file.seek(end)
        (length,) = struct.unpack("<I", file.read(4))
        if length > end:
            raise ValueError(_DAMAGED)
        if length > LONGEST:
            raise ValueError(f"its footer of {length} bytes is longer than {LONGEST}")
        file.seek(end - length)
        return file.read(length)


class _Compact:
    """A reader of Thrift's compact protocol, which takes all bytes for what Thrift's reader in C++ takes them, or none.

    IndexError where the data end early, ValueError where they are none or ambiguous.
    """

    def __init__(self, data: bytes):
        self.data = data
        self.at = 0

    def struct(self, known: dict) -> dict[int, Any]:
        """The fields that are known and of their type, by number. Of one that is there twice, the last."""
        fields, number = {}, 0
        while (head := self._byte()) & 15 != STOP:  # whatever stands before it
            number = number + (head >> 4) if head >> 4 else self._number()
            if not 0 < number < 1 << 15:
                raise ValueError(_DAMAGED)
            kind, element, parts = known.get(number, (STOP, STOP, {}))
            if kind != head & 15:
                self._pass(head & 15)
            elif kind == I64:
                fields[number] = self._number()
            else:
                fields[number] = self.struct(parts) if kind == STRUCT else self._known_list(element, parts)
        return fields

    def _known_list(self, element: int, parts: dict) -> list:
        count, kind = self._list_head()
        if kind != element:
            raise ValueError(_DAMAGED)
        if parts:
            return [self.struct(parts) for _ in range(count)]
        self._pass_elements(count, kind)
        return []

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
            self._pass_elements(*self._list_head())
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

    def _pass_elements(self, count: int, kind: int) -> None:
        for _ in range(count):
            self._pass(kind, in_list=True)

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
