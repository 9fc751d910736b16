"""OpenUni from fresh or published weights, and back.

Published are up to four things: InternVL3 (original or transformers' layout), SANA and DC-AE (diffusers'
layout), and OpenUni's own flat file, which holds only what its training changed: `meta_queries`,
`connector.`, `projector.`, and after fine-tuning `transformer.` (SANA). What that file lacks comes from the
others; a part that none of them has is an error that says which knob is empty.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from unimrg.config import FamilyConfig, require_choice
from unimrg.errors import CheckpointError, ConfigError
from unimrg.families.encoder import PictureEncoder, below, untrained
from unimrg.families.openuni import libraries
from unimrg.families.openuni.config import VARIANTS, OpenUniConfig
from unimrg.families.openuni.keys import to_original, to_transformers
from unimrg.families.openuni.model import OpenUni, encode_pictures
from unimrg.weights import check_fits, load_state, load_strictly, model_type, read_state_dict

log = logging.getLogger(__name__)

TINY_VAE = Path(__file__).parent / "assets" / "tiny_dc_ae.safetensors"
OWN = ("meta_queries", "connector.", "projector.")
"""What begins anew when only InternVL3, SANA and DC-AE are given: OpenUni's first training stage."""
PARTS = {
    "lmm.": "language_weights",
    "transformer.": "diffusion_weights",
    "vae.": "vae_weights",
    "meta_queries": "weights",
    "connector.": "weights",
    "projector.": "weights",
}
"""Beginning of a part's names, and the knob of `FamilyConfig` whose files have it."""
FLAT, LANGUAGE, DIFFUSION, VAE = "openuni.pth", "internvl3", "transformer", "vae"
"""Files and folders of an export."""


# -- loading -------------------------------------------------------------------------------------------------


def sizes(config: FamilyConfig) -> OpenUniConfig:
    """The model's numbers: of the folder of weights if it is ours, else of the variant.

    Raises ConfigError for an unknown variant.
    """
    if is_ours(config.weights):
        return OpenUniConfig.from_pretrained(config.weights)
    require_choice("family.variant", config.variant, VARIANTS)
    return VARIANTS[config.variant]()


def is_ours(weights: str) -> bool:
    """Whether that is a folder of our own `save_pretrained`."""
    return model_type(weights) == OpenUniConfig.model_type


def fresh(config: OpenUniConfig, seed: int, tiny: bool) -> OpenUni:
    """New weights from a seed; the tiny size has a trained autoencoder of its own."""
    torch.manual_seed(seed)
    model = OpenUni(config)
    if tiny:
        load_strictly(model.vae, read_state_dict(TINY_VAE), str(TINY_VAE))
    return model


def picture_encoder(config: FamilyConfig, dtype: torch.dtype = torch.float32) -> PictureEncoder:
    """The autoencoder that `build` would load, without the rest of the model.

    Raises ConfigError where none is given, CheckpointError where its files don't fit.
    """
    numbers = sizes(config)
    state, source = _vae_state(config)
    vae = libraries.dc_ae(numbers.vae)
    load_strictly(vae, state, source)
    identity = {"family": "openuni", "encoder": "dc-ae", "settings": asdict(numbers.vae)}
    return PictureEncoder(
        identity,
        vae,
        lambda pictures: encode_pictures(vae, numbers.vae, pictures),
        numbers.image_size,
        numbers.reads_pixels,
        dtype=dtype,
    )


def _vae_state(config: FamilyConfig) -> tuple[dict[str, Tensor], str]:
    """The autoencoder's tensors, and where they are from: as `published_state` and `fresh` choose."""
    own = below("vae.", read_state_dict(config.weights)) if config.weights else {}
    if own or is_ours(config.weights):
        return own, config.weights
    if config.vae_weights:
        return _read_part(config.vae_weights, "vae"), config.vae_weights
    if config.weights or config.language_weights or config.diffusion_weights:
        raise _nowhere("vae.", config)
    if config.variant != "tiny":
        raise untrained("openuni", config.variant)
    return read_state_dict(TINY_VAE), str(TINY_VAE)


