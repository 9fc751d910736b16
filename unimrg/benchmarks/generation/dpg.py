"""DPG-Bench: questions that depend on each other, and the scores of the answers.

Hu et al., "ELLA: equip diffusion models with LLM for enhanced semantic alignment" (arXiv 2403.05135), scoring
as in Davidsonian scene graphs (arXiv 2310.18235). Where prompts and pictures lie is in `dpg_files`, who
answers in `judges`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from unimrg.benchmarks.generation.files import read_text
from unimrg.benchmarks.result import BenchmarkResult
from unimrg.errors import DataError

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
ROWS = ("all", "official")
LAYOUTS = ("separate", "grid")
YES = "yes"

Answers = Mapping[str, Mapping[int, Mapping[int, str]]]
"""Item, number of its picture, number of the question to what was answered."""


@dataclass(frozen=True)
class Question:
    """One row of the question file.

    number: of its proposition within the item. parents: those that must hold for it to count. category: such
    as `attribute - color`. prompt: what the picture was to show.
    """

    item: str
    number: int
    parents: tuple[int, ...]
    category: str
    text: str
    prompt: str

    @property
    def broad(self) -> str:
        """`attribute` of `attribute - color`."""
        return self.category.partition("-")[0].strip()


def read_questions(path: str | Path, rows: str = "all") -> dict[str, list[Question]]:
    """Questions by item, in the order of the file.

    rows: of `ROWS`; "official" leaves out the first row, as the official loader does by mistake: then the
    others of its item lack a parent, and its pictures leave the mean. Raises DataError.
    """
    if rows not in ROWS:
        raise ValueError(f"unknown choice of rows {rows!r}; one of {', '.join(ROWS)}")
    table = csv.DictReader(io.StringIO(read_text(path)))
    missing = [name for name in COLUMNS if name not in (table.fieldnames or ())]
    if missing:
        raise DataError(f"{path} lacks the column {missing[0]}; use DPG-Bench's question file")
    found: dict[str, list[Question]] = {}
    for row in table:
        question = _question(row, f"{path}, line {table.line_num}")
        found.setdefault(question.item, []).append(question)
    if not found:
        raise DataError(f"{path} holds no questions; fetch it again")
    if rows == "official":
        first = next(iter(found))
        found[first] = found[first][1:]
    return found


def _question(row: Mapping[str, str | None], where: str) -> Question:
    values = {name: (row[name] or "").strip() for name in COLUMNS}
    try:
        number = int(values["proposition_id"])
        parents = tuple(int(word) for word in values["dependency"].split(","))
    except ValueError as error:
        raise DataError(
            f"{where}: proposition_id and dependency must be numbers ({error}); fetch the file again"
        ) from error
    parents = tuple(parent for parent in parents if parent)
    category = values["tuple"].partition("(")[0].strip()
    text, prompt = values["question_natural_language"], values["text"]
    if not (values["item_id"] and category and text):
        raise DataError(f"{where}: item_id, tuple and the question mustn't be empty; fetch the file again")
    return Question(values["item_id"], number, parents, category, text, prompt)


# -- scores --------------------------------------------------------------------------------------------------


def crop_score(questions: Sequence[Question], answers: Mapping[int, str]) -> float | None:
    """Share of the questions that hold, 0..1: answered with exactly `yes`, like all that they depend on.

    In the order of the file, so that what depends on a question in front of it that fell falls too, and what
    stands before its parent asks for the parent's own answer. None where a parent is no question of the item.
    """
    holds = {question.number: answers[question.number] == YES for question in questions}
    for question in questions:
        if any(parent not in holds for parent in question.parents):
            return None
        if not all(holds[parent] for parent in question.parents):
            holds[question.number] = False
    return sum(holds.values()) / len(holds) if holds else None


def picture_scores(
    questions: Mapping[str, Sequence[Question]], answers: Answers
) -> dict[str, dict[int, float | None]]:
    """Item and number of the picture to its `crop_score`. Raises DataError where an answer is missing."""
    found: dict[str, dict[int, float | None]] = {}
    for item, pictures in answers.items():
        if item not in questions:
            raise DataError(
                f"answers about {item}, which isn't in the question file; use one of the same set"
            )
        found[item] = {}
        for number, given in pictures.items():
            for question in questions[item]:
                if question.number not in given:
                    raise DataError(
                        f"picture {number} of {item}: question {question.number} has no answer; "
                        "ask the judge again"
                    )
            found[item][number] = crop_score(questions[item], given)
    return found


def score(
    questions: Mapping[str, Sequence[Question]],
    answers: Answers,
    layout: str = "separate",
    protocol: Mapping[str, str] | None = None,
) -> BenchmarkResult:
    """DPG-Bench's score, and the shares of yes by category before anything falls, all in percent.

    layout: of `LAYOUTS`; with "grid" the four pictures of an item are one, and the categories ask its last
    only, as in the official script; with "separate" each is one of its own. broad, detailed: means over the
    categories that are their groups. Raises DataError.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; one of {', '.join(LAYOUTS)}")
    scores = picture_scores(questions, answers)
    means: list[float] = []
    failed = 0
    for pictures in scores.values():
        values = [value for value in pictures.values() if value is not None]
        failed += len(pictures) - len(values)
        if values:
            means += [fmean(values)] if layout == "grid" else values
    if not means:
        raise DataError("DPG-Bench: no picture could be scored; ask the judge about some first")
    said = list(_said(questions, answers, scores, layout))
    groups = {
        "broad": _shares((question.broad, yes) for question, yes in said),
        "detailed": _shares((question.category, yes) for question, yes in said),
    }
    return BenchmarkResult(
        "DPG-Bench",
        {"overall": 100 * fmean(means)} | {name: fmean(parts.values()) for name, parts in groups.items()},
        "overall",
        dict.fromkeys(("overall", *groups), "percent"),
        groups,
        {"layout": layout} | dict(protocol or {}),
        {
            "items": len(scores),
            "pictures": sum(map(len, scores.values())),
            "pictures whose questions lack a parent": failed,
            "items without pictures": len(questions) - sum(bool(scores.get(item)) for item in questions),
        },
    )


def _said(
    questions: Mapping[str, Sequence[Question]],
    answers: Answers,
    scores: Mapping[str, Mapping[int, float | None]],
    layout: str,
) -> Iterable[tuple[Question, bool]]:
    """Every question about a scored picture, and whether the answer was yes."""
    for item, pictures in answers.items():
        numbers = [number for number in sorted(pictures) if scores[item][number] is not None]
        for number in numbers[-1:] if layout == "grid" else numbers:
            for question in questions[item]:
                yield question, pictures[number][question.number] == YES


def _shares(said: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """Category to its share of yes, in percent, by name."""
    marks: dict[str, list[bool]] = {}
    for category, yes in said:
        marks.setdefault(category, []).append(yes)
    return {category: 100 * sum(marks[category]) / len(marks[category]) for category in sorted(marks)}
