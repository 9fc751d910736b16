"""How well two divisions of a picture into regions agree, and how they follow from boundaries and back.

Label maps are integers [H, W]; 0 is what belongs to no region.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unimrg.benchmarks.dense.redraws import same_shape


@dataclass(frozen=True)
class RegionScores:
    """Agreement of regions.

    adapted_rand_error: 0 is perfect, 1 the worst; precision and recall: share of the pairs of pixels in one
    drawn region that also lie in one true region, and the reverse. over, under: variation of information in
    bits, 0 is perfect: what the drawn regions add to the true ones (too many), and what they lack (too few).
    best_iou: mean over the true regions of the best intersection over union with a drawn one, 0..1.
    """

    adapted_rand_error: float
    precision: float
    recall: float
    over: float
    under: float
    best_iou: float

    @property
    def variation_of_information(self) -> float:
        return self.over + self.under


def region_scores(drawn: np.ndarray, truth: np.ndarray) -> RegionScores:
    """Score a label map against the true one.

    Adapted Rand error: Arganda-Carreras et al., Frontiers in Neuroanatomy 9 (2015), where the truth is not 0.
    Variation of information: Meilă, Journal of Multivariate Analysis 98 (2007). For it and for the best IoU 0
    is a region like the others.
    Raises ValueError where the truth has no region.
    """
    same_shape(drawn, truth)
    if not (truth != 0).any():
        raise ValueError("no true region to score")
    error, precision, recall = _adapted_rand(_shared(drawn[truth != 0], truth[truth != 0]))
    whole = _shared(drawn, truth)
    over, under = _conditional_entropy(whole), _conditional_entropy(whole.T)
    either = whole.sum(1, keepdims=True) + whole.sum(0, keepdims=True) - whole
    return RegionScores(error, precision, recall, over, under, float((whole / either).max(1).mean()))


def _shared(drawn: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Pixels that each true (row) and each drawn label (column) have in common, float [R, C]."""
    rows, row = np.unique(truth, return_inverse=True)
    columns, column = np.unique(drawn, return_inverse=True)
    counts = np.bincount(row.ravel() * len(columns) + column.ravel(), minlength=len(rows) * len(columns))
    return counts.reshape(len(rows), len(columns)).astype(np.float64)


def _adapted_rand(shared: np.ndarray) -> tuple[float, float, float]:
    """Error, precision and recall; pairs of a pixel with itself don't count."""
    total = shared.sum()
    both, true, drawn = ((x**2).sum() - total for x in (shared, shared.sum(1), shared.sum(0)))
    precision, recall = both / drawn if drawn else 1.0, both / true if true else 1.0
    f = 2 * both / (true + drawn) if true + drawn else 1.0
    return float(1 - f), float(precision), float(recall)


def _conditional_entropy(shared: np.ndarray) -> float:
    """Bits that the columns' labels say where the rows' are known."""
    shares = shared / shared.sum()
    rows = np.broadcast_to(shares.sum(1, keepdims=True), shares.shape)
    there = shares > 0
    return float(-(shares[there] * np.log2(shares[there] / rows[there])).sum() + 0.0)


# -- regions and boundaries ----------------------------------------------------------------------------------


def regions_between(boundaries: np.ndarray) -> np.ndarray:
    """Connected areas between boundaries, boolean [H, W], as labels from 1 on; a boundary's pixels belong to
    the nearest area. Without any area everything is 0."""
    from scipy.ndimage import distance_transform_edt, label

    labels, count = label(~boundaries)
    if not count:
        return np.zeros(boundaries.shape, np.int64)
    rows, columns = distance_transform_edt(boundaries, return_distances=False, return_indices=True)
    return labels[rows, columns].astype(np.int64)


def boundaries_between(labels: np.ndarray, side: str = "inner") -> np.ndarray:
    """Pixels of a label map that touch another label along an axis, boolean [H, W].

    side: "thick" takes both sides, "inner" those inside a region, "outer" those around regions; where two
    regions meet, "outer" takes both sides.
    """
    thick = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        differs = np.diff(labels, axis=axis) != 0
        thick |= np.pad(differs, [(1, 0) if k == axis else (0, 0) for k in (0, 1)])
        thick |= np.pad(differs, [(0, 1) if k == axis else (0, 0) for k in (0, 1)])
    if side == "thick":
        return thick
    if side == "inner":
        return thick & (labels != 0)
    if side == "outer":
        return thick & ((labels == 0) | _beside_another_region(labels))
    raise ValueError(f"unknown side {side!r}; one of thick, inner, outer")


def _beside_another_region(labels: np.ndarray) -> np.ndarray:
    """Pixels of a region with a pixel of another region, not 0, among the eight around them."""
    height, width = labels.shape
    ring = np.pad(labels, 1)
    found = np.zeros(labels.shape, bool)
    for down in range(3):
        for right in range(3):
            other = ring[down : down + height, right : right + width]
            found |= (other != 0) & (other != labels)
    return found & (labels != 0)
