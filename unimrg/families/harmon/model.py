"""Harmon: a causal language model and a masked auto-regressive image model that share one picture encoder.

Written from the description in arXiv 2503.21979 (Harmon) and arXiv 2406.11838 (MAR). Understanding and
drawing see a picture through the same MAR encoder; drawing adds the language model's states to the encoder's
own output, fills in the masked cells with the MAR decoder and models every latent with a diffusion head.

Legend: B pictures, I condition pictures, G targets, L latent cells, BUF buffer tokens, V visible target
cells (all targets), T packed tokens, H width of the language model, W width of MAR, C latent channels,
M masked cells that count, K draws of noise per cell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from unimrg.attention import IMPLEMENTATION, NO_MASK
from unimrg.families.base import PROMPT, DrawOptions, Family
from unimrg.families.harmon import generate
from unimrg.families.harmon.config import HarmonConfig
from unimrg.families.harmon.flops import Sizes, count
from unimrg.families.harmon.mar import MAR, repeat_rows
from unimrg.families.harmon.processor import HarmonBatch, HarmonProcessor
from unimrg.families.harmon.vae import KLVAE
from unimrg.families.reading import read_rows_of, spread
from unimrg.flops import Flops
from unimrg.losses import TaskLoss
from unimrg.sample import IMAGE_TASKS, Task


class States(NamedTuple):
    """What the losses are computed from.

    latents: [B, L, C] of all pictures, conditions first. condition: [I, BUF + L, H], buffers first.
    target_encoded: [V + G * BUF, W], buffers first per target. hidden: [T, H] after the final norm.
    """

    latents: Tensor
    condition: Tensor
    target_encoded: Tensor | None
    hidden: Tensor


class ImageRows(NamedTuple):
    """Both loss terms of every masked cell that counts, mse and vb [K, M]; the other two are for tests."""

    mse: Tensor
    vb: Tensor
    decoder_in: Tensor
    decoded: Tensor


def _projector(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


class Harmon(Family):
    """The whole model; parameter names are the published ones, with the autoencoder under `vae.`."""

    config_class = HarmonConfig
    base_model_prefix = ""
    main_input_name = "batch"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _tied_weights_keys: ClassVar[dict[str, str]] = {"llm.lm_head.weight": "llm.model.embed_tokens.weight"}

    NO_DECAY = ("diffloss",)
    PARTS = ("llm", "mar_encoder", "mar_decoder", "proj_in", "proj_out")
    SHARED = "llm.model.norm"
    BLOCKS = (
        "mar.encoder_blocks",
        "llm.model.layers",
        "mar.decoder_blocks",
        "mar.diffloss.net.res_blocks",
    )
    LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __init__(self, config: HarmonConfig) -> None:
        super().__init__(config)
        self.vae = KLVAE(config.vae)
        self.mar = MAR(config.mar)
        self.llm = Qwen2ForCausalLM._from_config(config.llm, attn_implementation=IMPLEMENTATION)
        read_rows_of(self.llm.model.layers[-1], ["self_attn.o_proj"])
        hidden = config.llm.hidden_size
        self.proj_in = _projector(config.mar.encoder_width, hidden, hidden)
        self.proj_out = _projector(hidden, hidden, config.mar.encoder_width)
        self.grid = config.grid_of(config.image_size, config.image_size)
        self.post_init()
        self.train()

    def _init_weights(self, module: nn.Module) -> None:
        """Parts initialise themselves; the language model by its own library's rule."""

    # -- the loss --------------------------------------------------------------------------------------------

    def forward(self, batch: HarmonBatch) -> dict[Task, TaskLoss]:  # type: ignore[override]  # its own batch
        """Unweighted losses of a packed batch; a task without terms in the batch is left out."""
        read = torch.cat([batch.label_index, batch.hidden_index])
        states = self.states(batch, self.codes_of(batch), read)
        losses = {}
        if len(batch.label_index):
            losses[Task.UNDERSTANDING] = self.text_loss(states.hidden, self.llm.lm_head, batch)
        if batch.visible_lengths:
            rows = self.image_rows(states, batch, *self.draw_noise(batch))
            per_cell = (rows.mse + rows.vb).float().sum(0)
            losses |= self.image_losses(per_cell, batch.row_task, batch.row_weight, batch)
        return losses

    def states(self, batch: HarmonBatch, latents: Tensor, read: Tensor | None = None) -> States:
        """One pass over every condition picture, every visible target cell and every packed token.

        latents: [B, L, C] of the batch's pictures, conditions first. read: int64, the packed positions whose
        states matter, each once (the others' are zeros); None: all.
        """
        condition = self.embed_pictures(latents[: len(batch.images)])
        encoded = None
        tables = [condition.flatten(0, 1)]
        if batch.visible_lengths:
            target_cells = latents[batch.target_source].flatten(0, 1)
            visible = target_cells[self._visible_rows(batch)]
            lengths = list(batch.visible_lengths)
            encoded = self.mar.encode_ragged(visible, batch.visible_cells, lengths, self.grid)
            tables.append(self.proj_in(encoded))
        embeds = self.embed_packed(tables, self.llm.get_input_embeddings(), batch)
        hidden = self.llm.model(
            inputs_embeds=embeds.unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            attention_mask=NO_MASK,
            plan=batch.plan,
            rows=read,
            use_cache=False,
        ).last_hidden_state[0]
        return States(latents, condition, encoded, spread(hidden, read, batch.tokens))

    def _visible_rows(self, batch: HarmonBatch) -> Tensor:
        """int64 [V]: rows of the visible cells in the flattened [G, L]."""
        lengths = list(batch.visible_lengths)
        first = torch.arange(len(lengths), device=batch.visible_cells.device) * math.prod(self.grid)
        return batch.visible_cells + repeat_rows(first, lengths)

    def draw_noise(self, batch: HarmonBatch) -> tuple[Tensor, Tensor]:
        """Timesteps int64 [K, M] and noise [K, M, C]: a function of each target's seed alone."""
        device = batch.loss_rows.device
        draws, cells = self.config.mar.diffusion_batch_mul, math.prod(self.grid)
        generator = torch.Generator(device)
        steps, noise = [], []
        for seed in batch.noise_seeds:
            generator.manual_seed(seed)
            steps.append(torch.randint(1000, (draws, cells), generator=generator, device=device))
            shape = (draws, cells, self.config.mar.token_width)
            noise.append(torch.randn(shape, generator=generator, device=device))
        rows = batch.loss_rows
        return torch.cat(steps, 1)[:, rows], torch.cat(noise, 1)[:, rows]

    def image_rows(self, states: States, batch: HarmonBatch, timesteps: Tensor, noise: Tensor) -> ImageRows:
        """Decode the targets and score their masked cells with the diffusion head."""
        assert states.target_encoded is not None
        from_text = self.proj_out(states.hidden.index_select(0, batch.hidden_index))
        decoder_in = states.target_encoded + from_text
        lengths = list(batch.visible_lengths)
        decoded = self.mar.decode_ragged(decoder_in, batch.visible_cells, lengths, self.grid)
        condition = decoded.flatten(0, 1).index_select(0, batch.loss_rows)
        target = states.latents[batch.target_source].flatten(0, 1).index_select(0, batch.loss_rows)
        draws = len(timesteps)
        mse, vb = self.mar.diffloss.row_losses(
            target, condition, timesteps.flatten(), noise.flatten(0, 1), repeats=draws
        )
        return ImageRows(mse.view(draws, -1), vb.view(draws, -1), decoder_in, decoded)

    def flops(self, batch: HarmonBatch) -> dict[str, Flops]:
        """What the pass over a batch costs, by part."""
        return count(self, Sizes.of(batch, self.config.mar.diffusion_batch_mul))

    # -- pictures --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] to latents [B, L, C]."""
        if not len(pictures):
            shape = (0, math.prod(self.grid), self.config.mar.token_width)
            return torch.zeros(shape, dtype=self.vae.quant_conv.weight.dtype, device=pictures.device)
        return self.vae.encode_pictures(pictures, self.config.mar.patch_size)

    @torch.no_grad()
    def decode_pictures(self, latents: Tensor) -> Tensor:
        """Latents [B, L, C] to uint8 [B, S, S, 3]."""
        pixels = self.vae.decode_tokens(latents.unflatten(1, self.grid), self.config.mar.patch_size)
        return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def embed_pictures(self, latents: Tensor) -> Tensor:
        """Whole pictures as the language model sees them, buffers first: [I, BUF + L, H]."""
        if not len(latents):
            return latents.new_zeros(0, 1, self.config.llm.hidden_size)
        embedded = self.proj_in(self.mar.encode(latents, self.grid, None))
        return self.scale_gradient(embedded)

    # -- use -------------------------------------------------------------------------------------------------

    def answer(
        self,
        processor: HarmonProcessor,
        images: Sequence[np.ndarray | None],
        questions: Sequence[str],
        max_new_tokens: int = 128,
    ) -> list[str]:
        """Greedy answers, cached decoding."""
        return generate.answer(self, processor, images, questions, max_new_tokens)

    def draw(
        self, processor: HarmonProcessor, images: Sequence[np.ndarray], task: Task, options: DrawOptions
    ) -> list[np.ndarray]:
        """Redraw pictures, or draw their depth or segmentation."""
        return generate.draw(self, processor, images, task, options)

    def draw_text(
        self, processor: HarmonProcessor, texts: Sequence[str], options: DrawOptions
    ) -> list[np.ndarray]:
        """Draw what each text says."""
        return generate.draw_text(self, processor, texts, options)

    # -- freezing --------------------------------------------------------------------------------------------

    @property
    def drawing_parts(self) -> tuple[str, ...]:
        return ("mar_decoder", "proj_out")

    def block_tokens(self, text: int) -> dict[str, int]:
        mar, cells, drawn = self.config.mar, math.prod(self.grid), len(IMAGE_TASKS)
        picture = mar.buffer_size + cells
        visible = mar.buffer_size + math.floor(cells * (1 - mar.mask_ratio_min))
        return {
            "mar.encoder_blocks": picture + drawn * visible,
            "llm.model.layers": picture + text + drawn * (visible + PROMPT),
            "mar.decoder_blocks": drawn * picture,
            "mar.diffloss.net.res_blocks": drawn * cells * mar.diffusion_batch_mul,
        }

    def named_parts(self) -> Iterator[tuple[str, nn.Parameter]]:
        decoder = ("decoder_", "mask_token", "diffusion_pos_embed", "diffloss")
        for name, parameter in self.named_parameters():
            part, _, rest = name.partition(".")
            if part == "mar":
                if rest.startswith(decoder):
                    yield "mar_decoder", parameter
                elif rest == "class_emb.weight":  # published, but read by nothing
                    yield "no effect", parameter
                elif rest != "fake_latent":  # of both
                    yield "mar_encoder", parameter
            else:
                yield part, parameter
