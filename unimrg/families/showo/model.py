"""Show-o: one causal language model whose vocabulary also holds the codes of pictures.

Written from the description in arXiv 2408.12528 (Show-o) and arXiv 2509.07295 (RecA, for drawing from a
picture). Text is predicted token by token, a picture by filling in masked codes that all see each other. A
picture is read by the codes of its smaller copy or, in the `w_clip_vit` models, through CLIP.

Legend: I pictures, S tokens of a picture that is read, G targets, N codes of a target, T packed tokens,
M masked codes that count, H width of the language model, R side in pixels that CLIP reads, B pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, PhiForCausalLM

from unimrg.attention import IMPLEMENTATION
from unimrg.families.base import PROMPT, DrawOptions, Family
from unimrg.families.reading import read_rows_of, spread
from unimrg.families.showo import generate
from unimrg.families.showo.config import ShowoConfig
from unimrg.families.showo.flops import Sizes, count
from unimrg.families.showo.magvit import Magvit, encode_pictures, frozen_codes
from unimrg.families.showo.pixels import to_clip, to_pictures
from unimrg.families.showo.processor import ShowoBatch, ShowoProcessor
from unimrg.families.vocabulary import token_losses
from unimrg.flops import Flops
from unimrg.losses import TaskLoss
from unimrg.plan import Plan
from unimrg.sample import IMAGE_TASKS, Task


class Showo(Family):
    """The whole model; `showo.` and `mm_projector.` are the published names."""

    config_class = ShowoConfig
    base_model_prefix = ""
    main_input_name = "batch"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    PARTS = ("llm", "projector")
    SHARED = "showo.model.final_layernorm"
    BLOCKS = ("showo.model.layers",)
    EXACT = ("magvit",)
    LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")

    def __init__(self, config: ShowoConfig) -> None:
        super().__init__(config)
        self.magvit = Magvit(config.magvit)
        self.showo = PhiForCausalLM._from_config(config.llm, attn_implementation=IMPLEMENTATION)
        # Its MLP stands beside attention, not behind it.
        read_rows_of(self.showo.model.layers[-1], ["self_attn.dense", "mlp"])
        if config.clip is not None:
            width, hidden = config.clip.hidden_size, config.llm.hidden_size
            self.clip = CLIPVisionModel._from_config(config.clip)
            self.mm_projector = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.post_init()
        self.train()

    def _init_weights(self, module: nn.Module) -> None:
        """Parts initialise themselves; the language model by its own library's rule."""

    # -- the loss --------------------------------------------------------------------------------------------

    def forward(self, batch: ShowoBatch) -> dict[Task, TaskLoss]:  # type: ignore[override]  # its own batch
        """Unweighted losses of a packed batch; a task without terms in the batch is left out.

        A drawing's terms are the cross-entropy at its masked codes over the whole vocabulary (eq. 2 of
        Show-o).
        """
        codes = self.target_codes(batch)
        hidden = self.hidden(batch, codes, torch.cat([batch.label_index, batch.loss_index]))
        losses = {}
        if len(batch.label_index):
            losses[Task.UNDERSTANDING] = self.text_loss(hidden, self.showo.lm_head, batch)
        if len(batch.target_source):
            wanted = self.config.code_offset + codes.flatten().index_select(0, batch.loss_rows)
            terms = token_losses(self.showo.lm_head, hidden.index_select(0, batch.loss_index), wanted)
            losses |= self.image_losses(terms, batch.row_task, batch.row_weight, batch)
        return losses

    def target_codes(self, batch: ShowoBatch) -> Tensor:
        """Codes int64 [G, N] of the pictures to draw."""
        return self.codes_of(batch, batch.target_source)[:, : self.config.target_tokens]

    def hidden(self, batch: ShowoBatch, codes: Tensor, read: Tensor | None = None) -> Tensor:
        """[T, H] after the final norm. codes: int64 [G, N], of which the batch's masked ones are hidden.

        read: int64, the packed positions whose states matter, each once (the others' are zeros); None: all.
        """
        embeds = self.embed(batch, codes).unsqueeze(0)
        positions = batch.position_ids.unsqueeze(0)
        return spread(self.run(embeds, positions, batch.plan, rows=read)[0], read, batch.tokens)

    def embed(self, batch: ShowoBatch, codes: Tensor) -> Tensor:
        """[T, H]: what enters the language model."""
        embedding = self.showo.get_input_embeddings()
        ids = torch.where(batch.target_masked, self.config.mask_id, self.config.code_offset + codes)
        source = self.scale_gradient(self.embed_sources(batch))
        return self.embed_packed([source.flatten(0, 1), embedding(ids.flatten())], embedding, batch)

    def run(
        self,
        embeds: Tensor,
        positions: Tensor,
        plan: Plan | None = None,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
        **cache: Any,
    ) -> Tensor:
        """The language model's states after the final norm, [B, T, H].

        embeds: [B, T, H]. positions: int64 [B, T]. Give either a plan (B = 1), or a mask: bool
        [B, 1, T, keys], True where a token may look. rows: only these are returned, [1, rows, H]; None: all.
        """
        if mask is None:  # a mask that looks complete keeps the library from building one of its own
            mask = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=embeds.device)
        return self.showo.model(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=mask,
            plan=plan,
            rows=rows,
            use_cache=len(cache) > 0,
            **cache,
        ).last_hidden_state

    def flops(self, batch: ShowoBatch) -> dict[str, Flops]:
        """What the pass over a batch costs, by part."""
        return count(self, Sizes.of(batch))

    # -- pictures --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor, side: int | None = None) -> Tensor:
        """uint8 [B, S, S, 3] to codes int64 [B, N]; shrunk to `side` pixels first, if given."""
        return encode_pictures(self.magvit, pictures, side)

    @torch.no_grad()
    def frozen_codes(self, pictures: Tensor) -> Tensor:
        """Codes [B, N] to draw and, behind them without CLIP, the [B, S] by which a picture is read."""
        return frozen_codes(self.magvit, self.config, pictures)

    @torch.no_grad()
    def decode_pictures(self, codes: Tensor) -> Tensor:
        """Codes [B, N] to uint8 [B, S, S, 3]."""
        return to_pictures(self.magvit.decode(codes, self.config.grid))

    def embed_pictures(self, pictures: Tensor, clip_pictures: Tensor) -> Tensor:
        """Pictures as they are read, [I, S, H], from uint8 [I, S, S, 3] or with CLIP uint8 [I, R, R, 3]."""
        if not len(pictures):
            weight = self.showo.get_input_embeddings().weight
            return weight.new_zeros(0, self.config.source_tokens, self.config.llm.hidden_size)
        if self.config.clip is not None:
            return self.mm_projector(self.clip_features(to_clip(clip_pictures)))
        return self.embed_codes(self.encode_pictures(pictures, self.config.source_size))

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Codes of pictures as they are read, int64 [I, S], to [I, S, H]."""
        return self.showo.get_input_embeddings()(self.config.code_offset + codes)

    def embed_sources(self, batch: ShowoBatch) -> Tensor:
        """The batch's conditions as they are read, [I, S, H]."""
        if batch.codes is None or self.config.clip is not None:
            return self.embed_pictures(batch.images, batch.clip_images)
        return self.embed_codes(batch.codes[: len(batch.images), self.config.target_tokens :])

    @torch.no_grad()
    def clip_features(self, pixels: Tensor) -> Tensor:
        """[I, S, width] of the last layer but one, without the class token. pixels: [I, 3, R, R]."""
        states = self.clip(pixels.to(self.clip.dtype), output_hidden_states=True).hidden_states
        return states[-2][:, 1:]

    # -- use -------------------------------------------------------------------------------------------------

    def answer(
        self,
        processor: ShowoProcessor,
        images: Sequence[np.ndarray | None],
        questions: Sequence[str],
        max_new_tokens: int = 128,
    ) -> list[str]:
        """Greedy answers, cached decoding."""
        return generate.answer(self, processor, images, questions, max_new_tokens)

    def draw(
        self, processor: ShowoProcessor, images: Sequence[np.ndarray], task: Task, options: DrawOptions
    ) -> list[np.ndarray]:
        """Redraw pictures, or draw their depth or segmentation."""
        return generate.draw(self, processor, images, task, options)

    def draw_text(
        self, processor: ShowoProcessor, texts: Sequence[str], options: DrawOptions
    ) -> list[np.ndarray]:
        """Draw what each text says."""
        return generate.draw_text(self, processor, texts, options)

    # -- training --------------------------------------------------------------------------------------------

    def block_tokens(self, text: int) -> dict[str, int]:
        picture = PROMPT + self.config.source_tokens
        drawings = len(IMAGE_TASKS) * (PROMPT + self.config.target_tokens)
        return {"showo.model.layers": picture + text + drawings}

    def named_parts(self) -> Iterator[tuple[str, nn.Parameter]]:
        parts = {"showo": "llm", "mm_projector": "projector"}
        for name, parameter in self.named_parameters():
            part = name.partition(".")[0]
            yield parts.get(part, part), parameter

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Decayed, and not: only biases escape, as in Show-o's training."""
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups["bias" not in name].append(parameter)
        return [
            {"params": groups[True], "weight_decay": weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ]
