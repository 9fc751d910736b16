"""Harmon from fresh or published weights, and back.

Published files: a flat state dict (`llm.`, `mar.`, `proj_in.`, `proj_out.`; the autoencoder is separate) and
`kl16.ckpt` for the autoencoder. Parameter names are ours unchanged, so both ways are the identity but for
the `vae.` prefix and the tied `llm.lm_head.weight`, which may be in a file or not.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from unimrg.families.harmon.config import VARIANTS, HarmonConfig
from unimrg.families.harmon.model import Harmon
from unimrg.weights import check_fits, load_folder, load_strictly, read_state_dict

TINY_VAE = Path(__file__).parent / "assets" / "tiny_vae.safetensors"
TIED = "llm.lm_head.weight"
WEIGHTS, VAE = "harmon.safetensors", "vae.safetensors"


def variant_config(variant: str) -> HarmonConfig:
    """The named size. Raises ConfigError for an unknown name."""
    from unimrg.config import require_choice

    require_choice("family.variant", variant, VARIANTS)
    return VARIANTS[variant]()


def fresh(config: HarmonConfig, seed: int, tiny: bool) -> Harmon:
    """New weights from a seed; the tiny size has a trained autoencoder of its own."""
    torch.manual_seed(seed)
    model = Harmon(config)
    if tiny:
        load_strictly(model.vae, read_state_dict(TINY_VAE), str(TINY_VAE))
    return model


def from_folder(folder: Path, dropout: float | None = None) -> Harmon:
    """A folder of `save_pretrained`, every key accounted for.

    Raises CheckpointError when a key is missing, unexpected, or a file is unreadable.
    """
    options = (
        {} if dropout is None else {"config": with_dropout(HarmonConfig.from_pretrained(folder), dropout)}
    )
    model: Harmon = load_folder(Harmon, folder, **options)
    return model


def from_published(config: HarmonConfig, weights: Path, vae_weights: Path) -> Harmon:
    """The published flat file and the autoencoder's."""
    state = read_state_dict(weights)
    if "llm.model.embed_tokens.weight" in state:
        state.setdefault(TIED, state["llm.model.embed_tokens.weight"])
    vae = {f"vae.{name.removeprefix('vae.')}": t for name, t in read_state_dict(vae_weights).items()}
    with torch.device("meta"):
        expected = Harmon(config)
    # kl16.ckpt also carries its training losses; only what the autoencoder has is wanted, and all of that.
    state |= {name: tensor for name, tensor in vae.items() if name in expected.state_dict()}
    source = f"{weights} with {vae_weights}"
    check_fits(expected, state, source)  # before minutes are spent on drawing weights for the wrong variant
    model = Harmon(config)
    load_strictly(model, state, source)
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
