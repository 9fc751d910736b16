"""Ray Data: manifest rows to samples, streamed through teacher actors to the training workers.

The run reads one endless ordered list: position p is entry `p % n` of epoch `p // n`. Resuming means to
start later in that list: nothing is read or labelled twice. Order is kept through the whole pipeline, rows
that were rejected close up, and blocks hold exactly one worker's share of a batch, so global batch k is the
k-th run of usable rows whatever the timing and the number of workers.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy
from ray.data.expressions import col

from unimrg.config import RunConfig, S3Options, TeacherConfig, TeachersConfig
from unimrg.data.manifest import Manifest, build_index, epoch_order
from unimrg.data.stages import Fetch, Render, Sources, Teach, wanted_maps
from unimrg.families import load_family
from unimrg.storage import Store
from unimrg.teachers import Teacher
from unimrg.weights import localized

INDEX_FOLDER = Path("~/.cache/unimrg/manifests")


def split_url(url: str) -> tuple[str, str]:
    """Folder and name of a file's path or URL."""
    folder, _, name = url.rpartition("/")
    return folder or ".", name


def open_manifest(url: str, s3: S3Options, group_by_image: bool) -> Manifest:
    """The index of a manifest, built on this node if need be."""
    folder, name = split_url(url)
    return build_index(Store.at(folder, s3.store()), name, INDEX_FOLDER.expanduser(), group_by_image)


def open_sources(config: RunConfig) -> Sources:
    """Where pictures and ready-made maps lie."""
    depth, segmentation = wanted_maps(
        config.weights.active(), config.teachers.depth.name, config.teachers.segmentation.name
    )
    s3 = config.s3.store()
    images = config.data.images or split_url(config.data.manifest)[0]
    stored = Store.at(config.teachers.stored, s3) if config.teachers.stored else None
    return Sources(Store.at(images, s3), depth, segmentation, stored)


def make_teacher(name: str, config: TeachersConfig) -> Teacher:
    """The teacher of a later stage; loads its weights."""
    teacher = getattr(config, name)
    if teacher.name == "depth_anything":
        from unimrg.teachers.depth import DepthAnything

        return DepthAnything(teacher.checkpoint, batch_size=teacher.batch_size)
    from unimrg.teachers.segmentation import SamBoundaries

    sam = config.sam
    return SamBoundaries(
        teacher.checkpoint,
        points_per_side=sam.points_per_side,
        points_per_batch=sam.points_per_batch,
        pred_iou_thresh=sam.pred_iou_thresh,
        stability_score_thresh=sam.stability_score_thresh,
        box_nms_thresh=sam.box_nms_thresh,
    )


class Rows:
    """The endless ordered list over a manifest's training part.

    held_out: this many entries, the same in every run of a seed, are left out of training.
    """

    def __init__(self, manifest: Manifest, seed: int, held_out: int) -> None:
        self.manifest = manifest
        self.seed = seed
        self.training, self.held_out = split_held_out(len(manifest), seed, held_out)
        self._order = functools.lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> np.ndarray:
        return self.training[epoch_order(len(self.training), self.seed, epoch)]

    def __call__(self, start: int, stop: int) -> pa.Table:
        """Manifest rows of positions start..stop-1 with their `position`."""
        positions = np.arange(start, stop)
        epochs, places = np.divmod(positions, len(self.training))
        indices = np.array([self._order(int(e))[p] for e, p in zip(epochs, places, strict=True)])
        return self.manifest.rows(indices).append_column("position", pa.array(positions))


