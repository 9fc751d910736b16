"""Labels once and for all: every part of a label store that is missing, in the order in which it is needed.

    rows of a part ─► Fetch ─► depth actors ─► segmentation actors ─► Keep ─► _Write       labels/
    a part of labels ─► Unpack ─► encoder actors ─► _Write                                 codes/

`unimrg.label` does this as a job of its own; `labels.mode=streaming` beside training, in the actor
`Labeller`.
A part is made of whole units and written by one task, which may be repeated: its content depends on its rows
alone, so whatever dies in between, the store ends up the same.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import Dataset, TaskPoolStrategy

from cluster.pipeline import (
    POLL_SECONDS,
    READ_COLUMNS,
    Stored,
    images_of,
    join_stored,
    open_manifest,
    open_order,
    preparers,
    samples_needed,
    set_context,
    tell_retries,
)
from cluster.session import on_this_node, root_cause
from cluster.teachers import add_encoder, add_teachers, identify, label_key, make_encoder
from unimrg.config import RunConfig, from_plain
from unimrg.data.label_store import LabelStore, Parts
from unimrg.data.manifest import Manifest
from unimrg.data.order import Order
from unimrg.data.stages import MAPS, PADDING, Fetch, Keep, Sources, Unpack
from unimrg.errors import UnimrgError
from unimrg.storage import RETRY_REASONS, Store, take_retries

WRITE_CPUS = 0.25
# Not what teachers take on a CPU: Ray makes one stage of neighbours with equal needs, which then waits for as
# many parts as a teacher's batch has rows.
READ_CPUS = 0.25


@dataclass(frozen=True)
class Job:
    """One data set to label. encoder: identity of the frozen encoder that codes are wanted of, or None."""

    manifest: Manifest
    sources: Sources
    store: LabelStore
    codes: Parts | None = None


def open_stores(config: RunConfig, wait: bool) -> list[Stored]:
    """The label store of every data set of a run, made where it is missing.

    wait: they may be written while the run goes on; else they must be there in full, and teachers need not be
    known by their weights. Raises DataError, CheckpointError, StorageError.
    """
    root = Store.at(config.labels.store, config.s3.store())
    who = identify(config) if wait else {}
    encoder = make_encoder(config) if config.labels.codes else None
    found = []
    for url in config.data.places():
        manifest = open_manifest(url, config.s3, config.data.group_by_image)
        key = label_key(config, url, images_of(config, url).url, manifest)
        labels = LabelStore.create(root, key | {"teachers": who}) if wait else LabelStore.find(root, key)
        if encoder is None:
            found.append(Stored(labels))
        else:
            codes = labels.codes(encoder.identity | {"geometry": config.data.geometry})
            found.append(Stored(labels, codes, encoder.reads_pixels))
    return found


def jobs_of(config: RunConfig, stored: Sequence[Stored]) -> list[Job]:
    """What there is to label."""
    jobs = []
    for url, one in zip(config.data.places(), stored, strict=True):
        teachers = config.teachers
        maps = Store.at(teachers.stored, config.s3.store()) if teachers.stored else None
        sources = Sources(
            images_of(config, url), _read_map(teachers.depth), _read_map(teachers.segmentation), maps
        )
        manifest = open_manifest(url, config.s3, config.data.group_by_image)
        jobs.append(Job(manifest, sources, one.labels, one.codes))
    return jobs


def _read_map(teacher: Any) -> str:
    """What `Fetch` shall do for a map: make it, read it, or leave it to a later stage."""
    return "" if teacher.name == "none" else str(teacher.name)


Place = tuple[int, int]  # (number of the job, number of the part)


def all_parts(jobs: Sequence[Job]) -> list[Place]:
    """Every part of every data set."""
    return [(number, part) for number, job in enumerate(jobs) for part in range(job.store.parts)]


def parts_in_order(order: Order, jobs: Sequence[Job], start: int, stop: int) -> list[Place]:
    """The parts that positions start..stop-1 need, each where it is first needed."""
    seen: dict[Place, None] = {}
    epoch = sum(job.store.rows for job in jobs)
    for first, last in order.spans(start, min(stop, start + 2 * epoch)):
        source, row = order(first, last)
        for number, job in enumerate(jobs):
            parts = np.unique(row[source == number] // job.store.shard_rows)
            seen.update(dict.fromkeys((number, int(part)) for part in parts))
    return list(seen)


@dataclass(frozen=True)
class Told:
    """A part that was written. kind: labels or codes; reasons: its unusable rows by reason; retries: storage
    requests made again since the part before, by reason."""

    kind: str
    rows: int
    reasons: dict[str, int]
    retries: dict[str, int]


Report = Callable[[Told], None]


def label(config: RunConfig, jobs: Sequence[Job], places: Sequence[Place], report: Report) -> None:
    """Write the labels, and beside them the codes, of those places that lack them; in their order.

    report: called for every part written. Raises UnimrgError, or what Ray makes of it.
    """
    lacking = _missing(jobs, places, lambda job: job.store.labels)
    uncoded = _missing(jobs, places, lambda job: job.codes)
    failures: list[BaseException] = []

    def encode() -> None:
        try:
            _run(_encoding(config, jobs, uncoded), "codes", report)
        except BaseException as error:
            failures.append(error)

    side = threading.Thread(target=encode, daemon=True, name="encode")
    if uncoded:
        side.start()
    _run(_labelling(config, jobs, lacking), "labels", report)
    if uncoded:
        side.join()
    if failures:
        raise failures[0]


def _missing(
    jobs: Sequence[Job], places: Sequence[Place], kind: Callable[[Job], Parts | None]
) -> list[Place]:
    folders = [kind(job) for job in jobs]
    done = [set() if folder is None else folder.done() for folder in folders]
    return [(n, part) for n, part in places if folders[n] is not None and part not in done[n]]


def _run(dataset: Dataset | None, kind: str, report: Report) -> None:
    """Drain a pipeline, telling of every part it wrote."""
    if dataset is None:
        return
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for told in batch["told"].to_pylist():
                report(Told(kind, **json.loads(told)))
    except UnimrgError as error:
        raise root_cause(error) from None


# -- labels --------------------------------------------------------------------------------------------------


def _labelling(config: RunConfig, jobs: Sequence[Job], places: Sequence[Place]) -> Dataset | None:
    if not places:
        return None
    set_context(config.data)
    unit, size = config.data.unit, config.data.shard_rows
    units = [
        {"job": n, "part": part, "start": part * size + at, "stop": part * size + at + unit}
        for n, part in places
        for at in range(0, size, unit)
    ]
    desk = _start_desk(jobs)
    fetch = Fetch([job.sources for job in jobs], config.data, keep=config.labels.embed)
    dataset = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
        _Read(desk, fetch),
        batch_format="pyarrow",
        batch_size=1,
        num_cpus=READ_CPUS,
        compute=TaskPoolStrategy(size=preparers()),
    )
    dataset = add_teachers(dataset, config).map_batches(
        Keep(config.labels.embed), batch_format="pyarrow", batch_size=None, num_cpus=WRITE_CPUS
    )
    stores = [job.store for job in jobs]
    return _written(dataset, size, _Write(desk, stores, [store.labels for store in stores]))


def _written(dataset: Dataset, size: int, write: _Write) -> Dataset:
    """Parts put together from units, and stored."""
    return dataset.repartition(target_num_rows_per_block=size, strict=True).map_batches(
        write, batch_format="pyarrow", batch_size=size, num_cpus=WRITE_CPUS
    )


class _Desk:
    """Serves manifest rows, which lie on this node, and says when a part has its labels.

    Whoever asks waits in `ray.get`, which lends its share of the CPU to others.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = list(jobs)
        self.retries: Counter[str] = Counter()
        self._lock = threading.Lock()

    def rows(self, job: int, part: int, start: int, stop: int) -> pa.Table:
        """See `unit_rows`."""
        return unit_rows(self.jobs[job].manifest, job, part, start, stop)

    def wait_for(self, job: int, part: int) -> None:
        """Return when the labels of a part are there."""
        while not self.jobs[job].store.labels.is_done(part):
            time.sleep(POLL_SECONDS)

    def retried(self, retries: dict[str, int]) -> None:
        """A process made so many storage requests again, by reason."""
        with self._lock:
            self.retries.update(retries)

    def take_retries(self) -> dict[str, int]:
        """What was told since the last call, and this process's own."""
        with self._lock:
            self.retries.update(take_retries())
            taken = {reason: self.retries[reason] for reason in RETRY_REASONS}
            self.retries.clear()
        return taken


