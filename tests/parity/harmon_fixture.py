"""Whole-model golden cases through the packed code path: the model, and a case's rows as a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.parity.cases import Case
from tests.parity.harmon_config import from_fixture
from unimrg.families.harmon.model import Harmon
from unimrg.families.harmon.processor import IGNORE, IMAGE_ID, HarmonBatch, HarmonProcessor, HarmonTarget
from unimrg.families.processor import Branch, Pictures
from unimrg.sample import IMAGE_TASKS, Task


def build_model(case: Case) -> Harmon:
    """The case's model in evaluation mode; every key of the file is used, and none is missing."""
    config = from_fixture(case.config)
    config.image_size = case.config["grid"][0] * config.vae.stride * config.mar.patch_size
    model = Harmon(config)
    case.load_into(model)
    assert model.llm.lm_head.weight is model.llm.get_input_embeddings().weight
    return model


@torch.no_grad()
def latents_of(model: Harmon, pixels: Tensor) -> Tensor:
    """Float pictures [B, 3, S, S] in [-1, 1] as latents [B, L, C]."""
    return model.vae.tokenize(model.vae.encode(pixels), model.config.mar.patch_size).flatten(1, 2)


@dataclass
class Rows:
    """Branches of one or more tasks, grown row by row, with the latents of their pictures.

    Pixels never enter a batch: they are integers there, and the golden ones are not.
    """

    model: Harmon
    branches: list[Branch]
    conditions: list[Tensor]
    extras: list[Tensor]

    @classmethod
    def of(cls, model: Harmon) -> Rows:
        return cls(model, [], [], [])

    def condition(self, pixels: Tensor) -> range:
        """Add condition pictures; returns their numbers."""
        start = sum(len(latents) for latents in self.conditions)
        self.conditions.append(latents_of(self.model, pixels))
        return range(start, start + len(pixels))

    def extra(self, pixels: Tensor) -> range:
        """Add target pictures that are no conditions; returns their `Target.source`."""
        start = -1 - sum(len(latents) for latents in self.extras)
        self.extras.append(latents_of(self.model, pixels))
        return range(start, start - len(pixels), -1)

    def answer(self, given: dict[str, Tensor], images: range) -> None:
        """One understanding branch a row of `input_ids` and `labels`; padding is left away."""
        for row, image in enumerate(images):
            self._add(given, row, image, given["labels"][row], None)

    def draw(self, given: dict[str, Tensor], task: Task, images: range | None, sources: range) -> None:
        """One drawing branch a row, masked as the case says, every cell counted."""
        for row, source in enumerate(sources):
            masked = given["mask"][row].bool().numpy()
            target = HarmonTarget(task, source, 0, masked, np.ones_like(masked))
            labels = torch.full_like(given["input_ids"][row], IGNORE)
            self._add(given, row, None if images is None else images[row], labels, target)

    def _add(
        self,
        given: dict[str, Tensor],
        row: int,
        image: int | None,
        labels: Tensor,
        target: HarmonTarget | None,
    ) -> None:
        valid = given["attention_mask"][row].bool()
        ids, kept = given["input_ids"][row][valid].tolist(), labels[valid].tolist()
        cut = ids.index(IMAGE_ID) if image is not None else 0
        after = cut + 1 if image is not None else 0
        self.branches.append(Branch(tuple(ids[:cut]), image, ids[after:], kept[after:], target))

    def batch(self) -> tuple[HarmonBatch, Tensor]:
        """The packed batch and the latents that go with it."""
        side = self.model.config.image_size
        blank = np.zeros((side, side, 3), np.uint8)
        latents = torch.cat([*self.conditions, *self.extras])
        conditions = sum(len(part) for part in self.conditions)
        pictures = Pictures([blank] * conditions, [blank] * (len(latents) - conditions))
        return HarmonProcessor(self.model.config, None).assemble(
            self.branches, pictures, len(self.branches), 0
        ), latents


def draws_of(given: dict[str, Tensor], batch: HarmonBatch, cells: int) -> tuple[Tensor, Tensor]:
    """A single-task case's timesteps and noise at the batch's masked cells: [K, M] and [K, M, C]."""
    rows = len(batch.visible_lengths) * cells
    timesteps, noise = given["t"].unflatten(0, (-1, rows)), given["noise"].unflatten(0, (-1, rows))
    return timesteps[:, batch.loss_rows], noise[:, batch.loss_rows]


class Watch:
    """Records what enters the language model, as `embeds` [T, H]."""

    def __init__(self, model: Harmon) -> None:
        self.embeds = torch.empty(0)
        self.handle = model.llm.model.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.embeds = kwargs["inputs_embeds"][0].detach()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


def task_of(name: str) -> Task:
    """Our name of a golden task."""
    names = {"recon": Task.PIXEL, "depth": Task.DEPTH, "mask": Task.SEGMENTATION}
    return names.get(name, Task.UNDERSTANDING)


def cells_of(model: Harmon) -> int:
    return math.prod(model.grid)


def image_task_rows(batch: HarmonBatch, task: Task) -> Tensor:
    """Which of the batch's masked cells belong to `task`: bool [M]."""
    return batch.row_task == IMAGE_TASKS.index(task)
