"""What the tests of Janus-Pro share: a model as small as the library allows, a tokenizer, a processor."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import JanusConfig, JanusVisionConfig, LlamaConfig
from transformers.models.janus.configuration_janus import JanusVQVAEConfig

from unimrg.families.janus.config import OPEN_IMAGE, TINY_TOKENS, JanusFamilyConfig
from unimrg.families.janus.generate import embed_prompt
from unimrg.families.janus.model import Janus
from unimrg.families.janus.processor import JanusPackedProcessor
from unimrg.families.tokenizer import tiny_tokenizer
from unimrg.sample import Task

VOCABULARY = 512


@lru_cache
def tokenizer() -> Any:
    """The package's tiny one with Janus-Pro's special tokens."""
    return tiny_tokenizer(TINY_TOKENS)


def micro(tied: bool = False) -> JanusFamilyConfig:
    """The smallest Janus-Pro with every part: 16-pixel pictures, 16 tokens to look at, 16 codes to draw."""
    ids = {token: VOCABULARY + number for number, token in enumerate(TINY_TOKENS)}
    llm = LlamaConfig(
        vocab_size=VOCABULARY + len(TINY_TOKENS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        bos_token_id=VOCABULARY,
        eos_token_id=VOCABULARY + 1,
        pad_token_id=VOCABULARY + 2,
    )
    vision = JanusVisionConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        projection_dim=32,
        num_image_tokens=16,
    )
    vq = JanusVQVAEConfig(
        embed_dim=4,
        num_embeddings=24,
        latent_channels=8,
        base_channels=32,
        channel_multiplier=(1, 1, 1),
        num_res_blocks=0,
        projection_dim=32,
        image_token_embed_dim=32,
    )
    janus = JanusConfig(
        text_config=llm,
        vision_config=vision,
        vq_config=vq,
        image_token_id=ids["<image_placeholder>"],
        tie_word_embeddings=tied,
    )
    return JanusFamilyConfig(janus=janus, open_image_id=ids[OPEN_IMAGE])


def random_model(config: JanusFamilyConfig, seed: int = 0) -> Janus:
    """Every parameter random, so that gradients flow everywhere."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = Janus(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(noise * 0.1 + float("norm" in name and name.endswith("weight")))
    return model


def make_processor(config: JanusFamilyConfig, tasks: tuple[Task, ...], seed: int) -> JanusPackedProcessor:
    return JanusPackedProcessor(config, tokenizer(), tasks, seed)


@torch.no_grad()
def greedy(
    model: Janus, processor: JanusPackedProcessor, image: np.ndarray | None, question: str, steps: int
) -> str:
    """The whole sequence again for every token; no cache, no padding, no batch, and no attention of ours."""
    embeds = embed_prompt(model, processor, image, processor.question(question, with_image=image is not None))
    answer: list[int] = []
    for _ in range(steps):
        chosen = int(model.janus(inputs_embeds=embeds[None], use_cache=False).logits[0, -1].argmax())
        if chosen == processor.end[0]:
            break
        answer.append(chosen)
        embeds = torch.cat([embeds, model.janus.get_input_embeddings()(torch.tensor([chosen]))])
    return str(processor.tokenizer.decode(answer, skip_special_tokens=True)).strip()
