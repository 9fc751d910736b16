"""Learning rate over a run."""

from __future__ import annotations

import math


def cosine_with_warmup(step: int, total: int, warmup: int, start: float = 1e-5) -> float:
    """Share of the learning rate at `step` (from 0) of `total` steps.

    Rises linearly from `start` to 1 over the first `warmup` steps, then falls to 0 along half a cosine.
    """
    if step < warmup:
        return start + (1 - start) * step / (warmup - 1) if warmup > 1 else 1.0
    if step >= total:
        return 0.0
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
