"""Samples to a packed batch for Janus-Pro, and text to token ids (arXiv 2501.17811).

One sample is one row: the prefix is `<|User|>: <begin_of_image>`, the picture's tokens, `<end_of_image>⏎`;
every conversation and every drawing is a branch behind it. A drawing is a question whose answer begins with
`<begin_of_image>`, followed by the codes of its target but for the last: each place predicts the next code.

Legend: M codes that count, G targets, L codes of a target, P tokens of a condition picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from unimrg.families.janus.config import BEGIN, CLOSE_IMAGE, END, OPEN_IMAGE, PADDING, JanusFamilyConfig
from unimrg.families.processor import Branch, Layouted, PackedProcessor, Pictures, Target
from unimrg.families.rows import IGNORE, Block, CellRows, PackedBatch, Text, Vectors, as_long
from unimrg.sample import IMAGE_TASKS, Conversation, Sample, Task

USER = "<|User|>: "
ASSISTANT = "\n\n<|Assistant|>:"


@dataclass(frozen=True, kw_only=True)
class JanusBatch(PackedBatch):
    """A packed batch; tables are the pictures' embeddings [I * P] and the codes' [G * (L - 1)].

    code_index: int64 [M] packed positions that predict a code that counts; cell_rows: int64 [M], which code
    of the flattened [G, L]; cell_task: int64 [M] index into IMAGE_TASKS; cell_weight: float32 [M], 0 or 1.
    """

    code_index: torch.Tensor
    cell_rows: torch.Tensor
    cell_task: torch.Tensor
    cell_weight: torch.Tensor


@dataclass(frozen=True)
class JanusTarget(Target):
    """counts: bool [L], True where a code lies in the picture, not in its padding."""

    counts: np.ndarray


class JanusPackedProcessor(PackedProcessor[JanusTarget, JanusBatch]):
    """Turns `Sample`s into a `JanusBatch`."""

    def __init__(self, config: JanusFamilyConfig, tokenizer: Any, *args: Any, **options: Any) -> None:
        super().__init__(config.image_size, tokenizer, *args, **options)
        self.config = config
        self.codes = math.prod(config.grid)
        self.opening = tuple(self.encode(BEGIN + USER))
        self.open_image = self.encode(OPEN_IMAGE)
        self.end, self.padding = self.encode(END), self.encode(PADDING)
        self.close_image = self.encode(CLOSE_IMAGE + "\n")

    # -- text ------------------------------------------------------------------------------------------------

    def conversation_branch(self, conversation: Conversation, image: int | None) -> Branch[JanusTarget]:
        """Labels are the answers and their end token. Without a picture the text begins with the opening."""
        ids: list[int] = []
        labels: list[int] = []
        for number, turn in enumerate(conversation):
            question = self.question(turn.question, first=number == 0, with_image=image is not None)
            answer = self.encode(" " + turn.answer + END)
            ids += question + answer
            labels += [IGNORE] * len(question) + answer
        return Branch(self.opening if image is not None else (), image, ids, labels)

    def question(self, text: str, first: bool = True, with_image: bool = True) -> list[int]:
        """Ids of a question up to where its answer begins; behind a picture without what `prefix` holds."""
        if not first:
            return self.encode(USER + text + ASSISTANT)
        return [*(() if with_image else self.opening), *self.encode(text + ASSISTANT)]

    def drawing_branch(self, text: str, image: int, target: JanusTarget) -> Branch[JanusTarget]:
        ids = [*self.question(text), *self.open_image]
        return Branch(self.opening, image, ids, [IGNORE] * len(ids), target)

    # -- pictures and targets --------------------------------------------------------------------------------

    def prefix(self, opening: tuple[int, ...], image: int) -> tuple[Block, ...]:
        first = image * self.config.image_tokens
        picture = Vectors("pictures", np.arange(first, first + self.config.image_tokens))
        return (Block((Text([*opening, *self.open_image]), picture, Text(self.close_image))),)

    def make_target(self, task: Task, source: int, sample: Sample, rng: np.random.Generator) -> JanusTarget:
        return JanusTarget(task, source, 0, self.valid_cells(sample, self.config.grid))

    def drawing(self, number: int, target: JanusTarget, first: int) -> tuple[Block, ...]:
        rows = np.arange(first, first + self.target_rows(target))
        return (Block((Vectors("codes", rows, tag=number),)),)

    def target_rows(self, target: JanusTarget) -> int:
        return self.codes - 1

    def tables(self, pictures: Pictures, targets: Sequence[JanusTarget]) -> Mapping[str, int]:
        return {
            "pictures": len(pictures.images) * self.config.image_tokens,
            "codes": len(targets) * (self.codes - 1),
        }

    def finish(self, layouted: Layouted[JanusTarget]) -> JanusBatch:
        targets, places = layouted.targets, layouted.assembled.places
        cells = CellRows.of(
            [t.counts for t in targets], [t.task for t in targets], layouted.weights, self.codes
        )
        # A code is predicted by what stands before it: `<begin_of_image>`, then every code but the last.
        predicts = [np.append(places[number][0] - 1, places[number]) for number in range(len(targets))]
        counts = {Task.UNDERSTANDING: layouted.assembled.answers}
        return JanusBatch(
            **layouted.common,
            counts=counts | {task: cells.count(task) for task in IMAGE_TASKS},
            code_index=as_long(predicts)[cells.rows],
            cell_rows=cells.rows,
            cell_task=cells.task,
            cell_weight=cells.weight,
        )
