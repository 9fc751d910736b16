"""Answering and drawing with Show-o, one prompt cached and reused.

Legend: R rows, P prompt tokens, H width of the language model, N codes of a picture, K different codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from unimrg.families.base import DrawOptions
from unimrg.families.processor import Branch, Pictures
from unimrg.families.showo.processor import ShowoProcessor, ShowoTarget
from unimrg.families.showo.sampling import UNKNOWN, Noise, fill_in, masked_after, temperatures
from unimrg.plan import Plan
from unimrg.sample import Task
from unimrg.tasks import canonical_prompt

if TYPE_CHECKING:
    from unimrg.families.showo.model import Showo

DEFAULT_ITERATIONS = 18


@torch.no_grad()
def answer(
    model: Showo,
    processor: ShowoProcessor,
    images: Sequence[np.ndarray | None],
    questions: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers to one question per picture (uint8 [S, S, 3], or None for text alone)."""
    rows = [
        _row(model, processor, image, processor.question_branch(question, None if image is None else 0))
        for image, question in zip(images, questions, strict=True)
    ]
    found = greedy(Prompts(model, rows), max_new_tokens, processor.end)
    return [processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in found]


@torch.no_grad()
def draw(
    model: Showo,
    processor: ShowoProcessor,
    images: Sequence[np.ndarray],
    task: Task,
    options: DrawOptions,
) -> list[np.ndarray]:
    """Draw one picture per image, uint8 [S, S, 3]."""
    prompt = processor.drawing_branch(canonical_prompt(task), 0)
    return _draw(model, processor, [_row(model, processor, image, prompt) for image in images], options)


@torch.no_grad()
def draw_text(
    model: Showo, processor: ShowoProcessor, texts: Sequence[str], options: DrawOptions
) -> list[np.ndarray]:
    """Draw one picture per text, uint8 [S, S, 3]; the text is the whole prompt."""
    rows = [_row(model, processor, None, processor.text_branch(text)) for text in texts]
    return _draw(model, processor, rows, options)


def _draw(
    model: Showo, processor: ShowoProcessor, rows: Sequence[tuple[Tensor, Plan]], options: DrawOptions
) -> list[np.ndarray]:
    """One picture behind each prompt, as `Prompts` takes them."""
    guided = Prompts(model, rows)
    guidance, free = options.guidance or model.config.guidance, None
    if guidance != 1:
        free = Prompts(model, [_row(model, processor, None, processor.text_branch(""))] * len(rows))
    cells = model.config.target_tokens
    steps = options.iterations or min(DEFAULT_ITERATIONS, cells)
    generator = torch.Generator(model.device_of_weights).manual_seed(options.seed)
    codes = torch.full((len(rows), cells), UNKNOWN, device=model.device_of_weights)
    drawn = codes
    for step, temperature in enumerate(temperatures(options.temperature, steps)):
        logits = code_logits(guided, free, codes, guidance)
        left = masked_after(step, steps, cells)
        filled = fill_in(logits, codes, left, temperature, Noise.draw(logits, generator))
        drawn, codes = filled.drawn, filled.codes
    return list(model.decode_pictures(drawn).cpu().numpy())


def _row(
    model: Showo, processor: ShowoProcessor, image: np.ndarray | None, branch: Branch[ShowoTarget]
) -> tuple[Tensor, Plan]:
    """Embeddings [P, H] of one prompt and its plan, laid out as in training."""
    batch = processor.assemble([branch], Pictures([] if image is None else [image]), 1, 0)
    batch = batch.to(model.device_of_weights)
    return model.embed(batch, model.target_codes(batch)), batch.plan


class Prompts:
    """Cached prompts of R rows: `append` makes them longer, `conditions` looks ahead and forgets again.

    rows: embeddings [P, H] of each prompt and the plan by which its tokens look at each other.
    """

    def __init__(self, model: Showo, rows: Sequence[tuple[Tensor, Plan]]) -> None:
        self.model = model
        device, longest = rows[0][0].device, max(len(embeds) for embeds, _ in rows)
        embeds = rows[0][0].new_zeros(len(rows), longest, rows[0][0].shape[1])
        mask = torch.eye(longest, dtype=torch.bool, device=device).repeat(len(rows), 1, 1)
        self.seen = torch.zeros(len(rows), longest, dtype=torch.bool, device=device)
        for number, (own, plan) in enumerate(rows):
            start = longest - len(own)
            embeds[number, start:] = own
            mask[number, start:, start:] = plan.dense_mask().to(device)
            self.seen[number, start:] = True
        self.lengths = self.seen.sum(1, keepdim=True)
        self.cache = DynamicCache(config=model.config.llm)
        positions = (self.seen.cumsum(1) - 1).clamp(min=0)
        states = model.run(embeds, positions, mask=mask.unsqueeze(1), past_key_values=self.cache)
        self.last = states[:, -1]

    def logits(self) -> Tensor:
        """[R, vocabulary] of the next token."""
        return self.model.showo.lm_head(self.last).float()

    def append(self, ids: Tensor) -> None:
        """One token more in every row. ids: int64 [R]."""
        self.last = self._run(ids.unsqueeze(1))[:, -1]
        self.lengths = self.lengths + 1
        self.seen = F.pad(self.seen, (0, 1), value=True)

    def conditions(self, codes: Tensor) -> Tensor:
        """Logits [R, N, K] of the codes of a picture behind the prompt. codes: [R, N], `UNKNOWN` masked."""
        config, head = self.model.config, self.model.showo.lm_head
        ids = torch.where(codes == UNKNOWN, config.mask_id, config.code_offset + codes)
        before, after = (ids.new_full((len(ids), 1), config.special(name)) for name in ("soi", "eoi"))
        states = self._run(torch.cat([before, ids, after], 1))[:, 1:-1]
        self.cache.crop(-(ids.shape[1] + 2))
        # Only the rows of the codes: the whole vocabulary is seven times as long.
        chosen = slice(config.code_offset, config.mask_id)
        return F.linear(states, head.weight[chosen], head.bias[chosen]).float()

    def _run(self, ids: Tensor) -> Tensor:
        """States [R, n, H] of tokens behind the prompt that all look at all."""
        count = ids.shape[1]
        mask = F.pad(self.seen, (0, count), value=True)[:, None, None].expand(-1, -1, count, -1)
        positions = self.lengths + torch.arange(count, device=ids.device)
        embeds = self.model.showo.get_input_embeddings()(ids)
        return self.model.run(embeds, positions, mask=mask, past_key_values=self.cache)


def code_logits(guided: Prompts, free: Prompts | None, codes: Tensor, guidance: float) -> Tensor:
    """Logits [R, N, K] moved away from those of the prompts `free` of nothing: 1 = not at all."""
    logits = guided.conditions(codes)
    if free is None:
        return logits
    return guidance * logits + (1 - guidance) * free.conditions(codes)


def greedy(prompts: Prompts, max_new_tokens: int, end: int) -> list[list[int]]:
    """The likeliest tokens behind every prompt, up to `end`, which is left out."""
    found: list[Tensor] = []
    done = torch.zeros(len(prompts.seen), dtype=torch.bool, device=prompts.seen.device)
    for _ in range(max_new_tokens):
        ids = prompts.logits().argmax(-1)
        found.append(ids)
        done |= ids == end
        if bool(done.all()):
            break
        prompts.append(ids)
    rows = torch.stack(found, 1).tolist() if found else [[] for _ in done]
    return [row[: row.index(end)] if end in row else row for row in rows]
