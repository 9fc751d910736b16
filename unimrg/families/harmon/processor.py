"""Samples to a packed batch for Harmon, and text to token ids (Harmon, arXiv 2503.21979).

One sample is one row: the prefix is `<|im_start|>user⏎` and the picture's L + BUF embeddings; every
conversation and every drawing is a branch behind it. Prompts stand after the picture and are tokenised on
their own, so the prefix is the same for all tasks and is computed once. `published=True` reproduces the
published recipe instead, where tasks differ in the ids before the picture and in its geometry; such a
sample becomes several rows.

Legend: T packed tokens, N text tokens, I pictures, E extra target pictures (depth, boundaries), G targets,
V visible target cells, M masked cells that count, L cells of the latent grid, BUF buffer tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from unimrg.families.harmon.config import HarmonConfig
from unimrg.packing import Batch, Layout, pack
from unimrg.sample import IMAGE_TASKS, Conversation, Sample, Task, Turn
from unimrg.tasks import UNCONDITIONAL, choose_prompt

OPEN = "<|im_start|>user\n"
CLOSE = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
IGNORE = -100
IMAGE_ID = -200
PUBLISHED_MAX_PROMPT = 128
PUBLISHED_MAX_TEXT = 1472


@dataclass(frozen=True, kw_only=True)
class HarmonBatch(Batch):
    """A packed batch; every index refers to rows of the tensors named.

    token_ids: int64 [N]. position_ids: int64 [T].
    source_index: int64 [T] into the concatenation [picture embeddings, target embeddings, text embeddings],
        where the embeddings of a picture or a target stand buffers first.
    label_index, label_ids, label_weight: [A] packed position that predicts, id to predict, 0 or 1.
    images: uint8 [I, S, S, 3]; extra_images: uint8 [E, S, S, 3].
    target_source: int64 [G] into [images, extra_images].
    visible_cells: int64 [V] raster cells of all targets one behind the other; visible_lengths: V per target.
    hidden_index: int64 [V + G * BUF] packed positions of the targets' embeddings, buffers first per target.
    loss_rows: int64 [M] into the flattened [G, L]; row_task: int64 [M] index into IMAGE_TASKS;
    row_weight: float32 [M], 0 or 1.
    noise_seeds: one integer per target; timesteps and noise of its rows are drawn from it.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    source_index: torch.Tensor
    label_index: torch.Tensor
    label_ids: torch.Tensor
    label_weight: torch.Tensor
    images: torch.Tensor
    extra_images: torch.Tensor
    target_source: torch.Tensor
    visible_cells: torch.Tensor
    visible_lengths: tuple[int, ...]
    hidden_index: torch.Tensor
    loss_rows: torch.Tensor
    row_task: torch.Tensor
    row_weight: torch.Tensor
    noise_seeds: tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """A picture to draw: its pixels (`source` into all pictures), which cells are masked and which count."""

    task: Task
    source: int
    masked: np.ndarray
    counts: np.ndarray
    seed: int


@dataclass(frozen=True)
class BranchSpec:
    """What follows a prefix: text ids, the ids to predict at each of them (or IGNORE), perhaps a drawing."""

    prefix: tuple[int, ...]
    image: int | None
    ids: Sequence[int]
    labels: Sequence[int]
    target: Target | None = None
    weight: float = 1.0


@dataclass
class Pictures:
    """The pictures of a batch: conditions first, extra targets behind them."""

    images: list[np.ndarray] = field(default_factory=list)
    extra: list[np.ndarray] = field(default_factory=list)


