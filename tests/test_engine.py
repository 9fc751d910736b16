"""Worker equivalence with the real engines: the update doesn't depend on processes, accumulation or sharding.

Compared are the parameters after three steps of clipped AdamW. Its eps is 1e-4 there: with 1e-8 it would turn
rounding errors of gradients that are zero in theory (the biases of attention keys) into whole steps.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine_runs import CPU, ENGINES, Group, engine_config, train_config
from tests.tiny_harmon import micro, random_model
from unimrg.config import EngineConfig
from unimrg.engine import choose_precision, import_deepspeed, make_engine
from unimrg.errors import MissingExtraError
from unimrg.families.harmon.checkpoint import from_folder
from unimrg.sample import Task
from unimrg.schedule import cosine_with_warmup

ONLY_DRAWING = ("mar.decoder_", "mar.mask_token", "mar.diffusion_pos_embed", "mar.diffloss", "proj_out.")
FROZEN = ("vae.", "mar.class_emb.")
OFFLOADED = ("zero1-offload", "zero2-offload", "zero3-offload")
RUNS = [(ranks, f"{name}-{micros}") for ranks in (1, 2) for name in ENGINES for micros in (1, 2)]
RUNS += [(2, f"{name}-2") for name in OFFLOADED]
BALANCED = [("torch", name) for name in ("uncertainty", "gradnorm", "famo")]
BALANCED += [(engine, name) for engine in ("zero2", "zero3") for name in ("uncertainty", "famo")]


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Group]:
    """A group of one process and a group of two, at the same time, through all runs of this file."""
    folder = tmp_path_factory.mktemp("engines")
    equal: dict[str, Any] = {
        f"{name}-{micros}": ("train", {"engine": name, "accumulation": micros})
        for name in ENGINES
        for micros in (1, 2)
    }
    alone, two = dict(equal), dict(equal)
    two["zero3-1"] = ("train", {"engine": "zero3", "export": str(folder / "model")})
    for name in ENGINES:
        two[f"{name}-decay"] = ("decay", {"engine": name})
        two[f"{name}-clipped"] = ("clipped", {"engine": name})
        two[f"{name}-understanding"] = ("train", {"engine": name, "understanding_only": True})
    for name in OFFLOADED:
        two[f"{name}-2"] = ("train", {"engine": name, "accumulation": 2})
    for name, balance in BALANCED:
        two[f"{name}-{balance}"] = ("train_balanced", {"engine": name, "balance": balance})
        if name == "torch":
            alone[f"{name}-{balance}"] = two[f"{name}-{balance}"]
    for name in ("torch", "zero2"):
        alone[f"{name}-bfloat16"] = ("train", {"engine": name, "precision": "bfloat16"})
    started = {1: Group(folder / "one", 1, alone), 2: Group(folder / "two", 2, two)}
    return {ranks: group.wait() for ranks, group in started.items()}


@pytest.fixture(scope="module")
def initial() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in random_model(micro()).state_dict().items()}


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name] - tensor).abs().max().item()
        assert error <= 1e-6 + 1e-5 * tensor.abs().max().item(), f"{name} is off by {error}"


@pytest.mark.parametrize(("ranks", "run"), RUNS)
def test_equivalence(groups: dict[int, Group], initial: dict[str, Tensor], ranks: int, run: str) -> None:
    """8 samples a step as 1 x 8, 1 x 2 x 4, 2 x 4 and 2 x 2 x 2: one training."""
    expected, found = groups[1].result("torch-1"), groups[ranks].result(run)
    assert_same_weights(found["weights"], expected["weights"])
    for mine, reference in zip(found["steps"], expected["steps"], strict=True):
        assert mine["losses"] == pytest.approx(reference["losses"], rel=1e-5)
        assert mine["total"] == pytest.approx(reference["total"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
        for key in ("step", "position", "samples", "truncated"):
            assert mine[key] == reference[key]
    # The bound above would be worth little if nothing moved.
    moved = {name for name, tensor in expected["weights"].items() if not torch.equal(tensor, initial[name])}
    assert moved == {name for name in initial if not name.startswith(FROZEN)}


def test_the_runs_are_hard_ones(groups: dict[int, Group]) -> None:
    """Clipping acts in every step, tasks are missing in some, the learning rate falls along its cosine."""
    steps = groups[1].result("torch-1")["steps"]
    assert all(step["grad_norm"] > train_config().clip for step in steps)
    assert [set(step["losses"]) for step in steps] == [set(Task), set(Task), set(Task) - {Task.SEGMENTATION}]
    assert [step["learning_rate"] for step in steps] == pytest.approx([0.01, 0.0075, 0.0025])


@pytest.mark.parametrize("name", ENGINES)
def test_all_engines_report_the_same_learning_rates(groups: dict[int, Group], name: str) -> None:
    steps = groups[2].result(f"{name}-2")["steps"]
    assert [step["learning_rate"] for step in steps] == pytest.approx([0.01, 0.0075, 0.0025])


@pytest.mark.parametrize("name", ENGINES)
def test_frozen_parts_stay_bit_identical(
    groups: dict[int, Group], initial: dict[str, Tensor], name: str
) -> None:
    for run, frozen in ((f"{name}-1", FROZEN), (f"{name}-understanding", FROZEN + ONLY_DRAWING)):
        weights = groups[2].result(run)["weights"]
        still = {key for key, tensor in weights.items() if torch.equal(tensor, initial[key])}
        assert still == {key for key in initial if key.startswith(frozen)}


@pytest.mark.parametrize(("engine", "balance"), BALANCED)
def test_balancing_moves_the_weights_alike(groups: dict[int, Group], engine: str, balance: str) -> None:
    """Two ranks, sharded or not, as one process: what a balancer learns from is global."""
    expected, found = groups[1].result(f"torch-{balance}"), groups[2].result(f"{engine}-{balance}")
    for mine, reference in zip(found["steps"], expected["steps"], strict=True):
        assert mine["weights"] == pytest.approx(reference["weights"], rel=1e-4)
        assert mine["losses"] == pytest.approx(reference["losses"], rel=1e-4)
    assert found["steps"][0]["weights"] != pytest.approx(found["steps"][2]["weights"], rel=1e-3)
    assert (
        groups[2].result(f"{engine}-{balance}", rank=1)["steps"][2]["weights"] == found["steps"][2]["weights"]
    )


@pytest.mark.parametrize("name", ENGINES)
def test_understanding_only(groups: dict[int, Group], name: str) -> None:
    found, expected = (groups[2].result(f"{n}-understanding") for n in (name, "torch"))
    assert all(set(step["losses"]) <= {Task.UNDERSTANDING} for step in found["steps"])
    assert_same_weights(found["weights"], expected["weights"])


@pytest.mark.parametrize("name", ENGINES)
def test_weight_decay_spares_biases_norms_and_the_diffusion_head(
    groups: dict[int, Group], initial: dict[str, Tensor], name: str
) -> None:
    """All gradients are zero: what decays shrinks by 1 - 0.1 * 0.5, the rest keeps every bit."""
    weights = groups[2].result(f"{name}-decay")["weights"]
    for key, tensor in weights.items():
        spared = tensor.ndim == 1 or key.endswith("bias") or "diffloss" in key or key.startswith(FROZEN)
        expected = initial[key] if spared else initial[key] * 0.95
        torch.testing.assert_close(tensor, expected, rtol=0 if spared else 1e-6, atol=0)


@pytest.mark.parametrize("name", ENGINES)
def test_clipping_is_over_the_global_norm(
    groups: dict[int, Group], initial: dict[str, Tensor], name: str
) -> None:
    """The update is the gradient: all parameters together are as long as the bound."""
    weights = groups[2].result(f"{name}-clipped")["weights"]
    del weights["llm.lm_head.weight"]  # tied: counts once
    squares = sum((tensor - initial[key]).double().square().sum().item() for key, tensor in weights.items())
    assert math.sqrt(squares) == pytest.approx(train_config().clip, rel=1e-3)


def test_the_exported_folder_is_the_trained_model(groups: dict[int, Group], tmp_path: Path) -> None:
    """ZeRO-3 on two ranks: gathered, tied parameters saved once, no buffers that files don't carry."""
    folder = groups[2].folder.parent / "model"
    loaded = from_folder(folder).state_dict()
    assert_same_weights(loaded, groups[1].result("torch-1")["weights"])
    numbers = sum(tensor.numel() for name, tensor in loaded.items() if name != "llm.lm_head.weight")
    assert (folder / "model.safetensors").stat().st_size < numbers * 4 * 1.2


