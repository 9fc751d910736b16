"""Two ways to train on one picture's four tasks: the published recipe, and ours. Same losses, same gradients.

The reference recipe, put together from the descriptions of the published trainings of Harmon, Show-o and
OpenUni and of their post-trainings (UniMRG arXiv 2601.21406, RecA arXiv 2509.07295): one task a micro-step,
so four passes of every picture through the encoder and the language model; rows padded to the longest of the
micro-batch; every block recomputed in the backward pass; the frozen autoencoder or tokenizer inside the step;
Harmon's head on every cell, four copies of each condition; logits of the whole vocabulary at every place of
Show-o's rows and of OpenUni's answers; Show-o's dense mask. Where it is kinder than what was published: no
synchronisation with the host, no reduction of gradients after every micro-step, padding on the right, so that
causal attention needs no mask and the library's fastest kernel runs, and Harmon's time embedding computed
once per timestep. Frozen parts are in evaluation mode.

Ours: one packed pass over all tasks, stored codes in place of the autoencoder, nothing recomputed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from unimrg.attention import NO_MASK
from unimrg.families.base import Family
from unimrg.families.encoder import plain
from unimrg.families.harmon import flops as harmon_flops
from unimrg.families.harmon.model import Harmon
from unimrg.families.harmon.process import TRAIN_STEPS
from unimrg.families.harmon.processor import HarmonBatch, HarmonProcessor
from unimrg.families.janus.processor import JanusPackedProcessor
from unimrg.families.openuni import flops as openuni_flops
from unimrg.families.openuni.model import OpenUni
from unimrg.families.openuni.processor import OpenUniBatch, OpenUniProcessor
from unimrg.families.processor import PackedProcessor
from unimrg.families.rows import IGNORE, PackedBatch
from unimrg.families.showo import flops as showo_flops
from unimrg.families.showo.model import Showo
from unimrg.families.showo.processor import ShowoBatch, ShowoProcessor
from unimrg.flops import Flops
from unimrg.losses import combine
from unimrg.plan import Plan
from unimrg.sample import Sample, Task

MEAN_RATIO = 0.867
"""Of the truncated normal that Harmon's share of masked cells is drawn from."""


class Pass(NamedTuple):
    """One forward and backward pass of an optimiser step.

    loss: runs forward; its part of the step's loss. parts: what it costs. tokens: of the language model,
    padding included.
    """

    loss: Callable[[], Tensor]
    parts: dict[str, Flops]
    tokens: int


class OneRatio(HarmonProcessor):
    """As published, equally many cells of every picture of a micro-batch are masked; here the mean share."""

    def _draw_mask(self, rng: np.random.Generator) -> np.ndarray:
        masked = np.zeros(self.cells, bool)
        masked[rng.permutation(self.cells)[: math.ceil(self.cells * MEAN_RATIO)]] = True
        return masked


PROCESSORS: dict[str, type[PackedProcessor[Any, Any]]] = {
    "harmon": OneRatio,
    "showo": ShowoProcessor,
    "openuni": OpenUniProcessor,
    "janus": JanusPackedProcessor,
}


def processor(
    family: str, model: Family, tokenizer: Any, tasks: Sequence[Task], codes: bool = False
) -> PackedProcessor[Any, Any]:
    """Without dropped prompts: every row has its picture."""
    grey = model.grey_codes() if codes else None
    return PROCESSORS[family](model.config, tokenizer, tasks, 0, prompt_dropout=0.0, grey_codes=grey)


def ours(family: str, model: Family, tokenizer: Any, samples: Sequence[Sample]) -> list[Pass]:
    """On the meta device, where nothing is computed, codes are only said to be there."""
    if model.device.type == "meta":
        batch = processor(family, model, tokenizer, tuple(Task))(samples)
        batch = replace(batch, codes=torch.zeros(0))
    else:
        stored = [with_codes(sample, model) for sample in samples]
        batch = processor(family, model, tokenizer, tuple(Task), codes=True)(stored).to(model.device)
    return [packed_pass(model, batch)]


def packed_pass(model: Family, batch: Any, counts: dict[Task, int] | None = None) -> Pass:
    """One of the passes of a step. counts: terms of each task in the whole step."""
    whole, weights = counts or batch.counts, dict.fromkeys(Task, 1.0)
    return Pass(lambda: combine(model(batch), weights, whole), model.flops(batch), batch.tokens)


