"""Backward, step, clipping and sharding behind a few methods: plain torch, or DeepSpeed.

Both run in any number of processes of one `torch.distributed` group (or none). Gradients are averaged over
ranks by the engine; `losses.combine` multiplies by the number of ranks, so the update is that of the mean
over the global batch. DeepSpeed is imported when its engine is made.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unimrg.config import EngineConfig, TrainConfig
from unimrg.errors import CheckpointError, MissingExtraError, first_line
from unimrg.families.base import Family
from unimrg.losses import TaskLoss
from unimrg.packing import Batch
from unimrg.sample import Task
from unimrg.schedule import cosine_with_warmup


class Engine(Protocol):
    """What `loop` needs. `model` is the family itself; `ranks` the number of processes."""

    model: Family
    device: torch.device
    ranks: int
    steps_done: int

    def forward(self, batch: Batch, last: bool) -> dict[Task, TaskLoss]:
        """Losses of one micro-batch; `last` of its optimiser step."""

    def backward(self, total: Tensor, last: bool) -> None: ...

    def step(self) -> float | Tensor:
        """Clip, update, advance the schedule; returns the gradient norm before clipping."""

    def learning_rate(self) -> float:
        """Of the last update."""

    def save(self, folder: Path) -> None:
        """Model, optimiser and schedule of this rank into `folder`; every rank calls it."""

    def load(self, folder: Path) -> None: ...

    def weights(self) -> dict[str, Tensor]:
        """The whole model's state dict on the CPU, for rank 0; every rank calls it."""


def world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(values: Sequence[float]) -> list[list[float]]:
    """The same few numbers of every rank, in rank order, through the host's network."""
    _, ranks = world()
    if ranks == 1:
        return [list(values)]
    mine = torch.tensor(values, dtype=torch.float64)
    everyone = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(everyone, mine)
    return [row.tolist() for row in everyone]


