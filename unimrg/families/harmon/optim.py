"""Which of Harmon's parameters decay (its published recipe, arXiv 2503.21979)."""

from __future__ import annotations

from typing import Any

from torch import nn


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay spares vectors, biases and the whole diffusion head."""
    return parameter.ndim > 1 and not name.endswith(".bias") and "diffloss" not in name


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups over the trainable parameters: those that decay, then those that don't."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trained if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if not decays(name, p)], "weight_decay": 0.0},
    ]
