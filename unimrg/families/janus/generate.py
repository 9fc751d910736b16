"""Using a Janus-Pro: answers and pictures, both by cached decoding (arXiv 2501.17811).

Legend: n pictures, R rows (n conditional, then n unconditional with guidance), P prompt tokens, L codes of a
picture, H width of the language model, K size of the codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin

from unimrg.families.base import DrawOptions
from unimrg.families.janus.processor import JanusPackedProcessor
from unimrg.sample import Task
from unimrg.tasks import canonical_prompt

if TYPE_CHECKING:
    from unimrg.families.janus.model import Janus


@torch.no_grad()
def answer(
    model: Janus,
    processor: JanusPackedProcessor,
    images: Sequence[np.ndarray | None],
    questions: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers to one question per picture (uint8 [S, S, 3], or None for text alone)."""
    rows = [
        embed_prompt(model, processor, image, processor.question(question, with_image=image is not None))
        for image, question in zip(images, questions, strict=True)
    ]
    longest = max(len(row) for row in rows)
    embeds = rows[0].new_zeros(len(rows), longest, rows[0].shape[1])
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device=embeds.device)
    for number, row in enumerate(rows):
        embeds[number, longest - len(row) :], mask[number, longest - len(row) :] = row, 1
    # Not Janus' own `generate`, which only chooses between this and drawing.
    out = GenerationMixin.generate(
        model.janus,
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=processor.end[0],
        pad_token_id=processor.padding[0],
    )
    return [processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in out]


@torch.no_grad()
def draw(
    model: Janus,
    processor: JanusPackedProcessor,
    images: Sequence[np.ndarray],
    task: Task,
    options: DrawOptions,
) -> list[np.ndarray]:
    """Draw one picture per image, uint8 [S, S, 3]. `options.iterations` says nothing: a step is a code."""
    ids = [*processor.question(canonical_prompt(task)), *processor.open_image]
    return _draw(model, processor, [embed_prompt(model, processor, image, ids) for image in images], options)


@torch.no_grad()
def draw_text(
    model: Janus, processor: JanusPackedProcessor, texts: Sequence[str], options: DrawOptions
) -> list[np.ndarray]:
    """Draw one picture per text, uint8 [S, S, 3]; the text is the whole prompt."""
    ids = [[*processor.question(text, with_image=False), *processor.open_image] for text in texts]
    rows = [embed_prompt(model, processor, None, row) for row in ids]
    # Neighbours of one length at a time: the published sampling knows no padding that isn't seen.
    together = (list(same) for _, same in groupby(rows, key=len))
    return [picture for same in together for picture in _draw(model, processor, same, options)]


def _draw(
    model: Janus, processor: JanusPackedProcessor, rows: Sequence[Tensor], options: DrawOptions
) -> list[np.ndarray]:
    """One picture behind each prompt [P, H], all of one length."""
    embeds = torch.stack(list(rows))
    guidance = options.guidance or model.config.guidance
    if guidance != 1:
        embeds = torch.cat([embeds, embed_nothing(model, processor, embeds.shape[1]).expand_as(embeds)])
    generator = torch.Generator(embeds.device).manual_seed(options.seed)
    codes = sample_codes(model, embeds, processor.codes, guidance, options.temperature, generator=generator)
    return list(model.decode_pictures(codes).cpu().numpy())


def sample_codes(
    model: Janus,
    embeds: Tensor,
    count: int,
    guidance: float = 3.0,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Codes int64 [n, count] behind prompts [R, P, H]; the second half is unconditional unless guidance is 1.

    Logits are `u + guidance * (c - u)` of the unconditional u and the conditional c (arXiv 2410.13848, whose
    rule arXiv 2501.17811 keeps). temperature: 0 takes the likeliest code.
    """
    cache = DynamicCache(config=model.config.janus.text_config)
    codes: list[Tensor] = []
    for _ in range(count):
        hidden = model.janus.model.language_model(
            inputs_embeds=embeds, past_key_values=cache, use_cache=True
        ).last_hidden_state
        logits = model.janus.model.generation_head(hidden[:, -1]).float()
        if guidance != 1:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + guidance * (conditional - unconditional)
        codes.append(_choose(logits, temperature, generator))
        last = codes[-1] if guidance == 1 else codes[-1].repeat(2)
        embeds = model.embed_codes(last.unsqueeze(1))
    return torch.stack(codes, 1)


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One code per row of [n, K]."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)


def embed_prompt(
    model: Janus, processor: JanusPackedProcessor, image: np.ndarray | None, ids: Sequence[int]
) -> Tensor:
    """[P, H]: the prefix with the picture, if there is one, and `ids` behind it."""
    device, embedding = model.device_of_weights, model.janus.get_input_embeddings()

    def words(some: Sequence[int]) -> Tensor:
        return embedding(torch.tensor(some, device=device))

    if image is None:
        return words(ids)
    picture = torch.from_numpy(np.ascontiguousarray(image)).to(device).unsqueeze(0)
    before = words([*processor.opening, *processor.open_image])
    return torch.cat([before, model.embed_pictures(picture)[0], words([*processor.close_image, *ids])])


def embed_nothing(model: Janus, processor: JanusPackedProcessor, length: int) -> Tensor:
    """[length, H]: the published unconditional prompt, padding between the begin and `<begin_of_image>`."""
    ids = [processor.opening[0], *processor.padding * (length - 2), *processor.open_image]
    return model.janus.get_input_embeddings()(torch.tensor(ids, device=model.device_of_weights))
