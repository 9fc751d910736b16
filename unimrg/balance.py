"""Weights that follow the losses while a run trains: the known ways to balance tasks without a search.

A balancer multiplies the configured weights by factors with mean 1 over the trained tasks. After every step
it learns from the global mean losses, which the host reads anyway, with Adam on one number a task. All ranks
see the same numbers, so they agree without a word; the state is a few floats of the checkpoint.

    uncertainty   factor ∝ exp(-s), s learned by Σ exp(-s)·L + s    (Kendall et al., arXiv 1705.07115)
    gradnorm      gradients of all tasks come to G·r^α, where G is their mean size and r the relative
                  training rate                                     (Chen et al., arXiv 1711.02257)
    famo          factor ∝ softmax(ξ) / L, ξ learned so that all log losses fall alike
                                                                    (Liu et al., arXiv 2306.03792)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unimrg.losses import TaskLoss
from unimrg.sample import Task

ALPHA = 1.5
"""GradNorm's asymmetry, the value of most of its paper's experiments: how strongly slow tasks are pulled."""

DECAY = 1e-3
"""FAMO's regularisation of ξ."""

LEAST = 1e-8
"""Losses are taken to be no smaller before their logarithm or inverse is."""

BETAS, EPS = (0.9, 0.999), 1e-8


def make_balancer(name: str, weights: Mapping[Task, float], rate: float) -> Balancer:
    """The balancer of `weights.balance` over the tasks with a weight; `none` never moves a weight.

    rate: of its Adam.
    """
    kinds = {"none": Balancer, "uncertainty": Uncertainty, "gradnorm": GradNorm, "famo": Famo}
    return kinds[name](weights, rate)


class Balancer:
    """Fixed weights, and what the others share: one learned number a task, 0 at the start."""

    moves = False
    needs_gradients = False

    def __init__(self, weights: Mapping[Task, float], rate: float = 0.0) -> None:
        self.given = dict(weights)
        self.rate = rate
        self.tasks = [task for task, weight in weights.items() if weight > 0]
        self.learned = dict.fromkeys(self.tasks, 0.0)
        self._moments = {task: [0.0, 0.0, 0.0] for task in self.tasks}
        self._seen: dict[Task, float] = {}

    def weights(self) -> dict[Task, float]:
        """Weights of the next step."""
        factors = self._factors()
        mean = sum(factors.values()) / len(factors)
        return {task: weight * factors.get(task, 0.0) / mean for task, weight in self.given.items()}

    def update(self, losses: Mapping[Task, float], gradients: Mapping[Task, float]) -> None:
        """Learn from a step. losses: global means of the tasks present; gradients: see `SharedGradients`.

        A step with a loss that isn't finite teaches nothing.
        """
        there = {task: losses[task] for task in self.tasks if task in losses}
        if not there or not all(map(math.isfinite, (*there.values(), *gradients.values()))):
            return
        for task, slope in self._slopes(there, gradients).items():
            self._descend(task, slope)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: exact in JSON."""
        if not self.moves:
            return {}
        rows = {task: [self.learned[task], *self._moments[task]] for task in self.tasks}
        return {
            "learned": {task.value: row for task, row in rows.items()},
            "seen": {task.value: loss for task, loss in self._seen.items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; from one without a state (of a run that didn't balance) at the start."""
        for name, (learned, *moments) in state.get("learned", {}).items():
            if Task(name) in self.learned:
                self.learned[Task(name)], self._moments[Task(name)] = learned, list(moments)
        self._seen = {Task(name): loss for name, loss in state.get("seen", {}).items()}

    def _factors(self) -> dict[Task, float]:
        return dict.fromkeys(self.tasks, 1.0)

    def _slopes(self, losses: Mapping[Task, float], gradients: Mapping[Task, float]) -> dict[Task, float]:
        """Derivative of what is minimised by the number of each task; fixed weights minimise nothing."""
        return {}

    def _descend(self, task: Task, slope: float) -> None:
        first, second, count = self._moments[task]
        count += 1
        first = BETAS[0] * first + (1 - BETAS[0]) * slope
        second = BETAS[1] * second + (1 - BETAS[1]) * slope * slope
        size = math.sqrt(second / (1 - BETAS[1] ** count)) + EPS
        self.learned[task] -= self.rate * first / (1 - BETAS[0] ** count) / size
        self._moments[task] = [first, second, count]


