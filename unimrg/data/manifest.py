"""Data-set manifests in the LLaVA form: JSON list, JSONL or Parquet, read once into a local index.

    manifest = build_index(Store.at("s3://bucket/data"), "mix665k.json", "~/.cache/unimrg")
    manifest.rows(epoch_order(len(manifest), seed=0, epoch=0)[:32])      # pyarrow.Table, random access

An entry is `{id?, image?, conversations: [{from: human|gpt, value}], depth?, masks?}`, and for evaluation
`{family?, pair?, conflict?}` too. The index is an Arrow file that is memory-mapped: neither building nor
reading it needs memory for the whole data set. A malformed entry becomes a row with `error` and `detail`;
only a manifest that can't be read as a whole raises.
"""

from __future__ import annotations

import codecs
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
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unimrg.errors import DataError, SampleError, StorageError
from unimrg.sample import Conversation, Turn, dump_conversations
from unimrg.storage import Store

CHUNK_BYTES = 4 << 20
LONGEST_ENTRY = 64 << 20  # characters; more is an unclosed bracket or quote, not an entry
BATCH_ROWS = 4096
BATCH_CHARACTERS = 32 << 20
FORMAT = 1  # goes into the index's name: a new layout never reads an old file

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.string()),
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
WHITE = re.compile(r"[ \t\r\n]*")
MARKER = re.compile(r"<image>\n|\n<image>|<image>")


class Malformed(Exception):
    """One entry can't be used; the message says why. Never leaves this module."""


# Order


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `n` samples in one epoch: int64 [n], a permutation.

    Depends on (n, seed, epoch) alone, never on the number of workers. Built from Philox's raw bits, which
    numpy promises to keep, and not from `Generator.permutation`, which may change with numpy: a run resumed
    after an upgrade must go on in the same order.
    """
    key = np.array([seed % 2**64, epoch % 2**64], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")


def pair_name(path: str) -> str:
    """The path of an image or label inside its folder, tidied (`./a//b.jpg` is `a/b.jpg`).

    Raises SampleError("path-outside-folder") for empty names, absolute paths, `..` that climbs out,
    backslashes, URLs, drive letters and control characters: a manifest is data from elsewhere.
    """
    wrong = ""
    if not path or posixpath.normpath(path) == ".":
        wrong = "is empty"
    elif "\\" in path:
        wrong = "holds a backslash"
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", path):
        wrong = "is a URL or has a drive letter"
    elif path.startswith("/"):
        wrong = "is absolute"
    elif ".." in posixpath.normpath(path).split("/"):
        wrong = "climbs out of its folder"
    elif any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in path):
        wrong = "holds control characters"
    if wrong:
        raise SampleError("path-outside-folder", f"{path[:200]!r} {wrong}")
    return posixpath.normpath(path)


# Entries of the three forms


def read_entries(store: Store, manifest: str) -> Iterator[Any]:
    """Entries one after the other, whatever the form; an unreadable line of a JSONL file comes as Malformed.

    The form is told from the content: `PAR1` Parquet, `[` a JSON list, `{` one JSON object a line.
    Raises DataError naming the file (and the byte where JSON breaks), StorageError when it can't be read.
    """
    name = f"{store.url}/{manifest}"
    try:
        with store.open_input(manifest) as file:
            start = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()
            file.seek(0)
            if start.startswith(b"PAR1"):
                yield from read_parquet(file, name)
            elif start.startswith(b"["):
                yield from read_json(file, name)
            elif start.startswith(b"{"):
                yield from read_jsonl(file, name)
            else:
                raise DataError(f"{name}: neither a JSON list, nor JSON lines, nor Parquet (byte 0)")
    except FileNotFoundError as error:
        raise DataError(f"{error}; name a manifest inside the data folder") from error
    except OSError as error:
        raise StorageError(f"can't read {name}: {error}") from error


def read_json(file: BinaryIO | pa.NativeFile, name: str) -> Iterator[Any]:
    """Entries of a JSON list, parsed piece by piece. Raises DataError naming the byte where it breaks."""
    text = _Text(file, name)
    text.skip()
    text.take("[")
    while True:
        text.skip()
        if text.take("]", required=False):
            break
        yield text.value()
        text.skip()
        if not text.take(",", required=False):
            text.take("]")
            break
    text.skip()
    if text.at < len(text.buffer):
        raise text.broken("something follows the list", text.at)


class _Text:
    """A growing window of decoded text: `at` is the place of the parser in `buffer`."""

    def __init__(self, file: BinaryIO | pa.NativeFile, name: str) -> None:
        self.file, self.name = file, name
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.buffer, self.at = "", 0
        self.dropped = 0  # bytes of text no longer in the buffer
        self.decode = json.JSONDecoder().raw_decode

    def value(self) -> Any:
        """The JSON value at `at`, stepping over it; reads on until all of it is there. Raises DataError."""
        while True:
            try:
                value, end = self.decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                # Far from the end of what was read it is a mistake; near it the rest may be yet to come.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.buffer) - 16
                position = error.pos - self.at
                if not (cut and self.more()):
                    raise self.broken(error.msg, self.at + position) from error
            except (ValueError, RecursionError) as error:  # a number or a nesting beyond all sense
                raise self.broken(str(error), self.at) from error
            else:
                length, whole = end - self.at, end + 2 < len(self.buffer)
                if whole or not self.more():  # "1" may become "1.5", "1e" and "1e-" may become "1e-5"
                    self.at += length
                    return value

    def more(self) -> bool:
        """Read on, forgetting what is behind `at`; False at the end of the file."""
        self.dropped += len(self.buffer[: self.at].encode())
        self.buffer, self.at = self.buffer[self.at :], 0
        if len(self.buffer) > LONGEST_ENTRY:
            raise self.broken(f"an entry of more than {LONGEST_ENTRY >> 20} MiB (an unclosed quote?)", 0)
        raw = self.file.read(max(CHUNK_BYTES, len(self.buffer)))  # doubling: long entries stay linear
        try:
            new = self.decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise self.broken(f"not UTF-8: {error.reason}", len(self.buffer), error.start) from error
        self.buffer += new
        return bool(raw)

    def skip(self) -> None:
        """Over white space, so that a character stands at `at` unless the file ends."""
        while True:
            found = WHITE.match(self.buffer, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.buffer) or not self.more():
                return

    def take(self, character: str, required: bool = True) -> bool:
        """Step over `character` when it is next. Raises DataError when it must be and isn't."""
        found = self.buffer.startswith(character, self.at)
        if required and not found:
            raise self.broken(f"expected {character!r}", self.at)
        self.at += found
        return found

    def broken(self, what: str, position: int, more_bytes: int = 0) -> DataError:
        byte = self.dropped + len(self.buffer[:position].encode()) + more_bytes
        return DataError(f"{self.name}: broken JSON at byte {byte}: {what}")


