"""Blocks computed again: the same training in less memory, and how much less is known beforehand."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.families import NAMES, fresh_model
from tests.memory import Tally
from tests.test_frozen import with_dropout
from tests.test_sync import batch_of
from tests.tiny_harmon import random_sample
from unimrg.config import EngineConfig, FamilyConfig, TrainConfig
from unimrg.errors import ConfigError
from unimrg.families import load_family
from unimrg.families.base import Family
from unimrg.families.blocks import POLICIES, activation_bytes
from unimrg.families.rows import PackedBatch
from unimrg.losses import combine
from unimrg.memory import choose_recompute, free_bytes, state_bytes
from unimrg.sample import Task

CPU = torch.device("cpu")


def total(model: Family, batch: PackedBatch) -> Tensor:
    return combine(model(batch), dict.fromkeys(Task, 1.0), batch.counts)


def outcome(model: Family, batch: PackedBatch, seed: int = 0) -> dict[str, Tensor]:
    """The loss and every gradient, with the dropout of that seed."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = total(model, batch)
    loss.backward()
    return {"loss": loss.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("name", NAMES)
def test_recomputing_changes_nothing(name: str) -> None:
    """Bit for bit, also what was dropped; with names and hooks as they were."""
    model, batch = with_dropout(name).train(), batch_of(name, from_codes=True)
    names, want = list(model.state_dict()), outcome(model, batch)
    assert not torch.equal(outcome(model, batch, seed=1)["loss"], want["loss"])
    for policy in (*POLICIES, "none"):
        model.prepare_blocks(policy)
        assert list(model.state_dict()) == names
        got = outcome(model, batch)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], value) for key, value in want.items()), policy


@pytest.mark.parametrize("name", NAMES)
def test_which_blocks_run_again(name: str) -> None:
    """In the forward pass all of them once; in the backward pass those of the policy."""
    model, batch = fresh_model(name).train(), batch_of(name, from_codes=True)
    runs: Counter[str] = Counter()
    for where, members in model.blocks().items():
        assert members, where
        for number, block in enumerate(members):
            inner = next(module for module in block.modules() if isinstance(module, torch.nn.Linear))
            inner.register_forward_pre_hook(lambda *_, key=f"{where}.{number}": runs.update([key]))
    total(model, batch).backward()
    once = dict(runs)
    for policy in POLICIES:
        model.prepare_blocks(policy)
        runs.clear()
        total(model, batch).backward()
        for key, number in once.items():
            again = policy == "full" or (policy == "selective" and int(key.rpartition(".")[2]) % 2 == 0)
            assert runs[key] == number * (1 + again), (policy, key)
        with torch.no_grad():
            runs.clear()
            model(batch)
        assert runs == once


def test_transformers_own_switch_is_the_same() -> None:
    model, batch = fresh_model("harmon").train(), batch_of("harmon", from_codes=True)
    want = outcome(model, batch)
    # transformers renames the methods between 5.17 and 5.23, and warns of the old names.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    kept = held(model, batch)
    getattr(model, f"{kind}_checkpointing_enable")()
    assert held(model, batch) < kept / 2
    got = outcome(model, batch)
    assert all(torch.equal(got[key], value) for key, value in want.items())
    getattr(model, f"{kind}_checkpointing_disable")()
    assert held(model, batch) == kept


def test_copies_are_on_their_own() -> None:
    """A copied model recomputes its own blocks, not those of its original."""
    model, batch = fresh_model("harmon").train(), batch_of("harmon", from_codes=True)
    model.prepare_blocks("full")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    want = outcome(fresh_model("harmon").train(), batch)
    got = outcome(other, batch)
    assert all(torch.equal(got[key], value) for key, value in want.items())


# -- memory --------------------------------------------------------------------------------------------------


def held(model: Family, batch: PackedBatch) -> int:
    """Bytes between the forward and the backward pass."""
    with Tally() as tally:
        loss = total(model, batch)
        left = tally.now
    loss.backward()
    return left


def tiny(name: str, samples: int = 2) -> tuple[Family, PackedBatch]:
    """The tiny variant, most of which is blocks, and a batch with three conversations a picture."""
    module, config = load_family(name), FamilyConfig(name=name)
    (model, tokenizer), side = module.build(config, seed=0), module.image_size(config)
    rng = np.random.default_rng(0)
    given = [random_sample(rng, side, position, conversations=3) for position in range(samples)]
    processor = module.processor(model, tokenizer, TrainConfig(), tuple(Task), 0)
    batch: PackedBatch = processor(given)
    return model.train(), batch


