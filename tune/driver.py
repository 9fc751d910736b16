"""The driver of a search: prepare once what all trials share, run them on Ray Tune, judge, report."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.tune
from ray.tune.search import Searcher

from cluster.exporter import Outlet, exporting
from cluster.held_out import load_held_out
from cluster.label_job import label_all
from cluster.monitor import Show
from cluster.pipeline import data_cpus, uses_store
from cluster.prepare import check_data, check_weights, make_absolute, prepare_data
from cluster.session import LAPTOP_CPUS, gpus_of_cluster, node_resource, ray_session
from cluster.trainer import PAUSED, local_folder
from cluster.worker import run_store
from tune.campaign import Campaign, Job
from tune.config import SearchConfig
from tune.objectives import OBJECTIVES
from tune.outcome import Outcome
from tune.records import REPEATED, SEARCHED, Records, Trial
from tune.scoring import split
from tune.told import tell
from tune.trial import RUNS, Shared, clean, run_trial, write_job
from unimrg.config import RunConfig, redacted, to_plain
from unimrg.errors import ConfigError, DataError, UnimrgError
from unimrg.storage import Store

BEGUN = "search.json"
ON_CPUS = 2
"""Trials at once where there are no GPUs."""

FREE = ("search.resume", "search.max_failures", "log_every", "s3", "cluster", "metrics")
"""Keys that may change when a search is resumed."""


def run(config: SearchConfig, usual: RunConfig) -> int:
    """A search; returns the exit status: 0, or PAUSED when told to end (SIGTERM). usual: see `search`."""
    try:
        search(config, usual)
    except _Told:
        print(f"stopped as told; run again with {_again(config)} to go on", flush=True)
        return PAUSED
    return 0


class _Told(BaseException):
    """SIGTERM has come, and all trials are ended. No Exception, since nothing has failed."""


class _Ending(ray.tune.Stopper):
    """Ends all trials when SIGTERM has come; an exception from its handler might come out of Ray's code."""

    told = False  # of the class, since Ray Tune may copy the object

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return _Ending.told

    @staticmethod
    @contextlib.contextmanager
    def listening() -> Iterator[None]:
        """Within a Ray session, which begins with a handler of its own."""

        def end(number: int, frame: Any) -> None:
            _Ending.told = True

        _Ending.told = False
        before = signal.signal(signal.SIGTERM, end)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def search(config: SearchConfig, usual: RunConfig) -> None:
    """A search from its configuration to its report.

    usual: the run of `python -m unimrg.train` without a word, from which best.yaml says what differs.
    """
    began = time.monotonic()
    config.name = config.name or f"search-{config.family.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    Campaign(config, lag=1)  # strategies and budget that don't go together are told before anything starts
    given = copy.deepcopy(config)
    make_absolute(config)
    asked = redacted(config)  # before anything is filled in that depends on the cluster
    check_weights(config)
    store = run_store(config)
    store.check_writable()
    before = _begun(config, asked, store)
    prepare_data(config)
    check_data(config)
    with (
        ray_session(ON_CPUS * LAPTOP_CPUS) as logs,
        exporting(config.metrics, config.name, "labelling") as outlet,
    ):
        gpus = gpus_of_cluster()
        lag = before["lag"] if before else _at_once(config, gpus)
        if uses_store(config):
            label_all(config, logs, Show(config.name, outlet))
        outlet.enter(config.name, "searching")
        shared = _share(config, gpus, lag, outlet)
        if not before:
            store.write_bytes(BEGUN, json.dumps({"config": asked, "lag": lag}).encode())
        records = Records(store)
        campaign = Campaign(config, lag, records.read())
        at_once = min(lag, _fitting(config, gpus))
        outcome = Outcome(config, (given, usual), campaign, local_folder(config), logs)
        outcome.begin(at_once)
        _run(config, campaign, records, shared, outcome, at_once)
        _clean_up(config, campaign)
        outlet.enter(config.name, "done")
    outcome.end(store, time.monotonic() - began)


