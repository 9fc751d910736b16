"""The space of a search: which keys of a run it changes, and between which values."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from tune.config import SearchConfig

WEIGHTS = ("pixel", "depth", "segmentation")
KEYS = {"learning_rate": "train.learning_rate", "grad_scale": "family.grad_scale"}
DIGITS = 4
"""Significant digits of proposed values: what is stored is exactly what is run."""

Changes = dict[str, Any]


@dataclass(frozen=True)
class Dimension:
    """A positive number on a logarithmic scale. key: of the run's config. off: may it also be 0?"""

    key: str
    low: float
    high: float
    off: bool = False

    def levels(self, count: int) -> list[float]:
        """`count` values at equal ratios from low to high, and 0 if it may be."""
        ratio = (self.high / self.low) ** (1 / (count - 1))
        return [0.0] * self.off + [rounded(self.low * ratio**k) for k in range(count)]

    def __contains__(self, value: float) -> bool:
        return (self.off and value == 0) or self.low <= value <= self.high


Space = tuple[Dimension, ...]


def rounded(value: float) -> float:
    """To `DIGITS` significant digits."""
    return float(f"{value:.{DIGITS}g}")


def searched(config: SearchConfig) -> Space:
    """The dimensions of `search.space`. Weights are relative to understanding's."""
    space, unit = config.search.space, config.weights.understanding or 1.0
    dimensions = []
    for name in WEIGHTS:
        if span := getattr(space, name):
            low, high = (rounded(end * unit) for end in span)
            dimensions.append(Dimension(f"weights.{name}", low, high, off=space.switches))
    for name, key in KEYS.items():
        if span := getattr(space, name):
            dimensions.append(Dimension(key, *span))
    return tuple(dimensions)


def rates(config: SearchConfig) -> Space:
    """What strategies that don't search for weights may tune: the learning rate."""
    rate, span = config.train.learning_rate, config.search.rate_span
    return (Dimension(KEYS["learning_rate"], rounded(rate / span), rounded(rate * span)),)


def centre(config: SearchConfig, space: Space) -> Changes | None:
    """Where the config itself lies in the space, or None if that is outside."""
    values = {dimension.key: value_of(config, dimension.key) for dimension in space}
    return values if all(values[d.key] in d for d in space) else None


def value_of(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def grid(space: Space, levels: int) -> list[Changes]:
    """Every combination of `levels` values of each dimension."""
    columns = [dimension.levels(levels) for dimension in space]
    return [dict(zip((d.key for d in space), row, strict=True)) for row in itertools.product(*columns)]


def grid_levels(dimension: Dimension, precision: float) -> int:
    """Levels that a grid needs for every value to lie within a factor 1 + `precision` of one of them."""
    return math.ceil(math.log(dimension.high / dimension.low) / (2 * math.log1p(precision))) + 1
