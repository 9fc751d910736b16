"""GenEval: what a picture must show, the verdict from what a detector found, and the scores.

Ghosh, Hajishirzi and Schmidt, "GenEval: an object-focused framework for evaluating text-to-image alignment"
(arXiv 2310.11513). Verdicts and scores are those of the official scripts; where the pictures lie is in
`geneval_files`, who finds the objects in `detector`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unimrg.benchmarks.generation.files import read_lines
from unimrg.benchmarks.result import BenchmarkResult
from unimrg.errors import DataError

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MOST_OBJECTS = 16

Box = Sequence[float]
"""x1, y1, x2, y2 in pixels, and the detector's score, 0..1."""

ColorOf = Callable[[str, int], str]
"""Class and number of an object among those found of it, the surest first, to its colour."""


# -- what a picture must show --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clause:
    """At least (`include`) or fewer than (`exclude`) `count` objects of a class.

    color: what the `count` surest of them must be classified as. position: a relation, and the number of the
    earlier clause whose objects all of them must stand in it to.
    """

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Prompt:
    """One line of the prompt file. line: as it was written, JSON without its end."""

    tag: str
    text: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]
    line: str

    @classmethod
    def parse(cls, line: str, where: str) -> Prompt:
        """where: the file and line, for messages. Raises DataError for what is no prompt of GenEval."""
        try:
            plain = json.loads(line)
            include = tuple(_clause(raw, number) for number, raw in enumerate(plain["include"]))
            exclude = tuple(_clause(raw, 0) for raw in plain.get("exclude") or [])
            return cls(str(plain["tag"]), str(plain["prompt"]), include, exclude, line.strip())
        except KeyError as error:
            raise DataError(f"{where}: a prompt of GenEval lacks {error}; use the official file") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: no prompt of GenEval ({error}); use the official file") from error


def _clause(raw: dict[str, Any], number: int) -> Clause:
    color, position = raw.get("color"), raw.get("position")
    if position is not None:
        relation, target = position
        if relation not in RELATIONS or not 0 <= target < number:
            raise ValueError(f"position {position} names no relation to an earlier object")
        position = (relation, target)
    if int(raw["count"]) < 1:
        raise ValueError(f"count {raw['count']} is below 1")
    return Clause(str(raw["class"]), int(raw["count"]), color, position)


def read_prompts(path: str | Path) -> list[Prompt]:
    """The official `evaluation_metadata.jsonl`, or one like it. Raises DataError."""
    return [Prompt.parse(line, where) for where, line in read_lines(path)]


# -- what was found ------------------------------------------------------------------------------------------


def kept(boxes: Sequence[Box], tag: str, max_overlap: float = 1.0) -> list[int]:
    """Numbers of the objects of one class that count, the surest first.

    Those surer than 0.3 (0.9 for the tag "counting"), at most 16 of them; of two that overlap in
    `max_overlap` (IoU) or more the surer one, unless it is 1.
    """
    least = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    order = sorted(range(len(boxes)), key=lambda number: -boxes[number][4])
    order = [number for number in order if boxes[number][4] > least][:MOST_OBJECTS]
    if max_overlap >= 1:
        return order
    chosen: list[int] = []
    for number in order:
        if all(overlap(boxes[number], boxes[other]) < max_overlap for other in chosen):
            chosen.append(number)
    return chosen


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of boxes whose ends count as pixels."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
    both = width * height
    either = sum((box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)) - both
    return both / either if either > 0 else 0.0


