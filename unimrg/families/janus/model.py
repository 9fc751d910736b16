"""Janus-Pro (arXiv 2501.17811): a causal language model that sees SigLIP's features and draws picture codes.

The modules are transformers' own; this file runs them packed and turns their outputs into losses. A picture
to look at goes through SigLIP and an aligner, a picture to draw through the frozen VQ tokenizer of LlamaGen
(arXiv 2406.06525): its codes are predicted one after the other, each from the codes before it.

Legend: B pictures, I condition pictures, G targets, S side of a picture, P tokens of a condition, L codes of
a target, T packed tokens, H width of the language model, M codes that count, K size of the codebook.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import JanusForConditionalGeneration
from transformers.models.janus.modeling_janus import JanusVQVAE

from unimrg.attention import IMPLEMENTATION
from unimrg.families.base import PROMPT, DrawOptions, Family
from unimrg.families.janus import generate
from unimrg.families.janus.config import JanusFamilyConfig
from unimrg.families.janus.flops import Sizes, count
from unimrg.families.janus.processor import JanusBatch, JanusPackedProcessor
from unimrg.families.reading import read_rows_of, spread
from unimrg.families.vocabulary import token_losses
from unimrg.flops import Flops
from unimrg.losses import TaskLoss
from unimrg.sample import IMAGE_TASKS, Task

PART_OF = {
    "vision_model": "vision",
    "aligner": "aligner",
    "language_model": "llm",
    "lm_head": "llm",
    "generation_embeddings": "generation",
    "generation_aligner": "generation",
    "generation_head": "generation",
    "vqmodel": "vq",
}
"""Part of each of the library's modules; `vq` is never trained."""


