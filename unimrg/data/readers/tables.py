"""Entries of Parquet files and of the Arrow files that `save_to_disk` of Hugging Face's `datasets` writes.

Columns are those of an entry; others are passed over. `conversations` is a list of {from, value}, or the same
as JSON text. `image` is a path, or the picture itself: bytes, or {bytes, path} as the Image feature has it.
Pictures stay where they are: the index gets their places.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unimrg.data.readers.entries import FIELDS, Broken, Malformed, Packed
from unimrg.data.readers.pages import check_pages, leaves, read_footer
from unimrg.data.readers.source import Source
from unimrg.errors import SampleError

BATCH_ROWS = 1024
BATCH_PICTURES = 32
NAMED_BYTES = 256 << 20  # of texts that a dictionary names, all spelt out
GROUP_BYTES = 4 << 30  # of one column of a row group; it streams through memory page by page
PAGE_BYTES = 256 << 20
ROWS_BYTES = 64 << 20  # of rows that become Python objects at once
OBJECT_BYTES = 100  # of a small Python object, roughly
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"

# What pyarrow raises for damaged files: broken Thrift is an OSError, text that is not UTF-8 a ValueError.
DAMAGE = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, LookupError, Broken)


# Parquet


def read_parquet(source: Source, path: str) -> Iterator[Any]:
    """Entries of the Parquet file `path`; what can't be read of a row group becomes one SampleError.

    Raises Broken when nothing of the file can be read, StorageError.
    """
    source.ahead = 1 << 16  # texts lie in small pieces between the pictures
    footer = read_footer(source)
    try:
        types = pq.ParquetFile(source, metadata=footer, pre_buffer=False).schema_arrow
    except DAMAGE as error:
        raise Broken(f"broken Parquet schema: {error}") from error
    _check_columns(types)
    row = 0
    for number in range(footer.num_row_groups):
        end = row + footer.row_group(number).num_rows
        try:
            for batch, embedded in _batches(source, footer, number, types):
                places = [f"#{row + i}" if there else "" for i, there in enumerate(embedded)]
                yield from _entries(batch, source, path, row, places)
                row += batch.num_rows
        except DAMAGE as error:
            where = f"{source.name}: rows {row} to {end - 1}, in row group {number}"
            yield SampleError("unreadable-file", f"{where}: {error}")
        row = end


def _batches(
    source: Source, footer: pq.FileMetaData, number: int, types: pa.Schema
) -> Iterator[tuple[pa.RecordBatch, Sequence[bool]]]:
    """The rows of a row group without pictures, and which of them bring their picture. Raises DAMAGE."""
    picture = picture_leaf(types)
    columns = [name for name in types.names if name in FIELDS and not (picture and name == "image")]
    if picture.endswith(".bytes") and types.field("image").type.get_field_index("path") >= 0:
        columns.append("image.path")
    nulls = _nulls(footer, number, picture) if picture else -1
    rows = footer.row_group(number).num_rows
    size = BATCH_ROWS
    if picture and nulls not in (0, rows):
        columns.append(picture)  # only the pictures themselves tell which are there
        size = BATCH_PICTURES
    chunks = [footer.row_group(number).column(leaf) for leaf in leaves(footer, columns)]
    spelt = {one.path_in_schema: check_pages(source, one, GROUP_BYTES, PAGE_BYTES) for one in chunks}
    # Kept as indices of a dictionary; pyarrow adds all other values of the row group to it, too.
    named = [path for path, length in spelt.items() if length > NAMED_BYTES]
    file = pq.ParquetFile(
        source, metadata=footer, read_dictionary=named, buffer_size=1 << 20, pre_buffer=False
    )
    read = 0
    for batch in file.iter_batches(size, [number], columns, use_threads=False):
        read += batch.num_rows
        batch, pictures = _without_pictures(batch)
        if picture and pictures is None:
            yield batch, [nulls == 0] * batch.num_rows
        else:
            yield batch, [False] * batch.num_rows if pictures is None else pictures.is_valid().to_pylist()
    if read != rows:
        raise Broken(f"{read} of {rows} rows are there")


def picture_leaf(types: pa.Schema) -> str:
    """The Parquet column that holds pictures, "" if there is none."""
    if "image" not in types.names or _is_text(_spelt(types.field("image").type)):
        return ""
    return "image.bytes" if pa.types.is_struct(types.field("image").type) else "image"


def _nulls(footer: pq.FileMetaData, number: int, leaf: str) -> int:
    """How many values of a column of a row group are null; -1 when the file doesn't say."""
    found = footer.row_group(number).column(leaves(footer, [leaf])[0]).statistics
    return int(found.null_count) if found is not None and found.has_null_count else -1


