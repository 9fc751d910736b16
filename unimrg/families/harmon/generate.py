"""Using a Harmon: answers by cached decoding, pictures by iterative unmasking (MAR, arXiv 2406.11838).

Legend: n pictures, R rows (n conditional, then n unconditional with guidance), P prompt tokens, L latent
cells, BUF buffer tokens, H width of the language model, C latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from unimrg.families.base import DrawOptions
from unimrg.families.harmon.processor import CLOSE, END, IMAGE_ID, OPEN, HarmonProcessor
from unimrg.families.harmon.sampling import guidance_at, mask_schedule
from unimrg.sample import Task, Turn
from unimrg.tasks import UNCONDITIONAL, canonical_prompt, picture_prompt

if TYPE_CHECKING:
    from unimrg.families.harmon.model import Harmon

DEFAULT_ITERATIONS = 32


@torch.no_grad()
def answer(
    model: Harmon,
    processor: HarmonProcessor,
    images: Sequence[np.ndarray | None],
    questions: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers to one question per picture (uint8 [S, S, 3], or None for text alone)."""
    rows = []
    for image, question in zip(images, questions, strict=True):
        ids, _ = processor.conversation((Turn(question, ""),), with_image=image is not None)
        closing = len(processor.encode(END)) + len(processor.newline_ids)
        rows.append(_embed(model, ids[:-closing], image))
    embeds, mask = _pad(rows, left=True)
    end = processor.encode(END)[-1]
    out = model.llm.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
    )
    return [processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in out]


@torch.no_grad()
def draw(
    model: Harmon,
    processor: HarmonProcessor,
    images: Sequence[np.ndarray],
    task: Task,
    options: DrawOptions,
) -> list[np.ndarray]:
    """Draw one picture per image, uint8 [S, S, 3]."""
    ids = [*processor.open_ids, IMAGE_ID, *processor.encode(canonical_prompt(task) + CLOSE)]
    rows = [_embed(model, ids, image) for image in images]
    return _draw(model, processor, rows, options, DEFAULT_ITERATIONS)


@torch.no_grad()
def draw_text(
    model: Harmon, processor: HarmonProcessor, texts: Sequence[str], options: DrawOptions
) -> list[np.ndarray]:
    """Draw one picture per text, uint8 [S, S, 3], in twice as many iterations as from pictures."""
    ids = [processor.encode(OPEN + picture_prompt(text) + CLOSE) for text in texts]
    return _draw(model, processor, [_embed(model, row, None) for row in ids], options, 2 * DEFAULT_ITERATIONS)


def _draw(
    model: Harmon, processor: HarmonProcessor, rows: list[Tensor], options: DrawOptions, iterations: int
) -> list[np.ndarray]:
    """One picture behind each prompt [P, H]. iterations: where `options` names none."""
    count, guidance = len(rows), options.guidance or model.config.guidance
    if guidance != 1:
        rows = rows + [_embed(model, processor.encode(OPEN + UNCONDITIONAL + CLOSE), None)] * count
    embeds, mask = _pad(rows, left=False)
    generator = torch.Generator(embeds.device).manual_seed(options.seed)
    cells = math.prod(model.grid)
    scores = torch.rand(count, cells, generator=generator, device=embeds.device)
    latents = sample_latents(
        model,
        Prompt(model, embeds, mask),
        scores.argsort(1),
        iterations=options.iterations or min(iterations, cells),
        guidance=guidance,
        temperature=options.temperature,
        generator=generator,
    )
    return list(model.decode_pictures(latents).cpu().numpy())


