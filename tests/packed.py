"""Writes small data sets in every form that the readers know."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TALK = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    """A tar of (name, content)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def samples(pictures: Sequence[bytes], first: int = 0, suffix: str = "jpg") -> list[tuple[str, bytes]]:
    """Members of a WebDataset tar, a picture and its entry each."""
    found = []
    for number, picture in enumerate(pictures, first):
        entry = {"conversations": talk(f"q{number}", f"a{number}")}
        found += [(f"{number:06}.{suffix}", picture), (f"{number:06}.json", json.dumps(entry).encode())]
    return found


def table(pictures: Sequence[bytes | None], first: int = 0) -> pa.Table:
    """As `datasets` writes pictures; None: only a path."""
    rows: list[dict[str, Any]] = [
        {
            "id": f"id{number}",
            "image": {"bytes": picture, "path": f"{number}.jpg"},
            "conversations": talk(f"q{number}", f"a{number}"),
        }
        for number, picture in enumerate(pictures, first)
    ]
    kinds = [("id", pa.string()), ("image", IMAGE), ("conversations", TALK)]
    return pa.Table.from_pylist(rows, pa.schema(kinds))


def parquet(content: pa.Table, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(content, out, **options)
    return out.getvalue()


def arrow(content: pa.Table, rows: int = 1000, stream: bool = True, **options: Any) -> bytes:
    """The stream form, which `save_to_disk` writes, or the file form; rows: of a batch."""
    out = io.BytesIO()
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(out, content.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(content, max_chunksize=rows)
    return out.getvalue()


def save_to_disk(folder: Path, shards: Sequence[bytes]) -> None:
    """A folder as `Dataset.save_to_disk` leaves it."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(shards):05}.arrow" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        (folder / name).write_bytes(shard)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
