"""Held-out pictures drawn by a checkpoint: the truth of a data set, drawings that can be repeated, scores."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cluster.drawings import prepare
from tests import families
from unimrg import evaluate
from unimrg.benchmarks.dense.drawing import AUTOENCODER, Settings, draw, read, score, sheet
from unimrg.benchmarks.dense.subjects import Subject
from unimrg.benchmarks.evaluation import Evaluation
from unimrg.compose import run_command
from unimrg.config import EvaluateConfig, FamilyConfig, TrainConfig
from unimrg.data.scenes import Scene, make_scenes
from unimrg.data.scenes.write import pack
from unimrg.families import load_family
from unimrg.report.results import results_page
from unimrg.sample import IMAGE_TASKS, Task
from unimrg.storage import Store

SIZE = 48
COUNT = 6


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(make_scenes(COUNT, seed=2, split="test", size=SIZE))


@pytest.fixture(scope="module")
def manifest(scenes: list[Scene], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    entries, files = pack(scenes)
    store = Store.at(str(folder))
    for path, raw in files.items():
        store.write_bytes(path, raw)
    (folder / "test.json").write_text(json.dumps(entries))
    return folder / "test.json"


def prepared(manifest: Path, side: int = SIZE, pictures: int = 64) -> tuple[list[Subject], dict[str, int]]:
    return prepare(EvaluateConfig(drawings=str(manifest), pictures=pictures), side)


# -- pictures and the truth ----------------------------------------------------------------------------------


def test_targets_and_truth_are_those_of_the_scenes(scenes: list[Scene], manifest: Path) -> None:
    subjects, skipped = prepared(manifest)
    assert len(subjects) == COUNT and skipped == {}
    for scene, subject in zip(scenes, subjects, strict=True):
        assert subject.sample.image is not None and set(subject.sample.targets) == set(IMAGE_TASKS)
        assert (subject.sample.image == scene.rgb).all()
        assert subject.regions is not None and ((subject.regions > 0) == (scene.ids > 0)).all()
        assert len(np.unique(subject.regions)) == len(np.unique(scene.ids))
        assert subject.depth is not None
        near = np.isfinite(subject.depth) & (scene.depth < 20 * scene.depth.min())
        ratio = subject.depth[near] / scene.depth[near]
        assert near.mean() > 0.5 and np.ptp(ratio) < 0.01 * ratio.mean()  # up to a factor, in 16 bits


def test_what_can_t_be_used_is_left_out_and_counted(manifest: Path, tmp_path: Path) -> None:
    entries = json.loads(manifest.read_text())
    for kind in ("images", "depth", "masks"):
        shutil.copytree(manifest.parent / kind, tmp_path / kind)
    firsts = list({entry["image"]: dict(entry) for entry in reversed(entries)}.values())[:4]
    firsts[0]["image"] = "images/gone.png"
    del firsts[1]["depth"]
    del firsts[2]["image"]
    firsts[2]["conversations"] = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    (tmp_path / "test.json").write_text(json.dumps(firsts))
    subjects, skipped = prepared(tmp_path / "test.json")
    assert len(subjects) == 1
    assert skipped == {"left out: missing-file": 1, "left out: missing-label": 1, "left out: no picture": 1}
    config = EvaluateConfig(drawings=str(tmp_path / "test.json"))
    config.teachers.depth.name = "none"
    subjects, skipped = prepare(config, SIZE)
    assert len(subjects) == 2 and skipped["without true depth"] == 1


def test_only_so_many_pictures_are_taken(manifest: Path) -> None:
    whole, _ = prepared(manifest)
    some, _ = prepared(manifest, pictures=2)
    assert [one.sample.id for one in some] == [one.sample.id for one in whole[:2]]


# -- drawing -------------------------------------------------------------------------------------------------


def settings(batch: int = 3) -> Settings:
    return Settings("model", "pictures", 2, "float32", batch)


def shown(subjects: Sequence[Subject]) -> list[np.ndarray]:
    return [one.sample.image for one in subjects if one.sample.image is not None]


@pytest.mark.parametrize("name", families.NAMES)
def test_a_part_is_the_same_whenever_it_is_drawn(name: str, manifest: Path, tmp_path: Path) -> None:
    model, processor = families.shared_model(name), families.processor(name)
    pictures = shown(prepared(manifest, families.SIDE)[0])
    parts = settings().parts(Store.at(str(tmp_path)))
    parts.write(1, draw(model, processor, pictures[3:], 3, settings()))
    parts.write(0, draw(model, processor, pictures[:3], 0, settings()))
    drawn = read(parts)
    assert set(drawn) == {task.value for task in IMAGE_TASKS} | {AUTOENCODER}
    side = families.SIDE
    assert all(len(d) == COUNT and {p.shape for p in d} == {(side, side, 3)} for d in drawn.values())
    again = draw(model, processor, pictures[3:], 3, settings())
    assert again.equals(parts.read(1))
    assert not again.equals(draw(model, processor, pictures[3:], 0, settings()))  # another seed
    depth = again.filter(pa.compute.equal(again["name"], "depth"))["picture"][0].as_py()
    with Image.open(io.BytesIO(depth)) as picture:
        assert (np.asarray(picture) == drawn["depth"][3]).all()


def test_the_round_trip_is_near_the_picture_and_above_any_redraw() -> None:
    """With the autoencoder that comes with the tiny Harmon."""
    model, tokenizer = load_family("harmon").build(FamilyConfig(), seed=1)
    processor = load_family("harmon").processor(model.eval(), tokenizer, TrainConfig(), tuple(Task), 0)
    side = load_family("harmon").image_size(FamilyConfig())
    pictures = [scene.rgb for scene in make_scenes(2, seed=2, split="test", size=side)]
    table = draw(model, processor, pictures, 0, settings(2))
    errors: dict[str, list[float]] = {}
    for row in table.to_pylist():
        with Image.open(io.BytesIO(row["picture"])) as picture:
            error = np.abs(np.asarray(picture).astype(int) - pictures[row["row"]]).mean()
        errors.setdefault(row["name"], []).append(error)
    assert max(errors[AUTOENCODER]) < 16 < min(errors["pixel"])


def test_drawings_are_kept_apart_by_all_they_depend_on(tmp_path: Path) -> None:
    first = settings()
    others = [replace(first, checkpoint="x"), replace(first, pictures="x"), replace(first, iterations=3)]
    others += [replace(first, dtype="bfloat16"), replace(first, batch=4), replace(first, seed=1)]
    places = {one.parts(Store.at(str(tmp_path))).store.url for one in (first, *others)}
    assert len(places) == 1 + len(others)


# -- scores --------------------------------------------------------------------------------------------------


def test_right_drawings_are_worth_all_and_stand_above_chance(manifest: Path) -> None:
    subjects, _ = prepared(manifest)
    drawn = {task.value: [np.array(one.sample.targets[task]) for one in subjects] for task in IMAGE_TASKS}
    blurred = [np.clip(picture.astype(int) + 9, 0, 255).astype(np.uint8) for picture in shown(subjects)]
    redraw, depth, lines = score(subjects, drawn | {AUTOENCODER: blurred}, {"steps": "2"})
    assert redraw.counts["redrawn exactly"] == COUNT and redraw.scores["mae"] == 0
    assert 20 < redraw.groups["psnr"][AUTOENCODER] < 40 and redraw.protocol["steps"] == "2"
    assert depth.scores["pearson"] == pytest.approx(1) and depth.scores["delta1"] > 0.95
    assert depth.groups["pearson"]["shuffled"] < 0.9
    assert lines.scores["ods"] == 1 > lines.groups["ods"]["shuffled"]
    assert lines.scores["best_iou"] > lines.groups["best_iou"]["shuffled"]
    page = results_page([Evaluation("a", "a", (redraw, depth, lines))])
    assert "chance: target of another picture" in page and "the ceiling" in page
    assert "18\u00a0drawings" in page and "nothing could be found" not in page


def test_tasks_without_targets_have_no_scores(manifest: Path) -> None:
    config = EvaluateConfig(drawings=str(manifest))
    config.teachers.depth.name = config.teachers.segmentation.name = "none"
    subjects, _ = prepare(config, SIZE)
    drawn = {name: shown(subjects) for name in ("pixel", "depth", "segmentation", AUTOENCODER)}
    (redraw,) = score(subjects, drawn, {})
    assert redraw.benchmark == "redraw"
    with Image.open(io.BytesIO(sheet(subjects, drawn))) as picture:
        assert picture.size == (3 * SIZE, COUNT * SIZE)


def test_models_with_other_ceilings_are_told_apart(manifest: Path) -> None:
    subjects, _ = prepared(manifest)
    drawn = {task.value: shown(subjects) for task in IMAGE_TASKS}
    ceilings = [[np.clip(p + np.uint8(k), p, 255) for p in shown(subjects)] for k in (3, 9)]
    results = [score(subjects, drawn | {AUTOENCODER: one}, {}) for one in ceilings]
    page = results_page([Evaluation(n, n, tuple(found)) for n, found in zip("ab", results, strict=True)])
    assert "the ceiling, a" in page and "the ceiling, b" in page
    assert page.count("chance: target of another picture<") == 3


# -- the command ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ray
def test_the_command_goes_on_where_it_stopped(manifest: Path, tmp_path: Path) -> None:
    model, tokenizer = load_family("harmon").build(FamilyConfig(), seed=1)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    words = [f"drawings={manifest}", f"checkpoint={tmp_path / 'model'}", f"out={out}", "draw_iterations=2"]

    def run(*more: str) -> str:
        said, err = io.StringIO(), io.StringIO()
        with redirect_stdout(said), redirect_stderr(err):
            status = run_command(evaluate.main, "evaluate", EvaluateConfig, "", (), [*words, *more])
        assert status == 0, err.getvalue()
        return said.getvalue()

    assert run("pool.batch_size=2").startswith(f"{COUNT} of {COUNT} pictures to draw from")
    first = Evaluation.read(Store.at(str(out)))
    assert [result.benchmark for result in first.results] == ["redraw", "depth", "segmentation"]
    assert all(result.counts["pictures"] == COUNT for result in first.results)
    assert first.results[0].scores["psnr"] < first.results[0].groups["psnr"][AUTOENCODER]
    parts = sorted(out.glob("drawings/*/part-*.parquet"))
    assert len(parts) == COUNT // 2 and (out / "drawings.png").is_file()
    parts[1].unlink()
    assert run("pool.batch_size=2").startswith(f"2 of {COUNT} pictures to draw from")
    assert Evaluation.read(Store.at(str(out))) == first
    with redirect_stderr(io.StringIO()) as err:
        gone = [f"drawings={tmp_path / 'gone.json'}", *words[1:]]
        assert run_command(evaluate.main, "evaluate", EvaluateConfig, "", (), gone) == 2
    assert "gone.json" in err.getvalue()
