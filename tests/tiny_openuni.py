"""What the tests of OpenUni share: a model of thousands of parameters, a tokenizer, a processor."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

from unimrg.families.openuni.config import TOKENS, ConnectorConfig, DCAEConfig, OpenUniConfig, SanaConfig
from unimrg.families.openuni.generate import embed_prompt
from unimrg.families.openuni.model import OpenUni
from unimrg.families.openuni.processor import OpenUniProcessor
from unimrg.families.tokenizer import tiny_tokenizer
from unimrg.sample import Task

VOCABULARY = 512


@lru_cache
def tokenizer() -> Any:
    """The package's tiny one with InternVL3's special tokens."""
    return tiny_tokenizer(TOKENS)


def micro(qk_norm: str | None = None) -> OpenUniConfig:
    """The smallest OpenUni with every part: 16-pixel pictures as 9 embeddings and as 4 x 4 latent cells.

    The vision tower's pictures have 24 pixels, so ours are resized, as in the published sizes.
    """
    vision = InternVLVisionConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        attention_bias=True,
        image_size=24,
        patch_size=4,
    )
    text = Qwen2Config(
        vocab_size=VOCABULARY + len(TOKENS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    lmm = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=VOCABULARY + TOKENS.index("<IMG_CONTEXT>"),
        tie_word_embeddings=False,
    )
    vae = DCAEConfig(
        latent_channels=4,
        widths=(8, 16, 16),
        encoder_depths=(1, 1, 1),
        decoder_depths=(1, 1, 1),
        attention_levels=1,
        attention_head_dim=8,
        scale=0.7,
    )
    sana = SanaConfig(
        in_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=12,
        num_cross_attention_heads=3,
        cross_attention_head_dim=8,
        caption_channels=20,
        sample_size=4,
        qk_norm=qk_norm,
        interpolation_scale=1.0,
    )
    connector = ConnectorConfig(width=32, mlp_width=40, depth=2, heads=4, out_width=20)
    return OpenUniConfig(
        lmm=lmm, connector=connector, sana=sana, vae=vae, num_queries=5, image_size=16, sampling_steps=4
    )


def random_model(config: OpenUniConfig, seed: int = 0) -> OpenUni:
    """Every parameter random, so that gradients flow everywhere."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = OpenUni(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(noise * 0.1 + float("norm" in name and name.endswith("weight")))
    return model


def make_processor(config: OpenUniConfig, tasks: tuple[Task, ...], seed: int) -> OpenUniProcessor:
    return OpenUniProcessor(config, tokenizer(), tasks, seed)


@torch.no_grad()
def greedy(
    model: OpenUni, processor: OpenUniProcessor, image: np.ndarray | None, question: str, steps: int
) -> str:
    """The whole sequence again for every token; no cache, no padding, no batch, and no attention of ours."""
    embeds = embed_prompt(model, processor, image, processor.question(question, image is not None))
    answer: list[int] = []
    for _ in range(steps):
        chosen = int(model.lmm(inputs_embeds=embeds[None], use_cache=False).logits[0, -1].argmax())
        if chosen == processor.end_id:
            break
        answer.append(chosen)
        embeds = torch.cat([embeds, model.lmm.get_input_embeddings()(torch.tensor([chosen]))])
    return str(processor.tokenizer.decode(answer, skip_special_tokens=True)).strip()
