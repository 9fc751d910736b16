"""The host never waits inside a step: nothing there reads a device's tensor, or brings it one of the host's.

Seen three ways: in the source; by a run on torch's meta device, whose tensors have no values to read and
differ in their device from the host's, as a GPU's do; and on a GPU, where there is one, by CUDA itself.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine_runs import coded
from tests.families import NAMES, SIDE, fresh_model, processor, shared_model
from tests.tiny_harmon import random_sample
from unimrg.config import EngineConfig, TrainConfig
from unimrg.engine import make_engine
from unimrg.families import vocabulary
from unimrg.families.base import Family
from unimrg.families.rows import PackedBatch
from unimrg.loop import train_step
from unimrg.losses import combine
from unimrg.sample import Task

SOURCE = Path(__file__).parent.parent / "unimrg"
META = torch.device("meta")

# -- the source ----------------------------------------------------------------------------------------------

STEP = (
    "losses.py",
    "attention.py",
    "families/base.py",
    "families/harmon/model.py",
    "families/harmon/mar.py",
    "families/harmon/diffusion.py",
    "families/harmon/process.py",
    "families/harmon/vae.py",
    "families/showo/model.py",
    "families/showo/magvit.py",
    "families/showo/pixels.py",
    "families/openuni/model.py",
    "families/openuni/connector.py",
    "families/janus/model.py",
)
"""Modules of which a step runs."""

READING = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "unique", "bincount", "argwhere"}
MAKING = {"tensor", "as_tensor", "from_numpy"}
NUMBERS = {"float", "int", "bool"}

ALLOWED = {
    "families/base.py": {"grey_codes", "reads_pixels"},
    "families/harmon/mar.py": {"count_visible"},  # of the dense form with a mask, which only drawing uses
    "families/harmon/process.py": {"cosine_betas", "timestep_map", "_tables64"},  # once per device
    "families/openuni/model.py": {"_shift"},  # once per device
    "families/showo/pixels.py": {"resize"},  # in the processor
}
"""Functions that may read or make tensors, because no step calls them, or only the first one."""


def waiting_calls(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, str]]:
    """(innermost named function, what it calls) for every call that makes the host wait for a device."""
    for node in ast.iter_child_nodes(tree):
        where = node.name if isinstance(node, ast.FunctionDef) else inside
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Attribute):
                by_torch = isinstance(called.value, ast.Name) and called.value.id == "torch"
                if called.attr in READING or (called.attr in MAKING and by_torch):
                    yield inside, called.attr
            elif isinstance(called, ast.Name) and called.id in NUMBERS:
                yield inside, called.id
        yield from waiting_calls(node, where)


@pytest.mark.parametrize("name", STEP)
def test_no_source_of_a_step_waits(name: str) -> None:
    found = set(waiting_calls(ast.parse((SOURCE / name).read_text("utf-8"))))
    allowed = ALLOWED.get(name, set()) | {"__init__"}
    assert {(function, call) for function, call in found if function not in allowed} == set()


def test_every_family_is_looked_at() -> None:
    assert {f"families/{name}/model.py" for name in NAMES} <= set(STEP)


# -- a run without values ------------------------------------------------------------------------------------


class NoTraffic(TorchDispatchMode):
    """Raises AssertionError when an operation has tensors of the host and of the other device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # A tensor without dimensions travels with the launch of its operation.
        tensors = [t for t in (*args, out) if isinstance(t, Tensor) and (t.ndim or t.device == META)]
        devices = {tensor.device.type for tensor in tensors}
        assert len(devices) < 2, f"{func} moves {[list(tensor.shape) for tensor in tensors]}"
        return out


