"""A file of a store as the readers see it: seekable, read ahead, never more at once than is bearable."""

from __future__ import annotations

import io

from unimrg.data.readers.entries import Broken
from unimrg.errors import StorageError
from unimrg.storage import Store

AHEAD_BYTES = 1 << 20  # as much as comes over a network in the time of one request


class Source:
    """A binary file for the `json`, `tarfile` and `pyarrow` readers. Not for several threads at once.

    most: `read` of more bytes than this raises Broken: sizes come from the file, which may lie.
    Raises FileNotFoundError when it is opened, StorageError whenever the store fails: what a reader raises
    by itself is thus the file's fault.
    """

    closed = False

    def __init__(self, store: Store, path: str, most: int, ahead: int = AHEAD_BYTES) -> None:
        self.name = f"{store.url}/{path}"
        self.most, self.ahead = most, ahead
        self._file = store.open_input(path)
        self.size = self._guarded(self._file.size)
        self._at = 0
        self._start, self._held = 0, b""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self.size)[whence]
        if self._at < 0:
            raise Broken(f"it points to byte {self._at}")
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, fewer only at the end of the file."""
        size = min(size, self.size - self._at) if size >= 0 else self.size - self._at
        if size <= 0:
            return b""
        if size > self.most:
            raise Broken(f"{size} bytes at byte {self._at} belong together, at most {self.most} can be read")
        inside = self._at - self._start
        if not 0 <= inside <= len(self._held) - size:
            self.hold(self._at, max(size, self.ahead))
            inside = 0
        self._at += size
        return self._held[inside : inside + size]

    def hold(self, start: int, size: int) -> None:
        """Fetch a range at once: reads inside of it are served from memory until the next fetch."""
        size = min(size, self.size - start)
        self._held = b""  # not both at once
        self._start, self._held = start, self._guarded(self._file.read_at, size, start)
        if len(self._held) != size:
            raise StorageError(f"{self.name} was cut short while it was read; try again")

    def close(self) -> None:
        self.closed = True
        self._file.close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def _guarded(self, call, *arguments):  # type: ignore[no-untyped-def]
        try:
            return call(*arguments)
        except OSError as error:
            raise StorageError(f"can't read {self.name}: {error}") from error
