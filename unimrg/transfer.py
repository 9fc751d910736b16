"""Tensors to the device on which a step runs, without waiting for what that device is doing."""

from __future__ import annotations

import torch


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`. To a GPU it travels behind the work in hand, from memory that stays in place.

    From ordinary memory the host would wait until everything before the copy is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
