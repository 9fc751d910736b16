"""Does what a search found hold? In sentences, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tune.analysis import Difference, compare, compare_values
from tune.objectives import OBJECTIVES
from tune.records import Trial
from unimrg.report.markup import MINUS, percent, plural

ROLES = {"default": "the default configuration", "equal": "tuned equal weights"}
"""What the best is held against, and how it is called."""


def judge(repeats: Sequence[Trial], same: Mapping[str, str], role: str, objective: str) -> str:
    """The best against `role`, trained again with fresh seeds and measured on test pictures.

    By the objective, and by the answers. same: roles whose configuration is another role's.
    """
    if same.get("best", "best") == same.get(role, role):
        return f"The best is {ROLES[role]}: nothing did better on the validation pictures."
    mine, other = (_trained_as(name, repeats, same) for name in ("best", role))
    found = {} if objective == "accuracy" else {objective: compare_values(mine, other, objective)}
    found["accuracy"] = compare(mine, other)
    said = [_said(name, difference) for name, difference in found.items() if difference is not None]
    if not said:
        return f"The best against {ROLES[role]}: there are no repeats to compare."
    seeds = plural(len({trial.seed for trial in mine} & {trial.seed for trial in other}), "fresh seed")
    words = f"The best against {ROLES[role]}, {seeds}, test pictures: {'; '.join(said)}."
    if role == "default" and not holds(repeats, same, objective):
        words += " It didn't hold, so best.yaml keeps the default configuration."
    return words


def holds(repeats: Sequence[Trial], same: Mapping[str, str], objective: str) -> bool:
    """Whether the best did no worse than the default with fresh seeds, on average; True with less than two.

    A search picks what was lucky, too: what doesn't hold isn't handed out.
    """
    mine, other = (_trained_as(role, repeats, same) for role in ("best", "default"))
    found = compare_values(mine, other, objective)
    return found is None or OBJECTIVES[objective].sign * found.mean >= 0


def _trained_as(role: str, repeats: Sequence[Trial], same: Mapping[str, str]) -> list[Trial]:
    return [trial for trial in repeats if trial.strategy == same.get(role, role)]


def _said(name: str, difference: Difference) -> str:
    objective, interval = OBJECTIVES[name], difference.interval

    def number(value: float) -> str:
        return percent(value, sign=True) if name == "accuracy" else f"{value:+.3g}".replace("-", MINUS)

    unit = "points" if name == "accuracy" else objective.unit
    text = (
        f"{objective.title.lower()} {' '.join((number(difference.mean), unit)).strip()}, "
        f"95 % interval {number(interval.low)} to {number(interval.high)}"
    )
    if len(difference.by_seed) < 2:
        text += " (the questions alone: one seed says nothing about others)"
    if not difference.significant:
        return f"{text}, not significant: either may be the better one"
    return f"{text}, significantly {'better' if objective.sign * difference.mean > 0 else 'worse'}"
