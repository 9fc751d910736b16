"""How well boundaries agree: F-scores at one threshold, and ODS and OIS over all.

Martin, Fowlkes and Malik, TPAMI 26 (2004); Arbeláez, Maire, Fowlkes and Malik, TPAMI 33 (2011), section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unimrg.benchmarks.dense.redraws import same_shape

THRESHOLDS = tuple(round(0.1 * k, 1) for k in range(1, 10))


@dataclass(frozen=True)
class BoundaryScores:
    """Agreement of two boundary maps, each 0..1; f is the harmonic mean of precision and recall."""

    precision: float
    recall: float
    f: float


def boundary_scores(drawn: np.ndarray, truth: np.ndarray, tolerance: float = 0.03) -> BoundaryScores:
    """F-score of boundaries: a pixel is right if the other map has one within `tolerance` x diagonal.

    drawn, truth: boolean [H, W]; threshold (and thin, if thick lines should cost) before. 0.0075 is the
    tolerance of Martin, Fowlkes and Malik for pictures of 481 x 321; at 64 to 128 pixels a side 0.03 is about
    the same few pixels. Several pixels may match one, unlike their one-to-one matching (`boundary_counts`).
    Two empty maps agree fully.
    """
    same_shape(drawn, truth)
    if drawn.dtype != bool or truth.dtype != bool:
        raise ValueError("boundary maps must be boolean: compare with a threshold first")
    if not drawn.any() and not truth.any():
        return BoundaryScores(1.0, 1.0, 1.0)
    reach = tolerance * math.hypot(*truth.shape)
    return _scores(
        int((truth & within(drawn, reach)).sum()),
        int(truth.sum()),
        int((drawn & within(truth, reach)).sum()),
        int(drawn.sum()),
    )


def _scores(found: int, truth: int, right: int, drawn: int) -> BoundaryScores:
    """Of the true pixels `found` were drawn, of the drawn ones `right` are true; 0 where there are none."""
    precision, recall = right / drawn if drawn else 0.0, found / truth if truth else 0.0
    f = 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)
    return BoundaryScores(precision, recall, f)


def within(marks: np.ndarray, reach: float) -> np.ndarray:
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


# -- over all thresholds -------------------------------------------------------------------------------------


def boundary_counts(
    soft: np.ndarray,
    truths: Sequence[np.ndarray],
    tolerance: float = 0.03,
    thresholds: Sequence[float] = THRESHOLDS,
    thinned: bool = True,
    one_to_one: bool = True,
) -> np.ndarray:
    """Matched and all pixels at every threshold, int [T, 4].

    soft: [H, W], 0..1, a boundary from `threshold` on. truths: boolean [H, W] each, thin lines. tolerance:
    share of the diagonal within which pixels match. thinned: thick boundaries are thinned first.
    one_to_one: a pixel matches one other at most, as many as possible; otherwise several may match one.

    The columns are: true pixels that are matched, summed over `truths`; all of these; drawn pixels that match
    in any of them; all drawn ones.
    """
    for truth in truths:
        same_shape(soft, truth)
    reach = tolerance * math.hypot(*soft.shape)
    rows = []
    for threshold in thresholds:
        drawn = soft >= threshold
        drawn = thin(drawn) if thinned else drawn
        right, found = np.zeros_like(drawn), 0
        for truth in truths:
            if one_to_one:
                mine, theirs = match(drawn, truth, reach, closest=len(truths) > 1)
            else:
                mine, theirs = drawn & within(truth, reach), truth & within(drawn, reach)
            right |= mine
            found += int(theirs.sum())
        rows.append((found, sum(int(truth.sum()) for truth in truths), int(right.sum()), int(drawn.sum())))
    return np.array(rows)


def match(
    drawn: np.ndarray, truth: np.ndarray, reach: float, closest: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The pixels of both maps, boolean [H, W], that are matched: pairs no farther apart than `reach`, as many
    as there can be, each pixel in one.

    closest: of all such matchings one whose distances have the least sum. Their number is the same, so only
    with several truths, where it counts which pixels they are, is it worth the minutes that it takes.
    """
    from scipy.sparse import coo_array
    from scipy.spatial import cKDTree

    mine, theirs = np.zeros_like(drawn), np.zeros_like(truth)
    a, b = np.argwhere(drawn), np.argwhere(truth)
    if len(a) and len(b):
        near = cKDTree(a).query_ball_tree(cKDTree(b), reach)
        rows = np.repeat(np.arange(len(a)), [len(some) for some in near])
        columns = np.array([number for some in near for number in some], np.int64)
        # One more than the distance: the library takes a weight of zero for no edge.
        cost = np.hypot(*(a[rows] - b[columns]).T) + 1.0
        chosen = (_closest if closest else _any)(coo_array((cost, (rows, columns)), (len(a), len(b))))
        mine[tuple(a[chosen[0]].T)] = True
        theirs[tuple(b[chosen[1]].T)] = True
    return mine, theirs


