"""A small Depth Anything: its sizes, and the loss it is trained with.

Shape suffixes: B pictures, S side in pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unimrg.teachers.fit.scenes import Scenes

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

SQUARE, PATCH = 120, 10  # what the backbone sees, in pixels
SCALES = 4  # at which differences of neighbours are compared
GRADIENTS = 0.5  # their weight


def make_model() -> PreTrainedModel:
    """0.9 million parameters. Features are finest at half the side of the picture: most time goes there."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        image_size=SQUARE,
        patch_size=PATCH,
        hidden_size=96,
        num_hidden_layers=6,
        num_attention_heads=3,
        mlp_ratio=3,
        out_indices=[2, 3, 5, 6],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=PATCH,
        reassemble_hidden_size=96,
        reassemble_factors=[2, 1, 1, 0.5],
        neck_hidden_sizes=[32, 64, 64, 96],
        fusion_hidden_size=32,
        head_hidden_size=16,
    )
    model = DepthAnythingForDepthEstimation(config)
    with torch.no_grad():  # above the last ReLU, which would pass no gradient below 0
        model.head.conv3.bias.fill_(1.0)
    return model


def make_processor() -> BaseImageProcessor:
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    return DPTImageProcessorPil(
        size={"height": SQUARE, "width": SQUARE},
        keep_aspect_ratio=True,
        ensure_multiple_of=PATCH,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def loss(model: PreTrainedModel, pixels_B3SS: Tensor, scenes: Scenes, rng: np.random.Generator) -> Tensor:
    """Affine-invariant loss on inverse depth (arXiv 2401.10891, section 3.1) and gradient matching
    (arXiv 1907.01341, section 5), which keeps edges sharp. The sky is infinitely far: 0."""
    truth = torch.from_numpy(1 / scenes.depth)
    truth = F.interpolate(truth[:, None], (SQUARE, SQUARE), mode="area")[:, 0]
    error_BSS = normalised(model(pixel_values=pixels_B3SS).predicted_depth) - normalised(truth)
    total = error_BSS.abs().mean()
    for scale in range(SCALES):
        part = error_BSS[:, :: 2**scale, :: 2**scale]
        steps = part.diff(dim=1).abs().mean() + part.diff(dim=2).abs().mean()
        total = total + GRADIENTS * steps
    return total


def normalised(values_BSS: Tensor) -> Tensor:
    """Each map minus its median, over its mean distance from it: the same for all scales and shifts."""
    flat = values_BSS.flatten(1)
    centred = flat - flat.median(dim=1, keepdim=True).values
    spread = centred.abs().mean(dim=1, keepdim=True).clamp(min=1e-6)
    return (centred / spread).view_as(values_BSS)
