"""From trials to a table: each arm, and its difference from another one, with the seed as the unit.

Two trainings differ by more than their questions tell, so intervals are over seeds: Student's t on the
paired differences of the same seed. Questions say only how well one training is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from unimrg.benchmarks.intervals import Interval
from unimrg.sample import IMAGE_TASKS

HEADLINE = "headline"
PAIR = ("unimrg", "shuffled")
HARDLY = 0.05  # of a drawing's loss: what less than that depends on the picture isn't learnt from it
Result = dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; interval of 95 % by Student's t, from minus to plus infinity for a single seed."""

    mean: float
    interval: Interval
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return 0 not in self.interval


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Of independent values, one a seed."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Estimate(mean, Interval(-math.inf, math.inf), count)
    reach = float(stats.t.ppf(0.5 + confidence / 2, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return Estimate(mean, Interval(mean - reach, mean + reach), count)


def value(result: Result, family: str) -> float:
    """The headline of a trial, or the balanced accuracy of one family."""
    return float(result[HEADLINE] if family == HEADLINE else result["families"][family]["balanced"])


def of(results: Sequence[Result], arm: str) -> dict[int, Result]:
    """The trials of an arm by seed."""
    return {result["seed"]: result for result in results if result["arm"] == arm}


def level(results: Sequence[Result], arm: str, family: str) -> Estimate:
    """Of an arm alone."""
    return estimate([value(result, family) for result in of(results, arm).values()])


def difference(results: Sequence[Result], arm: str, other: str, family: str) -> Estimate | None:
    """Arm minus other on the seeds of both; the base has one training, which stands for every seed."""
    mine, theirs = of(results, arm), of(results, other)
    if other == "base" and theirs:
        theirs = dict.fromkeys(mine, theirs[0])
    both = sorted(mine.keys() & theirs.keys())
    if not both or arm in (other, "base"):
        return None
    return estimate([value(mine[seed], family) - value(theirs[seed], family) for seed in both])


def outcome(results: Sequence[Result]) -> str:
    """The claim in a sentence, as it came out."""
    found = difference(results, "unimrg", "sft", HEADLINE)
    if found is None:
        return "UniMRG and SFT weren't both trained, so nothing can be said about the claim."
    points = f"{_points(found.mean)} points"
    if found.seeds < 2:
        return f"UniMRG is {points} from SFT with one seed: that says nothing; take more seeds."
    ends = f"95 % interval {_points(found.interval.low)} to {_points(found.interval.high)}"
    verdict = "UniMRG and SFT can't be told apart"
    if found.clear:
        verdict = f"UniMRG is {'better' if found.mean > 0 else 'worse'} than SFT"
    control = difference(results, "unimrg", "shuffled", HEADLINE)
    words = f"{verdict}: {points}, {ends}, {found.seeds} seeds."
    if control is not None and found.clear and found.mean > 0 and not control.clear:
        words += " But it isn't clearly better than its control with drawings of other pictures."
    return words


def looking(results: Sequence[Result]) -> str:
    """How much of UniMRG's drawings comes from the picture: its losses against its control's, the last steps.

    Both draw the same places with the same noise. "" unless both were trained.
    """
    mine, theirs = ({seed: r["losses"]["last"] for seed, r in of(results, arm).items()} for arm in PAIR)
    if not (both := sorted(mine.keys() & theirs.keys())):
        return ""
    tasks = [task for task in IMAGE_TASKS if task in mine[both[0]]]
    share = {task: float(np.mean([1 - mine[k][task] / theirs[k][task] for k in both])) for task in tasks}
    told = ", ".join(f"{task} {100 * value:.1f} %" for task, value in share.items())
    words = f"Drawing the picture itself costs less loss than drawing another one: {told}."
    if max(share.values()) < HARDLY:
        words += " So the model hardly looks while it draws, and drawing has little to teach it here."
    return words


def table(results: Sequence[Result], arms: Sequence[str]) -> list[list[str]]:
    """Rows of text: head, one per arm, and the references; percent, differences in points."""
    families = [name for name in results[0]["families"] if name != "all"]
    rows = [["arm", "seeds", "headline", "\u2212 sft", "95 %", *families, "CPU s"]]
    for arm in arms:
        if not (mine := of(results, arm)):
            continue
        gain = difference(results, arm, "sft", HEADLINE)
        told = ["", ""]
        if gain is not None:
            told = [_points(gain.mean), f"{_points(gain.interval.low)} to {_points(gain.interval.high)}"]
        levels = [_percent(level(results, arm, family).mean) for family in families]
        seconds = np.mean([result["cpu_seconds"] for result in mine.values()])
        head = _percent(level(results, arm, HEADLINE).mean)
        rows.append([arm, str(len(mine)), head, *told, *levels, f"{seconds:.0f}"])
    known = results[0]["families"]
    best = [known[family]["reference"] for family in families]
    chance = [known[family]["chance"] for family in families]
    for name, values in (("chance", chance), ("best shortcut", best)):
        rows.append([name, "", _percent(float(np.mean(values))), "", "", *map(_percent, values), ""])
    return rows


def text(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "\u2212") if math.isfinite(share) else "?"
