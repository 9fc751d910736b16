"""Backward, step, clipping and sharding behind a few methods: plain torch, or DeepSpeed.

Both run in any number of processes of one `torch.distributed` group (or none). Gradients are averaged over
ranks by the engine; `losses.combine` multiplies by the number of ranks, so the update is that of the mean
over the global batch. DeepSpeed is imported when its engine is made.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unimrg.backends import choose_attention
from unimrg.config import EngineConfig, TrainConfig
from unimrg.errors import ConfigError, MissingExtraError
from unimrg.families.base import Family
from unimrg.families.blocks import lacks_compiler
from unimrg.losses import TaskLoss
from unimrg.memory import choose_recompute, free_bytes
from unimrg.packing import Batch
from unimrg.pieces import (
    AVERAGE,
    MovingAverage,
    Piece,
    full_size,
    set_updates,
    spread_zero,
    torch_pieces,
    updates,
    whole,
    zero_pieces,
)
from unimrg.sample import Task
from unimrg.schedule import cosine_with_warmup

log = logging.getLogger(__name__)


class Engine(Protocol):
    """What `loop` needs. `model` is the family itself; `ranks` the number of processes.

    attention: the backend that runs the plans of its batches.
    """

    model: Family
    device: torch.device
    attention: str
    ranks: int
    steps_done: int

    def forward(self, batch: Batch, last: bool) -> dict[Task, TaskLoss]:
        """Losses of one micro-batch; `last` of its optimiser step."""

    def backward(self, total: Tensor, last: bool) -> None: ...

    def step(self) -> float | Tensor:
        """Clip, update, advance the schedule; returns the gradient norm before clipping.

        Where that isn't finite nothing is updated.
        """

    def learning_rate(self) -> float:
        """Of the last update."""

    replicated: bool
    """Does every rank hold the same pieces?"""

    def pieces(self) -> list[Piece]:
        """What this rank holds of trained weights and moments: views, to be read or written."""

    def updates(self) -> int:
        """Updates that AdamW has made."""

    def resume(self, steps_done: int, updates: int) -> None:
        """Go on behind so many steps with what was written into the pieces; every rank calls it."""

    def weights(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """The model's state dict on the CPU, or `names` of it, for rank 0; every rank calls it alike.

        With a moving average that one's values.
        """


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
    model.prepare_blocks(_recompute(model, train, config, device), _compiles(config, device))
    kind = TorchEngine if config.name == "torch" else DeepSpeedEngine
    return kind(model, train, config, device)


def _recompute(model: Family, train: TrainConfig, config: EngineConfig, device: torch.device) -> str:
    """Which blocks to recompute: as the config says, or so that a step fits into every worker's memory."""
    if config.activation_checkpointing != "auto":
        return config.activation_checkpointing
    ranks = world()[1]
    free = min(row[0] for row in gather([free_bytes(device, model, ranks)]))
    if device.type == "cpu":  # the host's memory is the step's: nothing goes elsewhere
        config = replace(config, offload=False)
    return choose_recompute(model, train, config, choose_precision(config, device).itemsize, ranks, free)


def _compiles(config: EngineConfig, device: torch.device) -> bool:
    """Whether blocks are compiled: as the config says, or on GPUs with a compiler within reach.

    Raises ConfigError where they are to be and can't.
    """
    # Cutting weights acts between all layers.
    never = config.cuts_weights or device.type != "cuda"
    if config.compile == "none" or (config.compile == "auto" and never):
        return False
    lacking = lacks_compiler(device)
    if lacking and config.compile == "blocks":
        raise ConfigError(f"engine.compile is `blocks`, but {lacking} is missing; install it, or set none")
    if lacking:
        log.warning("blocks run uncompiled, for want of %s", lacking)
    return not lacking


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
        fused=True,
    )


def _average(engine: Engine, train: TrainConfig) -> MovingAverage | None:
    """Of an engine whose moving average isn't made yet."""
    engine._average = None  # type: ignore[attr-defined]
    return MovingAverage(engine.pieces(), train.ema) if train.ema else None


