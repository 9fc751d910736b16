"""How good a depth map is: errors after alignment, agreement with a teacher's map, order of pairs.

Maps are [H, W] and relative inverse depth, bright = near, unless they are called depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unimrg.benchmarks.dense.redraws import same_shape

ALIGNMENTS = ("disparity", "depth", "median")
MARGIN = 0.03


@dataclass(frozen=True)
class DepthScores:
    """Errors of a depth map after alignment; 0 is perfect, and 1 for the deltas.

    abs_rel: mean of |prediction - truth| / truth; sq_rel: of the squared difference over the truth.
    rmse, mae: in the unit of the depth. rmse_log: of natural logarithms; silog: 100 times the standard
    deviation of their difference, which no factor changes; log10: mean absolute difference of decimal
    logarithms. delta1..3: share of pixels whose larger ratio is below 1.25, 1.25^2, 1.25^3, 0..1.
    scale, shift: the fit; a scale below 0 means near and far are swapped: the errors may look fair, the map
    is not.
    """

    scale: float
    shift: float
    abs_rel: float
    sq_rel: float
    rmse: float
    mae: float
    rmse_log: float
    log10: float
    silog: float
    delta1: float
    delta2: float
    delta3: float

    @property
    def inverted(self) -> bool:
        return self.scale < 0


def depth_scores(
    drawn: np.ndarray,
    depth: np.ndarray,
    valid: np.ndarray | None = None,
    limits: tuple[float, float] | None = None,
    align: str = "disparity",
) -> DepthScores:
    """Score a drawn map against true depth.

    drawn: any numeric [H, W]. depth: [H, W], same unit as `limits`, e.g. metres.
    valid: boolean [H, W] of pixels to use; those with depth that is not finite and positive never count.
    limits: nearest and farthest depth a prediction is clipped to (default: those of the truth).
    align: of `ALIGNMENTS`. "disparity" takes `drawn` as relative inverse depth and fits scale and shift by
    least squares to 1/depth, the affine-invariant protocol of Ranftl et al., "Towards robust monocular depth
    estimation", TPAMI 44 (2022). "depth" fits relative depth to depth. "median" takes positive depth without
    a scale and makes the medians equal (Zhou et al., CVPR 2017); nothing is clipped. A constant map gets the
    fit of least norm.

    Raises ValueError without a valid pixel.
    """
    same_shape(drawn, depth)
    use = usable(drawn, valid) & np.isfinite(depth) & (depth > 0)
    if not use.any():
        raise ValueError("no valid pixel to score")
    truth, value = depth[use].astype(np.float64), drawn[use].astype(np.float64)
    near, far = limits if limits is not None else (float(truth.min()), float(truth.max()))
    if align == "disparity":
        scale, shift = fit(value, 1 / truth)
        predicted = 1 / np.clip(scale * value + shift, 1 / far, 1 / near)
    elif align == "depth":
        scale, shift = fit(value, truth)
        predicted = np.clip(scale * value + shift, near, far)
    elif align == "median":
        if value.min() <= 0:
            raise ValueError("alignment of medians needs depth above 0 in every pixel")
        scale, shift = float(np.median(truth) / np.median(value)), 0.0
        predicted = scale * value
    else:
        raise ValueError(f"unknown alignment {align!r}; one of {', '.join(ALIGNMENTS)}")
    return DepthScores(scale, shift, **_errors(predicted, truth))


def _errors(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The fields of `DepthScores` but for the fit; both depth [N], above 0."""
    away, logs = predicted - truth, np.log(predicted / truth)
    ratio = np.exp(np.abs(logs))
    errors = {
        "abs_rel": np.mean(np.abs(away) / truth),
        "sq_rel": np.mean(away**2 / truth),
        "rmse": np.sqrt(np.mean(away**2)),
        "mae": np.mean(np.abs(away)),
        "rmse_log": np.sqrt(np.mean(logs**2)),
        "log10": np.mean(np.abs(logs)) / np.log(10),
        "silog": 100 * np.std(logs),
    }
    errors |= {f"delta{k}": np.mean(ratio < 1.25**k) for k in (1, 2, 3)}
    return {name: float(error) for name, error in errors.items()}


