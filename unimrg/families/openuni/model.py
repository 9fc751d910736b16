"""OpenUni: a vision-language model that asks a diffusion transformer for pictures through learnable queries.

Written from the description in arXiv 2505.23661 (OpenUni). InternVL3 reads the picture, the instruction and
the queries behind it; the queries' last states, through a connector, condition SANA, which predicts the flow
from a picture's DC-AE latents to noise. Questions are answered by InternVL3 alone.

Legend: I condition pictures, B pictures, G targets, P embeddings of a picture, Q queries, T packed tokens,
H width of the language model, C latent channels, h x w latent grid, L its cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import InternVLForConditionalGeneration

from unimrg.attention import IMPLEMENTATION, NO_MASK
from unimrg.families.base import PROMPT, DrawOptions, Family
from unimrg.families.openuni import generate, libraries
from unimrg.families.openuni.config import DCAEConfig, OpenUniConfig
from unimrg.families.openuni.connector import Connector
from unimrg.families.openuni.flops import Sizes, count
from unimrg.families.openuni.processor import OpenUniBatch, OpenUniProcessor
from unimrg.families.reading import read_rows_of, spread
from unimrg.flops import Flops
from unimrg.losses import TaskLoss
from unimrg.sample import IMAGE_TASKS, Task

if TYPE_CHECKING:
    from diffusers import AutoencoderDC

TRAIN_STEPS = 1000
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]
DECODED_AT_ONCE = 8  # pictures in the autoencoder, whose last levels are as large as they


class Flow(NamedTuple):
    """One training step of flow matching; `error` [G, L] is the squared error's mean over channels.

    noisy, velocity: [G, C, h, w].
    """

    noisy: Tensor
    velocity: Tensor
    error: Tensor


class OpenUni(Family):
    """The whole model. `lmm` is transformers' InternVL; the other parts have their published names."""

    config_class = OpenUniConfig
    base_model_prefix = ""
    main_input_name = "batch"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    PARTS = ("vision", "mlp1", "llm", "queries", "connector", "projector", "sana")
    SHARED = "lmm.model.language_model.norm"
    BLOCKS = (
        "lmm.model.vision_tower.encoder.layer",
        "lmm.model.language_model.layers",
        "connector.layers",
        "transformer.transformer_blocks",
    )
    # Of the language model alone: the vision tower and the connector use the same names.
    LORA_TARGETS = ("lmm.model.language_model.*_proj",)

    def __init__(self, config: OpenUniConfig) -> None:
        super().__init__(config)
        self.lmm = InternVLForConditionalGeneration._from_config(
            config.lmm, attn_implementation=IMPLEMENTATION
        )
        read_rows_of(self.lmm.model.language_model.layers[-1], ["self_attn.o_proj"])
        width = config.text.hidden_size
        self.meta_queries = nn.Parameter(torch.randn(config.num_queries, width) * width**-0.5)
        self.connector = Connector(config.connector)
        self.projector = nn.Linear(config.connector.width, config.connector.out_width)
        self.transformer = libraries.sana(config.sana)
        self.vae = libraries.dc_ae(config.vae)
        self.grid = config.grid_of(config.image_size, config.image_size)
        self.post_init()
        self.train()

    def _init_weights(self, module: nn.Module) -> None:
        """Parts initialise themselves; the language model and the vision tower by their library's rule."""
        if module is self.transformer.patch_embed:
            libraries.fill_positions(module)

    # -- the loss --------------------------------------------------------------------------------------------

    def forward(self, batch: OpenUniBatch) -> dict[Task, TaskLoss]:  # type: ignore[override]  # its own batch
        """Unweighted losses of a packed batch; a task without terms in the batch is left out."""
        read = torch.cat([batch.label_index, batch.query_index])
        pictures = self.scale_gradient(self.embed_pictures(batch.images))
        hidden = self.states(batch, pictures, read)
        losses = {}
        if len(batch.label_index):
            losses[Task.UNDERSTANDING] = self.text_loss(hidden, self.lmm.lm_head, batch)
        if len(batch.target_source):
            latents = self.codes_of(batch, batch.target_source)
            flow = self.flow(latents, self.conditions(hidden, batch), *self.draw_noise(batch))
            terms = (flow.error * batch.cell_weight).sum(1)
            losses |= self.image_losses(terms, batch.target_task, batch.target_weight, batch)
        return losses

    def states(self, batch: OpenUniBatch, pictures: Tensor, read: Tensor | None = None) -> Tensor:
        """One pass of the language model over every packed token: [T, H] after the final norm.

        pictures: [I, P, H], the embeddings of the batch's pictures. read: int64, the packed positions whose
        states matter, each once (the others' are zeros); None: all.
        """
        tables = [pictures.flatten(0, 1), self.meta_queries]
        embeds = self.embed_packed(tables, self.lmm.get_input_embeddings(), batch)
        hidden = self.lmm.model.language_model(
            inputs_embeds=embeds.unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            attention_mask=NO_MASK,
            plan=batch.plan,
            rows=read,
            use_cache=False,
        ).last_hidden_state[0]
        return spread(hidden, read, batch.tokens)

    def conditions(self, hidden: Tensor, batch: OpenUniBatch) -> Tensor:
        """What SANA is told about every target: [G, Q, caption channels]."""
        queries = hidden.index_select(0, batch.query_index).unflatten(0, (-1, self.config.num_queries))
        return self.projector(self.connector(queries))

    def draw_noise(self, batch: OpenUniBatch) -> tuple[Tensor, Tensor]:
        """Timesteps [G] in 1..1000 and noise [G, C, h, w]: a function of each target's seed alone."""
        device = batch.target_source.device
        generator = torch.Generator(device)
        shares, noise = [], []
        for seed in batch.noise_seeds:
            generator.manual_seed(seed)
            shares.append(torch.rand((), generator=generator, device=device))
            shape = (self.config.vae.latent_channels, *self.grid)
            noise.append(torch.randn(shape, generator=generator, device=device))
        return timesteps_at(torch.stack(shares)), torch.stack(noise)

    def flow(self, latents: Tensor, conditions: Tensor, timesteps: Tensor, noise: Tensor) -> Flow:
        """Predict the velocity from latents to noise at `timesteps` (float32 [G], 1..1000).

        latents, noise: [G, C, h, w] with standard deviation near 1.
        """
        level = (timesteps / TRAIN_STEPS).view(-1, 1, 1, 1)
        latents = latents.float()
        noisy = (1 - level) * latents + level * noise
        velocity = self.velocity(noisy, conditions, timesteps)
        error = (velocity.float() - (noise - latents)).square().mean(1).flatten(1)
        return Flow(noisy, velocity, error)

    def velocity(self, noisy: Tensor, conditions: Tensor, timesteps: Tensor) -> Tensor:
        """SANA's prediction [G, C, h, w]."""
        return self.transformer(
            noisy.to(self.dtype), encoder_hidden_states=conditions, timestep=timesteps, return_dict=False
        )[0]

    def flops(self, batch: OpenUniBatch) -> dict[str, Flops]:
        """What the pass over a batch costs, by part."""
        return count(self, Sizes.of(batch))

    # -- pictures --------------------------------------------------------------------------------------------

    def embed_pictures(self, pictures: Tensor) -> Tensor:
        """uint8 [I, S, S, 3] to the language model's embeddings [I, P, H]."""
        if not len(pictures):
            return self.meta_queries.new_zeros(0, 1, self.config.text.hidden_size)
        return self.embed_pixels(pictures.permute(0, 3, 1, 2).float() / 255)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """[I, 3, any, any] in [0, 1] to [I, P, H]."""
        return self.lmm.get_image_features(vision_input(pixels, self.config.vision_size)).pooler_output

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] to latents [B, C, h, w]; in one call, since ranks must make equally many."""
        return encode_pictures(self.vae, self.config.vae, pictures)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """[B, 3, any, any] in [-1, 1] to latents [B, C, h, w]."""
        return encode_pixels(self.vae, self.config.vae, pixels)

    @torch.no_grad()
    def decode_pixels(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to [B, 3, ...], about [-1, 1]."""
        dtype = next(self.vae.parameters()).dtype
        shifted = latents / self.config.vae.scale + _shift(self.config.vae.shift, latents.device)
        return self.vae.decode(shifted.to(dtype)).sample

    @torch.no_grad()
    def decode_pictures(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to uint8 [B, S, S, 3]."""
        return torch.cat([to_bytes(self.decode_pixels(part)) for part in latents.split(DECODED_AT_ONCE)])

    # -- use -------------------------------------------------------------------------------------------------

    def answer(
        self,
        processor: OpenUniProcessor,
        images: Sequence[np.ndarray | None],
        questions: Sequence[str],
        max_new_tokens: int = 128,
    ) -> list[str]:
        """Greedy answers, cached decoding."""
        return generate.answer(self, processor, images, questions, max_new_tokens)

    def draw(
        self, processor: OpenUniProcessor, images: Sequence[np.ndarray], task: Task, options: DrawOptions
    ) -> list[np.ndarray]:
        """Redraw pictures, or draw their depth or segmentation."""
        return generate.draw(self, processor, images, task, options)

    def draw_text(
        self, processor: OpenUniProcessor, texts: Sequence[str], options: DrawOptions
    ) -> list[np.ndarray]:
        """Draw what each text says."""
        return generate.draw_text(self, processor, texts, options)

    # -- freezing --------------------------------------------------------------------------------------------

    def freeze(self, parts: Sequence[str], tasks: Sequence[Task]) -> None:
        """As every family; without questions also the head that only answers use.

        Raises ConfigError for an unknown part.
        """
        super().freeze(parts, tasks)
        if Task.UNDERSTANDING not in tasks:
            self.lmm.lm_head.requires_grad_(False)

    @property
    def drawing_parts(self) -> tuple[str, ...]:
        return ("queries", "connector", "projector", "sana")

    def block_tokens(self, text: int) -> dict[str, int]:
        drawn, queries = len(IMAGE_TASKS), self.config.num_queries
        tower = self.lmm.model.vision_tower
        seen = (self.config.vision_size // self.config.lmm.vision_config.patch_size[0]) ** 2 + 1
        trained = any(parameter.requires_grad for parameter in tower.parameters())
        return {
            # First of all and frozen, the tower keeps nothing.
            "lmm.model.vision_tower.encoder.layer": seen if trained else 0,
            "lmm.model.language_model.layers": PROMPT
            + self.config.picture_tokens
            + text
            + drawn * (PROMPT + queries),
            "connector.layers": drawn * queries,
            "transformer.transformer_blocks": drawn * math.prod(self.grid),
        }

    def named_parts(self) -> Iterator[tuple[str, nn.Parameter]]:
        cancelled = {id(bias) for bias in self._cancelled_biases()}
        parts = {
            "lmm.model.vision_tower.": "vision",
            "lmm.model.multi_modal_projector.": "mlp1",
            "lmm.": "llm",
            "meta_queries": "queries",
            "connector.": "connector",
            "projector.": "projector",
            "transformer.": "sana",
            "vae.": "vae",
        }
        for name, parameter in self.named_parameters():
            part = next(part for start, part in parts.items() if name.startswith(start))
            yield ("no effect" if id(parameter) in cancelled else part), parameter

    def _cancelled_biases(self) -> Iterator[nn.Parameter]:
        """Biases of keys that are neither rotated nor normalised: the softmax cancels them.

        Their gradients are rounding errors, which AdamW would make as large as anything else's.
        """
        yield from (layer.get_parameter("self_attn.k_proj.bias") for layer in self.connector.layers)
        if not self.config.lmm.vision_config.use_qk_norm:
            layers = self.lmm.model.vision_tower.encoder.layer
            yield from (layer.attention.k_proj.bias for layer in layers)
        if self.config.sana.qk_norm is None:
            yield from (block.attn2.to_k.bias for block in self.transformer.transformer_blocks)


def encode_pictures(vae: AutoencoderDC, config: DCAEConfig, pictures: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] to latents [B, C, h, w]."""
    return encode_pixels(vae, config, pictures.permute(0, 3, 1, 2).float() / 127.5 - 1)


def encode_pixels(vae: AutoencoderDC, config: DCAEConfig, pixels: Tensor) -> Tensor:
    """[B, 3, any, any] in [-1, 1] to latents [B, C, h, w]."""
    dtype = next(vae.parameters()).dtype
    return (vae.encode(pixels.to(dtype)).latent - _shift(config.shift, pixels.device)) * config.scale


@lru_cache(maxsize=64)
def _shift(shift: tuple[float, ...], device: torch.device) -> Tensor | float:
    """What latents are shifted by, for broadcasting over [B, C, h, w]; kept, so that no step waits for it."""
    with torch.inference_mode(False):
        return torch.tensor(shift, dtype=torch.float32, device=device).view(-1, 1, 1) if shift else 0.0


def timesteps_at(share: Tensor) -> Tensor:
    """Uniform draws in [0, 1) as timesteps 1000..1: the schedule descends and isn't shifted in training."""
    return TRAIN_STEPS - (share * TRAIN_STEPS).floor()


def vision_input(pixels: Tensor, side: int) -> Tensor:
    """[I, 3, any, any] in [0, 1] to what the vision tower takes, [I, 3, side, side]."""
    scaled = [(pixels[:, c] - mean) / std for c, (mean, std) in enumerate(zip(MEAN, STD, strict=True))]
    return interpolate(torch.stack(scaled, 1), size=(side, side), mode="bilinear", align_corners=False)


def to_bytes(pixels: Tensor) -> Tensor:
    """[B, 3, S, S], about [-1, 1], to uint8 [B, S, S, 3]."""
    return (pixels.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
