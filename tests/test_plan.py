"""Plans say who may look at whom; packing lays branches out so that nobody sees a neighbour."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimrg.packing import Layout, Stretch, pack
from unimrg.plan import Plan, Segment

MODES = st.sampled_from(("causal", "causal", "full", "ahead"))
STRETCHES = st.lists(st.builds(Stretch, st.integers(0, 4), MODES), max_size=4).map(tuple)
ENDING = st.lists(
    st.builds(Stretch, st.integers(1, 4), st.sampled_from(("causal", "full"))), min_size=1, max_size=2
)
LAYOUTS = st.lists(
    st.builds(
        Layout,
        st.tuples(STRETCHES, ENDING).map(lambda both: (*both[0], *both[1])) | st.just(()),
        st.lists(
            st.tuples(STRETCHES, ENDING).map(lambda both: (*both[0], *both[1])), min_size=1, max_size=3
        ).map(tuple),
    ),
    min_size=1,
    max_size=3,
)


def layout(prefix: int, *branches: int) -> Layout:
    """One of causal text alone."""
    return Layout((Stretch(prefix),), tuple((Stretch(branch),) for branch in branches))


def allowed_pairs(layouts: list[Layout]) -> torch.Tensor:
    """The rules in words, token by token: who may look at whom."""
    tokens = []  # layout, branch (-1: prefix), place in the row, its stretch (from, to, mode), the one behind
    for number, one in enumerate(layouts):
        shared = sum(stretch.length for stretch in one.prefix)
        for branch, stretches in ((-1, one.prefix), *enumerate(one.branches)):
            at = 0 if branch < 0 else shared
            real = [stretch for stretch in stretches if stretch.length]
            for index, (length, mode) in enumerate(real):
                ahead = real[index + 1].length if mode == "ahead" else 0
                tokens += [
                    (
                        number,
                        branch,
                        at + i,
                        at + length if mode == "full" else at + i + 1,
                        at + length,
                        ahead,
                    )
                    for i in range(length)
                ]
                at += length

    def may(query: tuple[int, ...], key: tuple[int, ...]) -> bool:
        number, branch, _, seen, end, ahead = query
        same = key[0] == number and key[1] in (branch, -1)
        inside = key[1] == branch and end <= key[2] < end + ahead
        return same and (key[2] < seen or inside)

    return torch.tensor([[may(query, key) for key in tokens] for query in tokens])


@settings(max_examples=60, deadline=None)
@given(LAYOUTS)
def test_packed_rows_see_their_prefix_and_themselves(layouts: list[Layout]) -> None:
    packed = pack(layouts)
    want = allowed_pairs(layouts)
    assert torch.equal(packed.plan.dense_mask(), want)
    assert packed.plan.attended_pairs == int(want.sum())


@settings(max_examples=40, deadline=None)
@given(LAYOUTS)
def test_positions_restart_behind_every_prefix(layouts: list[Layout]) -> None:
    packed = pack(layouts)
    for (start, stop), branches in zip(packed.prefixes, packed.branches, strict=True):
        assert packed.position_ids[start:stop].tolist() == list(range(stop - start))
        for first, last in branches:
            got = packed.position_ids[first:last].tolist()
            assert got == list(range(stop - start, stop - start + last - first))


def test_nothing_to_look_ahead_at_is_refused() -> None:
    with pytest.raises(ValueError, match="ahead"):
        pack([Layout((), ((Stretch(2, "ahead"),),))])


def test_spans_say_where_everything_lies() -> None:
    packed = pack([layout(3, 2, 1), layout(0, 4)])
    assert packed.prefixes == ((0, 3), (6, 6))
    assert packed.branches == (((3, 5), (5, 6)), ((6, 10),))
    assert packed.plan.length == 10


def test_full_segments_see_all_of_their_keys() -> None:
    plan = Plan(5, (Segment((0, 2), ((0, 2),), causal=True), Segment((2, 5), ((0, 2), (2, 5)), causal=False)))
    assert plan.dense_mask().tolist() == [
        [True, False, False, False, False],
        [True, True, False, False, False],
        *[[True] * 5] * 3,
    ]
    assert plan.attended_pairs == 3 + 15


@pytest.mark.parametrize(
    "segments",
    [
        (Segment((0, 2), ((0, 2),), True),),  # token 2 is missing
        (Segment((0, 2), ((0, 2),), True), Segment((1, 3), ((0, 3),), True)),  # token 1 twice
        (Segment((0, 3), ((0, 4),), False),),  # a key outside
        (Segment((0, 3), ((0, 2),), True),),  # fewer keys than queries
        (Segment((0, 0), ((0, 3),), False), Segment((0, 3), ((0, 3),), False)),  # an empty segment
    ],
)
def test_a_plan_that_does_not_fit_is_refused(segments: tuple[Segment, ...]) -> None:
    with pytest.raises(ValueError):
        Plan(3, segments)