class Janus(Family):
    """The whole model; parameter names are transformers' below `janus.`."""

    config_class = JanusFamilyConfig
    base_model_prefix = ""
    main_input_name = "batch"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    PARTS = ("vision", "aligner", "llm", "generation")
    SHARED = "janus.model.language_model.norm"
    BLOCKS = ("janus.model.vision_model.encoder.layers", "janus.model.language_model.layers")
    EXACT = ("janus.model.vqmodel",)
    LORA_TARGETS = ("janus.model.language_model.*_proj",)

    def __init__(self, config: JanusFamilyConfig) -> None:
        super().__init__(config)
        self.janus = JanusForConditionalGeneration._from_config(
            config.janus, attn_implementation=IMPLEMENTATION
        )
        read_rows_of(self.janus.model.language_model.layers[-1], ["self_attn.o_proj"])
        # The library takes the grid of codes to be that of SigLIP's patches; so it is in the published sizes.
        self.janus.model.vqmodel.quantize.quant_state_dims = list(config.grid)
        self.post_init()
        self.train()

    def _init_weights(self, module: nn.Module) -> None:
        """Parts initialise themselves by their own library's rule."""

    # -- the loss --------------------------------------------------------------------------------------------

    def forward(self, batch: JanusBatch) -> dict[Task, TaskLoss]:  # type: ignore[override]  # its own batch
        """Unweighted losses of a packed batch; a task without terms in the batch is left out."""
        codes = self.codes_of(batch, batch.target_source)
        hidden = self.hidden(batch, codes, torch.cat([batch.label_index, batch.code_index]))
        losses = {}
        if len(batch.label_index):
            losses[Task.UNDERSTANDING] = self.text_loss(hidden, self.janus.lm_head, batch)
        if len(batch.target_source):
            head = self.janus.model.generation_head
            features = head.activation_fn(head.proj_out(hidden.index_select(0, batch.code_index)))
            wanted = codes.flatten().index_select(0, batch.cell_rows)
            terms = token_losses(head.vision_head, features, wanted)
            losses |= self.image_losses(terms, batch.cell_task, batch.cell_weight, batch)
        return losses

    def hidden(self, batch: JanusBatch, codes: Tensor, read: Tensor | None = None) -> Tensor:
        """States [T, H] after the final norm. codes: int64 [G, L] of the targets, fed but for the last.

        read: int64, the packed positions whose states matter, each once (the others' are zeros); None: all.
        """
        pictures = self.scale_gradient(self.embed_pictures(batch.images))
        drawings = self.embed_codes(codes[:, :-1])
        tables = [pictures.flatten(0, 1), drawings.flatten(0, 1)]
        hidden = self.janus.model.language_model(
            inputs_embeds=self.embed_packed(tables, self.janus.get_input_embeddings(), batch).unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            # Llama passes on a mask of four dimensions, else it builds one [T, T]; with a plan it isn't read.
            attention_mask=batch.position_ids.new_zeros(1, 1, 1, 1),
            plan=batch.plan,
            rows=read,
            use_cache=False,
        ).last_hidden_state[0]
        return spread(hidden, read, batch.tokens)

    def flops(self, batch: JanusBatch) -> dict[str, Flops]:
        """What the pass over a batch costs, by part."""
        return count(self, Sizes.of(batch))

    # -- pictures --------------------------------------------------------------------------------------------

    def embed_pictures(self, pictures: Tensor) -> Tensor:
        """uint8 [I, S, S, 3] to what the language model sees, [I, P, H]."""
        if not len(pictures):
            return self.janus.lm_head.weight.new_zeros(0, 1, self.config.janus.text_config.hidden_size)
        features = self.janus.model.vision_model(to_pixels(pictures).to(self.dtype)).last_hidden_state
        return self.janus.model.aligner(features)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """int64 [..., n] to what the language model sees, [..., n, H]."""
        return self.janus.prepare_embeddings_for_image_generation(codes)

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] to codes int64 [B, L]."""
        return encode_pictures(self.janus.model.vqmodel, pictures)

    @torch.no_grad()
    def decode_pictures(self, codes: Tensor) -> Tensor:
        """Codes [B, L] to uint8 [B, S, S, 3]."""
        pixels = self.janus.model.vqmodel.decode(codes).float()
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    # -- use -------------------------------------------------------------------------------------------------

    def answer(
        self,
        processor: JanusPackedProcessor,
        images: Sequence[np.ndarray | None],
        questions: Sequence[str],
        max_new_tokens: int = 128,
    ) -> list[str]:
        """Greedy answers, cached decoding."""
        return generate.answer(self, processor, images, questions, max_new_tokens)

    def draw(
        self, processor: JanusPackedProcessor, images: Sequence[np.ndarray], task: Task, options: DrawOptions
    ) -> list[np.ndarray]:
        """Redraw pictures, or draw their depth or segmentation; every code is one step of decoding."""
        return generate.draw(self, processor, images, task, options)

    def draw_text(
        self, processor: JanusPackedProcessor, texts: Sequence[str], options: DrawOptions
    ) -> list[np.ndarray]:
        """Draw what each text says."""
        return generate.draw_text(self, processor, texts, options)

    # -- freezing --------------------------------------------------------------------------------------------

    def freeze(self, parts: Sequence[str], tasks: Sequence[Task]) -> None:
        """Stop training `parts`, and what only tasks other than `tasks` use."""
        super().freeze(parts, tasks)
        if Task.UNDERSTANDING not in tasks and not self.config.janus.tie_word_embeddings:
            self.janus.lm_head.requires_grad_(False)

    @property
    def drawing_parts(self) -> tuple[str, ...]:
        return ("generation",)

    def block_tokens(self, text: int) -> dict[str, int]:
        picture, codes = self.config.image_tokens, math.prod(self.config.grid)
        tower = self.janus.model.vision_model
        trained = any(parameter.requires_grad for parameter in tower.parameters())
        return {
            # First of all and frozen, the tower keeps nothing.
            "janus.model.vision_model.encoder.layers": picture if trained else 0,
            "janus.model.language_model.layers": PROMPT
            + picture
            + text
            + len(IMAGE_TASKS) * (PROMPT + codes),
        }

    def named_parts(self) -> Iterator[tuple[str, nn.Parameter]]:
        # A bias of SigLIP's keys is cancelled by the softmax: its gradients are rounding errors, which AdamW
        # would make as large as anything else's.
        cancelled = () if self.config.janus.vision_config.use_qk_norm else ("self_attn.k_proj.bias",)
        for name, parameter in self.named_parameters():
            module = name.removeprefix("janus.").removeprefix("model.").split(".")[0]
            yield ("no effect" if name.endswith(cancelled) else PART_OF[module]), parameter


def encode_pictures(vq: JanusVQVAE, pictures: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] to codes int64 [B, L].

    The nearest code by angle, as the tokenizer was trained (arXiv 2406.06525) and as it is decoded.
    transformers' own `encode` compares unnormalised vectors, which is the same only where all codes are
    equally long.
    """
    # Codes are what is to be predicted: half precision would flip those that are nearly as close as another.
    with torch.autocast(pictures.device.type, enabled=False):
        pixels = to_pixels(pictures).to(vq.quant_conv.weight.dtype)
        features = vq.quant_conv(vq.encoder(pixels)).flatten(2).transpose(1, 2)
        numbers = torch.arange(vq.config.num_embeddings, device=features.device)
        codebook = normalize(vq.quantize.embedding(numbers).float(), dim=-1)
        return (features.float() @ codebook.T).argmax(-1)


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] to float32 [B, 3, S, S] in [-1, 1]: SigLIP's range and the tokenizer's."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
