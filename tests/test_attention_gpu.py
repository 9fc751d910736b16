"""Every backend on a real GPU: the dense mask's numbers, the bottom right corner, no waiting.

Needs torch, transformers and pytest alone, so that it also runs on a bare machine.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.attention_cases import (
    HEADS,
    PLANS,
    assert_bottom_right,
    assert_like_the_oracle,
    causal,
    drawn,
)
from tests.families import NAMES, SIDE, fresh_model, processor
from tests.tiny_harmon import random_sample
from unimrg.attention import plan_attention
from unimrg.backends import MISSING, PREFERENCE, choose_attention, obstacle
from unimrg.packing import Layout, Mode, Stretch, pack
from unimrg.plan import Plan

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


@pytest.fixture(params=PREFERENCE)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend, unless its package isn't there; any other obstacle is a failure."""
    name: str = request.param
    reason = obstacle(name, GPU, torch.bfloat16)
    if reason == MISSING:
        pytest.skip(f"{name} {reason}")
    assert not reason, f"{name} {reason}"
    return name


def test_auto_is_a_flash_kernel() -> None:
    assert choose_attention("auto", GPU, torch.bfloat16).name in ("flash_attn", "varlen")


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("width", [12, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_kind_of_plan(backend: str, heads: tuple[int, int], width: int, dtype: torch.dtype) -> None:
    for plan in PLANS.values():
        ready = plan.on(GPU, backend)
        scale = None if width > 12 else 0.3
        assert_like_the_oracle(
            ready, heads, width=width, dtype=dtype, device=GPU, tolerance=2e-2, scale=scale
        )


def random_layout(chance: random.Random) -> Layout:
    def stretches(fewest: int) -> tuple[Stretch, ...]:
        modes: tuple[Mode, ...] = ("causal", "full")
        count = chance.randint(fewest, 3)
        return tuple(Stretch(chance.randint(1, 150), chance.choice(modes)) for _ in range(count))

    return Layout(stretches(0), tuple(stretches(1) for _ in range(chance.randint(1, 4))))


def test_random_plans(backend: str) -> None:
    chance = random.Random(0)
    for _ in range(25):
        plan = pack([random_layout(chance) for _ in range(chance.randint(1, 3))]).plan
        assert_like_the_oracle(
            plan.on(GPU, backend),
            chance.choice(HEADS),
            width=64,
            dtype=torch.bfloat16,
            device=GPU,
            tolerance=2e-2,
        )


def test_causal_aligns_at_the_bottom_right(backend: str) -> None:
    assert_bottom_right(backend, GPU, torch.bfloat16)


@pytest.mark.parametrize("name", ["flex", "sdpa"])
def test_float32(name: str) -> None:
    for plan in PLANS.values():
        assert_like_the_oracle(plan.on(GPU, name), (6, 2), width=64, device=GPU)


def test_flex_is_compiled_once_for_many_lengths() -> None:
    """Else torch gives up after a few and runs it unfused."""
    torch._dynamo.utils.counters.clear()
    for length in range(140, 1000, 70):
        plan = pack([causal(length, 20, length // 2)]).plan.on(GPU, "flex")
        *inputs, weight = (x.to(GPU) for x in drawn(plan, (6, 2), 64, torch.bfloat16))
        leaves = [x.requires_grad_() for x in inputs]
        torch.autograd.grad(plan_attention(*leaves, plan), leaves, weight)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


def test_nobody_waits_for_the_gpu(backend: str) -> None:
    """Neither laying out a plan nor running it, forward and backward, once kernels are compiled."""
    layouts = [causal(300, 20, 150), Layout((Stretch(30),), ((Stretch(200, "full"),),))]
    *inputs, weight = (x.to(GPU) for x in drawn(pack(layouts).plan, (6, 2), 64, torch.bfloat16))
    leaves = [x.requires_grad_() for x in inputs]

    def step(plan: Plan) -> None:
        ready = plan.on(GPU, backend)
        torch.autograd.grad(plan_attention(*leaves, ready), leaves, weight)

    step(pack(layouts).plan)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(pack(layouts).plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_families_lose_the_same(backend: str, name: str) -> None:
    """A packed step under autocast, by every backend, and by SDPA in float32: losses, gradient norm."""
    if name == "openuni":
        pytest.importorskip("diffusers")
    batch = processor(name)([random_sample(np.random.default_rng(seed), SIDE, seed) for seed in (0, 1)])
    model = fresh_model(name).to(GPU)

    def losses(attention: str, mixed: bool) -> Tensor:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
            found = model(batch.to(GPU, attention))
        total = torch.stack([loss.sum / max(loss.count, 1) for loss in found.values()])
        total.sum().backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        return torch.cat([total.detach(), norm[None]]).cpu()

    torch.testing.assert_close(losses(backend, True), losses("sdpa", False), rtol=5e-2, atol=2e-2)
