"""ZeRO-3 makes a model of which no worker ever holds the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.bench.presets import MIDDLES
from tests.engine_runs import Group
from unimrg.families.harmon import Harmon

RANKS = 2


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a model of a hundred million parameters, all 0."""
    folder = tmp_path_factory.mktemp("stored")
    config = MIDDLES["harmon"]()
    with torch.device("meta"):
        shapes = Harmon(config).state_dict()
    tied = Harmon._tied_weights_keys
    zeros = {name: torch.zeros(tensor.shape) for name, tensor in shapes.items() if name not in tied}
    save_file(zeros, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    return folder


def test_no_rank_ever_holds_the_whole_model(stored: Path, tmp_path: Path) -> None:
    """A rank grows by its own half and a few parameters, from a file that it only maps."""
    group = Group(tmp_path / "group", RANKS, {"shard": ("shard_folder", {"folder": str(stored)})}).wait()
    for rank in range(RANKS):
        saw = group.result("shard", rank)
        assert saw["size"] / RANKS <= saw["held"] <= 1.01 * saw["size"] / RANKS
        assert saw["held"] <= saw["grown"] <= 0.95 * saw["size"]
