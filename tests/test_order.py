"""The endless list: a permutation every epoch, the same wherever one starts, whole shards, shares."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimrg.data.order import MIX_BLOCK, Epochs, Order, permutation, split_held_out

SIZES = {
    "rows": st.integers(2, 400),
    "seed": st.integers(0, 2**32 - 1),
    "held_out": st.integers(0, 40),
    "shard_rows": st.integers(1, 64),
    "window": st.integers(1, 9),
}


@settings(deadline=None, max_examples=40)
@given(**SIZES, epoch=st.integers(0, 4))
def test_every_epoch_holds_every_training_row_once(epoch: int, **sizes: int) -> None:
    epochs = Epochs(**sizes)
    rows = epochs.rows(np.arange(epoch * len(epochs), (epoch + 1) * len(epochs)))
    assert sorted(rows) == epochs.training.tolist()
    both = np.concatenate([epochs.training, epochs.held_out])
    assert sorted(both) == list(range(sizes["rows"]))
    assert len(epochs.held_out) == min(sizes["held_out"], sizes["rows"] // 2)


@settings(deadline=None, max_examples=40)
@given(**SIZES, cuts=st.lists(st.integers(0, 900), min_size=2, max_size=6))
def test_any_cut_gives_the_same_list(cuts: list[int], **sizes: int) -> None:
    whole = Order([Epochs(**sizes)])(0, 901)
    start, stop = min(cuts), max(cuts)
    points = [start, *sorted(cuts), stop]
    parts = [Order([Epochs(**sizes)])(a, b).row for a, b in itertools.pairwise(points)]
    assert np.concatenate(parts).tolist() == whole.row[start:stop].tolist()


@settings(deadline=None, max_examples=40)
@given(**SIZES, start=st.integers(0, 900))
def test_a_window_needs_few_shards(start: int, **sizes: int) -> None:
    order = Order([Epochs(**sizes)])
    spans = list(order.spans(start, start + 500))
    assert [a for a, _ in spans] == [start, *(b for _, b in spans[:-1])] and spans[-1][1] == start + 500
    for a, b in spans:
        shards = set(order(a, b).row // sizes["shard_rows"])
        assert len(shards) <= sizes["window"]


def test_shards_of_an_epoch_are_read_once() -> None:
    epochs = Epochs(1000, seed=5, held_out=37, shard_rows=16, window=4)
    order = Order([epochs])
    read = Counter[int]()
    for a, b in order.spans(0, len(epochs)):
        read.update(set((order(a, b).row // 16).tolist()))
    assert set(read.values()) == {1} and len(read) == epochs.shards


def test_epochs_and_seeds_differ_and_rows_are_mixed() -> None:
    epochs = Epochs(512, seed=0, held_out=0, shard_rows=32, window=4)
    first, second = epochs.rows(np.arange(512)), epochs.rows(np.arange(512, 1024))
    other = Epochs(512, seed=1, held_out=0, shard_rows=32, window=4).rows(np.arange(512))
    assert (first != second).mean() > 0.9 and (first != other).mean() > 0.9
    # In a window of 128 rows out of 4 shards, neighbours come from one shard in about a quarter of the cases.
    same = (first[1:] // 32 == first[:-1] // 32).mean()
    assert 0.15 < same < 0.35


def test_the_order_never_changes() -> None:
    """A run resumed after an upgrade must go on in the same order."""
    assert permutation(8, 0, 0).tolist() == GOLDEN
    assert Order([Epochs(12, seed=3, held_out=2, shard_rows=3, window=2)])(0, 12).row.tolist() == GOLDEN_ROWS


GOLDEN = [0, 2, 1, 5, 4, 3, 6, 7]
GOLDEN_ROWS = [1, 9, 2, 10, 0, 6, 5, 8, 4, 3, 9, 6]


@settings(deadline=None, max_examples=40)
@given(
    shares=st.lists(st.floats(0.05, 20), min_size=2, max_size=4),
    sizes=st.lists(st.integers(3, 90), min_size=4, max_size=4),
    start=st.integers(0, 3000),
)
def test_a_mixture_keeps_its_shares(shares: list[float], sizes: list[int], start: int) -> None:
    sources = [Epochs(n, seed=1, held_out=0, shard_rows=4, window=2) for n in sizes[: len(shares)]]
    order = Order(sources, shares, seed=1)
    block = start // MIX_BLOCK * MIX_BLOCK
    counted = np.bincount(order(block, block + MIX_BLOCK).source, minlength=len(shares))
    exact = np.array(shares) / sum(shares) * MIX_BLOCK
    assert (abs(counted - exact) < len(shares)).all() and counted.min() >= 1
    # Each source's own rows come in its own order, none left out and none twice, whatever lies between them.
    whole = order(0, start + 100)
    for number, source in enumerate(sources):
        mine = whole.row[whole.source == number]
        assert mine.tolist() == source.rows(np.arange(len(mine))).tolist()
    tail = order(start, start + 100)
    assert tail.row.tolist() == whole.row[start:].tolist()


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_held_out_of_next_to_nothing(n: int) -> None:
    training, held_out = split_held_out(n, seed=0, held_out=5)
    assert len(held_out) == min(5, n // 2) and len(training) == n - len(held_out)
