"""Samples into a batch without padding: where prefixes and branches lie, and what a batch holds.

A family's processor says of what stretches each prefix and its branches consist (`Layout`); `pack` lays them
one behind the other and returns positions and the plan. Positions of every branch start again after its
prefix, so a branch is computed exactly as if its prefix stood before it alone (design: one image, many
tasks, one pass).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch

from unimrg.plan import Plan, Segment, Span
from unimrg.sample import Task
from unimrg.transfer import moved

Mode = Literal["causal", "full", "ahead"]


class Stretch(NamedTuple):
    """`length` tokens in a row that look at everything before them in their branch, and at each other:

    causal: each at the ones before it and itself. full: all at all (masked image tokens).
    ahead: causal, and at the whole stretch behind (text in front of picture features that every row sees).
    """

    length: int
    mode: Mode = "causal"


@dataclass(frozen=True)
class Layout:
    """One prefix (empty for text-only) and the branches that share it."""

    prefix: tuple[Stretch, ...]
    branches: tuple[tuple[Stretch, ...], ...]


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
    """Lay out prefixes and branches one behind the other.

    Raises ValueError when the last stretch of a prefix or branch is an `ahead` one.
    """
    segments: list[Segment] = []
    positions, prefixes, branches = [np.zeros(0, np.int64)], [], []
    end = 0
    for layout in layouts:
        prefix = (end, end + sum(stretch.length for stretch in layout.prefix))
        segments += _segments(layout.prefix, (), end)
        positions.append(np.arange(prefix[1] - prefix[0]))
        end = prefix[1]
        spans = []
        for branch in layout.branches:
            span = (end, end + sum(stretch.length for stretch in branch))
            shared = (prefix,) if prefix[1] > prefix[0] else ()
            segments += _segments(branch, shared, end)
            positions.append(np.arange(span[1] - span[0]) + prefix[1] - prefix[0])
            spans.append(span)
            end = span[1]
        prefixes.append(prefix)
        branches.append(tuple(spans))
    return Packed(
        Plan(end, tuple(segments)),
        torch.from_numpy(np.concatenate(positions)),
        tuple(prefixes),
        tuple(branches),
    )


def _segments(stretches: Sequence[Stretch], shared: tuple[Span, ...], start: int) -> list[Segment]:
    """Segments of stretches that begin at `start`, behind the keys in `shared`."""
    segments: list[Segment] = []
    at, last = start, ""
    full = [stretch for stretch in stretches if stretch.length]
    for number, (length, mode) in enumerate(full):
        stop = at + length
        keys: tuple[Span, ...] = (*shared, (start, stop))
        if mode == "ahead":
            if number + 1 == len(full):
                raise ValueError(f"stretch {number} looks ahead, but nothing follows it in its branch")
            # In front of the others, since a causal segment is aligned at its last keys.
            keys = ((stop, stop + full[number + 1].length), *keys)
        if mode == last == "causal":  # one longer attention call instead of two
            at = segments.pop().query[0]
        segments.append(Segment((at, stop), keys, causal=mode != "full"))
        at, last = stop, mode
    return segments


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What every family's batch has; families add their own tensors as fields.

    plan: which token looks at which. counts: the normaliser of each task's mean (answer tokens, masked
    latent rows), known before the forward pass so that it can be summed over ranks and accumulation.
    samples, tokens: sizes, for throughput. next_position: 1 + the largest sample position inside.
    ids: of the samples. notes: events worth counting, such as truncated texts.
    """

    plan: Plan
    counts: dict[Task, int]
    samples: int
    tokens: int
    next_position: int
    ids: tuple[str, ...] = ()
    notes: dict[str, int] = field(default_factory=dict)

    def to(self, device: torch.device, attention: str = "sdpa") -> Self:
        """The same batch with every tensor on `device`, its plan laid out there for the attention backend."""
        tensors: dict[str, Any] = {
            f.name: moved(value, device)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        # Laid out here, because inside the step it would have to be fetched from the host.
        return dataclasses.replace(self, plan=self.plan.on(device, attention), **tensors)
