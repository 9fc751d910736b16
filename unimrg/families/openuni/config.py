"""OpenUni's numbers: published sizes, and a tiny one for the CPU.

OpenUni (arXiv 2505.23661) joins InternVL3 (arXiv 2504.10479) to SANA (arXiv 2410.10629) with learnable
queries and a small transformer; pictures are made in the latent space of DC-AE (arXiv 2410.10733). This
module needs transformers alone; building the model also needs diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from transformers import AutoConfig, InternVLConfig, InternVLVisionConfig, PreTrainedConfig, Qwen2Config

TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>")
"""Special tokens of InternVL3's tokenizer beside Qwen2.5's; the last one marks a picture's embeddings."""


@dataclass
class ConnectorConfig:
    """Bidirectional transformer between the language model's queries and SANA; as wide as the former.

    out_width: what SANA takes as conditions (its caption channels).
    """

    width: int = 896
    mlp_width: int = 3072
    depth: int = 6
    heads: int = 14
    norm_eps: float = 1e-6
    out_width: int = 2304


@dataclass
class SanaConfig:
    """SANA's diffusion transformer, in the words of `diffusers.SanaTransformer2DModel`.

    sample_size: side of the latent grid it was made for. qk_norm: None, or `rms_norm_across_heads` (SANA
    1.5). interpolation_scale: None = no position embedding, as published; else the scale of a sine-cosine
    one.
    """

    in_channels: int = 32
    num_layers: int = 28
    num_attention_heads: int = 36
    attention_head_dim: int = 32
    num_cross_attention_heads: int = 16
    cross_attention_head_dim: int = 72
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    sample_size: int = 16
    qk_norm: str | None = None
    interpolation_scale: float | None = None

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@dataclass
class DCAEConfig:
    """Deep-compression autoencoder; each level but the last halves the picture.

    attention_levels: how many of the last levels are linear attention (EfficientViT), the others residual.
    multiscales: extra attention scales of those levels. shift, scale: latents are the encoder's output less
    its mean in every channel (empty = 0, as published), times `scale`, so that their standard deviation is
    near 1. Both belong to the weights.
    """

    latent_channels: int = 32
    widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_depths: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_depths: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    attention_levels: int = 3
    attention_head_dim: int = 32
    multiscales: tuple[int, ...] = (5,)
    scale: float = 0.41407
    shift: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("widths", "encoder_depths", "decoder_depths", "multiscales", "shift"):
            setattr(self, name, tuple(getattr(self, name)))
        if len(self.shift) not in (0, self.latent_channels):
            raise ValueError(f"{len(self.shift)} numbers to shift {self.latent_channels} latent channels by")

    @property
    def stride(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.widths) - 1)


