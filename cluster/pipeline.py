"""Ray Data: from a data set or its label store to the training workers, in one order.

The run reads one endless ordered list (`unimrg.data.order`). Resuming means to start later in that list:
nothing is read or labelled twice. Order is kept through the whole pipeline, rows that were rejected close up,
and blocks hold exactly one worker's share of a batch, so global batch k is the k-th run of usable rows
whatever the timing and the number of workers.

    units of the list ─► _ReadStored (parts of the label store) ─► _Finish(Prepare) ─► split
    units of the list ─► _Finish(_ReadRaw, pictures where they lie)                 ─► split

How far it works ahead of training is counted in samples, not in bytes: `Ingest.release` holds readers back.
"""

from __future__ import annotations

import bisect
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy

from unimrg.config import DataConfig, RunConfig, S3Options
from unimrg.data.label_store import LabelStore, Parts
from unimrg.data.manifest import Manifest, build_index
from unimrg.data.order import Epochs, Order
from unimrg.data.stages import (
    MAPS,
    STORED,
    Draw,
    Fetch,
    Prepare,
    Render,
    Sources,
    Unpack,
    wanted_maps,
)
from unimrg.errors import DataError
from unimrg.sample import PICTURES
from unimrg.storage import Store, take_retries

INDEX_FOLDER = Path("~/.cache/unimrg/manifests")
READ_CPUS = 0.25
PREPARE_CPUS = 0.5
CUT_CPUS = 0.125
READ_THREADS = 8
POLL_SECONDS = 0.2
READ_COLUMNS = ("id", "image", "place", "conversations", "depth", "masks", "error", "detail")
MANIFEST_COLUMNS = ("id", "position", "source", "conversations", "image", "place")
STEPS_AHEAD = 16
UNITS_AHEAD = 4
UNIT_BYTES = 64 << 20


def tell_retries(listener: Any) -> None:
    """Storage requests that this process made again since it last told, to the actor's `retried`."""
    retries = take_retries()
    if any(retries.values()):
        ray.get(listener.retried.remote(retries))


def split_url(url: str) -> tuple[str, str]:
    """Folder and name of a file's path or URL."""
    folder, _, name = url.rpartition("/")
    return folder or ".", name


def open_manifest(url: str, s3: S3Options, group_by_image: bool) -> Manifest:
    """The index of a manifest, built on this node if need be."""
    folder, name = split_url(url)
    return build_index(Store.at(folder, s3.store()), name, INDEX_FOLDER.expanduser(), group_by_image)


def images_of(config: RunConfig, manifest: str) -> Store:
    """Where the pictures of a manifest lie."""
    return Store.at(config.data.images or split_url(manifest)[0], config.s3.store())


def open_sources(config: RunConfig, manifest: str = "") -> Sources:
    """Where pictures and ready-made maps of a manifest (the first one) lie."""
    depth, segmentation = wanted_maps(
        config.weights.active(), config.teachers.depth.name, config.teachers.segmentation.name
    )
    stored = Store.at(config.teachers.stored, config.s3.store()) if config.teachers.stored else None
    return Sources(images_of(config, manifest or config.data.places()[0]), depth, segmentation, stored)


def uses_store(config: RunConfig) -> bool:
    """Do samples come out of a label store? Only drawings of depth or segmentation need labels."""
    if config.labels.mode == "off" or not config.data.group_by_image:
        return False
    wanted = [config.teachers.depth, config.teachers.segmentation]
    active = [t for t, name in zip(wanted, MAPS, strict=True) if name in config.weights.active()]
    return any(teacher.is_model for teacher in active) or (bool(active) and config.labels.codes)


@dataclass(frozen=True)
class Stored:
    """What the label store holds of one data set. codes: None if pixels are encoded in the training step;
    pixels: does the family look at pictures beside their codes?"""

    labels: LabelStore
    codes: Parts | None = None
    pixels: bool = True

    @property
    def last(self) -> Parts:
        """What is written last of all that is read."""
        return self.labels.labels if self.codes is None else self.codes

    def read(self, number: int, maps: Sequence[str]) -> pa.Table:
        """A part as the columns of STORED that don't come from the manifest; what isn't needed is null."""
        tables = []
        if self.codes is None or self.pixels:
            columns = ["image", "height", "width", *(maps if self.codes is None else ()), "error", "detail"]
            table = self.labels.labels.read(number, columns)
            tables.append(table.rename_columns({"image": "encoded"}))
        if self.codes is not None:
            names = ["image_codes", "pixel_codes", *(f"{name}_codes" for name in maps)]
            columns = ["side", "valid", *names, "codes_shape", "codes_dtype", "error", "detail"]
            tables.append(self.codes.read(number, columns))  # the errors of the labels are among these
        found = {name: table[name] for table in tables for name in table.column_names}
        return pa.table(
            {
                field.name: found.get(field.name, pa.nulls(len(tables[0]), field.type))
                for field in STORED
                if field.name not in MANIFEST_COLUMNS
            }
        )


