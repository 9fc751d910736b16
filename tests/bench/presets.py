"""The sizes of models that are timed, built with random weights: tiny, about 100 M parameters, published.

`100m` is no published variant: the published proportions of the parts, of picture to text and of picture to
drawing, at widths that a CPU can train.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from transformers import InternVLVisionConfig

from unimrg.config import FamilyConfig
from unimrg.families import load_family
from unimrg.families.base import Family
from unimrg.families.harmon import config as harmon
from unimrg.families.openuni import config as openuni
from unimrg.families.showo import config as showo

MIDDLE = "100m"


def harmon_100m() -> harmon.HarmonConfig:
    """256-pixel pictures as 16 x 16 latents."""
    mar = harmon.MARConfig(
        encoder_width=384,
        encoder_depth=8,
        encoder_heads=6,
        decoder_width=384,
        decoder_depth=8,
        decoder_heads=6,
        buffer_size=16,
        class_num=10,
        attn_dropout=0.0,
        proj_dropout=0.0,
        head_depth=6,
        head_width=512,
    )
    llm = harmon._qwen2_5(
        vocab_size=8192,
        hidden_size=512,
        num_hidden_layers=12,
        num_attention_heads=8,
        intermediate_size=2560,
        bos_token_id=None,
        eos_token_id=None,
    )
    vae = harmon.VAEConfig(base_width=32)
    return harmon.HarmonConfig(vae=vae, mar=mar, llm=llm, image_size=256)


def showo_100m() -> showo.ShowoConfig:
    """256-pixel pictures as 16 x 16 codes, read as 8 x 8."""
    magvit, text = showo.MagvitConfig(base_width=32), 4096
    llm = showo._phi(
        vocab_size=text + len(showo.SPECIAL_TOKENS) + magvit.codes + 1,
        hidden_size=640,
        intermediate_size=2560,
        num_hidden_layers=16,
        num_attention_heads=10,
        bos_token_id=0,
        eos_token_id=0,
    )
    return showo.ShowoConfig(magvit=magvit, llm=llm, text_vocab=text, text_end=0)


def openuni_100m() -> openuni.OpenUniConfig:
    """256-pixel pictures as 8 x 8 latents, read as 64 embeddings."""
    vision = InternVLVisionConfig(
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=1024,
        attention_bias=True,
        image_size=224,
        patch_size=14,
    )
    text = openuni._qwen2(
        vocab_size=12288,
        hidden_size=512,
        num_hidden_layers=10,
        num_attention_heads=8,
        intermediate_size=2048,
    )
    sana = openuni.SanaConfig(
        num_layers=6,
        num_attention_heads=18,
        num_cross_attention_heads=8,
        cross_attention_head_dim=72,
        caption_channels=512,
        sample_size=8,
    )
    return openuni.OpenUniConfig(
        lmm=openuni._lmm(vision, text),
        connector=openuni.ConnectorConfig(width=512, mlp_width=2048, depth=2, heads=8, out_width=512),
        sana=sana,
        vae=openuni.DCAEConfig(widths=(16, 32, 64, 64, 128, 128)),
        num_queries=64,
        image_size=256,
    )


MIDDLES: dict[str, Callable[[], Any]] = {
    "harmon": harmon_100m,
    "showo": showo_100m,
    "openuni": openuni_100m,
}
FROZEN = {"openuni": ("vision", "mlp1")}
"""Parts that the published trainings freeze beside autoencoders and tokenizers."""


def presets(family: str) -> list[str]:
    variants = importlib.import_module(f"unimrg.families.{family}.config").VARIANTS
    return [*variants, *([MIDDLE] if family in MIDDLES else [])]


def build(family: str, preset: str, device: torch.device) -> tuple[Family, Any]:
    """A model in training mode with random weights on a device (or `meta`), and the tiny tokenizer."""
    variants = importlib.import_module(f"unimrg.families.{family}.config").VARIANTS
    config = MIDDLES[family]() if preset == MIDDLE else variants[preset]()
    small, tokenizer = load_family(family).build(FamilyConfig(name=family), seed=0)
    torch.manual_seed(0)
    with device:
        model = type(small)(config)
    return model.train(), tokenizer
