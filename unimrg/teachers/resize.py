"""Pictures to the pixels that a model sees, on any device, with Pillow's own numbers.

Pillow takes uint8 and gives uint8 by whole-number arithmetic. On the CPU Pillow itself does it; on an
accelerator `resample` repeats its arithmetic, so that labels don't depend on where a picture was resized.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Pillow keeps its weights as whole numbers of this many bits after the point.
FRACTION_BITS = 22
SUPPORT = {Image.Resampling.BILINEAR: 1.0, Image.Resampling.BICUBIC: 2.0}


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device; the host doesn't wait for the copy."""
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def resize(picture: Tensor, size: tuple[int, int], filter: int) -> Tensor:
    """A picture uint8 [H, W, 3] at `size` (h, w) as Pillow resizes it, bit for bit, on the picture's device.

    filter: Pillow's number of the bilinear or the bicubic filter. Raises ValueError if a side of `size` is 0.
    """
    if min(size) < 1:
        raise ValueError(f"a picture of {size[1]}x{size[0]} pixels holds nothing; give a larger size")
    kind = Image.Resampling(filter)
    if picture.device.type != "cpu":
        return resample(picture, size, kind)
    return torch.from_numpy(np.array(Image.fromarray(picture.numpy()).resize(size[::-1], kind)))


def resample(picture: Tensor, size: tuple[int, int], kind: Image.Resampling) -> Tensor:
    """`resize` by torch alone: two passes, each rounded to uint8."""
    lost = picture.shape[0] - size[0], picture.shape[1] - size[1]
    # Rounding in between makes the order count: Pillow starts with the height where that saves it much.
    height_first = lost[0] > 0 and lost[0] > 2 * lost[1]
    for axis in (0, 1) if height_first else (1, 0):
        old, new = picture.shape[axis], size[axis]
        if old != new:
            first, weights = _pillow_weights(old, new, kind)
            total = _weighted(picture.to(torch.int32), first, weights, axis)
            picture = ((total + (1 << FRACTION_BITS - 1)) >> FRACTION_BITS).clamp_(0, 255).to(torch.uint8)
    return picture


def normalise(picture: Tensor, settings: dict[str, Any]) -> Tensor:
    """uint8 [H, W, 3] as float32 [3, H, W]: rescaled, mean taken away, divided, as image processors do."""
    values = (picture.permute(2, 0, 1).double() * settings.get("rescale_factor", 1 / 255)).float()
    # Filled in on the device: a tensor made from a list would be copied there, and the host would wait.
    for channel, mean, deviation in zip(values, settings["image_mean"], settings["image_std"], strict=True):
        channel.sub_(float(np.float32(mean))).div_(float(np.float32(deviation)))
    return values


def limit_side(picture: Tensor, max_side: int) -> Tensor:
    """The picture uint8 [H, W, 3], made smaller by area averaging if its long side is above max_side.

    Sides are cut to whole pixels, and each pixel averages exactly the part of the picture it covers, shared
    pixels by their share (INTER_AREA of OpenCV, which the published labels were made with).
    """
    height, width = picture.shape[:2]
    if max(height, width) <= max_side:
        return picture
    scale = max_side / max(height, width)
    values = picture.double()
    for axis, old in enumerate((height, width)):
        values = _weighted(values, *_area_weights(old, max(1, int(old * scale))), axis)
    return (values + 0.5).to(torch.uint8)


def _weighted(values: Tensor, first: np.ndarray, weights: np.ndarray, axis: int) -> Tensor:
    """Along axis 0 or 1 of [H, W, 3]: each new line is a weighted sum of the lines from `first` on.

    first: [n] line numbers. weights: [n, taps], of the kind of the values; 0 beyond the last line.
    """
    lines = values.shape[axis]
    shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
    taps = upload(np.minimum(first + np.arange(weights.shape[1])[:, None], lines - 1), values.device)
    shares = upload(weights.T, values.device)
    total = values.index_select(axis, taps[0]) * shares[0].view(shape)
    for tap, share in zip(taps[1:], shares[1:], strict=True):
        total += values.index_select(axis, tap) * share.view(shape)
    return total


@lru_cache(maxsize=256)
def _pillow_weights(old: int, new: int, kind: Image.Resampling) -> tuple[np.ndarray, np.ndarray]:
    """First line [new] and whole-number weights int32 [new, taps] of Pillow's filters.

    A filter is as wide as a new line, but never narrower than for old ones: shrinking averages.
    """
    scale = old / new
    stretch = max(scale, 1.0)
    reach = SUPPORT[kind] * stretch
    centres = (np.arange(new) + 0.5) * scale
    first = np.maximum((centres - reach + 0.5).astype(int), 0)
    count = np.minimum((centres + reach + 0.5).astype(int), old) - first
    offsets = np.arange(count.max())
    away = np.abs((offsets + first[:, None] - centres[:, None] + 0.5) * (1 / stretch))
    weights = np.where(offsets < count[:, None], _bell(away, kind), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    whole = np.trunc(weights * (1 << FRACTION_BITS) + np.copysign(0.5, weights))
    return first, whole.astype(np.int32)


def _bell(away: np.ndarray, kind: Image.Resampling) -> np.ndarray:
    """The filter's value at distances >= 0: a tent, or Keys' cubic (1981) with a = -0.5."""
    if kind == Image.Resampling.BILINEAR:
        return np.maximum(1 - away, 0.0)
    a = -0.5
    near = ((a + 2) * away - (a + 3)) * away * away + 1
    far = (((away - 5) * away + 8) * away - 4) * a
    return np.where(away < 1, near, np.where(away < 2, far, 0.0))


@lru_cache(maxsize=256)
def _area_weights(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """First line [new] and shares float64 [new, taps] of `old` lines averaged into `new` equal strips."""
    scale = old / new
    edges = np.arange(new + 1) * scale
    first = edges[:-1].astype(int)
    lines = first[:, None] + np.arange(math.ceil(scale) + 1)
    covered = np.minimum(lines + 1, edges[1:, None]) - np.maximum(lines, edges[:-1, None])
    return first, covered.clip(0) / scale


def enlarge(mask: Tensor, height: int, width: int) -> Tensor:
    """A map [h, w] at [height, width], nearest pixel counted from the top left (INTER_NEAREST of OpenCV)."""
    if tuple(mask.shape) == (height, width):
        return mask
    for axis, new in enumerate((height, width)):
        taken = (np.arange(new) * (1 / (new / mask.shape[axis]))).astype(int)
        mask = mask.index_select(axis, upload(taken, mask.device))
    return mask
