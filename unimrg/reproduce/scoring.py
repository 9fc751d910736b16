"""Many short answers about each picture in one pass: would greedy decoding give exactly this answer?

All questions of a picture stand behind one prefix, as in training. Greedy decoding gives an answer exactly
when each of its tokens is the likeliest behind those before it, so one pass over the answers tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unimrg.benchmarks.scenes import Item
from unimrg.config import TrainConfig
from unimrg.families import load_family
from unimrg.families.base import Family
from unimrg.reproduce.data import Example, asked, item, sample
from unimrg.reproduce.world import FAMILIES
from unimrg.sample import Sample, Task

PICTURES = 16  # scored at once


def score(
    model: Family,
    tokenizer: Any,
    family: str,
    data: Sequence[Example],
    families: Sequence[str] = FAMILIES,
    looked_at: Sequence[Example] | None = None,
) -> tuple[list[Item], list[bool]]:
    """The questions that are scored, and whether each is answered right.

    looked_at: of each example another one, whose picture is looked at in place of its own.
    """
    processor = load_family(family).processor(
        model, tokenizer, TrainConfig(prompt_dropout=0.0), (Task.UNDERSTANDING,), 0, from_codes=True
    )
    items: list[Item] = []
    marks: list[bool] = []
    for first in range(0, len(data), PICTURES):
        samples = []
        for k, example in enumerate(data[first : first + PICTURES], first):
            questions = asked(example, families)
            items += [item(example, ask) for ask in questions]
            seen = example if looked_at is None else looked_at[k]
            samples.append(sample(seen, k, questions, {"image": seen.codes["image"]}))
        marks += greedily_right(model, processor, samples)
    return items, marks


@torch.no_grad()
def greedily_right(model: Family, processor: Any, samples: Sequence[Sample]) -> list[bool]:
    """Of every answer in order, whether all of its tokens are the likeliest; its end isn't looked at."""
    batch, caught = processor(samples).to(model.device_of_weights), []

    def catch(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        caught.append(output.reshape(-1, output.shape[-1]))

    was_training = model.training
    model.eval()
    handle = model.shared_layer.register_forward_hook(catch)
    try:
        model(batch)
    finally:
        handle.remove()
        model.train(was_training)
    # The family reads only the places that are predicted from, in the order of `label_index`.
    hidden = caught[0][: len(batch.label_index)]
    hits = (language_head(model)(hidden).argmax(-1) == batch.label_ids).tolist()
    ends = (batch.label_ids == batch.label_ids[-1]).nonzero().flatten().tolist()
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [all(hits[start:end]) for start, end in zip(starts, ends, strict=True)]


def language_head(model: Family) -> torch.nn.Module:
    """What turns hidden states into scores of tokens."""
    for part in model.children():
        head = getattr(part, "lm_head", None)
        if head is not None:
            found: torch.nn.Module = head
            return found
    raise NotImplementedError(f"{type(model).__name__} has no language model among its children")
