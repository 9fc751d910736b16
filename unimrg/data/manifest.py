"""Data sets in the LLaVA form, whatever file holds them, read once into a local index.

    manifest = build_index(Store.at("s3://bucket/data"), "mix665k.json", "~/.cache/unimrg")
    manifest.rows([7, 3, 7])      # pyarrow.Table, random access

An entry is `{id?, image?, conversations: [{from: human|gpt, value}], depth?, masks?}`, and for evaluation
`{family?, pair?, conflict?}` too; see `unimrg.data.readers` for the files. The index is an Arrow file that
is memory-mapped: neither building nor reading it needs memory for the whole data set. A malformed entry
becomes a row with `error` and `detail`, and so does what is missing of a damaged file; only a data set that
can't be read as a whole raises.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from unimrg.data.readers import find_shards, read_entries
from unimrg.data.readers.entries import Malformed, Packed
from unimrg.errors import DataError, SampleError, StorageError
from unimrg.sample import Conversation, Turn, dump_conversations
from unimrg.storage import Store

BATCH_ROWS = 4096
BATCH_CHARACTERS = 32 << 20
LONGEST_NAME = 1024  # characters of an id or a path: what an object's key may have
LONGEST_ROW = 4 << 20  # characters of conversations about one picture; more become another row
LONGEST_TALK = 1 << 20  # characters of one conversation, more than any model's context
MOST_UNPACKED = 200  # texts may be so many times as large as their files: packed, but no bomb
SMALL = 64 << 20  # characters that are always fine
FORMAT = 3  # goes into the index's name: a new layout never reads an old file

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.string()),  # path, or a name unique in the data set where `place` is set
        ("place", pa.string()),  # null: the file `image`; else see pictures.py
        ("conversations", pa.string()),  # JSON, see sample.dump_conversations; "[]" when error is set
        ("depth", pa.string()),
        ("masks", pa.string()),
        ("family", pa.string()),
        ("pair", pa.string()),
        ("conflict", pa.bool_()),
        ("error", pa.string()),  # null, or one of SampleError.REASONS
        ("detail", pa.string()),
    ]
)
EVALUATION = ("family", "pair", "conflict")

ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
CONTROL = re.compile(r"[\x00-\x1f\ud800-\udfff]")
MARKER = re.compile(r"<image>\n|\n<image>|<image>")


def pair_name(path: str) -> str:
    """The path of an image or label inside its folder, tidied (`./a//b.jpg` is `a/b.jpg`).

    Raises SampleError("path-outside-folder") for empty names, absolute paths, `..` that climbs out,
    backslashes, URLs, drive letters and control characters: a manifest is data from elsewhere.
    """
    wrong = ""
    if not path or posixpath.normpath(path) == ".":
        wrong = "is empty"
    elif len(path) > LONGEST_NAME:
        wrong = f"has more than {LONGEST_NAME} characters"
    elif "\\" in path:
        wrong = "holds a backslash"
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", path):
        wrong = "is a URL or has a drive letter"
    elif path.startswith("/"):
        wrong = "is absolute"
    elif ".." in posixpath.normpath(path).split("/"):
        wrong = "climbs out of its folder"
    elif CONTROL.search(path):
        wrong = "holds control characters"
    if wrong:
        raise SampleError("path-outside-folder", f"{path[:200]!r} {wrong}")
    return posixpath.normpath(path)


# One entry -> one row


def parse_entry(entry: Any, index: int) -> dict[str, Any]:
    """A row of SCHEMA from one of `read_entries`; `index` becomes the id where it has none. Never raises."""
    row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
    row |= {"id": str(index), "conversations": "[]"}
    try:
        if isinstance(entry, Packed):
            row |= {"image": pair_name(entry.image), "place": entry.place}
            entry = {**entry.value, "image": row["image"]} if isinstance(entry.value, dict) else entry.value
        if isinstance(entry, Malformed | SampleError):
            raise entry
        if not isinstance(entry, dict):
            raise Malformed(f"an entry must be an object, not {type(entry).__name__}")
        row["id"] = _name(entry, "id") or row["id"]
        for key in ("image", "depth", "masks"):
            row[key] = _path(entry, key)
        for key in ("family", "pair"):
            row[key] = _name(entry, key)
        row["conflict"] = entry["conflict"] if isinstance(entry.get("conflict"), bool) else None
        row["conversations"] = dump_conversations((parse_conversation(entry.get("conversations")),))
    except SampleError as error:
        row |= {"error": error.reason, "detail": _clean(error.detail)[:500]}
    except Malformed as error:
        row |= {"error": "malformed-conversation", "detail": _clean(str(error))[:500]}
    return row


def _name(entry: dict[str, Any], key: str) -> str | None:
    """A text or number as text, anything else as None. Raises Malformed."""
    value = entry.get(key)
    if not isinstance(value, str | int | float):
        return None
    if len(text := _clean(str(value))) > LONGEST_NAME:
        raise Malformed(f"{key!r} has more than {LONGEST_NAME} characters")
    return text


def _path(entry: dict[str, Any], key: str) -> str | None:
    value = entry.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise Malformed(f"{key!r} must be one path, not {type(value).__name__}")
    return pair_name(value)


def parse_conversation(value: Any) -> Conversation:
    """Turns of `[{from, value}, …]`, without `<image>` markers.

    The same as a JSON string will do, or `{from: […], value: […]}`, which `datasets` makes of a Sequence.

    Raises Malformed unless human and gpt alternate, starting with human, with no answer empty.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise Malformed(f"conversations: {error}") from error
    if isinstance(value, dict) and all(isinstance(value.get(key), list) for key in ("from", "value")):
        value = [{"from": who, "value": text} for who, text in zip_longest(value["from"], value["value"])]
    if not isinstance(value, list) or not value:
        raise Malformed("conversations must be a list with at least one question and answer")
    if len(value) % 2:
        raise Malformed(f"conversations has {len(value)} messages; each question needs an answer")
    texts = [_message(message, ("human", "gpt")[i % 2], i) for i, message in enumerate(value)]
    if (length := sum(map(len, texts))) > LONGEST_TALK:
        raise Malformed(f"the conversation has {length} characters, at most {LONGEST_TALK}")
    return tuple(Turn(q, a) for q, a in zip(texts[::2], texts[1::2], strict=True))


