"""Geometry against the golden numbers of Harmon's own pre-processing (fixtures/harmon/preprocess)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from unimrg.data.geometry import depth_target, pad_square, segmentation_target, squash

SIDE = 32
# One grey level, for Pillow versions that round differently. Depth is stretched and rounded once more.
LEVEL = 2 / 255 + 1e-6
FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def preprocess(request: pytest.FixtureRequest) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    try:
        root: Path = request.getfixturevalue("parity_dir")
    except pytest.FixtureLookupError:
        root = FIXTURES
    folder = root / "harmon" / "preprocess"
    return load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")


def signed(image: np.ndarray) -> np.ndarray:
    """uint8 [S, S(, 3)] -> float [3, S, S] in [-1, 1]."""
    colour = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
    return colour.transpose(2, 0, 1) / 255 * 2 - 1


@pytest.mark.parametrize("name", ["square", "tall", "wide"])
def test_padded_understanding_image(preprocess, name: str) -> None:
    inputs, outputs = preprocess
    square, _ = pad_square(inputs[f"{name}.rgb"], SIDE)
    np.testing.assert_allclose(signed(square), outputs[f"{name}.understanding"], atol=LEVEL)


@pytest.mark.parametrize("name", ["square", "tall", "wide"])
def test_squashed_generation_image(preprocess, name: str) -> None:
    inputs, outputs = preprocess
    ours = signed(squash(inputs[f"{name}.rgb"], SIDE))
    np.testing.assert_allclose(ours, outputs[f"{name}.generation_source"], atol=LEVEL)


@pytest.mark.parametrize("name", ["square", "tall", "wide"])
def test_squashed_depth(preprocess, name: str) -> None:
    inputs, outputs = preprocess
    ours = signed(depth_target(inputs[f"{name}.depth"], SIDE, "squash"))
    np.testing.assert_allclose(ours, outputs[f"{name}.depth_target"], atol=LEVEL)


@pytest.mark.parametrize("name", ["square", "tall", "wide"])
def test_squashed_segmentation(preprocess, name: str) -> None:
    inputs, outputs = preprocess
    ours = signed(segmentation_target(inputs[f"{name}.mask"], SIDE, "squash"))
    np.testing.assert_allclose(ours, outputs[f"{name}.mask_target"], atol=LEVEL)


def test_constant_depth(preprocess) -> None:
    ours = signed(depth_target(np.full((40, 30), 77, np.uint8), SIDE, "squash"))
    np.testing.assert_array_equal(ours, preprocess[1]["constant_depth_target"])
