"""torch's FLOP counter, and what must be known of it to compare.

It counts the matrix multiplications that run. Attention on the CPU it doesn't see unless torch computes it
by plain products, and then, as on a GPU, it counts every rectangle of queries and keys as a whole, also where
half of it is masked: `rectangles` makes plans alike. For the weights of a convolution in groups it counts
each group's share once for every group; `counted` mends that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unimrg.flops import Flops
from unimrg.packing import Batch
from unimrg.plan import Plan

BatchT = TypeVar("BatchT", bound=Batch)


def rectangles(batch: BatchT) -> BatchT:
    """The batch with a plan that counts causal segments as whole rectangles. For counting only."""
    whole = tuple(replace(segment, causal=False) for segment in batch.plan.segments)
    return replace(batch, plan=Plan(batch.plan.length, whole))


def counted(run: Callable[[], Tensor]) -> Flops:
    """Forward and backward of the scalar that `run` returns; the latter is 0 if it has no gradient."""
    mended = {torch.ops.aten.convolution_backward: _convolution_backward}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=mended) as counter:
        loss = run()
        forward = counter.get_total_flops()
        if loss.requires_grad:
            loss.backward()
    return Flops(forward, counter.get_total_flops() - forward)


def _convolution_backward(gradient: Any, x: Any, weight: Any, *rest: Any, **named: Any) -> int:
    """As much as forward for the input, and for the weights; the last argument says which are asked for."""
    asked_for: tuple[bool, ...] = rest[-1]
    forward = 2 * gradient[0] * math.prod(gradient[2:]) * math.prod(weight)
    return int(forward * (asked_for[0] + asked_for[1]))
