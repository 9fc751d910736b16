"""Pictures as numbers: what the image tokenizer and CLIP read, and back."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bicubic, as Pillow does it: uint8 [H, W, 3] to uint8 [height, width, 3].

    Here and not on the GPU, because no other library rounds as CLIP's published preprocessing does.
    """
    from PIL import Image  # not at the top: only models with CLIP need it

    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to [-1, 1], float32 [B, 3, H, W]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(pixels: Tensor) -> Tensor:
    """[B, 3, H, W] in about [-1, 1] to uint8 [B, H, W, 3], cut off, not rounded, as published."""
    scaled = ((pixels.float() + 1) / 2).clamp(0, 1) * 255
    return scaled.to(torch.uint8).permute(0, 2, 3, 1)


def shrink(pixels: Tensor, side: int) -> Tensor:
    """Bilinear, without smoothing: [B, 3, H, W] to [B, 3, side, side], as RecA reads its source pictures."""
    return F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False)


def to_clip(pictures: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] with CLIP's mean and deviation."""
    mean, std = (pictures.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (pictures.permute(0, 3, 1, 2).float() / 255 - mean) / std
