"""GenEval's eyes through transformers: Mask2Former finds objects, CLIP names their colours.

The official choice is Mask2Former with Swin-S trained on COCO's instances (arXiv 2112.01527), and CLIP
ViT-L/14 of OpenAI (arXiv 2103.00020). None comes with the package: name folders, URLs or places on the hub,
such as `facebook/mask2former-swin-small-coco-instance` and `openai/clip-vit-large-patch14`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from unimrg.benchmarks.generation.files import load_tokenizer
from unimrg.benchmarks.generation.geneval import COLORS
from unimrg.benchmarks.generation.geneval_files import Found
from unimrg.errors import CheckpointError
from unimrg.teachers.weights import load_model, load_processor
from unimrg.weights import fetch

if TYPE_CHECKING:
    from unimrg.storage import S3Config

OBJECTS = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"),
    *("traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse"),
    *("sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie"),
    *("suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove"),
    *("skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon"),
    *("bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut"),
    *("cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop"),
    *("computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster"),
    *("sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
"""COCO's classes in its order, three of them by the names that GenEval's prompts use."""

RENAMED = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
MOST_QUERIES = 100
BACKGROUND = 0x99
TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)


def load_eyes(
    detector: str, clip: str, s3: S3Config, device: torch.device
) -> tuple[ObjectDetector, ColorClassifier]:
    """Both models, from wherever the user's weights lie. Raises CheckpointError or StorageError."""
    return (
        ObjectDetector(fetch("detector", detector, s3), device),
        ColorClassifier(fetch("clip", clip, s3), device),
    )


class ObjectDetector:
    """Objects by class, with boxes, scores and masks.

    The scores are those of the official detector's inference: probability of the class times the mean
    probability inside the mask, for the 100 likeliest pairs of query and class. A box ends one pixel behind
    its mask.
    """

    def __init__(self, folder: Any, device: torch.device) -> None:
        from transformers import Mask2FormerForUniversalSegmentation

        self.model: Any = load_model(
            Mask2FormerForUniversalSegmentation, folder, ("mask2former",), "detector"
        ).to(device)
        self.processor: Any = load_processor(folder, "detector")
        self.device = device
        labels = self.model.config.id2label
        named = [RENAMED.get(str(labels[k]), str(labels[k])) for k in sorted(labels, key=int)]
        if tuple(named) != OBJECTS:
            wrong = next((n for n, o in zip(named, OBJECTS, strict=False) if n != o), f"{len(named)} classes")
            raise CheckpointError(
                f"detector {folder}: its classes aren't COCO's 80 in their order ({wrong}); "
                "give a Mask2Former trained on COCO's instances"
            )

    @torch.inference_mode()
    def __call__(self, picture: np.ndarray) -> dict[str, list[Found]]:
        """uint8 [H, W, 3] to what it shows, the likeliest first."""
        given = self.processor(images=Image.fromarray(picture), return_tensors="pt")
        out = self.model(given["pixel_values"].to(self.device), given["pixel_mask"].to(self.device))
        shares = out.class_queries_logits[0].float().softmax(-1)[:, :-1]
        top = shares.flatten().topk(min(MOST_QUERIES, shares.numel()))
        queries, classes = top.indices // shares.shape[1], top.indices % shares.shape[1]
        used = given["pixel_mask"][0].sum(0).max(), given["pixel_mask"][0].sum(1).max()
        logits = out.masks_queries_logits[0].float()[queries]
        logits = _to_picture(logits, given["pixel_values"].shape[-2:], used, picture.shape[:2])
        masks = logits > 0
        inside = (logits.sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
        scores, named = (top.values * inside).tolist(), classes.tolist()
        found: dict[str, list[Found]] = {}
        for number, mask in enumerate(masks.cpu().numpy()):
            if mask.any():
                one = Found((*box_of(mask), scores[number]), mask)
                found.setdefault(OBJECTS[named[number]], []).append(one)
        return found


def _to_picture(logits: Tensor, padded: Any, used: Any, size: tuple[int, ...]) -> Tensor:
    """Mask logits [N, h, w] over a padded input to the picture's size, [N, H, W]."""
    whole = interpolate(logits[None], size=tuple(padded), mode="bilinear", align_corners=False)
    part = whole[..., : int(used[0]), : int(used[1])]
    return interpolate(part, size=size, mode="bilinear", align_corners=False)[0]


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 around a mask that isn't empty; the ends lie one pixel behind it."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


class ColorClassifier:
    """The colour of an object, zero-shot among `COLORS`: its own pixels on grey, cut to its box."""

    def __init__(self, folder: Any, device: torch.device) -> None:
        from transformers import CLIPModel

        self.model: Any = load_model(CLIPModel, folder, ("clip",), "clip").to(device)
        self.processor: Any = load_processor(folder, "clip")
        self.device = device
        self.tokenizer = load_tokenizer(folder, self.model.config.text_config.vocab_size, "clip")
        self.known: dict[str, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, picture: np.ndarray, name: str, objects: Sequence[Found]) -> list[str]:
        """One colour per object of class `name`."""
        if not objects:
            return []
        crops = [cut_out(picture, one) for one in objects]
        pixels = self.processor(images=crops, return_tensors="pt")["pixel_values"].to(self.device)
        seen = normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        return [COLORS[number] for number in (seen @ self.weights(name).T).argmax(1).tolist()]

    def weights(self, name: str) -> Tensor:
        """[colours, D]: the mean of the three templates' texts for each colour, of length 1."""
        if name not in self.known:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
            told = self.model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
            means = normalize(told, dim=-1).unflatten(0, (len(COLORS), len(TEMPLATES))).mean(1)
            self.known[name] = normalize(means, dim=-1)
        return self.known[name]


def cut_out(picture: np.ndarray, found: Found) -> Image.Image:
    """The object alone on grey, cut to its box."""
    alone = np.where(found.mask[..., None], picture, np.uint8(BACKGROUND))
    left, top, right, bottom = (round(end) for end in found.box[:4])
    return Image.fromarray(np.ascontiguousarray(alone[top:bottom, left:right]))
