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

import torch
from torch import Tensor, nn
from transformers import PhiConfig, Qwen2Config

from unimrg.data.scenes.world import COLOURS, SHAPES
from unimrg.families.base import Family
from unimrg.families.harmon import checkpoint as harmon
from unimrg.families.harmon.config import HarmonConfig
from unimrg.families.harmon.config import tiny as tiny_harmon
from unimrg.families.harmon.model import Harmon
from unimrg.families.showo import checkpoint as showo
from unimrg.families.showo.config import ShowoConfig
from unimrg.families.showo.config import tiny as tiny_showo
from unimrg.families.showo.model import Showo
from unimrg.families.tokenizer import tiny_tokenizer
from unimrg.reproduce.world import COLUMNS, ROWS

NAMES = (COLOURS, SHAPES, tuple(COLUMNS), tuple(ROWS))
"""The words for what a cell shows: colour, shape, column and row."""

SHARPNESS = 2.0  # factor on the queries of the layer that looks
APART = 0.7  # how much of its own a column's name has, beside its place in the order
EMBEDDING, POSITION = 0.1, 0.5  # standard deviations of word embeddings and of positions in the picture


LOOKING = 2  # layers of Show-o in which the picture's cells are made out, before words look at them
QUIET = 0.1  # factor on what these layers add at the start


@dataclass(frozen=True)
class Recipe:
    """How a family's small model is made, and where its picture's cells can be named.

    build: a seed to model and tokenizer. cells: model and codes of pictures [B, ...] to states [B, L, H].
    """

    build: Callable[[int], tuple[Family, Any]]
    cells: Callable[[Any, Tensor], Tensor]


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


def harmon_cells(model: Harmon, codes: Tensor) -> Tensor:
    """Cells as they enter the language model, [B, L, H]."""
    return model.embed_pictures(codes)[:, model.config.mar.buffer_size :]


# -- Show-o --------------------------------------------------------------------------------------------------


def build_showo(seed: int) -> tuple[Showo, Any]:
    """A Show-o of 1.3 million parameters with the tiny variant's image tokenizer; its third layer looks.

    Words that name cells also start as what scores the answers of the same sound.
    """
    model, tokenizer = showo.fresh(_showo(), seed, tiny=True), tiny_tokenizer()
    embedding, layers = model.showo.get_input_embeddings(), model.showo.model.layers
    nn.init.normal_(embedding.weight, std=EMBEDDING)
    attention = layers[LOOKING].self_attn
    words_find_cells(embedding, attention.q_proj, attention.k_proj, tokenizer)
    with torch.no_grad():
        attention.q_layernorm.weight.fill_(SHARPNESS)  # it would undo a factor on the weights
        for layer in layers[:LOOKING]:
            layer.self_attn.dense.weight.mul_(QUIET)
            layer.mlp.fc2.weight.mul_(QUIET)
        for words in NAMES[:2]:
            said = ids_of(tokenizer, [f" {word}" for word in words])
            model.showo.lm_head.weight[said] = embedding.weight[ids_of(tokenizer, words)]
    return model, tokenizer


def _showo() -> ShowoConfig:
    base, width = tiny_showo(), 128
    llm = PhiConfig(
        vocab_size=base.llm.vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=5,
        num_attention_heads=4,
        initializer_range=1 / math.sqrt(width),
        qk_layernorm=True,
        hidden_act=base.llm.hidden_act,
        rope_parameters=base.llm.rope_parameters,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    return ShowoConfig(
        magvit=base.magvit,
        llm=llm,
        text_vocab=base.text_vocab,
        text_end=0,
        image_size=64,
        source_size=32,
        guidance=1.0,
    )


def showo_cells(model: Showo, codes: Tensor) -> Tensor:
    """Cells as they enter the layer that words look with, [B, L, H]."""
    config, count = model.config, len(codes)
    picture = model.embed_codes(codes[:, config.target_tokens :])
    around = torch.tensor([config.special(name) for name in ("mmu", "soi", "eoi")])
    before, after = model.showo.get_input_embeddings()(around).split((2, 1))
    states = torch.cat([before.expand(count, -1, -1), picture, after.expand(count, -1, -1)], 1)
    positions = torch.arange(states.shape[1])[None]
    rotations = model.showo.model.rotary_emb(states, position_ids=positions)
    whole = torch.ones(1, 1, states.shape[1], states.shape[1], dtype=torch.bool)
    for layer in model.showo.model.layers[:LOOKING]:
        states = layer(states, attention_mask=whole, position_ids=positions, position_embeddings=rotations)
    return states[:, 2:-1]


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


RECIPES = {"harmon": Recipe(build_harmon, harmon_cells), "showo": Recipe(build_showo, showo_cells)}
