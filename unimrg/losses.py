"""Where a weight meets a loss, and nowhere else.

    total = Σ_t w_t · (Σ_i loss_{t,i} / N_t) / Σ_t w_t        over the tasks t with N_t > 0

loss_{t,i} are the unweighted terms of task t (one answer token, one masked latent row) and N_t is their
number in the *global* batch: all ranks and all accumulated micro-batches. Dividing by the sum of the weights
keeps the meaning of learning rate and clipping when weights change. Equal weights with one micro-batch a
task are the published recipe (accumulation over four micro-steps is the same mean).

Who divides by what: a micro-batch contributes its own sum over the global count, so micro-batches and ranks
are *added*. Engines average gradients over ranks (DDP, DeepSpeed), therefore `combine` multiplies by the
number of ranks, and DeepSpeed is told not to divide by accumulation steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from unimrg.sample import Task


class TaskLoss(NamedTuple):
    """Unweighted loss of one task in a micro-batch: `sum` of its terms (scalar tensor) and their `count`.

    A tuple, because ZeRO-3 looks for the tensors of a model's output in tuples, lists and dictionaries only.
    """

    sum: torch.Tensor
    count: int  # type: ignore[assignment]  # hides the method of tuples

    @property
    def mean(self) -> torch.Tensor:
        return self.sum / max(self.count, 1)


def combine(
    losses: Mapping[Task, TaskLoss],
    weights: Mapping[Task, float],
    counts: Mapping[Task, float],
    ranks: int = 1,
) -> torch.Tensor:
    """Weighted total of a micro-batch (scalar tensor), see the module's equation.

    counts: N_t over the global batch. A task that has no term anywhere contributes zero times its loss, so
    that every module takes part in every backward pass (ZeRO-3 needs it).
    Raises KeyError when a task has no weight: a task that is never weighted is a mistake, not a default.
    """
    # Over the tasks of the global batch, not of this micro-batch: all of them must divide by the same sum.
    present = sum(weights[task] for task, count in counts.items() if count > 0)
    total = torch.zeros((), device=next(iter(losses.values())).sum.device)
    for task, loss in losses.items():
        count = counts.get(task, 0)
        factor = weights[task] * ranks / (count * present) if count > 0 and present > 0 else 0.0
        total = total + factor * loss.sum
    return total
