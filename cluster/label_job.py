"""`unimrg.label`: every part of a data set's label store that is missing, as a job of its own."""

from __future__ import annotations

import threading
from collections import Counter

from tqdm import tqdm

from cluster.labeler import Told, all_parts, jobs_of, label, open_stores
from cluster.prepare import check_data, make_absolute, prepare_data
from cluster.session import gpus_of_cluster, ray_session
from cluster.teachers import settle_types
from unimrg.config import LabelConfig, RunConfig
from unimrg.data.label_store import LabelStore
from unimrg.errors import DataError
from unimrg.label import describe
from unimrg.storage import Store


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
    with ray_session() as logs:
        settle_types(whole, gpus_of_cluster())
        stored = open_stores(whole, wait=True)
        jobs = jobs_of(whole, stored)
        tally = _Tally(sum(job.store.rows for job in jobs) * (1 + whole.labels.codes))
        for job in jobs:
            tally.before(job.store, *(len(p.done()) for p in (job.store.labels, job.codes) if p is not None))
        if tally.rows_left:
            print(f"{tally.rows_left} rows to do in {whole.labels.store}; Ray's logs: {logs}", flush=True)
            with tally.bar:
                label(whole, jobs, all_parts(jobs), tally.add)
    for job in jobs:
        print("\n".join(describe(job.store)), flush=True)
        _judge(job.store, config)
    return 0


class _Tally:
    """What is done, shown as a bar on a terminal."""

    def __init__(self, rows: int) -> None:
        self.rows_left = rows
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


def _judge(store: LabelStore, config: LabelConfig) -> None:
    """Raises DataError when too much of a data set is unusable."""
    bad = store.quarantined()
    if store.rows >= config.data.min_checked and len(bad) > config.data.max_bad_share * store.rows:
        raise DataError(
            f"{len(bad)} of {store.rows} rows could not be labelled; see {store.store.url}/quarantine, mend "
            f"the data or raise data.max_bad_share ({config.data.max_bad_share:g})"
        )
