"""The nouns: what a task, a record, a sample and a loss are, with shapes.

A `Record` is one image of a data set with everything asked about it. Teachers add `Labels`. Geometry and
rendering turn both into a `Sample`: what a model family's processor reads. Row forms (`to_row`,
`from_row`) are plain Arrow scalars, so that they travel through Ray Data and Parquet unchanged.

Shape suffixes: H, W pixels of the original picture; S side of the square training picture.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np


class Task(StrEnum):
    """The four tasks of UniMRG (arXiv 2601.21406, section 3)."""

    UNDERSTANDING = "understanding"
    PIXEL = "pixel"
    DEPTH = "depth"
    SEGMENTATION = "segmentation"


IMAGE_TASKS = (Task.PIXEL, Task.DEPTH, Task.SEGMENTATION)

PICTURES = ("image", *(task.value for task in IMAGE_TASKS))
"""Keys of `Sample.codes`."""

BFLOAT16 = np.dtype([("bfloat16", np.uint16)])
"""Bits of bfloat16 numbers, which numpy has no type for."""


@dataclass(frozen=True)
class Turn:
    """One question and its answer; the image placeholder is not part of the text."""

    question: str
    answer: str


Conversation = tuple[Turn, ...]


@dataclass(frozen=True)
class Record:
    """One image of a data set (or none) and every conversation about it.

    image: uint8 [H, W, 3] RGB, or None for a text-only record.
    depth: what the data set brings along: inverse depth (bright = near) [H, W], float32 or uint16; or None.
    masks: instance ids [H, W] integer, 0 = background; or None.
    """

    id: str
    conversations: tuple[Conversation, ...]
    image: np.ndarray | None = None
    depth: np.ndarray | None = None
    masks: np.ndarray | None = None


@dataclass(frozen=True)
class Labels:
    """What the teachers say of one image.

    depth: uint8 [H, W], relative inverse depth stretched to 0..255 per image, bright = near.
    segmentation: uint8 [H, W], region boundaries 255 on 0.
    """

    depth: np.ndarray | None = None
    segmentation: np.ndarray | None = None


@dataclass(frozen=True)
class Sample:
    """One image in training geometry, its conversations and its drawings, as pixels or as codes.

    position: place in the epoch's order, the same for any number of workers; seeds every random draw.
    image: uint8 [S, S, 3], or None (text only, or only its codes are known).
    targets: uint8 [S, S, 3] for each image task present.
    valid: (left, top, right, bottom) in pixels: the part of the square that is picture, not padding.
    codes: what a family's frozen encoder (`families.encoder`) says of the pictures named in `PICTURES`; all
        of one shape and type: float32, BFLOAT16 or unsigned integers. `pixel` is missing where the target is
        the image itself.
    """

    id: str
    position: int
    conversations: tuple[Conversation, ...]
    image: np.ndarray | None = None
    targets: dict[Task, np.ndarray] = field(default_factory=dict)
    valid: tuple[int, int, int, int] = (0, 0, 0, 0)
    codes: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def has_image(self) -> bool:
        """Whether there is a picture, as pixels or as codes."""
        return self.image is not None or "image" in self.codes

    @property
    def drawn(self) -> tuple[Task, ...]:
        """The tasks that have a target, as pixels or as codes."""
        coded = {Task(name) for name in self.codes if name != "image"}
        coded |= {Task.PIXEL} if "image" in self.codes else set()
        return tuple(task for task in IMAGE_TASKS if task in self.targets or task in coded)

    def to_row(self) -> dict[str, Any]:
        """Plain scalars for Arrow; `from_row` restores the sample exactly.

        What is known already doesn't travel: one channel of grey drawings, nothing of a target that is the
        image itself.
        """
        row: dict[str, Any] = {
            "id": self.id,
            "position": self.position,
            "conversations": dump_conversations(self.conversations),
            "side": 0 if self.image is None else int(self.image.shape[0]),
            "valid": list(self.valid),
            "image": None if self.image is None else _to_bytes(self.image),
        }
        for task in IMAGE_TASKS:
            target = self.targets.get(task)
            same = target is not None and target is self.image
            row[task.value] = None if target is None else b"" if same else _to_bytes(target)
        return row | _codes_to_row(self.codes)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Sample:
        """Inverse of `to_row`."""
        side = int(row["side"])
        image = None if row["image"] is None else _from_bytes(row["image"], side)
        targets = {}
        for task in IMAGE_TASKS:
            if (raw := row[task.value]) is not None:
                targets[task] = _from_bytes(raw, side) if raw or image is None else image
        left, top, right, bottom = (int(v) for v in row["valid"])
        return cls(
            id=row["id"],
            position=int(row["position"]),
            conversations=load_conversations(row["conversations"]),
            image=image,
            targets=targets,
            valid=(left, top, right, bottom),
            codes=_codes_from_row(row),
        )


def grey_picture(values: np.ndarray) -> np.ndarray:
    """[S, S] as [S, S, 3] without a copy, and so not to be written to."""
    return np.broadcast_to(values[..., None], (*values.shape, 3))


def _to_bytes(picture: np.ndarray) -> bytes:
    return (picture if picture.strides[2] else picture[..., 0]).tobytes()


def _from_bytes(raw: bytes, side: int) -> np.ndarray:
    values = np.frombuffer(raw, np.uint8)
    grey = len(raw) == side * side
    return grey_picture(values.reshape(side, side)) if grey else values.reshape(side, side, 3)


def _codes_to_row(codes: dict[str, np.ndarray]) -> dict[str, Any]:
    row: dict[str, Any] = {f"{name}_codes": None for name in PICTURES}
    if not codes:
        return row | {"codes_shape": None, "codes_dtype": None}
    ((shape, dtype),) = {(array.shape, array.dtype) for array in codes.values()}
    row |= {f"{name}_codes": array.tobytes() for name, array in codes.items()}
    return row | {"codes_shape": list(shape), "codes_dtype": "bfloat16" if dtype == BFLOAT16 else dtype.name}


def _codes_from_row(row: dict[str, Any]) -> dict[str, np.ndarray]:
    if not row.get("codes_dtype"):
        return {}
    dtype = BFLOAT16 if row["codes_dtype"] == "bfloat16" else np.dtype(row["codes_dtype"])
    raw = {name: row[f"{name}_codes"] for name in PICTURES}
    return {
        name: np.frombuffer(value, dtype).reshape(row["codes_shape"])
        for name, value in raw.items()
        if value is not None
    }


def dump_conversations(conversations: tuple[Conversation, ...]) -> str:
    """Conversations as compact JSON: a list of lists of [question, answer]."""
    plain = [[[turn.question, turn.answer] for turn in conversation] for conversation in conversations]
    return json.dumps(plain, ensure_ascii=False)


def load_conversations(text: str) -> tuple[Conversation, ...]:
    """Inverse of `dump_conversations`."""
    return tuple(tuple(Turn(q, a) for q, a in conversation) for conversation in json.loads(text))
