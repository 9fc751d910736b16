"""What a search may look for: names, units, and which way is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Objective:
    """One measured value of a trained model. unit: "" for fractions 0..1."""

    title: str
    unit: str
    higher_is_better: bool
    task: str

    @property
    def sign(self) -> int:
        """Times this, more is better."""
        return 1 if self.higher_is_better else -1


OBJECTIVES: dict[str, Objective] = {
    "accuracy": Objective("Accuracy", "", True, "understanding"),
    "pair_accuracy": Objective("Accuracy of pairs", "", True, "understanding"),
    "answer_loss": Objective("Loss of the right answers", "nats/token", False, "understanding"),
    "pixel_psnr": Objective("PSNR of redraws", "dB", True, "pixel"),
    "depth_abs_rel": Objective("AbsRel of depth maps", "", False, "depth"),
    "depth_delta1": Objective("\u03b41 of depth maps", "", True, "depth"),
    "boundary_f": Objective("Boundary F of regions", "", True, "segmentation"),
    "samples_per_second": Objective("Throughput", "pictures/s", True, ""),
}
"""Every name that `search.objectives` accepts. task: the one that must be trained, "" = any."""


def better(a: Mapping[str, float], b: Mapping[str, float], names: Sequence[str]) -> bool:
    """Does `a` dominate `b`: nowhere worse, somewhere better?"""
    pairs = [(OBJECTIVES[name].sign * a[name], OBJECTIVES[name].sign * b[name]) for name in names]
    return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)
