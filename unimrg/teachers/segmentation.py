"""Region boundaries by SAM's automatic mask generator (arXiv 2304.02643, appendix B), with SAM or SAM 2.

A grid of points is put to the model, each answered with three masks; masks the model is sure of and whose
outline doesn't depend on the threshold are kept, duplicates go, and the outlines of the rest are drawn.
Defaults are the official generators': one crop (the picture), no removal of small regions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unimrg.errors import ConfigError, SampleError
from unimrg.teachers import weights
from unimrg.teachers.boundaries import tensor_boundaries
from unimrg.teachers.common import attempt, check_picture, in_batches, only_full_compiled
from unimrg.teachers.masks import box_nms, mask_boxes, stability
from unimrg.teachers.resize import enlarge, limit_side, upload
from unimrg.teachers.sam import Features, Geometry, load_sam

# Pixels of full-size float masks held at once: 128 MiB each for the mask and the step before it on a GPU, a
# few MiB on a CPU, for its caches.
CHUNK_PIXELS = {"cuda": 1 << 25, "cpu": 1 << 21}


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


class Candidates(NamedTuple):
    """Masks of one picture: logits [K, h, w] as decoded, predicted IoUs [K], boxes [K, 4] in its pixels."""

    logits: Tensor
    scores: Tensor
    boxes: Tensor


class SamBoundaries:
    """Pictures to region boundaries, uint8, 255 on 0; black where no mask is kept.

    checkpoint: a hub id such as facebook/sam-vit-huge or facebook/sam2.1-hiera-large, or a folder; its
    model_type says whether it is SAM or SAM 2. device: auto, cpu, cuda, cuda:<n>. dtype (of the image
    encoder; the small decoder stays in float32): auto (bfloat16 on a GPU, float32 elsewhere), float32,
    bfloat16, float16. pred_iou_thresh: None is the official generator's, 0.88 for SAM and 0.8 for SAM 2.
    points_per_batch (prompts decoded at once, of as many pictures as that takes) and images_per_batch
    (pictures encoded at once) change memory and rounding, not what is computed. compile: torch.compile for
    the encoder's layers and the decoder; None is: on a GPU. Only full batches run compiled. family: sam or
    sam2, where no other will do; None takes what the checkpoint holds.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        points_per_side: int = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float | None = None,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        mask_threshold: float = 0.0,
        max_side: int = 2048,
        images_per_batch: int = 4,
        compile: bool | None = None,
        family: str | None = None,
    ) -> None:
        for name, count in (("points_per_batch", points_per_batch), ("images_per_batch", images_per_batch)):
            if count < 1:
                raise ConfigError(f"segmentation {name} must be at least 1, found {count}")
        self.points_per_batch, self.images_per_batch = points_per_batch, images_per_batch
        self.device = weights.choose_device(device)
        folder = weights.find_folder(checkpoint, "segmentation")
        self.sam = load_sam(folder, self.device, weights.choose_dtype(dtype, self.device), family)
        self.rules = Rules(
            points_per_side=points_per_side,
            pred_iou_thresh=float(self.sam.pred_iou_thresh if pred_iou_thresh is None else pred_iou_thresh),
            stability_score_thresh=float(stability_score_thresh),
            stability_score_offset=float(stability_score_offset),
            box_nms_thresh=float(box_nms_thresh),
            mask_threshold=float(mask_threshold),
            max_side=max_side,
        )
        self.compiled = self.sam.compile(compile)
        self.identity = {
            "name": self.sam.name,
            "version": 2,
            "weights": weights.digest(folder),
            "settings": {
                "dtype": str(self.sam.dtype).removeprefix("torch."),
                **asdict(self.rules),
                "processor": self.sam.settings,
            },
        }

    def __call__(self, images: list[np.ndarray]) -> list[np.ndarray | SampleError]:
        """One map uint8 [H, W], or the reason why there is none, per picture uint8 [H, W, 3]."""
        results: list[np.ndarray | SampleError] = []
        faults = {index: attempt(partial(check_picture, image)) for index, image in enumerate(images)}
        good = [image for index, image in enumerate(images) if faults[index] is None]
        labels = iter(in_batches(self._label, good, self.images_per_batch))
        for index in range(len(images)):
            results.append(faults[index] or next(labels))
        return results

    @torch.inference_mode()
    def _label(self, images: list[np.ndarray]) -> list[np.ndarray]:
        pixels, geometries = zip(*(self._prepare(image) for image in images), strict=True)
        with only_full_compiled(self.compiled, len(images) == self.images_per_batch):
            features = self.sam.encode(torch.stack(pixels))
        if not torch.isfinite(features.image).all():
            raise ValueError("the image encoder gave values that are not finite")
        maps = []
        for candidates, geometry, image in zip(
            self._candidates(features, geometries), geometries, images, strict=True
        ):
            edges = self._outlines(candidates, geometry)
            maps.append(enlarge(edges, *image.shape[:2]).to(torch.uint8) * 255)
        return [label.cpu().numpy() for label in maps]

    def _prepare(self, image: np.ndarray) -> tuple[Tensor, Geometry]:
        return self.sam.prepare(limit_side(upload(image, self.device), self.rules.max_side))

    def _candidates(self, features: Features, geometries: tuple[Geometry, ...]) -> Iterator[Candidates]:
        """Per picture, all masks that pass both scores.

        The decoder's small logits are what is kept; full-size masks live for a chunk only. A grid larger than
        a pass is decoded picture by picture; of smaller ones several share a pass.
        """
        for start in range(0, len(geometries), self._together()):
            part = slice(start, start + self._together())
            found: list[list[Candidates]] = [[] for _ in geometries[part]]
            grids = torch.stack([self.sam.points(self.rules.points_per_side, g) for g in geometries[part]])
            for points in grids.split(self.points_per_batch, dim=1):
                passed = self._sure_and_stable(features.of(part), points, geometries[part])
                for kept, candidates in zip(found, passed, strict=True):
                    kept.append(candidates)
            for kept in found:
                yield Candidates(*(torch.cat(parts) for parts in zip(*kept, strict=True)))

    def _together(self) -> int:
        """How many pictures share a pass of the decoder."""
        return max(1, self.points_per_batch // self.rules.points_per_side**2)

    def _sure_and_stable(
        self, features: Features, points: Tensor, geometries: tuple[Geometry, ...]
    ) -> Iterator[Candidates]:
        """Of the masks that answer points [B, P, 2] of B pictures those above both thresholds, per picture.

        Only prompts with a mask that the model is sure of are drawn: the score is known before the mask is.
        As in the official code a threshold of 0 filters nothing.
        """
        pictures, prompts = points.shape[:2]
        full = pictures == self._together() and prompts in (
            self.points_per_batch,
            self.rules.points_per_side**2,
        )
        with only_full_compiled(self.compiled, full):
            answers = self.sam.answer(features, points)
        sure = answers.scores > self.rules.pred_iou_thresh
        if self.rules.pred_iou_thresh == 0:
            sure = torch.ones_like(sure)
        chosen = sure.any(dim=2).nonzero()
        picture, prompt = chosen.unbind(dim=1)
        drawn, wanted = self.sam.draw(features, answers, chosen), sure[picture, prompt]
        logits, scores = drawn[wanted], answers.scores[picture, prompt][wanted]
        counts = sure.sum(dim=(1, 2)).tolist()
        for some, rated, geometry in zip(logits.split(counts), scores.split(counts), geometries, strict=True):
            yield self._stable(some, rated, geometry)

    def _stable(self, logits: Tensor, scores: Tensor, geometry: Geometry) -> Candidates:
        """Of mask logits [K, h, w] of one picture those whose outline is stable at the picture's size."""
        rules = self.rules
        stable, boxes = [scores.new_ones(0, dtype=torch.bool)], [scores.new_zeros(0, 4)]
        for full in self._full_size(logits, geometry):
            score = stability(full, rules.mask_threshold, rules.stability_score_offset)
            stable.append((score >= rules.stability_score_thresh) | (rules.stability_score_thresh == 0))
            boxes.append(mask_boxes(full, rules.mask_threshold))
        kept = torch.cat(stable).nonzero()[:, 0]
        return Candidates(logits[kept], scores[kept], torch.cat(boxes)[kept])

    def _outlines(self, candidates: Candidates, geometry: Geometry) -> Tensor:
        """The boundaries of all masks that are left without duplicates, bool [H, W]."""
        kept = box_nms(candidates.boxes, candidates.scores, self.rules.box_nms_thresh)
        edges = torch.zeros(geometry.picture, dtype=torch.bool, device=self.device)
        for full in self._full_size(candidates.logits[kept], geometry):
            edges |= tensor_boundaries(full > self.rules.mask_threshold).any(dim=0)
        return edges

    def _full_size(self, logits: Tensor, geometry: Geometry) -> Iterator[Tensor]:
        """Logits [K, h, w] at the size of the picture, float32 [k, H, W], a few at a time."""
        height, width = geometry.picture
        pixels = max(height * width, self.sam.square**2)
        for part in logits.split(max(1, CHUNK_PIXELS[self.device.type] // pixels)) if len(logits) else ():
            yield self.sam.full_size(part, geometry)
