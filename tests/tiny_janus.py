"""What the tests of Janus-Pro share: a model as small as the library allows, a tokenizer, a processor."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from transformers import JanusConfig, JanusVisionConfig, LlamaConfig
from transformers.models.janus.configuration_janus import JanusVQVAEConfig

from unimrg.families.janus.config import OPEN_IMAGE, TINY_TOKENS, JanusFamilyConfig
from unimrg.families.janus.model import Janus
from unimrg.families.janus.processor import JanusPackedProcessor
from unimrg.families.tokenizer import tiny_tokenizer

VOCABULARY = 512


@lru_cache
def tokenizer() -> Any:
    """The package's tiny one with Janus-Pro's special tokens."""
    return tiny_tokenizer(TINY_TOKENS)


def micro(tied: bool = False) -> JanusFamilyConfig:
    """The smallest Janus-Pro with every part: 16-pixel pictures, seen as 4 x 4 tokens, drawn as 4 x 4 codes."""
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


def processor(config: JanusFamilyConfig, **options: Any) -> JanusPackedProcessor:
    return JanusPackedProcessor(config, tokenizer(), **{"seed": 5, **options})
