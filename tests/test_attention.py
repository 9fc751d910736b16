"""Running a plan gives what a dense mask gives, forward and backward, by every backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.attention_cases import (
    CPU,
    HEADS,
    PLANS,
    assert_bottom_right,
    assert_like_the_oracle,
    dense_attention,
    drawn,
    varlen_reference,
)
from tests.test_plan import LAYOUTS, layout
from unimrg import attention
from unimrg.attention import IMPLEMENTATION, NO_MASK, plan_attention
from unimrg.packing import Layout, pack
from unimrg.plan import Plan, Segment


@pytest.fixture
def flex_trains(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlexAttention refuses gradients on CPUs, since the compiled kernel has none; unfused it has them."""
    module = "torch.nn.attention.flex_attention._validate_device"
    monkeypatch.setattr(module, lambda *tensors: None, raising=False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def plain_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout and everything else around the kernel, with a plain kernel that any device runs."""
    monkeypatch.setattr(attention, "varlen_kernel", varlen_reference)


# -- on the CPU ----------------------------------------------------------------------------------------------

RANDOM = given(LAYOUTS, st.sampled_from(HEADS), st.sampled_from((3, 8, 20)))


@settings(max_examples=25, deadline=None)
@RANDOM
def test_sdpa(layouts: list[Layout], heads: tuple[int, int], width: int) -> None:
    assert_like_the_oracle(pack(layouts).plan, heads, width=width)


@settings(max_examples=25, deadline=None)
@RANDOM
def test_what_variable_length_kernels_are_given(
    layouts: list[Layout], heads: tuple[int, int], width: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "varlen_kernel", varlen_reference)
        assert_like_the_oracle(pack(layouts).plan.on(CPU, "varlen"), heads, width=width)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_kind_of_plan(plain_varlen: None, plan: Plan, heads: tuple[int, int]) -> None:
    for backend in ("sdpa", "varlen"):
        assert_like_the_oracle(plan.on(CPU, backend), heads, width=12, scale=0.3)


@pytest.mark.parametrize(("number", "name"), list(enumerate(PLANS)))
def test_flex(flex_trains: None, number: int, name: str) -> None:
    assert_like_the_oracle(PLANS[name].on(CPU, "flex"), HEADS[number % 3], width=(3, 8, 12)[number % 3])


@pytest.mark.slow
def test_flex_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block-sparse kernel itself, which on CPUs only runs forward.

    Compiled for each length: for any length, torch 2.13 writes C++ that doesn't always compile.
    """
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    monkeypatch.setattr(attention, "flex_kernel", lambda kind: compiled)
    for plan in (PLANS["full behind causal"], PLANS["looking ahead"], PLANS["many blocks"]):
        query, key, value, _ = drawn(plan, (6, 2), 16, torch.float32)
        got = plan_attention(query, key, value, plan.on(CPU, "flex"))
        want = dense_attention(query.double(), key.double(), value.double(), plan)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_full_and_causal_segments_together(plain_varlen: None, scale: float | None) -> None:
    """A full block of target tokens behind a causal prefix and text, in two rows of different shape."""
    segments = (
        Segment((0, 4), ((0, 4),), True),
        Segment((4, 6), ((0, 4), (4, 6)), True),
        Segment((6, 9), ((0, 4), (4, 9)), False),
        Segment((9, 11), ((9, 11),), False),
    )
    for backend in ("sdpa", "varlen"):
        plan = Plan(11, segments).on(CPU, backend)
        assert_like_the_oracle(plan, (4, 2), dtype=torch.float64, tolerance=1e-9, scale=scale)


@pytest.mark.parametrize("backend", ["sdpa", "flex", "varlen"])
def test_causal_aligns_at_the_bottom_right(plain_varlen: None, backend: str) -> None:
    """The first query of a branch sees its whole prefix, the last one everything."""
    assert_bottom_right(backend, CPU, torch.float32)


def test_a_sequence_of_another_length_is_refused() -> None:
    plan = pack([layout(2, 1)]).plan
    with pytest.raises(ValueError, match="3 tokens"):
        plan_attention(*[torch.zeros(1, 2, 4, 8)] * 3, plan)


def test_autocast_reaches_every_backend(plain_varlen: None) -> None:
    """Rotated queries and keys come in float32, values in bfloat16; kernels want one type."""
    query, key, value, _ = drawn(PLANS["several pictures"], (4, 2), 8, torch.float32)
    for backend in ("sdpa", "varlen", "flex"):
        with torch.autocast("cpu", torch.bfloat16):
            plan = PLANS["several pictures"].on(CPU, backend)
            out = plan_attention(query, key, value.bfloat16(), plan)
        assert out.dtype == torch.bfloat16
        want = dense_attention(query, key, value, plan)
        torch.testing.assert_close(out.float(), want, rtol=2e-2, atol=2e-2)


# -- what the step does --------------------------------------------------------------------------------------


class Recorded(TorchDispatchMode):
    """Names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


BUILDING = {"arange", "argsort", "sort", "full", "tril", "_to_copy", "lift_fresh", "lift_fresh_copy"}
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "_unique2", "item"}


def borrowed(query: Tensor, key: Tensor, value: Tensor, group: object, scale: float) -> Tensor:
    """In a kernel's place: depends on all inputs, needs nothing of the host."""
    return query * scale + (key.sum() + value.sum())


@pytest.mark.parametrize("backend", ["sdpa", "varlen"])
def test_the_step_builds_nothing_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(attention, "varlen_kernel", lambda: borrowed)
    for name, plan in PLANS.items():
        ready = plan.on(CPU, backend)
        *inputs, weight = drawn(plan, (4, 2), 8, torch.float32)
        leaves = [x.requires_grad_() for x in inputs]
        with Recorded() as step:
            torch.autograd.grad(plan_attention(*leaves, ready), leaves, weight)
        assert not step.names & (BUILDING | WAITING), name
    with Recorded() as making:
        pack([layout(5, 2, 3)]).plan.on(CPU, backend)
    assert making.names & BUILDING, "the recorder sees what it is to see"


@pytest.mark.parametrize("backend", ["sdpa", "varlen", "flex"])
def test_a_plan_is_laid_out_once(backend: str) -> None:
    plan = PLANS["several pictures"].on(CPU, backend)
    assert plan.layout(CPU) is plan.layout(CPU) is plan.on(CPU, backend).layout(CPU)


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
