"""Drawings of a picture that are asked for by name, so that a base listens to what it is to draw.

A base that has only ever redrawn has no reason to read its prompt: it begins every other drawing as a redraw
and, unlearning that, stops looking at the picture (docs/experiments.md). These drawings need no teacher and
tell nothing of depth or boundaries, which the arms are to learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from unimrg.families.encoder import PictureEncoder
from unimrg.sample import Task
from unimrg.tasks import choose_prompt

FORMS = ("Generate the {} of this image.", "Draw the {} of this image.", "Turn this image into its {}.")
PICTURE = "picture"  # redrawn, by the prompts of that task


def _grey(picture: np.ndarray) -> np.ndarray:
    return np.broadcast_to(picture.mean(-1, keepdims=True), picture.shape)


def _part(channel: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda picture: np.broadcast_to(picture[..., channel, None], picture.shape)


CHANGES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    PICTURE: lambda picture: picture,
    "negative": lambda picture: 255 - picture,
    "greyscale": _grey,
    "dark version": lambda picture: picture // 2,
    "swapped colours": lambda picture: picture[..., ::-1],
    "red part": _part(0),
    "blue part": _part(2),
}
"""What is drawn, by the name that prompts call it: pictures uint8 [..., 3] to pictures."""

NAMES = tuple(CHANGES)


def asked_for(position: int, seed: int) -> int:
    """Which of `NAMES` the sample at `position` is to be drawn as: the picture itself every other time."""
    rng = np.random.default_rng([10, seed, position])
    return 0 if rng.random() < 0.5 else int(rng.integers(1, len(NAMES)))


def prompt(kind: int, rng: np.random.Generator) -> str:
    """Asks for one of `NAMES`."""
    if NAMES[kind] == PICTURE:
        return choose_prompt(Task.PIXEL, rng, dropout=0.0)
    return FORMS[int(rng.integers(len(FORMS)))].format(NAMES[kind])


def changed(encoder: PictureEncoder, pictures: Sequence[np.ndarray], kinds: Sequence[int]) -> np.ndarray:
    """Codes of pictures, each as one of `NAMES`."""
    drawn = [CHANGES[NAMES[kind]](picture) for picture, kind in zip(pictures, kinds, strict=True)]
    return encoder(np.stack(drawn).astype(np.uint8))
