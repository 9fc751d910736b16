"""SAM's automatic mask generator as the paper tells it (arXiv 2304.02643, appendix B), the plain way.

One picture at a time, every mask at full size, one mask after the other where that is simplest: what
`SamBoundaries` is measured against, for its labels and for its speed. The model and, for SAM, the image
processor are transformers', in float32. SAM 2 (arXiv 2408.00714) differs in how a picture is brought to the
model and how a mask is brought back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from unimrg.teachers.boundaries import mask_boundaries

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PlainSam:
    """uint8 [H, W, 3] to uint8 [H, W]; `kept` is the number of masks drawn in the last picture."""

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        points_per_side: int = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        mask_threshold: float = 0.0,
    ) -> None:
        from transformers import AutoConfig, AutoImageProcessor, Sam2Model, SamModel

        self.first = AutoConfig.from_pretrained(folder).model_type == "sam"
        self.model: Any = (SamModel if self.first else Sam2Model).from_pretrained(folder, dtype=torch.float32)
        self.model.eval().to(device)
        if self.first:
            self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.side, self.batch, self.device = points_per_side, points_per_batch, device
        self.sure, self.stable, self.alike = pred_iou_thresh, stability_score_thresh, box_nms_thresh
        self.cut, self.offset = mask_threshold, stability_score_offset
        self.kept = 0

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> np.ndarray:
        pixels, content = self._pixels(image)
        seen = self.model.get_image_embeddings(pixels.to(self.device))
        masks, scores = [], []
        points = [
            ((column + 0.5) / self.side * content[1], (row + 0.5) / self.side * content[0])
            for row in range(self.side)
            for column in range(self.side)
        ]
        for start in range(0, len(points), self.batch):
            asked = torch.tensor(points[start : start + self.batch], dtype=torch.float32, device=self.device)
            answer = self.model(
                image_embeddings=seen, input_points=asked[None, :, None], multimask_output=True
            )
            some, rated = self._filter(answer, content, image.shape[:2])
            masks.append(some)
            scores.append(rated)
        found, rated = np.concatenate(masks), np.concatenate(scores)
        kept = suppress(boxes(found), rated, self.alike)
        self.kept = len(kept)
        edges = np.zeros(image.shape[:2], bool)
        for index in kept:
            edges |= mask_boundaries(found[index])
        return edges.astype(np.uint8) * 255

    def _pixels(self, image: np.ndarray) -> tuple[Tensor, tuple[int, int]]:
        """What the encoder sees, and the part of it that is picture."""
        if self.first:
            inputs = self.processor(images=[image], return_tensors="pt", input_data_format="channels_last")
            height, width = inputs["reshaped_input_sizes"][0].tolist()
            return inputs["pixel_values"], (height, width)
        side = self.model.config.prompt_encoder_config.image_size
        stretched = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
        values = (stretched / 255 - MEAN) / DEVIATION
        return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)[None], (side, side)

    def _filter(
        self, answer: Any, content: tuple[int, int], size: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of the masks of one pass those that the model is sure of and whose outline is stable."""
        logits, scores = answer.pred_masks.flatten(0, 2), answer.iou_scores.flatten()
        full = self._full_size(logits, content, size)
        keep = scores > self.sure
        full, scores = full[keep], scores[keep]
        inner, outer = ((full > self.cut + by).sum(dim=(1, 2)) for by in (self.offset, -self.offset))
        keep = inner / outer >= self.stable
        return (full[keep] > self.cut).cpu().numpy(), scores[keep].cpu().numpy()

    def _full_size(self, logits: Tensor, content: tuple[int, int], size: tuple[int, ...]) -> Tensor:
        full = logits[:, None]
        if self.first:
            side = self.model.config.vision_config.image_size
            full = F.interpolate(full, (side, side), mode="bilinear", align_corners=False)
            full = full[..., : content[0], : content[1]]
        return F.interpolate(full, tuple(size), mode="bilinear", align_corners=False)[:, 0]


def boxes(masks: np.ndarray) -> np.ndarray:
    """Left, top, right, bottom of each bool mask, float32 [K, 4]; zeros for an empty one."""
    found = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(found, masks, strict=True):
        if mask.any():
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            box[:] = columns[0], rows[0], columns[-1], rows[-1]
    return found


def suppress(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    """Greedy non-maximum suppression: the best box stays, those too much like it go, and so on."""
    left = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(int(best))
        low, high = np.maximum(boxes[best, :2], boxes[left, :2]), np.minimum(boxes[best, 2:], boxes[left, 2:])
        shared = (high - low).clip(0).prod(axis=1)
        total = (boxes[best, 2:] - boxes[best, :2]).prod()
        total = total + (boxes[left, 2:] - boxes[left, :2]).prod(axis=1) - shared
        left = left[~(shared > threshold * total)]
    return kept
