"""Answers marked: what each one is taken to say, what is right, and whether they agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from unimrg.benchmarks.understanding.extract import NOT_FOUND, UNKNOWN, Matcher, find_option, yes_or_no
from unimrg.benchmarks.understanding.prompts import options_of
from unimrg.benchmarks.understanding.tsv import Row, text_of
from unimrg.errors import DataError

ERROR = "error"
"""Column of why a row wasn't answered: one of `SampleError.REASONS`, or empty."""


@dataclass(frozen=True)
class Mark:
    """One answer. said: the option letter, or Yes or No, that it means; NOT_FOUND or UNKNOWN where none."""

    index: int | str
    row: Row
    said: str
    gold: str

    @property
    def right(self) -> bool:
        return self.said == self.gold

    @property
    def found(self) -> bool:
        return self.said not in (NOT_FOUND, UNKNOWN)


@dataclass(frozen=True)
class Scores:
    """Values by name, the one that is quoted, units (see BenchmarkResult), and the same of parts."""

    values: dict[str, float]
    headline: str
    units: dict[str, str]
    groups: dict[str, dict[str, float]] = field(default_factory=dict)


Marker = Callable[[Sequence[Row], Sequence[int | str], Matcher], list[Mark]]


def mark_options(rows: Sequence[Row], indices: Sequence[int | str], matcher: Matcher) -> list[Mark]:
    """Rows of multiple choice. Raises DataError for a row whose right answer is none of its options."""
    return [
        _mark_option(row, index, text_of(row["answer"]), matcher)
        for row, index in zip(rows, indices, strict=True)
    ]


def mark_open(rows: Sequence[Row], indices: Sequence[int | str], matcher: Matcher) -> list[Mark]:
    """The same; a row without options counts as a choice between its right answer and any other (MMMU)."""
    marks = []
    for row, index in zip(rows, indices, strict=True):
        if row.get("A") is None:
            gold = text_of(row["answer"])
            marks.append(_mark_option({**row, "A": gold, "B": "Other Answers"}, index, "A", matcher))
        else:
            marks.append(_mark_option(row, index, text_of(row["answer"]), matcher))
    return marks


def _mark_option(row: Row, index: int | str, gold: str, matcher: Matcher) -> Mark:
    options = options_of(row)
    if len(gold) != 1 or not "A" <= gold <= "Z":
        raise DataError(f"row {index}: the right answer is {gold[:40]!r}; a letter of an option is needed")
    said = None if row.get(ERROR) else find_option(text_of(row["prediction"]), options, matcher)
    return Mark(index, row, said or NOT_FOUND, gold)


def mark_yes_or_no(rows: Sequence[Row], indices: Sequence[int | str], matcher: Matcher) -> list[Mark]:
    """Rows whose right answer is Yes or No, by the one rule there is. Raises DataError for another one."""
    marks = []
    for row, index in zip(rows, indices, strict=True):
        gold = text_of(row["answer"])
        if gold not in ("Yes", "No"):
            raise DataError(f"row {index}: the right answer is {gold[:40]!r}; Yes or No is needed")
        said = UNKNOWN if row.get(ERROR) else yes_or_no(text_of(row["prediction"]))
        marks.append(Mark(index, row, said, gold))
    return marks


def count(marks: Sequence[Mark]) -> dict[str, int]:
    """Rows, answers nothing was found in, and rows that couldn't be asked, by reason."""
    reasons = Counter(f"unanswered: {mark.row[ERROR]}" for mark in marks if mark.row.get(ERROR))
    return {"rows": len(marks), "not extracted": sum(not mark.found for mark in marks), **reasons}


def share(marks: Iterable[Mark]) -> float:
    """How many are right, 0..1; NaN of none."""
    rights = [mark.right for mark in marks]
    return sum(rights) / len(rights) if rights else float("nan")


def by_column(marks: Iterable[Mark], column: str) -> dict[str, list[Mark]]:
    """Marks by the text of a cell, sorted by it; rows where it is empty are left out."""
    parts: dict[str, list[Mark]] = {}
    for mark in marks:
        if mark.row.get(column) is not None:
            parts.setdefault(str(mark.row[column]), []).append(mark)
    return dict(sorted(parts.items()))