# Arrow


def read_arrow(source: Source, path: str) -> Iterator[Any]:
    """Entries of the Arrow file `path`, of the stream or the file form; a damaged batch is one SampleError.

    Raises Broken where the file can't be followed any further, StorageError.
    """
    source.seek(8 if source.read(6) == b"ARROW1" else 0)
    row = 0
    try:
        reader = pa.ipc.MessageReader.open_stream(source)
        first = reader.read_next_message()
        if first.type != "schema":  # pyarrow would take it for one and crash
            raise Broken(f"it starts with a message of type {first.type!r}, not with a schema")
        types = pa.ipc.read_schema(first)
        _check_columns(types)
        while True:
            message = reader.read_next_message()
            try:
                batch = _record_batch(message, types)
                columns = [name for name in batch.schema.names if name in FIELDS]
                batch, pictures = _without_pictures(batch.select(columns))
                start = source.tell() - message.body.size - message.body.address
                places = _ranges(pictures, start, batch.num_rows)
                yield from _entries(batch, source, path, row, places)
                row += batch.num_rows
            except DAMAGE as error:
                where = f"{source.name}: the batch before byte {source.tell()}, after row {row}"
                yield SampleError("unreadable-file", f"{where}: {error}")
    except StopIteration:
        source.seek(max(0, source.tell() - 8))
        if source.read(8) != END_OF_STREAM:
            raise Broken(f"the Arrow file is cut short after row {row}") from None
    except DAMAGE as error:
        raise Broken(f"the Arrow file breaks after row {row}: {error}") from error


def _record_batch(message: pa.ipc.Message, types: pa.Schema) -> pa.RecordBatch:
    """A checked batch whose buffers lie in the message. Raises DAMAGE."""
    if message.type != "record batch":
        raise Broken(f"a {message.type} message; only plain batches are read")
    if _is_compressed(message.metadata.to_pybytes()):
        raise Broken("the batch is compressed; write it without compression, or as Parquet")
    batch = pa.ipc.read_record_batch(message, types)
    if batch.num_rows > max(message.body.size, 1):
        raise Broken(f"{batch.num_rows} rows in {message.body.size} bytes")
    batch.validate(full=True)  # offsets out of bounds would be followed
    return batch


def _is_compressed(metadata: bytes) -> bool:
    """Whether the header of a record batch has the field `compression` (Arrow format, Message.fbs)."""

    def field(table: int, number: int) -> int:
        """Where a field of a flatbuffer's table stands, 0 if it is absent."""
        vtable = table - struct.unpack_from("<i", metadata, table)[0]
        if 4 + 2 * number >= struct.unpack_from("<H", metadata, vtable)[0]:
            return 0
        offset = struct.unpack_from("<H", metadata, vtable + 4 + 2 * number)[0]
        return table + offset if offset else 0

    try:
        root = struct.unpack_from("<I", metadata, 0)[0]
        header = field(root, 2)
        return bool(field(header + struct.unpack_from("<I", metadata, header)[0], 3))
    except struct.error as error:
        raise Broken(f"broken message: {error}") from error


