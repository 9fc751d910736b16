"""One packed pass is the same training step as separate passes: losses and every gradient."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.families import NAMES, SIDE, processor, shared_model
from tests.tiny_harmon import micro, random_sample, tokenizer
from unimrg.families.harmon.processor import HarmonProcessor
from unimrg.families.processor import Branch, Pictures
from unimrg.families.rows import PackedBatch
from unimrg.losses import combine
from unimrg.sample import IMAGE_TASKS, Sample, Task

TOLERANCE = 1e-5  # relative to each tensor's largest magnitude, float32
WEIGHTS = {Task.UNDERSTANDING: 1.0, Task.PIXEL: 0.7, Task.DEPTH: 1.3, Task.SEGMENTATION: 0.4}


def gradients(name: str, batches: list[PackedBatch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Loss sums by task and gradients by parameter, accumulated over the batches as one global batch."""
    counts = {task: sum(batch.counts[task] for batch in batches) for task in Task}
    sums = {task.value: torch.zeros(()) for task in Task}
    shared_model(name).zero_grad()
    for batch in batches:
        losses = shared_model(name)(batch)
        combine(losses, WEIGHTS, counts).backward()
        for task, loss in losses.items():
            sums[task.value] = sums[task.value] + loss.sum.detach()
    return sums, {name: p.grad for name, p in shared_model(name).named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name in got.keys() | want.keys():
        # A module that didn't run has no gradient; one whose losses weigh nothing has a gradient of zero.
        zero = torch.zeros_like(got.get(name, want.get(name)))
        a, b = got.get(name, zero), want.get(name, zero)
        error, largest = float((a - b).abs().max()), float(b.abs().max())
        assert error <= TOLERANCE * largest + 1e-12, f"{name}: {error:.1e} of {largest:.1e}"


def branches_of(name: str, samples: list[Sample]) -> tuple[list[Branch], Pictures]:
    pictures, branches = Pictures(), []
    for sample in samples:
        branches += processor(name).branches(sample, pictures, {"truncated": 0})
    return branches, pictures


def alone(name: str, branch: Branch, pictures: Pictures) -> PackedBatch:
    """A branch as a batch of its own, with its own copy of the prefix."""
    own = Pictures()
    if branch.image is not None:
        own.images.append(pictures.images[branch.image])
        branch = replace(branch, image=0)
    if branch.target is not None and branch.target.source >= 0:
        branch = replace(branch, target=replace(branch.target, source=0))
    elif branch.target is not None:
        own.extra.append(pictures.extra[-branch.target.source - 1])
        branch = replace(branch, target=replace(branch.target, source=-1))
    return processor(name).assemble([branch], own, samples=1, next_position=0)


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


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(samples=sample_lists())
def test_packed_is_separate(name: str, samples: list[Sample]) -> None:
    branches, pictures = branches_of(name, samples)
    if not branches:
        return
    packed = processor(name).assemble(branches, pictures, samples=len(samples), next_position=0)
    singles = [alone(name, branch, pictures) for branch in branches]
    for got, want in zip(gradients(name, [packed]), gradients(name, singles), strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_packed_is_separate_with_everything_in_it(name: str) -> None:
    """The same with many conversations and all tasks, where most tokens are shared; no parameter is idle."""
    rng = np.random.default_rng(0)
    samples = [random_sample(rng, SIDE, position, conversations=3, turns=2) for position in range(3)]
    branches, pictures = branches_of(name, samples)
    packed = processor(name).assemble(branches, pictures, samples=len(samples), next_position=0)
    sums, grads = gradients(name, [packed])
    singles = [alone(name, branch, pictures) for branch in branches]
    assert len(singles) == 18 and packed.tokens < 0.9 * sum(batch.tokens for batch in singles)
    assert grads.keys() == {key for key, p in shared_model(name).named_parameters() if p.requires_grad}
    assert all(float(g.abs().max()) > 0 for g in grads.values())
    for got, want in zip((sums, grads), gradients(name, singles), strict=True):
        assert_same(got, want)


NEIGHBOURS = (
    {"position": 4, "conversations": 2, "valid": (0, 3, 16, 13)},
    {"position": 9, "conversations": 1, "picture": False},
    {"position": 5, "conversations": 1, "turns": 3, "tasks": (Task.PIXEL, Task.DEPTH)},
    {"position": 2, "conversations": 0},
)


@pytest.mark.parametrize("name", [*NAMES, "harmon, published"])
def test_a_sample_does_not_depend_on_its_neighbours(name: str) -> None:
    """The losses and gradients of a batch are those of its samples, each processed alone."""
    rng = np.random.default_rng(1)
    samples = [random_sample(rng, SIDE, **sample) for sample in NEIGHBOURS]
    name, _, published = name.partition(", ")
    process = processor(name)
    if published:
        process = HarmonProcessor(micro(), tokenizer(), seed=3, published=True)
    together, apart = [process(samples[::-1])], [process([sample]) for sample in samples]
    for got, want in zip(gradients(name, together), gradients(name, apart), strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("what", ["text only", "no conversation", "no drawing", "nothing"])
@pytest.mark.parametrize("name", NAMES)
def test_filler_weighs_nothing(name: str, what: str) -> None:
    """Every module runs, whatever the batch lacks; losses and gradients are those of the real branches."""
    rng = np.random.default_rng(2)
    sample = {
        "text only": random_sample(rng, SIDE, conversations=2, picture=False),
        "no conversation": random_sample(rng, SIDE, conversations=0),
        "no drawing": random_sample(rng, SIDE, tasks=()),
        "nothing": random_sample(rng, SIDE, conversations=0, picture=False),
    }[what]
    filled = processor(name)([sample])
    branches, pictures = branches_of(name, [sample])
    sums, grads = gradients(name, [filled])
    assert grads.keys() == {key for key, p in shared_model(name).named_parameters() if p.requires_grad}
    if branches:
        bare = processor(name).assemble(branches, pictures, samples=1, next_position=0)
        assert bare.counts == filled.counts
        for got, want in zip((sums, grads), gradients(name, [bare]), strict=True):
            assert_same(got, want)
    else:
        assert not any(filled.counts.values())
        assert not any(float(grad.abs().max()) for grad in grads.values())


def test_moving_a_batch_moves_its_tensors_only() -> None:
    batch = processor("harmon")([random_sample(np.random.default_rng(0), SIDE)])
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.source_index, batch.source_index)
    assert moved.plan is batch.plan and moved.counts == batch.counts
