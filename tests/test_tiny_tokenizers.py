"""The trained picture autoencoders in the wheel: they redraw unseen scenes, and their configurations fit."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from unimrg.families.harmon.checkpoint import TINY_VAE
from unimrg.families.janus.checkpoint import TINY_VQ
from unimrg.families.pretrain_images import (
    KINDS,
    SIDE,
    Autoencoder,
    HarmonVAE,
    JanusVQ,
    psnr,
    scene_maps,
    to_tensor,
)

FILES = {"harmon": (HarmonVAE, TINY_VAE), "janus": (JanusVQ, TINY_VQ)}


@cache
def drawings() -> dict[str, Tensor]:
    """Sixteen scenes that no autoencoder was trained on."""
    scenes = scene_maps(16, "test", seed=3)
    return {kind: to_tensor([maps.draw(kind, SIDE) for maps in scenes]) for kind in KINDS}


@cache
def shipped(family: str) -> Autoencoder:
    make, file = FILES[family]
    subject = make()
    subject.load(file)
    subject.module.eval()
    return subject


@pytest.mark.parametrize("family, least", [("harmon", (25.1, 36.1, 24.8)), ("janus", (22.0, 27.4, 17.8))])
def test_unseen_scenes_are_redrawn(family: str, least: tuple[float, float, float]) -> None:
    """least: signal-to-noise ratio in dB of pictures, depth maps and boundary maps, 1 below the measured."""
    assert FILES[family][1].stat().st_size < 2_000_000
    for kind, enough in zip(KINDS, least, strict=True):
        assert psnr(shipped(family), drawings()[kind]) > enough, kind


def test_latents_have_a_deviation_of_one() -> None:
    """The configurations' `scale` is that of the weights."""
    vae = shipped("harmon")
    assert isinstance(vae, HarmonVAE)
    with torch.no_grad():
        tokens = vae.module.tokenize(vae.module.encode(torch.cat(list(drawings().values()))))
    assert abs(tokens.std().item() - 1) < 0.15
