"""The driver of a run: check, prepare the data, train on Ray, score, report."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
import yaml
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cluster.exporter import Outlet, exporting
from cluster.held_out import compare
from cluster.labeler import Labeller, open_stores
from cluster.monitor import Show, fetch_told, start_monitor
from cluster.pipeline import Stored, uses_store
from cluster.prepare import check_data, check_weights, make_absolute, prepare_data
from cluster.progress import Progress
from cluster.session import gpus_of_cluster, on_this_node, ray_session
from cluster.teachers import gpus_of_teachers, settle_types
from cluster.worker import CHECKPOINTS, MAX_ROLLBACKS, MODEL, run_store, train_worker
from unimrg.checkpoint import latest_checkpoint, read_progress
from unimrg.config import RunConfig, redacted, to_plain
from unimrg.errors import ConfigError, UnimrgError
from unimrg.report import write_report
from unimrg.storage import Store

LOCAL_OUTPUTS = "outputs"
PAUSED = 75
"""Exit status of a run that saved and ended because it was told to (SIGTERM): run it again. EX_TEMPFAIL."""


def run(config: RunConfig) -> int:
    """One post-training run from its configuration to its report; returns the exit status: 0 or PAUSED."""
    began = time.monotonic()
    config.name = (
        config.name or f"{config.family.name}-{config.family.variant}-{time.strftime('%Y%m%d-%H%M%S')}"
    )
    make_absolute(config)
    check_weights(config)
    store = run_store(config)
    store.check_writable()
    folder = local_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    prepare_data(config)
    check_data(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(redacted(config), sort_keys=False))
    _point_latest(folder)
    with ray_session() as logs, exporting(config.metrics, config.name) as outlet:
        gpus = gpus_of_cluster()
        _settle(config, gpus)
        stored = open_stores(config, wait=config.labels.mode == "streaming") if uses_store(config) else None
        print(f"run {config.name}: {_summary(config)}; Ray's logs: {logs}", flush=True)
        outcome = train(config, folder, gpus, stored, outlet=outlet)
        if "paused" in outcome:
            outlet.enter(config.name, "paused")
            step, again = outcome["paused"], f"run again with name={config.name} to go on"
            print(f"saved at step {step} and stopped as told; {again}", flush=True)
            return PAUSED
        if config.report.enabled:
            outlet.enter(config.name, "scoring")
            print("scoring held-out pictures before and after", flush=True)
            compare(config, folder, gpus)
        outlet.enter(config.name, "done")
    page = write_report(folder)
    _mirror(folder, store)
    print(f"done in {time.monotonic() - began:.0f} s: {store.url}/{MODEL}, {page}", flush=True)
    return 0


def local_folder(config: RunConfig) -> Path:
    """Where a run's report and metrics lie on this machine: in the storage itself when that is local."""
    store = run_store(config)
    return Path(store.root) if store.is_local else Path(LOCAL_OUTPUTS).absolute() / config.name


def train(
    config: RunConfig,
    folder: Path,
    gpus: int,
    stored: list[Stored] | None,
    until: int = 0,
    outlet: Outlet | None = None,
    shown_as: str = "",
) -> dict[str, Any]:
    """Run the worker group to its end, or to a pause when this process is told to end (SIGTERM).

    until: optimiser steps after which it ends early and leaves a model, as if by chance: schedules still
    reach to `train.steps`, and a later call goes on from there; 0 = to the last step.
    outlet: to Prometheus; shown_as: name of the run there, its own by default.
    Returns what rank 0 did: `steps`, or `paused` and the step. Raises UnimrgError when it fails for good.
    """
    weights = {task.value: weight for task, weight in config.weights.by_task().items()}
    show = Show(shown_as or config.name, outlet or Outlet(), config.train.steps, weights)
    store = run_store(config)
    fetch_told(store, folder)
    monitor = start_monitor(folder, _command(), config.data.max_bad_share, config.data.min_checked, show)
    show.outlet.enter(show.name, "training")
    labeller = _start_labeller(config, monitor, stored) if config.labels.mode == "streaming" else None
    use_gpu = gpus > 0
    environment = dict(word.split("=", 1) for word in config.cluster.environment)
    least, most = config.cluster.min_workers or config.cluster.workers, config.cluster.workers
    workers: Any = (least, most) if least < most else most
    labels = dict(label.split("=", 1) for label in config.cluster.node_labels)
    resources = {"CPU": config.cluster.cpus_per_worker}
    if use_gpu:
        resources["GPU"] = config.cluster.gpus_per_worker
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "config": to_plain(config),
            "monitor": monitor,
            "labeller": labeller,
            "stored": stored,
            "until": until,
        },
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout_s=config.cluster.timeout_seconds
        ),
        scaling_config=ScalingConfig(
            num_workers=workers,
            elastic_resize_monitor_interval_s=config.cluster.resize_seconds,
            use_gpu=use_gpu,
            resources_per_worker=resources,
            label_selector=labels or None,
        ),
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS,
            storage_path=store.root,
            storage_filesystem=store.filesystem(),
            worker_runtime_env={"env_vars": environment} if environment else None,
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
        ),
    )
    progress = Progress(lambda: ray.get(monitor.snapshot.remote()), config.train.steps, config.log_every)
    with progress, _pausing(lambda: ray.get(monitor.pause.remote("SIGTERM"))):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            ray.get(monitor.event.remote("failure", str(error)[:2000]))
            raise UnimrgError(
                f"training failed after {config.cluster.max_failures} restarts: {_root_cause(error)}; "
                f"run again with name={config.name} to continue from the last checkpoint"
            ) from error
    outcome = result.return_value or {}
    if "error" in outcome:
        ray.get(monitor.event.remote("failure", outcome["error"]))
        raise UnimrgError(outcome["error"])
    return outcome


