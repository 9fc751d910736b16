"""What a trained model is worth: the values of `tune.objectives`, on one part of the held-out pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from unimrg.benchmarks.dense import boundary_scores, depth_scores, psnr
from unimrg.benchmarks.held_out import Question, ask, draw_all
from unimrg.config import ReportConfig
from unimrg.families.base import DrawOptions, Family, Processor
from unimrg.sample import Sample, Task, Turn

NEAR_TO_FAR = 10.0
"""A depth map says only what is nearer; its brightest grey is taken to be so many times nearer than black."""

BRIGHT = 127
BATCH = 32


@dataclass(frozen=True)
class Part:
    """Held-out pictures, and questions about them; `Question.sample` counts in `samples`.

    groups: of each question, the pictures that belong together by name.
    """

    samples: list[Sample]
    questions: list[Question]
    groups: list[str]


def split(samples: Sequence[Sample], questions: Sequence[Question], share: float) -> tuple[Part, Part]:
    """The part the search sees, `share` of the pictures, and the part that judges its outcome.

    Pictures whose questions form pairs stay together; otherwise they take turns.
    """
    group = list(range(len(samples)))  # of each picture, the first one it is joined to
    first: dict[str, int] = {}
    for question in questions:
        if question.pair:
            joined = group[first.setdefault(question.pair, question.sample)]
            group = [joined if number == group[question.sample] else number for number in group]
    order = {number: place for place, number in enumerate(dict.fromkeys(group))}
    seen = [int((order[g] + 1) * share) > int(order[g] * share) for g in group]
    return _part(samples, questions, group, seen), _part(samples, questions, group, [not s for s in seen])


def _part(
    samples: Sequence[Sample], questions: Sequence[Question], group: list[int], chosen: list[bool]
) -> Part:
    place = {old: new for new, old in enumerate(np.flatnonzero(chosen).tolist())}
    mine = [question for question in questions if chosen[question.sample]]
    return Part(
        [sample for sample, wanted in zip(samples, chosen, strict=True) if wanted],
        [replace(question, sample=place[question.sample]) for question in mine],
        [samples[group[question.sample]].id for question in mine],
    )


def score(
    model: Family,
    processor: Callable[[Sequence[Task]], Processor],
    part: Part,
    tasks: Sequence[Task],
    report: ReportConfig,
    seed: int,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(values, answers) of a model in evaluation mode. processor: makes the family's, for some tasks.

    Of each value that can be measured: none about pairs where there are none, nothing about a task that isn't
    in `tasks`. answers: {"id", "picture", "correct"} of each question. report: how to ask and to draw.
    """
    values: dict[str, float] = {}
    answers: list[dict[str, Any]] = []
    if part.questions:
        asked = ask(model, processor(tasks), part.samples, part.questions, report.max_new_tokens)
        answers = [
            {"id": one["id"], "picture": group, "correct": bool(one["correct"])}
            for one, group in zip(asked, part.groups, strict=True)
        ]
        values["accuracy"] = float(np.mean([answer["correct"] for answer in answers]))
        values |= _of_pairs(asked)
        values["answer_loss"] = answer_loss(model, processor((Task.UNDERSTANDING,)), part)
    shown = [sample for sample in part.samples if sample.image is not None and sample.targets]
    shown = shown[: report.images]
    options = DrawOptions(iterations=report.draw_iterations, seed=seed)
    for task, pictures in draw_all(model, processor(tasks), shown, tasks, options).items():
        values |= _of_drawings(task, shown, pictures)
    return values, answers


def _of_pairs(asked: Sequence[dict[str, Any]]) -> dict[str, float]:
    """A pair is right when all its questions are."""
    pairs: dict[str, list[bool]] = defaultdict(list)
    for one in asked:
        if one["pair"]:
            pairs[one["pair"]].append(bool(one["correct"]))
    whole = [all(right) for right in pairs.values() if len(right) > 1]
    return {"pair_accuracy": float(np.mean(whole))} if whole else {}


@torch.no_grad()
def answer_loss(model: Family, processor: Processor, part: Part) -> float:
    """Mean cross-entropy, nats per token, of the right answers' tokens."""
    about: dict[int, list[Question]] = defaultdict(list)
    for question in part.questions:
        about[question.sample].append(question)
    samples = [
        replace(part.samples[number], conversations=tuple((Turn(q.question, q.answer),) for q in some))
        for number, some in about.items()
    ]
    total, count = 0.0, 0
    for start in range(0, len(samples), BATCH):
        batch = processor(samples[start : start + BATCH]).to(model.device_of_weights)
        loss = model(batch)[Task.UNDERSTANDING]
        total, count = total + float(loss.sum), count + loss.count
    return total / max(count, 1)


def _of_drawings(task: Task, samples: Sequence[Sample], pictures: Sequence[np.ndarray]) -> dict[str, float]:
    """Means over pictures, inside the pictures and not their padding."""
    rows = []
    for sample, drawn in zip(samples, pictures, strict=True):
        if task in sample.targets:
            left, top, right, bottom = sample.valid
            inside = (slice(top, bottom), slice(left, right))
            rows.append(_of_drawing(task, sample.targets[task][inside], drawn[inside]))
    return {name: float(np.mean([row[name] for row in rows])) for name in (rows[0] if rows else ())}


def _of_drawing(task: Task, truth: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """uint8 [H, W, 3] both."""
    if task == Task.PIXEL:
        return {"pixel_psnr": psnr(truth, drawn)}
    grey, wanted = drawn.mean(axis=2), truth.mean(axis=2)
    if task == Task.SEGMENTATION:
        return {"boundary_f": boundary_scores(grey > BRIGHT, wanted > BRIGHT).f}
    depth = 1 / (1 / NEAR_TO_FAR + wanted / 255 * (1 - 1 / NEAR_TO_FAR))
    scores = depth_scores(grey, depth)
    return {"depth_abs_rel": scores.abs_rel, "depth_delta1": scores.delta1}
