"""Scores that others published, with their source and how sure it is: for comparison, not measured here."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.resources import files

CONFIDENCE = {
    "primary": "the authors\u2019 own file",
    "fork": "runs of a third party",
    "third party": "figures of a third party",
    "secondary": "told by others",
    "informal": "a remark",
}


@dataclass(frozen=True)
class Published:
    """One model's scores, in percent.

    scores: by "BENCHMARK score" in our names, or "BENCHMARK" alone where the kind of score isn't stated.
    gains: points over the base, where only those are known. confidence: one of CONFIDENCE.
    """

    model: str
    variant: str
    confidence: str
    source: str
    scores: dict[str, float] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)
    note: str = ""


def published() -> list[Published]:
    """All of them, in the order in which tables show them."""
    text = files("unimrg.benchmarks").joinpath("published.json").read_text("utf-8")
    return [Published(**entry) for entry in json.loads(text)["entries"]]