def _start_desk(jobs: Sequence[Job]) -> Any:
    desk = ray.remote(_Desk).options(num_cpus=0, max_concurrency=16, scheduling_strategy=on_this_node())
    return desk.remote(jobs)


class _Read:
    """Rows of the manifests, fetched. Rows behind the last one are padding."""

    def __init__(self, desk: Any, fetch: Fetch) -> None:
        self.desk = desk
        self.fetch = fetch

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = ray.get([self.desk.rows.remote(**unit) for unit in table.to_pylist()])
        fetched = pa.concat_tables([self.fetch(unit) for unit in rows])
        tell_retries(self.desk)
        return fetched


def unit_rows(manifest: Manifest, job: int, part: int, start: int, stop: int) -> pa.Table:
    """Manifest rows start..stop-1 with `position` (the row), `source` and `part`, padded at the end."""
    there = range(start, max(start, min(stop, len(manifest))))
    rows = manifest.rows(np.arange(there.start, there.stop))
    rows = rows.select([name for name in READ_COLUMNS if name in rows.column_names])
    missing = stop - start - len(rows)
    if missing:
        nothing = {f.name: pa.nulls(missing, f.type) for f in rows.schema}
        nothing["error"] = pa.array([PADDING] * missing, rows.schema.field("error").type)
        rows = pa.concat_tables([rows, pa.table(nothing, schema=rows.schema)])
    for name, values in (
        ("position", np.arange(start, stop)),
        ("source", np.full(len(rows), job)),
        ("part", np.full(len(rows), join_place(job, part))),
    ):
        rows = rows.append_column(name, pa.array(values))
    return rows.combine_chunks()


