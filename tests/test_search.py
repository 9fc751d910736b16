"""The search as a pure function: proposals, budgets, resuming, and whether it finds what was planted."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tune.campaign import Campaign, Job
from tune.config import SearchConfig
from tune.objectives import OBJECTIVES
from tune.outcome import Outcome
from tune.records import REPEATED, SEARCHED, Trial
from tune.space import Dimension, grid, grid_levels, searched
from tune.strategies import make_strategy
from unimrg.compose import compose
from unimrg.config import RunConfig
from unimrg.errors import ConfigError, UnimrgError
from unimrg.storage import Store

PLANTED = {"weights.pixel": 0.3, "weights.depth": 1.7, "weights.segmentation": 0.08}


def config(*words: str) -> SearchConfig:
    return compose("search", ["search.objectives=[accuracy]", *words], SearchConfig)


def planted(changes: dict[str, Any]) -> float:
    """Highest, 1, at `PLANTED`; a smooth bowl in the logarithms of the weights."""
    miss = sum(math.log(max(changes.get(key, 1.0), 0.01) / best) ** 2 for key, best in PLANTED.items())
    return 1 - miss / 30


def finish(job: Job, value: Callable[[dict[str, Any]], float] = planted, steps: int = 40) -> Trial:
    """What a real trial would leave: it is scored at its rungs and stops where it is behind."""
    score = value(job.changes)
    curve = []
    state = "done"
    for step in (*job.rungs, steps):
        curve.append({"step": step, "accuracy": score * step / steps})
        if step in job.least and curve[-1]["accuracy"] < job.least[step]:
            state = "stopped"
            break
    values = dict.fromkeys(OBJECTIVES, score) | {"accuracy": float(curve[-1]["accuracy"])}
    return Trial(
        job.id, job.strategy, job.phase, job.number, job.seed, job.changes, state, int(curve[-1]["step"]),
        1.0, values, curve,
    )  # fmt: skip


def explore(
    options: SearchConfig,
    lag: int,
    order: random.Random | None = None,
    finished: dict[str, Trial] | None = None,
) -> tuple[Campaign, list[str]]:
    """Run to the end, `lag` trials at once, ending in random order; and which jobs were handed out."""
    campaign = Campaign(options, lag, finished)
    running: list[Job] = []
    handed: list[str] = []
    while not campaign.done:
        while len(running) < lag and (job := campaign.next()) is not None:
            running.append(job)
            handed.append(job.id)
        if running:
            at = order.randrange(len(running)) if order else 0
            campaign.tell(finish(running.pop(at), steps=options.train.steps))
    return campaign, handed


# -- proposals -----------------------------------------------------------------------------------------------

ALL = "search.strategies=[tpe,nsga2,random,asha,equal]"


@pytest.mark.parametrize("lag", [1, 2, 5])
def test_the_order_in_which_trials_end_changes_nothing(lag: int) -> None:
    options = config(ALL, "search.trials=7")
    first, _ = explore(options, lag)
    for seed in range(3):
        other, _ = explore(options, lag, random.Random(seed))
        assert {t.id: (t.changes, t.state) for t in other.trials()} == {
            t.id: (t.changes, t.state) for t in first.trials()
        }


def test_an_interrupted_search_goes_on_without_repeating() -> None:
    options = config(ALL, "search.trials=6")
    whole, everything = explore(options, 2)
    generator = random.Random(5)
    for _ in range(5):
        # Finished when the driver was killed: any trials that may have been.
        _, handed = explore(options, 2, generator)
        before = set(handed[: generator.randrange(len(handed))])
        finished = {name: trial for name, trial in whole.finished.items() if name in before}
        resumed, again = explore(options, 2, generator, finished)
        assert not set(again) & before
        assert set(again) | before == set(everything)
        assert resumed.finished == whole.finished


def test_another_seed_proposes_other_trials() -> None:
    proposals = [make_strategy("tpe", config(f"seed={seed}")) for seed in (0, 0, 1)]
    for strategy in proposals:
        strategy.propose([])  # the config itself
    first, same, other = (strategy.propose([]) for strategy in proposals)
    assert first == same != other


def test_every_strategy_keeps_its_budget_and_begins_with_the_config() -> None:
    options = config(ALL, "search.trials=8", "search.repeats=2")
    campaign, _ = explore(options, 2)
    assert campaign.finished["start"].changes == {}
    for arm in campaign.arms:
        trials = [trial for trial in arm.trials if trial is not None]
        assert trials[0].id == "start"
        spent = sum(trial.steps for trial in trials)
        full = 8 * options.train.steps
        if arm.name == "asha":  # counted in steps: stopped trials leave room for more
            assert len(trials) > 8
            assert full <= spent <= full + 2 * options.train.steps  # two run at once
        else:
            assert spent == full
    repeats = campaign.trials(REPEATED)
    assert len({(trial.strategy, trial.seed) for trial in repeats}) == len(repeats)
    assert all(trial.seed != options.seed for trial in repeats)


def test_weights_are_relative_to_understanding_and_in_their_range() -> None:
    twice = [f"weights.{task}=2" for task in ("understanding", "pixel", "depth", "segmentation")]
    options = config(*twice, "search.trials=40", "search.strategies=[random]")
    campaign, _ = explore(options, 1)
    for trial in campaign.trials(SEARCHED):
        assert all(0.1 <= value <= 10 for value in trial.changes.values())
    assert campaign.finished["start"].changes == {}


def test_switches_turn_tasks_off() -> None:
    options = config("search/space=switches", "search.trials=30", "search.strategies=[random]")
    campaign, _ = explore(options, 1)
    off = [key for t in campaign.trials(SEARCHED) for key, value in t.changes.items() if value == 0]
    assert set(off) == set(PLANTED)


def test_a_grid_is_every_combination() -> None:
    options = config("search.strategies=[grid]", "search.space.levels=2", "search.trials=8")
    campaign, _ = explore(options, 3)
    tried = {tuple(t.changes.values()) for t in campaign.trials(SEARCHED) if t.strategy == "grid"}
    assert tried == set(itertools.product([0.05, 5.0], repeat=3))
    with pytest.raises(ConfigError, match=r"27 points of the grid; raise"):
        Campaign(config("search.strategies=[grid]"), 1)


def test_asha_stops_what_is_behind() -> None:
    options = config("search.strategies=[asha]", "search.trials=10")
    campaign, _ = explore(options, 1)
    trials = campaign.trials(SEARCHED)
    stopped = [trial for trial in trials if trial.state == "stopped"]
    assert len(stopped) > len(trials) / 3
    best = max(trials, key=lambda trial: planted(trial.changes))
    assert best.state == "done"


# -- what was planted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tpe_finds_a_planted_optimum_with_a_quarter_of_a_grid(seed: int) -> None:
    """A grid that has a point within 10 % of every weight needs thousands of trials."""
    space = searched(config())
    points = math.prod(grid_levels(dimension, 0.1) for dimension in space)
    budget = 250
    assert budget <= points / 4
    options = config(f"seed={seed}", f"search.trials={budget}", "search.strategies=[tpe]", "search.repeats=0")
    campaign, _ = explore(options, 1)
    best = max(campaign.trials(SEARCHED), key=lambda trial: trial.values["accuracy"])
    for key, value in PLANTED.items():
        assert best.changes[key] == pytest.approx(value, rel=0.1), key


def test_a_coarse_grid_needs_four_times_the_trials_of_tpe() -> None:
    """At the grid's own resolution: its best value is reached by TPE within a quarter of its points."""
    space = searched(config())
    points = grid(space, 7)
    reached = max(planted(point) for point in points)
    options = config(f"search.trials={len(points) // 4}", "search.strategies=[tpe]", "search.repeats=0")
    campaign, _ = explore(options, 1)
    assert max(t.values["accuracy"] for t in campaign.trials(SEARCHED)) >= reached


