"""The one door to object storage: `s3://`, `gs://`, `file://` and plain folders, all through `pyarrow.fs`.

    store = Store.at("s3://bucket/runs/a", S3Config(endpoint="http://minio:9000"))
    store.write_bytes("notes/done.json", b"{}")       # visible only when complete, size checked afterwards
    store.child("notes").read_bytes("done.json")

Every failure is a `StorageError` of one sentence (what, where, how to mend), except a single object that is
not there: that is a `FileNotFoundError`, since callers treat it as data. `pyarrow.fs.copy_files` and
`delete_dir` are never used: the first reports success for uploads the server refused, the second fails on
many S3-compatible stores.

Every call to S3 is repeated while its failure may be gone a moment later, which `take_retries` counts (see
`unimrg/retries.py`); Google's library repeats by itself, uncounted. An answer of the wrong length is noticed.
Wrong bytes of the right length are not: who reads must check (Parquet's checksums, the decoding of pictures).
Nor is a server that confirms to have replaced an object by one of the same size and didn't.
"""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from unimrg.errors import StorageError
from unimrg.failures import RETRY_REASONS as RETRY_REASONS
from unimrg.failures import CutShort, explained, no_bucket, retry_reason
from unimrg.retries import count_retry, retrying
from unimrg.retries import take_retries as take_retries

T = TypeVar("T")

# Seconds. A request is given up when not one byte moved for REQUEST_SECONDS.
CONNECT_SECONDS = 5.0
REQUEST_SECONDS = 15.0
# A bucket that was there is looked for again after BUCKET_SECONDS, when something in it is missing.
BUCKET_SECONDS = 60.0
# Calls of many requests, which would hardly ever get through as a whole, have each request tried so often by
# the SDK, uncounted, before the call itself is repeated.
SDK_ATTEMPTS = 4
# From here on pyarrow writes an object as several requests.
MULTIPART_BYTES = 10 << 20
CHUNK_BYTES = 8 << 20
THREADS = 8

# The SDK's new trailing checksums are refused by many S3-compatible stores (411 MissingContentLength).
CHECKSUM_DEFAULTS = {
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
}


@dataclass(frozen=True)
class S3Config:
    """How to reach an S3 store; what is empty comes from the usual AWS places.

    Those are the environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, …), the profile files in `~/.aws` and
    the role of the machine. Keys never appear in `repr`.
    """

    endpoint: str = ""
    region: str = ""
    access_key: str = field(default="", repr=False)
    secret_key: str = field(default="", repr=False)


