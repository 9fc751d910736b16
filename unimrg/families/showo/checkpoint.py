"""Show-o from fresh or published weights, and back.

Published are up to three things: Show-o's own (`showo.`, and `mm_projector.` with CLIP), its image tokenizer
MAGVIT-v2, and OpenAI's CLIP. The names of the first are ours unchanged; the second is our `magvit.`, and the
`vision_model.` of the third is our `clip.`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from unimrg.config import FamilyConfig, require_choice
from unimrg.errors import ConfigError
from unimrg.families.encoder import PictureEncoder, below, untrained
from unimrg.families.showo.config import VARIANTS, ShowoConfig
from unimrg.families.showo.magvit import Magvit, frozen_codes
from unimrg.families.showo.model import Showo
from unimrg.weights import check_fits, load_state, load_strictly, model_type, read_state_dict

TINY_MAGVIT = Path(__file__).parent / "assets" / "tiny_magvit.safetensors"
WEIGHTS, CONFIG = "pytorch_model.safetensors", "config.json"
MAGVIT, CLIP = "magvitv2", "clip"
"""Files of an export, and its folders."""
VISION = "vision_model."
CLIP_UNUSED = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
POSITIONS = f"{VISION}embeddings.position_ids"  # 0, 1, 2, … in files of older libraries


# -- loading -------------------------------------------------------------------------------------------------


def sizes(config: FamilyConfig) -> ShowoConfig:
    """The model's numbers: of the folder of weights if it is ours, else of the variant.

    Raises ConfigError for an unknown variant.
    """
    if is_ours(config.weights):
        return ShowoConfig.from_pretrained(config.weights)
    require_choice("family.variant", config.variant, VARIANTS)
    return VARIANTS[config.variant]()


def is_ours(weights: str) -> bool:
    """Whether that is a folder of our own `save_pretrained`."""
    return model_type(weights) == ShowoConfig.model_type


def fresh(config: ShowoConfig, seed: int, tiny: bool) -> Showo:
    """New weights from a seed; the tiny size has a trained image tokenizer of its own."""
    torch.manual_seed(seed)
    model = Showo(config)
    if tiny:
        load_strictly(model.magvit, read_state_dict(TINY_MAGVIT), str(TINY_MAGVIT))
    return model


def picture_encoder(config: FamilyConfig, dtype: torch.dtype = torch.float32) -> PictureEncoder:
    """The image tokenizer that `build` would load, without the rest of the model; `dtype` changes nothing.

    Raises ConfigError where none is given, CheckpointError where its files don't fit.
    """
    numbers = sizes(config)
    if is_ours(config.weights):
        state, source = below("magvit.", read_state_dict(config.weights)), config.weights
    elif config.weights:
        state, source = published_magvit(config.vae_weights), config.vae_weights
    elif config.variant == "tiny":
        state, source = read_state_dict(TINY_MAGVIT), str(TINY_MAGVIT)
    else:
        raise untrained("showo", config.variant)
    magvit = Magvit(numbers.magvit)
    load_strictly(magvit, state, source)
    read = None if numbers.reads_pixels else numbers.source_size
    identity = {
        "family": "showo",
        "encoder": "magvit-v2",
        "settings": asdict(numbers.magvit) | {"source_size": read},
    }
    return PictureEncoder(
        identity,
        magvit,
        lambda pictures: frozen_codes(magvit, numbers, pictures),
        numbers.image_size,
        numbers.reads_pixels,
        codes=numbers.magvit.codes,
        dtype=dtype,
    )


def published_magvit(weights: str) -> dict[str, Tensor]:
    """MAGVIT-v2's tensors. Raises ConfigError when no file is given."""
    if not weights:
        raise ConfigError("family.vae_weights is empty; Show-o needs its image tokenizer (showlab/magvitv2)")
    return read_state_dict(weights)


def from_published(
    sizes: ShowoConfig, config: FamilyConfig, dtype: torch.dtype | None = torch.float32
) -> Showo:
    """Show-o, MAGVIT-v2 and, for the sizes that have it, CLIP.

    Raises ConfigError when one isn't given, CheckpointError when names or shapes don't fit.
    """
    state = published_state(sizes, config)
    source = " with ".join(filter(None, (config.weights, config.vae_weights, config.vision_weights)))
    with torch.device("meta"):
        expected = Showo(sizes)
    check_fits(expected, state, source)
    model: Showo = load_state(Showo, sizes, state, dtype)
    return model


def published_state(sizes: ShowoConfig, config: FamilyConfig) -> dict[str, Tensor]:
    """All published tensors by our names."""
    magvit = published_magvit(config.vae_weights)
    if sizes.clip is not None and not config.vision_weights:
        raise ConfigError(
            f"family.vision_weights is empty; {config.variant} needs CLIP (openai/clip-vit-large-patch14-336)"
        )
    if sizes.clip is None and config.vision_weights:
        raise ConfigError(f"family.vision_weights: {config.variant} reads no picture by CLIP; leave it empty")
    state = read_state_dict(config.weights)
    state |= {f"magvit.{name}": tensor for name, tensor in magvit.items()}
    if config.vision_weights:
        for name, tensor in read_state_dict(config.vision_weights).items():
            if not name.startswith(CLIP_UNUSED) and name != POSITIONS:
                state[f"clip.{name.removeprefix(VISION)}"] = tensor
    return state


# -- exporting -----------------------------------------------------------------------------------------------


def save_published(model: Showo, folder: Path) -> None:
    """Write what the original code reads; `from_published` gives the same model back.

    In `folder` Show-o itself, in `magvitv2/` its image tokenizer, and with CLIP that in `clip/`, as
    transformers saves it.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    own = {n: tensor for n, tensor in state.items() if n.startswith(("showo.", "mm_projector."))}
    _save(own, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(published_config(model.config), indent=2) + "\n")
    _save(below("magvit.", state), folder / MAGVIT / WEIGHTS)
    if model.config.clip is not None:
        clip = {VISION + name: tensor for name, tensor in below("clip.", state).items()}
        _save(clip, folder / CLIP / "model.safetensors")
        model.config.clip.save_pretrained(folder / CLIP)


def published_config(config: ShowoConfig) -> dict[str, Any]:
    """The fields of Show-o's own config.json."""
    return {
        "_class_name": "Showo",
        "w_clip_vit": config.clip is not None,
        "vocab_size": config.llm.vocab_size,
        "llm_vocab_size": config.text_vocab,
        "llm_model_path": "microsoft/phi-1_5",
        "codebook_size": config.magvit.codes,
        "num_vq_tokens": config.target_tokens,
        "load_from_showo": True,
        "mask_token_id": config.mask_id,
    }


def _save(state: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file(state, path, metadata={"format": "pt"})
