"""What isn't trained runs as in use, whatever `train()` is told: no dropout, no statistics, no gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.families import NAMES, fresh_model
from tests.test_sync import batch_of
from unimrg.families.base import Family
from unimrg.sample import Task


def modules_with_weights(model: Family) -> Iterator[tuple[str, nn.Module, bool]]:
    """Name, module, and whether any of its parameters is trained."""
    for name, module in model.named_modules():
        trained = [parameter.requires_grad for parameter in module.parameters()]
        if trained:
            yield name, module, any(trained)


def with_dropout(name: str) -> Family:
    """Half of everything is dropped wherever the model has a place for it."""
    model = fresh_model(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        if hasattr(module, "attn_dropout"):
            module.attn_dropout = 0.5
    return model


def losses(model: Family, name: str, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.stack([loss.sum.detach() for loss in model(batch_of(name, from_codes=False)).values()])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_never_trained_has_no_gradient_mode(name: str) -> None:
    """The autoencoder or tokenizer of pictures (and CLIP, where it is): in use, and under no-grad."""
    model = fresh_model(name).train()
    ran: list[str] = []

    def look(module: nn.Module, args: Any) -> None:
        ran.append(type(module).__name__)
        assert not module.training and not torch.is_grad_enabled()

    for _, module, trained in modules_with_weights(model):
        if not trained and not list(module.children()):
            module.register_forward_pre_hook(look)
    model(batch_of(name, from_codes=False))
    assert len(ran) > 5


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_part_stays_as_in_use(name: str) -> None:
    """One part more at every turn; `freeze` sees to it, and `train` keeps it so."""
    model = fresh_model(name).train()
    for part in model.PARTS:
        model.freeze([part], tuple(Task))
        for _ in range(2):
            for where, module, trained in modules_with_weights(model):
                assert module.training is trained, where
                assert trained or not any(inner.training for inner in module.modules()), where
            model.train()
        frozen = {parameter.requires_grad for owner, parameter in model.named_parts() if owner == part}
        assert frozen <= {False}  # Show-o without CLIP has no projector
    model.eval()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_dropped_in_frozen_parts(name: str) -> None:
    model = with_dropout(name).train()
    assert not torch.equal(losses(model, name, 0), losses(model, name, 1))
    model.freeze(model.PARTS, tuple(Task))
    assert torch.equal(losses(model.train(), name, 0), losses(model, name, 1))