def reference(family: str, model: Family, tokenizer: Any, samples: Sequence[Sample]) -> list[Pass]:
    """A micro-step for each task, and a row for each conversation."""
    rows = [replace(s, conversations=(c,)) for s in samples for c in s.conversations]
    run, cost = REFERENCES[family]
    passes = []
    for task in Task:
        given = rows if task is Task.UNDERSTANDING else samples
        batch = processor(family, model, tokenizer, (task,))(given)
        padded = Padded.of(batch)
        # The mean over the micro-batch, and then over the micro-steps that are accumulated.
        share = 1 / (batch.counts[task] * len(Task))
        there = batch.to(model.device), padded.to(model.device)
        passes.append(
            Pass(partial(_part, run, share, model, *there), cost(model, batch, padded), padded.tokens)
        )
    return passes


def _part(run: Callable[..., Tensor], share: float, *given: Any) -> Tensor:
    return run(*given) * share


def with_codes(sample: Sample, model: Family) -> Sample:
    """As a label store gives it: pixels only where the model looks at them."""
    pictures = {"image": sample.image, **{task.value: target for task, target in sample.targets.items()}}
    stacked = torch.from_numpy(np.stack([pictures[name] for name in pictures])).to(model.device)
    codes = model.frozen_codes(stacked).cpu()
    numbers = (codes.float() if codes.is_floating_point() else codes).numpy()
    image = sample.image if model.reads_pixels else None
    return replace(
        sample, image=image, targets={}, codes=dict(zip(pictures, map(plain, numbers), strict=True))
    )


# -- padded rows ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Padded:
    """Packed rows of one branch each as a rectangle of `rows` x `length` places, padded on the right.

    place: int64 [T], of every packed token in the flattened rectangle. positions: int64 [rows, length].
    mask: bool [rows, 1, length, length], True where a place may look; padding looks at itself.
    """

    rows: int
    length: int
    place: Tensor
    positions: Tensor
    mask: Tensor

    @classmethod
    def of(cls, batch: PackedBatch) -> Padded:
        starts = (batch.position_ids == 0).nonzero().flatten().tolist()
        spans = list(zip(starts, [*starts[1:], batch.tokens], strict=True))
        rows, length = len(spans), max(stop - start for start, stop in spans)
        row = (batch.position_ids == 0).cumsum(0) - 1
        mask = torch.eye(length, dtype=torch.bool).repeat(rows, 1, 1)
        for number, (start, stop) in enumerate(spans):
            mask[number, : stop - start, : stop - start] = _alone(batch.plan, start, stop).dense_mask()
        positions = torch.arange(length).expand(rows, length)
        return cls(rows, length, row * length + batch.position_ids, positions, mask.unsqueeze(1))

    def to(self, device: torch.device) -> Padded:
        return replace(
            self,
            place=self.place.to(device),
            positions=self.positions.to(device),
            mask=self.mask.to(device),
        )

    def pad(self, packed: Tensor) -> Tensor:
        """[T, H] to [rows, length, H]."""
        whole = packed.new_zeros(self.rows * self.length, packed.shape[1])
        return whole.index_copy(0, self.place, packed).unflatten(0, (self.rows, self.length))

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def causal_pairs(self) -> int:
        return self.rows * self.length * (self.length + 1) // 2


def _alone(plan: Plan, start: int, stop: int) -> Plan:
    """The plan of the packed tokens start..stop-1, which look at nothing else."""

    def moved(span: tuple[int, int]) -> tuple[int, int]:
        return span[0] - start, span[1] - start

    inside = [s for s in plan.segments if start <= s.query[0] < stop]
    return Plan(
        stop - start,
        tuple(replace(s, query=moved(s.query), keys=tuple(map(moved, s.keys))) for s in inside),
    )


