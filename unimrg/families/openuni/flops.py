"""What a pass of OpenUni costs (`unimrg.flops`), from the sizes of its batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from unimrg.families.openuni.processor import OpenUniBatch
from unimrg.flops import Flops, attention, heads_width, layers, narrowed, trained, transformer

if TYPE_CHECKING:
    from unimrg.families.openuni.model import OpenUni


@dataclass(frozen=True)
class Sizes:
    """All that the cost depends on.

    encoded: pictures through the autoencoder. seen: pictures through the vision tower. drawn: targets.
    tokens, pairs: of the language model. predicted: rows of the output layer.
    last_rows: that the last block of the language model makes behind attention; None: all.
    """

    encoded: int
    seen: int
    drawn: int
    tokens: int
    pairs: int
    predicted: int
    last_rows: int | None = None

    @classmethod
    def of(cls, batch: OpenUniBatch) -> Sizes:
        targets = len(batch.target_source)
        return cls(
            encoded=0 if batch.codes is not None else targets,
            seen=len(batch.images),
            drawn=targets,
            tokens=batch.tokens,
            pairs=batch.plan.attended_pairs,
            predicted=len(batch.label_index),
            last_rows=len(batch.label_index) + len(batch.query_index),
        )


def count(model: OpenUni, sizes: Sizes) -> dict[str, Flops]:
    """By part, of a pass of these sizes."""
    config, lmm, queries = model.config, model.lmm, model.config.num_queries
    asked = sizes.drawn * queries
    seen = trained(lmm.model.vision_tower)
    mlp1 = lmm.model.multi_modal_projector
    embedded = seen or trained(mlp1, model.meta_queries, lmm.get_input_embeddings())
    read = embedded or trained(lmm.model.language_model)
    connected = read or trained(model.connector)
    width = heads_width(config.text)
    last = narrowed(sizes.last_rows)
    return {
        "vae": autoencoder(model) * sizes.encoded,
        "vision": _vision(model, sizes.seen),
        "mlp1": layers(mlp1, config.picture_tokens * sizes.seen, seen or trained(mlp1.layer_norm)),
        "llm": transformer(lmm.model.language_model.layers, sizes.tokens, sizes.pairs, width, embedded, last),
        "lm_head": layers(lmm.lm_head, sizes.predicted, read),
        "connector": transformer(
            model.connector.layers, asked, asked * queries, config.connector.width, read
        ),
        "projector": layers(model.projector, asked, connected),
        "sana": _sana(model, sizes.drawn, connected or trained(model.projector)),
    }


def _vision(model: OpenUni, pictures: int) -> Flops:
    tower = model.lmm.model.vision_tower
    patches = tower.embeddings.patch_embeddings.num_patches
    rows = patches + 1  # the class token
    flops = layers(tower.embeddings, patches * pictures)
    return flops + transformer(
        tower.encoder.layer,
        rows * pictures,
        rows**2 * pictures,
        tower.config.hidden_size,
        trained(tower.embeddings),
    )


def _sana(model: OpenUni, targets: int, told: bool) -> Flops:
    """told: whether a gradient passes to the conditions."""
    sana, config = model.transformer, model.config.sana
    latent = math.prod(model.grid)
    rows, asked = targets * latent, targets * model.config.num_queries
    flops = layers(sana.patch_embed, rows) + layers(sana.time_embed, targets)
    flops += layers(sana.caption_projection, asked, told)
    told = told or trained(sana.caption_projection, sana.caption_norm)
    reached = trained(sana.patch_embed, sana.time_embed)
    cross = config.num_cross_attention_heads * config.cross_attention_head_dim
    for block in sana.transformer_blocks:
        reached = reached or block.scale_shift_table.requires_grad
        flops += layers(block.attn1, rows, reached)
        flops += _linear_attention(
            rows, config.width, config.attention_head_dim, reached or trained(block.attn1)
        )
        reached = reached or trained(block.attn1)
        flops += layers(block.attn2.to_q, rows, reached) + layers(block.attn2.to_k, asked, told)
        flops += layers(block.attn2.to_v, asked, told)
        reached = reached or told or trained(block.attn2)
        flops += attention(rows * model.config.num_queries, cross, reached)
        flops += layers(block.attn2.to_out, rows, reached) + layers(block.ff, rows, reached)
        reached = reached or trained(block)
    return flops + layers(sana.proj_out, rows, reached)


def _linear_attention(rows: int, width: int, head: int, reached: bool = False) -> Flops:
    """Sums over keys and values, then over queries (arXiv 2006.16236), the denominator as one value more."""
    forward = 4 * rows * width * (head + 1)
    return Flops(forward, 2 * forward * reached)


def autoencoder(model: OpenUni) -> Flops:
    """One picture through the encoder of DC-AE (arXiv 2410.10733), which is never trained."""
    encoder: Any = model.vae.encoder
    side = model.config.image_size
    flops = layers(encoder.conv_in, side * side)
    for level in encoder.down_blocks:
        for block in level:
            if hasattr(block, "group_size"):  # from one level to the next
                side //= 2
            flops += layers(block, side * side) + _level_attention(block, side * side)
    return flops + layers(encoder.conv_out, side * side)


def _level_attention(block: nn.Module, cells: int) -> Flops:
    """Heads over all cells, linear where there are more of these than numbers in a head."""
    attn = getattr(block, "attn", None)
    if attn is None:
        return Flops()
    head = attn.attention_head_dim
    width = attn.to_out.in_features
    if cells > head:
        return _linear_attention(cells, width, head)
    return attention(cells**2, width)
