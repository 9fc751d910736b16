"""What a pass of Show-o costs (`unimrg.flops`), from the sizes of its batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from unimrg.families.showo.processor import ShowoBatch
from unimrg.flops import Flops, heads_width, layers, narrowed, picture_encoder, trained, transformer

if TYPE_CHECKING:
    from unimrg.families.showo.model import Showo


@dataclass(frozen=True)
class Sizes:
    """All that the cost depends on.

    drawn, read: pictures through the image tokenizer, in full size and as they are read. seen: pictures
    through CLIP. tokens, pairs: of the language model. predicted: rows of the output layer.
    last_rows: that the last block of the language model makes behind attention; None: all.
    """

    drawn: int
    read: int
    seen: int
    tokens: int
    pairs: int
    predicted: int
    last_rows: int | None = None

    @classmethod
    def of(cls, batch: ShowoBatch) -> Sizes:
        pixels = batch.codes is None
        clip = len(batch.clip_images)
        return cls(
            drawn=pixels * len(batch.target_source),
            read=0 if clip else pixels * len(batch.images),
            seen=clip,
            tokens=batch.tokens,
            pairs=batch.plan.attended_pairs,
            predicted=len(batch.label_index) + len(batch.loss_index),
            last_rows=len(batch.label_index) + len(batch.loss_index),
        )


def count(model: Showo, sizes: Sizes) -> dict[str, Flops]:
    """By part, of a pass of these sizes."""
    config, llm = model.config, model.showo
    embedded = trained(llm.get_input_embeddings())
    parts = {
        "magvit": tokenizer(model, config.image_size) * sizes.drawn
        + tokenizer(model, config.source_size) * sizes.read
    }
    if config.clip is not None:
        parts["clip"] = _clip(model) * sizes.seen
        parts["projector"] = layers(model.mm_projector, config.source_tokens * sizes.seen)
        embedded = embedded or trained(model.mm_projector)
    width = heads_width(config.llm)
    last = narrowed(sizes.last_rows, "self_attn.dense")
    return parts | {
        "llm": transformer(llm.model.layers, sizes.tokens, sizes.pairs, width, embedded, last),
        "lm_head": layers(llm.lm_head, sizes.predicted, embedded or trained(llm.model)),
    }


def tokenizer(model: Showo, side: int) -> Flops:
    """One picture of `side` pixels to its codes."""
    encoder = model.magvit.encoder
    cells = (side // model.config.magvit.stride) ** 2
    return picture_encoder(encoder, side) + layers(encoder.quant_conv, cells)


def _clip(model: Showo) -> Flops:
    """One picture, through all layers; the last is computed though not read."""
    rows = model.config.source_tokens + 1  # the class token
    patches = layers(model.clip.embeddings, model.config.source_tokens)
    blocks = model.clip.encoder.layers
    return patches + transformer(blocks, rows, rows**2, model.config.clip.hidden_size)
