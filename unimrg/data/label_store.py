"""Labels in object storage: written once, read by every run.

    <labels.store>/<data set>-<digest>/<teachers>-<digest>/
        store.json                          schema version and key: what these labels are of and by whom
        labels/part-000000.parquet          picture (or not), depth map and boundaries of rows 0..shard_rows-1
        quarantine/part-000000.jsonl        the unusable rows of that part with their reasons, if any
        codes/<family>-<digest>/part-000000.parquet    the same rows as a frozen picture encoder sees them

Part n always holds the same rows in the same order, whoever writes it and when: a part is visible only when
it is complete (an atomic write), so the list of names says what is done, and doing it again changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unimrg.data.manifest import Manifest
from unimrg.errors import DataError, StorageError
from unimrg.storage import Store

VERSION = 1
KEY = "store.json"
PART = re.compile(r"part-(\d{6,})\.parquet")
READ_THREADS = 8
RECENT_PARTS = 32  # the rate is theirs

LABELS = pa.schema(
    [
        ("row", pa.int64()),
        ("image", pa.binary()),  # as found; null: fetched from the data set when it is needed, or text only
        ("height", pa.int32()),  # of the maps; null without a picture
        ("width", pa.int32()),
        ("depth", pa.binary()),  # PNG, 8 bits
        ("segmentation", pa.binary()),  # PNG, 1 bit
        ("error", pa.string()),  # null, or one of SampleError.REASONS
        ("detail", pa.string()),
    ]
)
CODES = pa.schema(
    [
        ("row", pa.int64()),
        ("side", pa.int32()),
        ("valid", pa.list_(pa.int32())),
        ("image_codes", pa.binary()),
        ("pixel_codes", pa.binary()),  # null where the target is the picture itself
        ("depth_codes", pa.binary()),
        ("segmentation_codes", pa.binary()),
        ("codes_shape", pa.list_(pa.int32())),
        ("codes_dtype", pa.string()),
        ("error", pa.string()),
        ("detail", pa.string()),
    ]
)


def digest(value: Any) -> str:
    """Twelve hexadecimal digits of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def dataset_key(name: str, images: str, manifest: Manifest) -> dict[str, Any]:
    """What labels are of: the pictures of a manifest in their order; questions may change.

    name: of the data set, for people. images: where the pictures lie.
    """
    names = hashlib.sha256()
    for batch in manifest.iter_batches():
        for column in ("image", "place"):
            if column in batch.schema.names:
                names.update("\0".join(name or "" for name in batch.column(column).to_pylist()).encode())
    return {"name": name, "images": images, "rows": len(manifest), "names": names.hexdigest()}


