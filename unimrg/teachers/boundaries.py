"""Boundaries of binary masks: what `Canny(mask * 255, 100, 200)` of OpenCV gives, bit for bit.

Canny, "A Computational Approach to Edge Detection" (1986), in the form the published labels were made with:
3x3 Sobel with a replicated border, L1 magnitude, non-maximum suppression in four directions, hysteresis.
For a mask of two values three steps shrink:

- The mask is taken as 0/1 instead of 0/255. A common factor changes no comparison, and gradients of at
  most 4 in size fit in a byte.
- Both gradients have the parity of the sum of the four corners, so their L1 magnitude is even: it is 0 or
  at least 2 (510 of 255). That is above both thresholds, hence hysteresis keeps every survivor.
- Directions part at tan 22.5 = 0.4142. No ratio of whole numbers up to 4 lies between 0.4 and 0.4142, so
  2/5 does instead of fixed-point numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def mask_boundaries(mask: np.ndarray) -> np.ndarray:
    """Boundary pixels, bool, of a bool mask [H, W] or of each of several [N, H, W]; the shape is kept."""
    if mask.ndim not in (2, 3):
        raise ValueError(f"expected masks [H, W] or [N, H, W], found {list(mask.shape)}")
    masks = torch.from_numpy(np.ascontiguousarray(mask, dtype=bool))
    found = tensor_boundaries(masks if mask.ndim == 3 else masks[None])
    return found.numpy().reshape(mask.shape)


def tensor_boundaries(masks: Tensor) -> Tensor:
    """`mask_boundaries` for bool tensors [N, H, W] on any device. Takes about 10 bytes a pixel."""
    horizontal, vertical = _sobel(masks)
    across, down = horizontal.abs(), vertical.abs()
    magnitude = across + down
    ring = F.pad(magnitude, (1, 1, 1, 1))  # outside the picture there is no gradient

    def neighbour(rows: int, columns: int) -> Tensor:
        height, width = magnitude.shape[-2:]
        return ring[:, 1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]

    # Of two equal neighbours along an axis the left (upper) one wins; along a diagonal neither does.
    along_x = (magnitude > neighbour(0, -1)) & (magnitude >= neighbour(0, 1))
    along_y = (magnitude > neighbour(-1, 0)) & (magnitude >= neighbour(1, 0))
    falling = (magnitude > neighbour(-1, -1)) & (magnitude > neighbour(1, 1))
    rising = (magnitude > neighbour(-1, 1)) & (magnitude > neighbour(1, -1))
    diagonal = torch.where((horizontal ^ vertical) < 0, rising, falling)
    steep = torch.where(2 * down > 5 * across, along_y, diagonal)
    return (magnitude > 0) & torch.where(2 * across > 5 * down, along_x, steep)


def _sobel(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical 3x3 Sobel gradients, int8 [N, H, W] in -4..4, of 0/1 masks [N, H, W]."""
    m = masks.to(torch.int8)
    m = torch.cat((m[:, :1], m, m[:, -1:]), dim=1)
    m = torch.cat((m[:, :, :1], m, m[:, :, -1:]), dim=2)
    smooth_down = m[:, :-2] + 2 * m[:, 1:-1] + m[:, 2:]
    smooth_across = m[:, :, :-2] + 2 * m[:, :, 1:-1] + m[:, :, 2:]
    return smooth_down[:, :, 2:] - smooth_down[:, :, :-2], smooth_across[:, 2:] - smooth_across[:, :-2]
