"""GenEval from pictures: drawn in its layout, judged by real (tiny, random) detectors and classifiers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.families import processor, shared_model
from tests.tiny_judges import make_clip, make_mask2former
from unimrg.benchmarks.generation import geneval, geneval_files
from unimrg.benchmarks.generation.detector import (
    OBJECTS,
    TEMPLATES,
    ColorClassifier,
    ObjectDetector,
    box_of,
    cut_out,
    load_eyes,
)
from unimrg.benchmarks.generation.geneval import COLORS, Prompt
from unimrg.benchmarks.generation.geneval_files import Found
from unimrg.errors import CheckpointError, DataError
from unimrg.families.base import DrawOptions
from unimrg.storage import S3Config

CPU = torch.device("cpu")
OPTIONS = DrawOptions(iterations=2)


def prompt(text: str, **clause: object) -> Prompt:
    include = [{"class": "dog", "count": 1, **clause}]
    return Prompt.parse(json.dumps({"tag": "colors", "prompt": text, "include": include}), "here")


PROMPTS = [prompt("a photo of a dog"), prompt("a photo of a red dog", color="red")]


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> ObjectDetector:
    return ObjectDetector(make_mask2former(tmp_path_factory.mktemp("detector"), side=384), CPU)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ColorClassifier:
    return ColorClassifier(make_clip(tmp_path_factory.mktemp("clip")), CPU)


def picture(height: int = 384, width: int = 384) -> np.ndarray:
    return np.random.default_rng(height + width).integers(0, 256, (height, width, 3), np.uint8)


# -- the layout ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("geneval")
    model, using = shared_model("openuni"), processor("openuni")
    assert geneval_files.draw(model, using, PROMPTS, folder, OPTIONS, pictures=3, batch_size=2) == 6
    return folder


def test_pictures_lie_where_the_official_script_looks(drawn: Path) -> None:
    assert (drawn / "00001" / "metadata.jsonl").read_text() == PROMPTS[1].line + "\n"
    found = geneval_files.read(drawn)
    assert [asked for asked, _ in found] == PROMPTS
    assert [path.relative_to(drawn).as_posix() for path in found[1][1]] == [
        f"00001/samples/0000{k}.png" for k in range(3)
    ]
    pictures = [np.array(Image.open(path)) for _, paths in found for path in paths]
    assert all(p.shape == (16, 16, 3) and p.dtype == np.uint8 for p in pictures)
    assert len({p.tobytes() for p in pictures}) == 6


def test_only_what_is_missing_is_drawn_and_it_is_the_same(drawn: Path) -> None:
    model, using = shared_model("openuni"), processor("openuni")
    path = drawn / "00001" / "samples" / "00002.png"
    before = path.read_bytes()
    path.unlink()
    assert geneval_files.draw(model, using, PROMPTS, drawn, OPTIONS, pictures=3, batch_size=2) == 3
    assert path.read_bytes() == before
    with pytest.raises(DataError, match="another prompt"):
        geneval_files.draw(model, using, PROMPTS[::-1], drawn, OPTIONS, pictures=3)


def test_names_without_a_number_are_left_alone(tmp_path: Path) -> None:
    for name in ("00000", "9", "notes"):
        (tmp_path / name / "samples").mkdir(parents=True)
        (tmp_path / name / "metadata.jsonl").write_text(PROMPTS[0].line)
    for name in ("7.png", "010.png", "grid.png", "8.jpg", "9.png.part"):
        (tmp_path / "9" / "samples" / name).touch()
    (tmp_path / "results.jsonl").touch()
    found = geneval_files.read(tmp_path)
    assert [[path.name for path in paths] for _, paths in found] == [[], ["7.png", "010.png"]]


def test_what_is_no_folder_of_geneval_is_refused_in_a_sentence(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="draw the pictures first"):
            geneval_files.read(folder)
    (tmp_path / "00000" / "samples").mkdir(parents=True)
    with pytest.raises(DataError, match=r"metadata.jsonl does not exist"):
        geneval_files.read(tmp_path)
    (tmp_path / "00000" / "metadata.jsonl").write_text("{")
    with pytest.raises(DataError, match="no prompt of GenEval"):
        geneval_files.read(tmp_path)
    (tmp_path / "00000" / "metadata.jsonl").write_text(PROMPTS[0].line)
    (tmp_path / "00000" / "samples" / "00000.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"00000.png can't be read"):
        list(geneval_files.judge_folder(tmp_path, lambda _: {}, lambda *_: []))


# -- verdicts on pictures ------------------------------------------------------------------------------------


def test_a_folder_is_judged_through_the_real_models(
    drawn: Path, detector: ObjectDetector, clip: ColorClassifier, tmp_path: Path
) -> None:
    rows = list(geneval_files.judge_folder(drawn, detector, clip))
    assert [row.filename for row in rows] == [
        f"0000{n}/samples/0000{k}.png" for n in (0, 1) for k in (0, 1, 2)
    ]
    stored = tmp_path / "results.jsonl"
    stored.write_text("".join(row.to_line() + "\n" for row in rows))
    result = geneval.score(geneval.read_results(stored), prompts=PROMPTS)
    assert result.counts["pictures"] == 6 and result.counts["prompts without pictures"] == 0
    assert set(result.groups["overall"]) == {"colors"}


def test_colours_are_those_of_the_objects_that_count() -> None:
    """The surest first, whatever the detector's order, and only where a colour is named."""
    mask = np.ones((4, 4), bool)
    found = {
        "dog": [Found((0, 0, 4, 4, s), mask) for s in (0.2, 0.5, 0.8)],
        "cat": [Found((0, 0, 1, 1, 0.9), mask)],
    }
    asked: list[float] = []

    def classify(shown: np.ndarray, name: str, objects: list[Found]) -> list[str]:
        asked.extend(one.box[4] for one in objects)
        return ["red"] * len(objects)

    row = geneval_files.judge_picture(PROMPTS[1], picture(4, 4), "x", lambda _: found, classify)
    assert row.correct and asked == [0.8]
    assert {name: [box[4] for box in boxes] for name, boxes in row.details.items()} == {
        "dog": [0.8, 0.5],
        "cat": [0.9],
    }
    row = geneval_files.judge_picture(PROMPTS[0], picture(4, 4), "x", lambda _: found, classify)
    assert row.correct and asked == [0.8]
    row = geneval_files.judge_picture(PROMPTS[1], picture(4, 4), "x", lambda _: {}, classify)
    assert not row.correct and asked == [0.8]


