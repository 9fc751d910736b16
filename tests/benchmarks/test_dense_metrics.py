"""Scores of drawings against numpy, scipy, scikit-image and torchmetrics, and what must hold for any map."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import save_file

from tests.tiny_judges import make_clip
from unimrg.benchmarks.dense import depth as depth_of
from unimrg.benchmarks.dense import drawings, features, redraws
from unimrg.benchmarks.dense.boundaries import (
    boundary_counts,
    boundary_curve,
    match,
    thin,
)
from unimrg.benchmarks.dense.drawings import Example
from unimrg.benchmarks.dense.regions import boundaries_between, region_scores, regions_between
from unimrg.errors import CheckpointError, DataError

Cases = tuple[dict[str, dict[str, np.ndarray]], Any]


def cases(folder: Path, arrays_file: str, expected: str) -> Cases:
    """Arrays by case and name, and the expected numbers."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(folder / arrays_file) as stored:
        for key in stored:
            case, _, part = key.partition("/")
            found.setdefault(case, {})[part] = stored[key]
    return found, json.loads((folder / expected).read_text())


# -- redraws -------------------------------------------------------------------------------------------------


def test_redraws_agree(evaluation_dir: Path) -> None:
    pairs, expected = cases(evaluation_dir / "dense" / "reconstruction", "pairs.npz", "expected.json")
    assert pairs.keys() == expected.keys()
    for name, pair in pairs.items():
        want, both = expected[name], (pair["ref"], pair["rec"])
        assert redraws.psnr(*both) == pytest.approx(want["psnr"] or math.inf, rel=1e-9)
        assert redraws.mean_error(*both) == pytest.approx(want["mae_255"], rel=1e-9)
        for window, key in (
            ("gaussian", "ssim_gauss11_skimage"),
            ("torchmetrics", "ssim_gauss11_torchmetrics"),
            ("uniform", "ssim_uniform7_skimage"),
        ):
            assert redraws.ssim(*both, window) == pytest.approx(want[key], rel=1e-6), (name, window)


pictures = arrays.arrays(np.uint8, st.tuples(st.integers(11, 16), st.integers(11, 16), st.just(3)))


@settings(max_examples=30, deadline=None)
@given(st.data(), st.sampled_from(sorted(redraws.WINDOWS)))
def test_redraws_are_symmetric_and_bounded(data: st.DataObject, window: str) -> None:
    a = data.draw(pictures)
    b = data.draw(arrays.arrays(np.uint8, a.shape))
    assert redraws.psnr(a, b) == redraws.psnr(b, a) >= 0
    assert redraws.ssim(a, b, window) == pytest.approx(redraws.ssim(b, a, window))
    assert -1 - 1e-9 <= redraws.ssim(a, b, window) <= 1 + 1e-9
    assert redraws.ssim(a, a, window) == pytest.approx(1)
    for flip in (lambda x: x[::-1], lambda x: x[:, ::-1], lambda x: x.transpose(1, 0, 2)):
        assert redraws.ssim(flip(a), flip(b), window) == pytest.approx(redraws.ssim(a, b, window))
        assert redraws.psnr(flip(a), flip(b)) == pytest.approx(redraws.psnr(a, b))


# -- depth ---------------------------------------------------------------------------------------------------


def test_depth_agrees(evaluation_dir: Path) -> None:
    maps, expected = cases(evaluation_dir / "dense" / "depth", "cases.npz", "expected.json")
    assert maps.keys() == expected.keys()
    for name, case in maps.items():
        want, (near, far) = expected[name], expected[name]["clip"]
        drawn, depth, valid = case["pred"], case["depth"], case["mask"]
        for align, key in (
            ("disparity", "align_disparity"),
            ("depth", "align_depth"),
            ("median", "median_scale"),
        ):
            if key not in want:
                with pytest.raises(ValueError, match="above 0"):
                    depth_of.depth_scores(drawn, depth, valid, (near, far), align)
                continue
            got = vars(depth_of.depth_scores(drawn, depth, valid, (near, far), align))
            for score, value in want[key].items():
                assert got[score] == pytest.approx(value, rel=1e-6, abs=1e-9), (name, align, score)
        disparity = np.where(depth > 0, 1 / np.where(depth > 0, depth, 1).astype(np.float64), 0)
        agreement = vars(depth_of.map_scores(drawn, disparity, valid))
        for score, value in want["disparity_residual"].items():
            value = math.nan if value is None else value
            assert agreement[score] == pytest.approx(value, rel=1e-6, nan_ok=True), (name, score)
        pairs, order = case["pairs"], want["ordinal"]
        nearer = depth_of.nearer_by_depth(depth[valid], pairs)
        for sign, key in ((1, "accuracy_disparity_like"), (-1, "accuracy_depth_like")):
            got_order = depth_of.ordinal_score(sign * drawn[valid].astype(np.float64), nearer, pairs)
            assert got_order.count == order["n"]
            assert got_order.accuracy == pytest.approx(order[key])


