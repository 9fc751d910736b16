"""SAM (arXiv 2304.02643) and SAM 2 (arXiv 2408.00714) of transformers, run for many point prompts at once.

The library's decoder repeats the picture for every prompt and draws three masks for each. Here the first of
its blocks reads a picture once for all prompts, and only prompts whose masks are wanted are drawn; weights,
formulas and, to rounding, numbers are the library's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimrg.errors import CheckpointError
from unimrg.teachers import weights
from unimrg.teachers.common import COMPILATION, compile_layers
from unimrg.teachers.resize import normalise, resize, upload


@dataclass(frozen=True)
class Geometry:
    """Sides in pixels. content: (h, w) of the picture in the encoder's square; picture: (H, W)."""

    content: tuple[int, int]
    picture: tuple[int, int]


@dataclass(frozen=True)
class Features:
    """What the encoder sees in B pictures, float32: image [B, C, h, w]; SAM 2's larger maps, finest first."""

    image: Tensor
    fine: tuple[Tensor, ...] = ()

    def of(self, pictures: slice) -> Features:
        return Features(self.image[pictures], tuple(level[pictures] for level in self.fine))


@dataclass(frozen=True)
class Answers:
    """What the decoder makes of P prompts for each of B pictures.

    scores: predicted IoU of the three masks [B, P, 3]. Masks are drawn of the others: tokens [B, P, 3, C] and
    the picture as a prompt sees it, seen [B, P, h * w, C].
    """

    scores: Tensor
    tokens: Tensor
    seen: Tensor