def usable(drawn: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    """Boolean [H, W]: the pixels of a map that are finite and, if that is said, valid."""
    finite = np.isfinite(drawn)
    return finite if valid is None else finite & valid


def fit(value: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """Scale and shift that bring `value` [N] closest to `target` [N]; of least norm where it is constant."""
    found = np.linalg.lstsq(np.stack([value, np.ones_like(value)], 1), target, rcond=None)[0]
    return float(found[0]), float(found[1])


# -- agreement with another map ------------------------------------------------------------------------------


@dataclass(frozen=True)
class MapScores:
    """Agreement of a map with another.

    mae, rmse: of what the fit leaves, in the other map's unit. pearson, spearman: correlation of values and
    of ranks before the fit, -1..1; NaN where one of the maps is constant. scale, shift: the fit; a scale
    below 0 means near and far are swapped.
    """

    mae: float
    rmse: float
    pearson: float
    spearman: float
    scale: float
    shift: float

    @property
    def inverted(self) -> bool:
        return self.scale < 0


def map_scores(drawn: np.ndarray, target: np.ndarray, valid: np.ndarray | None = None) -> MapScores:
    """Score a drawn map against a teacher's, both [H, W], after a fit of scale and shift, nothing clipped.

    Raises ValueError without a valid pixel.
    """
    same_shape(drawn, target)
    use = usable(drawn, valid) & np.isfinite(target)
    if not use.any():
        raise ValueError("no valid pixel to score")
    value, wanted = drawn[use].astype(np.float64), target[use].astype(np.float64)
    scale, shift = fit(value, wanted)
    left = scale * value + shift - wanted
    mae, rmse = float(np.mean(np.abs(left))), float(np.sqrt(np.mean(left**2)))
    return MapScores(mae, rmse, _correlation(value, wanted), _rank_correlation(value, wanted), scale, shift)


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import rankdata

    return _correlation(rankdata(a), rankdata(b))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()), -1, 1))


# -- order of pairs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OrdinalScore:
    """accuracy: share of the pairs in the right order, 0..1, NaN without any; count: how many there were."""

    accuracy: float
    count: int


def ordinal_score(drawn: np.ndarray, nearer: np.ndarray, pairs: np.ndarray) -> OrdinalScore:
    """Whether the nearer pixel of a pair is brighter; no fit is needed, and equally bright is wrong.

    Chen, Fu, Yang and Deng, "Single-image depth perception in the wild", NeurIPS 2016.

    drawn: values [N]. pairs: int [P, 2] into them. nearer: int [P], 1 where the first is nearer, -1 where the
    second is, 0 for a pair that doesn't count.
    """
    values = drawn.astype(np.float64)
    found = np.sign(values[pairs[:, 0]] - values[pairs[:, 1]])
    counted = nearer != 0
    right = (found == nearer)[counted]
    return OrdinalScore(float(right.mean()) if len(right) else float("nan"), int(counted.sum()))


def nearer_by_depth(depth: np.ndarray, pairs: np.ndarray, margin: float = MARGIN) -> np.ndarray:
    """`nearer` of true depth [N], above 0: of pairs that differ by more than the share `margin`."""
    first, second = (depth[pairs[:, k]].astype(np.float64) for k in (0, 1))
    apart = np.maximum(first, second) > (1 + margin) * np.minimum(first, second)
    return np.sign(second - first).astype(np.int8) * apart


def nearer_by_map(target: np.ndarray, pairs: np.ndarray, margin: float = MARGIN) -> np.ndarray:
    """`nearer` of a map [N], bright = near: of pairs that differ by more than `margin` of the map's range."""
    first, second = (target[pairs[:, k]].astype(np.float64) for k in (0, 1))
    apart = np.abs(first - second) > margin * float(np.ptp(target))
    return np.sign(first - second).astype(np.int8) * apart


def draw_pairs(pixels: int, count: int, seed: int) -> np.ndarray:
    """Random pairs of pixels, int [count, 2]; always the same for one seed."""
    return np.random.default_rng(seed).integers(0, pixels, (count, 2))
