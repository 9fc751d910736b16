"""The stages from a manifest row to a `Sample`, as plain callables over Arrow tables.

    labelling    manifest rows ─► Fetch ─► Teach(depth) ─► Teach(segmentation) ─► Keep ─► label store
                 label store ─► Unpack ─► Encode ─► label store (frozen codes)
    training     label store ─► Prepare (Unpack, Render) ─► samples
                 manifest rows ─► Draw (Fetch, Render) ─► samples   (maps that need no model)

Each takes and returns a pyarrow.Table and never raises for a bad sample: the row gets `error` (one of
`SampleError.REASONS`) and `detail`, later stages pass it on untouched. Pictures and maps travel as raw bytes
beside their height and width, so that nothing but plain Arrow types crosses a process border.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from PIL import Image

from unimrg.config import DataConfig
from unimrg.data.decode import decode_image, decode_label, decode_map, decode_masks
from unimrg.data.geometry import render_sample
from unimrg.data.label_store import CODES, LABELS
from unimrg.data.manifest import pair_name
from unimrg.data.pictures import Pictures
from unimrg.errors import SampleError
from unimrg.sample import IMAGE_TASKS, PICTURES, Labels, Record, Sample, Task, load_conversations
from unimrg.storage import Store
from unimrg.teachers import Teacher

MAPS = ("depth", "segmentation")
READ_THREADS = 8
READ_AHEAD = 2 * READ_THREADS  # rows

FETCHED = pa.schema(
    [
        ("id", pa.string()),
        ("position", pa.int64()),
        ("conversations", pa.string()),
        ("error", pa.string()),
        ("detail", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("image", pa.binary()),
        ("depth", pa.binary()),
        ("segmentation", pa.binary()),
        ("encoded", pa.binary()),  # the picture as it was found, where it is to be kept
        ("part", pa.int64()),  # of the label store, while labelling
    ]
)
SAMPLES = pa.schema(
    [
        ("id", pa.string()),
        ("position", pa.int64()),
        ("conversations", pa.string()),
        ("error", pa.string()),
        ("detail", pa.string()),
        ("side", pa.int32()),
        ("valid", pa.list_(pa.int32())),
        ("image", pa.binary()),
        *((task.value, pa.binary()) for task in IMAGE_TASKS),
        *((f"{name}_codes", pa.binary()) for name in PICTURES),
        ("codes_shape", pa.list_(pa.int32())),
        ("codes_dtype", pa.string()),
    ]
)

CODE_COLUMNS = tuple(n for n in CODES.names if n.endswith("_codes") or n.startswith("codes_"))
STORED = pa.schema(
    [
        ("id", pa.string()),
        ("position", pa.int64()),
        ("source", pa.int64()),
        ("conversations", pa.string()),
        ("image", pa.string()),  # its name; the bytes, where the store holds them, are `encoded`
        ("place", pa.string()),
        ("encoded", pa.binary()),
        *(f for f in LABELS if f.name not in ("row", "image")),
        *(f for f in CODES if f.name not in ("row", "error", "detail")),
    ]
)

Row = dict[str, Any]
Files = dict[str, bytes]

PADDING = "padding"
"""The `error` of rows that only fill up a part of the label store, so that all have one size on the way."""

CARRIED = ("id", "position", "conversations", "error", "detail", "part")
"""What every stage passes on."""


@dataclass(frozen=True)
class Sources:
    """Where a data set's files lie, and which maps are read instead of made.

    images: root of the manifest's paths. stored: a folder of maps, one file a picture. depth, segmentation:
    "oracle" (the data set's own), "stored", or another teacher's name, which means that a later stage makes
    them; "" = not wanted.
    """

    images: Store
    depth: str = ""
    segmentation: str = ""
    stored: Store | None = None


class Fetch:
    """Manifest rows (plus `position`) to decoded pictures and the maps that need no model.

    sources: one, or one for each value of the column `source`. keep: also pass on the files as found.
    """

    def __init__(self, sources: Sources | Sequence[Sources], limits: DataConfig, keep: bool = False) -> None:
        self.sources = [sources] if isinstance(sources, Sources) else list(sources)
        self.pictures = [Pictures(one.images) for one in self.sources]
        self.stored = [
            {name: Pictures(one.stored.child(name)) for name in MAPS} if one.stored else {}
            for one in self.sources
        ]
        self.limits = limits
        self.keep = keep

    def __call__(self, table: pa.Table) -> pa.Table:
        return _each(self.read, self.decode, table, FETCHED)

    def read(self, row: Row) -> Files:
        """The picture of a row and its maps as they are stored, by column. Raises SampleError."""
        if row.get("error") or row["image"] is None:
            return {}
        source = row.get("source") or 0
        files = {"image": self.pictures[source].read(row["image"], row.get("place"), self.limits.max_bytes)}
        for name, column in zip(MAPS, ("depth", "masks"), strict=True):
            teacher = getattr(self.sources[source], name)
            if teacher == "stored":
                files[name] = self._stored(name, row["image"], source)
            elif teacher == "oracle":
                if not row.get(column):
                    raise SampleError("missing-label", f"the manifest names no {column} file for this image")
                files[name] = self.pictures[source].read(row[column], None, self.limits.max_bytes)
        return files

    def decode(self, row: Row, files: Callable[[], Files]) -> Row:
        """A row and what `read` gives for it as a row of FETCHED."""
        fetched = {name: row.get(name) for name in CARRIED}
        if fetched["error"]:
            return fetched
        return _guarded(fetched, lambda: self._decode(files(), row.get("source") or 0))

    def _decode(self, files: Files, source: int) -> Row:
        if not files:
            return {}
        image = decode_picture(files["image"], self.limits)
        height, width = image.shape[:2]
        maps = {name: self._map(name, files[name], (height, width), source) for name in MAPS if name in files}
        return {
            "height": height,
            "width": width,
            "image": image.tobytes(),
            "encoded": files["image"] if self.keep else None,
            **{name: values.tobytes() for name, values in maps.items()},
        }

    def _map(self, name: str, raw: bytes, shape: tuple[int, int], source: int) -> np.ndarray:
        if getattr(self.sources[source], name) == "stored":
            return _fit(_decode_grey(raw), shape)
        # Not at the top: it needs torch, whose import is most of what starting a reader takes.
        from unimrg.teachers.oracle import oracle_depth, oracle_segmentation

        if name == "depth":
            return oracle_depth(_fit(decode_map(raw), shape))
        return oracle_segmentation(_fit(decode_masks(raw), shape))

    def _stored(self, name: str, image: str, source: int) -> bytes:
        """The map file, under our name or one of the published scripts'."""
        folder = self.stored[source][name]
        for path in (stored_name(image), *_published_names(pair_name(image))):
            try:
                return folder.read(path, None, self.limits.max_bytes)
            except SampleError as error:
                if error.reason != "missing-file":
                    raise
        raise SampleError("missing-label", f"{name}/{stored_name(image)}")


class Teach:
    """One teacher over fetched rows: fills `depth` or `segmentation`.

    make: builds the teacher; called once, in the process that runs the stage.
    """

    def __init__(self, name: str, make: Callable[[], Teacher]) -> None:
        self.name = name
        self.teacher = make()

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        wanted = [row for row in rows if not row["error"] and row["image"] is not None]
        images = [np.frombuffer(r["image"], np.uint8).reshape(r["height"], r["width"], 3) for r in wanted]
        for row, result in zip(wanted, self.teacher(images) if images else [], strict=True):
            if isinstance(result, SampleError):
                _quarantine(row, result)
            else:
                row[self.name] = result.tobytes()
        return pa.Table.from_pylist(rows, schema=FETCHED)


KEPT = pa.schema([("part", pa.int64()), ("id", pa.string()), *LABELS])
CODED = pa.schema([("part", pa.int64()), ("id", pa.string()), *CODES])


class Keep:
    """Labelled rows to rows of the label store (`LABELS`) with the part and the id that they belong to.

    embed: keep the picture itself, not only its maps.
    """

    def __init__(self, embed: bool) -> None:
        self.embed = embed

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._row(row) for row in table.to_pylist()], schema=KEPT)

    def _row(self, row: Row) -> Row:
        kept = {"row": row["position"], **{name: row[name] for name in ("part", "id", "error", "detail")}}
        if row["error"] or row["image"] is None:
            return kept
        shape = (row["height"], row["width"])
        kept |= {"height": shape[0], "width": shape[1], "image": row["encoded"] if self.embed else None}
        for name in MAPS:
            if row[name] is not None:
                kept[name] = _png(np.frombuffer(row[name], np.uint8).reshape(shape))
        return kept


