"""Harmon (arXiv 2503.21979): a causal language model with masked continuous image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unimrg.config import FamilyConfig, TrainConfig
from unimrg.families.harmon import checkpoint
from unimrg.families.harmon.model import Harmon
from unimrg.families.harmon.processor import HarmonProcessor
from unimrg.families.tokenizer import SPECIAL_TOKENS, tokenizer_for
from unimrg.sample import Task

__all__ = [
    "Harmon",
    "HarmonProcessor",
    "build",
    "image_size",
    "picture_encoder",
    "processor",
    "save_published",
]

save_published = checkpoint.save_published
picture_encoder = checkpoint.picture_encoder


def image_size(config: FamilyConfig) -> int:
    """Side of the training picture in pixels, without building the model."""
    return checkpoint.sizes(config).image_size


def build(config: FamilyConfig, seed: int, dtype: torch.dtype | None = torch.float32) -> tuple[Harmon, Any]:
    """The model and its tokenizer, from fresh weights, a folder, or published files (local paths).

    dtype: None leaves the weights as they are stored, for an engine that changes each as it cuts it.
    Raises ConfigError or CheckpointError with one sentence.
    """
    tokenizer = tokenizer_for(config, SPECIAL_TOKENS[1:], "Qwen2.5")
    dropout = None if config.dropout < 0 else config.dropout
    if checkpoint.is_ours(config.weights):
        return checkpoint.from_folder(Path(config.weights), dropout, dtype), tokenizer
    sizes = checkpoint.sizes(config)
    if dropout is not None:
        sizes = checkpoint.with_dropout(sizes, dropout)
    if config.weights:
        return checkpoint.from_published(sizes, config.weights, config.vae_weights, dtype), tokenizer
    return checkpoint.fresh(sizes, seed, tiny=config.variant == "tiny"), tokenizer


def processor(
    model: Harmon,
    tokenizer: Any,
    train: TrainConfig,
    tasks: Sequence[Task],
    seed: int,
    from_codes: bool = False,
) -> HarmonProcessor:
    """The processor for `tasks` with the training's text settings.

    from_codes: make batches from `Sample.codes`, without a call of the frozen encoder in training.
    """
    return HarmonProcessor(
        model.config,
        tokenizer,
        tasks,
        seed,
        max_text_tokens=train.max_text_tokens,
        prompt_dropout=train.prompt_dropout,
        published=train.published_prompts,
        grey_codes=model.grey_codes() if from_codes else None,
    )