def read_jsonl(file: BinaryIO | pa.NativeFile, name: str) -> Iterator[Any]:
    """Entries of JSON lines. A line that doesn't parse is Malformed; if it is the first, DataError."""
    offset, first = 0, True
    for number, line in enumerate(_lines(file, name)):
        text = line.removeprefix(codecs.BOM_UTF8) if number == 0 else line
        if text.strip():
            try:
                yield json.loads(text)
            except (ValueError, RecursionError) as error:
                at = offset + (getattr(error, "pos", 0) or 0)
                if first:
                    raise DataError(f"{name}: broken JSON at byte {at}: {error}") from error
                yield Malformed(f"line {number + 1}, byte {at}: {error}")
            first = False
        offset += len(line)


def _lines(file: BinaryIO | pa.NativeFile, name: str) -> Iterator[bytes]:
    rest = b""
    while chunk := file.read(max(CHUNK_BYTES, len(rest))):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line + b"\n" for line in lines)
        if len(rest) > LONGEST_ENTRY:
            raise DataError(f"{name}: a line of more than {LONGEST_ENTRY >> 20} MiB; write one entry a line")
    if rest:
        yield rest


def read_parquet(file: BinaryIO | pa.NativeFile, name: str) -> Iterator[Any]:
    """Entries of a Parquet file: the columns of SCHEMA that it has. Raises DataError."""
    try:
        table = pq.ParquetFile(file)
        columns = [c for c in table.schema_arrow.names if c in SCHEMA.names and c not in ("error", "detail")]
        if "conversations" not in columns:
            raise DataError(
                f"{name}: no column 'conversations', only {', '.join(table.schema_arrow.names[:20])}"
            )
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"{name}: broken Parquet: {error}") from error


# One entry -> one row


