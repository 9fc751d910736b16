"""Reads the entries of a data set, whatever its form.

    for entry in read_entries(store, find_shards(store, "shard-{000..009}.tar")): ...

Forms are told from the content: a JSON list, JSON lines, Parquet, a WebDataset tar, Arrow as Hugging Face's
`save_to_disk` writes it. A name may stand for several files: a folder that holds Parquet files or was written
by `save_to_disk`, `*` and `?`, or a range of numbers in braces. Nothing is ever held as a whole in memory.
"""

from __future__ import annotations

import codecs
import fnmatch
import json
import posixpath
import re
from collections.abc import Iterator, Sequence
from typing import Any

from unimrg.data.readers.entries import Broken
from unimrg.data.readers.source import Source
from unimrg.data.readers.tables import read_arrow, read_parquet
from unimrg.data.readers.tars import read_tar
from unimrg.data.readers.text import read_json, read_jsonl
from unimrg.errors import DataError, SampleError
from unimrg.storage import Entry, Store

MOST_SHARDS = 1_000_000
MOST_BYTES = 2 << 30  # that belong together: a batch of an Arrow file
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
LIST_BYTES = 64 << 20


def find_shards(store: Store, manifest: str) -> list[Entry]:
    """The files that a manifest's name stands for, in the order in which they are read.

    Raises DataError when there are none or one is missing, StorageError.
    """
    name = f"{store.url}/{manifest}"
    if RANGE.search(manifest):
        return [_file(store, path) for path in _numbered(manifest)]
    if set("*?") & set(manifest):
        folder = posixpath.dirname(manifest)
        found = [e for e in store.list(folder) if not e.is_folder and fnmatch.fnmatchcase(e.path, manifest)]
        if not found:
            raise DataError(f"no file matches {name}; quote the pattern if the shell has expanded it")
        return found
    there = store.stat(manifest)
    if there is None:
        raise DataError(f"{name} does not exist; name a manifest inside the data folder")
    return _inside(store, manifest) if there.is_folder else [there]


def _numbered(pattern: str) -> Iterator[str]:
    """`a-{08..10}.tar` is a-08.tar, a-09.tar, a-10.tar."""
    found = RANGE.search(pattern)
    if found is None:
        yield pattern
        return
    first, last = found.groups()
    if not 0 <= int(last) - int(first) < MOST_SHARDS:
        raise DataError(f"{pattern}: {found[0]} is no range of up to {MOST_SHARDS} files; write {{000..009}}")
    for number in range(int(first), int(last) + 1):
        yield from _numbered(f"{pattern[: found.start()]}{number:0{len(first)}}{pattern[found.end() :]}")


def _inside(store: Store, folder: str) -> list[Entry]:
    """The files of a data set that is a folder."""
    where = f"{store.url}/{folder}".rstrip("/")
    names = {
        posixpath.relpath(entry.path, folder or "."): entry for entry in store.list(folder, recursive=True)
    }
    if "dataset_dict.json" in names:
        parts = sorted({name.split("/")[0] for name in names if "/" in name})
        raise DataError(f"{where} holds several data sets; name one: {', '.join(parts[:20])}")
    if "state.json" in names:
        return [_file(store, posixpath.join(folder, name)) for name in _listed(store, folder)]
    found = [entry for name, entry in sorted(names.items()) if name.endswith(".parquet")]
    if not found:
        raise DataError(
            f"{where} holds neither Parquet files nor a state.json of save_to_disk; name its files"
        )
    return found


def _listed(store: Store, folder: str) -> list[str]:
    """The names in a state.json. Raises DataError."""
    path = posixpath.join(folder, "state.json")
    try:
        files = json.loads(store.read_bytes(path, LIST_BYTES))["_data_files"]
        names = [str(file["filename"]) for file in files]
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise DataError(f"{store.url}/{path} is not as save_to_disk writes it: {error!r}"[:500]) from error
    if not names or any(name != posixpath.basename(name) or name in ("", ".", "..") for name in names):
        raise DataError(f"{store.url}/{path} names no files beside it; save the data set again")
    return names


def _file(store: Store, path: str) -> Entry:
    found = store.stat(path)
    if found is None or found.is_folder:
        raise DataError(f"{store.url}/{path} is missing; bring it, or leave it out of data.manifest")
    return found


def read_entries(store: Store, shards: Sequence[Entry]) -> Iterator[Any]:
    """Entries one after the other: what JSON gives, Packed, or what is wrong as Malformed or SampleError.

    A shard that breaks off gives one SampleError, and the next shard follows.
    Raises DataError naming the file (and the byte where a JSON list breaks), StorageError.
    """
    for shard in shards:
        try:
            source = Source(store, shard.path, MOST_BYTES)
            try:
                yield from _read(source, shard.path)
            except Broken as error:
                yield SampleError("unreadable-file", f"{source.name}: {error}")
            finally:
                source.close()
        except FileNotFoundError as error:
            raise DataError(f"{error}; it was there when the files were listed") from error


def _read(source: Source, path: str) -> Iterator[Any]:
    start = source.read(1024)
    source.seek(0)
    text = start.removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"PAR1"):
        yield from read_parquet(source, path)
    elif start.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        yield from read_arrow(source, path)
    elif start[257:262] == b"ustar" or path.endswith(".tar"):
        yield from read_tar(source, path)
    elif text.startswith(b"["):
        yield from read_json(source, source.name)
    elif text.startswith(b"{"):
        yield from read_jsonl(source)
    elif start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise Broken("it is compressed; unpack it: pictures are read from the middle of a file")
    else:
        raise Broken("neither a JSON list, nor JSON lines, nor Parquet, nor Arrow, nor a tar (byte 0)")
