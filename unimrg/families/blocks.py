"""How a model's blocks run: keeping what their backward pass needs or computing it again, compiled or not.

A block that is recomputed keeps its input alone and runs a second time in the backward pass (arXiv
1604.06174): its share of the forward pass, a third of a step, for nearly all of its memory.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from unimrg.families.reading import ReadsRows

POLICIES = ("none", "selective", "full")
"""Which blocks are recomputed: none, every second one, all of them."""


def prepare(blocks: Sequence[nn.Module], policy: str, compiled: bool) -> None:
    """Recompute of `blocks`, which run one after the other, those that `policy` (of `POLICIES`) names.

    compiled: by torch.compile, once for all lengths; attention stays outside, and so does a block that can be
    told which rows to return. Names in the state dict stay, and so do hooks: of a block's own calls outside,
    of its parts' calls inside, where they run again.
    """
    for number, block in enumerate(blocks):
        vars(block).pop("forward", None)
        forward = block.forward
        if compiled and not isinstance(block, ReadsRows):
            forward = torch.compile(forward, dynamic=True)
        if recomputed(number, policy):
            forward = partial(_twice, forward)
        if forward != block.forward:
            vars(block)["forward"] = forward


def lacks_compiler(device: torch.device) -> str:
    """What torch.compile would need here and doesn't find, or ""."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton"
    names = ("g++", "clang++") if device.type == "cpu" else ("gcc", "cc", "clang")
    given = os.environ.get("CXX" if device.type == "cpu" else "CC")
    return "" if given or any(map(shutil.which, names)) else f"a C compiler ({' or '.join(names)})"


def recomputed(number: int, policy: str) -> bool:
    """Whether the policy names block `number`."""
    return policy == "full" or (policy == "selective" and number % 2 == 0)


def _twice(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def activation_bytes(
    blocks: Mapping[str, Sequence[nn.Module]], tokens: Mapping[str, int], policy: str, element: int
) -> int:
    """About what `blocks` take at the most: at the end of the forward pass, when the first one runs again.

    tokens: rows that go through each list of blocks. element: bytes of a number that is computed with.
    """
    held = largest = 0
    for name, members in blocks.items():
        for number, block in enumerate(members):
            kept = tokens[name] * token_bytes(block, element)
            largest = max(largest, kept)
            held += tokens[name] * _width(block) * element if recomputed(number, policy) else kept
    # One that was kept makes room for one that runs again.
    return held + (largest if policy == "full" else 0)


def token_bytes(block: nn.Module, element: int) -> int:
    """About what a block keeps of each of its tokens.

    Inputs and outputs of its linear layers and convolutions, and those of its norms in float32. What lies
    between (rotations, activations, gates) keeps about as much as is counted twice here: of two layers that
    follow each other directly, or read the same.
    """
    total = 0
    for module in block.modules():
        if isinstance(module, nn.Linear):
            total += element * (module.in_features + module.out_features)
        elif isinstance(module, nn.Conv2d):
            total += element * (module.in_channels + module.out_channels)
        elif "Norm" in type(module).__name__:
            total += 8 * _width(block)
    return total


def _width(block: nn.Module) -> int:
    """Of what enters a block: that of its first linear layer."""
    return next(module.in_features for module in block.modules() if isinstance(module, nn.Linear))
