"""The image tokenizer (MAGVIT-v2, arXiv 2310.05737): pictures to a grid of codes and back.

Quantisation needs no look-up: a code is the signs of its channels (section 3 of the paper). Module names are
those of the published checkpoint. Shape suffixes: B batch, C channels (bits of a code), H, W rows and columns
(of pixels or cells), N codes of a picture, row by row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimrg.families.harmon.config import VAEConfig
from unimrg.families.harmon.vae import Downsample, Level, Middle, Upsample, conv3x3
from unimrg.families.showo.config import MagvitConfig, ShowoConfig
from unimrg.families.showo.pixels import shrink, to_pixels


class LatentLosses(NamedTuple):
    """What training a tokenizer adds to the reconstruction loss (scalars; Show-o weighs both with 0.1).

    commitment: 1.25 times the mean squared distance of the latents from their signs.
    entropy: low when every bit is certain in each cell, and both its values are used over all cells.
    """

    commitment: Tensor
    entropy: Tensor


class EncoderLevel(Level):
    """Residual blocks; halves rows and columns behind them if `halve`."""

    def __init__(self, width_in: int, width: int, blocks: int, norms: VAEConfig, halve: bool) -> None:
        super().__init__(width_in, width, blocks, norms)
        self.downsample = Downsample(width) if halve else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.downsample(super().forward(x_BCHW))


class DecoderLevel(Level):
    """Residual blocks; doubles rows and columns behind them if `double`."""

    def __init__(self, width_in: int, width: int, blocks: int, norms: VAEConfig, double: bool) -> None:
        super().__init__(width_in, width, blocks, norms)
        self.upsample = Upsample(width) if double else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.upsample(super().forward(x_BCHW))


def _widths(config: MagvitConfig, multipliers: tuple[int, ...]) -> list[int]:
    return [config.base_width * multiplier for multiplier in multipliers]


def _norms(config: MagvitConfig) -> VAEConfig:
    """What the shared blocks ask of a configuration."""
    return VAEConfig(norm_groups=config.norm_groups, norm_eps=config.norm_eps)


class Encoder(nn.Module):
    """Pictures to latents before quantisation, full resolution (level 0) first."""

    def __init__(self, config: MagvitConfig) -> None:
        super().__init__()
        norms, widths = _norms(config), _widths(config, config.encoder_multipliers)
        inputs, last = [config.base_width, *widths[:-1]], len(widths) - 1
        self.conv_in = conv3x3(3, config.base_width)
        self.down = nn.ModuleList(
            EncoderLevel(inputs[i], widths[i], config.encoder_blocks[i], norms, halve=i < last)
            for i in range(len(widths))
        )
        self.mid = Middle(widths[-1], norms)
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=config.norm_eps)
        self.conv_out = conv3x3(widths[-1], config.code_bits)
        self.quant_conv = nn.Conv2d(config.code_bits, config.code_bits, kernel_size=1)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        h = self.conv_in(x_B3HW)
        for level in self.down:
            h = level(h)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(h)))))


class Decoder(nn.Module):
    """Signs to pictures. `up` is indexed by level, so it is walked from the last to the first."""

    def __init__(self, config: MagvitConfig) -> None:
        super().__init__()
        norms, widths = _norms(config), _widths(config, config.decoder_multipliers)
        inputs = [*widths[1:], widths[-1]]
        self.post_quant_conv = nn.Conv2d(config.code_bits, config.code_bits, kernel_size=1)
        self.conv_in = conv3x3(config.code_bits, widths[-1])
        self.mid = Middle(widths[-1], norms)
        self.up = nn.ModuleList(
            DecoderLevel(inputs[i], widths[i], config.decoder_blocks[i], norms, double=i > 0)
            for i in range(len(widths))
        )
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[0], eps=config.norm_eps)
        self.conv_out = conv3x3(widths[0], 3)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        h = self.mid(self.conv_in(self.post_quant_conv(z_BCHW)))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class SignQuantizer(nn.Module):
    """Latents to codes by the signs of their channels; the first channel is the most significant bit.

    `embedding` [codes, C], the signs of every code, and `power_vals` [C] are stored in published files.
    """

    embedding: Tensor
    power_vals: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        powers = 2 ** torch.arange(bits - 1, -1, -1)
        signs = (torch.arange(2**bits).unsqueeze(1) // powers % 2) * 2 - 1
        self.register_buffer("embedding", signs.float())
        self.register_buffer("power_vals", powers.float())

    def codes(self, z_BCHW: Tensor) -> Tensor:
        """int64 [B, H*W]; a channel that is exactly 0 counts as negative."""
        bits = (z_BCHW > 0).flatten(2).transpose(1, 2)
        return (bits * self.power_vals.long()).sum(2)

    def signs(self, codes_BN: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, C, H, W] of -1 and +1."""
        return self.embedding[codes_BN].transpose(1, 2).unflatten(2, grid)

    def forward(self, z_BCHW: Tensor) -> tuple[Tensor, LatentLosses]:
        """Signs whose gradient is that of `z_BCHW` (straight through), and the latents' losses."""
        signs = torch.where(z_BCHW > 0, 1.0, -1.0).to(z_BCHW.dtype)
        losses = LatentLosses(1.25 * F.mse_loss(z_BCHW, signs), _bit_entropy(z_BCHW))
        return z_BCHW + (signs - z_BCHW).detach(), losses


def _bit_entropy(z_BCHW: Tensor) -> Tensor:
    """Mean entropy of a bit in a cell, minus the entropy of a bit over all cells (natural logarithms).

    A bit is set with the probability that a softmax over the negative squared distances to +1 and -1 gives.
    """
    logits = 4 * z_BCHW
    probability = logits.sigmoid()
    per_cell = F.softplus(logits) - logits * probability
    over_all = probability.mean((0, 2, 3)).clamp(1e-6, 1 - 1e-6)
    return per_cell.mean() - F.binary_cross_entropy(over_all, over_all)


class Magvit(nn.Module):
    """Pictures in [-1, 1] to codes and back. Any size divisible by the stride works."""

    def __init__(self, config: MagvitConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = SignQuantizer(config.code_bits)

    def latents(self, image_B3HW: Tensor) -> Tensor:
        """[B, C, H/stride, W/stride] before quantisation."""
        # Convolutions are up to twice as fast in this layout, on the CPU and in half precision on a GPU.
        return self.encoder(image_B3HW.contiguous(memory_format=torch.channels_last))

    def encode(self, image_B3HW: Tensor) -> Tensor:
        """Codes int64 [B, N]."""
        return self.quantize.codes(self.latents(image_B3HW))

    def decode(self, codes_BN: Tensor, grid: tuple[int, int]) -> Tensor:
        """Codes to pictures [B, 3, H, W]; values are not clamped. grid: rows and columns of codes."""
        # Engines that halve the weights may leave the buffers as they are.
        signs = self.quantize.signs(codes_BN, grid).to(self.decoder.conv_in.weight.dtype)
        return self.decoder(signs.contiguous(memory_format=torch.channels_last))

    def forward(self, image_B3HW: Tensor) -> tuple[Tensor, LatentLosses]:
        """Reconstruction [B, 3, H, W] and the latents' losses, all with gradients: for training it."""
        signs, losses = self.quantize(self.latents(image_B3HW))
        return self.decoder(signs), losses


def encode_pictures(magvit: Magvit, pictures_BHW3: Tensor, side: int | None = None) -> Tensor:
    """uint8 pictures to codes int64 [B, N]; shrunk to `side` pixels first, if given."""
    if not len(pictures_BHW3):
        cells = (side or pictures_BHW3.shape[1]) // magvit.config.stride
        return torch.zeros(0, cells * cells, dtype=torch.long, device=pictures_BHW3.device)
    pixels = to_pixels(pictures_BHW3)
    pixels = pixels if side is None else shrink(pixels, side)
    # Codes are what is to be predicted: half precision would flip bits whose latent is near zero.
    with torch.autocast(pixels.device.type, enabled=False):
        return magvit.encode(pixels.to(magvit.encoder.conv_in.weight.dtype))


def frozen_codes(magvit: Magvit, config: ShowoConfig, pictures_BHW3: Tensor) -> Tensor:
    """Codes int64 of pictures to draw, and behind them, without CLIP, those by which they are read."""
    codes = encode_pictures(magvit, pictures_BHW3)
    if config.clip is not None:
        return codes
    return torch.cat([codes, encode_pictures(magvit, pictures_BHW3, config.source_size)], 1)
