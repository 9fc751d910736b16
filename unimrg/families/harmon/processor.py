"""Samples to a packed batch for Harmon, and text to token ids (Harmon, arXiv 2503.21979).

The prefix is `<|im_start|>user⏎` and the picture's L + BUF embeddings. `published=True` reproduces the
published recipe instead, where tasks differ in the ids before the picture and in its geometry; such a
sample becomes several rows.

Legend: I pictures, G targets, V visible target cells, M masked cells that count, L cells of the latent grid,
BUF buffer tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from unimrg.families.harmon.config import HarmonConfig
from unimrg.families.processor import Branch, Layouted, PackedProcessor, Pictures, Target
from unimrg.families.rows import IGNORE, Block, CellRows, PackedBatch, Text, Vectors, as_long
from unimrg.sample import IMAGE_TASKS, Conversation, Sample, Task
from unimrg.tasks import UNCONDITIONAL

OPEN = "<|im_start|>user\n"
CLOSE = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
IMAGE_ID = -200
PUBLISHED_MAX_PROMPT = 128
PUBLISHED_MAX_TEXT = 1472


@dataclass(frozen=True, kw_only=True)
class HarmonBatch(PackedBatch):
    """A packed batch. Its tables are the pictures' and the targets' embeddings, each buffers first.

    visible_cells: int64 [V] raster cells of all targets one behind the other; visible_lengths: V per target.
    hidden_index: int64 [V + G * BUF] packed positions of the targets' embeddings, buffers first per target.
    loss_rows: int64 [M] into the flattened [G, L]; row_task: int64 [M] index into IMAGE_TASKS;
    row_weight: float32 [M], 0 or 1. Timesteps and noise of a target's rows are drawn from its noise seed.
    """

    visible_cells: torch.Tensor
    visible_lengths: tuple[int, ...]
    hidden_index: torch.Tensor
    loss_rows: torch.Tensor
    row_task: torch.Tensor
    row_weight: torch.Tensor


@dataclass(frozen=True)
class HarmonTarget(Target):
    """Which cells are masked and which of them count, bool [L]."""

    masked: np.ndarray
    counts: np.ndarray


class HarmonProcessor(PackedProcessor[HarmonTarget, HarmonBatch]):
    """Turns `Sample`s into a `HarmonBatch`.

    published: reproduce the published prompts (section "prompts" of the recipe) and text-only zero images.
    """

    def __init__(
        self,
        config: HarmonConfig,
        tokenizer: Any,
        tasks: Sequence[Task] = tuple(Task),
        seed: int = 0,
        max_text_tokens: int = PUBLISHED_MAX_TEXT,
        prompt_dropout: float = 0.1,
        published: bool = False,
        grey_codes: np.ndarray | None = None,
    ) -> None:
        super().__init__(
            config.image_size, tokenizer, tasks, seed, max_text_tokens, prompt_dropout, grey_codes
        )
        self.config = config
        self.published = published
        self.grid = config.grid_of(config.image_size, config.image_size)
        self.cells, self.buffers = math.prod(self.grid), config.mar.buffer_size

    # -- text ------------------------------------------------------------------------------------------------

    @cached_property
    def open_ids(self) -> tuple[int, ...]:
        return tuple(self.encode(OPEN))

    @cached_property
    def newline_ids(self) -> list[int]:
        return self.encode("\n")

    def conversation(self, conversation: Conversation, with_image: bool) -> tuple[list[int], list[int]]:
        """Ids and labels of a conversation.

        With an image they start with `open_ids`, then IMAGE_ID, then a newline before the first question.
        Labels are the answers and their end token; everything else is IGNORE. A newline follows every turn.
        """
        ids: list[int] = []
        labels: list[int] = []
        for number, turn in enumerate(conversation):
            if number == 0 and with_image:
                question = [*self.open_ids, IMAGE_ID, *self.encode("\n" + turn.question + CLOSE)]
            else:
                question = self.encode(OPEN + turn.question + CLOSE)
            answer = self.encode(turn.answer + END)
            ids += question + answer + self.newline_ids
            labels += [IGNORE] * len(question) + answer + [IGNORE] * len(self.newline_ids)
        return ids, labels

    def prompt(self, task: Task, text: str) -> list[int]:
        """Ids of a drawing prompt, IMAGE_ID after the first three.

        `published` adds the recipe's slips: a newline before the depth and segmentation prompts (which merges
        with the template's own), a backslash and an n before the redrawing prompts, and a cut at 128 ids.
        """
        if not self.published:
            return [*self.open_ids, IMAGE_ID, *self.encode(text + CLOSE)]
        slip = "" if text == UNCONDITIONAL else "\\n" if task is Task.PIXEL else "\n"
        ids = self.encode(OPEN + slip + text + CLOSE)
        return [*ids[:3], IMAGE_ID, *ids[3:]][:PUBLISHED_MAX_PROMPT]

    def conversation_branch(self, conversation: Conversation, image: int | None) -> Branch[HarmonTarget]:
        ids, labels = self.conversation(conversation, with_image=image is not None)
        return split(ids[:-1], labels[:-1], image)

    def drawing_branch(self, text: str, image: int, target: HarmonTarget) -> Branch[HarmonTarget]:
        ids = self.prompt(target.task, text)
        return split(ids, [IGNORE] * len(ids), image, target)

    # -- targets ---------------------------------------------------------------------------------------------

    def make_target(self, task: Task, source: int, sample: Sample, rng: np.random.Generator) -> HarmonTarget:
        masked, counts = self._draw_mask(rng), self.valid_cells(sample, self.grid)
        return HarmonTarget(task, source, int(rng.integers(2**62)), masked, counts)

    def _draw_mask(self, rng: np.random.Generator) -> np.ndarray:
        """bool [L]: ceil(L * ratio) cells masked, ratio from a truncated normal (MAR, arXiv 2406.11838)."""
        normal = NormalDist(1.0, 0.25)
        low, high = normal.cdf(self.config.mar.mask_ratio_min), normal.cdf(1.0)
        ratio = normal.inv_cdf(low + (high - low) * rng.random())
        masked = np.zeros(self.cells, bool)
        masked[rng.permutation(self.cells)[: min(self.cells, math.ceil(self.cells * ratio))]] = True
        return masked

    # -- the published recipe's rows -------------------------------------------------------------------------

    def branches(
        self, sample: Sample, pictures: Pictures, notes: dict[str, int]
    ) -> list[Branch[HarmonTarget]]:
        if not self.published:
            return super().branches(sample, pictures, notes)
        branches = []
        if Task.UNDERSTANDING in self.tasks:
            shown = sample if sample.has_image else self.grey_sample()
            image = self.add_condition(shown, "image", pictures)
            for conversation in sample.conversations:
                branch = self._cut(self.conversation_branch(conversation, image), notes)
                if any(label != IGNORE for label in branch.labels):
                    branches.append(branch)
        drawings = self.drawings(sample)
        if drawings:
            condition = self.add_condition(sample, Task.PIXEL.value, pictures)
            branches += [self.draw_branch(sample, task, condition, pictures) for task in drawings]
        return branches

    # -- packing ---------------------------------------------------------------------------------------------

    def prefix(self, opening: tuple[int, ...], image: int) -> tuple[Block, ...]:
        picture = Vectors("picture", self._buffers_last(image * (self.buffers + self.cells), self.cells))
        return (Block((Text(opening), picture)),)

    def drawing(self, number: int, target: HarmonTarget, first: int) -> tuple[Block, ...]:
        rows = self._buffers_last(first, self.target_rows(target) - self.buffers)
        return (Block((Vectors("target", rows, tag=number),)),)

    def target_rows(self, target: HarmonTarget) -> int:
        return int((~target.masked).sum()) + self.buffers

    def tables(self, pictures: Pictures, targets: Sequence[HarmonTarget]) -> Mapping[str, int]:
        return {
            "picture": len(pictures.images) * (self.buffers + self.cells),
            "target": sum(self.target_rows(target) for target in targets),
        }

    def _buffers_last(self, start: int, cells: int) -> np.ndarray:
        """Rows of one picture's embeddings in the order of the language model: cells, then buffers."""
        first_cell = start + self.buffers
        return np.concatenate([np.arange(first_cell, first_cell + cells), np.arange(start, first_cell)])

    def finish(self, layouted: Layouted[HarmonTarget]) -> HarmonBatch:
        targets, places = layouted.targets, layouted.assembled.places
        visible = [np.flatnonzero(~target.masked) for target in targets]
        cells = CellRows.of(
            [t.masked & t.counts for t in targets], [t.task for t in targets], layouted.weights, self.cells
        )
        draws = self.config.mar.diffusion_batch_mul
        return HarmonBatch(
            **layouted.common,
            counts={Task.UNDERSTANDING: layouted.assembled.answers}
            | {task: cells.count(task) * draws for task in IMAGE_TASKS},
            visible_cells=as_long(visible),
            visible_lengths=tuple(len(v) for v in visible),
            hidden_index=as_long([np.roll(places[n], self.buffers) for n in range(len(targets))]),
            loss_rows=cells.rows,
            row_task=cells.task,
            row_weight=cells.weight,
        )


def split(
    ids: Sequence[int], labels: Sequence[int], image: int | None, target: HarmonTarget | None = None
) -> Branch[HarmonTarget]:
    """Cut at the picture: what stands before it is the prefix's."""
    if image is None:
        return Branch((), None, ids, labels, target)
    cut = list(ids).index(IMAGE_ID)
    return Branch(tuple(ids[:cut]), image, ids[cut + 1 :], labels[cut + 1 :], target)
