"""Janus-Pro's numbers: published sizes, and a tiny one for the CPU.

Janus-Pro (arXiv 2501.17811) sees pictures through SigLIP and draws them as codes of LlamaGen's picture
tokenizer (arXiv 2406.06525), one after the other, with one causal language model. All of it is transformers'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from transformers import AutoConfig, JanusConfig, JanusVisionConfig, LlamaConfig, PreTrainedConfig
from transformers.models.janus.configuration_janus import JanusVQVAEConfig

# Special tokens of Janus-Pro's tokenizer; the bars and the spaces in the first three are no ASCII.
BEGIN, END, PADDING = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
OPEN_IMAGE, CLOSE_IMAGE = "<begin_of_image>", "<end_of_image>"
TOKENS = (BEGIN, END, PADDING, OPEN_IMAGE, CLOSE_IMAGE)
"""What a tokenizer must have."""
TINY_TOKENS = (*TOKENS, "<image_placeholder>", "<|User|>", "<|Assistant|>")
"""What the tiny tokenizer gets behind its own ids."""


class JanusFamilyConfig(PreTrainedConfig):
    """transformers' configuration in `janus`, which may be a dictionary, as it stands in config.json.

    open_image_id: id of `OPEN_IMAGE`, which exported weights are told for the library's own drawing.
    guidance: default scale of classifier-free guidance in drawing; 1 = off, since drawing from a picture is
        trained without dropping it.
    """

    model_type = "janus_unimrg"
    reads_pixels: ClassVar[bool] = True
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {"janus": JanusConfig}

    janus: JanusConfig = None
    open_image_id: int = 100016
    guidance: float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        self.janus = self.janus if isinstance(self.janus, JanusConfig) else JanusConfig(**(self.janus or {}))
        side, stride = self.image_size, self.stride
        if side % stride:
            raise ValueError(f"a picture of {side} pixels isn't made of {stride}-pixel codes")
        super().__post_init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> LlamaConfig:
        """The language model's part; generation and embedding resizing read it."""
        return self.janus.text_config

    @property
    def image_size(self) -> int:
        """Side of the square training picture in pixels."""
        return int(self.janus.vision_config.image_size)

    @property
    def image_tokens(self) -> int:
        """Tokens of a picture that is looked at."""
        return (self.image_size // int(self.janus.vision_config.patch_size)) ** 2

    @property
    def stride(self) -> int:
        """Pixels per code along one side."""
        return 2 ** (len(self.janus.vq_config.channel_multiplier) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a drawing's codes."""
        side = self.image_size // self.stride
        return side, side


def _janus_pro(**text: int) -> JanusFamilyConfig:
    """What the published sizes share: SigLIP-L/16 at 384 pixels and 576 codes out of 16384."""
    hidden = text["hidden_size"]
    # The tokenizer's numbers: its begin, end and padding of text, and the placeholder of a picture.
    llm = LlamaConfig(
        vocab_size=102400,
        max_position_embeddings=16384,
        rms_norm_eps=1e-6,
        bos_token_id=100000,
        eos_token_id=100001,
        pad_token_id=100015,
        tie_word_embeddings=False,
        **text,
    )
    vision = JanusVisionConfig(projection_dim=hidden)
    vq = JanusVQVAEConfig(projection_dim=hidden, image_token_embed_dim=hidden)
    config = JanusConfig(text_config=llm, vision_config=vision, vq_config=vq, tie_word_embeddings=False)
    return JanusFamilyConfig(janus=config)


def janus_pro_1b() -> JanusFamilyConfig:
    """Janus-Pro-1B: DeepSeek-LLM of 1.5 billion parameters."""
    return _janus_pro(hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, intermediate_size=5632)


def janus_pro_7b() -> JanusFamilyConfig:
    """Janus-Pro-7B: DeepSeek-LLM of 7 billion parameters."""
    return _janus_pro(hidden_size=4096, num_hidden_layers=30, num_attention_heads=32, intermediate_size=11008)


def tiny(vocab_size: int = 512) -> JanusFamilyConfig:
    """Seconds per step on two CPU cores: 64-pixel pictures, seen as 8 x 8 tokens, drawn as 16 x 16 codes."""
    llm = LlamaConfig(
        vocab_size=vocab_size + len(TINY_TOKENS),
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=512,
        max_position_embeddings=4096,
        initializer_range=0.05,  # a narrow model learns nothing for a hundred steps from the usual 0.02
        bos_token_id=vocab_size,
        eos_token_id=vocab_size + 1,
        pad_token_id=vocab_size + 2,
        tie_word_embeddings=True,
    )
    vision = JanusVisionConfig(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        projection_dim=192,
        num_image_tokens=64,
    )
    # The norms have 32 groups whatever the width: with fewer than 64 channels a group would be one channel,
    # whose mean is lost, and with it the colour of a picture.
    vq = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=512,
        latent_channels=16,
        base_channels=64,
        channel_multiplier=(1, 1, 1),
        num_res_blocks=0,
        projection_dim=192,
        image_token_embed_dim=192,
    )
    ids = {token: vocab_size + number for number, token in enumerate(TINY_TOKENS)}
    janus = JanusConfig(
        text_config=llm, vision_config=vision, vq_config=vq, image_token_id=ids["<image_placeholder>"]
    )
    return JanusFamilyConfig(janus=janus, open_image_id=ids[OPEN_IMAGE])


# So that tokenizers beside a model load without a warning about an unknown kind of model.
AutoConfig.register(JanusFamilyConfig.model_type, JanusFamilyConfig, exist_ok=True)

VARIANTS: dict[str, Callable[[], JanusFamilyConfig]] = {
    "janus_pro_1b": janus_pro_1b,
    "janus_pro_7b": janus_pro_7b,
    "tiny": tiny,
}