@contextlib.contextmanager
def _pausing(pause: Callable[[], None]) -> Iterator[None]:
    """SIGTERM calls `pause`, once, from a thread: in a handler Ray might be in the middle of something."""
    told, done = threading.Event(), threading.Event()

    def wait() -> None:
        told.wait()
        if not done.is_set():
            pause()

    if threading.current_thread() is not threading.main_thread():  # inside another program's threads
        yield
        return
    threading.Thread(target=wait, daemon=True, name="pause").start()
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        done.set()
        told.set()


def _start_labeller(config: RunConfig, monitor: Any, stored: list[Stored] | None) -> Any:
    """The actor that labels beside training, at work; it needs nothing from the training workers."""
    if stored is None:
        return None
    store = run_store(config)
    name = latest_checkpoint(store.child(CHECKPOINTS))
    start = read_progress(store.child(CHECKPOINTS), name).position if name else 0
    times = 1 + (MAX_ROLLBACKS if config.train.rollback_after else 0)  # a rollback leaves samples out
    samples = max(times * config.train.steps * config.train.batch_size - start, 0)
    actor = ray.remote(Labeller).options(num_cpus=0, scheduling_strategy=on_this_node())
    labeller = actor.remote(to_plain(config), monitor)
    ray.get(labeller.start.remote(stored, start, samples))
    return labeller


def _settle(config: RunConfig, gpus: int) -> None:
    """Numbers that depend on the cluster."""
    labelling = uses_store(config) and config.labels.mode == "streaming"
    taken = gpus_of_teachers(config, gpus) if labelling else 0
    config.cluster.workers = config.cluster.workers or max(1, gpus - taken)
    settle_types(config, gpus)
    config.check()
    if gpus and config.cluster.workers + taken > gpus:
        raise ConfigError(
            f"{gpus} GPU(s) can't hold {config.cluster.workers} training worker(s) and teachers on {taken}; "
            "label first (unimrg.label, then labels.mode=cached), or lower cluster.workers or teachers.*.gpus"
        )


def _summary(config: RunConfig) -> str:
    engine = config.engine.name + (
        f" ZeRO-{config.engine.zero_stage}" if config.engine.name == "deepspeed" else ""
    )
    return (
        f"{config.family.name} {config.family.weights or config.family.variant}, "
        f"{config.train.steps} steps of {config.train.batch_size} pictures, "
        f"{config.cluster.workers} worker(s), {engine}, data {config.data.manifest}"
    )


def _command() -> str:
    """This run's command line without credentials."""
    words = [
        word for word in sys.argv[1:] if not word.lstrip("+").startswith(("s3.secret_key", "s3.access_key"))
    ]
    return shlex.join(["python", "-m", "unimrg.train", *words])


def _root_cause(error: BaseException) -> str:
    """The last line of the innermost error: what the worker said."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _point_latest(folder: Path) -> None:
    """`latest` beside the run folder points at it."""
    link = folder.parent / "latest"
    fresh = folder.parent / f".latest-{os.getpid()}"
    fresh.symlink_to(folder.name, target_is_directory=True)
    os.replace(fresh, link)


def _mirror(folder: Path, store: Store) -> None:
    """Put the report beside the model when that is in object storage."""
    if not store.is_local:
        store.upload(folder, "report")
