"""Model FLOPs by formula: what a pass costs in matrix multiplications, from sizes that the host knows.

The convention is that of model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B): a multiply-add counts
as two, a linear layer costs 2 x weights x rows, attention 4 x width for every pair of a query and a key it
attends to (no half-empty rectangles for causal rows), and nothing is counted twice because it is computed
again. Going back costs as much again for the weights of a layer that is trained, and as much again where a
gradient passes to its input: three times the forward pass in all where everything is trained, twice where a
gradient only passes through, once where none comes by. Norms, activations, losses and look-ups are left out.

Families put these pieces together (`Family.flops`). Gradients are followed layer by layer in the order in
which modules are registered; of layers side by side that are the first ones trained, all but one are thought
to hand a gradient on, which is too much by a part of one block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Flops:
    """Of one part in a forward pass, and in the backward pass that belongs to it."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.forward * times, self.backward * times)

    @property
    def total(self) -> float:
        return self.forward + self.backward


def trained(*what: nn.Module | nn.Parameter) -> bool:
    """Whether anything in these is trained."""
    return any(
        one.requires_grad if isinstance(one, nn.Parameter) else any(p.requires_grad for p in one.parameters())
        for one in what
    )


def layers(
    module: nn.Module, rows: float, reached: bool = False, fewer: Mapping[str, float] = MappingProxyType({})
) -> Flops:
    """Linear layers and convolutions in `module`, each making `rows` rows (of a picture: cells).

    reached: whether a gradient passes to the input of the first; behind a layer that is trained one does.
    fewer: beginnings of the names of layers that make another number of rows, and that number.
    """
    flops = Flops()
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            made = next((number for part, number in fewer.items() if name.startswith(part)), rows)
            forward = 2 * _weights(layer) * made
            flops += Flops(forward, forward * (layer.weight.requires_grad + reached))
            reached = reached or trained(layer)
    return flops


def _weights(layer: nn.Linear | nn.Conv2d) -> int:
    """By the layer's sizes: sharded parameters are empty."""
    if isinstance(layer, nn.Linear):
        return layer.in_features * layer.out_features
    return layer.out_channels * layer.in_channels // layer.groups * math.prod(layer.kernel_size)


def attention(pairs: float, width: int, reached: bool = False) -> Flops:
    """Scores and weighted sums of `pairs` queries and keys. width: of all heads together."""
    forward = 4 * pairs * width
    return Flops(forward, 2 * forward * reached)


def transformer(
    blocks: Sequence[nn.Module] | nn.ModuleList,
    rows: float,
    pairs: float,
    width: int,
    reached: bool = False,
    last: Mapping[str, float] = MappingProxyType({}),
) -> Flops:
    """Blocks of linear layers over `rows` rows and attention among them. last: `fewer` of the last block."""
    flops = Flops()
    for number, block in enumerate(blocks):
        inside = reached or trained(block)
        fewer = last if number + 1 == len(blocks) else {}
        flops += layers(block, rows, reached, fewer) + attention(pairs, width, inside)
        reached = inside
    return flops


def narrowed(rows: int | None, projection: str = "self_attn.o_proj") -> dict[str, float]:
    """`last` of a language model whose last block makes so many rows behind attention; None: all."""
    return {} if rows is None else {projection: float(rows), "mlp": float(rows)}


def heads_width(config: Any) -> int:
    """Of all query heads together, by a library's configuration of a language model."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head * config.num_attention_heads)


def picture_encoder(encoder: Any, side: int) -> Flops:
    """One picture through the convolutional encoder of latent diffusion (arXiv 2112.10752).

    Between its levels `down`, residual blocks with or without attention behind each, the picture is halved.
    """
    cells = side * side
    flops = layers(encoder.conv_in, cells)
    for number, level in enumerate(encoder.down):
        flops += layers(level.block, cells) + _attended(level.attn, cells)
        if number + 1 < len(encoder.down):
            cells //= 4
            flops += layers(level.downsample, cells)
    middle = layers(encoder.mid, cells) + attention(cells**2, encoder.mid.attn_1.q.out_channels)
    return flops + middle + layers(encoder.conv_out, cells)


def _attended(blocks: Iterable[Any], cells: int) -> Flops:
    """Blocks of one head over all cells."""
    flops = Flops()
    for block in blocks:
        flops += layers(block, cells) + attention(cells**2, block.q.out_channels)
    return flops
