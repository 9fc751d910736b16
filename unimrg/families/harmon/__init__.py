"""Harmon (arXiv 2503.21979): a causal language model with masked continuous image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimrg.config import FamilyConfig, TrainConfig
from unimrg.errors import ConfigError
from unimrg.families.harmon import checkpoint
from unimrg.families.harmon.config import HarmonConfig
from unimrg.families.harmon.model import Harmon
from unimrg.families.harmon.processor import HarmonProcessor
from unimrg.families.tokenizer import SPECIAL_TOKENS, tokenizer_for
from unimrg.sample import Task
from unimrg.weights import model_type

__all__ = ["Harmon", "HarmonProcessor", "build", "image_size", "processor", "save_published"]

save_published = checkpoint.save_published


def image_size(config: FamilyConfig) -> int:
    """Side of the training picture in pixels, without building the model."""
    if _is_folder(config.weights):
        return HarmonConfig.from_pretrained(config.weights).image_size
    return checkpoint.variant_config(config.variant).image_size


def build(config: FamilyConfig, seed: int) -> tuple[Harmon, Any]:
    """The model and its tokenizer, from fresh weights, a folder, or published files (local paths).

    Raises ConfigError or CheckpointError with one sentence.
    """
    tokenizer = tokenizer_for(config, SPECIAL_TOKENS[1:], "Qwen2.5")
    dropout = None if config.dropout < 0 else config.dropout
    if _is_folder(config.weights):
        return checkpoint.from_folder(Path(config.weights), dropout), tokenizer
    sizes = checkpoint.variant_config(config.variant)
    if dropout is not None:
        sizes = checkpoint.with_dropout(sizes, dropout)
    if config.weights:
        if not config.vae_weights:
            raise ConfigError(
                "family.vae_weights is empty; published weights need the autoencoder's file (kl16.ckpt)"
            )
        return checkpoint.from_published(sizes, Path(config.weights), Path(config.vae_weights)), tokenizer
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


def _is_folder(weights: str) -> bool:
    """Whether that is a folder of our own `save_pretrained`."""
    return model_type(weights) == HarmonConfig.model_type
