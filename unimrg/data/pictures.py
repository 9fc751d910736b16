"""The bytes of a picture, wherever a data set keeps it.

A row of the index names a picture by `image` and `place`. Without a place it is the file `image`. Otherwise:

    <URL>@<offset>+<length>    a range of bytes of a file: a member of a tar, a value of an Arrow file
    <URL>#<row>                the picture in a row of a Parquet file
"""

from __future__ import annotations

import functools
import os
import re
import stat
import threading
from collections import OrderedDict
from concurrent.futures import Future
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unimrg.data.decode import Turns
from unimrg.data.manifest import pair_name
from unimrg.data.readers.entries import Broken
from unimrg.data.readers.pages import check_pages, extent, leaves, read_footer
from unimrg.data.readers.source import Source
from unimrg.data.readers.tables import DAMAGE, picture_leaf
from unimrg.errors import SampleError, StorageError
from unimrg.storage import Store

GROUP_BYTES = 512 << 20  # unpacked pictures of a row group, which are read together
LOADED_BYTES = 1 << 30  # of row groups that threads read at a time, packed and unpacked
HELD_BYTES = 256 << 20  # row groups kept for their other rows; the last one always
OPEN_FILES = 16
KNOWN_FOLDERS = 4096
RANGE = re.compile(r"(.+)@(\d{1,18})\+(\d{1,18})", re.DOTALL)
ROW = re.compile(r"(.+)#(\d{1,18})", re.DOTALL)

_loads = Turns(LOADED_BYTES)
Group = tuple[str, int]  # URL, row group


