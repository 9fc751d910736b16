"""Held-out pictures drawn by a checkpoint: what it draws of them, stored in parts, and what that is worth."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from PIL import Image

from unimrg.benchmarks.dense.drawings import Example, score_boundaries, score_depth, score_redraws
from unimrg.benchmarks.dense.subjects import Subject
from unimrg.benchmarks.result import BenchmarkResult
from unimrg.data.label_store import Parts, digest
from unimrg.sample import IMAGE_TASKS, Sample, Task
from unimrg.storage import Store

if TYPE_CHECKING:
    from unimrg.families.base import Family, Processor

AUTOENCODER = "autoencoder"
"""Name of what a family's frozen autoencoder makes of the pictures: as good as a redraw can be."""

DRAWN = pa.schema([("row", pa.int64()), ("name", pa.string()), ("picture", pa.binary())])  # a task, or that
SHOWN = 8  # pictures on the sheet


@dataclass(frozen=True)
class Settings:
    """All that a drawing depends on, beside software and machine: also on its neighbours in the batch.

    checkpoint, pictures: digests. iterations: 0 = the family's own. dtype: of the weights. batch: pictures
    drawn together, which are stored together.
    """

    checkpoint: str
    pictures: str
    iterations: int
    dtype: str
    batch: int
    seed: int = 0

    def parts(self, out: Store) -> Parts:
        return Parts(out.child(f"drawings/{digest(asdict(self))}"), DRAWN)


def draw(
    model: Family, processor: Processor, pictures: Sequence[np.ndarray], first: int, settings: Settings
) -> pa.Table:
    """A part: every drawing of a batch of pictures (uint8 [S, S, 3]), whose first is number `first`."""
    import torch

    from unimrg.families.base import DrawOptions

    options = DrawOptions(settings.iterations, seed=settings.seed + first)
    found = {task.value: model.draw(processor, pictures, task, options) for task in IMAGE_TASKS}
    with torch.no_grad():
        shown = torch.from_numpy(np.stack(pictures)).to(model.device_of_weights)
        found[AUTOENCODER] = list(model.decode_pictures(model.encode_pictures(shown)).cpu().numpy())
    rows = [
        {"row": first + n, "name": name, "picture": _png(picture)}
        for name, drawn in found.items()
        for n, picture in enumerate(drawn)
    ]
    return pa.Table.from_pylist(rows, schema=DRAWN)


def read(parts: Parts) -> dict[str, list[np.ndarray]]:
    """Name -> drawings in order, from all parts, which must be there. Raises DataError for a damaged one."""
    rows = [row for number in sorted(parts.done()) for row in parts.read(number).to_pylist()]
    found: dict[str, list[np.ndarray]] = {}
    for row in sorted(rows, key=lambda row: row["row"]):
        with Image.open(io.BytesIO(row["picture"]), formats=("PNG",)) as picture:
            found.setdefault(row["name"], []).append(np.asarray(picture))
    return found


def score(
    subjects: Sequence[Subject], drawn: Mapping[str, Sequence[np.ndarray]], protocol: Mapping[str, str]
) -> list[BenchmarkResult]:
    """Redraws, and depth and boundaries where all pictures have targets, with chance beside each score."""
    ceiling = {AUTOENCODER: drawn[AUTOENCODER]}
    results = [score_redraws(_examples(subjects, Task.PIXEL), drawn[Task.PIXEL.value], ceiling)]
    for task, scorer in ((Task.DEPTH, score_depth), (Task.SEGMENTATION, score_boundaries)):
        if all(task in subject.sample.targets for subject in subjects):
            results.append(scorer(_examples(subjects, task), drawn[task.value]))
    return [replace(result, protocol=result.protocol | dict(protocol)) for result in results]


def _examples(subjects: Sequence[Subject], task: Task) -> list[Example]:
    return [
        Example(_image(one.sample), one.sample.targets[task], one.sample.valid, one.depth, one.regions)
        for one in subjects
    ]


def sheet(subjects: Sequence[Subject], drawn: Mapping[str, Sequence[np.ndarray]]) -> bytes:
    """PNG of the first pictures, one a line: picture, its round trip, then each drawing behind its target."""
    lines = []
    for n, subject in enumerate(subjects[:SHOWN]):
        line = [_image(subject.sample), drawn[AUTOENCODER][n], drawn[Task.PIXEL.value][n]]
        for task in (Task.DEPTH, Task.SEGMENTATION):
            if task in subject.sample.targets:
                line += [subject.sample.targets[task], drawn[task.value][n]]
        lines.append(np.concatenate(line, axis=1))
    widest = max(line.shape[1] for line in lines)
    return _png(np.concatenate([np.pad(x, ((0, 0), (0, widest - x.shape[1]), (0, 0))) for x in lines]))


def _image(sample: Sample) -> Any:
    return sample.image


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
