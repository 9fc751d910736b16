"""What a family answers: build, process, lose, answer, draw, and map its keys to the published ones.

A family is a `transformers.PreTrainedModel`, so `from_pretrained`, `save_pretrained`, sharded safetensors and
gradient checkpointing are the library's. `Family.forward` *is* the loss: sharded engines gather parameters
in forward hooks, so nothing may be computed outside it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from unimrg.losses import TaskLoss
from unimrg.packing import Batch
from unimrg.sample import Sample, Task


class Processor(Protocol):
    """Turns samples into a family's batch; holds the tokenizer."""

    tokenizer: Any

    def __call__(self, samples: Sequence[Sample]) -> Batch: ...


@dataclass(frozen=True)
class DrawOptions:
    """How an image is drawn.

    iterations: decoding steps of the family's sampler, at least 1; 0 = the family's default.
    guidance: classifier-free guidance scale, 1 = off. temperature: of the sampler's noise, 0 or more.
    """

    iterations: int = 0
    guidance: float = 3.0
    temperature: float = 1.0
    seed: int = 0


class Family(PreTrainedModel):
    """Base class of the model families."""

    @abstractmethod
    def forward(self, batch: Batch) -> dict[Task, TaskLoss]:
        """Unweighted losses of every task in a packed batch."""

    @abstractmethod
    def answer(
        self,
        processor: Any,
        images: Sequence[np.ndarray | None],
        questions: Sequence[str],
        max_new_tokens: int = 128,
    ) -> list[str]:
        """Greedy answers to one question per image (uint8 [S, S, 3] or None)."""

    @abstractmethod
    def draw(
        self, processor: Any, images: Sequence[np.ndarray], task: Task, options: DrawOptions
    ) -> list[np.ndarray]:
        """Pictures uint8 [S, S, 3]: `images` redrawn, or their depth or segmentation."""

    @abstractmethod
    def freeze(self, parts: Sequence[str], tasks: Sequence[Task]) -> None:
        """Stop training the named parts, and whatever `tasks` don't use."""

    NO_DECAY: tuple[str, ...] = ()
    """Words in the names of parameters that weight decay leaves alone."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Two optimiser groups of the trained parameters: decayed, and not.

        Not decayed: one-dimensional tensors, biases, and names that contain a word of `NO_DECAY`.
        """
        groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                exempt = (
                    parameter.ndim == 1 or name.endswith(".bias") or any(w in name for w in self.NO_DECAY)
                )
                groups[not exempt].append(parameter)
        return [
            {"params": groups[True], "weight_decay": weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ]

    @property
    def device_of_weights(self) -> torch.device:
        return next(self.parameters()).device