class OpenUniConfig(PreTrainedConfig):
    """The whole model; parts may be given as dictionaries, as they stand in config.json.

    num_queries: learnable queries behind every drawing prompt. image_size: side of the square training
    picture in pixels; the vision tower sees it resized to its own. flow_shift: timestep shift of sampling
    (training has none). sampling_steps: default steps of the sampler. guidance: default scale of
    classifier-free guidance in drawing; 1 = off, since drawing from a picture is trained without dropping it.
    """

    model_type = "openuni_unimrg"
    reads_pixels: ClassVar[bool] = True
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {"lmm": InternVLConfig}

    # Dictionaries or nothing until `__post_init__` has run.
    lmm: InternVLConfig = None
    connector: ConnectorConfig = None  # type: ignore[assignment]
    sana: SanaConfig = None  # type: ignore[assignment]
    vae: DCAEConfig = None  # type: ignore[assignment]
    num_queries: int = 256
    image_size: int = 512
    flow_shift: float = 3.0
    sampling_steps: int = 20
    guidance: float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        self.lmm = self.lmm if isinstance(self.lmm, InternVLConfig) else InternVLConfig(**(self.lmm or {}))
        parts = {"connector": ConnectorConfig, "sana": SanaConfig, "vae": DCAEConfig}
        for name, kind in parts.items():
            value = getattr(self, name)
            setattr(self, name, value if isinstance(value, kind) else kind(**(value or {})))
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        pairs = {
            "the connector's and the language model's width": (self.connector.width, self.text.hidden_size),
            "the connector's output and SANA's captions": (
                self.connector.out_width,
                self.sana.caption_channels,
            ),
            "the autoencoder's and SANA's channels": (self.vae.latent_channels, self.sana.in_channels),
        }
        for what, (one, other) in pairs.items():
            if one != other:
                raise ValueError(f"{what} differ: {one} and {other}")

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries all the way down; tuples become lists, as JSON would make them."""
        config = super().to_dict()
        for name in ("connector", "sana", "vae"):
            config[name] = _as_plain(getattr(self, name))
        return config

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The language model's part; generation and embedding resizing read it."""
        return self.lmm.text_config

    @property
    def text(self) -> PreTrainedConfig:
        return self.lmm.text_config

    @property
    def vision_size(self) -> int:
        """Side of the picture that the vision tower was made for, in pixels."""
        return self.lmm.vision_config.image_size[0]

    @property
    def picture_tokens(self) -> int:
        """Embeddings of one picture in the language model."""
        side = self.vision_size // self.lmm.vision_config.patch_size[0]
        return math.floor(side * self.lmm.downsample_ratio) ** 2

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Latent grid (rows, columns) of a picture of that many pixels."""
        cell = self.vae.stride
        if height % cell or width % cell:
            raise ValueError(f"a picture of {height} x {width} pixels isn't made of {cell}-pixel cells")
        return height // cell, width // cell


def _as_plain(value: ConnectorConfig | SanaConfig | DCAEConfig) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(value).items()}


def _internvl3(**sizes: Any) -> InternVLConfig:
    """What the published InternVL3 sizes share: one vision tower (InternViT-300M, version 2.5)."""
    vision = InternVLVisionConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        attention_bias=True,
        image_size=448,
        patch_size=14,
    )
    return _lmm(vision, _qwen2(vocab_size=151674, **sizes))


def _lmm(vision: InternVLVisionConfig, text: Qwen2Config) -> InternVLConfig:
    return InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=min(151667, text.vocab_size - 1),
        tie_word_embeddings=False,
    )


def _qwen2(**sizes: Any) -> Qwen2Config:
    # Published: rope_type "dynamic", which only begins beyond max_position_embeddings, where no row gets; it
    # would ask the device for the longest row at every pass.
    common = {
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return Qwen2Config(**(common | sizes))


def openuni_b_512() -> OpenUniConfig:
    """InternVL3-1B with SANA 0.6B."""
    lmm = _internvl3(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, intermediate_size=4864)
    return OpenUniConfig(lmm=lmm, connector=ConnectorConfig(), sana=SanaConfig(), vae=DCAEConfig())


def openuni_l_512() -> OpenUniConfig:
    """InternVL3-2B with SANA 1.6B."""
    lmm = _internvl3(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, intermediate_size=8960)
    connector = ConnectorConfig(width=1536, mlp_width=8960, heads=24)
    return OpenUniConfig(lmm=lmm, connector=connector, sana=_sana_1_6b(), vae=DCAEConfig())


def openuni_l_1024() -> OpenUniConfig:
    """InternVL3-2B with SANA 1.5 1.6B, pictures of 1024 pixels."""
    config = openuni_l_512()
    config.sana = _sana_1_6b(sample_size=32, qk_norm="rms_norm_across_heads")
    config.image_size = 1024
    return config


def _sana_1_6b(**options: Any) -> SanaConfig:
    return SanaConfig(
        num_layers=20,
        num_attention_heads=70,
        num_cross_attention_heads=20,
        cross_attention_head_dim=112,
        **options,
    )


# Of the tiny autoencoder's weights: the mean of its encoder's output over pictures, depth and boundaries. A
# mean other than 0 is the first thing that SANA learns, and drowns what the fresh connector tells it.
SHIFT = (-41.8, 46.2, -32.7, 53.2, 44.3, 9.4, 20.1, -40.4, 19.5, -32.1, -2.1, -3.3, 0.6, -27.5, -1.0, -11.4)


def tiny(vocab_size: int = 520) -> OpenUniConfig:
    """A second per step on two CPU cores: 64-pixel pictures as 64 embeddings and as 8 x 8 latent cells."""
    vae = DCAEConfig(
        latent_channels=16,
        widths=(32, 32, 64, 64),
        encoder_depths=(1, 1, 1, 1),
        decoder_depths=(1, 1, 1, 1),
        attention_levels=1,
        attention_head_dim=16,
        multiscales=(),
        scale=0.0160,
        shift=SHIFT,
    )
    vision = InternVLVisionConfig(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        attention_bias=True,
        image_size=64,
        patch_size=4,
        initializer_range=0.1,  # the library's are for widths of thousands
        layer_scale_init_value=1.0,
    )
    text = _qwen2(
        vocab_size=vocab_size,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=512,
        initializer_range=0.07,
    )
    sana = SanaConfig(
        in_channels=16,
        num_layers=4,
        num_attention_heads=5,
        num_cross_attention_heads=5,
        cross_attention_head_dim=32,
        caption_channels=192,
        sample_size=8,
        interpolation_scale=1.0,
    )
    return OpenUniConfig(
        lmm=_lmm(vision, text),
        connector=ConnectorConfig(width=192, mlp_width=512, depth=2, heads=6, out_width=192),
        sana=sana,
        vae=vae,
        num_queries=32,
        image_size=64,
    )


# So that tokenizers beside a model load without a warning about an unknown kind of model.
AutoConfig.register(OpenUniConfig.model_type, OpenUniConfig, exist_ok=True)

VARIANTS: dict[str, Callable[[], OpenUniConfig]] = {
    "openuni_b_512": openuni_b_512,
    "openuni_l_512": openuni_l_512,
    "openuni_l_1024": openuni_l_1024,
    "tiny": tiny,
}
