"""Samples to a packed batch for Show-o, and text to token ids (Show-o, arXiv 2408.12528).

The prefix is the picture as it is read: `mmu soi codes eoi`, where all look at all; with CLIP `mmu system soi
features eoi`, where every token looks at the features. Behind it stand `USER: question ASSISTANT: answer end`
or, for a drawing, `end prompt end soi target eoi`: the target is one block, partly masked, where all look at
all. The end token also starts texts. A redrawing prompt that is dropped drops the picture too: `t2i end end`
is the row that guidance contrasts with.

Legend: I pictures, S tokens of a picture that is read, G targets, N codes of a target, M masked codes that
count, R side in pixels that CLIP reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from unimrg.families.processor import Branch, Layouted, PackedProcessor, Pictures, Target
from unimrg.families.rows import IGNORE, Block, CellRows, PackedBatch, Text, Vectors, as_long
from unimrg.families.showo.config import ShowoConfig
from unimrg.families.showo.pixels import resize
from unimrg.families.showo.sampling import masked_share, training_mask
from unimrg.sample import IMAGE_TASKS, Conversation, Sample, Task
from unimrg.tasks import UNCONDITIONAL


@dataclass(frozen=True, kw_only=True)
class ShowoBatch(PackedBatch):
    """A packed batch. Its tables are the pictures that are read and the targets.

    clip_images: uint8 [I, R, R, 3], the pictures as CLIP reads them; none without CLIP.
    target_masked: bool [G, N].
    loss_index: int64 [M] packed positions of the masked codes that count; loss_rows: int64 [M] the same into
    the flattened [G, N]; row_task: int64 [M] index into IMAGE_TASKS; row_weight: float32 [M], 0 or 1.
    """

    clip_images: torch.Tensor
    target_masked: torch.Tensor
    loss_index: torch.Tensor
    loss_rows: torch.Tensor
    row_task: torch.Tensor
    row_weight: torch.Tensor


@dataclass(frozen=True)
class ShowoTarget(Target):
    """Which codes are masked and which of them count, bool [N]."""

    masked: np.ndarray
    counts: np.ndarray


class ShowoProcessor(PackedProcessor[ShowoTarget, ShowoBatch]):
    """Turns `Sample`s into a `ShowoBatch`."""

    def __init__(
        self,
        config: ShowoConfig,
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
        self.end = config.text_end

    # -- text ------------------------------------------------------------------------------------------------

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """Ids in front of a picture."""
        system = self.encode(self.config.system_prompt) if self.config.system_prompt else []
        return (self.config.special("mmu"), *system, self.config.special("soi"))

    def question_branch(self, question: str, image: int | None) -> Branch[ShowoTarget]:
        """Up to where the answer begins. Text alone begins with the end token."""
        ids = [*([self.end] if image is None else []), *self._question(question)]
        return Branch(() if image is None else self.opening, image, ids, [IGNORE] * len(ids))

    def conversation_branch(self, conversation: Conversation, image: int | None) -> Branch[ShowoTarget]:
        """Labels are the answers and their end tokens."""
        branch = self.question_branch(conversation[0].question, image)
        ids, labels = list(branch.ids), list(branch.labels)
        for number, turn in enumerate(conversation):
            if number:
                question = self._question(turn.question)
                ids += question
                labels += [IGNORE] * len(question)
            answer = [*self.encode(f" {turn.answer}"), self.end]
            ids += answer
            labels += answer
        return replace(branch, ids=ids, labels=labels)

    def _question(self, text: str) -> list[int]:
        return self.encode(f"USER: {text} ASSISTANT:")

    def drawing_branch(self, text: str, image: int, target: ShowoTarget | None = None) -> Branch[ShowoTarget]:
        """Behind the picture, or on its own when the prompt is the unconditional one."""
        if text == UNCONDITIONAL:
            return self.text_branch("", target)
        ids = [self.end, *self.encode(text), self.end]
        return Branch(self.opening, image, ids, [IGNORE] * len(ids), target)

    def text_branch(self, text: str, target: ShowoTarget | None = None) -> Branch[ShowoTarget]:
        """What is drawn from text alone; without any it is the unconditional prompt."""
        ids = [self.config.special("t2i"), self.end, *self.encode(text), self.end]
        return Branch((), None, ids, [IGNORE] * len(ids), target)

    # -- targets ---------------------------------------------------------------------------------------------

    def make_target(self, task: Task, source: int, sample: Sample, rng: np.random.Generator) -> ShowoTarget:
        masked = training_mask(float(masked_share(rng.random())), rng.random(self.config.target_tokens))
        counts = self.valid_cells(sample, self.config.grid)
        return ShowoTarget(task, source, int(rng.integers(2**62)), masked, counts)

    # -- packing ---------------------------------------------------------------------------------------------

    def prefix(self, opening: tuple[int, ...], image: int) -> tuple[Block, ...]:
        tokens = self.config.source_tokens
        before, after = Text(opening), Text((self.config.special("eoi"),))
        picture = Vectors("source", np.arange(image * tokens, (image + 1) * tokens))
        if self.config.clip is None:
            return (Block((before, picture, after), "full"),)
        return (Block((before,), "ahead"), Block((picture,), "full"), Block((after,)))

    def drawing(self, number: int, target: ShowoTarget, first: int) -> tuple[Block, ...]:
        codes = Vectors("target", np.arange(first, first + self.target_rows(target)), tag=number)
        return (Block((Text(self.before_target), codes, Text(self.after_target)), "full"),)

    @property
    def before_target(self) -> tuple[int, ...]:
        return (self.config.special("soi"),)

    @property
    def after_target(self) -> tuple[int, ...]:
        return (self.config.special("eoi"),)

    def target_rows(self, target: ShowoTarget) -> int:
        return self.config.target_tokens

    def tables(self, pictures: Pictures, targets: Sequence[ShowoTarget]) -> Mapping[str, int]:
        return {
            "source": len(pictures.images) * self.config.source_tokens,
            "target": len(targets) * self.config.target_tokens,
        }

    def finish(self, layouted: Layouted[ShowoTarget]) -> ShowoBatch:
        targets, places = layouted.targets, layouted.assembled.places
        counted = [target.masked & target.counts for target in targets]
        tasks, codes = [target.task for target in targets], self.config.target_tokens
        cells = CellRows.of(counted, tasks, layouted.weights, codes)
        masked = np.stack([t.masked for t in targets]) if targets else np.zeros((0, codes), bool)
        return ShowoBatch(
            **layouted.common,
            counts={Task.UNDERSTANDING: layouted.assembled.answers}
            | {task: cells.count(task) for task in IMAGE_TASKS},
            clip_images=self._for_clip(layouted.common["images"]),
            target_masked=torch.from_numpy(masked),
            loss_index=as_long([places[n][counts] for n, counts in enumerate(counted)]),
            loss_rows=cells.rows,
            row_task=cells.task,
            row_weight=cells.weight,
        )

    def _for_clip(self, images: torch.Tensor) -> torch.Tensor:
        clip = self.config.clip
        if clip is None or not len(images):
            return torch.zeros(0, 0, 0, 3, dtype=torch.uint8)
        side = int(clip.image_size)
        return torch.from_numpy(np.stack([resize(image.numpy(), side, side) for image in images]))
