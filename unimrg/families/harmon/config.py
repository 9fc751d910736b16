"""Harmon's numbers: published sizes, and a tiny one for the CPU.

Harmon (arXiv 2503.21979) couples a causal language model (Qwen2.5) with a masked auto-regressive image
model (MAR, arXiv 2406.11838) over the latents of a KL-16 autoencoder (arXiv 2112.10752).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig, Qwen2Config


@dataclass
class VAEConfig:
    """KL autoencoder (arXiv 2112.10752): one level per multiplier, each but the last halves the picture.

    encoder_attention_levels: levels whose residual blocks are each followed by attention (encoder only).
    scale: latent tokens are the posterior mean times this, so that they have a standard deviation near 1.
    """

    base_width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks_per_level: int = 2
    latent_channels: int = 16
    norm_groups: int = 32
    norm_eps: float = 1e-6
    encoder_attention_levels: tuple[int, ...] = (4,)
    scale: float = 0.2325

    def __post_init__(self) -> None:
        self.multipliers = tuple(self.multipliers)
        self.encoder_attention_levels = tuple(self.encoder_attention_levels)

    @property
    def stride(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.multipliers) - 1)


@dataclass
class MARConfig:
    """Masked auto-regressive image model with its diffusion head (arXiv 2406.11838).

    grid: native latent grid (rows, columns) of the position tables; other grids are interpolated.
    latent_channels: channels of the autoencoder; a token holds latent_channels * patch_size**2 numbers.
    class_num: rows of an unused table that published checkpoints carry.
    diffusion_batch_mul: fresh (timestep, noise) draws per token and training step.
    clip_latents: in sampling, predicted clean latents stay within +- this; 0 = unbounded, as published. The
        first steps divide by nearly nothing, which only a long-trained head survives unbounded.
    """

    grid: tuple[int, int] = (16, 16)
    patch_size: int = 1
    latent_channels: int = 16
    encoder_width: int = 1280
    encoder_depth: int = 20
    encoder_heads: int = 16
    decoder_width: int = 1280
    decoder_depth: int = 20
    decoder_heads: int = 16
    buffer_size: int = 64
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    class_num: int = 1000
    mask_ratio_min: float = 0.7
    attn_dropout: float = 0.1
    proj_dropout: float = 0.1
    head_depth: int = 12
    head_width: int = 1536
    sampling_steps: int = 100
    diffusion_batch_mul: int = 4
    clip_latents: float = 0.0

    def __post_init__(self) -> None:
        self.grid = (int(self.grid[0]), int(self.grid[1]))

    @property
    def token_width(self) -> int:
        """Numbers per latent token."""
        return self.latent_channels * self.patch_size**2


class HarmonConfig(PreTrainedConfig):
    """The whole model. `vae`, `mar` and `llm` may be given as dictionaries, as they stand in config.json.

    grad_scale: factor on the gradient that enters the clean image's embeddings.
    image_size: side of the square training picture in pixels.
    guidance: default scale of classifier-free guidance in drawing, 1 = off: fresh weights have never seen the
        published unconditional prompt, which has no picture.
    """

    model_type = "harmon_unimrg"
    reads_pixels: ClassVar[bool] = False
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {"llm": Qwen2Config}

    # Dictionaries or nothing until `__post_init__` has run.
    vae: VAEConfig = None  # type: ignore[assignment]
    mar: MARConfig = None  # type: ignore[assignment]
    llm: Qwen2Config = None
    grad_scale: float = 0.1
    image_size: int = 512
    guidance: float = 3.0

    def __post_init__(self, **kwargs: Any) -> None:
        self.vae = self.vae if isinstance(self.vae, VAEConfig) else VAEConfig(**(self.vae or {}))
        self.mar = self.mar if isinstance(self.mar, MARConfig) else MARConfig(**(self.mar or {}))
        self.llm = self.llm if isinstance(self.llm, Qwen2Config) else Qwen2Config(**(self.llm or {}))
        if self.vae.latent_channels != self.mar.latent_channels:
            raise ValueError(
                f"the autoencoder has {self.vae.latent_channels} latent channels, "
                f"MAR expects {self.mar.latent_channels}"
            )
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries all the way down; tuples become lists, as JSON would make them."""
        config = super().to_dict()
        config["vae"] = _as_plain(self.vae)
        config["mar"] = _as_plain(self.mar)
        return config

    def get_text_config(self, *args: Any, **kwargs: Any) -> Qwen2Config:
        """The language model's part; generation and embedding resizing read it."""
        return self.llm

    @property
    def vae_scale(self) -> float:
        """Factor from the autoencoder's posterior mean to latent tokens."""
        return self.vae.scale

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Latent grid (rows, columns) of a picture of that many pixels."""
        cell = self.vae.stride * self.mar.patch_size
        if height % cell or width % cell:
            raise ValueError(f"a picture of {height} x {width} pixels isn't made of {cell}-pixel cells")
        return height // cell, width // cell


def _as_plain(value: VAEConfig | MARConfig) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(value).items()}


def _qwen2_5(**sizes: Any) -> Qwen2Config:
    """What the published Qwen2.5 sizes share."""
    common = {
        "vocab_size": 151936,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }
    return Qwen2Config(**(common | sizes))


def harmon_1_5b() -> HarmonConfig:
    """Qwen2.5-1.5B-Instruct with MAR-Huge."""
    llm = _qwen2_5(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, intermediate_size=8960)
    return HarmonConfig(vae=VAEConfig(), mar=MARConfig(), llm=llm)


def harmon_0_5b() -> HarmonConfig:
    """Qwen2.5-0.5B-Instruct with MAR-Base."""
    llm = _qwen2_5(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, intermediate_size=4864)
    mar = MARConfig(
        encoder_width=768,
        encoder_depth=12,
        encoder_heads=12,
        decoder_width=768,
        decoder_depth=12,
        decoder_heads=12,
        head_depth=6,
        head_width=1024,
    )
    return HarmonConfig(vae=VAEConfig(), mar=mar, llm=llm)


def tiny(vocab_size: int = 512) -> HarmonConfig:
    """Seconds per step on two CPU cores: 64-pixel pictures as 8 x 8 latent tokens."""
    vae = VAEConfig(
        base_width=16,
        multipliers=(1, 1, 2, 2),
        blocks_per_level=1,
        norm_groups=2,
        encoder_attention_levels=(3,),
        scale=0.9208,
    )
    mar = MARConfig(
        grid=(8, 8),
        encoder_width=128,
        encoder_depth=3,
        encoder_heads=4,
        decoder_width=128,
        decoder_depth=2,
        decoder_heads=4,
        buffer_size=8,
        class_num=10,
        attn_dropout=0.0,
        proj_dropout=0.0,
        head_depth=3,
        head_width=192,
        sampling_steps=20,
        diffusion_batch_mul=2,
        clip_latents=4.0,
    )
    llm = _qwen2_5(
        vocab_size=vocab_size,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=512,
        initializer_range=0.1,  # the library's 0.02 is for widths of thousands
        bos_token_id=None,
        eos_token_id=None,
    )
    return HarmonConfig(vae=vae, mar=mar, llm=llm, image_size=64, guidance=1.0)


# So that tokenizers beside a model load without a warning about an unknown kind of model.
AutoConfig.register(HarmonConfig.model_type, HarmonConfig, exist_ok=True)

VARIANTS: dict[str, Callable[[], HarmonConfig]] = {
    "harmon_1_5b": harmon_1_5b,
    "harmon_0_5b": harmon_0_5b,
    "tiny": tiny,
}
