"""Backward, step, clipping and sharding behind a few methods: plain torch, or DeepSpeed.

Both run in any number of processes of one `torch.distributed` group (or none). Gradients are averaged over
ranks by the engine; `losses.combine` multiplies by the number of ranks, so the update is that of the mean
over the global batch. DeepSpeed is imported when its engine is made.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unimrg.config import EngineConfig, TrainConfig
from unimrg.errors import CheckpointError, MissingExtraError
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

    def learning_rate(self) -> float: ...

    def save(self, folder: Path) -> None:
        """Model, optimiser and schedule of this rank into `folder`; every rank calls it."""

    def load(self, folder: Path) -> None: ...

    def weights(self) -> dict[str, Tensor]:
        """The whole model's state dict on the CPU; every rank calls it, rank 0 gets all of it."""


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

    def __init__(self, model: Family, train: TrainConfig, config: EngineConfig, device: torch.device) -> None:
        self.model = model.to(device)
        self.device = device
        self.steps_done = 0
        self.ranks = world()[1]
        self._schedule = _Schedule(train)
        self._clip = train.clip
        self._dtype = choose_precision(config, device)
        self._optimizer = _adamw(model, train)
        self._runner: nn.Module = model
        if self.ranks > 1:
            devices = [device] if device.type == "cuda" else None
            self._runner = nn.parallel.DistributedDataParallel(
                model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def forward(self, batch: Batch, last: bool) -> dict[Task, TaskLoss]:
        quiet = contextlib.nullcontext() if last or self.ranks == 1 else self._runner.no_sync()
        mixed = torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32)
        with quiet, mixed:
            return self._runner(batch)

    def backward(self, total: Tensor, last: bool) -> None:
        total.backward()

    def step(self) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        return norm

    def learning_rate(self) -> float:
        return self._schedule.at(self.steps_done)

    def save(self, folder: Path) -> None:
        if world()[0] == 0:
            state = {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}
            torch.save(state | {"steps_done": self.steps_done}, folder / "torch.pt")

    def load(self, folder: Path) -> None:
        state = _torch_load(folder / "torch.pt", self.device)
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.steps_done = state["steps_done"]

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}


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
        if not dist.is_initialized():
            # DeepSpeed always wants a process group, also for one process.
            store = dist.HashStore()
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model.to(device),
            optimizer=_adamw(model, train),
            config=self._config(train, config),
            dist_init_required=False,
        )

    def _config(self, train: TrainConfig, config: EngineConfig) -> dict[str, Any]:
        """Clipping is always set: DeepSpeed's own default is not "off"."""
        mixed = choose_precision(config, self.device) == torch.bfloat16
        return {
            "train_micro_batch_size_per_gpu": train.batch_size // (train.accumulation * self.ranks),
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
            group["lr"] = self.learning_rate()
        self._engine.step()
        self.steps_done += 1
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else norm

    def learning_rate(self) -> float:
        return self._schedule.at(self.steps_done)

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(
            str(folder), tag="deepspeed", client_state={"steps_done": self.steps_done}, save_latest=False
        )

    def load(self, folder: Path) -> None:
        try:
            path, state = self._engine.load_checkpoint(str(folder), tag="deepspeed")
        except Exception as error:  # DeepSpeed raises many kinds; each means: not this run's files
            raise CheckpointError(
                f"DeepSpeed can't read {folder} ({error}); continue with the workers and ZeRO stage it was written with"
            ) from error
        if path is None:
            raise CheckpointError(f"no DeepSpeed state in {folder}; it was written by another engine")
        self.steps_done = state["steps_done"]

    def weights(self) -> dict[str, Tensor]:
        if self._stage < 3:
            return {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
        import deepspeed

        whole = {name: tensor.detach().cpu() for name, tensor in self.model.named_buffers()}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters([parameter]):
                if world()[0] == 0:
                    whole[name] = parameter.detach().cpu().clone()
        return whole


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, told which device it runs on; it guesses wrong on CPU machines with a CUDA build of torch."""
    import os

    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
    except ImportError as error:
        raise MissingExtraError("deepspeed", "engine", "engine.name=deepspeed") from error
    return deepspeed


def _torch_load(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"no {path.name} in {path.parent}; it was written by another engine") from error
    except Exception as error:  # torch raises several kinds for a damaged or foreign file
        raise CheckpointError(
            f"{path} can't be read ({str(error).splitlines()[0]}); continue from another checkpoint"
        ) from error
