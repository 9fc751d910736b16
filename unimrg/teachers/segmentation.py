"""Region boundaries by SAM's automatic mask generator (arXiv 2304.02643, appendix B), through transformers.

A grid of points is put to the model, each answered with three masks; masks the model is sure of and whose
outline doesn't depend on the threshold are kept, duplicates go, and the outlines of the rest are drawn.
Defaults are the official generator's: one crop (the picture), no removal of small regions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unimrg.errors import CheckpointError, ConfigError, SampleError
from unimrg.teachers import weights
from unimrg.teachers.boundaries import tensor_boundaries
from unimrg.teachers.common import attempt, check_picture

# Pixels of full-size float masks held at once (128 MiB each for the mask and the step before it).
CHUNK_PIXELS = 1 << 25


@dataclass(frozen=True)
class Geometry:
    """Sides in pixels. square: the encoder's; content: (h, w) of the picture in it; picture: (H, W)."""

    square: int
    content: tuple[int, int]
    picture: tuple[int, int]


@dataclass(frozen=True)
class Rules:
    """Which masks count and how large a picture is looked at: everything of the settings labels depend on."""

    points_per_side: int
    pred_iou_thresh: float
    stability_score_thresh: float
    stability_score_offset: float
    box_nms_thresh: float
    mask_threshold: float
    max_side: int

    def __post_init__(self) -> None:
        for name in ("points_per_side", "max_side"):
            if getattr(self, name) < 1:
                raise ConfigError(f"segmentation {name} must be at least 1, found {getattr(self, name)}")
        for name in ("pred_iou_thresh", "stability_score_thresh", "box_nms_thresh"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"segmentation {name} must lie in 0..1, found {getattr(self, name)}")


