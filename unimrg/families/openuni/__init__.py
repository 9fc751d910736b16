"""OpenUni (arXiv 2505.23661): InternVL3 asks SANA for pictures through learnable queries.

Needs diffusers: pip install 'unimrg[openuni]'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unimrg.config import FamilyConfig, TrainConfig
from unimrg.errors import ConfigError
from unimrg.families.openuni import checkpoint
from unimrg.families.openuni.config import TOKENS
from unimrg.families.openuni.model import OpenUni
from unimrg.families.openuni.processor import OpenUniProcessor
from unimrg.families.tokenizer import SPECIAL_TOKENS, tokenizer_for
from unimrg.sample import Task
from unimrg.weights import load_folder

__all__ = [
    "OpenUni",
    "OpenUniProcessor",
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


def build(config: FamilyConfig, seed: int, dtype: torch.dtype | None = torch.float32) -> tuple[OpenUni, Any]:
    """The model and its tokenizer, from fresh weights, a folder, or published files (local paths).

    With InternVL3, SANA and DC-AE but no `weights`, queries, connector and projector are fresh.
    dtype: None leaves the weights as they are stored, for an engine that changes each as it cuts it.
    Raises ConfigError, CheckpointError or MissingExtraError with one sentence.
    """
    if config.dropout > 0:
        raise ConfigError(f"family.dropout={config.dropout}: OpenUni has no dropout; leave it at -1")
    sizes = checkpoint.sizes(config)
    tokenizer = tokenizer_for(_with_tokenizer(config), (*SPECIAL_TOKENS[1:], *TOKENS), "InternVL3", TOKENS)
    if checkpoint.is_ours(config.weights):
        return load_folder(OpenUni, Path(config.weights), dtype), tokenizer
    if config.weights or config.language_weights or config.diffusion_weights or config.vae_weights:
        return checkpoint.from_published(sizes, config, seed, dtype), tokenizer
    return checkpoint.fresh(sizes, seed, tiny=config.variant == "tiny"), tokenizer


def processor(
    model: OpenUni,
    tokenizer: Any,
    train: TrainConfig,
    tasks: Sequence[Task],
    seed: int,
    from_codes: bool = False,
) -> OpenUniProcessor:
    """The processor for `tasks` with the training's text settings.

    from_codes: make batches from `Sample.codes`, without a call of the frozen encoder in training.
    Raises ConfigError for `published_prompts`, which OpenUni has none of for all tasks.
    """
    if train.published_prompts:
        raise ConfigError("train.published_prompts: no recipe with all tasks is published for OpenUni")
    return OpenUniProcessor(
        model.config,
        tokenizer,
        tasks,
        seed,
        max_text_tokens=train.max_text_tokens,
        prompt_dropout=train.prompt_dropout,
        grey_codes=model.grey_codes() if from_codes else None,
    )


def _with_tokenizer(config: FamilyConfig) -> FamilyConfig:
    """InternVL3's folder also holds the tokenizer."""
    beside = (
        bool(config.language_weights) and (Path(config.language_weights) / "tokenizer_config.json").is_file()
    )
    return replace(config, tokenizer=config.language_weights) if beside and not config.tokenizer else config
