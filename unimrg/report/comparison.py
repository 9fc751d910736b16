"""Before against after on the same questions: how many right, how sure, and what may be said about it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from unimrg.benchmarks.intervals import Interval, McNemar, mcnemar, paired_bootstrap, wilson
from unimrg.report.folder import Question
from unimrg.report.markup import NBSP, percent

FEW = 20  # below this many pictures or pairs a bootstrap interval is known to be too narrow


@dataclass(frozen=True)
class Comparison:
    """Right answers of `count` questions in `groups` pictures or pairs. difference, interval: -1..1."""

    count: int
    groups: int
    right_before: int
    right_after: int
    difference: float
    interval: Interval
    test: McNemar

    @classmethod
    def of(cls, before: Sequence[bool], after: Sequence[bool], groups: Sequence[Hashable]) -> Comparison:
        count, was, now = len(before), sum(before), sum(after)
        interval = paired_bootstrap(before, after, groups)
        return cls(count, len(set(groups)), was, now, (now - was) / count, interval, mcnemar(before, after))

    @property
    def before(self) -> float:
        return self.right_before / self.count

    @property
    def after(self) -> float:
        return self.right_after / self.count

    @property
    def before_interval(self) -> Interval:
        return wilson(self.right_before, self.count)

    @property
    def after_interval(self) -> Interval:
        return wilson(self.right_after, self.count)

    @property
    def few(self) -> bool:
        return self.groups < FEW

    @property
    def verdict(self) -> str:
        """One of better, worse and open.

        A claim needs both: the interval knows that answers about one picture hang together, the exact test
        stays honest when few answers changed.
        """
        if self.test.p < 0.05 and self.interval.low > 0:
            return "better"
        return "worse" if self.test.p < 0.05 and self.interval.high < 0 else "open"


def compare(questions: Sequence[Question]) -> Comparison | None:
    """Over the questions judged both before and after; None if there are none."""
    both = [q for q in questions if q.paired]
    if not both:
        return None
    was, now = [bool(q.right_before) for q in both], [bool(q.right_after) for q in both]
    return Comparison.of(was, now, [q.group for q in both])


def compare_pairs(questions: Sequence[Question]) -> Comparison | None:
    """A pair counts as right if all of its questions are; single questions are no pairs."""
    pairs: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        if question.paired:
            pairs[question.group].append(question)
    whole = {group: members for group, members in pairs.items() if len(members) > 1}
    if not whole:
        return None
    was = [all(q.right_before for q in members) for members in whole.values()]
    now = [all(q.right_after for q in members) for members in whole.values()]
    return Comparison.of(was, now, list(whole))


def bracket(interval: Interval, sign: bool = False) -> str:
    """An interval of fractions in percent: [52.1, 61.0]."""
    low, high = (percent(v, sign=True) if sign else f"{100 * v:.1f}" for v in (interval.low, interval.high))
    return f"[{low},{NBSP}{high}]"
