"""The trained picture autoencoders in the wheel: they redraw unseen scenes, and their configurations fit."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from unimrg.families.harmon.checkpoint import TINY_VAE as HARMON
from unimrg.families.janus.checkpoint import TINY_VQ as JANUS
from unimrg.families.openuni.checkpoint import TINY_VAE as OPENUNI
from unimrg.families.openuni.config import tiny as tiny_openuni
from unimrg.families.pretrain_images import (
    KINDS,
    RECIPES,
    SIDE,
    Autoencoder,
    HarmonVAE,
    JanusVQ,
    OpenUniDCAE,
    ShowoMagvit,
    psnr,
    scene_maps,
    to_tensor,
)
from unimrg.families.showo.checkpoint import TINY_MAGVIT as SHOWO
from unimrg.families.showo.pixels import shrink

FILES = {"harmon": HARMON, "openuni": OPENUNI, "janus": JANUS, "showo": SHOWO}

# Signal-to-noise ratio in dB that pictures, depth and boundary maps reach at least: 1 below the measured.
LEAST = {
    "harmon": (25.1, 36.0, 24.8),
    "openuni": (24.5, 33.5, 18.1),
    "janus": (24.0, 31.8, 19.2),
    "showo": (21.7, 27.0, 18.2),
}


@cache
def drawings() -> dict[str, Tensor]:
    """Sixteen scenes that no autoencoder was trained on."""
    scenes = scene_maps(16, "test", seed=3)
    return {kind: to_tensor([maps.draw(kind, SIDE) for maps in scenes]) for kind in KINDS}


def everything() -> Tensor:
    return torch.cat(list(drawings().values()))


@cache
def shipped(family: str) -> Autoencoder:
    subject = RECIPES[family].make()
    subject.load(FILES[family])
    subject.module.eval()
    return subject


@pytest.mark.parametrize("family", FILES)
def test_unseen_scenes_are_redrawn(family: str) -> None:
    assert FILES[family].stat().st_size < 2_000_000
    for kind, least in zip(KINDS, LEAST[family], strict=True):
        assert psnr(shipped(family), drawings()[kind]) > least, kind


@torch.no_grad()
def test_latents_have_a_deviation_of_one() -> None:
    """The configurations' `scale` is that of the weights."""
    harmon, openuni = shipped("harmon"), shipped("openuni")
    assert isinstance(harmon, HarmonVAE) and isinstance(openuni, OpenUniDCAE)
    tokens = harmon.module.tokenize(harmon.module.encode(everything()))
    assert abs(tokens.std().item() - 1) < 0.15
    assert abs(openuni.latents(everything()).std().item() * tiny_openuni().vae.scale - 1) < 0.15


@torch.no_grad()
def test_most_codes_are_used() -> None:
    janus, showo = shipped("janus"), shipped("showo")
    assert isinstance(janus, JanusVQ) and isinstance(showo, ShowoMagvit)
    for codes, size in (
        (janus.module.encode(everything()).image_tokens, 512),
        (showo.module.encode(everything()), 512),
        (showo.module.encode(shrink(everything(), 32)), 512),
    ):
        assert codes.unique().numel() > size / 2


def test_code_vectors_have_length_one() -> None:
    """Decoding normalises them and encoding doesn't, so they must agree."""
    janus = shipped("janus")
    assert isinstance(janus, JanusVQ)
    assert (janus.book.norm(dim=1) - 1).abs().max() < 1e-3


def test_the_turn_of_the_latents_keeps_the_pictures() -> None:
    """Show-o's tokenizer decodes turned latents as it did before, but for the size that signs stand for."""
    torch.manual_seed(0)
    subject, x = ShowoMagvit(), drawings()["picture"][:4]
    with torch.no_grad():
        before = subject.module.decoder(subject.module.latents(x))
        subject.turn(subject.module.latents(x))
        turned = subject.module.latents(x)
        after = subject.module.decoder(turned / turned.abs().mean())
    torch.testing.assert_close(after, before, rtol=0, atol=1e-3 * float(before.abs().max()))
    flat = turned.permute(1, 0, 2, 3).flatten(1)
    assert (torch.cov(flat).diagonal() - 1).abs().max() < 1e-2
