"""Scores of the multiple-choice benchmarks, as fractions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from unimrg.benchmarks.understanding.marks import Mark, Scores, by_column, share
from unimrg.errors import DataError

ROTATION = 1_000_000
"""A rotated copy of an MMBench question has the index of the first plus a multiple of this."""

_ABBREVIATED = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}


def overall(marks: Sequence[Mark]) -> Scores:
    """How many are right; of each l2-category and category too (RealWorldQA, BLINK, CV-Bench-3D)."""
    return _fractions({"overall": share(marks)}, "overall", {"overall": _categories(marks)})


def by_split(marks: Sequence[Mark]) -> Scores:
    """The same for every split; `validation` is quoted (MMMU). A category that a split lacks is NaN there."""
    splits = by_column(marks, "split")
    if "validation" not in splits:
        raise DataError("no row has the split 'validation', which is the one that is scored")
    names = _categories(marks)
    groups = {
        split: {name: _categories(part).get(name, math.nan) for name in names}
        for split, part in splits.items()
    }
    return _fractions({split: share(part) for split, part in splits.items()}, "validation", groups)


def mmbench(marks: Sequence[Mark]) -> Scores:
    """circular: a question counts if all its rotations are right. vanilla_0: the first rows alone.
    vanilla_all: every row by itself.

    Raises DataError where an index is no integer.
    """
    rotations: dict[int, list[Mark]] = {}
    for mark in marks:
        if not isinstance(mark.index, int):
            raise DataError(f"MMBench's indices are integers, not {mark.index!r}; is it another file?")
        rotations.setdefault(mark.index % ROTATION, []).append(mark)
    first = [mark for mark in marks if isinstance(mark.index, int) and mark.index < ROTATION]
    wrong = {base for base, copies in rotations.items() if not all(mark.right for mark in copies)}
    circular = [_lost(mark) if mark.index in wrong else mark for mark in first]
    kinds = {"circular": circular, "vanilla_0": first, "vanilla_all": list(marks)}
    values = {name: share(part) for name, part in kinds.items()}
    return _fractions(values, "circular", {name: _categories(part) for name, part in kinds.items()})


def mmvp(marks: Sequence[Mark]) -> Scores:
    """average: of all questions. pairs: rows 2i and 2i + 1, sorted by index, both right.

    Raises DataError where two such rows don't ask the same.
    """
    ordered = sorted(marks, key=lambda mark: (isinstance(mark.index, str), mark.index))
    pairs = list(zip(ordered[::2], ordered[1::2], strict=False))
    if len(ordered) % 2:
        raise DataError(f"MMVP's questions come in pairs, but there are {len(ordered)}; some are missing")
    for one, other in pairs:
        if one.row["question"] != other.row["question"]:
            raise DataError(f"MMVP: rows {one.index} and {other.index} are no pair; some rows are missing")
    both = sum(one.right and other.right for one, other in pairs) / len(pairs)
    return _fractions({"average": share(marks), "pairs": both}, "average", {})


def cv_bench_2d(marks: Sequence[Mark]) -> Scores:
    """The mean over the sources (ADE20K, COCO) of how many are right in each. Raises DataError."""
    sources = {name: share(part) for name, part in by_column(marks, "source").items()}
    if not sources:
        raise DataError("CV-Bench-2D: no row says its source; is it another file?")
    return _fractions({"overall": sum(sources.values()) / len(sources)}, "overall", {"overall": sources})


def _categories(marks: Sequence[Mark]) -> dict[str, float]:
    return {
        _ABBREVIATED.get(name, name): share(part)
        for column in ("l2-category", "category")
        for name, part in by_column(marks, column).items()
    }


def _lost(mark: Mark) -> Mark:
    """The same question answered wrong."""
    return Mark(mark.index, mark.row, "", mark.gold)


def _fractions(values: dict[str, float], headline: str, groups: dict[str, dict[str, float]]) -> Scores:
    there = {name: parts for name, parts in groups.items() if parts}
    return Scores(values, headline, dict.fromkeys(values, "fraction"), there)