# -- the detector and the classifier -------------------------------------------------------------------------


def test_objects_are_geneval_s(evaluation_dir: Path) -> None:
    assert list(OBJECTS) == (evaluation_dir / "geneval" / "object_names.txt").read_text().split("\n")[:80]


@torch.no_grad()
def test_detections_are_those_of_the_library(detector: ObjectDetector) -> None:
    """At 384 pixels, where its post-processing doesn't blur the masks."""
    shown = picture()
    found = detector(shown)
    given = detector.processor(images=Image.fromarray(shown), return_tensors="pt")
    assert given["pixel_values"].shape[-2:] == (384, 384)
    (want,) = detector.processor.post_process_instance_segmentation(
        detector.model(**given), threshold=0.0, return_binary_maps=True
    )
    pairs = sorted((OBJECTS[s["label_id"]], s["score"]) for s in want["segments_info"])
    ours = sorted((name, one.box[4]) for name, objects in found.items() for one in objects)
    assert len(ours) > 20 and [name for name, _ in ours] == [name for name, _ in pairs]
    assert [score for _, score in ours] == pytest.approx([score for _, score in pairs], abs=1e-5)
    area = sum(one.mask.sum() for objects in found.values() for one in objects)
    assert area == want["segmentation"].sum()


@pytest.mark.parametrize("size", [(60, 90), (400, 200)])
def test_boxes_surround_masks_in_any_picture(detector: ObjectDetector, size: tuple[int, int]) -> None:
    """Pictures are scaled and padded for the model, and the masks brought back."""
    found = detector(picture(*size))
    assert found
    for objects in found.values():
        for one in objects:
            assert one.mask.shape == size and one.box[:4] == box_of(one.mask) and 0 < one.box[4] <= 1


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_box_is_the_smallest_around_its_mask(data: st.DataObject) -> None:
    mask = np.zeros((7, 9), bool)
    for _ in range(data.draw(st.integers(1, 5))):
        mask[data.draw(st.integers(0, 6)), data.draw(st.integers(0, 8))] = True
    left, top, right, bottom = (int(end) for end in box_of(mask))
    assert mask[top:bottom, left:right].sum() == mask.sum()
    for line in (mask[top, :], mask[bottom - 1, :], mask[:, left], mask[:, right - 1]):
        assert line.any()


@torch.no_grad()
def test_colours_are_the_likeliest_texts(clip: ColorClassifier) -> None:
    """Against the library's own logits, one template at a time."""
    shown = picture(40, 40)
    mask = np.zeros((40, 40), bool)
    mask[5:30, 8:20] = True
    objects = [Found((*box_of(mask), 0.9), mask), Found((0, 0, 40, 40, 0.8), np.ones((40, 40), bool))]
    got = clip(shown, "teddy bear", objects)
    weights = torch.zeros(len(COLORS), 8)
    for template in TEMPLATES:
        texts = [template.format(color=color, name="teddy bear") for color in COLORS]
        tokens = clip.tokenizer(texts, padding=True, return_tensors="pt")
        crops = clip.processor(images=[cut_out(shown, one) for one in objects], return_tensors="pt")
        out = clip.model(**tokens, **crops)
        weights += out.text_embeds
    assert got == [
        COLORS[k] for k in (out.image_embeds @ (weights / weights.norm(dim=1, keepdim=True)).T).argmax(1)
    ]
    assert clip(shown, "teddy bear", []) == []


def test_an_object_is_cut_out_on_grey() -> None:
    shown, mask = picture(10, 12), np.zeros((10, 12), bool)
    mask[2:5, 3:9] = True
    mask[3, 4] = False
    alone = np.array(cut_out(shown, Found((*box_of(mask), 1.0), mask)))
    assert alone.shape == (3, 6, 3)
    assert (alone[1, 1] == 0x99).all()
    alone[1, 1] = shown[3, 4]
    assert np.array_equal(alone, shown[2:5, 3:9])


def test_weights_that_don_t_fit_are_refused_in_a_sentence(tmp_path: Path, detector: ObjectDetector) -> None:
    s3 = S3Config()
    with pytest.raises(CheckpointError, match=r"detector: .*does not exist"):
        load_eyes(str(tmp_path / "nowhere"), str(tmp_path), s3, CPU)
    clip = make_clip(tmp_path / "clip")
    with pytest.raises(CheckpointError, match="type 'clip'"):
        load_eyes(str(clip), str(clip), s3, CPU)
    other = make_mask2former(tmp_path / "other", labels=("wall", *OBJECTS[1:]))
    with pytest.raises(CheckpointError, match=r"COCO's 80 in their order .wall"):
        load_eyes(str(other), str(clip), s3, CPU)
    fitting = make_mask2former(tmp_path / "fitting")
    (clip / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_eyes(str(fitting), str(clip), s3, CPU)
