"""Running a plan gives what a dense mask gives, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.test_plan import LAYOUTS, layout
from unimrg.attention import IMPLEMENTATION, NO_MASK, plan_attention
from unimrg.packing import Layout, pack
from unimrg.plan import Plan, Segment


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, scale: float | None
) -> torch.Tensor:
    """The oracle: [1, A, T, D] by softmax over a mask of all pairs."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~plan.dense_mask(), -torch.inf).softmax(-1) @ v


def assert_same(plan: Plan, heads: tuple[int, int], scale: float | None = None) -> None:
    generator = torch.Generator().manual_seed(plan.length)

    def draw(count: int) -> torch.Tensor:
        shape = (1, plan.length, count, 8)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn.transpose(1, 2).requires_grad_()

    inputs = draw(heads[0]), draw(heads[1]), draw(heads[1])
    weight = torch.randn(1, heads[0], plan.length, 8, generator=generator, dtype=torch.float64)
    got, want = plan_attention(*inputs, plan, scale), dense_attention(*inputs, plan, scale)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad((out * weight).sum(), inputs) for out in (got, want)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(
    LAYOUTS,
    st.sampled_from([(2, 2), (4, 2), (6, 1)]),
)
def test_random_plans(layouts: list[Layout], heads: tuple[int, int]) -> None:
    assert_same(pack(layouts).plan, heads)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_full_and_causal_segments_together(scale: float | None) -> None:
    """A full block of target tokens behind a causal prefix and text, in two rows of different shape."""
    segments = (
        Segment((0, 4), ((0, 4),), True),
        Segment((4, 6), ((0, 4), (4, 6)), True),
        Segment((6, 9), ((0, 4), (4, 9)), False),
        Segment((9, 11), ((9, 11),), False),
    )
    assert_same(Plan(11, segments), (4, 2), scale)


def test_causal_aligns_at_the_bottom_right() -> None:
    """The first query of a branch sees its whole prefix, the last one everything."""
    plan = Plan(3, (Segment((0, 1), ((0, 1),), True), Segment((1, 3), ((0, 1), (1, 3)), True)))
    value = torch.eye(3)[None, None]
    out = plan_attention(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3), value, plan)
    torch.testing.assert_close(out[0, 0], torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]]))


def test_a_sequence_of_another_length_is_refused() -> None:
    plan = pack([layout(2, 1)]).plan
    with pytest.raises(ValueError, match="3 tokens"):
        plan_attention(*[torch.zeros(1, 2, 4, 8)] * 3, plan)


def test_a_library_model_takes_the_plan() -> None:
    """Branches behind a shared prefix get the states they get behind a prefix of their own."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = Qwen2ForCausalLM._from_config(config, attn_implementation=IMPLEMENTATION).model.eval()
    prefix, branches = torch.randn(5, 32), [torch.randn(3, 32), torch.randn(4, 32)]
    packed = pack([layout(5, 3, 4)])
    with torch.no_grad():
        together = model(
            inputs_embeds=torch.cat([prefix, *branches])[None],
            position_ids=packed.position_ids[None],
            attention_mask=NO_MASK,
            plan=packed.plan,
            use_cache=False,
        ).last_hidden_state[0]
        for span, branch in zip(packed.branches[0], branches, strict=True):
            alone = model(inputs_embeds=torch.cat([prefix, branch])[None]).last_hidden_state[0]
            torch.testing.assert_close(together[slice(*span)], alone[5:], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(together[:5], alone[:5], rtol=1e-5, atol=1e-5)
