"""Teachers against the library they wrap, against OpenCV's stored answers and against plain code.

The weights are tiny and random (`tiny_teachers`): what is tested is everything around the published numbers.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.reference_sam import PlainSam
from tests.tiny_teachers import make_depth_anything, make_sam, make_sam2
from unimrg.benchmarks.dense import boundary_scores
from unimrg.errors import CheckpointError, ConfigError, SampleError
from unimrg.teachers import Teacher
from unimrg.teachers.boundaries import mask_boundaries
from unimrg.teachers.depth import DepthAnything
from unimrg.teachers.masks import box_nms, mask_boxes, stability
from unimrg.teachers.oracle import oracle_depth, oracle_segmentation
from unimrg.teachers.resize import enlarge, limit_side, resample, resize, upload
from unimrg.teachers.sam import load_sam, point_grid
from unimrg.teachers.segmentation import SamBoundaries

# Low thresholds: random weights are never sure.
LOOSE: dict[str, Any] = {"points_per_side": 4, "pred_iou_thresh": 0.05, "stability_score_thresh": 0.05}
SIZES = [(50, 70), (70, 50), (3, 20), (64, 64), (50, 70), (33, 90), (200, 30), (2, 2)]


def pictures(sizes: list[tuple[int, int]], seed: int = 0) -> list[np.ndarray]:
    """Smooth colourful uint8 pictures [H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = [Image.fromarray(rng.integers(0, 256, (5, 5, 3)).astype(np.uint8)) for _ in sizes]
    return [
        np.asarray(c.resize((width, height), 2)) for c, (height, width) in zip(coarse, sizes, strict=True)
    ]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models: threads that wait for each other on busy cores cost more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def depth_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_depth_anything(tmp_path_factory.mktemp("depth"))


@pytest.fixture(scope="module")
def sam_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sam(tmp_path_factory.mktemp("sam"))


@pytest.fixture(scope="module")
def depth(depth_folder: Path) -> DepthAnything:
    return DepthAnything(depth_folder, device="cpu", batch_size=3)


@pytest.fixture(scope="module")
def sam(sam_folder: Path) -> SamBoundaries:
    return SamBoundaries(sam_folder, device="cpu", points_per_batch=5, **LOOSE)


def reason(result: Any) -> str:
    assert isinstance(result, SampleError)
    return result.reason


# Pixels


@pytest.mark.parametrize("kind", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_resampling_on_a_device_is_that_of_pillow(kind: Image.Resampling) -> None:
    rng = np.random.default_rng(0)
    sizes = [
        *rng.integers(2, 150, (60, 4)).tolist(),
        (480, 640, 518, 686),
        (640, 480, 1024, 768),
        (9, 9, 9, 40),
    ]
    for number, (height, width, new_height, new_width) in enumerate(sizes):
        noise = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        picture = (noise > 127).astype(np.uint8) * 255 if number % 2 else noise  # the cubic filter overshoots
        expected = np.asarray(Image.fromarray(picture).resize((new_width, new_height), kind))
        found = resample(torch.from_numpy(picture), (new_height, new_width), kind)
        np.testing.assert_array_equal(found, expected, str((height, width, new_height, new_width)))
        np.testing.assert_array_equal(
            resize(torch.from_numpy(picture), (new_height, new_width), kind), expected
        )


@pytest.mark.parametrize("size", [(50, 70), (70, 50), (64, 64), (200, 30), (57, 56)])
def test_pixels_are_those_of_the_processors(
    depth: DepthAnything, depth_folder: Path, sam: SamBoundaries, sam_folder: Path, size: tuple[int, int]
) -> None:
    from transformers import AutoImageProcessor

    [image] = pictures([size])
    for folder, pixels in (
        (depth_folder, depth._pixels(image, depth._size(*size))),
        (sam_folder, sam._prepare(image)[0]),
    ):
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        expected = processor(images=[image], return_tensors="pt", input_data_format="channels_last")
        np.testing.assert_array_equal(pixels, expected["pixel_values"][0])


# Depth


def test_depth_is_what_the_pipeline_of_transformers_gives(depth: DepthAnything, depth_folder: Path) -> None:
    from transformers import pipeline

    reference = pipeline("depth-estimation", model=str(depth_folder), device="cpu", dtype=torch.float32)
    images = [image for image in pictures(SIZES) if min(image.shape[:2]) > 3]
    for image, found in zip(images, depth(images), strict=True):
        expected = np.asarray(reference(Image.fromarray(image))["depth"])
        assert isinstance(found, np.ndarray) and expected.std() > 20
        # One picture at a time and a batch sum in another order: a value at a step may fall to either side.
        assert np.abs(found.astype(int) - expected).max() <= 1
        assert (found != expected).mean() < 0.01


def test_depth_in_batches_is_depth_one_at_a_time(depth: DepthAnything) -> None:
    images = pictures(SIZES)
    for image, found in zip(images, depth(images), strict=True):
        [alone] = depth([image])
        assert isinstance(found, np.ndarray) and isinstance(alone, np.ndarray)
        assert found.dtype == np.uint8 and found.shape == image.shape[:2]
        assert (found.min(), found.max()) == (0, 255)
        assert np.abs(found.astype(int) - alone).max() <= 1


def test_pictures_of_one_processed_size_share_a_pass(depth: DepthAnything) -> None:
    seen: list[tuple[int, ...]] = []
    hook = depth.model.register_forward_pre_hook(
        lambda _module, _inputs, named: seen.append(tuple(named["pixel_values"].shape)), with_kwargs=True
    )
    depth(pictures([(56, 56)] * 4 + [(112, 112), (56, 168)]))
    hook.remove()
    assert seen == [(3, 3, 56, 56), (2, 3, 56, 56), (1, 3, 56, 168)]


def test_metric_depth_is_turned_round(tmp_path: Path) -> None:
    from transformers import pipeline

    teacher = DepthAnything(make_depth_anything(tmp_path, metric=True), device="cpu")
    reference = pipeline("depth-estimation", model=str(tmp_path), device="cpu", dtype=torch.float32)
    [image] = pictures([(60, 80)])
    [found] = teacher([image])
    metres = reference(Image.fromarray(image))["predicted_depth"].numpy()
    assert isinstance(found, np.ndarray) and teacher.identity["settings"]["metric"]
    inverse = 1 / metres
    expected = (inverse - inverse.min()) / (inverse.max() - inverse.min()) * 255
    assert np.abs(found - expected).max() <= 1.01
    assert found.flat[metres.argmin()] == 255 and found.flat[metres.argmax()] == 0


def test_a_constant_prediction_is_black(depth_folder: Path) -> None:
    teacher = DepthAnything(depth_folder, device="cpu")
    with torch.no_grad():
        teacher.model.head.conv3.weight.zero_()
    [found] = teacher(pictures([(40, 40)]))
    assert isinstance(found, np.ndarray) and not found.any()


def test_half_precision_stays_close(depth: DepthAnything, depth_folder: Path) -> None:
    images = pictures([(60, 80), (64, 64)])
    half = DepthAnything(depth_folder, device="cpu", dtype="bfloat16")
    assert half.identity != depth.identity
    for exact, found in zip(depth(images), half(images), strict=True):
        assert isinstance(found, np.ndarray) and isinstance(exact, np.ndarray)
        assert np.abs(found.astype(int) - exact).mean() < 12
        assert len(np.unique(found)) > 100  # no bands


def test_one_bad_picture_does_not_cost_the_batch(
    depth: DepthAnything, monkeypatch: pytest.MonkeyPatch
) -> None:
    render = depth._render

    def failing(values: torch.Tensor, size: tuple[int, ...]) -> Any:
        if tuple(size) == (57, 56):
            raise RuntimeError("too much for me")
        return render(values, size)

    monkeypatch.setattr(depth, "_render", failing)
    good, bad, again = depth(pictures([(56, 56), (57, 56), (56, 57)]))
    assert isinstance(good, np.ndarray) and isinstance(again, np.ndarray)
    assert reason(bad) == "teacher-failed" and "too much for me" in str(bad)


def test_values_that_are_not_finite_are_a_failure(depth_folder: Path) -> None:
    teacher = DepthAnything(depth_folder, device="cpu")
    with torch.no_grad():
        teacher.model.head.conv3.bias.fill_(float("nan"))
    [found] = teacher(pictures([(40, 40)]))
    assert reason(found) == "teacher-failed"


def test_a_strip_the_processor_would_squash_to_nothing_is_a_failure(depth: DepthAnything) -> None:
    squashed, good = depth(pictures([(20, 300), (40, 40)]))
    assert reason(squashed) == "teacher-failed" and isinstance(good, np.ndarray)


# Segmentation


def shapes(size: tuple[int, int], seed: int) -> np.ndarray:
    """A uint8 picture [H, W, 3] of a dozen overlapping disks and boxes, each of one colour."""
    rng = np.random.default_rng(seed)
    height, width = size
    picture = np.full((height, width, 3), rng.integers(0, 256, 3), np.uint8)
    y, x = np.mgrid[:height, :width]
    for number in range(12):
        down, across = y - rng.uniform(0, height), x - rng.uniform(0, width)
        radius = rng.uniform(0.05, 0.25) * min(size)
        within = np.hypot(down, across) if number % 2 else np.maximum(np.abs(down), np.abs(across) / 2)
        picture[within < radius] = rng.integers(0, 256, 3)
    return picture


# Tiny noise answers with masks all over the picture; a high cut-off leaves dozens of small ones apart.
DENSE: dict[str, Any] = {"points_per_side": 16, "pred_iou_thresh": 0.5, "stability_score_thresh": 0.2}
NOISY_SAM = {"side": 128, "patch": 8, "spread": 0.6, "seed": 4}
NOISY_SAM_RULES = DENSE | {"mask_threshold": 15.0}
NOISY_SAM2 = {"spread": 0.4, "seed": 1}
NOISY_SAM2_RULES = DENSE | {"mask_threshold": 200.0, "stability_score_offset": 6.0}


@pytest.mark.parametrize(
    ("make", "model", "rules"),
    [(make_sam, NOISY_SAM, NOISY_SAM_RULES), (make_sam2, NOISY_SAM2, NOISY_SAM2_RULES)],
    ids=["sam", "sam2"],
)
def test_sam_agrees_with_the_plain_generator(make: Any, model: Any, rules: Any, tmp_path: Path) -> None:
    images = [*pictures([(100, 128), (96, 70)]), shapes((96, 128), 0), shapes((128, 100), 1)]
    plain = PlainSam(make(tmp_path, **model), **rules)
    teacher = SamBoundaries(tmp_path, device="cpu", images_per_batch=3, **rules)
    drawn = 0
    for image, found in zip(images, teacher(images), strict=True):
        expected = plain(image)
        drawn += plain.kept
        assert isinstance(found, np.ndarray)
        assert boundary_scores(found > 0, expected > 0, tolerance=0.0).f >= 0.99
    assert drawn >= 36


@pytest.mark.parametrize("make", [make_sam, make_sam2], ids=["sam", "sam2"])
def test_the_decoder_is_that_of_the_library(make: Any, tmp_path: Path) -> None:
    from transformers import Sam2Model, SamModel

    ours = load_sam(make(tmp_path), torch.device("cpu"), torch.float32)
    library = (SamModel if make is make_sam else Sam2Model).from_pretrained(tmp_path).eval()
    generator = torch.Generator().manual_seed(0)
    pixels, points = (
        torch.randn(2, 3, 64, 64, generator=generator),
        64 * torch.rand(2, 7, 2, generator=generator),
    )
    with torch.inference_mode():
        expected = library(pixels, input_points=points[:, :, None], multimask_output=True)
        features = ours.encode(pixels)
        answers = ours.answer(features, points)
        chosen = torch.tensor([[0, 3], [1, 0], [1, 6]])
        drawn = ours.draw(features, answers, chosen)
    torch.testing.assert_close(answers.scores, expected.iou_scores)
    torch.testing.assert_close(drawn, expected.pred_masks[chosen[:, 0], chosen[:, 1]], rtol=1e-4, atol=1e-4)
    assert drawn.std() > 0.1


def test_stability_of_small_logits_would_keep_other_masks(tmp_path: Path) -> None:
    """Why masks are scored at the size of the picture: scored as decoded, other ones pass."""
    teacher = SamBoundaries(make_sam(tmp_path, **NOISY_SAM), device="cpu", **NOISY_SAM_RULES)
    with torch.inference_mode():
        pixels, geometry = teacher._prepare(shapes((96, 128), 0))
        features = teacher.sam.encode(pixels[None])
        answers = teacher.sam.answer(features, teacher.sam.points(16, geometry)[None])
        logits = teacher.sam.draw(features, answers, (answers.scores > 0.5).any(dim=2).nonzero()).flatten(
            0, 1
        )
        full = torch.cat(list(teacher._full_size(logits, geometry)))
    exact, quick = (stability(values, 15.0, 1.0) >= 0.2 for values in (full, logits))
    assert exact.sum() > 50 and (exact != quick).sum() > 0.02 * exact.sum()


@pytest.mark.parametrize("size", [(50, 70), (70, 50), (64, 64), (3, 30), (200, 20)])
def test_sam_of_any_aspect_is_the_plain_generator(
    sam: SamBoundaries, sam_folder: Path, size: tuple[int, int]
) -> None:
    [image] = pictures([size], seed=size[0])
    [found] = sam([image])
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, PlainSam(sam_folder, **LOOSE)(image))
    assert 0 < (found == 255).mean() < 1 and set(np.unique(found)) == {0, 255}


def test_sam_keeps_sizes_and_encodes_each_picture_once(sam: SamBoundaries) -> None:
    seen: list[int] = []
    hook = sam.sam.model.vision_encoder.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    images = pictures(SIZES)
    found = sam(images)
    hook.remove()
    assert [result.shape for result in found if isinstance(result, np.ndarray)] == SIZES
    assert seen == [4, 4] and len(SIZES) == 8


def test_point_batches_and_chunks_change_nothing(
    sam: SamBoundaries, sam_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(SIZES)
    whole = SamBoundaries(sam_folder, device="cpu", points_per_batch=40, images_per_batch=8, **LOOSE)
    assert whole.identity == sam.identity
    expected = whole(images)
    monkeypatch.setattr("unimrg.teachers.segmentation.CHUNK_PIXELS", {"cpu": 2 * 64 * 64})
    for found, other in zip(sam(images), expected, strict=True):
        np.testing.assert_array_equal(found, other)


def test_sam_without_a_mask_is_black(sam_folder: Path) -> None:
    teacher = SamBoundaries(sam_folder, device="cpu", points_per_side=4, stability_score_thresh=1.0)
    [found] = teacher(pictures([(50, 70)]))
    assert isinstance(found, np.ndarray) and found.shape == (50, 70) and not found.any()


def test_a_long_side_is_limited_and_the_map_enlarged(sam: SamBoundaries, sam_folder: Path) -> None:
    limited = SamBoundaries(sam_folder, device="cpu", max_side=40, **LOOSE)
    [image] = pictures([(60, 100)])
    small = limit_side(torch.from_numpy(image.copy()), 40).numpy()
    [found], [inner] = limited([image]), sam([small])
    assert isinstance(inner, np.ndarray) and inner.shape == (24, 40)
    np.testing.assert_array_equal(found, enlarge(torch.from_numpy(inner), 60, 100))


def test_half_precision_of_the_encoder_works(sam_folder: Path) -> None:
    [found] = SamBoundaries(sam_folder, device="cpu", dtype="bfloat16", **LOOSE)(pictures([(50, 70)]))
    assert isinstance(found, np.ndarray) and found.any()


def plain_nms(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    kept: list[int] = []
    for index in np.argsort(-scores, kind="stable"):
        if all(iou(boxes[index], boxes[other]) <= threshold for other in kept):
            kept.append(int(index))
    return kept


def iou(a: np.ndarray, b: np.ndarray) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / total if total else 0.0


def test_nms_against_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unimrg.teachers.masks.NMS_BLOCK", 16)  # 40 boxes: several blocks, the last not full
    rng = np.random.default_rng(0)
    for trial in range(30):
        low = rng.integers(0, 30, (40, 2))
        boxes = np.concatenate([low, low + rng.integers(0, 20, (40, 2))], axis=1).astype(np.float32)
        scores = rng.integers(0, 20, 40).astype(np.float32)  # many ties
        kept = box_nms(torch.from_numpy(boxes), torch.from_numpy(scores), 0.3)
        assert kept.tolist() == plain_nms(boxes, scores, 0.3), trial
    assert box_nms(torch.zeros(0, 4), torch.zeros(0), 0.7).tolist() == []


def test_boxes_points_and_stability_by_hand() -> None:
    masks = torch.zeros(3, 6, 8, dtype=torch.bool)
    masks[0, 2:4, 1:7] = True
    masks[1, 5, 0] = True
    assert mask_boxes(masks.float(), 0.5).tolist() == [[1, 2, 6, 3], [0, 5, 0, 5], [0, 0, 0, 0]]
    assert point_grid(2, (40, 80)).tolist() == [[20, 10], [60, 10], [20, 30], [60, 30]]
    logits = torch.tensor([[[-2.0, -0.5, 0.5, 2.0]], [[-2.0, -2.0, -2.0, -2.0]]])
    scores = stability(logits, 0.0, 1.0)
    assert scores[0] == pytest.approx(1 / 3) and torch.isnan(scores[1])


# Boundaries


@cache
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "golden" / "boundaries.npz") as stored:
        return dict(stored)


def golden_masks() -> list[tuple[np.ndarray, np.ndarray]]:
    stored = golden()
    sizes = stored["sizes"].astype(int)
    ends = np.cumsum(sizes.prod(axis=1))
    masks, edges = (
        np.split(np.unpackbits(stored[name], count=ends[-1]).astype(bool), ends[:-1])
        for name in ("masks", "edges")
    )
    return [(m.reshape(s), e.reshape(s)) for m, e, s in zip(masks, edges, sizes, strict=True)]


def test_boundaries_are_those_of_opencv() -> None:
    pairs = golden_masks()
    assert len(pairs) == 120 and sum(edge.sum() for _, edge in pairs) > 10_000
    for mask, edge in pairs:
        np.testing.assert_array_equal(mask_boundaries(mask), edge)


def test_boundaries_of_several_masks_at_once() -> None:
    masks = np.random.default_rng(0).random((4, 20, 30)) > 0.5
    np.testing.assert_array_equal(mask_boundaries(masks), np.stack([mask_boundaries(m) for m in masks]))
    assert not mask_boundaries(np.ones((9, 9), bool)).any()
    with pytest.raises(ValueError, match=r"\[H, W\]"):
        mask_boundaries(np.zeros(3, bool))


def test_resizing_is_that_of_opencv() -> None:
    stored = golden()
    small = limit_side(torch.from_numpy(stored["picture"]), 64).numpy()
    assert small.shape == stored["area"].shape
    assert np.abs(small.astype(int) - stored["area"]).max() <= 1
    assert (small != stored["area"]).mean() < 0.002
    first = golden_masks()[0][0].astype(np.uint8)
    enlarged = enlarge(torch.from_numpy(first), *stored["nearest"].shape)
    np.testing.assert_array_equal(enlarged, stored["nearest"])
    halved = limit_side(torch.tensor([[[0] * 3, [1] * 3]] * 2, dtype=torch.uint8), 1)
    assert halved.tolist() == [[[1, 1, 1]]]


# Bad inputs and broken checkpoints


@pytest.mark.parametrize("name", ["depth", "sam"])
def test_bad_pictures_give_errors_in_their_place(name: str, request: pytest.FixtureRequest) -> None:
    teacher = request.getfixturevalue(name)
    [good] = pictures([(40, 40)])
    bad: list[Any] = [
        np.zeros((1, 1, 3), np.uint8),
        np.zeros((2, 400, 3), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((5, 5), np.uint8),
        np.zeros((5, 5, 4), np.uint8),
        np.zeros((5, 5, 3), np.float32),
        None,
    ]
    found = teacher([good, *bad, good])
    assert [reason(result) for result in found[1:-1]] == ["teacher-failed"] * len(bad)
    np.testing.assert_array_equal(found[0], found[-1])
    assert isinstance(teacher, Teacher) and teacher([]) == []


BUILDERS = [(DepthAnything, make_depth_anything), (SamBoundaries, make_sam), (SamBoundaries, make_sam2)]


@pytest.mark.parametrize(("teacher", "make"), BUILDERS)
class TestCheckpoints:
    def test_missing_folder(self, teacher: Any, make: Any, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no such folder"):
            teacher(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match="no such folder"):
            teacher("s3://bucket/teacher")

    def test_unreachable_hub_id(
        self, teacher: Any, make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def offline(*_: Any, **__: Any) -> str:
            raise ConnectionError("no network")

        monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(CheckpointError, match="hub gave ConnectionError"):
            teacher("owner/name")

    def test_hub_id_is_fetched(
        self, teacher: Any, make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(make(tmp_path / "hub")))
        monkeypatch.chdir(tmp_path)
        assert teacher("owner/name").identity == teacher(tmp_path / "hub").identity

    def test_pickle_that_runs_code_is_refused(self, teacher: Any, make: Any, tmp_path: Path) -> None:
        make(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        trap = tmp_path / "sprung"

        class Trap:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(trap),)

        torch.save({"weight": Trap()}, tmp_path / "pytorch_model.bin", pickle_module=pickle)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin can't be read"):
            teacher(tmp_path)
        assert not trap.exists()

    def test_pickle_of_plain_tensors_is_read(self, teacher: Any, make: Any, tmp_path: Path) -> None:
        from safetensors.torch import load_file

        expected = teacher(make(tmp_path), device="cpu")
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
        images = pictures([(40, 40)])
        np.testing.assert_array_equal(teacher(tmp_path, device="cpu")(images)[0], expected(images)[0])

    def test_folder_without_weights(self, teacher: Any, make: Any, tmp_path: Path) -> None:
        make(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="holds no"):
            teacher(tmp_path)

    def test_truncated_weights(self, teacher: Any, make: Any, tmp_path: Path) -> None:
        path = make(tmp_path) / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match="can't be read"):
            teacher(tmp_path)

    def test_missing_weight(self, teacher: Any, make: Any, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = make(tmp_path) / "model.safetensors"
        tensors = load_file(path)
        dropped = next(key for key in tensors if key.endswith("weight"))
        del tensors[dropped]
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(CheckpointError, match="lacks 1 weights"):
            teacher(tmp_path)

    def test_another_model(self, teacher: Any, make: Any, tmp_path: Path) -> None:
        (make_sam if make is make_depth_anything else make_depth_anything)(tmp_path)
        with pytest.raises(CheckpointError, match="of type"):
            teacher(tmp_path)

    def test_no_config_or_no_processor(self, teacher: Any, make: Any, tmp_path: Path) -> None:
        make(tmp_path)
        processor, config = tmp_path / "preprocessor_config.json", tmp_path / "config.json"
        processor.write_text("{")
        with pytest.raises(CheckpointError, match="image processor"):
            teacher(tmp_path)
        shutil.copy(config, processor)
        config.unlink()
        with pytest.raises(CheckpointError):
            teacher(tmp_path)

    def test_bad_settings(self, teacher: Any, make: Any, tmp_path: Path) -> None:
        folder = make(tmp_path)
        for knob in ({"device": "gpu"}, {"dtype": "int8"}):
            with pytest.raises(ConfigError, match="unknown"):
                teacher(folder, **knob)

    def test_identity(self, teacher: Any, make: Any, tmp_path: Path) -> None:
        first, copy, other = make(tmp_path / "a"), make(tmp_path / "b"), make(tmp_path / "c", seed=1)
        identity = teacher(first).identity
        assert identity == teacher(copy).identity == json.loads(json.dumps(identity))
        assert identity["weights"] != teacher(other).identity["weights"] and len(identity["weights"]) == 64


def test_which_sam_is_said_by_the_checkpoint_or_asked_for(sam_folder: Path, tmp_path: Path) -> None:
    second = make_sam2(tmp_path)
    defaults = [SamBoundaries(folder, device="cpu") for folder in (sam_folder, second)]
    assert [teacher.identity["name"] for teacher in defaults] == ["sam-boundaries", "sam2-boundaries"]
    assert [teacher.rules.pred_iou_thresh for teacher in defaults] == [0.88, 0.8]
    assert [teacher.rules.stability_score_thresh for teacher in defaults] == [0.95, 0.95]
    # The published SAM 2 is the video model, which holds that of pictures under the same names.
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"model_type": "sam2"', '"model_type": "sam2_video"'))
    assert SamBoundaries(second, device="cpu", family="sam2").identity == defaults[1].identity
    for family, folder in (("sam", second), ("sam2", sam_folder)):
        with pytest.raises(CheckpointError, match="of type"):
            SamBoundaries(folder, device="cpu", family=family)


def test_equal_calls_give_equal_bytes_whatever_came_before(depth_folder: Path, sam_folder: Path) -> None:
    images, others = pictures(SIZES), pictures([(80, 60), (64, 64)], seed=1)
    for build in (
        lambda: DepthAnything(depth_folder, device="cpu"),
        lambda: SamBoundaries(sam_folder, device="cpu", **LOOSE),
    ):
        fresh, used = build(), build()
        used(others)
        for first, second in zip(fresh(images), used(images), strict=True):
            np.testing.assert_array_equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teacher", "make"),
    [(DepthAnything, make_depth_anything), (SamBoundaries, make_sam), (SamBoundaries, make_sam2)],
)
def test_compiled_layers_give_the_same_labels(teacher: Any, make: Any, tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    batch = {"batch_size": 2} if teacher is DepthAnything else {"images_per_batch": 2, **LOOSE}
    plain, compiled = (teacher(make(tmp_path), device="cpu", compile=flag, **batch) for flag in (False, True))
    counters.clear()
    # Full batches of common aspects, a batch that isn't full, and an aspect that is rare.
    for sizes, compiles in ([[(64, 64)] * 2, True], [[(64, 64)] * 3, False], [[(30, 80)] * 2, False]):
        images = pictures(sizes)
        before = counters["stats"]["unique_graphs"]
        found = compiled(images)
        assert (counters["stats"]["unique_graphs"] > before) is compiles
        for exact, label in zip(plain(images), found, strict=True):
            assert np.abs(label.astype(int) - exact).mean() < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("teacher", "make"),
    [(DepthAnything, make_depth_anything), (SamBoundaries, make_sam), (SamBoundaries, make_sam2)],
)
def test_the_gpu_labels_as_the_cpu_does(teacher: Any, make: Any, tmp_path: Path) -> None:
    rules = {} if teacher is DepthAnything else LOOSE
    images = pictures(SIZES)
    on_cpu = teacher(make(tmp_path), device="cpu", **rules)(images)
    for compiled in (False, True):
        found = teacher(tmp_path, device="cuda", dtype="float32", compile=compiled, **rules)(images)
        for label, exact in zip(found, on_cpu, strict=True):
            if teacher is DepthAnything:
                assert np.abs(label.astype(int) - exact).mean() < 1
            else:
                assert boundary_scores(label > 0, exact > 0, tolerance=0.01).f >= 0.99
    half = teacher(tmp_path, device="cuda", **rules)(images)
    assert all(isinstance(label, np.ndarray) for label in half)


@pytest.mark.gpu
def test_pixels_on_the_gpu_are_those_on_the_cpu() -> None:
    [picture] = pictures([(480, 640)])
    for size in ((518, 686), (100, 30)):
        for kind in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
            expected = resize(torch.from_numpy(picture.copy()), size, kind)
            torch.testing.assert_close(
                resize(upload(picture, torch.device("cuda")), size, kind).cpu(), expected
            )


def test_thresholds_out_of_range_are_named(sam_folder: Path, depth_folder: Path) -> None:
    for knob in ({"points_per_side": 0}, {"pred_iou_thresh": 1.5}, {"points_per_batch": 0}, {"max_side": 0}):
        with pytest.raises(ConfigError, match=next(iter(knob))):
            SamBoundaries(sam_folder, **knob)
    with pytest.raises(ConfigError, match="batch_size"):
        DepthAnything(depth_folder, batch_size=0)


def test_import_is_light() -> None:
    code = "import sys; from unimrg.teachers import depth, oracle, segmentation"
    code += "; sys.exit(bool({'transformers', 'cv2', 'torchvision', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Oracles


def test_oracle_depth_stretches_what_is_valid() -> None:
    values = np.array([[0.5, 1.0, 1.5], [np.nan, np.inf, -1.0], [0.0, 0.5, 1.25]], np.float32)
    assert oracle_depth(values).tolist() == [[0, 127, 255], [0, 0, 0], [0, 0, 191]]
    assert oracle_depth((values[:1] * 40_000).astype(np.uint16)).tolist() == [[0, 127, 255]]
    assert not oracle_depth(np.full((3, 4), 2.0)).any()
    assert not oracle_depth(np.zeros((3, 4), np.uint16)).any()


def test_oracle_segmentation_draws_every_instance() -> None:
    rng = np.random.default_rng(0)
    ids = np.kron(rng.integers(0, 6, (5, 7)), np.ones((9, 8), int))
    expected = np.zeros(ids.shape, bool)
    for instance in range(1, 6):
        expected |= mask_boundaries(ids == instance)
    found = oracle_segmentation(ids.astype(np.uint16))
    np.testing.assert_array_equal(found, expected.astype(np.uint8) * 255)
    np.testing.assert_array_equal(oracle_segmentation(np.where(ids == 0, -1, ids)), found)
    assert not oracle_segmentation(np.zeros((4, 4), np.uint8)).any()


def test_oracles_name_what_is_missing() -> None:
    nothing = np.full((3, 4), np.nan)
    for broken in (None, np.zeros((3, 4, 1)), np.zeros((0, 4)), np.array([["a"]]), nothing):
        with pytest.raises(SampleError, match="missing-label"):
            oracle_depth(broken)
    for broken in (None, np.zeros((3, 4)), np.zeros((3, 4, 1), int)):
        with pytest.raises(SampleError, match="missing-label"):
            oracle_segmentation(broken)
    for oracle in (oracle_depth, oracle_segmentation):
        with pytest.raises(SampleError, match="the picture"):
            oracle(np.ones((3, 4), int), shape=(4, 3))
