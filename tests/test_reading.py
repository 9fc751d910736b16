"""The last block run only where it is read: the same losses and gradients, and less to compute."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.families import NAMES, fresh_model, shared_model
from tests.test_blocks import outcome
from tests.test_sync import batch_of
from unimrg.families.base import Family
from unimrg.families.reading import spread
from unimrg.families.rows import PackedBatch

TRUNK = {
    "harmon": ("llm.model.layers", "states"),
    "showo": ("showo.model.layers", "hidden"),
    "openuni": ("lmm.model.language_model.layers", "states"),
    "janus": ("janus.model.language_model.layers", "hidden"),
}
"""Its blocks, and the family's method that runs them."""


def rows_read(name: str, batch: PackedBatch) -> Tensor:
    index = {"harmon": "hidden_index", "showo": "loss_index", "openuni": "query_index", "janus": "code_index"}
    return torch.cat([batch.label_index, getattr(batch, index[name])])


def read_everything(name: str, patch: pytest.MonkeyPatch) -> None:
    """From here on the family runs all rows through its last block."""
    kind, method = type(shared_model(name)), TRUNK[name][1]
    original = getattr(kind, method)
    patch.setattr(kind, method, lambda self, batch, given, read=None: original(self, batch, given))


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_changes(name: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = fresh_model(name).train(), batch_of(name, from_codes=True)
    model.prepare_blocks(policy)
    got = outcome(model, batch)
    read_everything(name, monkeypatch)
    want = outcome(model, batch)
    assert got.keys() == want.keys()
    for key, value in want.items():
        bound = 1e-6 * float(value.abs().max()) + 1e-12
        torch.testing.assert_close(got[key], value, rtol=0, atol=max(bound, 1e-7), msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_states_are_those_of_the_whole(name: str) -> None:
    model, batch = shared_model(name), batch_of(name, from_codes=True)
    read = rows_read(name, batch)
    assert len(read.unique()) == len(read) < batch.tokens  # each once, or its gradient would count twice
    some, whole = (states(name, model, batch, rows) for rows in (read, None))
    torch.testing.assert_close(some[read], whole[read], rtol=0, atol=1e-6)
    unread = torch.ones(batch.tokens, dtype=torch.bool).index_fill(0, read, False)
    assert not some[unread].any() and whole[unread].any()


@torch.no_grad()
def states(name: str, model: Any, batch: Any, read: Tensor | None) -> Tensor:
    if name == "harmon":
        found: Tensor = model.states(batch, model.codes_of(batch), read).hidden
    elif name == "openuni":
        found = model.states(batch, model.embed_pictures(batch.images), read)
    else:
        codes = model.codes_of(batch, batch.target_source)
        codes = model.target_codes(batch) if name == "showo" else codes
        found = model.hidden(batch, codes, read)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_what_each_block_computes(name: str) -> None:
    """Every row, but for the last one's MLP, which sees those that are read."""
    model, batch = fresh_model(name), batch_of(name, from_codes=True)
    seen: dict[str, int] = defaultdict(int)
    blocks = model.blocks()[TRUNK[name][0]]
    for number, block in enumerate(blocks):
        for part in ("self_attn.k_proj", "mlp"):
            linear = next(m for m in block.get_submodule(part).modules() if isinstance(m, torch.nn.Linear))
            key = f"{number}.{part}"
            linear.register_forward_hook(lambda m, a, out, key=key: seen.update({key: out.shape[-2]}))
    model(batch)
    every = dict.fromkeys(seen, batch.tokens)
    assert len(every) == 2 * len(blocks)
    assert seen == every | {f"{len(blocks) - 1}.mlp": len(rows_read(name, batch))}


@pytest.mark.parametrize("name", NAMES)
def test_what_it_saves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's counter: for every row that isn't read, the output projection and the MLP of one block."""
    model, batch = shared_model(name), batch_of(name, from_codes=True)
    block = model.blocks()[TRUNK[name][0]][-1]
    some = flops(model, batch)
    read_everything(name, monkeypatch)
    whole = flops(model, batch)
    output = next(n for n in ("self_attn.o_proj", "self_attn.dense") if n in dict(block.named_modules()))
    behind = [*block.get_submodule("mlp").modules(), block.get_submodule(output)]
    weights = sum(module.weight.numel() for module in behind if isinstance(module, torch.nn.Linear))
    assert whole - some == 2 * weights * (batch.tokens - len(rows_read(name, batch)))


@torch.no_grad()
def flops(model: Family, batch: PackedBatch) -> int:
    with FlopCounterMode(display=False) as counter:
        model(batch)
    found: int = counter.get_total_flops()
    return found


def test_spread() -> None:
    rows = torch.tensor([3, 0])
    states = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    whole = spread(states, rows, 4)
    assert whole.tolist() == [[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [1.0, 2.0]]
    whole[3].sum().backward()
    assert states.grad is not None and states.grad.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert spread(states, None, 2) is states
