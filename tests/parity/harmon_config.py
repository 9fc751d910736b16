"""A fixture's config.json, which uses the published implementation's names, as our configuration."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config

from unimrg.families.harmon.config import HarmonConfig, MARConfig, VAEConfig

# published name: our name
MAR_NAMES = {
    "patch_size": "patch_size",
    "vae_embed_dim": "latent_channels",
    "encoder_embed_dim": "encoder_width",
    "encoder_depth": "encoder_depth",
    "encoder_num_heads": "encoder_heads",
    "decoder_embed_dim": "decoder_width",
    "decoder_depth": "decoder_depth",
    "decoder_num_heads": "decoder_heads",
    "mlp_ratio": "mlp_ratio",
    "norm_eps": "norm_eps",
    "class_num": "class_num",
    "mask_ratio_min": "mask_ratio_min",
    "attn_dropout": "attn_dropout",
    "proj_dropout": "proj_dropout",
    "buffer_size": "buffer_size",
    "diffloss_d": "head_depth",
    "diffloss_w": "head_width",
    "diffusion_batch_mul": "diffusion_batch_mul",
}


def vae_config(vae: dict[str, Any], scale: float) -> VAEConfig:
    # Which levels carry attention is given by the resolutions they would have at the nominal picture size.
    sides = [vae["resolution"] // 2**level for level in range(len(vae["ch_mult"]))]
    return VAEConfig(
        base_width=vae["ch"],
        multipliers=tuple(vae["ch_mult"]),
        blocks_per_level=vae["num_res_blocks"],
        latent_channels=vae["embed_dim"],
        norm_groups=vae["norm_groups"],
        norm_eps=vae["norm_eps"],
        encoder_attention_levels=tuple(
            i for i, side in enumerate(sides) if side in vae["encoder_attn_resolutions"]
        ),
        scale=scale,
    )


def mar_config(mar: dict[str, Any]) -> MARConfig:
    """Case `diffloss` gives the head's numbers only; the rest keeps its defaults."""
    ours: dict[str, Any] = {MAR_NAMES[name]: value for name, value in mar.items() if name in MAR_NAMES}
    ours["sampling_steps"] = int(mar["num_sampling_steps"])
    if "img_size" in mar:
        side = mar["img_size"] // mar["vae_stride"] // mar["patch_size"]
        ours["grid"] = (side, side)
    return MARConfig(**ours)


def from_fixture(config: dict[str, Any]) -> HarmonConfig:
    """The whole model of a case."""
    llm = dict(config["llm"])
    llm["rope_parameters"] = {"rope_type": "default", "rope_theta": llm.pop("rope_theta")}
    return HarmonConfig(
        vae=vae_config(config["vae"], config["vae_scale"]),
        mar=mar_config(config["mar"]),
        llm=Qwen2Config(**llm),
        grad_scale=config["grad_scale"],
    )