class Parts:
    """Numbered Parquet files of one folder, and what is wrong with their rows beside them."""

    def __init__(self, store: Store, schema: pa.Schema) -> None:
        self.store = store
        self.schema = schema

    def done(self) -> set[int]:
        """Numbers of the parts that are there. Raises StorageError."""
        return {number for number, _ in self.listed()}

    def listed(self) -> list[tuple[int, float]]:
        """(number, time of writing in seconds since 1970) of every part. Raises StorageError."""
        found = ((PART.fullmatch(entry.path), entry) for entry in self.store.list())
        return [(int(match[1]), entry.mtime or 0.0) for match, entry in found if match]

    def is_done(self, number: int) -> bool:
        return self.store.exists(part_name(number))

    def write(self, number: int, table: pa.Table) -> None:
        """Store a part, whole or not at all. Raises StorageError."""
        sink = pa.BufferOutputStream()
        columns = [f.name for f in self.schema if f.type != pa.binary()]
        pq.write_table(
            table.select(self.schema.names).cast(self.schema),
            sink,
            # Pictures, maps and latents are compressed already, or noise.
            compression={f.name: "zstd" if f.name in columns else "none" for f in self.schema},
            use_dictionary=[name for name in columns if name != "row"],
            write_page_checksum=True,
        )
        self.store.write_bytes(part_name(number), sink.getvalue().to_pybytes())

    def read(self, number: int, columns: Iterable[str] | None = None) -> pa.Table:
        """A part, or some of its columns.

        Raises FileNotFoundError, StorageError, and DataError when it is damaged.
        """
        wanted = None if columns is None else list(columns)
        name = part_name(number)
        try:
            return self._parse(name, wanted)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
        try:  # what came may have been damaged on its way
            return self._parse(name, wanted)
        except (pa.ArrowException, OSError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise DataError(
                f"{self.store.url}/{name} is damaged ({first[:200]}); delete it and run the command again"
            ) from error

    def _parse(self, name: str, columns: list[str] | None) -> pa.Table:
        raw = pa.BufferReader(self.store.read_bytes(name))
        return pq.read_table(raw, columns=columns, use_threads=False, page_checksum_verification=True)


@dataclass(frozen=True)
class Status:
    """How far a store is. rate: rows a second over the last parts, None if unknown; idle: seconds since the
    last part was written; left: seconds at that rate; reasons: quarantined rows by reason."""

    rows: int
    rows_done: int
    parts: int
    parts_done: int
    rate: float | None
    idle: float | None
    left: float | None
    reasons: dict[str, int]
    codes: dict[str, int]


class LabelStore:
    """The labels of one data set by one pair of teachers. Made by `create` and `find`."""

    def __init__(self, store: Store, key: dict[str, Any]) -> None:
        self.store = store
        self.key = key
        self.labels = Parts(store.child("labels"), LABELS)

    @property
    def shard_rows(self) -> int:
        """Rows of every part but the last."""
        return int(self.key["shard_rows"])

    @property
    def rows(self) -> int:
        return int(self.key["dataset"]["rows"])

    @property
    def parts(self) -> int:
        return -(-self.rows // self.shard_rows)

    def rows_of(self, part: int) -> range:
        """The manifest rows of a part."""
        return range(part * self.shard_rows, min((part + 1) * self.shard_rows, self.rows))

    def codes(self, identity: dict[str, Any]) -> Parts:
        """What a frozen picture encoder (and the geometry it saw) made of these labels."""
        return Parts(self.store.child(f"codes/{identity['family']}-{digest(identity)}"), CODES)

    @classmethod
    def create(cls, root: Store, key: dict[str, Any]) -> LabelStore:
        """The store of a key, made when it isn't there. Raises StorageError, DataError (another version)."""
        teachers = "-".join(key["teachers"][name]["name"] for name in ("depth", "segmentation"))
        folder = root.child(f"{_dataset_folder(key['dataset'])}/{teachers}-{digest(_essence(key))}")
        there = _read_key(folder)
        if there is None:
            folder.write_bytes(KEY, json.dumps({"version": VERSION} | key, indent=1, sort_keys=True).encode())
            return cls(folder, key)
        return cls(folder, there)

    @classmethod
    def find(cls, root: Store, key: dict[str, Any]) -> LabelStore:
        """The store made with the same settings (`key` without the teachers' identities), whoever wrote it.

        Raises DataError when there is none, or when several differ in nothing but the teachers' weights.
        """
        where = root.child(_dataset_folder(key["dataset"]))
        stores = [cls(where.child(e.path), k) for e in where.list() if (k := _read_key(where.child(e.path)))]
        fitting = [s for s in stores if all(s.key[name] == key[name] for name in ("asked", "limits"))]
        fitting = [s for s in fitting if s.shard_rows == key["shard_rows"]]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise DataError(
                f"{where.url} holds {len(fitting)} label stores of these teachers with different weights; "
                f"delete all but one, or use labels.mode=streaming, which knows its teachers' weights"
            )
        others = ", ".join(s.store.url.rsplit("/", 1)[-1] for s in stores) or "none"
        raise DataError(
            f"{where.url} holds no labels by these teachers with these settings (there: {others}); run "
            f"unimrg.label with the same data and teachers, or use labels.mode=streaming"
        )

    def quarantine(self, part: int, rows: list[dict[str, Any]]) -> None:
        """Tell what is wrong with rows of a part; before the part itself is written."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.store.write_bytes(f"quarantine/part-{part:06d}.jsonl", lines.encode())

    def quarantined(self) -> list[dict[str, Any]]:
        """All unusable rows: row, image, reason, detail. Raises StorageError."""
        names = [entry.path for entry in self.store.list("quarantine")]
        with ThreadPoolExecutor(READ_THREADS) as pool:
            texts = list(pool.map(self.store.read_bytes, names))
        return [json.loads(line) for text in texts for line in text.decode().splitlines()]

    def status(self) -> Status:
        """How far it is, from the names and times of what is there. Raises StorageError."""
        listed = sorted(self.labels.listed(), key=lambda found: found[1])
        done = {number for number, _ in listed}
        rows_done = sum(len(self.rows_of(number)) for number in done if number < self.parts)
        recent = listed[-RECENT_PARTS:]
        seconds = recent[-1][1] - recent[0][1] if len(recent) > 1 else 0.0
        # The first of them was begun before the first time known.
        rate = sum(len(self.rows_of(n)) for n, _ in recent[1:]) / seconds if seconds > 0 else None
        folders = [e.path.rsplit("/", 1)[-1] for e in self.store.list("codes") if e.is_folder]
        return Status(
            rows=self.rows,
            rows_done=rows_done,
            parts=self.parts,
            parts_done=len(done),
            rate=rate,
            idle=max(0.0, time.time() - listed[-1][1]) if listed else None,
            left=(self.rows - rows_done) / rate if rate else None,
            reasons=dict(Counter(row["reason"] for row in self.quarantined()).most_common()),
            codes={n: len(Parts(self.store.child(f"codes/{n}"), CODES).done()) for n in folders},
        )


def find_all(root: Store) -> list[LabelStore]:
    """Every label store below `root`. Raises StorageError."""
    return [
        LabelStore(folder, key)
        for dataset in root.list()
        if dataset.is_folder
        for teachers in root.child(dataset.path).list()
        if teachers.is_folder
        and (key := _read_key(folder := root.child(dataset.path).child(teachers.path.rsplit("/", 1)[-1])))
    ]


def part_name(number: int) -> str:
    return f"part-{number:06d}.parquet"


def _dataset_folder(dataset: dict[str, Any]) -> str:
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", dataset["name"]).strip("-.")[:60]
    return f"{plain or 'data'}-{digest(dataset)}"


def _essence(key: dict[str, Any]) -> dict[str, Any]:
    """What the labels depend on: not the words by which the teachers were asked for."""
    return {name: key[name] for name in ("dataset", "teachers", "limits", "shard_rows")}


def _read_key(folder: Store) -> dict[str, Any] | None:
    try:
        key = json.loads(folder.read_bytes(KEY))
        version = int(key.pop("version"))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder.url}/{KEY} is no label store's key ({error}); delete the folder") from error
    if version > VERSION:
        raise DataError(
            f"{folder.url} was written by a newer unimrg (schema {version}, this one reads {VERSION}); "
            f"upgrade, or label into another labels.store"
        )
    return dict(key)


__all__ = ["CODES", "LABELS", "LabelStore", "Parts", "Status", "StorageError", "dataset_key", "find_all"]
