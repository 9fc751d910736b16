"""From pictures and maps of any shape to the training square, in one of three geometries.

"pad" (ours): the picture is centred on a grey square, and so are all its drawings, so that every task sees
one geometry and the image tokens can be shared; the padding is left out of the image losses (`Sample.valid`).
"squash": the picture is stretched to a square, losing its proportions.
"published": questions see the padded picture, drawings start from the squashed one and are squashed.

Pillow's `resize` averages over as many pixels as the factor asks for, so shrinking never aliases.
"""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image
from PIL.Image import Resampling

from unimrg.errors import ConfigError, SampleError
from unimrg.sample import Labels, Record, Sample, Task, grey_picture

GEOMETRIES = ("pad", "squash", "published")
GREY = 127

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the square, right and bottom excluded


def pad_square(
    image: np.ndarray, side: int, fill: int = GREY, resample: Resampling = Resampling.BICUBIC
) -> tuple[np.ndarray, Box]:
    """Centre on a square of `fill`, then resize once.

    image: [H, W, 3] uint8 or [H, W] uint8 or float32. Returns [side, side(, 3)] of the same kind, and the box
    of pixels that hold nothing but picture.
    """
    height, width = image.shape[:2]
    longest = max(height, width)
    left, top = (longest - width) // 2, (longest - height) // 2
    square = np.full((longest, longest, *image.shape[2:]), fill, image.dtype)
    square[top : top + height, left : left + width] = image
    return _resize(square, side, resample), _box(height, width, side)


def squash(image: np.ndarray, side: int) -> np.ndarray:
    """Stretch to a square of the longer side, then resize, both bicubic: [H, W(, 3)] -> [side, side(, 3)]."""
    return _resize(_resize(image, max(image.shape[:2]), Resampling.BICUBIC), side, Resampling.BICUBIC)


