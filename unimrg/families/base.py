"""What a family answers: build, process, lose, answer, draw, and map its keys to the published ones.

A family is a `transformers.PreTrainedModel`, so `from_pretrained`, `save_pretrained`, sharded safetensors and
gradient checkpointing are the library's. `Family.forward` *is* the loss: sharded engines gather parameters
in forward hooks, so nothing may be computed outside it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from transformers import PreTrainedModel

from unimrg.errors import ConfigError
from unimrg.families.blocks import prepare
from unimrg.families.encoder import grey
from unimrg.families.rows import PackedBatch
from unimrg.families.vocabulary import token_losses
from unimrg.flops import Flops
from unimrg.losses import TaskLoss
from unimrg.packing import Batch
from unimrg.sample import IMAGE_TASKS, Sample, Task

PROMPT = 64
"""More tokens than a drawing's prompt and what surrounds its target have."""


class Processor(Protocol):
    """Turns samples into a family's batch; holds the tokenizer."""

    tokenizer: Any

    def __call__(self, samples: Sequence[Sample]) -> Batch: ...


@dataclass(frozen=True)
class DrawOptions:
    """How an image is drawn.

    iterations: decoding steps of the family's sampler, at least 1; 0 = the family's default.
    guidance: classifier-free guidance scale, 1 = off; 0 = the family's default.
    temperature: of the sampler's noise, 0 or more.
    """

    iterations: int = 0
    guidance: float = 0.0
    temperature: float = 1.0
    seed: int = 0


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.scale, None


