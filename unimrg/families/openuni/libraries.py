"""The parts of OpenUni that diffusers has: SANA, DC-AE and the sampler's scheduler, from our numbers.

diffusers is an extra: it is imported when a model is built, not before.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

from unimrg.errors import MissingExtraError

if TYPE_CHECKING:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel

    from unimrg.families.openuni.config import DCAEConfig, SanaConfig

EXTRA = "'unimrg[openuni]'"


def diffusers() -> ModuleType:
    """The library. Raises MissingExtraError with the line that installs it."""
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise MissingExtraError(EXTRA, "the family openuni") from error


def sana(config: SanaConfig) -> SanaTransformer2DModel:
    """SANA with fresh weights: latents [G, C, h, w] and conditions [G, Q, captions] to a velocity."""
    made = diffusers().SanaTransformer2DModel(
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        num_cross_attention_heads=config.num_cross_attention_heads,
        cross_attention_head_dim=config.cross_attention_head_dim,
        cross_attention_dim=config.width,
        caption_channels=config.caption_channels,
        mlp_ratio=config.mlp_ratio,
        sample_size=config.sample_size,
        qk_norm=config.qk_norm,
        interpolation_scale=config.interpolation_scale,
    )
    _initialise(made)
    return made


def _initialise(made: SanaTransformer2DModel) -> None:
    """The velocity begins at zero (PixArt, arXiv 2310.00426), but conditions are heard from the first step.

    Were their way closed as well, one direction would open it and be all that the connector learns.
    """
    nn.init.zeros_(made.proj_out.weight)
    nn.init.zeros_(made.proj_out.bias)
    captions = made.caption_projection
    for layer in (captions.linear_1, captions.linear_2):
        nn.init.xavier_uniform_(layer.weight, gain=2**0.5)
        nn.init.zeros_(layer.bias)
    for block in made.transformer_blocks:
        nn.init.xavier_uniform_(block.attn2.to_v.weight)
        nn.init.xavier_uniform_(block.attn2.to_out[0].weight)
        for layer in (block.attn2.to_q, block.attn2.to_k):
            nn.init.xavier_uniform_(layer.weight, gain=2.0)


def fill_positions(embedding: Any) -> None:
    """SANA's table of positions, if it has one: it is in no file, so loading leaves it empty."""
    if embedding.pos_embed is not None:
        again = type(embedding)(
            embedding.height,
            embedding.width,
            patch_size=1,
            in_channels=1,
            embed_dim=embedding.pos_embed.shape[-1],
            interpolation_scale=embedding.interpolation_scale,
        )
        embedding.pos_embed.copy_(again.pos_embed)


def dc_ae(config: DCAEConfig) -> AutoencoderDC:
    """The autoencoder with fresh weights: pixels [B, 3, S, S] in [-1, 1] to latents [B, C, h, w] and back."""
    levels, attention = len(config.widths), config.attention_levels
    blocks = ("ResBlock",) * (levels - attention) + ("EfficientViTBlock",) * attention
    multiscales = ((),) * (levels - attention) + (config.multiscales,) * attention
    return diffusers().AutoencoderDC(
        latent_channels=config.latent_channels,
        attention_head_dim=config.attention_head_dim,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=config.widths,
        decoder_block_out_channels=config.widths,
        encoder_layers_per_block=config.encoder_depths,
        decoder_layers_per_block=config.decoder_depths,
        encoder_qkv_multiscales=multiscales,
        decoder_qkv_multiscales=multiscales,
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        scaling_factor=config.scale,
    )


def dpm_solver(shift: float) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ of order 2 (arXiv 2211.01095) along a flow whose timesteps are shifted."""
    return diffusers().DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
