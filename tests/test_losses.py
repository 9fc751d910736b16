"""The one equation in which weights meet losses."""

from __future__ import annotations

import pytest
import torch

from unimrg.losses import TaskLoss, combine
from unimrg.sample import Task

TEXT, PIXEL, DEPTH = Task.UNDERSTANDING, Task.PIXEL, Task.DEPTH


def loss(value: float, count: int) -> TaskLoss:
    return TaskLoss(torch.tensor(value, requires_grad=True), count)


def test_equation() -> None:
    losses = {TEXT: loss(6.0, 3), PIXEL: loss(20.0, 4)}
    total = combine(losses, {TEXT: 1.0, PIXEL: 0.5}, {TEXT: 3, PIXEL: 4})
    assert total.item() == pytest.approx((1.0 * 2 + 0.5 * 5) / 1.5)
    total.backward()
    assert float(losses[TEXT].sum.grad) == pytest.approx(1 / 3 / 1.5)


def test_equal_weights_are_the_mean_of_the_task_means() -> None:
    losses = {task: loss(2.0 * n, n) for n, task in enumerate(Task, start=1)}
    counts = {task: value.count for task, value in losses.items()}
    assert combine(losses, dict.fromkeys(Task, 7.0), counts).item() == pytest.approx(2.0)


def test_a_weight_of_zero_takes_a_task_out() -> None:
    losses = {TEXT: loss(6.0, 3), PIXEL: loss(20.0, 4)}
    total = combine(losses, {TEXT: 1.0, PIXEL: 0.0}, {TEXT: 3, PIXEL: 4})
    total.backward()
    assert total.item() == pytest.approx(2.0)
    assert float(losses[PIXEL].sum.grad) == 0.0


def test_a_task_without_terms_takes_part_and_weighs_nothing() -> None:
    """Its modules must run backwards on every rank, and the others' mean must not feel it."""
    losses = {TEXT: loss(6.0, 3), DEPTH: loss(5.0, 0)}
    total = combine(losses, {TEXT: 1.0, DEPTH: 1.0}, {TEXT: 3, DEPTH: 0})
    total.backward()
    assert total.item() == pytest.approx(2.0)
    assert losses[DEPTH].sum.grad is not None and float(losses[DEPTH].sum.grad) == 0.0


def test_micro_batches_add_up_whichever_tasks_they_hold() -> None:
    weights, counts = {TEXT: 1.0, PIXEL: 0.5, DEPTH: 2.0}, {TEXT: 3, PIXEL: 4, DEPTH: 5}
    whole = {TEXT: loss(6.0, 3), PIXEL: loss(20.0, 4), DEPTH: loss(10.0, 5)}
    parts = [{TEXT: loss(6.0, 3), PIXEL: loss(5.0, 1)}, {PIXEL: loss(15.0, 3)}, {DEPTH: loss(10.0, 5)}]
    total = sum(combine(part, weights, counts).item() for part in parts)
    assert total == pytest.approx(combine(whole, weights, counts).item())


def test_the_average_over_ranks_is_the_global_loss() -> None:
    weights, counts = {TEXT: 1.0, PIXEL: 1.0}, {TEXT: 4, PIXEL: 2}
    ranks = [{TEXT: loss(3.0, 1), PIXEL: loss(8.0, 2)}, {TEXT: loss(9.0, 3), PIXEL: loss(0.0, 0)}]
    mean = sum(combine(losses, weights, counts, ranks=2).item() for losses in ranks) / 2
    assert mean == pytest.approx((12 / 4 + 8 / 2) / 2)


def test_a_missing_weight_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        combine({TEXT: loss(1.0, 1), PIXEL: loss(1.0, 1)}, {TEXT: 1.0}, {TEXT: 1, PIXEL: 1})


def test_nothing_to_learn_is_zero() -> None:
    assert combine({TEXT: loss(3.0, 0)}, {TEXT: 1.0}, {TEXT: 0}).item() == 0.0


def test_mean_of_no_terms_is_zero() -> None:
    assert loss(0.0, 0).mean.item() == 0.0
