"""What a benchmark says of a model: named scores with units, by group, with the protocol and the counts."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

UNITS = ("percent", "fraction", "dB", "number")
"""percent: 0..100. fraction: 0..1. dB: decibels. number: anything else, like an error or a distance."""


@dataclass(frozen=True)
class BenchmarkResult:
    """The outcome of one benchmark.

    benchmark: its registered name.
    scores: value by name, in the unit that the official tool prints; NaN where nothing was there to score.
    headline: the score that the benchmark is quoted by.
    units: one of UNITS for every score.
    groups: score name -> part (a category, a tag) -> value in the score's unit.
    protocol: how it was scored (matcher, judge, prompts), by name, as short words.
    counts: how many rows, pictures or answers there were, and how many were out of the ordinary, by reason.

    Raises ValueError when a headline, a unit or a group belongs to no score.
    """

    benchmark: str
    scores: dict[str, float]
    headline: str
    units: dict[str, str]
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    protocol: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.headline not in self.scores:
            raise ValueError(f"{self.benchmark}: the headline {self.headline!r} is none of the scores")
        if set(self.units) != set(self.scores) or not set(self.units.values()) <= set(UNITS):
            raise ValueError(f"{self.benchmark}: every score needs one unit of {', '.join(UNITS)}")
        if not set(self.groups) <= set(self.scores):
            raise ValueError(f"{self.benchmark}: groups of scores that aren't there")

    def to_json(self) -> str:
        """One JSON object; NaN becomes null."""
        return json.dumps(_nulls(dataclasses.asdict(self)), indent=1, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> BenchmarkResult:
        """Inverse of `to_json`. Raises ValueError for anything else."""
        plain = json.loads(text)
        if not isinstance(plain, dict) or set(plain) != {f.name for f in dataclasses.fields(cls)}:
            raise ValueError("no stored result of a benchmark")
        plain["scores"] = _floats(plain["scores"])
        plain["groups"] = {name: _floats(parts) for name, parts in plain["groups"].items()}
        return cls(**plain)


def _nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nulls(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _floats(values: dict[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else float(value) for name, value in values.items()}
