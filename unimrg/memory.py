"""How much memory a step takes, by formula, and which blocks are to be recomputed so that it fits.

A worker's device holds the weights, their gradients and the optimiser's state, whatever the batch; what is
left is for the activations of one micro-batch, which grow with its tokens (`families.blocks`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from unimrg.config import EngineConfig, TrainConfig
from unimrg.families.base import Family
from unimrg.families.blocks import POLICIES, activation_bytes

log = logging.getLogger(__name__)

SHARE = 0.7
"""Of the memory that is free, how much the formulas may fill: they are right within a factor of 1.5, and
chunks of logits, communication and the allocator's gaps want the rest."""


def choose_recompute(
    model: Family, train: TrainConfig, config: EngineConfig, element: int, ranks: int, free: float
) -> str:
    """The first of `POLICIES` with which a micro-batch fits into `free` bytes of each worker, else the last.

    A sample is taken to have all drawings and `train.max_text_tokens` of texts. element: bytes of a number
    that is computed with. All ranks must give the same numbers, as they must recompute alike.
    """
    left = SHARE * (free - state_bytes(model, config, element, ranks))
    samples = max(1, train.batch_size // (train.accumulation * ranks))
    tokens = {name: samples * each for name, each in model.block_tokens(train.max_text_tokens).items()}
    needed = {policy: activation_bytes(model.blocks(), tokens, policy, element) for policy in POLICIES}
    policy = next((policy for policy, size in needed.items() if size <= left), POLICIES[-1])
    sizes = ", ".join(f"{name} {size / 2**30:.1f} GiB" for name, size in needed.items())
    log.info("activation checkpointing %s: %.1f GiB are free for %s", policy, left / 2**30, sizes)
    return policy


def state_bytes(model: Family, config: EngineConfig, element: int, ranks: int) -> float:
    """Weights, gradients and AdamW's state of one rank, without what `config.offload` moves elsewhere.

    Plain torch keeps float32 and, for the time of a forward pass, a copy of the weights in what it computes
    with. DeepSpeed keeps weights and gradients in that, and a float32 copy with the optimiser's state.
    """
    every, trained = _numbers(model.parameters()), _numbers(p for p in model.parameters() if p.requires_grad)
    if config.name == "torch":
        return (4 if element == 4 else 4 + element) * every + (4 + 8) * trained
    shards = [1, *(ranks if config.zero_stage >= stage else 1 for stage in (1, 2, 3))]
    optimizer = 0.0 if config.offload else (4 + 8) * trained / shards[1]
    return element * every / shards[3] + element * trained / shards[2] + optimizer


def _numbers(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def free_bytes(device: torch.device, model: Family, ranks: int) -> float:
    """Memory that this worker could fill, the model's own weights included if they are on `device`.

    On CPUs: the machine's, shared by all ranks as if they were all on it.
    """
    own = sum(p.numel() * p.element_size() for p in model.parameters() if p.device.type == device.type)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + own
    return _free_ram() / ranks + own


def _free_ram() -> float:
    """Bytes that the machine could give to new processes; without Linux' table all that it has."""
    table = Path("/proc/meminfo")
    for line in table.read_text().splitlines() if table.exists() else ():
        if line.startswith("MemAvailable:"):
            return 1024.0 * int(line.split()[1])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
