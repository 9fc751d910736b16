"""Pictures of prompts: drawn once, kept as PNG, read again."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from unimrg.config import DataConfig
from unimrg.data.decode import decode_image
from unimrg.errors import DataError, SampleError
from unimrg.families.base import DrawOptions, Family, Processor


def draw_missing(
    model: Family,
    processor: Processor,
    text: str,
    paths: Sequence[Path],
    options: DrawOptions,
    batch_size: int = 4,
) -> int:
    """Draw `text` once for each path, unless all of them are there; returns how many were drawn.

    `batch_size` pictures at a time, the n-th batch with the seed n after that of `options`: the same pictures
    whatever was drawn before.
    """
    if all(path.is_file() for path in paths):
        return 0
    for number, start in enumerate(range(0, len(paths), batch_size)):
        some = paths[start : start + batch_size]
        drawn = model.draw_text(processor, [text] * len(some), replace(options, seed=options.seed + number))
        for path, picture in zip(some, drawn, strict=True):
            write_picture(path, picture)
    return len(paths)


def write_picture(path: Path, picture: np.ndarray) -> None:
    """uint8 [H, W, 3] as PNG, whole or not at all; makes the folder."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(buffer.getvalue())
    os.replace(part, path)


def read_picture(path: Path) -> np.ndarray:
    """uint8 [H, W, 3] of a picture file. Raises DataError."""
    limits = DataConfig()
    try:
        return decode_image(path.read_bytes(), limits.max_bytes, limits.max_pixels, limits.max_side)
    except (OSError, SampleError) as error:
        raise DataError(f"{path} can't be read as a picture ({error}); draw or fetch it again") from error
