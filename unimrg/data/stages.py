"""The stages from a manifest row to a `Sample`, as plain callables over Arrow tables.

    rows (manifest) ─► Fetch ─► Teach(depth) ─► Teach(segmentation) ─► Render ─► samples

Each takes and returns a pyarrow.Table and never raises for a bad sample: the row gets `error` (one of
`SampleError.REASONS`) and `detail`, later stages pass it on untouched. Pictures and maps travel as raw bytes
beside their height and width, so that nothing but plain Arrow types crosses a process border.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from unimrg.config import DataConfig
from unimrg.data.decode import decode_image, decode_map, decode_masks
from unimrg.data.geometry import render_sample
from unimrg.data.manifest import pair_name
from unimrg.errors import SampleError, StorageError
from unimrg.sample import IMAGE_TASKS, Labels, Record, Task, load_conversations
from unimrg.storage import Store
from unimrg.teachers import Teacher
from unimrg.teachers.oracle import oracle_depth, oracle_segmentation

MAPS = ("depth", "segmentation")
FETCH_THREADS = 8

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
    ]
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Sources:
    """Where a data set's files lie, and which maps are read instead of made.

    images: root of the manifest's paths. stored: what `unimrg.label` wrote. depth, segmentation: "oracle"
    (the data set's own), "stored", or another teacher's name, which means that a later stage makes them;
    "" = not wanted.
    """

    images: Store
    depth: str = ""
    segmentation: str = ""
    stored: Store | None = None


class Fetch:
    """Manifest rows (plus `position`) to decoded pictures and the maps that need no model."""

    def __init__(self, sources: Sources, limits: DataConfig) -> None:
        self.sources = sources
        self.limits = limits

    def __call__(self, table: pa.Table) -> pa.Table:
        with ThreadPoolExecutor(FETCH_THREADS) as pool:
            rows = list(pool.map(self._row, table.to_pylist()))
        return pa.Table.from_pylist(rows, schema=FETCHED)

    def _row(self, row: Row) -> Row:
        fetched = {name: row.get(name) for name in ("id", "position", "conversations", "error", "detail")}
        if fetched["error"]:
            return fetched
        return _guarded(fetched, lambda: self._fetch(row))

    def _fetch(self, row: Row) -> Row:
        if row["image"] is None:
            return {}
        image = decode_image(
            self._read(self.sources.images, row["image"], self.limits.max_bytes),
            self.limits.max_bytes,
            self.limits.max_pixels,
            self.limits.max_side,
        )
        height, width = image.shape[:2]
        maps = {name: self._map(name, row, (height, width)) for name in MAPS}
        return {
            "height": height,
            "width": width,
            "image": image.tobytes(),
            **{name: None if values is None else values.tobytes() for name, values in maps.items()},
        }

    def _map(self, name: str, row: Row, shape: tuple[int, int]) -> np.ndarray | None:
        teacher = getattr(self.sources, name)
        if teacher == "stored":
            return _fit(_decode_grey(self._stored(name, row["image"])), shape)
        if teacher != "oracle":
            return None
        column = "depth" if name == "depth" else "masks"
        if not row.get(column):
            raise SampleError("missing-label", f"the manifest names no {column} file for this image")
        raw = self._read(self.sources.images, row[column], self.limits.max_bytes)
        if name == "depth":
            return oracle_depth(_fit(decode_map(raw), shape))
        return oracle_segmentation(_fit(decode_masks(raw), shape))

    def _stored(self, name: str, image: str) -> bytes:
        """The map file, under our name or one of the published scripts'."""
        assert self.sources.stored is not None
        folder = self.sources.stored.child(name)
        for path in (stored_name(image), *_published_names(pair_name(image))):
            try:
                return self._read(folder, path, self.limits.max_bytes)
            except SampleError as error:
                if error.reason != "missing-file":
                    raise
        raise SampleError("missing-label", f"{name}/{stored_name(image)}")

    def _read(self, store: Store, path: str, limit: int) -> bytes:
        path = pair_name(path)
        try:
            raw = store.read_bytes(path, limit + 1)
        except FileNotFoundError:
            raise SampleError("missing-file", path) from None
        except StorageError as error:
            raise SampleError("unreadable-file", str(error)) from error
        if len(raw) > limit:
            raise SampleError("too-large", f"{path} has more than {limit} bytes")
        return raw


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


class Render:
    """Labelled rows to samples in training geometry."""

    def __init__(self, side: int, geometry: str) -> None:
        self.side = side
        self.geometry = geometry

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._row(row) for row in table.to_pylist()], schema=SAMPLES)

    def _row(self, row: Row) -> Row:
        kept = {name: row[name] for name in ("id", "position", "conversations", "error", "detail")}
        if kept["error"]:
            return kept
        return _guarded(kept, lambda: self._render(row))

    def _render(self, row: Row) -> Row:
        shape = (row["height"], row["width"])

        def picture(name: str, *channels: int) -> np.ndarray | None:
            raw = row[name]
            return None if raw is None else np.frombuffer(raw, np.uint8).reshape(*shape, *channels)

        record = Record(row["id"], load_conversations(row["conversations"]), picture("image", 3))
        labels = Labels(picture("depth"), picture("segmentation"))
        return render_sample(record, labels, row["position"], self.side, self.geometry).to_row()


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


def _decode_grey(raw: bytes) -> np.ndarray:
    values = decode_map(raw)
    return values if values.dtype == np.uint8 else oracle_depth(values)


def _fit(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A map in the picture's size (pictures may have been shrunk on decoding), by nearest neighbour."""
    if values.shape == shape:
        return values
    rows = np.arange(shape[0]) * values.shape[0] // shape[0]
    columns = np.arange(shape[1]) * values.shape[1] // shape[1]
    return np.ascontiguousarray(values[rows[:, None], columns[None, :]])
