"""Labels once and for all: the teachers over every picture of a manifest, one PNG a map in the label folder.

    <out>/depth/<image path>.png    <out>/segmentation/<image path>.png    <out>/labels.json

A picture whose maps are all there is skipped, so a second run does only what is missing. Maps are written
whole or not at all. `labels.json` names the teachers; a folder of other teachers is refused.
"""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from PIL import Image
from ray.data import DataContext
from tqdm import tqdm

from cluster.pipeline import add_teachers, open_manifest, open_sources
from cluster.prepare import make_absolute, prepare_data
from cluster.session import ray_session
from unimrg.config import LabelConfig, RunConfig, TeachersConfig
from unimrg.data.manifest import Manifest
from unimrg.data.stages import MAPS, Fetch, stored_name
from unimrg.errors import ConfigError, DataError, SampleError
from unimrg.storage import Store

IDENTITY = "labels.json"
QUARANTINE = "quarantine.jsonl"


def run(config: LabelConfig) -> int:
    """Label everything that isn't yet; returns the exit status."""
    whole = RunConfig(
        s3=config.s3,
        data=config.data,
        teachers=config.teachers,
        cluster=config.cluster,
        storage_path=config.out,
    )
    make_absolute(whole)
    out = Store.at(config.out, config.s3.store())
    out.check_writable()
    prepare_data(whole)
    _identify(out, config.teachers)
    manifest = open_manifest(whole.data.manifest, whole.s3, group_by_image=True)
    missing = find_missing(manifest, out)
    print(f"{len(missing)} of {len(manifest)} entries need labels in {out.url}", flush=True)
    if not missing:
        return 0
    with ray_session() as logs:
        print(f"Ray's logs: {logs}", flush=True)
        done, bad = _label(whole, manifest, missing, out)
    print(f"labelled {done}, skipped {len(bad)}: {out.url}", flush=True)
    if bad:
        checked = done + len(bad)
        out.write_bytes(QUARANTINE, "".join(json.dumps(row) + "\n" for row in bad).encode())
        if checked >= config.data.min_checked and len(bad) > config.data.max_bad_share * checked:
            raise DataError(
                f"{len(bad)} of {checked} pictures could not be labelled; see {out.url}/{QUARANTINE}, "
                f"mend the data or raise data.max_bad_share ({config.data.max_bad_share:g})"
            )
    return 0


def find_missing(manifest: Manifest, out: Store) -> list[int]:
    """Rows with a picture of which some map is not stored yet."""
    stored = {name: {entry.path for entry in out.child(name).list(recursive=True)} for name in MAPS}
    missing = []
    row = 0
    for batch in manifest.iter_batches():
        for image in batch.column("image").to_pylist():
            if image is not None and not all(_stored(image) in stored[name] for name in MAPS):
                missing.append(row)
            row += 1
    return missing


def _stored(image: str) -> str:
    """The stored name, or the path itself where it isn't allowed: such a row is never there and gets told."""
    try:
        return stored_name(image)
    except SampleError:
        return image


def _identify(out: Store, teachers: TeachersConfig) -> None:
    """Write who labels, or refuse a folder that others labelled."""
    who = {
        "depth": [teachers.depth.name, teachers.depth.checkpoint],
        "segmentation": [teachers.segmentation.name, teachers.segmentation.checkpoint],
        "sam": vars(teachers.sam) if teachers.segmentation.name == "sam" else None,
    }
    try:
        there = json.loads(out.read_bytes(IDENTITY))
    except FileNotFoundError:
        out.write_bytes(IDENTITY, json.dumps(who, indent=1).encode())
        return
    if there != who:
        raise ConfigError(f"out: {out.url} holds labels of other teachers ({there}); choose another folder")


def _label(
    config: RunConfig, manifest: Manifest, rows: list[int], out: Store
) -> tuple[int, list[dict[str, Any]]]:
    """Fetch, teach, store; returns how many were stored and the rows that were not."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    unit = config.data.unit
    units = [{"rows": rows[at : at + unit]} for at in range(0, len(rows), unit)]
    dataset = ray.data.from_items(units, override_num_blocks=len(units))
    read = _Read(manifest, Fetch(open_sources(config), config.data))
    dataset = dataset.map_batches(read, batch_format="pyarrow", batch_size=1)
    dataset = add_teachers(dataset, config)
    dataset = dataset.map_batches(_Keep(out), batch_format="pyarrow", batch_size=None)
    done, bad = 0, []
    with tqdm(total=len(rows), unit="picture", disable=None) as bar:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            results = batch.to_pylist()
            bar.update(len(results))
            done += sum(not row["reason"] for row in results)
            bad += [row for row in results if row["reason"]]
    return done, bad


class _Read:
    """Rows of the manifest, fetched."""

    def __init__(self, manifest: Manifest, fetch: Fetch) -> None:
        self.manifest = manifest
        self.fetch = fetch

    def __call__(self, table: pa.Table) -> pa.Table:
        indices = np.concatenate([np.asarray(unit) for unit in table["rows"].to_pylist()])
        rows = self.manifest.rows(indices)
        # The position carries the row's number, and the id the image's path, which names the stored maps.
        rows = rows.append_column("position", pa.array(indices))
        return self.fetch(rows.set_column(rows.schema.get_field_index("id"), "id", rows["image"]))


class _Keep:
    """Write the maps of every good row."""

    def __init__(self, out: Store) -> None:
        self.out = out

    def __call__(self, table: pa.Table) -> pa.Table:
        results = []
        for row in table.to_pylist():
            if not row["error"]:
                for name in MAPS:
                    picture = np.frombuffer(row[name], np.uint8).reshape(row["height"], row["width"])
                    self.out.write_bytes(f"{name}/{stored_name(row['id'])}", _png(picture))
            results.append({"image": row["id"], "reason": row["error"] or "", "detail": row["detail"] or ""})
        return pa.Table.from_pylist(results)


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
