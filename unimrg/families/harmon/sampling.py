"""Which tokens a drawing reveals in which iteration, and how strongly it follows its condition.

MAR's cosine order (arXiv 2406.11838, section 4), as Harmon uses it (arXiv 2503.21979). Pure arithmetic:
the loop over the model is in the model.
"""

from __future__ import annotations

import math
from itertools import pairwise

GUIDANCE_SCHEDULES = ("constant", "linear")


def mask_schedule(length: int, iterations: int) -> list[int]:
    """Tokens still masked at the start of each iteration; the first entry is `length`.

    Where there are as many iterations as tokens or more, some iterations reveal nothing, as in the
    published loop; the last one reveals all that remain.
    """
    masked = [length]
    for k in range(iterations - 1):
        planned = math.floor(length * math.cos(math.pi / 2 * (k + 1) / iterations))
        masked.append(max(1, min(masked[-1] - 1, planned)))
    return masked


def tokens_to_predict(length: int, iterations: int) -> list[int]:
    """Tokens revealed in each iteration; they sum to `length`."""
    masked = [*mask_schedule(length, iterations), 0]
    return [before - after for before, after in pairwise(masked)]


def guidance_at(guidance: float, length: int, masked_after: int, schedule: str = "constant") -> float:
    """Guidance scale of an iteration that leaves `masked_after` of `length` tokens masked.

    "linear" grows from 1 to `guidance` with the share of revealed tokens.
    """
    if schedule == "constant":
        return guidance
    if schedule == "linear":
        return 1.0 + (guidance - 1.0) * (length - masked_after) / length
    raise ValueError(f"unknown guidance schedule {schedule!r}; one of {', '.join(GUIDANCE_SCHEDULES)}")
