"""The training loop: plain functions over any iterable of batches; no Ray, no family, no storage.

    for micro_batches in batches:  train_step(engine, micro_batches, weights)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
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
    seconds: whole step; wait_seconds: of this, waiting for data. notes: counts of events.
    """

    step: int
    losses: dict[Task, float]
    total: float
    grad_norm: float
    learning_rate: float
    position: int
    samples: int
    tokens: int
    seconds: float
    wait_seconds: float
    notes: dict[str, int] = field(default_factory=dict)


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
) -> None:
    """Train until `steps` optimiser steps are done (those of a resumed engine count).

    batches: micro-batches of one step at a time, the same number on every rank. observe: called after every
    step; save: every `save_every` steps and after the last one.
    Raises DataError when the batches end too early, or when a loss is not finite.
    """
    source = iter(batches)
    while engine.steps_done < steps:
        began = time.perf_counter()
        micro_batches = next(source, None)
        waited = time.perf_counter() - began
        if micro_batches is None:
            raise DataError(f"the data ended after {engine.steps_done} of {steps} steps; is any sample usable?")
        sums, norm, counts = train_step(engine, micro_batches, weights)
        output = _summarise(engine, micro_batches, weights, sums, norm, counts, began, waited)
        observe(output)
        if engine.steps_done == steps or (save_every and engine.steps_done % save_every == 0):
            save(output)


def _summarise(
    engine: Engine,
    batches: Sequence[Batch],
    weights: Mapping[Task, float],
    sums: Mapping[Task, Tensor],
    norm: float | Tensor,
    counts: Mapping[Task, float],
    began: float,
    waited: float,
) -> StepOutput:
    """Global means and sizes of the step just done; the only place that reads losses on the host."""
    tasks = list(Task)
    mine = [float(sums.get(task, 0.0)) for task in tasks]
    sizes = [sum(b.samples for b in batches), sum(b.tokens for b in batches), max(b.next_position for b in batches)]
    truncated = sum(b.notes.get("truncated", 0) for b in batches)
    rows = gather([*mine, *sizes, truncated])
    columns = list(zip(*rows, strict=True))
    means = {
        task: sum(column) / counts[task] for task, column in zip(tasks, columns, strict=False) if counts[task]
    }
    active = sum(weights[task] for task in means)
    total = sum(weights[task] * mean for task, mean in means.items()) / active if active else 0.0
    if not torch.isfinite(torch.tensor(total)):
        raise DataError(f"the loss is {total} at step {engine.steps_done}; lower train.learning_rate or train.clip")
    return StepOutput(
        step=engine.steps_done,
        losses=means,
        total=total,
        grad_norm=float(norm),
        learning_rate=engine.learning_rate(),
        samples=int(sum(columns[-4])),
        tokens=int(sum(columns[-3])),
        position=int(max(columns[-2])),
        seconds=time.perf_counter() - began,
        wait_seconds=waited,
        notes={"truncated": int(sum(columns[-1]))},
    )
