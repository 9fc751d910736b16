"""Which token may look at which: one image, many branches, no repeated prefix.

A packed row is `prefix, branch, branch, …`; a plan says, segment by segment, which contiguous query tokens
attend to which key ranges, causally or fully. Nothing in a prefix looks past it, so it is computed once and
shared by every branch, exactly. Attention backends (`unimrg.attention`) run a plan; `dense_mask` is the
oracle they are tested against.

Legend: T tokens of the packed sequence.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from unimrg.layouts import LAYOUTS, Span, indices


@dataclass(frozen=True)
class Segment:
    """Query tokens [start, stop) attend to the concatenation of the key spans.

    causal: aligned at the bottom right, so the last query sees every key and the first query sees all but
    the last `queries - 1`. Otherwise every query sees every key.
    """

    query: Span
    keys: tuple[Span, ...]
    causal: bool

    @property
    def query_length(self) -> int:
        return self.query[1] - self.query[0]

    @property
    def key_length(self) -> int:
        return sum(stop - start for start, stop in self.keys)


@dataclass(frozen=True)
class Plan:
    """Segments over a packed sequence of `length` tokens; their queries cover 0..length-1 in order, once.

    attention: the backend that runs it, a name of `LAYOUTS`.
    Raises ValueError when a token is covered twice or not at all, or a key lies outside the sequence.
    """

    length: int
    segments: tuple[Segment, ...]
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        end = 0
        for segment in self.segments:
            if segment.query[0] != end or segment.query_length <= 0:
                raise ValueError(f"segment {segment} doesn't continue at token {end}")
            if any(not 0 <= start < stop <= self.length for start, stop in segment.keys):
                raise ValueError(f"segment {segment} has keys outside 0..{self.length}")
            if segment.causal and segment.key_length < segment.query_length:
                raise ValueError(f"causal segment {segment} has fewer keys than queries")
            end = segment.query[1]
        if end != self.length:
            raise ValueError(f"segments end at token {end}, the sequence at {self.length}")

    def dense_mask(self) -> torch.Tensor:
        """Boolean [T, T], True where the row's token may look at the column's: the test oracle."""
        mask = torch.zeros(self.length, self.length, dtype=torch.bool)
        for segment in self.segments:
            keys = indices(segment.keys)
            allowed = torch.ones(segment.query_length, len(keys), dtype=torch.bool)
            if segment.causal:
                allowed = allowed.tril(len(keys) - segment.query_length)
            mask[slice(*segment.query), keys] = allowed
        return mask

    def on(self, device: torch.device, attention: str) -> Plan:
        """The same plan, all that the backend needs of it laid out on the device."""
        plan = self if attention == self.attention else dataclasses.replace(self, attention=attention)
        plan.layout(torch.empty(0, device=device).device)  # of `cuda` the number too
        return plan

    def layout(self, device: torch.device) -> Any:
        """What `LAYOUTS` makes of the segments for the backend. Built once, on the host."""
        if device not in self._layouts:
            self._layouts[device] = LAYOUTS[self.attention](self.segments, device)
        return self._layouts[device]

    @cached_property
    def _layouts(self) -> dict[torch.device, Any]:
        return {}

    @property
    def attended_pairs(self) -> int:
        """Number of (query, key) pairs computed; what attention costs."""
        total = 0
        for segment in self.segments:
            queries, keys = segment.query_length, segment.key_length
            total += queries * keys - (queries * (queries - 1) // 2 if segment.causal else 0)
        return total
