"""Compiled blocks: the same training, compiled a fixed number of times whatever the batches' lengths."""

from __future__ import annotations

import functools
import importlib.util
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from tests.engine_runs import engine_config, train_config
from tests.families import NAMES, SIDE, fresh_model, processor
from tests.test_blocks import outcome
from tests.tiny_harmon import random_sample
from unimrg.config import EngineConfig
from unimrg.engine import make_engine
from unimrg.errors import ConfigError
from unimrg.families.blocks import lacks_compiler
from unimrg.families.rows import PackedBatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
WARM = 3  # batches after which nothing is compiled any more


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batch(name: str, number: int) -> PackedBatch:
    """Other numbers of samples, texts, turns and drawings every time, so other lengths everywhere."""
    rng = np.random.default_rng(number)
    samples = [
        random_sample(rng, SIDE, 10 * number + n, conversations=1 + (number + n) % 3, turns=1 + number % 2)
        for n in range(2 + number % 3)
    ]
    made: PackedBatch = processor(name)(samples)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_compiled_again(name: str, recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks are traced as they would be compiled, and run as traced: the same numbers."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = fresh_model(name).train()
    plain = [outcome(model, batch(name, number)) for number in range(8)]
    names = list(model.state_dict())
    model.prepare_blocks(recompute, compiled=True)
    assert list(model.state_dict()) == names
    graphs = []
    for number, want in enumerate(plain):
        got = outcome(model, batch(name, number))
        graphs.append(counters["stats"]["unique_graphs"])
        assert got.keys() == want.keys()
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6, msg=key)
    lists = len(model.BLOCKS)
    assert lists <= graphs[0] and graphs[-1] == graphs[WARM - 1] <= 12 * lists, graphs
    # Attention alone may lie outside.
    outside = [reason for reason in counters["graph_break"] if "torch.compiler.disable" not in reason]
    assert all("method `get`" in reason for reason in outside), outside


def check_compiled(device: torch.device, name: str) -> None:
    model = fresh_model(name).train().to(device)
    plain = [outcome(model, batch(name, number).to(device)) for number in range(WARM)]
    model.prepare_blocks("selective", compiled=True)
    for number, want in enumerate(plain):
        got = outcome(model, batch(name, number).to(device))
        for key, value in want.items():
            bound = 1e-4 * float(value.abs().max()) + 1e-6
            torch.testing.assert_close(got[key], value, rtol=0, atol=bound, msg=key)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiled_on_the_cpu() -> None:
    check_compiled(CPU, "showo")


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_compiled_on_a_gpu(name: str) -> None:
    assert lacks_compiler(CUDA) == ""
    check_compiled(CUDA, name)


# -- who compiles --------------------------------------------------------------------------------------------


def compiled_blocks(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many blocks an engine on the CPU hands to the compiler."""
    asked: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: asked.append(forward) or forward)
    make_engine(fresh_model("harmon"), train_config(), config, CPU)
    return len(asked)


def test_a_cpu_compiles_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled_blocks(engine_config("torch"), monkeypatch) == 0
    blocks = sum(map(len, fresh_model("harmon").blocks().values()))
    told = EngineConfig(name="torch", compile="blocks")
    assert compiled_blocks(told, monkeypatch) == blocks - 1  # the language model's last one reads rows


def test_a_missing_compiler_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Told to compile it is an error; where it would only be faster, one line of the log."""
    from unimrg.engine import _compiles

    assert lacks_compiler(CPU) == ("" if shutil.which("g++") or shutil.which("clang++") else "a C compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"^engine\.compile is `blocks`, but a C compiler \(g\+\+ or"):
        _compiles(EngineConfig(name="torch", compile="blocks"), CPU)
    if importlib.util.find_spec("triton") is None:
        assert not _compiles(EngineConfig(), CUDA)
        assert caplog.messages == ["blocks run uncompiled, for want of the package triton"]
    caplog.set_level(logging.DEBUG)
    caplog.clear()
    assert not _compiles(EngineConfig(), CPU) and not _compiles(EngineConfig(compile="none"), CUDA)
    assert not _compiles(EngineConfig(zero_stage=3), CUDA) and not caplog.messages


def test_sharded_parameters_and_compiled_blocks_exclude_each_other() -> None:
    EngineConfig(zero_stage=2, compile="blocks").check()
    with pytest.raises(ConfigError, match="zero_stage 3 acts inside of them"):
        EngineConfig(zero_stage=3, compile="blocks").check()
    with pytest.raises(ConfigError, match=r"engine\.compile: unknown value 'all'"):
        EngineConfig(compile="all").check()