def _message(message: Any, expected: str, i: int) -> str:
    if not isinstance(message, dict) or not isinstance(message.get("value"), str):
        raise Malformed(f"message {i} must be an object with 'from' and a text 'value'")
    role = message.get("from")
    if not isinstance(role, str) or ROLES.get(role) != expected:
        raise Malformed(f"message {i} is from {str(role)[:50]!r}; expected {expected}")
    text = message["value"]
    if text != _clean(text):
        raise Malformed(f"message {i} is not UTF-8, or holds half a Unicode character")
    if "<image>" in text:
        text = MARKER.sub("", text).strip()
    if expected == "gpt" and not text.strip():
        raise Malformed(f"message {i}: the answer is empty")
    return text


def _clean(text: str) -> str:
    """Without lone surrogates, which JSON can spell and Arrow can't hold."""
    return text.encode("utf-8", "replace").decode()


# The index


@dataclass(frozen=True)
class Manifest:
    """A built index. Pickles as its path; the file is mapped on first use.

    Columns: SCHEMA, with family, pair and conflict only where the data set has them.
    """

    path: str

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def schema(self) -> pa.Schema:
        return self._reader.schema

    def rows(self, indices: Sequence[int] | np.ndarray) -> pa.Table:
        """The rows at `indices`, in that order, repeats allowed. Raises IndexError."""
        wanted = np.asarray(indices, np.int64).reshape(-1)
        if not len(wanted):
            return self.schema.empty_table()
        if wanted.min() < 0 or wanted.max() >= len(self):
            raise IndexError(f"rows {wanted.min()}..{wanted.max()} of a manifest of {len(self)}")
        batch_of = np.searchsorted(self._starts, wanted, side="right") - 1
        by_batch = np.argsort(batch_of, kind="stable")
        # Batch by batch: `Table.take` would first copy all batches into one.
        parts = []
        for batch in np.unique(batch_of):
            inside = wanted[by_batch][batch_of[by_batch] == batch] - self._starts[batch]
            parts.append(self._reader.get_batch(int(batch)).take(pa.array(inside)))
        table = pa.Table.from_batches(parts, self.schema).combine_chunks()
        back = np.empty_like(by_batch)
        back[by_batch] = np.arange(len(by_batch))
        return table.take(pa.array(back))

    def iter_batches(self) -> Iterator[pa.RecordBatch]:
        """All rows in order, zero-copy."""
        for i in range(self._reader.num_record_batches):
            yield self._reader.get_batch(i)

    def __getstate__(self) -> dict[str, str]:
        return {"path": self.path}

    @cached_property
    def _reader(self) -> pa.ipc.RecordBatchFileReader:
        try:
            return pa.ipc.open_file(pa.memory_map(self.path))
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"the index {self.path} can't be read ({error}); delete it, it will be rebuilt"
            ) from error

    @cached_property
    def _starts(self) -> np.ndarray:
        """int64 [batches + 1]: the first row of each batch, and the number of rows."""
        return np.cumsum([0, *(batch.num_rows for batch in self.iter_batches())], dtype=np.int64)