def _begun(config: SearchConfig, asked: dict[str, Any], store: Store) -> dict[str, Any] | None:
    """What was stored when a search of this name began; None if it is new. Raises ConfigError.

    asked: the configuration as it was given, plain.
    """
    begun = store.exists(BEGUN)
    if begun and not config.search.resume:
        raise ConfigError(
            f"name: there is a search {config.name!r} in {store.url} already; set search.resume=true to go "
            "on with it, or choose another name"
        )
    if config.search.resume and not begun:
        raise ConfigError(
            f"search.resume is true, but there is no search {config.name!r} in {store.url}; set name and "
            "storage_path to those of the search that was interrupted"
        )
    if not begun:
        return None
    stored: dict[str, Any] = json.loads(store.read_bytes(BEGUN))
    now, then = (dict(_flat(plain)) for plain in (asked, stored["config"]))
    for key in now.keys() | then.keys():
        if now.get(key) != then.get(key) and not key.startswith(FREE):
            raise ConfigError(
                f"{key}: {now.get(key)!r} now, but the search {config.name!r} was begun with "
                f"{then.get(key)!r}; give it that value, or begin another search"
            )
    return stored


def _flat(plain: dict[str, Any], before: str = "") -> Any:
    for key, value in plain.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value


def _at_once(config: SearchConfig, gpus: int) -> int:
    """How many trials are to run at once; the proposals depend on it, so a resumed search keeps it."""
    if config.search.concurrent:
        return config.search.concurrent
    return _fitting(config, gpus) if gpus else ON_CPUS


def _fitting(config: SearchConfig, gpus: int) -> int:
    """How many trials have room at once, for their workers and for the data of these.

    With more, workers would hold what their own data waits for. Raises ConfigError when not one has room.
    """
    asked, workers = config.cluster, config.cluster.workers or 1
    there = {"CPU": ray.cluster_resources().get("CPU", 0.0)}
    needed = {"CPU": workers * asked.cpus_per_worker + data_cpus(config)}
    if gpus:
        there["GPU"], needed["GPU"] = gpus, workers * asked.gpus_per_worker
    scarce = min(needed, key=lambda kind: there[kind] / needed[kind])
    if there[scarce] < needed[scarce]:
        raise ConfigError(
            f"a trial needs {needed[scarce]:g} {scarce}s for {workers} worker(s) and its data, but the "
            f"cluster has {there[scarce]:g}; add nodes, or lower cluster.workers"
        )
    return int(there[scarce] / needed[scarce])