relief = arrays.arrays(np.float64, (6, 7), elements=st.integers(1, 60).map(float))


@settings(deadline=None)
@given(relief, relief, st.floats(0.1, 5), st.floats(-3, 3))
def test_scale_and_shift_change_no_depth_score(drawn: Any, depth: Any, scale: float, shift: float) -> None:
    """Only the sign is told: a negative scale swaps near and far."""
    if np.ptp(drawn) == 0:
        return
    before = depth_of.depth_scores(drawn, depth)
    after = depth_of.depth_scores(scale * drawn + shift, depth)
    swapped = depth_of.depth_scores(-scale * drawn + shift, depth)
    for score in ("abs_rel", "rmse", "silog", "mae"):
        assert getattr(after, score) == pytest.approx(getattr(before, score), rel=1e-4, abs=1e-6)
        assert getattr(swapped, score) == pytest.approx(getattr(before, score), rel=1e-4, abs=1e-6)
    if abs(before.scale) > 1e-6:
        assert after.inverted == before.inverted != swapped.inverted
    assert 0 <= before.delta1 <= before.delta2 <= before.delta3 <= 1 and before.abs_rel >= 0
    agreement = depth_of.map_scores(drawn, depth)
    if np.ptp(depth):
        assert depth_of.map_scores(-drawn, depth).pearson == pytest.approx(-agreement.pearson, abs=1e-9)
        assert -1 <= agreement.pearson <= 1 and -1 <= agreement.spearman <= 1
        monotone = depth_of.map_scores(drawn**3, depth)
        assert monotone.spearman == pytest.approx(agreement.spearman, abs=1e-9)


@settings(deadline=None)
@given(relief, st.integers(0, 9))
def test_order_of_pairs(depth: Any, seed: int) -> None:
    values = depth.ravel()
    pairs = depth_of.draw_pairs(values.size, 60, seed)
    nearer = depth_of.nearer_by_depth(values, pairs)
    assert np.array_equal(depth_of.nearer_by_depth(values, pairs[:, ::-1]), -nearer)
    right = depth_of.ordinal_score(1 / values, nearer, pairs)
    wrong = depth_of.ordinal_score(values, nearer, pairs)
    flat = depth_of.ordinal_score(np.ones_like(values), nearer, pairs)
    if right.count:
        assert (right.accuracy, wrong.accuracy, flat.accuracy) == (1, 0, 0)
    else:
        assert math.isnan(right.accuracy)
    by_map = depth_of.nearer_by_map(-values, pairs, margin=0)
    assert np.array_equal(by_map, np.sign(values[pairs[:, 1]] - values[pairs[:, 0]]))


# -- boundaries ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edges(evaluation_dir: Path) -> Cases:
    return cases(evaluation_dir / "dense" / "edges", "cases.npz", "expected.json")


def test_boundary_counts_agree(edges: Cases) -> None:
    """Picture 1 has two truths; ties between equally close matchings may move its third count by 2."""
    maps, expected = edges
    for name, want in expected["settings"].items():
        for number, case in maps.items():
            truths = [case[key] for key in ("gt0", "gt1") if key in case]
            got = boundary_counts(
                case["soft_u8"] / 255,
                truths,
                want["max_dist_fraction"],
                expected["thresholds"],
                thinned=want["thin"],
                one_to_one=want["matching"] == "one_to_one",
            )
            away = np.abs(got - np.array(want["counts"][int(number)]))
            assert away[:, [0, 1, 3]].max() == 0, (name, number)
            assert away[:, 2].max() <= (2 if len(truths) > 1 else 0), (name, number)


