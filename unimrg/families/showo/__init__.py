"""Show-o (arXiv 2408.12528): one causal language model over text and the codes of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unimrg.config import FamilyConfig, TrainConfig
from unimrg.errors import CheckpointError, ConfigError
from unimrg.families.showo import checkpoint
from unimrg.families.showo.config import ShowoConfig
from unimrg.families.showo.model import Showo
from unimrg.families.showo.processor import ShowoProcessor
from unimrg.families.tokenizer import tokenizer_for
from unimrg.sample import Task
from unimrg.weights import load_folder

__all__ = ["Showo", "ShowoProcessor", "build", "image_size", "picture_encoder", "processor", "save_published"]

END = "<|endoftext|>"

save_published = checkpoint.save_published
picture_encoder = checkpoint.picture_encoder


def image_size(config: FamilyConfig) -> int:
    """Side of the training picture in pixels, without building the model."""
    return checkpoint.sizes(config).image_size


def build(config: FamilyConfig, seed: int, dtype: torch.dtype | None = torch.float32) -> tuple[Showo, Any]:
    """The model and its tokenizer, from fresh weights, a folder, or published weights (local paths).

    dtype: None leaves the weights as they are stored, for an engine that changes each as it cuts it.
    Raises ConfigError or CheckpointError with one sentence.
    """
    if config.dropout > 0:
        raise ConfigError(f"family.dropout={config.dropout}: Show-o has no dropout; leave it at -1")
    sizes = checkpoint.sizes(config)
    tokenizer = tokenizer_for(config, (END,), "Phi-1.5")
    _check_tokenizer(tokenizer, sizes)
    if not config.weights:
        return checkpoint.fresh(sizes, seed, tiny=config.variant == "tiny"), tokenizer
    if checkpoint.is_ours(config.weights):
        return load_folder(Showo, Path(config.weights), dtype), tokenizer
    return checkpoint.from_published(sizes, config, dtype), tokenizer


def processor(
    model: Showo,
    tokenizer: Any,
    train: TrainConfig,
    tasks: Sequence[Task],
    seed: int,
    from_codes: bool = False,
) -> ShowoProcessor:
    """The processor for `tasks` with the training's text settings.

    from_codes: make batches from `Sample.codes`, without a call of the frozen encoder in training.
    Raises ConfigError for `published_prompts`: RecA's layouts (arXiv 2509.07295) know no shared prefix.
    """
    if train.published_prompts:
        raise ConfigError("train.published_prompts: no recipe with all tasks is published for Show-o")
    return ShowoProcessor(
        model.config,
        tokenizer,
        tasks,
        seed,
        max_text_tokens=train.max_text_tokens,
        prompt_dropout=train.prompt_dropout,
        grey_codes=model.grey_codes() if from_codes else None,
    )


def _check_tokenizer(tokenizer: Any, sizes: ShowoConfig) -> None:
    """Raise CheckpointError unless text ids end where the model's other ids begin."""
    end = tokenizer.convert_tokens_to_ids(END)
    if end != sizes.text_end or len(tokenizer) > sizes.text_vocab:
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer)} ids and {END} is {end}, Show-o needs at most "
            f"{sizes.text_vocab} and {sizes.text_end}: give family.tokenizer the folder of microsoft/phi-1_5"
        )
