"""What is done to predicted masks: how stable they are, their boxes, which of several alike stays.

Everything runs on the device of its inputs; nothing waits for the device once a mask, a box or a pixel.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Boxes compared at once by `box_nms`: 1024 x 1024 of a few float32 each are 30 MB.
NMS_BLOCK = 1024


def stability(logits: Tensor, threshold: float, offset: float) -> Tensor:
    """IoU of each mask [K, H, W] cut at threshold + offset and at threshold - offset; NaN if both empty."""
    inner, outer = (
        # 32 bits are enough for a picture, and several times faster than the 64 of the default.
        (logits > threshold + by).sum(dim=(-2, -1), dtype=torch.int32)
        for by in (offset, -offset)
    )
    return inner / outer


def mask_boxes(logits: Tensor, threshold: float) -> Tensor:
    """Left, top, right, bottom (outermost pixels), float32 [K, 4], of logits [K, H, W] above it; else 0."""

    def span(occupied: Tensor) -> tuple[Tensor, Tensor]:
        bits = occupied.to(torch.uint8)
        return bits.argmax(dim=-1), occupied.shape[-1] - 1 - bits.flip(-1).argmax(dim=-1)

    # The largest value of a line says whether the line is occupied, and no mask has to be written down.
    columns, rows = logits.amax(dim=-2) > threshold, logits.amax(dim=-1) > threshold
    (left, right), (top, bottom) = span(columns), span(rows)
    boxes = torch.stack([left, top, right, bottom], dim=-1).float()
    return boxes * rows.any(dim=-1)[:, None]


def box_nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes [K, 4] that no better kept one overlaps by an IoU above the threshold, best first.

    Sides are right - left, one pixel less than the masks', as in the official generator. Memory doesn't grow
    with K squared: ranks are settled in blocks, each then clears the later blocks.
    """
    order = scores.argsort(descending=True, stable=True)
    blocks = boxes[order].split(NMS_BLOCK)
    alive = list(torch.ones_like(order, dtype=torch.bool).split(NMS_BLOCK))
    for number, block in enumerate(blocks):
        alive[number] = kept = _settle(_overlaps(block, block, threshold).triu(1), alive[number])
        for later in range(number + 1, len(blocks)):
            beaten = kept.float() @ _overlaps(block, blocks[later], threshold).float() > 0
            alive[later] = alive[later] & ~beaten
    return order[torch.cat(alive)]


def _settle(beats: Tensor, free: Tensor) -> Tensor:
    """Which of the free ranks [n] stay, when one that stays beats others: beats [n, n], upper triangle.

    Asking every rank at once, again and again, until nothing changes: after t rounds the first t ranks are
    right, so the end is the answer of one-by-one. Chains are short, hence rounds few.
    """
    kept, beats = free, beats.float()
    while True:
        asked = free & (kept.float() @ beats == 0)
        if torch.equal(asked, kept):
            return kept
        kept = asked


def _overlaps(first: Tensor, second: Tensor, threshold: float) -> Tensor:
    """Bool [n, m]: is the IoU of boxes [n, 4] and [m, 4] above the threshold? Two boxes without area: no."""
    areas = [(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (first, second)]
    corner = torch.maximum(first[:, None, :2], second[None, :, :2])
    sides = (torch.minimum(first[:, None, 2:], second[None, :, 2:]) - corner).clamp_(min=0)
    shared = sides[..., 0] * sides[..., 1]
    return shared / (areas[0][:, None] + areas[1] - shared) > threshold