def open_order(config: RunConfig, manifests: Sequence[Manifest]) -> Order:
    """The list a run trains on. Pictures are held out of the first data set, unless there is a second one."""
    data = config.data
    held_out = [0 if data.held_out else data.held_out_count] + [0] * (len(manifests) - 1)
    epochs = [
        Epochs(len(manifest), config.seed, count, data.shard_rows, data.window, config.split_seed)
        for manifest, count in zip(manifests, held_out, strict=True)
    ]
    return Order(epochs, data.shares or [1.0] * len(epochs), config.seed)


def data_cpus(config: RunConfig) -> float:
    """Logical CPUs without which the pipeline of one worker group would stand still."""
    return READ_CPUS * (config.data.readers if uses_store(config) else 1) + PREPARE_CPUS + 2 * CUT_CPUS


def samples_needed(config: RunConfig, samples: int) -> int:
    """Rows to prepare so that `samples` usable ones are among them, as far as the run may lose any."""
    return (
        math.ceil(samples / max(1 - config.data.max_bad_share, 0.5))
        + 4 * config.data.unit
        + config.data.min_checked
    )


class Ingest:
    """Owns a worker group's pipeline; lives on rank 0's node and dies with it.

    Serves manifest rows to the pipeline's own tasks, so that the manifest is read where it is mapped, and
    holds readers back until training is near.
    """

    def __init__(
        self, plain: dict[str, Any], monitor: Any, labeller: Any, stored: list[Stored] | None
    ) -> None:
        from unimrg.config import from_plain

        self.config = from_plain(plain)
        self.monitor, self.labeller = monitor, labeller
        data = self.config.data
        self.manifests = [open_manifest(url, self.config.s3, data.group_by_image) for url in data.places()]
        self.order = open_order(self.config, self.manifests)
        self.stored = stored
        self.ahead = data.ahead or max(STEPS_AHEAD * self.config.train.batch_size, UNITS_AHEAD * data.unit)
        self._moved = threading.Condition()
        self._trained = 0
        self._bad: list[int] = []
        self._there: set[tuple[int, int]] = set()
        self._shards: list[Any] = []
        tell_retries(monitor)

    # -- what the pipeline's tasks ask -----------------------------------------------------------------------

    def rows(self, start: int, stop: int) -> pa.Table:
        """Manifest rows of positions start..stop-1 in order, with `position`, `source` and `row`."""
        source, row = self.order(start, stop)
        tables, places = [], []
        for number, manifest in enumerate(self.manifests):
            mine = np.flatnonzero(source == number)
            if len(mine):
                table = manifest.rows(row[mine])
                tables.append(table.select([c for c in READ_COLUMNS if c in table.column_names]))
                places.append(mine)
        place = np.concatenate(places)
        table = pa.concat_tables(tables, promote_options="default")
        table = table.take(pa.array(np.argsort(place, kind="stable"))).combine_chunks()
        for name, values in (("position", np.arange(start, stop)), ("source", source), ("row", row)):
            table = table.append_column(name, pa.array(values))
        return table

    def release(self, position: int) -> None:
        """Return when training is near enough to `position`; skipped samples don't count."""
        with self._moved:
            while position >= self._trained + self.ahead + len(self._bad):
                self._moved.wait(timeout=10)

    def trained(self, position: int) -> None:
        """Training has used everything before `position`."""
        with self._moved:
            self._trained = max(self._trained, position)
            del self._bad[: bisect.bisect_left(self._bad, self._trained)]
            self._moved.notify_all()

    def skipped(self, positions: list[int]) -> None:
        """These samples will never be trained on."""
        with self._moved:
            for position in positions:
                if position >= self._trained and position not in self._bad:
                    bisect.insort(self._bad, position)
            self._moved.notify_all()

    def wait_for(self, parts: list[tuple[int, int]]) -> None:
        """Return when these parts, (source, number), are in the store.

        Raises DataError when nobody will write them.
        """
        for source, number in parts:
            while not self._is_there(source, number):
                self._check_labeller(source, number)
                time.sleep(POLL_SECONDS)

    def _is_there(self, source: int, number: int) -> bool:
        if (source, number) not in self._there:
            assert self.stored is not None
            if not self.stored[source].last.is_done(number):
                return False
            tell_retries(self.monitor)
            self._there.add((source, number))
        return True

    def _check_labeller(self, source: int, number: int) -> None:
        if self.labeller is None:
            assert self.stored is not None
            raise DataError(
                f"part {number} is not in {self.stored[source].last.store.url}; run unimrg.label with the "
                f"same settings, or use labels.mode=streaming"
            )
        reason = ray.get(self.labeller.failure.remote())
        if reason:
            raise DataError(reason)

    # -- the workers' side -----------------------------------------------------------------------------------

    def shard(self, rank: int) -> Any:
        """The iterator of one rank, after `split`."""
        return self._shards[rank]

    def split(self, myself: Any, position: int, samples: int, workers: int, side: int) -> None:
        """Prepare iterators, one a worker, over at least `samples` usable samples from `position` on.

        side: of the training pictures, pixels.
        """
        self.trained(position)
        dataset = self._dataset(myself, position, position + samples_needed(self.config, samples), side)
        batch, share = self.config.train.batch_size, share_of(self.config.train.batch_size, workers)
        if batch % workers:  # the shares of the last workers are filled up with rows that say nothing
            dataset = _cut(dataset, batch).map_batches(
                _FillUp(batch, share * workers), batch_format="pyarrow", batch_size=None, num_cpus=CUT_CPUS
            )
        if workers > 1:  # one worker cuts its batches itself
            dataset = _cut(dataset, share)
        self._shards = dataset.streaming_split(workers, equal=True)

    def _dataset(self, myself: Any, start: int, stop: int, side: int) -> Dataset:
        """Samples of positions start..stop-1, in order; quarantined ones are missing."""
        config = self.config
        set_context(config.data)
        render = Render(side, config.data.geometry)
        # Every task costs some milliseconds, so a unit is as large as work ahead and memory allow.
        fitting = min(self.ahead // UNITS_AHEAD, UNIT_BYTES // (len(PICTURES) * 3 * side * side))
        unit = max(config.data.unit, fitting)
        spans = [{"start": at, "stop": min(at + unit, stop)} for at in range(start, stop, unit)]
        dataset = ray.data.from_items(spans, override_num_blocks=len(spans))
        if self.stored is not None:
            maps = tuple(name for name in MAPS if name in config.weights.active())
            parts = 2 * config.data.window * len(self.stored)
            dataset = dataset.map_batches(
                _ReadStored,
                fn_constructor_args=(self.monitor, myself, self.stored, maps, parts),
                batch_format="pyarrow",
                batch_size=1,
                num_cpus=READ_CPUS,
                # A reader waits for labels and for training: a later unit must not make an earlier one wait.
                allow_out_of_order_execution=False,
                compute=ActorPoolStrategy(size=config.data.readers, max_tasks_in_flight_per_actor=2),
            )
            images = [images_of(config, url) for url in config.data.places()]
            work: Any = Prepare(Unpack(images, config.data, maps), render, self.stored[0].pixels)
        else:
            sources = [open_sources(config, url) for url in config.data.places()]
            work = _ReadRaw(myself, Draw(Fetch(sources, config.data), render))
        return dataset.map_batches(
            _Finish(self.monitor, myself, work),
            batch_format="pyarrow",
            batch_size=None,
            num_cpus=PREPARE_CPUS,
            compute=TaskPoolStrategy(size=preparers()),
        )


def share_of(batch_size: int, workers: int) -> int:
    """Rows of a batch that a worker gets, those that fill up included."""
    return -(-batch_size // workers)


def _cut(dataset: Dataset, rows: int) -> Dataset:
    """Blocks of exactly `rows` rows."""
    cut = dataset.repartition(target_num_rows_per_block=rows, strict=True)
    # Its tasks ask for a whole CPU, and `repartition` has no word for less. For a while after a pipeline
    # died Ray Data keeps its share of the cluster for it: what is left of few cores may be less.
    cut._logical_plan.dag.ray_remote_args["num_cpus"] = CUT_CPUS
    return cut


class _FillUp:
    """A batch to `rows` rows: behind it such without an id, which are no samples; a part of one to none."""

    def __init__(self, batch: int, rows: int) -> None:
        self.batch, self.rows = batch, rows

    def __call__(self, table: pa.Table) -> pa.Table:
        if len(table) < self.batch:
            return table.slice(0, 0)
        empty = pa.table([pa.nulls(self.rows - len(table), f.type) for f in table.schema], table.schema)
        return pa.concat_tables([table, empty]).combine_chunks()


def image_side(config: RunConfig) -> int:
    """Side of the family's training pictures, pixels."""
    # Not at the top: they need torch, and most processes of a pipeline don't.
    from unimrg.families import load_family
    from unimrg.weights import localized

    with localized(config.family, config.s3.store(), only_descriptions=True) as family:
        return int(load_family(family.name).image_size(family))


def set_context(config: DataConfig) -> None:
    """Ray Data's settings for every pipeline of ours."""
    context = DataContext.get_current()
    context.execution_no_progress_timeout_s = config.stall_seconds or -1
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # else the reason is lost on the way to the driver
    context.execution_options.preserve_order = True
    context.execution_options.verbose_progress = False


def preparers() -> int:
    """Tasks that decode and render at once, a core each. They rest when they are far enough ahead."""
    return max(2, int(ray.cluster_resources().get("CPU", 1)) // 4)


class _ReadRaw:
    """A unit of positions to samples, from pictures where they lie."""

    def __init__(self, ingest: Any, draw: Draw) -> None:
        self.ingest = ingest
        self.draw = draw

    def __call__(self, table: pa.Table) -> pa.Table:
        ((start, stop),) = ((unit["start"], unit["stop"]) for unit in table.to_pylist())
        ray.get(self.ingest.release.remote(start))
        return self.draw(ray.get(self.ingest.rows.remote(start, stop)))


class _ReadStored:
    """A unit of positions to rows of the label store (`STORED`).

    An actor: units of one window need the same parts, which it keeps. (A task that yields the units of a
    window one by one can't be held back: Ray Data collects what a task yields into large blocks.)
    """

    def __init__(
        self, monitor: Any, ingest: Any, stored: Sequence[Stored], maps: Sequence[str], parts: int
    ) -> None:
        self.monitor, self.ingest = monitor, ingest
        self.stored = list(stored)
        self.maps = tuple(maps)
        self.kept: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self.parts = parts
        self.pool = ThreadPoolExecutor(READ_THREADS)

    def __call__(self, table: pa.Table) -> pa.Table:
        ((start, stop),) = ((unit["start"], unit["stop"]) for unit in table.to_pylist())
        ray.get(self.ingest.release.remote(start))
        rows = ray.get(self.ingest.rows.remote(start, stop))
        source, row = (rows[name].to_numpy() for name in ("source", "row"))
        sizes = np.array([one.labels.shard_rows for one in self.stored])[source]
        keys, part_of = np.unique(np.stack([source, row // sizes]), axis=1, return_inverse=True)
        tables = self._read([(int(s), int(number)) for s, number in keys.T])
        tell_retries(self.monitor)
        return join_stored(rows, pick(tables, part_of.reshape(-1), row % sizes))

    def _read(self, parts: list[tuple[int, int]]) -> list[pa.Table]:
        """These parts, (source, number), as soon as they are there."""
        new = [part for part in parts if part not in self.kept]
        if new:
            ray.get(self.ingest.wait_for.remote(new))
            found = self.pool.map(lambda part: self.stored[part[0]].read(part[1], self.maps), new)
            self.kept.update(zip(new, found, strict=True))
        for part in parts:
            self.kept.move_to_end(part)
        while len(self.kept) > max(self.parts, len(parts)):
            self.kept.popitem(last=False)
        return [self.kept[part] for part in parts]


def pick(tables: Sequence[pa.Table], table: np.ndarray, row: np.ndarray) -> pa.Table:
    """Row `row[i]` of `tables[table[i]]` for every i.

    All in one `take` would overflow where pictures are large.
    """
    grouped = np.argsort(table, kind="stable")
    some = [tables[k].take(pa.array(row[table == k])) for k in np.unique(table)]
    back = np.empty_like(grouped)
    back[grouped] = np.arange(len(grouped))
    return pa.concat_tables(some).take(pa.array(back)).combine_chunks()


def join_stored(rows: pa.Table, stored: pa.Table) -> pa.Table:
    """Manifest rows and what is stored of each, side by side. The manifest's own errors come first."""
    columns = {}
    for field in STORED:
        name = field.name
        if name in ("error", "detail"):
            columns[name] = pa.compute.coalesce(rows[name], stored[name])
        elif name in MANIFEST_COLUMNS:
            columns[name] = rows[name] if name in rows.column_names else pa.nulls(len(rows), field.type)
        else:
            columns[name] = stored[name]
    return pa.table(columns).cast(STORED)


class _Finish:
    """To usable samples, and the tale of what was skipped."""

    def __init__(self, monitor: Any, ingest: Any, work: Callable[[pa.Table], pa.Table]) -> None:
        self.monitor = monitor
        self.ingest = ingest
        self.work = work

    def __call__(self, table: pa.Table) -> pa.Table:
        done = self.work(table)
        names = ("id", "position", "error", "detail")
        usable = pa.compute.equal(done["error"].fill_null(""), "")
        bad = done.filter(pa.compute.invert(usable)).select(names).to_pylist()
        for row in bad:
            row["reason"] = row.pop("error")
        positions = done["position"].to_pylist()
        if bad:
            self.ingest.skipped.remote([row["position"] for row in bad])
        if positions:
            self.monitor.audit.remote(min(positions), max(positions) + 1, bad)
        tell_retries(self.monitor)
        return done.filter(usable)