def relations(a: Box, b: Box, margin: float = 0.1) -> frozenset[str]:
    """Where `a` stands, seen from `b`: none, one or two of `RELATIONS`.

    The distance of the centres, less `margin` times both sizes, must be more than half of the whole distance
    along an axis.
    """
    away = [(a[k] + a[k + 2] - b[k] - b[k + 2]) / 2 for k in (0, 1)]
    sizes = [a[k + 2] - a[k] + b[k + 2] - b[k] for k in (0, 1)]
    length = math.hypot(*away)
    if length == 0:
        return frozenset()
    left = [math.copysign(max(abs(d) - margin * size, 0.0), d) for d, size in zip(away, sizes, strict=True)]
    x, y = (part / length for part in left)
    holds = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return frozenset(name for name, true in zip(RELATIONS, holds, strict=True) if true)


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows what it must, and why not, in the words of the official script."""

    correct: bool
    reason: str


def judge(prompt: Prompt, found: Mapping[str, Sequence[Box]], color_of: ColorOf) -> Verdict:
    """The verdict on one picture. found: the `kept` objects by class; color_of: asked only where needed."""
    reasons: list[str] = []
    matched: list[Sequence[Box] | None] = []
    for clause in prompt.include:
        objects = list(found.get(clause.name, ()))
        faults = _faults(clause, objects, matched, color_of)
        matched.append(None if faults else objects[: clause.count])
        reasons += faults
    for clause in prompt.exclude:
        if (count := len(found.get(clause.name, ()))) >= clause.count:
            reasons.append(f"expected {clause.name}<{clause.count}, found {count}")
    return Verdict(not reasons, "\n".join(reasons))


def _faults(
    clause: Clause, objects: list[Box], matched: Sequence[Sequence[Box] | None], color_of: ColorOf
) -> list[str]:
    """What is wrong with an included clause. matched: the objects of earlier clauses, None if they failed."""
    name, count = clause.name, clause.count
    if len(objects) < count:
        return [f"expected {name}>={count}, found {len(objects)}"]
    if clause.color is not None:
        seen = Counter(color_of(name, number) for number in range(count))
        if seen[clause.color] < count:
            rest = ", ".join(f"{times} {color}" for color, times in seen.items() if times)
            found = f"found {seen[clause.color]} {clause.color}; and {rest}"
            return [f"expected {clause.color} {name}>={count}, {found}"]
    if clause.position is not None:
        relation, target = clause.position
        targets = matched[target]
        if targets is None:
            return [f"no target for {name} to be {relation}"]
        for a in objects[:count]:
            for b in targets:
                if relation not in (holds := relations(a, b)):
                    return [f"expected {name} {relation} target, found {' and '.join(sorted(holds))} target"]
    return []


# -- scores --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The verdict on one picture, as the official script stores it.

    metadata: the prompt's line. details: class -> boxes of the kept objects.
    """

    filename: str
    tag: str
    prompt: str
    correct: bool
    reason: str
    metadata: str
    details: Mapping[str, Sequence[Box]]

    def to_line(self) -> str:
        """One line of `results.jsonl`."""
        plain = vars(self) | {"details": json.dumps(self.details)}
        return json.dumps(plain, ensure_ascii=False)

    @classmethod
    def parse(cls, line: str, where: str) -> Row:
        """Inverse of `to_line`; reads the official script's lines. Raises DataError."""
        try:
            plain = json.loads(line)
            details = json.loads(plain.get("details") or "{}")
            if not isinstance(plain["correct"], bool):
                raise ValueError(f"correct is {plain['correct']!r}")
            filename, tag, prompt = (str(plain[key]) for key in ("filename", "tag", "prompt"))
            reason, metadata = str(plain.get("reason") or ""), str(plain["metadata"])
            return cls(filename, tag, prompt, plain["correct"], reason, metadata, details)
        except KeyError as error:
            raise DataError(
                f"{where}: a result of GenEval lacks {error}; score the pictures again"
            ) from error
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: no result of GenEval ({error}); score the pictures again") from error


def read_results(path: str | Path) -> list[Row]:
    """An official `results.jsonl`, or one of ours. Raises DataError."""
    return [Row.parse(line, where) for where, line in read_lines(path)]


def score(
    rows: Iterable[Row], protocol: Mapping[str, str] | None = None, prompts: Sequence[Prompt] = ()
) -> BenchmarkResult:
    """Shares of right pictures, by tag, whatever the order of the rows.

    prompts: those that were to be drawn; the ones without a picture are counted, and nothing else.
    overall: mean of the tags present, 0..1. pictures: share of right ones, prompts: share of those with at
    least one right picture, both in percent.
    """
    rows = list(rows)
    if not rows:
        raise DataError("GenEval: no results to score; judge some pictures first")
    tags = sorted({row.tag for row in rows}, key=lambda tag: (TAGS.index(tag) if tag in TAGS else 99, tag))
    by_tag = {tag: [row.correct for row in rows if row.tag == tag] for tag in tags}
    shares = {tag: sum(right) / len(right) for tag, right in by_tag.items()}
    any_right: dict[str, bool] = {}
    for row in rows:
        any_right[row.metadata] = any_right.get(row.metadata, False) or row.correct
    return BenchmarkResult(
        "GenEval",
        {
            "overall": sum(shares.values()) / len(shares),
            "pictures": 100 * sum(row.correct for row in rows) / len(rows),
            "prompts": 100 * sum(any_right.values()) / len(any_right),
        },
        "overall",
        {"overall": "fraction", "pictures": "percent", "prompts": "percent"},
        {"overall": shares},
        dict(protocol or {}),
        {"pictures": len(rows), "prompts": len(any_right)}
        | {f"pictures of {tag}": len(right) for tag, right in by_tag.items()}
        | {"prompts without pictures": sum(prompt.line not in any_right for prompt in prompts)},
    )
