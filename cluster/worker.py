"""What runs in every Ray Train worker: build, restore, train, save.

train_worker ─► fit ─► train_step ─► Family.forward
"""

from __future__ import annotations

import contextlib
import math
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

from cluster.monitor import Verdict
from cluster.pipeline import Ingest, Stored, share_of, tell_retries
from cluster.session import root_cause
from unimrg.backends import choose_attention
from unimrg.balance import make_balancer
from unimrg.checkpoint import (
    Progress,
    Saver,
    check_same_order,
    checkpoints_in,
    is_complete,
    latest_checkpoint,
    read_progress,
    restore,
    retire,
    step_name,
    step_of,
)
from unimrg.config import RunConfig, from_plain, redacted, to_plain
from unimrg.consolidate import save_adapters, save_model
from unimrg.data.prefetch import prefetch
from unimrg.engine import Engine, choose_precision, gather, make_engine
from unimrg.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MissingExtraError,
    StorageError,
    UnimrgError,
)
from unimrg.families import load_family
from unimrg.hardware import peak_flops
from unimrg.health import Health, LossSpike
from unimrg.loop import StepOutput, fit
from unimrg.lora import adapt
from unimrg.metrics import Meter
from unimrg.packing import Batch
from unimrg.sample import Sample, Task
from unimrg.storage import Store
from unimrg.watchdog import Watchdog
from unimrg.weights import localized

CHECKPOINTS = "checkpoints"
MODEL = "model"
ADAPTER = "adapter"
PREEMPTION_STEPS = 10
MAX_ROLLBACKS = 3


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