def _ranges(pictures: pa.Array | None, start: int, rows: int) -> list[str]:
    """Where each picture lies: "@offset+length", "" for none. start: from addresses to bytes of the file."""
    if pictures is None:
        return [""] * rows
    _, offsets, data = pictures.buffers()
    if data is None or not rows:
        return [""] * rows
    width = np.dtype(np.int64 if pa.types.is_large_binary(pictures.type) else np.int32)
    ends = np.frombuffer(offsets, width, rows + 1, pictures.offset * width.itemsize).tolist()
    first = start + data.address
    there = pictures.is_valid().to_pylist()
    return [f"@{first + ends[i]}+{ends[i + 1] - ends[i]}" if there[i] else "" for i in range(rows)]


# Both


def _check_columns(types: pa.Schema) -> None:
    """Raises Broken unless the columns make entries."""
    if "conversations" not in types.names:
        raise Broken(f"no column 'conversations', only {', '.join(types.names[:20])}")
    if double := [name for name in FIELDS if types.names.count(name) > 1]:
        raise Broken(f"column {double[0]!r} is there twice")
    kind = _spelt(types.field("image").type) if "image" in types.names else pa.string()
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = _spelt(kind.field("bytes").type)
    if not (_is_text(kind) or _is_bytes(kind)):
        raise Broken(
            f"column 'image' is of {types.field('image').type}; use a path, bytes or {{bytes, path}}"
        )


def _spelt(kind: pa.DataType) -> pa.DataType:
    """The type of the values, where they are named by a dictionary."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _without_pictures(batch: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.Array | None]:
    """The batch with `image` as paths, or without it, and the pictures if it holds them."""
    if "image" not in batch.schema.names:
        return batch, None
    column = batch.column("image")
    kind = _spelt(column.type)
    if _is_text(kind):
        return batch, None
    batch = batch.drop_columns(["image"])
    if not pa.types.is_struct(kind):
        return batch, column
    parts = dict(zip([kind.field(i).name for i in range(kind.num_fields)], column.flatten(), strict=True))
    if "path" in parts:
        batch = batch.append_column("image", parts["path"])
    return batch, parts.get("bytes")


def _entries(
    batch: pa.RecordBatch, source: Source, path: str, row: int, places: Sequence[str]
) -> Iterator[Any]:
    """Entries of a batch that starts at `row` of the file `path`; places: "" where there is no picture."""
    for i, (value, place) in enumerate(zip(_values(batch), places, strict=True)):
        yield Packed(value, f"{path}/{row + i}", source.name + place) if place else value


def _values(batch: pa.RecordBatch) -> Iterator[Any]:
    """Rows as Python objects; Malformed for those that are too long or no text."""
    problem = ""
    if sum(map(_cost, batch.columns)) > ROWS_BYTES:
        problem = f"the entry has more than {ROWS_BYTES >> 20} MiB"
    else:
        try:
            yield from batch.to_pylist()
            return
        except (ValueError, OverflowError, pa.ArrowException) as error:
            problem = str(error)
    if batch.num_rows == 1:
        yield Malformed(problem)
        return
    half = batch.num_rows // 2
    yield from _values(batch.slice(0, half))
    yield from _values(batch.slice(half))


def _cost(values: pa.Array) -> int:
    """Bytes of an array as Python objects, roughly: dictionaries spelt out. Raises Broken for odd types."""
    kind = values.type
    own = OBJECT_BYTES * len(values)
    if pa.types.is_dictionary(kind):
        lengths = pc.take(pc.binary_length(values.dictionary), values.indices)
        return own + int(pc.sum(lengths).as_py() or 0)
    if pa.types.is_struct(kind):
        return own + sum(map(_cost, values.flatten()))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return own + _cost(values.flatten())
    if _is_bytes(kind) or _is_text(kind):
        return own + (0 if pa.types.is_null(kind) else int(pc.sum(pc.binary_length(values)).as_py() or 0))
    if pa.types.is_primitive(kind):  # numbers, booleans, times
        return own
    raise Broken(f"a column is of {kind}; use text, numbers, lists and structs")
