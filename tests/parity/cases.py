"""Golden numbers: one folder per case, made by running the published implementation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

BUNDLED = Path(__file__).parent / "fixtures"

# What every float32 implementation must reach, and what ours does reach where only the order of sums differs.
REQUIRED = 1e-4
REACHED = 1e-5


@dataclass(frozen=True)
class Case:
    """One case. Floating tensors are float32; weights were stored as bfloat16 without loss."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    def load_into(self, module: nn.Module, prefix: str = "") -> None:
        """Strictly load the weights below `prefix`, and switch dropout off."""
        state = {k.removeprefix(prefix): v for k, v in self.weights.items() if k.startswith(prefix)}
        module.load_state_dict(state)
        module.eval()


def load_case(folder: Path) -> Case:
    def tensors(part: str) -> dict[str, Tensor]:
        file = folder / f"{part}.safetensors"
        found = load_file(file) if file.exists() else {}
        return {k: v.float() if v.is_floating_point() else v for k, v in found.items()}

    config = json.loads((folder / "config.json").read_text())
    return Case(config, tensors("weights"), tensors("inputs"), tensors("outputs"))


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the wanted tensor's largest magnitude."""
    if not want.numel():
        return 0.0
    largest = want.double().abs().max().item()
    return (got.double() - want.double()).abs().max().item() / (largest or 1.0)


def assert_agrees(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float = REACHED) -> None:
    """Every tensor of `got` has its namesake's shape and numbers; the message names all that don't."""
    wrong = {}
    for name, tensor in got.items():
        assert tensor.shape == want[name].shape, f"{name}: {tuple(tensor.shape)} != {tuple(want[name].shape)}"
        error = relative_error(tensor, want[name])
        if not error <= tolerance:  # also catches NaN
            wrong[name] = error
    assert not wrong, f"relative errors above {tolerance}: {wrong}"
