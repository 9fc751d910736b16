"""The training loop: plain functions over any iterable of batches; no Ray, no family, no storage.

for micro_batches in batches:  train_step(engine, micro_batches, weights)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from unimrg.balance import Balancer, SharedGradients
from unimrg.config import TrainConfig
from unimrg.engine import Engine, gather, world
from unimrg.errors import DataError
from unimrg.hardware import peak_memory
from unimrg.health import Health, LossSpike
from unimrg.losses import combine
from unimrg.packing import Batch
from unimrg.sample import Task

DATA_ENDED = "the data ended; is any sample usable?"


@dataclass(frozen=True)
class StepOutput:
    """One optimiser step, over the global batch.

    step: 1 for the first. losses: mean of every task present. total: as in `losses.combine`.
    position: 1 + the largest sample position used on any rank. samples, tokens: of all ranks.
    flops: of all ranks, forward and backward, by formula (`unimrg.flops`): nothing twice that was recomputed.
    peak_memory: bytes, the most that any rank has needed so far (`hardware.peak_memory`).
    started, ready, ended: values of `time.perf_counter()`: batch asked for, batch there, update done.
    truncated: conversations cut at the maximum length. weights: of the tasks in this step. wrong: what is
    wrong with the step ("skipped": loss or gradient wasn't finite and nothing was updated, "spike"), or "".
    suspects: ids of the samples of a step that went wrong, only those of the workers whose loss wasn't finite
    if there are any.
    """

    step: int
    losses: dict[Task, float]
    total: float
    grad_norm: float
    learning_rate: float
    position: int
    samples: int
    tokens: int
    flops: float
    peak_memory: int
    started: float
    ready: float
    ended: float
    truncated: int
    weights: Mapping[Task, float]
    wrong: str = ""
    suspects: tuple[str, ...] = ()


def train_step(
    engine: Engine,
    batches: Sequence[Batch],
    weights: Mapping[Task, float],
    gradients: SharedGradients | None = None,
) -> tuple[dict[Task, Tensor], float | Tensor, dict[Task, float]]:
    """One optimiser step over accumulated micro-batches.

    Returns this rank's loss sums by task, the gradient norm before clipping, and the global counts.
    """
    counts = global_counts(batches)
    sums: dict[Task, Tensor] = {}
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        losses = engine.forward(batch.to(engine.device, engine.attention), last)
        if gradients:
            gradients.add(losses)
        total = combine(losses, weights, counts, engine.ranks)
        # Times one, or times NaN where the loss isn't finite: then no gradient is, on any rank, and the
        # engines skip the update without anybody waiting for a number.
        engine.backward(total * (1 + 0 * total.detach()), last)
        for task, loss in losses.items():
            sums[task] = sums.get(task, 0) + loss.sum.detach()
    return sums, engine.step(), counts


def global_counts(batches: Sequence[Batch]) -> dict[Task, float]:
    """N_t of `losses.combine`: terms of each task over all ranks and micro-batches of a step."""
    tasks = list(Task)
    mine = [float(sum(batch.counts.get(task, 0) for batch in batches)) for task in tasks]
    return dict(zip(tasks, (sum(column) for column in zip(*gather(mine), strict=True)), strict=True))


def fit(
    engine: Engine,
    batches: Iterable[Sequence[Batch]],
    weights: Mapping[Task, float] | Balancer,
    steps: int,
    observe: Callable[[StepOutput], None] = lambda output: None,
    save: Callable[[StepOutput], None] = lambda output: None,
    save_every: int = 0,
    stop: Callable[[], str] = str,
    pause: Callable[[], bool] = bool,
    health: Health | None = None,
) -> None:
    """Train until `steps` optimiser steps are done (those of a resumed engine count).

    batches: micro-batches of one step at a time, the same number on every rank. weights: of the tasks, fixed
    or moved by a balancer. observe: called after every step; save: every `save_every` steps and after the
    last one. stop: a reason to give up, or "". pause: whether to save now and return before the end. health:
    how much may go wrong; by default as much as by the default configuration.
    Raises DataError, on every rank, when one gives up, the batches end too early, or too many updates in a
    row were skipped; LossSpike when it is time to go back.
    """
    source = iter(batches)
    health = health or Health(TrainConfig())
    balancer = weights if isinstance(weights, Balancer) else Balancer(weights)
    gradients = SharedGradients(engine.model.shared_layer) if balancer.needs_gradients else None
    unsaved: StepOutput | None = None
    while engine.steps_done < steps:
        started = time.perf_counter()
        micro_batches = next(source, None)
        ready = time.perf_counter()
        if not _agree_to_go_on(stop() or ("" if micro_batches else DATA_ENDED), pause()):
            if unsaved:
                save(unsaved)
            return
        assert micro_batches is not None
        now = balancer.weights()
        result = train_step(engine, micro_batches, now, gradients)
        output = _summarise(engine, micro_batches, now, result, (started, ready), health)
        balancer.update(output.losses, _norms(gradients, result[2]) if gradients else {})
        observe(output)
        _check(output, health)
        unsaved = output
        if engine.steps_done == steps or (save_every and engine.steps_done % save_every == 0):
            save(output)
            unsaved = None


def _norms(gradients: SharedGradients, counts: Mapping[Task, float]) -> dict[Task, float]:
    """Of the gradients of every task's global mean loss."""
    squares = gradients.take()
    rows = gather([float(squares.get(task, 0.0)) for task in Task])
    columns = zip(Task, zip(*rows, strict=True), strict=True)
    return {task: math.sqrt(sum(column)) / counts[task] for task, column in columns if counts[task]}


def _agree_to_go_on(reason: str, pause: bool) -> bool:
    """False on every rank if one wants a pause; every rank raises if one has a reason to.

    A rank that left alone would leave the others waiting.
    """
    stops, pauses = zip(*gather([float(bool(reason)), float(pause)]), strict=True)
    if any(stops):
        raise DataError(reason or "another worker gave up; its message says why")
    return not any(pauses)


def _check(output: StepOutput, health: Health) -> None:
    if health.must_go_back:
        raise LossSpike(output.step, output.position)
    if health.must_stop:
        raise DataError(
            f"the loss is {output.total:g} and the gradient's norm {output.grad_norm:g} at step {output.step}"
            f", the last of {health.skipped_in_a_row} such steps in a row; look at the samples "
            f"{', '.join(output.suspects[:8])}, or lower train.learning_rate"
        )


def _suspects(batches: Sequence[Batch], finite: bool) -> tuple[str, ...]:
    """Ids of all ranks' samples, or only of the ranks whose loss isn't finite."""
    mine = (finite, [name for batch in batches for name in batch.ids])
    everyone = [mine]
    if world()[1] > 1:
        everyone = [mine] * world()[1]
        dist.all_gather_object(everyone, mine)
    bad = [names for fine, names in everyone if not fine] or [names for _, names in everyone]
    return tuple(name for names in bad for name in names)


def _sizes(engine: Engine, batches: Sequence[Batch]) -> list[float]:
    """Of this rank's part of a step: position, samples, tokens, cut texts, FLOPs; and its peak memory."""
    parts = [part for batch in batches for part in engine.model.flops(batch).values()]
    return [
        max(b.next_position for b in batches),
        sum(b.samples for b in batches),
        sum(b.tokens for b in batches),
        sum(b.notes.get("truncated", 0) for b in batches),
        sum(part.total for part in parts),
        peak_memory(engine.device),
    ]


def _summarise(
    engine: Engine,
    batches: Sequence[Batch],
    weights: Mapping[Task, float],
    result: tuple[Mapping[Task, Tensor], float | Tensor, Mapping[Task, float]],
    times: tuple[float, float],
    health: Health,
) -> StepOutput:
    """Global means and sizes of the step just done; the only place that reads losses on the host."""
    sums, norm, counts = result
    sizes = _sizes(engine, batches)  # before the losses are read: a GPU is still at work
    mine = [float(sums.get(task, 0.0)) for task in Task]
    rows = gather([*mine, *sizes])
    *totals, positions, samples, tokens, cut, flops, memory = zip(*rows, strict=True)
    means = {
        task: sum(column) / counts[task] for task, column in zip(Task, totals, strict=True) if counts[task]
    }
    active = sum(weights[task] for task in means)
    total = sum(weights[task] * mean for task, mean in means.items()) / active if active else 0.0
    wrong = health.judge(total, float(norm))
    return StepOutput(
        step=engine.steps_done,
        losses=means,
        total=total,
        grad_norm=float(norm),
        learning_rate=engine.learning_rate(),
        position=int(max(positions)),
        samples=int(sum(samples)),
        tokens=int(sum(tokens)),
        flops=sum(flops),
        peak_memory=int(max(memory)),
        started=times[0],
        ready=times[1],
        ended=time.perf_counter(),
        truncated=int(sum(cut)),
        weights=weights,
        wrong=wrong,
        suspects=_suspects(batches, all(map(math.isfinite, mine))) if wrong else (),
    )
