"""OpenUni's golden cases through the packed code path: the model, and a case's rows as a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

from tests.parity.cases import Case
from unimrg.families.openuni.config import ConnectorConfig, DCAEConfig, OpenUniConfig, SanaConfig
from unimrg.families.openuni.keys import to_transformers
from unimrg.families.openuni.model import Flow, OpenUni, timesteps_at
from unimrg.families.openuni.processor import OpenUniBatch
from unimrg.families.rows import IGNORE, Block, Row, Text, Vectors, as_long, assemble
from unimrg.sample import IMAGE_TASKS, Task


def from_fixture(golden: dict[str, Any]) -> OpenUniConfig:
    """Our configuration of a case's `config.json`."""
    vision, text, sana, vae = (dict(golden[part]) for part in ("vision", "llm", "sana", "vae"))
    connector = golden["connector"]
    assert golden["proj_type"] == "enc_proj"
    assert golden["chat"]["ps_version"] == "v2"
    rope = {"rope_theta": text.pop("rope_theta"), **(text.pop("rope_scaling") or {"rope_type": "default"})}
    rope.pop("type", None)  # an older word for the same
    lmm = InternVLConfig(
        vision_config=InternVLVisionConfig(
            attention_bias=vision.pop("qkv_bias"),
            use_qk_norm=vision.pop("qk_normalization"),
            **{name: value for name, value in vision.items() if name in dir(InternVLVisionConfig)},
        ),
        text_config=Qwen2Config(rope_parameters=rope, **text),
        image_token_id=golden["tokens"]["img_context"],
        downsample_ratio=golden["chat"]["downsample_ratio"],
        tie_word_embeddings=False,
    )
    assert sana["cross_attention_dim"] == sana["num_attention_heads"] * sana["attention_head_dim"]
    return OpenUniConfig(
        lmm=lmm,
        connector=ConnectorConfig(
            width=connector["hidden_size"],
            mlp_width=connector["intermediate_size"],
            depth=connector["num_hidden_layers"],
            heads=connector["num_attention_heads"],
            norm_eps=connector["layer_norm_eps"],
            out_width=sana["caption_channels"],
        ),
        sana=SanaConfig(**{name: sana[name] for name in SanaConfig.__dataclass_fields__}),
        vae=_dc_ae(vae),
        num_queries=golden["num_queries"],
        image_size=golden["tgt_hw"][0],
    )


def _dc_ae(vae: dict[str, Any]) -> DCAEConfig:
    assert vae["encoder_block_types"] == vae["decoder_block_types"]
    assert vae["encoder_block_out_channels"] == vae["decoder_block_out_channels"]
    return DCAEConfig(
        latent_channels=vae["latent_channels"],
        widths=vae["encoder_block_out_channels"],
        encoder_depths=vae["encoder_layers_per_block"],
        decoder_depths=vae["decoder_layers_per_block"],
        attention_levels=vae["encoder_block_types"].count("EfficientViTBlock"),
        attention_head_dim=vae["attention_head_dim"],
        multiscales=vae["encoder_qkv_multiscales"][-1],
        scale=vae["scaling_factor"],
    )


