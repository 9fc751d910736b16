"""Masked codes: which are masked in training, and how a picture is filled in (MaskGIT, arXiv 2202.04200).

Legend: B pictures, N codes of a picture, K different codes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

UNKNOWN = -1
"""Stands for a code that is still masked."""

TINY = 1e-20


def masked_share(u: np.ndarray | float) -> np.ndarray | float:
    """Share of masked codes for u in 0..1, the cosine schedule; uniform u gives 2 / pi on average."""
    return np.cos(np.pi / 2 * np.asarray(u))


def training_mask(share: float, order: np.ndarray) -> np.ndarray:
    """bool [N], at least one True: `share` of the codes, chosen by the random numbers `order` [N]."""
    count = max(1, round(len(order) * share))
    return np.argsort(order, kind="stable") < count


def temperatures(start: float, steps: int) -> list[float]:
    """Temperature of every step's choice; each step shrinks the one before, so the last is 0."""
    found, temperature = [], start
    for step in range(steps):
        temperature *= 1 - (step + 1) / steps
        found.append(temperature)
    return found


def masked_after(step: int, steps: int, codes: int) -> int:
    """Codes that the schedule leaves masked after step 0..steps-1, at least 1."""
    # Single precision, as published: at a ratio of 2/3 the cosine is just below a half, not just above.
    share = torch.cos(torch.tensor((step + 1) / steps, dtype=torch.float32) * math.pi * 0.5)
    return max(1, math.floor(float(codes * share)))


class Noise(NamedTuple):
    """Randomness of one step: exponential [B, N, K] to draw codes by, uniform [B, N] for their choice."""

    exponential: Tensor
    uniform: Tensor

    @classmethod
    def draw(cls, like: Tensor, generator: torch.Generator) -> Noise:
        """For logits [B, N, K]."""
        exponential = torch.empty_like(like).exponential_(generator=generator)
        return cls(exponential, torch.empty_like(like[..., 0]).uniform_(generator=generator))


class Filled(NamedTuple):
    """After one step. probabilities: [B, N, K]. drawn: [B, N], a code everywhere. codes: [B, N], `UNKNOWN`
    where a code is masked again.
    """

    probabilities: Tensor
    drawn: Tensor
    codes: Tensor


def fill_in(logits: Tensor, codes: Tensor, left: int, temperature: float, noise: Noise) -> Filled:
    """One step: draw every unknown code and mask the least trusted again.

    logits: [B, N, K]. codes: int64 [B, N], `UNKNOWN` where masked; the others stay. left: codes to leave
    masked, fewer where fewer are unknown. temperature: of the Gumbel noise that blurs the trust.
    """
    probabilities = logits.softmax(-1)
    drawn = (probabilities / noise.exponential).argmax(-1)
    trust = probabilities.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
    unknown = codes == UNKNOWN
    drawn = torch.where(unknown, drawn, codes)
    trust = torch.where(unknown, trust, torch.finfo(trust.dtype).max)
    gumbel = -(-noise.uniform.clamp(min=TINY).log()).clamp(min=TINY).log()
    score = trust.clamp(min=TINY).log() + temperature * gumbel
    masked = (unknown.sum(1, keepdim=True) - 1).clamp(max=left).clamp(min=1)
    cut = score.sort(1).values.gather(1, masked)
    return Filled(probabilities, drawn, drawn.masked_fill(score < cut, UNKNOWN))
