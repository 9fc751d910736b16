"""The label store: parts whole or not at all, the same bytes whoever writes them, keys that tell apart."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from unimrg.config import DataConfig
from unimrg.data.geometry import GEOMETRIES
from unimrg.data.label_store import CODES, LABELS, LabelStore, Parts, dataset_key, find_all
from unimrg.data.manifest import Manifest, build_index
from unimrg.data.stages import (
    FETCHED,
    PADDING,
    STORED,
    Encode,
    Fetch,
    Keep,
    Prepare,
    Render,
    Sources,
    Unpack,
    frozen_pictures,
    stored_name,
)
from unimrg.errors import DataError
from unimrg.sample import Sample, Task
from unimrg.storage import Store


def make_data(folder: Path, count: int = 7) -> Manifest:
    """Pictures of different sizes with exact labels, one text, one picture that isn't there."""
    rng = np.random.default_rng(0)
    entries: list[dict[str, Any]] = []
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "Noise."}]
    for number in range(count):
        height, width = rng.integers(20, 60, 2)
        for name, array in (
            ("image", rng.integers(0, 256, (height, width, 3), np.uint8)),
            ("depth", rng.integers(1, 256, (height, width), np.uint8)),
            ("masks", rng.integers(0, 3, (height // 7 + 1, width // 7 + 1), np.uint8)),
        ):
            picture = Image.fromarray(array).resize((int(width), int(height)), Image.Resampling.NEAREST)
            picture.save(folder / f"{name}-{number}.png")
        names = {name: f"{name}-{number}.png" for name in ("image", "depth", "masks")}
        entries.append({"id": f"p{number}", **names, "conversations": turns})
    entries.insert(3, {"id": "text", "conversations": turns})
    entries.insert(5, {"id": "gone", "image": "gone.png", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(entries))
    return build_index(Store.at(str(folder)), "train.json", folder / "index")


def key(manifest: Manifest, folder: Path, **changes: Any) -> dict[str, Any]:
    teachers = {name: {"name": "oracle", "version": 1} for name in ("depth", "segmentation")}
    whole = {
        "dataset": dataset_key("noise", str(folder), manifest),
        "teachers": teachers,
        "asked": {"depth": ["oracle", "", "float32"]},
        "limits": {"max_side": 2048},
        "shard_rows": 4,
    }
    return whole | changes


def rows_of(manifest: Manifest, start: int, stop: int) -> pa.Table:
    rows = manifest.rows(np.arange(start, min(stop, len(manifest))))
    return rows.append_column("position", pa.array(np.arange(start, start + len(rows))))


def fetched(manifest: Manifest, folder: Path, start: int, stop: int, keep: bool = True) -> pa.Table:
    sources = Sources(Store.at(str(folder)), "oracle", "oracle")
    return Fetch(sources, DataConfig(), keep)(rows_of(manifest, start, stop))


def stored_rows(manifest: Manifest, labels: pa.Table, codes: pa.Table | None = None) -> pa.Table:
    """Rows as a reader joins them."""
    whole = rows_of(manifest, 0, len(manifest)).to_pylist()
    kept = [row | {"encoded": row.pop("image")} for row in labels.to_pylist()]
    coded = [{}] * len(whole) if codes is None else codes.to_pylist()
    joined = []
    for row, label, code in zip(whole, kept, coded, strict=True):
        errors = {"error": row["error"] or label["error"], "detail": row["detail"] or label["detail"]}
        joined.append({name: (row | label | code).get(name) for name in STORED.names})
        joined[-1] |= errors | {"image": row["image"], "source": 0}
    return pa.Table.from_pylist(joined, schema=STORED)


@pytest.fixture
def data(tmp_path: Path) -> tuple[Manifest, Path]:
    folder = tmp_path / "data"
    folder.mkdir()
    return make_data(folder), folder


def test_what_is_stored_renders_to_the_same_samples(data: tuple[Manifest, Path]) -> None:
    """Pictures and labels out of the store give, pixel for pixel, the samples of the files themselves."""
    manifest, folder = data
    direct = fetched(manifest, folder, 0, len(manifest))
    images = [Store.at(str(folder))]
    for embed in (True, False):
        stored = stored_rows(manifest, Keep(embed)(direct))
        assert all(
            (row["encoded"] is None) != (embed and row["height"] is not None) for row in stored.to_pylist()
        )
        for geometry in GEOMETRIES:
            render = Render(32, geometry)
            prepared = Prepare(Unpack(images, DataConfig()), render, needs_pixels=True)(stored)
            assert prepared.equals(render(direct))
    errors = dict(zip(direct["id"].to_pylist(), direct["error"].to_pylist(), strict=True))
    assert {name for name, error in errors.items() if error} == {"gone"}


class Mean:
    """An encoder whose codes are easily checked."""

    identity: ClassVar = {"family": "mean", "version": 1}
    side = 32

    def __init__(self, reads_pixels: bool) -> None:
        self.reads_pixels = reads_pixels

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        return pictures.mean((1, 2), dtype=np.float64).astype(np.float32)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("reads_pixels", [True, False])
def test_codes_stand_for_the_pictures(data: tuple[Manifest, Path], geometry: str, reads_pixels: bool) -> None:
    manifest, folder = data
    table = fetched(manifest, folder, 0, len(manifest))
    codes = Encode(lambda: Mean(reads_pixels), geometry, batch_size=4)(table)
    stored = stored_rows(manifest, Keep(True)(table), codes.select(CODES.names))
    render = Render(32, geometry)
    prepare = Prepare(Unpack([Store.at(str(folder))], DataConfig()), render, reads_pixels)
    for plain, coded in zip(render(table).to_pylist(), prepare(stored).to_pylist(), strict=True):
        assert (plain["error"], plain["id"]) == (coded["error"], coded["id"])
        if plain["error"]:
            continue
        a, b = Sample.from_row(plain), Sample.from_row(coded)
        assert a.valid == b.valid and a.conversations == b.conversations and a.drawn == b.drawn
        assert (b.image is not None) == (reads_pixels and a.has_image) and not b.targets
        wanted = frozen_pictures(a)
        assert set(b.codes) == set(wanted) and ("pixel" in wanted) == (
            geometry == "published" and a.has_image
        )
        for name, picture in wanted.items():
            assert np.array_equal(b.codes[name], Mean(True)(picture[None])[0])


def test_parts_are_the_same_bytes_and_read_back(data: tuple[Manifest, Path], tmp_path: Path) -> None:
    manifest, folder = data
    parts = [Parts(Store.at(str(tmp_path / name)), LABELS) for name in "ab"]
    for n, place in enumerate(parts):
        for part in (0, 1) if n else (1, 0):
            table = Keep(True)(fetched(manifest, folder, part * 4, part * 4 + 4))
            place.write(part, table)
    for part in (0, 1):
        raw = [place.store.read_bytes(f"part-{part:06d}.parquet") for place in parts]
        assert raw[0] == raw[1]
        assert parts[0].read(part).schema.names == LABELS.names
        assert parts[0].read(part, ["error", "row"]).column_names == ["error", "row"]
    assert parts[0].done() == {0, 1} and parts[0].is_done(1) and not parts[0].is_done(2)


def test_a_damaged_part_is_told(data: tuple[Manifest, Path], tmp_path: Path) -> None:
    """One flipped bit anywhere is an error, never another picture."""
    manifest, folder = data
    parts = Parts(Store.at(str(tmp_path / "labels")), LABELS)
    parts.write(0, Keep(True)(fetched(manifest, folder, 0, 4)))
    path = tmp_path / "labels" / "part-000000.parquet"
    good, whole = path.read_bytes(), parts.read(0)
    rng = np.random.default_rng(1)
    told = 0
    for place in rng.integers(4, len(good) - 12, 60):
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        try:
            assert parts.read(0).equals(whole)  # a bit of the footer that means nothing to the reader
        except DataError as error:
            told += 1
            assert "is damaged" in str(error) and "part-000000" in str(error)
    assert told > 45
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match="is damaged"):
        parts.read(0)


def test_keys_tell_stores_apart(data: tuple[Manifest, Path], tmp_path: Path) -> None:
    manifest, folder = data
    root = Store.at(str(tmp_path / "labels"))
    first = LabelStore.create(root, key(manifest, folder))
    again = LabelStore.create(root, key(manifest, folder, asked={"depth": ["another", "word", "for it"]}))
    assert first.store == again.store and (first.rows, first.parts) == (len(manifest), 3)
    for changes in (
        {"limits": {"max_side": 64}},
        {"shard_rows": 8},
        {"teachers": key(manifest, folder)["teachers"] | {"depth": {"name": "oracle", "version": 2}}},
        {"dataset": dataset_key("noise", "elsewhere", manifest)},
    ):
        assert LabelStore.create(root, key(manifest, folder, **changes)).store != first.store
    assert len(find_all(root)) == 5


def test_find_needs_no_weights(data: tuple[Manifest, Path], tmp_path: Path) -> None:
    manifest, folder = data
    root = Store.at(str(tmp_path / "labels"))
    asked = {name: value for name, value in key(manifest, folder).items() if name != "teachers"}
    with pytest.raises(DataError, match=r"no labels by these teachers.*there: none.*labels.mode=streaming"):
        LabelStore.find(root, asked)
    made = LabelStore.create(root, key(manifest, folder))
    assert LabelStore.find(root, asked).store == made.store
    with pytest.raises(DataError, match="no labels by these teachers"):
        LabelStore.find(root, asked | {"limits": {"max_side": 64}})
    other = key(manifest, folder)["teachers"] | {"depth": {"name": "oracle", "weights": "fresh"}}
    LabelStore.create(root, key(manifest, folder, teachers=other))
    with pytest.raises(DataError, match="2 label stores of these teachers with different weights"):
        LabelStore.find(root, asked)


def test_a_newer_schema_is_refused(data: tuple[Manifest, Path], tmp_path: Path) -> None:
    manifest, folder = data
    root = Store.at(str(tmp_path / "labels"))
    path = Path(LabelStore.create(root, key(manifest, folder)).store.url) / "store.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"version": 99}))
    for use in (lambda: LabelStore.create(root, key(manifest, folder)), lambda: find_all(root)):
        with pytest.raises(
            DataError, match=r"written by a newer unimrg \(schema 99, this one reads 1\); upgrade"
        ):
            use()
    path.write_text("no json")
    with pytest.raises(DataError, match="no label store's key"):
        find_all(root)


def test_status_counts_what_is_there(data: tuple[Manifest, Path], tmp_path: Path) -> None:
    manifest, folder = data
    store = LabelStore.create(Store.at(str(tmp_path / "labels")), key(manifest, folder))
    empty = store.status()
    assert (empty.rows_done, empty.parts_done, empty.rate, empty.left) == (0, 0, None, None)
    for part in (0, 2):
        rows = store.rows_of(part)
        store.labels.write(part, Keep(True)(fetched(manifest, folder, rows.start, rows.stop)))
    store.quarantine(1, [{"row": 5, "id": "gone", "reason": "missing-file", "detail": "gone.png"}])
    for part, age in ((0, 100), (2, 50)):
        path = Path(store.labels.store.url) / f"part-{part:06d}.parquet"
        now = path.stat().st_mtime
        os.utime(path, (now - age, now - age))
    status = store.status()
    assert (status.rows, status.rows_done, status.parts, status.parts_done) == (9, 5, 3, 2)
    assert status.rate == pytest.approx(1 / 50, rel=0.05) and status.left == pytest.approx(200, rel=0.05)
    assert status.idle == pytest.approx(50, abs=5) and status.reasons == {"missing-file": 1}


def test_padding_is_passed_on_untouched(data: tuple[Manifest, Path]) -> None:
    manifest, folder = data
    rows = fetched(manifest, folder, 0, 2).to_pylist()
    padding = dict.fromkeys(FETCHED.names) | {"error": PADDING}
    table = pa.Table.from_pylist([*rows, padding], schema=FETCHED)
    assert Keep(True)(table)["error"].to_pylist() == [None, None, PADDING]
    coded = Encode(lambda: Mean(False), "pad", 4)(table)
    assert coded["error"].to_pylist() == [None, None, PADDING] and coded["image_codes"][2].as_py() is None


def test_lines_are_kept_in_one_bit_and_greys_in_eight() -> None:
    lines = np.zeros((9, 13), np.uint8)
    lines[4] = 255
    greys = np.arange(9 * 13, dtype=np.uint8).reshape(9, 13)
    row = dict.fromkeys(FETCHED.names) | {"height": 9, "width": 13, "image": bytes(9 * 13 * 3)}
    table = pa.Table.from_pylist(
        [row | {"depth": greys.tobytes(), "segmentation": lines.tobytes()}], schema=FETCHED
    )
    (kept,) = Keep(False)(table).to_pylist()
    opened = {name: Image.open(io.BytesIO(kept[name])) for name in ("depth", "segmentation")}
    assert (opened["depth"].mode, opened["segmentation"].mode) == ("L", "1")
    assert np.array_equal(np.asarray(opened["depth"]), greys)
    assert np.array_equal(np.asarray(opened["segmentation"].convert("L")), lines)
    assert kept["image"] is None and Task.DEPTH.value in kept


def test_stored_maps_come_back_as_they_are(data: tuple[Manifest, Path], tmp_path: Path) -> None:
    """Maps beside the pictures, as `teachers=stored` reads them, are those that were written."""
    manifest, folder = data
    direct = fetched(manifest, folder, 0, len(manifest)).drop_columns("encoded")
    names = manifest.rows(np.arange(len(manifest)))["image"].to_pylist()
    maps = Store.at(str(tmp_path / "maps"))
    for name, row in zip(
        names, Keep(False)(direct.append_column("encoded", direct["image"])).to_pylist(), strict=True
    ):
        for kind in ("depth", "segmentation"):
            if row[kind] is not None:
                maps.write_bytes(f"{kind}/{stored_name(name)}", row[kind])
    sources = Sources(Store.at(str(folder)), "stored", "stored", maps)
    again = Fetch(sources, DataConfig())(rows_of(manifest, 0, len(manifest))).drop_columns("encoded")
    assert again.equals(direct)
    lines = [row["segmentation"] for row in again.to_pylist() if row["segmentation"]]
    assert lines and all(b"\xff" in line for line in lines)