class Sam:
    """SAM: a picture's long side fills the encoder's square, the rest is padding."""

    name = "sam-boundaries"
    types: tuple[str, ...] = ("sam",)
    pred_iou_thresh = 0.88
    leading_tokens = 0  # before the token of the predicted IoU

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.model: Any = weights.load_model(self._model_class(), folder, self.types, "segmentation").to(
            device
        )
        # Half precision would move the points by pixels and fray the outlines; the encoder is the dear part.
        self.model.vision_encoder.to(dtype)
        self.settings = self._read_settings(folder)
        self._transform = self._read_picture
        self.square = int(self.model.prompt_encoder.input_image_size)
        self.position = self.model.get_image_wide_positional_embeddings().flatten(2).transpose(1, 2)[:, None]
        fed = self._fed()
        if fed != self.square:
            raise CheckpointError(
                f"segmentation checkpoint {folder}: the image processor gives {fed} pixels, the model sees "
                f"{self.square}; put the published preprocessor_config.json beside the weights"
            )

    @staticmethod
    def _model_class() -> Any:
        from transformers import SamModel

        return SamModel

    @staticmethod
    def _read_settings(folder: Path) -> dict[str, Any]:
        return weights.processor_settings(weights.load_processor(folder, "segmentation"))

    def _fed(self) -> Any:
        """The side of the square that pictures are brought to."""
        return self.settings.get("pad_size", {}).get("height")

    def layers(self) -> nn.ModuleList:
        """The encoder's blocks."""
        found: nn.ModuleList = self.model.vision_encoder.layers
        return found

    def compile(self, wanted: bool | None) -> bool:
        """Compiles the encoder's layers and the decoder's transformer if wanted (None: on a GPU); did it?"""
        compiled = compile_layers(self.layers(), wanted, self.device)
        if compiled:
            self._transform = torch.compile(self._read_picture, **COMPILATION)
        return compiled

    def content(self, height: int, width: int) -> tuple[int, int]:
        """Sides of a picture when its long side is the square's, rounded."""
        scale = self.settings["size"]["longest_edge"] / max(height, width)
        return int(height * scale + 0.5), int(width * scale + 0.5)

    def prepare(self, picture: Tensor) -> tuple[Tensor, Geometry]:
        """uint8 [H, W, 3] as normalised pixels float32 [3, square, square], padded at right and bottom."""
        size = int(picture.shape[0]), int(picture.shape[1])
        content = self.content(*size)
        pixels = normalise(resize(picture, content, self.settings["resample"]), self.settings)
        padding = (0, self.square - content[1], 0, self.square - content[0])
        return F.pad(pixels, padding), Geometry(content, size)

    def encode(self, pixels: Tensor) -> Features:
        """Features of pixels [B, 3, square, square]: the one pass of the large encoder."""
        return Features(self.model.vision_encoder(pixels.to(self.dtype)).last_hidden_state.float())

    def full_size(self, logits: Tensor, geometry: Geometry) -> Tensor:
        """Decoded logits [K, h, w] at the size of the picture, float32 [K, H, W].

        Two bilinear steps with the padding cut off in between, as the model was trained to be read.
        """
        square = F.interpolate(logits[:, None], (self.square, self.square), mode="bilinear")
        content = square[..., : geometry.content[0], : geometry.content[1]]
        return F.interpolate(content, geometry.picture, mode="bilinear")[:, 0]

    def points(self, per_side: int, geometry: Geometry) -> Tensor:
        """The grid of prompts, float32 [per_side^2, 2], in pixels of the encoder's square."""
        return upload(point_grid(per_side, geometry.content), self.device)

    def answer(self, features: Features, points: Tensor) -> Answers:
        """The decoder's answers to points [B, P, 2], each a prompt of its own, of B pictures."""
        with _tensor_cores(self.dtype != torch.float32 and self.device.type == "cuda"):
            decoder = self.model.mask_decoder
            prompts, dense = self.model.prompt_encoder(
                input_points=points[:, :, None],
                input_labels=torch.ones(points.shape[:2], dtype=torch.int, device=points.device)[..., None],
                input_boxes=None,
                input_masks=None,
            )
            own = self._own_tokens(decoder).expand(*points.shape[:2], -1, -1)
            image = (features.image + dense).flatten(2).transpose(1, 2)[:, None]
            tokens, seen = self._transform(torch.cat([own, prompts], dim=2), image)
            first = self.leading_tokens
            scores = decoder.iou_prediction_head(tokens[:, :, first])[..., 1:]
            # The first mask token is for single answers; the others answer part, object and whole.
            return Answers(scores, tokens[:, :, first + 2 : first + 1 + decoder.num_mask_tokens], seen)

    def _own_tokens(self, decoder: Any) -> Tensor:
        return torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])

    def _read_picture(self, tokens: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """The two-way transformer: tokens [B, P, n, C], pictures [B, 1, T, C] to tokens and [B, P, T, C]."""
        transformer = self.model.mask_decoder.transformer
        queries, seen = tokens, image
        for block in transformer.layers:
            queries, seen = self._block(block, tokens, queries, seen)
        read, _ = transformer.final_attn_token_to_image(
            query=queries + tokens, key=seen + self.position, value=seen
        )
        return transformer.layer_norm_final_attn(queries + read), seen

    def _block(self, block: Any, tokens: Tensor, queries: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """One two-way block; where all prompts still see one picture, [B, 1, T, C], it is projected once."""
        placed = image + self.position
        asked = queries if block.skip_first_layer_pe else queries + tokens
        read, _ = block.self_attn(query=asked, key=asked, value=queries)
        queries = block.layer_norm1(read if block.skip_first_layer_pe else queries + read)
        asked = queries + tokens
        if image.shape[1] == 1:
            asked = asked.flatten(1, 2)[:, None]  # tokens don't see each other here: they may be one long row
        read, _ = block.cross_attn_token_to_image(query=asked, key=placed, value=image)
        queries = block.layer_norm2(queries + read.reshape(queries.shape))
        queries = block.layer_norm3(queries + block.mlp(queries))
        read = self._read_tokens(block.cross_attn_image_to_token, placed, queries + tokens, queries)
        return queries, block.layer_norm4(image + read)

    def _read_tokens(self, attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of many places [B, 1 or P, T, C] to few tokens [B, P, n, C], as [B, P, T, C].

        The scores lie with the places last: library kernels run along the tokens, far slower on a CPU.
        """
        heads = attention.num_attention_heads
        query, key, value = (
            project(states).unflatten(-1, (heads, -1)).transpose(-3, -2)
            for project, states in zip(
                (attention.q_proj, attention.k_proj, attention.v_proj), (query, key, value), strict=True
            )
        )
        scores = (key * key.shape[-1] ** -0.5) @ query.transpose(-2, -1)
        read = scores.softmax(dim=-2).transpose(-2, -1) @ value
        return self._project_out(attention, read.transpose(-3, -2).flatten(-2))

    @staticmethod
    def _project_out(attention: Any, states: Tensor) -> Tensor:
        projected: Tensor = attention.out_proj(states)
        return projected

    def draw(self, features: Features, answers: Answers, chosen: Tensor) -> Tensor:
        """Mask logits [N, 3, h, w] of chosen prompts, int [N, 2] as (picture, prompt)."""
        with _tensor_cores(self.dtype != torch.float32 and self.device.type == "cuda"):
            decoder = self.model.mask_decoder
            picture, prompt = chosen.unbind(dim=1)
            seen = answers.seen[picture, prompt].transpose(1, 2).unflatten(2, features.image.shape[-2:])
            drawn = self._upscale(decoder, seen, tuple(level[picture] for level in features.fine))
            tokens = answers.tokens[picture, prompt].unbind(dim=1)
            filters = [
                mlp(token) for mlp, token in zip(decoder.output_hypernetworks_mlps[1:], tokens, strict=True)
            ]
            return (torch.stack(filters, dim=1) @ drawn.flatten(2)).unflatten(2, drawn.shape[-2:])

    def _upscale(self, decoder: Any, seen: Tensor, fine: tuple[Tensor, ...]) -> Tensor:
        """The picture as seen [N, C, h, w] at four times the size, [N, C / 8, 4h, 4w]."""
        half: Tensor = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(seen)))
        full: Tensor = decoder.activation(decoder.upscale_conv2(half))
        return full


class Sam2(Sam):
    """SAM 2 (and 2.1), its image part: a picture is stretched to the square, masks are read in one step."""

    name = "sam2-boundaries"
    types = (
        "sam2",
        "sam2_video",
    )  # the published checkpoints are of the video model, which holds the image model
    pred_iou_thresh = 0.8
    leading_tokens = 1  # is there an object at all

    @staticmethod
    def _model_class() -> Any:
        from transformers import Sam2Model

        return Sam2Model

    @staticmethod
    def _read_settings(folder: Path) -> dict[str, Any]:
        # The library's own processor class can't be loaded without torchvision; its settings can be read.
        return SAM2_SETTINGS | weights.stored_settings(folder, "segmentation")

    def _fed(self) -> Any:
        size = self.settings["size"]
        return size.get("height") if size.get("height") == size.get("width") else size

    def layers(self) -> nn.ModuleList:
        found: nn.ModuleList = self.model.vision_encoder.backbone.blocks
        return found

    def content(self, height: int, width: int) -> tuple[int, int]:
        return self.square, self.square

    def encode(self, pixels: Tensor) -> Features:
        levels = [
            level.float() for level in self.model.vision_encoder(pixels.to(self.dtype)).fpn_hidden_states
        ]
        decoder = self.model.mask_decoder
        image = levels[-1] + self.model.no_memory_embedding.view(1, -1, 1, 1)
        return Features(image, (decoder.conv_s0(levels[0]), decoder.conv_s1(levels[1])))

    def full_size(self, logits: Tensor, geometry: Geometry) -> Tensor:
        return F.interpolate(logits[:, None], geometry.picture, mode="bilinear")[:, 0]

    def _own_tokens(self, decoder: Any) -> Tensor:
        return torch.cat([decoder.obj_score_token.weight, super()._own_tokens(decoder)])

    @staticmethod
    def _project_out(attention: Any, states: Tensor) -> Tensor:
        projected: Tensor = attention.o_proj(states)
        return projected

    def _upscale(self, decoder: Any, seen: Tensor, fine: tuple[Tensor, ...]) -> Tensor:
        half: Tensor = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(seen) + fine[1]))
        full: Tensor = decoder.activation(decoder.upscale_conv2(half) + fine[0])
        return full


# What a SAM 2 processor does where its file leaves it open.
SAM2_SETTINGS: dict[str, Any] = {
    "size": {"height": 1024, "width": 1024},
    "resample": 2,
    "rescale_factor": 1 / 255,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def load_sam(folder: Path, device: torch.device, dtype: torch.dtype, family: str | None = None) -> Sam:
    """SAM or SAM 2: what the folder holds, or of `family` (sam, sam2) and nothing else.

    Raises CheckpointError for another model.
    """
    holds_sam2 = weights.model_type(folder, "segmentation") in Sam2.types
    kind = Sam2 if family == "sam2" or (family is None and holds_sam2) else Sam
    return kind(folder, device, dtype)


@lru_cache(maxsize=64)
def point_grid(per_side: int, content: tuple[int, int]) -> np.ndarray:
    """Centres of per_side x per_side equal cells, float32 [per_side^2, 2] as (x, y) pixels, row by row."""
    steps = (np.arange(per_side) + 0.5) / per_side
    x, y = np.meshgrid(steps * content[1], steps * content[0])
    return np.stack([x, y], axis=-1).reshape(-1, 2).astype(np.float32)


@contextmanager
def _tensor_cores(wanted: bool) -> Iterator[None]:
    """float32 products in TF32 (10 bits after the point, sums in float32): the encoder is halved anyway."""
    before = torch.get_float32_matmul_precision()
    if wanted:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        if wanted:
            torch.set_float32_matmul_precision(before)