class TorchEngine:
    """Plain torch: AdamW, DistributedDataParallel when there are several ranks, autocast for bfloat16."""

    replicated = True

    def __init__(self, model: Family, train: TrainConfig, config: EngineConfig, device: torch.device) -> None:
        self.model = model.to(device)
        self.device = device
        self.steps_done = 0
        self.ranks = world()[1]
        self._schedule = _Schedule(train)
        self._clip = train.clip
        self._dtype = choose_precision(config, device)
        self.attention = choose_attention(config.attention, device, self._dtype).name
        self._optimizer = _adamw(model, train)
        self._average = _average(self, train)
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
        # The fused AdamW looks at this flag on the device, so that nobody waits for the norm.
        self._optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._average:
            self._average.update()
        self.steps_done += 1
        return norm

    def learning_rate(self) -> float:
        return self._schedule.at(max(self.steps_done - 1, 0))

    def pieces(self) -> list[Piece]:
        pieces = torch_pieces(self.model, self._optimizer)
        return self._average.attach(pieces) if self._average else pieces

    def updates(self) -> int:
        return updates(self._optimizer)

    def resume(self, steps_done: int, updates: int) -> None:
        self.steps_done = steps_done
        set_updates(self._optimizer, updates)

    def weights(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        state = _on_host(self.model, names)
        return _averaged(self, names, state) if self._average else state


class DeepSpeedEngine:
    """DeepSpeed ZeRO 1, 2 or 3: bfloat16 with float32 master weights on GPUs, float32 on CPUs."""

    replicated = False

    def __init__(self, model: Family, train: TrainConfig, config: EngineConfig, device: torch.device) -> None:
        deepspeed = import_deepspeed(device)
        self.model = model
        self.device = device
        self.steps_done = 0
        self.ranks = world()[1]
        self.attention = choose_attention(config.attention, device, choose_precision(config, device)).name
        self._schedule = _Schedule(train)
        self._stage = config.zero_stage
        if not dist.is_initialized():
            # DeepSpeed always wants a process group, also for one process.
            store = dist.HashStore()
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        settings, optimizer = self._config(train, config), _adamw(model, train)
        _keep_exact(model)
        if self._stage == 3:
            shard(model, settings, choose_precision(config, device), device)
        model.to(device)
        exact = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        # DeepSpeed rounds buffers to bfloat16 too, but rotary frequencies need all their digits.
        for name, buffer in model.named_buffers():
            buffer.data = exact[name]
        self._average = _average(self, train)

    def _config(self, train: TrainConfig, config: EngineConfig) -> dict[str, Any]:
        """Clipping is always set: DeepSpeed's own default is not "off"."""
        mixed = choose_precision(config, self.device) == torch.bfloat16
        on_gpu = self.device.type == "cuda"
        sharding: dict[str, Any] = {"stage": config.zero_stage, "overlap_comm": on_gpu}
        if config.offload:
            sharding["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
        return {
            "train_micro_batch_size_per_gpu": max(1, train.batch_size // (train.accumulation * self.ranks)),
            "gradient_accumulation_steps": train.accumulation,
            "gradient_clipping": train.clip,
            "zero_optimization": sharding,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW needs no compiler, theirs does
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
        if self._average:
            self._average.update()
        self.steps_done += 1
        # DeepSpeed skips an update whose gradients aren't finite, and keeps the norm of the one before.
        norm = None if self._optimizer.overflow else self._engine.get_global_grad_norm()
        return float("nan") if norm is None else norm

    def learning_rate(self) -> float:
        return self._schedule.at(max(self.steps_done - 1, 0))

    def pieces(self) -> list[Piece]:
        pieces = zero_pieces(self.model, self._optimizer, self._stage, world()[0])
        return self._average.attach(pieces) if self._average else pieces

    def updates(self) -> int:
        return updates(self._optimizer.optimizer)

    def resume(self, steps_done: int, updates: int) -> None:
        self.steps_done = steps_done
        set_updates(self._optimizer.optimizer, updates)
        spread_zero(self._optimizer, self._stage)

    def weights(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        import deepspeed

        gathered = (lambda tensor: deepspeed.zero.GatheredParameters([tensor])) if self._stage == 3 else None
        state = _on_host(self.model, names, gathered)
        return _averaged(self, names, state) if self._average else state


def _keep_exact(model: Family) -> None:
    """Make buffers of `model.EXACT`, which are neither rounded nor cut: whole on every rank, names kept."""
    for name in model.EXACT:
        for module in model.get_submodule(name).modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, key)
                module.register_buffer(key, parameter.detach().float())


def _on_host(
    model: Family,
    names: Collection[str] | None,
    gathered: Callable[[Tensor], AbstractContextManager[Any]] | None = None,
) -> dict[str, Tensor]:
    """Of the state dict copies in rank 0's memory; tied names share one tensor there too.

    gathered: makes a sharded parameter whole for a while, on all ranks together.
    """
    first = world()[0] == 0
    state = _chosen(model, names)
    copies: dict[int, Tensor] = {}
    for tensor in {id(tensor): tensor for tensor in state.values()}.values():
        sharded = gathered and isinstance(tensor, nn.Parameter)
        with gathered(tensor) if gathered and sharded else contextlib.nullcontext():
            if first:
                copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
    return {name: copies[id(tensor)] for name, tensor in state.items()} if first else {}


def _averaged(engine: Engine, names: Collection[str] | None, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rank 0's `state` with the moving averages in place of the weights."""
    mine: dict[str, list[Piece]] = {}
    for piece in engine.pieces():
        mine.setdefault(piece.name, []).append(piece)
    wanted = {id(tensor): name for name, tensor in _chosen(engine.model, names).items()}
    for name, parameter in engine.model.named_parameters():
        if parameter.requires_grad and id(parameter) in wanted:
            average = whole(mine.get(name, []), AVERAGE, full_size(parameter), engine.replicated)
            if state:
                state[wanted[id(parameter)]].copy_(average)  # in place: tied names share it
    return state


def _chosen(model: Family, names: Collection[str] | None) -> dict[str, Tensor]:
    state = model.state_dict(keep_vars=True)
    return state if names is None else {name: state[name] for name in names}


def shard(model: nn.Module, settings: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """Cut all parameters into the ranks' pieces, as ZeRO-3 keeps them, one parameter after the other.

    Never more than one is whole on the device; what the model maps from its files never is in memory at all,
    in whatever precision it is stored there.
    settings: DeepSpeed's. Every rank calls it.
    """
    import deepspeed

    first, *others = model.parameters()
    begin = nn.Module()
    begin.register_parameter("first", first)
    first.data = first.data.to(device, dtype, copy=True)
    deepspeed.zero.Init(module=begin, config_dict_or_path=settings, dtype=dtype)
    for parameter in others:
        # Copied, since rank 0's values are written over those of the others.
        parameter.data = parameter.data.to(device, dtype, copy=True)
        first.convert_to_zero_parameters(param_list=[parameter])  # type: ignore[attr-defined]
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()


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