class SamBoundaries:
    """Pictures to region boundaries, uint8, 255 on 0; black where no mask is kept.

    checkpoint: a hub id such as facebook/sam-vit-huge, or a folder. device: auto, cpu, cuda, cuda:<n>.
    dtype (of the image encoder; the small decoder stays in float32): auto (bfloat16 on a GPU, float32
    elsewhere), float32, bfloat16, float16. points_per_batch changes the memory, not the result.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        points_per_side: int = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        mask_threshold: float = 0.0,
        max_side: int = 2048,
    ) -> None:
        from transformers import SamModel

        if points_per_batch < 1:
            raise ConfigError(f"segmentation points_per_batch must be at least 1, found {points_per_batch}")
        self.points_per_batch = points_per_batch
        self.rules = Rules(
            points_per_side=points_per_side,
            pred_iou_thresh=float(pred_iou_thresh),
            stability_score_thresh=float(stability_score_thresh),
            stability_score_offset=float(stability_score_offset),
            box_nms_thresh=float(box_nms_thresh),
            mask_threshold=float(mask_threshold),
            max_side=max_side,
        )
        self.device = weights.choose_device(device)
        self.dtype = weights.choose_dtype(dtype, self.device)
        folder = weights.find_folder(checkpoint, "segmentation")
        self.processor = weights.load_processor(folder, "segmentation")
        self.model = weights.load_model(SamModel, folder, "sam", "segmentation").to(self.device)
        # Half precision would move the points by pixels and fray the outlines; the encoder is the dear part.
        self.model.vision_encoder.to(self.dtype)
        self.square = int(self.model.config.vision_config.image_size)
        fed = dict(self.processor.pad_size).get("height")
        if fed != self.square:
            raise CheckpointError(
                f"segmentation checkpoint {folder}: the image processor pads to {fed} pixels, the model sees "
                f"{self.square}; put the published preprocessor_config.json beside the weights"
            )
        self.identity = {
            "name": "sam-boundaries",
            "version": 1,
            "weights": weights.digest(folder),
            "settings": {
                "dtype": str(self.dtype).removeprefix("torch."),
                **asdict(self.rules),
                "processor": weights.processor_settings(self.processor),
            },
        }

    def __call__(self, images: list[np.ndarray]) -> list[np.ndarray | SampleError]:
        """One map uint8 [H, W], or the reason why there is none, per picture uint8 [H, W, 3]."""
        return [attempt(partial(self._label, image)) for image in images]

    @torch.inference_mode()
    def _label(self, image: np.ndarray) -> np.ndarray:
        check_picture(image)
        small = limit_side(image, self.rules.max_side)
        embedding, geometry = self._encode(small)
        logits, scores, boxes = self._candidates(embedding, geometry)
        kept = box_nms(boxes, scores, self.rules.box_nms_thresh)
        edges = torch.zeros(geometry.picture, dtype=torch.bool, device=self.device)
        for masks in _full_size(logits[kept], geometry):
            edges |= tensor_boundaries(masks > self.rules.mask_threshold).any(dim=0)
        return enlarge(edges.cpu().numpy(), *image.shape[:2]).astype(np.uint8) * 255

    def _encode(self, image: np.ndarray) -> tuple[Tensor, Geometry]:
        """The image embedding, float32 [1, C, h, w]: the one pass of the large encoder."""
        # A picture three pixels high must not be taken for one that has its channels first.
        inputs = self.processor(images=[image], return_tensors="pt", input_data_format="channels_last")
        content = tuple(int(side) for side in inputs["reshaped_input_sizes"][0])
        pixels = inputs["pixel_values"].to(device=self.device, dtype=self.dtype)
        embedding = self.model.get_image_embeddings(pixels).float()
        if not torch.isfinite(embedding).all():
            raise ValueError("the image encoder gave values that are not finite")
        return embedding, Geometry(self.square, (content[0], content[1]), (image.shape[0], image.shape[1]))

    def _candidates(self, embedding: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
        """All masks that pass both scores: logits [K, h, w] as decoded, scores [K], boxes [K, 4].

        The decoder's small logits are what is kept; full-size masks live for a chunk only.
        """
        points = point_grid(self.rules.points_per_side, geometry.content).to(self.device)
        found = []
        for batch in points.split(self.points_per_batch):
            answer = self.model(
                image_embeddings=embedding, input_points=batch[None, :, None], multimask_output=True
            )
            found.append(self._sure_and_stable(answer.pred_masks, answer.iou_scores, geometry))
        logits, scores, boxes = (torch.cat(parts) for parts in zip(*found, strict=True))
        return logits, scores, boxes

    def _sure_and_stable(
        self, masks: Tensor, scores: Tensor, geometry: Geometry
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of masks [1, P, 3, h, w] and predicted IoUs [1, P, 3] those above the thresholds, with boxes.

        As in the official code a threshold of 0 filters nothing.
        """
        rules = self.rules
        logits, scores = masks.flatten(0, 2), scores.flatten()
        if rules.pred_iou_thresh > 0:
            sure = scores > rules.pred_iou_thresh
            logits, scores = logits[sure], scores[sure]
        stable, boxes = [torch.ones(0, dtype=torch.bool)], [torch.zeros(0, 4)]
        for full in _full_size(logits, geometry):
            score = stability(full, rules.mask_threshold, rules.stability_score_offset)
            stable.append((score >= rules.stability_score_thresh) | (rules.stability_score_thresh == 0))
            boxes.append(mask_boxes(full > rules.mask_threshold))
        kept = torch.cat([part.to(self.device) for part in stable])
        return logits[kept], scores[kept], torch.cat([part.to(self.device) for part in boxes])[kept]


