"""Which token may look at which: one image, many branches, no repeated prefix.

A packed row is `prefix, branch, branch, …`; a plan says, segment by segment, which contiguous query tokens
attend to which key ranges, causally or fully. Nothing in a prefix looks past it, so it is computed once and
shared by every branch, exactly. Attention backends (`unimrg.attention`) run a plan; `dense_mask` is the
oracle they are tested against.

Legend: T tokens of the packed sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from unimrg.transfer import moved

Span = tuple[int, int]


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
class SegmentGroup:
    """`count` segments of one shape, which run as one batch.

    mask: bool [queries, keys], True = may look, for causal segments with more keys than queries; else None.
    """

    count: int
    queries: int
    keys: int
    causal: bool
    mask: torch.Tensor | None


@dataclass(frozen=True)
class Gathered:
    """The segments of a plan sorted into groups, on one device.

    query_index: [T] and key_index: [sum of all segments' keys]: packed positions, group by group.
    packed_index: [T], where each packed token stands in `query_index`.
    """

    groups: tuple[SegmentGroup, ...]
    query_index: torch.Tensor
    key_index: torch.Tensor
    packed_index: torch.Tensor


@dataclass(frozen=True)
class Plan:
    """Segments over a packed sequence of `length` tokens; their queries cover 0..length-1 in order, once.

    Raises ValueError when a token is covered twice or not at all, or a key lies outside the sequence.
    """

    length: int
    segments: tuple[Segment, ...]

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
            keys = _indices(segment.keys)
            allowed = torch.ones(segment.query_length, len(keys), dtype=torch.bool)
            if segment.causal:
                allowed = allowed.tril(len(keys) - segment.query_length)
            mask[slice(*segment.query), keys] = allowed
        return mask

    def gathered(self, device: torch.device) -> Gathered:
        """Segments batched by shape: few large attention calls instead of many small ones. Built once."""
        if device not in self._gathered:
            self._gathered[device] = self._gather(device)
        return self._gathered[device]

    @cached_property
    def _gathered(self) -> dict[torch.device, Gathered]:
        return {}

    def _gather(self, device: torch.device) -> Gathered:
        shapes: dict[tuple[int, int, bool], list[Segment]] = {}
        for segment in self.segments:
            shapes.setdefault((segment.query_length, segment.key_length, segment.causal), []).append(segment)
        ordered = [segment for same in shapes.values() for segment in same]
        query_index = _indices(segment.query for segment in ordered)
        return Gathered(
            tuple(
                SegmentGroup(len(same), queries, keys, causal, _lower_right(queries, keys, causal, device))
                for (queries, keys, causal), same in shapes.items()
            ),
            moved(query_index, device),
            moved(_indices(span for segment in ordered for span in segment.keys), device),
            moved(query_index.argsort(), device),
        )

    @property
    def attended_pairs(self) -> int:
        """Number of (query, key) pairs computed; what attention costs."""
        total = 0
        for segment in self.segments:
            queries, keys = segment.query_length, segment.key_length
            total += queries * keys - (queries * (queries - 1) // 2 if segment.causal else 0)
        return total


def _indices(spans: Iterable[Span]) -> torch.Tensor:
    return torch.cat([torch.arange(0), *(torch.arange(start, stop) for start, stop in spans)])


def _lower_right(queries: int, keys: int, causal: bool, device: torch.device) -> torch.Tensor | None:
    """Causal mask whose last row sees every key; None where none is needed or the usual one will do."""
    if not causal or queries == keys:
        return None
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