def test_ods_and_ois_agree(edges: Cases) -> None:
    _, expected = edges
    for want in expected["settings"].values():
        got = boundary_curve(np.array(want["counts"]), expected["thresholds"])
        for mine, theirs in ((got.ods, want["ods"]), (got.ois, want["ois"])):
            assert vars(mine) == pytest.approx({key: theirs[key] for key in ("precision", "recall", "f")})
        assert got.ods_threshold == want["ods"]["threshold"]
        per_threshold = [[score.precision, score.recall, score.f] for score in got.per_threshold]
        assert np.allclose(per_threshold, want["per_threshold"], rtol=1e-9)
        assert [threshold for _, threshold in got.per_picture] == want["ois"]["image_thresholds"]
        assert [f for f, _ in got.per_picture] == pytest.approx(want["per_image_best_f"])


def test_thinning_is_that_of_scikit_image(edges: Cases) -> None:
    morphology = pytest.importorskip("skimage.morphology")
    for case in edges[0].values():
        assert np.array_equal(thin(case["soft_u8"] / 255 >= 0.5), case["thin_at_0.5"])
    generator = np.random.default_rng(0)
    for share in np.linspace(0, 1, 11):
        marks = generator.random((40, 33)) < share
        assert np.array_equal(thin(marks), morphology.thin(marks))
        blobs = np.kron(generator.random((8, 9)) < share, np.ones((5, 6), bool))
        assert np.array_equal(thin(blobs), morphology.thin(blobs))


marks = arrays.arrays(bool, (7, 8))


@settings(max_examples=60, deadline=None)
@given(marks, marks, st.floats(0, 3))
def test_matching_is_one_to_one_and_as_large_as_can_be(a: Any, b: Any, reach: float) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    mine, theirs = match(a, b, reach)
    assert mine.sum() == theirs.sum() and not (mine & ~a).any() and not (theirs & ~b).any()
    assert match(b, a, reach)[0].sum() == mine.sum() == match(a, b, reach, closest=True)[0].sum()
    assert np.array_equal(match(a, a, reach)[0], a)
    first, second = np.argwhere(a), np.argwhere(b)
    if len(first) and len(second):
        apart = np.hypot(*(first[:, None] - second[None]).transpose(2, 0, 1))
        rows, columns = optimize.linear_sum_assignment(np.where(apart <= reach, 0.0, 1.0))
        assert mine.sum() == (apart[rows, columns] <= reach).sum()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(arrays.arrays(np.uint8, (9, 9)), arrays.arrays(bool, (9, 9))), min_size=1, max_size=3)
)
def test_boundary_scores_are_bounded_and_blind_to_order(pairs: list[Any]) -> None:
    counts = np.stack([boundary_counts(soft / 255, [truth], 0.1) for soft, truth in pairs])
    got, again = boundary_curve(counts), boundary_curve(counts[::-1])
    assert (got.ods, got.ods_threshold) == (again.ods, again.ods_threshold) and got.ois == again.ois
    assert all(0 <= score.f <= 1 for score in (*got.per_threshold, got.ois))
    assert got.ods.f == max(score.f for score in got.per_threshold)
    alone = boundary_curve(counts[:1])
    assert alone.ods == alone.ois
    for soft, truth in pairs:
        mirrored = boundary_counts(soft[:, ::-1] / 255, [truth[:, ::-1]], 0.1, thinned=False)
        assert np.array_equal(mirrored, boundary_counts(soft / 255, [truth], 0.1, thinned=False))


def test_a_true_drawing_is_perfect() -> None:
    truth = thin(np.random.default_rng(0).random((30, 30)) < 0.2)
    curve = boundary_curve(boundary_counts(truth.astype(float), [truth], 0.03)[None])
    assert curve.ods.f == curve.ois.f == 1
    with pytest.raises(ValueError, match="different size"):
        boundary_counts(truth.astype(float), [truth[:5]])
    with pytest.raises(ValueError, match="expected counts"):
        boundary_curve(np.zeros((0, 9, 4), int))


# -- regions -------------------------------------------------------------------------------------------------


