"""What finished trials say: known answers, brute force, and the coverage of an interval."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.search_trials import KEYS, repeated, searched, value_at
from tune.analysis import best, compare, compare_values, importance, pareto_front, so_far, to_table
from tune.objectives import OBJECTIVES
from tune.records import Trial
from tune.verdict import holds, judge


def filled(trials: list[Trial]) -> list[Trial]:
    """With the values that the start left alone."""
    for trial in trials:
        trial.changes = dict.fromkeys(KEYS, 1.0) | trial.changes
    return trials


def test_best_is_the_first_of_the_highest() -> None:
    trials = searched(20)
    assert best(trials, "accuracy") is max(trials, key=lambda trial: trial.values["accuracy"])
    trials[3].values = dict(trials[7].values)
    for trial in trials:
        trial.values["depth_abs_rel"] = 1.0
    assert best(trials, "depth_abs_rel") is trials[0]
    trials[5].values["depth_abs_rel"] = 0.5
    assert best(trials, "depth_abs_rel") is trials[5]  # less is better
    trials[5].state = "stopped"
    assert best(trials, "depth_abs_rel") is trials[0]
    assert best([], "accuracy") is None


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_pareto_front_by_brute_force(points: list[tuple[int, int, int]]) -> None:
    names = ["accuracy", "depth_abs_rel", "samples_per_second"]
    trials = searched(len(points))[1:]
    for trial, point in zip(trials, points, strict=True):
        trial.values = dict(zip(names, map(float, point), strict=True))
    up = [tuple(OBJECTIVES[n].sign * v for n, v in zip(names, p, strict=True)) for p in points]
    wanted = {
        trial.id
        for trial, mine in zip(trials, up, strict=True)
        if not any(other != mine and all(a >= b for a, b in zip(other, mine, strict=True)) for other in up)
    }
    assert {trial.id for trial in pareto_front(trials, names)} == wanted


# -- importance ----------------------------------------------------------------------------------------------


def test_importance_finds_what_was_planted() -> None:
    found = importance(filled(searched(60, noise=0.005)), "accuracy", KEYS)
    assert found[0].key == "weights.depth"
    shares = {one.key: one for one in found}
    assert shares["weights.depth"].share > 0.7
    assert shares["weights.segmentation"].share < 0.1
    assert sum(one.share for one in found) <= 1
    for one in found:
        assert one.interval.low <= one.share + 0.1
        assert one.interval.high - one.interval.low < 0.5


def test_importance_without_noise_explains_everything() -> None:
    found = importance(filled(searched(40)), "accuracy", KEYS)
    assert sum(one.share for one in found) == pytest.approx(1)


def test_importance_of_noise_is_uncertain() -> None:
    trials = filled(searched(14))
    for trial, value in zip(trials, np.random.default_rng(0).random(15), strict=True):
        trial.values["accuracy"] = float(value)
    widest = max(one.interval.high - one.interval.low for one in importance(trials, "accuracy", KEYS))
    assert widest > 0.3


def test_too_few_trials_say_nothing() -> None:
    assert importance(filled(searched(6)), "accuracy", KEYS) == []
    assert importance([], "accuracy", KEYS) == []


def test_a_switch_counts() -> None:
    trials = filled(searched(60, noise=0.001))
    for number, trial in enumerate(trials):
        if number % 2:
            trial.changes["weights.segmentation"] = 0.0
            trial.values["accuracy"] -= 0.5
    assert importance(trials, "accuracy", KEYS)[0].key == "weights.segmentation"


# -- comparing -----------------------------------------------------------------------------------------------


def test_difference_of_known_answers() -> None:
    a, b = repeated("a", [0.5, 0.5, 0.5]), repeated("bb", [0.5, 0.5, 0.5])
    for one, other in zip(a, b, strict=True):
        for number, answer in enumerate(other.answers):
            answer["correct"] = number < 100
        for number, answer in enumerate(one.answers):
            answer["correct"] = number < 120
    found = compare(a, b)
    assert found is not None
    assert found.mean == pytest.approx(20 / 400)
    assert list(found.by_seed.values()) == pytest.approx([0.05] * 3)
    # No spread over seeds: ten of 200 pictures gained, by Student's t with two degrees of freedom.
    reach = 4.3027 * np.sqrt(0.05 * 0.95 / 200)
    assert found.interval.high - found.mean == pytest.approx(reach, rel=0.05)


def test_no_common_seed_is_no_comparison() -> None:
    a, b = repeated("a", [0.5]), repeated("bb", [0.5])
    b[0].seed = 7
    assert compare(a, b) is None
    assert compare(a, []) is None


def test_the_interval_covers_the_truth() -> None:
    covered = 0
    for trial in range(60):
        generator = np.random.default_rng(trial)
        level = generator.normal(0.4, 0.03, 3)
        a = repeated("a", list(level + 0.05), seed=trial)
        b = repeated("bb", list(level), seed=trial)
        found = compare(a, b, resamples=400)
        assert found is not None
        covered += 0.05 in found.interval
    assert covered >= 57  # 95 %, and it is made to be rather too wide


def test_a_large_difference_is_significant() -> None:
    found = compare(repeated("a", [0.8, 0.82, 0.79]), repeated("bb", [0.4, 0.41, 0.39]))
    assert found is not None
    assert found.significant
    same = compare(repeated("a", [0.5] * 3), repeated("bb", [0.5] * 3))
    assert same is not None
    assert not same.significant


def test_difference_of_values() -> None:
    """By Student's t over the common seeds; 2 and 4 more, so 3 with an interval of 12.7 either way."""
    a, b = repeated("a", [0.5, 0.6, 0.7]), repeated("bb", [0.5, 0.6, 0.7])
    for number, (one, other) in enumerate(zip(a, b, strict=True)):
        one.values["answer_loss"], other.values["answer_loss"] = 2.0 + 2 * number, float(0)
    b[2].values.clear()
    found = compare_values(a, b, "answer_loss")
    assert found is not None
    assert found.mean == pytest.approx(3)
    assert found.interval.high - found.mean == pytest.approx(12.706, rel=1e-3)
    assert list(found.by_seed.values()) == [2.0, 4.0]
    assert compare_values(a[:1], b, "answer_loss") is None