def split_held_out(n: int, seed: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Entries to train on and entries held out (at most half of them), a function of (n, seed) alone."""
    kept_back = min(held_out, n // 2)
    order = epoch_order(n, seed + 1_000_003, 0)
    return np.sort(order[kept_back:]), np.sort(order[:kept_back])


class Ingest:
    """Owns a worker group's pipeline; lives on rank 0's node and dies with it.

    Serves manifest rows to the pipeline's own tasks, so that the manifest is read where it is mapped.
    """

    def __init__(self, plain: dict[str, Any], monitor: Any) -> None:
        from unimrg.config import from_plain

        self.config = from_plain(plain)
        self.monitor = monitor
        manifest = open_manifest(self.config.data.manifest, self.config.s3, self.config.data.group_by_image)
        held_out = 0 if self.config.data.held_out else self.config.data.held_out_count
        self._rows = Rows(manifest, self.config.seed, held_out)

        self._shards: list[Any] = []

    def rows(self, start: int, stop: int) -> pa.Table:
        """See `Rows`."""
        return self._rows(start, stop)

    def shard(self, rank: int) -> Any:
        """The iterator of one rank, after `split`."""
        return self._shards[rank]

    def split(self, myself: Any, position: int, samples: int, workers: int) -> None:
        """Prepare iterators, one a worker, over at least `samples` usable samples from `position` on."""
        share = self.config.data.max_bad_share
        needed = (
            math.ceil(samples / max(1 - share, 0.5))
            + 4 * self.config.data.unit
            + self.config.data.min_checked
        )
        dataset = sample_dataset(self.config, myself, self.monitor, position, needed)
        dataset = dataset.repartition(
            target_num_rows_per_block=self.config.train.batch_size // workers, strict=True
        )
        self._shards = dataset.streaming_split(workers, equal=True)


def sample_dataset(config: RunConfig, ingest: Any, monitor: Any, position: int, rows: int) -> Dataset:
    """Samples of positions position..position+rows-1, in order; quarantined ones are missing."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.verbose_progress = False
    unit = config.data.unit
    starts = range(position, position + rows, unit)
    dataset = ray.data.from_items(
        [{"start": start, "stop": min(start + unit, position + rows)} for start in starts],
        override_num_blocks=len(starts),
    )
    with localized(config.family, config.s3.store(), only_descriptions=True) as family:
        side = load_family(family.name).image_size(family)
    fetch = Fetch(open_sources(config), config.data)
    dataset = dataset.map_batches(
        _Prepare(ingest, fetch),
        batch_format="pyarrow",
        batch_size=1,
        compute=TaskPoolStrategy(size=_fetchers()),
    )
    dataset = add_teachers(dataset, config)
    finish = _Finish(monitor, Render(side, config.data.geometry))
    return dataset.map_batches(finish, batch_format="pyarrow", batch_size=None).filter(
        expr=col("error") == ""
    )


def add_teachers(dataset: Dataset, config: RunConfig) -> Dataset:
    """The model teachers that the config names, each as a pool of actors."""
    tasks = config.weights.active()
    names = wanted_maps(tasks, config.teachers.depth.name, config.teachers.segmentation.name)
    for map_name, teacher in zip(("depth", "segmentation"), names, strict=True):
        if teacher in ("", "oracle", "stored"):
            continue
        options: TeacherConfig = getattr(config.teachers, map_name)
        actors, gpus = _pool(options)
        dataset = dataset.map_batches(
            Teach,
            fn_constructor_args=(map_name, functools.partial(make_teacher, map_name, config.teachers)),
            batch_format="pyarrow",
            batch_size=options.batch_size,
            compute=ActorPoolStrategy(size=actors),
            num_gpus=gpus,
            num_cpus=0.5 if not gpus else 1,
        )
    return dataset


def _fetchers() -> int:
    """Tasks that fetch and decode at once: they must keep ahead of training, not take its cores."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)) // 4)


def _pool(options: TeacherConfig) -> tuple[int, float]:
    """(actors, GPUs of each)."""
    gpus_there = int(ray.cluster_resources().get("GPU", 0))
    gpus = options.gpus if options.gpus >= 0 else float(min(gpus_there, 1))
    actors = options.actors or max(1, int(gpus_there // gpus) if gpus else 1)
    return actors, gpus


class _Prepare:
    """A unit of positions to fetched rows."""

    def __init__(self, ingest: Any, fetch: Fetch) -> None:
        self.ingest = ingest
        self.fetch = fetch

    def __call__(self, table: pa.Table) -> pa.Table:
        parts = [
            self.fetch(ray.get(self.ingest.rows.remote(unit["start"], unit["stop"])))
            for unit in table.to_pylist()
        ]
        return pa.concat_tables(parts)


class _Finish:
    """Rendering, and the tale of what was skipped. Usable rows get the error "": filters know no null."""

    def __init__(self, monitor: Any, render: Render) -> None:
        self.monitor = monitor
        self.render = render

    def __call__(self, table: pa.Table) -> pa.Table:
        rendered = self.render(table)
        errors = rendered["error"].to_pylist()
        names = ("id", "position", "error", "detail")
        bad = [row for row in rendered.select(names).to_pylist() if row["error"]]
        for row in bad:
            row["reason"] = row.pop("error")
        positions = rendered["position"].to_pylist()
        if positions:
            self.monitor.audit.remote(min(positions), max(positions) + 1, bad)
        column = pa.array([error or "" for error in errors], pa.string())
        return rendered.set_column(rendered.schema.get_field_index("error"), "error", column)