class Family(PreTrainedModel):
    """Base class of the model families."""

    PARTS: tuple[str, ...] = ()
    """Names that `freeze` accepts."""

    EXACT: tuple[str, ...] = ()
    """Frozen modules that are never rounded to half precision: they make codes, and it would flip some."""

    LORA_TARGETS: tuple[str, ...] = ()
    """Ends of the names of the linear layers that low-rank adapters are put on."""

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
    def draw_text(self, processor: Any, texts: Sequence[str], options: DrawOptions) -> list[np.ndarray]:
        """Pictures uint8 [S, S, 3] of what each text says, from no picture."""

    @abstractmethod
    def named_parts(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters and the part each belongs to; those of a part outside `PARTS` are never trained."""

    @abstractmethod
    def flops(self, batch: Any) -> dict[str, Flops]:
        """What the pass over a batch costs, by part: by formula, from the batch's sizes and its plan."""

    @property
    def drawing_parts(self) -> tuple[str, ...]:
        """The parts that only drawing uses."""
        return ()

    def freeze(self, parts: Sequence[str], tasks: Sequence[Task]) -> None:
        """Stop training `parts` (of `PARTS`); without a drawing task also what only drawing uses.

        Raises ConfigError for an unknown part.
        """
        unknown = sorted(set(parts) - set(self.PARTS))
        if unknown:
            known = ", ".join(self.PARTS)
            raise ConfigError(f"family.freeze: no part named {unknown[0]!r}; parts are {known}")
        frozen = set(parts)
        if not set(tasks) & set(IMAGE_TASKS):
            frozen |= set(self.drawing_parts)
        for name, parameter in self.named_parts():
            if name in frozen or name not in self.PARTS:
                parameter.requires_grad_(False)

        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """What isn't trained stays as in use: no dropout, no statistics of its own.

        Parts outside `PARTS` are frozen here too, because loading makes all parameters anew, ends in `eval()`
        and forgets what was frozen.
        """
        super().train(mode)
        for part, parameter in self.named_parts():
            if part not in self.PARTS:
                parameter.requires_grad_(False)
        for module in self.modules():
            trained = [parameter.requires_grad for parameter in module.parameters()]
            if trained and not any(trained):
                for inner in module.modules():
                    inner.training = False
        return self

    # -- pictures that are looked at -------------------------------------------------------------------------

    @property
    def grad_scale(self) -> float:
        """Factor on the gradient that embeddings of clean pictures pass back to what made them, 0..1."""
        scale: float = getattr(self.config, "grad_scale", 1.0)
        return scale

    def set_grad_scale(self, scale: float) -> None:
        """From now on, and in what is saved; -1 leaves it as it is."""
        if scale != -1:
            self.config.grad_scale = scale

    def scale_gradient(self, embedded: torch.Tensor) -> torch.Tensor:
        """Embeddings of clean pictures, the same numbers with `grad_scale` on their way back."""
        return embedded if self.grad_scale == 1 else _ScaleGradient.apply(embedded, self.grad_scale)

    # -- blocks ----------------------------------------------------------------------------------------------

    BLOCKS: tuple[str, ...] = ()
    """Names of the lists of blocks, which take most of a step's time and memory."""

    def blocks(self) -> dict[str, list[torch.nn.Module]]:
        """The members of each list of `BLOCKS`, in the order in which they run."""
        return {name: list(self.get_submodule(name).children()) for name in self.BLOCKS}

    @abstractmethod
    def block_tokens(self, text: int) -> dict[str, int]:
        """Rows that one sample with all drawings and `text` tokens of texts sends through each of `BLOCKS`.

        Upper bounds; a drawing's prompt is taken to be `PROMPT` tokens long.
        """

    def prepare_blocks(self, recompute: str, compiled: bool = False) -> None:
        """How blocks run from now on.

        recompute: of `blocks.POLICIES`, whose activations are computed again in the backward pass.
        """
        for members in self.blocks().values():
            prepare(members, recompute, compiled)

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        """What transformers' own methods for the same call."""
        self.prepare_blocks("full" if enable else "none")

    SHARED = ""
    """Name of the module whose output is the last that the losses of all tasks are computed from."""

    @property
    def shared_layer(self) -> torch.nn.Module:
        """The module named by `SHARED`, with adapters on it or not; it puts out hidden states [..., H]."""
        return self.get_submodule(self.SHARED)

    # -- frozen codes ----------------------------------------------------------------------------------------

    @property
    def reads_pixels(self) -> bool:
        """Whether pictures to look at go through an encoder of their own, which codes don't replace."""
        return bool(self.config.reads_pixels)

    @abstractmethod
    def encode_pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        """uint8 [B, S, S, 3] to what the frozen autoencoder or tokenizer makes of them, [B, ...]."""

    @abstractmethod
    def decode_pictures(self, codes: torch.Tensor) -> torch.Tensor:
        """What `encode_pictures` gives, back to uint8 [B, S, S, 3]: as well as any drawing can become."""

    def frozen_codes(self, pictures: torch.Tensor) -> torch.Tensor:
        """All that the frozen encoder is ever asked about pictures, [B, ...]: what `Sample.codes` holds."""
        return self.encode_pictures(pictures)

    def codes_of(self, batch: PackedBatch, which: torch.Tensor | None = None) -> torch.Tensor:
        """Codes of a batch's pictures [I + E, ...], or of those numbered `which`: as stored, or encoded now.

        Ranks make equally many calls of the encoder: one each, or with codes none (sharded engines gather its
        parameters in every call).
        """
        if batch.codes is None:
            pictures = torch.cat([batch.images, batch.extra_images])
            return self.encode_pictures(pictures if which is None else pictures[which])
        codes = batch.codes if which is None else batch.codes[which]
        return codes.to(self.dtype) if codes.is_floating_point() else codes

    def grey_codes(self) -> np.ndarray:
        """Codes of the grey picture that stands for none: float32 or int64."""
        picture = torch.from_numpy(grey(self.config.image_size)).to(self.device_of_weights)
        codes = self.frozen_codes(picture[None])[0].cpu()
        return (codes.float() if codes.is_floating_point() else codes).numpy()

    # -- what the losses of packed batches share -------------------------------------------------------------

    def embed_packed(
        self, tables: Sequence[torch.Tensor], embedding: torch.nn.Module, batch: PackedBatch
    ) -> torch.Tensor:
        """Embeddings [T, H] of all packed tokens, from the family's tables [n, H] and its text embedding."""
        return torch.cat([*tables, embedding(batch.token_ids)]).index_select(0, batch.source_index)

    def text_loss(self, hidden: torch.Tensor, head: torch.nn.Linear, batch: PackedBatch) -> TaskLoss:
        """Cross-entropy at the positions of `hidden` [T, H] that predict an answer token; no other logits."""
        terms = token_losses(head, hidden.index_select(0, batch.label_index), batch.label_ids)
        return TaskLoss((terms * batch.label_weight).sum(), batch.counts[Task.UNDERSTANDING])

    def image_losses(
        self, terms: torch.Tensor, task: torch.Tensor, weight: torch.Tensor, batch: PackedBatch
    ) -> dict[Task, TaskLoss]:
        """Terms [M] summed by task. task: int64 [M] index into IMAGE_TASKS; weight: [M], 0 or 1."""
        terms = terms.float() * weight
        sums = terms.new_zeros(len(IMAGE_TASKS)).index_add(0, task, terms)
        return {name: TaskLoss(sums[number], batch.counts[name]) for number, name in enumerate(IMAGE_TASKS)}

    # -- the optimiser ---------------------------------------------------------------------------------------

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

    def get_input_embeddings(self) -> torch.nn.Module:
        """The language model's table of tokens, where PEFT looks for layers that are tied to it."""
        for part in self.children():
            if isinstance(part, PreTrainedModel):
                found = part.get_input_embeddings()
                if isinstance(found, torch.nn.Embedding):
                    return found
        raise NotImplementedError(f"{type(self).__name__} has no language model among its children")

    @property
    def device_of_weights(self) -> torch.device:
        return next(self.parameters()).device