def test_only_rank_0_gets_the_weights(groups: dict[int, Group]) -> None:
    for name in ENGINES:
        assert groups[2].result(f"{name}-1", rank=1)["weights"] == {}
        weights = groups[2].result(f"{name}-1")["weights"]
        tied = weights["llm.lm_head.weight"], weights["llm.model.embed_tokens.weight"]
        assert tied[0].data_ptr() == tied[1].data_ptr()


def test_engines_are_silent_and_need_no_compiler(groups: dict[int, Group]) -> None:
    """The groups' PATH is an empty folder, so DeepSpeed could neither find g++ nor ninja."""
    assert [said for group in groups.values() for said in group.said] == ["", "", ""]
    assert not any((group.folder / "extensions").exists() for group in groups.values())


# -- bfloat16 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("torch", torch.float32), ("zero2", torch.bfloat16)])
def test_bfloat16(groups: dict[int, Group], name: str, dtype: torch.dtype) -> None:
    """Plain torch computes in bfloat16, DeepSpeed holds its weights in it; neither rounds the frequencies."""
    exact, found = groups[1].result("torch-1"), groups[1].result(f"{name}-bfloat16")
    for mine, reference in zip(found["steps"], exact["steps"], strict=True):
        assert mine["losses"] == pytest.approx(reference["losses"], rel=0.03)
        assert mine["grad_norm"] == pytest.approx(reference["grad_norm"], rel=0.05)
    assert {tensor.dtype for tensor in found["weights"].values()} == {dtype}
    assert torch.equal(found["frequencies"], exact["frequencies"])


