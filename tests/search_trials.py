"""Made-up trials of a search, for the tests of what is made of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from tune.records import REPEATED, SEARCHED, Trial

KEYS = ("weights.pixel", "weights.depth", "weights.segmentation")


def value_at(changes: dict[str, Any]) -> float:
    """Depends on depth most, a little on pixel, and not at all on segmentation."""
    depth, pixel = (np.log(changes.get(key, 1.0)) for key in ("weights.depth", "weights.pixel"))
    return float(0.4 - 0.02 * (depth - 0.5) ** 2 - 0.004 * pixel)


def searched(count: int, noise: float = 0.0, seed: int = 0, strategy: str = "tpe") -> list[Trial]:
    """The start and `count` random trials."""
    generator = np.random.default_rng(seed)
    trials = [_trial("start", "start", 0, {}, value_at({}))]
    for number in range(1, count + 1):
        changes = {key: float(10 ** generator.uniform(-1, 1)) for key in KEYS}
        value = value_at(changes) + noise * generator.normal()
        trials.append(_trial(f"{strategy}-{number:03d}", strategy, number, changes, value))
    return trials


def repeated(role: str, accuracies: list[float], questions: int = 400, seed: int = 0) -> list[Trial]:
    """Repeats whose answers are right by chance, two questions about each picture."""
    trials = []
    for number, accuracy in enumerate(accuracies):
        right = np.random.default_rng((seed, number, len(role))).random(questions) < accuracy
        trial = _trial(f"{role}-seed-{number}", role, number, {}, float(right.mean()))
        trial.phase, trial.seed = REPEATED, 1000 + number
        trial.answers = [
            {"id": str(k), "picture": str(k // 2), "correct": bool(one)} for k, one in enumerate(right)
        ]
        trials.append(trial)
    return trials


def _trial(name: str, strategy: str, number: int, changes: dict[str, Any], value: float) -> Trial:
    values = {"accuracy": value, "pixel_psnr": 10 + np.log(changes.get("weights.pixel", 1.0))}
    losses = [{"step": step, "loss/understanding": 2 / step, "loss/total": 3 / step} for step in range(1, 41)]
    curve = [{"step": 40.0, **values}]
    return Trial(
        name, strategy, SEARCHED, number, 0, changes, "done", 40, 60.0, values, curve, losses
    )  # fmt: skip
