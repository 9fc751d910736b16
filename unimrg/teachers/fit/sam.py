"""A small Segment Anything: its sizes, and the loss it is trained with (arXiv 2304.02643, appendix A).

Shape suffixes: B pictures, P prompts of a picture, K prompts on objects of all pictures, M masks of a prompt,
S side of a picture in pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unimrg.config import SamConfig
from unimrg.teachers.fit.scenes import SIDE, Scenes

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

# Of the mask generator, chosen on scenes that are neither trained on nor reported.
SETTINGS = SamConfig(
    points_per_side=7,
    points_per_batch=64,
    pred_iou_thresh=0.55,
    stability_score_thresh=0.6,
    box_nms_thresh=0.3,
)

SQUARE, PATCH, WIDTH = 120, 10, 64  # what the encoder sees, in pixels; width of the decoder
JUDGED = 64  # side at which masks are compared in training, pixels
POINTS = 8  # of a picture in a training step
OBJECTS = 0.75  # share of them that lie on objects
FOCAL = 20.0  # weight of the focal loss against the Dice loss
ALPHA, GAMMA = 0.25, 2.0  # of the focal loss (arXiv 1708.02002)


def make_model() -> PreTrainedModel:
    """0.8 million parameters, most of them in the encoder; masks are decoded at 48 pixels."""
    import transformers

    vision = transformers.SamVisionConfig(
        hidden_size=96,
        output_channels=WIDTH,
        num_hidden_layers=6,
        num_attention_heads=3,
        image_size=SQUARE,
        patch_size=PATCH,
        global_attn_indexes=list(range(6)),
        num_pos_feats=WIDTH // 2,
        mlp_ratio=3.0,
    )
    prompt = transformers.SamPromptEncoderConfig(
        hidden_size=WIDTH, image_size=SQUARE, patch_size=PATCH, mask_input_channels=8
    )
    decoder = transformers.SamMaskDecoderConfig(
        hidden_size=WIDTH, mlp_dim=128, num_attention_heads=2, iou_head_hidden_dim=WIDTH
    )
    model = transformers.SamModel(
        transformers.SamConfig(
            vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder
        )
    )
    # Random Fourier features stay as drawn, at the spread of the published models: neighbours look alike.
    waves = model.shared_image_embedding.positional_embedding.requires_grad_(False)
    with torch.no_grad():
        waves.normal_()
    return model


def make_processor() -> BaseImageProcessor:
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    mask = 4 * SQUARE // PATCH
    return SamImageProcessorPil(
        size={"longest_edge": SQUARE},
        pad_size={"height": SQUARE, "width": SQUARE},
        mask_size={"longest_edge": mask},
        mask_pad_size={"height": mask, "width": mask},
    )


def loss(model: PreTrainedModel, pixels_B3SS: Tensor, scenes: Scenes, rng: np.random.Generator) -> Tensor:
    """Focal and Dice loss of the best of three masks, and the squared error of the predicted IoUs.

    A point on no object has no mask: there the model learns to be sure of none.
    """
    points_BP2, ids_BP = draw_points(rng, scenes.ids)
    prompts = (torch.from_numpy(points_BP2) + 0.5) * (SQUARE / SIDE) - 0.5  # the model adds half a pixel
    answer = model(pixel_values=pixels_B3SS, input_points=prompts[:, :, None].float(), multimask_output=True)
    where, point = np.nonzero(ids_BP)
    exact_KSS = torch.from_numpy(scenes.ids[where] == ids_BP[where, point][:, None, None])
    truth_K1SS = F.avg_pool2d(exact_KSS[:, None].float(), SIDE // JUDGED)
    logits_KMSS = F.interpolate(answer.pred_masks[where, point], (JUDGED, JUDGED), mode="bilinear")
    best_K = mask_loss(logits_KMSS, truth_K1SS).min(dim=1).values
    overlap_BPM = torch.zeros_like(answer.iou_scores)
    overlap_BPM[where, point] = iou(logits_KMSS.detach() > 0, truth_K1SS > 0.5)
    return best_K.mean() + F.mse_loss(answer.iou_scores, overlap_BPM)


def draw_points(rng: np.random.Generator, ids_BSS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points as (x, y) pixels, int64 [B, P, 2], and the instances they lie on, uint8 [B, P], 0 = none.

    Every object of a picture is as likely as the others, however small.
    """
    points = np.zeros((len(ids_BSS), POINTS, 2), np.int64)
    for ids_SS, row in zip(ids_BSS, points, strict=True):
        objects = np.unique(ids_SS[ids_SS > 0])
        for k in range(POINTS):
            wanted = rng.choice(objects) if k < OBJECTS * POINTS else 0
            y, x = np.divmod(rng.choice(np.flatnonzero(ids_SS == wanted)), ids_SS.shape[1])
            row[k] = x, y
    return points, np.take_along_axis(
        ids_BSS.reshape(len(ids_BSS), -1), points[..., 1] * ids_BSS.shape[2] + points[..., 0], axis=1
    )


def mask_loss(logits_KMSS: Tensor, truth_K1SS: Tensor) -> Tensor:
    """Focal loss, weighed, plus Dice loss of each mask against its truth (0..1): [K, M]."""
    truth = truth_K1SS.expand_as(logits_KMSS)
    sure = logits_KMSS.sigmoid()
    surprise = F.binary_cross_entropy_with_logits(logits_KMSS, truth, reduction="none")
    focal = (ALPHA * truth + (1 - ALPHA) * (1 - truth)) * (sure - truth).abs() ** GAMMA * surprise
    shared = (sure * truth).sum(dim=(2, 3))
    dice = 1 - (2 * shared + 1) / (sure.sum(dim=(2, 3)) + truth.sum(dim=(2, 3)) + 1)
    return FOCAL * focal.mean(dim=(2, 3)) + dice


def iou(masks_KMSS: Tensor, truth_K1SS: Tensor) -> Tensor:
    """Intersection over union of bool masks, [K, M]; 0 where both are empty."""
    shared = (masks_KMSS & truth_K1SS).sum(dim=(2, 3))
    either = (masks_KMSS | truth_K1SS).sum(dim=(2, 3))
    return shared / either.clamp(min=1)
