"""The models of the reproduction before any training: small, and started so that words find what they name.

With the library's initialisation a tiny model never learns to look up a word of the question in the picture:
attention starts even, and nothing pulls it anywhere. Here the words of questions (" red") start as a rotation
of the words that name cells ("red"), the queries of one layer undo that rotation, and its keys share their
weights. So a question's "red" attends to whatever looks like the name "red", which `base` teaches the
picture's cells to be; it doesn't attend to itself. (Queries and keys that share weights: Trockman and Kolter,
arXiv 2305.09828.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import JanusConfig, JanusVisionConfig, LlamaConfig, Qwen2Config
from transformers.models.janus.configuration_janus import JanusVQVAEConfig

from unimrg.data.scenes.world import COLOURS, SHAPES
from unimrg.families.base import Family
from unimrg.families.encoder import plain
from unimrg.families.harmon import checkpoint as harmon
from unimrg.families.harmon.config import HarmonConfig
from unimrg.families.harmon.config import tiny as tiny_harmon
from unimrg.families.harmon.model import Harmon
from unimrg.families.janus import checkpoint as janus
from unimrg.families.janus.config import TINY_TOKENS, JanusFamilyConfig
from unimrg.families.janus.config import tiny as tiny_janus
from unimrg.families.janus.model import Janus
from unimrg.families.tokenizer import tiny_tokenizer
from unimrg.reproduce.data import Example
from unimrg.reproduce.world import COLUMNS, ROWS, SIDE

NAMES = (COLOURS, SHAPES, tuple(COLUMNS), tuple(ROWS))
"""The words for what a cell shows: colour, shape, column and row."""

SHARPNESS = 2.0  # factor on the queries of the layer that looks
APART = 0.7  # how much of its own a column's name has, beside its place in the order
EMBEDDING, POSITION = 0.1, 0.5  # standard deviations of word embeddings and of positions in the picture


@dataclass(frozen=True)
class Recipe:
    """How a family's small model is made, and where its picture's cells can be named.

    build: a seed to model and tokenizer. cells: model and pictures to states [B, L, H].
    """

    build: Callable[[int], tuple[Family, Any]]
    cells: Callable[[Any, Sequence[Example]], Tensor]


# -- Harmon --------------------------------------------------------------------------------------------------


def build_harmon(seed: int) -> tuple[Harmon, Any]:
    """A Harmon of 1.9 million parameters with the tiny variant's autoencoder; its first layer looks."""
    model, tokenizer = harmon.fresh(_harmon(), seed, tiny=True), tiny_tokenizer()
    nn.init.normal_(model.mar.encoder_pos_embed_learned, std=POSITION)
    embedding = model.llm.get_input_embeddings()
    nn.init.normal_(embedding.weight, std=EMBEDDING)
    attention = model.llm.model.layers[0].self_attn
    words_find_cells(embedding, attention.q_proj, attention.k_proj, tokenizer)
    return model, tokenizer


