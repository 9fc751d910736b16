"""`unimrg.label`: every part of a data set's label store that is missing, as a job of its own."""

from __future__ import annotations

import threading
from collections import Counter

from tqdm import tqdm

from cluster.exporter import exporting
from cluster.labeler import Told, all_parts, jobs_of, label, open_stores
from cluster.monitor import Show, count_labelled, count_retries
from cluster.prepare import check_data, make_absolute, prepare_data
from cluster.session import gpus_of_cluster, ray_session
from cluster.teachers import settle_types
from unimrg.config import LabelConfig, RunConfig
from unimrg.data.label_store import LabelStore
from unimrg.errors import DataError
from unimrg.figures import Figures
from unimrg.label import describe
from unimrg.storage import Store

JOB = "label"
"""What Prometheus is shown the job as."""


def run(config: LabelConfig) -> int:
    """Label everything that isn't yet; returns the exit status."""
    whole = RunConfig(
        s3=config.s3,
        data=config.data,
        teachers=config.teachers,
        labels=config.labels,
        family=config.family,
        cluster=config.cluster,
        storage_path=config.storage_path,
    )
    make_absolute(whole)
    Store.at(whole.labels.store, whole.s3.store()).check_writable()
    prepare_data(whole)
    check_data(whole)
    with ray_session() as logs, exporting(config.metrics, JOB, "labelling") as outlet:
        for store in label_all(whole, logs, Show(JOB, outlet)):
            print("\n".join(describe(store)), flush=True)
        outlet.enter(JOB, "done")
    return 0


def label_all(config: RunConfig, logs: str, show: Show) -> list[LabelStore]:
    """Label what isn't yet of a run's data; returns the label stores. `logs`: where Ray's are.

    show: how Prometheus is shown the labelling. Raises DataError when too much of a data set is unusable.
    """
    settle_types(config, gpus_of_cluster())
    jobs = jobs_of(config, open_stores(config, wait=True))
    tally = _Tally(sum(job.store.rows for job in jobs) * (1 + config.labels.codes), show)
    for job in jobs:
        tally.before(job.store, *(len(p.done()) for p in (job.store.labels, job.codes) if p is not None))
    if tally.rows_left:
        print(f"{tally.rows_left} rows to do in {config.labels.store}; Ray's logs: {logs}", flush=True)
        with tally.bar:
            label(config, jobs, all_parts(jobs), tally.add)
    for job in jobs:
        _judge(job.store, config)
    return [job.store for job in jobs]


class _Tally:
    """What is done, shown as a bar on a terminal, and to Prometheus."""

    def __init__(self, rows: int, show: Show) -> None:
        self.rows_left = rows
        self.shown, self.figures = show, Figures(show.name)
        show.outlet.show(show.name, self.figures.collect())
        self.bar = tqdm(total=rows, unit="row", disable=None)
        self.reasons: Counter[str] = Counter()
        self._lock = threading.Lock()  # labels and codes are told of from two threads

    def before(self, store: LabelStore, *parts: int) -> None:
        """So many parts (of labels, of codes) were there already."""
        done = sum(min(count * store.shard_rows, store.rows) for count in parts)
        self.rows_left -= done
        self.bar.update(done)

    def add(self, told: Told) -> None:
        """A part was written."""
        with self._lock:
            self.reasons.update(told.reasons)
            if self.reasons:
                self.bar.set_postfix(self.reasons)
            self.bar.update(told.rows)
            count_labelled(self.figures, told.rows, told.kind, told.reasons)
            count_retries(self.figures, told.retries)
            self.shown.outlet.show(self.shown.name, self.figures.collect())


def _judge(store: LabelStore, config: RunConfig) -> None:
    """Raises DataError when too much of a data set is unusable."""
    bad = store.quarantined()
    if store.rows >= config.data.min_checked and len(bad) > config.data.max_bad_share * store.rows:
        raise DataError(
            f"{len(bad)} of {store.rows} rows could not be labelled; see {store.store.url}/quarantine, mend "
            f"the data or raise data.max_bad_share ({config.data.max_bad_share:g})"
        )