class _Worker:
    """One process of the worker group."""

    def __init__(
        self,
        config: RunConfig,
        monitor: Any,
        labeller: Any = None,
        stored: list[Stored] | None = None,
        until: int = 0,
    ) -> None:
        context = ray.train.get_context()
        self.config = config
        self.until = until or config.train.steps
        self.monitor, self.labeller, self.stored = monitor, labeller, stored
        self.rank, self.ranks = context.get_world_rank(), context.get_world_size()
        self.store = run_store(config)
        self.saver = Saver(self.store.child(CHECKPOINTS), self._keep_told)
        self.watchdog = Watchdog(config.cluster.hang_seconds, self._tell_hang)
        self.totals: list[float] = []
        weights = config.weights
        self.balancer = make_balancer(weights.balance, weights.by_task(), weights.balance_rate)
        self.position = 0
        self.warned = False
        self.saved_step = -1
        self.checkpoint_values: dict[str, float] = {}
        self.saving_since = 0.0
        self.verdict: Any = None

    def run(self) -> dict[str, Any]:
        device = _device(self.config)
        peak = peak_flops(device, self.config.engine.peak_tflops)
        self.meter = Meter(self.config.train.steps, workers=self.ranks, peak=peak)
        family = load_family(self.config.family.name)
        tasks = self.config.weights.active()
        with _together(), localized(self.config.family, self.config.s3.store()) as local:
            # What ZeRO-3 cuts, it changes one parameter at a time: none is copied before.
            dtype = None if self.config.engine.cuts_weights else torch.float32
            model, tokenizer = family.build(local, self.config.seed, dtype)
            model.freeze(self.config.family.freeze, tasks)
            model.set_grad_scale(self.config.family.grad_scale)
            adapt(model, self.config.family.lora, tasks, self.config.seed)
            # Here, where ranks give up together; the engine gets the same answer.
            engine_config = self.config.engine
            attention = choose_attention(
                engine_config.attention, device, choose_precision(engine_config, device)
            )
        model.train()
        coded = self.stored is not None and self.stored[0].codes is not None
        self.processor = family.processor(
            model, tokenizer, self.config.train, tasks, self.config.seed, from_codes=coded
        )
        self.engine = engine = make_engine(model, self.config.train, self.config.engine, device)
        torch.manual_seed(self.config.seed + 7919 * self.rank)  # of dropout; a checkpoint brings its own
        with _together():
            self._restore(engine)
        self._announce(engine.steps_done, str(attention))
        self._train()
        self._commit(self.saver.finish(wait=True))
        self.watchdog.close()
        if engine.steps_done < self.until:
            return {"paused": engine.steps_done}
        self._export(engine, tokenizer)
        return {"steps": engine.steps_done, "position": self.position}

    def _train(self) -> None:
        """To the last step asked for, or a pause; back to a checkpoint when the loss keeps jumping."""
        engine = self.engine
        for rollbacks in range(MAX_ROLLBACKS + 1):
            remaining = self.until - engine.steps_done
            try:
                with contextlib.closing(
                    prefetch(self._batches(remaining) if remaining > 0 else ())
                ) as batches:
                    fit(
                        engine,
                        self.watchdog.resting(batches),
                        self.balancer,
                        self.until,
                        observe=self._observe,
                        save=self._save,
                        save_every=self.config.train.checkpoint_every,
                        stop=lambda: self._verdict().stop,
                        pause=lambda: self._verdict().pause,
                        health=Health(self.config.train),
                    )
                return
            except LossSpike as spike:
                self._go_back(spike, rollbacks)

    # -- data ------------------------------------------------------------------------------------------------

    def _batches(self, steps: int) -> Iterator[list[Batch]]:
        """Micro-batches of one optimiser step after the other, from this rank's split.

        Where a batch can't be shared equally some have fewer samples, down to none.
        """
        share = share_of(self.config.train.batch_size, self.ranks)
        parts = self.config.train.accumulation
        tables = self._shard(steps).iter_batches(
            batch_size=share, batch_format="pyarrow", drop_last=True, prefetch_batches=2
        )
        for table in tables:
            samples = [Sample.from_row(row) for row in table.to_pylist() if row["id"] is not None]
            cuts = [part * len(samples) // parts for part in range(parts + 1)]
            yield [self.processor(samples[cuts[at] : cuts[at + 1]]) for at in range(parts)]

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
            flops=output.flops,
        )
        self.totals.append(output.total)
        self._commit(self.saver.finish())
        if self.rank == 0:
            self._tell(output, values)
        if output.step % PREEMPTION_STEPS == 0:
            self._look_for_preemption(output)

    def _tell(self, output: StepOutput, values: dict[str, float | None]) -> None:
        if output.wrong:
            kind = "skipped-step" if output.wrong == "skipped" else output.wrong
            detail = {"total": output.total, "grad_norm": output.grad_norm, "samples": output.suspects[:64]}
            self.monitor.event.remote(kind, detail, output.step)
        self.ingest.trained.remote(output.position)
        record: dict[str, Any] = {
            "step": output.step,
            "position": output.position,
            **{f"loss/{task}": output.losses.get(task) for task in Task},
            "loss/total": output.total,
            **self._moved_weights(output),
            "grad_norm": output.grad_norm,
            "learning_rate": output.learning_rate,
            "workers": self.ranks,
            "peak_memory_bytes": output.peak_memory,
            **values,
            **self.checkpoint_values,
            "timestamp": time.time(),
        }
        self.verdict = self.monitor.write.remote(record)

    def _moved_weights(self, output: StepOutput) -> dict[str, float]:
        """The weights of this step, for the metrics, where they move."""
        return {f"weight/{task}": output.weights[task] for task in self.balancer.tasks if self.balancer.moves}

    def _verdict(self) -> Verdict:
        """What the monitor said to the last record; asked a step late, so that nobody waits for it."""
        if self.rank or self.verdict is None:
            return Verdict()
        return ray.get(self.verdict)

    def _look_for_preemption(self, output: StepOutput) -> None:
        """At the first notice that a node will be taken away, save; Ray replaces the group when it is."""
        notice = ray.train.get_preemption_info()
        if notice is None or self.warned:
            return
        self.warned = True
        if self.rank == 0:
            self.monitor.event.remote("preemption", str(notice)[:2000], output.step)
        self._save(output)
        self._commit(self.saver.finish(wait=True))

    def _tell_hang(self, what: str) -> None:
        """Raises nothing: the process ends all the same."""
        with contextlib.suppress(Exception):
            detail = {"rank": self.rank, "pid": os.getpid(), "stacks": what[-20_000:]}
            ray.get(self.monitor.event.remote("hang", detail), timeout=30)

    def _announce(self, step: int, attention: str) -> None:
        """Say that this worker group begins, which processes it is, and which attention it runs on."""
        pids = [int(pid) for (pid,) in gather([os.getpid()])]
        if self.rank == 0:
            ray.get(self.monitor.start.remote(step, pids))
            self.monitor.event.remote("attention", attention, step)

    # -- keeping ---------------------------------------------------------------------------------------------

    def _restore(self, engine: Engine) -> None:
        name = ray.train.collective.broadcast_from_rank_zero(
            latest_checkpoint(self.saver.store) if self.rank == 0 else None
        )
        if not name:
            return
        check_same_order(read_progress(self.saver.store, name), to_plain(self.config))
        progress = restore(self.saver.store, name, engine)
        self.position = progress.position
        self.balancer.load(progress.balance)
        if progress.ranks != self.ranks:  # else the random states are those of the checkpoint
            torch.manual_seed(self.config.seed + 7919 * self.rank + 104729 * progress.step)

    def _save(self, output: StepOutput) -> None:
        """Begin to write a checkpoint; `_commit` hears when all ranks have."""
        if output.step == self.saved_step:
            return
        self.saved_step = output.step
        finite = [total for total in self.totals if math.isfinite(total)]
        self.totals.clear()
        progress = Progress(
            output.step,
            output.position,
            self.ranks,
            redacted(self.config),
            loss=sum(finite) / len(finite) if finite else None,
            updates=self.engine.updates(),
            balance=self.balancer.state(),
        )
        started = time.perf_counter()
        self._commit(self.saver.finish(wait=True))
        self.saving_since = time.perf_counter()
        self.saver.begin(self.engine, progress)
        self.checkpoint_values = {"checkpoint_seconds": time.perf_counter() - started}

    def _keep_told(self) -> None:
        """What was told of the steps of a checkpoint lies in the run's folder before the checkpoint exists.

        Else a run that goes on from it, here or on another machine, would lack records. Runs in a thread.
        """
        told = ray.get(self.monitor.told.remote(whole=not self.store.is_local))
        for name, content in told.items():
            self.store.write_bytes(name, content)

    def _commit(self, progress: Progress | None) -> None:
        """A checkpoint exists: tell the monitor, and delete older ones.

        Ray isn't told: it would list them all, and refuse to begin again once one of its list is deleted.
        """
        if progress is None:
            return
        self.watchdog.alive()
        tell_retries(self.monitor)
        name = step_name(progress.step, self.ranks)
        self.checkpoint_values["checkpoint_step"] = progress.step
        if self.rank == 0:
            stalled = self.checkpoint_values.get("checkpoint_seconds", 0.0)
            seconds = time.perf_counter() - self.saving_since
            self.monitor.checkpoint.remote(name, progress.step, stalled, seconds)
            try:
                retire(self.saver.store, self.config.train.keep_checkpoints, self.config.train.keep_best)
            except (StorageError, CheckpointError) as error:
                self.monitor.event.remote("warning", str(error))

    def _go_back(self, spike: LossSpike, rollbacks: int) -> None:
        """To the last checkpoint before the spikes; on with the samples behind them."""
        self._commit(self.saver.finish(wait=True))
        store, first = self.saver.store, spike.step - self.config.train.rollback_after
        names = checkpoints_in(store) if self.rank == 0 else []
        before = [name for name in names if step_of(name) <= first and is_complete(store, name)]
        name = ray.train.collective.broadcast_from_rank_zero(before[-1] if before else "")
        if not name or rollbacks == MAX_ROLLBACKS:
            why = f"after {rollbacks} rollbacks" if name else "and there is no checkpoint from before"
            raise DataError(f"{spike}, {why}; lower train.learning_rate, or look at the data")
        if self.rank == 0:
            for later in names[names.index(name) + 1 :]:
                store.delete(later)
        self.balancer.load(restore(store, name, self.engine).balance)
        self.position, self.saved_step = spike.position, -1
        if self.rank == 0:
            detail = f"{spike}; back to {name}, on with the samples from {spike.position} on"
            ray.get(self.monitor.go_back.remote(self.engine.steps_done, detail))

    def _export(self, engine: Engine, tokenizer: Any) -> None:
        """A folder that `from_pretrained` loads: weights, configuration, tokenizer; adapters also alone."""
        folder = Path(tempfile.mkdtemp(prefix="unimrg-model-"))
        try:
            save_model(engine, folder / MODEL)
            adapted = save_adapters(engine, folder / ADAPTER)
            if self.rank == 0:
                tokenizer.save_pretrained(folder / MODEL)
                for name in (MODEL, ADAPTER) if adapted else (MODEL,):
                    self.store.upload(folder / name, name)
                self.monitor.event.remote("finish", MODEL, engine.steps_done)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if dist.is_initialized():
            dist.barrier()


def _device(config: RunConfig) -> torch.device:
    """This worker's GPU, or the CPU with its share of the cores."""
    if torch.cuda.is_available():
        return ray.train.torch.get_device()
    local = ray.train.get_context().get_local_world_size()
    torch.set_num_threads(config.engine.threads or max(1, (os.cpu_count() or 1) // local))
    return torch.device("cpu")
