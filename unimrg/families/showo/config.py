"""Show-o's numbers: published sizes, and a tiny one for the CPU.

Show-o (arXiv 2408.12528) is one causal language model (Phi-1.5 with query and key norms) whose vocabulary
also holds the codes of an image tokenizer (MAGVIT-v2, arXiv 2310.05737): text is predicted token by token,
pictures by filling in masked codes. The `w_clip_vit` models read a picture through CLIP instead of its codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

from transformers import AutoConfig, CLIPVisionConfig, PhiConfig, PreTrainedConfig

SPECIAL_TOKENS = ("pad", "soi", "eoi", "sov", "eov", "t2i", "mmu", "t2v", "v2v", "lvg")
"""Ids behind the text's, in this order; the picture's codes follow, and the mask token is last."""


@dataclass
class MagvitConfig:
    """MAGVIT-v2 (arXiv 2310.05737): one level per multiplier, each but the last halves the picture.

    Multipliers of `base_width` and numbers of residual blocks are given per level, full resolution first,
    also for the decoder. code_bits: a code is that many signs, so there are 2**code_bits of them.
    """

    base_width: int = 128
    encoder_multipliers: tuple[int, ...] = (1, 2, 2, 4, 4)
    encoder_blocks: tuple[int, ...] = (4, 3, 4, 3, 4)
    decoder_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_blocks: tuple[int, ...] = (4, 4, 3, 4, 3)
    code_bits: int = 13
    norm_groups: int = 32
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        levels = [
            tuple(values)
            for values in (
                self.encoder_multipliers,
                self.encoder_blocks,
                self.decoder_multipliers,
                self.decoder_blocks,
            )
        ]
        if len({len(values) for values in levels}) != 1:
            raise ValueError(f"the tokenizer's levels differ in number: {levels}")
        self.encoder_multipliers, self.encoder_blocks, self.decoder_multipliers, self.decoder_blocks = levels

    @property
    def stride(self) -> int:
        """Pixels per code along one side."""
        return 2 ** (len(self.encoder_multipliers) - 1)

    @property
    def codes(self) -> int:
        """Number of different codes."""
        return 2**self.code_bits


class ShowoConfig(PreTrainedConfig):
    """The whole model. `magvit`, `llm` and `clip` may be given as dictionaries, as they stand in config.json.

    text_vocab: ids of the text tokenizer; everything else in the vocabulary is derived from it.
    text_end: the id that starts and ends every text.
    image_size: side of the square training picture and of everything drawn, in pixels.
    source_size: side, in pixels, of the picture as it is read: shrunk to this, then tokenised. It must carry
        less than the picture to draw, or redrawing is copying (RecA, arXiv 2509.07295). Unused with `clip`.
    clip: the picture's encoder of the `w_clip_vit` models, or None to read the picture by its codes.
    system_prompt: text in front of the picture (with `clip`; empty = none).
    guidance: default scale of classifier-free guidance in drawing, 1 = off; Show-o's own scale is this minus
        1. Off for fresh weights: what it contrasts with is learnt from few dropped prompts.
    """

    model_type = "showo_unimrg"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {"llm": PhiConfig, "clip": CLIPVisionConfig}

    # Dictionaries or nothing until `__post_init__` has run.
    magvit: MagvitConfig = None  # type: ignore[assignment]
    llm: PhiConfig = None
    clip: CLIPVisionConfig | None = None
    text_vocab: int = 50295
    text_end: int = 50256
    image_size: int = 256
    source_size: int = 128
    system_prompt: str = ""
    guidance: float = 2.75

    def __post_init__(self, **kwargs: Any) -> None:
        magvit: Any = self.magvit
        self.magvit = magvit if isinstance(magvit, MagvitConfig) else MagvitConfig(**(magvit or {}))
        self.llm = self.llm if isinstance(self.llm, PhiConfig) else PhiConfig(**(self.llm or {}))
        if isinstance(self.clip, dict):
            self.clip = CLIPVisionConfig(**self.clip)
        wanted = self.text_vocab + len(SPECIAL_TOKENS) + self.magvit.codes + 1
        if self.llm.vocab_size != wanted:
            raise ValueError(f"llm.vocab_size is {self.llm.vocab_size}, the parts need {wanted}")
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries all the way down; tuples become lists, as JSON would make them."""
        config = super().to_dict()
        plain = asdict(self.magvit)
        config["magvit"] = {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}
        return config

    def get_text_config(self, *args: Any, **kwargs: Any) -> PhiConfig:
        """The language model's part; generation and embedding resizing read it."""
        return self.llm

    def special(self, name: str) -> int:
        """Id of one of `SPECIAL_TOKENS`."""
        return self.text_vocab + SPECIAL_TOKENS.index(name)

    @property
    def code_offset(self) -> int:
        """Id of code 0."""
        return self.text_vocab + len(SPECIAL_TOKENS)

    @property
    def mask_id(self) -> int:
        """Id that stands for a masked code."""
        return self.llm.vocab_size - 1

    @property
    def reads_pixels(self) -> bool:
        """Whether pictures are read by more than their codes."""
        return self.clip is not None

    @property
    def grid(self) -> tuple[int, int]:
        """Codes (rows, columns) of a picture to draw."""
        return self._grid_of(self.image_size)

    @property
    def target_tokens(self) -> int:
        """N: codes of a picture to draw."""
        return math.prod(self.grid)

    @property
    def source_tokens(self) -> int:
        """Embeddings of a picture that is read: codes of the shrunk one, or CLIP's patches."""
        if self.clip is not None:
            return (self.clip.image_size // self.clip.patch_size) ** 2
        return math.prod(self._grid_of(self.source_size))

    def _grid_of(self, side: int) -> tuple[int, int]:
        if side % self.magvit.stride:
            raise ValueError(f"a side of {side} pixels isn't made of {self.magvit.stride}-pixel cells")
        return side // self.magvit.stride, side // self.magvit.stride


def _phi(**sizes: Any) -> PhiConfig:
    """Phi-1.5 as Show-o changes it: norms of queries and keys; no padding id, since every row counts."""
    common = {
        "vocab_size": 58498,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        "qk_layernorm": True,
        "hidden_act": "gelu_pytorch_tanh",  # "gelu_new" in one kernel: the same formula
        "tie_word_embeddings": False,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "pad_token_id": None,
    }
    return PhiConfig(**(common | sizes))


def _clip() -> CLIPVisionConfig:
    """CLIP ViT-L/14 at 336 pixels (arXiv 2103.00020)."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )


# The system sentence of LLaVA (arXiv 2310.03744), which the `w_clip_vit` models are trained with: 28 tokens.
SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


GUIDANCE = {256: 2.75, 512: 6.0}
"""By image size, as the published demonstrations draw: they call it 1.75 and 5."""


def showo(image_size: int) -> ShowoConfig:
    """Reads a picture by the codes of its half-size copy."""
    return ShowoConfig(
        llm=_phi(), image_size=image_size, source_size=image_size // 2, guidance=GUIDANCE[image_size]
    )


def showo_w_clip_vit(image_size: int) -> ShowoConfig:
    """Reads a picture through CLIP."""
    return ShowoConfig(
        llm=_phi(),
        clip=_clip(),
        image_size=image_size,
        system_prompt=SYSTEM_PROMPT,
        guidance=GUIDANCE[image_size],
    )


def tiny(text_vocab: int = 512) -> ShowoConfig:
    """Seconds per step on two CPU cores: 64-pixel pictures as 16 x 16 codes, read as 8 x 8."""
    magvit = MagvitConfig(
        base_width=16,
        encoder_multipliers=(1, 2, 3),
        encoder_blocks=(1, 1, 1),
        decoder_multipliers=(1, 2, 3),
        decoder_blocks=(1, 1, 1),
        code_bits=9,
        norm_groups=8,
    )
    llm = _phi(
        vocab_size=text_vocab + len(SPECIAL_TOKENS) + magvit.codes + 1,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        bos_token_id=0,
        eos_token_id=0,
    )
    return ShowoConfig(
        magvit=magvit,
        llm=llm,
        text_vocab=text_vocab,
        text_end=0,
        image_size=64,
        source_size=32,
        guidance=1.0,
    )


# So that tokenizers beside a model load without a warning about an unknown kind of model.
AutoConfig.register(ShowoConfig.model_type, ShowoConfig, exist_ok=True)

VARIANTS: dict[str, Callable[[], ShowoConfig]] = {
    "showo_256": partial(showo, 256),
    "showo_512": partial(showo, 512),
    "showo_w_clip_vit_256": partial(showo_w_clip_vit, 256),
    "showo_w_clip_vit_512": partial(showo_w_clip_vit, 512),
    "tiny": tiny,
}
