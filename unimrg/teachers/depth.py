"""Depth maps by Depth Anything V2 (arXiv 2406.09414), any published size, through transformers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unimrg.errors import CheckpointError, ConfigError, SampleError
from unimrg.teachers import weights
from unimrg.teachers.common import (
    attempt,
    check_picture,
    compile_layers,
    in_batches,
    only_full_compiled,
    stretch_tensor,
)
from unimrg.teachers.resize import normalise, resize, upload

# Metric checkpoints end in a sigmoid times `max_depth`; nearer than this part of it counts as touching.
NEAREST = 1e-3

# Pictures of these aspects, either way round, are most of what cameras and the web give: worth compiling for.
COMMON_ASPECTS = ((1, 1), (4, 3), (3, 2), (16, 9))

# A map uint8 [H, W] on the device, and whether (bool []) all was finite that it was made of.
Label = tuple[Tensor, Tensor]


class DepthAnything:
    """Pictures to relative inverse depth, uint8, stretched to 0..255 per picture, bright = near.

    checkpoint: a hub id such as depth-anything/Depth-Anything-V2-Large-hf, or a folder. Metric checkpoints
    (metres, larger = farther) are inverted. device: auto, cpu, cuda, cuda:<n>. dtype: auto (bfloat16 on a
    GPU, float32 elsewhere), float32, bfloat16, float16. batch_size: pictures of the processor's square size
    in one pass; larger pictures make it fewer. compile: torch.compile for the encoder's layers; None is: on a
    GPU. Only full batches of common aspects run compiled.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 8,
        compile: bool | None = None,
    ) -> None:
        from transformers import AutoModelForDepthEstimation

        if batch_size < 1:
            raise ConfigError(f"depth batch_size must be at least 1, found {batch_size}")
        self.device = weights.choose_device(device)
        self.dtype = weights.choose_dtype(dtype, self.device)
        self.batch_size = batch_size
        folder = weights.find_folder(checkpoint, "depth")
        model: Any = weights.load_model(AutoModelForDepthEstimation, folder, ("depth_anything",), "depth")
        self.settings = _settings(folder)
        self.metric = model.config.depth_estimation_type == "metric"
        self.nearest = NEAREST * (model.config.max_depth or 1)
        self.model = model.to(device=self.device, dtype=self.dtype)
        # Half precision has no more steps than the map has grey levels: the last, cheap layers stay exact.
        self.model.head.float().register_forward_pre_hook(_widen)
        self.compiled = compile_layers(model.backbone.encoder.layer, compile, self.device)
        self.common = {
            self._size(*scaled) for a, b in COMMON_ASPECTS for scaled in ((99 * a, 99 * b), (99 * b, 99 * a))
        }
        self.identity = {
            "name": "depth-anything",
            "version": 2,
            "weights": weights.digest(folder),
            "settings": {
                "dtype": str(self.dtype).removeprefix("torch."),
                "metric": self.metric,
                "processor": self.settings,
            },
        }

    def __call__(self, images: list[np.ndarray]) -> list[np.ndarray | SampleError]:
        """One map uint8 [H, W], or the reason why there is none, per picture uint8 [H, W, 3].

        Pictures that the model sees at one size share a pass; exactly one, as padding would change the depth.
        """
        results: dict[int, Label | SampleError] = {}
        groups: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            size = attempt(partial(self._checked_size, image))
            if isinstance(size, SampleError):
                results[index] = size
            else:
                groups.setdefault(size, []).append(index)
        for size, indices in groups.items():
            label = partial(self._label, size)
            found = in_batches(label, [images[index] for index in indices], self._batch(size))
            results.update(zip(indices, found, strict=True))
        return _fetch([results[index] for index in range(len(images))])

    def _checked_size(self, image: Any) -> tuple[int, int]:
        check_picture(image)
        return self._size(*image.shape[:2])

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """The (h, w) at which the model sees a picture: multiples of the patch, as the processor has it."""
        target, multiple = self.settings["size"], self.settings["ensure_multiple_of"]
        scales = target["height"] / height, target["width"] / width
        if self.settings.get("keep_aspect_ratio"):
            # The scale nearer to 1 goes for both: the short side fits, the long one stays longer.
            scales = (min(scales, key=lambda scale: abs(1 - scale)),) * 2
        return round(scales[0] * height / multiple) * multiple, round(scales[1] * width / multiple) * multiple

    def _batch(self, size: tuple[int, int]) -> int:
        """How many pictures of (h, w) go through the model at once in the memory of `batch_size` squares."""
        square = self.settings["size"]
        return max(1, self.batch_size * square["height"] * square["width"] // max(1, size[0] * size[1]))

    @torch.inference_mode()
    def _label(self, size: tuple[int, int], images: list[np.ndarray]) -> list[Label]:
        """Labels, on the device, of pictures that the model sees at one size; the host doesn't wait."""
        pixels = [self._pixels(image, size) for image in images]
        batch = torch.stack(pixels).to(self.dtype)
        with only_full_compiled(self.compiled, size in self.common and len(images) == self._batch(size)):
            predicted = self.model(pixel_values=batch).predicted_depth.float()
        return [self._render(depth, image.shape[:2]) for depth, image in zip(predicted, images, strict=True)]

    def _pixels(self, image: np.ndarray, size: tuple[int, int]) -> Tensor:
        """Normalised pixels, float32 [3, h, w]."""
        return normalise(resize(upload(image, self.device), size, self.settings["resample"]), self.settings)

    def _render(self, depth: Tensor, size: tuple[int, ...]) -> Label:
        """A prediction [h, w] as uint8 of `size` (H, W): bicubic as transformers' own post-processing."""
        full = F.interpolate(depth[None, None], size=tuple(size), mode="bicubic", align_corners=False)[0, 0]
        if self.metric:
            full = 1 / full.clamp(min=self.nearest)
        return stretch_tensor(full), full.isfinite().all()


def _settings(folder: Path) -> dict[str, Any]:
    """What the checkpoint's image processor does to a picture; only that of DPT is known here."""
    processor = weights.load_processor(folder, "depth")
    settings = weights.processor_settings(processor)
    if not type(processor).__name__.startswith("DPTImageProcessor") or settings.get("do_pad"):
        raise CheckpointError(
            f"depth checkpoint {folder}: its image processor is no DPTImageProcessor without padding; "
            "put the published preprocessor_config.json beside the weights"
        )
    return settings


def _fetch(results: list[Label | SampleError]) -> list[np.ndarray | SampleError]:
    """The maps on the host, where they hold finite numbers only; waits for the device once."""
    labels = [result for result in results if not isinstance(result, SampleError)]
    finite = iter(torch.stack([sound for _, sound in labels]).tolist() if labels else [])
    maps = [label.to("cpu", non_blocking=True) for label, _ in labels]
    if maps and labels[0][0].is_cuda:
        torch.cuda.synchronize(labels[0][0].device)
    fetched = iter(maps)
    broken = SampleError("teacher-failed", "the depth model gave values that are not finite")

    def one(result: Label | SampleError) -> np.ndarray | SampleError:
        if isinstance(result, SampleError):
            return result
        found = next(fetched).numpy()
        return found if next(finite) else broken

    return [one(result) for result in results]


def _widen(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Feature maps of the neck in float32; the other arguments as they are."""
    return ([features.float() for features in inputs[0]], *inputs[1:])