def _harmon() -> HarmonConfig:
    base, width = tiny_harmon(), 128
    llm = Qwen2Config(
        vocab_size=base.llm.vocab_size,
        hidden_size=width,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,  # a key of its own for every query
        intermediate_size=3 * width,
        initializer_range=1 / math.sqrt(width),
        rope_parameters=base.llm.rope_parameters,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    mar = replace(base.mar, encoder_depth=3, decoder_depth=1, buffer_size=4, head_depth=2, head_width=width)
    return HarmonConfig(vae=base.vae, mar=mar, llm=llm, image_size=64, guidance=1.0, grad_scale=1.0)


def harmon_cells(model: Harmon, some: Sequence[Example]) -> Tensor:
    """Cells as they enter the language model, [B, L, H]."""
    codes = torch.from_numpy(np.stack([plain(example.codes["image"]) for example in some]))
    return model.embed_pictures(codes)[:, model.config.mar.buffer_size :]


# -- Janus-Pro -----------------------------------------------------------------------------------------------


def build_janus(seed: int) -> tuple[Janus, Any]:
    """A Janus-Pro of 0.9 million trained parameters with the tiny variant's picture tokenizer.

    Its vision tower makes cells out, with positions of their own, and the first layer of its language model
    looks at them.
    """
    model, tokenizer = janus.fresh(_janus(), seed, tiny=True), tiny_tokenizer(TINY_TOKENS)
    core = model.janus.model
    nn.init.normal_(core.vision_model.embeddings.position_embedding.weight, std=POSITION)
    embedding = core.get_input_embeddings()
    nn.init.normal_(embedding.weight, std=EMBEDDING)
    attention = core.language_model.layers[0].self_attn
    words_find_cells(embedding, attention.q_proj, attention.k_proj, tokenizer)
    return model, tokenizer


def _janus() -> JanusFamilyConfig:
    base, width, seen = tiny_janus(), 128, 96
    llm = LlamaConfig(
        vocab_size=base.janus.text_config.vocab_size,
        hidden_size=width,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=4096,
        initializer_range=1 / math.sqrt(width),
        rope_parameters=tiny_harmon().llm.rope_parameters,
        bos_token_id=base.janus.text_config.bos_token_id,
        eos_token_id=base.janus.text_config.eos_token_id,
        pad_token_id=base.janus.text_config.pad_token_id,
        tie_word_embeddings=True,
    )
    vision = JanusVisionConfig(
        hidden_size=seen,
        num_hidden_layers=3,
        num_attention_heads=4,
        mlp_ratio=2,
        image_size=SIDE,
        patch_size=SIDE // len(COLUMNS),
        projection_dim=width,
        num_image_tokens=len(COLUMNS) * len(ROWS),
        initializer_range=1 / math.sqrt(seen),
    )
    vq = JanusVQVAEConfig(
        **base.janus.vq_config.to_diff_dict() | {"projection_dim": width, "image_token_embed_dim": width}
    )
    whole = JanusConfig(
        text_config=llm, vision_config=vision, vq_config=vq, image_token_id=base.janus.image_token_id
    )
    return JanusFamilyConfig(janus=whole, open_image_id=base.open_image_id)


def janus_cells(model: Janus, some: Sequence[Example]) -> Tensor:
    """Cells as they enter the language model, [B, L, H]."""
    return model.embed_pictures(torch.from_numpy(np.stack([example.image for example in some])))


# -- what they share -----------------------------------------------------------------------------------------


def words_find_cells(embedding: nn.Embedding, query: nn.Linear, key: nn.Linear, tokenizer: Any) -> None:
    """Start the words and a layer's queries as the module's head says."""
    width = embedding.embedding_dim
    with torch.no_grad():
        for words in NAMES[2:]:
            embedding.weight[ids_of(tokenizer, words)] = EMBEDDING * _in_order(len(words), width)
        rotation = torch.linalg.qr(torch.randn(width, width))[0]
        for words in NAMES[:2]:
            answers = embedding.weight[ids_of(tokenizer, words)]
            embedding.weight[ids_of(tokenizer, [f" {word}" for word in words])] = answers @ rotation.T
        query.weight.copy_(SHARPNESS * key.weight @ rotation.T)


def _in_order(count: int, width: int) -> Tensor:
    """[count, width] of unit variance along half a circle, so that which comes first is read off a line."""
    plane = torch.linalg.qr(torch.randn(width, 2))[0]
    turn = torch.linspace(0, math.pi, count)
    own = nn.functional.normalize(torch.randn(count, width), dim=-1)
    rows = torch.stack([turn.cos(), turn.sin()], 1) @ plane.T + APART * own
    return nn.functional.normalize(rows, dim=-1) * math.sqrt(width)


def ids_of(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """One id of each word: all are single tokens of the tiny tokenizer."""
    found = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    return [one for (one,) in found]


RECIPES = {"harmon": Recipe(build_harmon, harmon_cells), "janus": Recipe(build_janus, janus_cells)}
