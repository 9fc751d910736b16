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


def store(folder: Path, precision: str, published: bool) -> None:
    """A model of a hundred million parameters, every one 0.5."""
    config = MIDDLES["harmon"]()
    with torch.device("meta"):
        shapes = Harmon(config).state_dict()
    tied = Harmon._tied_weights_keys
    state = {
        name: torch.full(tensor.shape, 0.5, dtype=getattr(torch, precision))
        for name, tensor in shapes.items()
        if name not in tied
    }
    if published:
        torch.save({n: t for n, t in state.items() if not n.startswith("vae.")}, folder / "harmon.pth")
        torch.save({n: t for n, t in state.items() if n.startswith("vae.")}, folder / "kl16.ckpt")
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


@pytest.mark.parametrize("published", [False, True], ids=["folder", "published"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_rank_ever_holds_the_whole_model(precision: str, published: bool, tmp_path: Path) -> None:
    """A rank grows by its own half and a few parameters, from a file that it only maps."""
    store(tmp_path, precision, published)
    given = {"folder": str(tmp_path), "published": published}
    group = Group(tmp_path / "group", RANKS, {"shard": ("shard_stored", given)}).wait()
    for rank in range(RANKS):
        saw = group.result("shard", rank)
        assert saw["size"] / RANKS <= saw["held"] <= 1.01 * saw["size"] / RANKS
        assert saw["held"] <= saw["grown"] <= 0.95 * saw["size"]
        assert saw["values"] == {0.5}
