"""What a pass of Janus-Pro costs (`unimrg.flops`), from the sizes of its batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unimrg.families.janus.processor import JanusBatch
from unimrg.flops import Flops, heads_width, layers, narrowed, picture_encoder, trained, transformer

if TYPE_CHECKING:
    from unimrg.families.janus.model import Janus


@dataclass(frozen=True)
class Sizes:
    """All that the cost depends on.

    encoded: pictures through the frozen tokenizer. seen: pictures through SigLIP. drawn: targets.
    tokens, pairs: of the language model. answers, codes: predicted text tokens and picture codes.
    last_rows: that the last block of the language model makes behind attention; None: all.
    """

    encoded: int
    seen: int
    drawn: int
    tokens: int
    pairs: int
    answers: int
    codes: int
    last_rows: int | None = None

    @classmethod
    def of(cls, batch: JanusBatch) -> Sizes:
        targets = len(batch.target_source)
        return cls(
            encoded=0 if batch.codes is not None else targets,
            seen=len(batch.images),
            drawn=targets,
            tokens=batch.tokens,
            pairs=batch.plan.attended_pairs,
            answers=len(batch.label_index),
            codes=len(batch.code_index),
            last_rows=len(batch.label_index) + len(batch.code_index),
        )


def count(model: Janus, sizes: Sizes) -> dict[str, Flops]:
    """By part, of a pass of these sizes."""
    config, whole = model.config, model.janus.model
    patches = config.image_tokens
    vision, rows = whole.vision_model, patches * sizes.seen
    drawn = sizes.drawn * (math.prod(config.grid) - 1)
    entered = trained(vision.embeddings)
    looked = trained(vision)
    embedded = looked or trained(
        whole.aligner,
        whole.generation_embeddings,
        whole.generation_aligner,
        model.janus.get_input_embeddings(),
    )
    read = embedded or trained(whole.language_model)
    width = heads_width(config.janus.text_config)
    last = narrowed(sizes.last_rows)
    return {
        "vq": tokenizer(model) * sizes.encoded,
        "vision": layers(vision.embeddings, rows)
        + transformer(
            vision.encoder.layers, rows, sizes.seen * patches**2, vision.config.hidden_size, entered
        ),
        "aligner": layers(whole.aligner, rows, looked),
        "generation_aligner": layers(whole.generation_aligner, drawn, trained(whole.generation_embeddings)),
        "llm": transformer(whole.language_model.layers, sizes.tokens, sizes.pairs, width, embedded, last),
        "lm_head": layers(model.janus.lm_head, sizes.answers, read),
        "generation_head": layers(whole.generation_head, sizes.codes, read),
    }


def tokenizer(model: Janus) -> Flops:
    """One picture to its codes: the encoder, then its features against the whole codebook."""
    vq, cells = model.janus.model.vqmodel, math.prod(model.config.grid)
    compared = Flops(2 * cells * vq.config.embed_dim * vq.config.num_embeddings)
    return picture_encoder(vq.encoder, model.config.image_size) + layers(vq.quant_conv, cells) + compared
