"""DPG-Bench's prompts, pictures and answers as files.

Prompts are a folder of `ITEM.txt` or one JSON object of file names and texts. Pictures are `ITEM_0.png` to
`ITEM_3.png`, or in the official layout one `ITEM.png` of two by two.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from unimrg.benchmarks.generation.dpg import Answers, Question
from unimrg.benchmarks.generation.drawing import draw_missing, read_picture, write_picture
from unimrg.benchmarks.generation.files import read_text
from unimrg.errors import DataError
from unimrg.families.base import DrawOptions, Family, Processor

PICTURES = 4

Judge = Callable[[Sequence[np.ndarray], Sequence[str]], list[str]]
"""One answer to each question about its picture, uint8 [H, W, 3]; only the text `yes` counts as one."""


def read_prompts(path: str | Path) -> dict[str, str]:
    """Item to prompt, sorted by item. Raises DataError."""
    path = Path(path)
    if path.is_dir():
        found = {file.stem: read_text(file).strip() for file in sorted(path.glob("*.txt"))}
    else:
        try:
            plain = json.loads(read_text(path))
        except ValueError as error:
            raise DataError(f"{path} is no JSON ({error}); fetch it again") from error
        if not isinstance(plain, dict) or not all(isinstance(text, str) for text in plain.values()):
            raise DataError(f"{path} must map file names to prompts; use RecA's prompts.json")
        found = {Path(name).stem: text.strip() for name, text in sorted(plain.items())}
    if not found:
        raise DataError(f"{path} holds no prompts; give a folder of ITEM.txt or a prompts.json")
    if empty := next((item for item, text in found.items() if not text), None):
        raise DataError(f"{path}: the prompt of {empty} is empty; fetch it again")
    return found


def draw(
    model: Family,
    processor: Processor,
    prompts: Mapping[str, str],
    folder: Path,
    options: DrawOptions,
    batch_size: int = PICTURES,
) -> int:
    """Draw the pictures that are missing, as separate files; returns how many were drawn."""
    return sum(
        draw_missing(
            model,
            processor,
            text,
            [folder / f"{item}_{number}.png" for number in range(PICTURES)],
            options,
            batch_size,
        )
        for item, text in prompts.items()
    )


def write_grids(folder: Path, target: Path) -> int:
    """The separate pictures of a folder in the official layout; returns the number of grids.

    Raises DataError for an item that hasn't all of its pictures.
    """
    items = sorted({path.stem.rpartition("_")[0] for path in folder.glob("*_*.png")})
    for item in items:
        parts = [read_picture(folder / f"{item}_{number}.png") for number in range(PICTURES)]
        write_picture(
            target / f"{item}.png", np.concatenate([np.concatenate(parts[k : k + 2], 1) for k in (0, 2)])
        )
    return len(items)


def read(folder: Path, items: Sequence[str], layout: str) -> Iterator[tuple[str, dict[int, np.ndarray]]]:
    """Every item that has pictures, and these by number, uint8 [H, W, 3].

    Raises DataError where there is no picture of any item.
    """
    none = True
    for item in items:
        if pictures := (_from_grid if layout == "grid" else _separate)(folder, item):
            none = False
            yield item, pictures
    if none:
        raise DataError(
            f"{folder} holds no {layout} pictures of the items; draw them, or name the other layout"
        )


def _separate(folder: Path, item: str) -> dict[int, np.ndarray]:
    paths = {number: folder / f"{item}_{number}.png" for number in range(PICTURES)}
    return {number: read_picture(path) for number, path in paths.items() if path.is_file()}


def _from_grid(folder: Path, item: str) -> dict[int, np.ndarray]:
    path = folder / f"{item}.png"
    return dict(enumerate(quarters(read_picture(path)))) if path.is_file() else {}


def quarters(grid: np.ndarray) -> list[np.ndarray]:
    """The four pictures of a grid, row by row."""
    height, width = grid.shape[0] // 2, grid.shape[1] // 2
    return [grid[top : top + height, left : left + width] for top in (0, height) for left in (0, width)]


def ask(
    folder: Path, questions: Mapping[str, Sequence[Question]], judge: Judge, layout: str = "separate"
) -> Answers:
    """What the judge says of every picture that is there. Raises DataError."""
    answers: dict[str, dict[int, dict[int, str]]] = {}
    for item, pictures in read(folder, list(questions), layout):
        asked = questions[item]
        for number, picture in pictures.items():
            said = judge([picture] * len(asked), [question.text for question in asked])
            answers.setdefault(item, {})[number] = {
                question.number: text for question, text in zip(asked, said, strict=True)
            }
    return answers


def write_answers(path: Path, answers: Answers) -> None:
    """As one JSON object: item, picture, question, answer."""
    path.write_text(json.dumps(answers, indent=1, ensure_ascii=False), "utf-8")


def read_answers(path: str | Path) -> Answers:
    """Inverse of `write_answers`; also what another judge has said. Raises DataError."""
    try:
        return {
            str(item): {
                int(picture): {int(number): str(text) for number, text in said.items()}
                for picture, said in pictures.items()
            }
            for item, pictures in json.loads(read_text(path)).items()
        }
    except (ValueError, AttributeError) as error:
        raise DataError(
            f"{path} holds no answers by item, picture and question ({error}); ask the judge again"
        ) from error
