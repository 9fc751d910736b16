"""Using an OpenUni: answers by cached decoding, pictures by DPM-Solver++ (arXiv 2211.01095).

Legend: n pictures, P prompt tokens, H width of the language model, Q queries, C latent channels,
h x w latent grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from unimrg.families.base import DrawOptions
from unimrg.families.openuni import libraries
from unimrg.families.openuni.processor import OpenUniProcessor, OpenUniTarget
from unimrg.families.processor import Pictures
from unimrg.sample import Task
from unimrg.tasks import UNCONDITIONAL, canonical_prompt, picture_prompt

if TYPE_CHECKING:
    from unimrg.families.openuni.model import OpenUni


@torch.no_grad()
def answer(
    model: OpenUni,
    processor: OpenUniProcessor,
    images: Sequence[np.ndarray | None],
    questions: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers to one question per picture (uint8 [S, S, 3], or None for text alone)."""
    rows = [
        embed_prompt(model, processor, image, processor.question(question, image is not None))
        for image, question in zip(images, questions, strict=True)
    ]
    embeds, mask = _pad_left(rows)
    out = model.lmm.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=processor.end_id,
        pad_token_id=processor.end_id,
    )
    return [processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in out]


@torch.no_grad()
def draw(
    model: OpenUni,
    processor: OpenUniProcessor,
    images: Sequence[np.ndarray],
    task: Task,
    options: DrawOptions,
) -> list[np.ndarray]:
    """Draw one picture per image, uint8 [S, S, 3]."""
    prompts = [canonical_prompt(task)] * len(images)
    return _draw(model, processor, prompt_conditions(model, processor, images, prompts), options)


@torch.no_grad()
def draw_text(
    model: OpenUni, processor: OpenUniProcessor, texts: Sequence[str], options: DrawOptions
) -> list[np.ndarray]:
    """Draw one picture per text, uint8 [S, S, 3]."""
    prompts = [picture_prompt(text) for text in texts]
    conditions = prompt_conditions(model, processor, [None] * len(texts), prompts)
    return _draw(model, processor, conditions, options)


def _draw(
    model: OpenUni, processor: OpenUniProcessor, conditions: Tensor, options: DrawOptions
) -> list[np.ndarray]:
    """One picture for each of `prompt_conditions`.

    Guidance leads away from the unconditional prompt of the published text-to-image training, which has no
    picture; it is the same for all and is computed once.
    """
    count, guidance = len(conditions), options.guidance or model.config.guidance
    if guidance != 1:
        nothing = prompt_conditions(model, processor, [None], [UNCONDITIONAL])
        conditions = torch.cat([nothing.expand_as(conditions), conditions])
    shape = (count, model.config.vae.latent_channels, *model.grid)
    generator = torch.Generator(conditions.device).manual_seed(options.seed)
    noise = torch.randn(shape, generator=generator, device=conditions.device) * options.temperature
    scheduler = libraries.dpm_solver(model.config.flow_shift)
    scheduler.set_timesteps(options.iterations or model.config.sampling_steps, device=conditions.device)
    latents = sample_latents(model, conditions, noise, scheduler, guidance)
    return list(model.decode_pictures(latents).cpu().numpy())


def prompt_conditions(
    model: OpenUni,
    processor: OpenUniProcessor,
    images: Sequence[np.ndarray | None],
    prompts: Sequence[str],
) -> Tensor:
    """What SANA is told by each prompt about its image, or by it alone (None): [n, Q, caption channels]."""
    pictures, branches = Pictures(), []
    target = OpenUniTarget(Task.PIXEL, 0, 0, np.ones(processor.cells, bool))  # only that there is one counts
    for image, prompt in zip(images, prompts, strict=True):
        number = None if image is None else pictures.add(image)
        branches.append(processor.drawing_branch(prompt, number, target))
    batch = processor.assemble(branches, pictures, len(images), 0).to(model.device_of_weights)
    return model.conditions(model.states(batch, model.embed_pictures(batch.images)), batch)


def sample_latents(
    model: OpenUni, conditions: Tensor, noise: Tensor, scheduler: Any, guidance: float
) -> Tensor:
    """Follow the flow from noise [n, C, h, w] to latents, by a scheduler whose timesteps are set.

    conditions: [n, Q, caption channels], or with guidance (other than 1) [2 n, ...], the unconditional first.
    """
    latents = noise
    for timestep in scheduler.timesteps:
        velocity = guided_velocity(model, latents, conditions, timestep, guidance)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def guided_velocity(
    model: OpenUni, latents: Tensor, conditions: Tensor, timestep: Tensor, guidance: float
) -> Tensor:
    """SANA's velocity in float32, led away from the unconditional one by the factor `guidance`."""
    rows = latents.repeat(len(conditions) // len(latents), 1, 1, 1)
    velocity = model.velocity(rows, conditions, timestep.expand(len(rows))).float()
    if guidance == 1:
        return velocity
    without, given = velocity.chunk(2)
    return without + guidance * (given - without)


def embed_prompt(
    model: OpenUni, processor: OpenUniProcessor, image: np.ndarray | None, ids: Sequence[int]
) -> Tensor:
    """[P, H]: embeddings of the ids, behind the picture's if there is one."""
    device = model.device_of_weights
    embedding = model.lmm.get_input_embeddings()
    if image is None:
        return embedding(torch.tensor(ids, device=device))
    picture = torch.from_numpy(np.ascontiguousarray(image)).to(device).unsqueeze(0)
    before = embedding(torch.tensor(processor.open_ids, device=device))
    after = embedding(torch.tensor([*processor.close_ids, *ids], device=device))
    return torch.cat([before, model.embed_pictures(picture)[0], after])


def _pad_left(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack rows [P_i, H] to [n, P, H] with zeros in front, and the mask int64 [n, P] of valid places."""
    longest = max(len(row) for row in rows)
    embeds = rows[0].new_zeros(len(rows), longest, rows[0].shape[1])
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device=rows[0].device)
    for number, row in enumerate(rows):
        embeds[number, longest - len(row) :], mask[number, longest - len(row) :] = row, 1
    return embeds, mask
