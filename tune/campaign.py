"""A search as a pure function: which trial comes next, given those that are finished.

Ray isn't known here. A strategy's proposal number k may depend on its first k + 1 - `lag` trials, where `lag`
is how many run at once, and on nothing else: whichever trial ends first, and however often the search is
interrupted, the proposals are the same. Going on after an interruption is asking again from the beginning:
trials that are finished are not handed out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tune.analysis import best
from tune.config import SearchConfig
from tune.records import REPEATED, SEARCHED, Trial
from tune.space import Changes, value_of
from tune.strategies import Strategy, make_strategy
from unimrg.errors import UnimrgError

START = "start"
REPEAT_SEEDS = 1000
"""Seeds of repeats begin so far behind the search's own."""


@dataclass(frozen=True)
class Job:
    """A trial to run. rungs: steps at which it is scored on its way. least: see `Strategy.least`."""

    id: str
    strategy: str
    phase: str
    number: int
    seed: int
    changes: Changes
    rungs: tuple[int, ...] = ()
    least: dict[int, float] = field(default_factory=dict)


class _Arm:
    """One strategy's trials in the order of their numbers; None where one isn't finished."""

    def __init__(self, name: str, config: SearchConfig) -> None:
        self.name = name
        self.strategy: Strategy = make_strategy(name, config)
        self.trials: list[Trial | None] = []
        self.ended = False

    def known(self, lag: int) -> list[Trial] | None:
        """What the next proposal may depend on, or None while that isn't finished."""
        first = self.trials[: max(len(self.trials) + 1 - lag, 0)]
        finished = [trial for trial in first if trial is not None]
        return finished if len(finished) == len(first) else None


class Campaign:
    """Hands out jobs. finished: trials of an interrupted search, by id; lag: trials at once."""

    def __init__(self, config: SearchConfig, lag: int, finished: Mapping[str, Trial] | None = None) -> None:
        self.config, self.lag = config, lag
        self.finished = dict(finished or {})
        self.arms = [_Arm(name, config) for name in config.search.strategies]
        self.jobs: dict[str, Job] = {}
        self.repeats: list[Job] | None = None
        self.same: dict[str, str] = {}

    def next(self) -> Job | None:
        """A job that wasn't handed out yet; None if there is none now (see `done`).

        Raises UnimrgError when the trials so far have all failed.
        """
        self._look_at_failures()
        job = self._next()
        while job is not None and job.id in self.finished:
            self._enter(self.finished[job.id])
            job = self._next()
        return job

    def tell(self, trial: Trial) -> None:
        """A job that was handed out is finished."""
        self.finished[trial.id] = trial
        self._enter(trial)

    @property
    def done(self) -> bool:
        """Is every job finished?"""
        return self.repeats is not None and all(job.id in self.finished for job in self.repeats)

    def trials(self, phase: str = "") -> list[Trial]:
        """The finished trials in the order in which they were handed out."""
        found = [self.finished[name] for name in self.jobs if name in self.finished]
        return [trial for trial in found if phase in ("", trial.phase)]

    # -- searching -------------------------------------------------------------------------------------------

    def _next(self) -> Job | None:
        if START not in self.jobs:
            return self._hand_out(self._job(START, START, 0, {}))
        for arm in sorted((arm for arm in self.arms if not arm.ended), key=lambda arm: len(arm.trials)):
            job = self._propose(arm)
            if job is not None:
                return job
        if any(not arm.ended for arm in self.arms) or not self._searched():
            return None
        if self.repeats is None:
            self.repeats = list(self._choose_repeats())
        return next((self._hand_out(job) for job in self.repeats if job.id not in self.jobs), None)

    def _propose(self, arm: _Arm) -> Job | None:
        """The arm's next job; proposals that are the search's own config are answered by the start."""
        while (known := arm.known(self.lag)) is not None:
            changes = arm.strategy.propose(known)
            if changes is None:
                arm.ended = True
                return None
            number = len(arm.trials)
            if self._is_start(changes):
                start = self.finished.get(START)
                arm.trials.append(start and dataclasses.replace(start, number=number))
                continue
            arm.trials.append(None)
            job = self._job(f"{arm.name}-{number:03d}", arm.name, number, changes)
            return self._hand_out(dataclasses.replace(job, least=arm.strategy.least(known)))
        return None

    def _job(self, name: str, strategy: str, number: int, changes: Changes) -> Job:
        options = self.config.search
        stopping = strategy == "asha" or (strategy == START and "asha" in options.strategies)
        rungs = [max(1, round(share * self.config.train.steps)) for share in options.rungs]
        return Job(
            name, strategy, SEARCHED, number, self.config.seed, changes, tuple(rungs) if stopping else ()
        )

    def _hand_out(self, job: Job) -> Job:
        self.jobs[job.id] = job
        return job

    def _enter(self, trial: Trial) -> None:
        """Into the arms whose proposal it was."""
        for arm in self.arms:
            if trial.id == START:
                numbers = [k for k, known in enumerate(arm.trials) if known is None]
                own = {job.number for job in self.jobs.values() if job.strategy == arm.name}
                for number in set(numbers) - own:
                    arm.trials[number] = dataclasses.replace(trial, number=number)
            elif trial.strategy == arm.name and trial.phase == SEARCHED:
                arm.trials[trial.number] = trial

    def _is_start(self, changes: Changes) -> bool:
        return all(value_of(self.config, key) == value for key, value in changes.items())

    def _searched(self) -> bool:
        return all(job.id in self.finished for job in self.jobs.values() if job.phase == SEARCHED)

    def _look_at_failures(self) -> None:
        trials = list(self.finished.values())
        if len(trials) > self.lag and all(trial.state == "failed" for trial in trials):
            raise UnimrgError(f"all {len(trials)} trials so far have failed: {trials[0].error}")

    # -- judging ---------------------------------------------------------------------------------------------

    def _choose_repeats(self) -> Iterable[Job]:
        """Best, default and tuned equal weights with fresh seeds, each configuration once."""
        trials = self.trials(SEARCHED)
        objective = self.config.search.objectives[0]
        tuned = [trial for trial in trials if trial.strategy in ("equal", START)]
        chosen = {"best": best(trials, objective), "default": self.finished[START]}
        if "equal" in self.config.search.strategies:
            chosen["equal"] = best(tuned, objective)
        seen: dict[str, str] = {}
        for role in sorted(chosen, key=("default", "best", "equal").index):
            trial = chosen[role]
            if trial is None:
                continue
            if trial.id in seen:
                self.same[role] = seen[trial.id]
                continue
            seen[trial.id] = role
            for number in range(self.config.search.repeats):
                seed = (self.config.seed + REPEAT_SEEDS + number) % 2**32
                yield Job(f"{role}-seed-{number}", role, REPEATED, number, seed, trial.changes)