def _any(graph: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of as many edges as there can be without one in common.

    By a flow: the library's own bipartite matching takes minutes where lines run beside each other.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import maximum_flow

    (rows, columns), (height, width) = graph.coords, graph.shape
    source, sink = height + width, height + width + 1
    starts = np.concatenate([rows, np.full(height, source), height + np.arange(width)])
    ends = np.concatenate([height + columns, np.arange(height), np.full(width, sink)])
    ones = np.ones(len(starts), np.int32)
    pipes = coo_array((ones, (starts, ends)), (sink + 1, sink + 1)).tocsr()
    flow = maximum_flow(pipes, source, sink).flow.tocoo()
    used = (flow.data > 0) & (flow.row < height)
    return flow.row[used], flow.col[used] - height


def _closest(graph: Any) -> tuple[np.ndarray, np.ndarray]:
    """As `_any`, with the least sum of weights.

    As a full assignment of pixels and stand-ins: a pixel may also take its own stand-in on the other side,
    at a price above that of all edges together, and stand-ins of pixels with an edge may take each other.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    (rows, columns), (height, width) = graph.coords, graph.shape
    size = height + width
    first, second = np.arange(height), np.arange(width)
    alone = np.full(size, size * float(graph.data.max(initial=1.0)))
    weights = np.concatenate([graph.data, alone, np.ones(len(rows))])
    starts = np.concatenate([rows, first, height + second, height + columns])
    ends = np.concatenate([columns, width + first, second, width + rows])
    whole = coo_array((weights, (starts, ends)), (size, size)).tocsr()
    left, right = min_weight_full_bipartite_matching(whole)
    paired = (left < height) & (right < width)
    return left[paired], right[paired]


@dataclass(frozen=True)
class BoundaryCurve:
    """F-scores over all thresholds.

    ods: at the one threshold that is best for the whole set; ois: of the sum of the counts at the best
    threshold of each picture (it may lie below ODS). per_threshold, per_picture: scores at each threshold,
    and the best F of each picture with its threshold.
    """

    ods: BoundaryScores
    ods_threshold: float
    ois: BoundaryScores
    per_threshold: tuple[BoundaryScores, ...]
    per_picture: tuple[tuple[float, float], ...]


def boundary_curve(counts: np.ndarray, thresholds: Sequence[float] = THRESHOLDS) -> BoundaryCurve:
    """ODS and OIS of the `boundary_counts` of several pictures, int [I, T, 4]; of equal ones the lowest."""
    if counts.ndim != 3 or not len(counts) or counts.shape[1:] != (len(thresholds), 4):
        raise ValueError(f"expected counts [pictures, {len(thresholds)}, 4], found {list(counts.shape)}")
    summed = [_scores(*map(int, row)) for row in counts.sum(0)]
    best = max(range(len(thresholds)), key=lambda number: (summed[number].f, -number))
    chosen, per_picture = [], []
    for rows in counts:
        scores = [_scores(*map(int, row)).f for row in rows]
        number = int(np.argmax(scores))
        chosen.append(rows[number])
        per_picture.append((scores[number], thresholds[number]))
    ois = _scores(*map(int, np.sum(chosen, 0)))
    return BoundaryCurve(summed[best], thresholds[best], ois, tuple(summed), tuple(per_picture))


def thin(marks: np.ndarray) -> np.ndarray:
    """Lines of one pixel in place of thicker ones, boolean [H, W].

    Guo and Hall, "Parallel thinning with two-subiteration algorithms", Communications of the ACM 32 (1989):
    outer pixels are taken away, from two sides in turn, while nothing falls apart or loses its ends.
    """
    height, width = marks.shape
    ring = np.pad(marks, 1).astype(np.uint8)
    inside = ring[1:-1, 1:-1]
    while True:
        before = int(inside.sum())
        for removable in _REMOVABLE:
            code = np.zeros(marks.shape, np.uint8)
            for bit, (down, right) in enumerate(_AROUND):
                code |= ring[1 + down : 1 + down + height, 1 + right : 1 + right + width] << bit
            inside[removable[code]] = 0
        if int(inside.sum()) == before:
            return inside.astype(bool)


_AROUND = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))
"""Neighbours as rows down and columns right: east, north-east, and so on around."""


def _removable(first: int) -> np.ndarray:
    """Whether a pixel may go, boolean [256], by its neighbours' bits; of one subiteration.

    first: the neighbour at whose side it must be free, 0 (east) or 4 (west).
    """
    x = [(np.arange(256) >> bit & 1).astype(bool) for bit in range(8)]
    corners = ((0, 1, 2), (2, 3, 4), (4, 5, 6), (6, 7, 0))
    parts = sum((~x[a] & (x[b] | x[c])).astype(int) for a, b, c in corners)
    ahead = sum((x[a] | x[b]).astype(int) for a, b, _ in corners)
    behind = sum((x[b] | x[c]).astype(int) for _, b, c in corners)
    filled = np.minimum(ahead, behind)
    held = (x[first + 1] | x[first + 2] | ~x[(first + 7) % 8]) & x[first]
    return np.asarray((parts == 1) & (filled >= 2) & (filled <= 3) & ~held)


_REMOVABLE = (_removable(0), _removable(4))
