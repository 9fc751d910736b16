"""Held-out pictures before and after: drawings to look at, and answers to count.

Used twice by a run, with the weights it started from and with those it ended with, on the same pictures and
the same questions; `report` compares the stored results.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unimrg.benchmarks.dense import psnr
from unimrg.families.base import DrawOptions, Family, Processor
from unimrg.sample import IMAGE_TASKS, Sample, Task


@dataclass(frozen=True)
class Question:
    """One held-out question. family, pair, conflict: see the data set; empty where it has none."""

    id: str
    sample: int
    question: str
    answer: str
    family: str | None = None
    pair: str | None = None
    conflict: bool | None = None


def ask(
    model: Family,
    processor: Processor,
    samples: Sequence[Sample],
    questions: Sequence[Question],
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """Greedy answers, marked by exact match without case and final full stop."""
    results = []
    for start in range(0, len(questions), batch_size):
        some = questions[start : start + batch_size]
        images = [samples[question.sample].image for question in some]
        texts = model.answer(processor, images, [question.question for question in some], max_new_tokens)
        for question, text in zip(some, texts, strict=True):
            result = asdict(question) | {"prediction": text, "correct": same_answer(text, question.answer)}
            results.append(result)
    return results


def same_answer(prediction: str, answer: str) -> bool:
    """Whether two short answers are the same words."""
    return prediction.strip().rstrip(".").casefold() == answer.strip().rstrip(".").casefold()


def draw_all(
    model: Family,
    processor: Processor,
    samples: Sequence[Sample],
    tasks: Sequence[Task],
    options: DrawOptions,
) -> dict[Task, list[np.ndarray]]:
    """Every drawing task on every sample that has an image, uint8 [S, S, 3]."""
    images = [sample.image for sample in samples if sample.image is not None]
    return {
        task: model.draw(processor, images, task, options) for task in tasks if task in IMAGE_TASKS and images
    }


def score_drawings(samples: Sequence[Sample], drawings: dict[Task, list[np.ndarray]]) -> list[dict[str, Any]]:
    """Per picture: PSNR in dB of each drawing against its target, inside the picture (not its padding)."""
    rows = []
    for k, sample in enumerate(samples):
        left, top, right, bottom = sample.valid
        inside = (slice(top, bottom), slice(left, right))
        row: dict[str, Any] = {"k": k}
        for task, pictures in drawings.items():
            if task in sample.targets:
                row[f"{task}_psnr"] = float(psnr(sample.targets[task][inside], pictures[k][inside]))
        rows.append(row)
    return rows


def png(picture: np.ndarray) -> bytes:
    """A uint8 picture as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def write_pictures(folder: Path, pictures: dict[str, list[np.ndarray]]) -> None:
    """`folder`/<k>/<name>.png for every picture."""
    for name, series in pictures.items():
        for k, picture in enumerate(series):
            place = folder / str(k)
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{name}.png").write_bytes(png(picture))