def _share(config: SearchConfig, gpus: int, lag: int, outlet: Outlet) -> Shared:
    """What all trials have in common: the run, and the held-out pictures in two parts."""
    options = config.search
    plain = {key: value for key, value in to_plain(config).items() if key != "search"}
    run = RunConfig(**{key: getattr(config, key) for key in plain})
    run.cluster = dataclasses.replace(run.cluster, workers=run.cluster.workers or 1)
    run.data = dataclasses.replace(run.data, held_out_seed=config.split_seed)
    run.labels = dataclasses.replace(run.labels)
    run.engine = dataclasses.replace(run.engine)
    if not gpus and "RAY_ADDRESS" not in os.environ:  # trials that run at once share this machine's cores
        run.engine.threads = run.engine.threads or max(1, (os.cpu_count() or 1) // lag)
    if uses_store(run):
        run.labels.mode = "cached"
    # Of the held-out pictures, as many as both parts need, each picture in one of them.
    run.report = dataclasses.replace(
        run.report, enabled=False, images=2 * options.drawings, questions=2 * options.questions
    )
    samples, questions = load_held_out(run)
    if not samples:
        raise DataError("no held-out picture can be read; set data.held_out, or data.held_out_count above 0")
    validation, test = split(samples, questions, options.validation)
    _check_measurable(config, {question.pair for question in validation.questions})
    run.report.images = options.drawings
    parts = {SEARCHED: ray.put(validation), REPEATED: ray.put(test)}
    root, folder = run_store(config).url, str(local_folder(config))
    objectives = tuple(options.objectives)
    return Shared(to_plain(run), root, folder, objectives, gpus, parts, config.name, outlet)


def _check_measurable(config: SearchConfig, pairs: set[str | None]) -> None:
    """Raises ConfigError for an objective that no trial, or not every trial, could measure."""
    options = config.search
    for name in options.objectives:
        task = OBJECTIVES[name].task
        switched = options.space.switches and getattr(options.space, task, None)
        why = ""
        if task and (not getattr(config.weights, task) or switched):
            why = f"weights.{task} is 0 in some trials" if switched else f"weights.{task} is 0"
        elif task == "understanding" and not options.questions:
            why = "search.questions is 0"
        elif task not in ("", "understanding") and not options.drawings:
            why = "search.drawings is 0"
        elif name == "pair_accuracy" and pairs <= {None, ""}:
            why = "the held-out questions have no pairs"
        if why:
            raise ConfigError(f"search.objectives: {name} can't be measured, because {why}")


class _Proposer(Searcher):
    """Hands Ray Tune the campaign's jobs."""

    def __init__(self, campaign: Campaign, records: Records, outcome: Outcome, show: Show) -> None:
        super().__init__()
        self.campaign, self.records, self.outcome = campaign, records, outcome
        self.shown = show
        self.running: dict[str, Job] = {}
        self.failure: UnimrgError | None = None

    def suggest(self, trial_id: str) -> Any:
        try:
            job = None if self.failure else self.campaign.next()
        except UnimrgError as error:  # raised by `search`, where Ray Tune can't wrap it
            self.failure = error
            job = None
        if job is None:
            return Searcher.FINISHED if self.failure or self.campaign.done else None
        self.running[trial_id] = job
        tell(self.shown, self.campaign, len(self.running))
        return {"job": write_job(job)}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        job = self.running.pop(trial_id, None)
        if job is None:
            return
        trial = self.records.read_one(job.id)
        if trial is None and _Ending.told:
            return
        if trial is None:
            trial = Trial(
                job.id, job.strategy, job.phase, job.number, job.seed, job.changes, "failed", 0, 0.0,
                error="its process ended again and again; Ray's logs say why",
            )  # fmt: skip
            self.records.write(trial)
        self.campaign.tell(trial)
        self.outcome.finished(trial)
        tell(self.shown, self.campaign, len(self.running))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: records are all that is needed."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


def _run(
    config: SearchConfig,
    campaign: Campaign,
    records: Records,
    shared: Shared,
    outcome: Outcome,
    at_once: int,
) -> None:
    """Every trial that isn't finished, on Ray Tune. Raises UnimrgError when it is no use to go on."""
    proposer = _Proposer(campaign, records, outcome, Show(config.name, shared.outlet))
    trainable = ray.tune.with_parameters(run_trial, shared=shared)
    with tempfile.TemporaryDirectory(prefix="unimrg-tune-") as folder:
        tuner = ray.tune.Tuner(
            # On the driver's machine, where the folders of the runs are; its workers may be anywhere.
            ray.tune.with_resources(trainable, {"CPU": 0, node_resource(): 0.001}),
            tune_config=ray.tune.TuneConfig(
                search_alg=proposer, num_samples=-1, max_concurrent_trials=at_once
            ),
            run_config=ray.tune.RunConfig(
                name=config.name,
                storage_path=folder,
                verbose=0,
                failure_config=ray.tune.FailureConfig(max_failures=config.search.max_failures),
                stop=_Ending(),
            ),
        )
        with _Ending.listening():
            tuner.fit()
    if proposer.failure:
        raise proposer.failure
    if _Ending.told and not campaign.done:
        raise _Told
    if not campaign.done:
        raise UnimrgError(f"interrupted; run again with {_again(config)} to go on")


def _again(config: SearchConfig) -> str:
    return f"name={config.name} search.resume=true"


def _clean_up(config: SearchConfig, campaign: Campaign) -> None:
    """What an interruption between a trial's record and its cleaning has left."""
    for trial in campaign.trials():
        keep = trial.phase == REPEATED and trial.strategy == "best"
        clean(run_store(config).child(f"{RUNS}/{trial.id}"), keep)