def test_levels_of_a_grid() -> None:
    dimension = Dimension("weights.pixel", 0.05, 5.0)
    levels = dimension.levels(grid_levels(dimension, 0.1))
    assert all(b / a <= 1.1**2 * 1.001 for a, b in itertools.pairwise(levels))


# -- failures ------------------------------------------------------------------------------------------------


def failed(job: Job) -> Trial:
    return Trial(
        job.id, job.strategy, job.phase, job.number, job.seed, job.changes, "failed", 0, 1.0, error="no loss"
    )


def test_a_failed_trial_stops_nothing() -> None:
    options = config("search.trials=6")
    campaign = Campaign(options, 2)
    while not campaign.done:
        job = campaign.next()
        assert job is not None
        campaign.tell(failed(job) if job.id in ("tpe-002", "equal-001", "default-seed-1") else finish(job))
    assert {t.id for t in campaign.trials() if t.state == "failed"} == {
        "tpe-002",
        "equal-001",
        "default-seed-1",
    }


@pytest.mark.parametrize("started", [True, False])
def test_the_default_is_handed_out_where_the_best_does_not_hold(started: bool, tmp_path: Path) -> None:
    """Also where the search's own trial of it failed; best.yaml is a config that a run reads."""
    options = config("name=search", "search.trials=6", "search.repeats=2", "data.manifest=mine.json")
    campaign = Campaign(options, 2)
    while not campaign.done:
        job = campaign.next()
        assert job is not None
        lucky = job.phase == SEARCHED or job.strategy == "default"
        trial = finish(job, planted if lucky else lambda changes: -1.0)
        campaign.tell(trial if started or job.id != "start" else failed(job))
    outcome = Outcome(options, (options, RunConfig()), campaign, tmp_path, "")
    outcome.end(Store.at(str(tmp_path)), 1.0)
    best = (tmp_path / "best.yaml").read_text()
    assert best.startswith("# start of the search search: ") and (" nothing on" in best) is not started
    found = compose("train", [f"experiment={tmp_path / 'best.yaml'}"], RunConfig)
    assert found.data.manifest == "mine.json" and found.weights == options.weights


