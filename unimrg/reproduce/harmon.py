"""A small Harmon before any training, whose buffers stand for the cells of its pictures.

From a picture to what is drawn of it one way leads in Harmon: through its buffers. Left alone, a tiny model
never finds it, and draws without looking (docs/experiments.md). So there is a buffer for every cell; `base`
names it by the cell's column and row, turned like a question's words; and attention starts such that it
looks at its cell, and that a cell to be drawn looks at its buffer, which both hand on what they see.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2Config

from unimrg.families.encoder import plain
from unimrg.families.harmon import checkpoint
from unimrg.families.harmon.config import HarmonConfig, tiny
from unimrg.families.harmon.model import Harmon
from unimrg.families.tokenizer import tiny_tokenizer
from unimrg.reproduce.data import Example
from unimrg.reproduce.words import EMBEDDING, NAMES, POSITION, ids_of, rotation, words_find_cells
from unimrg.reproduce.world import COLUMNS, ROWS, SIDE

IN_TEXT, IN_DECODER = 2.5, 2.0  # factors on the queries that look by place


def build(seed: int) -> tuple[Harmon, Any]:
    """A Harmon of 1.9 million parameters with the tiny variant's autoencoder; its first layer looks."""
    model, tokenizer = checkpoint.fresh(config(), seed, tiny=True), tiny_tokenizer()
    nn.init.normal_(model.mar.encoder_pos_embed_learned, std=POSITION)
    embedding = model.llm.get_input_embeddings()
    nn.init.normal_(embedding.weight, std=EMBEDDING)
    attention = model.llm.model.layers[0].self_attn
    words_find_cells(embedding, attention.q_proj, attention.k_proj, tokenizer)
    _buffers_stand_for_cells(model, tokenizer)
    return model, tokenizer


def _buffers_stand_for_cells(model: Harmon, tokenizer: Any) -> None:
    """A buffer looks at its cell of the picture from the start, and a cell to be drawn at its buffer."""
    _by_name(model, tokenizer)
    mar: Any = model.mar
    attention = mar.decoder_blocks[0].attn
    width, codes = mar.config.decoder_width, len(COLUMNS) + len(ROWS)
    ways, cells = rotation(width), torch.arange(len(COLUMNS) * len(ROWS))
    place = torch.zeros(len(cells), codes)
    place[cells, cells % len(COLUMNS)] = place[cells, len(COLUMNS) + cells // len(COLUMNS)] = 1
    with torch.no_grad():
        table = math.sqrt(width / 2) * torch.cat([place @ ways[:codes], place @ ways[codes : 2 * codes]])
        mar.decoder_pos_embed_learned.copy_(table)
        query, key, value = attention.qkv.weight.chunk(3)
        attention.qkv.weight[: 2 * width] = 0
        for head in range(attention.heads):
            at = head * width // attention.heads
            key[at : at + codes] = ways[:codes]
            query[at : at + codes] = IN_DECODER * ways[codes : 2 * codes]
        _pass_on(value, attention.proj.weight)


def _by_name(model: Harmon, tokenizer: Any) -> None:
    """Half of the heads of the layer that looks do so by column and row, which name buffers, turned."""
    attention, width = model.llm.model.layers[0].self_attn, model.config.llm.hidden_size
    size = attention.head_dim
    with torch.no_grad():
        words = model.llm.get_input_embeddings().weight[ids_of(tokenizer, NAMES[2] + NAMES[3])]
        known = torch.linalg.pinv(nn.functional.normalize(words, dim=-1)).T
        # In the half of a head that rotary positions hardly turn over a few hundred tokens.
        slow = torch.arange(size).view(2, 2, -1)[:, 1].flatten()
        for at in range(width // 2, width, size):
            for projection, rows in (
                (attention.k_proj, known),
                (attention.q_proj, IN_TEXT * known @ rotation(width).T),
            ):
                projection.weight[at : at + size] = 0
                projection.weight[at + slow] = rows
        _pass_on(attention.v_proj.weight, attention.o_proj.weight)


def _pass_on(value: Tensor, out: Tensor) -> None:
    """Values and outputs of an attention that hand on what is looked at as it is."""
    nn.init.orthogonal_(value)
    out.copy_(value.T)


def config() -> HarmonConfig:
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
    mar = replace(
        base.mar,
        encoder_depth=3,
        decoder_depth=1,
        buffer_size=len(COLUMNS) * len(ROWS),
        head_depth=2,
        head_width=width,
    )
    return HarmonConfig(vae=base.vae, mar=mar, llm=llm, image_size=SIDE, guidance=1.0, grad_scale=1.0)


def cells(model: Harmon, some: Sequence[Example]) -> Tensor:
    """Cells as they enter the language model, [B, L, H]."""
    codes = torch.from_numpy(np.stack([plain(example.codes["image"]) for example in some]))
    return model.embed_pictures(codes)[:, model.config.mar.buffer_size :]


def buffers(model: Harmon, some: Sequence[Example]) -> Tensor:
    """Buffers as they enter the language model, turned as queries are: of whole pictures, and of none."""
    codes = torch.from_numpy(np.stack([plain(example.codes["image"]) for example in some]))
    buffers = model.config.mar.buffer_size
    whole = model.embed_pictures(codes)[:, :buffers]
    alone = model.proj_in(model.mar.encode(codes[:1], model.grid, torch.ones(codes[:1].shape[:2])))
    return torch.cat([whole, alone]) @ rotation(whole.shape[-1])


class Guess:
    """Cells that are to be drawn, by a linear map of what the diffusion head is told of them.

    kinds: of drawings, each with a map of its own: what is told is to be of the picture, whatever is drawn.
    """

    def __init__(self, model: Harmon, kinds: int) -> None:
        mar = model.config.mar
        self.model, self.told = model, torch.empty(0)
        self.maps = nn.ModuleList(nn.Linear(mar.decoder_width, mar.token_width) for _ in range(kinds))
        self.optimizer = torch.optim.Adam(self.maps.parameters())
        model.mar.decoder_norm.register_forward_hook(self._hear)

    def _hear(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.told = output[:, self.model.config.mar.buffer_size :]

    def loss(self, batch: Any, kinds: Sequence[int]) -> Tensor:
        """Mean squared error over the masked cells, of latents with a standard deviation near 1."""
        wanted = self.model.codes_of(batch)[batch.target_source]
        found = torch.stack([self.maps[kind](told) for kind, told in zip(kinds, self.told, strict=True)])
        return (found.flatten(0, 1) - wanted.flatten(0, 1))[batch.loss_rows].square().mean()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