def _full_size(logits: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """Decoded logits [K, h, w] at the size of the picture, float32 [k, H, W], a few at a time.

    Two bilinear steps with the padding cut off in between, as the model was trained to be read.
    """
    height, width = geometry.picture
    chunk = max(1, CHUNK_PIXELS // max(height * width, geometry.square**2))
    for part in logits.split(chunk) if len(logits) else ():
        square = F.interpolate(part[:, None], (geometry.square, geometry.square), mode="bilinear")
        content = square[..., : geometry.content[0], : geometry.content[1]]
        yield F.interpolate(content, geometry.picture, mode="bilinear")[:, 0]


def point_grid(per_side: int, content: tuple[int, int]) -> Tensor:
    """Centres of per_side x per_side equal cells, float32 [per_side^2, 2] as (x, y) pixels, row by row."""
    steps = (np.arange(per_side) + 0.5) / per_side
    x, y = np.meshgrid(steps * content[1], steps * content[0])
    return torch.from_numpy(np.stack([x, y], axis=-1).reshape(-1, 2).astype(np.float32))


def stability(logits: Tensor, threshold: float, offset: float) -> Tensor:
    """IoU of each mask [K, H, W] cut at threshold + offset and at threshold - offset; NaN if both empty."""
    inner = (logits > threshold + offset).sum(dim=(-2, -1))
    outer = (logits > threshold - offset).sum(dim=(-2, -1))
    return inner / outer


def mask_boxes(masks: Tensor) -> Tensor:
    """Left, top, right, bottom (outermost pixels), float32 [K, 4], of bool masks [K, H, W]; 0 if empty."""

    def span(occupied: Tensor) -> tuple[Tensor, Tensor]:
        bits = occupied.to(torch.uint8)
        return bits.argmax(dim=-1), occupied.shape[-1] - 1 - bits.flip(-1).argmax(dim=-1)

    (left, right), (top, bottom) = span(masks.any(dim=-2)), span(masks.any(dim=-1))
    boxes = torch.stack([left, top, right, bottom], dim=-1).float()
    return boxes * masks.any(dim=-1).any(dim=-1)[:, None]


def box_nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes [K, 4] that no better kept one overlaps by an IoU above the threshold, best first.

    Sides are right - left, one pixel less than the masks', as in the official generator.
    """
    order = scores.argsort(descending=True, stable=True)
    ranked = boxes[order]
    area = (ranked[:, 2] - ranked[:, 0]) * (ranked[:, 3] - ranked[:, 1])
    corner = torch.maximum(ranked[:, None, :2], ranked[None, :, :2])
    sides = (torch.minimum(ranked[:, None, 2:], ranked[None, :, 2:]) - corner).clamp(min=0)
    shared = sides[..., 0] * sides[..., 1]
    # The loop runs on the CPU: on a GPU each of its thousands of steps would wait for the device.
    rivals = (shared / (area[:, None] + area - shared) > threshold).cpu().numpy()
    alive = np.ones(len(rivals), bool)
    for rank in range(len(rivals)):
        if alive[rank]:
            alive[rank + 1 :] &= ~rivals[rank, rank + 1 :]
    return order[torch.from_numpy(alive).to(order.device)]


def limit_side(image: np.ndarray, max_side: int) -> np.ndarray:
    """The picture uint8 [H, W, 3], made smaller by area averaging if its long side is above max_side.

    Sides are cut to whole pixels, and each pixel averages exactly the part of the picture it covers, shared
    pixels by their share (INTER_AREA of OpenCV, which the published labels were made with).
    """
    height, width = image.shape[:2]
    if max(height, width) <= max_side:
        return image
    scale = max_side / max(height, width)
    size = max(1, int(height * scale)), max(1, int(width * scale))
    channels = [_average(_average(image[..., c], size[0]).T, size[1]).T for c in range(3)]
    return (np.stack(channels, axis=-1) + 0.5).astype(np.uint8)


def _average(values: np.ndarray, size: int) -> np.ndarray:
    """Rows of [n, m] averaged into `size` equal strips: float64 [size, m]."""
    rows = len(values)
    cuts = np.arange(size + 1) * (rows / size)
    whole = np.minimum(cuts.astype(int), rows - 1)
    sums = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, axis=0, dtype=np.float64)])
    below = sums[whole] + (cuts - whole)[:, None] * values[whole]
    return np.diff(below, axis=0) * (size / rows)


def enlarge(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map [h, w] at [height, width], nearest pixel counted from the top left (INTER_NEAREST of OpenCV)."""
    if mask.shape == (height, width):
        return mask
    rows = (np.arange(height) * (1 / (height / mask.shape[0]))).astype(int)
    columns = (np.arange(width) * (1 / (width / mask.shape[1]))).astype(int)
    return mask[rows[:, None], columns[None, :]]