def test_regions_agree(edges: Cases) -> None:
    """scikit-image calls precision what its documentation calls recall; ours are as documented there."""
    maps, expected = edges
    for name, want in expected["regions"].items():
        case = maps[name]
        got = region_scores(case["pred_labels"], case["labels"])
        assert got.adapted_rand_error == pytest.approx(want["adapted_rand_error"], rel=1e-9)
        assert got.recall == pytest.approx(want["rand_precision"], rel=1e-9)
        assert got.precision == pytest.approx(want["rand_recall"], rel=1e-9)
        assert [got.over, got.under] == pytest.approx(want["voi"], rel=1e-9)
        assert got.best_iou == pytest.approx(want["mean_best_iou"], rel=1e-9)
        counts = {
            side: int(boundaries_between(case["labels"], side).sum()) for side in want["boundary_pixels"]
        }
        assert counts == want["boundary_pixels"]


labels = arrays.arrays(np.int64, (6, 7), elements=st.integers(0, 4))


@settings(deadline=None)
@given(labels, labels, st.permutations(range(1, 5)))
def test_regions_have_no_names(drawn: Any, truth: Any, order: list[int]) -> None:
    if not truth.any():
        with pytest.raises(ValueError, match="no true region"):
            region_scores(drawn, truth)
        return
    got = region_scores(drawn, truth)
    renamed = np.array([0, *order])
    assert vars(region_scores(renamed[drawn], renamed[truth])) == pytest.approx(vars(got))
    assert vars(region_scores(drawn.T, truth.T)) == pytest.approx(vars(got))
    assert 0 <= got.adapted_rand_error <= 1 and 0 <= got.best_iou <= 1
    assert got.over >= 0 and got.under >= 0
    same = region_scores(truth, truth)
    assert (same.adapted_rand_error, same.best_iou) == (0, 1)
    assert same.variation_of_information == pytest.approx(0, abs=1e-12)
    if drawn.any():
        other = region_scores(truth, drawn)
        assert (other.over, other.under) == pytest.approx((got.under, got.over))


def test_one_region_too_few_and_one_too_many() -> None:
    halves = np.repeat([[1, 2]], 4, 0).repeat(3, 1)
    whole = np.ones_like(halves)
    few, many = region_scores(whole, halves), region_scores(halves, whole)
    assert (few.over, few.under) == (0, 1) and (many.over, many.under) == (1, 0)
    assert few.recall == many.precision == 1 and few.precision == many.recall < 1
    assert few.best_iou == many.best_iou == 0.5


def test_regions_between_boundaries() -> None:
    cross = np.zeros((9, 11), bool)
    cross[4], cross[:, 5] = True, True
    found = regions_between(cross)
    assert (
        set(np.unique(found)) == {1, 2, 3, 4}
        and len({found[k] for k in ((0, 0), (0, 9), (8, 0), (8, 9))}) == 4
    )
    assert set(np.unique(regions_between(np.zeros((4, 4), bool)))) == {1}
    assert not regions_between(np.ones((4, 4), bool)).any()
    with pytest.raises(ValueError, match="unknown side"):
        boundaries_between(found, "left")


# -- what networks see ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(evaluation_dir: Path) -> Cases:
    return cases(evaluation_dir / "dense" / "reconstruction", "features.npz", "features_expected.json")


def test_lpips_heads_agree(seen: Cases) -> None:
    maps, expected = seen
    for name, want in expected["lpips_head"].items():
        x, y, w = (
            [torch.from_numpy(maps[name][f"{layer}/{part}"]) for layer in range(3)]
            for part in ("x", "y", "w")
        )
        got = features.lpips_layers(x, y, w)
        assert got.numpy() == pytest.approx(np.array(want["per_layer"]), rel=1e-6)
        assert got.sum(0).numpy() == pytest.approx(want["per_sample"], rel=1e-6)
        assert got.sum(0).numpy() == pytest.approx(want["per_sample_torchmetrics_eps"], rel=1e-6)
        assert torch.equal(features.lpips_layers(y, x, w), got)
        assert not features.lpips_layers(x, x, w).any()


def test_fid_agrees(seen: Cases) -> None:
    maps, expected = seen
    for name, want in expected["fid"].items():
        real, drawn = maps[name]["real"], maps[name]["gen"]
        assert features.fid(real, drawn) == pytest.approx(want, rel=1e-6)
        assert features.fid(drawn, real) == pytest.approx(want, rel=1e-6)
        turn = np.linalg.qr(np.random.default_rng(0).normal(size=(real.shape[1],) * 2))[0]
        assert features.fid(real @ turn + 3, drawn[::-1] @ turn + 3) == pytest.approx(want, rel=1e-6)
        assert features.fid(real, real) == pytest.approx(0, abs=1e-5)
        assert features.fid(real, real + 1) == pytest.approx(real.shape[1], rel=1e-5)
    with pytest.raises(ValueError, match="two sets"):
        features.fid(real, real[:1])


