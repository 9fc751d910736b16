"""Rows of text and vectors into the index tensors of a packed batch.

A family says what its prefix and its branches are made of: text, and vectors out of tables that the model
computes (embeddings of pictures, of masked targets, learnable queries). `assemble` lays them out, and the
model finds every packed token's embedding with one `index_select` from all tables and the text behind them.

Legend: T packed tokens, N text tokens, A predicted text tokens, I pictures, E extra target pictures (depth,
boundaries), G targets, M cells that count, S side of a picture.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from unimrg.packing import Batch, Layout, Mode, Packed, Stretch, pack
from unimrg.plan import Plan
from unimrg.sample import IMAGE_TASKS, Task

IGNORE = -100


class Text(NamedTuple):
    """Token ids, and at each place the id to be predicted there (by the position before) or IGNORE."""

    ids: Sequence[int]
    labels: Sequence[int] | None = None
    weight: float = 1.0

    @property
    def length(self) -> int:
        return len(self.ids)


class Vectors(NamedTuple):
    """Rows (int64 [n]) of the table `source`; `tag` finds in `Assembled.places` where they went."""

    source: str
    rows: np.ndarray
    tag: Hashable = None

    @property
    def length(self) -> int:
        return len(self.rows)


class Block(NamedTuple):
    """Pieces that look at each other as `mode` says (`packing.Stretch`)."""

    pieces: tuple[Text | Vectors, ...]
    mode: Mode = "causal"

    @property
    def stretch(self) -> Stretch:
        return Stretch(sum(piece.length for piece in self.pieces), self.mode)


class Row(NamedTuple):
    """A prefix and the branches that share it."""

    prefix: tuple[Block, ...]
    branches: Sequence[tuple[Block, ...]]


@dataclass(frozen=True)
class Assembled:
    """What `assemble` returns; the tensors are `PackedBatch`'s of the same names.

    places: by tag, the packed positions (int64) of the vectors that carry it, in their own order.
    """

    plan: Plan
    position_ids: torch.Tensor
    token_ids: torch.Tensor
    source_index: torch.Tensor
    label_index: torch.Tensor
    label_ids: torch.Tensor
    label_weight: torch.Tensor
    places: dict[Hashable, np.ndarray]

    @property
    def answers(self) -> int:
        """Predicted text tokens that count."""
        return int((self.label_weight > 0).sum())


@dataclass(frozen=True, kw_only=True)
class PackedBatch(Batch):
    """A packed batch of any family; families add what their targets need.

    token_ids: int64 [N]. position_ids: int64 [T].
    source_index: int64 [T] into the concatenation of the family's tables and the text embeddings.
    label_index, label_ids, label_weight: [A] packed position that predicts, id to predict, 0 or 1.
    images: uint8 [I, S, S, 3]; extra_images: uint8 [E, S, S, 3]; S is 0 where only their codes are read.
    codes: what `Family.frozen_codes` gives for conditions and, behind them, extra pictures, [I + E, ...],
        float32 or int64; None: the model is to encode the pictures itself.
    target_source: int64 [G] into [images, extra_images]. target_task: int64 [G] index into IMAGE_TASKS;
    target_weight: float32 [G], 0 or 1. noise_seeds: one integer per target, for whatever the loss draws.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    source_index: torch.Tensor
    label_index: torch.Tensor
    label_ids: torch.Tensor
    label_weight: torch.Tensor
    images: torch.Tensor
    extra_images: torch.Tensor
    target_source: torch.Tensor
    target_task: torch.Tensor
    target_weight: torch.Tensor
    noise_seeds: tuple[int, ...]
    codes: torch.Tensor | None = None


class CellRows(NamedTuple):
    """The cells of all targets that count, for losses that are a sum over cells.

    rows: int64 [M] into the flattened [G, cells]. task: int64 [M] index into IMAGE_TASKS.
    weight: float32 [M], 0 or 1.
    """

    rows: torch.Tensor
    task: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def of(
        cls, counts: Sequence[np.ndarray], tasks: Sequence[Task], weights: Sequence[float], cells: int
    ) -> CellRows:
        """counts: bool [cells] for every target, True where a cell counts."""
        rows, task, weight = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
        for number, counted in enumerate(counts):
            own = np.flatnonzero(counted)
            rows.append(number * cells + own)
            task.append(np.full(len(own), IMAGE_TASKS.index(tasks[number]), np.int64))
            weight.append(np.full(len(own), weights[number], np.float32))
        return cls(*(torch.from_numpy(np.concatenate(part)) for part in (rows, task, weight)))

    def count(self, task: Task) -> int:
        """Cells of `task` that weigh anything."""
        return int(((self.task == IMAGE_TASKS.index(task)) & (self.weight > 0)).sum())


def assemble(rows: Sequence[Row], tables: Mapping[str, int]) -> Assembled:
    """Lay rows out one behind the other. tables: rows of every table, in the order of concatenation."""
    return _Assembly(tables).of(rows)


@dataclass
class _Assembly:
    """Grows the index lists, row by row."""

    tables: Mapping[str, int]
    token_ids: list[int] = field(default_factory=list)
    source: list[np.ndarray] = field(default_factory=list)
    labels: list[tuple[int, int, float]] = field(default_factory=list)
    places: dict[Hashable, np.ndarray] = field(default_factory=dict)

    def of(self, rows: Sequence[Row]) -> Assembled:
        self.base = dict(zip(self.tables, np.cumsum([0, *self.tables.values()]).tolist(), strict=False))
        self.text_base = sum(self.tables.values())
        packed = self._pack(rows)
        for row, prefix, spans in zip(rows, packed.prefixes, packed.branches, strict=True):
            self._blocks(row.prefix, prefix[0])
            for branch, span in zip(row.branches, spans, strict=True):
                self._blocks(branch, span[0])
        index, ids, weight = zip(*self.labels, strict=True) if self.labels else ((), (), ())
        return Assembled(
            plan=packed.plan,
            position_ids=packed.position_ids,
            token_ids=torch.tensor(self.token_ids, dtype=torch.long),
            source_index=as_long(self.source),
            label_index=torch.tensor(index, dtype=torch.long),
            label_ids=torch.tensor(ids, dtype=torch.long),
            label_weight=torch.tensor(weight, dtype=torch.float32),
            places=self.places,
        )

    def _pack(self, rows: Sequence[Row]) -> Packed:
        return pack(
            [
                Layout(
                    tuple(block.stretch for block in row.prefix),
                    tuple(tuple(block.stretch for block in branch) for branch in row.branches),
                )
                for row in rows
            ]
        )

    def _blocks(self, blocks: Sequence[Block], start: int) -> None:
        for block in blocks:
            for piece in block.pieces:
                if isinstance(piece, Text):
                    self._text(piece, start)
                else:
                    self.source.append(self.base[piece.source] + piece.rows)
                    if piece.tag is not None:
                        self.places[piece.tag] = np.arange(start, start + piece.length)
                start += piece.length

    def _text(self, text: Text, start: int) -> None:
        first = self.text_base + len(self.token_ids)
        self.source.append(np.arange(first, first + text.length))
        self.token_ids += text.ids
        self.labels += [
            (start + place - 1, label, text.weight)
            for place, label in enumerate(text.labels or ())
            if label != IGNORE
        ]


def as_long(parts: Sequence[np.ndarray]) -> torch.Tensor:
    """The concatenation as int64, also of nothing."""
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]))
