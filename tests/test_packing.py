"""One packed pass is the same training step as separate passes: losses and every gradient."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny_harmon import micro, random_model, random_sample, tokenizer
from unimrg.families.harmon.model import Harmon
from unimrg.families.harmon.processor import HarmonBatch, HarmonProcessor
from unimrg.families.processor import Branch, Pictures
from unimrg.losses import combine
from unimrg.sample import IMAGE_TASKS, Sample, Task

TOLERANCE = 1e-5  # relative to each tensor's largest magnitude, float32
WEIGHTS = {Task.UNDERSTANDING: 1.0, Task.PIXEL: 0.7, Task.DEPTH: 1.3, Task.SEGMENTATION: 0.4}
SIDE = 16


@lru_cache
def model() -> Harmon:
    return random_model(micro())


def processor(tasks: tuple[Task, ...] = tuple(Task), published: bool = False) -> HarmonProcessor:
    return HarmonProcessor(micro(), tokenizer(), tasks, seed=3, published=published)


def gradients(batches: list[HarmonBatch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Loss sums by task and gradients by parameter, accumulated over the batches as one global batch."""
    counts = {task: sum(batch.counts[task] for batch in batches) for task in Task}
    sums = {task.value: torch.zeros(()) for task in Task}
    model().zero_grad()
    for batch in batches:
        losses = model()(batch)
        combine(losses, WEIGHTS, counts).backward()
        for task, loss in losses.items():
            sums[task.value] = sums[task.value] + loss.sum.detach()
    return sums, {name: p.grad for name, p in model().named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name in got.keys() | want.keys():
        # A module that didn't run has no gradient; one whose losses weigh nothing has a gradient of zero.
        zero = torch.zeros_like(got.get(name, want.get(name)))
        a, b = got.get(name, zero), want.get(name, zero)
        error, largest = float((a - b).abs().max()), float(b.abs().max())
        assert error <= TOLERANCE * largest + 1e-12, f"{name}: {error:.1e} of {largest:.1e}"


def one_by_one(branches: list[Branch], pictures: Pictures) -> list[HarmonBatch]:
    """Every branch as a batch of its own, with its own copy of the prefix."""
    return [alone(branch, pictures) for branch in branches]


def alone(branch: Branch, pictures: Pictures) -> HarmonBatch:
    own = Pictures()
    if branch.image is not None:
        own.images.append(pictures.images[branch.image])
        branch = replace(branch, image=0)
    if branch.target is not None and branch.target.source >= 0:
        branch = replace(branch, target=replace(branch.target, source=0))
    elif branch.target is not None:
        own.extra.append(pictures.extra[-branch.target.source - 1])
        branch = replace(branch, target=replace(branch.target, source=-1))
    return processor().assemble([branch], own, samples=1, next_position=0)


@st.composite
def sample_lists(draw: st.DrawFn) -> list[Sample]:
    """Samples with or without a picture, any tasks, conversations, turns and padding box."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    edges = st.lists(st.integers(0, SIDE), min_size=2, max_size=2).map(sorted)
    samples = []
    for position in range(draw(st.integers(1, 3))):
        (left, right), (top, bottom) = draw(edges), draw(edges)
        picture = draw(st.booleans())
        samples.append(
            random_sample(
                rng,
                SIDE,
                position=position + draw(st.integers(0, 9)),
                conversations=draw(st.integers(0 if picture else 1, 3)),
                turns=draw(st.integers(1, 3)),
                tasks=tuple(draw(st.sets(st.sampled_from(IMAGE_TASKS)))),
                picture=picture,
                valid=(left, top, right, bottom),
            )
        )
    return samples


@settings(max_examples=10, deadline=None, derandomize=True)
@given(sample_lists())
def test_packed_is_separate(samples: list[Sample]) -> None:
    pictures, branches = Pictures(), []
    for sample in samples:
        branches += processor().branches(sample, pictures, {"truncated": 0})
    if not branches:
        return
    packed = processor().assemble(branches, pictures, samples=len(samples), next_position=0)
    for got, want in zip(gradients([packed]), gradients(one_by_one(branches, pictures)), strict=True):
        assert_same(got, want)


def test_packed_is_separate_with_everything_in_it() -> None:
    """The same with many conversations and all tasks, where most tokens are shared; no parameter is idle."""
    rng = np.random.default_rng(0)
    samples = [random_sample(rng, SIDE, position, conversations=3, turns=2) for position in range(3)]
    pictures, branches = Pictures(), []
    for sample in samples:
        branches += processor().branches(sample, pictures, {"truncated": 0})
    packed = processor().assemble(branches, pictures, samples=len(samples), next_position=0)
    sums, grads = gradients([packed])
    singles = one_by_one(branches, pictures)
    assert len(singles) == 18 and packed.tokens < 0.75 * sum(batch.tokens for batch in singles)
    assert grads.keys() == {name for name, p in model().named_parameters() if p.requires_grad}
    assert all(float(g.abs().max()) > 0 for g in grads.values())
    for got, want in zip((sums, grads), gradients(singles), strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("published", [False, True])
def test_a_sample_does_not_depend_on_its_neighbours(published: bool) -> None:
    """The losses and gradients of a batch are those of its samples, each processed alone."""
    rng = np.random.default_rng(1)
    samples = [
        random_sample(rng, SIDE, 4, conversations=2, valid=(0, 3, 16, 13)),
        random_sample(rng, SIDE, 9, conversations=1, picture=False),
        random_sample(rng, SIDE, 5, conversations=1, turns=3, tasks=(Task.PIXEL, Task.DEPTH)),
        random_sample(rng, SIDE, 2, conversations=0),
    ]
    process = processor(published=published)
    together, apart = [process(samples[::-1])], [process([sample]) for sample in samples]
    for got, want in zip(gradients(together), gradients(apart), strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("what", ["text only", "no conversation", "no drawing", "nothing"])
def test_filler_weighs_nothing(what: str) -> None:
    """Every module runs, whatever the batch lacks; losses and gradients are those of the real branches."""
    rng = np.random.default_rng(2)
    sample = {
        "text only": random_sample(rng, SIDE, conversations=2, picture=False),
        "no conversation": random_sample(rng, SIDE, conversations=0),
        "no drawing": random_sample(rng, SIDE, tasks=()),
        "nothing": random_sample(rng, SIDE, conversations=0, picture=False),
    }[what]
    filled = processor()([sample])
    pictures = Pictures()
    branches = processor().branches(sample, pictures, {"truncated": 0})
    sums, grads = gradients([filled])
    assert grads.keys() == {name for name, p in model().named_parameters() if p.requires_grad}
    if branches:
        bare = processor().assemble(branches, pictures, samples=1, next_position=0)
        assert bare.counts == filled.counts
        for got, want in zip((sums, grads), gradients([bare]), strict=True):
            assert_same(got, want)
    else:
        assert not any(filled.counts.values())
        assert not any(float(grad.abs().max()) for grad in grads.values())


def test_moving_a_batch_moves_its_tensors_only() -> None:
    batch = processor()([random_sample(np.random.default_rng(0), SIDE)])
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.source_index, batch.source_index)
    assert moved.plan is batch.plan and moved.counts == batch.counts