def ours(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    """Golden tensors by our parameters' names."""
    lmm = {name: tensor for name, tensor in golden.items() if name.startswith("lmm.")}
    rest = {name: tensor for name, tensor in golden.items() if not name.startswith("lmm.")}
    return rest | {f"lmm.{name}": tensor for name, tensor in to_transformers(lmm).items()}


def build_model(case: Case) -> OpenUni:
    """The case's model in evaluation mode; every key of the file is used, and no part is half loaded."""
    model = OpenUni(from_fixture(case.config))
    state = ours(case.weights)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    parts = {part_of(name) for name in state}
    assert not [name for name in missing if part_of(name) in parts]
    return model.eval()


def part_of(name: str) -> str:
    """The smallest part that a golden file may leave out."""
    pieces = name.split(".")
    return ".".join(pieces[:3]) if pieces[0] == "lmm" else pieces[0]


@dataclass
class Rows:
    """Rows of a case, each laid out alone, without its padding."""

    model: OpenUni
    rows: list[Row] = field(default_factory=list)
    pictures: int = 0
    drawings: int = 0

    def add(
        self,
        given: dict[str, Tensor],
        drawn: bool,
        tiles: list[list[int]] | None = None,
        labels: Tensor | None = None,
    ) -> None:
        """One row per line of `input_ids`; tiles: the numbers of the pictures each line shows, in order."""
        ids = given["input_ids"]
        mask = given.get("attention_mask", torch.ones_like(ids)).bool()
        for line, valid in enumerate(mask):
            own = None if labels is None else labels[line][valid].tolist()
            pieces = self._pieces(ids[line][valid].tolist(), own, tiles[line] if tiles else [])
            blocks = [Block(tuple(pieces))]
            if drawn:
                queries = np.arange(self.model.config.num_queries)
                blocks.append(Block((Vectors("query", queries, tag=self.drawings),)))
                self.drawings += 1
            self.rows.append(Row((), [tuple(blocks)]))

    def _pieces(self, ids: list[int], labels: list[int] | None, tiles: list[int]) -> list[Text | Vectors]:
        tokens = self.model.config.picture_tokens
        context = self.model.config.lmm.image_token_id
        rows = np.concatenate([np.zeros(0, int), *(np.arange(t * tokens, (t + 1) * tokens) for t in tiles)])
        assert ids.count(context) == len(rows)
        pieces: list[Text | Vectors] = []
        place = used = 0
        while place < len(ids):
            end = place
            while end < len(ids) and (ids[end] == context) == (ids[place] == context):
                end += 1
            if ids[place] == context:
                pieces.append(Vectors("picture", rows[used : used + end - place]))
                used += end - place
            else:
                own = labels[place:end] if labels is not None else [IGNORE] * (end - place)
                pieces.append(Text(ids[place:end], own))
            place = end
        self.pictures = max([self.pictures, *(tile + 1 for tile in tiles)])
        return pieces

    def batch(self, task: Task = Task.PIXEL) -> OpenUniBatch:
        """All rows; latents, noise and pictures are given beside it."""
        queries = self.model.config.num_queries
        tables = {"picture": self.pictures * self.model.config.picture_tokens, "query": queries}
        laid = assemble(self.rows, tables)
        drawings = range(self.drawings)
        blank = torch.zeros(0, 1, 1, 3, dtype=torch.uint8)
        return OpenUniBatch(
            **{name: value for name, value in vars(laid).items() if name != "places"},
            counts={Task.UNDERSTANDING: laid.answers, task: self.drawings},
            samples=len(self.rows),
            tokens=laid.plan.length,
            next_position=0,
            images=blank,
            extra_images=blank,
            target_source=torch.arange(self.drawings),
            target_task=torch.full((self.drawings,), IMAGE_TASKS.index(task)),
            target_weight=torch.ones(self.drawings),
            noise_seeds=tuple(drawings),
            query_index=as_long([laid.places[number] for number in drawings]),
            cell_weight=torch.zeros(0),
        )


@dataclass(frozen=True)
class Drawn:
    """One golden generation loss with its intermediates."""

    batch: OpenUniBatch
    hidden: Tensor
    queries: Tensor
    conditions: Tensor
    latents: Tensor
    timesteps: Tensor
    flow: Flow

    @property
    def loss(self) -> Tensor:
        return self.flow.error.mean(1).mean()


def draw(model: OpenUni, given: dict[str, Tensor], pictures: Tensor, latents: Tensor) -> Drawn:
    """The loss of a case's rows, line i about picture i when there are any; noise and u as the case says."""
    rows = Rows(model)
    lines = len(given["input_ids"])
    rows.add(given, drawn=True, tiles=[[line] for line in range(lines)] if len(pictures) else None)
    batch = rows.batch()
    hidden = model.states(batch, pictures)
    conditions = model.conditions(hidden, batch)
    timesteps = timesteps_at(given["u"])
    flow = model.flow(latents, conditions, timesteps, given["noise"])
    queries = hidden[batch.query_index].unflatten(0, (lines, -1))
    return Drawn(batch, hidden, queries, conditions, latents, timesteps, flow)


def none_of(model: OpenUni) -> Tensor:
    """The embeddings of no pictures."""
    return torch.zeros(0, 1, model.config.text.hidden_size)


def real(tensor: Tensor, mask: Tensor) -> Tensor:
    """The places of [rows, T, ...] where the mask is true, row behind row: packed order."""
    return tensor[mask.bool()]
