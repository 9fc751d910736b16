"""Steps that go wrong: updates skipped because a number isn't finite, losses that jump.

Every rank judges from what all of them know, so all come to the same verdict.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

from unimrg.config import TrainConfig

WINDOW = 100
SEEN = 20  # fewer steps say nothing about what is usual


class LossSpike(Exception):
    """Spike after spike: training is to go on from an earlier checkpoint, behind `position`."""

    def __init__(self, step: int, position: int) -> None:
        super().__init__(f"the loss kept jumping up to step {step}")
        self.step, self.position = step, position


class Health:
    """Judges one step after the other; `skipped_in_a_row` and `spikes_in_a_row` count up to now."""

    def __init__(self, config: TrainConfig) -> None:
        self._factor = config.spike
        self._totals: deque[float] = deque(maxlen=WINDOW)
        self.max_skipped = config.max_skipped
        self.rollback_after = config.rollback_after
        self.skipped_in_a_row = 0
        self.spikes_in_a_row = 0

    def judge(self, total: float, grad_norm: float) -> str:
        """What is wrong with a step: "skipped", "spike", or ""."""
        if not (math.isfinite(total) and math.isfinite(grad_norm)):
            self.skipped_in_a_row += 1
            return "skipped"
        self.skipped_in_a_row = 0
        if self._is_spike(total):
            self.spikes_in_a_row += 1
            return "spike"
        self.spikes_in_a_row = 0
        self._totals.append(total)
        return ""

    def _is_spike(self, total: float) -> bool:
        if not self._factor or len(self._totals) < SEEN:
            return False
        return total > self._factor * statistics.median(self._totals)

    @property
    def must_stop(self) -> bool:
        return self.skipped_in_a_row > self.max_skipped

    @property
    def must_go_back(self) -> bool:
        return bool(self.rollback_after) and self.spikes_in_a_row >= self.rollback_after
