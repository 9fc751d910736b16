"""Janus-Pro from fresh or published weights, and back.

Two published layouts, told apart by their names: transformers' (the names of our `janus.` part), and the
original one (`vision_model.`, `gen_vision_model.`, `language_model.` …), where the projections of SigLIP's
attention are one matrix. Of the original, what no one uses is left away: the pooling head of SigLIP and the
codes' usage counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import GenerationConfig, JanusConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from unimrg.config import FamilyConfig, require_choice
from unimrg.families.encoder import PictureEncoder, below, untrained
from unimrg.families.janus.config import VARIANTS, JanusFamilyConfig
from unimrg.families.janus.model import Janus, encode_pictures
from unimrg.weights import check_fits, load_state, load_strictly, model_type, read_state_dict

TINY_VQ = Path(__file__).parent / "assets" / "tiny_vq.safetensors"
HEAD = "lm_head.weight"
VQ, ORIGINAL_VQ = "model.vqmodel.", "gen_vision_model."
POSITIONS = "model.vision_model.embeddings.position_embedding.weight"
ORIGINAL = "original"
"""Subfolder of an export that holds the original layout."""

Pairs = tuple[tuple[str, str], ...]
Rule = tuple[str, str, Pairs]

VISION: Pairs = (
    ("layer_norm1.", "norm1."),
    ("layer_norm2.", "norm2."),
    (".self_attn.projection_layer.", ".attn.proj."),
    (".self_attn.", ".attn."),
)
CODES: Pairs = (
    ("encoder.down.", "encoder.conv_blocks."),
    ("decoder.up.", "decoder.conv_blocks."),
    (".block.", ".res."),
    ("mid.block_1.", "mid.0."),
    ("mid.attn_1.", "mid.1."),
    ("mid.block_2.", "mid.2."),
)
RENAMED: tuple[Rule, ...] = (
    ("lm_head.", "language_model.lm_head.", ()),
    ("model.language_model.", "language_model.model.", ()),
    (POSITIONS, "vision_model.vision_tower.pos_embed", ()),
    ("model.vision_model.embeddings.patch_embedding.", "vision_model.vision_tower.patch_embed.proj.", ()),
    ("model.vision_model.post_layernorm.", "vision_model.vision_tower.norm.", ()),
    ("model.vision_model.encoder.layers.", "vision_model.vision_tower.blocks.", VISION),
    ("model.aligner.fc1.", "aligner.layers.0.", ()),
    ("model.aligner.hidden_layers.0.", "aligner.layers.2.", ()),
    (VQ, ORIGINAL_VQ, CODES),
    ("model.generation_embeddings.", "gen_embed.", ()),
    ("model.generation_aligner.fc1.", "gen_aligner.layers.0.", ()),
    ("model.generation_aligner.hidden_layers.0.", "gen_aligner.layers.2.", ()),
    ("model.generation_head.proj_out.", "gen_head.output_mlp_projector.", ()),
    ("model.generation_head.vision_head.", "gen_head.vision_head.", ()),
)
"""transformers' beginning of a name, the original's, and what differs behind it."""
RENAMED_BACK = tuple((b, a, tuple((new, old) for old, new in inner)) for a, b, inner in RENAMED)
UNUSED = ("vision_model.vision_tower.attn_pool.", "gen_vision_model.quantize.codebook_used")


# -- loading -------------------------------------------------------------------------------------------------


def sizes(config: FamilyConfig) -> JanusFamilyConfig:
    """The model's numbers: of the folder of weights if it describes them, else of the variant.

    Raises ConfigError for an unknown variant, CheckpointError for a description that can't be read.
    """
    kind = model_type(config.weights)
    if kind == JanusFamilyConfig.model_type:
        return JanusFamilyConfig.from_pretrained(config.weights)
    if kind == JanusConfig.model_type:
        return JanusFamilyConfig(janus=JanusConfig.from_pretrained(config.weights))
    require_choice("family.variant", config.variant, VARIANTS)
    return VARIANTS[config.variant]()


def fresh(config: JanusFamilyConfig, seed: int, tiny: bool) -> Janus:
    """New weights from a seed; the tiny size has a trained picture tokenizer of its own."""
    torch.manual_seed(seed)
    model = Janus(config)
    core = model.janus.model
    if tiny:
        load_strictly(core.vqmodel, read_state_dict(TINY_VQ), str(TINY_VQ))
    # As the library draws them, codes would enter the language model a hundred times smaller than words.
    with torch.no_grad():
        core.generation_embeddings.weight.copy_(normalize(core.vqmodel.quantize.embedding.weight, dim=-1))
    for aligner in (core.aligner, core.generation_aligner):
        for layer in (aligner.fc1, *aligner.hidden_layers):
            torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return model


def picture_encoder(config: FamilyConfig, dtype: torch.dtype = torch.float32) -> PictureEncoder:
    """The picture tokenizer that `build` would load, without the rest of the model; `dtype` changes nothing.

    Raises ConfigError where none is given, CheckpointError where its files don't fit.
    """
    numbers = sizes(config)
    if config.weights:
        state, source = _vq_state(read_state_dict(config.weights)), config.weights
    elif config.variant == "tiny":
        state, source = read_state_dict(TINY_VQ), str(TINY_VQ)
    else:
        raise untrained("janus", config.variant)
    vq = JanusVQVAE._from_config(numbers.janus.vq_config, dtype=torch.float32)
    load_strictly(vq, state, source)
    return PictureEncoder(
        {"family": "janus", "encoder": "vq"},
        vq,
        lambda pictures: encode_pictures(vq, pictures),
        numbers.image_size,
        numbers.reads_pixels,
        codes=numbers.janus.vq_config.num_embeddings,
        dtype=dtype,
    )


def _vq_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tokenizer's tensors, out of a model of any of the three layouts."""
    state = from_original({n: t for n, t in state.items() if n.startswith((VQ, f"janus.{VQ}", ORIGINAL_VQ))})
    return below(VQ, {name.removeprefix("janus."): tensor for name, tensor in state.items()})


