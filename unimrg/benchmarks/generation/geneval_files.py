"""Pictures in GenEval's layout: drawn, read, and judged by a detector and a classifier of colours.

DIR/00000/metadata.jsonl        the prompt's line
DIR/00000/samples/00000.png     its pictures
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unimrg.benchmarks.generation.drawing import draw_missing, read_picture
from unimrg.benchmarks.generation.files import read_lines
from unimrg.benchmarks.generation.geneval import Prompt, Row, judge, kept
from unimrg.errors import DataError
from unimrg.families.base import DrawOptions, Family, Processor


@dataclass(frozen=True)
class Found:
    """One object that a detector found. box: x1, y1, x2, y2, score; mask: bool [H, W]."""

    box: tuple[float, float, float, float, float]
    mask: np.ndarray


Detector = Callable[[np.ndarray], dict[str, list[Found]]]
"""A picture, uint8 [H, W, 3], to what it shows, by class, however unsure."""

Classifier = Callable[[np.ndarray, str, Sequence[Found]], list[str]]
"""A picture, a class and objects of it to their colours."""


def draw(
    model: Family,
    processor: Processor,
    prompts: Sequence[Prompt],
    folder: Path,
    options: DrawOptions,
    pictures: int = 4,
    batch_size: int = 4,
) -> int:
    """Draw the pictures that are missing, and write the prompts beside them; returns how many were drawn.

    The n-th prompt has the folder n. Raises DataError where another prompt lies already.
    """
    drawn = 0
    for number, prompt in enumerate(prompts):
        place = folder / f"{number:05d}"
        _write_prompt(place / "metadata.jsonl", prompt)
        paths = [place / "samples" / f"{k:05d}.png" for k in range(pictures)]
        drawn += draw_missing(model, processor, prompt.text, paths, options, batch_size)
    return drawn


def _write_prompt(path: Path, prompt: Prompt) -> None:
    if path.is_file() and path.read_text("utf-8").strip() != prompt.line:
        raise DataError(f"{path} holds another prompt; draw into an empty folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(prompt.line + "\n", "utf-8")


def read(folder: Path) -> list[tuple[Prompt, list[Path]]]:
    """Every prompt with its pictures, which may be none, in the order of their numbers.

    Other names than digits are left alone, as by the official script. Raises DataError where there is no
    prompt, or one without its metadata.
    """
    places = [place for place in _numbered(folder) if place.is_dir()]
    if not places:
        raise DataError(f"{folder} holds no folders 00000, 00001, … of GenEval; draw the pictures first")
    found = []
    for place in places:
        where, line = next(read_lines(place / "metadata.jsonl"))
        pictures = [path for path in _numbered(place / "samples") if path.suffix == ".png"]
        found.append((Prompt.parse(line, where), pictures))
    return found


def _numbered(folder: Path) -> list[Path]:
    """What has a number as its name, in order."""
    names = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in names if path.stem.isdigit()), key=lambda path: (int(path.stem), path))


def judge_folder(
    folder: Path, detector: Detector, classifier: Classifier, max_overlap: float = 1.0
) -> Iterator[Row]:
    """The verdict on every picture of a folder. Raises DataError."""
    for prompt, pictures in read(folder):
        for path in pictures:
            yield judge_picture(
                prompt, read_picture(path), str(path.relative_to(folder)), detector, classifier, max_overlap
            )


def judge_picture(
    prompt: Prompt,
    picture: np.ndarray,
    name: str,
    detector: Detector,
    classifier: Classifier,
    max_overlap: float = 1.0,
) -> Row:
    """The verdict on one picture, uint8 [H, W, 3]. Colours are asked for once a class, where one is named."""
    found: dict[str, list[Found]] = {}
    for kind, objects in detector(picture).items():
        numbers = kept([one.box for one in objects], prompt.tag, max_overlap)
        if numbers:
            found[kind] = [objects[number] for number in numbers]
    colors = {
        clause.name: classifier(picture, clause.name, found[clause.name][: clause.count])
        for clause in prompt.include
        if clause.color is not None and len(found.get(clause.name, ())) >= clause.count
    }
    boxes = {kind: [one.box for one in objects] for kind, objects in found.items()}
    verdict = judge(prompt, boxes, lambda kind, number: colors[kind][number])
    return Row(name, prompt.tag, prompt.text, verdict.correct, verdict.reason, prompt.line, boxes)
