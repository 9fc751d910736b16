"""Samples to a packed batch for OpenUni, and text to token ids (OpenUni, arXiv 2505.23661).

The prefix is `<|im_start|>user⏎<img>`, the picture's P embeddings and `</img>⏎`: InternVL's chat without a
system turn, the same for all tasks. A drawing's prompt ends with `<img>` and the Q learnable queries, whose
states are what SANA is told.

Legend: I pictures, G targets, P embeddings of a picture, Q queries, L cells of the latent grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from unimrg.families.openuni.config import TOKENS, OpenUniConfig
from unimrg.families.processor import Branch, Layouted, PackedProcessor, Pictures, Target
from unimrg.families.rows import IGNORE, Block, PackedBatch, Text, Vectors, as_long
from unimrg.sample import IMAGE_TASKS, Conversation, Sample, Task

OPEN = "<|im_start|>user\n"
CLOSE = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
IMAGE_OPEN, IMAGE_CLOSE, _ = TOKENS


@dataclass(frozen=True, kw_only=True)
class OpenUniBatch(PackedBatch):
    """A packed batch. Its tables are the pictures' embeddings and the queries.

    query_index: int64 [G * Q] packed positions of the targets' queries.
    cell_weight: float32 [G, L], what each latent cell counts in its target's mean: 1 over the number of cells
        that lie in the picture, 0 in its padding.
    """

    query_index: torch.Tensor
    cell_weight: torch.Tensor


@dataclass(frozen=True)
class OpenUniTarget(Target):
    """Which latent cells count, bool [L]."""

    counts: np.ndarray


class OpenUniProcessor(PackedProcessor[OpenUniTarget, OpenUniBatch]):
    """Turns `Sample`s into an `OpenUniBatch`."""

    def __init__(
        self,
        config: OpenUniConfig,
        tokenizer: Any,
        tasks: Sequence[Task] = tuple(Task),
        seed: int = 0,
        max_text_tokens: int = 1472,
        prompt_dropout: float = 0.1,
        grey_codes: np.ndarray | None = None,
    ) -> None:
        super().__init__(
            config.image_size, tokenizer, tasks, seed, max_text_tokens, prompt_dropout, grey_codes
        )
        self.config = config
        self.grid = config.grid_of(config.image_size, config.image_size)
        self.cells = math.prod(self.grid)

    # -- text ------------------------------------------------------------------------------------------------

    @cached_property
    def open_ids(self) -> tuple[int, ...]:
        """In front of a picture."""
        return tuple(self.encode(OPEN + IMAGE_OPEN))

    @cached_property
    def close_ids(self) -> tuple[int, ...]:
        """Behind a picture."""
        return tuple(self.encode(IMAGE_CLOSE + "\n"))

    @cached_property
    def newline_ids(self) -> list[int]:
        return self.encode("\n")

    @cached_property
    def end_id(self) -> int:
        """Of the token that ends an answer."""
        return self.encode(END)[-1]

    def question(self, text: str, behind_picture: bool) -> list[int]:
        """Ids of a user turn up to where the answer begins."""
        return self.encode(("" if behind_picture else OPEN) + text + CLOSE)

    def conversation_branch(self, conversation: Conversation, image: int | None) -> Branch[OpenUniTarget]:
        """Labels are the answers and their end token; a newline stands between turns."""
        ids: list[int] = []
        labels: list[int] = []
        for number, turn in enumerate(conversation):
            between = self.newline_ids if number else []
            asked = [*between, *self.question(turn.question, image is not None and number == 0)]
            answer = self.encode(turn.answer + END)
            ids += asked + answer
            labels += [IGNORE] * len(asked) + answer
        return Branch(() if image is None else self.open_ids, image, ids, labels)

    def drawing_branch(self, text: str, image: int | None, target: OpenUniTarget) -> Branch[OpenUniTarget]:
        """The instruction `text` about a picture, or from text alone."""
        ids = [*self.question(text, image is not None), *self.encode(IMAGE_OPEN)]
        return Branch(() if image is None else self.open_ids, image, ids, [IGNORE] * len(ids), target)

    # -- targets and packing ---------------------------------------------------------------------------------

    def make_target(self, task: Task, source: int, sample: Sample, rng: np.random.Generator) -> OpenUniTarget:
        return OpenUniTarget(task, source, int(rng.integers(2**62)), self.valid_cells(sample, self.grid))

    def prefix(self, opening: tuple[int, ...], image: int) -> tuple[Block, ...]:
        tokens = self.config.picture_tokens
        picture = Vectors("picture", np.arange(image * tokens, (image + 1) * tokens))
        return (Block((Text(opening), picture, Text(self.close_ids))),)

    def drawing(self, number: int, target: OpenUniTarget, first: int) -> tuple[Block, ...]:
        return (Block((Vectors("query", np.arange(self.config.num_queries), tag=number),)),)

    def target_rows(self, target: OpenUniTarget) -> int:
        return 0

    def tables(self, pictures: Pictures, targets: Sequence[OpenUniTarget]) -> Mapping[str, int]:
        return {
            "picture": len(pictures.images) * self.config.picture_tokens,
            "query": self.config.num_queries,
        }

    def finish(self, layouted: Layouted[OpenUniTarget]) -> OpenUniBatch:
        targets, places = layouted.targets, layouted.assembled.places
        counts = {Task.UNDERSTANDING: layouted.assembled.answers} | dict.fromkeys(IMAGE_TASKS, 0)
        weight = np.zeros((len(targets), self.cells), np.float32)
        for number, (target, drawn) in enumerate(zip(targets, layouted.weights, strict=True)):
            cells = int(target.counts.sum())
            if cells:
                weight[number] = target.counts / cells
                counts[target.task] += drawn > 0
        return OpenUniBatch(
            **layouted.common,
            counts=counts,
            query_index=as_long([places[number] for number in range(len(targets))]),
            cell_weight=torch.from_numpy(weight),
        )
