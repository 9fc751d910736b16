"""What finished trials say: the best, the Pareto front, what mattered, and how sure a difference is."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import stats

from tune.objectives import OBJECTIVES, better
from tune.records import SEARCHED, Trial
from unimrg.benchmarks.intervals import Interval

RESAMPLES = 400
CONFIDENCE = 0.95


def best(trials: Sequence[Trial], objective: str) -> Trial | None:
    """The finished search trial with the best value; the first of several."""
    found = [trial for trial in trials if trial.state == "done" and trial.phase == SEARCHED]
    return max(found, key=lambda t: OBJECTIVES[objective].sign * t.values[objective], default=None)


def pareto_front(trials: Sequence[Trial], objectives: Sequence[str]) -> list[Trial]:
    """Finished search trials that none dominates, the best by the first objective first."""
    found = [trial for trial in trials if trial.state == "done" and trial.phase == SEARCHED]
    front = [t for t in found if not any(better(other.values, t.values, objectives) for other in found)]
    return sorted(front, key=lambda t: -OBJECTIVES[objectives[0]].sign * t.values[objectives[0]])


# -- importance ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Importance:
    """Share of the explained variance that a key accounts for, 0..1, and its interval."""

    key: str
    share: float
    interval: Interval


def importance(
    trials: Sequence[Trial], objective: str, keys: Sequence[str], seed: int = 0
) -> list[Importance]:
    """How much each key mattered for the value, the most important one first.

    Each key gets its share of the variance that a quadratic in the values' logarithms explains (without
    products of keys, a switched-off weight being a case of its own), averaged over all orders in which keys
    can enter (Lindeman, Merenda and Gold, 1980: Shapley's value of R²). Intervals: bootstrap over trials.
    [] where the trials are too few for it: with less than three more than the model has terms.
    """
    done = [trial for trial in trials if trial.state == "done" and trial.phase == SEARCHED]
    done = [trial for trial in done if all(key in trial.changes for key in keys)]
    columns = {key: _terms([float(trial.changes[key]) for trial in done]) for key in keys}
    columns = {key: terms for key, terms in columns.items() if terms.shape[1]}
    value = np.array([trial.values[objective] for trial in done])
    if not columns or len(done) < sum(terms.shape[1] for terms in columns.values()) + 4:
        return []
    whole = _shares(columns, value)
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES):
        rows = generator.integers(0, len(done), len(done))
        drawn.append(_shares({key: terms[rows] for key, terms in columns.items()}, value[rows]))
    tail = (1 - CONFIDENCE) / 2
    found = []
    for key, share in whole.items():
        low, high = np.quantile([one[key] for one in drawn], (tail, 1 - tail))
        found.append(Importance(key, share, Interval(float(low), float(high))))
    return sorted(found, key=lambda one: -one.share)


def _terms(values: Sequence[float]) -> np.ndarray:
    """[N, terms]: whether it is on, its logarithm and that squared; those that vary at all."""
    value = np.array(values)
    on = value > 0
    log = np.log(np.where(on, value, 1.0))
    log = np.where(on, log - (log[on].mean() if on.any() else 0), 0.0)
    terms = np.stack([on.astype(float), log, log**2], 1) if len(value) else np.zeros((0, 3))
    return terms[:, terms.std(axis=0) > 1e-9] if len(value) else terms[:, :0]


def _shares(columns: dict[str, np.ndarray], value: np.ndarray) -> dict[str, float]:
    """Each key's part of R², which sum to it."""
    explained = {
        chosen: _explained([columns[key] for key in chosen], value)
        for size in range(len(columns) + 1)
        for chosen in itertools.combinations(columns, size)
    }
    count = len(columns)
    shares = dict.fromkeys(columns, 0.0)
    for key in columns:
        for chosen in explained:
            if key in chosen:
                without = tuple(other for other in chosen if other != key)
                size = len(without)
                weight = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
                shares[key] += weight * (explained[chosen] - explained[without])
    return shares


def _explained(columns: Sequence[np.ndarray], value: np.ndarray) -> float:
    """R² of least squares, 0..1."""
    centred = value - value.mean()
    whole = float(centred @ centred)
    if not columns or whole <= 0:
        return 0.0
    terms = np.concatenate(columns, axis=1)
    terms = terms - terms.mean(axis=0)
    fit = terms @ np.linalg.lstsq(terms, centred, rcond=None)[0]
    return min(1.0, float(fit @ centred) / whole)


# -- comparing two configurations ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Of two configurations' values: `mean` over seeds and its interval; `by_seed`."""

    mean: float
    interval: Interval
    by_seed: dict[int, float]

    @property
    def significant(self) -> bool:
        """Does the interval leave out 0?"""
        return 0.0 not in self.interval


def compare(
    a: Sequence[Trial], b: Sequence[Trial], resamples: int = 10_000, seed: int = 0
) -> Difference | None:
    """Accuracy of `a` minus that of `b`, the same seeds and the same questions; None without a common seed.

    Two things are uncertain: what another seed would give (the spread of the differences by seed), and what
    other questions would (bootstrap over pictures of the difference averaged over seeds). The interval adds
    both variances and uses Student's t with seeds - 1 degrees of freedom: rather too wide than too narrow,
    because the spread over seeds holds part of the questions' noise already. With one seed, the normal
    distribution and the questions alone.
    """
    pairs = [(one, other) for one in a for other in b if one.seed == other.seed and one.answers]
    pairs = [(one, other) for one, other in pairs if other.answers]
    if not pairs:
        return None
    by_seed, gains = {}, []
    for one, other in pairs:
        right = {answer["id"]: answer["correct"] for answer in other.answers}
        gain = np.array(
            [float(x["correct"]) - float(right[x["id"]]) for x in one.answers if x["id"] in right]
        )
        by_seed[one.seed] = float(gain.mean())
        gains.append(gain)
    mean_gain = np.mean(gains, axis=0)
    pictures = [answer["picture"] for answer in pairs[0][0].answers]
    variance = _bootstrap_variance(mean_gain, pictures, resamples, seed)
    count = len(gains)
    quantile = stats.norm.ppf(0.5 + CONFIDENCE / 2)
    if count > 1:
        variance += float(np.var(list(by_seed.values()), ddof=1)) / count
        quantile = stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1)
    mean, reach = float(mean_gain.mean()), float(quantile) * math.sqrt(variance)
    return Difference(mean, Interval(mean - reach, mean + reach), by_seed)