def build_index(
    store: Store, manifest: str, folder: str | os.PathLike[str], group_by_image: bool = True
) -> Manifest:
    """The index of a manifest under the local `folder`; built when there is none for its present content.

    manifest: a file, a folder or a pattern of files in the store, see `unimrg.data.readers`.
    group_by_image: entries naming the same image become one row with several conversations, at the place and
    with the id of the first; depth and masks come from the first that has them. Entries without an image or
    with an error stay single. Evaluation, which needs family, pair and conflict per question, passes False.
    Several processes may build at once: each writes a file of its own and the last rename wins.
    Raises DataError (no manifest, not readable, no entries) and StorageError.
    """
    shards = find_shards(store, manifest)
    name = f"{store.url}/{manifest}".rstrip("/")
    found = [(shard.path, shard.size, shard.mtime) for shard in shards]
    key = repr((FORMAT, store.url, manifest, found, group_by_image))
    digest = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
    place = Path(folder).expanduser().absolute()
    target = place / f"{re.sub('[^A-Za-z0-9._-]', '_', Path(name).stem)[:60]}-{digest}.arrow"
    if target.exists():
        return Manifest(str(target))
    try:
        place.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{digest}-", dir=place))
        try:
            entries = _readable(read_entries(store, shards), name)
            most = MOST_UNPACKED * sum(shard.size or 0 for shard in shards) + SMALL
            built = _build(entries, work, group_by_image, most)
            os.replace(built.path, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"can't write the index of {manifest} into {place}: {error}") from error
    return Manifest(str(target))


def _readable(entries: Iterable[Any], name: str) -> Iterator[Any]:
    """The same entries. Raises DataError at their end if there are none, or none could be read at all."""
    first: Exception | None = None
    good = False
    for entry in entries:
        if not good and isinstance(entry, Malformed | SampleError):
            first = first or entry
        else:
            good = True
        yield entry
    if not good:
        detail = first.detail if isinstance(first, SampleError) else f"no entry can be read: {first}"
        raise DataError(f"{name} holds no entries" if first is None else f"{name}: {detail}")


