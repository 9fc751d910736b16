"""Janus-Pro (arXiv 2501.17811): a causal language model that draws pictures code by code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unimrg.config import FamilyConfig, TrainConfig
from unimrg.errors import ConfigError
from unimrg.families.janus import checkpoint
from unimrg.families.janus.config import TINY_TOKENS, TOKENS, JanusFamilyConfig
from unimrg.families.janus.model import Janus
from unimrg.families.janus.processor import JanusPackedProcessor
from unimrg.families.tokenizer import tokenizer_for
from unimrg.sample import Task
from unimrg.weights import load_folder, model_type

__all__ = [
    "Janus",
    "JanusPackedProcessor",
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


def build(config: FamilyConfig, seed: int, dtype: torch.dtype | None = torch.float32) -> tuple[Janus, Any]:
    """The model and its tokenizer, from fresh weights, a folder, or published weights (local paths).

    dtype: None leaves the weights as they are stored, for an engine that changes each as it cuts it.
    Raises ConfigError or CheckpointError with one sentence.
    """
    if config.vae_weights:
        raise ConfigError(
            "family.vae_weights: Janus-Pro's weights hold its picture tokenizer; leave it empty"
        )
    if config.dropout > 0:
        raise ConfigError(f"family.dropout={config.dropout}: Janus-Pro has no dropout; leave it at -1")
    sizes = checkpoint.sizes(config)
    tokenizer = tokenizer_for(config, TOKENS, "Janus-Pro", TINY_TOKENS)
    if not config.weights:
        return checkpoint.fresh(sizes, seed, tiny=config.variant == "tiny"), tokenizer
    if model_type(config.weights) == JanusFamilyConfig.model_type:
        return load_folder(Janus, Path(config.weights), dtype), tokenizer
    return checkpoint.from_published(sizes, Path(config.weights), dtype), tokenizer


def processor(
    model: Janus,
    tokenizer: Any,
    train: TrainConfig,
    tasks: Sequence[Task],
    seed: int,
    from_codes: bool = False,
) -> JanusPackedProcessor:
    """The processor for `tasks` with the training's text settings.

    from_codes: make batches from `Sample.codes`, without a call of the frozen encoder in training.
    Raises ConfigError for `published_prompts`, which Janus-Pro has none of.
    """
    if train.published_prompts:
        raise ConfigError("train.published_prompts: no recipe with all tasks is published for Janus-Pro")
    return JanusPackedProcessor(
        model.config,
        tokenizer,
        tasks,
        seed,
        max_text_tokens=train.max_text_tokens,
        prompt_dropout=train.prompt_dropout,
        grey_codes=model.grey_codes() if from_codes else None,
    )
