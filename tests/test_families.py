"""Every family learns as it did when its numbers were checked, on any number of workers, and after a stop.

The golden numbers (`python -m tests.golden.make_families`) are those of the micro models whose code agrees
with the published implementations (tests/parity): a change of any of them is a change of the training.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import families
from tests.engine_runs import BATCH, Group
from tests.families import NAMES, fresh_model
from tests.golden.make_families import CURVE, FOLDER, curve, first_step
from tests.tiny_harmon import random_sample

CHUNK = 2000  # elements of a head's logits at one time: three rows of most
OTHERS = tuple(name for name in NAMES if name != "harmon")  # Harmon's are in test_engine.py and test_loop.py


@lru_cache
def golden(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return loaded


@pytest.mark.parametrize("name", NAMES)
def test_first_step(name: str) -> None:
    """Losses, the norm of every gradient, and every parameter's length after one step of AdamW."""
    got, want = first_step(name), golden(name)["first_step"]
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-5)
    for key in ("gradient_norms", "parameters"):
        assert got[key].keys() == want[key].keys()
        wrong = {
            part: (got[key][part], value)
            for part, value in want[key].items()
            if abs(got[key][part] - value) > 1e-4 * abs(value) + 1e-6
        }
        assert not wrong, key


@pytest.mark.parametrize("name", NAMES)
def test_loss_curve(name: str) -> None:
    got, want = curve(name), golden(name)["curve"]
    assert len(want) == CURVE
    for step, (mine, reference) in enumerate(zip(got, want, strict=True)):
        assert mine == pytest.approx(reference, rel=1e-3), f"step {step}"
    assert want[-1]["total"] < want[0]["total"]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_from_pictures_are_scaled(name: str, tmp_path: Path) -> None:
    """Losses stay; gradients are linear in the factor, and it is saved with the model."""
    rng = np.random.default_rng(0)
    batch = families.processor(name)([random_sample(rng, families.SIDE, number) for number in range(2)])
    model = fresh_model(name).train()
    own = model.grad_scale
    assert own == (0.1 if name == "harmon" else 1)

    def gradients(scale: float) -> tuple[float, dict[str, torch.Tensor]]:
        model.set_grad_scale(scale)
        model.zero_grad()
        total = torch.stack([loss.sum for loss in model(batch).values()]).sum()
        total.backward()
        found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        return total.item(), found

    (all_of_it, full), (_, half), (_, none) = gradients(1), gradients(0.5), gradients(0)
    assert gradients(-1)[0] == all_of_it and model.grad_scale == 0
    for key, gradient in full.items():
        torch.testing.assert_close(half[key], (gradient + none[key]) / 2, rtol=1e-3, atol=1e-4)
    assert any((gradient - none[key]).abs().max() > 1e-3 for key, gradient in full.items())
    model.set_grad_scale(0.25)
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).grad_scale == 0.25


# -- processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Group]:
    folder = tmp_path_factory.mktemp("families")

    def kept(name: str, **rest: Any) -> tuple[str, dict[str, Any]]:
        return "interrupted", {"engine": "zero2", "family": name, "folder": str(folder / name), **rest}

    alone: dict[str, Any] = {name: ("train_any", {"engine": "torch", "family": name}) for name in NAMES}
    halves = {"engine": "zero2", "recompute": "selective"}
    sharded = {"engine": "zero3", "recompute": "full", "logits": CHUNK}
    two: dict[str, Any] = {name: ("train_any", {"family": name, **halves}) for name in OTHERS}
    two |= {f"{name}-zero3": ("train_any", {"family": name, **sharded}) for name in NAMES}
    two |= {f"{name}-whole": kept(name) for name in OTHERS}
    two |= {f"{name}-half": kept(name, stop_at=3) for name in OTHERS}
    started = [Group(folder / "alone", 1, alone), Group(folder / "two", 2, two)]
    done = {"alone": started[0].wait(), "two": started[1].wait()}
    rest = {name: kept(name, resume=True) for name in OTHERS}
    return done | {"rest": Group(folder / "rest", 2, rest).wait()}


def assert_same_training(got: dict[str, Any], want: dict[str, Any]) -> None:
    for mine, reference in zip(got["steps"], want["steps"], strict=True):
        assert mine["losses"] == pytest.approx(reference["losses"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
    assert got["weights"].keys() == want["weights"].keys()
    for key, tensor in want["weights"].items():
        error = (got["weights"][key] - tensor).abs().max().item()
        assert error <= 1e-6 + 1e-5 * tensor.abs().max().item(), f"{key} is off by {error}"


@pytest.mark.parametrize("run", [*OTHERS, *(f"{name}-zero3" for name in NAMES)])
def test_two_sharded_workers_are_one(groups: dict[str, Group], run: str) -> None:
    """With every second block recomputed; and with sharded parameters (zero3), all blocks recomputed, and
    logits in chunks, of which the ranks have different numbers."""
    name = run.removesuffix("-zero3")
    want = groups["alone"].result(name)
    assert_same_training(groups["two"].result(run), want)
    before = fresh_model(name).state_dict()
    parameters = fresh_model(name).named_parameters(remove_duplicate=False)
    trained = {key for key, p in parameters if p.requires_grad}
    moved = {key for key, tensor in want["weights"].items() if not torch.equal(tensor, before[key])}
    assert moved == trained


@pytest.mark.parametrize("name", OTHERS)
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(groups: dict[str, Group], name: str) -> None:
    whole, half = groups["two"].result(f"{name}-whole"), groups["two"].result(f"{name}-half")
    rest = groups["rest"].result(name)
    assert rest["position"] == 3 * BATCH
    for resumed, undisturbed in zip(half["steps"] + rest["steps"], whole["steps"], strict=True):
        for key in ("step", "losses", "total", "grad_norm", "position"):
            assert resumed[key] == undisturbed[key], (resumed["step"], key)
    assert all(torch.equal(rest["weights"][key], tensor) for key, tensor in whole["weights"].items())


def test_no_family_is_without_golden_numbers() -> None:
    assert {path.stem for path in Path(FOLDER).glob("*.json")} == set(NAMES)
