"""What drawings are worth: redraws, depth maps and boundaries of a set, with chance beside each score.

A score says little alone: next to each stands what the same scorer gives to maps that know nothing of the
picture, and to the picture itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from unimrg.benchmarks.dense.boundaries import THRESHOLDS, boundary_counts, boundary_curve, thin
from unimrg.benchmarks.dense.depth import (
    depth_scores,
    draw_pairs,
    map_scores,
    nearer_by_map,
    ordinal_score,
)
from unimrg.benchmarks.dense.redraws import mean_error, psnr, ssim
from unimrg.benchmarks.dense.regions import region_scores, regions_between
from unimrg.benchmarks.result import BenchmarkResult
from unimrg.errors import DataError

TASKS = ("redraw", "depth", "segmentation")
"""Names of the results."""

GREY = 127
PAIRS = 2000
FINE, COARSE, FINE_FROM = 0.0075, 0.03, 256


@dataclass(frozen=True)
class Example:
    """One picture and what is to be drawn of it, uint8 [S, S, 3] or [S, S].

    valid: left, top, right, bottom of what isn't padding. depth: true depth [S, S], where it is known.
    regions: true labels [S, S], otherwise those between the target's boundaries.
    """

    picture: np.ndarray
    target: np.ndarray
    valid: tuple[int, int, int, int]
    depth: np.ndarray | None = None
    regions: np.ndarray | None = None

    def inside(self, values: np.ndarray) -> np.ndarray:
        """The part of a map or picture that isn't padding."""
        left, top, right, bottom = self.valid
        return values[top:bottom, left:right]


Scorer = Callable[[Sequence[Example], Sequence[np.ndarray]], dict[str, float]]


def grey(picture: np.ndarray) -> np.ndarray:
    """Brightness 0..255 of uint8 [H, W, 3] (ITU-R BT.601), or [H, W] as it is; float64."""
    return picture @ np.array([0.299, 0.587, 0.114]) if picture.ndim == 3 else picture.astype(np.float64)


# -- chance --------------------------------------------------------------------------------------------------


def chance_maps(examples: Sequence[Example], constant: int = GREY) -> dict[str, list[np.ndarray]]:
    """Drawings that cost nothing, by name, uint8 like the targets.

    constant: one value everywhere. mean: the mean of the other targets. shuffled: the target of the next
    picture. input: the picture itself. With one example there are no others, and mean and shuffled are left
    out.
    """
    targets = [example.target for example in examples]
    maps = {"constant": [np.full_like(target, constant) for target in targets]}
    if len(targets) > 1:
        total = np.sum(targets, axis=0, dtype=np.float64)
        means = [(total - target) / (len(targets) - 1) for target in targets]
        maps["mean"] = [mean.round().astype(np.uint8) for mean in means]
        maps["shuffled"] = targets[1:] + targets[:1]
    return maps | {"input": [example.picture for example in examples]}


def _result(
    name: str,
    headline: str,
    units: Mapping[str, str],
    scorer: Scorer,
    examples: Sequence[Example],
    drawn: Sequence[np.ndarray],
    beside: Mapping[str, Sequence[np.ndarray]],
    protocol: Mapping[str, str],
    odd: Mapping[str, int],
) -> BenchmarkResult:
    """The scores of `drawn`, and in the groups of each those of the maps `beside`."""
    scores = scorer(examples, drawn)
    others = {other: scorer(examples, maps) for other, maps in beside.items()}
    return BenchmarkResult(
        name,
        scores,
        headline,
        {score: units[score] for score in scores},
        {score: {other: values[score] for other, values in others.items()} for score in scores},
        dict(protocol),
        {"pictures": len(examples), **odd},
    )


def _check(name: str, examples: Sequence[Example], drawn: Sequence[np.ndarray]) -> None:
    if not examples or len(examples) != len(drawn):
        raise DataError(f"{name}: {len(examples)} pictures and {len(drawn)} drawings; score one of each")


def _mean(values: Sequence[float]) -> float:
    """Of those that are finite; NaN without any."""
    kept = [value for value in values if math.isfinite(value)]
    return sum(kept) / len(kept) if kept else math.nan


# -- redraws -------------------------------------------------------------------------------------------------


def score_redraws(
    examples: Sequence[Example],
    drawn: Sequence[np.ndarray],
    beside: Mapping[str, Sequence[np.ndarray]] | None = None,
    lpips: Callable[[np.ndarray, np.ndarray], float] | None = None,
) -> BenchmarkResult:
    """PSNR (mean over the pictures that aren't redrawn exactly), SSIM, mean absolute error, perhaps LPIPS.

    beside: more drawings to stand beside, such as `autoencoder`, what the family's own makes of the pictures:
    the ceiling.
    """
    _check("redraw", examples, drawn)

    def scorer(examples: Sequence[Example], drawn: Sequence[np.ndarray]) -> dict[str, float]:
        pairs = [(e.inside(e.target), e.inside(d)) for e, d in zip(examples, drawn, strict=True)]
        kinds = {"psnr": psnr, "ssim": ssim, "mae": mean_error} | ({"lpips": lpips} if lpips else {})
        return {name: _mean([kind(*pair) for pair in pairs]) for name, kind in kinds.items()}

    chance = chance_maps(examples)
    del chance["input"]  # the answer itself
    units = {"psnr": "dB", "ssim": "number", "mae": "number", "lpips": "number"}
    same = sum(np.array_equal(e.inside(e.target), e.inside(d)) for e, d in zip(examples, drawn, strict=True))
    odd, maps = {"redrawn exactly": same}, chance | dict(beside or {})
    return _result("redraw", "psnr", units, scorer, examples, drawn, maps, {}, odd)