def test_when_all_fail_the_search_ends_early() -> None:
    campaign = Campaign(config("search.trials=50"), 2)
    with pytest.raises(UnimrgError, match="all 3 trials so far have failed: no loss"):
        for _ in range(10):
            job = campaign.next()
            assert job is not None
            campaign.tell(failed(job))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["search.space.depth=[-1,2]"], "search.space.depth: -1.0 is out of range; it must be above 0"),
        (["search.space.depth=[2,1]"], r"search.space.depth: \[2.0, 1.0\] is no range"),
        (["search.space.dept=[1,2]"], "unknown key 'search.space.dept'; did you mean 'search.space.depth'"),
        (
            ["search.space.pixel=[]", "search.space.depth=[]", "search.space.segmentation=[]"],
            "search.space is empty",
        ),
        (["weights.depth=0"], "search.space.depth has a range but weights.depth is 0"),
        (["search.strategies=[tpee]"], "unknown value 'tpee'; did you mean 'tpe'"),
        (["search.strategies=[]"], "search.strategies is empty"),
        (["search.strategies=[tpe,tpe]"], "names one twice"),
        (["search.objectives=[acuracy]"], "did you mean 'accuracy'"),
        (["search.objectives=[accuracy,pixel_psnr]", "search.strategies=[asha]"], "asha compares by one"),
        (["search.rungs=[0.5,0.25]"], "must be rising"),
        (["search.space.grad_scale=[0.1,2]"], "search.space.grad_scale: 2.0 is out of range"),
    ],
)
def test_what_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*words)
