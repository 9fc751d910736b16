"""Scores of drawings and their intervals against stored numbers and against other libraries."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unimrg.benchmarks import dense, intervals
from unimrg.benchmarks.dense.boundaries import within

FIXTURES = Path(__file__).parent / "benchmarks" / "fixtures" / "dense"


def cases(name: str, file: str) -> tuple[dict[str, dict[str, np.ndarray]], Any]:
    """Arrays by case and name, and the expected numbers."""
    arrays: dict[str, dict[str, np.ndarray]] = {}
    with np.load(FIXTURES / name / file) as stored:
        for key in stored:
            case, part = key.split("/")
            arrays.setdefault(case, {})[part] = stored[key]
    return arrays, json.loads((FIXTURES / name / "expected.json").read_text())


def test_psnr_and_ssim_agree_with_the_stored_numbers() -> None:
    pairs, expected = cases("reconstruction", "pairs.npz")
    for name, pair in pairs.items():
        want = expected[name]
        found = dense.psnr(pair["ref"], pair["rec"])
        assert found == pytest.approx(math.inf if want["psnr"] is None else want["psnr"], rel=1e-12)
        assert dense.ssim(pair["ref"], pair["rec"]) == pytest.approx(want["ssim_gauss11_skimage"], abs=1e-12)


def test_ssim_agrees_with_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    generator = np.random.default_rng(3)
    a = generator.integers(0, 256, (33, 47), np.uint8)
    b = np.clip(a + generator.normal(0, 30, a.shape), 0, 255).astype(np.uint8)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    assert dense.ssim(a, b) == pytest.approx(metrics.structural_similarity(a, b, **settings), abs=1e-12)


def test_ssim_names_a_picture_that_is_too_small() -> None:
    with pytest.raises(ValueError, match="11 pixels"):
        dense.ssim(np.zeros((8, 40), np.uint8), np.zeros((8, 40), np.uint8))


def test_depth_agrees_with_the_stored_numbers() -> None:
    maps, expected = cases("depth", "cases.npz")
    for name, case in maps.items():
        want = expected[name]["align_disparity"]
        near, far = expected[name]["clip"]
        found = dense.depth_scores(case["pred"], case["depth"], case["mask"], (near, far))
        for key in ("scale", "shift", "abs_rel", "delta1"):
            assert getattr(found, key) == pytest.approx(want[key], rel=1e-6, abs=1e-9), (name, key)


def test_depth_perfect_inverted_and_empty() -> None:
    depth = np.linspace(1, 9, 64).reshape(8, 8)
    depth[0, 0] = np.nan
    perfect = dense.depth_scores(200 / depth + 3, depth)
    assert perfect.abs_rel == pytest.approx(0, abs=1e-9) and perfect.delta1 == 1 and not perfect.inverted
    assert dense.depth_scores(-200 / depth, depth).inverted
    with pytest.raises(ValueError, match="no valid pixel"):
        dense.depth_scores(depth, np.zeros((8, 8)))


def test_boundaries_agree_with_the_stored_numbers() -> None:
    """Against the many-to-one counts of pictures with one truth, thinned by scikit-image."""
    morphology = pytest.importorskip("skimage.morphology")
    pictures, expected = cases("edges", "cases.npz")
    counts = expected["settings"]["nearest_thin_0.03"]["counts"]
    for name, case in pictures.items():
        if "gt1" in case:
            continue
        for threshold, (hit_truth, truth, hit_drawn, drawn) in zip(
            expected["thresholds"], counts[int(name)], strict=True
        ):
            thin = morphology.thin(case["soft_u8"] / 255 >= threshold)
            found = dense.boundary_scores(thin, case["gt0"], 0.03)
            assert found.precision == pytest.approx(hit_drawn / drawn if drawn else 0.0)
            assert found.recall == pytest.approx(hit_truth / truth if truth else 0.0)


def test_reach_is_the_distance_transform() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    marks = np.random.default_rng(0).random((40, 31)) < 0.01
    distance = ndimage.distance_transform_edt(~marks)
    for reach in (0.0, 1.0, 2.5, 5.0):
        np.testing.assert_array_equal(within(marks, reach), distance <= reach)


def test_boundaries_that_are_empty() -> None:
    none, some = np.zeros((9, 9), bool), np.eye(9, dtype=bool)
    assert dense.boundary_scores(none, none).f == 1
    assert dense.boundary_scores(none, some).f == dense.boundary_scores(some, none).f == 0


def test_wilson_against_published_values() -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    for successes, total, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = intervals.wilson(successes, total)
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    assert intervals.wilson(0, 0) == intervals.Interval(0, 1)
    assert intervals.wilson(7, 7).high == 1
    with pytest.raises(ValueError):
        intervals.wilson(3, 2)


def test_bootstrap_is_seeded_and_close_to_the_normal_interval() -> None:
    generator = np.random.default_rng(1)
    before, after = generator.random(900) < 0.5, generator.random(900) < 0.6
    found = intervals.paired_bootstrap(before, after)
    assert found == intervals.paired_bootstrap(before, after)
    difference = after.astype(float) - before
    half = 1.96 * difference.std() / 30
    assert found.low == pytest.approx(difference.mean() - half, abs=0.004)
    assert found.high == pytest.approx(difference.mean() + half, abs=0.004)


def test_bootstrap_over_groups_is_wider_when_answers_hang_together() -> None:
    generator = np.random.default_rng(2)
    before, after = np.repeat(generator.random(60) < 0.5, 10), np.repeat(generator.random(60) < 0.6, 10)
    alone = intervals.paired_bootstrap(before, after)
    together = intervals.paired_bootstrap(before, after, [k // 10 for k in range(600)])
    assert together.high - together.low > 2.5 * (alone.high - alone.low)
    with pytest.raises(ValueError, match="groups"):
        intervals.paired_bootstrap(before, after, [1, 2])
    with pytest.raises(ValueError, match="empty"):
        intervals.paired_bootstrap([], [])


def test_mcnemar_is_the_exact_binomial_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    for gained, lost in ((9, 2), (0, 0), (5, 5), (3, 0), (700, 600)):
        before = [False] * gained + [True] * lost + [True, False]
        after = [True] * gained + [False] * lost + [True, False]
        found = intervals.mcnemar(before, after)
        want = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        assert (found.gained, found.lost) == (gained, lost)
        assert found.p == pytest.approx(want, rel=1e-9)
