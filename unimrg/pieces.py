"""What training keeps of every parameter, in pieces that don't depend on how they are spread.

A process holds *pieces*: runs of a flattened parameter with their float32 weights and AdamW's two moments.
In plain torch they are whole parameters, the same on every rank; with ZeRO (arXiv 1910.02054) every rank has
its own. The values are views into what the optimiser works on: reading them saves a training, writing them
restores it, whatever engine, stage and number of ranks wrote them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "average"


@dataclass(frozen=True)
class Piece:
    """Numbers start..start+n-1 of the flattened parameter `name`.

    values: float32 [n] each: WEIGHT, MOMENTS, and AVERAGE where a moving average is kept.
    """

    name: str
    start: int
    values: dict[str, Tensor]

    @property
    def length(self) -> int:
        return self.values[WEIGHT].numel()

    def part(self, start: int, stop: int) -> Piece:
        """The part of it that lies in start..stop-1 of the parameter."""
        cut = slice(start - self.start, stop - self.start)
        return Piece(self.name, start, {key: value[cut] for key, value in self.values.items()})


def torch_pieces(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Piece]:
    """Whole trained parameters of a model that isn't sharded."""
    return [
        Piece(name, 0, {WEIGHT: flat(parameter), **moments(optimizer, parameter)})
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def zero_pieces(model: nn.Module, zero: Any, stage: int, rank: int) -> list[Piece]:
    """This rank's pieces of the trained parameters under DeepSpeed's optimiser `zero`."""
    place = _place_of_stage_3 if stage == 3 else _place_of_stage_2
    pieces = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        found = place(zero, parameter, rank)
        if found is None:
            continue
        master, offset, start, length = found
        values = {WEIGHT: master.data, **moments(zero.optimizer, master)}
        run = slice(offset, offset + length)
        pieces.append(Piece(name, start, {key: value[run] for key, value in values.items()}))
    return pieces


def _place_of_stage_2(zero: Any, parameter: nn.Parameter, rank: int) -> tuple[Tensor, int, int, int] | None:
    """Master tensor, offset in it, start in the parameter, length; None if it is all on other ranks."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
    master = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    return master, here.start, there.start, here.numel


def _place_of_stage_3(zero: Any, parameter: Any, rank: int) -> tuple[Tensor, int, int, int] | None:
    """As above. Every rank has an equal run of every parameter, the last ones padded."""
    group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
    start = rank * length
    length = min(length, parameter.ds_numel - start)
    return (zero.fp32_partitioned_groups_flat[group], offset, start, length) if length > 0 else None


def spread_zero(zero: Any, stage: int) -> None:
    """Bring the masters' values into the parameters that the model computes with; all ranks together."""
    if stage < 3:
        zero.update_lp_params()
        return
    persistent = zero.persistent_parameters
    if persistent:
        persistent[0].partition(persistent)
    for number, master in enumerate(zero.fp32_partitioned_groups_flat):
        zero.fp16_partitioned_groups_flat[number].data.copy_(master.data)
        zero._unflatten_partitioned_parameters(number)
    if persistent:
        persistent[0].all_gather(persistent)


class MovingAverage:
    """Exponential moving average of weights: a <- decay * a + (1 - decay) * w after every update.

    Kept in float32 beside the weights, spread over the ranks as they are.
    """

    def __init__(self, pieces: Sequence[Piece], decay: float) -> None:
        self._decay = decay
        self._weights = [piece.values[WEIGHT] for piece in pieces]
        self._averages = [weight.clone() for weight in self._weights]

    def update(self) -> None:
        torch._foreach_lerp_(self._averages, self._weights, 1 - self._decay)

    def attach(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The same pieces with AVERAGE among their values."""
        return [
            Piece(piece.name, piece.start, piece.values | {AVERAGE: average})
            for piece, average in zip(pieces, self._averages, strict=True)
        ]


def whole(pieces: Sequence[Piece], kind: str, size: torch.Size, replicated: bool) -> Tensor:
    """On rank 0 the values that all ranks hold of a parameter, float32 on the CPU; all ranks call it.

    pieces: this rank's of the parameter.
    """
    joined = torch.zeros(size)
    for piece in pieces:
        joined.view(-1)[piece.start : piece.start + piece.length].copy_(piece.values[kind])
    if not replicated and dist.is_initialized() and dist.get_world_size() > 1:
        dist.reduce(joined, 0)
    return joined


def full_size(tensor: Tensor) -> torch.Size:
    """The shape of a parameter, which ZeRO-3 leaves empty where it isn't gathered."""
    size: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return size


def flat(tensor: Tensor) -> Tensor:
    """A view [n]."""
    return tensor.detach().view(-1)


def moments(optimizer: Any, master: Tensor) -> dict[str, Tensor]:
    """AdamW's moments of a tensor it updates, [n] each; before the first step zeros, as it begins with."""
    state = optimizer.state[master]
    if not state:
        group = optimizer.param_groups[0]  # they differ in weight decay only
        at = master.device if group.get("fused") or group.get("capturable") else None
        state["step"] = torch.zeros((), dtype=torch.float32, device=at)
        state.update({key: torch.zeros_like(master, requires_grad=False) for key in MOMENTS})
    return {key: flat(state[key]) for key in MOMENTS}


def updates(optimizer: Any) -> int:
    """Updates that AdamW has made; the same for all its tensors."""
    done = {int(state["step"]) for state in optimizer.state.values()}
    assert len(done) <= 1, f"parameters were updated unequally often: {sorted(done)}"
    return done.pop() if done else 0


def set_updates(optimizer: Any, done: int) -> None:
    """Let AdamW go on as after that many updates."""
    for state in optimizer.state.values():
        if isinstance(state["step"], Tensor):
            state["step"].fill_(done)
        else:
            state["step"] = done


def share(pieces: Sequence[Piece], rank: int, ranks: int) -> list[Piece]:
    """An equal part of what all ranks hold alike, cut at any number; together the parts are the whole."""
    total = sum(piece.length for piece in pieces)
    low, high = rank * total // ranks, (rank + 1) * total // ranks
    mine, at = [], 0
    for piece in pieces:
        first, last = max(low, at), min(high, at + piece.length)
        if first < last:
            mine.append(piece.part(piece.start + first - at, piece.start + last - at))
        at += piece.length
    return mine