# -- depth ---------------------------------------------------------------------------------------------------


def score_depth(
    examples: Sequence[Example],
    drawn: Sequence[np.ndarray],
    beside: Mapping[str, Sequence[np.ndarray]] | None = None,
) -> BenchmarkResult:
    """Agreement with the teacher's maps, and errors against true depth where all examples have it.

    mae: in shares of the teacher's range, after a fit of scale and shift per picture. pearson, spearman:
    means over the maps that aren't constant. order: share of pairs of pixels in the right order. inverted:
    share of maps where near and far are swapped, which the fit would hide.
    """
    _check("depth", examples, drawn)

    def scorer(examples: Sequence[Example], drawn: Sequence[np.ndarray]) -> dict[str, float]:
        rows = [
            _of_depth(e, e.inside(grey(d)), n) for n, (e, d) in enumerate(zip(examples, drawn, strict=True))
        ]
        shared = [name for name in rows[0] if all(name in row for row in rows)]
        return {name: _mean([row[name] for row in rows]) for name in shared}

    units = dict.fromkeys(("pearson", "spearman", "mae", "abs_rel"), "number")
    units |= dict.fromkeys(("order", "inverted", "delta1"), "fraction")
    protocol = {"fit": "scale and shift per picture, least squares", "order": f"{PAIRS} pairs, margin 3 %"}
    maps = chance_maps(examples) | dict(beside or {})
    flat = sum(int(np.ptp(e.inside(grey(d))) == 0) for e, d in zip(examples, drawn, strict=True))
    odd = {"constant maps": flat}
    return _result("depth", "pearson", units, scorer, examples, drawn, maps, protocol, odd)


def _of_depth(example: Example, drawn: np.ndarray, number: int) -> dict[str, float]:
    target = example.inside(grey(example.target))
    pairs = draw_pairs(target.size, PAIRS, number)
    order = ordinal_score(drawn.ravel(), nearer_by_map(target.ravel(), pairs), pairs)
    agreement = map_scores(drawn, target)
    row = {
        "pearson": agreement.pearson,
        "spearman": agreement.spearman,
        "mae": agreement.mae / 255,
        "order": order.accuracy,
        "inverted": float(agreement.inverted),
    }
    if example.depth is not None:
        errors = depth_scores(drawn, example.inside(example.depth))
        row |= {"abs_rel": errors.abs_rel, "delta1": errors.delta1}
    return row


# -- boundaries and regions ----------------------------------------------------------------------------------


def score_boundaries(
    examples: Sequence[Example],
    drawn: Sequence[np.ndarray],
    beside: Mapping[str, Sequence[np.ndarray]] | None = None,
    tolerance: float | None = None,
) -> BenchmarkResult:
    """ODS and OIS F of boundaries, matched one to one, and agreement of the regions between them.

    tolerance: share of the diagonal within which pixels match; by default 0.0075 from 256 pixels a side on,
    and 0.03 below, where the former is about a pixel. The regions are those at the threshold of ODS.
    """
    _check("segmentation", examples, drawn)
    reach = tolerance or (FINE if min(examples[0].target.shape[:2]) >= FINE_FROM else COARSE)

    def scorer(examples: Sequence[Example], drawn: Sequence[np.ndarray]) -> dict[str, float]:
        return _of_boundaries(examples, drawn, reach)

    units = dict.fromkeys(("ods", "ois", "best_iou"), "fraction")
    units |= dict.fromkeys(("adapted_rand_error", "variation_of_information"), "number")
    protocol = {"tolerance": f"{reach:g} of the diagonal", "matching": "one to one, thinned"}
    maps = chance_maps(examples, constant=0) | dict(beside or {})
    empty = sum(not (grey(example.target) >= 0.5 * 255).any() for example in examples)
    odd = {"targets without boundaries": empty}
    return _result("segmentation", "ods", units, scorer, examples, drawn, maps, protocol, odd)


def _of_boundaries(
    examples: Sequence[Example], drawn: Sequence[np.ndarray], tolerance: float
) -> dict[str, float]:
    soft = [e.inside(grey(d)) / 255 for e, d in zip(examples, drawn, strict=True)]
    edges = [e.inside(grey(e.target)) >= 0.5 * 255 for e in examples]
    counts = [boundary_counts(s, [thin(edge)], tolerance) for s, edge in zip(soft, edges, strict=True)]
    curve = boundary_curve(np.stack(counts), THRESHOLDS)
    rows = []
    for example, one, edge in zip(examples, soft, edges, strict=True):
        truth = regions_between(edge) if example.regions is None else example.inside(example.regions)
        if (truth != 0).any():
            rows.append(region_scores(regions_between(one >= curve.ods_threshold), truth))
    return {
        "ods": curve.ods.f,
        "ois": curve.ois.f,
        "adapted_rand_error": _mean([row.adapted_rand_error for row in rows]),
        "variation_of_information": _mean([row.variation_of_information for row in rows]),
        "best_iou": _mean([row.best_iou for row in rows]),
    }
