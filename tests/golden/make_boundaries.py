"""Writes boundaries.npz: what OpenCV says of some masks, and of one picture made smaller.

Run where OpenCV is installed: pip install opencv-python-headless; python tests/golden/make_boundaries.py

sizes: int16 [N, 2] (height, width) of each mask. masks, edges: the masks and their Canny(mask * 255, 100,
200), row by row and one after the other, packed to bits. picture, area: uint8 [H, W, 3] and its INTER_AREA at
the size `area` has. nearest: INTER_NEAREST of the first mask at the size `nearest` has.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np


def draw(kind: int, rng: np.random.Generator) -> np.ndarray:
    """A uint8 0/1 mask of a random size: noise, polygons, discs, blobs, ellipses, lines by `kind`."""
    height, width = (int(side) for side in rng.integers(1, 80, 2))
    mask = np.zeros((height, width), np.uint8)
    for _ in range(int(rng.integers(1, 4))):
        centre = tuple(int(v) for v in rng.integers(0, 80, 2))
        if kind == 0:
            mask = (rng.random((height, width)) < rng.random()).astype(np.uint8)
        elif kind == 1:
            cv2.fillPoly(mask, [rng.integers(-10, 90, (int(rng.integers(3, 9)), 2)).astype(np.int32)], 1)
        elif kind == 2:
            cv2.circle(mask, centre, int(rng.integers(1, 40)), 1, -1)
        elif kind == 3:
            noise = cv2.GaussianBlur(rng.random((height, width)), (0, 0), float(rng.uniform(0.8, 6)))
            mask = (noise > np.median(noise)).astype(np.uint8)
        elif kind == 4:
            axes = tuple(int(v) for v in rng.integers(1, 40, 2))
            cv2.ellipse(mask, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
        else:
            end = tuple(int(v) for v in rng.integers(0, 80, 2))
            cv2.line(mask, centre, end, 1, int(rng.integers(1, 4)))
    return mask


def main() -> None:
    rng = np.random.default_rng(0)
    masks = [draw(index % 6, rng) for index in range(120)]
    edges = [cv2.Canny(mask * 255, 100, 200) > 0 for mask in masks]
    picture = rng.integers(0, 256, (61, 93, 3)).astype(np.uint8)
    np.savez_compressed(
        Path(__file__).with_name("boundaries.npz"),
        opencv=np.array(cv2.__version__),
        sizes=np.array([mask.shape for mask in masks], np.int16),
        masks=np.packbits(np.concatenate([mask.ravel() for mask in masks])),
        edges=np.packbits(np.concatenate([edge.ravel() for edge in edges])),
        picture=picture,
        area=cv2.resize(picture, (64, 41), interpolation=cv2.INTER_AREA),
        nearest=cv2.resize(masks[0], (101, 57), interpolation=cv2.INTER_NEAREST),
    )


if __name__ == "__main__":
    main()
