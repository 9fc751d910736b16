"""How sure a score is: intervals of a proportion and of a paired difference, and McNemar's exact test.

All proportions are fractions, 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

_CHUNK = 2_000_000  # drawn indices held at once: 16 MB


@dataclass(frozen=True)
class Interval:
    """A confidence interval, ends included."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def wilson(successes: int, total: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion; (0, 1) if nothing was counted.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927);
    recommended for small n by Brown, Cai and DasGupta, "Interval estimation for a binomial proportion",
    Statistical Science 16 (2001). It takes the answers to be independent.
    """
    if not 0 <= successes <= total:
        raise ValueError(f"successes must lie in 0..total, not {successes} of {total}")
    if total == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # At the ends the exact bound is 0 or 1; rounding would leave 1e-17.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == total else (centre + spread) / scale
    return Interval(low, high)


def paired_bootstrap(
    before: ArrayLike,
    after: ArrayLike,
    groups: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of mean(after) - mean(before) on the same items.

    before, after: [N] scores (0/1 or any finite number) of the same items in the same order.
    groups: [N] key of the picture or pair an item belongs to; whole groups are drawn, because answers about
    one picture are not independent. Default: every item is its own group.

    B. Efron and R. Tibshirani, "An Introduction to the Bootstrap" (1993), chapters 8 and 13; drawing whole
    groups: Field and Welsh, "Bootstrapping clustered data", JRSS B 69 (2007). With few groups (under about
    20) the interval is too narrow; read it together with `mcnemar`.
    """
    difference = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    if difference.ndim != 1 or difference.size == 0:
        raise ValueError("before and after must be two lists of one length, not empty")
    totals, sizes = _by_group(difference, groups)
    count = len(totals)
    generator = np.random.default_rng(seed)
    means: list[np.ndarray] = []
    left = resamples
    while left > 0:
        rows = min(left, max(1, _CHUNK // count))
        drawn = generator.integers(0, count, (rows, count))
        means.append(totals[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
        left -= rows
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), (tail, 1 - tail))
    return Interval(float(low), float(high))


def _by_group(values: np.ndarray, groups: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the values and number of items of each group, in order of first appearance."""
    if groups is None:
        return values, np.ones_like(values)
    if len(groups) != len(values):
        raise ValueError(f"{len(values)} items but {len(groups)} groups")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
    return np.bincount(index, values), np.bincount(index).astype(np.float64)


@dataclass(frozen=True)
class McNemar:
    """gained: wrong before, right after; lost: the reverse; p: two-sided exact p-value, 0..1."""

    gained: int
    lost: int
    p: float


def mcnemar(before: ArrayLike, after: ArrayLike) -> McNemar:
    """McNemar's exact test that a change of right answers is as likely as a change of wrong ones.

    Q. McNemar, "Note on the sampling error of the difference between correlated proportions",
    Psychometrika 12 (1947); exact binomial form as in Fagerland, Lydersen and Laake, BMC Medical
    Research Methodology 13:91 (2013).
    """
    was, now = np.asarray(before, bool), np.asarray(after, bool)
    if was.shape != now.shape or was.ndim != 1:
        raise ValueError("before and after must be two lists of one length")
    gained, lost = int((~was & now).sum()), int((was & ~now).sum())
    changed, fewer = gained + lost, min(gained, lost)
    # Python's integers keep this exact for any number of questions.
    tail = term = 1
    for k in range(1, fewer + 1):
        term = term * (changed - k + 1) // k
        tail += term
    return McNemar(gained, lost, min(1.0, 2 * tail / 2**changed))
