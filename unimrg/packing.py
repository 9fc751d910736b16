"""Samples into a batch without padding: where prefixes and branches lie, and what a batch holds.

A family's processor says how long each prefix and its branches are (`Layout`); `pack` lays them one behind
the other and returns positions and the plan. Positions of every branch start again after its prefix, so a
branch is computed exactly as if its prefix stood before it alone (design: one image, many tasks, one pass).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from unimrg.plan import Plan, Segment, Span
from unimrg.sample import Task


@dataclass(frozen=True)
class Layout:
    """Lengths of one prefix (0 for text-only) and of the causal branches that share it."""

    prefix: int
    branches: tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """A packed sequence of T tokens.

    position_ids: int64 [T]. prefixes: one span a layout. branches: spans of every layout's branches.
    """

    plan: Plan
    position_ids: torch.Tensor
    prefixes: tuple[Span, ...]
    branches: tuple[tuple[Span, ...], ...]


def pack(layouts: list[Layout]) -> Packed:
    """Lay out prefixes and branches one behind the other."""
    segments, positions, prefixes, branches = [], [], [], []
    end = 0
    for layout in layouts:
        prefix = (end, end + layout.prefix)
        if layout.prefix:
            segments.append(Segment(prefix, (prefix,), causal=True))
            positions.append(torch.arange(layout.prefix))
        end = prefix[1]
        spans = []
        for length in layout.branches:
            span = (end, end + length)
            segments.append(Segment(span, (prefix, span) if layout.prefix else (span,), causal=True))
            positions.append(torch.arange(layout.prefix, layout.prefix + length))
            spans.append(span)
            end += length
        prefixes.append(prefix)
        branches.append(tuple(spans))
    return Packed(Plan(end, tuple(segments)), torch.cat(positions), tuple(prefixes), tuple(branches))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What every family's batch has; families add their own tensors as fields.

    plan: which token looks at which. counts: the normaliser of each task's mean (answer tokens, masked
    latent rows), known before the forward pass so that it can be summed over ranks and accumulation.
    samples, tokens: sizes, for throughput. next_position: 1 + the largest sample position inside.
    notes: events worth counting, such as truncated texts.
    """

    plan: Plan
    counts: dict[Task, int]
    samples: int
    tokens: int
    next_position: int
    notes: dict[str, int] = field(default_factory=dict)

    def to(self, device: torch.device) -> Self:
        """The same batch with every tensor on `device`."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)
