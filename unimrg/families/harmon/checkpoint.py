"""Harmon from fresh or published weights, and back.

Published files: a flat state dict (`llm.`, `mar.`, `proj_in.`, `proj_out.`; the autoencoder is separate) and
`kl16.ckpt` for the autoencoder. Parameter names are ours unchanged, so both ways are the identity but for
the `vae.` prefix and the tied `llm.lm_head.weight`, which may be in a file or not.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from unimrg.config import FamilyConfig
from unimrg.errors import ConfigError
from unimrg.families.encoder import PictureEncoder, below, untrained
from unimrg.families.harmon.config import VARIANTS, HarmonConfig
from unimrg.families.harmon.model import Harmon
from unimrg.families.harmon.vae import KLVAE
from unimrg.weights import check_fits, load_folder, load_state, load_strictly, model_type, read_state_dict

TINY_VAE = Path(__file__).parent / "assets" / "tiny_vae.safetensors"
TIED = "llm.lm_head.weight"
WEIGHTS, VAE = "harmon.safetensors", "vae.safetensors"


def variant_config(variant: str) -> HarmonConfig:
    """The named size. Raises ConfigError for an unknown name."""
    from unimrg.config import require_choice

    require_choice("family.variant", variant, VARIANTS)
    return VARIANTS[variant]()


def sizes(config: FamilyConfig) -> HarmonConfig:
    """The model's numbers: of the folder of weights if it is ours, else of the variant.

    Raises ConfigError for an unknown variant.
    """
    if is_ours(config.weights):
        return HarmonConfig.from_pretrained(config.weights)
    return variant_config(config.variant)


def is_ours(weights: str) -> bool:
    """Whether that is a folder of our own `save_pretrained`."""
    return model_type(weights) == HarmonConfig.model_type


def picture_encoder(config: FamilyConfig, dtype: torch.dtype = torch.float32) -> PictureEncoder:
    """The autoencoder that `build` would load, without the rest of the model.

    Raises ConfigError where none is given, CheckpointError where its files don't fit.
    """
    if not config.weights and config.variant != "tiny":
        raise untrained("harmon", config.variant)
    numbers = sizes(config)
    vae = KLVAE(numbers.vae)
    if is_ours(config.weights):
        state, source = below("vae.", read_state_dict(config.weights)), config.weights
    elif config.weights:
        state, source = published_vae(vae, config.vae_weights), config.vae_weights
    else:
        state, source = read_state_dict(TINY_VAE), str(TINY_VAE)
    load_strictly(vae, state, source)
    patch = numbers.mar.patch_size
    identity = {"family": "harmon", "encoder": "kl-vae", "settings": asdict(numbers.vae) | {"patch": patch}}
    return PictureEncoder(
        identity,
        vae,
        lambda pictures: vae.encode_pictures(pictures, patch),
        numbers.image_size,
        numbers.reads_pixels,
        dtype=dtype,
    )


def published_vae(vae: torch.nn.Module, weights: str) -> dict[str, torch.Tensor]:
    """What `vae` has of `kl16.ckpt`, which also carries its training losses.

    Raises ConfigError when no file is given.
    """
    if not weights:
        raise ConfigError(
            "family.vae_weights is empty; published weights need the autoencoder's file (kl16.ckpt)"
        )
    state = {name.removeprefix("vae."): tensor for name, tensor in read_state_dict(weights).items()}
    return {name: tensor for name, tensor in state.items() if name in vae.state_dict()}


def fresh(config: HarmonConfig, seed: int, tiny: bool) -> Harmon:
    """New weights from a seed; the tiny size has a trained autoencoder of its own."""
    torch.manual_seed(seed)
    model = Harmon(config)
    if tiny:
        load_strictly(model.vae, read_state_dict(TINY_VAE), str(TINY_VAE))
    return model


def from_folder(
    folder: Path, dropout: float | None = None, dtype: torch.dtype | None = torch.float32
) -> Harmon:
    """A folder of `save_pretrained`, every key accounted for; dtype as in `load_folder`.

    Raises CheckpointError when a key is missing, unexpected, or a file is unreadable.
    """
    options = (
        {} if dropout is None else {"config": with_dropout(HarmonConfig.from_pretrained(folder), dropout)}
    )
    model: Harmon = load_folder(Harmon, folder, dtype, **options)
    return model


def from_published(
    config: HarmonConfig, weights: str, vae_weights: str, dtype: torch.dtype | None = torch.float32
) -> Harmon:
    """The published flat file and the autoencoder's. Raises ConfigError when the latter isn't given."""
    state = read_state_dict(weights)
    if "llm.model.embed_tokens.weight" in state:
        state.setdefault(TIED, state["llm.model.embed_tokens.weight"])
    with torch.device("meta"):
        expected = Harmon(config)
    vae = published_vae(expected.vae, vae_weights)
    state |= {f"vae.{name}": tensor for name, tensor in vae.items()}
    source = f"{weights} with {vae_weights}"
    check_fits(expected, state, source)
    model: Harmon = load_state(Harmon, config, state, dtype)
    return model


def with_dropout(config: HarmonConfig, dropout: float) -> HarmonConfig:
    """The same with MAR's dropouts replaced."""
    config.mar.attn_dropout = config.mar.proj_dropout = dropout
    return config


def save_published(model: Harmon, folder: Path) -> None:
    """Write the published flat layout as safetensors: `WEIGHTS` without the autoencoder, and `VAE` alone."""
    parts: dict[str, dict[str, torch.Tensor]] = {WEIGHTS: {}, VAE: {}}
    for name, tensor in model.state_dict().items():
        if name != TIED:
            file = VAE if name.startswith("vae.") else WEIGHTS
            parts[file][name.removeprefix("vae.")] = tensor.contiguous()
    for file, state in parts.items():
        save_file(state, folder / file, metadata={"format": "pt"})
