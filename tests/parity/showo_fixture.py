"""Fixtures of Show-o as our model, our processor and packed batches; ids take the place of pictures.

A case's rows are padded; padding is left away here, which changes nothing, since positions are relative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import CLIPVisionConfig, PhiConfig

from tests.parity.cases import Case
from unimrg.families.processor import Branch, Pictures
from unimrg.families.rows import IGNORE, Block, Text
from unimrg.families.showo.config import SPECIAL_TOKENS, MagvitConfig, ShowoConfig
from unimrg.families.showo.generate import Prompts
from unimrg.families.showo.model import Showo
from unimrg.families.showo.processor import ShowoBatch, ShowoProcessor, ShowoTarget
from unimrg.losses import TaskLoss
from unimrg.plan import Plan
from unimrg.sample import Task


class FixtureConfig(ShowoConfig):
    """Numbers of tokens as a case gives them, which need not be those of a square picture."""

    sources: int = 0
    targets: int = 0

    @property
    def source_tokens(self) -> int:
        return self.sources

    @property
    def target_tokens(self) -> int:
        return self.targets


class Decimals:
    """The tokenizer of the fixtures: words are ids written out."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def phi_config(phi: dict[str, Any]) -> PhiConfig:
    phi = {name: value for name, value in phi.items() if name not in ("head_dim", "rotary_dims")}
    rope = {
        "rope_type": "default",
        "rope_theta": phi.pop("rope_theta"),
        "partial_rotary_factor": phi.pop("partial_rotary_factor"),
    }
    return PhiConfig(**phi, rope_parameters=rope, pad_token_id=None)


def clip_config(clip: dict[str, Any]) -> CLIPVisionConfig:
    """Of a case that gives the features: only their width counts."""
    width = clip["clip_dim"]
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=4,
        patch_size=4,
    )


def showo_config(config: dict[str, Any]) -> FixtureConfig:
    """The sizes of a case; its image tokenizer is unused, but for the number of codes."""
    showo, clip = config["showo"], config.get("clip")
    clip = clip if clip is not None and "clip_dim" in clip else None
    magvit = MagvitConfig(
        base_width=2,
        encoder_multipliers=(1,),
        encoder_blocks=(1,),
        decoder_multipliers=(1,),
        decoder_blocks=(1,),
        code_bits=int(math.log2(showo["codebook_size"])),
        norm_groups=1,
    )
    i2i, read = config.get("i2i", {}), showo["num_vq_tokens"]
    return FixtureConfig(
        magvit=magvit,
        llm=phi_config(config["phi"]),
        clip=None if clip is None else clip_config(clip),
        text_vocab=showo["llm_vocab_size"],
        text_end=showo["eos_token_id"],
        image_size=4,
        source_size=2,
        system_prompt=" ".join(str(token) for token in i2i.get("system_ids", ())),
        sources=i2i.get("num_source_tokens", read) if clip is None else clip["num_features"],
        targets=i2i.get("num_target_tokens", showo["num_vq_tokens"]),
    )


class FixtureProcessor(ShowoProcessor):
    """Pictures are given as ids or features, so there is nothing to resize."""

    def _for_clip(self, images: Tensor) -> Tensor:
        return images


class RecaProcessor(FixtureProcessor):
    """RecA's own masks and layout (arXiv 2509.07295), which differ from ours in three places.

    With codes, the task token sees only itself. With CLIP, soi and eoi of the target are plain text, and
    there is no system prompt.
    """

    def prefix(self, opening: tuple[int, ...], image: int) -> tuple[Block, ...]:
        if self.config.clip is not None:
            return super().prefix(opening, image)
        (block,) = super().prefix(opening[1:], image)
        return (Block((Text(opening[:1]),)), block)

    def drawing(self, number: int, target: ShowoTarget, first: int) -> tuple[Block, ...]:
        ((pieces, mode),) = blocks = super().drawing(number, target, first)
        if self.config.clip is None:
            return blocks
        before, codes, after = pieces
        return (Block((before,)), Block((codes,), mode), Block((after,)))


