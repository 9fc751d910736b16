"""Weights that move: what each method drives at, that no cut of a batch changes it, and resuming exactly."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.engine_runs import BATCH, WEIGHTS, batches, make_any, samples, train_config
from tests.families import NAMES
from unimrg.balance import Balancer, SharedGradients, make_balancer
from unimrg.config import EngineConfig, RunConfig, WeightsConfig
from unimrg.errors import ConfigError
from unimrg.loop import StepOutput, fit
from unimrg.sample import Task

MOVING = ("uncertainty", "gradnorm", "famo")
TEXT, PIXEL, DEPTH, SEGMENTATION = Task
LOSSES = {TEXT: 2.0, PIXEL: 0.5, DEPTH: 0.25, SEGMENTATION: 1.0}
EQUAL = dict.fromkeys(Task, 1.0)


def learn(balancer: Balancer, steps: int, losses: dict[Task, float], gradients: Any = None) -> None:
    for _ in range(steps):
        balancer.update(losses, gradients or {})


def ratio(balancer: Balancer, one: Task, other: Task) -> float:
    weights = balancer.weights()
    return weights[one] / weights[other]


@pytest.mark.parametrize("name", ("none", *MOVING))
def test_factors_have_mean_one_and_leave_out_what_is_left_out(name: str) -> None:
    balancer = make_balancer(name, EQUAL | {DEPTH: 0.0}, 0.05)
    learn(balancer, 20, LOSSES, {task: 1.0 + number for number, task in enumerate(Task)})
    weights = balancer.weights()
    assert weights[DEPTH] == 0 and sum(weights.values()) == pytest.approx(3)
    assert (weights == EQUAL | {DEPTH: 0.0}) == (name == "none")


@pytest.mark.parametrize("name", MOVING)
def test_factors_multiply_the_weights_given(name: str) -> None:
    given = WEIGHTS.by_task()
    balancer = make_balancer(name, given, 0.05)
    assert balancer.weights() == pytest.approx(given)


def test_uncertainty_comes_to_the_inverse_of_the_losses() -> None:
    """Where exp(-s)·L + s is least, exp(-s) is 1 / L."""
    balancer = make_balancer("uncertainty", EQUAL, 0.02)
    learn(balancer, 3000, LOSSES)
    assert ratio(balancer, DEPTH, TEXT) == pytest.approx(8, rel=0.02)
    assert ratio(balancer, PIXEL, SEGMENTATION) == pytest.approx(2, rel=0.02)


def test_gradnorm_makes_gradients_equal_and_favours_the_slow() -> None:
    gradients = {TEXT: 4.0, PIXEL: 1.0, DEPTH: 0.5, SEGMENTATION: 2.0}
    balancer = make_balancer("gradnorm", EQUAL, 0.005)
    learn(balancer, 3000, LOSSES, gradients)
    sizes = [weight * gradients[task] for task, weight in balancer.weights().items()]
    assert max(sizes) / min(sizes) < 1.05
    learn(
        balancer, 3000, LOSSES | {PIXEL: LOSSES[PIXEL] / 4}, gradients
    )  # it has come farther than the others
    sizes = [weight * gradients[task] for task, weight in balancer.weights().items()]
    assert sizes[0] / sizes[1] == pytest.approx(4**1.5, rel=0.1)


def test_famo_favours_what_falls_slowly() -> None:
    """Relative to the plain 1 / L: the fast falling loss gets less than its share."""
    balancer = make_balancer("famo", EQUAL, 0.02)
    losses = dict(LOSSES)
    for _ in range(40):
        balancer.update(losses, {})
        losses[PIXEL] *= 0.95
    balancer.update(LOSSES, {})
    assert ratio(balancer, PIXEL, TEXT) < 0.8 * LOSSES[TEXT] / LOSSES[PIXEL]
    assert ratio(balancer, DEPTH, TEXT) == pytest.approx(LOSSES[TEXT] / LOSSES[DEPTH], rel=0.05)


@pytest.mark.parametrize("name", MOVING)
def test_a_state_goes_through_json_exactly(name: str) -> None:
    gradients = {task: 0.3 + number for number, task in enumerate(Task)}
    one, other = (make_balancer(name, EQUAL, 0.05) for _ in range(2))
    learn(one, 7, LOSSES, gradients)
    other.load(json.loads(json.dumps(one.state())))
    changed = {task: loss / 3 for task, loss in LOSSES.items()} | {PIXEL: 0.4}
    learn(one, 3, changed, gradients)
    learn(other, 3, changed, gradients)
    assert one.weights() == other.weights() != EQUAL


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("wrong", (math.nan, math.inf))
def test_steps_that_are_not_finite_teach_nothing(name: str, wrong: float) -> None:
    balancer = make_balancer(name, EQUAL, 0.05)
    learn(balancer, 2, LOSSES, EQUAL)
    before = json.dumps(balancer.state())
    balancer.update(LOSSES | {DEPTH: wrong}, EQUAL)
    balancer.update({}, {})
    assert json.dumps(balancer.state()) == before


@pytest.mark.parametrize("family", NAMES)
def test_gradients_do_not_depend_on_how_a_batch_is_cut(family: str) -> None:
    """And they are those of the losses alone: measuring them leaves the parameters' gradients as they are."""
    engine, processor = make_any("torch", train_config(), family)
    gradients = SharedGradients(engine.model.shared_layer)
    found = []
    for parts in (1, 4):
        for at in range(parts):
            cut = slice(at * BATCH // parts, (at + 1) * BATCH // parts)
            losses = engine.forward(processor(samples(0)[cut]), True)
            gradients.add(losses)
        found.append({task: float(square) for task, square in gradients.take().items()})
    gradients.close()
    assert all(parameter.grad is None for parameter in engine.model.parameters())
    assert found[0] == pytest.approx(found[1], rel=1e-3) and set(found[0]) == set(Task)
    assert all(square > 0 for square in found[0].values())


@pytest.mark.parametrize("name", MOVING)
def test_training_moves_the_weights_and_resumes_exactly(name: str) -> None:
    def run(first: int, last: int, accumulation: int, made: Any, balancer: Balancer) -> list[StepOutput]:
        seen: list[StepOutput] = []
        steps = batches(made[1], first, last, accumulation)
        fit(made[0], steps, balancer, last, observe=seen.append)
        return seen

    def balancer() -> Balancer:
        return make_balancer(name, WEIGHTS.by_task(), 0.1)

    seen = run(0, 3, 1, make_any("torch", train_config(), "harmon"), balancer())
    assert seen[0].weights == pytest.approx(WEIGHTS.by_task()) and seen[2].weights != seen[0].weights
    cut = run(0, 3, 2, make_any("torch", train_config(accumulation=2), "harmon"), balancer())
    for one, other in zip(seen, cut, strict=True):
        assert one.weights == pytest.approx(other.weights, rel=1e-3)
    made, first = make_any("torch", train_config(), "harmon"), balancer()
    run(0, 2, 1, made, first)
    second = balancer()
    second.load(json.loads(json.dumps(first.state())))
    (last,) = run(2, 3, 1, made, second)
    assert (last.weights, last.losses) == (seen[2].weights, seen[2].losses)


def test_wrong_ways_to_balance_are_told() -> None:
    def config(**weights: Any) -> RunConfig:
        return RunConfig(weights=WeightsConfig(**weights))

    with pytest.raises(ConfigError, match=r"weights\.balance"):
        config(balance="magic").check()
    with pytest.raises(ConfigError, match="balance_rate"):
        config(balance="famo", balance_rate=0.0).check()
    with pytest.raises(ConfigError, match="needs two tasks"):
        config(balance="famo", pixel=0.0, depth=0.0, segmentation=0.0).check()
    deepspeed = EngineConfig(name="deepspeed", zero_stage=2)
    with pytest.raises(ConfigError, match="engine=torch"):
        RunConfig(weights=WeightsConfig(balance="gradnorm"), engine=deepspeed).check()
    RunConfig(weights=WeightsConfig(balance="famo"), engine=deepspeed).check()
