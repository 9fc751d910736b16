"""What runs in every Ray Train worker: build, restore, train, save.

train_worker ─► fit ─► train_step ─► Family.forward
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointUploadMode

from cluster.pipeline import Ingest, Stored
from cluster.session import root_cause
from unimrg.checkpoint import (
    Progress,
    check_same_order,
    is_complete,
    load_training,
    mark_complete,
    read_progress,
    save_training,
)
from unimrg.config import RunConfig, from_plain, redacted, to_plain
from unimrg.data.prefetch import prefetch
from unimrg.engine import Engine, gather, make_engine
from unimrg.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MissingExtraError,
    StorageError,
    UnimrgError,
)
from unimrg.families import load_family
from unimrg.loop import StepOutput, fit
from unimrg.lora import adapt, merged, save_adapter
from unimrg.metrics import Meter
from unimrg.packing import Batch
from unimrg.sample import Sample, Task
from unimrg.storage import Store
from unimrg.weights import localized

CHECKPOINTS = "checkpoints"
MODEL = "model"
ADAPTER = "adapter"


def train_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """Train until the steps are done. Arguments: those of `_Worker`, `config` as plain values.

    An error that the user must mend, and that every rank has met, is returned as `error`: restarting can't
    cure it. Any other error is raised, so that Ray replaces the whole group: a rank that merely left would
    leave the others waiting.
    """
    try:
        return _Worker(**(arguments | {"config": from_plain(arguments["config"])})).run()
    except (_GivenUp, DataError) as error:
        return {"error": str(root_cause(error))}


class _GivenUp(Exception):
    """All ranks stop, for the reason in the message."""


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """If one rank fails inside in a way the user must mend, all ranks give up together."""
    failure: UnimrgError | None = None
    try:
        yield
    except (ConfigError, CheckpointError, MissingExtraError) as error:
        failure = error
    if any(failed for (failed,) in gather([float(failure is not None)])):
        raise _GivenUp(str(failure or "another worker gave up; its log says why"))


def run_store(config: RunConfig) -> Store:
    """Where a run's checkpoints and its model are kept."""
    return Store.at(config.storage_path, config.s3.store()).child(config.name)


def step_name(step: int, ranks: int) -> str:
    """Folder of a checkpoint; names sort by step, and worlds never mix in one folder."""
    return f"step-{step:08d}-w{ranks}"


def latest_checkpoint(store: Store) -> str:
    """Name of the newest complete checkpoint under `checkpoints/`, or ""."""
    folder = store.child(CHECKPOINTS)
    names = sorted(
        (e.path for e in folder.list() if e.is_folder and e.path.startswith("step-")), reverse=True
    )
    return next((name for name in names if is_complete(folder, name)), "")


