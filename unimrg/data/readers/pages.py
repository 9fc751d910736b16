"""What a Parquet file may cost, read from its own headers before any of it is decompressed.

A footer's sizes can lie, and a page of a few bytes can claim gigabytes. So the header of every page is read
first (Parquet format, parquet.thrift: PageHeader, in Thrift's compact protocol) and its claims are added up.
One long text that a dictionary names a million times would be copied a million times: `check_pages` says how
much that comes to, so that such columns can be read without spelling them out. The one encoding that lets
values grow otherwise, DELTA_BYTE_ARRAY, is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unimrg.data.readers.entries import Broken
from unimrg.data.readers.source import Source

FOOTER_BYTES = 32 << 20
HEADER_BYTES = 1 << 20
MOST_VALUES = 32 << 20  # of one column in one row group: a few bytes of levels and index each
DICTIONARY_BYTES = 4 << 20  # of a dictionary that is looked into; pyarrow writes up to 1 MiB
DICTIONARY_PAGE = 2
PLAIN_DICTIONARY, DELTA_BYTE_ARRAY, RLE_DICTIONARY = 2, 7, 8  # encodings


def read_footer(source: Source) -> pq.FileMetaData:
    """The metadata of a Parquet file. Raises Broken, StorageError."""
    source.seek(max(0, source.size - 8))
    tail = source.read(8)
    length = int.from_bytes(tail[:4], "little") + 8
    if tail[4:] != b"PAR1" or length + 4 > source.size:
        raise Broken("the Parquet file has no footer: it is cut short, or encrypted")
    if length > FOOTER_BYTES:
        raise Broken(f"the Parquet footer has {length} bytes, at most {FOOTER_BYTES}")
    source.seek(source.size - length)
    try:
        footer = pq.read_metadata(pa.BufferReader(b"PAR1" + source.read(length)))
        rows = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Broken(f"broken Parquet footer: {error}") from error
    if min(rows, default=0) < 0 or sum(rows) != footer.num_rows or footer.num_rows > source.size:
        raise Broken(f"the Parquet footer claims {footer.num_rows} rows in {source.size} bytes")
    return footer


def leaves(footer: pq.FileMetaData, columns: Sequence[str]) -> list[int]:
    """Numbers of the leaf columns at or below these paths."""
    paths = [footer.schema.column(i).path for i in range(footer.num_columns)]
    return [i for i, path in enumerate(paths) if any(path == c or path.startswith(f"{c}.") for c in columns)]


def extent(column: pq.ColumnChunkMetaData) -> tuple[int, int]:
    """(first byte, bytes) of a column of a row group in its file. Raises Broken."""
    start = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < start:
        start = column.dictionary_page_offset
    if start < 4 or column.total_compressed_size < 0:
        raise Broken(f"column {column.path_in_schema}: it starts at byte {start}")
    return start, column.total_compressed_size


def check_pages(source: Source, column: pq.ColumnChunkMetaData, most_bytes: int, most_page: int) -> int:
    """How many bytes the values that a dictionary names may come to when they are spelt out.

    Raises Broken when the column's pages claim more than `most_bytes` in all or `most_page` in one, both
    decompressed, or when their headers can't be read. Raises StorageError.
    """
    at, size = extent(column)
    end, total, values, named, longest = at + size, 0, 0, 0, 0
    if end > source.size:
        raise Broken(f"column {column.path_in_schema} ends behind the file: it is cut short")
    while at < end:
        header, length = _header(source, at, min(end - at, HEADER_BYTES))
        details: dict[int, Any] = next((header[i] for i in (5, 7, 8) if isinstance(header.get(i), dict)), {})
        page, packed, count = (_natural(n, at) for n in (header.get(2), header.get(3), details.get(1, 0)))
        encoding = details.get(4 if 8 in header else 2)
        total, values = total + page, values + count
        if page > most_page or total > most_bytes or values > MOST_VALUES:
            raise Broken(
                f"column {column.path_in_schema} unpacks to {total} bytes and {values} values or more, at "
                f"most {most_bytes} and {MOST_VALUES} of a row group are read; write smaller row groups"
            )
        if encoding == DELTA_BYTE_ARRAY:
            raise Broken(
                f"column {column.path_in_schema} is of DELTA_BYTE_ARRAY; write it with another encoding"
            )
        if header.get(1) == DICTIONARY_PAGE:
            longest = max(longest, _longest(source, column, at + length, packed, page))
        elif encoding in (PLAIN_DICTIONARY, RLE_DICTIONARY):
            named += count
        at += length + packed
    return named * longest


def _longest(source: Source, column: pq.ColumnChunkMetaData, at: int, packed: int, page: int) -> int:
    """At most how long a text of a dictionary is. at, packed: where it lies; page: its bytes, unpacked."""
    if column.physical_type != "BYTE_ARRAY" or max(packed, page) > DICTIONARY_BYTES:
        return page
    source.seek(at)
    raw = source.read(packed)
    if column.compression != "UNCOMPRESSED":
        try:
            codec = {"LZ4": "lz4_raw"}.get(column.compression, column.compression.lower())
            raw = pa.decompress(raw, page, codec, asbytes=True)
        except (pa.ArrowException, OSError, ValueError):
            return page
    longest = place = 0
    while place < len(raw):
        length = int.from_bytes(raw[place : place + 4], "little")
        longest = max(longest, length)
        place += 4 + length
    return min(longest, page)


def _natural(value: Any, at: int) -> int:
    if not isinstance(value, int) or value < 0:
        raise Broken(f"broken page header at byte {at}")
    return value


def _header(source: Source, at: int, most: int) -> tuple[dict[int, Any], int]:
    """The Thrift struct at a byte of the file as {field: value}, and its length. Raises Broken."""
    size = 1 << 10
    while True:
        source.seek(at)
        reader = _Compact(source.read(min(size, most)))
        try:
            return reader.struct(), reader.at
        except IndexError:
            if size >= most:
                raise Broken(f"broken page header at byte {at}") from None
            size *= 16
        except (ValueError, RecursionError):
            raise Broken(f"broken page header at byte {at}") from None


class _Compact:
    """Thrift's compact protocol, as far as Parquet's page headers use it. Raises IndexError at the end."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def struct(self) -> dict[int, Any]:
        found: dict[int, Any] = {}
        field = 0
        while head := self.byte():
            field = field + (head >> 4) if head >> 4 else self.zigzag()
            found[field] = self.value(head & 15)
        return found

    def value(self, kind: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self.byte()
        if kind in (4, 5, 6):
            return self.zigzag()
        if kind == 7:
            return self.skip(8)
        if kind == 8:
            return self.skip(self.varint())
        if kind == 9:
            head = self.byte()
            count = head >> 4 if head >> 4 < 15 else self.varint()
            return [self.value(head & 15) for _ in range(self.bounded(count))]
        if kind == 12:
            return self.struct()
        raise ValueError(f"type {kind}")

    def byte(self) -> int:
        self.at += 1
        return self.raw[self.at - 1]

    def varint(self) -> int:
        number = shift = 0
        while True:
            byte = self.byte()
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number
            if shift > 63:
                raise ValueError("a number without end")

    def zigzag(self) -> int:
        number = self.varint()
        return (number >> 1) ^ -(number & 1)

    def skip(self, count: int) -> None:
        self.at += self.bounded(count)

    def bounded(self, count: int) -> int:
        if count > len(self.raw) - self.at:
            raise IndexError
        return count
