"""One trial: an ordinary run of this project with what the search changes, then its score.

`run_trial` is what Ray Tune runs, in a process on the driver's machine that needs nothing but memory; Ray
Train starts the workers from there. A trial that is run again goes on where its checkpoints and its stored
scores end.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.tune
import yaml

from cluster.exporter import Outlet
from cluster.held_out import model_of
from cluster.labeler import open_stores
from cluster.pipeline import uses_store
from cluster.trainer import train
from cluster.worker import CHECKPOINTS, MODEL, run_store
from tune.campaign import Job
from tune.objectives import OBJECTIVES
from tune.records import REPEATED, Records, Trial
from tune.scoring import Part, score
from unimrg.config import RunConfig, from_plain, redacted, to_plain
from unimrg.errors import UnimrgError
from unimrg.families import load_family
from unimrg.families.base import Processor
from unimrg.metrics import read_jsonl
from unimrg.sample import Task
from unimrg.storage import Store

CURVE = "curve.json"
RUNS = "runs"
MOST_LOSSES = 200
LOSSES = ("step", "loss/total", "loss/understanding", "loss/pixel", "loss/depth", "loss/segmentation")


@dataclass(frozen=True)
class Shared:
    """What all trials know.

    config: the run's, plain; root: URL of the search's folder; folder: the one on the driver's machine;
    parts: by phase; search: its name; outlet: to Prometheus.
    """

    config: dict[str, Any]
    root: str
    folder: str
    objectives: tuple[str, ...]
    gpus: int
    parts: dict[str, Any]
    search: str = ""
    outlet: Outlet = field(default_factory=Outlet)

    def shown_as(self, job: Job) -> str:
        """What Prometheus is shown a trial as."""
        return f"{self.search}/{job.id}"


def run_trial(proposal: dict[str, Any], shared: Shared) -> None:
    """A trial of Ray Tune; keeps its record, and reports its values."""
    job = read_job(proposal["job"])
    config = configured(shared, job)
    trial = Trial(job.id, job.strategy, job.phase, job.number, job.seed, job.changes, "done", 0, 0.0)
    try:
        _train(config, job, shared, trial)
    except UnimrgError as error:
        trial.state, trial.error, trial.values = "failed", " ".join(str(error).split()), {}
    shared.outlet.enter(shared.shown_as(job), "failed" if trial.state == "failed" else "done")
    Records(Store.at(shared.root, config.s3.store())).write(trial)
    clean(run_store(config), keep_model=job.phase == REPEATED and job.strategy == "best")
    ray.tune.report({"state": trial.state, "steps": trial.steps, **trial.values})


def configured(shared: Shared, job: Job) -> RunConfig:
    """The run of a trial."""
    config = from_plain(copy.deepcopy(shared.config))
    config.name, config.seed = job.id, job.seed
    config.storage_path = f"{shared.root}/{RUNS}"
    for key, value in job.changes.items():
        *sections, name = key.split(".")
        section: Any = config
        for part in sections:
            section = getattr(section, part)
        setattr(section, name, value)
    config.check()
    return config


def clean(store: Store, keep_model: bool) -> None:
    """Delete what nobody needs of a finished trial: most of its bytes."""
    for name in (CHECKPOINTS, "adapter", MODEL)[: 2 if keep_model else 3]:
        if store.exists(name):
            store.delete(name)


def _train(config: RunConfig, job: Job, shared: Shared, trial: Trial) -> None:
    """Train from rung to rung, score, and stop where the trial is behind; fills `trial`."""
    # Not `local_folder`, since Ray Tune gives every trial a working directory of its own.
    store, folder = run_store(config), Path(shared.folder) / RUNS / job.id
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(redacted(config), sort_keys=False))
    stored = open_stores(config, wait=False) if uses_store(config) else None
    curve = json.loads(store.read_bytes(CURVE)) if store.exists(CURVE) else []
    for until in (*job.rungs, config.train.steps):
        row = next((row for row in curve if row["step"] == until), None)
        if row is None:
            began = time.monotonic()
            train(config, folder, shared.gpus, stored, until, shared.outlet, shared.shown_as(job))
            shared.outlet.enter(shared.shown_as(job), "scoring")
            values, answers = _score(config, shared, job.phase, folder)
            seconds = round(time.monotonic() - began, 1)
            row = {"step": until, "seconds": seconds, "values": values, "answers": answers}
            curve.append(row)
            store.write_bytes(CURVE, json.dumps(curve).encode())
        values = row["values"]
        trial.steps, trial.values, trial.answers = until, values, row["answers"]
        trial.seconds += row["seconds"]
        trial.curve.append({"step": until, **values})
        missing = [name for name in shared.objectives if name not in values]
        if missing:
            raise UnimrgError(f"{job.id}: {missing[0]} was not measured; is its task trained?")
        if until in job.least and _behind(values[shared.objectives[0]], job.least[until], shared):
            trial.state = "stopped"
            break
    trial.losses = _losses(folder)


def _behind(value: float, least: float, shared: Shared) -> bool:
    sign = OBJECTIVES[shared.objectives[0]].sign
    return sign * value < sign * least


def _score(config: RunConfig, shared: Shared, phase: str, folder: Path) -> Any:
    """(values, answers) of the run's model, measured by a task on a device of the cluster."""
    gpus = config.cluster.gpus_per_worker if shared.gpus else 0
    # Anywhere: a trial's own placement is its place on the driver's machine, and nothing else.
    room = {"num_cpus": config.cluster.cpus_per_worker, "num_gpus": gpus}  # what a worker just gave back
    task = ray.remote(score_run).options(**room, scheduling_strategy="DEFAULT")
    values, answers = ray.get(task.remote(to_plain(config), shared.parts[phase]))
    times = [row["step_seconds"] for row in read_jsonl(folder / "metrics.jsonl")]
    values["samples_per_second"] = config.train.batch_size / statistics.median(times)
    return values, answers


def score_run(plain: dict[str, Any], part: Part) -> Any:
    """Runs in a Ray task: the exported model of a run on one part of the held-out pictures."""
    config = from_plain(plain)
    model, tokenizer = model_of(config, trained=True)
    make = load_family(config.family.name).processor

    def processor(tasks: Sequence[Task]) -> Processor:
        made: Processor = make(model, tokenizer, config.train, tasks, config.seed)
        return made

    return score(model, processor, part, config.weights.active(), config.report, config.split_seed)


def _losses(folder: Path) -> list[dict[str, Any]]:
    """At most `MOST_LOSSES` records of the training, evenly spaced, the last one among them."""
    records = list(read_jsonl(folder / "metrics.jsonl"))
    every = -(-len(records) // MOST_LOSSES) or 1
    return [{key: row.get(key) for key in LOSSES} for row in records[::-1][::every]][::-1]


def write_job(job: Job) -> str:
    """Text, because Ray Tune would take the parts of anything else for parameters of its own."""
    return json.dumps(dataclasses.asdict(job))


def read_job(text: str) -> Job:
    """The inverse of `write_job`."""
    job = Job(**json.loads(text))
    least = {int(step): value for step, value in job.least.items()}
    return dataclasses.replace(job, rungs=tuple(job.rungs), least=least)
