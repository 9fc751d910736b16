"""Reads what a run has stored; whatever is missing or damaged becomes empty, and a notice says so."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unimrg.metrics import SKIPPED, parse_jsonl
from unimrg.report.markup import number

Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """One held-out question and both answers; an answer is None if that side was not scored."""

    id: str
    question: str
    answer: str
    family: str | None
    group: str
    conflict: bool
    before: str | None
    after: str | None
    right_before: bool | None
    right_after: bool | None

    @property
    def paired(self) -> bool:
        return self.right_before is not None and self.right_after is not None


@dataclass(frozen=True)
class Run:
    """The stored files of one run. metrics: by rising step, one record a step."""

    path: Path
    config: str | None = None
    metrics: list[Row] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)
    quarantine: list[Row] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    drawings: dict[str, dict[int, Row]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.resolve().name or str(self.path)

    @property
    def finished(self) -> bool:
        """True if nothing started or failed after the last "finish"."""
        last = [e.get("event") for e in self.events if e.get("event") in ("start", "resume", "finish")]
        return bool(last) and last[-1] == "finish"

    @property
    def skipped(self) -> dict[str, int]:
        """Skipped samples by reason: the run's own count, or that of the quarantine file."""
        reasons = Counter(str(row.get("reason", "no reason given")) for row in self.quarantine)
        for record in self.metrics[-1:]:
            for key, value in record.items():
                amount = number(value)
                if key.startswith(SKIPPED) and amount is not None and 0 <= amount < 1e18:
                    reasons[key.removeprefix(SKIPPED)] = int(amount)
        return {reason: amount for reason, amount in reasons.most_common() if amount}

    def column(self, name: str) -> list[float | None]:
        """That metric of every record, None where it is missing."""
        return [number(record.get(name)) for record in self.metrics]


def load(folder: Path) -> Run:
    """Everything of one run's folder that can be read."""
    notices: list[str] = []
    config = folder / "config.yaml"
    answers = {side: _held_out(folder / "held_out" / f"{side}.json", notices) for side in ("before", "after")}
    return Run(
        path=folder,
        config=config.read_text("utf-8", "replace") if config.is_file() else None,
        metrics=_by_step(_lines(folder / "metrics.jsonl", notices), notices),
        events=_lines(folder / "events.jsonl", notices),
        quarantine=_lines(folder / "quarantine.jsonl", notices),
        questions=_join(_rows(answers["before"], "questions"), _rows(answers["after"], "questions")),
        drawings={side: _by_picture(_rows(stored, "drawings")) for side, stored in answers.items()},
        notices=notices,
    )


def _lines(path: Path, notices: list[str]) -> list[Row]:
    if not path.is_file():
        return []
    records, bad = parse_jsonl(path.read_text("utf-8", "replace"))
    if bad:
        notices.append(f"{path.name}: unreadable lines are left out: {len(bad)}, the first is line {bad[0]}.")
    return records


def _by_step(records: list[Row], notices: list[str]) -> list[Row]:
    """One record a step, the last one written, by rising step."""
    steps: dict[float, Row] = {}
    for record in records:
        step = number(record.get("step"))
        if step is not None and abs(step) < 1e15:
            steps[step] = record
    if len(steps) < len(records):
        notices.append(
            f"metrics.jsonl: {len(records) - len(steps)} records of repeated or missing steps are left out."
        )
    return [steps[step] for step in sorted(steps)]


def _held_out(path: Path, notices: list[str]) -> Row:
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text("utf-8", "replace"))
    except (ValueError, RecursionError):
        stored = None
    if isinstance(stored, dict):
        return stored
    notices.append(f"held_out/{path.name} is not a JSON object and is left out.")
    return {}


def _rows(stored: Row, name: str) -> list[Row]:
    found = stored.get(name)
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def _by_picture(rows: list[Row]) -> dict[int, Row]:
    return {int(k): row for row in rows if (k := number(row.get("k"))) is not None and 0 <= k < 1e9}


def _join(before: list[Row], after: list[Row]) -> list[Question]:
    """Both answers to each question, matched by id (and by turn, where an id repeats), in stored order."""
    sides: list[dict[tuple[str, int], Row]] = []
    for rows in (before, after):
        seen: Counter[str] = Counter()
        side: dict[tuple[str, int], Row] = {}
        for row in rows:
            key = str(row.get("id"))
            side[key, seen[key]] = row
            seen[key] += 1
        sides.append(side)
    first, second = sides
    return [_question(key[0], first.get(key), second.get(key)) for key in {**first, **second}]


def _question(key: str, before: Row | None, after: Row | None) -> Question:
    row = after or before or {}
    family, pair = row.get("family"), row.get("pair")
    return Question(
        id=key,
        question=str(row.get("question", "")),
        answer=str(row.get("answer", "")),
        family=None if family is None else str(family),
        group=f"question {key}" if pair is None else f"pair {pair}",
        conflict=row.get("conflict") is True,
        before=None if before is None else str(before.get("prediction", "")),
        after=None if after is None else str(after.get("prediction", "")),
        right_before=_right(before),
        right_after=_right(after),
    )


def _right(row: Row | None) -> bool | None:
    """True or False as stored; None if the answer was not judged."""
    value = None if row is None else row.get("correct")
    return bool(value) if isinstance(value, (bool, int)) else None