class Prompt:
    """The cached prompt of R rows; `conditions` runs the image tokens behind it and forgets them again.

    embeds: [R, P, H] right-padded, mask: int [R, P], 1 = valid.
    """

    def __init__(self, model: Harmon, embeds: Tensor, mask: Tensor) -> None:
        self.model, self.mask = model, mask
        self.cache = DynamicCache(config=model.config.llm)
        model.llm.model(inputs_embeds=embeds, past_key_values=self.cache, use_cache=True)

    def conditions(self, tokens: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Decoder input [R, BUF + visible, W] and one condition vector per cell [R, L, W'].

        tokens: [R, L, C]; masked: bool [R, L], the same number in every row.
        """
        model, buffers = self.model, self.model.config.mar.buffer_size
        encoded = model.mar.encode(tokens, model.grid, masked)
        embeds = model.proj_in(encoded).roll(-buffers, 1)
        rows, length = embeds.shape[:2]
        positions = self.mask.sum(1, keepdim=True) + torch.arange(length, device=embeds.device)
        hidden = model.llm.model(
            inputs_embeds=embeds,
            attention_mask=torch.cat([self.mask, self.mask.new_ones(rows, length)], 1),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.cache.crop(-length)
        decoder_in = encoded + model.proj_out(hidden.roll(buffers, 1))
        return decoder_in, model.mar.decode(decoder_in, masked, model.grid)


def sample_latents(
    model: Harmon,
    prompt: Prompt,
    orders: Tensor,
    iterations: int,
    guidance: float = 3.0,
    schedule: str = "constant",
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    noise: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Unmask all cells in `iterations` steps; returns latents [n, L, C] of the conditional rows.

    orders: int64 [n, L], the first entries stay masked longest. noise: per iteration the head's start noise
    and its per-step noise, instead of drawing them from `generator`.
    """
    count, cells = orders.shape
    guided = guidance != 1
    tokens = orders.new_zeros(count, cells, model.config.mar.token_width, dtype=model.dtype)
    rank = orders.argsort(1)
    left = [*mask_schedule(cells, iterations), 0]
    for step in range(iterations):
        if left[step + 1] == left[step]:
            continue  # more iterations than cells: this one reveals nothing
        masked = rank < left[step]
        rows = 2 if guided else 1
        _, decoded = prompt.conditions(tokens.repeat(rows, 1, 1), masked.repeat(rows, 1))
        now = masked & (rank >= left[step + 1])
        # The published schedule counts one cell as still masked in the last iteration.
        scale = guidance_at(guidance, cells, max(1, left[step + 1]), schedule)
        start, steps = noise[step] if noise is not None else (None, None)
        sampled = model.mar.diffloss.sample(
            decoded[now.repeat(rows, 1)],
            guidance=scale,
            temperature=temperature,
            init_noise_NC=start,
            step_noise_SNC=steps,
            generator=generator,
        )
        tokens[now] = sampled[: int(now.sum())].to(tokens.dtype)
    return tokens


def _embed(model: Harmon, ids: Sequence[int], image: np.ndarray | None) -> Tensor:
    """[P, H]: token embeddings with the picture's, buffers last, in place of IMAGE_ID."""
    device = model.device_of_weights
    embedding = model.llm.get_input_embeddings()
    if image is None:
        return embedding(torch.tensor(ids, device=device))
    cut = list(ids).index(IMAGE_ID)
    picture = torch.from_numpy(np.ascontiguousarray(image)).to(device).unsqueeze(0)
    embedded = model.embed_pictures(model.encode_pictures(picture))[0].roll(-model.config.mar.buffer_size, 0)
    before, after = (embedding(torch.tensor(part, device=device)) for part in (ids[:cut], ids[cut + 1 :]))
    return torch.cat([before, embedded, after])


def _pad(rows: Sequence[Tensor], left: bool) -> tuple[Tensor, Tensor]:
    """Stack rows [P_i, H] to [R, P, H] with zeros, and the mask of valid places."""
    longest = max(len(row) for row in rows)
    embeds = rows[0].new_zeros(len(rows), longest, rows[0].shape[1])
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device=rows[0].device)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(None, len(row))
        embeds[number, place], mask[number, place] = row, 1
    return embeds, mask
