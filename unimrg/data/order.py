"""In which order samples are trained on: one endless list, a function of the seed alone.

Position p of the list is a row of a source's manifest. Nothing here knows of time or of workers, so a run is
resumed by starting later in the list, with however many workers.

Rows are shuffled as shards are read: in every epoch the shards (`shard_rows` neighbouring rows) come in a new
order, and the rows of `window` shards in a row are mixed. A window is what must be at hand to train on it, so
object storage serves whole shards, once an epoch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

MIX_BLOCK = 512
"""Positions in which a mixture keeps its shares exactly, to one sample of each source."""


class Place(NamedTuple):
    """Rows of sources, one for each position asked for: `source` and `row`, both int64 [n]."""

    source: np.ndarray
    row: np.ndarray


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of n places, int64 [n], a function of (n, key) alone. key: two integers.

    Built from Philox's raw bits, which numpy promises to keep, and not from `Generator.permutation`, which
    may change with numpy: a run resumed after an upgrade must go on in the same order.
    """
    bits = np.random.Philox(key=np.array([word % 2**64 for word in key], np.uint64)).random_raw(n)
    return np.argsort(bits, kind="stable")


def split_held_out(n: int, seed: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held out (at most half), sorted; a function of the arguments alone."""
    kept_back = min(held_out, n // 2)
    order = permutation(n, seed + 1_000_003, 0)
    return np.sort(order[kept_back:]), np.sort(order[:kept_back])


class Epochs:
    """The endless list of one source: epoch after epoch of its training rows.

    rows: of the manifest. held_out: this many of them are never trained on, chosen by split_seed, or by seed.
    """

    def __init__(
        self,
        rows: int,
        seed: int,
        held_out: int,
        shard_rows: int,
        window: int,
        split_seed: int | None = None,
    ) -> None:
        self.seed, self.shard_rows, self.window = seed, shard_rows, window
        chosen_by = seed if split_seed is None else split_seed
        self.training, self.held_out = split_held_out(rows, chosen_by, held_out)
        self.shards = -(-rows // shard_rows)
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        """Rows of one epoch."""
        return len(self.training)

    def rows(self, places: np.ndarray) -> np.ndarray:
        """Manifest rows, int64 [n], at these places of the endless list."""
        found = np.empty(len(places), np.int64)
        epochs, inside = np.divmod(places, len(self))
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            found[chosen] = self._epoch(int(epoch))[0][inside[chosen]]
        return found

    def window_end(self, place: int) -> int:
        """The first place behind the window that `place` lies in."""
        epoch, inside = divmod(place, len(self))
        ends = self._epoch(epoch)[1]
        return epoch * len(self) + int(ends[np.searchsorted(ends, inside, side="right")])

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of an epoch in order, and where its windows end."""
        turn = np.empty(self.shards, np.int64)
        turn[permutation(self.shards, self.seed, 2 * epoch + 1)] = np.arange(self.shards)
        window = turn[self.training // self.shard_rows] // self.window
        mixed = permutation(len(self), self.seed, 2 * epoch)
        order = mixed[np.argsort(window[mixed], kind="stable")]
        ends = np.flatnonzero(np.diff(window[order], append=-1)) + 1
        return self.training[order], ends


class Order:
    """The endless list over one or more sources.

    shares: how often each source's turn comes, in proportion; every block of MIX_BLOCK positions holds them
    as exactly as whole samples allow, in an order of its own. A source that ends starts again.
    """

    def __init__(self, sources: Sequence[Epochs], shares: Sequence[float] = (1.0,), seed: int = 0) -> None:
        self.sources = list(sources)
        self.seed = seed
        self.quota = _quota(np.asarray(shares, float), MIX_BLOCK)
        self._block = functools.lru_cache(maxsize=4)(self._turns)

    def __call__(self, start: int, stop: int) -> Place:
        """Sources and rows of positions start..stop-1."""
        positions = np.arange(start, stop)
        if len(self.sources) == 1:
            return Place(np.zeros(len(positions), np.int64), self.sources[0].rows(positions))
        source, place = self._mixed(positions)
        row = np.empty(len(positions), np.int64)
        for number, epochs in enumerate(self.sources):
            mine = source == number
            row[mine] = epochs.rows(place[mine])
        return Place(source, row)

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """start..stop-1 cut where a new window begins, so that each span needs few shards."""
        while start < stop:
            first = self.sources[0]
            end = (
                first.window_end(start) if len(self.sources) == 1 else start + first.shard_rows * first.window
            )
            yield start, min(end, stop)
            start = end

    def _mixed(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each position, and its place in that source's list."""
        source, place = np.empty((2, len(positions)), np.int64)
        blocks, inside = np.divmod(positions, MIX_BLOCK)
        for block in np.unique(blocks):
            chosen = blocks == block
            turns, rank = self._block(int(block))
            source[chosen] = turns[inside[chosen]]
            place[chosen] = block * self.quota[source[chosen]] + rank[inside[chosen]]
        return source, place

    def _turns(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Whose turn it is at each place of a block, and how many of the same source stand before."""
        turns = np.repeat(np.arange(len(self.quota)), self.quota)[
            permutation(MIX_BLOCK, self.seed + 2_000_003, block)
        ]
        rank = np.empty(MIX_BLOCK, np.int64)
        for number, count in enumerate(self.quota):
            rank[turns == number] = np.arange(count)
        return turns, rank


def _quota(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in proportion to `shares`, at least 1 each, that sum to `total` (largest remainders)."""
    exact = shares / shares.sum() * (total - len(shares))
    whole = np.floor(exact).astype(np.int64)
    missing = total - len(shares) - int(whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:missing]] += 1
    return whole + 1