class Uncertainty(Balancer):
    """Each task's loss over its learned variance exp(s)."""

    moves = True

    def _factors(self) -> dict[Task, float]:
        return {task: math.exp(-s) for task, s in self.learned.items()}

    def _slopes(self, losses: Mapping[Task, float], gradients: Mapping[Task, float]) -> dict[Task, float]:
        return {task: 1 - math.exp(-self.learned[task]) * loss for task, loss in losses.items()}


class GradNorm(Balancer):
    """Gradients of like size, larger for tasks that have come less far than the others.

    Sizes are measured at the last hidden states that all tasks share (`SharedGradients`), not at a weight.
    The learned numbers are the factors' logarithms, so that factors stay positive; and the aims add up to
    what there is, because aims that can't all be met would drive the fastest task's weight to 0.
    """

    moves = True
    needs_gradients = True

    def _factors(self) -> dict[Task, float]:
        return {task: math.exp(value) for task, value in self.learned.items()}

    def _slopes(self, losses: Mapping[Task, float], gradients: Mapping[Task, float]) -> dict[Task, float]:
        weights = self.weights()
        sizes = {task: weights[task] * gradients[task] for task in losses if gradients.get(task)}
        if len(sizes) < 2:
            return {}
        left = {}
        for task in sizes:
            left[task] = losses[task] / max(self._seen.setdefault(task, losses[task]), LEAST)
        pulls = {task: loss**ALPHA for task, loss in left.items()}
        share = sum(sizes.values()) / max(sum(pulls.values()), LEAST)
        aims = {task: share * pull for task, pull in pulls.items()}
        return {task: math.copysign(sizes[task], sizes[task] - aims[task]) for task in sizes}


class Famo(Balancer):
    """All log losses fall at the same rate.

    The method compares a batch's losses before and after its update, which takes one more pass; here the next
    step's losses stand for those after it, as cheap as no balancing and noisier.
    """

    moves = True

    def _factors(self) -> dict[Task, float]:
        shares = self._shares(self.tasks)
        return {task: share / max(self._seen.get(task, 1.0), LEAST) for task, share in shares.items()}

    def _shares(self, tasks: Sequence[Task]) -> dict[Task, float]:
        """Softmax of the learned numbers."""
        top = max(self.learned[task] for task in tasks)
        powers = {task: math.exp(self.learned[task] - top) for task in tasks}
        return {task: power / sum(powers.values()) for task, power in powers.items()}

    def _slopes(self, losses: Mapping[Task, float], gradients: Mapping[Task, float]) -> dict[Task, float]:
        both = [task for task in losses if task in self._seen]
        falls = {t: math.log(max(self._seen[t], LEAST)) - math.log(max(losses[t], LEAST)) for t in both}
        self._seen |= losses
        shares = self._shares(both) if both else {}
        mean = sum(shares[task] * falls[task] for task in both)
        return {task: shares[task] * (falls[task] - mean) + DECAY * self.learned[task] for task in both}


class SharedGradients:
    """Norms of the tasks' gradients at the last hidden states that all of them share.

    The rows of different samples are different, so squares add up over micro-batches and ranks: the norms are
    those of the global batch, however it is cut. layer: the module that puts these states out.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._hidden: Tensor | None = None
        self._hook = layer.register_forward_hook(self._keep)
        self._squares: dict[Task, Tensor] = {}

    def _keep(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self._hidden = output

    def add(self, losses: Mapping[Task, TaskLoss]) -> None:
        """A micro-batch's losses, of the pass just made and before its backward pass."""
        hidden, self._hidden = self._hidden, None
        if hidden is None or not hidden.requires_grad:
            return
        for task, loss in losses.items():
            if loss.sum.requires_grad:
                (slope,) = torch.autograd.grad(loss.sum, hidden, retain_graph=True, materialize_grads=True)
                square = slope.float().square().sum()
                self._squares[task] = self._squares.get(task, torch.zeros_like(square)) + square

    def take(self) -> dict[Task, Tensor]:
        """This rank's sums of squares since the last call, of summed losses."""
        squares, self._squares = self._squares, {}
        return squares

    def close(self) -> None:
        """Watch no longer."""
        self._hook.remove()
