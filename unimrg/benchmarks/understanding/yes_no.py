"""Scores of the yes/no benchmarks, in percent but for VSR's F1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from unimrg.benchmarks.understanding.marks import Mark, Scores, by_column
from unimrg.benchmarks.understanding.tsv import text_of
from unimrg.errors import DataError


@dataclass(frozen=True)
class Confusion:
    """Counts of yes and no. An answer that says neither is no yes, and not right either.

    All shares are 0..1, and 0 where they would be 0/0.
    """

    total: int
    right: int
    true_yes: int
    said_yes: int
    both_yes: int

    @classmethod
    def of(cls, said: Sequence[str], gold: Sequence[str]) -> Self:
        """said: Yes, No or anything else; gold: Yes or No."""
        both = list(zip(said, gold, strict=True))
        return cls(
            total=len(both),
            right=sum(a == b for a, b in both),
            true_yes=sum(b == "Yes" for _, b in both),
            said_yes=sum(a == "Yes" for a, _ in both),
            both_yes=sum(a == b == "Yes" for a, b in both),
        )

    @property
    def accuracy(self) -> float:
        return _ratio(self.right, self.total)

    @property
    def precision(self) -> float:
        return _ratio(self.both_yes, self.said_yes)

    @property
    def recall(self) -> float:
        return _ratio(self.both_yes, self.true_yes)

    @property
    def f1(self) -> float:
        return _ratio(2 * self.both_yes, self.said_yes + self.true_yes)

    @property
    def yes_ratio(self) -> float:
        return _ratio(self.said_yes, self.total)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def hallusion_bench(marks: Sequence[Mark]) -> Scores:
    """aAcc: of all answers. fAcc, qAcc: of the groups about one figure, or of one question, those all right.

    The index names set, figure and question between underscores. Raises DataError where it doesn't.
    """
    names = [str(mark.index).split("_") for mark in marks]
    for mark, name in zip(marks, names, strict=True):
        if len(name) < 6:
            raise DataError(f"HallusionBench: the index {mark.index!r} has no set, figure and question in it")
    parts = {"": list(marks), **by_column(marks, "category"), **by_column(marks, "l2-category")}
    values = {part: _hallusion(some) for part, some in parts.items()}
    groups = {score: {part: values[part][score] for part in parts if part} for score in values[""]}
    return Scores(values[""], "aAcc", dict.fromkeys(values[""], "percent"), groups)


def _hallusion(marks: Sequence[Mark]) -> dict[str, float]:
    def whole(at: int) -> float:
        groups: dict[tuple[str, str, str], bool] = {}
        for mark in marks:
            name = str(mark.index).split("_")
            key = (text_of(mark.row.get("l2-category")), name[3], name[at])
            groups[key] = groups.get(key, True) and mark.right
        return 100 * sum(groups.values()) / len(groups)

    right = 100 * sum(mark.right for mark in marks) / len(marks)
    return {"aAcc": right, "fAcc": whole(4), "qAcc": whole(5)}


def vsr(marks: Sequence[Mark]) -> Scores:
    """Accuracy, precision and recall in percent, F1 as a fraction, as the official table has them."""
    found = _confusion(marks)
    values = {
        "acc": 100 * found.accuracy,
        "precision": 100 * found.precision,
        "recall": 100 * found.recall,
        "f1": found.f1,
    }
    return Scores(values, "acc", dict.fromkeys(values, "percent") | {"f1": "fraction"})


def pope(marks: Sequence[Mark]) -> Scores:
    """F1, accuracy, precision and recall in percent, and those by POPE's own scorer (`own_…`).

    A row counts once in every category that it lists.
    """
    expanded = [
        (category.strip(), mark)
        for mark in marks
        for category in text_of(mark.row.get("category")).split(",")
    ]
    names = sorted({category for category, _ in expanded})
    parts = {"": [mark for _, mark in expanded]}
    parts |= {name: [mark for category, mark in expanded if category == name] for name in names}
    values = {part: _pope(some) for part, some in parts.items()}
    groups = {score: {part: values[part][score] for part in names} for score in values[""]}
    return Scores(values[""], "f1", dict.fromkeys(values[""], "percent"), groups)


def _pope(marks: Sequence[Mark]) -> dict[str, float]:
    found = _confusion(marks)
    own = pope_own([text_of(m.row["prediction"]) for m in marks], [mark.gold for mark in marks])
    columns: dict[str, Callable[[Confusion], float]] = {
        "f1": lambda c: c.f1,
        "acc": lambda c: c.accuracy,
        "precision": lambda c: c.precision,
        "recall": lambda c: c.recall,
    }
    values = {name: 100 * of(found) for name, of in columns.items()}
    values |= {f"own_{name}": 100 * of(own) for name, of in columns.items()}
    return values | {"own_yes_ratio": 100 * own.yes_ratio}


def pope_says(answer: str) -> str:
    """`Yes` or `No` by POPE's own rule: no where the first sentence has the word No, not or no, else yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "No" if {"No", "not", "no"} & set(words) else "Yes"


def pope_own(answers: Sequence[str], gold: Sequence[str]) -> Confusion:
    """Answers by POPE's own rule, which knows no third case. gold: Yes or No."""
    return Confusion.of([pope_says(answer) for answer in answers], gold)


def _confusion(marks: Sequence[Mark]) -> Confusion:
    return Confusion.of([mark.said for mark in marks], [mark.gold for mark in marks])
