"""Trains the tiny variant's autoencoder on procedural scenes, photographs and patterns.

    python -m unimrg.families.harmon.pretrain_vae --out tiny_vae.safetensors

made the weights in `assets/` in eleven minutes of one core; `--start FILE --corners 0 --rate 0.008` goes on
from weights. Every batch is a third pictures, a third depth maps, a third boundary maps, as the model draws
them. Prints the signal-to-noise ratio of each kind on scenes never trained on, and the `scale` to write into
`config.tiny()`. Photographs come from scikit-image where it is installed; two are held out.

Shape suffixes: B batch, C latent channels, S side of the training picture.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unimrg.data.geometry import depth_target, pad_square, segmentation_target
from unimrg.data.scenes import make_scenes
from unimrg.families.harmon.config import tiny
from unimrg.families.harmon.vae import KLVAE, AttentionBlock, ResidualBlock
from unimrg.teachers.oracle import oracle_depth, oracle_segmentation

KINDS = ("picture", "depth", "boundaries")
SCENE_SIDE = 128
PHOTOS = (
    "astronaut brick camera cat coins grass gravel hubble_deep_field immunohistochemistry logo moon page "
    "retina rocket text"
)
HELD_OUT_PHOTOS = "coffee colorwheel"
KL_WEIGHT = 1e-6
ABSOLUTE = 0.05  # weight of the absolute beside the squared error
LATENT_NOISE = 0.02  # of the latents' standard deviation: the decoder must bear what a sampler makes of them


@dataclass(frozen=True)
class Maps:
    """One scene. rgb: uint8 [H, W, 3]; nearness: float32 [H, W], inverse depth; lines: uint8 [H, W]."""

    rgb: np.ndarray
    nearness: np.ndarray
    lines: np.ndarray

    def crop(self, top: int, left: int, side: int) -> Maps:
        box = np.s_[top : top + side, left : left + side]
        return Maps(self.rgb[box], self.nearness[box], self.lines[box])

    def draw(self, kind: str, side: int) -> np.ndarray:
        """The training square of one kind, uint8 [side, side, 3]."""
        if kind == "picture":
            return pad_square(self.rgb, side)[0]
        if kind == "depth":
            drawing = depth_target(oracle_depth(self.nearness), side)
        else:
            drawing = segmentation_target(self.lines, side)
        return np.repeat(drawing[..., None], 3, axis=2)


def scene_maps(count: int, split: str, seed: int = 0) -> list[Maps]:
    scenes = make_scenes(count, seed=seed, split=split, size=SCENE_SIDE, questions=2)
    return [Maps(s.rgb, 1.0 / s.depth, oracle_segmentation(s.ids)) for s in scenes]


def photos(names: str) -> list[np.ndarray]:
    """Photographs of scikit-image's package, uint8 [H, W, 3]; none where it isn't installed."""
    try:
        from skimage import data
    except ImportError:
        return []
    found = [np.asarray(getattr(data, name)()) for name in names.split()]
    return [
        np.repeat(p[..., None], 3, 2) if p.ndim == 2 else p[..., :3] for p in found if p.dtype == np.uint8
    ]


def noise_picture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Noise with the falling spectrum of natural pictures, or flat rectangles; uint8 [side, side, 3]."""
    if rng.random() < 0.5:
        picture = np.empty((side, side, 3))
        picture[:] = rng.integers(0, 256, 3)
        for _ in range(rng.integers(0, 6)):
            top, left, bottom, right = rng.integers(0, side, 4)
            picture[top:bottom, left:right] = rng.integers(0, 256, 3)
        return picture.astype(np.uint8)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1.0 / side
    spectrum = np.fft.rfft2(rng.standard_normal((3, side, side))) / frequency ** rng.uniform(0.8, 2.0)
    waves = np.fft.irfft2(spectrum, s=(side, side))
    waves = np.einsum("ij,jhw->hwi", np.eye(3) * rng.uniform(0, 1) + rng.uniform(0, 1), waves)
    waves = (waves - waves.mean()) / waves.std()
    return np.clip(rng.uniform(60, 190, 3) + waves * rng.uniform(10, 60), 0, 255).astype(np.uint8)