def parse_entry(entry: Any, index: int) -> dict[str, Any]:
    """A row of SCHEMA from one entry; `index` becomes the id where the entry has none. Never raises."""
    row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
    row |= {"id": str(index), "conversations": "[]"}
    try:
        if isinstance(entry, Malformed):
            raise entry
        if not isinstance(entry, dict):
            raise Malformed(f"an entry must be an object, not {type(entry).__name__}")
        if isinstance(entry.get("id"), str | int):
            row["id"] = _clean(str(entry["id"]))
        for key in ("image", "depth", "masks"):
            row[key] = _path(entry, key)
        for key in ("family", "pair"):
            value = entry.get(key)
            row[key] = None if value is None else _clean(str(value))
        row["conflict"] = entry["conflict"] if isinstance(entry.get("conflict"), bool) else None
        row["conversations"] = dump_conversations((parse_conversation(entry.get("conversations")),))
    except SampleError as error:
        row |= {"error": error.reason, "detail": _clean(error.detail)}
    except Malformed as error:
        row |= {"error": "malformed-conversation", "detail": _clean(str(error))[:500]}
    return row


def _path(entry: dict[str, Any], key: str) -> str | None:
    value = entry.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise Malformed(f"{key!r} must be one path, not {type(value).__name__}")
    return pair_name(value)


def parse_conversation(value: Any) -> Conversation:
    """Turns of `[{from, value}, …]` (or the same as a JSON string), without `<image>` markers.

    Raises Malformed unless human and gpt alternate, starting with human, with no answer empty.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise Malformed(f"conversations: {error}") from error
    if not isinstance(value, list) or not value:
        raise Malformed("conversations must be a list with at least one question and answer")
    if len(value) % 2:
        raise Malformed(f"conversations has {len(value)} messages; each question needs an answer")
    texts = [_message(message, ("human", "gpt")[i % 2], i) for i, message in enumerate(value)]
    return tuple(Turn(q, a) for q, a in zip(texts[::2], texts[1::2], strict=True))


def _message(message: Any, expected: str, i: int) -> str:
    if not isinstance(message, dict) or not isinstance(message.get("value"), str):
        raise Malformed(f"message {i} must be an object with 'from' and a text 'value'")
    role = message.get("from")
    if not isinstance(role, str) or ROLES.get(role) != expected:
        raise Malformed(f"message {i} is from {str(role)[:50]!r}; expected {expected}")
    text = message["value"]
    if text != _clean(text):
        raise Malformed(f"message {i} holds half a Unicode character")
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

    group_by_image: entries naming the same image become one row with several conversations, at the place and
    with the id of the first; depth and masks come from the first that has them. Entries without an image or
    with an error stay single. Evaluation, which needs family, pair and conflict per question, passes False.
    Several processes may build at once: each writes a file of its own and the last rename wins.
    Raises DataError (no manifest, not readable, no entries) and StorageError.
    """
    found = store.stat(manifest)
    if found is None or found.is_folder:
        raise DataError(f"{store.url}/{manifest} does not exist; name a manifest inside the data folder")
    key = repr((FORMAT, store.url, manifest, found.size, found.mtime, group_by_image))
    digest = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
    place = Path(folder).expanduser().absolute()
    target = place / f"{Path(manifest).stem[:60]}-{digest}.arrow"
    if target.exists():
        return Manifest(str(target))
    try:
        place.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{digest}-", dir=place))
        try:
            built = _build(read_entries(store, manifest), work, group_by_image)
            if not len(built):
                raise DataError(f"{store.url}/{manifest} holds no entries")
            os.replace(built.path, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"can't write the index of {manifest} into {place}: {error}") from error
    return Manifest(str(target))


def _build(entries: Iterable[Any], work: Path, group_by_image: bool) -> Manifest:
    images = array("Q")  # one 64-bit hash per row: 8 bytes instead of a path
    seen: set[str] = set()

    def rows() -> Iterator[dict[str, Any]]:
        for index, entry in enumerate(entries):
            row = parse_entry(entry, index)
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
        _write(final, _merged(built, *_grouped(np.frombuffer(images, np.uint64))), schema)
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


def _merged(flat: Manifest, order: np.ndarray, leader: np.ndarray) -> Iterator[dict[str, Any]]:
    """Rows of the grouped index; `order` and `leader` as `_grouped` gives them."""
    group: dict[tuple[str, str], dict[str, Any]] = {}  # by name: two images may share a hash
    current = -1
    for start in range(0, len(order), BATCH_ROWS):
        stop = min(start + BATCH_ROWS, len(order))
        for place, row in zip(range(start, stop), flat.rows(order[start:stop]).to_pylist(), strict=True):
            if leader[place] != current:
                yield from map(_joined, group.values())
                group, current = {}, int(leader[place])
            _merge(group.setdefault((row["image"], row["error"]), {**row, "parts": []}), row)
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
