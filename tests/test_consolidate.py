"""A trained model written file by file equals what the library writes, however it was spread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from tests import families
from tests.engine_runs import CPU, Group, engine_config, train_config
from unimrg.config import LoraConfig
from unimrg.consolidate import save_adapters, save_model
from unimrg.engine import make_engine
from unimrg.lora import adapt, merged, save_adapter
from unimrg.sample import Task
from unimrg.weights import load_folder, read_state_dict

FILE_BYTES = 20_000
RUNS: dict[str, dict[str, Any]] = {
    "zero2": {"engine": "zero2"},
    "zero3": {"engine": "zero3"},
    "zero3-bfloat16": {"engine": "zero3", "precision": "bfloat16"},
    "zero3-average": {"engine": "zero3", "ema": 0.5},
    "zero3-adapters": {"engine": "zero3", "rank": 2},
    "zero2-adapters-average": {"engine": "zero2", "rank": 2, "ema": 0.5},
    "torch-average": {"engine": "torch", "ema": 0.5},
}


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Group:
    folder = tmp_path_factory.mktemp("consolidated")
    plan = {
        name: ("consolidate", {"folder": str(folder / name), "file_bytes": FILE_BYTES} | changes)
        for name, changes in RUNS.items()
    }
    return Group(folder / "group", 2, plan).wait()


@pytest.fixture
def quiet() -> Any:
    disable_progress_bar()
    yield
    enable_progress_bar()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", families.NAMES)
def test_every_family_is_written_as_the_library_does(name: str, rank: int, tmp_path: Path) -> None:
    """Byte for byte: one file, and several with their index; adapters are merged."""
    model = families.fresh_model(name)
    model.freeze((), tuple(Task))
    adapt(model, LoraConfig(rank=rank), tuple(Task), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    engine = make_engine(model, train_config(), engine_config("torch"), CPU)
    state = merged(model, model.state_dict())
    for size in (2**30, FILE_BYTES):
        model.save_pretrained(
            tmp_path / f"expected-{size}",
            state_dict=dict(state),
            max_shard_size=size,
            save_original_format=False,
        )
        save_model(engine, tmp_path / f"found-{size}", size)
        found, expected = contents(tmp_path / f"found-{size}"), contents(tmp_path / f"expected-{size}")
        index = "model.safetensors.index.json"
        assert (index in found) == (size == FILE_BYTES)
        if index in found:
            listed, known = json.loads(found.pop(index)), json.loads(expected.pop(index))
            assert listed["weight_map"] == known["weight_map"]
            assert listed["metadata"]["total_size"] == known["metadata"]["total_size"]
        assert found == expected
    assert save_adapters(engine, tmp_path / "adapter") == bool(rank)
    if rank:
        assert save_adapter(model, model.state_dict(), tmp_path / "whole")
        assert contents(tmp_path / "adapter") == contents(tmp_path / "whole")
    loaded = load_folder(type(model), tmp_path / f"found-{FILE_BYTES}").state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


def owned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the name that is tied to another one."""
    return {name: tensor for name, tensor in state.items() if name != "llm.lm_head.weight"}


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_write_the_model_that_they_trained(group: Group, run: str) -> None:
    saw = group.result(run)
    folder = group.folder.parent / run
    found, expected = read_state_dict(folder / "model"), owned(saw["merged"])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert saw["adapted"] == (folder / "adapter").exists() == ("adapters" in run)


@pytest.mark.parametrize("run", RUNS)
def test_no_rank_holds_more_than_a_file(group: Group, run: str) -> None:
    """Of what it asked for: rank 0 one file with what is merged into it, the other rank nothing."""
    files = list((group.folder.parent / run / "model").glob("*.safetensors"))
    assert len(files) > 3
    largest = max(tensor.nbytes for tensor in group.result(run)["merged"].values())
    assert 0 < max(group.result(run)["asked"]) <= 1.5 * max(FILE_BYTES, largest)
    assert not any(group.result(run, rank=1)["asked"])
