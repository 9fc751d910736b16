"""A trained model as the field's own harnesses want it, to check scores against theirs.

Nothing of a harness is imported before its model is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np


class Asked:
    """A checkpoint that answers one question at a time or several, as `unimrg.evaluate` lets it answer.

    checkpoint: a folder of `save_pretrained`, local, s3:// or on the hub. device: auto, cpu, cuda or cuda:1.
    Weights are bfloat16 on a GPU, float32 elsewhere. Raises UnimrgError.
    """

    def __init__(self, checkpoint: str, device: str = "auto") -> None:
        from unimrg.families import load_trained
        from unimrg.storage import S3Config
        from unimrg.teachers.weights import choose_device, choose_dtype
        from unimrg.weights import fetch

        where = choose_device(device)
        folder = fetch("checkpoint", checkpoint, S3Config())
        self.model, self.processor, self.side = load_trained(folder, where, choose_dtype("auto", where))

    def __call__(
        self, pictures: Sequence[np.ndarray | None], questions: Sequence[str], max_new_tokens: int
    ) -> list[str]:
        """Greedy answers. pictures: uint8 [H, W, 3] of any size, padded here to a square with grey."""
        from unimrg.data.geometry import pad_square

        squares = [None if picture is None else pad_square(picture, self.side)[0] for picture in pictures]
        answers: list[str] = self.model.answer(self.processor, squares, questions, max_new_tokens)
        return answers


def base_of(module: str, name: str) -> Any:
    """A class of a harness, or `object` where the harness isn't installed."""
    if find_spec(module.partition(".")[0]) is None:
        return object
    return getattr(importlib.import_module(module), name)
