"""Held-out pictures in training geometry, with the drawings that would be right, and the truth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL.Image import Resampling

from unimrg.data.decode import decode_map, decode_masks
from unimrg.data.geometry import pad_square
from unimrg.data.pictures import Pictures
from unimrg.errors import SampleError
from unimrg.sample import Sample


@dataclass(frozen=True)
class Subject:
    """One picture. depth: true depth float64 [S, S] up to a factor, infinite where it isn't known.

    regions: true labels int64 [S, S], 0 = none. None where the data set doesn't say.
    """

    sample: Sample
    depth: np.ndarray | None = None
    regions: np.ndarray | None = None


def read_subjects(
    rows: pa.Table, stages: Sequence[Callable[[pa.Table], pa.Table]], files: Pictures, side: int
) -> tuple[list[Subject], dict[str, int]]:
    """The usable pictures of a manifest's rows, in order, and counts of what was out of the ordinary.

    stages: of `unimrg.data.stages`, from rows with a position to samples of `side` pixels.
    """
    table = rows.append_column("position", pa.array(np.arange(len(rows))))
    for stage in stages:
        table = stage(table)
    counts: Counter[str] = Counter()
    subjects = []
    for row, sample in zip(rows.to_pylist(), table.to_pylist(), strict=True):
        if sample["error"] or sample["image"] is None:
            counts[f"left out: {sample['error'] or 'no picture'}"] += 1
        else:
            subjects.append(
                Subject(Sample.from_row(sample), _depth(row, files, side), _regions(row, files, side))
            )
    counts["without true depth"] = sum(one.depth is None for one in subjects)
    counts["without true regions"] = sum(one.regions is None for one in subjects)
    return subjects, {reason: n for reason, n in counts.items() if n}


def _depth(row: dict[str, Any], files: Pictures, side: int) -> np.ndarray | None:
    inverse = _read(row, "depth", files, decode_map)
    if inverse is None:
        return None
    near = _square(inverse, side)
    with np.errstate(divide="ignore"):
        depth: np.ndarray = np.where(near > 0, 1 / near, np.inf)
    return depth


def _regions(row: dict[str, Any], files: Pictures, side: int) -> np.ndarray | None:
    ids = _read(row, "masks", files, decode_masks)
    if ids is None:
        return None
    known, place = np.unique(ids, return_inverse=True)  # ids may be too large for single precision
    numbers = np.where(known > 0, np.arange(1, len(known) + 1), 0)
    return _square(numbers[place.reshape(ids.shape)], side).astype(np.int64)


def _read(
    row: dict[str, Any], column: str, files: Pictures, decode: Callable[[bytes], np.ndarray]
) -> np.ndarray | None:
    """A map that an entry names, or None where it names none or one that can't be read."""
    if not row.get(column):
        return None
    try:
        return decode(files.read(row[column], None, _MAX_BYTES))
    except SampleError:
        return None


_MAX_BYTES = 64 << 20


def _square(values: np.ndarray, side: int) -> np.ndarray:
    """As pictures are padded and resized, by the nearest pixel, 0 around it."""
    return pad_square(values.astype(np.float32), side, 0, Resampling.NEAREST)[0].astype(np.float64)