def test_the_verdict_speaks_of_the_objective_first() -> None:
    """Less loss is better; what is the same configuration needs no numbers."""
    a, b = repeated("best", [0.5, 0.6, 0.7]), repeated("default", [0.5, 0.6, 0.7])
    for number, (one, other) in enumerate(zip(a, b, strict=True)):
        one.values["answer_loss"], other.values["answer_loss"] = 1.0 + number, 2.0 + 1.01 * number
    said = judge([*a, *b], {}, "default", "answer_loss")
    assert "3\u00a0fresh seeds" in said
    assert said.index("loss of the right answers \u22121.01 nats/token") < said.index("accuracy")
    assert "significantly better; accuracy" in said
    assert "nothing did better" in judge([*a, *b], {"best": "default"}, "default", "answer_loss")
    assert "no repeats" in judge([], {}, "default", "accuracy")


def test_what_does_worse_with_fresh_seeds_isn_t_handed_out() -> None:
    """On average, whatever the interval says; one seed or none says nothing."""
    a, b = repeated("best", [0.5, 0.6, 0.7]), repeated("default", [0.5, 0.6, 0.7])
    for number, (one, other) in enumerate(zip(a, b, strict=True)):
        one.values["answer_loss"], other.values["answer_loss"] = 1.0 + number, 1.1 + 0.9 * number
    assert holds([*a, *b], {}, "answer_loss") and "best.yaml" not in judge(
        [*a, *b], {}, "default", "answer_loss"
    )
    for one in a:
        one.values["answer_loss"] += 0.1
    assert not holds([*a, *b], {}, "answer_loss")
    assert "best.yaml keeps the default" in judge([*a, *b], {}, "default", "answer_loss")
    assert "best.yaml" not in judge([*a, *b], {"equal": "default"}, "equal", "answer_loss")
    assert holds([*a[:1], *b[:1]], {}, "answer_loss") and holds([], {}, "answer_loss")
    assert holds([*a, *b], {"best": "default"}, "answer_loss")


# -- tables --------------------------------------------------------------------------------------------------


def test_so_far_only_rises_and_counts_what_was_stopped() -> None:
    trials = searched(10)
    trials[4].state = "stopped"
    points = so_far(trials, "accuracy")
    assert [steps for steps, _ in points] == [40 * k for k in range(1, 12)]
    values = [value for _, value in points]
    assert values == sorted(values)
    assert values[-1] == max(trial.values["accuracy"] for trial in trials if trial.state == "done")


def test_the_table_holds_every_trial() -> None:
    trials = [*searched(5), *repeated("best", [0.5])]
    table = to_table(trials)
    assert table["id"].to_pylist() == [trial.id for trial in trials]
    assert table["changes.weights.depth"].to_pylist()[0] is None
    assert table["changes.weights.depth"].to_pylist()[1] == trials[1].changes["weights.depth"]
    assert table["values.accuracy"].to_pylist() == [trial.values["accuracy"] for trial in trials]
    assert table["values.boundary_f"].to_pylist() == [None] * 7
    assert to_table([]).num_rows == 0
    assert value_at({}) == trials[0].values["accuracy"]