def compare_values(a: Sequence[Trial], b: Sequence[Trial], name: str) -> Difference | None:
    """Value `name` of `a` minus that of `b`, seed by seed; None with less than two common seeds.

    The interval is Student's t of the differences by seed, which hold the noise of the questions too.
    """
    others = {trial.seed: trial.values[name] for trial in b if name in trial.values}
    mine = {trial.seed: trial.values[name] for trial in a if name in trial.values}
    by_seed = {seed: mine[seed] - others[seed] for seed in mine.keys() & others.keys()}
    if len(by_seed) < 2:
        return None
    gains = np.array(list(by_seed.values()))
    mean, error = float(gains.mean()), float(gains.std(ddof=1)) / math.sqrt(len(gains))
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(gains) - 1)) * error
    return Difference(mean, Interval(mean - reach, mean + reach), by_seed)


def _bootstrap_variance(gain: np.ndarray, pictures: Sequence[str], resamples: int, seed: int) -> float:
    """Of the mean over questions when whole pictures are drawn anew."""
    numbers: dict[str, int] = {}
    index = np.array([numbers.setdefault(picture, len(numbers)) for picture in pictures])
    totals, sizes = np.bincount(index, gain), np.bincount(index).astype(float)
    drawn = np.random.default_rng(seed).integers(0, len(totals), (resamples, len(totals)))
    return float(np.var(totals[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)))


# -- tables --------------------------------------------------------------------------------------------------


def so_far(trials: Sequence[Trial], objective: str) -> list[tuple[int, float]]:
    """(steps spent, best value) after each trial; stopped ones only cost."""
    sign, spent, top = OBJECTIVES[objective].sign, 0, -math.inf
    points = []
    for trial in trials:
        spent += trial.steps
        if trial.state == "done":
            top = max(top, sign * trial.values[objective])
        if top > -math.inf:
            points.append((spent, sign * top))
    return points


def to_table(trials: Sequence[Trial]) -> pa.Table:
    """One row per trial: its record without curves and answers; `changes.<key>`, `values.<name>`."""
    plain: dict[str, pa.DataType] = {
        "id": pa.string(), "strategy": pa.string(), "phase": pa.string(), "number": pa.int64(),
        "seed": pa.int64(), "state": pa.string(), "steps": pa.int64(), "seconds": pa.float64(),
        "error": pa.string(),
    }  # fmt: skip
    rows: dict[str, list[Any]] = {name: [getattr(trial, name) for trial in trials] for name in plain}
    kinds = dict(plain)
    changed: dict[str, None] = defaultdict(None)
    for trial in trials:
        changed.update(dict.fromkeys(trial.changes))
    for key in sorted(changed):
        values = [trial.changes.get(key) for trial in trials]
        rows[f"changes.{key}"] = values
        text = any(isinstance(value, str) for value in values)
        kinds[f"changes.{key}"] = pa.string() if text else pa.float64()
    for name in OBJECTIVES:
        rows[f"values.{name}"] = [trial.values.get(name) for trial in trials]
        kinds[f"values.{name}"] = pa.float64()
    return pa.table({name: pa.array(column, kinds[name]) for name, column in rows.items()})
