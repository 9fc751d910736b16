"""Scores of drawings: PSNR and SSIM of a redraw, depth errors after alignment, F-score of boundaries.

Pictures are uint8 [H, W, 3] or [H, W]; depth maps and boundary maps are [H, W]. Only numpy is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_SSIM_SIDE = 11
_SSIM_SIGMA = 1.5


def psnr(reference: np.ndarray, drawn: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures of one size; infinity if they are equal."""
    _same_shape(reference, drawn)
    error = float(np.mean((reference.astype(np.float64) - drawn.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255.0**2 / error)


def ssim(reference: np.ndarray, drawn: np.ndarray) -> float:
    """Structural similarity (-1..1) of two uint8 pictures, mean over colours and over all whole windows.

    Wang, Bovik, Sheikh and Simoncelli, IEEE TIP 13 (2004): Gaussian window of 11 x 11, sigma 1.5, population
    covariance, K = (0.01, 0.03). Windows reaching over the edge (5 pixels) are left out, as in scikit-image.
    """
    _same_shape(reference, drawn)
    if min(reference.shape[:2]) < _SSIM_SIDE:
        raise ValueError(f"SSIM needs at least {_SSIM_SIDE} pixels a side, not {reference.shape[:2]}")
    x, y = reference.astype(np.float64), drawn.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return float(np.mean(luminance * structure))


def _blur(picture: np.ndarray) -> np.ndarray:
    """Gaussian means of all windows that lie inside the picture: 10 pixels less on either axis."""
    offsets = np.arange(_SSIM_SIDE) - _SSIM_SIDE // 2
    weights = np.exp(-0.5 * (offsets / _SSIM_SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        length = picture.shape[axis] - _SSIM_SIDE + 1
        shifted = (np.take(picture, range(k, k + length), axis) for k in range(_SSIM_SIDE))
        picture = sum(weight * part for weight, part in zip(weights, shifted, strict=True))
    return picture


@dataclass(frozen=True)
class DepthScores:
    """Errors of a depth map after alignment.

    abs_rel: mean of |prediction - truth| / truth, 0 is perfect. delta1: share of pixels whose larger ratio is
    below 1.25, 0..1. scale, shift: the fit, in 1/depth units; a scale below 0 means near and far are swapped:
    the errors may look fair, the map is not.
    """

    abs_rel: float
    delta1: float
    scale: float
    shift: float

    @property
    def inverted(self) -> bool:
        return self.scale < 0


def depth_scores(
    drawn: np.ndarray,
    depth: np.ndarray,
    valid: np.ndarray | None = None,
    limits: tuple[float, float] | None = None,
) -> DepthScores:
    """Score relative inverse depth (bright = near) against true depth.

    drawn: any numeric [H, W]. depth: [H, W], same unit as `limits`, e.g. metres.
    valid: boolean [H, W] of pixels to use; those with depth that is not finite and positive never count.
    limits: nearest and farthest depth a prediction is clipped to (default: those of the truth).

    Scale and shift are fitted by least squares to 1/depth, the affine-invariant protocol of Ranftl et al.,
    "Towards robust monocular depth estimation", TPAMI 44 (2022). A constant map gets the fit of least norm.
    """
    _same_shape(drawn, depth)
    use = np.isfinite(depth) & (depth > 0) & np.isfinite(drawn)
    use = use if valid is None else use & valid
    if not use.any():
        raise ValueError("no valid pixel to score")
    truth = depth[use].astype(np.float64)
    value = drawn[use].astype(np.float64)
    near, far = limits if limits is not None else (float(truth.min()), float(truth.max()))
    scale, shift = np.linalg.lstsq(np.stack([value, np.ones_like(value)], 1), 1 / truth, rcond=None)[0]
    predicted = 1 / np.clip(scale * value + shift, 1 / far, 1 / near)
    ratio = np.maximum(predicted / truth, truth / predicted)
    abs_rel = float(np.mean(np.abs(predicted - truth) / truth))
    return DepthScores(abs_rel, float(np.mean(ratio < 1.25)), float(scale), float(shift))


@dataclass(frozen=True)
class BoundaryScores:
    """Agreement of two boundary maps, each 0..1; f is the harmonic mean of precision and recall."""

    precision: float
    recall: float
    f: float


def boundary_scores(drawn: np.ndarray, truth: np.ndarray, tolerance: float = 0.03) -> BoundaryScores:
    """F-score of boundaries: a pixel is right if the other map has one within `tolerance` x diagonal.

    drawn, truth: boolean [H, W]; threshold (and thin, if thick lines should cost) before. 0.0075 is the
    tolerance of Martin, Fowlkes and Malik, TPAMI 26 (2004), for pictures of 481 x 321; at 64 to 128 pixels a
    side 0.03 is about the same few pixels. Several pixels may match one, unlike their one-to-one matching.
    Two empty maps agree fully.
    """
    _same_shape(drawn, truth)
    if drawn.dtype != bool or truth.dtype != bool:
        raise ValueError("boundary maps must be boolean: compare with a threshold first")
    if not drawn.any() and not truth.any():
        return BoundaryScores(1.0, 1.0, 1.0)
    reach = tolerance * math.hypot(*truth.shape)
    precision = _share(drawn & _within(truth, reach), drawn)
    recall = _share(truth & _within(drawn, reach), truth)
    f = 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)
    return BoundaryScores(precision, recall, f)


def _share(part: np.ndarray, whole: np.ndarray) -> float:
    count = int(whole.sum())
    return float(part.sum()) / count if count else 0.0


def _within(marks: np.ndarray, reach: float) -> np.ndarray:
    """Pixels no farther than `reach` from a mark: the distance transform, cut off at `reach`.

    The union of the marks shifted by every offset of the disk is the same set, and the disk is small.
    """
    height, width = marks.shape
    span = math.floor(reach)
    padded = np.pad(marks, span)
    near = np.zeros_like(marks)
    for down in range(-span, span + 1):
        for right in range(-span, span + 1):
            if math.hypot(down, right) <= reach:
                top, left = span + down, span + right
                near |= padded[top : top + height, left : left + width]
    return near


def _same_shape(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise ValueError(f"pictures of different size: {a.shape} and {b.shape}")