def batch_of(name: str, from_codes: bool) -> PackedBatch:
    """All tasks, several shapes: two conversations, text alone, padding, and a missing drawing."""
    rng = np.random.default_rng(0)
    samples = [
        random_sample(rng, SIDE, 0, conversations=2),
        random_sample(rng, SIDE, 1, picture=False),
        random_sample(rng, SIDE, 2, tasks=(Task.DEPTH,), valid=(0, 4, SIDE, SIDE)),
    ]
    made = processor(name)
    if from_codes:
        made.grey_codes = shared_model(name).grey_codes()
        samples = [coded(sample, shared_model(name)) for sample in samples]
    batch: PackedBatch = made(samples)
    return batch


def train(model: Family, batch: PackedBatch) -> None:
    """Forward, backward."""
    combine(model(batch), dict.fromkeys(Task, 1.0), batch.counts).backward()


@pytest.fixture
def without_values(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, PackedBatch], Family]:
    """A model on the meta device; it draws its noise on the CPU, as generators have to be somewhere."""

    def build(name: str, batch: PackedBatch) -> Family:
        model = fresh_model(name)
        if hasattr(model, "draw_noise"):
            noise = [tensor.to(META) for tensor in model.draw_noise(batch)]
            monkeypatch.setattr(model, "draw_noise", lambda batch: noise)
        # There is no autocast for this device; what is tested doesn't depend on it.
        autocast = torch.autocast
        monkeypatch.setattr(
            torch,
            "autocast",
            lambda kind, *args, **kwargs: (
                contextlib.nullcontext() if kind == "meta" else autocast(kind, *args, **kwargs)
            ),
        )
        return model.train().to(META)

    return build


@pytest.mark.parametrize("from_codes", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_neither_reads_values_nor_moves_them(
    name: str,
    from_codes: bool,
    without_values: Callable[[str, PackedBatch], Family],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From pixels, and from codes with everything computed again in the backward pass."""
    batch = batch_of(name, from_codes)
    model, there = without_values(name, batch), batch.to(META)
    if from_codes:
        model.prepare_blocks("full")
        monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", 2000)
    train(model, there)  # the first step fills tables that stay on the device
    with NoTraffic():
        train(model, there)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.tolist(),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]).to(x.device),
        lambda x: x.index_select(0, torch.arange(3)),
    ],
)
def test_that_run_would_notice(waits: Callable[[Tensor], Any]) -> None:
    with NoTraffic(), pytest.raises((AssertionError, NotImplementedError, RuntimeError)):
        waits(torch.empty(3, device=META))


def test_a_batch_takes_its_plan_along() -> None:
    """What attention makes of the plan is there before the step begins."""
    batch = batch_of("harmon", from_codes=False)
    there = batch.to(META)
    with NoTraffic():
        assert there.plan.layout(META).key_index.device == META
    assert all(
        getattr(there, f.name).device == META
        for f in dataclasses.fields(there)
        if isinstance(getattr(there, f.name), Tensor)
    )


# -- a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("from_codes", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_cuda_sees_no_synchronisation(name: str, from_codes: bool) -> None:
    """`set_sync_debug_mode` raises where the host waits for the device, copies of batches included."""
    device = torch.device("cuda", 0)
    batch = batch_of(name, from_codes)
    model = fresh_model(name).train().to(device)
    model.prepare_blocks("full" if from_codes else "none")
    with torch.autocast("cuda", torch.bfloat16):
        train(model, batch.to(device))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            train(model, batch.to(device))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_sees_none_in_the_update_either() -> None:
    """A whole `train_step`: clipping, optimiser and moving average, over two micro-batches."""
    device = torch.device("cuda", 0)
    config = EngineConfig(name="torch", activation_checkpointing="none", compile="none")
    engine = make_engine(fresh_model("harmon").train(), TrainConfig(steps=2, ema=0.9), config, device)
    batches = [batch_of("harmon", from_codes=True) for _ in range(2)]
    train_step(engine, batches, dict.fromkeys(Task, 1.0))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, norm, _ = train_step(engine, batches, dict.fromkeys(Task, 1.0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert isinstance(norm, Tensor) and norm.is_cuda