class Unpack:
    """Rows of the label store, joined to the manifest's (`STORED`), to what `Fetch` and `Teach` gave.

    maps: those that are wanted. Pictures that the store doesn't hold are fetched from where they lie.
    """

    def __init__(self, images: Sequence[Store], limits: DataConfig, maps: Sequence[str] = MAPS) -> None:
        self.pictures = [Pictures(store) for store in images]
        self.limits = limits
        self.maps = tuple(maps)

    def __call__(self, table: pa.Table) -> pa.Table:
        return _each(self.read, self.decode, table, FETCHED)

    def read(self, row: Row) -> Files:
        """The picture of a row. Raises SampleError."""
        if row.get("error") or row["height"] is None:
            return {}
        raw = row["encoded"]
        if raw is None:
            raw = self.pictures[row["source"]].read(row["image"], row["place"], self.limits.max_bytes)
        return {"image": raw}

    def decode(self, row: Row, files: Callable[[], Files]) -> Row:
        """A row of STORED and what `read` gives for it as a row of FETCHED."""
        fetched = {name: row.get(name) for name in CARRIED}
        if fetched["error"] or row["height"] is None:
            return fetched
        return _guarded(fetched, lambda: self._decode(row, files()["image"]))

    def _decode(self, row: Row, raw: bytes) -> Row:
        image = decode_picture(raw, self.limits)
        if image.shape[:2] != (row["height"], row["width"]):
            found = (
                f"{image.shape[1]} x {image.shape[0]} pixels, labelled as {row['width']} x {row['height']}"
            )
            raise SampleError("missing-label", f"{row['image']} has changed: {found}")
        maps = {name: _grey(row[name]).tobytes() for name in self.maps if row[name] is not None}
        return {"height": row["height"], "width": row["width"], "image": image.tobytes(), **maps}