def test_auto_precision_is_bfloat16_on_gpus_only() -> None:
    auto = EngineConfig()
    assert choose_precision(auto, CPU) is torch.float32
    assert choose_precision(auto, torch.device("cuda", 0)) is torch.bfloat16
    assert choose_precision(EngineConfig(precision="float32"), torch.device("cuda", 0)) is torch.float32


# -- alone ---------------------------------------------------------------------------------------------------


def test_schedule() -> None:
    """Up along a line, down along half a cosine; the last step still learns something."""
    rates = [cosine_with_warmup(step, total=10, warmup=3) for step in range(11)]
    assert rates[:4] == pytest.approx([1e-5, (1 + 1e-5) / 2, 1, 1])
    assert rates[3:] == pytest.approx([(1 + math.cos(math.pi * n / 7)) / 2 for n in range(8)])
    assert rates[9] > 0.01 and rates[10] == 0
    assert cosine_with_warmup(0, total=4, warmup=1) == 1
    assert cosine_with_warmup(99, total=4, warmup=0) == 0


def test_a_warm_up_is_rounded_up() -> None:
    engine = make_engine(random_model(micro()), train_config(10, warmup=0.11), engine_config("torch"), CPU)
    rates = []
    for engine.steps_done in range(1, 5):
        rates.append(engine.learning_rate())
    assert rates == pytest.approx([1e-7, 0.01, 0.01, 0.01 * (1 + math.cos(math.pi / 8)) / 2])


def test_deepspeed_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(MissingExtraError, match=r"deepspeed: pip install"):
        import_deepspeed(CPU)