def from_published(
    sizes: OpenUniConfig, config: FamilyConfig, seed: int, dtype: torch.dtype | None = torch.float32
) -> OpenUni:
    """Published weights, whole parts of them from wherever they are; the log says what came from where.

    Raises ConfigError when a part is nowhere, CheckpointError when names or shapes don't fit.
    """
    state = published_state(config)
    absent = () if config.weights else OWN
    given = filter(
        None, (config.weights, config.language_weights, config.diffusion_weights, config.vae_weights)
    )
    source = " with ".join(given)
    with torch.device("meta"):
        expected = OpenUni(sizes)
    # Before minutes are spent on drawing weights for the wrong variant.
    check_fits(expected, state, source, absent)
    if not absent:
        model: OpenUni = load_state(OpenUni, sizes, state, dtype)
        return model
    torch.manual_seed(seed)
    model = OpenUni(sizes)
    load_strictly(model, state, source, absent)
    return model


def published_state(config: FamilyConfig) -> dict[str, Tensor]:
    """All published tensors by our names; OpenUni's own file goes over the others."""
    state: dict[str, Tensor] = {}
    if config.language_weights:
        state |= _under("lmm.", to_transformers(read_state_dict(config.language_weights)))
    if config.diffusion_weights:
        state |= _under("transformer.", _read_part(config.diffusion_weights, "transformer"))
    if config.vae_weights:
        state |= _under("vae.", _read_part(config.vae_weights, "vae"))
    own = _own_state(config.weights) if config.weights else {}
    for part, knob in PARTS.items():
        from_own = any(name.startswith(part) for name in own)
        if from_own or any(name.startswith(part) for name in state):
            log.info("%s from %s", part.rstrip("."), config.weights if from_own else getattr(config, knob))
        elif part in OWN and not config.weights:
            log.info("%s begins anew", part.rstrip("."))
        else:
            raise _nowhere(part, config)
    return state | own


def _own_state(weights: str) -> dict[str, Tensor]:
    """OpenUni's flat file; usually without `lmm.` and `vae.`, but they may be there."""
    state = read_state_dict(weights)
    lmm = {name: tensor for name, tensor in state.items() if name.startswith("lmm.")}
    rest = {name: tensor for name, tensor in state.items() if name not in lmm}
    return rest | _under("lmm.", to_transformers(lmm))


def _nowhere(part: str, config: FamilyConfig) -> ConfigError | CheckpointError:
    knob = PARTS[part]
    if knob == "weights":
        return CheckpointError(
            f"{config.weights} lacks {part.rstrip('.')}; give a file of OpenUni as published"
        )
    what = {"lmm.": "InternVL3", "transformer.": "SANA", "vae.": "DC-AE"}[part]
    where = f", and {config.weights} doesn't hold {part.rstrip('.')}" if config.weights else ""
    return ConfigError(f"family.{knob} is empty{where}; give the folder or file of {what}")


def _read_part(weights: str, inside: str) -> dict[str, Tensor]:
    """A file, a model's folder, or the folder `inside` a pipeline's."""
    below = Path(weights) / inside
    state = read_state_dict(below if below.is_dir() else weights)
    return {name.removeprefix(f"{inside}."): tensor for name, tensor in state.items()}


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


# -- exporting -----------------------------------------------------------------------------------------------


def save_published(model: OpenUni, folder: Path) -> None:
    """Write what the original code and diffusers read; `from_published` gives the same model back.

    `openuni.pth`: queries, connector, projector and SANA as one plain state dict. `internvl3/`: the trained
    language model with its vision tower in InternVL3's original layout, to be put in the place of the weights
    in a published folder. `transformer/` and `vae/`: SANA and DC-AE as diffusers saves them.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    own = {name: tensor for name, tensor in state.items() if not name.startswith(("lmm.", "vae."))}
    torch.save(own, folder / FLAT)
    lmm = {n.removeprefix("lmm."): tensor for n, tensor in state.items() if n.startswith("lmm.")}
    (folder / LANGUAGE).mkdir(exist_ok=True)
    save_file(to_original(lmm), folder / LANGUAGE / "model.safetensors", metadata={"format": "pt"})
    model.transformer.save_pretrained(folder / DIFFUSION)
    model.vae.save_pretrained(folder / VAE)