def block_rows(model: Family, batch: PackedBatch) -> dict[str, int]:
    """What really goes through each list of blocks: rows of the outputs of its first one."""
    rows: Counter[str] = Counter()
    handles = []
    for name, members in model.blocks().items():

        def count(module: Any, args: Any, output: Any, name: str = name) -> None:
            states = output[0] if isinstance(output, tuple) else output
            rows[name] += states.numel() // states.shape[-1]

        handles.append(members[0].register_forward_hook(count))
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    return dict(rows)


@pytest.mark.parametrize("name", NAMES)
def test_the_estimate_is_right_within_a_factor_of_one_and_a_half(name: str) -> None:
    """Of the most that a step takes beside weights and gradients, counted tensor by tensor.

    That is what lies between the passes, or more when a block is running again, as gradients begin to come.
    """
    model, batch = tiny(name)
    rows = block_rows(model, batch)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    found = {}
    for policy in POLICIES:
        model.prepare_blocks(policy)
        model.zero_grad()
        with Tally() as tally:
            loss = total(model, batch)
            between = tally.now
            loss.backward()
        found[policy] = max(between, tally.peak - gradients)
        estimate = activation_bytes(model.blocks(), rows, policy, element=4)
        assert 1 / 1.5 < estimate / found[policy] < 1.5, (policy, estimate, found)
    assert found["none"] > 1.5 * found["selective"] > 1.5 * found["full"]


@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_a_sample_are_bounded(name: str) -> None:
    """By little more than there are: prompts are shorter than is reckoned with, and fewer cells visible."""
    model, batch = tiny(name, samples=1)
    rows = block_rows(model, batch)
    bound = model.block_tokens(text=120)
    assert bound.keys() == rows.keys() == set(model.BLOCKS)
    for where, found in rows.items():
        assert found <= bound[where] <= 2 * found, (where, found, bound)
    model.freeze([part for part in model.PARTS if part == "vision"], tuple(Task))
    frozen = model.block_tokens(text=120)
    assert frozen == {where: 0 if "vision" in where else found for where, found in bound.items()}


TRAIN = TrainConfig(batch_size=8, accumulation=2)


def test_auto_takes_the_first_policy_that_fits(caplog: pytest.LogCaptureFixture) -> None:
    """More and more memory: all blocks recomputed, every second, none; the log says why."""
    model, config = tiny("harmon")[0], EngineConfig(name="torch")
    caplog.set_level(logging.INFO, logger="unimrg.memory")
    state = state_bytes(model, config, 4, 1)
    tokens = {name: 4 * each for name, each in model.block_tokens(TRAIN.max_text_tokens).items()}
    sizes = {policy: activation_bytes(model.blocks(), tokens, policy, 4) for policy in POLICIES}
    assert sizes["full"] < sizes["selective"] < sizes["none"]

    def choose(free: float, ranks: int = 1) -> str:
        return choose_recompute(model, TRAIN, config, 4, ranks, free)

    for policy, size in sizes.items():
        assert choose(state + size / 0.7 + 10) == policy
    assert choose(state + sizes["full"]) == choose(0) == "full"
    # Two ranks share the samples.
    assert choose(state + sizes["none"] / 0.7 / 2 + 10, ranks=2) == "none"
    assert caplog.messages[0].startswith("activation checkpointing none: 0.")


def test_what_a_worker_keeps_whatever_the_batch() -> None:
    """Per parameter 16 bytes, or 18 with what is computed with; sharded what a stage shards."""
    model = fresh_model("showo").train()
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert every > trained
    plain, deep = EngineConfig(name="torch"), EngineConfig(name="deepspeed")
    assert state_bytes(model, plain, 4, 4) == 4 * every + 12 * trained
    assert state_bytes(model, plain, 2, 4) == 6 * every + 12 * trained
    offloaded = replace(deep, zero_stage=2, offload=True)
    assert state_bytes(model, offloaded, 2, 4) == 2 * every + 0.5 * trained
    stages = [state_bytes(model, replace(deep, zero_stage=stage), 2, 4) for stage in (1, 2, 3)]
    assert stages == [
        2 * every + 2 * trained + 3 * trained,
        2 * every + 0.5 * trained + 3 * trained,
        0.5 * every + 0.5 * trained + 3 * trained,
    ]


def test_free_memory_is_that_of_the_machine() -> None:
    model = fresh_model("harmon")
    own = sum(p.numel() * 4 for p in model.parameters())
    one, four = free_bytes(CPU, model, 1), free_bytes(CPU, model, 4)
    assert 2**28 < one < 2**43 and own < four < one / 3


@pytest.mark.parametrize("value", [True, "true", "half"])
def test_what_is_no_policy_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^engine\.activation_checkpointing: unknown value"):
        EngineConfig(activation_checkpointing=value).check()