class Pictures:
    """Reads pictures. For several threads at once; pickles without what it holds.

    store: where the pictures without a place lie. Rows of a Parquet file come a row group at a time, and the
    last groups are kept: neighbouring rows cost one read, rows in any order one read each. Row groups of a
    hundred pictures suit both.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._lock = threading.Lock()
        self._groups: OrderedDict[Group, Future[pa.ChunkedArray | str]] = OrderedDict()
        self._table = functools.lru_cache(OPEN_FILES)(self._open_table)
        self._folder = functools.lru_cache(OPEN_FILES)(store.beside)
        self._real = functools.lru_cache(KNOWN_FOLDERS)(os.path.realpath)  # asks about every folder above
        self._root = os.path.realpath(store.url) if store.is_local else ""

    def __reduce__(self) -> tuple[Any, ...]:
        # Tasks of one process unpickle it again and again: they share what it holds.
        return _of_this_process, (self.store,)

    def read(self, image: str, place: str | None, limit: int) -> bytes:
        """The encoded picture, at most `limit` bytes.

        Raises SampleError: missing-file, too-large, path-outside-folder (also through links on local disks),
        unreadable-file. Raises StorageError when the store itself fails, which says nothing of the picture.
        """
        try:
            if place is None:
                return self._file(pair_name(image), limit)
            if found := RANGE.fullmatch(place):
                return self._range(found[1], int(found[2]), int(found[3]), limit)
            if found := ROW.fullmatch(place):
                return self._row(found[1], int(found[2]), limit)
        except FileNotFoundError as error:
            raise SampleError("missing-file", str(error)) from None
        except Broken as error:
            raise SampleError("unreadable-file", f"{place}: {error}") from error
        except StorageError as error:
            if error.kind != "other":
                raise
            raise SampleError("unreadable-file", str(error)) from error
        raise SampleError("unreadable-file", f"{place[:200]!r} is no place; delete the index to rebuild it")

    def _file(self, path: str, limit: int) -> bytes:
        self._check_local(path)
        raw = self.store.read_bytes(path, limit + 1)
        if len(raw) > limit:
            raise SampleError("too-large", f"{path} has more than {limit} bytes")
        return raw

    def _check_local(self, path: str) -> None:
        """Links on a local disk lead anywhere, and reading a pipe would wait forever. Raises SampleError."""
        if not self._root:
            return
        folder, name = os.path.split(os.path.join(self._root, path))
        real = os.path.join(self._real(folder), name)
        try:
            found = os.lstat(real)
            if stat.S_ISLNK(found.st_mode):
                real = os.path.realpath(real)
                found = os.stat(real)
        except OSError:
            return  # the store says it better
        if not real.startswith(os.path.join(self._root, "")):
            raise SampleError(
                "path-outside-folder", f"{path} leads out of {self._root}; set data.images above both"
            )
        if not stat.S_ISREG(found.st_mode):
            raise SampleError("unreadable-file", f"{path} is no plain file")

    def _split(self, url: str) -> tuple[Store, str]:
        """The folder and the name of a file."""
        folder, _, name = url.rpartition("/")
        return self._folder(folder or "/"), name

    def _range(self, url: str, offset: int, length: int, limit: int) -> bytes:
        if length > limit:
            raise SampleError("too-large", f"{url} holds {length} bytes at byte {offset}, at most {limit}")
        folder, name = self._split(url)
        raw = folder.read_range(name, offset, length)
        if len(raw) != length:
            raise SampleError("unreadable-file", f"{url} ends before byte {offset + length}: it is cut short")
        return raw

    def _row(self, url: str, row: int, limit: int) -> bytes:
        _, _, starts = self._table(url)
        if row >= starts[-1]:
            raise Broken(f"the file has {starts[-1]} rows")
        number = int(np.searchsorted(starts, row, side="right")) - 1
        value = self._group(url, number)[row - int(starts[number])]
        if value.type.num_fields:
            value = value["bytes"]
        size = 0 if not value.is_valid else value.value.as_buffer().size
        if size > limit:
            raise SampleError("too-large", f"{url} holds {size} bytes in row {row}, at most {limit}")
        raw = value.as_py()
        if raw is None:
            raise SampleError("missing-file", f"{url} holds no picture in row {row}")
        return raw

    def _open_table(self, url: str) -> tuple[pq.FileMetaData, str, np.ndarray]:
        """Footer, the column of the pictures, and where row groups start; last the number of rows."""
        source = Source(*self._split(url), GROUP_BYTES, ahead=1 << 16)
        footer = read_footer(source)
        try:
            leaf = picture_leaf(footer.schema.to_arrow_schema())
        except DAMAGE as error:
            raise Broken(str(error)) from error
        if not leaf:
            raise Broken("it has no column of pictures")
        rows = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
        return footer, leaf, np.cumsum([0, *rows])

    def _group(self, url: str, number: int) -> pa.ChunkedArray:
        """The pictures of a row group; threads that want the same one wait for a single read."""
        key = (url, number)
        with self._lock:
            future = self._groups.get(key)
            mine = future is None
            if future is None:
                future = self._groups[key] = Future()
            self._groups.move_to_end(key)
        if mine:
            try:
                future.set_result(self._read_group(url, number))
            except Broken as error:  # which it stays; without the frames, which hold the file's bytes
                future.set_result(str(error))
            except BaseException as error:
                future.set_exception(error)
                with self._lock:
                    self._groups.pop(key, None)
            self._shrink()
        found = future.result()
        if isinstance(found, str):
            raise Broken(found)
        return found

    def _read_group(self, url: str, number: int) -> pa.ChunkedArray:
        footer, leaf, _ = self._table(url)
        column = footer.row_group(number).column(leaves(footer, [leaf])[0])
        source = Source(*self._split(url), GROUP_BYTES, ahead=1 << 16)
        try:
            start, size = extent(column)
            if size > GROUP_BYTES:
                raise Broken(
                    f"row group {number} has {size} bytes, at most {GROUP_BYTES}; write smaller ones"
                )
            with _loads(size + max(0, column.total_uncompressed_size)):
                source.hold(start, size)
                check_pages(source, column, GROUP_BYTES, GROUP_BYTES)
                file = pq.ParquetFile(source, metadata=footer, read_dictionary=[leaf], pre_buffer=False)
                group = file.read_row_group(number, columns=[leaf], use_threads=False).column(0)
                group.validate(full=True)  # indices of its dictionary may lead out of it
                return group
        except DAMAGE as error:
            raise Broken(f"row group {number}: {error}") from error

    def _shrink(self) -> None:
        """Let go of the groups unused for longest."""
        with self._lock:
            done = [key for key, future in self._groups.items() if future.done()]
            sizes = {key: _size(self._groups[key]) for key in done}
            total = sum(sizes.values())
            for key in done[:-1]:
                if total <= HELD_BYTES and len(self._groups) <= 64 * OPEN_FILES:
                    return
                total -= sizes[key]
                del self._groups[key]


@functools.lru_cache(8)
def _of_this_process(store: Store) -> Pictures:
    return Pictures(store)


def _size(group: Future[pa.ChunkedArray | str]) -> int:
    found = None if group.exception() else group.result()
    return int(found.nbytes) if isinstance(found, pa.ChunkedArray) else 0