@pytest.fixture(scope="module")
def alex(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Random weights by the published names and shapes: torchvision's AlexNet, and the heads of LPIPS."""
    folder, generator = tmp_path_factory.mktemp("alex"), torch.Generator().manual_seed(0)
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    backbone = {"classifier.6.bias": torch.zeros(1000)}
    for number, (out, into, side) in shapes.items():
        weight = torch.randn(out, into, side, side, generator=generator) / math.sqrt(into * side * side)
        backbone |= {f"features.{number}.weight": weight, f"features.{number}.bias": torch.zeros(out)}
    heads = {
        f"lin{number}.model.1.weight": torch.rand(1, shape[0], 1, 1, generator=generator)
        for number, shape in enumerate(shapes.values())
    }
    save_file(backbone, folder / "alexnet.safetensors")
    torch.save(heads, folder / "alex.pth")
    return folder / "alexnet.safetensors", folder / "alex.pth"


def test_lpips_grows_with_the_damage(alex: tuple[Path, Path]) -> None:
    lpips = features.Lpips.alex(*alex)
    generator = np.random.default_rng(0)
    picture = np.kron(generator.integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    noise = generator.normal(0, 1, picture.shape)
    damaged = [np.clip(picture + sigma * noise, 0, 255).astype(np.uint8) for sigma in (0, 5, 20, 80)]
    found = [lpips(picture, other) for other in damaged]
    assert found[0] == 0 and found == sorted(found) and found[-1] > 3 * found[1]
    assert lpips(damaged[2], picture) == pytest.approx(found[2], rel=1e-5)


def test_weights_of_lpips_that_don_t_fit_are_refused(alex: tuple[Path, Path]) -> None:
    backbone, heads = alex
    with pytest.raises(CheckpointError, match=r"lacks lin0.model.1.weight"):
        features.Lpips.alex(backbone, backbone)
    with pytest.raises(CheckpointError, match="10 missing"):
        features.Lpips.alex(heads, heads)


def test_features_of_any_vision_model(tmp_path: Path) -> None:
    see = features.TransformersFeatures(make_clip(tmp_path), torch.device("cpu"))
    shown = list(np.random.default_rng(0).integers(0, 256, (7, 20, 20, 3), np.uint8))
    found = see(shown, batch_size=3)
    assert found.shape == (7, 16)
    assert np.allclose(found, np.concatenate([see([one]) for one in shown]), atol=1e-5)
    assert features.fid(found, found) == pytest.approx(0, abs=1e-4)
    assert features.fid(found, see([255 - one for one in shown])) > 0.01


# -- drawings of a set ---------------------------------------------------------------------------------------


def example(seed: int, side: int = 48) -> Example:
    """A tilted plane with a disk before it."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    depth = 4 + rng.normal(0, 1) * x + rng.normal(0, 1) * y
    disk = np.hypot(x - rng.uniform(0.3, 0.7), y - rng.uniform(0.3, 0.7)) < 0.2
    depth = np.where(disk, 1.5, depth)
    near = 1 / depth
    shown = ((near - near.min()) / np.ptp(near) * 255).round().astype(np.uint8)
    picture = rng.integers(0, 256, (side, side, 3), np.uint8)
    return Example(picture, np.stack([shown] * 3, 2), (4, 2, side - 4, side - 2), depth, disk + 1)


EXAMPLES = [example(seed) for seed in range(5)]
EDGES = [
    Example(
        e.picture, 255 * np.uint8(boundaries_between(e.regions) & (e.regions == 2)), e.valid, None, e.regions
    )
    for e in EXAMPLES
    if e.regions is not None
]


def test_a_perfect_depth_map_beats_chance() -> None:
    perfect = drawings.score_depth(EXAMPLES, [e.target for e in EXAMPLES])
    assert perfect.scores["pearson"] == perfect.scores["order"] == pytest.approx(1)
    assert perfect.scores["mae"] == pytest.approx(0, abs=1e-6) and perfect.scores["delta1"] == 1
    assert perfect.scores["abs_rel"] < 0.02 and perfect.scores["inverted"] == 0
    for name in ("pearson", "order", "delta1"):
        chance = perfect.groups[name]
        assert set(chance) == {"constant", "mean", "shuffled", "input"}
        assert all(math.isnan(value) or value < perfect.scores[name] for value in chance.values()), name
    assert math.isnan(perfect.groups["pearson"]["constant"]) and perfect.groups["order"]["constant"] == 0
    assert abs(perfect.groups["pearson"]["input"]) < 0.2


def test_an_inverted_depth_map_is_told() -> None:
    """Its errors after the fit are those of the right one."""
    upright = drawings.score_depth(EXAMPLES, [e.target for e in EXAMPLES])
    inverted = drawings.score_depth(EXAMPLES, [255 - e.target for e in EXAMPLES])
    assert inverted.scores["inverted"] == 1 and inverted.scores["pearson"] == pytest.approx(-1)
    assert inverted.scores["abs_rel"] == pytest.approx(upright.scores["abs_rel"])
    flat = drawings.score_depth(EXAMPLES, [np.zeros_like(e.target) for e in EXAMPLES])
    assert flat.counts["constant maps"] == 5 and math.isnan(flat.scores["pearson"])
    assert json.loads(flat.to_json())["scores"]["pearson"] is None


def test_perfect_boundaries_beat_chance() -> None:
    perfect = drawings.score_boundaries(EDGES, [e.target for e in EDGES])
    assert perfect.scores["ods"] == perfect.scores["ois"] == 1
    assert perfect.scores["adapted_rand_error"] < 0.1 and perfect.scores["best_iou"] > 0.8
    assert perfect.groups["ods"]["constant"] == 0
    assert perfect.groups["adapted_rand_error"]["constant"] > 2 * perfect.scores["adapted_rand_error"]
    assert all(value < 0.8 for value in perfect.groups["ods"].values())
    assert perfect.protocol["tolerance"].startswith("0.03 ")


def test_redraws_stand_beside_the_ceiling() -> None:
    originals = [Example(e.picture, e.picture, e.valid) for e in EXAMPLES]
    noisy = [e.picture // 4 * 4 for e in originals]
    got = drawings.score_redraws(originals, [originals[0].picture, *noisy[1:]], {"autoencoder": noisy})
    assert got.counts == {"pictures": 5, "redrawn exactly": 1}
    assert math.isfinite(got.scores["psnr"]) and got.scores["ssim"] > got.groups["ssim"]["autoencoder"]
    assert set(got.groups["psnr"]) == {"constant", "mean", "shuffled", "autoencoder"}
    assert all(got.groups["ssim"][name] < 0.5 for name in ("constant", "mean", "shuffled"))


def test_padding_doesn_t_count() -> None:
    """Whatever is drawn there."""
    for score, shown in (
        (drawings.score_depth, EXAMPLES),
        (drawings.score_boundaries, EDGES),
        (drawings.score_redraws, [Example(e.picture, e.picture, e.valid) for e in EXAMPLES]),
    ):
        clean = [
            e.target // 2
            + e.picture[..., : e.target.shape[2] if e.target.ndim == 3 else 1].reshape(e.target.shape) // 2
            for e in shown
        ]
        dirty = [drawn.copy() for drawn in clean]
        for one, drawn in zip(shown, dirty, strict=True):
            left, top, right, bottom = one.valid
            drawn[:top], drawn[bottom:], drawn[:, :left], drawn[:, right:] = 255, 0, 255, 0
        assert score(shown, dirty).scores == score(shown, clean).scores


def test_chance_with_one_example_and_with_none() -> None:
    assert set(drawings.chance_maps(EXAMPLES[:1])) == {"constant", "input"}
    shuffled = drawings.chance_maps(EXAMPLES)["shuffled"]
    assert not any(np.array_equal(e.target, other) for e, other in zip(EXAMPLES, shuffled, strict=True))
    for score in (drawings.score_depth, drawings.score_boundaries, drawings.score_redraws):
        with pytest.raises(DataError, match="0 pictures"):
            score([], [])
        with pytest.raises(DataError, match="5 pictures and 1 drawings"):
            score(EXAMPLES, [EXAMPLES[0].target])
