"""A plan laid out for a backend: index tensors on the device, built on the host before the step.

`by_shape`: segments of one shape together, for batched attention (SDPA).
`by_mode`: causal segments together and full ones together, for variable-length kernels (FlashAttention).
`by_block`: blocks of the whole square of pairs, for FlexAttention (arXiv 2412.05496), which gathers nothing.

Legend: T tokens of the packed sequence, S key ranges of a segment at most, R runs of queries of one segment
inside one block, N blocks along the sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from unimrg.transfer import moved

if TYPE_CHECKING:
    from unimrg.plan import Segment

Span = tuple[int, int]
BLOCK = 128
"""Side of a block of pairs, what FlexAttention's own masks take."""


@dataclass(frozen=True)
class ShapeGroup:
    """`count` segments of one shape, which run as one batch.

    mask: bool [queries, keys], True = may look, for causal segments with more keys than queries; else None.
    """

    count: int
    queries: int
    keys: int
    causal: bool
    mask: Tensor | None

    @property
    def rows(self) -> tuple[int, int]:
        """Gathered queries and gathered keys."""
        return self.count * self.queries, self.count * self.keys


@dataclass(frozen=True)
class ModeGroup:
    """Segments of one mode, which run as one call of a variable-length kernel.

    cu_queries, cu_keys: int32 [segments + 1], where each segment's rows begin; the last entry is `rows`.
    longest_query, longest_key: rows of the longest segment. causal: aligned at the bottom right.
    """

    causal: bool
    cu_queries: Tensor
    cu_keys: Tensor
    longest_query: int
    longest_key: int
    rows: tuple[int, int]


Group = TypeVar("Group", ShapeGroup, ModeGroup)


@dataclass(frozen=True)
class Gathered(Generic[Group]):
    """The segments of a plan sorted into groups.

    query_index: int64 [T] and key_index: int64 [sum of all segments' keys]: packed positions, group by group.
    packed_index: int64 [T], where each packed token stands in `query_index`. Both query indices are None when
    the groups keep the packed order, so that nothing has to move.
    """

    groups: tuple[Group, ...]
    query_index: Tensor | None
    key_index: Tensor
    packed_index: Tensor | None


def by_shape(segments: Sequence[Segment], device: torch.device) -> Gathered[ShapeGroup]:
    """Segments batched by shape: few large attention calls instead of many small ones."""

    def group(same: Sequence[Segment]) -> ShapeGroup:
        queries, keys, causal = same[0].query_length, same[0].key_length, same[0].causal
        return ShapeGroup(len(same), queries, keys, causal, _lower_right(queries, keys, causal, device))

    return _gather(segments, lambda one: (one.query_length, one.key_length, one.causal), group, device)


def by_mode(segments: Sequence[Segment], device: torch.device) -> Gathered[ModeGroup]:
    """Two calls at most, causal and full; the keys of a prefix are counted again for each of its branches."""

    def group(same: Sequence[Segment]) -> ModeGroup:
        queries, keys = [one.query_length for one in same], [one.key_length for one in same]
        starts = (torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) for lengths in (queries, keys))
        cu_queries, cu_keys = (moved(start, device) for start in starts)
        rows = sum(queries), sum(keys)
        return ModeGroup(same[0].causal, cu_queries, cu_keys, max(queries), max(keys), rows)

    return _gather(segments, lambda one: one.causal, group, device)


def _gather(
    segments: Sequence[Segment],
    kind: Callable[[Segment], Hashable],
    group: Callable[[Sequence[Segment]], Group],
    device: torch.device,
) -> Gathered[Group]:
    kinds: dict[Hashable, list[Segment]] = {}
    for segment in segments:
        kinds.setdefault(kind(segment), []).append(segment)
    ordered = [segment for same in kinds.values() for segment in same]
    queries = indices(segment.query for segment in ordered)
    reordered = any(now is not before for now, before in zip(ordered, segments, strict=True))
    return Gathered(
        tuple(group(same) for same in kinds.values()),
        moved(queries, device) if reordered else None,
        moved(indices(span for segment in ordered for span in segment.keys), device),
        moved(queries.argsort(), device) if reordered else None,
    )