def from_published(
    config: JanusFamilyConfig, weights: Path, dtype: torch.dtype | None = torch.float32
) -> Janus:
    """Published weights of either layout. Raises CheckpointError unless every key is accounted for."""
    state = read_state_dict(weights)
    if any(name.startswith(ORIGINAL_VQ) for name in state):
        state = from_original(state)
    # The library's default says tied, also for files that have a head of their own.
    config.janus.tie_word_embeddings = HEAD not in state
    with torch.device("meta"):
        expected = Janus(config).janus
    check_fits(expected, state, str(weights), absent=() if HEAD in state else (HEAD,))
    named = {f"janus.{name}": tensor for name, tensor in state.items()}
    model: Janus = load_state(Janus, config, named, dtype)
    return model


# -- exporting -----------------------------------------------------------------------------------------------


def save_published(model: Janus, folder: Path) -> None:
    """Write transformers' layout into `folder`, and the original one below it into `ORIGINAL`.

    The first is loaded by `JanusForConditionalGeneration.from_pretrained`. The original package takes the
    second with the config.json of the published folder; it lacks SigLIP's pooling head, which nothing uses.
    """
    text = model.config.janus.text_config
    model.janus.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        guidance_scale=5.0,
        generation_kwargs={"boi_token_id": model.config.open_image_id},  # where the library looks for it
    )
    model.janus.save_pretrained(folder)
    (folder / ORIGINAL).mkdir(exist_ok=True)
    state = to_original(model.janus.state_dict())
    save_file(state, folder / ORIGINAL / "model.safetensors", metadata={"format": "pt"})


# -- names ---------------------------------------------------------------------------------------------------


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original layout in transformers' names; unknown names stay as they are."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(UNUSED):
            continue
        own = _rename(name, RENAMED_BACK)
        if ".qkv." in own:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                out[own.replace(".qkv.", f".{letter}_proj.")] = part
        else:
            out[own] = tensor.squeeze(0) if own == POSITIONS else tensor
    return out


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names in the original layout; every tensor has memory of its own."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        theirs = _rename(name, RENAMED)
        if ".attn.q_proj." in theirs:
            parts = [state[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            out[theirs.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
        elif ".attn.k_proj." not in theirs and ".attn.v_proj." not in theirs:
            out[theirs] = (tensor.unsqueeze(0) if name == POSITIONS else tensor).clone()
    return out


def _rename(name: str, rules: Iterable[Rule]) -> str:
    for before, after, inner in rules:
        if name.startswith(before):
            rest = name.removeprefix(before)
            for old, new in inner:
                rest = rest.replace(old, new)
            return after + rest
    return name
