"""The small teachers of the package: they load, are small, are as good as measured, and can be made again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from unimrg.compose import compose
from unimrg.config import RunConfig
from unimrg.teachers.depth import DepthAnything
from unimrg.teachers.fit import depth, sam
from unimrg.teachers.fit.__main__ import main
from unimrg.teachers.fit.quality import centre, depth_quality, sam_quality
from unimrg.teachers.fit.scenes import Scenes, render
from unimrg.teachers.fit.training import load
from unimrg.teachers.segmentation import SamBoundaries
from unimrg.teachers.weights import TINY

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def fresh() -> Scenes:
    """Scenes that were neither trained on nor measured on."""
    return render(16, seed=4321, split="test")


@pytest.mark.parametrize("folder", TINY.values(), ids=list(TINY))
def test_they_are_small(folder: Path) -> None:
    made = json.loads((folder / "quality.json").read_text())
    weights = folder / "model.safetensors"
    assert made["parameters"] <= 2_000_000
    assert made["quality"]["bytes"] == weights.stat().st_size <= 5 * MEGABYTE
    assert made["quality"]["unseen_scenes"] >= 200


def test_depth_is_as_good_as_measured(fresh: Scenes) -> None:
    quality = depth_quality(TINY["depth"], fresh)
    assert quality["abs_rel"] < 0.12
    assert quality["delta1"] > 0.86


def test_masks_are_as_good_as_measured(fresh: Scenes) -> None:
    quality = sam_quality(TINY["segmentation"], fresh, sam.SETTINGS)
    assert quality["mean_iou"] > 0.72
    assert quality["boundary_f"] > 0.9


def test_the_configuration_names_them(fresh: Scenes) -> None:
    """`teachers=tiny` builds both from the package, with the settings they were measured with."""
    teachers = compose("train", ["teachers=tiny"], RunConfig).teachers
    assert teachers.sam == sam.SETTINGS
    built = (
        DepthAnything(teachers.depth.checkpoint, device="cpu"),
        SamBoundaries(teachers.segmentation.checkpoint, device="cpu", **vars(teachers.sam)),
    )
    for teacher in built:
        (drawn,) = teacher([fresh.rgb[0]])
        assert isinstance(drawn, np.ndarray) and drawn.shape == fresh.ids.shape[1:]
        assert drawn.min() == 0 and drawn.max() == 255


@pytest.mark.parametrize("name", ["depth", "sam"])
def test_they_can_be_made_again(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], restore_threads: None
) -> None:
    """Three steps from the command to measured weights; the same seed gives the same weights."""
    words = [name, "--scenes", "8", "--steps", "3", "--batch", "2", "--unseen", "2"]
    for folder in ("one", "two"):
        assert main([*words, "--out", str(tmp_path / folder)]) == 0
    shown = capsys.readouterr().out
    made = json.loads((tmp_path / "two" / "quality.json").read_text())
    assert "step 3 loss" in shown and json.dumps(made, indent=1) in shown
    assert made["command"].startswith(f"python -m unimrg.teachers.fit {name} --scenes 8")
    assert set(json.loads((TINY_OF[name] / "quality.json").read_text())["quality"]) == set(made["quality"])
    first, second = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("one", "two"))
    assert first == second


TINY_OF = {"depth": TINY["depth"], "sam": TINY["segmentation"]}


def test_training_goes_on_from_stored_weights() -> None:
    model = sam.make_model()
    load(model, TINY["segmentation"])
    stored = load_file(TINY["segmentation"] / "model.safetensors")
    weights = model.state_dict()
    assert len(stored) > 100 and all(torch.equal(weights[name], stored[name].float()) for name in stored)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps is 0; give 1 or more"),
        (["--measure"], "holds no quality.json; train a teacher into it first"),
        (["--start", "nowhere"], "nowhere holds no weights of these sizes"),
        (["--start", str(TINY["segmentation"])], "holds no weights of these sizes"),
    ],
)
def test_what_can_t_be_done_is_said(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], restore_threads: None
) -> None:
    assert main(["depth", "--unseen", "2", "--out", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def restore_threads():  # type: ignore[no-untyped-def]
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def test_depth_loss_knows_no_scale_and_no_shift() -> None:
    values = torch.rand(2, 8, 8)
    assert torch.allclose(depth.normalised(values), depth.normalised(3 * values + 5), atol=1e-5)
    assert not torch.allclose(depth.normalised(values), depth.normalised(-values), atol=1e-1)


def test_mask_loss_prefers_the_truth() -> None:
    truth = torch.zeros(1, 1, 8, 8)
    truth[..., 2:6, 2:6] = 1
    right, empty, wrong = 8 * (2 * truth - 1), torch.full_like(truth, -8), 8 * (1 - 2 * truth)
    losses = sam.mask_loss(torch.cat([right, empty, wrong], dim=1), truth)[0]
    assert losses[0] < 0.01 < losses[1] < losses[2]
    overlaps = sam.iou(torch.cat([right, empty, wrong], dim=1) > 0, truth > 0)[0]
    assert overlaps.tolist() == [1, 0, 0]


def test_points_lie_on_what_they_ask_for(fresh: Scenes) -> None:
    points, ids = sam.draw_points(np.random.default_rng(0), fresh.ids)
    x, y = points[..., 0], points[..., 1]
    assert (fresh.ids[np.arange(len(ids))[:, None], y, x] == ids).all()
    assert (ids[:, :6] > 0).all() and (ids[:, 6:] == 0).all()


def test_mirrored_scenes_are_mirrored_whole(fresh: Scenes) -> None:
    """Picture, depth and instances turn together: each picked scene is one that is there, or its mirror."""
    picked = fresh.pick(np.random.default_rng(0), 8)
    for k in range(8):
        ways = [
            (n, way)
            for n in range(len(fresh))
            for way in (1, -1)
            if np.array_equal(fresh.rgb[n][:, ::way], picked.rgb[k])
        ]
        assert any(
            np.array_equal(fresh.depth[n][:, ::way], picked.depth[k])
            and np.array_equal(fresh.ids[n][:, ::way], picked.ids[k])
            for n, way in ways
        )


def test_the_centre_is_inside() -> None:
    mask = np.zeros((9, 9), bool)
    mask[1:4, 2:7] = True
    x, y = centre(mask)
    assert y == 2 and 3 <= x <= 5
