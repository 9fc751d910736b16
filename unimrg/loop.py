"""The training loop: plain functions over any iterable of batches; no Ray, no family, no storage.

for micro_batches in batches:  train_step(engine, micro_batches, weights)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from unimrg.engine import Engine, gather
from unimrg.errors import DataError
from unimrg.losses import combine
from unimrg.packing import Batch
from unimrg.sample import Task


@dataclass(frozen=True)
class StepOutput:
    """One optimiser step, over the global batch.

    step: 1 for the first. losses: mean of every task present. total: as in `losses.combine`.
    position: 1 + the largest sample position used on any rank. samples, tokens: of all ranks.
    started, ready, ended: values of `time.perf_counter()`: batch asked for, batch there, update done.
    truncated: conversations cut at the maximum length.
    """

    step: int
    losses: dict[Task, float]
    total: float
    grad_norm: float
    learning_rate: float
    position: int
    samples: int
    tokens: int
    started: float
    ready: float
    ended: float
    truncated: int


def train_step(
    engine: Engine, batches: Sequence[Batch], weights: Mapping[Task, float]
) -> tuple[dict[Task, Tensor], float | Tensor, dict[Task, float]]:
    """One optimiser step over accumulated micro-batches.

    Returns this rank's loss sums by task, the gradient norm before clipping, and the global counts.
    """
    counts = global_counts(batches)
    sums: dict[Task, Tensor] = {}
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        losses = engine.forward(batch.to(engine.device), last)
        engine.backward(combine(losses, weights, counts, engine.ranks), last)
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
    weights: Mapping[Task, float],
    steps: int,
    observe: Callable[[StepOutput], None] = lambda output: None,
    save: Callable[[StepOutput], None] = lambda output: None,
    save_every: int = 0,
    stop: Callable[[], str] = str,
) -> None:
    """Train until `steps` optimiser steps are done (those of a resumed engine count).

    batches: micro-batches of one step at a time, the same number on every rank. observe: called after every
    step; save: every `save_every` steps and after the last one. stop: a reason to give up, or "".
    Raises DataError, on every rank, when one gives up, the batches end too early, or a loss is not finite.
    """
    source = iter(batches)
    while engine.steps_done < steps:
        started = time.perf_counter()
        micro_batches = next(source, None)
        ready = time.perf_counter()
        _agree_to_go_on(stop() or ("" if micro_batches else "the data ended; is any sample usable?"))
        assert micro_batches is not None
        sums, norm, counts = train_step(engine, micro_batches, weights)
        output = _summarise(engine, micro_batches, weights, (sums, norm, counts), (started, ready))
        observe(output)
        if engine.steps_done == steps or (save_every and engine.steps_done % save_every == 0):
            save(output)


def _agree_to_go_on(reason: str) -> None:
    """Every rank raises if one has a reason to: a rank that left alone would leave the others waiting."""
    if any(flag for (flag,) in gather([float(bool(reason))])):
        raise DataError(reason or "another worker gave up; its message says why")


def _summarise(
    engine: Engine,
    batches: Sequence[Batch],
    weights: Mapping[Task, float],
    result: tuple[Mapping[Task, Tensor], float | Tensor, Mapping[Task, float]],
    times: tuple[float, float],
) -> StepOutput:
    """Global means and sizes of the step just done; the only place that reads losses on the host."""
    sums, norm, counts = result
    mine = [float(sums.get(task, 0.0)) for task in Task]
    truncated = sum(b.notes.get("truncated", 0) for b in batches)
    position = max(b.next_position for b in batches)
    rows = gather(
        [*mine, position, sum(b.samples for b in batches), sum(b.tokens for b in batches), truncated]
    )
    *totals, positions, samples, tokens, cut = zip(*rows, strict=True)
    means = {
        task: sum(column) / counts[task] for task, column in zip(Task, totals, strict=True) if counts[task]
    }
    active = sum(weights[task] for task in means)
    total = sum(weights[task] * mean for task, mean in means.items()) / active if active else 0.0
    for name, value in (("loss", total), ("gradient's norm", float(norm))):
        if not math.isfinite(value):
            raise DataError(f"the {name} is {value} at step {engine.steps_done}; lower train.learning_rate")
    return StepOutput(
        step=engine.steps_done,
        losses=means,
        total=total,
        grad_norm=float(norm),
        learning_rate=engine.learning_rate(),
        position=int(max(positions)),
        samples=int(sum(samples)),
        tokens=int(sum(tokens)),
        started=times[0],
        ready=times[1],
        ended=time.perf_counter(),
        truncated=int(sum(cut)),
    )
