"""Plans say who may look at whom; packing lays branches out so that nobody sees a neighbour."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimrg.packing import Layout, pack
from unimrg.plan import Plan, Segment

LAYOUTS = st.lists(
    st.builds(Layout, st.integers(0, 5), st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)),
    min_size=1,
    max_size=4,
)


def allowed_pairs(layouts: list[Layout]) -> torch.Tensor:
    """Token by token: whose prefix or branch it is, and where it stands in it."""
    owner: list[tuple[int, int]] = []  # row, branch (-1 = prefix)
    for row, layout in enumerate(layouts):
        owner += [(row, -1)] * layout.prefix
        for branch, length in enumerate(layout.branches):
            owner += [(row, branch)] * length
    mask = torch.zeros(len(owner), len(owner), dtype=torch.bool)
    for i, (row, branch) in enumerate(owner):
        for j in range(i + 1):
            mask[i, j] = owner[j][0] == row and owner[j][1] in (-1, branch)
    return mask


@settings(max_examples=40, deadline=None)
@given(LAYOUTS)
def test_packed_rows_see_their_prefix_and_themselves(layouts: list[Layout]) -> None:
    packed = pack(layouts)
    want = allowed_pairs(layouts)
    assert torch.equal(packed.plan.dense_mask(), want)
    assert packed.plan.attended_pairs == int(want.sum())


@settings(max_examples=40, deadline=None)
@given(LAYOUTS)
def test_positions_restart_behind_every_prefix(layouts: list[Layout]) -> None:
    """A token's position is the number of tokens it may look at besides itself."""
    packed = pack(layouts)
    assert torch.equal(packed.position_ids, packed.plan.dense_mask().sum(1) - 1)


def test_spans_say_where_everything_lies() -> None:
    packed = pack([Layout(3, (2, 1)), Layout(0, (4,))])
    assert packed.prefixes == ((0, 3), (6, 6))
    assert packed.branches == (((3, 5), (5, 6)), ((6, 10),))
    assert packed.plan.length == 10


@settings(max_examples=40, deadline=None)
@given(LAYOUTS)
def test_gathering_reorders_every_token_once(layouts: list[Layout]) -> None:
    plan = pack(layouts).plan
    gathered = plan.gathered(torch.device("cpu"))
    assert torch.equal(gathered.query_index[gathered.packed_index], torch.arange(plan.length))
    assert len(gathered.query_index) == sum(group.count * group.queries for group in gathered.groups)
    assert len(gathered.key_index) == sum(group.count * group.keys for group in gathered.groups)
    assert gathered is plan.gathered(torch.device("cpu"))


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