class PictureEncoder(Protocol):
    """The frozen part of a family that turns rendered pictures into latents or codes.

    identity: everything its output depends on. side: of the pictures it takes, pixels. reads_pixels: does the
    family look at the picture itself too?
    """

    identity: dict[str, Any]
    side: int
    reads_pixels: bool

    def __call__(self, pictures: np.ndarray) -> np.ndarray: ...


class Encode:
    """Decoded pictures and maps to rows of frozen codes (`label_store.CODES`).

    make: builds the encoder; called once, in the process that runs the stage. batch_size: pictures a call.
    """

    def __init__(self, make: Callable[[], PictureEncoder], geometry: str, batch_size: int) -> None:
        self.encoder = make()
        self.geometry = geometry
        self.batch_size = batch_size

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = Render(self.encoder.side, self.geometry)(table).to_pylist()
        samples = {n: Sample.from_row(row) for n, row in enumerate(rows) if not row["error"]}
        asked = [(n, name, p) for n, sample in samples.items() for name, p in frozen_pictures(sample).items()]
        codes: dict[int, dict[str, np.ndarray]] = {n: {} for n in samples}
        for start in range(0, len(asked), self.batch_size):
            some = asked[start : start + self.batch_size]
            found = self.encoder(np.stack([picture for _, _, picture in some]))
            for (n, name, _), code in zip(some, found, strict=True):
                codes[n][name] = code
        coded = [
            replace(samples[n], codes=codes[n]).to_row() if n in samples else {} for n in range(len(rows))
        ]
        carried = zip(table["part"].to_pylist(), rows, coded, strict=True)
        kept = [
            {name: values.get(name) for name in CODES.names}
            | {
                "part": part,
                "row": row["position"],
                **{name: row[name] for name in ("id", "error", "detail")},
            }
            for part, row, values in carried
        ]
        return pa.Table.from_pylist(kept, schema=CODED)


def frozen_pictures(sample: Sample) -> dict[str, np.ndarray]:
    """The pictures of a sample that a frozen encoder sees, by their names in `Sample.codes`."""
    if sample.image is None:
        return {}
    targets = {task.value: target for task, target in sample.targets.items()}
    if Task.PIXEL in sample.targets and np.array_equal(sample.targets[Task.PIXEL], sample.image):
        del targets[Task.PIXEL.value]
    return {"image": sample.image} | targets


class Render:
    """Labelled rows to samples in training geometry."""

    def __init__(self, side: int, geometry: str) -> None:
        self.side = side
        self.geometry = geometry

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self.row(row) for row in table.to_pylist()], schema=SAMPLES)

    def row(self, row: Row) -> Row:
        """One row of FETCHED as one of SAMPLES."""
        kept = {name: row[name] for name in CARRIED if name != "part"}
        if kept["error"]:
            return kept
        return _guarded(kept, lambda: self._render(row))

    def _render(self, row: Row) -> Row:
        shape = (row.get("height") or 0, row.get("width") or 0)

        def picture(name: str, *channels: int) -> np.ndarray | None:
            raw = row.get(name)
            return None if raw is None else np.frombuffer(raw, np.uint8).reshape(*shape, *channels)

        record = Record(row["id"], load_conversations(row["conversations"]), picture("image", 3))
        labels = Labels(picture("depth"), picture("segmentation"))
        return render_sample(record, labels, row["position"], self.side, self.geometry).to_row()


class Draw:
    """Manifest rows (plus `position`) to samples, one by one: pictures in full size don't add up."""

    def __init__(self, fetch: Fetch, render: Render) -> None:
        self.fetch = fetch
        self.render = render

    def __call__(self, table: pa.Table) -> pa.Table:
        return _each(
            self.fetch.read, lambda row, files: self.render.row(self.fetch.decode(row, files)), table, SAMPLES
        )