class _Worker:
    """One process of the worker group."""

    def __init__(
        self, config: RunConfig, monitor: Any, labeller: Any = None, stored: list[Stored] | None = None
    ) -> None:
        context = ray.train.get_context()
        self.config = config
        self.monitor, self.labeller, self.stored = monitor, labeller, stored
        self.rank, self.ranks = context.get_world_rank(), context.get_world_size()
        self.store = run_store(config)
        self.meter = Meter(config.train.steps)
        self.position = 0
        self.verdict: Any = None

    def run(self) -> dict[str, Any]:
        device = _device(self.config)
        family = load_family(self.config.family.name)
        tasks = self.config.weights.active()
        with _together(), localized(self.config.family, self.config.s3.store()) as local:
            model, tokenizer = family.build(local, self.config.seed)
            model.freeze(self.config.family.freeze, tasks)
            adapt(model, self.config.family.lora, tasks, self.config.seed)
        model.train()
        coded = self.stored is not None and self.stored[0].codes is not None
        self.processor = family.processor(
            model, tokenizer, self.config.train, tasks, self.config.seed, from_codes=coded
        )
        engine = make_engine(model, self.config.train, self.config.engine, device)
        torch.manual_seed(self.config.seed + 7919 * self.rank)  # of dropout; a checkpoint brings its own
        with _together():
            self._restore(engine)
        self._announce(engine.steps_done)
        remaining = self.config.train.steps - engine.steps_done
        fit(
            engine,
            prefetch(self._batches(remaining)) if remaining > 0 else [],
            self.config.weights.by_task(),
            self.config.train.steps,
            observe=self._observe,
            save=lambda output: self._save(engine, output),
            save_every=self.config.train.checkpoint_every,
            stop=self._stop,
        )
        self._export(engine, tokenizer)
        return {"steps": engine.steps_done, "position": self.position}

    # -- data ------------------------------------------------------------------------------------------------

    def _batches(self, steps: int) -> Iterator[list[Batch]]:
        """Micro-batches of one optimiser step after the other, from this rank's split."""
        micro = self.config.train.batch_size // (self.ranks * self.config.train.accumulation)
        tables = self._shard(steps).iter_batches(
            batch_size=micro * self.config.train.accumulation,
            batch_format="pyarrow",
            drop_last=True,
            prefetch_batches=2,
        )
        for table in tables:
            samples = [Sample.from_row(row) for row in table.to_pylist()]
            yield [self.processor(samples[at : at + micro]) for at in range(0, len(samples), micro)]

    def _shard(self, steps: int) -> Any:
        """This rank's iterator; the pipeline belongs to an actor that rank 0 owns and takes down with it."""
        name = ray.train.collective.broadcast_from_rank_zero(
            f"ingest-{uuid4().hex}" if self.rank == 0 else None
        )
        samples = steps * self.config.train.batch_size
        if self.rank == 0:
            actor = ray.remote(Ingest).options(name=name, num_cpus=0, max_concurrency=64)
            self.ingest = actor.remote(to_plain(self.config), self.monitor, self.labeller, self.stored)
            side = self.processor.side
            ray.get(self.ingest.split.remote(self.ingest, self.position, samples, self.ranks, side))
        ray.train.collective.barrier()
        if self.rank:
            self.ingest = ray.get_actor(name)
        return ray.get(self.ingest.shard.remote(self.rank))

    # -- telling ---------------------------------------------------------------------------------------------

    def _observe(self, output: StepOutput) -> None:
        self.position = output.position
        values = self.meter.step(
            output.step,
            started=output.started,
            ready=output.ready,
            ended=output.ended,
            samples=output.samples,
            tokens=output.tokens,
        )
        if self.rank:
            return
        self.ingest.trained.remote(output.position)
        record: dict[str, Any] = {
            "step": output.step,
            "position": output.position,
            **{f"loss/{task}": output.losses.get(task) for task in Task},
            "loss/total": output.total,
            "grad_norm": output.grad_norm,
            "learning_rate": output.learning_rate,
            **values,
            "timestamp": time.time(),
        }
        self.verdict = self.monitor.write.remote(record)

    def _stop(self) -> str:
        """What the monitor said to the last record; asked a step late, so that nobody waits for it."""
        if self.rank or self.verdict is None:
            return ""
        return ray.get(self.verdict)

    def _announce(self, step: int) -> None:
        """Say that this worker group begins, and which processes it is."""
        pids = [int(pid) for (pid,) in gather([os.getpid()])]
        if self.rank == 0:
            ray.get(self.monitor.start.remote(step, pids))

    # -- keeping ---------------------------------------------------------------------------------------------

    def _restore(self, engine: Engine) -> None:
        name = ray.train.collective.broadcast_from_rank_zero(
            latest_checkpoint(self.store) if self.rank == 0 else None
        )
        if not name:
            return
        folder = Path(tempfile.mkdtemp(prefix="unimrg-restore-"))
        try:
            self.store.child(CHECKPOINTS).download(name, folder)
            check_same_order(read_progress(folder), to_plain(self.config))
            self.position = load_training(folder, engine).position
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _save(self, engine: Engine, output: StepOutput) -> None:
        """Every rank uploads its share and checks it; rank 0 then writes the list that makes it count."""
        name = step_name(output.step, self.ranks)
        checkpoints = self.store.child(CHECKPOINTS)
        folder = Path(tempfile.mkdtemp(prefix="unimrg-save-"))
        progress = Progress(
            output.step, output.position, self.ranks, self.config.train.batch_size, redacted(self.config)
        )
        try:
            save_training(folder, engine, progress)
            checkpoints.upload(folder, name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        ray.train.collective.barrier()
        if self.rank == 0:
            mark_complete(checkpoints, name)
            self._retire(checkpoints)
            self.monitor.event.remote("checkpoint", name, output.step)
        filesystem = ray.train.get_context().get_storage().storage_filesystem
        path = f"{ray.train.get_context().get_storage().experiment_fs_path}/{name}"
        ray.train.report(
            {"step": output.step, "loss": output.total},
            checkpoint=Checkpoint(path=path, filesystem=filesystem),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )

    def _retire(self, checkpoints: Store) -> None:
        """Delete all but the newest checkpoints; one that stays costs space, not the run."""
        names = sorted(e.path for e in checkpoints.list() if e.is_folder and e.path.startswith("step-"))
        for name in names[: -self.config.train.keep_checkpoints]:
            try:
                checkpoints.delete(name)
            except StorageError as error:
                self.monitor.event.remote("warning", str(error))

    def _export(self, engine: Engine, tokenizer: Any) -> None:
        """A folder that `from_pretrained` loads: weights, configuration, tokenizer; adapters also alone."""
        weights = engine.weights()
        if self.rank == 0:
            folder = Path(tempfile.mkdtemp(prefix="unimrg-model-"))
            try:
                engine.model.save_pretrained(folder / MODEL, state_dict=merged(engine.model, weights))
                tokenizer.save_pretrained(folder / MODEL)
                self.store.upload(folder / MODEL, MODEL)
                if save_adapter(engine.model, weights, folder / ADAPTER):
                    self.store.upload(folder / ADAPTER, ADAPTER)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            self.monitor.event.remote("finish", MODEL, engine.steps_done)
        if dist.is_initialized():
            dist.barrier()


def _device(config: RunConfig) -> torch.device:
    """This worker's GPU, or the CPU with its share of the cores."""
    if torch.cuda.is_available():
        return ray.train.torch.get_device()
    local = ray.train.get_context().get_local_world_size()
    torch.set_num_threads(config.engine.threads or max(1, (os.cpu_count() or 1) // local))
    return torch.device("cpu")
