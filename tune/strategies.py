"""Who proposes what a trial changes: samplers of Optuna, a grid, and the baselines' learning rates.

A strategy is asked for its proposals one after the other, each time with the trials it may know: the
same answers give the same proposals, so a search is a function of its seed and of what its trials scored.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from tune.config import BASELINES, SearchConfig
from tune.objectives import OBJECTIVES
from tune.records import Trial
from tune.space import WEIGHTS, Changes, Space, centre, grid, rates, rounded, searched
from unimrg.errors import ConfigError, MissingExtraError

OFF = " is on"
"""Ends the name of a switch."""

STARTUP = 10
"""Random proposals before TPE uses what it knows: Optuna's default, and a third of a smaller budget."""


class Strategy(Protocol):
    """Proposes trials, numbered from 0."""

    def propose(self, known: Sequence[Trial]) -> Changes | None:
        """What the next trial changes, or None when there is no further one.

        known: this strategy's first trials, in the order of their numbers, all finished.
        """

    def least(self, known: Sequence[Trial]) -> dict[int, float]:
        """Step -> the least value there with which the trial proposed last may go on; {} = always."""


def make_strategy(name: str, config: SearchConfig) -> Strategy:
    """The strategy of that name. Raises ConfigError where budget, space and strategy don't go together."""
    options, seed = config.search, (config.seed + zlib.crc32(name.encode())) % 2**32
    if name == "grid":
        points = grid(searched(config), options.space.levels)
        if len(points) > options.trials:
            raise ConfigError(
                f"search.trials: {options.trials} are fewer than the {len(points)} points of the grid; raise "
                "it, or lower search.space.levels or the number of ranges"
            )
        return Listed(points)
    space = rates(config) if name in BASELINES else searched(config)
    fixed = baseline(name, config) if name in BASELINES else {}
    first = centre(config, space)
    sampler = make_sampler(name, options.trials, seed)
    strategy = Sampled(sampler, space, options.objectives, first, fixed, options.trials)
    if name != "asha":
        return strategy
    rungs = [max(1, round(share * config.train.steps)) for share in options.rungs]
    return Halving(strategy, config.train.steps * options.trials, rungs, options.reduction)


def baseline(name: str, config: SearchConfig) -> Changes:
    """All tasks that are trained count as much as understanding, or do so before balancing moves them."""
    one = config.weights.understanding or 1.0
    equal: Changes = {f"weights.{task}": one for task in WEIGHTS if getattr(config.weights, task)}
    return equal if name == "equal" else equal | {"weights.balance": name}


def make_sampler(name: str, trials: int, seed: int) -> Any:
    """A sampler of Optuna. Raises MissingExtraError."""
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("optuna", f"search.strategies={name}") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers = optuna.samplers
    if name == "random":
        return samplers.RandomSampler(seed=seed)
    startup = max(2, min(STARTUP, trials // 3))
    if name == "nsga2":
        return samplers.NSGAIISampler(population_size=startup, seed=seed)
    return samplers.TPESampler(n_startup_trials=startup, constant_liar=True, seed=seed)


class Listed:
    """Proposes what is in a list."""

    def __init__(self, points: Sequence[Changes]) -> None:
        self._points = iter(points)

    def propose(self, known: Sequence[Trial]) -> Changes | None:
        return next(self._points, None)

    def least(self, known: Sequence[Trial]) -> dict[int, float]:
        return {}


class Sampled:
    """Proposes what a sampler of Optuna draws.

    first: proposed before all else, if not None. fixed: changes that all trials share.
    """

    def __init__(
        self,
        sampler: Any,
        space: Space,
        objectives: Sequence[str],
        first: Changes | None,
        fixed: Changes,
        trials: int,
    ) -> None:
        import optuna

        directions = ["maximize" if OBJECTIVES[name].higher_is_better else "minimize" for name in objectives]
        self.optuna = optuna
        self.study = optuna.create_study(directions=directions, sampler=sampler)
        self.space, self.objectives, self.fixed, self.trials = space, objectives, fixed, trials
        self.asked: list[Any] = []
        self.told = 0
        if first is not None:
            values = {key: value for key, value in first.items() if value > 0}
            self.study.enqueue_trial(values | {d.key + OFF: first[d.key] > 0 for d in space if d.off})

    def propose(self, known: Sequence[Trial]) -> Changes | None:
        if len(self.asked) >= self.trials:
            return None
        for trial in known[self.told :]:
            self._tell(self.asked[trial.number], trial)
        self.told = len(known)
        asked = self.study.ask()
        self.asked.append(asked)
        return {**self.fixed, **{d.key: self._value(asked, d) for d in self.space}}

    def least(self, known: Sequence[Trial]) -> dict[int, float]:
        return {}

    def _value(self, asked: Any, dimension: Any) -> float:
        if dimension.off and not asked.suggest_categorical(dimension.key + OFF, [True, False]):
            return 0.0
        return rounded(asked.suggest_float(dimension.key, dimension.low, dimension.high, log=True))

    def _tell(self, asked: Any, trial: Trial) -> None:
        states = self.optuna.trial.TrialState
        if trial.state == "done":
            self.study.tell(asked, [trial.values[name] for name in self.objectives])
        elif trial.state == "stopped":
            asked.report(trial.values[self.objectives[0]], trial.steps)
            self.study.tell(asked, state=states.PRUNED)
        else:
            self.study.tell(asked, state=states.FAIL)


class Halving:
    """Asynchronous successive halving (ASHA, arXiv 1810.05934) over another strategy's proposals.

    A trial goes on behind a rung if it is among the best one in `reduction` of the trials known when it was
    proposed; so what is stopped doesn't depend on which machine was faster. What stopped trials save is
    spent on further ones: the budget is counted in optimiser steps.
    """

    def __init__(self, inner: Sampled, budget: int, rungs: Sequence[int], reduction: int) -> None:
        self.inner, self.budget, self.rungs, self.reduction = inner, budget, rungs, reduction
        inner.trials = budget  # more than can be reached: a trial is at least a step

    def propose(self, known: Sequence[Trial]) -> Changes | None:
        running = len(self.inner.asked) - len(known)
        if sum(trial.steps for trial in known) + running * self.rungs[0] >= self.budget:
            return None
        return self.inner.propose(known)

    def least(self, known: Sequence[Trial]) -> dict[int, float]:
        name = self.inner.objectives[0]
        sign = OBJECTIVES[name].sign
        limits = {}
        for rung in self.rungs:
            there = [sign * row[name] for trial in known for row in trial.curve if row["step"] == rung]
            if there:
                limits[rung] = sign * float(np.quantile(there, 1 - 1 / self.reduction))
        return limits