class Bench:
    """A case's model, fed with ids.

    images: ids [I, S] of the pictures that are read, or with CLIP `features`, [I, S, width].
    """

    def __init__(
        self, case: Case, processor: type[ShowoProcessor] = FixtureProcessor, sources: int | None = None
    ) -> None:
        self.config = showo_config(case.config)
        self.read_only(self.config.sources if sources is None else sources)
        if processor is RecaProcessor:
            self.config.system_prompt = ""
        self.model = Showo(self.config).eval()
        if case.weights:
            case.load_into(self.model.showo, "showo.")
        if case.weights and self.config.clip is not None:
            case.load_into(self.model.mm_projector, "mm_projector.")
        self.processor = processor(self.config, Decimals())
        self.features = case.inputs.get("features")
        assert {f"<|{name}|>": self.special(name) for name in SPECIAL_TOKENS}.items() <= (
            case.config["showo"]["special_token_ids"].items()
        )
        assert self.config.code_offset == case.config["showo"]["image_token_offset"]
        assert self.config.mask_id == case.config["showo"]["mask_token_id"]
        self.model.embed_pictures = self._embed_pictures

    def _embed_pictures(self, pictures: Tensor, clip_pictures: Tensor) -> Tensor:
        if self.features is not None:
            return self.model.mm_projector(self.features)
        return self.model.showo.get_input_embeddings()(self.images)

    # -- rows ------------------------------------------------------------------------------------------------

    def special(self, name: str) -> int:
        return self.config.special(name)

    def unpadded(self, row: Tensor) -> list[int]:
        """Ids without the padding on the left."""
        ids = row.tolist()
        pad = self.special("pad")
        return ids[next(i for i, token in enumerate(ids) if token != pad) :]

    def read_only(self, sources: int) -> None:
        """From now on pictures of that many ids are read; the ones so far are forgotten."""
        self.config.sources = sources
        self.images = torch.zeros(0, sources, dtype=torch.long)

    def read(self, ids: Tensor) -> int:
        """Number of a picture [S] that is read."""
        self.images = torch.cat([self.images, ids.unsqueeze(0)])
        return len(self.images) - 1

    def branch(
        self,
        ids: Sequence[int],
        labels: Sequence[int] | None = None,
        target: ShowoTarget | None = None,
        picture: int = 0,
    ) -> Branch[ShowoTarget]:
        """A row of ids; the picture that it reads and the target that it ends in are taken out.

        labels: of all ids. picture: which of the features it reads, where a case gives features; negative
        ids may stand for them.
        """
        ids = list(ids)
        labels = [IGNORE] * len(ids) if labels is None else list(labels)
        if target is not None:
            behind = self.config.target_tokens + 2
            assert (ids[-behind], ids[-1]) == (self.special("soi"), self.special("eoi"))
            ids, labels = ids[:-behind], labels[:-behind]
        if ids[0] != self.special("mmu"):
            return Branch((), None, ids, [IGNORE, *labels[1:]], target)
        last = first = ids.index(self.special("soi")) + 1
        if self.features is None or ids[first] < 0:
            last += self.config.source_tokens
        image = self.read(torch.tensor(ids[first:last])) if self.features is None else picture
        assert ids[last] == self.special("eoi")
        return Branch(tuple(ids[:first]), image, ids[last + 1 :], labels[last + 1 :], target)

    def target(self, masked: Tensor, task: Task = Task.PIXEL) -> ShowoTarget:
        """masked: bool [N]; all that is masked counts."""
        return ShowoTarget(task, 0, 0, masked.numpy(), masked.numpy())

    def batch(self, branches: Sequence[Branch[ShowoTarget]]) -> ShowoBatch:
        side = self.config.image_size
        count = len(self.images if self.features is None else self.features)
        return self.processor.assemble(
            branches, Pictures([np.zeros((side, side, 3), np.uint8)] * count), 1, 0
        )

    # -- numbers ---------------------------------------------------------------------------------------------

    def ids(self, batch: ShowoBatch, targets: Tensor) -> Tensor:
        """Packed ids [T]; features are -1. targets: ids [G, N], of which the batch hides the masked ones."""
        source = self.images.flatten()
        if self.features is not None:
            source = torch.full((len(self.features) * self.config.source_tokens,), -1)
        hidden = torch.where(batch.target_masked, self.config.mask_id, targets)
        return torch.cat([source, hidden.flatten(), batch.token_ids])[batch.source_index]

    @property
    def no_targets(self) -> Tensor:
        """Ids of the targets of a batch that has none."""
        return torch.zeros(0, self.config.target_tokens, dtype=torch.long)

    def hidden(self, batch: ShowoBatch, targets: Tensor) -> Tensor:
        """[T, H]. targets: ids [G, N]."""
        return self.model.hidden(batch, targets - self.config.code_offset)

    def terms(self, hidden: Tensor, batch: ShowoBatch, targets: Tensor) -> Tensor:
        """Cross-entropy [M] at the masked codes."""
        logits = self.model.showo.lm_head(hidden[batch.loss_index])
        return cross_entropy(logits, targets.flatten()[batch.loss_rows], reduction="none")

    def image_losses(self, hidden: Tensor, batch: ShowoBatch, targets: Tensor) -> dict[Task, TaskLoss]:
        terms = self.terms(hidden, batch, targets)
        return self.model.image_losses(terms, batch.row_task, batch.row_weight, batch)

    def prompts(self, rows: Tensor) -> Prompts:
        """Rows of prompts [R, P], padded on the left, cached."""
        return Prompts(self.model, [self._prompt(row) for row in rows])

    def _prompt(self, row: Tensor) -> tuple[Tensor, Plan]:
        batch = self.batch([self.branch(self.unpadded(row))])
        return self.model.embed(batch, self.no_targets), batch.plan