def photo_crop(rng: np.random.Generator, photo: np.ndarray, side: int) -> np.ndarray:
    """A random part of a photograph, shrunk to the training square."""
    largest = min(photo.shape[:2])
    part = int(np.exp(rng.uniform(np.log(min(side, largest)), np.log(largest))))
    top, left = (int(rng.integers(0, edge - part + 1)) for edge in photo.shape[:2])
    cut = Image.fromarray(np.ascontiguousarray(photo[top : top + part, left : left + part]))
    return np.asarray(cut.resize((side, side), Image.Resampling.BICUBIC))


def jitter(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Other brightness, contrast and balance of colours."""
    gain, offset = rng.uniform(0.7, 1.3) * rng.uniform(0.85, 1.15, 3), rng.uniform(-30, 30)
    if rng.random() < 0.3:
        picture = picture[..., rng.permutation(3)]
    return np.clip((picture.astype(np.float32) - 128) * gain + 128 + offset, 0, 255).astype(np.uint8)


def draw_example(
    rng: np.random.Generator, kind: str, scenes: list[Maps], pictures: list[np.ndarray], side: int
) -> np.ndarray:
    """One augmented training square, uint8 [side, side, 3]."""
    chance = rng.random()
    if kind == "picture" and chance < 0.08:
        return noise_picture(rng, side)
    if kind == "picture" and pictures and chance < 0.33:
        example = jitter(rng, photo_crop(rng, pictures[rng.integers(len(pictures))], side))
    else:
        maps = scenes[rng.integers(len(scenes))]
        part = SCENE_SIDE if rng.random() < 0.5 else int(rng.integers(side, SCENE_SIDE + 1))
        top, left = rng.integers(0, SCENE_SIDE - part + 1, 2)
        example = maps.crop(top, left, part).draw(kind, side)
        if kind == "picture" and rng.random() < 0.5:
            example = jitter(rng, example)
    if rng.random() < 0.5:
        example = example[:, ::-1]
    return example[::-1] if rng.random() < 0.1 else example


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    """uint8 [S, S, 3] each to float32 [B, 3, S, S] in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def batches(
    rng: np.random.Generator, size: int, scenes: list[Maps], pictures: list[np.ndarray], side: int
) -> Iterator[Tensor]:
    while True:
        yield to_tensor(
            [draw_example(rng, KINDS[i % len(KINDS)], scenes, pictures, side) for i in range(size)]
        )


def open_paths(vae: KLVAE) -> None:
    """Start as an almost linear chain: residual branches closed, little noise on the latents.

    It learns several times faster than from the usual initialisation, where the signal first has to find its
    way through twenty normalisations.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.get_parameter("bias"))
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, AttentionBlock):
            nn.init.zeros_(module.proj_out.weight)
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 0.3
        vae.quant_conv.get_parameter("bias")[vae.config.latent_channels :] = -8.0


def corner(x_B3SS: Tensor, step: int) -> Tensor:
    """A quarter of the picture: four times as many early steps in the same time."""
    half = x_B3SS.shape[-1] // 2
    return x_B3SS.unfold(2, half, half).unfold(3, half, half)[:, :, step % 2, step // 2 % 2]


def loss_of(vae: KLVAE, x_B3SS: Tensor) -> Tensor:
    """Error plus a small divergence from the standard normal (arXiv 2112.10752), per pixel value.

    The absolute error alone prefers medians: black for thin lines, grey for small coloured things. It then
    learns neither, so the squared error leads, and the absolute error matters when little is left.
    """
    mean, log_variance = vae.encode(x_B3SS).chunk(2, dim=1)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
    spread = torch.exp(0.5 * log_variance) + LATENT_NOISE * mean.detach().std()
    error = vae.decode(mean + spread * torch.randn_like(mean)) - x_B3SS
    return (error.square().sum() + ABSOLUTE * error.abs().sum() + KL_WEIGHT * divergence) / x_B3SS.numel()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (arXiv 2502.16982), for convolutions seen as matrices.

    Brightness has far more variance than colour or lines. Adam follows it for thousands of steps first; with
    all singular values of the update equal, the small directions are learnt at the same pace.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(mean, group["momentum"]).flatten(1))
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                p.sub_(update.reshape(p.shape), alpha=group["lr"] * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with its singular values pushed to about 1: five Newton-Schulz steps (arXiv 2502.16982)."""
    x = matrix / (matrix.norm() + 1e-7)
    if matrix.shape[0] > matrix.shape[1]:
        x = x.T
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if x.shape == matrix.shape else x.T


def train(vae: KLVAE, data: Iterator[Tensor], corners: int, steps: int, rate: float) -> None:
    """`corners` steps on quarters of pictures, then `steps` on whole ones; linear warm-up and decay."""
    kernels = [p for p in vae.parameters() if p.ndim == 4]
    others = [p for p in vae.parameters() if p.ndim != 4]
    optimisers = [Muon(kernels, rate), torch.optim.AdamW(others, 0.2 * rate, (0.9, 0.95), weight_decay=0.0)]
    total, began, mean_loss = corners + steps, time.monotonic(), 0.0
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda k: min((k + 1) / 50, 1 - k / total)) for o in optimisers
    ]
    for step in range(1, total + 1):
        pictures = next(data)
        loss = loss_of(vae, corner(pictures, step) if step <= corners else pictures)
        loss.backward()
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
        mean_loss += (loss.item() - mean_loss) / min(step, 50)
        if step % 100 == 0:
            print(f"step {step} loss {mean_loss:.4f} seconds {time.monotonic() - began:.0f}", flush=True)


