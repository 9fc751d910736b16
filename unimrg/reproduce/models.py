"""The models of the reproduction before any training: small, and started so that words find what they name.

With the library's initialisation a tiny model never learns to look up a word of the question in the picture:
attention starts even, and nothing pulls it anywhere. Here the words of questions (" red") start as a rotation
of the words of answers ("red"), the first layer's queries undo that rotation, and its keys share the queries'
weights. So a question's "red" attends to whatever looks like the answer "red", which `base` teaches the
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
from transformers import Qwen2Config

from unimrg.data.scenes.world import COLOURS, SHAPES
from unimrg.families.base import Family
from unimrg.families.harmon.checkpoint import fresh as fresh_harmon
from unimrg.families.harmon.config import HarmonConfig, tiny
from unimrg.families.harmon.model import Harmon
from unimrg.families.tokenizer import tiny_tokenizer
from unimrg.reproduce.world import COLUMNS, ROWS

NAMES = (COLOURS, SHAPES, tuple(COLUMNS), tuple(ROWS))
"""The words for what a cell shows: colour, shape, column and row."""

SHARPNESS = 2.0  # factor on the first layer's queries
APART = 0.7  # how much of its own a column's name has, beside its place in the order
EMBEDDING, POSITION = 0.1, 0.5  # standard deviations of word embeddings and of positions in the picture


@dataclass(frozen=True)
class Recipe:
    """How a family's small model is made, and where its picture's cells can be named.

    build: a seed to model and tokenizer. cells: model and codes of pictures [B, ...] to states [B, L, H].
    """

    build: Callable[[int], tuple[Family, Any]]
    cells: Callable[[Any, Tensor], Tensor]


def build_harmon(seed: int) -> tuple[Harmon, Any]:
    """A Harmon of 1.9 million parameters with the tiny variant's autoencoder."""
    model, tokenizer = fresh_harmon(_harmon(), seed, tiny=True), tiny_tokenizer()
    nn.init.normal_(model.mar.encoder_pos_embed_learned, std=POSITION)
    embedding = model.llm.get_input_embeddings()
    nn.init.normal_(embedding.weight, std=EMBEDDING)
    attention = model.llm.model.layers[0].self_attn
    words_find_cells(embedding, attention.q_proj, attention.k_proj, tokenizer)
    return model, tokenizer


def _harmon() -> HarmonConfig:
    base, width = tiny(), 128
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


def words_find_cells(embedding: nn.Embedding, query: nn.Linear, key: nn.Linear, tokenizer: Any) -> None:
    """Start the words and the first layer's queries as the module's head says."""
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


def harmon_cells(model: Harmon, codes: Tensor) -> Tensor:
    """Cells as they enter the language model, [B, L, H]."""
    return model.embed_pictures(codes)[:, model.config.mar.buffer_size :]


RECIPES = {"harmon": Recipe(build_harmon, harmon_cells)}
