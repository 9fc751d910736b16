"""Trains the picture autoencoders and tokenizers of the tiny variants on scenes, photographs and patterns.

    python -m unimrg.families.pretrain_images janus --out tiny_vq.safetensors

makes weights like those in `<family>/assets/` in 5 to 15 minutes of an idle core; `--start FILE --corners 0`,
with half the learning rate, goes on from weights. Harmon's were made so; the others' in three to five goes
that come to as many steps as `RECIPES` names. Every batch is a third pictures, a third depth maps, a third
boundary maps, as the models draw them. Prints the signal-to-noise ratio of each kind on scenes never trained
on, how many codes they use, and the `scale` that the variant's configuration takes where latents are numbers.
Photographs come from scikit-image where it is installed; two are held out.

Shape suffixes: B batch, C latent channels, H, W rows and columns of cells, S side of a picture.
"""

from __future__ import annotations

import argparse
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.janus.modeling_janus import (
    JanusVQVAE,
    JanusVQVAEAttnBlock,
    JanusVQVAEResnetBlock,
)

from unimrg.data.geometry import depth_target, pad_square, segmentation_target
from unimrg.data.scenes import make_scenes
from unimrg.families.harmon.config import tiny as tiny_harmon
from unimrg.families.harmon.vae import KLVAE, AttentionBlock, ResidualBlock
from unimrg.families.janus.config import tiny as tiny_janus
from unimrg.families.openuni.config import tiny as tiny_openuni
from unimrg.families.openuni.libraries import dc_ae
from unimrg.families.showo.config import tiny as tiny_showo
from unimrg.families.showo.magvit import Magvit
from unimrg.families.showo.pixels import shrink
from unimrg.teachers.oracle import oracle_depth, oracle_segmentation

KINDS = ("picture", "depth", "boundaries")
SIDE = 64  # of the training picture of every tiny variant
SCENE_SIDE = 128
PHOTOS = (
    "astronaut brick camera cat coins grass gravel hubble_deep_field immunohistochemistry logo moon page "
    "retina rocket text"
)
HELD_OUT_PHOTOS = "coffee colorwheel"
KL_WEIGHT = 1e-6
ABSOLUTE = 0.05  # weight of the absolute beside the squared error
LATENT_NOISE = 0.02  # of the latents' standard deviation: the decoder must bear what a sampler makes of them


# -- data --------------------------------------------------------------------------------------------------


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


def corner(x_B3SS: Tensor, step: int) -> Tensor:
    """A quarter of the picture: four times as many early steps in the same time."""
    half = x_B3SS.shape[-1] // 2
    return x_B3SS.unfold(2, half, half).unfold(3, half, half)[:, :, step % 2, step // 2 % 2]


def held_out(side: int, count: int = 48) -> dict[str, Tensor]:
    """Drawings of scenes of the test split, and crops of photographs that are never trained on."""
    scenes, rng = scene_maps(count, "test"), np.random.default_rng(1)
    sets = {kind: to_tensor([maps.draw(kind, side) for maps in scenes]) for kind in KINDS}
    if found := photos(HELD_OUT_PHOTOS):
        sets["photo"] = to_tensor([photo_crop(rng, found[i % len(found)], side) for i in range(count)])
    return sets


# -- what is trained ---------------------------------------------------------------------------------------


class Autoencoder(ABC):
    """A family's picture autoencoder as it is trained and measured here.

    module: the network; its state is what is stored. stored_as: the numbers of the file.
    soft: the share of the training in which latents aren't quantised yet; none when it goes on from weights.
    calm: factor of the learning rate after that. Steps that swap the codes of many cells teach the decoder
        nothing.
    """

    module: nn.Module
    stored_as: torch.dtype = torch.float16
    soft: float = 0.0
    calm: float = 1.0

    @abstractmethod
    def loss(self, x_B3SS: Tensor, done: float) -> Tensor:
        """What a step minimises, per pixel value. done: the share of the training behind it, 0 to 1."""

    @abstractmethod
    def redraw(self, x_B3SS: Tensor) -> Tensor:
        """Pictures as the frozen module gives them back; not clamped."""

    @abstractmethod
    def facts(self, x_B3SS: Tensor) -> str:
        """What the variant's configuration or its reader must know, measured on held-out pictures."""

    def load(self, file: Path) -> None:
        self.module.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})
        self.soft = 0.0

    def save(self, file: Path) -> None:
        state = {name: t.to(self.stored_as).contiguous() for name, t in self.module.state_dict().items()}
        save_file(state, file)


