"""A small Janus-Pro before any training, whose vision tower makes out the cells of a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import JanusConfig, JanusVisionConfig, LlamaConfig
from transformers.models.janus.configuration_janus import JanusVQVAEConfig

from unimrg.families.harmon.config import tiny as tiny_harmon
from unimrg.families.janus import checkpoint
from unimrg.families.janus.config import TINY_TOKENS, JanusFamilyConfig, tiny
from unimrg.families.janus.model import Janus
from unimrg.families.tokenizer import tiny_tokenizer
from unimrg.reproduce.data import Example
from unimrg.reproduce.words import EMBEDDING, POSITION, words_find_cells
from unimrg.reproduce.world import COLUMNS, ROWS, SIDE


def build(seed: int) -> tuple[Janus, Any]:
    """A Janus-Pro of 0.9 million trained parameters with the tiny variant's picture tokenizer.

    Its vision tower makes cells out, with positions of their own, and the first layer of its language model
    looks at them.
    """
    model, tokenizer = checkpoint.fresh(config(), seed, tiny=True), tiny_tokenizer(TINY_TOKENS)
    core = model.janus.model
    nn.init.normal_(core.vision_model.embeddings.position_embedding.weight, std=POSITION)
    embedding = core.get_input_embeddings()
    nn.init.normal_(embedding.weight, std=EMBEDDING)
    attention = core.language_model.layers[0].self_attn
    words_find_cells(embedding, attention.q_proj, attention.k_proj, tokenizer)
    return model, tokenizer


def config() -> JanusFamilyConfig:
    base, width, seen = tiny(), 128, 96
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


def cells(model: Janus, some: Sequence[Example]) -> Tensor:
    """Cells as they enter the language model, [B, L, H]."""
    return model.embed_pictures(torch.from_numpy(np.stack([example.image for example in some])))
