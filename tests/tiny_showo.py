"""What the tests of Show-o share: a model of thousands of parameters, a tokenizer, a processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import CLIPVisionConfig, PhiConfig

from unimrg.families.processor import Pictures
from unimrg.families.showo.config import SPECIAL_TOKENS, MagvitConfig, ShowoConfig
from unimrg.families.showo.model import Showo
from unimrg.families.showo.processor import ShowoProcessor
from unimrg.families.tokenizer import tiny_tokenizer
from unimrg.sample import Task

VOCABULARY = 512


@lru_cache
def tokenizer() -> Any:
    return tiny_tokenizer()


def micro(clip: bool = False) -> ShowoConfig:
    """The smallest Show-o with every part: 16-pixel pictures as 4 x 4 codes, read as 2 x 2.

    With CLIP they are read as 3 x 3 patches of 12 pixels, and there is a system prompt.
    """
    magvit = MagvitConfig(
        base_width=4,
        encoder_multipliers=(1, 1, 2),
        encoder_blocks=(1, 1, 1),
        decoder_multipliers=(1, 2, 2),
        decoder_blocks=(1, 2, 1),
        code_bits=5,
        norm_groups=2,
    )
    llm = PhiConfig(
        vocab_size=VOCABULARY + len(SPECIAL_TOKENS) + magvit.codes + 1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        qk_layernorm=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=12,
        patch_size=4,
    )
    return ShowoConfig(
        magvit=magvit,
        llm=llm,
        clip=vision if clip else None,
        text_vocab=VOCABULARY,
        text_end=0,
        image_size=16,
        source_size=8,
        system_prompt="A picture." if clip else "",
    )


def random_model(config: ShowoConfig, seed: int = 0) -> Showo:
    """Every parameter random, also those that start at zero, so that gradients flow everywhere."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = Showo(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(noise * 0.1 + float("norm" in name) * name.endswith("weight"))
    return model


def make_processor(
    config: ShowoConfig, tasks: Sequence[Task] = tuple(Task), seed: int = 0, prompt_dropout: float = 0.0
) -> ShowoProcessor:
    """Without dropped prompts, unless asked for: those rows don't read their picture."""
    return ShowoProcessor(config, tokenizer(), tasks, seed, prompt_dropout=prompt_dropout)


@torch.no_grad()
def greedy(
    model: Showo, processor: ShowoProcessor, image: np.ndarray | None, question: str, steps: int
) -> str:
    """The whole sequence again for every token; no cache, no padding, no batch."""
    branch = processor.question_branch(question, None if image is None else 0)
    answer: list[int] = []
    for _ in range(steps):
        ids = [*branch.ids, *answer]
        batch = processor.assemble(
            [replace(branch, ids=ids)], Pictures([] if image is None else [image]), 1, 0
        )
        hidden = model.hidden(batch, model.target_codes(batch))
        chosen = int(model.showo.lm_head(hidden[-1]).argmax())
        if chosen == processor.end:
            break
        answer.append(chosen)
    return str(processor.tokenizer.decode(answer, skip_special_tokens=True)).strip()