def aws_environment(s3: S3Config) -> dict[str, str]:
    """Environment variables that give a worker process the same settings.

    Only what `s3` or a custom endpoint says: keys that this process found in the usual AWS places are not
    copied, workers find their own there.
    """
    found: dict[str, str] = {}
    endpoint = _endpoint(s3)
    if endpoint:
        found["AWS_ENDPOINT_URL"] = endpoint
        found |= {name: os.environ.get(name, value) for name, value in CHECKSUM_DEFAULTS.items()}
    if s3.region:
        found |= {"AWS_REGION": s3.region, "AWS_DEFAULT_REGION": s3.region}
    if s3.access_key:
        found |= {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
    return found


@dataclass(frozen=True)
class Entry:
    """One object or folder.

    path: relative to the store; size: bytes, None for a folder; mtime: seconds since 1970, None if unknown.
    """

    path: str
    size: int | None
    mtime: float | None = None

    @property
    def is_folder(self) -> bool:
        return self.size is None


class _Connection:
    """What a store and its children share: the file systems, and what is known of the server.

    answered: it ever did. bucket_seen: when the bucket was, in seconds since 1970. Pickles without the file
    systems.
    """

    def __init__(self, scheme: str, bucket: str, s3: S3Config) -> None:
        self._scheme, self._bucket, self._s3 = scheme, bucket, s3
        self._filesystems: dict[int, pafs.FileSystem] = {}
        self.answered = False
        self.bucket_seen = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_filesystems": {}}

    def filesystem(self, attempts: int = 1) -> pafs.FileSystem:
        """attempts: how often S3's SDK tries each request; by default retrying is left to the caller."""
        if attempts not in self._filesystems:
            self._filesystems[attempts] = _connect(self._scheme, self._bucket, self._s3, attempts)
        return self._filesystems[attempts]


class Store:
    """A folder in object storage or on disk. Connects on first use and pickles without its connection.

    Paths are relative to the store, with `/`; `..` and empty names are refused. Create with `Store.at`.
    """

    def __init__(self, scheme: str, root: str, s3: S3Config = S3Config()) -> None:
        self._scheme = scheme
        self.root = root
        self._s3 = s3
        self._connection = _Connection(scheme, root.split("/", 1)[0], s3)

    @classmethod
    def at(cls, url: str, s3: S3Config = S3Config()) -> Store:
        """`s3://bucket/prefix`, `gs://bucket/prefix`, `file:///folder` or a local path (relative, `~`).

        Raises StorageError when the URL can't be used. Nothing is contacted yet.
        """
        scheme, _, rest = url.partition("://") if "://" in url else ("", "", url)
        if scheme in ("s3", "gs"):
            bucket = rest.split("/", 1)[0]
            if "@" in bucket:  # the address would end up in logs: don't even repeat it here
                raise StorageError(
                    f"credentials don't belong into a {scheme}:// address; put them into S3Config"
                )
            if not bucket:
                raise StorageError(f"{url!r} names no bucket; write {scheme}://bucket/prefix")
            return cls(scheme, posixpath.join(bucket, *_parts(rest[len(bucket) :])), s3)
        if scheme == "file":
            host = urlsplit(url).netloc
            if host not in ("", "localhost"):
                raise StorageError(f"{url!r} names a host; write file:///folder with three slashes")
            return cls("file", str(Path(unquote(rest[len(host) :])).absolute()))
        if scheme:
            raise StorageError(f"{url!r}: storage {scheme}:// is unknown; use s3://, gs:// or a path")
        if not url:
            raise StorageError("the storage address is empty; write s3://bucket/prefix or a folder")
        return cls("file", os.path.normpath(Path(url).expanduser().absolute()))

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and (self.url, self._s3) == (other.url, other._s3)

    def __hash__(self) -> int:
        return hash(self.url)

    @property
    def is_local(self) -> bool:
        return self._scheme == "file"

    @property
    def url(self) -> str:
        """Address that `Store.at` takes back: `s3://…`, `gs://…` or an absolute local path."""
        return self.root if self.is_local else f"{self._scheme}://{self.root}"

    def filesystem(self) -> pafs.FileSystem:
        """The pyarrow file system for other libraries; `root` is this store's path inside it.

        What they do through it is repeated by the SDK only, and not counted.
        """
        return self._connection.filesystem(SDK_ATTEMPTS)

    def child(self, path: str) -> Store:
        """The store of a folder inside this one; shares the connection."""
        store = Store(self._scheme, self._key(path), self._s3)
        store._connection = self._connection
        return store

    def beside(self, url: str) -> Store:
        """The store at another address, reached with the same settings. Raises StorageError as `at` does."""
        return Store.at(url, self._s3)

    # Reading

    def stat(self, path: str = "") -> Entry | None:
        """What lies at `path`, or None. Raises StorageError when the store or its bucket can't be reached."""
        look = partial(self._call, "look at", path, partial(self._look, self._key(path)))
        info = look()
        # pyarrow takes a page of HTML for a folder or for nothing, as it comes; so that has to be said twice.
        if not self.is_local and info.type != pafs.FileType.File and look().type != info.type:
            count_retry("truncated")
            info = look()
        if info.type == pafs.FileType.NotFound:
            self._check_bucket()
            return None
        return _entry(info, "/".join(_parts(path)))

    def exists(self, path: str = "") -> bool:
        """Is there an object, or anything below a folder, at `path`? Raises StorageError."""
        return self.stat(path) is not None

    def size(self, path: str) -> int | None:
        """Bytes of the object, None when it is missing or a folder. Raises StorageError."""
        found = self.stat(path)
        return None if found is None else found.size

    def open_input(self, path: str) -> pa.NativeFile:
        """A readable, seekable file. Raises FileNotFoundError or StorageError.

        Later reads of a stored object repeat what is transient and raise the same; those of a local file
        raise OSError.
        """
        if self.is_local:
            with self._explain("read", path):
                return self._connection.filesystem().open_input_file(self._key(path))
        return pa.PythonFile(_Reader(self, path), mode="r")

    def read_bytes(self, path: str, limit: int | None = None) -> bytes:
        """The object, or its first `limit` bytes. Raises FileNotFoundError or StorageError."""
        return self.read_range(path, 0, limit)

    def read_range(self, path: str, offset: int, length: int | None = None) -> bytes:
        """`length` bytes of the object from `offset` on; fewer, or none, where it ends; None: to the end.

        Raises FileNotFoundError or StorageError. Each call asks for the object's size first: for many ranges
        of one object, `open_input` and `seek` take half the requests.
        """
        if self.is_local:
            with self._explain("read", path), self.open_input(path) as source:
                size = source.size()
                start = min(offset, size)
                source.seek(start)
                return source.read(size - start if length is None else min(length, size - start))
        return bytes(self._call("read", path, partial(_OpenObject(self._open(path)).read, offset, length)))

    def list(self, path: str = "", recursive: bool = False) -> list[Entry]:
        """What lies in the folder, sorted by path; recursive: all objects below it, without the folders.

        A folder that doesn't exist is empty, as in object storage. Raises StorageError.
        """
        key = self._key(path)
        selector = pafs.FileSelector(key, recursive=recursive, allow_not_found=True)
        # A long listing is many requests, so its second try has each of them repeated by the SDK.
        attempts = chain([1], repeat(SDK_ATTEMPTS))
        filesystem = self._connection.filesystem
        infos = self._call("list", path, lambda: _listed(filesystem(next(attempts)), selector))
        if not infos:
            self._check_bucket()
        entries = [_entry(info, posixpath.relpath(info.path, self.root)) for info in infos]
        return sorted((e for e in entries if not (recursive and e.is_folder)), key=lambda e: e.path)

    def download(self, path: str, local_folder: str | os.PathLike[str]) -> None:
        """Copy the folder (or the one object) at `path` into `local_folder`; sizes are checked.

        Raises FileNotFoundError when nothing is there, else StorageError.
        """
        found = self.stat(path)
        if found is None:
            raise FileNotFoundError(f"{self._where(path)} does not exist")
        entries = self.list(path, recursive=True) if found.is_folder else [found]
        base = "/".join(_parts(path)) if found.is_folder else posixpath.dirname(found.path)
        root = Path(local_folder)
        targets = [root.joinpath(*_parts(posixpath.relpath(entry.path, base or "."))) for entry in entries]
        try:
            _run_all([partial(self._fetch, e, target) for e, target in zip(entries, targets, strict=True)])
        except FileNotFoundError as error:
            if not found.is_folder:
                raise
            raise StorageError(f"{error} any more: it was deleted while its folder was copied") from error

    # Writing

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write one object atomically: readers see the old content or the new one, never a part.

        Local: temporary file and rename. S3: one PUT, or one multipart upload for large data. The
        size is read back. Raises StorageError.
        """
        self._put(path, lambda: [data], len(data))

    def write_pieces(self, path: str, pieces: Callable[[], Iterable[bytes | memoryview]], size: int) -> None:
        """`write_bytes` of `size` bytes in pieces; asked for again, from the first one, for every attempt."""

        def small() -> Iterator[memoryview]:
            for piece in pieces():
                view = memoryview(piece)
                for at in range(0, len(view), CHUNK_BYTES):
                    yield view[at : at + CHUNK_BYTES]

        self._put(path, small, size)

    def upload(self, local_folder: str | os.PathLike[str], path: str) -> None:
        """Copy every file below `local_folder` to `path`; each one's size is read back.

        Raises StorageError at the first file that isn't there in full afterwards.
        """
        folder = Path(local_folder)
        if not folder.is_dir():
            raise StorageError(f"can't upload {folder}: there is no such folder")
        files = sorted(Path(top, name) for top, _, names in os.walk(folder) for name in names)
        targets = [posixpath.join(*_parts(path), *file.relative_to(folder).parts) for file in files]
        _run_all([partial(self._send, file, target) for file, target in zip(files, targets, strict=True)])

    def delete(self, path: str) -> None:
        """Delete the object, or all below the folder; fine if nothing is there. Raises StorageError."""
        key = self._key(path)
        if not key.strip("/") or (not self.is_local and "/" not in key):
            raise StorageError(f"refusing to delete all of {self.url}; name a folder inside it")
        found = self.stat(path)
        if found is None:
            return
        entries = self.list(path, recursive=True) if found.is_folder else [found]
        self._call("delete", path, partial(self._remove_all, found, entries))
        if not found.is_folder:
            return
        if self.is_local:  # only empty folders are left
            with self._explain("delete", path):
                shutil.rmtree(key)
        else:
            self._remove_markers(key)

    # Checks before a run starts

    def check_readable(self) -> None:
        """Raises StorageError unless something lies at this address and may be read."""
        if self.stat() is None:
            raise StorageError(f"there is nothing at {self.url}; check the spelling, or put the data there")

    def check_writable(self) -> None:
        """Writes, reads back and deletes a tiny object. Raises StorageError."""
        path, content = f".unimrg-probe-{secrets.token_hex(6)}", b"unimrg"
        self.write_bytes(path, content)
        try:
            if self.read_bytes(path) != content:
                raise StorageError(f"{self._where(path)} was written but reads back differently")
        except FileNotFoundError as error:
            raise StorageError(f"{self._where(path)} was written but can't be found again") from error
        self.delete(path)

    # Inside

    def _key(self, path: str) -> str:
        return posixpath.join(self.root, *_parts(path))

    def _where(self, path: str) -> str:
        return posixpath.join(self.url, *_parts(path))

    @contextlib.contextmanager
    def _explain(self, verb: str, path: str) -> Iterator[None]:
        """Turns what pyarrow and the system raise into the errors of this module."""
        try:
            yield
        except FileNotFoundError as error:
            self._check_bucket()
            if verb == "write":  # a folder that can't be made, or a source file that vanished
                raise StorageError(f"can't write {self._where(path)}: {error}") from error
            raise FileNotFoundError(f"{self._where(path)} does not exist") from error
        except (OSError, ValueError, pa.ArrowException) as error:
            if "AWS Error NO_SUCH_KEY" in str(error):  # deleted after it was opened
                self._check_bucket()
                raise FileNotFoundError(f"{self._where(path)} does not exist") from error
            endpoint = "" if self._scheme != "s3" else _endpoint(self._s3)
            raise explained(verb, self._where(path), endpoint, error) from error

    def _call(self, verb: str, path: str, attempt: Callable[[], T]) -> T:
        """What `attempt` returns, repeated while its failures are transient; raises as `_explain` does."""
        with self._explain(verb, path):
            result = retrying(attempt, self._connection.answered)
        self._connection.answered = True
        return result

    def _check_bucket(self) -> None:
        """A missing bucket looks like a missing object to pyarrow; tell them apart, not asking each time."""
        link = self._connection
        if self.is_local or time.time() - link.bucket_seen < BUCKET_SECONDS:
            return
        bucket = self.root.split("/", 1)[0]
        at = _endpoint(self._s3) if self._scheme == "s3" else ""
        try:
            info = retrying(lambda: link.filesystem().get_file_info(bucket), link.answered)
        except OSError as error:
            if retry_reason(error):
                raise explained("look at", f"{self._scheme}://{bucket}", at, error) from error
        else:  # some roles may read objects but not look at the bucket
            if info.type == pafs.FileType.NotFound:
                raise no_bucket(self._scheme, bucket, at)
        link.answered, link.bucket_seen = True, time.time()

    def _look(self, key: str) -> pafs.FileInfo:
        """One attempt to learn what is at a key."""
        info = self._connection.filesystem().get_file_info(key)
        if self._scheme == "s3" and info.type == pafs.FileType.File and not info.mtime_ns:
            raise CutShort(NOT_S3)
        return info

    def _open(self, path: str) -> Callable[[], pa.NativeFile]:
        """Opens a stored object, in one attempt."""
        key = self._key(path)

        def opened() -> pa.NativeFile:
            file = self._connection.filesystem().open_input_file(key)
            if self._scheme == "s3" and "Last-Modified" not in file.metadata():
                raise CutShort(NOT_S3)
            return file

        return opened

    def _put(self, path: str, pieces: Callable[[], Iterable[bytes | memoryview]], size: int) -> None:
        """Write one object of `size` bytes and check that it arrived. pieces: the content, from its start."""
        key = self._key(path)
        if self.is_local:
            with self._explain("write", path):
                _write_local(Path(key), pieces())
            return
        written = False

        def attempt() -> None:
            nonlocal written
            if not written:
                self._write_object(key, pieces(), SDK_ATTEMPTS if size >= MULTIPART_BYTES else 1)
            written = True
            try:
                arrived = self._open(path)().size()
            except FileNotFoundError:
                arrived = None
            if arrived != size:
                written = False
                raise CutShort(f"it holds {arrived or 'none'} of {size} bytes; the store lost data")

        self._call("write", path, attempt)

    def _write_object(self, key: str, pieces: Iterable[bytes | memoryview], attempts: int) -> None:
        source = iter(pieces)
        torn = False
        try:
            with self._connection.filesystem(attempts).open_output_stream(key) as sink:
                while True:
                    try:
                        piece = next(source, None)
                    except BaseException:
                        torn = True
                        raise
                    if piece is None:
                        break
                    sink.write(piece)
        except BaseException:
            # Leaving the block closes the stream, which commits half an object when the source fails. When
            # the store fails nothing was committed, and what lay there before must stay.
            if torn:
                with contextlib.suppress(OSError):
                    self.filesystem().delete_file(key)
            raise

    def _send(self, file: Path, path: str) -> None:
        def pieces() -> Iterator[bytes]:
            source.seek(0)
            return _pieces(source)

        with self._explain("write", path), open(file, "rb") as source:
            self._put(path, pieces, os.fstat(source.fileno()).st_size)

    def _fetch(self, entry: Entry, target: Path) -> None:
        with self._explain("read", entry.path):
            if self.is_local:
                with self.open_input(entry.path) as source:
                    _write_local(target, _pieces(source))
            else:
                _write_local(target, self._chunks(entry.path))
        size = target.stat().st_size
        if size != entry.size:
            raise StorageError(
                f"{self._where(entry.path)} has {size} bytes but was listed with {entry.size}; "
                "it changed while it was copied, try again"
            )

    def _chunks(self, path: str) -> Iterator[bytearray]:
        """A stored object piece by piece, each of them repeated by itself."""
        source, offset = _OpenObject(self._open(path)), 0
        while piece := self._call("read", path, partial(source.read, offset, CHUNK_BYTES)):
            yield piece
            offset += len(piece)

    def _remove_all(self, found: Entry, entries: Sequence[Entry]) -> None:
        """One attempt to delete these objects; an answer that says so is not enough, they must be gone."""
        _run_all([partial(self._remove, entry.path) for entry in entries])
        if self.is_local:
            return
        there = self.list(found.path, recursive=True) if found.is_folder else [self.stat(found.path)]
        left = {entry.path for entry in entries} & {entry.path for entry in there if entry}
        if left:
            raise CutShort(f"{len(left)} of {len(entries)} deleted objects are still there")

    def _remove(self, path: str) -> None:
        try:
            with contextlib.suppress(FileNotFoundError):
                delete = partial(self._connection.filesystem().delete_file, self._key(path))
                self._call("delete", path, delete)
        except StorageError:
            # After a delete pyarrow writes a marker for the folder, which another delete may just have
            # removed: then the object is gone all the same.
            if self.stat(path) is not None:
                raise

    def _remove_markers(self, key: str) -> None:
        """Remove the empty objects that pyarrow leaves to stand for folders.

        Deepest first: `delete_dir` of a folder without children is a plain DELETE, which every store can do.
        """
        selector = pafs.FileSelector(key, recursive=True, allow_not_found=True)
        filesystem = self._connection.filesystem()
        with contextlib.suppress(OSError):  # a marker that stays is ugly, not wrong
            below = retrying(partial(filesystem.get_file_info, selector))
            if all(info.type == pafs.FileType.Directory for info in below):
                for folder in sorted((info.path for info in below), key=len, reverse=True):
                    retrying(partial(filesystem.delete_dir, folder))
                retrying(partial(filesystem.delete_dir, key))


NOT_S3 = "the answer has no date, so it is not S3's; is something between here and the store?"


class _OpenObject:
    """A stored object that is opened with the first read, and anew after an answer of the wrong length."""

    def __init__(self, open_file: Callable[[], pa.NativeFile]) -> None:
        self._open = open_file
        self._file: pa.NativeFile | None = None

    def read(self, offset: int, length: int | None = None) -> bytearray:
        """One attempt to read `length` bytes (None: all) from `offset` on; fewer where the object ends."""
        if self._file is None:
            self._file = self._open()
        try:
            rest = max(0, self._file.size() - offset)
            buffer = bytearray(rest if length is None else min(rest, length))
            _fill(self._file, offset, buffer)
        except OSError as error:
            if retry_reason(error) == "truncated":
                self._file = None
            raise
        return buffer

    def size(self) -> int:
        if self._file is None:
            self._file = self._open()
        return int(self._file.size())


def _fill(file: pa.NativeFile, offset: int, buffer: bytearray) -> None:
    """Read exactly as many bytes as `buffer` holds. Raises CutShort when fewer come.

    pyarrow (26.0) takes every answer to a GET for a full one and leaves the rest of the buffer as it was. So
    its last byte is set beforehand: if it is still the same, the read is repeated with another one.
    """
    if not buffer:
        return
    for mark in (0xA7, 0x58):
        buffer[-1] = mark
        file.seek(offset)
        if file.readinto(buffer) == len(buffer) and buffer[-1] != mark:
            return
    raise CutShort(f"fewer than the {len(buffer)} bytes that were asked for came")


class _Reader(io.RawIOBase):
    """A stored object as a file whose reads are repeated while failures are transient."""

    def __init__(self, store: Store, path: str) -> None:
        super().__init__()
        self._store, self._path = store, path
        self._object = _OpenObject(store._open(path))
        self._size = store._call("read", path, self._object.size)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        rest = max(0, self._size - self._at)
        length = rest if size is None or size < 0 else min(rest, size)
        found = self._store._call("read", self._path, partial(self._object.read, self._at, length))
        if len(found) != length:
            where = self._store._where(self._path)
            raise StorageError(f"{where} became shorter while it was read; try again")
        self._at += length
        return bytes(found)


def _listed(filesystem: pafs.FileSystem, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
    """One attempt to list a folder; pyarrow takes a page of HTML for none, so that has to be said twice."""
    infos = _look(filesystem, selector)
    if not infos and _look(filesystem, selector):
        raise CutShort("the store says now that the folder is empty, now that it isn't")
    return infos


def _look(filesystem: pafs.FileSystem, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
    try:
        return filesystem.get_file_info(selector)
    except FileNotFoundError:  # Arrow looks twice at a local folder, which may be made or removed in between
        return []


def _parts(path: str) -> list[str]:
    """The names of a relative path. Raises StorageError for `..`, which would leave the store."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise StorageError(f"path {path!r} leaves its folder; write it without '..'")
    return parts


def _entry(info: pafs.FileInfo, path: str) -> Entry:
    mtime = None if info.mtime is None else info.mtime.timestamp()
    return Entry(path, info.size if info.type == pafs.FileType.File else None, mtime)


def _endpoint(s3: S3Config) -> str:
    return s3.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3", "") or os.environ.get("AWS_ENDPOINT_URL", "")


def _connect(scheme: str, bucket: str, s3: S3Config, attempts: int) -> pafs.FileSystem:
    """A pyarrow file system with bounded waits. Raises StorageError for settings that can't be used."""
    if scheme == "file":
        return pafs.LocalFileSystem()
    if scheme == "gs":
        return pafs.GcsFileSystem(retry_time_limit=timedelta(seconds=SDK_ATTEMPTS * REQUEST_SECONDS))
    if bool(s3.access_key) != bool(s3.secret_key):
        raise StorageError(f"s3://{bucket}: access_key and secret_key go together; set both or none")
    endpoint = _endpoint(s3)
    options: dict[str, Any] = {}
    if endpoint:
        for name, value in CHECKSUM_DEFAULTS.items():
            os.environ.setdefault(name, value)
        found = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
        if found.scheme not in ("http", "https") or not found.netloc or found.path.strip("/"):
            raise StorageError(f"endpoint {endpoint!r} is no address; write http://host:port or https://host")
        options |= {"endpoint_override": found.netloc, "scheme": found.scheme}
    if s3.access_key:
        options |= {"access_key": s3.access_key, "secret_key": s3.secret_key}
    return pafs.S3FileSystem(
        region=_region(s3, endpoint, bucket),
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        allow_delayed_open=True,  # small objects become one PUT instead of a multipart upload
        **options,
    )


def _region(s3: S3Config, endpoint: str, bucket: str) -> str | None:
    """As configured; AWS itself can be asked where a bucket lives, other stores mostly don't care."""
    named = s3.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if named or endpoint:
        return named or "us-east-1"
    try:
        return str(pafs.resolve_s3_region(bucket))
    except OSError:  # missing bucket or no network: the first real request says so better
        return None


def _pieces(source: BinaryIO | pa.NativeFile) -> Iterator[bytes]:
    while piece := source.read(CHUNK_BYTES):
        yield piece


def _write_local(target: Path, pieces: Iterable[bytes | bytearray | memoryview]) -> None:
    """Temporary file beside `target`, flushed to disk, then renamed over it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "wb") as sink:
            sink.writelines(pieces)
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _run_all(jobs: Sequence[Callable[[], None]]) -> None:
    """Run in a few threads; the first error is raised and what hasn't started is dropped."""
    if len(jobs) <= 1:
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(min(THREADS, len(jobs))) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
