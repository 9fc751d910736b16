"""Heads see the rows that count and no other: answers' tokens, masked cells inside the picture.

OpenUni's drawings have no such head: its diffusion transformer reads and predicts whole pictures, so cells in
the padding are computed and weigh nothing.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine_runs import coded
from tests.families import NAMES, SIDE, processor, shared_model
from tests.tiny_harmon import random_sample
from unimrg.families.rows import PackedBatch
from unimrg.sample import IMAGE_TASKS, Task

HEADS = {
    "harmon": {"llm.lm_head": ["answers"], "mar.diffloss.net": ["drawn"]},
    "showo": {"showo.lm_head": ["answers", "drawn"]},
    "openuni": {"lmm.lm_head": ["answers"]},
    "janus": {
        "janus.lm_head": ["answers"],
        "janus.model.generation_head.proj_out": ["drawn"],
        "janus.model.generation_head.vision_head": ["drawn"],
    },
}
"""Modules that make a loss's terms, and of which rows, call by call."""


def padded_batch(name: str) -> PackedBatch:
    """From codes; half of one picture is padding, and everybody weighs something."""
    rng = np.random.default_rng(0)
    samples = [
        random_sample(rng, SIDE, 0, conversations=2, valid=(0, 4, SIDE, SIDE - 4)),
        random_sample(rng, SIDE, 1, tasks=(Task.DEPTH,)),
    ]
    made = processor(name)
    made.grey_codes = shared_model(name).grey_codes()
    batch: PackedBatch = made([coded(sample, shared_model(name)) for sample in samples])
    return batch


@pytest.mark.parametrize("name", NAMES)
def test_heads_see_the_rows_that_count(name: str) -> None:
    batch, model = padded_batch(name), shared_model(name)
    counted = {
        "answers": batch.counts[Task.UNDERSTANDING],
        "drawn": sum(batch.counts[task] for task in IMAGE_TASKS),
    }
    seen: dict[str, list[int]] = defaultdict(list)

    def look(where: str) -> Any:
        return lambda module, args: seen[where].append(len(args[0]))

    handles = [model.get_submodule(head).register_forward_pre_hook(look(head)) for head in HEADS[name]]
    model(batch)
    for handle in handles:
        handle.remove()
    assert seen == {head: [counted[rows] for rows in calls] for head, calls in HEADS[name].items()}


def losses(name: str, batch: PackedBatch) -> Tensor:
    torch.manual_seed(0)
    return torch.stack([loss.sum for loss in shared_model(name)(batch).values()])


@pytest.mark.parametrize(("name", "poison"), [("harmon", torch.nan), ("showo", 10**6)])
@torch.no_grad()
def test_what_does_not_count_is_never_read(name: str, poison: float) -> None:
    """Targets of masked cells in the padding may be anything, where they would spoil a loss they touch."""
    batch = padded_batch(name)
    assert batch.codes is not None
    # The depth map to draw is no condition, so a masked cell of it is read by the loss alone.
    drawn = batch.target_source.tolist().index(len(batch.images))
    cells = {"harmon": 16, "showo": 16}[name]
    kept = set(batch.loss_rows[batch.loss_rows // cells == drawn].tolist())
    kept |= {drawn * cells + cell for cell in visible(name, batch, drawn)}
    spoilt = [cell for cell in range(cells) if drawn * cells + cell not in kept]
    assert spoilt
    codes = batch.codes.clone()
    codes[batch.target_source[drawn], spoilt] = poison
    assert torch.equal(losses(name, replace(batch, codes=codes)), losses(name, batch))


def visible(name: str, batch: Any, drawn: int) -> list[int]:
    """Cells of a target that aren't masked."""
    if name == "showo":
        return (~batch.target_masked[drawn]).nonzero().flatten().tolist()
    found: list[int] = batch.visible_cells.split(list(batch.visible_lengths))[drawn].tolist()
    return found