def depth_target(depth: np.ndarray, side: int, geometry: str = "pad") -> np.ndarray:
    """The drawing of a depth map, uint8 [side, side], stretched to 0..255 within the picture; bright = near.

    depth: [H, W] uint8, uint16 or float32. A constant map gives 0. squash: bicubic to the square, bilinear to
    `side`. pad: bilinear; the map is continued past its border while resizing, so that no padding bleeds in.
    Raises ConfigError for an unknown geometry.
    """
    _check(geometry)
    values = depth if depth.dtype == np.uint8 else depth.astype(np.float32)
    if geometry != "pad":
        stretched = _resize(values, max(values.shape), Resampling.BICUBIC)
        return _full_range(_resize(stretched, side, Resampling.BILINEAR))
    height, width = values.shape
    down, across = max(width - height, 0), max(height - width, 0)
    margins = ((down // 2, down - down // 2), (across // 2, across - across // 2))
    square = _resize(np.pad(values, margins, mode="edge"), side, Resampling.BILINEAR)
    return _framed(square, _box(height, width, side), stretch=True)


def segmentation_target(boundaries: np.ndarray, side: int, geometry: str = "pad") -> np.ndarray:
    """The drawing of region boundaries, uint8 [side, side]: 255 on 0.

    boundaries: [H, W] uint8. squash: bicubic to the square, nearest to `side`, as published; nearest drops
    most of a line of one pixel when it shrinks. pad: each target pixel takes the maximum of the source pixels
    it covers. Lines stay closed, white and about a pixel wide at every size, where averaging would fade them
    in proportion to the factor. When enlarging it is nearest.
    Raises ConfigError for an unknown geometry.
    """
    _check(geometry)
    if geometry != "pad":
        square = _resize(boundaries, max(boundaries.shape), Resampling.BICUBIC)
        return _resize(square, side, Resampling.NEAREST)
    height, width = boundaries.shape
    longest = max(height, width)
    left, top = (longest - width) // 2, (longest - height) // 2
    square = np.zeros((longest, longest), np.uint8)
    square[top : top + height, left : left + width] = boundaries
    return _framed(_largest(square, (side, side)), _box(height, width, side), stretch=False)


def render_sample(record: Record, labels: Labels, position: int, side: int, geometry: str = "pad") -> Sample:
    """The training square of a record and its labels.

    Targets: the image itself for pixel; depth and segmentation as grey in three channels where there are
    labels. Labels of another size than the image are first brought to the image's. A record without an image
    becomes a text-only sample. Raises ConfigError for an unknown geometry, SampleError for malformed labels.
    """
    _check(geometry)
    if record.image is None:
        return Sample(record.id, position, record.conversations)
    if geometry == "pad":
        image, valid = pad_square(record.image, side)
        targets = {Task.PIXEL: image}
    else:
        valid = (0, 0, side, side)
        targets = {Task.PIXEL: squash(record.image, side)}
        image = targets[Task.PIXEL] if geometry == "squash" else pad_square(record.image, side)[0]
    height, width = record.image.shape[:2]
    if labels.depth is not None:
        depth = _label(labels.depth, "depth")
        if depth.shape != (height, width):
            depth = np.array(Image.fromarray(depth).resize((width, height), Resampling.BILINEAR))
        targets[Task.DEPTH] = grey_picture(depth_target(depth, side, geometry))
    if labels.segmentation is not None:
        lines = _largest(_label(labels.segmentation, "segmentation"), (height, width))
        targets[Task.SEGMENTATION] = grey_picture(segmentation_target(lines, side, geometry))
    return Sample(record.id, position, record.conversations, image, targets, valid)


def _check(geometry: str) -> None:
    if geometry not in GEOMETRIES:
        raise ConfigError(f"geometry {geometry!r} is unknown; choose one of {', '.join(GEOMETRIES)}")


def _label(label: np.ndarray, name: str) -> np.ndarray:
    if label.ndim != 2 or label.dtype != np.uint8 or not label.size:
        raise SampleError("missing-label", f"{name} must be uint8 [H, W], not {label.dtype} {label.shape}")
    return label


def _resize(image: np.ndarray, side: int, resample: Resampling) -> np.ndarray:
    """[H, W(, 3)] uint8 or [H, W] float32 -> [side, side(, 3)]."""
    return np.array(Image.fromarray(np.ascontiguousarray(image)).resize((side, side), resample))


def _box(height: int, width: int, side: int) -> Box:
    """Pixels of the padded and resized square that lie inside the picture in full; at least one."""
    longest = max(height, width)

    def span(length: int) -> tuple[int, int]:
        start = (longest - length) // 2
        first = -(-start * side // longest)
        last = (start + length) * side // longest
        if last > first:
            return first, last
        middle = min(side - 1, (2 * start + length) * side // (2 * longest))
        return middle, middle + 1

    (left, right), (top, bottom) = span(width), span(height)
    return left, top, right, bottom


def _largest(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resize [H, W] by the maximum over the pixels that a target pixel covers; nearest when enlarging."""
    for axis, length in enumerate(shape):
        size = image.shape[axis]
        if size != length:
            starts = np.arange(length) * size // length
            last = np.maximum(np.append(starts[1:], size) - 1, starts)
            # A gather for each place in a cell: many times as fast as `reduceat`.
            places = (np.minimum(starts + k, last) for k in range(int((last - starts).max()) + 1))
            image = functools.reduce(np.maximum, (image.take(place, axis) for place in places))
    return image


def _framed(square: np.ndarray, box: Box, stretch: bool) -> np.ndarray:
    """The picture's part of a square on grey, as in the padded image; `stretch` brings it to 0..255 first."""
    left, top, right, bottom = box
    inside = square[top:bottom, left:right]
    framed = np.full(square.shape, GREY, np.uint8)
    framed[top:bottom, left:right] = _full_range(inside) if stretch else inside
    return framed


def _full_range(values: np.ndarray) -> np.ndarray:
    """Minimum to 0, maximum to 255, uint8; constant to 0."""
    values = values.astype(np.float32)
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    return np.rint((values - low) * (255.0 / (high - low))).astype(np.uint8)
