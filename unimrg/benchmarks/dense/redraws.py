"""How close a redraw is to its picture: PSNR, mean absolute error, SSIM.

Pictures are uint8 [H, W, 3] or [H, W].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


def psnr(reference: np.ndarray, drawn: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures of one size; infinity if they are equal."""
    same_shape(reference, drawn)
    error = float(np.mean((reference.astype(np.float64) - drawn.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255.0**2 / error)


def mean_error(reference: np.ndarray, drawn: np.ndarray) -> float:
    """Mean absolute difference of two uint8 pictures of one size, 0..255."""
    same_shape(reference, drawn)
    return float(np.mean(np.abs(reference.astype(np.float64) - drawn.astype(np.float64))))


def same_shape(a: np.ndarray, b: np.ndarray) -> None:
    """Raise ValueError unless two pictures or maps are of one size."""
    if a.shape != b.shape:
        raise ValueError(f"pictures of different size: {a.shape} and {b.shape}")


@dataclass(frozen=True)
class Window:
    """Where SSIM's means are taken.

    weights: along one axis, of an odd number of pixels, their sum 1. unbiased: variances are those of a
    sample. mirrored: windows also reach over the edges, where the picture is mirrored; otherwise only whole
    ones count.
    """

    weights: tuple[float, ...]
    unbiased: bool = False
    mirrored: bool = False


def _gaussian(side: int, sigma: float) -> tuple[float, ...]:
    weights = np.exp(-0.5 * ((np.arange(side) - side // 2) / sigma) ** 2)
    return tuple(weights / weights.sum())


WINDOWS = {
    "gaussian": Window(_gaussian(11, 1.5)),
    "torchmetrics": Window(_gaussian(11, 1.5), mirrored=True),
    "uniform": Window((1 / 7,) * 7, unbiased=True),
}
"""The paper's window as scikit-image and torchmetrics apply it, and scikit-image's default."""


def ssim(reference: np.ndarray, drawn: np.ndarray, window: str = "gaussian") -> float:
    """Structural similarity (-1..1) of two uint8 pictures, mean over colours and windows.

    Wang, Bovik, Sheikh and Simoncelli, IEEE TIP 13 (2004): Gaussian window of 11 x 11, sigma 1.5, population
    covariance, K = (0.01, 0.03). Windows reaching over the edge (5 pixels) are left out, as in scikit-image.
    window: of `WINDOWS`; scores by different windows don't compare.
    """
    same_shape(reference, drawn)
    how = WINDOWS[window]
    side = len(how.weights)
    if min(reference.shape[:2]) < side:
        raise ValueError(f"SSIM needs at least {side} pixels a side, not {reference.shape[:2]}")
    x, y = (_mirrored(p.astype(np.float64), side // 2 if how.mirrored else 0) for p in (reference, drawn))
    mean_x, mean_y = _means(x, how.weights), _means(y, how.weights)
    sample = side**2 / (side**2 - 1) if how.unbiased else 1.0
    var_x = sample * (_means(x * x, how.weights) - mean_x**2)
    var_y = sample * (_means(y * y, how.weights) - mean_y**2)
    covariance = sample * (_means(x * y, how.weights) - mean_x * mean_y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return float(np.mean(luminance * structure))


def _mirrored(picture: np.ndarray, border: int) -> np.ndarray:
    """With so many pixels more on each side, mirrored at the outermost ones."""
    return np.pad(picture, [(border, border)] * 2 + [(0, 0)] * (picture.ndim - 2), mode="reflect")


def _means(picture: np.ndarray, weights: tuple[float, ...]) -> np.ndarray:
    """Weighted means of all windows that lie inside the picture."""
    for axis in (0, 1):
        length = picture.shape[axis] - len(weights) + 1
        shifted = (np.take(picture, range(k, k + length), axis) for k in range(len(weights)))
        parts = (weight * part for weight, part in zip(weights, shifted, strict=True))
        picture = sum(parts, np.zeros(()))
    return picture