def open_paths(module: nn.Module, last: dict[type[nn.Module], str]) -> None:
    """Start as an almost linear chain, with residual branches closed.

    It learns several times faster than from the usual initialisation, where the signal first has to find its
    way through twenty normalisations. last: the final convolution of each kind of residual block.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="linear")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for part in module.modules():
        if type(part) in last:
            nn.init.zeros_(part.get_parameter(f"{last[type(part)]}.weight"))
    with torch.no_grad():
        module.get_parameter("decoder.conv_out.weight").mul_(0.3)


def pixel_error(error_B3SS: Tensor) -> Tensor:
    """Mean of the squared error and a little of the absolute one.

    The absolute error alone prefers medians: black for thin lines, grey for small coloured things. It then
    learns neither, so the squared error leads, and the absolute error matters when little is left.
    """
    return error_B3SS.square().mean() + ABSOLUTE * error_B3SS.abs().mean()


class HarmonVAE(Autoencoder):
    """KL autoencoder (arXiv 2112.10752) with a small divergence from the standard normal."""

    stored_as = torch.bfloat16

    def __init__(self) -> None:
        self.module: KLVAE = KLVAE(tiny_harmon().vae)
        open_paths(self.module, {ResidualBlock: "conv2", AttentionBlock: "proj_out"})
        with torch.no_grad():  # little noise on the latents
            self.module.quant_conv.get_parameter("bias")[self.module.config.latent_channels :] = -8.0

    def loss(self, x_B3SS: Tensor, done: float) -> Tensor:
        mean, log_variance = self.module.encode(x_B3SS).chunk(2, dim=1)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        spread = torch.exp(0.5 * log_variance) + LATENT_NOISE * mean.detach().std()
        error = self.module.decode(mean + spread * torch.randn_like(mean)) - x_B3SS
        return pixel_error(error) + KL_WEIGHT * divergence / x_B3SS.numel()

    def mean(self, x_B3SS: Tensor) -> Tensor:
        return self.module.encode(x_B3SS).chunk(2, dim=1)[0]

    def redraw(self, x_B3SS: Tensor) -> Tensor:
        return self.module.decode(self.mean(x_B3SS))

    def facts(self, x_B3SS: Tensor) -> str:
        return f"scale = {1 / self.mean(x_B3SS).std().item():.4f}"


class OpenUniDCAE(Autoencoder):
    """Deep compression autoencoder (arXiv 2410.10733), whose latents are smoothed by noise alone.

    Kernels and latents grow while it learns, which anneals the steps: decay of the kernels and a penalty on
    the latents were tried and learnt more slowly. The configuration's scale takes the size back.
    """

    def __init__(self) -> None:
        self.module: Any = dc_ae(tiny_openuni().vae)
        open_paths(self.module, {})
        with torch.no_grad():  # its residual branches end in a norm, whose weight closes them
            for name, weight in self.module.named_parameters():
                if name.endswith(("norm.weight", "norm_out.weight")) and "blocks" in name:
                    weight.fill_(0.1)

    def latents(self, x_B3SS: Tensor) -> Tensor:
        return self.module.encode(x_B3SS, return_dict=False)[0]

    def decode(self, z_BCHW: Tensor) -> Tensor:
        return self.module.decode(z_BCHW, return_dict=False)[0]

    def loss(self, x_B3SS: Tensor, done: float) -> Tensor:
        z = self.latents(x_B3SS)
        noise = LATENT_NOISE * z.detach().std() * torch.randn_like(z)
        return pixel_error(self.decode(z + noise) - x_B3SS)

    def redraw(self, x_B3SS: Tensor) -> Tensor:
        return self.decode(self.latents(x_B3SS))

    def facts(self, x_B3SS: Tensor) -> str:
        latents = self.latents(x_B3SS)
        shift = latents.mean((0, 2, 3))
        scale = 1 / (latents - shift.view(-1, 1, 1)).std().item()
        return f"scale = {scale:.4f}, shift = {[round(mean, 1) for mean in shift.tolist()]}"


class JanusVQ(Autoencoder):
    """Vector quantisation (arXiv 1711.00937) on the unit sphere, since decoding normalises code vectors.

    First without quantisation but with noise; then code vectors follow the mean of what they stand for
    (appendix A.1 of the paper), and one that hardly anything is near to starts again at a latent.
    """

    NOISE = 0.15
    COMMITMENT = 0.02
    DECAY = 0.97
    FEWEST = 0.05  # uses per step, in the running mean, below which a code starts again
    soft, calm = 0.1, 0.3

    def __init__(self) -> None:
        self.module: Any = JanusVQVAE(tiny_janus().janus.vq_config)
        open_paths(self.module, {JanusVQVAEResnetBlock: "conv2", JanusVQVAEAttnBlock: "proj_out"})
        self.book = self.module.quantize.embedding.weight.requires_grad_(False)
        self.book.copy_(F.normalize(self.book))
        self.sums, self.counts = self.book.clone(), torch.zeros(len(self.book))

    def load(self, file: Path) -> None:
        super().load(file)
        self.sums, self.counts = self.book.clone(), torch.ones(len(self.book))

    def latents(self, x_B3SS: Tensor) -> Tensor:
        return F.normalize(self.module.quant_conv(self.module.encoder(x_B3SS)), dim=1)

    def decode(self, z_BCHW: Tensor) -> Tensor:
        return self.module.decoder(self.module.post_quant_conv(z_BCHW))

    def codes(self, z_BCHW: Tensor) -> Tensor:
        """int64 [B, H, W]: the code vector of the smallest angle."""
        return torch.einsum("bchw,kc->bkhw", z_BCHW, self.book).argmax(1)

    def vectors(self, codes_BHW: Tensor) -> Tensor:
        return F.normalize(F.embedding(codes_BHW, self.book), dim=-1).permute(0, 3, 1, 2)

    @torch.no_grad()
    def follow(self, z_BCHW: Tensor, codes_BHW: Tensor) -> None:
        """Move code vectors towards the latents they stand for."""
        flat, codes = z_BCHW.permute(0, 2, 3, 1).flatten(0, 2), codes_BHW.flatten()
        self.counts.lerp_(torch.bincount(codes, minlength=len(self.book)).float(), 1 - self.DECAY)
        self.sums.lerp_(torch.zeros_like(self.book).index_add_(0, codes, flat), 1 - self.DECAY)
        idle = self.counts < self.FEWEST
        self.sums[idle] = flat[torch.randint(len(flat), (int(idle.sum()),))]
        self.counts[idle] = 1.0
        self.book.copy_(F.normalize(self.sums))

    def loss(self, x_B3SS: Tensor, done: float) -> Tensor:
        z = self.latents(x_B3SS)
        if done < self.soft:
            return pixel_error(self.decode(z + self.NOISE * torch.randn_like(z)) - x_B3SS)
        codes = self.codes(z.detach())
        quantised = self.vectors(codes)
        commitment = (z - quantised).square().sum(1).mean()
        self.follow(z.detach(), codes)
        error = self.decode(z + (quantised - z).detach()) - x_B3SS
        return pixel_error(error) + self.COMMITMENT * commitment

    def redraw(self, x_B3SS: Tensor) -> Tensor:
        codes = self.module.encode(x_B3SS).image_tokens  # as the library finds them
        side = x_B3SS.shape[-1] // 2 ** (self.module.encoder.num_resolutions - 1)
        return self.decode(self.vectors(codes.view(len(x_B3SS), side, side)))

    def facts(self, x_B3SS: Tensor) -> str:
        return usage(self.module.encode(x_B3SS).image_tokens, len(self.book))


class ShowoMagvit(Autoencoder):
    """Look-up-free quantisation (arXiv 2310.05737). Pictures to be read have half the side of those drawn.

    First without quantisation but with noise. Then the two 1x1 convolutions around the signs take up the
    turn of the whitened latents in which signs say most, so that all bits are used from the start: left to
    themselves, most of them repeat the brightness.
    """

    NOISE = 0.2  # of each channel's standard deviation
    COLOUR = 4.0  # weight of the error's part that isn't grey: few bits are left for it
    COMMITMENT = 0.02
    ENTROPY = 0.05
    soft, calm = 0.3, 0.3

    def __init__(self) -> None:
        self.module: Magvit = Magvit(tiny_showo().magvit)
        open_paths(self.module, {ResidualBlock: "conv2", AttentionBlock: "proj_out"})
        self.steps, self.turned = 0, False

    def load(self, file: Path) -> None:
        super().load(file)
        self.turned = True

    def loss(self, x_B3SS: Tensor, done: float) -> Tensor:
        self.steps += 1
        if x_B3SS.shape[-1] == SIDE and self.steps % 4 == 0:
            x_B3SS = shrink(x_B3SS, tiny_showo().source_size)
        z = self.module.latents(x_B3SS)
        if done < self.soft:
            noise = self.NOISE * z.detach().std((0, 2, 3), keepdim=True) * torch.randn_like(z)
            return self.error(self.module.decoder(z + noise) - x_B3SS)
        if not self.turned:
            self.turn(z.detach())
            z = self.module.latents(x_B3SS)
        signs, losses = self.module.quantize(z)
        error = self.error(self.module.decoder(signs) - x_B3SS)
        return error + self.COMMITMENT * losses.commitment + self.ENTROPY * self.entropy(z)

    def error(self, error_B3SS: Tensor) -> Tensor:
        colour = error_B3SS - error_B3SS.mean(1, keepdim=True)
        return pixel_error(error_B3SS) + self.COLOUR * colour.square().mean()

    @torch.no_grad()
    def turn(self, z_BCHW: Tensor) -> None:
        """Iterative quantisation (Gong and Lazebnik, CVPR 2011) of the whitened latents, into the weights."""
        flat = z_BCHW.permute(0, 2, 3, 1).flatten(0, 2)
        mean = flat.mean(0)
        variances, axes = torch.linalg.eigh(torch.cov(flat.T))
        whiten = axes / variances.clamp(min=1e-4 * float(variances.max())).sqrt()
        white = (flat - mean) @ whiten
        rotation = torch.linalg.qr(torch.randn(len(mean), len(mean)))[0]
        for _ in range(50):
            u, _, v = torch.linalg.svd(white.T @ (white @ rotation).sign())
            rotation = u @ v
        into = whiten @ rotation  # a latent z becomes (z - mean) @ into
        size = (white @ rotation).abs().mean()  # of a channel, where its sign is known
        before, after = self.module.encoder.quant_conv, self.module.decoder.post_quant_conv
        before.weight.copy_((into.T @ before.weight.flatten(1)).view_as(before.weight))
        before.get_parameter("bias").copy_((before.get_parameter("bias") - mean) @ into)
        back = after.weight.flatten(1)
        after.get_parameter("bias").add_(back @ mean)
        after.weight.copy_((size * back @ into.inverse().T).view_as(after.weight))
        self.turned = True

    def entropy(self, z_BCHW: Tensor) -> Tensor:
        """Entropy of a cell's code minus that of all cells' codes (equation 5 of the paper), per bit.

        Over whole codes: bits that are each used evenly but always together would waste most codes.
        """
        logits = torch.einsum("bchw,kc->bhwk", 2 * z_BCHW, self.module.quantize.embedding)
        log_shares = logits.log_softmax(-1).flatten(0, 2)
        shares = log_shares.exp()
        of_all = torch.special.entr(shares.mean(0).clamp(min=1e-9)).sum()
        return (-(shares * log_shares).sum(1).mean() - of_all) / self.module.config.code_bits

    def redraw(self, x_B3SS: Tensor) -> Tensor:
        side = x_B3SS.shape[-1] // self.module.config.stride
        return self.module.decode(self.module.encode(x_B3SS), (side, side))

    def facts(self, x_B3SS: Tensor) -> str:
        small = shrink(x_B3SS, tiny_showo().source_size)
        found = usage(self.module.encode(x_B3SS), self.module.config.codes)
        return f"{found}; {psnr(self, small):.2f} dB on pictures of {small.shape[-1]} pixels"


def usage(codes: Tensor, size: int) -> str:
    """How many of `size` codes appear, and their perplexity: e to the entropy of their shares."""
    share = torch.bincount(codes.flatten(), minlength=size) / codes.numel()
    return f"{int((share > 0).sum())} of {size} codes, perplexity {torch.special.entr(share).sum().exp():.0f}"


# -- training ----------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Recipe:
    """corners: steps on quarters of pictures; steps: on whole ones after them; rate: of the kernels."""

    make: Callable[[], Autoencoder]
    corners: int
    steps: int
    batch: int = 16
    rate: float = 0.015


RECIPES = {
    "harmon": Recipe(HarmonVAE, corners=3000, steps=800),
    "openuni": Recipe(OpenUniDCAE, corners=1900, steps=200, batch=8),
    "janus": Recipe(JanusVQ, corners=1500, steps=150, batch=8),
    "showo": Recipe(ShowoMagvit, corners=2400, steps=200, batch=8),
}


def train(
    subject: Autoencoder, data: Iterator[Tensor], corners: int, steps: int, rate: float, save: Path
) -> None:
    """`corners` steps on quarters of pictures, then `steps` on whole ones; linear warm-up and decay.

    What is there after every 250 steps is written to `save`.
    """
    weights = [p for p in subject.module.parameters() if p.requires_grad]
    kernels, others = [p for p in weights if p.ndim == 4], [p for p in weights if p.ndim != 4]
    optimisers = [Muon(kernels, rate), torch.optim.AdamW(others, 0.2 * rate, (0.9, 0.95), weight_decay=0.0)]
    total, began, mean_loss = corners + steps, time.monotonic(), 0.0

    def factor(k: int) -> float:
        return min((k + 1) / 50, 1 - k / total) * (1.0 if k < subject.soft * total else subject.calm)

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in optimisers]
    for step in range(1, total + 1):
        pictures = next(data)
        loss = subject.loss(corner(pictures, step) if step <= corners else pictures, (step - 1) / total)
        loss.backward()
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
        mean_loss += (loss.item() - mean_loss) / min(step, 50)
        if step % 100 == 0:
            print(f"step {step} loss {mean_loss:.4f} seconds {time.monotonic() - began:.0f}", flush=True)
        if step % 250 == 0:
            subject.save(save)


@torch.no_grad()
def psnr(subject: Autoencoder, x_B3SS: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB, after rounding to 8 bits."""
    got = ((subject.redraw(x_B3SS).clamp(-1, 1) + 1) * 127.5).round()
    error = (got - (x_B3SS + 1) * 127.5).square().mean(dim=(1, 2, 3))
    return float((20 * math.log10(255) - 10 * error.clamp(min=1e-3).log10()).mean())