def full_loss(hidden: Tensor, head: torch.nn.Module, place: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy summed over the places of `wanted` ids, from float32 logits at every place of [N, H]."""
    labels = wanted.new_full((len(hidden),), IGNORE).index_copy(0, place, wanted)
    return cross_entropy(head(hidden).float(), labels, ignore_index=IGNORE, reduction="sum")


# -- the families' reference passes: the sum of one task's loss ----------------------------------------------


def harmon_loss(model: Harmon, batch: HarmonBatch, padded: Padded) -> Tensor:
    latents = model.encode_pictures(torch.cat([batch.images, batch.extra_images]))
    tables = [model.embed_pictures(latents[: len(batch.images)]).flatten(0, 1)]
    targets = len(batch.target_source)
    if targets:
        target = latents[batch.target_source]
        visible = batch.visible_cells.unflatten(0, (targets, -1))
        hidden_cells = target.new_ones(target.shape[:2]).scatter(1, visible, 0.0)
        encoded = model.mar.encode(target, model.grid, hidden_cells)
        tables.append(model.proj_in(encoded).flatten(0, 1))
    embeds = model.embed_packed(tables, model.llm.get_input_embeddings(), batch)
    states = model.llm.model(
        inputs_embeds=padded.pad(embeds),
        position_ids=padded.positions,
        attention_mask=NO_MASK,
        use_cache=False,
    ).last_hidden_state.flatten(0, 1)
    if not targets:
        answers = states.index_select(0, padded.place[batch.label_index])
        return cross_entropy(model.llm.lm_head(answers).float(), batch.label_ids, reduction="sum")
    asked = states.index_select(0, padded.place[batch.hidden_index])
    decoded = model.mar.decode(encoded + model.proj_out(asked).view_as(encoded), hidden_cells, model.grid)
    return _every_cell(model, batch, target.flatten(0, 1), decoded.flatten(0, 1))


def _every_cell(model: Harmon, batch: HarmonBatch, target: Tensor, condition: Tensor) -> Tensor:
    """The head on all cells [G * L]; those that aren't masked weigh nothing."""
    draws = model.config.mar.diffusion_batch_mul
    cells = torch.arange(len(target), device=target.device)
    timesteps, noise = model.draw_noise(replace(batch, loss_rows=cells))
    weight = noise.new_zeros(len(target)).index_copy(0, batch.loss_rows, batch.row_weight.to(noise.dtype))
    mse, vb = model.mar.diffloss.row_losses(
        target.repeat(draws, 1), condition.repeat(draws, 1), timesteps.flatten(), noise.flatten(0, 1)
    )
    return ((mse + vb) * weight.repeat(draws)).sum()


def harmon_cost(model: Harmon, batch: HarmonBatch, padded: Padded) -> dict[str, Flops]:
    rows = model.config.mar.diffusion_batch_mul * len(batch.target_source) * math.prod(model.grid)
    sizes = replace(
        harmon_flops.Sizes.of(batch, 0),
        tokens=padded.tokens,
        pairs=padded.causal_pairs,
        projected=rows,
        noisy=rows,
        timed=min(rows, TRAIN_STEPS),
        last_rows=None,
    )
    return harmon_flops.count(model, sizes)


def showo_loss(model: Showo, batch: ShowoBatch, padded: Padded) -> Tensor:
    codes = model.target_codes(batch)
    embeds = padded.pad(model.embed(batch, codes))
    barred = torch.zeros_like(padded.mask, dtype=embeds.dtype).masked_fill(
        ~padded.mask, torch.finfo(embeds.dtype).min
    )
    states = model.run(embeds, padded.positions, mask=barred).flatten(0, 1)
    drawn = len(batch.target_source) > 0
    place = batch.loss_index if drawn else batch.label_index
    wanted = model.config.code_offset + codes.flatten()[batch.loss_rows] if drawn else batch.label_ids
    return full_loss(states, model.showo.lm_head, padded.place[place], wanted)


def showo_cost(model: Showo, batch: ShowoBatch, padded: Padded) -> dict[str, Flops]:
    tokens, pairs = padded.tokens, padded.tokens * padded.length
    made = showo_flops.Sizes.of(batch)
    sizes = replace(made, tokens=tokens, pairs=pairs, predicted=tokens, last_rows=None)
    return showo_flops.count(model, sizes)


def openuni_loss(model: OpenUni, batch: OpenUniBatch, padded: Padded) -> Tensor:
    pictures = model.embed_pictures(batch.images).flatten(0, 1)
    embeds = model.embed_packed([pictures, model.meta_queries], model.lmm.get_input_embeddings(), batch)
    states = model.lmm.model.language_model(
        inputs_embeds=padded.pad(embeds),
        position_ids=padded.positions,
        attention_mask=NO_MASK,
        use_cache=False,
    ).last_hidden_state.flatten(0, 1)
    if not len(batch.target_source):
        return full_loss(states, model.lmm.lm_head, padded.place[batch.label_index], batch.label_ids)
    asked = replace(batch, query_index=padded.place[batch.query_index])
    latents = model.codes_of(batch, batch.target_source)
    flow = model.flow(latents, model.conditions(states, asked), *model.draw_noise(batch))
    return ((flow.error * batch.cell_weight).sum(1).float() * batch.target_weight).sum()


def openuni_cost(model: OpenUni, batch: OpenUniBatch, padded: Padded) -> dict[str, Flops]:
    sizes = replace(
        openuni_flops.Sizes.of(batch),
        tokens=padded.tokens,
        pairs=padded.causal_pairs,
        predicted=0 if len(batch.target_source) else padded.tokens,
        last_rows=None,
    )
    return openuni_flops.count(model, sizes)


REFERENCES: dict[str, tuple[Callable[..., Tensor], Callable[..., dict[str, Flops]]]] = {
    "harmon": (harmon_loss, harmon_cost),
    "showo": (showo_loss, showo_cost),
    "openuni": (openuni_loss, openuni_cost),
}
"""Janus-Pro has none: no training of all tasks is published for it."""