def by_block(segments: Sequence[Segment], device: torch.device) -> Any:
    """FlexAttention's BlockMask [1, 1, T, T]: blocks to visit, and the rule inside those seen in part."""
    from torch.nn.attention.flex_attention import BlockMask

    first, stop = key_ranges(segments)
    some, every = blocks(segments, first, stop)
    firsts, stops = (moved(ends, device).unbind(0) for ends in (first, stop))

    def may_look(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = (key >= firsts[0][query]) & (key < stops[0][query])
        for low, high in zip(firsts[1:], stops[1:], strict=True):
            allowed = allowed | ((key >= low[query]) & (key < high[query]))
        return allowed

    length = first.shape[1]
    mask = BlockMask.from_kv_blocks(
        *_listed(some & ~every),
        *_listed(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=may_look,
        seq_lengths=(length, length),
    )
    for name, value in vars(mask).items():
        if isinstance(value, Tensor):
            setattr(mask, name, moved(value, device))
    return mask


LAYOUTS: dict[str, Callable[[Sequence[Segment], torch.device], Any]] = {
    "flash_attn": by_mode,
    "varlen": by_mode,
    "flex": by_block,
    "sdpa": by_shape,
}
"""What each backend of `unimrg.attention` takes."""


def key_ranges(segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
    """Keys that each token sees, as ranges: first and stop, int32 [S, T]; unused ranges are empty."""
    length = segments[-1].query[1]
    most = max(len(segment.keys) for segment in segments)
    first, stop = torch.zeros(2, most, length, dtype=torch.int32)
    for segment in segments:
        # Keys in the order of the spans, of which a causal query sees all but the last few.
        seen = torch.full((segment.query_length,), segment.key_length)
        if segment.causal:
            seen = torch.arange(segment.key_length - segment.query_length, segment.key_length) + 1
        before = 0
        for number, (start, end) in enumerate(segment.keys):
            first[number, slice(*segment.query)] = start
            stop[number, slice(*segment.query)] = (start + (seen - before).clamp(0, end - start)).int()
            before += end - start
    return first, stop


def blocks(segments: Sequence[Segment], first: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of `BLOCK` queries and keys with some pairs that may look, and with such alone: bool [N, N]."""
    length = first.shape[1]
    count = math.ceil(length / BLOCK)
    edges = {*range(0, length, BLOCK), *(segment.query[0] for segment in segments)}
    begin = torch.tensor(sorted(edges))
    last = torch.cat([begin[1:], torch.tensor([length])]) - 1
    row, low = begin // BLOCK, torch.arange(count) * BLOCK
    # A later query of a segment sees all that an earlier one does, so the two ends of a run speak for it.
    low_end, high_end = first[:, last, None], stop[:, last, None]
    some = ((low_end < low + BLOCK) & (high_end > low) & (high_end > low_end)).any(0)
    every = ((first[:, begin, None] <= low) & (stop[:, begin, None] >= low + BLOCK)).any(0)

    def of_rows(runs: Tensor) -> Tensor:
        return torch.zeros(count, count, dtype=torch.int64).index_add_(0, row, runs.long())

    whole = (torch.arange(1, count + 1) * BLOCK <= length)[:, None]
    return of_rows(some) > 0, (of_rows(~every) == 0) & whole


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's chosen blocks: how many, int32 [1, 1, N]; which, int32 [1, 1, N, N], the others behind."""
    which = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[None, None], which.int()[None, None]


def indices(spans: Iterable[Span]) -> Tensor:
    """int64: every position of the spans, in their order."""
    return torch.cat([torch.arange(0), *(torch.arange(start, stop) for start, stop in spans)])


def _lower_right(queries: int, keys: int, causal: bool, device: torch.device) -> Tensor | None:
    """Causal mask whose last row sees every key; None where none is needed or the usual one will do."""
    if not causal or queries == keys:
        return None
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
