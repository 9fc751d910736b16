"""Label maps from the depth and the instance ids that a data set brings along."""

from __future__ import annotations

from typing import Any

import numpy as np

from unimrg.errors import SampleError
from unimrg.teachers.boundaries import mask_boundaries
from unimrg.teachers.common import stretch


def oracle_depth(inverse_depth: np.ndarray, shape: tuple[int, int] | None = None) -> np.ndarray:
    """Inverse depth [H, W] (any unit, larger = nearer) as uint8 [H, W]: stretched over its valid pixels.

    Valid is finite and above 0; the rest (sky, holes of a sensor) becomes 0 = far. `shape`: (H, W) of the
    picture, where it is known.
    """
    values = _checked(inverse_depth, shape, "inverse depth", "fiu").astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        raise SampleError("missing-label", "inverse depth holds no finite value")
    valid = finite & (values > 0)
    result = np.zeros(values.shape, np.uint8)
    if valid.any():
        result[valid] = stretch(values[valid])
    return result


def oracle_segmentation(ids: np.ndarray, shape: tuple[int, int] | None = None) -> np.ndarray:
    """Instance ids [H, W] (0 and below = no instance) as uint8 [H, W]: all their boundaries, 255 on 0."""
    ids = _checked(ids, shape, "instance ids", "iu")
    edges = np.zeros(ids.shape, bool)
    for instance in np.unique(ids):
        if instance > 0:
            mask = ids == instance
            # One pixel around the instance: beyond it nothing changes, and most instances are small.
            box = _around(mask.any(axis=1)), _around(mask.any(axis=0))
            edges[box] |= mask_boundaries(mask[box])
    return edges.astype(np.uint8) * 255


def _around(occupied: np.ndarray) -> slice:
    """From one before the first to one after the last True of a bool vector with at least one True."""
    where = np.flatnonzero(occupied)
    return slice(max(int(where[0]) - 1, 0), int(where[-1]) + 2)


def _checked(array: Any, shape: tuple[int, int] | None, name: str, kinds: str) -> np.ndarray:
    """The array if it is a non-empty map of a fitting number kind (and shape), else a `SampleError`."""
    if array is None:
        raise SampleError("missing-label", f"the record has no {name}")
    array = np.asarray(array)
    if array.ndim != 2 or array.size == 0 or array.dtype.kind not in kinds:
        raise SampleError("missing-label", f"{name} of shape {list(array.shape)} and type {array.dtype}")
    if shape is not None and array.shape != tuple(shape):
        raise SampleError("missing-label", f"{name} is {list(array.shape)}, the picture {list(shape)}")
    return array