def _build(entries: Iterable[Any], work: Path, group_by_image: bool, most: int) -> Manifest:
    """The index in `work`. Raises DataError when it has more than `most` characters of conversations."""
    images = array("Q")  # one 64-bit hash per row: 8 bytes instead of a path
    seen: set[str] = set()
    characters = longest = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal characters, longest
        for index, entry in enumerate(entries):
            row = parse_entry(entry, index)
            characters += len(row["conversations"])
            longest = max(longest, len(row["conversations"]))
            if characters > most:
                raise DataError(
                    f"the data set unpacks to more than {MOST_UNPACKED} times its size by entry {index}; "
                    "look whether that is meant, and write its texts less packed"
                )
            single = row["image"] is None or row["error"] is not None
            images.append(_hash(f"row {index}" if single else f"image {row['image']}"))
            seen.update(name for name in EVALUATION if row[name] is not None)
            yield row

    flat = work / "flat.arrow"
    _write(flat, rows(), SCHEMA)
    built = Manifest(str(flat))
    absent = set(EVALUATION) - seen
    if not group_by_image and not absent:
        return built
    schema = pa.schema([field for field in SCHEMA if field.name not in absent])
    final = work / "final.arrow"
    if group_by_image:
        step = max(1, min(BATCH_ROWS, BATCH_CHARACTERS // max(longest, 1)))
        _write(final, _merged(built, *_grouped(np.frombuffer(images, np.uint64)), step), schema)
    else:
        with pa.OSFile(str(final), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in built.iter_batches():
                writer.write_batch(batch.select(schema.names))
    return Manifest(str(final))


def _grouped(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(order, leader): rows so that equal hashes are neighbours, groups at the place of their first row.

    order: int64 [n], a permutation; leader: int64 [n], for each place of `order` the first row of its group.
    """
    _, first, inverse = np.unique(images, return_index=True, return_inverse=True)
    leader = first[inverse]
    order = np.argsort(leader, kind="stable")
    return order, leader[order]


def _merged(flat: Manifest, order: np.ndarray, leader: np.ndarray, step: int) -> Iterator[dict[str, Any]]:
    """Rows of the grouped index; `order` and `leader` as `_grouped` gives them, `step` rows read at a time.

    A second picture of a name gets an error: what is stored for one would be taken for the other.
    """
    group: dict[tuple[str, str], dict[str, Any]] = {}  # by name: two images may share a hash
    current = -1
    for start in range(0, len(order), step):
        stop = min(start + step, len(order))
        for place, row in zip(range(start, stop), flat.rows(order[start:stop]).to_pylist(), strict=True):
            if leader[place] != current:
                yield from map(_joined, group.values())
                group, current = {}, int(leader[place])
            key = (row["image"], row["error"])
            into = group.setdefault(key, {**row, "parts": []})
            if into["place"] == row["place"]:
                if sum(map(len, into["parts"])) > LONGEST_ROW:
                    yield _joined(into)
                    into = group[key] = {**row, "parts": []}
                _merge(into, row)
            else:
                taken = f"{row['image'][:200]} names two pictures; members of a tar need names of their own"
                yield {**row, "conversations": "[]", "error": "unreadable-file", "detail": taken}
    yield from map(_joined, group.values())


def _merge(into: dict[str, Any], row: dict[str, Any]) -> None:
    into["parts"].append(row["conversations"][1:-1])
    for name in ("depth", "masks", *EVALUATION):
        if into[name] is None:
            into[name] = row[name]


def _joined(row: dict[str, Any]) -> dict[str, Any]:
    """Conversations joined as text, in the form `dump_conversations` gives."""
    parts = row.pop("parts")
    return {**row, "conversations": f"[{', '.join(parts)}]"}


def _write(path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> None:
    """An uncompressed Arrow file, batch by batch; uncompressed, so that mapped pages are the data."""
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    held = characters = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for row in rows:
            for name, column in columns.items():
                column.append(row[name])
            held, characters = held + 1, characters + len(row["conversations"])
            if held == BATCH_ROWS or characters > BATCH_CHARACTERS:
                writer.write_batch(pa.RecordBatch.from_pydict(columns, schema))
                columns = {name: [] for name in schema.names}
                held = characters = 0
        if held:
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