@torch.no_grad()
def psnr(vae: KLVAE, x_B3SS: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB, after rounding to 8 bits."""
    got = ((vae.decode(vae.encode(x_B3SS).chunk(2, dim=1)[0]).clamp(-1, 1) + 1) * 127.5).round()
    error = (got - (x_B3SS + 1) * 127.5).square().mean(dim=(1, 2, 3))
    return float((20 * math.log10(255) - 10 * error.clamp(min=1e-3).log10()).mean())


def show(vae: KLVAE, rows: list[Tensor], file: Path) -> None:
    """Originals above reconstructions, one pair of rows per tensor, as a PNG."""
    with torch.no_grad():
        pairs = [(x, vae.decode(vae.encode(x).chunk(2, dim=1)[0]).clamp(-1, 1)) for x in rows]
    strips = [torch.cat(list(x), dim=2) for pair in pairs for x in pair]
    sheet = ((torch.cat(strips, dim=1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(sheet).save(file)


def held_out(side: int, count: int = 48) -> dict[str, Tensor]:
    """Drawings of scenes of the test split, and crops of photographs that are never trained on."""
    scenes, rng = scene_maps(count, "test"), np.random.default_rng(1)
    sets = {kind: to_tensor([maps.draw(kind, side) for maps in scenes]) for kind in KINDS}
    if found := photos(HELD_OUT_PHOTOS):
        sets["photo"] = to_tensor([photo_crop(rng, found[i % len(found)], side) for i in range(count)])
    return sets


def load(vae: KLVAE, file: Path) -> None:
    vae.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny variant's autoencoder.")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--corners", type=int, default=3000, help="steps on quarters of pictures")
    parser.add_argument("--steps", type=int, default=800, help="steps on whole pictures")
    parser.add_argument("--start", type=Path, help="weights to go on from")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=0.015, help="learning rate of the kernels")
    parser.add_argument("--scenes", type=int, default=400, help="training scenes to render")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="PNG of reconstructions to write")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    config = tiny()
    vae, rng = KLVAE(config.vae), np.random.default_rng(args.seed)
    if args.start:
        load(vae, args.start)
    else:
        open_paths(vae)
    data = batches(rng, args.batch, scene_maps(args.scenes, "train"), photos(PHOTOS), config.image_size)
    train(vae, data, args.corners, args.steps, args.rate)

    args.out.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.bfloat16().contiguous() for name, tensor in vae.state_dict().items()}
    save_file(state, args.out)
    load(vae, args.out)  # what is measured is what was rounded and written

    sets = held_out(config.image_size)
    for kind, pictures in sets.items():
        print(f"{kind}: {psnr(vae, pictures):.2f} dB")
    with torch.no_grad():
        means = vae.encode(torch.cat([sets[kind] for kind in KINDS])).chunk(2, dim=1)[0]
    print(f"scale = {1 / means.std().item():.4f}")
    if args.sheet:
        show(vae, [pictures[:12] for pictures in sets.values()], args.sheet)


if __name__ == "__main__":
    main()