class HarmonProcessor:
    """Turns `Sample`s into a `HarmonBatch`.

    tasks: the tasks to train on; others are left out of the batch. seed: of every random draw, together with
    a sample's position, so that a sample is masked the same way in any batch on any number of workers.
    max_text_tokens: longer conversations are cut at the right and counted in `Batch.notes`.
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
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.tasks = tuple(tasks)
        self.seed = seed
        self.max_text_tokens = max_text_tokens
        self.prompt_dropout = prompt_dropout
        self.published = published
        self.open_ids = tuple(self.encode(OPEN))
        self.newline_ids = self.encode("\n")
        self.grid = config.grid_of(config.image_size, config.image_size)

    def __call__(self, samples: Sequence[Sample]) -> HarmonBatch:
        """Pack samples, each one row (or several when `published`)."""
        pictures, branches, notes = Pictures(), [], {"truncated": 0}
        for sample in samples:
            branches += self._branches(sample, pictures, notes)
        if self._lacks_a_module(branches):
            branches += self._filler(pictures)
        return assemble(
            self.config,
            branches,
            pictures,
            samples=len(samples),
            next_position=1 + max((s.position for s in samples), default=-1),
            notes=notes,
        )

    # -- text ------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

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

    # -- samples to branches ---------------------------------------------------------------------------------

    def _branches(self, sample: Sample, pictures: Pictures, notes: dict[str, int]) -> list[BranchSpec]:
        image = self._add_image(sample.image, pictures)
        branches = []
        if Task.UNDERSTANDING in self.tasks:
            for conversation in sample.conversations:
                branch = self._answer(conversation, image, pictures, notes)
                if branch is not None:
                    branches.append(branch)
        drawings = [task for task in IMAGE_TASKS if task in self.tasks and task in sample.targets]
        condition = image
        if drawings and self.published:
            condition = self._add_image(sample.targets[Task.PIXEL], pictures)
        for task in drawings:
            branches.append(self._drawing(sample, task, condition, pictures))
        return branches

    def _add_image(self, image: np.ndarray | None, pictures: Pictures) -> int | None:
        if image is None:
            return None
        pictures.images.append(image)
        return len(pictures.images) - 1

    def _answer(
        self, conversation: Conversation, image: int | None, pictures: Pictures, notes: dict[str, int]
    ) -> BranchSpec | None:
        if image is None and self.published:
            image = self._add_image(self._grey(), pictures)
        ids, labels = self.conversation(conversation, with_image=image is not None)
        ids, labels = ids[:-1], labels[:-1]
        if len(ids) > self.max_text_tokens:
            ids, labels = ids[: self.max_text_tokens], labels[: self.max_text_tokens]
            notes["truncated"] += 1
        if all(label == IGNORE for label in labels):
            return None
        return self._split(ids, labels, image)

    def _drawing(self, sample: Sample, task: Task, image: int | None, pictures: Pictures) -> BranchSpec:
        rng = np.random.default_rng((self.seed, sample.position, IMAGE_TASKS.index(task)))
        ids = self.prompt(task, choose_prompt(task, rng, self.prompt_dropout))
        if task is Task.PIXEL:
            assert image is not None
            source = image
        else:
            pictures.extra.append(sample.targets[task])
            source = -len(pictures.extra)
        target = Target(
            task, source, self._draw_mask(rng), self._valid_cells(sample), int(rng.integers(2**62))
        )
        return self._split(ids, [IGNORE] * len(ids), image, target)

    def _split(
        self, ids: list[int], labels: list[int], image: int | None, target: Target | None = None
    ) -> BranchSpec:
        """Cut at the picture: what stands before it is the prefix."""
        if image is None:
            return BranchSpec((), None, ids, labels, target)
        cut = ids.index(IMAGE_ID)
        return BranchSpec(tuple(ids[:cut]), image, ids[cut + 1 :], labels[cut + 1 :], target)

    def _draw_mask(self, rng: np.random.Generator) -> np.ndarray:
        """bool [L]: ceil(L * ratio) cells masked, ratio from a truncated normal (MAR, arXiv 2406.11838)."""
        length, normal = math.prod(self.grid), NormalDist(1.0, 0.25)
        low, high = normal.cdf(self.config.mar.mask_ratio_min), normal.cdf(1.0)
        ratio = normal.inv_cdf(low + (high - low) * rng.random())
        masked = np.zeros(length, bool)
        masked[rng.permutation(length)[: min(length, math.ceil(length * ratio))]] = True
        return masked

    def _valid_cells(self, sample: Sample) -> np.ndarray:
        """bool [L]: cells whose centre lies in the picture, not in its padding."""
        cell = self.config.image_size / self.grid[0]
        left, top, right, bottom = (edge / cell for edge in sample.valid)
        centre = np.arange(self.grid[0]) + 0.5
        rows, columns = (centre > top) & (centre < bottom), (centre > left) & (centre < right)
        return (rows[:, None] & columns[None, :]).reshape(-1)

    # -- every module in every batch -------------------------------------------------------------------------

    def _lacks_a_module(self, branches: list[BranchSpec]) -> bool:
        """Whether a trained module would not run: sharded optimisers and ranks in step need all of them."""
        draws = any(task in self.tasks for task in IMAGE_TASKS)
        return (
            not branches
            or all(branch.image is None for branch in branches)
            or (draws and all(branch.target is None for branch in branches))
            or (Task.UNDERSTANDING in self.tasks and all(branch.target is not None for branch in branches))
        )

    def _filler(self, pictures: Pictures) -> list[BranchSpec]:
        """One grey picture whose losses weigh nothing."""
        side = self.config.image_size
        sample = Sample(
            id="filler",
            position=0,
            conversations=(),
            image=self._grey(),
            targets={task: self._grey() for task in IMAGE_TASKS},
            valid=(0, 0, side, side),
        )
        image = len(pictures.images)
        fillers = self._branches(sample, pictures, {})
        if Task.UNDERSTANDING in self.tasks:  # not cut, however short texts may be
            ids, labels = self.conversation((Turn("?", "."),), with_image=True)
            fillers.append(self._split(ids[:-1], labels[:-1], image))
        return [replace(filler, weight=0.0) for filler in fillers]

    def _grey(self) -> np.ndarray:
        """The all-zero image of the published recipe is mid-grey in pixels."""
        return np.full((self.config.image_size, self.config.image_size, 3), 127, np.uint8)


def assemble(
    config: HarmonConfig,
    branches: Sequence[BranchSpec],
    pictures: Pictures,
    samples: int,
    next_position: int,
    notes: dict[str, int] | None = None,
) -> HarmonBatch:
    """Lay branches out behind their prefixes and build every index the model needs."""
    return _Assembly(config, branches, pictures).batch(samples, next_position, notes or {})


class _Assembly:
    """Grows the index lists of a HarmonBatch, row by row."""

    def __init__(self, config: HarmonConfig, branches: Sequence[BranchSpec], pictures: Pictures) -> None:
        self.config, self.pictures = config, pictures
        self.buffers, self.length = (
            config.mar.buffer_size,
            math.prod(config.grid_of(config.image_size, config.image_size)),
        )
        self.rows: dict[tuple[tuple[int, ...], int | None, int], list[BranchSpec]] = {}
        for number, branch in enumerate(branches):
            # Text-only branches have nothing to share: each is a row of its own.
            alone = number if branch.image is None else -1
            self.rows.setdefault((branch.prefix, branch.image, alone), []).append(branch)
        self.targets = [b.target for row in self.rows.values() for b in row if b.target is not None]
        self.visible = [np.flatnonzero(~target.masked) for target in self.targets]
        self.target_base = len(pictures.images) * (self.buffers + self.length)
        self.text_base = self.target_base + sum(len(v) + self.buffers for v in self.visible)
        self.token_ids: list[int] = []
        self.source: list[np.ndarray] = []
        self.labels: list[tuple[int, int, float]] = []
        self.hidden: list[np.ndarray] = []
        self.target_weights: list[float] = []

    def batch(self, samples: int, next_position: int, notes: dict[str, int]) -> HarmonBatch:
        packed = pack([self._layout(key, row) for key, row in self.rows.items()])
        target = 0
        for (prefix, image, _), row, spans in zip(
            self.rows, self.rows.values(), packed.branches, strict=True
        ):
            self._text(prefix)
            if image is not None:
                start = image * (self.buffers + self.length)
                self.source.append(self._buffers_last(start, self.length))
            for branch, span in zip(row, spans, strict=True):
                target = self._branch(branch, span[0], target)
        loss_rows, row_task, row_weight = self._loss_rows()
        extra = len(self.pictures.images)
        label_index, label_ids, label_weight = zip(*self.labels, strict=True) if self.labels else ((), (), ())
        return HarmonBatch(
            plan=packed.plan,
            counts=self._counts(row_task, row_weight),
            samples=samples,
            tokens=packed.plan.length,
            next_position=next_position,
            notes=notes,
            token_ids=torch.tensor(self.token_ids, dtype=torch.long),
            position_ids=packed.position_ids,
            source_index=_long(self.source),
            label_index=torch.tensor(label_index, dtype=torch.long),
            label_ids=torch.tensor(label_ids, dtype=torch.long),
            label_weight=torch.tensor(label_weight, dtype=torch.float32),
            images=self._stack(self.pictures.images),
            extra_images=self._stack(self.pictures.extra),
            target_source=torch.tensor(
                [t.source if t.source >= 0 else extra - t.source - 1 for t in self.targets], dtype=torch.long
            ),
            visible_cells=_long(self.visible),
            visible_lengths=tuple(len(v) for v in self.visible),
            hidden_index=_long(self.hidden),
            loss_rows=torch.from_numpy(loss_rows),
            row_task=torch.from_numpy(row_task),
            row_weight=torch.from_numpy(row_weight),
            noise_seeds=tuple(t.seed for t in self.targets),
        )

    def _layout(self, key: tuple[tuple[int, ...], int | None, int], row: list[BranchSpec]) -> Layout:
        prefix, image, _ = key
        shared = len(prefix) + (self.length + self.buffers if image is not None else 0)
        return Layout(shared, tuple(len(b.ids) + self._drawn(b) for b in row))

    def _drawn(self, branch: BranchSpec) -> int:
        return 0 if branch.target is None else int((~branch.target.masked).sum()) + self.buffers

    def _branch(self, branch: BranchSpec, start: int, target: int) -> int:
        self._text(branch.ids)
        self.labels += [
            (start + place - 1, label, branch.weight)
            for place, label in enumerate(branch.labels)
            if label != IGNORE
        ]
        if branch.target is None:
            return target
        visible = len(self.visible[target])
        before = sum(len(v) + self.buffers for v in self.visible[:target])
        self.source.append(self._buffers_last(self.target_base + before, visible))
        first = start + len(branch.ids)
        self.hidden.append(
            np.concatenate(
                [
                    np.arange(first + visible, first + visible + self.buffers),
                    np.arange(first, first + visible),
                ]
            )
        )
        self.target_weights.append(branch.weight)
        return target + 1

    def _text(self, ids: Sequence[int]) -> None:
        first = self.text_base + len(self.token_ids)
        self.source.append(np.arange(first, first + len(ids)))
        self.token_ids += ids

    def _buffers_last(self, start: int, cells: int) -> np.ndarray:
        """Rows of one picture's embeddings in the order of the language model: cells, then buffers."""
        first_cell = start + self.buffers
        return np.concatenate([np.arange(first_cell, first_cell + cells), np.arange(start, first_cell)])

    def _loss_rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, tasks, weights = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
        for number, (target, weight) in enumerate(zip(self.targets, self.target_weights, strict=True)):
            cells = np.flatnonzero(target.masked & target.counts)
            rows.append(number * self.length + cells)
            tasks.append(np.full(len(cells), IMAGE_TASKS.index(target.task), np.int64))
            weights.append(np.full(len(cells), weight, np.float32))
        return np.concatenate(rows), np.concatenate(tasks), np.concatenate(weights)

    def _counts(self, row_task: np.ndarray, row_weight: np.ndarray) -> dict[Task, int]:
        counts = {Task.UNDERSTANDING: sum(1 for _, _, weight in self.labels if weight > 0)}
        for number, task in enumerate(IMAGE_TASKS):
            rows = int(((row_task == number) & (row_weight > 0)).sum())
            counts[task] = rows * self.config.mar.diffusion_batch_mul
        return counts

    def _stack(self, pictures: list[np.ndarray]) -> torch.Tensor:
        side = self.config.image_size
        if not pictures:
            return torch.zeros(0, side, side, 3, dtype=torch.uint8)
        return torch.from_numpy(np.stack(pictures))


def _long(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]))
