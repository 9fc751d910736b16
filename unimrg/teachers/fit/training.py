"""The training loop of the small teachers, and how they are stored."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from unimrg.errors import CheckpointError, first_line
from unimrg.teachers.fit.scenes import Scenes

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

Loss = Callable[["PreTrainedModel", Tensor, Scenes, np.random.Generator], Tensor]
WARMUP = 0.05  # of the steps


def train(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    loss: Loss,
    scenes: Scenes,
    steps: int,
    batch: int,
    rate: float,
    rng: np.random.Generator,
    folder: Path,
) -> None:
    """`steps` steps on `batch` pictures each; the learning rate rises to `rate` and falls to 0, linearly.

    What is there after every 500 steps, and at the end, is written to `folder`.
    """
    optimisers = make_optimisers(model, rate)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda k: min((k + 1) / (WARMUP * steps), 1 - k / steps))
        for o in optimisers
    ]
    began, mean = time.monotonic(), 0.0
    model.train()
    for step in range(1, steps + 1):
        picked = scenes.pick(rng, batch)
        pixels = processor(images=list(picked.rgb), return_tensors="pt")["pixel_values"]
        value = loss(model, pixels, picked, rng)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
        mean += (value.item() - mean) / min(step, 100)
        if step % 100 == 0 or step == steps:
            print(f"step {step} loss {mean:.4f} seconds {time.monotonic() - began:.0f}", flush=True)
        if step % 500 == 0 or step == steps:
            store(folder, model, processor)


def make_optimisers(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of linear layers, AdamW for the rest (arXiv 2502.16982)."""
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    weights = [p for p in model.parameters() if p.requires_grad]
    return [
        torch.optim.Muon(
            [p for p in weights if id(p) in linear],
            lr=rate,
            weight_decay=0.05,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW([p for p in weights if id(p) not in linear], rate, (0.9, 0.98), weight_decay=0.05),
    ]


def store(folder: Path, model: PreTrainedModel, processor: BaseImageProcessor) -> None:
    """The model in half precision and its processor, as the published checkpoints are laid out."""
    half = {name: value.half() for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=half)
    processor.save_pretrained(folder)


def load(model: PreTrainedModel, folder: Path) -> None:
    """Puts stored weights into a model of the same sizes."""
    try:
        stored = type(model).from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        model.load_state_dict(stored.state_dict())
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} holds no weights of these sizes ({first_line(error)}); give one that fit wrote"
        ) from error