def choose_precision(config: EngineConfig, device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs and float32 on CPUs, unless the config says otherwise."""
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32


def make_engine(model: Family, train: TrainConfig, config: EngineConfig, device: torch.device) -> Engine:
    """The engine that the config names, around `model` moved to `device`."""
    if config.activation_checkpointing:
        model.recompute_activations()
    kind = TorchEngine if config.name == "torch" else DeepSpeedEngine
    return kind(model, train, config, device)


class _Schedule:
    """The learning rate of every optimiser step: linear warm-up, then cosine to 0."""

    def __init__(self, train: TrainConfig) -> None:
        self.peak = train.learning_rate
        self.total = train.steps
        self.warmup = math.ceil(train.steps * train.warmup)

    def at(self, step: int) -> float:
        return self.peak * cosine_with_warmup(step, self.total, self.warmup)


def _adamw(model: Family, train: TrainConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameter_groups(train.weight_decay),
        lr=train.learning_rate,
        betas=(train.betas[0], train.betas[1]),
        eps=train.eps,
    )


class TorchEngine:
    """Plain torch: AdamW, DistributedDataParallel when there are several ranks, autocast for bfloat16."""

    FILE = "torch.pt"

    def __init__(self, model: Family, train: TrainConfig, config: EngineConfig, device: torch.device) -> None:
        self.model = model.to(device)
        self.device = device
        self.steps_done = 0
        self.ranks = world()[1]
        self._schedule = _Schedule(train)
        self._clip = train.clip
        self._dtype = choose_precision(config, device)
        self._optimizer = _adamw(model, train)
        self._parallel: nn.parallel.DistributedDataParallel | None = None
        if self.ranks > 1:
            devices = [device] if device.type == "cuda" else None
            self._parallel = nn.parallel.DistributedDataParallel(
                model, device_ids=devices, gradient_as_bucket_view=True
            )

    def forward(self, batch: Batch, last: bool) -> dict[Task, TaskLoss]:
        mixed = torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32)
        quiet = self._parallel.no_sync() if self._parallel and not last else contextlib.nullcontext()
        with mixed, quiet:
            return (self._parallel or self.model)(batch)

    def backward(self, total: Tensor, last: bool) -> None:
        total.backward()

    def step(self) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.at(self.steps_done)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        return norm

    def learning_rate(self) -> float:
        return self._schedule.at(max(self.steps_done - 1, 0))

    def save(self, folder: Path) -> None:
        if world()[0] == 0:
            state = {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}
            torch.save(state | {"steps_done": self.steps_done}, folder / self.FILE)

    def load(self, folder: Path) -> None:
        _check_writer(folder, self.FILE)
        try:
            state = torch.load(folder / self.FILE, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
        except Exception as error:  # torch raises several kinds for a damaged or foreign file
            raise CheckpointError(
                f"{folder / self.FILE} can't be read ({first_line(error)}); continue from another checkpoint"
            ) from error
        self.steps_done = state["steps_done"]

    def weights(self) -> dict[str, Tensor]:
        return _on_host(self.model)


class DeepSpeedEngine:
    """DeepSpeed ZeRO 1, 2 or 3: bfloat16 with float32 master weights on GPUs, float32 on CPUs."""

    def __init__(self, model: Family, train: TrainConfig, config: EngineConfig, device: torch.device) -> None:
        deepspeed = import_deepspeed(device)
        self.model = model
        self.device = device
        self.steps_done = 0
        self.ranks = world()[1]
        self._schedule = _Schedule(train)
        self._stage = config.zero_stage
        self._tag = f"zero{config.zero_stage}"
        if not dist.is_initialized():
            # DeepSpeed always wants a process group, also for one process.
            store = dist.HashStore()
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        model.to(device)
        exact = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=_adamw(model, train),
            config=self._config(train, config),
            dist_init_required=False,
        )
        # DeepSpeed rounds buffers to bfloat16 too, but rotary frequencies need all their digits.
        for name, buffer in model.named_buffers():
            buffer.data = exact[name]

    def _config(self, train: TrainConfig, config: EngineConfig) -> dict[str, Any]:
        """Clipping is always set: DeepSpeed's own default is not "off"."""
        mixed = choose_precision(config, self.device) == torch.bfloat16
        return {
            "train_micro_batch_size_per_gpu": max(1, train.batch_size // (train.accumulation * self.ranks)),
            "gradient_accumulation_steps": train.accumulation,
            "gradient_clipping": train.clip,
            "zero_optimization": {"stage": config.zero_stage, "overlap_comm": self.device.type == "cuda"},
            "bf16": {"enabled": mixed},
            "steps_per_print": 2**31 - 1,
        }

    def forward(self, batch: Batch, last: bool) -> dict[Task, TaskLoss]:
        return self._engine(batch)

    def backward(self, total: Tensor, last: bool) -> None:
        self._engine.backward(total, scale_wrt_gas=False)
        if not last:
            self._engine.step()  # counts the micro-batch; updates nothing before the last one

    def step(self) -> float | Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.at(self.steps_done)
        self._engine.step()
        self.steps_done += 1
        # DeepSpeed skips an update whose gradients aren't finite, and keeps the norm of the one before.
        norm = None if self._optimizer.overflow else self._engine.get_global_grad_norm()
        return float("nan") if norm is None else norm

    def learning_rate(self) -> float:
        return self._schedule.at(max(self.steps_done - 1, 0))

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(
            str(folder), tag=self._tag, client_state={"steps_done": self.steps_done}, save_latest=False
        )

    def load(self, folder: Path) -> None:
        _check_writer(folder, self._tag)
        try:
            _, state = self._engine.load_checkpoint(str(folder), tag=self._tag)
            self.steps_done = state["steps_done"]
        except Exception as error:  # DeepSpeed raises many kinds for damaged files and other numbers of ranks
            raise CheckpointError(
                f"{folder / self._tag} can't be read ({first_line(error)}); continue from another checkpoint"
            ) from error

    def weights(self) -> dict[str, Tensor]:
        if self._stage < 3:
            return _on_host(self.model)
        import deepspeed

        return _on_host(self.model, lambda tensor: deepspeed.zero.GatheredParameters([tensor]))


def _check_writer(folder: Path, mine: str) -> None:
    """Raise CheckpointError unless `mine`, this engine's part of a checkpoint, is in the folder."""
    if (folder / mine).exists():
        return
    writers = [name for name in ("torch.pt", "zero1", "zero2", "zero3") if (folder / name).exists()]
    if not writers:
        raise CheckpointError(
            f"{folder} lacks {mine}: damaged, or written by another engine; continue from another checkpoint"
        )
    raise CheckpointError(
        f"{folder} was written by another engine; continue it with engine={writers[0].removesuffix('.pt')}"
    )


def _on_host(
    model: Family, gathered: Callable[[Tensor], AbstractContextManager[Any]] | None = None
) -> dict[str, Tensor]:
    """The state dict copied to rank 0's memory; tied names share one tensor there too, so it is saved once.

    gathered: makes a sharded parameter whole for a while, on all ranks together.
    """
    first = world()[0] == 0
    state = model.state_dict(keep_vars=True)
    copies: dict[int, Tensor] = {}
    for tensor in {id(tensor): tensor for tensor in state.values()}.values():
        sharded = gathered and isinstance(tensor, nn.Parameter)
        with gathered(tensor) if gathered and sharded else contextlib.nullcontext():
            if first:
                copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
    return {name: copies[id(tensor)] for name, tensor in state.items()} if first else {}


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, told its device: it guesses wrong on CPU machines with a CUDA build of torch."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # Launchers set it; DeepSpeed refuses to start without it, also where nothing was launched.
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    try:
        import deepspeed
    except ImportError as error:
        raise MissingExtraError("deepspeed", "engine.name=deepspeed") from error
    if device.type == "cpu":
        # A reduction for inference that training never calls; compiling it takes g++ and ninja, and DeepSpeed
        # doesn't start where they are missing.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It calls torch's collectives by names that newer torch wants changed, once a step and rank.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed
