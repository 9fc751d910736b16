"""The frozen picture autoencoder (KL-16 of latent diffusion, arXiv 2112.10752), used at its posterior mean.

Module names are those of the published checkpoint. Shape suffixes: B batch, C channels, H, W rows and
columns (of pixels or cells), m, n rows and columns of the token grid, P patch side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimrg.families.harmon.config import VAEConfig


def conv3x3(width_in: int, width_out: int) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, kernel_size=3, padding=1)


def group_norm(width: int, config: VAEConfig) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, width, eps=config.norm_eps)


class ResidualBlock(nn.Module):
    """Two (norm, swish, conv) and a skip; the skip is a 1x1 convolution where the widths differ."""

    def __init__(self, width_in: int, width_out: int, config: VAEConfig) -> None:
        super().__init__()
        self.norm1 = group_norm(width_in, config)
        self.conv1 = conv3x3(width_in, width_out)
        self.norm2 = group_norm(width_out, config)
        self.conv2 = conv3x3(width_out, width_out)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_in, width_out, kernel_size=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x_BCHW)))
        h = self.conv2(F.silu(self.norm2(h)))
        skip = self.nin_shortcut(x_BCHW) if hasattr(self, "nin_shortcut") else x_BCHW
        return skip + h


class AttentionBlock(nn.Module):
    """One head over all cells, with a skip."""

    def __init__(self, width: int, config: VAEConfig) -> None:
        super().__init__()
        self.norm = group_norm(width, config)
        self.q = nn.Conv2d(width, width, kernel_size=1)
        self.k = nn.Conv2d(width, width, kernel_size=1)
        self.v = nn.Conv2d(width, width, kernel_size=1)
        self.proj_out = nn.Conv2d(width, width, kernel_size=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = self.norm(x_BCHW)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))  # each B, H*W, C
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x_BCHW.shape)
        return x_BCHW + self.proj_out(h)


class Middle(nn.Module):
    """Block, attention, block: at the lowest resolution of both halves."""

    def __init__(self, width: int, config: VAEConfig) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width, config)
        self.attn_1 = AttentionBlock(width, config)
        self.block_2 = ResidualBlock(width, width, config)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x_BCHW)))


class Downsample(nn.Module):
    """Halves rows and columns; the one row and column of padding are at the bottom and the right."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel_size=3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles rows and columns: nearest neighbour, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv3x3(width, width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if `attention`."""

    def __init__(
        self, width_in: int, width: int, blocks: int, config: VAEConfig, attention: bool = False
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(width if i else width_in, width, config) for i in range(blocks)
        )
        self.attn = nn.ModuleList(AttentionBlock(width, config) for _ in range(blocks if attention else 0))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if len(self.attn):
                x_BCHW = self.attn[i](x_BCHW)
        return x_BCHW


class DownLevel(Level):
    """A level of the encoder; halves rows and columns behind its blocks if `halve`."""

    def __init__(self, width_in: int, width: int, config: VAEConfig, attention: bool, halve: bool) -> None:
        super().__init__(width_in, width, config.blocks_per_level, config, attention)
        self.downsample = Downsample(width) if halve else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.downsample(super().forward(x_BCHW))


class UpLevel(Level):
    """A level of the decoder, with one block more; doubles rows and columns behind its blocks if `double`."""

    def __init__(self, width_in: int, width: int, config: VAEConfig, double: bool) -> None:
        super().__init__(width_in, width, config.blocks_per_level + 1, config)
        self.upsample = Upsample(width) if double else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.upsample(super().forward(x_BCHW))


class Encoder(nn.Module):
    """Pictures to twice the latent channels, full resolution (level 0) first."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_width * m for m in config.multipliers]
        inputs, last = [config.base_width, *widths[:-1]], len(widths) - 1
        self.conv_in = conv3x3(3, config.base_width)
        self.down = nn.ModuleList(
            DownLevel(inputs[i], widths[i], config, i in config.encoder_attention_levels, halve=i < last)
            for i in range(len(widths))
        )
        self.mid = Middle(widths[-1], config)
        self.norm_out = group_norm(widths[-1], config)
        self.conv_out = conv3x3(widths[-1], 2 * config.latent_channels)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        h = self.conv_in(x_B3HW)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents to pictures. `up` is indexed by level, so it is walked from the last to the first."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_width * m for m in config.multipliers]
        inputs = [*widths[1:], widths[-1]]
        self.conv_in = conv3x3(config.latent_channels, widths[-1])
        self.mid = Middle(widths[-1], config)
        self.up = nn.ModuleList(
            UpLevel(inputs[i], widths[i], config, double=i > 0) for i in range(len(widths))
        )
        self.norm_out = group_norm(widths[0], config)
        self.conv_out = conv3x3(widths[0], 3)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z_BCHW))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class KLVAE(nn.Module):
    """Pictures in [-1, 1] to latent tokens and back. Any size divisible by the stride works."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(channels, channels, kernel_size=1)

    def encode(self, image_B3HW: Tensor) -> Tensor:
        """Moments [B, 2C, H/stride, W/stride]: mean, then log-variance, along the channels."""
        # Convolutions are up to twice as fast in this layout, on the CPU and in half precision on a GPU.
        return self.quant_conv(self.encoder(image_B3HW.contiguous(memory_format=torch.channels_last)))

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Unscaled latents to pictures; values are not clamped."""
        return self.decoder(self.post_quant_conv(latent_BCHW.contiguous(memory_format=torch.channels_last)))

    def tokenize(self, moments_BCHW: Tensor, patch_size: int = 1) -> Tensor:
        """Posterior mean, scaled, as tokens [B, m, n, C*P*P]; features in (channel, row, column) order."""
        mean = moments_BCHW.chunk(2, dim=1)[0] * self.config.scale
        B, C, H, W = mean.shape
        P = patch_size
        patches = mean.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5)
        return patches.reshape(B, H // P, W // P, C * P * P)

    def encode_pictures(self, pictures_BHW3: Tensor, patch_size: int = 1) -> Tensor:
        """uint8 pictures to latent tokens [B, m*n, C*P*P], row by row."""
        dtype = self.quant_conv.weight.dtype
        pixels = (pictures_BHW3.permute(0, 3, 1, 2).float() / 127.5 - 1).to(dtype)
        return self.tokenize(self.encode(pixels), patch_size).flatten(1, 2)

    def decode_tokens(self, tokens_BmnD: Tensor, patch_size: int = 1) -> Tensor:
        """Tokens [B, m, n, C*P*P] to pictures [B, 3, H, W]: the way back from `tokenize`."""
        B, m, n, _ = tokens_BmnD.shape
        C, P = self.config.latent_channels, patch_size
        latent = tokens_BmnD.reshape(B, m, n, C, P, P).permute(0, 3, 1, 4, 2, 5).reshape(B, C, m * P, n * P)
        return self.decode(latent / self.config.scale)