@torch.no_grad()
def show(subject: Autoencoder, rows: list[Tensor], file: Path) -> None:
    """Originals above reconstructions, one pair of rows per tensor, as a PNG."""
    pairs = [(x, subject.redraw(x).clamp(-1, 1)) for x in rows]
    strips = [torch.cat(list(x), dim=2) for pair in pairs for x in pair]
    sheet = ((torch.cat(strips, dim=1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(sheet).save(file)


@torch.no_grad()
def report(subject: Autoencoder, sheet: Path | None) -> None:
    """Print what held-out pictures look like afterwards."""
    sets = held_out(SIDE)
    for kind, pictures in sets.items():
        print(f"{kind}: {psnr(subject, pictures):.2f} dB")
    print(subject.facts(torch.cat([sets[kind] for kind in KINDS])))
    if sheet:
        show(subject, [pictures[:12] for pictures in sets.values()], sheet)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the picture autoencoder of a tiny variant.")
    parser.add_argument("family", choices=RECIPES)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--corners", type=int, help="steps on quarters of pictures (the family's own)")
    parser.add_argument("--steps", type=int, help="steps on whole pictures (the family's own)")
    parser.add_argument("--start", type=Path, help="weights to go on from")
    parser.add_argument("--batch", type=int, help="pictures per step (the family's own)")
    parser.add_argument("--rate", type=float, help="learning rate of the kernels (the family's own)")
    parser.add_argument("--scenes", type=int, default=400, help="training scenes to render")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="PNG of reconstructions to write")
    args = parser.parse_args()
    recipe = RECIPES[args.family]
    corners, steps, batch, rate = (
        getattr(recipe, name) if getattr(args, name) is None else getattr(args, name)
        for name in ("corners", "steps", "batch", "rate")
    )

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    subject, rng = recipe.make(), np.random.default_rng(args.seed)
    if args.start:
        subject.load(args.start)
    data = batches(rng, batch, scene_maps(args.scenes, "train"), photos(PHOTOS), SIDE)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    train(subject, data, corners, steps, rate, args.out)
    subject.save(args.out)
    subject.load(args.out)  # what is measured is what was rounded and written
    report(subject, args.sheet)


if __name__ == "__main__":
    main()
