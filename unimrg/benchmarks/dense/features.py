"""Distances in what networks see: LPIPS of two pictures, FID of two sets.

No network comes with the package. LPIPS runs AlexNet from files that users fetch; FID takes features of any
network, and those by others than InceptionV3 don't compare with published numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unimrg.errors import CheckpointError
from unimrg.weights import load_strictly, read_state_dict

Network = Callable[[Tensor], Sequence[Tensor]]
"""Pictures [B, 3, H, W] in -1..1 to feature maps [B, C, h, w], from one layer after the other."""


# -- LPIPS ---------------------------------------------------------------------------------------------------


def lpips_layers(x: Sequence[Tensor], y: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """What every layer adds to the distance of pictures, [L, B]; their sum is LPIPS.

    Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric" (arXiv 1801.03924),
    equation 1. x, y: feature maps [B, C, h, w] of each layer; weights: [C] of each layer, 0 or more.
    """
    layers = []
    for a, b, weight in zip(x, y, weights, strict=True):
        apart = (_unit(a) - _unit(b)) ** 2
        layers.append((apart * weight[None, :, None, None]).sum(1).mean((1, 2)))
    return torch.stack(layers)


def _unit(features: Tensor) -> Tensor:
    """Of length 1 over the channels; 0 stays 0."""
    return features / (features.norm(dim=1, keepdim=True) + 1e-10)


class Lpips:
    """Distance of pictures, 0 for equal ones.

    network: gives as many layers as there are `weights`, [C] each.
    """

    def __init__(self, network: Network, weights: Sequence[Tensor]) -> None:
        self.network, self.weights = network, weights

    @classmethod
    def alex(cls, backbone: str | Path, heads: str | Path) -> Lpips:
        """With AlexNet. backbone: torchvision's `alexnet` weights; heads: the published `alex.pth`.

        Raises CheckpointError for files that are neither.
        """
        network = AlexNet()
        features = {k: v for k, v in read_state_dict(backbone).items() if k.startswith("features.")}
        load_strictly(network, features, str(backbone))
        return cls(network.eval(), _heads(read_state_dict(heads), str(heads)))

    @torch.inference_mode()
    def __call__(self, reference: np.ndarray, drawn: np.ndarray) -> float:
        """Of two uint8 pictures [H, W, 3] of one size."""
        pair = torch.from_numpy(np.stack([reference, drawn])).permute(0, 3, 1, 2).float() / 127.5 - 1
        x, y = zip(*(layer.chunk(2) for layer in self.network(pair)), strict=True)
        return float(lpips_layers(x, y, self.weights).sum())


class AlexNet(nn.Module):
    """AlexNet's convolutions by torchvision's names (Krizhevsky, arXiv 1404.5997), after every ReLU."""

    TAPS = (1, 4, 7, 9, 11)
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU()),
            *(nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU()),
        )
        # LPIPS' own constants: those of ImageNet for pictures in -1..1.
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        x, found = (pictures - self.mean) / self.std, []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.TAPS:
                found.append(x)
        return found


def _heads(state: Mapping[str, Tensor], source: str) -> list[Tensor]:
    names = [f"lin{number}.model.1.weight" for number in range(len(AlexNet.TAPS))]
    missing = [name for name in names if name not in state]
    if missing:
        raise CheckpointError(f"{source} lacks {missing[0]}; give the published heads of LPIPS, alex.pth")
    return [state[name].flatten() for name in names]


# -- FID -----------------------------------------------------------------------------------------------------


def fid(reference: np.ndarray, drawn: np.ndarray) -> float:
    """Fréchet distance of the normal distributions of two sets of features [N, D] and [M, D].

    Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium"
    (arXiv 1706.08500), equation 6, with covariances of samples. Small sets give large values.
    Raises ValueError for sets of fewer than two.
    """
    if min(len(reference), len(drawn)) < 2 or reference.shape[1:] != drawn.shape[1:]:
        raise ValueError(
            f"FID needs two sets of at least two features of one size, not {reference.shape}, {drawn.shape}"
        )
    means, roots, traces = [], [], []
    for features in (reference.astype(np.float64), drawn.astype(np.float64)):
        means.append(features.mean(0))
        covariance = np.atleast_2d(np.cov(features, rowvar=False))
        values, vectors = np.linalg.eigh(covariance)
        roots.append((vectors * np.sqrt(values.clip(min=0))) @ vectors.T)
        traces.append(np.trace(covariance))
    # The trace of the root of A B is the sum of the singular values of root(A) root(B); no complex numbers.
    shared = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    return float(((means[0] - means[1]) ** 2).sum() + traces[0] + traces[1] - 2 * shared)


class TransformersFeatures:
    """Pictures to features [N, D] by any vision model of transformers, such as CLIP's or DINOv2's encoder.

    folder: of its `save_pretrained`. The features are the pooled output, or the mean over the patches where
    there is none.
    """

    def __init__(self, folder: str | Path, device: torch.device) -> None:
        from transformers import AutoModel

        from unimrg.teachers.weights import load_model, load_processor, model_type

        folder = Path(folder)
        kind = model_type(folder, "features") or ""
        loaded: Any = load_model(AutoModel, folder, (kind,), "features")
        self.model = getattr(loaded, "vision_model", loaded).to(device)
        self.processor: Any = load_processor(folder, "features")
        self.device = device

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray], batch_size: int = 32) -> np.ndarray:
        """uint8 [H, W, 3] each."""
        found = []
        for start in range(0, len(pictures), batch_size):
            given = self.processor(images=list(pictures[start : start + batch_size]), return_tensors="pt")
            out = self.model(given["pixel_values"].to(self.device))
            pooled = getattr(out, "pooler_output", None)
            pooled = out.last_hidden_state.mean(1) if pooled is None else pooled
            found.append(pooled.float().cpu().numpy())
        return np.concatenate(found)