def join_place(job: int, part: int) -> int:
    """A place as one integer, for a column."""
    return job << 40 | part


def split_place(place: int) -> Place:
    """Inverse of `join_place`."""
    return place >> 40, place & (1 << 40) - 1


class _Write:
    """One part to the store; its unusable rows first, into the quarantine."""

    def __init__(self, desk: Any, stores: Sequence[LabelStore] | None, parts: Sequence[Parts]) -> None:
        self.desk = desk
        self.stores = stores
        self.parts = list(parts)

    def __call__(self, table: pa.Table) -> pa.Table:
        ((place),) = set(table["part"].to_pylist())
        job, part = split_place(place)
        rows = table.filter(pa.compute.not_equal(table["error"].fill_null(""), PADDING))
        bad = [
            {"row": row["row"], "id": row["id"], "reason": row["error"], "detail": row["detail"]}
            for row in rows.select(["row", "id", "error", "detail"]).to_pylist()
            if row["error"]
        ]
        if bad and self.stores is not None:
            self.stores[job].quarantine(part, bad)
        self.parts[job].write(part, rows)
        reasons = Counter(row["reason"] for row in bad)
        tell_retries(self.desk)
        retries = ray.get(self.desk.take_retries.remote())
        told = {"rows": len(rows), "reasons": reasons, "retries": retries}
        return pa.table({"told": [json.dumps(told)]})


# -- codes ---------------------------------------------------------------------------------------------------


def _encoding(config: RunConfig, jobs: Sequence[Job], places: Sequence[Place]) -> Dataset | None:
    if not places:
        return None
    set_context(config.data)
    size = config.data.shard_rows
    items = [{"job": n, "part": part} for n, part in places]
    images = [job.sources.images for job in jobs]
    stores = [job.store for job in jobs]
    desk = _start_desk(jobs)
    read = _ReadPart(desk, stores, Unpack(images, config.data), config.data.unit)
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        read, batch_format="pyarrow", batch_size=1, num_cpus=READ_CPUS, compute=TaskPoolStrategy(size=1)
    )
    return _written(add_encoder(dataset, config), size, _Write(desk, None, [_codes(job) for job in jobs]))


def _codes(job: Job) -> Parts:
    assert job.codes is not None
    return job.codes


class _ReadPart:
    """A part of the labels, decoded, unit by unit, with its padding."""

    def __init__(self, desk: Any, stores: Sequence[LabelStore], unpack: Unpack, unit: int) -> None:
        self.desk = desk
        self.stores = list(stores)
        self.unpack = unpack
        self.unit = unit

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        ((job, part),) = ((item["job"], item["part"]) for item in table.to_pylist())
        ray.get(self.desk.wait_for.remote(job, part))
        store = self.stores[job]
        size = store.shard_rows
        rows = ray.get(self.desk.rows.remote(job, part, part * size, part * size + size))
        stored = Stored(store).read(part, MAPS)
        nothing = {f.name: pa.nulls(size - len(stored), f.type) for f in stored.schema}
        whole = join_stored(rows, pa.concat_tables([stored, pa.table(nothing)]))
        whole = whole.append_column("part", rows["part"])
        for at in range(0, size, self.unit):
            unit = self.unpack(whole.slice(at, self.unit))
            tell_retries(self.desk)
            yield unit


# -- beside training -----------------------------------------------------------------------------------------


class Labeller:
    """Labels in the background, in an actor on the driver's node that outlives the training workers."""

    def __init__(self, plain: dict[str, Any], monitor: Any) -> None:
        self.config = from_plain(plain)
        self.monitor = monitor
        self._failure = ""

    def start(self, stored: list[Stored], start: int, samples: int) -> None:
        """Begin with what positions from `start` on need, for `samples` usable samples; returns at once."""
        threading.Thread(target=self._work, args=(stored, start, samples), daemon=True, name="label").start()

    def failure(self) -> str:
        """Why nothing more will be labelled, or ""."""
        return self._failure

    def _work(self, stored: list[Stored], start: int, samples: int) -> None:
        try:
            jobs = jobs_of(self.config, stored)
            order = open_order(self.config, [job.manifest for job in jobs])
            places = parts_in_order(order, jobs, start, start + samples_needed(self.config, samples))
            label(self.config, jobs, places, self._tell)
        except BaseException as error:
            self._failure = f"labelling stopped: {' '.join(str(error).split())[-600:]}"
            self.monitor.event.remote("failure", self._failure)

    def _tell(self, told: Told) -> None:
        self.monitor.labelled.remote(told.rows, told.kind, told.reasons)
        self.monitor.retried.remote(told.retries)
