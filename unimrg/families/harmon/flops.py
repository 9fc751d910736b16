"""What a pass of Harmon costs (`unimrg.flops`), from the sizes of its batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unimrg.families.harmon.process import TRAIN_STEPS
from unimrg.families.harmon.processor import HarmonBatch
from unimrg.flops import Flops, heads_width, layers, narrowed, picture_encoder, trained, transformer

if TYPE_CHECKING:
    from unimrg.families.harmon.model import Harmon


@dataclass(frozen=True)
class Sizes:
    """All that the cost depends on.

    encoded: pictures through the autoencoder. conditions: pictures that MAR reads whole. visible: cells that
    MAR reads, of every target. tokens, pairs: of the language model. answers: predicted text tokens.
    projected: condition vectors that enter the head; noisy: its rows; timed: rows of its time embedding.
    last_rows: that the last block of the language model makes behind attention; None: all.
    """

    encoded: int
    conditions: int
    visible: tuple[int, ...]
    tokens: int
    pairs: int
    answers: int
    projected: int
    noisy: int
    timed: int
    last_rows: int | None = None

    @classmethod
    def of(cls, batch: HarmonBatch, draws: int) -> Sizes:
        """draws: of noise, for every masked cell that counts."""
        cells = len(batch.loss_rows)
        return cls(
            encoded=0 if batch.codes is not None else len(batch.images) + len(batch.extra_images),
            conditions=len(batch.images),
            visible=batch.visible_lengths,
            tokens=batch.tokens,
            pairs=batch.plan.attended_pairs,
            answers=len(batch.label_index),
            projected=cells,
            noisy=cells * draws,
            timed=min(cells * draws, TRAIN_STEPS),
            last_rows=len(batch.label_index) + len(batch.hidden_index),
        )


def count(model: Harmon, sizes: Sizes) -> dict[str, Flops]:
    """By part, of a pass of these sizes."""
    mar, llm, cells = model.mar, model.llm, math.prod(model.grid)
    runs = [mar.config.buffer_size + n for n in (*[cells] * sizes.conditions, *sizes.visible)]
    whole, targets = mar.config.buffer_size + cells, len(sizes.visible)
    # Where a gradient comes by: behind each of these, if anything up to there is trained.
    entered = trained(mar.z_proj, mar.z_proj_ln, mar.fake_latent, mar.encoder_pos_embed_learned)
    encoded = entered or trained(mar.encoder_blocks, mar.encoder_norm)
    embedded = encoded or trained(model.proj_in, llm.get_input_embeddings())
    read = embedded or trained(llm.model)
    filled = read or trained(model.proj_out, mar.decoder_embed, mar.mask_token, mar.decoder_pos_embed_learned)
    decoded = filled or trained(mar.decoder_blocks, mar.decoder_norm, mar.diffusion_pos_embed_learned)
    visible = sum(runs[sizes.conditions :])
    last = narrowed(sizes.last_rows)
    return {
        "vae": autoencoder(model, sizes.encoded),
        "mar_encoder": layers(mar.z_proj, sum(runs) - mar.config.buffer_size * len(runs))
        + transformer(mar.encoder_blocks, sum(runs), _squares(runs), mar.config.encoder_width, entered),
        "proj_in": layers(model.proj_in, sum(runs), encoded),
        "llm": transformer(
            llm.model.layers, sizes.tokens, sizes.pairs, heads_width(model.config.llm), embedded, last
        ),
        "lm_head": layers(llm.lm_head, sizes.answers, read),
        "proj_out": layers(model.proj_out, visible, read),
        "mar_decoder": layers(mar.decoder_embed, visible, read or trained(model.proj_out))
        + transformer(
            mar.decoder_blocks, targets * whole, targets * whole**2, mar.config.decoder_width, filled
        ),
        "head": _head(model, sizes, decoded),
    }


def autoencoder(model: Harmon, pictures: int) -> Flops:
    once = picture_encoder(model.vae.encoder, model.config.image_size)
    cells = (model.config.image_size // model.config.vae.stride) ** 2
    return (once + layers(model.vae.quant_conv, cells)) * pictures


def _head(model: Harmon, sizes: Sizes, reached: bool) -> Flops:
    net = model.mar.diffloss.net
    flops = layers(net.time_embed, sizes.timed) + layers(net.input_proj, sizes.noisy)
    flops += layers(net.cond_embed, sizes.projected, reached)
    inside = reached or trained(net.time_embed, net.input_proj, net.cond_embed)
    flops += layers(net.res_blocks, sizes.noisy, inside)
    return flops + layers(net.final_layer, sizes.noisy, inside or trained(net.res_blocks))


def _squares(runs: list[int]) -> int:
    return sum(n * n for n in runs)
