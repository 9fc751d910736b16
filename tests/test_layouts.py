"""What backends are given says what the plan says: every token once, every pair that may look, no other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention_cases import CPU, PLANS
from tests.test_plan import ENDING, LAYOUTS, layout
from unimrg.layouts import BLOCK, blocks, by_block, by_mode, by_shape, indices, key_ranges
from unimrg.packing import Layout, Stretch, pack
from unimrg.plan import Plan

LONG = st.builds(Stretch, st.integers(1, 200), st.sampled_from(("causal", "full")))
LONG_LAYOUTS = st.lists(
    st.builds(
        Layout,
        st.lists(LONG, max_size=3).map(tuple),
        st.lists(st.lists(LONG, min_size=1, max_size=2).map(tuple), min_size=1, max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=2,
)


@settings(max_examples=40, deadline=None)
@given(LAYOUTS, st.sampled_from((by_shape, by_mode)))
def test_gathering_reorders_every_token_once(layouts: list[Layout], gather) -> None:  # type: ignore[no-untyped-def]
    plan = pack(layouts).plan
    gathered = gather(plan.segments, CPU)
    order = torch.arange(plan.length)
    if gathered.query_index is None:
        assert gathered.packed_index is None
    else:
        assert torch.equal(gathered.query_index[gathered.packed_index], order)
        assert not torch.equal(gathered.query_index, order)
    queries, keys = zip(*(group.rows for group in gathered.groups), strict=True)
    assert sum(queries) == plan.length
    assert len(gathered.key_index) == sum(keys)


@settings(max_examples=40, deadline=None)
@given(LAYOUTS)
def test_calls_of_one_mode_hold_their_segments(layouts: list[Layout]) -> None:
    """Two calls at most; cumulative lengths that cut out each segment's own rows, prefixes counted again."""
    plan = pack(layouts).plan
    gathered = by_mode(plan.segments, CPU)
    assert len(gathered.groups) == len({segment.causal for segment in plan.segments})
    order = torch.arange(plan.length) if gathered.query_index is None else gathered.query_index
    query_start = key_start = 0
    for group in gathered.groups:
        queries = order[query_start : query_start + group.rows[0]]
        keys = gathered.key_index[key_start : key_start + group.rows[1]]
        members = [segment for segment in plan.segments if segment.causal == group.causal]
        for number, segment in enumerate(members):
            own = queries[group.cu_queries[number] : group.cu_queries[number + 1]]
            assert torch.equal(own, indices([segment.query]))
            seen = keys[group.cu_keys[number] : group.cu_keys[number + 1]]
            assert torch.equal(seen, indices(segment.keys))
        assert group.longest_query == max(segment.query_length for segment in members)
        assert group.longest_key == max(segment.key_length for segment in members)
        query_start, key_start = query_start + group.rows[0], key_start + group.rows[1]


def test_causal_text_alone_moves_nothing() -> None:
    gathered = by_mode(pack([layout(7, 2, 3)]).plan.segments, CPU)
    assert gathered.query_index is None and gathered.packed_index is None


@settings(max_examples=40, deadline=None)
@given(LAYOUTS)
def test_key_ranges_are_the_dense_mask(layouts: list[Layout]) -> None:
    plan = pack(layouts).plan
    first, stop = key_ranges(plan.segments)
    key = torch.arange(plan.length)
    seen = (key >= first[..., None]) & (key < stop[..., None])
    assert torch.equal(seen.any(0), plan.dense_mask())
    assert int(seen.sum()) == plan.attended_pairs, "no pair is in two ranges"


def squares(plan: Plan) -> torch.Tensor:
    """The dense mask in blocks [N, N, BLOCK, BLOCK]; pairs beyond the sequence may not look."""
    missing = -plan.length % BLOCK
    padded = torch.nn.functional.pad(plan.dense_mask(), (0, missing, 0, missing))
    return padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(1, 2)


@settings(max_examples=40, deadline=None)
@given(LONG_LAYOUTS)
def test_blocks_hold_every_pair(layouts: list[Layout]) -> None:
    """No pair that may look is outside the visited blocks, and none that may not is in a whole one."""
    plan = pack(layouts).plan
    some, every = blocks(plan.segments, *key_ranges(plan.segments))
    assert torch.equal(some, squares(plan).flatten(2).any(2))
    assert not (every & ~squares(plan).flatten(2).all(2)).any()


def test_whole_blocks_are_found() -> None:
    """Behind a long prefix most blocks need no rule: the kernel's speed."""
    plan = pack([Layout((Stretch(3 * BLOCK, "full"),), ((Stretch(BLOCK),), (Stretch(BLOCK + 5),)))]).plan
    some, every = blocks(plan.segments, *key_ranges(plan.segments))
    assert torch.equal(every, squares(plan).flatten(2).all(2))
    assert int(every.sum()) == 3 * 3 + 3 + 3 and int(some.sum()) == int(every.sum()) + 1 + 1 + 3 + 2


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_block_mask_is_the_one_of_torch(plan: Plan) -> None:
    """Rule and blocks, those of the backward pass too, against torch's own from the dense mask."""
    from torch.nn.attention.flex_attention import create_block_mask, create_mask

    mask, dense = by_block(plan.segments, CPU), plan.dense_mask()
    size = plan.length, plan.length
    assert torch.equal(create_mask(mask.mask_mod, 1, 1, *size, device="cpu")[0, 0], dense)
    want = create_block_mask(
        lambda b, h, q, k: dense[q, k], None, None, *size, device="cpu", BLOCK_SIZE=BLOCK
    )
    assert torch.equal(mask.to_dense(), want.to_dense())
    assert mask.shape == want.shape and mask.BLOCK_SIZE == want.BLOCK_SIZE
    visits = mask.q_num_blocks + mask.full_q_num_blocks
    assert torch.equal(visits, want.q_num_blocks + want.full_q_num_blocks)


@settings(max_examples=10, deadline=None)
@given(ENDING)
def test_a_plan_keeps_what_it_says(branch: tuple[Stretch, ...]) -> None:
    plan = pack([Layout((), (tuple(branch),))]).plan
    for backend in ("varlen", "flex", "sdpa"):
        ready = plan.on(CPU, backend)
        assert ready.attention == backend
        assert (ready.length, ready.segments) == (plan.length, plan.segments)
    assert plan.on(CPU, "sdpa") is plan