class Prepare:
    """Rows of STORED to samples: pixels where they are needed, frozen codes where the store has them.

    needs_pixels: does the family look at pictures beside their codes?
    """

    def __init__(self, unpack: Unpack, render: Render, needs_pixels: bool) -> None:
        self.unpack = unpack
        self.render = render
        self.needs_pixels = needs_pixels

    def __call__(self, table: pa.Table) -> pa.Table:
        return _each(self._read, self._row, table, SAMPLES)

    def _read(self, row: Row) -> Files:
        return self.unpack.read(row) if self.needs_pixels or not _codes(row) else {}

    def _row(self, row: Row, files: Callable[[], Files]) -> Row:
        coded = _codes(row)
        if not coded or row["error"]:
            return self.render.row(self.unpack.decode(row, files))
        if self.needs_pixels:
            plain = self.render.row(self.unpack.decode(row | dict.fromkeys(MAPS), files))
            # The codes stand for every target.
            return plain | dict.fromkeys(task.value for task in IMAGE_TASKS) | coded
        kept = {name: row[name] for name in CARRIED if name != "part"}
        return kept | coded | {"side": row["side"], "valid": row["valid"]}


def _codes(row: Row) -> Row:
    return {name: row[name] for name in CODE_COLUMNS if row.get(name) is not None}


def _each(
    read: Callable[[Row], Files],
    work: Callable[[Row, Callable[[], Files]], Row],
    table: pa.Table,
    schema: pa.Schema,
) -> pa.Table:
    """`work` on every row and its files, one by one; a few of the next rows are read meanwhile.

    Decoding by several threads of one process takes twice the time: they wait for the interpreter.
    """
    done: list[Row] = []
    waiting: deque[tuple[Row, Callable[[], Files]]] = deque()
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for row in table.to_pylist():
            at_hand = row.get("encoded") is not None
            waiting.append((row, partial(read, row) if at_hand else pool.submit(read, row).result))
            if len(waiting) > READ_AHEAD:
                done.append(work(*waiting.popleft()))
        done.extend(work(*next_one) for next_one in waiting)
    return pa.Table.from_pylist(done, schema=schema)


def decode_picture(raw: bytes, limits: DataConfig) -> np.ndarray:
    """uint8 [H, W, 3] within the limits. Raises SampleError."""
    return decode_image(raw, limits.max_bytes, limits.max_pixels, limits.max_side)


def stored_name(image: str) -> str:
    """Where a stored map of an image lies: the image's own path, as PNG; no two images share one."""
    path = pair_name(image)
    return path if path.endswith(".png") else path + ".png"


def _published_names(image: str) -> tuple[str, ...]:
    """Where the published labelling scripts put a map: another suffix, or the image's own name."""
    stem = image.rsplit(".", 1)[0] if "." in image.rsplit("/", 1)[-1] else image
    return (image, f"{stem}.png", f"{stem}.jpg")


def wanted_maps(tasks: tuple[Task, ...], depth: str, segmentation: str) -> tuple[str, str]:
    """The teachers' names, or "" where no task needs the map."""
    return depth if Task.DEPTH in tasks else "", segmentation if Task.SEGMENTATION in tasks else ""


def _guarded(row: Row, work: Callable[[], Row]) -> Row:
    """`row` with the result of `work`, or with its error."""
    try:
        return row | work()
    except SampleError as error:
        return _quarantine(row, error)


def _quarantine(row: Row, error: SampleError) -> Row:
    row["error"], row["detail"] = error.reason, error.detail[:500]
    return row


def _png(values: np.ndarray) -> bytes:
    """uint8 [H, W] as PNG; of one bit a pixel where only 0 and 255 occur."""
    picture = Image.fromarray(values)
    if not ((values != 0) & (values != 255)).any():
        picture = picture.convert("1", dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)  # twice as fast as the default, a few per cent larger
    return buffer.getvalue()


def _grey(raw: bytes) -> np.ndarray:
    """A map of the label store, uint8 [H, W]."""
    with Image.open(io.BytesIO(raw), formats=("PNG",)) as picture:
        return np.asarray(picture.convert("L"))


def _decode_grey(raw: bytes) -> np.ndarray:
    """A stored map, uint8 [H, W]. Only numbers wider than that are still to be stretched."""
    values = decode_label(raw)
    if values.dtype == np.uint8:
        return values
    # Not at the top: it needs torch, whose import is most of what starting a reader takes.
    from unimrg.teachers.oracle import oracle_depth

    return oracle_depth(values)


def _fit(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A map in the picture's size (pictures may have been shrunk on decoding), by nearest neighbour."""
    if values.shape == shape:
        return values
    rows = np.arange(shape[0]) * values.shape[0] // shape[0]
    columns = np.arange(shape[1]) * values.shape[1] // shape[1]
    return np.ascontiguousarray(values[rows[:, None], columns[None, :]])
