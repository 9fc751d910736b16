"""Depth maps by Depth Anything V2 (arXiv 2406.09414), any published size, through transformers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unimrg.errors import ConfigError, SampleError
from unimrg.teachers import weights
from unimrg.teachers.common import attempt, check_picture, stretch

# Metric checkpoints end in a sigmoid times `max_depth`; nearer than this part of it counts as touching.
NEAREST = 1e-3


class DepthAnything:
    """Pictures to relative inverse depth, uint8, stretched to 0..255 per picture, bright = near.

    checkpoint: a hub id such as depth-anything/Depth-Anything-V2-Large-hf, or a folder. Metric checkpoints
    (metres, larger = farther) are inverted. device: auto, cpu, cuda, cuda:<n>. dtype: auto (bfloat16 on a
    GPU, float32 elsewhere), float32, bfloat16, float16. batch_size: pictures of the processor's square size
    in one pass; larger pictures make it fewer.
    """

    def __init__(
        self, checkpoint: str | Path, device: str = "auto", dtype: str = "auto", batch_size: int = 8
    ) -> None:
        from transformers import AutoModelForDepthEstimation

        if batch_size < 1:
            raise ConfigError(f"depth batch_size must be at least 1, found {batch_size}")
        self.device = weights.choose_device(device)
        self.dtype = weights.choose_dtype(dtype, self.device)
        self.batch_size = batch_size
        folder = weights.find_folder(checkpoint, "depth")
        self.processor = weights.load_processor(folder, "depth")
        model = weights.load_model(AutoModelForDepthEstimation, folder, "depth_anything", "depth")
        self.metric = model.config.depth_estimation_type == "metric"
        self.nearest = NEAREST * (model.config.max_depth or 1)
        self.model = model.to(device=self.device, dtype=self.dtype)
        # Half precision has no more steps than the map has grey levels: the last, cheap layers stay exact.
        self.model.head.float().register_forward_pre_hook(_widen)
        self.identity = {
            "name": "depth-anything",
            "version": 1,
            "weights": weights.digest(folder),
            "settings": {
                "dtype": str(self.dtype).removeprefix("torch."),
                "metric": self.metric,
                "processor": weights.processor_settings(self.processor),
            },
        }

    def __call__(self, images: list[np.ndarray]) -> list[np.ndarray | SampleError]:
        """One map uint8 [H, W], or the reason why there is none, per picture uint8 [H, W, 3]."""
        results: dict[int, np.ndarray | SampleError] = {}
        groups: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        for index, image in enumerate(images):
            pixels = attempt(partial(self._pixels, image))
            if isinstance(pixels, SampleError):
                results[index] = pixels
            else:
                groups.setdefault(tuple(pixels.shape), []).append((index, pixels))
        for shape, group in groups.items():
            step = self._batch(shape)
            for start in range(0, len(group), step):
                indices, batch = zip(*group[start : start + step], strict=True)
                sizes = [images[index].shape[:2] for index in indices]
                results.update(zip(indices, self._label(list(batch), sizes), strict=True))
        return [results[index] for index in range(len(images))]

    def _pixels(self, image: np.ndarray) -> Tensor:
        """Normalised pixels, float [3, h, w], both sides multiples of the patch."""
        check_picture(image)
        # A picture three pixels high must not be taken for one that has its channels first.
        inputs = self.processor(images=[image], return_tensors="pt", input_data_format="channels_last")
        return inputs["pixel_values"][0]

    def _batch(self, shape: tuple[int, ...]) -> int:
        """How many pictures [3, h, w] go through the model at once in the memory of `batch_size` squares."""
        side = self.processor.size
        return max(1, self.batch_size * side["height"] * side["width"] // (shape[1] * shape[2]))

    def _label(self, pixels: list[Tensor], sizes: list[tuple[int, ...]]) -> list[np.ndarray | SampleError]:
        """Maps for pixels of one shape; if the batch fails, each on its own, so that one culprit is found."""
        found = attempt(lambda: self._forward(pixels, sizes))
        if not isinstance(found, SampleError):
            return found
        if len(pixels) == 1:
            return [found]
        return [self._label([one], [size])[0] for one, size in zip(pixels, sizes, strict=True)]

    @torch.inference_mode()
    def _forward(self, pixels: list[Tensor], sizes: list[tuple[int, ...]]) -> list[np.ndarray | SampleError]:
        batch = torch.stack(pixels).to(device=self.device, dtype=self.dtype)
        predicted = self.model(pixel_values=batch).predicted_depth.float()
        return [self._render(depth, size) for depth, size in zip(predicted, sizes, strict=True)]

    def _render(self, depth: Tensor, size: tuple[int, ...]) -> np.ndarray | SampleError:
        """A prediction [h, w] as uint8 of `size` (H, W): bicubic as transformers' own post-processing."""
        full = F.interpolate(depth[None, None], size=tuple(size), mode="bicubic", align_corners=False)[0, 0]
        if self.metric:
            full = 1 / full.clamp(min=self.nearest)
        values: np.ndarray = full.cpu().numpy()
        if not np.isfinite(values).all():
            return SampleError("teacher-failed", "the depth model gave values that are not finite")
        return stretch(values)


def _widen(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Feature maps of the neck in float32; the other arguments as they are."""
    return ([features.float() for features in inputs[0]], *inputs[1:])
